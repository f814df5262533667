"""The native core, typed: the only module that imports ``extfs._core``.

Every call of ``native/extfs_core.h`` has one method here. Numbers keep the header's units: offsets
and sizes of files are bytes, extents and space are filesystem blocks, times are seconds since the
epoch (negative before it) with nanoseconds beside them. Names and targets are ``bytes``.

A failed call raises `CoreError`, an ``OSError`` with the errno for the front and the core's own code
for the log. Calls that change something may find the journal full; then nothing was done. The
methods of `Filesystem` wait and try again, which blocks the thread for as long as a checkpoint
takes. From trio, where nothing may block, use ``await fs.changing(lambda fs: fs.mkdir(...))``, which
waits in a thread of its own; or `Filesystem.nowait`, whose methods raise `JournalFullError` instead.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from extfs import _core

__all__ = [
    "Atime",
    "Bridge",
    "BridgeStats",
    "CoreError",
    "Cred",
    "Device",
    "Dirent",
    "Extent",
    "ExtentState",
    "Filesystem",
    "JournalFullError",
    "Mutant",
    "OpcodeServer",
    "SimDevice",
    "Space",
    "Stat",
    "Stats",
    "Superblock",
    "drain_log",
    "log_fd",
    "mkfs",
    "opcodes",
    "read_super",
]

_ffi: Any = _core.ffi
_lib: Any = _core.lib
_T = TypeVar("_T")

ROOT_INODE = 1
BLOCK_SIZE = 4096


class CoreError(OSError):
    """A call of the core failed.

    Attributes: ``errno`` for callers that speak POSIX; ``code``, the core's negative return code;
    ``name``, its symbol ("ERR_META_CRC", or "ENOSPC" when it is a plain errno); ``text``, what failed.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        self.name: str = _string(_lib.extfs_error_name(code))
        self.text: str = _string(_lib.extfs_error_text(code))
        super().__init__(int(_lib.extfs_errno(code)), self.text)


class JournalFullError(CoreError):
    """The journal has no room until its next checkpoint. Nothing was done; wait and call again."""


def _string(pointer: Any) -> str:
    raw: bytes = _ffi.string(pointer)
    return raw.decode("utf-8", "replace")


def _checked(code: int) -> int:
    """Pass a count or 0 through; raise for a negative code."""
    if code >= 0:
        return code
    if _lib.extfs_is_retry(code):
        raise JournalFullError(code)
    raise CoreError(code)


# ---- log ---------------------------------------------------------------------------------------


def log_fd() -> int:
    """A descriptor that is readable while the core has lines for `drain_log`. Owned by the core."""
    return int(_lib.extfs_log_fd())


def drain_log(logger: logging.Logger) -> int:
    """Hand the core's log lines to `logger` at their own levels; returns how many there were."""
    buffer = _ffi.new("char[]", 1024)
    count = 0
    while level := _lib.extfs_log_next(buffer, len(buffer)):
        logger.log(level, "%s", _string(buffer))
        count += 1
    return count


# ---- what calls return -------------------------------------------------------------------------


class ExtentState(enum.IntEnum):
    """What a reader of the file sees there: holes and unwritten extents read as zeros."""

    HOLE = 0
    UNWRITTEN = 1
    WRITTEN = 2


class Atime(enum.IntEnum):
    """When reading updates the access time, as in mount(8)."""

    RELATIME = 0
    STRICT = 1
    NONE = 2


class Mutant(enum.IntEnum):
    """Deliberate violations of the ordering rules; tests set them to prove that they are caught."""

    NONE = 0
    COMMIT_BEFORE_FLUSH = 1
    CHECKPOINT_NO_FLUSH = 2
    META_REUSE_EARLY = 3
    TAIL_ZERO_EARLY = 4


