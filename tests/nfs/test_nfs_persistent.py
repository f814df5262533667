"""Persistent sessions (RFC 8881 2.10.6.5): what is the same after the server was killed, and what a
request that is sent again gets."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, Cred, Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.records import Kind, SessionRecord
from extfs.nfs.riders import MARKS, RiderRecord
from extfs.nfs.service import ServiceOptions
from extfs.nfs.stateids import INVALID, Stateid
from extfs.nfs.xdr import XdrError
from nfs.calls import (
    Call,
    Failed,
    auth_sys,
    getattr_,
    getfh,
    lookup,
    mkdir,
    path,
    putrootfh,
    remove,
    rename,
    savefh,
    verify,
)
from nfs.file_calls import (
    BOTH,
    NO_DELEG,
    READ,
    WANT_READ,
    by_name,
    open_op,
    putfh,
    read_delegation,
    read_stateid,
    stateid,
)
from nfs.file_calls import create as how
from nfs.handshake import (
    PERSIST,
    RECLAIM_COMPLETE,
    bind_conn,
    created,
    destroy_clientid,
    destroy_session,
    identify,
)
from nfs.layout_calls import answer, take_callbacks
from nfs.persistence import Host, Persistent, SequenceError
from nfs.wire import Wire, create_session, op, opaque, u32, u64

FILE = 0o100644
ALICE = auth_sys(1001, 1001)


@pytest.fixture
def host() -> Iterator[Host]:
    with SimDevice(48 << 20) as sim:
        with sim.device() as device:
            mkfs(device)
        found = Host(sim)
        yield found
        found.fs.abandon()


@pytest.fixture
def client(host: Host) -> Persistent:
    found = Persistent().establish(host)
    assert found.granted & n.CREATE_SESSION4_FLAG_PERSIST
    return found


def records(fs: Filesystem, kind: int) -> list[bytes]:
    return [value for number, value in fs.records.load().items() if number >> 56 == kind]


def exists(fs: Filesystem, name: bytes) -> bool:
    try:
        fs.resolve(name)
    except OSError:
        return False
    return True


def refused(call: Any, *args: Any, **more: Any) -> int:
    with pytest.raises((SequenceError, Failed)) as caught:
        call(*args, **more)
    found: int = caught.value.status
    return found


# ---- the session -------------------------------------------------------------------------------


def test_it_goes_on_over_a_new_connection(host: Host, client: Persistent) -> None:
    client.do(host, putrootfh())
    assert not client.flags
    for _ in range(3):
        host.kill()
        client.do(host, putrootfh())
        down = n.SEQ4_STATUS_CB_PATH_DOWN | n.SEQ4_STATUS_CB_PATH_DOWN_SESSION
        assert client.flags & down == down
        assert not client.flags & ~down
        assert client.wire is not None
        bound = client.wire.compound(bind_conn(client.id, n.CDFC4_FORE_OR_BOTH))
        assert bound.status == n.NFS4_OK
        client.do(host, putrootfh())
        assert not client.flags
    assert host.service.counters["sessions_kept"] == 1
    [told] = host.service.status()["clients"]
    assert [one["persistent"] for one in told["sessions"]] == [True]
    assert told["address"] == "127.0.0.1"


def test_its_channels_are_as_they_were(host: Host, client: Persistent) -> None:
    before = host.service.sessions.get(client.id)
    host.kill()
    after = host.service.sessions.get(client.id)
    assert before is not None
    assert after is not None
    for name in ("fore", "back", "cb_program", "cb_auth", "minor", "record"):
        assert getattr(after, name) == getattr(before, name), name
    assert refused(client.send, host, 32, 1, putrootfh()) == n.NFS4ERR_BADSLOT


def test_what_backchannel_ctl_set_is_kept(host: Host, client: Persistent) -> None:
    control = op(n.OP_BACKCHANNEL_CTL, u32(0x40000123), u32(1), u32(n.AUTH_NONE))
    client.do(host, Call(control))
    host.cut(1)
    session = host.service.sessions.get(client.id)
    assert session is not None
    assert session.cb_program == 0x40000123


def test_its_end_is_durable(host: Host, client: Persistent) -> None:
    for slot in range(3):
        client.do(host, putrootfh(), mkdir(b"%d" % slot), slot=slot)
    assert len(records(host.fs, Kind.RIDER)) == 3
    client.do(host, Call(destroy_session(client.id)))
    assert not records(host.fs, Kind.SESSION)
    assert not records(host.fs, Kind.RIDER)
    host.cut(1)
    assert refused(client.do, host, putrootfh()) == n.NFS4ERR_BADSESSION


def test_it_can_be_ended_first_of_all_after_a_restart(host: Host, client: Persistent) -> None:
    host.kill()
    client.connect(host)
    assert client.wire is not None
    destroy = destroy_session(client.id)
    refusal = client.wire.compound(destroy, auth=ALICE).status
    assert refusal == n.NFS4ERR_CONN_NOT_BOUND_TO_SESSION
    assert client.wire.compound(destroy).status == n.NFS4_OK
    assert client.wire.compound(destroy_clientid(client.clientid)).status == n.NFS4_OK
    assert not records(host.fs, Kind.SESSION)


def test_it_goes_with_its_client(host: Host, client: Persistent) -> None:
    client.do(host, putrootfh(), mkdir(b"made"))
    host.kill()
    # The client has restarted: another verifier.
    wire = Wire(host.service)
    found = identify(wire, client.owner, b"rebooted")
    other = created(wire.compound(create_session(found.clientid, found.sequence, PERSIST)))
    assert refused(client.do, host, putrootfh()) == n.NFS4ERR_BADSESSION
    assert [SessionRecord.decode(r).identity for r in records(host.fs, Kind.SESSION)] == [other.id]
    assert not records(host.fs, Kind.RIDER)


def test_a_rider_that_was_left_is_removed(host: Host, client: Persistent) -> None:
    """And its number is not that of another session."""
    client.do(host, putrootfh(), mkdir(b"made"))
    [rider] = records(host.fs, Kind.RIDER)
    number = RiderRecord.decode(rider).number
    client.do(host, Call(destroy_session(client.id)))
    host.fs.records.put({number: rider})
    host.kill()
    again = Persistent().establish(host)
    session = host.service.sessions.get(again.id)
    assert session is not None
    assert session.record & 0xFF != RiderRecord.decode(rider).session
    assert not records(host.fs, Kind.RIDER)


def test_many_sessions(host: Host) -> None:
    """Each with its own riders."""
    clients = [Persistent(b"%d" % number).establish(host) for number in range(20)]
    for number, one in enumerate(clients):
        for slot in range(4):
            one.do(host, putrootfh(), mkdir(b"%d-%d" % (number, slot)), slot=slot)
    host.cut(5)
    for number, one in enumerate(clients):
        for slot in range(4):
            one.again(host, putrootfh(), mkdir(b"%d-%d" % (number, slot)), slot=slot)
    assert len(host.fs.readdir(ROOT_INODE)) == 80
    for one in clients:
        one.do(host, Call(destroy_session(one.id)))
    assert not records(host.fs, Kind.RIDER)


# ---- not granted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [ServiceOptions(persistent_sessions=0), ServiceOptions(keep_clients=False)],
    ids=["full", "not kept"],
)
def test_where_it_cannot_be_it_is_not_promised(host: Host, options: ServiceOptions) -> None:
    host.options = options
    host.kill()
    one = Persistent().establish(host)
    assert not one.granted & n.CREATE_SESSION4_FLAG_PERSIST
    one.do(host, putrootfh(), mkdir(b"made"))
    assert not records(host.fs, Kind.SESSION)
    assert not records(host.fs, Kind.RIDER)
    host.kill()
    assert refused(one.do, host, putrootfh()) == n.NFS4ERR_BADSESSION


def test_who_does_not_ask_is_not_promised_it(host: Host, client: Persistent) -> None:
    found = identify(Wire(host.service), client.owner)
    plain = created(Wire(host.service).compound(create_session(found.clientid, found.sequence, 2)))
    assert not plain.flags & n.CREATE_SESSION4_FLAG_PERSIST
    host.kill()
    client.do(host, putrootfh())
    client.id = plain.id
    assert refused(client.send, host, 0, 1, putrootfh()) == n.NFS4ERR_BADSESSION


def test_a_record_that_cannot_be_written(
    host: Host, client: Persistent, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets its session without the promise."""
    log_watch.expect("is not persistent")
    store = host.service.records._store
    put = store.put

    def full(values: dict[int, bytes], delete: Any = ()) -> None:
        if any(number >> 56 == Kind.SESSION for number in values):
            raise OSError(errno.ENOSPC, "full")
        put(values, delete)

    monkeypatch.setattr(store, "put", full)
    found = identify(Wire(host.service), client.owner)
    got = created(
        Wire(host.service).compound(create_session(found.clientid, found.sequence, PERSIST))
    )
    assert not got.flags & n.CREATE_SESSION4_FLAG_PERSIST
    assert len(records(host.fs, Kind.SESSION)) == 1
    other = Persistent(client.owner, client.clientid, got.id)
    other.do(host, putrootfh(), mkdir(b"made"))
    # Repeated, the answer is the same.
    again = created(
        Wire(host.service).compound(create_session(found.clientid, found.sequence, PERSIST))
    )
    assert again == got
    host.kill()
    client.do(host, putrootfh())


