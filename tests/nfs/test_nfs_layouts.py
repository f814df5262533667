"""LAYOUTGET, LAYOUTCOMMIT, LAYOUTRETURN and devices: one client at a time."""

from __future__ import annotations

import stat

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, LayoutState
from extfs.nfs import constants as n
from extfs.nfs.block_layout import decode_device_address
from extfs.nfs.stateids import ANONYMOUS, BYPASS, Stateid
from nfs.calls import Failed, do, fails, getattr_, lookup, putfh, putrootfh, status_of
from nfs.conftest import World
from nfs.layout_calls import (
    ALL,
    ANY,
    BLOCK,
    READ,
    RW,
    File,
    close,
    events,
    getdeviceinfo,
    getdevicelist,
    layoutcommit,
    layoutget,
    layoutreturn,
    open_file,
    take_recall,
)
from nfs.reference_client import check_layout
from nfs.wire import Session as WireSession
from nfs.wire import make_service, op, opaque, u32, u64

INVALID, WRITABLE = LayoutState.INVALID_DATA, LayoutState.READ_WRITE_DATA
NONE, READABLE = LayoutState.NONE_DATA, LayoutState.READ_DATA
MIB = 1 << 20
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def file(world: World) -> File:
    return open_file(world.session(), b"file")


def ino_of(world: World, name: bytes = b"file") -> int:
    return world.fs.lookup(ROOT_INODE, name).ino


# ---- stateids ----------------------------------------------------------------------------------


def test_the_first_seqid_is_one_and_every_get_and_return_raises_it(file: File) -> None:
    assert file.get(0, 8192).stateid.seqid == 1
    other = file.layout.other  # type: ignore[union-attr]
    for index in range(2, 6):
        layout = file.get(8192 * index, 8192)
        assert layout.stateid == Stateid(index, other)
    left = file.give_back(0, 8192)
    assert left == Stateid(6, other)
    assert file.give_back() is None


def test_a_commit_does_not_raise_the_seqid(file: File) -> None:
    file.get(0, 8192)
    assert file.commit((0, 8192), last=8191) == 8192
    assert file.get(0, 8192).stateid.seqid == 2


def test_a_second_first_layoutget_goes_on_with_the_same_stateid(file: File) -> None:
    first = file.get(0, 4096)
    again = file.get(4096, 4096, stateid=file.opened)
    assert again.stateid == Stateid(2, first.stateid.other)


def test_after_everything_was_returned_the_stateid_is_bad(file: File) -> None:
    layout = file.get(0, 4096)
    assert file.give_back() is None
    failed = fails(file.session, putfh(file.fh), layoutget(0, 4096, 4096, RW, layout.stateid))
    assert failed.status == n.NFS4ERR_BAD_STATEID
    assert file.get(0, 4096).stateid.seqid == 1


@pytest.mark.parametrize(
    ("seqid", "status"), [(0, "BAD_STATEID"), (3, "BAD_STATEID"), (1 << 31, "BAD_STATEID")]
)
def test_seqids_that_never_were(file: File, seqid: int, status: str) -> None:
    file.get(0, 4096)
    other = file.get(4096, 4096).stateid.other
    call = layoutget(0, 4096, 4096, RW, Stateid(seqid, other))
    assert status_of(file.session, putfh(file.fh), call) == status
    call = layoutcommit([(0, 4096)], Stateid(seqid, other), 4095)
    assert status_of(file.session, putfh(file.fh), call) == status


def test_an_older_seqid_of_parallel_layoutgets_is_accepted(file: File) -> None:
    first = file.get(0, 4096)
    file.get(4096, 4096)
    assert file.get(8192, 4096, stateid=first.stateid).stateid.seqid == 3


@pytest.mark.parametrize("stateid", [ANONYMOUS, BYPASS, Stateid(1, b"x" * 12)])
def test_special_and_foreign_stateids_get_no_layout(file: File, stateid: Stateid) -> None:
    call = layoutget(0, 4096, 4096, RW, stateid)
    assert status_of(file.session, putfh(file.fh), call) in ("BAD_STATEID", "STALE_STATEID")


