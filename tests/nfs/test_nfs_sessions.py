"""Slots, the reply cache and connections (RFC 8881 2.10, 18.33, 18.34, 18.46)."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from extfs.nfs import constants as n
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.effects import Steps, Waiting
from extfs.nfs.xdr import Reader, Writer
from nfs import wire
from nfs.conftest import World
from nfs.handshake import OTHER_USER, bind_conn, created, identify, sequence_result
from nfs.wire import Session, channel_attributes, create_session, next_result, op, opaque, u32

ROOT_FH = op(n.OP_PUTROOTFH)
COUNTED = op(n.OP_IO_ADVISE)


class Counted:
    """An operation that counts how often it was run, in place of IO_ADVISE.

    `held`: it ends when `release` is called. `size`: bytes of its result.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.size = 4
        self.held = False
        self.waiting: list[Waiting] = []

    def __call__(self, c: Compound, args: Reader, out: Writer) -> Steps[None]:
        self.runs += 1
        if self.held:
            effect = Waiting(1000.0)
            self.waiting.append(effect)
            yield effect
        out.raw(self.runs.to_bytes(4, "big") * (self.size // 4))

    def release(self) -> None:
        for effect in self.waiting:
            effect.wake()
        self.waiting.clear()


@pytest.fixture
def counted(world: World) -> Iterator[Counted]:
    operation = Counted()
    table = world.service.operations
    world.service.operations = {**table, n.OP_IO_ADVISE: Operation(operation, minor=2)}
    yield operation
    world.service.operations = table


def raw(session: Session, *operations: bytes, number: int, slot: int = 0, cache: int = 1) -> bytes:
    """The whole answer of a request in a slot."""
    first = wire.sequence(session.id, number, slot, slot, cache)
    reader = session.wire.results(session.wire.send(wire.encode(first, *operations)))
    return reader.buffer[reader.pos :]


def status(answer: bytes) -> int:
    found: int = struct.unpack_from(">I", answer)[0]
    return found


def test_sequence_result(world: World) -> None:
    session = world.session()
    reply = session.wire.compound(wire.sequence(session.id, 1, 2, 3, 1))
    identity, (number, slot, highest, target, flags) = sequence_result(reply)
    assert (identity, number, slot, flags) == (session.id, 1, 2, 0)
    assert highest == target == 31  # the true maximum, of 32 slots


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (wire.sequence(b"Bad Session Id!!", 1), n.NFS4ERR_BADSESSION),
        (None, n.NFS4ERR_OP_NOT_IN_SESSION),
    ],
)
def test_without_a_session(world: World, first: bytes | None, expected: int) -> None:
    assert world.wire().compound(ROOT_FH if first is None else first).status == expected


def test_sequence_position(world: World) -> None:
    session = world.session()
    assert session.run(wire.sequence(session.id, 9)).status == n.NFS4ERR_SEQUENCE_POS


@pytest.mark.parametrize(
    ("slot", "highest", "expected"),
    [
        (32, 32, n.NFS4ERR_BADSLOT),
        (0xFFFFFFFF, 0, n.NFS4ERR_BADSLOT),
        (0, 32, n.NFS4ERR_BAD_HIGH_SLOT),
        (0, 0xFFFFFFFF, n.NFS4ERR_BAD_HIGH_SLOT),
    ],
)
def test_slots_that_are_not(world: World, slot: int, highest: int, expected: int) -> None:
    session = world.session()
    reply = session.wire.compound(wire.sequence(session.id, 2, slot, highest))
    assert reply.status == expected
    assert session.run(ROOT_FH).status == n.NFS4_OK


def test_sequence_numbers(world: World) -> None:
    session = Session(world.service, reclaim_complete=False)
    for number in (0, 2, 3, 0xFFFFFFFF):
        answer = raw(session, ROOT_FH, number=number)
        assert status(answer) == n.NFS4ERR_SEQ_MISORDERED
    assert status(raw(session, ROOT_FH, number=1)) == n.NFS4_OK
    for number in (0, 3):
        assert status(raw(session, ROOT_FH, number=number)) == n.NFS4ERR_SEQ_MISORDERED
    assert status(raw(session, ROOT_FH, number=2)) == n.NFS4_OK


