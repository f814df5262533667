"""SCSI layouts, updates and device addresses as bytes (RFC 8154); exports that offer them."""

from __future__ import annotations

import contextlib
import struct

import pytest
from conftest import LogWatch
from hypothesis import given
from hypothesis import strategies as st

from extfs.nfs import block_layout, scsi_layout
from extfs.nfs import constants as n
from extfs.nfs.block_layout import SliceVolume
from extfs.nfs.exports import ExportError, parse_export
from extfs.nfs.scsi_layout import BaseVolume
from extfs.nfs.service import ServiceOptions
from extfs.nfs.xdr import XdrError
from nfs.conftest import World
from nfs.scsi_world import NAA, Name, unit
from nfs.wire import make_service

KEY = 0xE5F5_0000_0000_0001
BASE = BaseVolume(1, 3, NAA, KEY)


def test_device_address_is_what_rfc_8154_says() -> None:
    body = scsi_layout.encode_device_address([BASE, SliceVolume(1 << 20, 1 << 30, 0)])
    assert body == (
        struct.pack(">I", 2)
        + struct.pack(">IIII16sQ", 4, 1, 3, 16, NAA, KEY)
        + struct.pack(">IQQI", 1, 1 << 20, 1 << 30, 0)
    )
    assert scsi_layout.decode_device_address(body) == [BASE, SliceVolume(1 << 20, 1 << 30, 0)]


def test_every_prefix_of_an_address_is_refused() -> None:
    body = scsi_layout.encode_device_address([BASE, SliceVolume(1 << 20, 1 << 30, 0)])
    for end in range(len(body)):
        with pytest.raises(XdrError):
            scsi_layout.decode_device_address(body[:end])
    with pytest.raises(XdrError):
        scsi_layout.decode_device_address(body + b"\0\0\0\0")


RANGES = st.lists(st.tuples(st.integers(0, 1 << 60), st.integers(1, 1 << 60)), max_size=20)


@given(RANGES)
def test_an_update_is_a_list_of_ranges(ranges: list[tuple[int, int]]) -> None:
    body = scsi_layout.encode_update(ranges)
    assert len(body) == 4 + 16 * len(ranges)
    assert scsi_layout.decode_update(body) == block_layout.joined(ranges)
    for end in range(1, len(body)):
        with pytest.raises(XdrError):
            scsi_layout.decode_update(body[:end])


def test_an_update_joins_neighbours() -> None:
    body = scsi_layout.encode_update([(8192, 4096), (0, 4096), (4096, 4096), (65536, 512)])
    assert body[:20] == struct.pack(">IQQ", 4, 8192, 4096)
    assert scsi_layout.decode_update(body) == [(0, 12288), (65536, 512)]
    assert scsi_layout.decode_update(b"") == []


@pytest.mark.parametrize(
    "body",
    [
        struct.pack(">IQQ", 1, 0, 0),
        struct.pack(">IQQ", 1, (1 << 64) - 512, 512),
        struct.pack(">IQQ", 1, 0, 512) + b"\0",
        struct.pack(">I", block_layout.RANGES_MAX + 1),
        struct.pack(">I", 0xFFFFFFFF),
        b"\0",
    ],
)
def test_bad_updates_are_refused(body: bytes) -> None:
    with pytest.raises(XdrError):
        scsi_layout.decode_update(body)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_decoded(body: bytes) -> None:
    for decode in (scsi_layout.decode_update, scsi_layout.decode_device_address):
        with contextlib.suppress(XdrError):
            decode(body)  # type: ignore[operator]


# ---- the unit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "code_set"),
    [
        ("naa", NAA[:6], 1),
        ("naa", NAA, 2),
        ("eui64", NAA[:12], 1),  # Linux looks for 8, 10 and 16 bytes; SPC has 8, 12 and 16
        ("t10", b"vendor", 2),
    ],
)
def test_a_unit_that_no_client_finds_is_refused(
    world: World, kind: str, data: bytes, code_set: int
) -> None:
    identity = scsi_layout.ScsiIdentity(Name(kind, data, code_set), 0, lambda: 1)
    with pytest.raises(ValueError, match="designator"):
        make_service(world.fs, ("/:layouts=scsi",), ServiceOptions(unit=identity))


@pytest.mark.parametrize(("kind", "length"), [("naa", 8), ("naa", 16), ("eui64", 8), ("eui64", 16)])
def test_designators_that_clients_find(world: World, kind: str, length: int) -> None:
    identity = scsi_layout.ScsiIdentity(Name(kind, NAA[:length]), 0, lambda: 1)
    make_service(world.fs, ("/:layouts=scsi",), ServiceOptions(unit=identity))


def test_scsi_layouts_without_a_unit_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="layouts=scsi needs a unit"):
        make_service(world.fs, ("/:layouts=scsi",))


def test_both_kinds_on_one_server_are_warned_of(world: World, log_watch: LogWatch) -> None:
    world.fs.mkdir(1, b"blocks", 0o755)
    log_watch.expect("refuses their I/O")
    make_service(world.fs, ("/:layouts=scsi", "/blocks:layouts=block"), ServiceOptions(unit=unit()))


# ---- exports -----------------------------------------------------------------------------------


def test_an_export_offers_one_type_of_layouts() -> None:
    export = parse_export("/:10.0.0.0/8,layouts=scsi@10.1.0.0/16")
    assert export.layout_type("10.1.2.3") == n.LAYOUT4_SCSI
    assert export.layout_type("10.2.0.1") == 0
    assert parse_export("/:layouts=scsi").layout_type("127.0.0.1") == n.LAYOUT4_SCSI
    assert parse_export("/:layouts=block").layout_type("127.0.0.1") == n.LAYOUT4_BLOCK_VOLUME
    assert parse_export("/:layouts=none").layout_type("127.0.0.1") == 0
    with pytest.raises(ExportError, match="given twice"):
        parse_export("/:layouts=scsi,layouts=block")
