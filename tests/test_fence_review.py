"""Seams of fencing: what a restart, a full journal and an unmount find half done."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing
from nfs.layout_calls import events
from nfs.scsi_world import FIRST_KEY, fence, has_nothing, holder
from nfs.test_nfs_scsi_fenced import Machine, kept_file, machine, try_get
from test_layout_policy import FakeTable, Script, clock, record, run_for, yes

from extfs.core import CoreError, FenceState, JournalFullError
from extfs.layout import Fencing

__all__ = ["clock", "machine"]


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


def test_a_restart_does_not_forget_that_a_fenced_client_must_drop(machine: Machine) -> None:
    """It has its next holder and key, but was not told it: its old layouts may still be used."""
    client, file = kept_file(machine)
    number = holder(machine.world, b"kept").id
    machine.fs.layouts.lost(number)
    machine.fs.layouts.fence_put(number, FenceState.DECIDED, 0)
    events(machine.world)
    fence(machine.world, number)
    events(machine.world)
    file.layout = None
    assert try_get(file) == "LAYOUTTRYLATER"
    assert holder(machine.world, b"kept").spec.fence_key == FIRST_KEY + 1
    machine.restart()
    client.reopen(machine.server, client.first + 1)
    file.session = client
    assert try_get(file) == "LAYOUTTRYLATER"
    has_nothing(client)
    assert try_get(file) == "OK"
    assert holder(machine.world, b"kept").spec.fence_key == FIRST_KEY + 1
