"""A client of SCSI layouts that was fenced, and comes back (RFC 8154 2.4.10).

Invariants 13 and 14 of `extfs.nfs.layout_holders`. The storage is played by `Layouts.fenced`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import LogWatch

from extfs.core import (
    EventType,
    FenceState,
    Filesystem,
    HolderState,
    LayoutEvent,
    SimDevice,
    mkfs,
)
from extfs.nfs import constants as n
from extfs.nfs.layout_holders import FENCE_SECONDS
from extfs.nfs.service import ServiceOptions
from extfs.nfs.xdr import Reader
from nfs.calls import putfh, status_of
from nfs.conftest import World
from nfs.file_calls import FileClient
from nfs.handshake import RECLAIM_COMPLETE, Kept, Server, destroy_clientid, destroy_session
from nfs.layout_calls import (
    BLOCK,
    RW,
    SCSI_TYPE,
    File,
    answer,
    close,
    events,
    getdeviceinfo,
    getdevicelist,
    layoutcommit,
    layoutget,
    layoutreturn,
    read_recall,
    take_callbacks,
)
from nfs.scsi_world import (
    EXPORT,
    FIRST_KEY,
    fence,
    has_nothing,
    holder,
    ino_of,
    miss_a_recall,
    scsi_file,
    scsi_world,
    session,
    unit,
)
from nfs.test_nfs_layouts_recall import Slow, send
from nfs.wire import Session, u64

BOTH = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE
DECIDED, ISSUED = FenceState.DECIDED, FenceState.ISSUED


@pytest.fixture
def scsi(world: World) -> World:
    return scsi_world(world)


@pytest.fixture
def file(scsi: World) -> File:
    """A file that the client "one" has a layout of, with the device's address."""
    file = scsi_file(session(scsi))
    device = file.get(0, 8192).extents[0].device
    file.do(getdeviceinfo(device, types=BOTH, kind=SCSI_TYPE))
    return file


def try_get(file: File, offset: int = 0) -> str:
    stateid = file.layout or file.opened
    call = layoutget(offset, BLOCK, BLOCK, RW, stateid, kind=SCSI_TYPE)
    return status_of(file.session, putfh(file.fh), call)


def device_of(world: World, key: int) -> bytes:
    return world.fs.super.uuid[:8] + u64(key)


def device_status(file: File, device: bytes) -> str:
    return status_of(file.session, getdeviceinfo(device, kind=SCSI_TYPE))


def lost(world: World, file: File) -> int:
    """The client misses a recall, and its fence is decided."""
    number = holder(world).id
    miss_a_recall(world)
    world.fs.layouts.fence_put(number, DECIDED, 0)
    file.layout = None
    return number


# ---- while the fence is under way --------------------------------------------------------------


@pytest.mark.expect_log("was revoked")
def test_a_condemned_client_waits_and_goes_through_the_server(scsi: World, file: File) -> None:
    number = lost(scsi, file)
    events(scsi)
    assert try_get(file) == "LAYOUTTRYLATER"
    scsi.runner.advance(FENCE_SECONDS + 0.1)
    assert try_get(file) == "LAYOUTUNAVAILABLE", "then through the server"
    assert device_status(file, device_of(scsi, FIRST_KEY)) == "NOENT", "nor is it told its key"
    client = FileClient(file.session)
    assert client.write(file.fh, file.opened, 0, b"server")[0] == 6
    assert client.read(file.fh, file.opened, 0, 6)[0] == b"server"
    record = scsi.fs.layouts.holder(number)
    assert record is not None
    assert record.state is HolderState.LOST
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    has_nothing(file.session)
    assert try_get(file) == "OK"


@pytest.mark.expect_log("was revoked")
def test_a_lost_client_that_is_not_condemned_goes_on(scsi: World, file: File) -> None:
    number = holder(scsi).id
    miss_a_recall(scsi)
    events(scsi)
    file.layout = None
    assert try_get(file) == "OK"
    assert holder(scsi).id == number
    assert holder(scsi).state is HolderState.LIVE


