"""Delegations (RFC 8881 10.2 to 10.4, 18.6, 18.49, 20.1, 20.2), also against local users."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from extfs.core import DelegationConflict
from extfs.nfs import constants as n
from extfs.nfs.delegations import CONTENDED_SECONDS, REFUSALS, RESEND_SECONDS
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.stateids import Stateid
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    BOTH,
    DENY_READ,
    NO_DELEG,
    PUTROOTFH,
    READ,
    WANT_ANY,
    WANT_READ,
    WANT_WRITE,
    WRITE,
    Delegation,
    FileClient,
    Opened,
    StatusError,
    by_name,
    create,
    open_op,
    putfh,
    read_delegation,
    read_stateid,
    stateid,
)
from nfs.layout_calls import Callback, answer, callback_reply, events, take_callbacks
from nfs.wire import (
    Reply,
    Runner,
    Session,
    bitmap,
    encode,
    make_service,
    next_result,
    op,
    opaque,
    read_compound,
    sequence,
    u32,
)

SIGNAL = n.OPEN4_SHARE_ACCESS_WANT_SIGNAL_DELEG_WHEN_RESRC_AVAIL
CHANGE_AND_SIZE = op(n.OP_GETATTR, bitmap(n.FATTR4_CHANGE, n.FATTR4_SIZE))


@pytest.fixture
def one(world: World) -> FileClient:
    return FileClient(world.session(b"one"))


@pytest.fixture
def two(world: World) -> FileClient:
    return FileClient(world.session(b"two"))


@pytest.fixture
def path(world: World, one: FileClient) -> Iterator[bytes]:
    """An old file, so that nothing of its creation is open."""
    made = one.create(b"f")
    one.write(made.fh, made.stateid, 0, b"contents")
    one.close(made.fh, made.stateid)
    yield b"f"
    states = world.service.states
    for client in list(states._of_client):  # what is in the tables is consistent to the end
        states.client_lost(client)
    assert states.status() == dict.fromkeys(states.status(), 0)


def status_of(call: Any, *args: Any, **more: Any) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **more)
    return caught.value.status


def recall_of(client: FileClient) -> tuple[Callback, Stateid, bytes]:
    """The one callback that came, which is CB_RECALL."""
    (callback,) = take_callbacks(client.session.wire)
    assert callback.op == n.OP_CB_RECALL
    held = read_stateid(callback.body)
    assert callback.body.boolean() is False
    fh = callback.body.opaque(128)
    assert callback.body.done()
    return callback, held, fh


def ino_of(world: World) -> int:
    return world.fs.lookup(1, b"f").ino


def held_in_core(world: World, client: FileClient) -> list[bool]:
    """Kinds (write) of the client's delegations, as the core has them."""
    found = world.service.clients.get(client.session.clientid)
    assert found is not None
    return [d.write for d in world.fs.delegations.of(found.holder_id)] if found.holder_id else []


def start(client: FileClient, *operations: bytes) -> int:
    """Send a COMPOUND that may not be answered at once."""
    session = client.session
    session.numbers[1] = session.numbers.get(1, 0) + 1
    first = sequence(session.id, session.numbers[1], 1, 1)
    return session.wire.send(encode(first, *operations))


def finish(client: FileClient, xid: int) -> Reply:
    """The reply, behind SEQUENCE."""
    reply = read_compound(client.session.wire.results(xid))
    assert next_result(reply.body).status == n.NFS4_OK
    reply.body.fixed(16)
    for _ in range(5):
        reply.body.u32()
    return reply


def change_and_size(reply: Reply) -> tuple[int, int]:
    for _ in range(2):
        assert next_result(reply.body).status == n.NFS4_OK
    assert reply.body.bitmap() == 1 << n.FATTR4_CHANGE | 1 << n.FATTR4_SIZE
    change, size = struct.unpack(">QQ", reply.body.opaque(16))
    return change, size


# -- who gets one --


