"""Sequences that once broke an invariant of the layout server, each as short as it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, Cred, DelegationConflict, EventType, LayoutEvent
from extfs.nfs import constants as n
from extfs.nfs import layout_revoked, layouts
from extfs.nfs.callbacks import CallbackReply
from extfs.nfs.clients import Client
from extfs.nfs.service import Service, ServiceOptions
from nfs import wire
from nfs.calls import Failed, do, putfh
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    NO_DELEG,
    PUTROOTFH,
    READ,
    WRITE,
    FileClient,
    StatusError,
    create,
    stateid,
)
from nfs.file_calls import (
    putfh as file_putfh,
)
from nfs.handshake import RECLAIM_COMPLETE, Kept, Server, bind_conn, created, identify
from nfs.layout_calls import (
    BLOCK,
    RW,
    File,
    answer,
    close,
    getdeviceinfo,
    layoutget,
    layoutreturn,
    open_file,
    take_callbacks,
)
from nfs.test_nfs_layouts_recall import OVER
from nfs.test_nfs_layouts_restart import Machine, kept_file, machine
from nfs.wire import (
    Runner,
    Session,
    Wire,
    auth_sys,
    create_session,
    encode,
    exchange_id,
    make_service,
    op,
    sequence,
    u32,
    u64,
)

__all__ = ["machine"]

STRANGER = auth_sys(uid=4321, gid=4321)


class SlowRunner(Runner):
    """While `slow`, blocking calls wait until they are run by `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.calls: list[tuple[Callable[[], Any], Any]] = []

    def blocking(self, call: Callable[[], Any], done: Any) -> None:
        if self.slow:
            self.calls.append((call, done))
        else:
            super().blocking(call, done)

    def go(self, index: int = 0) -> None:
        """Run one of the calls that wait."""
        super().blocking(*self.calls.pop(index))

    def go_all(self) -> None:
        self.slow = False
        while self.calls:
            self.go()


def slow_service(world: World, options: ServiceOptions | None = None) -> tuple[Service, SlowRunner]:
    runner = SlowRunner()
    service, _ = make_service(world.fs, options=options, runner=runner)
    return service, runner


def status_of(call: Callable[[], object]) -> int:
    try:
        call()
    except (StatusError, Failed) as error:
        return error.status
    return n.NFS4_OK


def client_of(session: Session) -> Client:
    found = session.service.clients.get(session.clientid)
    assert found is not None
    return found


def start(session: Session, *operations: bytes, slot: int = 0) -> int:
    """Send a COMPOUND that will not be answered yet; its xid."""
    session.numbers[slot] = session.numbers.get(slot, 0) + 1
    first = sequence(session.id, session.numbers[slot], slot, slot)
    return session.wire.send(encode(first, *operations))


# ---- who may do what ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", [n.EXCLUSIVE4, n.EXCLUSIVE4_1])
def test_a_verifier_that_looks_like_the_times_of_a_file_opens_nothing(
    world: World, how: int
) -> None:
    """An exclusive create whose verifier is (atime, mtime), which anybody may ask for."""
    fs = world.fs
    made = fs.mknod(ROOT_INODE, b"secret", 0o100600, 0, Cred(0, 0, 0))
    fs.setattr(made.ino, atime=(1_700_000_000, 0), mtime=(1_600_000_000, 0))
    fs.setattr(ROOT_INODE, mode=0o777)
    stranger = FileClient(world.session(), STRANGER)
    verifier = u32(1_700_000_000) + u32(1_600_000_000)
    opening = create(how, verifier)
    assert status_of(lambda: stranger.open(b"secret", how=opening)) in (
        n.NFS4ERR_ACCESS,
        n.NFS4ERR_EXIST,
    )
    owner = FileClient(stranger.session)
    assert owner.open(b"secret", how=opening).stateid


def test_who_may_only_write_does_not_read(world: World) -> None:
    made = world.fs.mknod(ROOT_INODE, b"box", 0o100602, 0, Cred(0, 0, 0))
    world.fs.write(made.ino, 0, b"what others have put in")
    stranger = FileClient(world.session(), STRANGER)
    opened = stranger.open(b"box", WRITE | NO_DELEG)
    assert stranger.write(opened.fh, opened.stateid, 0, b"mine")[0] == 4
    assert status_of(lambda: stranger.read(opened.fh, opened.stateid, 0, 10)) == n.NFS4ERR_ACCESS
    plus = op(n.OP_READ_PLUS, stateid(opened.stateid), u64(0), u32(10))
    assert status_of(lambda: stranger.on(opened.fh, plus)) == n.NFS4ERR_ACCESS
    root = FileClient(stranger.session)
    assert root.read(opened.fh, opened.stateid, 0, 4) == (b"mine", False)


def test_another_user_does_not_take_over_what_a_restart_left(world: World) -> None:
    """RFC 8881 8.4.2.1: who reclaims is who had it, as far as the principal tells."""
    server = Server(world.fs)
    victim = FileClient(server.session(b"victim"))
    victim.create(b"file")
    server.restart()
    thief = server.wire()
    found = identify(thief, b"victim", auth=STRANGER)
    reply = thief.compound(create_session(found.clientid, found.sequence), auth=STRANGER)
    assert reply.status == n.NFS4ERR_CLID_INUSE
    back = FileClient(server.session(b"victim", reclaim_complete=False))
    assert server.service.lease.in_grace()
    assert back.session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert not server.service.lease.in_grace()


# ---- what is undone when an operation fails in the middle --------------------------------------


def test_a_lock_that_finds_no_room_for_its_state_is_not_kept(world: World) -> None:
    service, _ = make_service(world.fs, options=ServiceOptions(states_of_client=1))
    one, two = FileClient(Session(service, b"one")), FileClient(Session(service, b"two"))
    opened = one.create(b"file")
    locking = lambda: one.lock(opened.fh, opened.stateid, b"owner", 0, 10)  # noqa: E731
    assert status_of(locking) == n.NFS4ERR_DELAY
    assert len(service.states.owners) == 0
    two.lockt(opened.fh, b"other", 0, 10)  # nobody is in the way


def test_an_open_that_finds_no_room_for_its_state_makes_no_file(world: World) -> None:
    """GUARDED4 would get EXIST when it is sent again."""
    service, _ = make_service(world.fs, options=ServiceOptions(states_of_client=1))
    one = FileClient(Session(service, b"one"))
    first = one.create(b"first")
    making = lambda: one.open(b"second", how=create(n.GUARDED4, mode=u32(0o644)))  # noqa: E731
    assert status_of(making) == n.NFS4ERR_DELAY
    one.close(first.fh, first.stateid)
    assert status_of(making) == n.NFS4_OK


def test_a_file_that_goes_during_a_compound_is_stale_for_its_rest(world: World) -> None:
    """Its inode number may be another file's by then, one outside of the export."""
    service, runner = slow_service(world)
    client = FileClient(Session(service, b"one"))
    opened = client.create(b"file")
    client.close(opened.fh, opened.stateid)
    runner.slow = True
    read = op(n.OP_READ, stateid(ANONYMOUS), u64(0), u32(10))
    commit = op(n.OP_COMMIT, u64(0), u32(0))
    xid = start(client.session, file_putfh(opened.fh), commit, read)
    world.fs.unlink(ROOT_INODE, b"file")
    runner.go_all()
    reply = wire.read_compound(client.session.wire.results(xid))
    assert reply.status == n.NFS4ERR_STALE


# ---- clients and sessions ----------------------------------------------------------------------


def test_the_old_instance_does_not_end_the_new_one_that_is_being_confirmed(world: World) -> None:
    service, runner = slow_service(world)
    Session(service, b"host", b"old")
    connection = Wire(service)
    new = identify(connection, b"host", b"new")
    runner.slow = True
    creating = connection.send(encode(create_session(new.clientid, new.sequence)))
    late = Wire(service)
    assert late.compound(exchange_id(b"host", b"old")).status == n.NFS4ERR_DELAY
    runner.go_all()
    assert created(wire.read_compound(connection.results(creating))).id
    assert service.counters["server_faults"] == 0


def test_sessions_made_at_once_do_not_get_more_memory_than_there_is(world: World) -> None:
    options = ServiceOptions(reply_cache_bytes=1 << 20)
    service, runner = slow_service(world, options)
    found = []
    for number in range(40):
        connection = Wire(service)
        found.append((connection, identify(connection, b"client %d" % number)))
    runner.slow = True
    for connection, who in found:
        connection.send(encode(create_session(who.clientid, who.sequence)))
    runner.go_all()
    reserved = sum(session.reserved for session in service.sessions._sessions.values())
    assert 0 < reserved <= options.reply_cache_bytes


def test_what_has_no_room_in_the_reply_is_not_done(world: World) -> None:
    """48 bytes are left behind SEQUENCE: six results without a body, and not a seventh."""
    connection = world.wire()
    who = identify(connection, b"one")
    fore = wire.channel_attributes(response=24 + 12 + 44 + 48)
    made = created(connection.compound(create_session(who.clientid, who.sequence, fore=fore)))
    assert made.fore[1] == 128
    operations = [PUTROOTFH] * 6 + [RECLAIM_COMPLETE]
    reply = connection.compound(sequence(made.id, 1), *operations)
    assert reply.status == n.NFS4ERR_REP_TOO_BIG
    client = world.service.clients.get(who.clientid)
    assert client is not None
    assert not client.reclaim_done


def test_a_bug_at_the_end_of_a_request_leaves_its_slot_usable(
    world: World, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    log_watch.expect("records of clients")
    session = world.session()

    def fail(staged: int) -> bool:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(world.service.records, "owes", fail)
        assert session.run(PUTROOTFH).status == n.NFS4ERR_SERVERFAULT
    assert session.run(PUTROOTFH).status == n.NFS4_OK


# ---- layouts -----------------------------------------------------------------------------------


def grants(service: Service, ino: int, session: Session) -> list[tuple[int, int]]:
    """What the core has of a client."""
    holder = client_of(session).holder_id
    return sorted(
        (g.offset, g.offset + g.length)
        for g in service.fs.layouts.grants(ino)
        if g.holder == holder
    )


def segments(service: Service, ino: int, session: Session) -> list[tuple[int, int]]:
    """What the server believes that the client has."""
    state = service.layouts.find(client_of(session), ino)
    return sorted((s.start, s.end) for s in state.segments) if state is not None else []


def test_reclaim_complete_takes_no_layout_of_after_the_restart(world: World) -> None:
    """Its client comes after the grace period: what it was given meanwhile is not of before."""
    server = Server(world.fs)
    before = open_file(server.session(), b"file")
    before.get(0, 4 * BLOCK)
    ino = world.fs.lookup(ROOT_INODE, b"file").ino
    server.restart()
    session = server.session(reclaim_complete=False)
    files = FileClient(session)
    previous = u32(n.CLAIM_PREVIOUS) + u32(n.OPEN_DELEGATE_NONE)
    opened = files.open(fh=before.fh, claim=previous)
    while server.service.lease.in_grace():
        server.runner.advance(1)
        session.run()
    again = File(session, opened.fh, opened.stateid)
    asked = status_of(lambda: again.get(0, 4 * BLOCK))
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert segments(server.service, ino, session) == grants(server.service, ino, session)
    assert asked == n.NFS4ERR_GRACE
    again.get(0, 4 * BLOCK)
    assert segments(server.service, ino, session) == grants(server.service, ino, session) != []


def test_the_return_of_a_revoked_layout_takes_no_new_one(world: World, log_watch: LogWatch) -> None:
    """LAYOUTRETURN with the old stateid and LAYOUTGET in two slots at once."""
    service, runner = slow_service(world)
    session = Session(service, b"one")
    file = open_file(session, b"file")
    file.get(0, BLOCK)
    old = file.layout
    assert old is not None
    ino = world.fs.lookup(ROOT_INODE, b"file").ino
    state = service.layouts.find(client_of(session), ino)
    assert state is not None
    log_watch.expect("was revoked")
    service.layouts.revoked(state)
    runner.slow = True
    returning = layoutreturn(stateid=old)
    start(session, putfh(file.fh).encoded, returning.encoded, slot=1)
    getting = layoutget(0, BLOCK, BLOCK, RW, file.opened)
    start(session, putfh(file.fh).encoded, getting.encoded, slot=2)
    while runner.calls:
        runner.go(len(runner.calls) - 1)
    assert segments(service, ino, session) == grants(service, ino, session)


def test_a_close_during_the_first_layoutget_leaves_no_layout(world: World) -> None:
    """Layouts here are return-on-close, RFC 8881 18.43.3."""
    service, runner = slow_service(world)
    session = Session(service, b"one")
    other = open_file(session, b"other")
    other.get(0, BLOCK)  # the client is a holder now
    file = open_file(session, b"file")
    ino = world.fs.lookup(ROOT_INODE, b"file").ino
    runner.slow = True
    getting = layoutget(0, BLOCK, BLOCK, RW, file.opened)
    start(session, putfh(file.fh).encoded, getting.encoded, slot=1)
    start(session, putfh(file.fh).encoded, close(file.opened).encoded, slot=2)
    runner.go_all()
    assert grants(service, ino, session) == []
    assert service.layouts.find(client_of(session), ino) is None


def test_revoked_layouts_that_are_not_remembered_are_not_returned(
    world: World, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """The quarantine holds what the client could reach by any of them."""
    log_watch.expect("was revoked")
    monkeypatch.setattr(layout_revoked, "REVOKED_MAX", 1)
    session = world.session()
    files = [open_file(session, name) for name in (b"a", b"b")]
    table = world.service.layouts
    stateids = []
    for file in files:
        file.get(0, BLOCK)
        stateids.append(file.layout)
    for state in table.of_client(client_of(session)):
        table.revoked(state)
    for file, old in zip(files, stateids, strict=True):
        assert old is not None
        status_of(lambda file=file, old=old: file.do(layoutreturn(stateid=old)))  # type: ignore[misc]
    assert world.service.counters["holders_settled"] == 0
    files[0].do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL))
    assert world.service.counters["holders_settled"] == 1


def miss_a_recall(machine: Machine, name: bytes) -> None:
    """The layout of a file is revoked by the core."""
    layouts, ino = machine.fs.layouts, machine.fs.lookup(ROOT_INODE, name).ino
    layouts.set_clock(1)
    layouts.recall(ino)
    layouts.set_clock(1 + OVER)
    layouts.settle()
    machine.events()


def test_what_was_revoked_before_a_restart_is_not_returned_by_something_else(
    machine: Machine, log_watch: LogWatch
) -> None:
    """The client goes on writing by what it has; the server has forgotten that it has it."""
    log_watch.expect("was revoked")
    client, before = kept_file(machine)
    before.get(0, 2 * BLOCK)
    holder = client_of(client).holder_id
    miss_a_recall(machine, b"file")
    machine.fs.sync()
    machine.restart()
    client.reopen(machine.server, client.first + 1)
    record = machine.fs.layouts.holder(holder)
    assert record is not None
    assert record.quarantined
    after = open_file(client, b"other")
    old = after.get(0, BLOCK).stateid
    miss_a_recall(machine, b"other")
    assert after.do(layoutreturn(stateid=old)) is None
    machine.fs.layouts.settle()
    again = machine.fs.layouts.holder(holder)
    assert again is not None
    assert again.quarantined >= record.quarantined
    client_file = File(client, before.fh, before.opened)
    client_file.do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL))
    machine.fs.layouts.settle()
    clean = machine.fs.layouts.holder(holder)
    assert clean is not None
    assert not clean.quarantined


def test_what_two_could_reach_is_not_returned_by_something_else_either(
    machine: Machine, log_watch: LogWatch
) -> None:
    """Blocks that more than one holder could reach are in quarantine under nobody's name: after a
    restart, too, the client has to return all before it has nothing of them."""
    log_watch.expect("was revoked")
    client, file = kept_file(machine)
    ino = machine.fs.lookup(ROOT_INODE, b"file").ino
    machine.fs.write(ino, 0, bytes(2 * BLOCK))
    machine.fs.sync()
    file.get(0, 2 * BLOCK, iomode=READ)
    other = Kept(machine.server, b"other")
    assert other.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    open_file(other, b"file").get(0, 2 * BLOCK, iomode=READ)
    holder, others = client_of(client).holder_id, client_of(other).holder_id
    miss_a_recall(machine, b"file")
    machine.fs.truncate(ino, 0)
    machine.fs.sync()
    record = machine.fs.layouts.holder(holder)
    assert record is not None
    assert not record.quarantined
    assert machine.fs.statfs().quarantined
    machine.restart()
    client.reopen(machine.server, client.first + 1)
    assert list(machine.server.service.layouts) == [], "it would read what the file had before"
    machine.fs.layouts.lost(others)
    machine.fs.layouts.fenced(others)
    machine.fs.layouts.settle()
    after = open_file(client, b"after")
    old = after.get(0, BLOCK).stateid
    miss_a_recall(machine, b"after")
    assert after.do(layoutreturn(stateid=old)) is None
    machine.fs.layouts.settle()
    assert machine.fs.statfs().quarantined, "it writes by what was revoked before the restart"
    after.do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL))
    machine.fs.layouts.settle()
    assert not machine.fs.statfs().quarantined


def test_there_are_not_more_segments_than_memory_is_meant_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "SEGMENTS_MAX", 2)
    session = world.session()
    file = open_file(session, b"file")
    world.fs.truncate(world.fs.lookup(ROOT_INODE, b"file").ino, 1 << 30)
    step = 64 << 20
    for number in (0, 2):
        file.get(number * step, BLOCK)
    assert status_of(lambda: file.get(4 * step, BLOCK)) == n.NFS4ERR_LAYOUTTRYLATER
    assert status_of(lambda: file.get(4 * step, BLOCK)) == n.NFS4ERR_LAYOUTUNAVAILABLE
    file.give_back()
    assert file.layout is None
    file.get(4 * step, BLOCK)


def test_a_client_is_told_of_few_devices(world: World) -> None:
    """Every size up to now names the device, and there are as many as blocks."""
    session = world.session()
    devices = world.service.devices
    uuid, blocks = devices.block.current[:8], world.fs.super.total_blocks
    for number in range(1, 200):
        asked = getdeviceinfo(uuid + u64(number), types=1 << n.NOTIFY_DEVICEID4_CHANGE)
        do(session, asked)
    assert len(devices._asked[client_of(session)]) <= 64 < 200 < blocks


# ---- callbacks ---------------------------------------------------------------------------------


def ask(session: Session) -> list[CallbackReply | None]:
    """Send a callback; what it was answered is put into the list."""
    answers: list[CallbackReply | None] = []
    body = op(n.OP_CB_RECALL_ANY, u32(0), wire.bitmap(0))
    session.service.callbacks.call(client_of(session), body, 1, answers.append)
    return answers


def test_a_callback_that_was_answered_is_not_sent_again(world: World) -> None:
    """DELAY, then at once BACKCHANNEL_CTL: sent again and answered before the pause is over."""
    session = world.session()
    answers = ask(session)
    (first,) = take_callbacks(session.wire)
    answer(session.wire, first, n.NFS4_OK, n.NFS4ERR_DELAY)
    control = op(n.OP_BACKCHANNEL_CTL, u32(wire.CB_PROGRAM), u32(1), u32(n.AUTH_NONE))
    assert session.run(control).status == n.NFS4_OK
    (second,) = take_callbacks(session.wire)
    assert (second.slot, second.sequence) == (first.slot, first.sequence)
    answer(session.wire, second, n.NFS4_OK)
    assert len(answers) == 1
    world.runner.advance(1)
    assert take_callbacks(session.wire) == []


def test_a_callback_whose_answer_was_lost_leaves_its_slot_usable(world: World) -> None:
    """The client has executed it and says so: RETRY_UNCACHED_REP, csa_cachethis was not set."""
    session = world.session()
    answers = ask(session)
    (first,) = take_callbacks(session.wire)
    session.wire.close()
    session.wire = Wire(world.service)
    both = n.CDFC4_FORE_OR_BOTH
    assert session.wire.compound(bind_conn(session.id, both)).status == n.NFS4_OK
    (again,) = take_callbacks(session.wire)
    assert (again.slot, again.sequence) == (first.slot, first.sequence)
    answer(session.wire, again, n.NFS4_OK, n.NFS4ERR_RETRY_UNCACHED_REP)
    assert answers == [None]
    assert world.service.callbacks.path_up(client_of(session))
    ask(session)
    (new,) = take_callbacks(session.wire)
    assert (new.slot, new.sequence) == (first.slot, first.sequence + 1)


def test_binding_the_same_connection_again_mends_the_backchannel(world: World) -> None:
    """As Linux does at SEQ4_STATUS_CB_PATH_DOWN: else it would do so for ever."""
    session = world.session()
    answers = ask(session)
    (first,) = take_callbacks(session.wire)
    answer(session.wire, first, n.NFS4_OK, n.NFS4ERR_BADSESSION)
    assert answers == [None]
    assert not world.service.callbacks.path_up(client_of(session))
    both = n.CDFC4_FORE_OR_BOTH
    assert session.wire.compound(bind_conn(session.id, both)).status == n.NFS4_OK
    assert world.service.callbacks.path_up(client_of(session))


# ---- events of the core that were lost ---------------------------------------------------------

OVERFLOW = LayoutEvent(EventType.OVERFLOW, 1, 0, 0, 0, 0, 0, 1, 0, 0)


def test_a_recall_of_a_delegation_that_was_lost_is_found(world: World) -> None:
    client = FileClient(world.session())
    opened = client.create(b"file", READ | n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG)
    assert opened.delegation.given
    ino = world.fs.lookup(ROOT_INODE, b"file").ino
    assert not world.fs.delegations.make_way(ino, DelegationConflict.OPEN_WRITE)
    assert world.fs.layouts.events()
    world.service.layout_event(OVERFLOW)
    (callback,) = take_callbacks(client.session.wire)
    assert callback.op == n.OP_CB_RECALL
    client.delegreturn(opened.fh, opened.delegation.stateid)
    assert world.fs.delegations.make_way(ino, DelegationConflict.OPEN_WRITE)


def test_a_revoke_of_a_delegation_that_was_lost_is_found(world: World) -> None:
    client = FileClient(world.session())
    opened = client.create(b"file", READ | n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG)
    ino = world.fs.lookup(ROOT_INODE, b"file").ino
    world.fs.delegations.give_back(ino, client_of(client.session).holder_id)
    world.service.layout_event(OVERFLOW)
    assert client.test(opened.delegation.stateid) == [n.NFS4ERR_DELEG_REVOKED]


# ---- names -------------------------------------------------------------------------------------


def test_a_remove_takes_no_other_file_than_was_looked_at(world: World) -> None:
    service, runner = slow_service(world)
    fs = world.fs
    place = fs.mkdir(ROOT_INODE, b"tmp", 0o1777, Cred(0, 0, 0))
    fs.mknod(place.ino, b"name", 0o100644, 0, Cred(4321, 4321, 0))
    session = Session(service, b"one")
    find = (PUTROOTFH, op(n.OP_LOOKUP, wire.opaque(b"tmp")))
    runner.slow = True
    session.numbers[1] = 1
    remove = op(n.OP_REMOVE, wire.opaque(b"name"))
    request = encode(sequence(session.id, 1, 1, 1), *find, remove)
    session.wire.send(request, auth=STRANGER)
    fs.unlink(place.ino, b"name")
    fs.mknod(place.ino, b"name", 0o100600, 0, Cred(0, 0, 0))  # root's, where the bit protects it
    runner.go_all()
    assert fs.lookup(place.ino, b"name").uid == 0
