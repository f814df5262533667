"""Kept clients over a kill of the server and over a power cut: every stateid goes on."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from extfs.core import Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.records import Kind
from extfs.nfs.service import ServiceOptions
from nfs import layout_calls as layouts
from nfs.conftest import DEVICE_BYTES
from nfs.file_calls import NO_DELEG, READ, FileClient, StatusError
from nfs.handshake import RECLAIM_COMPLETE, Kept, Server
from nfs.wire import op, u32

LENGTH = 65536
CONTENT = bytes(range(256)) * (LENGTH // 256)


class Machine:
    """A server whose power can be cut, or which can be killed while the disk goes on."""

    def __init__(self, sim: SimDevice) -> None:
        self.sim = sim
        self.fs = Filesystem.open(sim.device())
        self.server = Server(self.fs)

    def restart(self, cut: bool, *, at_once: bool = False) -> None:
        """`at_once`: opens have no time to become durable."""
        if not at_once:
            self.server.runner.advance(1.5)
        if cut:
            self.sim.crash_at(0)
        self.fs.abandon()
        if cut:
            self.sim.restart(7)
        self.fs = self.server.fs = Filesystem.open(self.sim.device())
        self.server.restart()

    def write(self, layout: layouts.Layout) -> None:
        """As the holder of the layout does: to the device."""
        for extent in layout.extents:
            begin = extent.offset - layout.offset
            self.sim.poke(extent.storage, CONTENT[begin : begin + extent.length])


@pytest.fixture
def machine() -> Iterator[Machine]:
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        found = Machine(sim)
        yield found
        found.fs.close()


def kept(machine: Machine, owner: bytes = b"kept") -> Kept:
    session = Kept(machine.server, owner)
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    return session


def again(machine: Machine, session: Kept) -> None:
    """The client comes back, with another session."""
    session.reopen(machine.server, session.first + 1)
    session.first += 1


def states(machine: Machine) -> int:
    """How many have a record."""
    return sum(number >> 56 == Kind.STATE for number in machine.fs.records.load())


@pytest.mark.parametrize("cut", [False, True])
def test_opens_and_locks(machine: Machine, cut: bool) -> None:
    session = kept(machine)
    client = FileClient(session)
    file = client.create(b"file")
    lock = client.lock(file.fh, file.stateid, b"locker", 100, 50)
    lock = client.lock(file.fh, lock, None, 200, 50)
    lock = client.locku(file.fh, lock, 220, 10)
    gone = client.create(b"closed")
    client.close(gone.fh, gone.stateid)
    machine.restart(cut)
    assert not machine.server.service.lease.in_grace()
    again(machine, session)
    assert client.test(file.stateid, lock) == [n.NFS4_OK, n.NFS4_OK]
    # Others meet the locks, and what was unlocked is free.
    other = FileClient(kept(machine, b"other"))
    opened = other.open(b"file", READ | NO_DELEG)
    for offset in (100, 149, 200, 219, 230, 249):
        with pytest.raises(StatusError):
            other.lockt(opened.fh, b"o", offset, 1)
    for offset in (99, 150, 220, 229, 250):
        other.lockt(opened.fh, b"o", offset, 1)
    client.write(file.fh, lock, 0, b"through the lock's stateid", n.FILE_SYNC4)
    client.locku(file.fh, lock, 0, n.NFS4_MAXFILELEN)
    client.close(file.fh, file.stateid)
    # What has ended has no record any more; there is the open of the other.
    assert states(machine) == 1


@pytest.mark.parametrize("cut", [False, True])
def test_a_layout_is_committed_after_the_restart(machine: Machine, cut: bool) -> None:
    session = kept(machine)
    file = layouts.open_file(session, b"file")
    layout = file.get(0, LENGTH, LENGTH)
    if not cut:
        machine.write(layout)
    machine.restart(cut)
    again(machine, session)
    if cut:
        machine.write(layout)
    assert file.commit((0, LENGTH), last=LENGTH - 1) == LENGTH
    ino = machine.fs.lookup(1, b"file").ino
    assert machine.fs.read(ino, 0, LENGTH) == CONTENT
    assert file.give_back() is None
    file.do(layouts.close(file.opened))
    machine.server.runner.advance(1.5)
    assert states(machine) == 0


@pytest.mark.parametrize("cut", [False, True])
def test_a_second_restart(machine: Machine, cut: bool) -> None:
    session = kept(machine)
    client = FileClient(session)
    file = client.create(b"file")
    for _ in range(3):
        machine.restart(cut)
        again(machine, session)
        assert client.test(file.stateid) == [n.NFS4_OK]
    client.close(file.fh, file.stateid)
    assert client.test(file.stateid) != [n.NFS4_OK]


def test_a_file_that_is_gone(machine: Machine) -> None:
    """Open and without a name it was freed by the restart; the stateid is bad."""
    session = kept(machine)
    client = FileClient(session)
    file = client.create(b"file")
    client.last(op(n.OP_PUTROOTFH), op(n.OP_REMOVE, u32(4) + b"file"))
    machine.restart(False)
    again(machine, session)
    assert client.test(file.stateid)[0] != n.NFS4_OK
    machine.server.runner.advance(2)
    assert states(machine) == 0


def test_many_opens_cost_one_record_each(machine: Machine) -> None:
    """What a change writes does not grow with what the client holds."""
    session = kept(machine)
    client = FileClient(session)
    files = [client.create(b"%d" % number) for number in range(200)]
    machine.server.runner.advance(1.5)
    service = machine.server.service
    written: list[int] = []
    put = service.records._put
    service.records._put = lambda changes: (written.append(len(changes)), put(changes))[1]  # type: ignore[method-assign,func-returns-value]
    client.close(files[0].fh, files[0].stateid)
    assert sum(written) == 0
    machine.server.runner.advance(1.5)
    assert sum(written) == 1
    machine.restart(False)
    again(machine, session)
    assert client.test(*[file.stateid for file in files[1:]]) == [n.NFS4_OK] * 199


def test_the_lease_of_a_kept_client_that_does_not_come_back(machine: Machine) -> None:
    machine.server.options = ServiceOptions(lease_seconds=20)
    session = kept(machine)
    client = FileClient(session)
    file = client.create(b"file", deny=n.OPEN4_SHARE_DENY_BOTH)
    machine.restart(False)
    # Within the lease nobody gets in; after it, as a courtesy, whoever needs it.
    other = FileClient(kept(machine, b"other"))
    with pytest.raises(StatusError):
        other.open(b"file")
    machine.server.runner.now += 21
    other.open(b"file")
    assert machine.server.service.clients.get(session.clientid) is None
    assert file.stateid.other not in machine.server.service.states._states


def test_a_full_device(machine: Machine) -> None:
    """Opens, closes and removals need no space that is not there."""
    session = kept(machine)
    client = FileClient(session)
    first = client.create(b"first")
    ino = machine.fs.mknod(1, b"filler", 0o100644).ino
    size = 1 << 20
    offset = 0
    while size >= 4096:
        try:
            machine.fs.write(ino, offset, b"x" * size)
            offset += size
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size //= 2
    machine.fs.sync()
    held = [client.open(b"first", READ | NO_DELEG, owner=b"%d" % number) for number in range(64)]
    for opened in held:
        client.close(opened.fh, opened.stateid)
    client.lock(first.fh, first.stateid, b"locker", 0, 10)
    machine.restart(False)
    again(machine, session)
    client.last(op(n.OP_PUTROOTFH), op(n.OP_REMOVE, u32(6) + b"filler\0\0"))
    client.close(first.fh, first.stateid)


def test_what_a_timer_took_is_durable_before_others_are_told(machine: Machine) -> None:
    """Any COMPOUND commits it, though it staged nothing by itself."""
    session = kept(machine)
    client = FileClient(session)
    opened = client.create(b"file")
    other = kept(machine, b"other")
    service = machine.server.service
    [state] = service.states.of_client(service.clients.get(session.clientid))
    service.states.revoke(state, n.NFS4ERR_ADMIN_REVOKED)
    before = machine.fs.records.load()
    assert other.run(op(n.OP_PUTROOTFH)).status == n.NFS4_OK
    assert machine.fs.records.load() != before
    machine.restart(True)
    again(machine, session)
    assert client.test(opened.stateid) == [n.NFS4ERR_ADMIN_REVOKED]


def test_opens_do_not_wait_for_the_device(machine: Machine) -> None:
    """OPEN and CLOSE of a file that is there, denying nothing, are not a transaction each."""
    session = kept(machine)
    client = FileClient(session)
    client.create(b"file")
    machine.server.runner.advance(1.5)
    before = machine.fs.records.load()
    opened = client.open(b"file", READ | NO_DELEG, owner=b"again")
    assert machine.fs.records.load() == before
    # A lock takes its open along; its end waits for nothing.
    lock = client.lock(opened.fh, opened.stateid, b"locker", 0, 10, n.READ_LT)
    assert len(machine.fs.records.load()) == len(before) + 2
    client.free(client.locku(opened.fh, lock, 0, 10))
    client.close(opened.fh, opened.stateid)
    machine.server.runner.advance(1.5)
    assert machine.fs.records.load() == before


def test_an_open_that_was_too_late(machine: Machine) -> None:
    """The client is told so, and opens again."""
    session = kept(machine)
    client = FileClient(session)
    client.create(b"file")
    machine.restart(True)
    again(machine, session)
    opened = client.open(b"file", READ | NO_DELEG, owner=b"again")
    machine.restart(True, at_once=True)
    again(machine, session)
    assert client.test(opened.stateid) == [n.NFS4ERR_BAD_STATEID]
    found = client.open(b"file", READ | NO_DELEG, owner=b"again")
    client.close(found.fh, found.stateid)


def test_what_denies_is_durable_at_once(machine: Machine) -> None:
    session = kept(machine)
    client = FileClient(session)
    file = client.create(b"file", READ | NO_DELEG)
    denying = client.open(b"file", READ | NO_DELEG, n.OPEN4_SHARE_DENY_WRITE, owner=b"denying")
    machine.restart(True, at_once=True)
    again(machine, session)
    assert client.test(file.stateid, denying.stateid) == [n.NFS4_OK, n.NFS4_OK]
    client.close(denying.fh, denying.stateid)
    machine.restart(True, at_once=True)
    again(machine, session)
    assert client.test(denying.stateid) == [n.NFS4ERR_BAD_STATEID]