@pytest.mark.parametrize(
    ("access", "kind", "why"),
    [
        (READ, n.OPEN_DELEGATE_READ, None),
        (READ | WANT_READ, n.OPEN_DELEGATE_READ, None),
        (READ | WANT_ANY, n.OPEN_DELEGATE_READ, None),
        (READ | WANT_WRITE, n.OPEN_DELEGATE_READ, None),
        (READ | NO_DELEG, n.OPEN_DELEGATE_NONE_EXT, n.WND4_NOT_WANTED),
        (READ | 0x500, n.OPEN_DELEGATE_NONE_EXT, n.WND4_CANCELLED),
        (BOTH, n.OPEN_DELEGATE_NONE, None),
        (BOTH | WANT_WRITE, n.OPEN_DELEGATE_WRITE, None),
        (WRITE | WANT_ANY | SIGNAL, n.OPEN_DELEGATE_WRITE, None),
        (BOTH | WANT_READ, n.OPEN_DELEGATE_NONE_EXT, n.WND4_CONTENTION),
    ],
)
def test_who_gets_which(
    world: World, one: FileClient, path: bytes, access: int, kind: int, why: int | None
) -> None:
    """18.16.3: what is wanted, told when it is not had."""
    got = one.open(path, access).delegation
    assert (got.kind, got.why) == (kind, why)
    if got.given:
        assert got.stateid.seqid == 1
        assert held_in_core(world, one) == [kind == n.OPEN_DELEGATE_WRITE]
    else:
        assert held_in_core(world, one) == []


def test_nobody_gets_one_beside_writers(one: FileClient, two: FileClient, path: bytes) -> None:
    """10.4: READ beside readers, WRITE alone."""
    reader = two.open(path, READ | NO_DELEG)
    assert one.open(path, BOTH | WANT_WRITE).delegation.why == n.WND4_CONTENTION
    two.close(reader.fh, reader.stateid)
    assert two.open(path, READ).delegation.kind == n.OPEN_DELEGATE_NONE
    assert two.open(path, READ | WANT_READ).delegation.why == n.WND4_CONTENTION


def test_readers_have_one_each(world: World, one: FileClient, two: FileClient, path: bytes) -> None:
    for client in (one, two):
        assert client.open(path, READ).delegation.kind == n.OPEN_DELEGATE_READ
        assert held_in_core(world, client) == [False]


def test_a_client_has_one_of_a_file(one: FileClient, path: bytes) -> None:
    """A second OPEN does not get it again."""
    assert one.open(path, READ).delegation.given
    assert one.open(path, READ, owner=b"b").delegation.kind == n.OPEN_DELEGATE_NONE
    assert one.open(path, READ | WANT_READ).delegation.why == n.WND4_RESOURCE
    assert one.open(path, READ | WANT_WRITE).delegation.why == n.WND4_NOT_SUPP_UPGRADE


def test_without_a_backchannel_there_is_none(world: World, one: FileClient, path: bytes) -> None:
    """10.2.1: nobody could recall it."""
    for session in world.service.clients.get(one.session.clientid).sessions:  # type: ignore[union-attr]
        world.service.callbacks.detach(session)
    assert one.open(path, READ | WANT_READ).delegation.why == n.WND4_RESOURCE


def test_it_is_good_for_io(one: FileClient, path: bytes) -> None:
    """10.4: its stateid reads, a WRITE one writes too."""
    got = one.open(path, READ)
    assert one.read(got.fh, got.delegation.stateid, 0, 100) == (b"contents", True)
    status = status_of(one.write, got.fh, got.delegation.stateid, 0, b"x")
    assert status == n.NFS4ERR_OPENMODE
    one.delegreturn(got.fh, got.delegation.stateid)
    assert one.test(got.delegation.stateid) == [n.NFS4ERR_BAD_STATEID]
    got = one.open(path, BOTH | WANT_WRITE)
    one.write(got.fh, got.delegation.stateid, 0, b"C")


# -- recalls --