def test_a_client_whose_registration_is_lost_does_not_go_on(scsi: World, file: File) -> None:
    """The unit forgot it, and it would not register again: it needs another key, so a fence, also
    when it asks for more, or returns all, before that is decided."""
    number = holder(scsi).id
    scsi.fs.layouts.lost(number)  # as ReservedMount does
    assert try_get(file) == "LAYOUTTRYLATER"
    file.do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL, layout_type=SCSI_TYPE))
    record = scsi.fs.layouts.holder(number)
    assert record is None or record.state is not HolderState.LIVE
    file.layout = None
    assert try_get(file) != "OK"
    scsi.fs.layouts.fenced(number)
    scsi.fs.layouts.settle()
    events(scsi)
    has_nothing(file.session)
    assert try_get(file) == "OK"
    assert holder(scsi).spec.fence_key == FIRST_KEY + 1


@pytest.mark.expect_log("was revoked")
def test_returning_everything_does_not_spare_it(scsi: World, file: File) -> None:
    number = holder(scsi).id
    stateid = file.layout
    assert stateid is not None
    miss_a_recall(scsi)
    events(scsi)
    scsi.fs.layouts.fence_put(number, DECIDED, 0)
    back = layoutreturn(stateid=stateid, layout_type=SCSI_TYPE)
    assert status_of(file.session, putfh(file.fh), back) == "OK"
    file.layout = None
    assert try_get(file) == "LAYOUTTRYLATER"
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    has_nothing(file.session)
    assert try_get(file) == "OK"
    assert holder(scsi).spec.fence_key == FIRST_KEY + 1


# ---- after it ----------------------------------------------------------------------------------


@pytest.mark.expect_log("was revoked")
def test_its_layouts_are_dead_and_it_comes_back_with_another_key(scsi: World, file: File) -> None:
    other = scsi_file(file.session, b"other")  # nobody has recalled this one
    other.get(0, 4096)
    old_device = device_of(scsi, FIRST_KEY)
    number = lost(scsi, file)
    events(scsi)
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    assert other.layout is not None
    layout = other.layout
    assert try_get(other) == "BAD_STATEID"
    for call in (
        layoutcommit([(0, 4096)], layout, 4095, kind=SCSI_TYPE),
        layoutcommit([], layout, None, kind=SCSI_TYPE),
        layoutreturn(stateid=layout, layout_type=SCSI_TYPE),
    ):
        assert status_of(other.session, putfh(other.fh), call) == "BAD_STATEID"
    assert scsi.service.layouts.status()["states"] == 0
    assert scsi.fs.layouts.holder(number) is None
    other.layout = None
    has_nothing(file.session)
    again = other.get(0, 4096)
    assert again.stateid.seqid == 1
    (device,) = {extent.device for extent in again.extents}
    assert device == device_of(scsi, FIRST_KEY + 1) != old_device
    assert device_status(other, device) == "OK"
    assert device_status(other, old_device) == "NOENT"
    assert other.commit((0, 4096), last=4095) == 4096


@pytest.mark.expect_log("was revoked")
def test_the_old_device_is_deleted(scsi: World, file: File) -> None:
    number = lost(scsi, file)
    events(scsi)
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    has_nothing(file.session)  # nor anything on the device
    (callback,) = take_callbacks(file.session.wire)
    assert callback.op == n.OP_CB_NOTIFY_DEVICEID
    assert callback.body.u32() == 1
    assert callback.body.bitmap() == 1 << n.NOTIFY_DEVICEID4_DELETE
    what = Reader(callback.body.opaque(100))
    assert (what.u32(), what.fixed(16)) == (SCSI_TYPE, device_of(scsi, FIRST_KEY))
    assert what.done()
    assert callback.body.done()


def test_who_did_not_ask_is_told_nothing(scsi: World) -> None:
    file = scsi_file(session(scsi))
    device = file.get(0, 4096).extents[0].device
    file.do(getdeviceinfo(device, types=0, kind=SCSI_TYPE))
    number = holder(scsi).id
    scsi.fs.layouts.lost(number)
    fence(scsi, number)
    events(scsi)
    has_nothing(file.session)
    assert take_callbacks(file.session.wire) == []


