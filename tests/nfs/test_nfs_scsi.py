"""SCSI layouts on the wire (RFC 8154): who gets which device and key, and in which words."""

from __future__ import annotations

import pytest
from conftest import LogWatch

from extfs.core import HolderState, LayoutState
from extfs.nfs import block_layout, scsi_layout
from extfs.nfs import constants as n
from extfs.nfs.block_layout import SliceVolume
from extfs.nfs.effects import run_here
from extfs.nfs.scsi_layout import BaseVolume
from extfs.nfs.service import ServiceOptions
from nfs.calls import do, fails, getattr_, getfh, lookup, putfh, putrootfh, status_of
from nfs.conftest import World
from nfs.layout_calls import (
    ALL,
    ANY,
    BLOCK,
    BLOCK_TYPE,
    READ,
    RW,
    SCSI_TYPE,
    File,
    answer,
    encoded,
    events,
    getdeviceinfo,
    getdevicelist,
    layoutcommit,
    layoutget,
    layoutreturn,
    open_,
    open_file,
    take_callbacks,
    take_recall,
)
from nfs.reference_client import check_layout
from nfs.scsi_world import FIRST_KEY, NAA, holder, ino_of, scsi_file, scsi_world, session, unit
from nfs.wire import make_service, op, u32, u64

MIB = 1 << 20
BOTH = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE


@pytest.fixture
def scsi(world: World) -> World:
    return scsi_world(world)


@pytest.fixture
def file(scsi: World) -> File:
    return scsi_file(session(scsi))


def device_of(world: World, key: int = FIRST_KEY) -> bytes:
    return world.fs.super.uuid[:8] + u64(key)


# ---- layouts -----------------------------------------------------------------------------------


def test_a_file_is_written_and_read_by_its_layout(scsi: World, file: File) -> None:
    layout = file.get(0, 16384)
    check_layout(layout, 0, 16384, BLOCK)
    assert layout.kind == SCSI_TYPE
    assert {extent.device for extent in layout.extents} == {device_of(scsi)}
    assert {extent.state for extent in layout.extents} == {LayoutState.INVALID_DATA}
    scsi.sim.poke(layout.extents[0].storage, b"s" * 16384)
    assert file.commit((0, 4096), (4096, 12288), last=16383) == 16384
    assert scsi.fs.read(ino_of(scsi.fs), 0, 16384) == b"s" * 16384
    again = file.get(0, 16384, iomode=READ)
    check_layout(again, 0, 16384, BLOCK)
    assert scsi.sim.peek(again.extents[0].storage, 4096) == b"s" * 4096