def broken_by(name: str, client: FileClient, opened: Opened) -> Any:
    """An operation of somebody else, as a call to be made again and again."""
    setattr_mode = op(
        n.OP_SETATTR, bytes(16), bitmap(n.FATTR4_MODE), opaque(struct.pack(">I", 0o600))
    )
    calls = {
        "open for reading": lambda: client.open(b"f", READ | NO_DELEG),
        "open for writing": lambda: client.open(b"f", WRITE | NO_DELEG),
        "open with deny": lambda: client.open(b"f", READ | NO_DELEG, DENY_READ),
        "truncation": lambda: client.open(
            b"f", READ | NO_DELEG, how=create(n.UNCHECKED4, size=bytes(8))
        ),
        "read": lambda: client.read(opened.fh, ANONYMOUS, 0, 1),
        "write": lambda: client.write(opened.fh, ANONYMOUS, 0, b"x"),
        "setattr": lambda: client.on(opened.fh, setattr_mode),
        "remove": lambda: client.last(op(n.OP_PUTROOTFH), op(n.OP_REMOVE, opaque(b"f"))),
        "setxattr": lambda: client.on(
            opened.fh, op(n.OP_SETXATTR, u32(0), opaque(b"a"), opaque(b"v"))
        ),
    }
    return calls[name]


CHANGES = [
    "open for writing",
    "open with deny",
    "truncation",
    "write",
    "setattr",
    "remove",
    "setxattr",
]


@pytest.mark.parametrize("what", [*CHANGES, "open for reading", "read"])
@pytest.mark.parametrize("access", [READ | WANT_READ, BOTH | WANT_WRITE])
def test_conflicts_recall(
    world: World, one: FileClient, two: FileClient, path: bytes, access: int, what: str
) -> None:
    """10.4.1, 10.4.4: DELAY, one CB_RECALL, and after DELEGRETURN it goes on."""
    got = one.open(path, access)
    again = broken_by(what, two, got)
    if access & READ and not access & WRITE and what not in CHANGES:
        again()
        assert take_callbacks(one.session.wire) == []
        return
    assert status_of(again) == n.NFS4ERR_DELAY
    callback, held, fh = recall_of(one)
    assert (held, fh) == (got.delegation.stateid, got.fh)
    assert callback.referring == [(one.session.id, one.session.numbers[0], 0)]
    answer(one.session.wire, callback, n.NFS4_OK)
    assert status_of(again) == n.NFS4ERR_DELAY
    assert take_callbacks(one.session.wire) == []
    one.close(got.fh, got.stateid)
    one.delegreturn(got.fh, held)
    assert held_in_core(world, one) == []
    again()


@pytest.mark.parametrize("what", CHANGES)
def test_ones_own_operations_do_not_recall(one: FileClient, path: bytes, what: str) -> None:
    """10.4: the holder may do all that it promises to know of."""
    got = one.open(path, READ)
    broken_by(what, one, got)()
    assert take_callbacks(one.session.wire) == []
    one.delegreturn(got.fh, got.delegation.stateid)


def test_opens_from_a_recalled_delegation(one: FileClient, two: FileClient, path: bytes) -> None:
    """10.4.4: CLAIM_DELEGATE_CUR and CLAIM_DELEG_CUR_FH tell the server what was opened."""
    got = one.open(path, BOTH | WANT_WRITE)
    held = got.delegation.stateid
    assert status_of(two.open, path, READ) == n.NFS4ERR_DELAY
    by_fh = u32(n.CLAIM_DELEG_CUR_FH) + stateid(held)
    opened = one.open(fh=got.fh, claim=by_fh, owner=b"b", access=WRITE)
    assert opened.delegation.kind == n.OPEN_DELEGATE_NONE
    by_name = u32(n.CLAIM_DELEGATE_CUR) + stateid(held) + opaque(path)
    assert one.open(claim=by_name, owner=b"b", access=READ).stateid.seqid == 2
    other = one.create(b"g")
    assert status_of(one.open, fh=other.fh, claim=by_fh) == n.NFS4ERR_BAD_STATEID
    assert status_of(two.open, fh=got.fh, claim=by_fh) == n.NFS4ERR_BAD_STATEID
    one.delegreturn(got.fh, held)
    two.open(path, READ)


def test_a_read_delegation_is_no_right_to_write(one: FileClient, path: bytes) -> None:
    got = one.open(path, READ)
    claim = u32(n.CLAIM_DELEG_CUR_FH) + stateid(got.delegation.stateid)
    assert status_of(one.open, fh=got.fh, claim=claim, access=WRITE) == n.NFS4ERR_OPENMODE


