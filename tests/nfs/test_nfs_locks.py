"""LOCK, LOCKT, LOCKU, FREE_STATEID (RFC 8881 9, 18.10 to 18.12, 18.38), local locks beside them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extfs.core import EventType, LayoutEvent
from extfs.nfs import constants as n
from extfs.nfs.locks import LAST, Ranges
from extfs.nfs.stateids import Stateid
from nfs.conftest import World
from nfs.file_calls import (
    CURRENT,
    NO_DELEG,
    READ,
    WRITE,
    FileClient,
    Opened,
    StatusError,
    putfh,
    stateid,
)
from nfs.wire import op, opaque, u32, u64

TO_EOF = n.NFS4_MAXFILELEN


@pytest.fixture
def one(world: World) -> FileClient:
    return FileClient(world.session(b"one"))


@pytest.fixture
def two(world: World) -> FileClient:
    return FileClient(world.session(b"two"))


def refused(call: Any, *args: Any, **more: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        call(*args, **more)
    return caught.value


def status_of(call: Any, *args: Any, **more: Any) -> int:
    return refused(call, *args, **more).status


def denied(error: StatusError) -> tuple[int, int, int, int, bytes]:
    """LOCK4denied: offset, length, type, clientid, owner."""
    assert error.status == n.NFS4ERR_DENIED
    body = error.body
    found = (body.u64(), body.u64(), body.u32(), body.u64(), body.opaque(1024))
    assert body.done()
    return found


def open_two(one: FileClient, two: FileClient) -> tuple[Opened, Opened]:
    return one.create(b"f"), two.open(b"f")


def ino_of(world: World) -> int:
    return world.fs.lookup(1, b"f").ino


# -- what an owner holds --


@given(
    st.lists(
        st.tuples(st.sampled_from(["read", "write", "none"]), st.integers(0, 40), st.integers(0, 9))
    )
)
def test_ranges_are_a_map_of_bytes(changes: list[tuple[str, int, int]]) -> None:
    """Against one entry for each byte; the ranges are disjoint, in order and as few as can be."""
    ranges = Ranges()
    model: dict[int, bool] = {}
    for kind, start, more in changes:
        last = start + more
        for byte in range(start, last + 1):
            if kind == "none":
                model.pop(byte, None)
            else:
                model[byte] = kind == "write"
        if kind == "none":
            ranges.clear(start, last)
        else:
            ranges.set(start, last, kind == "write")
    assert {b: w for s, e, w in ranges for b in range(s, e + 1)} == model
    found = list(ranges)
    for (_, end, kind), (start, _, other) in itertools.pairwise(found):
        assert end < start
        assert end + 1 < start or kind != other


# -- LOCK, LOCKU --


def test_lock_and_unlock(world: World, one: FileClient, two: FileClient) -> None:
    """18.10, 18.12; the stateid of a lock-owner and file, its seqid."""
    mine, theirs = open_two(one, two)
    held = one.lock(mine.fh, mine.stateid, b"owner", 10, 10)
    assert held.seqid == 1
    assert held.other != mine.stateid.other
    error = refused(two.lock, theirs.fh, theirs.stateid, b"owner", 0, 11)
    assert denied(error) == (10, 10, n.WRITE_LT, one.session.clientid, b"owner")
    assert world.service.states.status()["locks"] == 1
    other = two.lock(theirs.fh, theirs.stateid, b"owner", 0, 10)
    assert one.lock(mine.fh, held, None, 30, TO_EOF).seqid == 2
    error = refused(two.lock, theirs.fh, other, None, 1 << 63, 1)
    assert denied(error)[:3] == (30, TO_EOF, n.WRITE_LT)
    held = one.locku(mine.fh, Stateid(0, held.other), 0, TO_EOF)
    assert held.seqid == 3
    assert two.lock(theirs.fh, other, None, 5, TO_EOF).seqid == 2
    assert status_of(one.lock, mine.fh, Stateid(2, held.other), None, 0, 1) == (
        n.NFS4ERR_OLD_STATEID
    )


def test_the_middle_of_a_lock_can_be_given_up(one: FileClient, two: FileClient) -> None:
    """18.12.4: any range."""
    mine, theirs = open_two(one, two)
    held = one.lock(mine.fh, mine.stateid, b"owner", 0, 30)
    one.locku(mine.fh, held, 10, 10)
    other = two.lock(theirs.fh, theirs.stateid, b"owner", 10, 10)
    for offset in (9, 20):
        assert status_of(two.lock, theirs.fh, other, None, offset, 1) == n.NFS4ERR_DENIED


def test_readers_share_and_may_upgrade_alone(one: FileClient, two: FileClient) -> None:
    """9.3: upgrades and downgrades of an owner's own lock."""
    mine, theirs = open_two(one, two)
    held = one.lock(mine.fh, mine.stateid, b"o", 0, 10, n.READ_LT)
    other = two.lock(theirs.fh, theirs.stateid, b"o", 0, 10, n.READ_LT)
    assert status_of(one.lock, mine.fh, held, None, 0, 10) == n.NFS4ERR_DENIED
    two.locku(theirs.fh, other, 0, 10)
    held = one.lock(mine.fh, held, None, 0, 10, n.WRITE_LT)
    assert status_of(two.lockt, theirs.fh, b"o", 0, 1, n.READ_LT) == n.NFS4ERR_DENIED
    one.lock(mine.fh, held, None, 0, 10, n.READ_LT)
    two.lockt(theirs.fh, b"o", 0, 1, n.READ_LT)