@dataclass(frozen=True, slots=True)
class Superblock:
    """Geometry and identity of a filesystem; sizes in blocks. `from_copy`: the primary is damaged."""

    uuid: bytes
    label: bytes
    compat: int
    ro_compat: int
    incompat: int
    total_blocks: int
    ag_blocks: int
    journal_blocks: int
    journal_start: int
    ag_count: int
    block_size: int
    created_sec: int
    from_copy: bool


@dataclass(frozen=True, slots=True)
class Space:
    """Blocks: `avail` is what users may still take; `busy` is free but not reusable yet."""

    total: int
    free: int
    avail: int
    busy: int
    quarantined: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the mount, except `bufs`, `dirty`, `logged`, `log_*`, `lookups`: levels now."""

    commits: int
    flush_only: int
    images: int
    checkpoints: int
    home_writes: int
    log_blocks: int
    log_used: int
    waits_for_space: int
    bufs: int
    dirty: int
    logged: int
    hits: int
    misses: int
    evictions: int
    lookups: int
    dev_reads: int
    dev_writes: int
    dev_flushes: int
    durable_xid: int
    running_xid: int


@dataclass(frozen=True, slots=True)
class Stat:
    """Attributes of an inode. `size` in bytes (a directory: entries), `blocks` in device blocks."""

    ino: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    flags: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    btime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int
    parent: int
    change: int
    subdirs: int
    xattrs: int


_STAT_FIELDS = tuple(Stat.__dataclass_fields__)
_STATS_FIELDS = tuple(Stats.__dataclass_fields__)


def _stat(raw: Any) -> Stat:
    return Stat(*[getattr(raw, name) for name in _STAT_FIELDS])


@dataclass(frozen=True, slots=True)
class Cred:
    """Who creates something: filesystem ids and umask of the caller."""

    uid: int = 0
    gid: int = 0
    umask: int = 0o022


@dataclass(frozen=True, slots=True)
class Dirent:
    """A directory entry. `cookie` is its readdir offset; `type` is a DT_* number."""

    ino: int
    cookie: int
    type: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of file blocks `file`.. that lives in device blocks `block`.. (0 for a hole); all in
    blocks. `shared`: other files map some of it too."""

    file: int
    block: int
    len: int
    state: ExtentState
    flags: int
    shared: bool


def _superblock(raw: Any) -> Superblock:
    return Superblock(
        uuid=bytes(_ffi.buffer(raw.uuid, 16)),
        label=bytes(_ffi.buffer(raw.label, 64)).rstrip(b"\0"),
        compat=raw.compat,
        ro_compat=raw.ro_compat,
        incompat=raw.incompat,
        total_blocks=raw.total_blocks,
        ag_blocks=raw.ag_blocks,
        journal_blocks=raw.journal_blocks,
        journal_start=raw.journal_start,
        ag_count=raw.ag_count,
        block_size=raw.block_size,
        created_sec=raw.created_sec,
        from_copy=bool(raw.from_copy),
    )


# ---- devices -----------------------------------------------------------------------------------