def test_a_silent_holder_loses_it(
    world: World, one: FileClient, two: FileClient, path: bytes
) -> None:
    """10.2.1, 18.38, 18.46.3, 18.48: after a lease time; marked until FREE_STATEID."""
    got = one.open(path, READ)
    one.close(got.fh, got.stateid)
    held = got.delegation.stateid
    assert status_of(two.open, path, WRITE) == n.NFS4ERR_DELAY
    for _ in range(10):  # it lives, but does not answer
        world.runner.advance(world.service.options.lease_seconds / 9)
        one.test()
        two.test()
    two.open(path, WRITE)
    assert held_in_core(world, one) == []
    assert status_of(one.read, got.fh, held, 0, 1) == n.NFS4ERR_DELEG_REVOKED
    assert status_of(one.delegreturn, got.fh, held) == n.NFS4ERR_DELEG_REVOKED
    assert one.test(held) == [n.NFS4ERR_DELEG_REVOKED]
    client = world.service.clients.get(one.session.clientid)
    assert client is not None
    flags = world.service.states.sequence_flags
    assert flags(client) == n.SEQ4_STATUS_RECALLABLE_STATE_REVOKED
    assert not world.service.states.has_state(client)
    before = world.fs.lookup(1, path)
    one.free(held)
    after = world.fs.lookup(1, path)
    assert after.change > before.change  # a client may have taken the last change for its own
    assert (after.mtime, after.mtime_ns) == (before.mtime, before.mtime_ns)
    assert flags(client) == 0
    assert one.test(held) == [n.NFS4ERR_BAD_STATEID]


def test_an_unanswered_recall_is_sent_again(
    world: World, one: FileClient, two: FileClient, path: bytes
) -> None:
    """20.2: DELAY, then nothing at all, then an answer."""
    one.open(path, READ)
    assert status_of(two.open, path, WRITE) == n.NFS4ERR_DELAY
    callback, held, _ = recall_of(one)
    answer(one.session.wire, callback, n.NFS4ERR_DELAY)
    assert take_callbacks(one.session.wire) == []
    world.runner.advance(RESEND_SECONDS)
    assert recall_of(one)[1] == held
    world.runner.advance(world.service.options.callback_seconds + RESEND_SECONDS + 1)
    assert world.service.states.delegations.recalls_in_progress() == 1


def test_a_holder_that_does_not_know_it(
    world: World, one: FileClient, two: FileClient, path: bytes
) -> None:
    """20.2: the grant may still be on its way; after some tries it is gone."""
    one.open(path, READ)
    for left in reversed(range(REFUSALS)):
        assert status_of(two.open, path, WRITE) == n.NFS4ERR_DELAY
        callback, _, _ = recall_of(one)
        answer(one.session.wire, callback, n.NFS4ERR_BAD_STATEID)
        assert world.service.states.delegations.recalls_in_progress() == bool(left)
        world.runner.advance(RESEND_SECONDS)
    two.open(path, WRITE)


def test_after_a_conflict_there_is_none_for_a_while(
    world: World, one: FileClient, two: FileClient, path: bytes
) -> None:
    got = one.open(path, READ)
    with pytest.raises(StatusError):
        two.open(path, WRITE | NO_DELEG)
    answer(one.session.wire, recall_of(one)[0], n.NFS4_OK)
    one.delegreturn(got.fh, got.delegation.stateid)
    assert one.open(path, READ | WANT_READ).delegation.why == n.WND4_CONTENTION
    world.runner.advance(CONTENDED_SECONDS + 1)
    assert one.open(path, READ | WANT_READ).delegation.given


def test_courtesy_holders_are_not_asked(world: World, one: FileClient, path: bytes) -> None:
    """8.4.2.4"""
    one.open(path, BOTH | WANT_WRITE)
    world.runner.advance(world.service.options.lease_seconds + 5)
    two = FileClient(world.session(b"two"))
    two.open(path, BOTH)
    assert take_callbacks(one.session.wire) == []


# -- local users --


