"""Seams of fencing: what a restart, a full journal and an unmount find half done."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from nfs.layout_calls import events
from nfs.scsi_world import FIRST_KEY, fence, has_nothing, holder
from nfs.test_nfs_scsi_fenced import Machine, kept_file, machine, try_get
from simulated_unit import SimulatedTarget
from test_layout_policy import FakeTable, Script, clock, record, run_for, yes
from test_reserved_mount import image, mounted, unit

from extfs.core import CoreError, FenceState, Filesystem, JournalFullError
from extfs.layout import Fencing
from extfs.layout.reservations import UnitError

__all__ = ["clock", "image", "machine", "unit"]


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


@pytest.mark.expect_log("had lost its reservation")
def test_no_thread_left_behind_is_in_a_closed_filesystem(
    image: Path, unit: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the unit is not waited for at the unmount; it may be in a read of the device."""
    reads, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow(filesystem: Filesystem) -> bool:
        reads.set()
        assert go_on.wait(20)
        return not closed.is_set()

    with mounted(image, unit) as mount:
        unit.restart(forget=True)
        monkeypatch.setattr(Filesystem, "mount_stands", slow)
        found: list[object] = []

        def look() -> None:
            try:
                found.append(mount.look())
            except UnitError as error:
                found.append(str(error))

        def close() -> None:
            mount.let_go()
            closed.set()

        threads = [threading.Thread(target=look), threading.Thread(target=close)]
        threads[0].start()
        assert reads.wait(20)
        threads[1].start()
        assert not closed.wait(0.1), "the read is still under way"
        go_on.set()
        for thread in threads:
            thread.join()
        assert closed.is_set()
        assert len(found) == 1
        with pytest.raises(UnitError, match="unmounted"):
            mount.look()
        with pytest.raises(OSError, match="unmounted"):
            mount.new_key()