# ---- slots -------------------------------------------------------------------------------------


def test_numbers_of_a_slot_without_a_rider(host: Host, client: Persistent) -> None:
    """Any is the first after a restart; from then on it is the next, or the same."""
    for number in (1, 1000, 0xFFFFFFFF):
        host.kill()
        client.send(host, 5, number, putrootfh())
        assert refused(client.send, host, 5, number + 2 & 0xFFFFFFFF) == n.NFS4ERR_SEQ_MISORDERED
        client.send(host, 5, number, putrootfh())
        client.send(host, 5, number + 1 & 0xFFFFFFFF, putrootfh())


def test_numbers_of_a_slot_with_a_rider(host: Host, client: Persistent) -> None:
    client.numbers[2] = 0xFFFFFFF0
    host.kill()
    made = (putrootfh(), mkdir(b"made"))
    client.do(host, *made, slot=2)
    rider = client.numbers[2]
    # From the rider's on, around the end of the numbers; not before it.
    for number in (rider + 1, rider + 15, rider + 100, rider + (1 << 31) - 1):
        host.kill()
        for old in (rider - 1, rider - 1000, rider - (1 << 31)):
            status = refused(client.send, host, 2, old & 0xFFFFFFFF, putrootfh())
            assert status == n.NFS4ERR_SEQ_MISORDERED
        other = refused(client.send, host, 2, rider, putrootfh(), mkdir(b"other"))
        assert other == n.NFS4ERR_SEQ_FALSE_RETRY
        client.send(host, 2, number & 0xFFFFFFFF, putrootfh())
        assert refused(client.send, host, 2, rider, *made) == n.NFS4ERR_SEQ_MISORDERED
    host.kill()
    assert refused(client.send, host, 2, rider, *made, auth=ALICE) == n.NFS4ERR_SEQ_FALSE_RETRY
    client.again(host, *made, slot=2)