def test_local_users_recall(world: World, one: FileClient, path: bytes) -> None:
    """The core's event reaches the client, and DELEGRETURN the core."""
    got = one.open(path, READ)
    ino = ino_of(world)
    assert not world.fs.delegations.make_way(ino, DelegationConflict.WRITE)
    events(world)
    _, held, _ = recall_of(one)
    assert held == got.delegation.stateid
    one.delegreturn(got.fh, held)
    assert world.fs.delegations.make_way(ino, DelegationConflict.WRITE)


def test_the_core_may_revoke(world: World, one: FileClient, path: bytes) -> None:
    """Local users wait for the mount's recall time only."""
    got = one.open(path, READ)
    ino = ino_of(world)
    now = world.fs.layouts.now()
    world.fs.layouts.set_clock(now)
    assert not world.fs.delegations.make_way(ino, DelegationConflict.WRITE)
    world.fs.layouts.set_clock(now + 60 * 10**9)
    world.fs.layouts.settle()
    events(world)
    assert one.test(got.delegation.stateid) == [n.NFS4ERR_DELEG_REVOKED]
    assert world.fs.delegations.make_way(ino, DelegationConflict.WRITE)
    one.free(got.delegation.stateid)


# -- attributes --


def answer_getattr(client: FileClient, change: int, size: int, more: bytes = b"") -> None:
    """Answer the one CB_GETATTR that came."""
    (callback,) = take_callbacks(client.session.wire)
    assert callback.op == n.OP_CB_GETATTR
    callback.body.opaque(128)
    assert callback.body.bitmap() == 1 << n.FATTR4_CHANGE | 1 << n.FATTR4_SIZE
    numbers = [n.FATTR4_CHANGE, n.FATTR4_SIZE]
    if more:
        numbers.append(n.FATTR4_TIME_DELEG_MODIFY)
    values = struct.pack(">QQ", change, size) + more
    message = callback_reply(callback, n.NFS4_OK) + bitmap(*numbers) + opaque(values)
    for record in RecordReader(1 << 20).feed(marked(bytearray(message))):
        client.session.wire.service.receive(client.session.wire.connection, record)


def write_delegated(one: FileClient, path: bytes) -> tuple[Opened, int]:
    got = one.open(path, BOTH | WANT_WRITE)
    assert got.delegation.kind == n.OPEN_DELEGATE_WRITE
    reply = one.run(putfh(got.fh), CHANGE_AND_SIZE)
    change, size = change_and_size(reply)
    assert size == 8
    assert take_callbacks(one.session.wire) == []
    return got, change


def test_getattr_asks_the_holder(one: FileClient, two: FileClient, path: bytes) -> None:
    """10.4.3: what the holder has not changed is as the server knows it."""
    got, change = write_delegated(one, path)
    xid = start(two, putfh(got.fh), CHANGE_AND_SIZE)
    assert xid not in two.session.wire.replies
    answer_getattr(one, change, 8)
    assert change_and_size(finish(two, xid)) == (change, 8)


def test_what_the_holder_has_changed_is_seen(one: FileClient, two: FileClient, path: bytes) -> None:
    """10.4.3: its size; a change attribute that nobody has seen, also after the return."""
    got, change = write_delegated(one, path)
    seen = [change]
    for more in (b"", struct.pack(">qI", 5, 0)):
        xid = start(two, putfh(got.fh), CHANGE_AND_SIZE)
        answer_getattr(one, change + 1, 100, more)
        found, size = change_and_size(finish(two, xid))
        assert size == 100
        assert found > seen[-1]
        seen.append(found)
    one.write(got.fh, got.stateid, 99, b"x")
    one.delegreturn(got.fh, got.delegation.stateid)
    found, size = change_and_size(two.run(putfh(got.fh), CHANGE_AND_SIZE))
    assert size == 100
    assert found > seen[-1]


def test_many_who_ask_ask_once(one: FileClient, two: FileClient, path: bytes) -> None:
    got, change = write_delegated(one, path)
    first = start(two, putfh(got.fh), CHANGE_AND_SIZE)
    three = FileClient(type(two.session)(two.session.service, b"three"))
    second = start(three, putfh(got.fh), CHANGE_AND_SIZE)
    answer_getattr(one, change + 1, 9)
    assert change_and_size(finish(two, first))[1] == 9
    assert change_and_size(finish(three, second))[1] == 9