def test_sequence_number_wraps(world: World) -> None:
    session = Session(world.service, reclaim_complete=False)
    assert status(raw(session, ROOT_FH, number=1)) == n.NFS4_OK
    kept = world.service.sessions.get(session.id)
    assert kept is not None
    slot = kept.slots[0]
    assert slot is not None
    slot.sequence = 0xFFFFFFFF
    assert status(raw(session, ROOT_FH, number=0)) == n.NFS4_OK
    assert status(raw(session, ROOT_FH, number=1)) == n.NFS4_OK


def test_a_retransmission_is_not_executed(world: World, counted: Counted) -> None:
    session = Session(world.service, reclaim_complete=False)
    first = raw(session, ROOT_FH, COUNTED, number=1)
    assert status(first) == n.NFS4_OK
    assert raw(session, ROOT_FH, COUNTED, number=1) == first
    assert counted.runs == 1
    # Over another connection too, as after a reconnect.
    session.wire.close()
    session.wire = world.wire()
    assert raw(session, ROOT_FH, COUNTED, number=1) == first
    assert counted.runs == 1
    assert status(raw(session, ROOT_FH, COUNTED, number=2)) == n.NFS4_OK
    assert counted.runs == 2


def test_a_failure_is_replayed_too(world: World) -> None:
    session = Session(world.service, reclaim_complete=False)
    first = raw(session, op(n.OP_ILLEGAL), number=1)
    assert status(first) == n.NFS4ERR_OP_ILLEGAL
    assert raw(session, op(n.OP_ILLEGAL), number=1) == first


def test_uncached(world: World, counted: Counted) -> None:
    """SEQUENCE succeeds, the operation after it says why there is no answer (18.46.3)."""
    session = Session(world.service, reclaim_complete=False)
    counted.size = 4096
    assert status(raw(session, COUNTED, number=1, cache=0)) == n.NFS4_OK
    again = raw(session, COUNTED, number=1, cache=0)
    assert status(again) == n.NFS4ERR_RETRY_UNCACHED_REP
    reply = wire.read_compound(Reader(again))
    assert reply.count == 2
    sequence_result(reply)
    last = next_result(reply.body)
    assert (last.op, last.status) == (n.OP_IO_ADVISE, n.NFS4ERR_RETRY_UNCACHED_REP)
    assert reply.body.done()
    assert counted.runs == 1


def test_a_small_reply_is_kept_anyway(world: World, counted: Counted) -> None:
    session = Session(world.service, reclaim_complete=False)
    first = raw(session, COUNTED, number=1, cache=0)
    assert raw(session, COUNTED, number=1, cache=0) == first
    assert counted.runs == 1


@pytest.mark.parametrize(
    "other",
    [
        (ROOT_FH,),
        (COUNTED, ROOT_FH),
        (op(n.OP_LOOKUP, opaque(b"x")),),
    ],
)
def test_another_request_under_a_used_number(
    world: World, counted: Counted, other: tuple[bytes, ...]
) -> None:
    session = Session(world.service, reclaim_complete=False)
    first = raw(session, COUNTED, number=1)
    assert status(raw(session, *other, number=1)) == n.NFS4ERR_SEQ_FALSE_RETRY
    assert raw(session, COUNTED, number=1) == first
    assert counted.runs == 1


def test_another_user_under_a_used_number(world: World, counted: Counted) -> None:
    session = Session(world.service, reclaim_complete=False)
    raw(session, COUNTED, number=1)
    first = wire.sequence(session.id, 1, 0, 0, 1)
    reply = session.wire.compound(first, COUNTED, auth=OTHER_USER)
    assert reply.status == n.NFS4ERR_SEQ_FALSE_RETRY