def test_a_request_without_a_mark_is_executed_again(host: Host, client: Persistent) -> None:
    look = (putrootfh(), lookup(b"made"))
    client.do(host, putrootfh(), mkdir(b"made"))
    client.do(host, *look)
    host.kill()
    client.again(host, *look)
    host.fs.rmdir(ROOT_INODE, b"made")
    client.again(host, *look)  # from the cache of this life
    host.fs.sync()
    host.kill()
    assert refused(client.again, host, *look) == n.NFS4ERR_NOENT


def test_a_failure_leaves_no_mark(host: Host, client: Persistent) -> None:
    host.fs.mkdir(ROOT_INODE, b"made", 0o755)
    host.fs.sync()
    made = (putrootfh(), mkdir(b"made"))
    assert refused(client.do, host, *made) == n.NFS4ERR_EXIST
    assert not records(host.fs, Kind.RIDER)
    host.kill()
    host.fs.rmdir(ROOT_INODE, b"made")
    client.again(host, *made)
    assert exists(host.fs, b"made")


def test_more_marks_than_there_are(host: Host, client: Persistent) -> None:
    names = [b"%d" % number for number in range(MARKS + 1)]
    request = [call for name in names for call in (putrootfh(), mkdir(name))]
    failed = refused(client.do, host, *request)
    assert failed == n.NFS4ERR_TOO_MANY_OPS
    assert [exists(host.fs, name) for name in names] == [True] * MARKS + [False]
    host.kill()
    for name in names[:MARKS]:
        host.fs.rmdir(ROOT_INODE, name)
    assert refused(client.again, host, *request) == n.NFS4ERR_TOO_MANY_OPS
    assert not any(exists(host.fs, name) for name in names)
    # Sessions without the promise have no such bound.
    plain = Persistent(b"plain").establish(host, 2)
    plain.do(host, *request)


