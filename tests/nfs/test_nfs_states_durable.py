"""Opens, locks and delegations of clients that are kept over a restart of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from extfs.core import Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.locks import STORED_MAX
from extfs.nfs.stateids import Stateid
from nfs.conftest import DEVICE_BYTES
from nfs.file_calls import (
    ANONYMOUS,
    BOTH,
    DENY_WRITE,
    NO_DELEG,
    READ,
    WANT_WRITE,
    WRITE,
    FileClient,
    StatusError,
    by_name,
    open_op,
    putfh,
    stateid,
)
from nfs.handshake import created, identify
from nfs.wire import Session, Wire, bitmap, create_session, make_service, op, opaque, u32

PERSIST = n.CREATE_SESSION4_FLAG_PERSIST | n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
RECLAIM_COMPLETE = op(n.OP_RECLAIM_COMPLETE, u32(0))


class Host:
    """A server that can be cut off and started again."""

    def __init__(self, sim: SimDevice) -> None:
        self.sim = sim
        self.fs = Filesystem.open(sim.device())
        self.service, self.runner = make_service(self.fs)

    def restart(self, seed: int = 1) -> None:
        """As after a power cut: what was not durable may be lost; opens had a second for it."""
        self.runner.advance(1.5)
        self.sim.crash_at(0)
        self.fs.abandon()
        self.sim.restart(seed)
        self.fs = Filesystem.open(self.sim.device())
        self.service, self.runner = make_service(self.fs)


class Kept(Session):
    """A client that asks for PERSIST, as the Linux client does."""

    def __init__(self, host: Host, owner: bytes) -> None:
        self.owner = owner
        self.reconnect(host)
        assert self.run(RECLAIM_COMPLETE).status == n.NFS4_OK

    def reconnect(self, host: Host) -> None:
        self.service = host.service
        self.wire = Wire(host.service)
        found = identify(self.wire, self.owner)
        self.clientid = found.clientid
        reply = self.wire.compound(create_session(found.clientid, found.sequence, PERSIST))
        self.id, self.numbers = created(reply).id, {}


@pytest.fixture
def host() -> Iterator[Host]:
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        found = Host(sim)
        yield found
        found.fs.close()


def status_of(call: Any, *args: Any, **more: Any) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **more)
    return caught.value.status


def kept(host: Host, owner: bytes = b"kept") -> FileClient:
    return FileClient(Kept(host, owner))


def again(host: Host, *clients: FileClient) -> None:
    """Restart, and the clients find it out."""
    host.restart()
    for client in clients:
        session = client.session
        assert isinstance(session, Kept)
        session.reconnect(host)


def test_opens_are_as_they_were(host: Host) -> None:
    one, two = kept(host), kept(host, b"two")
    opened = one.create(b"f", READ | NO_DELEG)
    opened = one.open(b"f", BOTH | NO_DELEG, DENY_WRITE)
    gone = one.create(b"g")
    one.write(gone.fh, gone.stateid, 0, b"contents")
    one.close(gone.fh, gone.stateid)
    again(host, one, two)
    assert one.test(opened.stateid, gone.stateid) == [n.NFS4_OK, n.NFS4ERR_BAD_STATEID]
    assert two.test(opened.stateid) == [n.NFS4ERR_BAD_STATEID]
    assert status_of(two.open, b"f", WRITE | NO_DELEG) == n.NFS4ERR_SHARE_DENIED
    one.write(opened.fh, opened.stateid, 0, b"x")
    down = one.downgrade(opened.fh, opened.stateid, READ)
    assert down == Stateid(3, opened.stateid.other)
    two.open(b"f", WRITE | NO_DELEG)
    one.close(opened.fh, down)
    assert one.create(b"h").stateid.other[:4] != opened.stateid.other[:4]


def test_what_was_not_answered_may_be_lost_but_not_more(host: Host) -> None:
    """Each answer is durable by itself."""
    one = kept(host)
    for number in range(12):
        opened = one.create(b"f%d" % number)
        again(host, one)
        assert one.test(opened.stateid) == [n.NFS4_OK]
    assert host.service.states.status()["opens"] == 12


def test_locks_are_as_they_were(host: Host) -> None:
    one, two = kept(host), kept(host, b"two")
    opened = one.create(b"f")
    held = one.lock(opened.fh, opened.stateid, b"o", 0, 100)
    held = one.locku(opened.fh, held, 10, 10)
    held = one.lock(opened.fh, held, None, 50, 10, n.READ_LT)
    theirs = two.open(b"f")
    again(host, one, two)
    other = two.lock(theirs.fh, theirs.stateid, b"o", 10, 10)
    for offset, kind in ((9, n.READ_LT), (20, n.READ_LT), (50, n.WRITE_LT), (99, n.READ_LT)):
        assert status_of(two.lock, theirs.fh, other, None, offset, 1, kind) == n.NFS4ERR_DENIED
    two.lock(theirs.fh, other, None, 50, 10, n.READ_LT)
    held = one.locku(opened.fh, held, 0, 40)
    assert held.seqid == 4
    two.lock(theirs.fh, Stateid(0, other.other), None, 0, 40)
    one.close(opened.fh, opened.stateid)
    two.lock(theirs.fh, Stateid(0, other.other), None, 0, 1000)


def test_more_locks_than_are_kept_are_told_to_be_lost(host: Host) -> None:
    one = kept(host)
    opened = one.create(b"f")
    held = one.lock(opened.fh, opened.stateid, b"o", 0, 1)
    for number in range(1, STORED_MAX + 1):
        held = one.lock(opened.fh, held, None, 2 * number, 1)
    again(host, one)
    assert one.test(opened.stateid, held) == [n.NFS4_OK, n.NFS4ERR_ADMIN_REVOKED]
    one.free(held)
    held = one.lock(opened.fh, opened.stateid, b"o", 0, 1)
    again(host, one)
    assert one.test(held) == [n.NFS4_OK]


def test_delegations_are_as_they_were(host: Host) -> None:
    one, two = kept(host), kept(host, b"two")
    made = one.create(b"f")
    one.close(made.fh, made.stateid)
    got = one.open(b"f", BOTH | WANT_WRITE)
    assert got.delegation.given
    again(host, one, two)
    held = got.delegation.stateid
    assert one.test(held) == [n.NFS4_OK]
    client = host.service.clients.get(one.session.clientid)
    assert client is not None
    assert [d.write for d in host.fs.delegations.of(client.holder_id)] == [True]
    assert status_of(two.open, b"f", READ) == n.NFS4ERR_DELAY
    again(host, one, two)
    assert host.service.states.delegations.recalls_in_progress() == 1
    one.close(got.fh, got.stateid)
    one.delegreturn(got.fh, held)
    two.open(b"f", READ)


def test_revoked_ones_stay_so(host: Host) -> None:
    """Until FREE_STATEID."""
    one = kept(host)
    got = one.create(b"f", READ)
    held = got.delegation.stateid
    state = host.service.states._states[held.other]
    host.service.states.revoke(state, n.NFS4ERR_DELEG_REVOKED)
    host.runner.advance(2)  # nobody waits for it
    again(host, one)
    assert one.test(held) == [n.NFS4ERR_DELEG_REVOKED]
    one.free(held)
    again(host, one)
    assert one.test(held) == [n.NFS4ERR_BAD_STATEID]


def test_a_file_without_a_name_is_gone(host: Host) -> None:
    """Its open goes with it, the others stay."""
    one = kept(host)
    gone, stays = one.create(b"f"), one.create(b"g")
    held = one.lock(gone.fh, gone.stateid, b"o", 0, 1)
    host.fs.unlink(1, b"f")
    host.fs.sync()
    again(host, one)
    assert one.test(gone.stateid, held, stays.stateid) == [
        n.NFS4ERR_BAD_STATEID,
        n.NFS4ERR_BAD_STATEID,
        n.NFS4_OK,
    ]


def test_a_client_that_is_not_kept_has_to_reclaim(host: Host) -> None:
    """8.4.2.1; by CLAIM_PREVIOUS, with locks."""
    one = FileClient(Session(host.service, b"plain"))
    opened = one.create(b"f")
    held = one.lock(opened.fh, opened.stateid, b"o", 0, 10)
    host.restart()
    one = FileClient(Session(host.service, b"plain", reclaim_complete=False))
    assert one.test(opened.stateid, held) == [n.NFS4ERR_STALE_STATEID] * 2
    assert status_of(one.open, b"f") == n.NFS4ERR_GRACE
    claim = u32(n.CLAIM_PREVIOUS) + u32(n.OPEN_DELEGATE_NONE)
    back = one.open(fh=opened.fh, claim=claim, access=BOTH)
    assert status_of(one.lock, back.fh, back.stateid, b"o", 0, 10) == n.NFS4ERR_GRACE
    one.lock(back.fh, back.stateid, b"o", 0, 10, reclaim=True)
    assert one.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    late = one.run(op(n.OP_PUTROOTFH), open_op(by_name(b"f"), READ | NO_DELEG, owner=b"p"))
    assert late.status == n.NFS4_OK
    status = status_of(one.lock, back.fh, back.stateid, b"p", 20, 10, reclaim=True)
    assert status == n.NFS4ERR_NO_GRACE


def test_what_could_be_in_conflict_with_a_reclaim_waits(host: Host) -> None:
    """8.4.2.1: GRACE also for who has no stateid, and for changes of names and attributes."""
    one, plain = kept(host), FileClient(Session(host.service, b"plain"))
    mine = one.create(b"f")
    plain.open(b"f")
    again(host, one)
    remove = op(n.OP_PUTROOTFH), op(n.OP_REMOVE, opaque(b"f"))
    values = bitmap(n.FATTR4_MODE) + opaque(u32(0o600))
    setattr_mode = op(n.OP_SETATTR, stateid(ANONYMOUS), values)

    def outcomes() -> list[int]:
        return [
            one.run(*remove).status,
            one.run(putfh(mine.fh), setattr_mode).status,
            one.run(putfh(mine.fh), op(n.OP_READ, stateid(ANONYMOUS), bytes(12))).status,
        ]

    assert outcomes() == [n.NFS4ERR_GRACE] * 3
    one.write(mine.fh, mine.stateid, 0, b"x")
    for _ in range(3 * int(host.service.lease.seconds)):
        host.runner.advance(1)
        one.test()
    assert outcomes() == [n.NFS4_OK] * 3


def test_reclaims_in_conflict_with_what_was_kept(host: Host) -> None:
    """8.4.2.1, 15.1.9: RECLAIM_CONFLICT, since a client that is kept was first."""
    one, two = kept(host), FileClient(Session(host.service, b"plain"))
    mine, theirs = one.create(b"f"), two.open(b"f")
    host.restart()
    assert isinstance(one.session, Kept)
    one.session.reconnect(host)
    host.service.states._states[mine.stateid.other].file.share(  # type: ignore[union-attr]
        host.service.states._states[mine.stateid.other], BOTH, DENY_WRITE, 1 << 14
    )
    two = FileClient(Session(host.service, b"plain", reclaim_complete=False))
    claim = u32(n.CLAIM_PREVIOUS) + u32(n.OPEN_DELEGATE_NONE)
    status = status_of(two.open, fh=theirs.fh, claim=claim, access=WRITE)
    assert status == n.NFS4ERR_RECLAIM_CONFLICT


@pytest.mark.parametrize("kind", [n.OPEN_DELEGATE_READ, n.OPEN_DELEGATE_WRITE])
def test_delegations_are_reclaimed(host: Host, kind: int) -> None:
    """10.2.1: with the open that they came with."""
    one = FileClient(Session(host.service, b"plain"))
    access = BOTH if kind == n.OPEN_DELEGATE_WRITE else READ
    opened = one.create(b"f", access | NO_DELEG)
    host.restart()
    one = FileClient(Session(host.service, b"plain", reclaim_complete=False))
    claim = u32(n.CLAIM_PREVIOUS) + u32(kind)
    back = one.open(fh=opened.fh, claim=claim, access=access)
    assert (back.delegation.kind, back.delegation.recall) == (kind, False)