def test_owners_of_one_client_are_not_each_other(one: FileClient) -> None:
    """9.1.1"""
    mine = one.create(b"f")
    one.lock(mine.fh, mine.stateid, b"a", 0, 10)
    error = refused(one.lock, mine.fh, mine.stateid, b"b", 0, 10)
    assert denied(error)[4] == b"a"
    assert one.lock(mine.fh, mine.stateid, b"a", 5, 10).seqid == 2


def test_locks_need_an_open_of_their_kind(one: FileClient) -> None:
    """18.10.3: OPENMODE; a lock stateid is not an open."""
    made = one.create(b"f")
    one.close(made.fh, made.stateid)
    reader = one.open(b"f", READ | NO_DELEG, owner=b"r")
    writer = one.open(b"f", WRITE | NO_DELEG, owner=b"w")
    assert status_of(one.lock, made.fh, reader.stateid, b"x", 0, 1) == n.NFS4ERR_OPENMODE
    held = one.lock(made.fh, reader.stateid, b"x", 0, 1, n.READ_LT)
    assert status_of(one.lock, made.fh, held, None, 0, 1) == n.NFS4ERR_OPENMODE
    error = status_of(one.lock, made.fh, writer.stateid, b"y", 5, 1, n.READ_LT)
    assert error == n.NFS4ERR_OPENMODE
    assert status_of(one.lock, made.fh, held, b"z", 0, 1) == n.NFS4ERR_BAD_STATEID


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (5, (1 << 64) - 4), (1 << 63, (1 << 63) + 1), (LAST, 2)]
)
def test_ranges_that_are_none(one: FileClient, offset: int, length: int) -> None:
    """18.10.3: empty, or beyond 2**64 - 1."""
    made = one.create(b"f")
    for call in (one.lock, one.locku):
        more = (b"o",) if call == one.lock else ()
        assert status_of(call, made.fh, made.stateid, *more, offset, length) == n.NFS4ERR_INVAL
    assert status_of(one.lockt, made.fh, b"o", offset, length) == n.NFS4ERR_INVAL


def test_lock_of_the_last_byte(one: FileClient, two: FileClient) -> None:
    """The largest offset that there is; what a file cannot have can be locked."""
    mine, theirs = open_two(one, two)
    held = one.lock(mine.fh, mine.stateid, b"o", LAST - 1, 1)
    one.lock(mine.fh, held, None, 1 << 63, 1 << 63)
    assert status_of(two.lock, theirs.fh, theirs.stateid, b"o", 100, TO_EOF) == n.NFS4ERR_DENIED


