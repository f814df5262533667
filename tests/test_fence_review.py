"""Seams of fencing: what a restart, a full journal and an unmount find half done."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing
from test_layout_policy import FakeTable, Script, clock, record, run_for, yes

from extfs.core import CoreError, JournalFullError
from extfs.layout import Fencing

__all__ = ["clock"]


class Shut(FakeTable):
    """The filesystem was shut down while somebody waited for room in its journal."""

    async def wait_space(self) -> None:
        await super().wait_space()
        if self.waits == 1:
            raise CoreError(-errno.EIO)


@pytest.mark.expect_log("telling that it is fenced")
async def test_no_room_ever_ends_nobody_elses_fence(clock: trio.testing.MockClock) -> None:
    table = Shut(record(5))
    table.refuse = [JournalFullError(-errno.EAGAIN)]
    await run_for(Fencing(table, Script(yes)), 20)
    assert [number for number, _ in table.confirmed] == [5]