def test_a_stateid_of_another_file_or_client_is_bad(world: World, file: File) -> None:
    layout = file.get(0, 4096)
    other = open_file(file.session, b"other")
    call = layoutget(0, 4096, 4096, RW, layout.stateid)
    assert status_of(file.session, putfh(other.fh), call) == "BAD_STATEID"
    stranger = world.session(b"two")
    assert status_of(stranger, putfh(file.fh), call) == "BAD_STATEID"
    call = layoutreturn(0, ALL, ANY, layout.stateid)
    assert status_of(stranger, putfh(file.fh), call) == "BAD_STATEID"


def test_rw_needs_an_open_for_writing(world: World) -> None:
    world.fs.mknod(ROOT_INODE, b"file", FILE)
    file = open_file(world.session(), b"file", n.OPEN4_SHARE_ACCESS_READ)
    call = layoutget(0, 4096, 4096, RW, file.opened)
    assert status_of(file.session, putfh(file.fh), call) == "OPENMODE"
    assert file.get(0, 4096, iomode=READ).iomode == READ


def test_test_stateid_knows_layouts(file: File) -> None:
    layout = file.get(0, 4096)
    encoded = u32(layout.stateid.seqid) + layout.stateid.other
    reply = file.session.run(op(n.OP_TEST_STATEID, u32(1), encoded))
    assert reply.status == n.NFS4_OK
    assert [reply.body.u32() for _ in range(4)] == [n.OP_TEST_STATEID, 0, 1, 0]


# ---- what a layout says ------------------------------------------------------------------------


def test_rw_over_a_hole_is_invalid_data_and_tiles(world: World, file: File) -> None:
    layout = file.get(0, 8192)
    check_layout(layout, 0, 8192, BLOCK)
    assert layout.return_on_close
    assert {e.state for e in layout.extents} == {INVALID}
    assert all(e.device == world.service.devices.block.current for e in layout.extents)
    assert world.fs.getattr(ino_of(world)).size == 0


def test_a_written_block_is_read_write_and_at_its_place(world: World, file: File) -> None:
    world.fs.write(ino_of(world), 0, b"a" * 8192)
    world.fs.sync()
    layout = file.get(0, 8192)
    check_layout(layout, 0, 8192, BLOCK)
    (extent,) = [e for e in layout.extents if e.offset == 0]
    assert extent.state is WRITABLE
    (mapped,) = world.fs.map(ino_of(world), 0, 2)
    assert extent.storage == mapped.block * BLOCK


def test_read_layouts_have_only_read_and_none(world: World, file: File) -> None:
    ino = ino_of(world)
    world.fs.write(ino, 4096, b"a" * 4096)
    world.fs.fallocate(ino, 8192, 4096)
    layout = file.get(0, 16384, iomode=READ)
    check_layout(layout, 0, 16384, BLOCK)
    states = {e.offset: e.state for e in layout.extents}
    assert states[0] is NONE
    assert states[4096] is READABLE
    assert states[8192] is NONE


def test_read_of_everything_of_an_empty_file(file: File) -> None:
    layout = file.get(0, ALL, 4 * BLOCK, READ)
    check_layout(layout, 0, ALL, 4 * BLOCK)
    assert {e.state for e in layout.extents} == {NONE}


def test_a_clone_gets_a_copy_on_write_layout(world: World, file: File) -> None:
    ino = ino_of(world)
    world.fs.write(ino, 0, b"a" * 16384)
    twin = world.fs.mknod(ROOT_INODE, b"twin", FILE).ino
    world.fs.clone(ino, 0, twin, 0, 16384)
    world.fs.sync()
    layout = file.get(4096, 8192)
    check_layout(layout, 4096, 8192, BLOCK)
    pairs = [(e.offset, e.state) for e in layout.extents if e.offset < 12288]
    assert pairs[:2] == [(4096, READABLE), (4096, INVALID)]
    assert file.commit((4096, 8192), last=12287) is None
    assert world.fs.read(twin, 4096, 8192) == b"a" * 8192


