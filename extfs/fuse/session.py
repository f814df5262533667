"""pyfuse3 on the bridge's socket, under trio.

libfuse takes ``/dev/fd/N`` as a mountpoint for "already mounted, here is the connection"; here N is
not /dev/fuse but a socket on which the bridge passes the requests that it does not serve itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pyfuse3

from extfs.fuse.operations import Operations

__all__ = ["Session"]


class Session:
    """The one pyfuse3 session of this process (pyfuse3 keeps it in globals)."""

    def __init__(self, forward_fd: int, status: Callable[[], bytes]) -> None:
        """Take `forward_fd` over: it is closed with the session, or here when that fails.

        `status` makes the text of /.extfs/status, in a thread of its own.

        RuntimeError: libfuse refuses.
        """
        self._open = False
        try:
            pyfuse3.init(Operations(status), f"/dev/fd/{forward_fd}", {"fsname=extfs"})
        except BaseException:
            os.close(forward_fd)
            raise
        self._open = True

    async def run(self) -> None:
        """Serve until `stop`."""
        await pyfuse3.main()

    def stop(self) -> None:
        """Let `run` return. From the trio thread."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Free the session and its descriptor; after `run` has returned."""
        if self._open:
            self._open = False
            pyfuse3.close(unmount=False)