def test_an_answer_that_is_not_known_any_more(host: Host, client: Persistent) -> None:
    """The file that was looked at before it was removed: nothing is done, no answer is made up."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    size = {n.FATTR4_SIZE: u64(0)}
    requests = [
        (*path(b"file"), getattr_(n.FATTR4_SIZE), putrootfh(), remove(b"file")),
        (*path(b"file"), verify(size), putrootfh(), remove(b"file"), mkdir(b"made")),
    ]
    for request in requests:
        client.do(host, *request)
        host.kill()
        if not exists(host.fs, b"file"):
            host.fs.mknod(ROOT_INODE, b"other", FILE)
        with pytest.raises(Failed) as caught:
            client.again(host, *request)
        assert caught.value.status == n.NFS4ERR_RETRY_UNCACHED_REP
        assert caught.value.index == 0
        assert not exists(host.fs, b"file")
        assert host.service.counters["replies_lost"] == 1
        # The slot goes on.
        client.do(host, putrootfh())
        host.fs.rename(ROOT_INODE, b"other", ROOT_INODE, b"file")


def test_only_the_last_request_of_a_slot_has_marks(host: Host, client: Persistent) -> None:
    client.do(host, putrootfh(), mkdir(b"a"))
    client.do(host, putrootfh(), savefh(), rename(b"a", b"b"))
    [rider] = records(host.fs, Kind.RIDER)
    decoded = RiderRecord.decode(rider)
    assert [mark.op for mark in decoded.marks] == [n.OP_RENAME]
    assert decoded.sequence == client.numbers[0]
    assert decoded.encode() == rider


# ---- states ------------------------------------------------------------------------------------


def opened(body: Any) -> tuple[Stateid, Any]:
    held = read_stateid(body)
    body.boolean(), body.u64(), body.u64(), body.u32(), body.bitmap()
    return held, read_delegation(body)


def open_call(access: int = BOTH | NO_DELEG, **more: Any) -> tuple[Call, ...]:
    encoded = open_op(by_name(b"file"), access, **more)
    return putrootfh(), Call(encoded, opened), getfh()


def lock_call(held: Stateid, owner: bytes | None, offset: int) -> Call:
    if owner is not None:
        locker = u32(1) + u32(0) + stateid(held) + u32(0) + u64(0) + opaque(owner)
    else:
        locker = u32(0) + stateid(held) + u32(0)
    fields = (u32(n.WRITE_LT), u32(0), u64(offset), u64(10), locker)
    return Call(op(n.OP_LOCK, *fields), read_stateid)


def locku_call(held: Stateid) -> Call:
    fields = (u32(n.WRITE_LT), u32(0), stateid(held), u64(0), u64(5))
    return Call(op(n.OP_LOCKU, *fields), read_stateid)


def sent_again(host: Host, client: Persistent, *request: Call) -> list[Any]:
    """A request that was executed, durably, and not answered; then what it gets."""
    first = client.do(host, *request)
    host.runner.advance(1.5)
    host.kill()
    again = client.again(host, *request)
    assert again == first
    assert client.again(host, *request) == first
    return again


def test_states_are_changed_once(host: Host, client: Persistent) -> None:
    """Stateids and their seqids are those of the first answer."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, _), fh = sent_again(host, client, *open_call(READ | NO_DELEG))
    assert held.seqid == 1
    file = Call(putfh(fh))
    _, (held, _), _ = sent_again(host, client, *open_call())
    assert held.seqid == 2
    _, locks = sent_again(host, client, file, lock_call(held, b"locker", 0))
    assert locks.seqid == 1
    _, locks = sent_again(host, client, file, lock_call(locks, None, 20))
    assert locks.seqid == 2
    _, locks = sent_again(host, client, file, locku_call(locks))
    assert locks.seqid == 3
    down = op(n.OP_OPEN_DOWNGRADE, stateid(held), u32(0), u32(READ), u32(0))
    _, held = sent_again(host, client, file, Call(down, read_stateid))
    assert held.seqid == 3
    close = Call(op(n.OP_CLOSE, u32(0), stateid(held)), read_stateid)
    _, gone = sent_again(host, client, file, close)
    assert gone == INVALID
    assert host.service.states.status()["opens"] == 0