@pytest.mark.expect_log("was revoked")
@pytest.mark.parametrize("first", ["layoutget", "commit", "return", "overflow", "close"])
def test_it_is_found_out_without_the_event(scsi: World, file: File, first: str) -> None:
    """The event comes later, or is lost."""
    other = scsi_file(file.session, b"other")
    layout = other.get(0, 4096).stateid
    number = lost(scsi, file)
    events(scsi)
    fence(scsi, number)
    take_callbacks(file.session.wire)
    later = scsi.fs.layouts.events()
    assert EventType.HOLDER_GONE in [event.type for event in later]
    if first == "layoutget":
        assert try_get(other) == "DELAY"
        assert try_get(other) == "BAD_STATEID"
    elif first == "commit":
        call = layoutcommit([], layout, None, kind=SCSI_TYPE)
        assert status_of(other.session, putfh(other.fh), call) == "BAD_STATEID"
    elif first == "return":
        call = layoutreturn(stateid=layout, layout_type=SCSI_TYPE)
        assert status_of(other.session, putfh(other.fh), call) == "OK"
    elif first == "close":
        assert status_of(other.session, putfh(other.fh), close(other.opened)) == "OK"
        other = scsi_file(file.session, b"other")
    else:
        lost_events = LayoutEvent(EventType.OVERFLOW, 1, 0, 0, 0, 0, 0, len(later), 0, 0)
        scsi.service.layout_event(lost_events)
        assert scsi.service.layouts.status()["states"] == 0
    other.layout = None
    if first in ("return", "close"):
        assert try_get(other) == "DELAY"
    has_nothing(file.session)
    take_callbacks(file.session.wire)
    assert other.get(0, 4096).extents[0].device == device_of(scsi, FIRST_KEY + 1)
    for event in later:
        scsi.service.layout_event(event)
    assert other.commit((0, 4096), last=4095) == 4096, "late events change nothing"


@pytest.mark.expect_log("was revoked")
def test_delegations_go_with_the_holder(scsi: World, file: File) -> None:
    """The core has dropped them: local users do not respect them any more."""
    client = FileClient(file.session)
    opened = client.create(b"delegated", 3 | n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG)
    assert opened.delegation.given
    held = opened.delegation.stateid
    assert client.test(held) == [n.NFS4_OK]
    number = lost(scsi, file)
    events(scsi)
    fence(scsi, number)
    events(scsi)
    assert client.test(held) == [n.NFS4ERR_DELEG_REVOKED]


# ---- what it still believes to have ------------------------------------------------------------


@pytest.fixture
def fenced(scsi: World, file: File, log_watch: LogWatch) -> File:
    """The client was fenced just now, and is asked for all of its layouts."""
    log_watch.expect("was revoked")
    number = lost(scsi, file)
    events(scsi)
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    return file


def test_without_an_answer_there_is_no_other_key(scsi: World, fenced: File) -> None:
    """With it the unit would serve what the client writes by its old layouts, too."""
    assert try_get(fenced) == "LAYOUTTRYLATER"
    assert fenced.do(getdevicelist(SCSI_TYPE)) == []
    assert device_status(fenced, device_of(scsi, FIRST_KEY + 1)) == "NOENT"
    has_nothing(fenced.session, n.NFS4ERR_DELAY)
    assert take_callbacks(fenced.session.wire) == []
    assert try_get(fenced) == "LAYOUTTRYLATER"
    has_nothing(fenced.session, n.NFS4ERR_DELAY)
    scsi.runner.advance(FENCE_SECONDS + 0.1)
    assert try_get(fenced) == "LAYOUTUNAVAILABLE"
    has_nothing(fenced.session)
    assert try_get(fenced) == "OK"


def test_returning_all_layouts_is_an_answer(scsi: World, fenced: File) -> None:
    has_nothing(fenced.session, n.NFS4_OK)
    assert try_get(fenced) == "LAYOUTTRYLATER"
    take_callbacks(fenced.session.wire)
    block = layoutreturn(kind=n.LAYOUT4_RET_REC_ALL)
    assert status_of(fenced.session, block) == "OK"
    assert try_get(fenced) == "LAYOUTTRYLATER", "those of the other type"
    everything = layoutreturn(kind=n.LAYOUT4_RET_REC_ALL, layout_type=SCSI_TYPE)
    assert status_of(fenced.session, everything) == "OK"
    assert try_get(fenced) == "OK"