class _Closing:
    """A context manager that closes at the end of its block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Device(_Closing):
    """An open block device or image. A `Filesystem` that opens it takes it over."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    @classmethod
    def open(cls, path: str | bytes, *, read_only: bool = False, shared: bool = False) -> Device:
        """Open by path. Exclusive on this host unless `shared` (for tools that only look).

        ERR_DEV_IN_USE, ENOENT, EACCES, ENOTBLK (neither block device nor regular file).
        """
        out = _ffi.new("struct device **")
        flags = (_lib.EXTFS_DEV_READ_ONLY if read_only else 0) | (
            _lib.EXTFS_DEV_SHARED if shared else 0
        )
        name = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
        _checked(_lib.extfs_device_open(name, flags, out))
        return cls(out[0])

    @property
    def raw(self) -> Any:
        """The C pointer; raises ValueError when closed or owned by a filesystem."""
        if self._raw is None:
            raise ValueError("the device is closed, or a filesystem owns it")
        return self._raw

    @property
    def size(self) -> int:
        """Bytes."""
        return int(_lib.extfs_device_size(self.raw))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at `offset`; both multiples of 4096 to suit any device."""
        buffer = bytearray(length)
        _checked(_lib.extfs_device_read(self.raw, offset, _ffi.from_buffer(buffer), length))
        return bytes(buffer)

    def write(self, offset: int, content: bytes) -> None:
        """Write; `offset` and length multiples of 4096 to suit any device. Not durable by itself."""
        _checked(
            _lib.extfs_device_write(self.raw, offset, _ffi.from_buffer(content), len(content))
        )

    def close(self) -> None:
        """Close unless closed, or given to a filesystem."""
        raw, self._raw = self._raw, None
        if raw is not None:
            _lib.extfs_device_close(raw)

    def taken_over(self) -> None:
        """The C side owns it from now on."""
        self._raw = None


class SimDevice(_Closing):
    """The simulated device: it can lose power and fail, see native/device_sim.h. Sizes in bytes."""

    READ, WRITE, FLUSH = 0, 1, 2

    def __init__(self, size: int, *, align: int = 512, seed: int = 0, _raw: Any = None) -> None:
        if _raw is None:
            out = _ffi.new("struct sim **")
            _checked(_lib.extfs_sim_create(size, align, seed, out))
            _raw = out[0]
        self._raw = _raw
        self.size = size

    @property
    def raw(self) -> Any:
        """The C pointer; raises ValueError when closed."""
        if self._raw is None:
            raise ValueError("the simulated device is closed")
        return self._raw

    def device(self) -> Device:
        """A device on it; one at a time."""
        out = _ffi.new("struct device **")
        _checked(_lib.extfs_sim_device(self.raw, out))
        return Device(out[0])

    @property
    def events(self) -> int:
        """Writes and flushes that reached it so far."""
        return int(_lib.extfs_sim_events(self.raw))

    def crash_at(self, event: int) -> None:
        """Lose power when `events` reaches this number; 0: never."""
        _lib.extfs_sim_crash_at(self.raw, event)

    @property
    def crashed(self) -> bool:
        """Whether the power is gone."""
        return bool(_lib.extfs_sim_crashed(self.raw))

    def restart(self, seed: int) -> None:
        """Power returns; the seed decides what became of each held write. No device may be open."""
        _lib.extfs_sim_restart(self.raw, seed)

    def settle(self) -> None:
        """Everything held becomes durable, as at a clean power-off."""
        _lib.extfs_sim_settle(self.raw)

    def fail(self, kind: int, offset: int, length: int, count: int = 1) -> None:
        """The next `count` I/Os of this kind (READ, WRITE, FLUSH) that touch the range fail."""
        _lib.extfs_sim_fail(self.raw, kind, offset, length, count)

    def shuffle(self, on: bool = True) -> None:
        """Complete asynchronous I/O in an order that the seed decides."""
        _lib.extfs_sim_shuffle(self.raw, on)

    def drop_flushes(self, count: int) -> None:
        """The next `count` flushes and FUA writes succeed without making anything durable."""
        _lib.extfs_sim_drop_flushes(self.raw, count)

    def peek(self, offset: int, length: int) -> bytes:
        """What a reader of the device sees now."""
        buffer = bytearray(length)
        _checked(_lib.extfs_sim_peek(self.raw, offset, _ffi.from_buffer(buffer), length))
        return bytes(buffer)

    def poke(self, offset: int, content: bytes) -> None:
        """Write as a holder of a layout would: through the volatile cache."""
        _checked(
            _lib.extfs_sim_poke(self.raw, offset, _ffi.from_buffer(content), len(content))
        )

    def clone(self) -> SimDevice:
        """An independent copy of the whole state."""
        out = _ffi.new("struct sim **")
        _checked(_lib.extfs_sim_clone(self.raw, out))
        return SimDevice(self.size, _raw=out[0])

    def close(self) -> None:
        """Free it; its device must be closed."""
        raw, self._raw = self._raw, None
        if raw is not None:
            _lib.extfs_sim_destroy(raw)


# ---- format, open ------------------------------------------------------------------------------


def mkfs(
    device: Device,
    *,
    label: str | bytes = b"",
    journal_blocks: int = 0,
    force: bool = False,
    uuid: bytes | None = None,
    now_sec: int = 0,
    size_blocks: int = 0,
) -> None:
    """Format. Zeros mean: journal scaled with the device, the clock's time, the whole device.

    ERR_FOREIGN_FS (without `force`; the log names what was found), ERR_DEV_TINY, EINVAL.
    """
    if isinstance(label, str):
        label = label.encode()
    if len(label) > 64:
        raise ValueError("a label has at most 64 bytes")
    if uuid is not None and len(uuid) != 16:
        raise ValueError("a UUID has 16 bytes")
    options = _ffi.new("struct extfs_mkfs_options *")
    label_memory = _ffi.new("char[]", label)
    uuid_memory = _ffi.NULL if uuid is None else _ffi.new("uint8_t[]", uuid)
    options.label = label_memory if label else _ffi.NULL
    options.journal_blocks = journal_blocks
    options.force = force
    options.uuid = uuid_memory
    options.now_sec = now_sec
    options.size_blocks = size_blocks
    _checked(_lib.extfs_mkfs(device.raw, options))


def read_super(device: Device) -> Superblock:
    """The superblock, or its copy. ERR_NOT_EXTFS, ERR_SB_DAMAGED, ERR_INCOMPAT, ERR_DEV_SMALL."""
    out = _ffi.new("struct extfs_super *")
    _checked(_lib.extfs_super_read(device.raw, out))
    return _superblock(out)


class Filesystem(_Closing):
    """A mounted core. Leaving the ``with`` block closes it clean: committed and checkpointed."""

    def __init__(self, raw: Any, *, wait: bool = True) -> None:
        self._raw = raw
        self._wait = wait

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
        mutant: Mutant = Mutant.NONE,
    ) -> Filesystem:
        """Open and replay (blocks for the replay). Takes the device over when it succeeds.

        Zeros mean the core's defaults. EROFS: read-only, but the journal has to be replayed.
        """
        options = _ffi.new("struct extfs_mount_options *")
        options.read_only = read_only
        options.cache_bytes = cache_bytes
        options.inode_cache = inode_cache
        options.commit_ms = commit_ms
        options.atime = int(atime)
        options.no_heartbeat = no_heartbeat
        options.mutant = int(mutant)
        out = _ffi.new("struct fs **")
        _checked(_lib.extfs_open(device.raw, options, out))
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
        return Filesystem(self.raw, wait=False)

    async def changing(self, call: Callable[[Filesystem], _T]) -> _T:
        """Run ``call(fs)`` from trio; while the journal is full, wait for room in a thread.

        `call` runs in the trio thread, more than once if the journal was full before its first change.
        """
        import trio

        view = self.nowait
        while True:
            try:
                return call(view)
            except JournalFullError:
                await trio.to_thread.run_sync(self.wait_space)

    def _change(self, call: Callable[[], int]) -> int:
        """Run a call that may find the journal full."""
        while True:
            code = call()
            if code >= 0:
                return code
            if not (self._wait and _lib.extfs_is_retry(code)):
                return _checked(code)
            self.wait_space()

    # -- the whole filesystem --

    def close(self) -> None:
        """Commit, checkpoint, leave the journal empty; blocks. Closing twice does nothing."""
        raw, self._raw = self._raw, None
        if raw is not None and self._wait:
            _checked(_lib.extfs_close(raw))

    def abandon(self) -> None:
        """Stop as a power cut would."""
        raw, self._raw = self._raw, None
        if raw is not None:
            _lib.extfs_abandon(raw)

    @property
    def shutdown_error(self) -> CoreError | None:
        """What made the filesystem read-only after the mount, or None."""
        code = int(_lib.extfs_is_shutdown(self.raw))
        return CoreError(code) if code else None

    @property
    def super(self) -> Superblock:
        """Identity and geometry."""
        out = _ffi.new("struct extfs_super *")
        _lib.extfs_super_of(self.raw, out)
        return _superblock(out)

    def statfs(self) -> Space:
        """Space now, in blocks."""
        out = _ffi.new("struct extfs_space *")
        _lib.extfs_statfs(self.raw, out)
        return Space(out.total, out.free, out.avail, out.busy, out.quarantined, out.inodes)

    def stats(self) -> Stats:
        """Counters of journal, cache and device."""
        out = _ffi.new("struct extfs_stats *")
        _lib.extfs_get_stats(self.raw, out)
        return Stats(*[getattr(out, name) for name in _STATS_FIELDS])

    def sync(self) -> None:
        """Everything done so far is durable when this returns; blocks."""
        _checked(_lib.extfs_sync(self.raw))

    def wait_space(self) -> None:
        """Until the journal has room; blocks."""
        _checked(_lib.extfs_wait_space(self.raw))

    def drain(self) -> None:
        """Until nothing is left to free in the background; blocks."""
        _lib.extfs_drain(self.raw)

    def checkpoint(self) -> None:
        """Ask for a checkpoint; does not wait."""
        _lib.extfs_checkpoint(self.raw)

    # -- names and attributes --

    def getattr(self, ino: int) -> Stat:
        """Attributes. ENOENT."""
        out = _ffi.new("struct extfs_stat *")
        _checked(_lib.extfs_getattr(self.raw, ino, out))
        return _stat(out)

    def lookup(self, directory: int, name: bytes) -> Stat:
        """The inode of a name; "." and ".." work. ENOENT, ENOTDIR, ENAMETOOLONG."""
        out = _ffi.new("struct extfs_stat *")
        _checked(_lib.extfs_lookup(self.raw, directory, name, len(name), out))
        return _stat(out)

    def resolve(self, path: bytes) -> Stat:
        """Walk a path from the root, name by name; symbolic links are not followed."""
        stat = self.getattr(ROOT_INODE)
        for name in path.split(b"/"):
            if name:
                stat = self.lookup(stat.ino, name)
        return stat

    def mknod(
        self, directory: int, name: bytes, mode: int, rdev: int = 0, cred: Cred = Cred()
    ) -> Stat:
        """Create a regular file, fifo, socket or device; `mode` with type, `rdev` as in makedev."""
        out = _ffi.new("struct extfs_stat *")
        who = _cred(cred)
        self._change(
            lambda: _lib.extfs_mknod(
                self.raw, directory, name, len(name), mode, rdev, who, out
            )
        )
        return _stat(out)

    def mkdir(self, directory: int, name: bytes, mode: int, cred: Cred = Cred()) -> Stat:
        """Create a directory."""
        out = _ffi.new("struct extfs_stat *")
        who = _cred(cred)
        self._change(
            lambda: _lib.extfs_mkdir(self.raw, directory, name, len(name), mode, who, out)
        )
        return _stat(out)

    def symlink(
        self, directory: int, name: bytes, target: bytes, cred: Cred = Cred()
    ) -> Stat:
        """Create a symbolic link; targets have 1 to 4095 bytes."""
        out = _ffi.new("struct extfs_stat *")
        who = _cred(cred)
        self._change(
            lambda: _lib.extfs_symlink(
                self.raw, directory, name, len(name), target, len(target), who, out
            )
        )
        return _stat(out)

    def tmpfile(self, directory: int, mode: int, cred: Cred = Cred()) -> Stat:
        """A file without a name (O_TMPFILE), open once: `release` frees it unless it was linked."""
        out = _ffi.new("struct extfs_stat *")
        who = _cred(cred)
        self._change(lambda: _lib.extfs_tmpfile(self.raw, directory, mode, who, out))
        return _stat(out)

    def link(self, ino: int, directory: int, name: bytes) -> Stat:
        """Another name. EPERM for directories, EMLINK, EEXIST."""
        out = _ffi.new("struct extfs_stat *")
        self._change(lambda: _lib.extfs_link(self.raw, ino, directory, name, len(name), out))
        return _stat(out)

    def unlink(self, directory: int, name: bytes) -> None:
        """Remove a name of anything but a directory. EISDIR, ENOENT."""
        self._change(lambda: _lib.extfs_unlink(self.raw, directory, name, len(name)))

    def rmdir(self, directory: int, name: bytes) -> None:
        """Remove an empty directory. ENOTEMPTY, ENOTDIR, ENOENT."""
        self._change(lambda: _lib.extfs_rmdir(self.raw, directory, name, len(name)))

    def rename(
        self,
        directory: int,
        name: bytes,
        to: int,
        new_name: bytes,
        *,
        noreplace: bool = False,
        exchange: bool = False,
    ) -> None:
        """As renameat2(2). EINVAL for a directory below itself, ENOTEMPTY, EEXIST."""
        flags = (_lib.EXTFS_RENAME_NOREPLACE if noreplace else 0) | (
            _lib.EXTFS_RENAME_EXCHANGE if exchange else 0
        )
        self._change(
            lambda: _lib.extfs_rename(
                self.raw, directory, name, len(name), to, new_name, len(new_name), flags
            )
        )

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        buffer = bytearray(4096)
        length = _checked(
            _lib.extfs_readlink(self.raw, ino, _ffi.from_buffer("char[]", buffer), len(buffer))
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
        new = _ffi.new("struct extfs_stat *")
        valid = _lib.EXTFS_ATTR_KILL_PRIV if kill_priv else 0
        if mode is not None:
            new.mode = mode
            valid |= _lib.EXTFS_ATTR_MODE
        if uid is not None:
            new.uid = uid
            valid |= _lib.EXTFS_ATTR_UID
        if gid is not None:
            new.gid = gid
            valid |= _lib.EXTFS_ATTR_GID
        if atime is not None:
            new.atime, new.atime_ns = atime
            valid |= _lib.EXTFS_ATTR_ATIME
        if mtime is not None:
            new.mtime, new.mtime_ns = mtime
            valid |= _lib.EXTFS_ATTR_MTIME
        self._change(lambda: _lib.extfs_setattr(self.raw, ino, valid, new))

    def readdir(self, directory: int, after: int = 0, limit: int = 256) -> list[Dirent]:
        """Up to `limit` entries with a cookie above `after`, without "." and ".."."""
        out = _ffi.new("struct extfs_dirent[]", limit)
        count = _checked(_lib.extfs_readdir(self.raw, directory, after, out, limit))
        return [
            Dirent(entry.ino, entry.cookie, entry.type, bytes(_ffi.buffer(entry.name, entry.name_len)))
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
        _checked(_lib.extfs_open_inode(self.raw, ino))

    def release(self, ino: int) -> None:
        """End what `open_inode` or `tmpfile` began."""
        _checked(_lib.extfs_release(self.raw, ino))

    def handle_check(self, ino: int, generation: int) -> None:
        """ESTALE when the file of this handle is gone."""
        _checked(_lib.extfs_handle_check(self.raw, ino, generation))

    # -- extended attributes --

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Value of an attribute; full names ("user.x"). ENODATA, EOPNOTSUPP."""
        buffer = bytearray(65536)
        length = _checked(
            _lib.extfs_xattr_get(self.raw, ino, name, _ffi.from_buffer(buffer), len(buffer))
        )
        return bytes(buffer[:length])

    def setxattr(
        self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False
    ) -> None:
        """Set an attribute. EEXIST (`create`), ENODATA (`replace`), E2BIG, ENOSPC."""
        flags = (1 if create else 0) | (2 if replace else 0)
        self._change(
            lambda: _lib.extfs_xattr_set(
                self.raw, ino, name, _ffi.from_buffer(value), len(value), flags
            )
        )

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute. ENODATA."""
        self._change(lambda: _lib.extfs_xattr_remove(self.raw, ino, name))

    def listxattr(self, ino: int) -> list[bytes]:
        """Names of all attributes."""
        length = _checked(_lib.extfs_xattr_list(self.raw, ino, _ffi.NULL, 0))
        if not length:
            return []
        buffer = bytearray(length)
        length = _checked(
            _lib.extfs_xattr_list(self.raw, ino, _ffi.from_buffer("char[]", buffer), length)
        )
        return bytes(buffer[:length]).split(b"\0")[:-1]

    # -- contents; all of these block for device I/O --

    def read(self, ino: int, offset: int, length: int) -> bytes:
        """Bytes up to `length` or the end of the file."""
        buffer = bytearray(length)
        count = self.read_into(ino, offset, buffer)
        return bytes(memoryview(buffer)[:count])

    def read_into(self, ino: int, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill `buffer`; returns how many bytes there were."""
        memory = _ffi.from_buffer(buffer)
        return self._change(
            lambda: _lib.extfs_read(self.raw, ino, offset, memory, len(memory))
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
    ) -> int:
        """Write; returns the count of bytes. `append`: at the end of the file, `offset` is ignored."""
        flags = (
            (_lib.EXTFS_F_APPEND if append else 0)
            | (_lib.EXTFS_F_DSYNC if dsync else 0)
            | (_lib.EXTFS_F_KILL_PRIV if kill_priv else 0)
        )
        memory = _ffi.from_buffer(content)
        return self._change(
            lambda: _lib.extfs_write(self.raw, ino, offset, memory, len(memory), flags)
        )

    def truncate(self, ino: int, size: int) -> None:
        """Set the size in bytes, either way."""
        self._change(lambda: _lib.extfs_truncate(self.raw, ino, size))

    def fallocate(
        self,
        ino: int,
        offset: int,
        length: int,
        *,
        keep_size: bool = False,
        punch_hole: bool = False,
        zero_range: bool = False,
    ) -> None:
        """As fallocate(2); bytes."""
        mode = (
            (_lib.EXTFS_FALLOC_KEEP_SIZE if keep_size else 0)
            | (_lib.EXTFS_FALLOC_PUNCH_HOLE if punch_hole else 0)
            | (_lib.EXTFS_FALLOC_ZERO_RANGE if zero_range else 0)
        )
        self._change(lambda: _lib.extfs_fallocate(self.raw, ino, mode, offset, length))

    def copy(self, ino: int, offset: int, to: int, to_offset: int, length: int) -> int:
        """Copy bytes, sharing blocks where the offsets allow it; returns how many."""
        return self._change(
            lambda: _lib.extfs_copy(self.raw, ino, offset, to, to_offset, length)
        )

    def fsync(self, ino: int, *, datasync: bool = False) -> None:
        """Make a file durable."""
        self._change(lambda: _lib.extfs_fsync(self.raw, ino, datasync))

    def seek_data(self, ino: int, offset: int) -> int:
        """As lseek SEEK_DATA; ENXIO when there is none."""
        return _checked(_lib.extfs_seek(self.raw, ino, offset, _lib.EXTFS_SEEK_DATA))

    def seek_hole(self, ino: int, offset: int) -> int:
        """As lseek SEEK_HOLE; ENXIO past the end."""
        return _checked(_lib.extfs_seek(self.raw, ino, offset, _lib.EXTFS_SEEK_HOLE))

    def map(
        self, ino: int, start: int = 0, end: int = 1 << 51, *, holes: bool = False, limit: int = 512
    ) -> list[Extent]:
        """Up to `limit` extents of file blocks [start, end)."""
        out = _ffi.new("struct extfs_extent[]", limit)
        count = _checked(_lib.extfs_map(self.raw, ino, start, end, holes, out, limit))
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


