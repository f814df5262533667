"""The core's holders, as the policy sees them."""

from __future__ import annotations

import trio

from extfs.core import Filesystem, HolderRecord, LayoutEvent

__all__ = ["CoreTable"]


class CoreTable:
    """`extfs.layout.policy.HolderTable` on an open filesystem."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem

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

    def fenced(self, holder: int) -> None:
        """Tell that it is cut off. ENOENT; EBUSY: it is live; JournalFullError."""
        self._filesystem.nowait.layouts.fenced(holder)

    async def wait_space(self) -> None:
        """Until the journal has room."""
        await trio.to_thread.run_sync(self._filesystem.wait_space)