def test_a_layout_on_its_way_is_referred_to(scsi: World, file: File, log_watch: LogWatch) -> None:
    log_watch.expect("was revoked")
    other = scsi_file(file.session, b"other")
    scsi.fs.truncate(ino_of(scsi.fs, b"other"), 1 << 20)
    slow = Slow(scsi)
    call = layoutget(0, BLOCK, BLOCK, RW, other.opened, kind=SCSI_TYPE)
    send(other, call, 1)
    slow.end()
    slot = (file.session.id, file.session.numbers[1], 1)
    number = lost(scsi, file)
    events(scsi)
    take_callbacks(file.session.wire)
    fence(scsi, number)
    events(scsi)
    (callback,) = take_callbacks(file.session.wire)
    assert slot in callback.referring
    assert read_recall(callback).kind == n.LAYOUT4_RET_REC_ALL


# ---- the same owner, or the same host ----------------------------------------------------------


def leave(world: World, of: Session) -> None:
    """The client unmounts."""
    assert of.wire.compound(destroy_session(of.id)).status == n.NFS4_OK
    assert of.wire.compound(destroy_clientid(of.clientid)).status == n.NFS4_OK
    world.fs.layouts.settle()
    events(world)


@pytest.mark.parametrize("how", ["expired", "rebooted"])
def test_the_next_client_of_an_owner_waits_for_the_last_ones_fence(
    scsi: World, file: File, how: str
) -> None:
    """Its key would take the place of the old one at the unit, and what is queued there would
    go through. That a client has rebooted says nothing of what the unit has queued."""
    number = holder(scsi).id
    if how == "expired":
        client = scsi.service.clients.living(b"one")
        assert client is not None
        scsi.service.lease.expire(client)
    again = scsi_file(session(scsi, verifier=b"boot" if how == "expired" else b"again"))
    record = scsi.fs.layouts.holder(number)
    assert record is not None
    assert record.state is HolderState.LOST
    assert record.grants > 0
    assert try_get(again) == "LAYOUTTRYLATER"
    assert device_status(again, device_of(scsi, FIRST_KEY + 1)) == "NOENT"
    scsi.fs.layouts.fence_put(number, DECIDED, 0)
    scsi.fs.layouts.fence_put(number, ISSUED, 1)
    assert try_get(again) == "LAYOUTTRYLATER"
    fence(scsi, number)
    events(scsi)
    assert try_get(again) == "LAYOUTTRYLATER"
    has_nothing(again.session)
    assert try_get(again) == "OK"
    assert holder(scsi).spec.fence_key == FIRST_KEY + 1


def test_the_next_client_of_an_owner_that_left_clean_waits_for_nothing(
    scsi: World, file: File
) -> None:
    assert file.give_back() is None
    assert status_of(file.session, putfh(file.fh), close(file.opened)) == "OK"
    leave(scsi, file.session)
    assert scsi.fs.layouts.holders() == []
    assert try_get(scsi_file(session(scsi))) == "OK"


def test_one_client_of_a_host_registers(scsi: World, file: File) -> None:
    """Of two in containers one key would take the other's place."""
    neighbour = scsi_file(session(scsi, b"two"), b"other")
    far = scsi_file(session(scsi, b"three", "10.0.0.3"), b"third")
    assert try_get(neighbour) == "LAYOUTUNAVAILABLE"
    assert try_get(far) == "OK"
    assert scsi.service.counters["layoutget_other_client_of_host"] == 1
    assert file.give_back() is None
    assert try_get(neighbour) == "LAYOUTUNAVAILABLE", "the first one is still registered"
    assert status_of(file.session, putfh(file.fh), close(file.opened)) == "OK"
    leave(scsi, file.session)
    assert try_get(neighbour) == "OK"