def test_open_with_a_delegation(host: Host, client: Persistent) -> None:
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, given), fh = sent_again(host, client, *open_call(READ | WANT_READ))
    assert given.given
    file = Call(putfh(fh))
    sent_again(host, client, file, Call(op(n.OP_DELEGRETURN, stateid(given.stateid))))
    assert host.service.states.status()["delegations"] == 0
    close = Call(op(n.OP_CLOSE, u32(0), stateid(held)), read_stateid)
    sent_again(host, client, file, close)


def test_open_that_makes_a_file_is_one_open(host: Host, client: Persistent) -> None:
    new = how(n.GUARDED4, mode=u32(0o600))
    _, (held, _), fh = sent_again(host, client, *open_call(how=new))
    assert held.seqid == 1
    host.fs.handle_check(host.fs.resolve(b"file").ino, host.fs.resolve(b"file").generation)
    assert len(fh) > 0
    assert host.service.states.status()["opens"] == 1


def test_free_stateid_and_reclaim_complete(host: Host, client: Persistent) -> None:
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, _), fh = client.do(host, *open_call())
    file = Call(putfh(fh))
    _, locks = client.do(host, file, lock_call(held, b"locker", 0))
    unlock = Call(
        op(n.OP_LOCKU, u32(n.WRITE_LT), u32(0), stateid(locks), u64(0), u64(10)), read_stateid
    )
    _, locks = client.do(host, file, unlock)
    sent_again(host, client, Call(op(n.OP_FREE_STATEID, stateid(locks))))
    # A new request for what has ended is an error.
    status = refused(client.do, host, Call(op(n.OP_FREE_STATEID, stateid(locks))))
    assert status == n.NFS4ERR_BAD_STATEID
    other = Persistent(b"other")
    other.wire = Wire(host.service)
    found = identify(other.wire, other.owner)
    other.clientid = found.clientid
    reply = other.wire.compound(create_session(found.clientid, found.sequence, PERSIST))
    other.id = created(reply).id
    sent_again(host, other, Call(RECLAIM_COMPLETE))
    assert refused(other.do, host, Call(RECLAIM_COMPLETE)) == n.NFS4ERR_COMPLETE_ALREADY