def test_a_retransmission_of_what_is_executing(world: World, counted: Counted) -> None:
    """It is executed once; the answer comes to where it was asked for last."""
    session = Session(world.service, reclaim_complete=False)
    counted.held = True
    body = wire.encode(wire.sequence(session.id, 1, 0, 0, 1), COUNTED)
    session.wire.send(body)
    assert not session.wire.replies
    session.wire.close()
    later = world.wire()
    xid = later.send(body)
    assert not later.replies
    # The slot takes nothing else meanwhile; the others do.
    following = later.compound(wire.sequence(session.id, 2, 0, 0, 1), ROOT_FH)
    assert following.status == n.NFS4ERR_SEQ_MISORDERED
    assert later.compound(wire.sequence(session.id, 1, 1, 1, 1), ROOT_FH).status == n.NFS4_OK
    counted.release()
    assert wire.read_compound(later.results(xid)).status == n.NFS4_OK
    assert counted.runs == 1


def test_a_session_that_is_executing_is_not_destroyed(world: World, counted: Counted) -> None:
    session = Session(world.service, reclaim_complete=False)
    counted.held = True
    xid = session.wire.send(wire.encode(wire.sequence(session.id, 1, 0, 0, 1), COUNTED))
    destroy = op(n.OP_DESTROY_SESSION, session.id)
    assert session.wire.compound(destroy).status == n.NFS4ERR_DELAY
    counted.release()
    assert wire.read_compound(session.wire.results(xid)).status == n.NFS4_OK
    assert session.wire.compound(destroy).status == n.NFS4_OK


def limited(world: World, fore: bytes, owner: bytes = b"one") -> Session:
    """A session with these limits, instead of the usual one."""
    session = Session(world.service, owner, reclaim_complete=False)
    reply = session.wire.compound(create_session(session.clientid, 2, 2, fore))
    session.id = created(reply).id
    session.numbers = {}
    return session


def test_request_too_big(world: World) -> None:
    session = limited(world, channel_attributes(request=512))
    reply = session.wire.compound(
        wire.sequence(session.id, 1), ROOT_FH, op(n.OP_LOOKUP, opaque(b"12345" * 100))
    )
    assert reply.status == n.NFS4ERR_REQ_TOO_BIG
    assert session.run(ROOT_FH).status == n.NFS4_OK


def test_too_many_operations(world: World) -> None:
    session = limited(world, channel_attributes(ops=4))
    assert session.run(ROOT_FH, ROOT_FH, ROOT_FH).status == n.NFS4_OK
    reply = session.wire.compound(wire.sequence(session.id, 2), *[ROOT_FH] * 4)
    assert reply.status == n.NFS4ERR_TOO_MANY_OPS


def test_reply_too_big(world: World, counted: Counted) -> None:
    session = limited(world, channel_attributes(response=400))
    counted.size = 400
    reply = session.run(ROOT_FH, COUNTED)
    assert (reply.status, reply.count) == (n.NFS4ERR_REP_TOO_BIG, 2)


def test_reply_too_big_to_cache(world: World, counted: Counted) -> None:
    session = limited(world, channel_attributes(cached=400))
    counted.size = 400
    answer = raw(session, ROOT_FH, COUNTED, number=1)
    assert status(answer) == n.NFS4ERR_REP_TOO_BIG_TO_CACHE
    assert raw(session, ROOT_FH, COUNTED, number=1) == answer
    assert status(raw(session, ROOT_FH, COUNTED, number=2, cache=0)) == n.NFS4_OK
    tiny = limited(world, channel_attributes(cached=10), b"two")
    assert status(raw(tiny, number=1)) == n.NFS4ERR_REP_TOO_BIG_TO_CACHE
    assert status(raw(tiny, number=1, cache=0)) == n.NFS4_OK


def test_bytes_of_the_reply_cache_are_bounded(world: World, counted: Counted) -> None:
    session = Session(world.service, reclaim_complete=False)
    counted.size = 8000
    for slot in range(32):
        assert status(raw(session, COUNTED, number=1, slot=slot)) == n.NFS4_OK
    table = world.service.clients.status()
    [client] = [one for one in table if one["clientid"] == f"{session.clientid:016x}"]
    assert client["sessions"][0]["cached_bytes"] <= 32 * 8192