@pytest.mark.expect_log("was revoked")
def test_the_host_of_a_fenced_client_stays_its_own(scsi: World, file: File) -> None:
    """It may have I/O that it has not sent yet."""
    neighbour = scsi_file(session(scsi, b"two"), b"other")
    number = lost(scsi, file)
    events(scsi)
    fence(scsi, number)
    events(scsi)
    assert try_get(neighbour) == "LAYOUTUNAVAILABLE"
    (*_, last) = take_callbacks(file.session.wire)
    answer(file.session.wire, last, n.NFS4ERR_NOMATCHING_LAYOUT)
    assert try_get(file) == "OK"


def test_keys_that_are_told_are_offered_before(world: World) -> None:
    offered: list[int] = []
    scsi = scsi_world(world, identity=replace(unit(), offered=offered.append))
    file = scsi_file(session(scsi))
    device = file.get(0, 4096).extents[0].device
    assert offered == [], "nobody can register a key that he does not know"
    file.do(getdeviceinfo(device, kind=SCSI_TYPE))
    file.do(getdeviceinfo(device, kind=SCSI_TYPE))
    assert offered == [FIRST_KEY, FIRST_KEY]
    device_status(file, device_of(scsi, FIRST_KEY + 5))
    assert offered == [FIRST_KEY, FIRST_KEY]


# ---- over a restart of the server --------------------------------------------------------------


class Machine:
    """A server on a device; `restart` is a power cut of it, after which the device keeps all."""

    def __init__(self, sim: SimDevice) -> None:
        self.sim = sim
        self.options = ServiceOptions(grace_seconds=20.0, unit=unit())
        self.start()

    def start(self) -> None:
        self.fs = Filesystem.open(self.sim.device())
        self.fs.layouts.set_clock(1)
        self.server = Server(self.fs, self.options, (EXPORT,))
        self.world = World(self.fs, self.server.service, self.server.runner, self.sim)

    def restart(self) -> None:
        self.fs.abandon()
        self.sim.settle()
        self.start()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with SimDevice(64 << 20) as sim:
        with sim.device() as device:
            mkfs(device)
        machine = Machine(sim)
        yield machine
        machine.fs.close()


def kept_file(machine: Machine) -> tuple[Kept, File]:
    client = Kept(machine.server)
    assert client.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    file = scsi_file(client)
    device = file.get(0, 8192).extents[0].device
    assert device_status(file, device) == "OK"
    return client, file


def test_a_kept_client_keeps_key_and_device(machine: Machine) -> None:
    client, file = kept_file(machine)
    ino = ino_of(machine.fs)
    layout = file.get(0, 8192)
    machine.sim.poke(layout.extents[0].storage, b"k" * 8192)
    machine.restart()
    client.reopen(machine.server, client.first + 1)
    file.session = client
    device = layout.extents[0].device
    assert device_status(file, device) == "OK", "it may have dropped the address"
    assert file.commit((0, 8192), last=8191) == 8192
    assert machine.fs.read(ino, 0, 8192) == b"k" * 8192
    assert file.get(0, 8192).extents[0].device == device
    assert holder(machine.world, b"kept").spec.fence_key == FIRST_KEY


@pytest.mark.parametrize("state", [DECIDED, ISSUED])
def test_a_kept_client_that_was_to_be_fenced_has_nothing_left(
    machine: Machine, state: FenceState
) -> None:
    client, file = kept_file(machine)
    number = holder(machine.world, b"kept").id
    layout = file.layout
    assert layout is not None
    machine.fs.layouts.lost(number)
    machine.fs.layouts.fence_put(number, DECIDED, 0)
    if state is ISSUED:
        machine.fs.layouts.fence_put(number, ISSUED, 1)
    machine.restart()
    assert machine.server.service.layouts.status()["states"] == 0
    client.reopen(machine.server, client.first + 1)
    file.session = client
    assert try_get(file) == "BAD_STATEID"
    call = layoutcommit([(0, 8192)], layout, 8191, kind=SCSI_TYPE)
    assert status_of(client, putfh(file.fh), call) == "BAD_STATEID"
    file.layout = None
    assert try_get(file) == "LAYOUTTRYLATER"
    assert device_status(file, device_of(machine.world, FIRST_KEY)) == "NOENT"
    fence(machine.world, number)
    events(machine.world)
    has_nothing(client)
    assert try_get(file) == "OK"
    assert holder(machine.world, b"kept").spec.fence_key == FIRST_KEY + 1


