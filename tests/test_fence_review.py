"""Seams of fencing: what a restart, a full journal and an unmount find half done."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from nfs.conftest import World, world
from nfs.layout_calls import SCSI_TYPE, File, events, getdeviceinfo
from nfs.scsi_world import (
    FIRST_KEY,
    fence,
    has_nothing,
    holder,
    scsi_file,
    scsi_world,
    session,
)
from nfs.scsi_world import unit as unit_of
from nfs.test_nfs_layouts_recall import Slow, result, send
from nfs.test_nfs_scsi_fenced import Machine, device_of, kept_file, machine, try_get
from simulated_unit import SimulatedTarget
from test_layout_policy import FakeTable, Script, clock, record, run_for, yes
from test_reserved_mount import image, mounted, unit

from extfs import daemon
from extfs.core import CoreError, FenceState, Filesystem, JournalFullError
from extfs.layout import Fencing, reserved_mount
from extfs.layout.keys import new_client_key
from extfs.layout.reservations import UnitError
from extfs.layout.reserved_mount import CHECK_SECONDS
from extfs.nfs import constants as n
from extfs.nfs.clients import REGISTERING_MAX

__all__ = ["clock", "image", "machine", "unit", "world"]


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


def test_keys_that_the_unit_is_asked_for_leave_threads_to_others(world: World) -> None:
    """Every client's first layout asks the unit, which may not answer for long."""
    waiting: list[File] = []
    answers: list[str] = []
    depth = most = 0

    def new_key() -> int:
        """While the unit does not answer, the next client asks."""
        nonlocal depth, most
        depth += 1
        most = max(most, depth)
        if waiting:
            answers.append(try_get(waiting.pop()))
        depth -= 1
        return new_client_key(())

    scsi = scsi_world(world, identity=unit_of(new_key=new_key))
    files = [scsi_file(session(scsi, b"%d" % i, f"10.0.0.{i}"), b"file%d" % i) for i in range(1, 9)]
    waiting += files[1:]
    answers.append(try_get(files[0]))
    assert most == REGISTERING_MAX
    assert sorted(answers) == ["DELAY"] + ["OK"] * REGISTERING_MAX
    waiting.clear()
    assert [try_get(file) for file in files] == ["OK"] * len(files)


async def test_the_first_look_is_not_late(image: Path, unit: SimulatedTarget) -> None:
    """A client that a server before this one fenced has registered again since."""
    with mounted(image, unit) as mount:
        unit.nexus("stray").register(new_client_key(()))
        assert unit.serves("stray")
        with trio.move_on_after(CHECK_SECONDS / 4):
            await mount.keep(lambda why: None)
        assert not unit.serves("stray")


def test_a_key_is_not_told_after_the_fence_that_nobody_knew_it(machine: Machine) -> None:
    """The fence comes while it is looked who may be told: confirmed, for the key was not told."""
    client, file = kept_file(machine)
    machine.restart()  # who was told what is looked up anew
    client.reopen(machine.server, client.first + 1)
    file.session = client
    record = holder(machine.world, b"kept")
    call = getdeviceinfo(device_of(machine.world, record.spec.fence_key), kind=SCSI_TYPE)
    slow = Slow(machine.world)
    xid = send(file, call, 1)
    assert slow.held, "it looks at all holders"
    looked = slow.go(answer=False)
    machine.fs.layouts.lost(record.id)
    fence(machine.world, record.id)
    looked()
    slow.end()
    assert result(file, call, xid) == n.NFS4ERR_NOENT


@pytest.mark.parametrize("read_only", [True, False])
def test_a_mount_that_cannot_serve_takes_no_unit(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    monkeypatch.setattr(
        reserved_mount, "reserve", lambda *args, **how: pytest.fail("it was reserved")
    )
    nfs = daemon.parse_nfs("127.0.0.1:2049", ["/:127.0.0.0/8,rw,layouts=scsi"])
    options = daemon.MountOptions(
        str(image),
        str(tmp_path),
        nfs=nfs,
        take_over=True,
        read_only=read_only,
        writeback_cache=not read_only,
    )
    with pytest.raises(daemon.MountError, match=r"NFS|nfs"):
        daemon.run(options)