def test_unaligned_ranges_are_covered(file: File) -> None:
    layout = file.get(5000, 100, 100)
    assert layout.offset == 4096
    assert layout.end >= 8192
    check_layout(layout, 5000, 100, 100)


def test_a_writer_who_appends_gets_more_and_more(world: World, file: File) -> None:
    layouts = 0
    at = 0
    while at < 24 * MIB:
        layout = file.get(at, BLOCK)
        layouts += 1
        at = layout.end
        file.commit((layout.offset, layout.length), last=layout.end - 1)
    assert layouts <= 16, "the device is small: there is not much to be generous with"
    file.give_back()


def test_a_layout_of_mapped_blocks_is_long(world: World, file: File) -> None:
    world.fs.write(ino_of(world), 0, b"a" * (4 * MIB))
    world.fs.sync()
    layout = file.get(MIB, BLOCK)
    assert layout.end >= 4 * MIB


def test_no_generosity_over_holes_inside_the_file(world: World, file: File) -> None:
    world.fs.truncate(ino_of(world), 8 * MIB)
    before = world.fs.getattr(ino_of(world)).blocks
    layout = file.get(MIB, BLOCK)
    assert layout.length == BLOCK
    assert world.fs.getattr(ino_of(world)).blocks == before + 1


def test_as_many_extents_as_fit(world: World, file: File) -> None:
    ino = ino_of(world)
    for block in range(0, 64, 2):
        world.fs.write(ino, block * BLOCK, b"a" * BLOCK)
    world.fs.sync()
    for extents in (2, 3, 10):
        call = layoutget(0, 64 * BLOCK, BLOCK, READ, file.opened, 60 + extents * 44)
        layout = file.do(call)
        assert len(layout.extents) == extents
        check_layout(layout, 0, 64 * BLOCK, BLOCK)
    failed = fails(file.session, putfh(file.fh), layoutget(0, BLOCK, BLOCK, READ, file.opened, 100))
    assert failed.status == n.NFS4ERR_TOOSMALL


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ((0, 0, 0, RW), "INVAL"),
        ((4096, ALL - 1, 4096, RW), "INVAL"),
        ((0, 4096, 8192, RW), "INVAL"),
        ((0, 4096, 4096, ANY), "BADIOMODE"),
        ((0, 4096, 4096, 0), "BADIOMODE"),
        ((1 << 63, 4096, 4096, RW), "LAYOUTUNAVAILABLE"),
    ],
)
def test_arguments(file: File, call: tuple[int, int, int, int], status: str) -> None:
    offset, length, least, iomode = call
    get = layoutget(offset, length, least, iomode, file.opened)
    assert status_of(file.session, putfh(file.fh), get) == status


def test_types_directories_and_exports_without_layouts(world: World, file: File) -> None:
    session = file.session
    get = layoutget(0, 4096, 4096, READ, file.opened, kind=n.LAYOUT4_SCSI)
    assert status_of(session, putfh(file.fh), get) == "UNKNOWN_LAYOUTTYPE"
    get = layoutget(0, 4096, 4096, READ, file.opened)
    assert status_of(session, putrootfh(), get) == "LAYOUTUNAVAILABLE"
    assert world.service.counters["layoutgets"] == 0


def test_a_host_without_the_disk_gets_no_layout(world: World) -> None:
    service, _ = make_service(world.fs, ("/:rw,insecure,no_root_squash",))
    file = open_file(WireSession(service, b"x"), b"file")
    get = layoutget(0, 4096, 4096, RW, file.opened)
    assert status_of(file.session, putfh(file.fh), get) == "LAYOUTUNAVAILABLE"


# ---- commits -----------------------------------------------------------------------------------