def test_lockt_changes_nothing(world: World, one: FileClient, two: FileClient) -> None:
    """18.11: needs no open."""
    mine = one.create(b"f")
    one.lock(mine.fh, mine.stateid, b"o", 0, 10)
    one.lockt(mine.fh, b"o", 0, 20)
    assert denied(refused(two.lockt, mine.fh, b"o", 5, 5))[:2] == (0, 10)
    two.lockt(mine.fh, b"o", 10, 5)
    one.close(mine.fh, mine.stateid)
    two.lockt(mine.fh, b"o", 0, 10)
    assert world.service.states.status()["files"] == 0


def test_current_stateid_of_locks(one: FileClient) -> None:
    """16.2.3.1.2"""
    made = one.create(b"f")
    locker = u32(1) + u32(0) + stateid(made.stateid) + u32(0) + u64(0) + opaque(b"o")
    lock = op(n.OP_LOCK, u32(n.WRITE_LT), u32(0), u64(0), u64(TO_EOF), locker)
    write = op(n.OP_WRITE, stateid(CURRENT), u64(0), u32(n.FILE_SYNC4), opaque(b"abc"))
    unlock = op(n.OP_LOCKU, u32(n.WRITE_LT), u32(0), stateid(CURRENT), u64(0), u64(TO_EOF))
    assert one.run(putfh(made.fh), lock, write, unlock).status == n.NFS4_OK


# -- the end of locks --


def test_close_takes_the_locks_along(world: World, one: FileClient, two: FileClient) -> None:
    """18.2.3"""
    mine, theirs = open_two(one, two)
    held = one.lock(mine.fh, mine.stateid, b"o", 0, 10)
    one.close(mine.fh, mine.stateid)
    two.lock(theirs.fh, theirs.stateid, b"o", 0, 10)
    assert one.test(held) == [n.NFS4ERR_BAD_STATEID]
    assert len(world.service.states.owners) == 1


def test_free_stateid(one: FileClient) -> None:
    """18.38.3: LOCKS_HELD while there are any."""
    made = one.create(b"f")
    held = one.lock(made.fh, made.stateid, b"o", 0, 10)
    assert status_of(one.free, held) == n.NFS4ERR_LOCKS_HELD
    held = one.locku(made.fh, held, 0, 10)
    assert status_of(one.free, Stateid(1, held.other)) == n.NFS4ERR_OLD_STATEID
    one.free(held)
    assert status_of(one.free, held) == n.NFS4ERR_BAD_STATEID
    assert one.lock(made.fh, made.stateid, b"o", 0, 10).seqid == 1


def test_courtesy_locks_go(world: World, one: FileClient) -> None:
    """8.4.2.4; also before LOCKT."""
    made = one.create(b"f")
    one.lock(made.fh, made.stateid, b"o", 0, TO_EOF)
    world.runner.advance(world.service.options.lease_seconds + 5)
    two = FileClient(world.session(b"two"))
    two.lockt(made.fh, b"o", 0, 10)
    opened = two.open(b"f")
    two.lock(opened.fh, opened.stateid, b"o", 0, 10)


# -- local locks --


def test_local_locks_are_in_the_way_and_told(world: World, one: FileClient) -> None:
    """One table; a process of the server's host has no client ID. The owner space is apart."""
    made = one.create(b"f")
    held = one.lock(made.fh, made.stateid, b"o", 0, 10)
    ino = ino_of(world)
    number = world.service.states.owners.number(
        world.service.clients.get(one.session.clientid), b"o"
    )
    assert number > 0
    found = world.fs.locks.test(ino, number + 1, 0, 10, False)
    assert found is not None
    assert (found.owner, found.start, found.length, found.local) == (number, 0, 10, False)
    one.locku(made.fh, held, 0, 10)
    assert world.fs.locks.test(ino, number + 1, 0, 10, True) is None


def wanted(world: World, one: FileClient, owner: bytes) -> None:
    """As the core tells it."""
    client = world.service.clients.get(one.session.clientid)
    number = world.service.states.owners.number(client, owner)
    world.service.layout_event(
        LayoutEvent(EventType.LOCK_WANTED, 1, number, ino_of(world), 1, 0, 0, 0, 0, 0)
    )


