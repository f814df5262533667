"""An open filesystem: names, attributes, contents, durability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from extfs.core.delegations import Delegations
from extfs.core.device import Device
from extfs.core.layouts import Layouts
from extfs.core.locks import Locks
from extfs.core.native import Closing, CoreError, JournalFullError, checked, ffi, lib
from extfs.core.records import Records
from extfs.core.values import (
    MEMORY_FIELDS,
    ROOT_INODE,
    STATS_FIELDS,
    Atime,
    Cred,
    Dirent,
    Extent,
    ExtentState,
    Memory,
    Mutant,
    Space,
    Stat,
    Stats,
    Superblock,
    cred_struct,
    stat_of,
    superblock_of,
)

_T = TypeVar("_T")
_ROOT = Cred()


def _flags(
    *, append: bool = False, dsync: bool = False, kill_priv: bool = False, nowait: bool = False
) -> int:
    return int(
        (lib.EXTFS_F_APPEND if append else 0)
        | (lib.EXTFS_F_DSYNC if dsync else 0)
        | (lib.EXTFS_F_KILL_PRIV if kill_priv else 0)
        | (lib.EXTFS_F_NOWAIT if nowait else 0)
    )


class Filesystem(Closing):
    """A mounted core. Leaving the ``with`` block closes it clean: committed and checkpointed."""

    def __init__(self, raw: Any, *, wait: bool = True, mount: bool = False) -> None:
        self._raw = raw
        self._wait = wait
        self._mount = mount

    @classmethod
    def open(
        cls,
        device: Device,
        *,
        read_only: bool = False,
        cache_bytes: int = 0,
        inode_cache: int = 0,
        commit_ms: int = 0,
        atime: Atime = Atime.RELATIME,
        no_heartbeat: bool = False,
        recall_ms: int = 0,
        early_bytes: int = 0,
        mutant: Mutant = Mutant.NONE,
    ) -> Filesystem:
        """Open and replay (blocks for the replay). Takes the device over when it succeeds.

        Zeros mean the core's defaults; `recall_ms` is a layout holder's time to answer a recall;
        `early_bytes` is memory for buffered writes that are answered before they are on the device
        (0: none are).
        EROFS: read-only, but the journal has to be replayed.
        """
        options = ffi.new("struct extfs_mount_options *")
        options.read_only = read_only
        options.cache_bytes = cache_bytes
        options.inode_cache = inode_cache
        options.commit_ms = commit_ms
        options.atime = int(atime)
        options.no_heartbeat = no_heartbeat
        options.recall_ms = recall_ms
        options.early_bytes = early_bytes
        options.mutant = int(mutant)
        out = ffi.new("struct fs **")
        checked(lib.extfs_open(device.raw, options, out))
        device.taken_over()
        return cls(out[0])

    @property
    def raw(self) -> Any:
        """The C pointer; raises ValueError when closed."""
        if self._raw is None:
            raise ValueError("the filesystem is closed")
        return self._raw

    @property
    def nowait(self) -> Filesystem:
        """The same filesystem; its methods raise `JournalFullError` instead of waiting.

        A view: close the original.
        """
        return Filesystem(self.raw, wait=False, mount=self._mount)

    @property
    def of_mount(self) -> Filesystem:
        """The same filesystem, for requests of the mount itself: the kernel is not told of changes.

        Everybody else's changes are told to the kernel that has it mounted: attributes at once,
        names and contents a moment later; no call waits for the kernel. A view: close the original.
        """
        return Filesystem(self.raw, wait=self._wait, mount=True)

    async def changing(self, call: Callable[[Filesystem], _T]) -> _T:
        """Run ``call(fs)`` from trio; while the journal is full, wait for room in a thread.

        `call` runs in the trio thread, again when the journal was full before its first change.
        """
        import trio

        view = self.nowait
        while True:
            try:
                return call(view)
            except JournalFullError:
                await trio.to_thread.run_sync(self.wait_space)

    def change(self, call: Callable[[], int]) -> int:
        """Run a call of the core that may find the journal full: wait for room and repeat it.

        A `nowait` view raises `JournalFullError` instead. For the modules of this package.
        """
        while True:
            code = self._call(call)
            if code >= 0:
                return code
            if not (self._wait and lib.extfs_is_retry(code)):
                return checked(code)
            self.wait_space()

    def _call(self, call: Callable[[], int]) -> int:
        if not self._mount:
            return call()
        lib.extfs_of_mount(True)
        try:
            return call()
        finally:
            lib.extfs_of_mount(False)

    @property
    def layouts(self) -> Layouts:
        """Grants and holders."""
        return Layouts(self)

    @property
    def locks(self) -> Locks:
        """Record locks of the NFS server's owners."""
        return Locks(self)

    @property
    def records(self) -> Records:
        """What the NFS server remembers over a restart."""
        return Records(self)

    @property
    def delegations(self) -> Delegations:
        """Delegations of NFSv4 against local use."""
        return Delegations(self)

    # -- the whole filesystem --

    def close(self) -> None:
        """Commit, checkpoint, leave the journal empty; blocks. Closing twice does nothing."""
        raw, self._raw = self._raw, None
        if raw is not None and self._wait and not self._mount:
            checked(lib.extfs_close(raw))

    def abandon(self) -> None:
        """Stop as a power cut would."""
        raw, self._raw = self._raw, None
        if raw is not None:
            lib.extfs_abandon(raw)

    def shutdown(self, why: str) -> None:
        """Change nothing on the device from now on. What is not durable yet is lost."""
        lib.extfs_shutdown(self.raw, why.encode())

    @property
    def shutdown_error(self) -> CoreError | None:
        """What made the filesystem read-only after the mount, or None."""
        code = int(lib.extfs_is_shutdown(self.raw))
        return CoreError(code) if code else None

    @property
    def super(self) -> Superblock:
        """Identity and geometry."""
        out = ffi.new("struct extfs_super *")
        lib.extfs_super_of(self.raw, out)
        return superblock_of(out)

    @property
    def total_blocks(self) -> int:
        """Of the superblock; rises when the filesystem grows."""
        out = ffi.new("struct extfs_super *")
        lib.extfs_super_of(self.raw, out)
        return int(out.total_blocks)

    def statfs(self) -> Space:
        """Space now, in blocks."""
        out = ffi.new("struct extfs_space *")
        lib.extfs_statfs(self.raw, out)
        return Space(out.total, out.free, out.avail, out.busy, out.quarantined, out.inodes)

    def stats(self) -> Stats:
        """Counters of journal, cache and device."""
        out = ffi.new("struct extfs_stats *")
        lib.extfs_get_stats(self.raw, out)
        return Stats(*[getattr(out, name) for name in STATS_FIELDS])

    def memory(self) -> Memory:
        """What the caches hold now."""
        out = ffi.new("struct extfs_memory *")
        lib.extfs_get_memory(self.raw, out)
        return Memory(*[getattr(out, name) for name in MEMORY_FIELDS])

    def limit_caches(self, cache_bytes: int, inodes: int) -> int:
        """Set how much the caches may hold: at most what the mount asked for. What is above, clean
        and unused leaves, and its memory goes back to the kernel: milliseconds. Returns bytes."""
        return int(lib.extfs_limit_caches(self.raw, cache_bytes, inodes))

    def sync(self) -> None:
        """Everything done so far is durable when this returns; blocks."""
        checked(lib.extfs_sync(self.raw))

    def mount_stands(self) -> bool:
        """Whether nobody has mounted the device since we did, by the heartbeat on it; blocks."""
        return bool(checked(lib.extfs_mount_stands(self.raw)))

    def hold_device(self) -> None:
        """No new I/O reaches the device until `release_device`, which must come soon: who reads or
        writes waits. What is under way goes on. EBUSY: it is held."""
        checked(lib.extfs_device_hold(self.raw))

    def release_device(self) -> None:
        """After `hold_device`."""
        lib.extfs_device_release(self.raw)

    def wait_space(self) -> None:
        """Until the journal has room; blocks."""
        checked(lib.extfs_wait_space(self.raw))

    def drain(self) -> None:
        """Until nothing is left to free in the background; blocks."""
        lib.extfs_drain(self.raw)

    def checkpoint(self) -> None:
        """Ask for a checkpoint; does not wait."""
        lib.extfs_checkpoint(self.raw)

    # -- names and attributes --

    def getattr(self, ino: int) -> Stat:
        """Attributes. ENOENT."""
        out = ffi.new("struct extfs_stat *")
        checked(lib.extfs_getattr(self.raw, ino, out))
        return stat_of(out)

    def lookup(self, directory: int, name: bytes) -> Stat:
        """The inode of a name; "." and ".." work. ENOENT, ENOTDIR, ENAMETOOLONG."""
        out = ffi.new("struct extfs_stat *")
        checked(lib.extfs_lookup(self.raw, directory, name, len(name), out))
        return stat_of(out)

    def resolve(self, path: bytes) -> Stat:
        """Walk a path from the root, name by name; symbolic links are not followed."""
        stat = self.getattr(ROOT_INODE)
        for name in path.split(b"/"):
            if name:
                stat = self.lookup(stat.ino, name)
        return stat

    def mknod(
        self, directory: int, name: bytes, mode: int, rdev: int = 0, cred: Cred = _ROOT
    ) -> Stat:
        """Create a regular file, fifo, socket or device; `mode` with type, `rdev` as in makedev."""
        out = ffi.new("struct extfs_stat *")
        who = cred_struct(cred)
        self.change(
            lambda: lib.extfs_mknod(self.raw, directory, name, len(name), mode, rdev, who, out)
        )
        return stat_of(out)

    def mkdir(self, directory: int, name: bytes, mode: int, cred: Cred = _ROOT) -> Stat:
        """Create a directory."""
        out = ffi.new("struct extfs_stat *")
        who = cred_struct(cred)
        self.change(lambda: lib.extfs_mkdir(self.raw, directory, name, len(name), mode, who, out))
        return stat_of(out)

    def symlink(self, directory: int, name: bytes, target: bytes, cred: Cred = _ROOT) -> Stat:
        """Create a symbolic link; targets have 1 to 4095 bytes."""
        out = ffi.new("struct extfs_stat *")
        who = cred_struct(cred)
        self.change(
            lambda: lib.extfs_symlink(
                self.raw, directory, name, len(name), target, len(target), who, out
            )
        )
        return stat_of(out)

    def tmpfile(self, directory: int, mode: int, cred: Cred = _ROOT) -> Stat:
        """A file without a name (O_TMPFILE), open once: `release` frees it unless it was linked."""
        out = ffi.new("struct extfs_stat *")
        who = cred_struct(cred)
        self.change(lambda: lib.extfs_tmpfile(self.raw, directory, mode, who, out))
        return stat_of(out)

    def link(self, ino: int, directory: int, name: bytes) -> Stat:
        """Another name. EPERM for directories, EMLINK, EEXIST."""
        out = ffi.new("struct extfs_stat *")
        self.change(lambda: lib.extfs_link(self.raw, ino, directory, name, len(name), out))
        return stat_of(out)

    def unlink(self, directory: int, name: bytes, meant: int = 0) -> Stat:
        """Remove a name of anything but a directory; returns what lost it. EISDIR, ENOENT.

        EAGAIN: the name leads to another inode than `meant`; 0: whichever has it.
        """
        lost = ffi.new("struct extfs_stat *")
        self.change(lambda: lib.extfs_unlink(self.raw, directory, name, len(name), meant, lost))
        return stat_of(lost)

    def rmdir(self, directory: int, name: bytes, meant: int = 0) -> Stat:
        """Remove an empty directory; returns what it was. ENOTEMPTY, ENOTDIR, ENOENT; EAGAIN."""
        lost = ffi.new("struct extfs_stat *")
        self.change(lambda: lib.extfs_rmdir(self.raw, directory, name, len(name), meant, lost))
        return stat_of(lost)

    def rename(
        self,
        directory: int,
        name: bytes,
        to: int,
        new_name: bytes,
        *,
        noreplace: bool = False,
        exchange: bool = False,
        meant: tuple[int, int] | None = None,
    ) -> Stat | None:
        """As renameat2(2); returns what the new name stood for and no longer does, if anything.

        EINVAL for a directory below itself, ENOTEMPTY, EEXIST; EAGAIN: the names lead to other
        inodes than those `meant`, the moved one and the replaced one (0: none).
        """
        lost = ffi.new("struct extfs_stat *")
        both = ffi.new("struct extfs_rename_meant *", meant) if meant else ffi.NULL
        flags = (lib.EXTFS_RENAME_NOREPLACE if noreplace else 0) | (
            lib.EXTFS_RENAME_EXCHANGE if exchange else 0
        )
        self.change(
            lambda: lib.extfs_rename(
                self.raw, directory, name, len(name), to, new_name, len(new_name), flags, both, lost
            )
        )
        return stat_of(lost) if lost.ino else None

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        buffer = bytearray(4096)
        length = checked(
            lib.extfs_readlink(self.raw, ino, ffi.from_buffer("char[]", buffer), len(buffer))
        )
        return bytes(buffer[:length])

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: tuple[int, int] | None = None,
        mtime: tuple[int, int] | None = None,
        kill_priv: bool = False,
    ) -> None:
        """Change what is given; times as (seconds, nanoseconds). The size: `truncate`."""
        new = ffi.new("struct extfs_stat *")
        valid = lib.EXTFS_ATTR_KILL_PRIV if kill_priv else 0
        if mode is not None:
            new.mode = mode
            valid |= lib.EXTFS_ATTR_MODE
        if uid is not None:
            new.uid = uid
            valid |= lib.EXTFS_ATTR_UID
        if gid is not None:
            new.gid = gid
            valid |= lib.EXTFS_ATTR_GID
        if atime is not None:
            new.atime, new.atime_ns = atime
            valid |= lib.EXTFS_ATTR_ATIME
        if mtime is not None:
            new.mtime, new.mtime_ns = mtime
            valid |= lib.EXTFS_ATTR_MTIME
        self.change(lambda: lib.extfs_setattr(self.raw, ino, valid, new))

    def readdir(self, directory: int, after: int = 0, limit: int = 256) -> list[Dirent]:
        """Up to `limit` entries with a cookie above `after`, without "." and ".."."""
        out = ffi.new("struct extfs_dirent[]", limit)
        count = checked(lib.extfs_readdir(self.raw, directory, after, out, limit))
        return [
            Dirent(
                entry.ino, entry.cookie, entry.type, bytes(ffi.buffer(entry.name, entry.name_len))
            )
            for entry in (out[index] for index in range(count))
        ]

    def scandir(self, directory: int) -> Iterator[Dirent]:
        """All entries, in cookie order."""
        after = 0
        while entries := self.readdir(directory, after):
            yield from entries
            after = entries[-1].cookie

    def open_inode(self, ino: int) -> None:
        """Keep the inode although its names may go; undone by `release`."""
        checked(lib.extfs_open_inode(self.raw, ino))

    def release(self, ino: int) -> None:
        """End what `open_inode` or `tmpfile` began."""
        checked(lib.extfs_release(self.raw, ino))

    def handle_check(self, ino: int, generation: int) -> None:
        """ESTALE when the file of this handle is gone."""
        checked(lib.extfs_handle_check(self.raw, ino, generation))

    def access(self, ino: int, uid: int, gids: Sequence[int], mask: int) -> int:
        """What of `mask` (R=4, W=2, X=1) mode bits and POSIX access ACL allow, as a whole.

        `gids`: all groups of the caller, in any order. Where only one part or another of `mask` can
        be had, reading goes before writing before executing. uid 0 may do everything, but execute
        only directories and files with an execute bit. Read-only mounts are the caller's business.
        """
        groups = ffi.new("uint32_t[]", list(gids))
        return checked(lib.extfs_access(self.raw, ino, uid, groups, len(groups), mask))

    # -- extended attributes --

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Value of an attribute; full names ("user.x"). ENODATA, EOPNOTSUPP."""
        buffer = bytearray(65536)
        length = checked(
            lib.extfs_xattr_get(self.raw, ino, name, ffi.from_buffer(buffer), len(buffer))
        )
        return bytes(buffer[:length])

    def setxattr(
        self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False
    ) -> None:
        """Set an attribute. EEXIST (`create`), ENODATA (`replace`), E2BIG, ENOSPC."""
        flags = (1 if create else 0) | (2 if replace else 0)
        self.change(
            lambda: lib.extfs_xattr_set(
                self.raw, ino, name, ffi.from_buffer(value), len(value), flags
            )
        )

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute. ENODATA."""
        self.change(lambda: lib.extfs_xattr_remove(self.raw, ino, name))

    def listxattr(self, ino: int) -> list[bytes]:
        """Names of all attributes."""
        length = checked(lib.extfs_xattr_list(self.raw, ino, ffi.NULL, 0))
        if not length:
            return []
        buffer = bytearray(length)
        length = checked(
            lib.extfs_xattr_list(self.raw, ino, ffi.from_buffer("char[]", buffer), length)
        )
        return bytes(buffer[:length]).split(b"\0")[:-1]

    # -- contents; all of these block for device I/O --
    #
    # With `nowait` none of them waits for a holder of layouts, or behind somebody who does: the
    # holders in the way are recalled, and the call fails with EAGAIN and nothing done.

    def read(self, ino: int, offset: int, length: int, *, nowait: bool = False) -> bytes:
        """Bytes up to `length` or the end of the file."""
        buffer = bytearray(length)
        count = self.read_into(ino, offset, buffer, nowait=nowait)
        return bytes(memoryview(buffer)[:count])

    def read_into(
        self, ino: int, offset: int, buffer: bytearray | memoryview, *, nowait: bool = False
    ) -> int:
        """Fill `buffer`; returns how many bytes there were. Grants are never in the way of it."""
        flags = _flags(nowait=nowait)
        with ffi.from_buffer(buffer) as memory:  # see `write`
            return self.change(
                lambda: lib.extfs_read(self.raw, ino, offset, memory, len(memory), flags)
            )

    def write(
        self,
        ino: int,
        offset: int,
        content: bytes | bytearray | memoryview,
        *,
        append: bool = False,
        dsync: bool = False,
        kill_priv: bool = False,
        nowait: bool = False,
    ) -> int:
        """Write; returns the count of bytes. `append`: at the end of the file, not at `offset`."""
        flags = _flags(append=append, dsync=dsync, kill_priv=kill_priv, nowait=nowait)
        # An exported memoryview in a cycle, as a traceback may make, crashes CPython's collector.
        with ffi.from_buffer(content) as memory:
            return self.change(
                lambda: lib.extfs_write(self.raw, ino, offset, memory, len(memory), flags)
            )

    def truncate(
        self, ino: int, size: int, *, kill_priv: bool = False, nowait: bool = False
    ) -> None:
        """Set the size in bytes, either way."""
        flags = _flags(kill_priv=kill_priv, nowait=nowait)
        self.change(lambda: lib.extfs_truncate(self.raw, ino, size, flags))

    def fallocate(
        self,
        ino: int,
        offset: int,
        length: int,
        *,
        keep_size: bool = False,
        punch_hole: bool = False,
        zero_range: bool = False,
        kill_priv: bool = False,
        nowait: bool = False,
    ) -> None:
        """As fallocate(2); bytes."""
        mode = (
            (lib.EXTFS_FALLOC_KEEP_SIZE if keep_size else 0)
            | (lib.EXTFS_FALLOC_PUNCH_HOLE if punch_hole else 0)
            | (lib.EXTFS_FALLOC_ZERO_RANGE if zero_range else 0)
        )
        flags = _flags(kill_priv=kill_priv, nowait=nowait)
        self.change(lambda: lib.extfs_fallocate(self.raw, ino, mode, offset, length, flags))

    def copy(
        self,
        ino: int,
        offset: int,
        to: int,
        to_offset: int,
        length: int,
        *,
        kill_priv: bool = False,
        nowait: bool = False,
    ) -> int:
        """Copy bytes, sharing blocks where the offsets allow it; returns how many."""
        flags = _flags(kill_priv=kill_priv, nowait=nowait)
        return self.change(
            lambda: lib.extfs_copy(self.raw, ino, offset, to, to_offset, length, flags)
        )

    def clone(
        self,
        ino: int,
        offset: int,
        to: int,
        to_offset: int,
        length: int,
        *,
        kill_priv: bool = False,
        nowait: bool = False,
    ) -> int:
        """Share blocks with a range of `to`: whole blocks, the source's last one excepted; bytes.

        Without `nowait` layouts in the way are recalled and waited for, as by the next four.
        """
        flags = _flags(kill_priv=kill_priv, nowait=nowait)
        return self.change(
            lambda: lib.extfs_clone(self.raw, ino, offset, to, to_offset, length, flags)
        )

    def dedupe(self, ino: int, offset: int, to: int, to_offset: int, length: int) -> int:
        """As `clone`, if the bytes are equal; returns how many were shared. EBADE: they differ."""
        return self.change(lambda: lib.extfs_dedupe(self.raw, ino, offset, to, to_offset, length))

    def exchange(self, ino: int, offset: int, other: int, other_offset: int, length: int) -> None:
        """Two ranges of whole blocks below both ends of file change places, atomically. EINVAL."""
        self.change(lambda: lib.extfs_exchange(self.raw, ino, offset, other, other_offset, length))

    def collapse(self, ino: int, offset: int, length: int) -> None:
        """As FALLOC_FL_COLLAPSE_RANGE: cut the range out; whole blocks below the end. EINVAL."""
        self.change(lambda: lib.extfs_collapse(self.raw, ino, offset, length))

    def insert(self, ino: int, offset: int, length: int) -> None:
        """As FALLOC_FL_INSERT_RANGE: a hole, before what is there; whole blocks. EINVAL, EFBIG."""
        self.change(lambda: lib.extfs_insert(self.raw, ino, offset, length))

    def map_generation(self, ino: int) -> int:
        """Two equal generations are of the same extent map."""
        out = ffi.new("uint64_t *")
        checked(lib.extfs_map_generation(self.raw, ino, out))
        return int(out[0])

    def fsync(self, ino: int, *, datasync: bool = False) -> None:
        """Make a file durable."""
        self.change(lambda: lib.extfs_fsync(self.raw, ino, datasync))

    def seek_data(self, ino: int, offset: int) -> int:
        """As lseek SEEK_DATA; ENXIO when there is none."""
        return checked(lib.extfs_seek(self.raw, ino, offset, lib.EXTFS_SEEK_DATA))

    def seek_hole(self, ino: int, offset: int) -> int:
        """As lseek SEEK_HOLE; ENXIO past the end."""
        return checked(lib.extfs_seek(self.raw, ino, offset, lib.EXTFS_SEEK_HOLE))

    def map(
        self, ino: int, start: int = 0, end: int = 1 << 51, *, holes: bool = False, limit: int = 512
    ) -> list[Extent]:
        """Up to `limit` extents of file blocks [start, end)."""
        out = ffi.new("struct extfs_extent[]", limit)
        count = checked(lib.extfs_map(self.raw, ino, start, end, holes, out, limit))
        return [
            Extent(e.file, e.block, e.len, ExtentState(e.state), e.flags, bool(e.shared))
            for e in (out[index] for index in range(count))
        ]

    def extents(self, ino: int) -> Iterator[Extent]:
        """All extents of a file, without holes."""
        start = 0
        while found := self.map(ino, start):
            yield from found
            start = found[-1].file + found[-1].len