def test_what_was_written_is_in_the_file_after_the_commit(world: World, file: File) -> None:
    layout = file.get(0, 8192)
    extent = layout.extents[0]
    world.sim.poke(extent.storage, b"x" * 8192)
    assert world.fs.read(ino_of(world), 0, 8192) == b""
    assert file.commit((0, 8192), last=5999) == 6000
    assert world.fs.read(ino_of(world), 0, 8192) == b"x" * 6000
    assert file.commit((0, 8192), last=5999) is None, "the size has not changed"


def test_the_times_of_a_commit(world: World, file: File) -> None:
    layout = file.get(0, 4096)
    file.do(layoutcommit([(0, 4096)], layout.stateid, 4095, mtime=(1234567, 89)))
    found = world.fs.getattr(ino_of(world))
    assert (found.mtime, found.mtime_ns) == (1234567, 89)
    call = layoutcommit([(0, 4096)], layout.stateid, 4095, mtime=(1, 1_000_000_000))
    assert status_of(file.session, putfh(file.fh), call) == "INVAL"


def test_a_commit_of_nothing(world: World, file: File) -> None:
    layout = file.get(0, 8192)
    assert file.commit((0, 8192), last=8191) == 8192
    for body in (b"", u32(0)):
        call = layoutcommit([], layout.stateid, 8191, body=body)
        assert file.do(call) is None
    file.do(layoutcommit([], layout.stateid, None))


def test_nothing_becomes_written_behind_the_end(world: World, file: File) -> None:
    """As of a client with pages of 64 KiB: what it was not granted as written it has to return."""
    layout = file.get(0, 65536)
    for extent in layout.extents:
        world.sim.poke(extent.storage, b"x" * extent.length)
    assert file.commit((0, 65536), last=4999) == 5000
    events(world)
    _, recall = take_recall(file.session)
    assert (recall.offset, recall.length) == (8192, 65536 - 8192)
    assert file.give_back(stateid=recall.stateid) is None
    world.fs.truncate(ino_of(world), 65536)
    assert world.fs.read(ino_of(world), 0, 65536).rstrip(b"\0") == b"x" * 5000


def test_a_client_that_takes_no_less_gets_no_more(file: File) -> None:
    assert file.get(0, 65536, 65536).length == 65536
    assert file.get(MIB, 4096, 4096).length > 4096


@pytest.mark.parametrize(
    ("ranges", "last", "status"),
    [
        ([(0, 4096), (MIB * 20, 4096)], 21 * MIB, "BAD_STATEID"),
        ([(0, 4096)], 30 * MIB, "BAD_STATEID"),
        ([(512, 512)], 4095, "INVAL"),
    ],
)
def test_a_commit_outside_of_the_layout_changes_nothing(
    world: World, file: File, ranges: list[tuple[int, int]], last: int, status: str
) -> None:
    layout = file.get(0, 8192)
    world.sim.poke(layout.extents[0].storage, b"x" * 4096)
    call = layoutcommit(ranges, layout.stateid, last)
    assert status_of(file.session, putfh(file.fh), call) == status
    assert world.fs.getattr(ino_of(world)).size == 0


def test_a_commit_that_loses_nothing_may_be_called_badlayout(world: World, file: File) -> None:
    world.fs.write(ino_of(world), 0, b"a" * 4096)
    layout = file.get(0, 4096, iomode=READ)
    call = layoutcommit([], layout.stateid, None)
    assert status_of(file.session, putfh(file.fh), call) == "BADLAYOUT"


def test_malformed_updates(file: File) -> None:
    layout = file.get(0, 4096)
    for body in (b"\0\0\0\1", b"\0\0\0\0\0", b"\xff\xff\xff\xff"):
        call = layoutcommit([], layout.stateid, 0, body=body)
        assert status_of(file.session, putfh(file.fh), call) == "BADXDR"


def test_reclaim_only_in_grace(file: File) -> None:
    layout = file.get(0, 4096)
    call = layoutcommit([(0, 4096)], layout.stateid, 4095, reclaim=True)
    assert status_of(file.session, putfh(file.fh), call) == "NO_GRACE"


# ---- returns -----------------------------------------------------------------------------------


