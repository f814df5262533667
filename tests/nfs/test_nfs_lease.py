"""Leases, courtesy, grace and reclaim (RFC 8881 8.3, 8.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from extfs.core import ROOT_INODE, Filesystem, HolderKind, HolderState, Iomode, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.clients import Client, Standing
from extfs.nfs.compound import Operation
from extfs.nfs.effects import Waiting, run_here
from extfs.nfs.errors import NfsError
from extfs.nfs.lease import COURTESY_SECONDS, IDLE_SECONDS, Grace
from extfs.nfs.records import Records
from extfs.nfs.service import ServiceOptions
from extfs.nfs.stateids import Kind, State
from nfs import wire
from nfs.conftest import DEVICE_BYTES
from nfs.handshake import PERSIST, RECLAIM_COMPLETE, Kept, Server, destroy_session
from nfs.wire import Session, create_session, op

LEASE = 40.0
GRACE = 30.0
OPTIONS = ServiceOptions(lease_seconds=LEASE, grace_seconds=GRACE)


@pytest.fixture
def server() -> Iterator[Server]:
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device()) as fs:
            yield Server(fs, OPTIONS)


def client_of(session: Session) -> Client:
    found = session.service.clients.get(session.clientid)
    assert found is not None
    return found


def holds(monkeypatch: pytest.MonkeyPatch, server: Server, *clients: Client) -> None:
    """These clients hold state, as far as the lease is told."""
    monkeypatch.setattr(server.service.states, "has_state", lambda client: client in clients)


def open_status(server: Server, session: Session, *, reclaim: bool) -> int:
    """What an OPEN of the client is told before anything else."""
    try:
        server.service.lease.begin_open(client_of(session), reclaim)
    except NfsError as error:
        return error.status
    return n.NFS4_OK


# -- leases --


def test_a_client_without_state_goes_with_its_lease(server: Server) -> None:
    session = server.session()
    server.runner.advance(LEASE - 1)
    assert session.run().status == n.NFS4_OK
    server.runner.advance(LEASE - 1)
    assert session.run().status == n.NFS4_OK
    assert session.wire.compound(destroy_session(session.id)).status == n.NFS4_OK
    server.runner.advance(LEASE + 2)
    reply = session.wire.compound(create_session(session.clientid, 2))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID
    assert len(server.fs.records.load()) == 1


def test_a_client_that_only_has_a_session_goes_later(server: Server) -> None:
    away, gone = server.session(b"away"), server.session(b"gone")
    server.runner.advance(IDLE_SECONDS - 1)
    assert away.run().status == n.NFS4_OK
    server.runner.advance(3)
    reply = gone.wire.compound(wire.sequence(gone.id, 9))
    assert reply.status == n.NFS4ERR_BADSESSION
    assert away.run().status == n.NFS4_OK
    assert len(server.fs.records.load()) == 2


def test_courtesy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away for longer than its lease, it comes back to what it held."""
    session = server.session()
    client = client_of(session)
    holds(monkeypatch, server, client)
    server.runner.advance(LEASE * 5)
    assert client.standing is Standing.COURTESY
    assert server.service.lease.is_courtesy(client)
    assert session.run().status == n.NFS4_OK
    assert client.standing is Standing.CONFIRMED
    assert not server.service.lease.conflict(client)


def test_who_waits_for_an_answer_is_not_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = server.session()
    client = client_of(session)
    holds(monkeypatch, server, client)
    waiting = Waiting(1e9)

    def slow(c: Any, args: Any, out: Any) -> Any:
        yield waiting

    operations = {**server.service.operations, n.OP_IO_ADVISE: Operation(slow)}
    monkeypatch.setattr(server.service, "operations", operations)
    request = wire.encode(wire.sequence(session.id, 2), wire.op(n.OP_IO_ADVISE))
    xid = session.wire.send(request)
    server.runner.advance(LEASE * 3)
    assert not server.service.lease.conflict(client)
    waiting.wake()
    assert wire.read_compound(session.wire.results(xid)).status == n.NFS4_OK
    server.runner.advance(2)
    assert server.service.lease.conflict(client)


def test_create_session_ends_a_courtesy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    session = server.session()
    client = client_of(session)
    holds(monkeypatch, server, client)
    server.runner.advance(LEASE * 2)
    assert session.wire.compound(create_session(session.clientid, 2)).status == n.NFS4_OK
    assert not server.service.lease.conflict(client)