def test_what_was_granted_before_a_restart_is_not_refused_in_grace(
    host: Host, client: Persistent
) -> None:
    """Who is told GRACE sends a new request, and a file that it made would be in its way."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, _), fh = client.do(host, *open_call())
    new = Call(open_op(by_name(b"new"), BOTH | NO_DELEG, how=how(n.GUARDED4)), opened)
    requests = [
        (putrootfh(), new, getfh()),
        open_call(owner=b"another"),
        (Call(putfh(fh)), lock_call(held, b"locker", 0)),
    ]
    first = [client.do(host, *request, slot=slot) for slot, request in enumerate(requests)]
    Persistent(b"not kept").establish(host, 2)  # who has something to reclaim
    host.runner.advance(1.5)
    host.kill()
    assert host.service.lease.in_grace()
    again = [client.again(host, *request, slot=slot) for slot, request in enumerate(requests)]
    assert again == first
    for slot, request in enumerate(requests):
        assert refused(client.do, host, *request, slot=slot) == n.NFS4ERR_GRACE
        assert refused(client.do, host, *request, slot=slot + 10) == n.NFS4ERR_GRACE


def test_two_changes_of_a_state_in_one_request(host: Host, client: Persistent) -> None:
    """The last of them says that the first was done, too."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, _), fh = client.do(host, *open_call())
    file = Call(putfh(fh))
    _, locks = client.do(host, file, lock_call(held, b"locker", 0))
    request = file, lock_call(locks, None, 20), locku_call(Stateid(0, locks.other))
    _, one, two = client.do(host, *request)
    assert (one.seqid, two.seqid) == (2, 3)
    host.kill()
    assert client.again(host, *request)[1:] == [two, two]


def test_a_directory_that_is_gone_since(host: Host, client: Persistent) -> None:
    """What was done in it was done."""
    _, _, fh = client.do(host, putrootfh(), mkdir(b"dir"), getfh())
    request = Call(putfh(fh)), mkdir(b"inside"), getfh()
    first = client.do(host, *request)
    host.fs.rmdir(host.fs.resolve(b"dir").ino, b"inside")
    host.fs.rmdir(ROOT_INODE, b"dir")
    host.fs.sync()
    host.kill()
    host.fs.drain()
    assert client.again(host, *request) == first
    assert refused(client.do, host, *request) == n.NFS4ERR_STALE


def test_an_open_that_was_lost_is_bad(host: Host, client: Persistent) -> None:
    """Not stale: the client would look for a new lease, and this one is in order."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    host.fs.sync()
    _, (held, _), fh = client.do(host, *open_call())
    host.cut(1)
    read = Call(op(n.OP_READ, stateid(held), u64(0), u32(10)))
    client.do(host, putrootfh())
    assert refused(client.do, host, Call(putfh(fh)), read) == n.NFS4ERR_BAD_STATEID


# ---- the backchannel ---------------------------------------------------------------------------


class Backchannel:
    """The client's side of it: in each slot it takes only the next request."""

    def __init__(self) -> None:
        self.sequences: dict[int, int] = {}
        self.taken = self.refused = 0

    def serve(self, wire: Wire) -> None:
        while calls := take_callbacks(wire):
            for call in calls:
                if call.sequence != self.sequences.get(call.slot, 0) + 1:
                    self.refused += 1
                    answer(wire, call, n.NFS4_OK, n.NFS4ERR_SEQ_MISORDERED)
                    continue
                self.sequences[call.slot] = call.sequence
                self.taken += 1
                answer(wire, call, n.NFS4_OK)


def call_back(host: Host, client: Persistent) -> list[Any]:
    """A callback of the server; its answers."""
    found = host.service.clients.get(client.clientid)
    assert found is not None
    got: list[Any] = []
    body = u32(n.OP_CB_RECALL_ANY) + u32(0) + u32(0)
    host.service.callbacks.call(found, body, 1, got.append)
    return got


def test_its_numbers_go_on(host: Host, client: Persistent) -> None:
    back = Backchannel()
    assert client.wire is not None
    for many in (1, 3, 20, 0, 7, 1):
        for _ in range(many):
            got = call_back(host, client)
            back.serve(client.wire)
            assert [reply.status for reply in got] == [n.NFS4_OK]
        # One that the client has executed, and whose answer is lost.
        lost = call_back(host, client)
        [call] = take_callbacks(client.wire)
        if call.sequence == back.sequences.get(call.slot, 0) + 1:
            back.sequences[call.slot] = call.sequence
        assert not lost
        host.cut(many)
        client.do(host, putrootfh())
        client.wire.compound(bind_conn(client.id, n.CDFC4_FORE_OR_BOTH))
    assert back.taken == 32
    assert back.refused < 9 * 6
    session = host.service.sessions.get(client.id)
    assert session is not None
    assert not session.back_fault


