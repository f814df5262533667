"""The FUSE requests that are served in Python: those of /.extfs/status.

That file exists in the mount only: OPEN makes its text, READ gives it out, RELEASE forgets it.
INIT comes here, too: libfuse answers it. Of the opcodes as such the table of
``native/bridge_dispatch.c`` says where they are served; a test compares it with this class.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyfuse3
import trio

from extfs.core import CoreError

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FileInfo, FlagT, InodeT, RequestContext

__all__ = ["Operations"]

log = logging.getLogger("extfs")

STATUS_NODE = (1 << 62) + 3
"""CONTROL_STATUS of native/bridge_control.h."""
OPEN_TEXTS_BYTES = 32 << 20
"""Texts of the status kept for those who have it open: anybody may."""


def _refusal(error: Exception) -> pyfuse3.FUSEError:
    """The answer to a failed request; of any other exception pyfuse3 would end the mount."""
    if isinstance(error, CoreError):
        return pyfuse3.FUSEError(error.errno or errno.EIO)
    log.error("a request failed", exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


class Operations(pyfuse3.Operations):
    """Handlers of the forwarded requests. All raise `pyfuse3.FUSEError`."""

    # What the kernel does is negotiated by the bridge, which rewrites the answer to INIT.
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, status: Callable[[], bytes]) -> None:
        super().__init__()
        self._status = status
        self._texts: dict[int, bytes] = {}
        self._next_text = 1
        self._one_at_a_time = trio.CapacityLimiter(1)

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