def test_a_conflict_ends_a_courtesy_durably(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8.4.3, first edge: what was given to somebody else cannot be reclaimed."""
    session = server.session()
    client = client_of(session)
    holds(monkeypatch, server, client)
    assert not server.service.lease.conflict(client)
    server.runner.advance(LEASE + 2)
    assert server.service.lease.conflict(client)
    assert server.service.lease.conflict(client)
    assert server.service.records.pending  # the COMPOUND of the conflict commits it
    run_here(server.service.records.durable())
    assert len(server.fs.records.load()) == 1
    assert session.wire.compound(wire.sequence(session.id, 9)).status == n.NFS4ERR_BADSESSION
    server.restart()
    assert not server.service.lease.in_grace()
    again = server.session(reclaim_complete=False)
    assert open_status(server, again, reclaim=True) == n.NFS4ERR_NO_GRACE


def test_a_compound_commits_what_it_expired(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = server.session(b"one"), server.session(b"two")
    client = client_of(session)
    holds(monkeypatch, server, client)

    def conflicting(c: Any, args: Any, out: Any) -> None:
        assert c.service.lease.conflict(client)

    operations = {**server.service.operations, n.OP_IO_ADVISE: Operation(conflicting)}
    monkeypatch.setattr(server.service, "operations", operations)
    server.runner.now += LEASE + 0.5
    assert len(server.fs.records.load()) == 3
    assert other.run(wire.op(n.OP_IO_ADVISE)).status == n.NFS4_OK
    assert len(server.fs.records.load()) == 2


def test_the_lease_is_over_before_the_next_tick(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = server.session()
    client = client_of(session)
    holds(monkeypatch, server, client)
    server.runner.now += LEASE + 0.1
    assert client.standing is Standing.CONFIRMED
    assert server.service.lease.conflict(client)


def test_courtesy_is_not_for_ever(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(server.session())
    holds(monkeypatch, server, client)
    server.runner.advance(LEASE + 2)
    assert client.standing is Standing.COURTESY
    server.runner.now += COURTESY_SECONDS
    server.runner.advance(2)
    assert client.standing is Standing.GONE


def test_without_courtesy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.options = ServiceOptions(lease_seconds=LEASE, courtesy=False)
    server.restart()
    client = client_of(server.session())
    holds(monkeypatch, server, client)
    server.runner.advance(LEASE + 2)
    assert client.standing is Standing.GONE


def test_courtesy_clients_make_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.options = ServiceOptions(lease_seconds=LEASE, clients=3)
    server.restart()
    sessions = []
    for number in range(3):
        sessions.append(server.session(b"%d" % number))
        server.runner.advance(1)
    clients = [client_of(session) for session in sessions]
    holds(monkeypatch, server, *clients)
    server.runner.advance(LEASE + 4)
    assert sessions[0].run().status == n.NFS4_OK
    server.session(b"more")
    assert [client.standing for client in clients] == [
        Standing.CONFIRMED,
        Standing.GONE,
        Standing.COURTESY,
    ]


# -- grace --


def test_no_grace_when_nobody_can_reclaim(server: Server) -> None:
    assert not server.service.lease.in_grace()
    server.session(b"incomplete", reclaim_complete=False)
    server.restart()
    assert not server.service.lease.in_grace()
    # What cannot reclaim is forgotten.
    assert len(server.fs.records.load()) == 1


def test_before_reclaim_complete_nothing_new(server: Server) -> None:
    """18.51.3"""
    session = server.session(reclaim_complete=False)
    assert open_status(server, session, reclaim=False) == n.NFS4ERR_GRACE
    assert open_status(server, session, reclaim=True) == n.NFS4ERR_NO_GRACE
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert open_status(server, session, reclaim=False) == n.NFS4_OK
    assert open_status(server, session, reclaim=True) == n.NFS4ERR_NO_GRACE


def test_after_a_restart(server: Server) -> None:
    old = server.session(b"one")
    server.restart()
    connection = server.wire()
    assert connection.compound(wire.sequence(old.id, 2)).status == n.NFS4ERR_BADSESSION
    reply = connection.compound(create_session(old.clientid, 2))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID


def test_reclaim(server: Server) -> None:
    server.session(b"one")
    server.session(b"two")
    server.restart()
    assert server.service.lease.in_grace()
    one = server.session(b"one", reclaim_complete=False)
    new = server.session(b"new", reclaim_complete=False)
    assert open_status(server, one, reclaim=True) == n.NFS4_OK
    assert open_status(server, one, reclaim=False) == n.NFS4ERR_GRACE
    assert open_status(server, new, reclaim=True) == n.NFS4ERR_RECLAIM_BAD
    assert one.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert open_status(server, one, reclaim=True) == n.NFS4ERR_NO_GRACE
    assert open_status(server, one, reclaim=False) == n.NFS4ERR_GRACE
    # The last one that could reclaim ends the period.
    two = server.session(b"two", b"rebooted")
    assert not server.service.lease.in_grace()
    assert open_status(server, two, reclaim=False) == n.NFS4_OK
    assert open_status(server, one, reclaim=False) == n.NFS4_OK


def test_grace_ends_by_time(server: Server) -> None:
    server.session(b"one")
    server.session(b"two")
    server.restart()
    server.session(b"one")
    server.runner.advance(GRACE - 2)
    assert server.service.lease.in_grace()
    server.runner.advance(4)
    assert not server.service.lease.in_grace()
    late = server.session(b"two", reclaim_complete=False)
    assert open_status(server, late, reclaim=True) == n.NFS4ERR_NO_GRACE


def test_who_missed_the_grace_period_cannot_reclaim_in_the_next(server: Server) -> None:
    """8.4.3, second edge."""
    server.session(b"one")
    server.session(b"late")
    server.restart()
    server.session(b"one")
    confirmed = server.session(b"late", reclaim_complete=False)
    server.runner.advance(GRACE - 1)
    assert confirmed.run().status == n.NFS4_OK
    server.runner.advance(GRACE)
    assert not server.service.lease.in_grace()
    server.session(b"one", b"again")
    server.restart()
    late = server.session(b"late", reclaim_complete=False)
    assert open_status(server, late, reclaim=True) == n.NFS4ERR_RECLAIM_BAD


def test_a_restart_in_grace(server: Server) -> None:
    """Who had no time to reclaim may do it in the next period; and who had done it, or begun."""
    for owner in (b"done", b"begun", b"away"):
        server.session(owner)
    server.restart()
    server.session(b"done")
    server.session(b"begun", reclaim_complete=False)
    server.restart()
    assert server.service.lease.in_grace()
    for owner in (b"done", b"begun", b"away"):
        session = server.session(owner, reclaim_complete=False)
        assert open_status(server, session, reclaim=True) == n.NFS4_OK
        assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert not server.service.lease.in_grace()


def test_reclaims_extend_the_period(server: Server) -> None:
    server.session(b"one")
    server.session(b"two")
    server.restart()
    one = server.session(b"one", reclaim_complete=False)
    server.runner.advance(GRACE - 1)
    for _ in range(20):
        assert one.run().status == n.NFS4_OK
        assert open_status(server, one, reclaim=True) == n.NFS4_OK
        server.runner.advance(1)
    assert server.service.lease.in_grace()
    server.runner.advance(3)
    assert not server.service.lease.in_grace()
    assert open_status(server, one, reclaim=True) == n.NFS4ERR_NO_GRACE


def test_reclaims_do_not_extend_it_for_ever(server: Server) -> None:
    server.session(b"one")
    server.session(b"two")
    server.restart()
    one = server.session(b"one", reclaim_complete=False)
    for _ in range(int(2 * GRACE) + 4):
        one.run()
        open_status(server, one, reclaim=True)
        server.runner.advance(1)
    assert not server.service.lease.in_grace()


@pytest.mark.expect_log("the end of the grace period cannot be|client records cannot be written")
def test_the_period_does_not_end_before_that_is_durable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.session(b"one")
    server.restart()
    records = server.service.records

    def failing(changes: object) -> None:
        raise OSError(5, "as told")

    with monkeypatch.context() as broken:
        broken.setattr(records, "_put", failing)
        server.runner.advance(GRACE + 2)
        assert server.service.lease.grace is Grace.ENDING
        assert server.service.lease.in_grace()
    server.runner.advance(3)
    assert not server.service.lease.in_grace()


def test_many_clients(server: Server) -> None:
    owners = [b"client %d" % number for number in range(300)]
    for owner in owners:
        server.session(owner)
    server.restart()
    for owner in owners[:150]:
        server.session(owner)
    assert server.service.lease.in_grace()
    server.runner.advance(GRACE + 2)
    assert not server.service.lease.in_grace()
    assert len(server.fs.records.load()) == 1 + 150


# -- the core's holder of a client --


def holder_of(server: Server, session: Session) -> int:
    found: int = run_here(client_of(session).holder(server.service))
    return found


def state_of(server: Server, holder: int) -> HolderState | None:
    found = server.fs.layouts.holder(holder)
    return None if found is None else found.state


def granted(server: Server, holder: int) -> int:
    """A file with a RW grant of this holder; returns its inode."""
    stat = server.fs.mknod(ROOT_INODE, b"granted", 0o100644)
    server.fs.layouts.get(stat.ino, holder, Iomode.RW, 0, 65536)
    return stat.ino


def test_a_holder_is_registered_once(server: Server) -> None:
    session = server.session(b"host \xff")
    holder = holder_of(server, session)
    assert holder_of(server, session) == holder
    record = server.fs.layouts.holder(holder)
    assert record is not None
    assert record.spec.kind is HolderKind.CLIENT
    assert record.spec.name == "host ."
    assert record.spec.fence == f"nfs:{session.clientid:x}"


def test_the_holder_of_an_expired_client_is_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = server.session()
    holder = holder_of(server, session)
    ino = granted(server, holder)
    holds(monkeypatch, server, client_of(session))
    server.service.lease.expire(client_of(session))
    assert state_of(server, holder) is HolderState.LOST
    assert server.fs.layouts.grants(ino)


def test_a_client_that_restarted_has_returned_everything(server: Server) -> None:
    session = server.session(b"one", b"boot")
    holder = holder_of(server, session)
    ino = granted(server, holder)
    server.session(b"one", b"again")
    assert state_of(server, holder) in (None, HolderState.GONE)
    assert not server.fs.layouts.grants(ino)


def restart_core(server: Server) -> None:
    """The holders of before are lost, as after a restart of the daemon."""
    for record in server.fs.layouts.holders():
        server.fs.layouts.lost(record.id)
    server.restart()


def test_after_a_restart_the_same_client_has_its_holder(server: Server) -> None:
    session = server.session(b"one", b"boot")
    holder = holder_of(server, session)
    ino = granted(server, holder)
    restart_core(server)
    again = server.session(b"one", b"boot", reclaim_complete=False)
    assert client_of(again).holder_id == holder
    assert state_of(server, holder) is HolderState.LIVE
    assert server.fs.layouts.grants(ino)
    # Layouts are not reclaimed: with RECLAIM_COMPLETE the old ones are given up.
    assert again.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert not server.fs.layouts.grants(ino)
    assert holder_of(server, again) == holder


def test_after_a_restart_of_both_the_old_holder_is_gone(server: Server) -> None:
    session = server.session(b"one", b"boot")
    holder = holder_of(server, session)
    ino = granted(server, holder)
    restart_core(server)
    again = server.session(b"one", b"again")
    assert state_of(server, holder) in (None, HolderState.GONE)
    assert not server.fs.layouts.grants(ino)
    assert holder_of(server, again) != holder


# -- clients that a restart keeps --


class Thing(State):
    """A state that says how often it was changed."""

    kind = Kind.OPEN

    def to_record(self) -> bytes:
        return self.other + self.seqid.to_bytes(4, "big")

    @classmethod
    def restored(cls, client: Client, body: bytes) -> Thing | None:
        if body[-1] == 99:
            return None
        thing = cls(client, None, body[:12])
        thing.seqid = int.from_bytes(body[12:], "big")
        return thing


@pytest.fixture
def things(monkeypatch: pytest.MonkeyPatch) -> list[Thing]:
    """What the next starts of the server restore."""
    found: list[Thing] = []
    begin = Records.restore

    def restored(client: Client, body: bytes) -> Thing | None:
        thing = Thing.restored(client, body)
        if thing is not None:
            found.append(thing)
        return thing

    def restore(records: Records) -> None:
        found.clear()
        records.restorers[Kind.OPEN] = restored
        begin(records)

    monkeypatch.setattr(Records, "restore", restore)
    return found


def test_a_kept_client(server: Server, things: list[Thing]) -> None:
    session = Kept(server)
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    records = server.service.records
    one = Thing(client_of(session), None, b"one state...")
    two = Thing(client_of(session), None, b"another one.")
    for thing in (one, two):
        records.state_changed(thing)
    run_here(records.durable())
    one.bump()
    records.state_changed(one)
    records.state_dropped(two)
    run_here(records.durable())
    server.restart()
    assert not server.service.lease.in_grace()
    assert [(thing.other, thing.seqid) for thing in things] == [(b"one state...", 2)]
    # The session is there, and the client ID makes another.
    session.service, session.wire = server.service, server.wire()
    assert session.run(op(n.OP_PUTROOTFH)).status == n.NFS4_OK
    session.reopen(server, session.first + 1)
    assert client_of(session) is things[0].client
    assert open_status(server, session, reclaim=False) == n.NFS4_OK
    assert open_status(server, session, reclaim=True) == n.NFS4ERR_NO_GRACE
    # Dropped with its client.
    Kept(server, b"kept", b"rebooted")
    server.restart()
    assert not things


def test_a_compound_commits_the_states_it_changed(
    server: Server, things: list[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = Kept(server), server.session(b"other")

    def changing(c: Any, args: Any, out: Any) -> None:
        c.service.records.state_changed(Thing(c.client, None, b"x" * 12))

    operations = {**server.service.operations, n.OP_IO_ADVISE: Operation(changing)}
    monkeypatch.setattr(server.service, "operations", operations)
    before = len(server.fs.records.load())
    assert other.run(wire.op(n.OP_IO_ADVISE)).status == n.NFS4_OK
    assert len(server.fs.records.load()) == before
    assert session.run(wire.op(n.OP_IO_ADVISE)).status == n.NFS4_OK
    assert len(server.fs.records.load()) == before + 1


def test_a_state_that_cannot_be_restored_is_forgotten(server: Server, things: list[Thing]) -> None:
    session = Kept(server)
    thing = Thing(client_of(session), None, b"unrestorable")
    thing.seqid = 99
    server.service.records.state_changed(thing)
    run_here(server.service.records.durable())
    assert len(server.fs.records.load()) == 4
    server.restart()
    server.runner.advance(2)
    assert not things
    assert len(server.fs.records.load()) == 3


def test_a_retransmitted_create_session_after_a_restart(server: Server) -> None:
    """The client may not have seen the answer: it gets it, and the session that it is about."""
    session = Kept(server)
    server.restart()
    first = session.id
    session.reopen(server, session.first)
    assert session.id == first
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK


def test_a_kept_client_is_known_to_exchange_id(server: Server) -> None:
    first = Kept(server)
    server.restart()
    again = Kept(server)
    assert (again.clientid, again.confirmed) == (first.clientid, True)
    assert again.first == first.first + 1


def test_a_kept_client_has_a_lease(server: Server) -> None:
    Kept(server)
    server.restart()
    server.runner.advance(LEASE + 2)  # it has nothing but its session
    assert len(server.fs.records.load()) == 3
    server.runner.advance(IDLE_SECONDS)
    assert len(server.fs.records.load()) == 1
    server.restart()
    assert not server.service.lease.in_grace()


def test_a_kept_client_keeps_its_holder(server: Server) -> None:
    session = Kept(server)
    holder = holder_of(server, session)
    ino = granted(server, holder)
    restart_core(server)
    assert state_of(server, holder) is HolderState.LIVE
    session.reopen(server, session.first + 1)
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert client_of(session).holder_id == holder
    assert server.fs.layouts.grants(ino)


def test_kept_and_not_kept(server: Server) -> None:
    """The grace period of others is one for the kept client too, but it has nothing to reclaim."""
    session = Kept(server)
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    server.session(b"other")
    server.restart()
    assert server.service.lease.in_grace()
    session.reopen(server, session.first + 1)
    assert open_status(server, session, reclaim=False) == n.NFS4ERR_GRACE
    server.session(b"other")
    assert not server.service.lease.in_grace()


def test_clients_are_not_kept_when_the_option_says_so(server: Server) -> None:
    session = Kept(server)
    server.options = ServiceOptions(lease_seconds=LEASE, keep_clients=False)
    server.restart()
    reply = server.wire().compound(create_session(session.clientid, 2, PERSIST))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID
