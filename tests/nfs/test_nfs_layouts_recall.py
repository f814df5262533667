"""Recalls of layouts: the races of RFC 8881 12.5.5 and of `extfs.nfs.layouts`, one by one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, CoreError, HolderState
from extfs.nfs import constants as n
from extfs.nfs.layout_recalls import AGREED_PAUSE, LONGEST_PAUSE
from extfs.nfs.layouts import RECALL_ANY_SECONDS
from extfs.nfs.stateids import Stateid
from nfs.calls import Call, fails, putfh, putrootfh, status_of
from nfs.conftest import World
from nfs.layout_calls import (
    ALL,
    ANY,
    BLOCK,
    READ,
    RW,
    File,
    answer,
    encoded,
    events,
    layoutcommit,
    layoutget,
    layoutreturn,
    open_file,
    take_callbacks,
    take_recall,
)
from nfs.wire import encode as encode_compound
from nfs.wire import next_result, op, read_compound, u64
from nfs.wire import sequence as sequence_op

MIB = 1 << 20
OVER = 11_000_000_000
"""More than the time of a recall, in nanoseconds."""


@pytest.fixture
def one(world: World) -> File:
    """A file of 1 MiB, a hole, open by the client "one"."""
    file = open_file(world.session(b"one"), b"file")
    world.fs.truncate(ino_of(world), MIB)
    world.fs.layouts.set_clock(1)
    return file


@pytest.fixture
def two(world: World, one: File) -> File:
    return open_file(world.session(b"two"), b"file")


def ino_of(world: World) -> int:
    return world.fs.lookup(ROOT_INODE, b"file").ino


def held(world: World) -> list[tuple[int, int]]:
    return [(g.offset, g.offset + g.length) for g in world.fs.layouts.grants(ino_of(world))]


def try_get(world: World, file: File, offset: int, length: int, iomode: int = RW) -> str:
    """A LAYOUTGET's status, and the core's events after it."""
    stateid = file.layout or file.opened
    status = status_of(
        file.session, putfh(file.fh), layoutget(offset, length, BLOCK, iomode, stateid)
    )
    events(world)
    return status


def prove(file: File) -> None:
    """Another request on the slot: the reply before it was received."""
    file.session.run(putrootfh().encoded)


# ---- recalls and their answers -----------------------------------------------------------------


def test_a_conflict_recalls_and_the_return_lets_the_other_in(
    world: World, one: File, two: File
) -> None:
    mine = one.get(0, 8192)
    assert try_get(world, two, 4096, 4096) == "LAYOUTTRYLATER"
    callback, recall = take_recall(one.session)
    assert (recall.offset, recall.length) == (4096, 4096)
    assert recall.fh == one.fh
    assert recall.iomode == ANY
    assert not recall.changed
    assert recall.stateid == Stateid(mine.stateid.seqid + 1, mine.stateid.other)
    answer(one.session.wire, callback, n.NFS4_OK)
    assert try_get(world, two, 4096, 4096) == "LAYOUTTRYLATER"
    assert take_callbacks(one.session.wire) == [], "it agreed, it is not asked again"
    assert one.give_back(stateid=recall.stateid) is None
    assert two.get(4096, 4096).offset == 4096
    assert world.service.layouts.status()["recalls"] == []


def test_will_signal_is_false(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    failed = fails(two.session, putfh(two.fh), layoutget(0, 4096, 4096, RW, two.opened))
    assert failed.status == n.NFS4ERR_LAYOUTTRYLATER
    assert failed.body.boolean() is False
    assert failed.body.done()


def test_disjoint_writers_coexist(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    assert two.get(4096, 4096).length == BLOCK
    assert one.get(8192, 4096).length == BLOCK, "shared: no more than was asked for"
    events(world)
    assert take_callbacks(one.session.wire) == []


def test_readers_of_what_somebody_writes_go_through_the_server(
    world: World, one: File, two: File
) -> None:
    one.get(0, 8192)
    assert try_get(world, two, 0, 4096, READ) == "LAYOUTUNAVAILABLE"
    assert take_callbacks(one.session.wire) == []
    layout = two.get(8192, 8192, iomode=READ)
    assert layout.offset == 8192
    layout = open_file(two.session, b"file").get(8192, 8192, iomode=READ)


def test_a_reader_gets_what_lies_before_the_conflict(world: World, one: File, two: File) -> None:
    one.get(8192, 4096)
    layout = two.get(0, 16384, iomode=READ)
    assert (layout.offset, layout.end) == (0, 8192)


def test_while_a_recall_is_out_layoutgets_are_refused(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    try_get(world, two, 0, 4096)
    assert try_get(world, one, 65536, 4096) == "RECALLCONFLICT"
    callback, recall = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4_OK)
    assert try_get(world, one, 65536, 4096) == "RECALLCONFLICT"
    one.give_back(stateid=recall.stateid)
    assert try_get(world, one, 65536, 4096) == "OK"


def test_one_recall_at_a_time_and_what_is_wanted_meanwhile_comes_after(
    world: World, one: File, two: File
) -> None:
    one.get(0, 4096)
    one.get(8192, 4096)
    try_get(world, two, 0, 4096)
    try_get(world, two, 8192, 4096)
    callback, recall = take_recall(one.session)
    assert (recall.offset, recall.length) == (0, 4096)
    answer(one.session.wire, callback, n.NFS4_OK)
    left = one.give_back(0, 4096, stateid=recall.stateid)
    assert left is not None
    callback, second = take_recall(one.session)
    assert (second.offset, second.length) == (8192, 4096)
    assert second.stateid == Stateid(left.seqid + 1, left.other)
    answer(one.session.wire, callback, n.NFS4_OK)
    assert one.give_back(stateid=second.stateid) is None
    assert held(world) == []


def test_a_return_of_the_whole_file_answers_all_recalls(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    one.get(8192, 4096)
    try_get(world, two, 0, 4096)
    try_get(world, two, 8192, 4096)
    callback, recall = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4_OK)
    assert one.give_back(stateid=recall.stateid) is None
    assert take_callbacks(one.session.wire) == []


def test_delay_and_silence_are_asked_again_with_the_same_seqid(
    world: World, one: File, two: File
) -> None:
    one.get(0, 4096)
    try_get(world, two, 0, 4096)
    callback, first = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4ERR_DELAY)
    world.runner.advance(LONGEST_PAUSE)
    callback, second = take_recall(one.session)
    assert second == first
    world.runner.advance(world.service.options.callback_seconds + LONGEST_PAUSE + 1)
    assert held(world) == [(0, 4096)], "the deadline is the core's"


def test_who_agreed_and_forgot_is_asked_again(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    prove(one)
    try_get(world, two, 0, 4096)
    callback, first = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4_OK)
    world.runner.advance(AGREED_PAUSE - 0.1)
    assert take_callbacks(one.session.wire) == []
    world.runner.advance(0.2)
    callback, again = take_recall(one.session)
    assert again == first
    answer(one.session.wire, callback, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert held(world) == []


def test_old_stateid_is_answered_with_a_newer_one(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    one.get(8192, 4096)
    try_get(world, two, 0, 4096)
    callback, first = take_recall(one.session)
    assert first.stateid is not None
    assert one.give_back(8192, 4096) is not None  # was under way already
    answer(one.session.wire, callback, n.NFS4ERR_OLD_STATEID)
    callback, second = take_recall(one.session)
    assert second.stateid is not None
    assert second.stateid.seqid == first.stateid.seqid + 2


# ---- forgetful clients, replies that are not proven ----------------------------------------------


@pytest.mark.parametrize("status", [n.NFS4ERR_NOMATCHING_LAYOUT, n.NFS4ERR_BAD_STATEID])
def test_who_has_nothing_any_more_says_so(world: World, one: File, two: File, status: int) -> None:
    one.get(0, 4096)
    prove(one)
    try_get(world, two, 0, 4096)
    callback, _ = take_recall(one.session)
    assert callback.referring == [], "the reply was received"
    answer(one.session.wire, callback, status)
    assert held(world) == []
    assert two.get(0, 4096)


def test_a_layout_whose_reply_is_not_proven_is_not_believed_to_be_forgotten(
    world: World, one: File, two: File
) -> None:
    layout = one.get(0, 4096)
    try_get(world, two, 0, 4096)
    callback, _ = take_recall(one.session)
    assert callback.referring == [(one.session.id, one.session.numbers[0], 0)]
    answer(one.session.wire, callback, 0, n.NFS4ERR_DELAY)
    world.runner.advance(0.1)
    callback, _ = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert held(world) == [(0, 4096)], "it may not have got it yet"
    world.runner.advance(0.1)
    callback, _ = take_recall(one.session)
    assert callback.referring == [], "but now it has: it would not have answered before"
    answer(one.session.wire, callback, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert held(world) == []
    call = layoutcommit([(0, 4096)], layout.stateid, 4095)
    assert status_of(one.session, putfh(one.fh), call) == "BAD_STATEID"


def test_nomatching_is_about_the_recalled_range(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    one.get(8192, 4096)
    prove(one)
    try_get(world, two, 0, 4096)
    callback, _ = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert held(world) == [(8192, 12288)]


def test_a_forgetful_client_begins_anew_with_its_open(world: World, one: File) -> None:
    one.get(0, 4096)
    one.layout = None
    assert one.get(0, 4096).stateid.seqid == 2


# ---- deadlines -----------------------------------------------------------------------------------


def miss_the_deadline(world: World, file: File) -> None:
    """The core's time is over; it revokes."""
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.settle()
    events(world)


def wait_for(world: World, file: File) -> CoreError:
    """A local user that does not wait is in the way."""
    with pytest.raises(CoreError) as caught:
        world.fs.write(ino_of(world), 0, b"local" * 1000, nowait=True)
    events(world)
    return caught.value


def revoke(world: World, file: File, log_watch: LogWatch) -> None:
    log_watch.expect("was revoked")
    log_watch.lines.clear()
    assert wait_for(world, file).errno == errno.EAGAIN
    world.fs.layouts.recall(ino_of(world))
    miss_the_deadline(world, file)


def test_a_revoked_layout_cannot_be_committed_and_the_client_hears_of_it(
    world: World, one: File, log_watch: LogWatch
) -> None:
    layout = one.get(0, 8192)
    world.sim.poke(layout.extents[0].storage, b"x" * 8192)
    revoke(world, one, log_watch)
    call = layoutcommit([(0, 8192)], layout.stateid, 8191)
    status = status_of(one.session, putfh(one.fh), call)
    assert status == "BAD_STATEID", "not one that Linux takes for success"
    assert world.fs.read(ino_of(world), 0, 8192) == bytes(8192)
    call = layoutget(0, 4096, 4096, RW, layout.stateid)
    assert status_of(one.session, putfh(one.fh), call) == "BAD_STATEID"
    assert world.service.layouts.status()["states"] == 0


