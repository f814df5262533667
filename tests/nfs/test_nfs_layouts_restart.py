"""Layouts over a restart of the server: of clients that are kept, and of others in grace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from extfs.core import ROOT_INODE, Filesystem, HolderState, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.service import ServiceOptions
from nfs.calls import putfh, status_of
from nfs.handshake import Server
from nfs.layout_calls import (
    BLOCK,
    RW,
    File,
    answer,
    layoutcommit,
    layoutget,
    layoutreturn,
    open_file,
    read_recall,
    take_callbacks,
)
from nfs.test_nfs_lease import RECLAIM_COMPLETE, Kept
from nfs.wire import Session

MIB = 1 << 20


class Machine:
    """A server on a device; `restart` is a power cut of it, after which the device keeps all."""

    def __init__(self, sim: SimDevice) -> None:
        self.sim = sim
        self.fs = Filesystem.open(sim.device())
        self.server = Server(self.fs, ServiceOptions(grace_seconds=20.0))

    def restart(self) -> None:
        self.fs.abandon()
        self.sim.settle()
        self.fs = Filesystem.open(self.sim.device())
        self.server = Server(self.fs, ServiceOptions(grace_seconds=20.0))

    def events(self) -> None:
        for event in self.fs.layouts.events():
            self.server.service.layout_event(event)

    def ino(self) -> int:
        return self.fs.lookup(ROOT_INODE, b"file").ino


@pytest.fixture
def machine() -> Iterator[Machine]:
    with SimDevice(64 * MIB) as sim:
        with sim.device() as device:
            mkfs(device)
        machine = Machine(sim)
        yield machine
        machine.fs.close()


def kept_file(machine: Machine) -> tuple[Kept, File]:
    client = Kept(machine.server)
    assert client.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    return client, open_file(client, b"file")


def come_back(machine: Machine, client: Kept, file: File, number: int) -> File:
    """The client's next session after a restart; the file with the same stateids."""
    client.reopen(machine.server, number)
    return File(client, file.fh, file.opened, file.layout)


def test_a_kept_client_commits_after_a_restart_what_it_wrote_before(machine: Machine) -> None:
    client, file = kept_file(machine)
    layout = file.get(0, 8192)
    machine.sim.poke(layout.extents[0].storage, b"x" * 8192)
    file.get(65536, 4096)
    machine.restart()
    file = come_back(machine, client, file, client.first + 1)
    assert file.commit((0, 8192), last=8191) == 8192
    assert machine.fs.read(machine.ino(), 0, 9000) == b"x" * 8192
    again = file.get(0, 8192)
    assert again.stateid.other == layout.stateid.other, "it goes on where it was"
    assert again.stateid.seqid > 2
    assert file.give_back() is None
    assert machine.fs.layouts.grants(machine.ino()) == []
    machine.restart()
    assert machine.server.service.layouts.status()["states"] == 0


def test_a_kept_client_is_recalled_although_its_seqid_is_not_known(machine: Machine) -> None:
    client, file = kept_file(machine)
    file.get(0, 8192)
    file.get(0, 8192)
    machine.restart()
    file = come_back(machine, client, file, client.first + 1)
    machine.fs.layouts.recall(machine.ino(), 0, BLOCK)
    machine.events()
    (callback,) = take_callbacks(client.wire)
    assert read_recall(callback).kind == n.LAYOUT4_RET_REC_ALL
    answer(client.wire, callback, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert machine.fs.layouts.grants(machine.ino()) == []
    call = layoutget(0, 4096, 4096, RW, file.layout)  # type: ignore[arg-type]
    assert status_of(client, putfh(file.fh), call) == "BAD_STATEID"


def test_once_it_has_shown_its_seqid_it_is_recalled_by_it(machine: Machine) -> None:
    client, file = kept_file(machine)
    file.get(0, 8192)
    file.get(0, 8192)
    machine.restart()
    file = come_back(machine, client, file, client.first + 1)
    file.do(layoutcommit([], file.layout))  # type: ignore[arg-type]
    machine.fs.layouts.recall(machine.ino(), 0, BLOCK)
    machine.events()
    (callback,) = take_callbacks(client.wire)
    recall = read_recall(callback)
    assert recall.stateid is not None
    assert recall.stateid.seqid == 3


def other_file(machine: Machine, **how: Any) -> File:
    return open_file(machine.server.session(b"other", **how), b"file")


@pytest.mark.parametrize("reclaim", [True, False])
def test_a_commit_in_grace_is_honoured_reclaim_or_not(machine: Machine, reclaim: bool) -> None:
    file = other_file(machine)
    layout = file.get(0, 8192)
    ino = machine.ino()
    machine.sim.poke(layout.extents[0].storage, b"y" * 8192)
    machine.restart()
    session = Session(machine.server.service, b"other", reclaim_complete=False)
    get = layoutget(0, 4096, 4096, RW, layout.stateid)
    assert status_of(session, putfh(file.fh), get) == "GRACE"
    call = layoutcommit([(0, 8192)], layout.stateid, 8191, reclaim=reclaim)
    assert status_of(session, putfh(file.fh), call) == "OK"
    assert machine.fs.read(ino, 0, 9000) == b"y" * 8192
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert status_of(session, putfh(file.fh), call) in ("NO_GRACE", "STALE_STATEID")
    assert machine.fs.layouts.grants(ino) == []


def test_a_commit_in_grace_is_of_what_was_told(machine: Machine) -> None:
    file = other_file(machine)
    machine.fs.truncate(machine.ino(), MIB)
    layout = file.get(0, 8192)
    machine.restart()
    session = Session(machine.server.service, b"other", reclaim_complete=False)
    call = layoutcommit([(65536, 8192)], layout.stateid, None, reclaim=True)
    assert status_of(session, putfh(file.fh), call) == "BAD_STATEID"
    stranger = Session(machine.server.service, b"stranger", reclaim_complete=False)
    call = layoutcommit([(0, 8192)], layout.stateid, None)
    assert status_of(stranger, putfh(file.fh), call) in ("STALE_STATEID", "BAD_STATEID")


def test_reclaimed_layouts_may_be_returned(machine: Machine) -> None:
    file = other_file(machine)
    layout = file.get(0, 8192)
    machine.restart()
    session = Session(machine.server.service, b"other", reclaim_complete=False)
    call = layoutreturn(stateid=layout.stateid, reclaim=True)
    assert status_of(session, putfh(file.fh), call) == "OK"


def test_who_does_not_come_back_stays_in_quarantine(machine: Machine) -> None:
    file = other_file(machine)
    file.get(0, 8192)
    (grant,) = machine.fs.layouts.grants(machine.ino())
    machine.restart()
    machine.server.runner.advance(25.0)
    assert not machine.server.service.lease.in_grace()
    record = machine.fs.layouts.holder(grant.holder)
    assert record is not None
    assert record.state is HolderState.LOST