def held(world: World, name: bytes = b"file") -> list[tuple[int, int]]:
    return [(g.offset, g.offset + g.length) for g in world.fs.layouts.grants(ino_of(world, name))]


def test_returning_the_middle(world: World, file: File) -> None:
    world.fs.truncate(ino_of(world), MIB)
    file.get(0, 16384)
    assert held(world) == [(0, 16384)]
    assert file.give_back(4096, 4096) is not None
    assert held(world) == [(0, 4096), (8192, 16384)]
    assert file.give_back(8192 + 100, 4096 + 200) is not None, "whole blocks only"
    assert held(world) == [(0, 4096), (8192, 16384)]
    assert file.give_back(0, 4096) is not None
    assert file.give_back(8192, 8192) is None
    assert held(world) == []


def test_a_return_spares_what_is_newer(world: World, file: File) -> None:
    world.fs.truncate(ino_of(world), MIB)
    first = file.get(0, 8192)
    file.get(4096, 8192)
    assert file.give_back(stateid=first.stateid) is not None
    assert held(world) == [(4096, 12288)]


def test_iomodes_are_returned_apart(world: World, file: File) -> None:
    world.fs.write(ino_of(world), 0, b"a" * 8192)
    world.fs.sync()
    file.get(0, 8192, iomode=READ)
    file.get(0, 8192, iomode=RW)
    assert len(held(world)) == 2
    assert file.give_back(iomode=RW) is not None
    (grant,) = world.fs.layouts.grants(ino_of(world))
    assert grant.iomode == READ
    assert file.give_back(iomode=READ) is None


def test_what_is_not_held_may_be_returned(file: File) -> None:
    file.get(0, 4096)
    assert file.give_back(512 * MIB, 4096) is not None


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ({"length": 0}, "INVAL"),
        ({"offset": 4096, "length": ALL - 1}, "INVAL"),
        ({"iomode": 4}, "BADIOMODE"),
        ({"layout_type": 5}, "UNKNOWN_LAYOUTTYPE"),
        ({"kind": 9}, "INVAL"),
        ({"reclaim": True}, "NO_GRACE"),
    ],
)
def test_arguments_of_returns(file: File, call: dict[str, int], status: str) -> None:
    layout = file.get(0, 4096)
    give = layoutreturn(stateid=layout.stateid, **call)  # type: ignore[arg-type]
    assert status_of(file.session, putfh(file.fh), give) == status


@pytest.mark.parametrize("kind", [n.LAYOUT4_RET_REC_FSID, n.LAYOUT4_RET_REC_ALL])
def test_bulk_returns(world: World, file: File, kind: int) -> None:
    other = open_file(file.session, b"other")
    file.get(0, 4096)
    other.get(0, 4096)
    stranger = open_file(world.session(b"two"), b"third")
    stranger.get(0, 4096)
    assert file.do(layoutreturn(kind=kind)) is None
    assert held(world) == []
    assert held(world, b"other") == []
    assert held(world, b"third") != []


def test_layouts_end_with_the_last_close(world: World, file: File) -> None:
    file.get(0, 4096)
    again = open_file(file.session, b"file")
    assert again.opened.other == file.opened.other, "the same owner"
    file.do(close(again.opened))
    assert held(world) == []
    events(world)


def test_a_client_that_goes_takes_its_layouts_along(world: World, file: File) -> None:
    file.get(0, 4096)
    holder = world.fs.layouts.grants(ino_of(world))[0].holder
    world.session(b"one", b"reboot")
    assert held(world) == []
    assert world.fs.layouts.holder(holder) is None
    assert world.service.layouts.status()["states"] == 0


# ---- devices -----------------------------------------------------------------------------------