def _cred(cred: Cred) -> Any:
    return _ffi.new("struct extfs_cred *", (cred.uid, cred.gid, cred.umask))


# ---- the bridge --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BridgeStats:
    """Requests since the mount; `by_opcode` by FUSE opcode number."""

    requests: int
    forwarded: int
    parked: int
    interrupted: int
    by_opcode: dict[int, int]


class OpcodeServer(enum.IntEnum):
    """Who serves a FUSE opcode."""

    NONE = 0
    C = 1
    PYTHON = 2


def opcodes() -> dict[str, OpcodeServer]:
    """The bridge's table: every opcode that it knows, and who serves it."""
    found = {}
    server = _ffi.new("int *")
    for number in range(64):
        name = _lib.extfs_bridge_opcode(number, server)
        if name:
            found[_string(name)] = OpcodeServer(server[0])
    return found


class Bridge:
    """The mount at /dev/fuse, served by the core's own threads; see native/bridge.h."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    @classmethod
    def start(
        cls,
        fs: Filesystem,
        mountpoint: str,
        *,
        fsname: str,
        options: str = "",
        threads: int = 0,
        writeback_cache: bool = False,
        read_only: bool = False,
    ) -> Bridge:
        """Mount and serve. ENOENT, ENOTDIR, EBUSY (mountpoint), ENODEV (no /dev/fuse), EPERM.

        `options` are the mount(8) options left for the kernel; `threads` 0: one for each CPU, at most 4.
        """
        keep = [
            _ffi.new("char[]", text.encode("utf-8", "surrogateescape"))
            for text in (mountpoint, fsname, options)
        ]
        wanted = _ffi.new("struct extfs_bridge_options *")
        wanted.mountpoint, wanted.fsname, wanted.options = keep
        wanted.threads = threads
        wanted.writeback_cache = writeback_cache
        wanted.read_only = read_only
        out = _ffi.new("struct bridge **")
        _checked(_lib.extfs_bridge_start(fs.raw, wanted, out))
        return cls(out[0])

    @property
    def forward_fd(self) -> int:
        """Socket with the requests that Python serves; pyfuse3's mountpoint is /dev/fd/<this>.

        The caller's to close, once asked for.
        """
        return int(_lib.extfs_bridge_forward_fd(self._raw))

    @property
    def event_fd(self) -> int:
        """Readable once unmounted."""
        return int(_lib.extfs_bridge_event_fd(self._raw))

    def stats(self) -> BridgeStats:
        """Counts of requests."""
        out = _ffi.new("struct extfs_bridge_stats *")
        _lib.extfs_bridge_get_stats(self._raw, out)
        opcodes = {number: count for number, count in enumerate(out.by_opcode) if count}
        return BridgeStats(out.requests, out.forwarded, out.parked, out.interrupted, opcodes)

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount. EBUSY while files are open, unless `lazy`. May wait for requests: blocks."""
        _checked(_lib.extfs_bridge_unmount(self._raw, lazy))

    def abort(self) -> None:
        """Fail every request from now on, as if unmounted."""
        _checked(_lib.extfs_bridge_abort(self._raw))

    def notify_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """Tell the kernel that bytes changed; length 0: to the end; offset -1: attributes."""
        _checked(_lib.extfs_bridge_notify_inode(self._raw, ino, offset, length))

    def notify_entry(self, directory: int, name: bytes) -> None:
        """Tell the kernel that a name changed."""
        _checked(_lib.extfs_bridge_notify_entry(self._raw, directory, name, len(name)))

    def stop(self) -> None:
        """Wait for the threads and free everything; what is still mounted is aborted. Blocks."""
        raw, self._raw = self._raw, None
        if raw is not None:
            _checked(_lib.extfs_bridge_stop(raw))