# -- connections --


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        (n.CDFC4_FORE, n.CDFS4_FORE),
        (n.CDFC4_BACK, n.CDFS4_BACK),
        (n.CDFC4_FORE_OR_BOTH, n.CDFS4_BOTH),
        (n.CDFC4_BACK_OR_BOTH, n.CDFS4_BOTH),
    ],
)
def test_bind_conn_to_session(world: World, direction: int, expected: int) -> None:
    session = world.session()
    other = world.wire()
    reply = other.compound(bind_conn(session.id, direction))
    body = next_result(reply.body).body
    assert (body.fixed(16), body.u32(), body.u32()) == (session.id, expected, 0)
    kept = world.service.sessions.get(session.id)
    assert kept is not None
    assert (other.connection in kept.back_connections) == (direction != n.CDFC4_FORE)
    other.close()
    assert other.connection not in kept.connections
    assert other.connection not in kept.back_connections


def test_bind_conn_to_session_refused(world: World) -> None:
    session = world.session()
    other = world.wire()
    reply = other.compound(bind_conn(bytes(16), n.CDFC4_FORE))
    assert reply.status == n.NFS4ERR_BADSESSION
    assert other.compound(bind_conn(session.id, 5)).status == n.NFS4ERR_BADXDR
    reply = session.run(bind_conn(session.id, n.CDFC4_FORE))
    assert reply.status == n.NFS4ERR_NOT_ONLY_OP


def flags_of(session: Session) -> int:
    session.numbers[0] = session.numbers.get(0, 0) + 1
    reply = session.wire.compound(wire.sequence(session.id, session.numbers[0]))
    return sequence_result(reply)[1][4]


def test_flags_tell_of_the_backchannel(world: World) -> None:
    session = world.session()
    assert flags_of(session) == 0
    session.wire.close()
    session.wire = world.wire()
    down = n.SEQ4_STATUS_CB_PATH_DOWN
    assert flags_of(session) == down | n.SEQ4_STATUS_CB_PATH_DOWN_SESSION
    other = created(session.wire.compound(create_session(session.clientid, 2)))
    assert flags_of(session) == n.SEQ4_STATUS_CB_PATH_DOWN_SESSION
    assert session.wire.compound(op(n.OP_DESTROY_SESSION, other.id)).status == n.NFS4_OK
    assert flags_of(session) & down
    bind = bind_conn(session.id, n.CDFC4_FORE_OR_BOTH)
    assert session.wire.compound(bind).status == n.NFS4_OK
    assert flags_of(session) == 0


def test_a_client_without_callbacks_is_told_nothing(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    got = created(connection.compound(create_session(found.clientid, 1, 0)))
    assert got.flags == 0
    reply = connection.compound(wire.sequence(got.id, 1))
    assert sequence_result(reply)[1][4] == 0


def test_backchannel_ctl(world: World) -> None:
    session = world.session()
    reply = session.run(op(n.OP_BACKCHANNEL_CTL, u32(77), u32(1), u32(n.AUTH_NONE)))
    assert reply.status == n.NFS4_OK
    kept = world.service.sessions.get(session.id)
    assert kept is not None
    assert (kept.cb_program, kept.cb_auth) == (77, bytes(8))
    gss = u32(6) + u32(1) + opaque(b"a") + opaque(b"b")
    reply = session.run(op(n.OP_BACKCHANNEL_CTL, u32(78), u32(1), gss))
    assert reply.status == n.NFS4ERR_NOENT
    assert kept.cb_program == 77


def test_random_retransmissions_execute_once(world: World, counted: Counted) -> None:
    """Requests that are lost before or after their execution, and sent again until answered."""
    rng = random.Random(8881)
    session = Session(world.service, reclaim_complete=False)
    numbers = [0] * 8
    for expected in range(1, 401):
        slot = rng.randrange(8)
        numbers[slot] += 1
        answers = {
            raw(session, COUNTED, number=numbers[slot], slot=slot)
            for _ in range(rng.choice((1, 1, 2, 3)))
        }
        assert len(answers) == 1
        if rng.random() < 0.2:
            session.wire.close()
            session.wire = world.wire()
        assert counted.runs == expected


def test_options_bound_the_slots(world: World) -> None:
    options = replace(world.service.options, slots=2)
    service, _ = wire.make_service(world.fs, options=options)
    session = Session(service)
    assert sequence_result(session.wire.compound(wire.sequence(session.id, 2)))[1][2:4] == (1, 1)