def test_getdeviceinfo(world: World, file: File) -> None:
    session = file.session
    device = file.get(0, 4096).extents[0].device
    (address,) = do(session, getdeviceinfo(device))
    assert decode_device_address(address[0]) == world.service.devices.block.volumes()
    types = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE
    (address,) = do(session, getdeviceinfo(device, types=types))
    assert address[1] == types  # else the Linux client keeps no address
    (empty,) = do(session, getdeviceinfo(device, maxcount=0))
    assert empty[0] == b""
    failed = fails(session, getdeviceinfo(device, maxcount=20))
    assert failed.status == n.NFS4ERR_TOOSMALL
    assert failed.body.u32() == 8 + len(address[0])
    assert status_of(session, getdeviceinfo(device, maxcount=8 + len(address[0]))) == "OK"
    assert status_of(session, getdeviceinfo(device, maxcount=7 + len(address[0]))) == "TOOSMALL"
    assert status_of(session, getdeviceinfo(bytes(16))) == "NOENT"
    assert status_of(session, getdeviceinfo(device, kind=5)) == "UNKNOWN_LAYOUTTYPE"


def test_getdevicelist(world: World, file: File) -> None:
    assert file.do(getdevicelist()) == [world.service.devices.block.current]
    failed = fails(file.session, putfh(file.fh), getdevicelist(cookie=1))
    assert failed.status == n.NFS4ERR_BAD_COOKIE
    failed = fails(file.session, putfh(file.fh), getdevicelist(n.LAYOUT4_SCSI))
    assert failed.status == n.NFS4ERR_UNKNOWN_LAYOUTTYPE


def test_layout_types_are_told_everywhere(world: World, file: File) -> None:
    for where in ([putrootfh()], [putfh(file.fh)], [putrootfh(), lookup(b"file")]):
        found = do(
            file.session, *where, getattr_(n.FATTR4_FS_LAYOUT_TYPES, n.FATTR4_LAYOUT_BLKSIZE)
        )[-1]
        assert found[n.FATTR4_FS_LAYOUT_TYPES] == [n.LAYOUT4_BLOCK_VOLUME]
        assert 0 < found[n.FATTR4_LAYOUT_BLKSIZE] <= 4096


# ---- LAYOUTSTATS, LAYOUTERROR ------------------------------------------------------------------


def test_what_clients_tell_is_counted(world: World, file: File, log_watch: LogWatch) -> None:
    log_watch.expect("cannot use device")
    layout = file.get(0, 4096)
    stateid = u32(layout.stateid.seqid) + layout.stateid.other
    stats = op(
        n.OP_LAYOUTSTATS,
        u64(0),
        u64(ALL),
        stateid,
        u64(3) + u64(3000),
        u64(4) + u64(4000),
        layout.extents[0].device,
        u32(n.LAYOUT4_BLOCK_VOLUME),
        opaque(b""),
    )
    trouble = op(
        n.OP_LAYOUTERROR,
        u64(0),
        u64(4096),
        stateid,
        u32(1),
        layout.extents[0].device,
        u32(n.NFS4ERR_NXIO),
        u32(n.OP_WRITE),
    )
    putfh_ = putfh(file.fh).encoded
    assert file.session.run(putfh_, stats).status == n.NFS4_OK
    assert file.session.run(putfh_, trouble).status == n.NFS4_OK
    assert file.session.run(putfh_, stats, minor=1).status == n.NFS4ERR_OP_ILLEGAL
    counters = world.service.counters
    assert counters["layoutstats_write_bytes"] == 4000
    assert counters["layouterrors"] == 1


def test_every_prefix_of_the_arguments_is_bad_xdr(file: File) -> None:
    layout = file.get(0, 4096)
    calls = [
        layoutget(0, 4096, 4096, RW, layout.stateid),
        layoutcommit([(0, 4096)], layout.stateid, 4095, mtime=(1, 1)),
        layoutreturn(stateid=layout.stateid),
        getdeviceinfo(layout.extents[0].device, types=2),
        getdevicelist(),
    ]
    for call in calls:
        for end in range(4, len(call.encoded), 4):
            reply = file.session.run(putfh(file.fh).encoded, call.encoded[:end])
            assert reply.status == n.NFS4ERR_BADXDR, (call.encoded[:end], reply.status)
    with pytest.raises(Failed):
        file.do(layoutreturn(stateid=Stateid(9, b"z" * 12)))