def test_a_commit_that_comes_before_the_news_of_a_revoke(
    world: World, one: File, log_watch: LogWatch
) -> None:
    """Of blocks that are written in place no range says anything: it must not be taken for done."""
    log_watch.expect("was revoked")
    world.fs.write(ino_of(world), 0, b"a" * 16384)
    world.fs.sync()
    layout = one.get(0, 16384)
    with pytest.raises(CoreError):
        world.fs.write(ino_of(world), 0, b"local" * 100, nowait=True)
    world.fs.layouts.recall(ino_of(world), 0, BLOCK)
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.settle()
    assert (0, 4096) not in held(world)
    assert held(world) != [], "the rest is still in its hands"
    call = layoutcommit([], layout.stateid, None)
    assert status_of(one.session, putfh(one.fh), call) == "BAD_STATEID"
    events(world)


def test_returning_what_was_revoked_empties_the_quarantine(
    world: World, one: File, log_watch: LogWatch
) -> None:
    layout = one.get(0, 8192)
    (grant,) = world.fs.layouts.grants(ino_of(world))
    revoke(world, one, log_watch)
    record = world.fs.layouts.holder(grant.holder)
    assert record is not None
    assert record.state is HolderState.LOST
    assert record.quarantined > 0
    assert one.do(layoutreturn(stateid=layout.stateid)) is None
    record = world.fs.layouts.holder(grant.holder)
    assert record is not None
    assert record.state is HolderState.LIVE
    world.fs.layouts.settle()
    record = world.fs.layouts.holder(grant.holder)
    assert record is not None
    assert record.quarantined == 0
    one.layout = None
    assert one.get(0, 4096).stateid.seqid == 1


def test_a_client_that_missed_a_recall_may_go_on(
    world: World, one: File, log_watch: LogWatch
) -> None:
    other = open_file(one.session, b"other")
    kept = other.get(0, 4096)
    one.get(0, 8192)
    revoke(world, one, log_watch)
    one.layout = None
    assert one.get(0, 8192).stateid.seqid == 1
    assert other.get(0, 4096).stateid.other == kept.stateid.other
    (grant,) = world.fs.layouts.grants(ino_of(world))
    record = world.fs.layouts.holder(grant.holder)
    assert record is not None
    assert record.state is HolderState.LIVE
    assert record.quarantined > 0, "what was revoked is not returned by that"