def test_in_grace_a_condemned_client_may_commit_but_gets_no_layouts(machine: Machine) -> None:
    """Nobody has taken from it what it wrote."""
    first = Session(machine.server.service, b"other")
    file = scsi_file(first)
    ino = ino_of(machine.fs)
    got = file.get(0, 8192)
    machine.sim.poke(got.extents[0].storage, b"w" * 8192)
    layout = got.stateid
    number = holder(machine.world, b"other").id
    machine.fs.layouts.lost(number)
    machine.fs.layouts.fence_put(number, DECIDED, 0)
    machine.restart()
    again = Session(machine.server.service, b"other", reclaim_complete=False)
    call = layoutcommit([(0, 8192)], layout, 8191, kind=SCSI_TYPE, reclaim=True)
    assert status_of(again, putfh(file.fh), call) == "OK"
    assert machine.fs.read(ino, 0, 8192) == b"w" * 8192
    assert again.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    file = scsi_file(again)
    assert try_get(file) == "LAYOUTTRYLATER"
    fence(machine.world, number)
    assert try_get(file) == "LAYOUTTRYLATER", "it has not said yet that it has none"
    has_nothing(again)
    assert try_get(file) == "OK"
    assert holder(machine.world, b"other").spec.fence_key == FIRST_KEY + 1


def test_what_was_not_reclaimed_is_fenced(machine: Machine) -> None:
    """A client that is not kept says that it has all it wants; what it queued before is unknown.

    From then on, and not only when the decision is durable, nothing that the client does makes its
    old holder live again: the core would forget what it could reach.
    """
    first = Session(machine.server.service, b"other")
    scsi_file(first).get(0, 8192)
    number = holder(machine.world, b"other").id
    machine.restart()
    again = Session(machine.server.service, b"other", reclaim_complete=False)
    assert again.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    file = scsi_file(again)
    for step in ("at once", "it has returned all", "decided"):
        record = machine.fs.layouts.holder(number)
        assert record is not None
        assert record.state is HolderState.LOST, step
        assert try_get(file) == "LAYOUTTRYLATER", step
        if step == "at once":
            has_nothing(again)
            file.do(layoutreturn(kind=n.LAYOUT4_RET_REC_ALL, layout_type=SCSI_TYPE))
        elif step == "it has returned all":
            machine.fs.layouts.fence_put(number, DECIDED, 0)  # as the policy does, some time later
    fence(machine.world, number)
    assert try_get(file) == "OK"
    assert holder(machine.world, b"other").spec.fence_key == FIRST_KEY + 1


def test_a_client_that_gave_up_its_holder_does_not_find_it_after_another_restart(
    machine: Machine,
) -> None:
    """The server ends before the decision is durable: nobody speaks for that holder any more."""
    first = Session(machine.server.service, b"other")
    scsi_file(first).get(0, 8192)
    number = holder(machine.world, b"other").id
    machine.restart()
    again = Session(machine.server.service, b"other", reclaim_complete=False)
    assert again.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    machine.restart()
    Session(machine.server.service, b"other", reclaim_complete=False)
    record = machine.fs.layouts.holder(number)
    assert record is not None
    assert record.state is HolderState.LOST


def test_one_that_was_fenced_while_the_server_was_down_may_reclaim(
    machine: Machine, log_watch: LogWatch
) -> None:
    first = Session(machine.server.service, b"other")
    scsi_file(first).get(0, 8192)
    number = holder(machine.world, b"other").id
    machine.restart()
    again = Session(machine.server.service, b"other", reclaim_complete=False)
    machine.fs.layouts.lost(number)
    fence(machine.world, number)
    assert again.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert try_get(scsi_file(again)) == "LAYOUTTRYLATER"
    has_nothing(again)
    assert try_get(scsi_file(again)) == "OK"
    assert log_watch.lines == []
