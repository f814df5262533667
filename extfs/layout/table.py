"""The core's holders, as the policy sees them."""

from __future__ import annotations

import trio

from extfs.core import FenceRecord, FenceState, Filesystem, HolderRecord, LayoutEvent

__all__ = ["CoreTable"]

RECORD_THREADS = 16


class CoreTable:
    """`extfs.layout.policy.HolderTable` on an open filesystem.

    What waits for the device has threads of its own: the default ones may all be taken by calls
    that wait for the very holder that is to be fenced.
    """

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._threads = trio.CapacityLimiter(RECORD_THREADS)

    def events(self) -> list[LayoutEvent]:
        """All that have come."""
        return self._filesystem.layouts.events()

    def holders(self) -> list[HolderRecord]:
        """All of them."""
        return self._filesystem.layouts.holders()

    def holder(self, holder: int) -> HolderRecord | None:
        """One of them."""
        return self._filesystem.layouts.holder(holder)

    async def wait_events(self) -> None:
        """Until there are events."""
        await trio.lowlevel.wait_readable(self._filesystem.layouts.event_fd)

    def fences(self) -> list[FenceRecord]:
        """Those with a record."""
        return self._filesystem.layouts.fences()

    async def fence_put(self, holder: int, state: FenceState, tries: int) -> None:
        """Make durable how far a fence is. ENOENT; EBUSY: it is live; EINVAL; EIO."""
        put = self._filesystem.layouts.fence_put
        await trio.to_thread.run_sync(put, holder, state, tries, limiter=self._threads)

    def fenced(self, holder: int) -> None:
        """Tell that it is cut off. ENOENT; EBUSY: it is live; JournalFullError."""
        self._filesystem.nowait.layouts.fenced(holder)

    async def wait_space(self) -> None:
        """Until the journal has room."""
        await trio.to_thread.run_sync(self._filesystem.wait_space, limiter=self._threads)