def test_returning_all_makes_a_lost_client_clean(
    world: World, one: File, log_watch: LogWatch
) -> None:
    other = open_file(one.session, b"other")
    other.get(0, 4096)
    one.get(0, 8192)
    (grant,) = world.fs.layouts.grants(ino_of(world))
    revoke(world, one, log_watch)
    assert one.do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL)) is None
    world.fs.layouts.settle()
    record = world.fs.layouts.holder(grant.holder)
    assert record is not None
    assert (record.state, record.quarantined) == (HolderState.LIVE, 0)
    assert world.service.counters["holders_settled"] == 1


# ---- LAYOUTGETs that take their time -------------------------------------------------------------


class Slow:
    """Lets blocking calls of a runner wait until they are let go."""

    def __init__(self, world: World) -> None:
        self.held: list[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = []
        self.runner = world.runner
        self.at_once = world.runner.blocking
        world.runner.blocking = self.hold  # type: ignore[method-assign]

    def hold(self, call: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        self.held.append((call, done))

    def go(self, *, answer: bool = True) -> Callable[[], None]:
        """Run the first call; without `answer` what is returned tells its result."""
        call, done = self.held.pop(0)
        try:
            result, error = call(), None
        except Exception as failed:
            result, error = None, failed
        if answer:
            done(result, error)
        return lambda: done(result, error)

    def go_all(self) -> None:
        while self.held:
            self.go()

    def end(self) -> None:
        self.runner.blocking = self.at_once  # type: ignore[method-assign]
        self.go_all()


def send(file: File, call: Any, slot: int) -> int:
    """A request whose answer may come later; its xid."""
    session = file.session
    session.numbers[slot] = session.numbers.get(slot, 0) + 1
    first = sequence_op(session.id, session.numbers[slot], slot, slot)
    return session.wire.send(encode_compound(first, putfh(file.fh).encoded, call.encoded))


def result(file: File, call: Any, xid: int) -> Any:
    """The status that an answer has, or the call's value."""
    reply = read_compound(file.session.wire.results(xid))
    assert next_result(reply.body).status == n.NFS4_OK
    reply.body.fixed(16)
    for _ in range(5):
        reply.body.u32()
    next_result(reply.body)
    last = next_result(reply.body)
    return call.decode(last.body) if last.status == n.NFS4_OK else last.status


def test_a_recall_waits_for_the_layoutget_it_is_about(world: World, one: File, two: File) -> None:
    one.get(65536, 4096)  # the holder exists
    slow = Slow(world)
    call = layoutget(0, 4096, 4096, RW, one.opened)
    xid = send(one, call, 1)
    tell = slow.go(answer=False)
    slow.runner.blocking = slow.at_once  # type: ignore[method-assign]
    assert try_get(world, two, 0, 4096) == "LAYOUTTRYLATER"
    assert take_callbacks(one.session.wire) == [], "the client does not know of it yet"
    tell()
    layout = result(one, call, xid)
    callback, recall = take_recall(one.session)
    assert recall.stateid == Stateid(layout.stateid.seqid + 1, layout.stateid.other)
    assert (one.session.id, one.session.numbers[1], 1) in callback.referring


def test_a_return_waits_for_a_layoutget_and_spares_it(world: World, one: File) -> None:
    first = one.get(0, 4096)
    slow = Slow(world)
    get = layoutget(0, 4096, 4096, RW, first.stateid)
    got = send(one, get, 1)
    give = layoutreturn(0, ALL, ANY, first.stateid)
    given = send(one, give, 2)
    assert len(slow.held) == 1, "the return waits"
    slow.go_all()
    world.runner.advance(1)
    slow.end()
    layout = result(one, get, got)
    assert layout.stateid.seqid == 2
    left = result(one, give, given)
    assert left == Stateid(3, layout.stateid.other)
    assert held(world) == [(0, layout.end)]


def test_a_layoutget_waits_for_a_return(world: World, one: File) -> None:
    first = one.get(0, 4096)
    slow = Slow(world)
    give = layoutreturn(0, ALL, ANY, first.stateid)
    given = send(one, give, 1)
    get = layoutget(0, 4096, 4096, RW, one.opened)
    got = send(one, get, 2)
    assert len(slow.held) == 1
    slow.go_all()
    for _ in range(4):
        world.runner.advance(0.1)
        slow.go_all()
    slow.end()
    assert result(one, give, given) is None
    layout = result(one, get, got)
    assert not isinstance(layout, int), n.STATUS_NAMES[layout]
    assert layout.stateid.seqid == 1, "a new layout state"
    assert layout.stateid.other != first.stateid.other
    assert held(world) == [(0, layout.end)]


def test_a_layoutget_of_a_client_that_went_meanwhile(world: World, one: File) -> None:
    one.get(65536, 4096)
    slow = Slow(world)
    get = layoutget(0, 4096, 4096, RW, one.opened)
    send(one, get, 1)
    client = next(iter(world.service.clients.all_living()))
    world.service.clients.drop(client, restarted=True)
    slow.end()
    assert held(world) == []


# ---- others --------------------------------------------------------------------------------------


def test_a_local_writer_recalls(world: World, one: File) -> None:
    one.get(0, 4096)
    assert wait_for(world, one).errno == errno.EAGAIN
    callback, recall = take_recall(one.session)
    answer(one.session.wire, callback, n.NFS4_OK)
    one.give_back(stateid=recall.stateid)
    assert world.fs.write(ino_of(world), 0, b"local", nowait=True) == 5


def test_no_layout_without_a_backchannel(world: World, one: File) -> None:
    for session in list(world.service.clients.all_living()[0].sessions):
        session.back_connections.clear()
    assert try_get(world, one, 0, 4096) == "LAYOUTUNAVAILABLE"


def test_recall_any_when_space_is_short(world: World, one: File) -> None:
    for index in range(4):
        open_file(one.session, b"file%d" % index).get(0, 4096)
    world.service.layouts.recall_any()
    world.service.layouts.recall_any()
    (callback,) = take_callbacks(one.session.wire)
    assert callback.op == n.OP_CB_RECALL_ANY
    assert callback.body.u32() == 2
    assert callback.body.bitmap() == 1 << n.RCA4_TYPE_MASK_BLK_LAYOUT


def test_when_space_is_short_others_are_asked_first(world: World, one: File, two: File) -> None:
    one.get(0, 4096)
    big = 40 * MIB
    assert try_get(world, one, 0, 4096) == "OK"
    take_callbacks(one.session.wire)
    call = layoutget(MIB, big, big, RW, two.opened)
    world.fs.fallocate(world.fs.mknod(ROOT_INODE, b"big", 0o100644).ino, 0, 30 * MIB)
    assert status_of(two.session, putfh(two.fh), call) == "LAYOUTTRYLATER"
    assert [c.op for c in take_callbacks(one.session.wire)] == [n.OP_CB_RECALL_ANY]
    assert status_of(two.session, putfh(two.fh), call) == "NOSPC"
    world.runner.advance(RECALL_ANY_SECONDS)
    assert status_of(two.session, putfh(two.fh), call) == "LAYOUTTRYLATER"


def test_a_write_without_space_asks_for_layouts_first(world: World, one: File, two: File) -> None:
    one.get(0, 40 * MIB)
    world.fs.fallocate(world.fs.mknod(ROOT_INODE, b"big", 0o100644).ino, 0, 8 * MIB)
    other = open_file(two.session, b"other")
    world.runner.advance(RECALL_ANY_SECONDS)
    take_callbacks(one.session.wire)
    call = Call(op(n.OP_ALLOCATE, encoded(other.opened), u64(0), u64(30 * MIB)))
    assert status_of(two.session, putfh(other.fh), call) == "DELAY"
    assert [c.op for c in take_callbacks(one.session.wire)] == [n.OP_CB_RECALL_ANY]
    assert status_of(two.session, putfh(other.fh), call) == "NOSPC"


def test_lost_events_are_made_good(world: World, one: File, log_watch: LogWatch) -> None:
    one.get(0, 4096)
    with pytest.raises(CoreError):
        world.fs.write(ino_of(world), 0, b"x", nowait=True)
    assert world.fs.layouts.events()  # lost
    world.service.layouts.recalls.overflow()
    _, recall = take_recall(one.session)
    assert recall.offset == 0
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.recall(ino_of(world))
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.settle()
    assert held(world) == []
    world.fs.layouts.events()
    log_watch.expect("was revoked")
    world.service.layouts.recalls.overflow()
    assert world.service.layouts.status()["states"] == 0