def test_a_client_that_counts_otherwise_is_told(host: Host, client: Persistent) -> None:
    """18.46.3: it makes another session."""
    back = Backchannel()
    assert client.wire is not None
    call_back(host, client)
    back.serve(client.wire)
    host.kill()
    back.sequences[0] = 77
    client.do(host, putrootfh())
    client.wire.compound(bind_conn(client.id, n.CDFC4_FORE_OR_BOTH))
    got = call_back(host, client)
    back.serve(client.wire)
    assert got == [None]
    client.do(host, putrootfh())
    assert client.flags & n.SEQ4_STATUS_BACKCHANNEL_FAULT


def test_layouts_wait_for_the_backchannel(host: Host, client: Persistent) -> None:
    """LAYOUTUNAVAILABLE would make the client go through the server for a while."""
    host.fs.mknod(ROOT_INODE, b"file", FILE)
    _, (held, _), fh = client.do(host, *open_call())
    host.runner.advance(1.5)
    host.kill()
    get = Call(
        op(
            n.OP_LAYOUTGET,
            u32(0),
            u32(n.LAYOUT4_BLOCK_VOLUME),
            u32(n.LAYOUTIOMODE4_RW),
            u64(0),
            u64(65536),
            u64(4096),
            stateid(held),
            u32(65536),
        )
    )
    assert refused(client.do, host, Call(putfh(fh)), get) == n.NFS4ERR_DELAY
    host.runner.advance(11)
    assert refused(client.do, host, Call(putfh(fh)), get) == n.NFS4ERR_LAYOUTUNAVAILABLE
    assert client.wire is not None
    client.wire.compound(bind_conn(client.id, n.CDFC4_FORE_OR_BOTH))
    client.send(host, 0, client.next(), Call(putfh(fh)), get)


# ---- records -----------------------------------------------------------------------------------


def test_records_that_are_damaged(host: Host, client: Persistent, log_watch: LogWatch) -> None:
    """Every prefix of them is an error and nothing else; the server starts without them."""
    client.do(host, putrootfh(), mkdir(b"made"))
    [session], [rider] = records(host.fs, Kind.SESSION), records(host.fs, Kind.RIDER)
    for length in range(len(session)):
        with pytest.raises(XdrError):
            SessionRecord.decode(session[:length])
    for slots in (0, 65537, 0xFFFFFFFF):
        at = 4 + 8 + 16 + 4 + 16
        with pytest.raises(XdrError, match="slots"):
            SessionRecord.decode(session[:at] + u32(slots) + session[at + 4 :])
    for length in range(len(rider)):
        with pytest.raises(ValueError, match="bytes"):
            RiderRecord.decode(rider[:length])
    for count in (0, MARKS + 1, 0xFFFFFFFF):
        with pytest.raises(ValueError, match="marks"):
            RiderRecord.decode(rider[:20] + count.to_bytes(4, "little") + rider[24:])
    stored = host.fs.records.load()
    log_watch.expect("is unknown, it stays as it is")
    host.fs.records.put(
        {number: value[:40] for number, value in stored.items() if number >> 56 in (3, 4)}
    )
    host.kill()
    assert refused(client.do, host, putrootfh()) == n.NFS4ERR_BADSESSION
    Persistent(client.owner).establish(host)


def test_operations_of_others_carry_nothing(host: Host, client: Persistent) -> None:
    """A mark is of one call in one thread."""
    client.do(host, putrootfh(), mkdir(b"made"))
    before = records(host.fs, Kind.RIDER)
    host.fs.mkdir(ROOT_INODE, b"local", 0o755, Cred())
    host.fs.unlink(ROOT_INODE, host.fs.mknod(ROOT_INODE, b"x", FILE) and b"x")
    assert records(host.fs, Kind.RIDER) == before