def test_the_update_is_ranges_and_nothing_else(scsi: World, file: File) -> None:
    scsi.fs.truncate(ino_of(scsi.fs), MIB)
    layout = file.get(0, 8192)
    update = block_layout.encode_update(layout.extents[0].device, [(0, 8192)])
    call = layoutcommit([], layout.stateid, 8191, body=update, kind=SCSI_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "BADXDR"
    call = layoutcommit([(0, 8192)], layout.stateid, 8191, kind=BLOCK_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "INVAL"
    outside = [(0, 8192), (MIB // 2, 4096)]
    call = layoutcommit(outside, layout.stateid, 8191, kind=SCSI_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "BAD_STATEID", "whole, or nothing"
    call = layoutcommit([(0, 8192)], layout.stateid, 8191, kind=SCSI_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "OK"


def test_recalls_and_returns_name_the_type(scsi: World, file: File) -> None:
    layout = file.get(0, 8192)
    scsi.fs.layouts.recall(ino_of(scsi.fs), 0, BLOCK)
    events(scsi)
    callback, recall = take_recall(file.session)
    assert recall.layout_type == SCSI_TYPE
    answer(file.session.wire, callback, n.NFS4_OK)
    wrong = layoutreturn(0, ALL, ANY, recall.stateid, layout_type=BLOCK_TYPE)
    assert status_of(file.session, putfh(file.fh), wrong) == "INVAL"
    of_block = layoutreturn(kind=n.LAYOUT4_RET_REC_ALL, layout_type=BLOCK_TYPE)
    assert status_of(file.session, of_block) == "OK"
    assert scsi.fs.layouts.grants(ino_of(scsi.fs)) != [], "that was all of the other type"
    all_of_it = layoutreturn(kind=n.LAYOUT4_RET_REC_ALL, layout_type=SCSI_TYPE)
    assert status_of(file.session, all_of_it) == "OK"
    assert scsi.fs.layouts.grants(ino_of(scsi.fs)) == []
    assert layout.stateid.other not in scsi.service.states._states


# ---- what is offered ---------------------------------------------------------------------------


def test_the_type_is_the_exports_and_the_hosts(world: World, log_watch: LogWatch) -> None:
    log_watch.expect("refuses their I/O")
    world.fs.mkdir(1, b"blocks", 0o755)
    world.fs.mkdir(1, b"units", 0o755)
    both = scsi_world(
        world,
        "/units:127.0.0.0/8,10.0.0.0/8,rw,insecure,no_root_squash,layouts=scsi@127.0.0.0/8",
        "/blocks:127.0.0.0/8,rw,insecure,no_root_squash,layouts=block",
    )
    types = getattr_(n.FATTR4_FS_LAYOUT_TYPES)

    def told(host: str, *path: bytes) -> list[int]:
        of = session(both, b"|".join((host.encode(), *path)), host)
        found = do(of, putrootfh(), *(lookup(name) for name in path), types)[-1]
        offered = found[n.FATTR4_FS_LAYOUT_TYPES]
        assert isinstance(offered, list)
        return offered

    assert told("127.0.0.1", b"units") == [SCSI_TYPE]
    assert told("127.0.0.1", b"blocks") == [BLOCK_TYPE]
    assert told("127.0.0.1") == [BLOCK_TYPE, SCSI_TYPE], "the root of them all"
    assert told("10.0.0.9", b"units") == []


def test_another_type_than_the_exports_is_unknown(world: World, scsi: World, file: File) -> None:
    call = layoutget(0, 4096, 4096, RW, file.opened, kind=BLOCK_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "UNKNOWN_LAYOUTTYPE"
    file.get(0, 4096)
    block = open_file(world.session(b"other"), b"file")
    call = layoutget(0, 4096, 4096, RW, block.opened, kind=SCSI_TYPE)
    assert status_of(block.session, putfh(block.fh), call) == "UNKNOWN_LAYOUTTYPE"


def test_a_file_has_layouts_of_one_type(world: World, log_watch: LogWatch) -> None:
    """Of one client, though two exports lead to it."""
    log_watch.expect("refuses their I/O")
    inner = world.fs.mkdir(1, b"blocks", 0o755).ino
    both = scsi_world(
        world,
        "/:rw,insecure,no_root_squash,layouts=scsi",
        "/blocks:rw,insecure,no_root_squash,layouts=block",
    )
    one = session(both)
    stateid, fh = do(one, putrootfh(), lookup(b"blocks"), open_(b"file"), getfh())[-2:]
    block = File(one, fh, stateid, kind=BLOCK_TYPE)
    both.fs.link(ino_of_inner(both, inner), 1, b"link")
    block.get(0, 4096)
    assert holder(both).spec.fence_key == FIRST_KEY, "the host may have SCSI layouts"
    scsi = scsi_file(one, b"link")
    call = layoutget(0, 4096, 4096, RW, scsi.opened, kind=SCSI_TYPE)
    assert status_of(one, putfh(scsi.fh), call) == "LAYOUTUNAVAILABLE"
    block.give_back()
    assert scsi.get(0, 4096).kind == SCSI_TYPE


def ino_of_inner(world: World, directory: int) -> int:
    return world.fs.lookup(directory, b"file").ino


# ---- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, MIB])
def test_the_address_is_the_unit_with_the_clients_key(world: World, offset: int) -> None:
    scsi = scsi_world(world, identity=unit(offset))
    file = scsi_file(session(scsi))
    (device,) = {extent.device for extent in file.get(0, 4096).extents}
    address, granted = file.do(getdeviceinfo(device, types=BOTH, kind=SCSI_TYPE))
    base = BaseVolume(1, 3, NAA, FIRST_KEY)
    size = scsi.fs.super.total_blocks * BLOCK
    slices = [SliceVolume(offset, size, 0)] if offset else []
    assert scsi_layout.decode_device_address(address) == [base, *slices]
    assert granted == BOTH, "Linux keeps no address when it is promised less"
    failed = fails(file.session, getdeviceinfo(device, maxcount=16, kind=SCSI_TYPE))
    assert failed.status == n.NFS4ERR_TOOSMALL
    assert failed.body.u32() == 8 + len(address)
    assert file.do(getdevicelist(SCSI_TYPE)) == [device]


def test_each_client_has_its_own_key_and_asks_for_no_other(scsi: World, file: File) -> None:
    other = scsi_file(session(scsi, b"two", "10.0.0.2"), b"other")
    assert other.do(getdevicelist(SCSI_TYPE)) == [], "it never had a layout"
    asked = getdeviceinfo(device_of(scsi, FIRST_KEY), kind=SCSI_TYPE)
    assert status_of(file.session, asked) == "NOENT", "nor had this one"
    mine, others = file.get(0, 4096), other.get(0, 4096)
    assert mine.extents[0].device == device_of(scsi, FIRST_KEY)
    assert others.extents[0].device == device_of(scsi, FIRST_KEY + 1)
    assert status_of(file.session, asked) == "OK"
    assert status_of(other.session, asked) == "NOENT"
    for device in (bytes(16), device_of(scsi, 0), device_of(scsi, FIRST_KEY + 9)):
        asked = getdeviceinfo(device, kind=SCSI_TYPE)
        assert status_of(file.session, asked) == "NOENT"
    asked = getdeviceinfo(device_of(scsi), kind=BLOCK_TYPE)
    assert status_of(file.session, asked) == "NOENT", "of another type"


def test_the_holder_is_registered_with_its_key(scsi: World, file: File) -> None:
    file.get(0, 4096)
    record = holder(scsi)
    assert record.state is HolderState.LIVE
    assert record.spec.fence_key == FIRST_KEY
    scheme, clientid, _, host = record.spec.fence.split(":")
    assert (scheme, int(clientid, 16), host) == ("scsi", file.session.clientid, "127.0.0.1")


def test_a_client_of_block_layouts_has_no_key(world: World, log_watch: LogWatch) -> None:
    """What nobody registers cannot be fenced by a reservation."""
    log_watch.expect("refuses their I/O")
    world.fs.mkdir(1, b"blocks", 0o755)
    both = scsi_world(
        world,
        "/:10.0.0.0/8,rw,insecure,no_root_squash,layouts=scsi",
        "/blocks:rw,insecure,no_root_squash,layouts=block",
    )
    one = session(both)
    stateid, fh = do(one, putrootfh(), lookup(b"blocks"), open_(b"file"), getfh())[-2:]
    File(one, fh, stateid, kind=BLOCK_TYPE).get(0, 4096)
    assert holder(both).spec.fence.startswith("nfs:")
    assert holder(both).spec.fence_key == 0


def test_a_key_that_a_holder_has_is_not_used_again(world: World) -> None:
    keys = iter([FIRST_KEY, FIRST_KEY, 0, FIRST_KEY, FIRST_KEY + 7])
    scsi = scsi_world(world, identity=unit(new_key=lambda: next(keys)))
    scsi_file(session(scsi)).get(0, 4096)
    scsi_file(session(scsi, b"two", "10.0.0.2"), b"other").get(0, 4096)
    assert holder(scsi, b"two").spec.fence_key == FIRST_KEY + 7
    assert list(keys) == []


def test_without_a_new_key_there_is_no_holder(world: World) -> None:
    scsi = scsi_world(world, identity=unit(new_key=lambda: FIRST_KEY))
    scsi_file(session(scsi)).get(0, 4096)
    other = scsi_file(session(scsi, b"two", "10.0.0.2"), b"other")
    call = layoutget(0, 4096, 4096, RW, other.opened, kind=SCSI_TYPE)
    assert status_of(other.session, putfh(other.fh), call) == "DELAY"
    assert [h.spec.fence_key for h in scsi.fs.layouts.holders()] == [FIRST_KEY]


def test_growth_changes_no_device(scsi: World, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices with one key Linux would unregister it with the first that it forgets."""
    device = file.get(0, 4096).extents[0].device
    file.do(getdeviceinfo(device, types=BOTH, kind=SCSI_TYPE))
    before = scsi.service.devices.superblock
    small = type(before)(
        **{name: getattr(before, name) for name in before.__dataclass_fields__}
        | {"total_blocks": before.total_blocks // 2}
    )
    scsi.service.devices.superblock = small
    assert file.get(4096, 4096).extents[0].device == device
    assert scsi.service.counters["devices_grown"] == 1
    assert take_callbacks(file.session.wire) == []


# ---- a holder of before there was a unit -------------------------------------------------------


def test_a_holder_without_a_key_gets_no_scsi_layouts(world: World) -> None:
    """The server was restarted with another type of layouts, and the client was kept."""
    scsi = scsi_world(world)
    file = scsi_file(session(scsi))
    client = scsi.service.clients.living(b"one")
    assert client is not None
    scsi.service.options = ServiceOptions()
    assert run_here(client.holder(scsi.service))
    scsi.service.options = ServiceOptions(unit=unit())
    call = layoutget(0, 4096, 4096, RW, file.opened, kind=SCSI_TYPE)
    assert status_of(file.session, putfh(file.fh), call) == "LAYOUTUNAVAILABLE"
    assert scsi.service.counters["layoutget_no_key"] == 1


# ---- LAYOUTERROR -------------------------------------------------------------------------------


def test_errors_of_one_request_are_one_line(scsi: World, file: File, log_watch: LogWatch) -> None:
    log_watch.expect("NFS4ERR_NXIO in operation 38, and 999 more errors$")
    layout = file.get(0, 4096)
    error = layout.extents[0].device + u32(n.NFS4ERR_NXIO) + u32(n.OP_WRITE)
    trouble = op(
        n.OP_LAYOUTERROR, u64(0), u64(4096), encoded(layout.stateid), u32(1000), error * 1000
    )
    assert file.session.run(putfh(file.fh).encoded, trouble).status == n.NFS4_OK
    assert scsi.service.counters["layouterrors"] == 1000
    assert len(log_watch.lines) == 1
    none = op(n.OP_LAYOUTERROR, u64(0), u64(4096), encoded(layout.stateid), u32(0))
    assert file.session.run(putfh(file.fh).encoded, none).status == n.NFS4_OK
    assert len(log_watch.lines) == 1


def test_the_server_of_blocks_is_as_before(world: World) -> None:
    service, _ = make_service(world.fs)
    assert sorted(service.devices.formats) == [BLOCK_TYPE]
