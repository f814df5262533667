"""The FUSE opcodes that are served in Python: exactly those that the bridge forwards.

Which these are is said in one place, the table of ``native/bridge_dispatch.c``; a test compares it
with this class. Each handler is one call of the core. A full journal is waited for in a thread, so
that no handler keeps the others from running.

The requests of one file come here whole, /.extfs/status, which exists in the mount only: OPEN makes
its text, READ gives it out, RELEASE forgets it.

Lookup counts are the bridge's: it counts the entries in the answers that it passes on.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import pyfuse3
import trio

from extfs.core import BLOCK_SIZE, CoreError, Cred, Filesystem, Stat

if TYPE_CHECKING:
    from pyfuse3 import (
        EntryAttributes,
        FileHandleT,
        FileInfo,
        FileNameT,
        FlagT,
        InodeT,
        RequestContext,
        StatvfsData,
        XAttrNameT,
    )

__all__ = ["Operations"]

_T = TypeVar("_T")

log = logging.getLogger("extfs")

VALID_SECONDS = 86400
"""As BRIDGE_VALID_SECONDS of native/bridge.h: whoever changes a file otherwise tells the kernel."""

NAME_MAX = 255

STATUS_NODE = (1 << 62) + 3
"""CONTROL_STATUS of native/bridge_control.h."""
OPEN_TEXTS_BYTES = 32 << 20
"""Texts of the status kept for those who have it open: anybody may."""

_NANOSECONDS = 1_000_000_000
_SECTORS_PER_BLOCK = BLOCK_SIZE // 512


def attributes(stat: Stat) -> EntryAttributes:
    """What the kernel is told of an inode: sizes in bytes, blocks in 512-byte sectors."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(stat.ino)
    entry.generation = stat.generation
    entry.entry_timeout = VALID_SECONDS
    entry.attr_timeout = VALID_SECONDS
    entry.st_mode = pyfuse3.ModeT(stat.mode)
    entry.st_nlink = stat.nlink
    entry.st_uid = stat.uid
    entry.st_gid = stat.gid
    entry.st_rdev = stat.rdev
    entry.st_size = stat.size
    entry.st_blksize = BLOCK_SIZE
    entry.st_blocks = stat.blocks * _SECTORS_PER_BLOCK
    entry.st_atime_ns = stat.atime * _NANOSECONDS + stat.atime_ns
    entry.st_mtime_ns = stat.mtime * _NANOSECONDS + stat.mtime_ns
    entry.st_ctime_ns = stat.ctime * _NANOSECONDS + stat.ctime_ns
    return entry


def _refusal(error: Exception) -> pyfuse3.FUSEError:
    """The answer to a failed request; of any other exception pyfuse3 would end the mount."""
    if isinstance(error, CoreError):
        return pyfuse3.FUSEError(error.errno or errno.EIO)
    log.error("a request failed", exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


class Operations(pyfuse3.Operations):
    """Handlers of the forwarded opcodes, on one filesystem. All raise `pyfuse3.FUSEError`."""

    # What the kernel does is negotiated by the bridge, which rewrites the answer to INIT.
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: Filesystem, status: Callable[[], bytes]) -> None:
        super().__init__()
        self._filesystem = filesystem.of_mount
        self._status = status
        self._texts: dict[int, bytes] = {}
        self._next_text = 1
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def _change(self, call: Callable[[Filesystem], _T]) -> _T:
        try:
            return await self._filesystem.changing(call)
        except Exception as error:
            raise _refusal(error) from error

    def _look(self, call: Callable[[Filesystem], _T]) -> _T:
        try:
            return call(self._filesystem)
        except Exception as error:
            raise _refusal(error) from error

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """SYMLINK. EEXIST, ENOSPC, ENAMETOOLONG."""
        cred = Cred(ctx.uid, ctx.gid, 0)
        return await self._change(
            lambda fs: attributes(fs.symlink(parent_inode, name, target, cred))
        )

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """READLINK. EINVAL: not a symbolic link."""
        return pyfuse3.FileNameT(self._look(lambda fs: fs.readlink(inode)))

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """LINK. EEXIST, EMLINK, EPERM (a directory)."""
        return await self._change(lambda fs: attributes(fs.link(inode, new_parent_inode, new_name)))

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """STATFS, in blocks. Inodes are made as needed: each takes at most a block."""
        space = self._look(lambda fs: fs.statfs())
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = BLOCK_SIZE
        result.f_blocks = space.total
        result.f_bfree = space.free
        result.f_bavail = space.avail
        result.f_files = space.inodes + space.free
        result.f_ffree = space.free
        result.f_favail = space.avail
        result.f_namemax = NAME_MAX
        return result

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """LISTXATTR. Who may not read trusted attributes is not told of them."""
        names = self._look(lambda fs: fs.listxattr(inode))
        return [
            pyfuse3.XAttrNameT(name)
            for name in names
            if ctx.uid == 0 or not name.startswith(b"trusted.")
        ]

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """REMOVEXATTR. ENODATA: there is none."""
        await self._change(lambda fs: fs.removexattr(inode, name))

    # -- /.extfs/status --

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """OPEN of the status: its text is of this moment. EACCES to write, EMFILE."""
        if inode != STATUS_NODE:
            log.error("asked to open inode %d, which the bridge serves", inode)
            raise pyfuse3.FUSEError(errno.EIO)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EACCES)
        try:
            # Tenths of a second where there are thousands of holders: not in this thread.
            text = await trio.to_thread.run_sync(self._status, limiter=self._one_at_a_time)
        except Exception as error:
            raise _refusal(error) from error
        if len(text) + sum(map(len, self._texts.values())) > OPEN_TEXTS_BYTES:
            raise pyfuse3.FUSEError(errno.EMFILE)
        number = self._next_text
        self._next_text += 1
        self._texts[number] = text
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(number), direct_io=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """READ of the status."""
        text = self._texts.get(fh)
        if text is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return text[off : off + size]

    async def flush(self, fh: FileHandleT) -> None:
        """FLUSH of the status: nothing to do."""

    async def release(self, fh: FileHandleT) -> None:
        """RELEASE of the status."""
        self._texts.pop(fh, None)
