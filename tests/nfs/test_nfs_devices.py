"""Block layouts, updates and device addresses on the wire; where the volume of a device begins."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extfs.core import Filesystem, LayoutExtent, LayoutState, SimDevice, mkfs
from extfs.nfs import block_layout as b
from extfs.nfs import constants as n
from extfs.nfs import devices
from extfs.nfs.xdr import Reader, XdrError

DEVICE = bytes(range(16))
UUID = bytes(range(100, 116))
MIB = 1 << 20
CLIENT: Any = None
"""A block device is the same for all."""


def test_layout_is_what_rfc_5663_says() -> None:
    body = b.encode_layout(DEVICE, [LayoutExtent(4096, 8192, 12288, LayoutState.INVALID_DATA)])
    assert body == struct.pack(">I16sQQQI", 1, DEVICE, 4096, 12288, 8192, 2)


EXTENTS = st.lists(
    st.builds(
        lambda o, d, c, s: LayoutExtent(o * 512, d * 512, c * 512, s),
        st.integers(0, 1 << 50),
        st.integers(0, 1 << 50),
        st.integers(1, 1 << 50),
        st.sampled_from(LayoutState),
    ),
    max_size=20,
)


@given(EXTENTS)
def test_layout_round_trip(extents: list[LayoutExtent]) -> None:
    decoded = b.decode_layout(b.encode_layout(DEVICE, extents))
    assert [LayoutExtent(e.offset, e.storage, e.length, e.state) for e in decoded] == extents
    assert {e.device for e in decoded} <= {DEVICE}


@given(EXTENTS)
def test_every_prefix_of_a_layout_is_refused(extents: list[LayoutExtent]) -> None:
    body = b.encode_layout(DEVICE, extents)
    for end in range(len(body)):
        with pytest.raises(XdrError):
            b.decode_layout(body[:end])
    with pytest.raises(XdrError):
        b.decode_layout(body + b"\0\0\0\0")


def test_update_joins_neighbours_and_sorts() -> None:
    body = b.encode_update(DEVICE, [(8192, 4096), (0, 4096), (4096, 4096), (65536, 512)])
    assert b.decode_update(body) == [(0, 12288), (65536, 512)]


def test_update_of_nothing() -> None:
    assert b.decode_update(b"") == []
    assert b.decode_update(b.encode_update(DEVICE, [])) == []


def _update(offset: int, length: int, state: int) -> bytes:
    return struct.pack(">I16sQQQI", 1, DEVICE, offset, length, 0, state)


@pytest.mark.parametrize(
    "body",
    [
        _update(0, 0, 0),
        _update((1 << 64) - 512, 512, 0),
        _update((1 << 64) - 1, (1 << 64) - 1, 0),
        _update(0, 512, LayoutState.INVALID_DATA),
        _update(0, 512, LayoutState.READ_DATA),
        _update(0, 512, 4),
        _update(0, 512, 0) + b"\0",
        struct.pack(">I", b.RANGES_MAX + 1),
        struct.pack(">I", 0xFFFFFFFF),
        b"\0",
    ],
)
def test_bad_updates_are_refused(body: bytes) -> None:
    with pytest.raises(XdrError):
        b.decode_update(body)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_decoded(body: bytes) -> None:
    for decode in (b.decode_layout, b.decode_update, b.decode_device_address):
        with contextlib.suppress(XdrError):
            decode(body)  # type: ignore[operator]


def test_device_address_is_what_rfc_5663_says() -> None:
    volumes = [b.SimpleVolume((b.Signature(-8, b"abcd"),)), b.SliceVolume(512, 4096, 0)]
    body = b.encode_device_address(volumes)
    simple = struct.pack(">IIqI4s", 0, 1, -8, 4, b"abcd")
    assert body == struct.pack(">I", 2) + simple + struct.pack(">IQQI", 1, 512, 4096, 0)
    assert b.decode_device_address(body) == volumes


class Callbacks:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, bytes]] = []

    def path_up(self, client: Any) -> bool:
        return bool(client != "deaf")

    def call(self, client: Any, body: bytes, count: int, done: Any) -> None:
        assert count == 1
        self.calls.append((client, body))


def _service(uuid: bytes, blocks: int, device: str = "") -> Any:
    superblock = SimpleNamespace(uuid=uuid, total_blocks=blocks, block_size=4096)
    return SimpleNamespace(
        fs=SimpleNamespace(super=superblock, total_blocks=blocks),
        options=SimpleNamespace(device=device, unit=None),
        callbacks=Callbacks(),
        count=lambda name: None,
    )


def test_the_signatures_stand_on_the_device_and_stay() -> None:
    sim = SimDevice(64 * MIB)
    with sim.device() as device:
        mkfs(device, uuid=UUID)
    fs = Filesystem.open(sim.device())
    service = _service(fs.super.uuid, fs.super.total_blocks)
    (volume,) = devices.Devices(service).block.volumes()
    assert isinstance(volume, b.SimpleVolume)

    def match() -> None:
        for signature in volume.signatures:
            at = signature.offset
            assert sim.peek(0, 4096)[at : at + len(signature.contents)] == signature.contents

    match()
    fs.mknod(1, b"f", stat.S_IFREG | 0o644)
    fs.sync()
    fs.close()
    match()
    assert UUID in [signature.contents for signature in volume.signatures]
    sim.close()


def test_a_filesystem_inside_a_disk_is_a_slice() -> None:
    known = devices.Devices(_service(UUID, 1000), offset=MIB).block
    simple, part = known.volumes()
    assert isinstance(simple, b.SimpleVolume)
    assert [s.offset for s in simple.signatures] == [MIB, MIB + 16]
    assert part == b.SliceVolume(MIB, 1000 * 4096, 0)
    assert b.decode_device_address(known.address(CLIENT)) == [simple, part]


def test_ids_outlive_a_restart_and_change_with_the_size() -> None:
    service = _service(UUID, 1000)
    known = devices.Devices(service)
    small = known.block.current
    assert len(small) == 16
    assert devices.Devices(_service(UUID, 1000)).block.current == small
    known.asked("friend", small, 0xFF)  # type: ignore[arg-type]
    known.asked("deaf", small, 0xFF)  # type: ignore[arg-type]
    known.asked("silent", small, 0)  # type: ignore[arg-type]
    assert not known.refresh()
    service.fs.super = SimpleNamespace(uuid=UUID, total_blocks=2000, block_size=4096)
    service.fs.total_blocks = 2000
    assert known.refresh()
    assert known.block.current != small
    assert known.block.known(CLIENT, small)
    assert known.block.known(CLIENT, known.block.current)
    assert not known.block.known(CLIENT, struct.pack(">8sQ", UUID[:8], 2001))
    assert not known.block.known(CLIENT, struct.pack(">8sQ", UUID[8:], 1000))
    assert not known.block.known(CLIENT, bytes(16))
    ((client, body),) = service.callbacks.calls
    assert client == "friend"
    reader = Reader(body)
    assert reader.u32() == n.OP_CB_NOTIFY_DEVICEID
    assert reader.u32() == 1
    assert reader.bitmap() == 1 << n.NOTIFY_DEVICEID4_CHANGE
    change = Reader(reader.opaque(100))
    assert reader.done()
    assert (change.u32(), change.fixed(16), change.boolean()) == (3, small, False)
    assert change.done()


def test_what_can_happen_is_notified() -> None:
    known = devices.Devices(_service(UUID, 1000))
    both = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE
    client: Any = "c"
    assert known.asked(client, known.block.current, both | 1 << 5) == both
    assert known.asked(client, known.block.current, 0) == 0
    known.client_lost(client)


def test_offsets_of_devices(tmp_path: Path) -> None:
    assert devices.disk_offset("/no/such/device") == 0
    assert devices.disk_offset(str(tmp_path)) == 0
    sys = tmp_path / "sys"
    disk = sys / "block" / "loop7"
    part = disk / "loop7p1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1\n")
    (part / "start").write_text("2048\n")
    numbers = sys / "dev" / "block"
    numbers.mkdir(parents=True)
    (numbers / "259:1").symlink_to(part)
    (numbers / "7:7").symlink_to(disk)

    def at(major: int, minor: int) -> int:
        return devices.offset_of(os.makedev(major, minor), sys)

    assert at(259, 1) == MIB
    assert at(7, 7) == 0
    (disk / "loop").mkdir()
    (disk / "loop" / "offset").write_text("4096\n")
    assert at(7, 7) == 4096
    assert at(259, 1) == MIB + 4096