def test_a_holder_that_does_not_answer_getattr(
    world: World, one: FileClient, two: FileClient, path: bytes
) -> None:
    """DELAY, and a recall."""
    got, _ = write_delegated(one, path)
    xid = start(two, putfh(got.fh), CHANGE_AND_SIZE)
    world.runner.advance(2)
    assert finish(two, xid).status == n.NFS4ERR_DELAY
    _, recall = take_callbacks(one.session.wire)
    assert recall.op == n.OP_CB_RECALL
    assert read_stateid(recall.body) == got.delegation.stateid


def test_a_return_meanwhile_answers(one: FileClient, two: FileClient, path: bytes) -> None:
    got, change = write_delegated(one, path)
    xid = start(two, putfh(got.fh), CHANGE_AND_SIZE)
    one.delegreturn(got.fh, got.delegation.stateid)
    assert change_and_size(finish(two, xid)) == (change, 8)


# -- WANT_DELEGATION --


def want(client: FileClient, fh: bytes, what: int, claim: int = n.CLAIM_FH) -> Delegation:
    return read_delegation(client.on(fh, op(n.OP_WANT_DELEGATION, u32(what), u32(claim))))


def test_want_delegation(world: World, one: FileClient, two: FileClient, path: bytes) -> None:
    """18.49"""
    fh = one.open(path, READ | NO_DELEG).fh
    assert want(one, fh, WANT_READ).kind == n.OPEN_DELEGATE_READ
    assert want(one, fh, WANT_READ).why == n.WND4_RESOURCE
    assert want(two, fh, WANT_READ | SIGNAL).given
    assert status_of(want, two, fh, 0) == n.NFS4ERR_INVAL
    assert status_of(want, two, fh, NO_DELEG) == n.NFS4ERR_INVAL
    assert status_of(want, two, fh, WANT_READ, n.CLAIM_DELEG_PREV_FH) == n.NFS4ERR_NOTSUPP
    assert status_of(want, two, fh, WANT_READ, n.CLAIM_NULL) == n.NFS4ERR_BADXDR
    assert status_of(want, two, fh, WANT_WRITE) == n.NFS4ERR_DELAY
    assert held_in_core(world, two) == [False]


@pytest.mark.parametrize(
    "operation",
    [op(n.OP_DELEGPURGE, bytes(8)), op(n.OP_GET_DIR_DELEGATION, bytes(44))],
)
def test_what_is_not_supported_says_so(one: FileClient, path: bytes, operation: bytes) -> None:
    fh = one.open(path, READ | NO_DELEG).fh
    assert status_of(one.on, fh, operation) == n.NFS4ERR_NOTSUPP


class SlowRunner(Runner):
    """Blocking calls wait until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.calls: list[tuple[Any, Any]] = []

    def blocking(self, call: Any, done: Any) -> None:
        if self.slow:
            self.calls.append((call, done))
        else:
            super().blocking(call, done)

    def go(self) -> None:
        while self.calls:
            call, done = self.calls.pop(0)
            super().blocking(call, done)


def test_first_opens_at_once(world: World) -> None:
    """The client is registered in the core once; who finds that under way just has an open."""
    runner = SlowRunner()
    service, _ = make_service(world.fs, runner=runner)
    client = FileClient(Session(service, b"several"))
    for name in (b"f", b"g"):
        made = client.create(name)
        client.close(made.fh, made.stateid)
    runner.slow = True
    first = start(client, PUTROOTFH, open_op(by_name(b"f"), READ))
    session = client.session
    second = session.wire.send(
        encode(sequence(session.id, 1, 2, 2), PUTROOTFH, open_op(by_name(b"g"), READ))
    )
    runner.go()
    kinds = []
    for xid in (first, second):
        reply = finish(client, xid)
        assert reply.status == n.NFS4_OK
        for _ in range(2):
            next_result(reply.body)
        read_stateid(reply.body)
        reply.body.fixed(24)
        reply.body.bitmap()
        kinds.append(read_delegation(reply.body).kind)
    assert kinds == [n.OPEN_DELEGATE_READ, n.OPEN_DELEGATE_NONE]
    assert service.states.status()["opens"] == 2