def test_local_processes_take_locks_of_courtesy_clients(world: World, one: FileClient) -> None:
    """8.4.2.4: also when the lease ends after somebody has begun to wait; live ones keep theirs."""
    made = one.create(b"f")
    held = one.lock(made.fh, made.stateid, b"o", 0, 10)
    wanted(world, one, b"o")
    for _ in range(10):
        world.runner.advance(world.service.options.lease_seconds / 4)
        assert one.test(held) == [n.NFS4_OK]
    assert len(world.service.states.wanted_locks) == 1
    world.runner.advance(world.service.options.lease_seconds + 10)
    assert world.service.states.status()["locks"] == 0
    assert len(world.service.states.wanted_locks) == 0
    assert world.fs.locks.test(ino_of(world), 1 << 40, 0, 10, True) is None


def test_wanted_locks_are_forgotten_with_their_owner(world: World, one: FileClient) -> None:
    made = one.create(b"f")
    one.lock(made.fh, made.stateid, b"o", 0, 10)
    wanted(world, one, b"o")
    one.close(made.fh, made.stateid)
    world.runner.advance(10)
    assert len(world.service.states.wanted_locks) == 0
    assert one.open(b"f").stateid.seqid == 1


# -- waiting --


def test_a_refused_blocking_lock_is_told_when_it_is_free(
    world: World, one: FileClient, two: FileClient
) -> None:
    """18.10.4, 20.11: CB_NOTIFY_LOCK, once; nothing is reserved."""
    mine, theirs = open_two(one, two)
    assert mine.flags & n.OPEN4_RESULT_MAY_NOTIFY_LOCK
    held = one.lock(mine.fh, mine.stateid, b"o", 0, 10)
    assert status_of(two.lock, theirs.fh, theirs.stateid, b"w", 5, 1, n.WRITEW_LT) == (
        n.NFS4ERR_DENIED
    )
    assert status_of(two.lock, theirs.fh, theirs.stateid, b"w", 6, 1, n.WRITEW_LT) == (
        n.NFS4ERR_DENIED
    )
    assert len(world.service.states.waiters) == 1
    deliver(world)
    assert two.session.wire.calls == []
    one.locku(mine.fh, held, 0, 10)
    deliver(world)
    (call,) = two.session.wire.calls
    assert u32(n.OP_CB_NOTIFY_LOCK) + opaque(mine.fh) in call
    assert call.endswith(u64(two.session.clientid) + opaque(b"w"))
    assert len(world.service.states.waiters) == 0
    two.lock(theirs.fh, theirs.stateid, b"w", 5, 1, n.WRITEW_LT)
    assert len(world.service.states.owners) == 2


def test_lost_events_are_made_up_for(world: World, one: FileClient, two: FileClient) -> None:
    """After OVERFLOW who waits asks again, and each lock may be wanted by somebody local."""
    mine, theirs = open_two(one, two)
    one.lock(mine.fh, mine.stateid, b"o", 0, 10)
    with pytest.raises(StatusError):
        two.lock(theirs.fh, theirs.stateid, b"w", 5, 1, n.WRITEW_LT)
    world.service.layout_event(LayoutEvent(EventType.OVERFLOW, 1, 0, 0, 0, 0, 0, 1, 0, 0))
    (call,) = two.session.wire.calls
    assert call.endswith(u64(two.session.clientid) + opaque(b"w"))
    assert len(world.service.states.waiters) == 0
    assert len(world.service.states.wanted_locks) == 1


def test_waiters_go_with_their_client_and_file(
    world: World, one: FileClient, two: FileClient
) -> None:
    mine, theirs = open_two(one, two)
    one.lock(mine.fh, mine.stateid, b"o", 0, 10)
    with pytest.raises(StatusError):
        two.lock(theirs.fh, theirs.stateid, b"w", 0, 1, n.READW_LT)
    FileClient(world.session(b"two", b"reboot"))
    states = world.service.states
    assert (len(states.waiters), len(states.owners)) == (0, 1)
    with pytest.raises(StatusError):
        one.lock(mine.fh, mine.stateid, b"x", 0, 1, n.READW_LT)
    one.close(mine.fh, mine.stateid)
    assert (len(states.waiters), len(states.owners)) == (0, 0)


def deliver(world: World) -> None:
    """The core's events, as the server's loop hands them on."""
    for event in world.fs.layouts.events():
        world.service.layout_event(event)
