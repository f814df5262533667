"""What RFC 8154 puts into the opaque bodies of pNFS: SCSI layouts, updates, device addresses.

A layout is on the wire what a block layout is (`extfs.nfs.block_layout`): pnfs_scsi_extent4 has the
fields of pnfs_block_extent4. An update names ranges of the file only. The address names the unit by
a designator of its VPD page 0x83, and the key that this client registers there before its first
I/O, so that it can be fenced: each client is told another one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from extfs.nfs.block_layout import RANGES_MAX, VOLUME_SLICE, SliceVolume, joined
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = [
    "CODE_SET_BINARY",
    "DESIGNATOR_EUI64",
    "DESIGNATOR_NAA",
    "BaseVolume",
    "Designator",
    "ScsiIdentity",
    "ScsiVolume",
    "base_volume",
    "decode_device_address",
    "decode_update",
    "encode_device_address",
    "encode_update",
]

VOLUME_BASE = 4
CODE_SET_BINARY = 1
DESIGNATOR_EUI64 = 2
DESIGNATOR_NAA = 3
_TYPES = {"eui64": DESIGNATOR_EUI64, "naa": DESIGNATOR_NAA}
_LENGTHS = {DESIGNATOR_EUI64: (8, 16), DESIGNATOR_NAA: (8, 16)}
"""What bl_validate_designator() of Linux accepts, and SPC defines: an EUI-64 designator of 12 bytes
finds no disk there."""

_VOLUMES_MAX = 64
_DESIGNATOR_MAX = 256
_END = 1 << 64
_RANGE = struct.Struct(">QQ")
_SLICE = struct.Struct(">QQI")


def _nothing(_: int) -> None:
    """Nobody wants to know."""


class Designator(Protocol):
    """A designation descriptor of the unit: `kind` is "naa" or "eui64"."""

    @property
    def kind(self) -> str:
        """Its type by name."""
        ...

    @property
    def code_set(self) -> int:
        """PS_CODE_SET_*."""
        ...

    @property
    def data(self) -> bytes:
        """The designator itself."""
        ...


@dataclass(frozen=True, slots=True)
class BaseVolume:
    """pnfs_scsi_base_volume_info4 (RFC 8154 2.3). `key`: this client registers it."""

    code_set: int
    designator_type: int
    designator: bytes
    key: int


ScsiVolume = BaseVolume | SliceVolume


@dataclass(frozen=True, slots=True)
class ScsiIdentity:
    """The unit that the filesystem is on, as clients find it.

    `offset`: bytes before the filesystem on it. `new_key`: a key for a client that no other has, or
    had; it may be called in any thread. `offered` is called, in the protocol's thread, with each
    key before a client is told it, each time: from then on it may be registered, again.
    """

    designator: Designator
    offset: int
    new_key: Callable[[], int]
    offered: Callable[[int], None] = _nothing

    def check(self) -> None:
        """ValueError: the Linux client would not find a disk by this designator."""
        volume = base_volume(self.designator, 1)
        lengths = _LENGTHS[volume.designator_type]
        if volume.code_set != CODE_SET_BINARY or len(volume.designator) not in lengths:
            raise ValueError(
                f"the unit's designator ({self.designator.kind}, code set {volume.code_set},"
                f" {len(volume.designator)} bytes) is none that clients find a disk by"
            )


def base_volume(designator: Designator, key: int) -> BaseVolume:
    """The volume of a unit for the client with this key. ValueError: no such type of designator."""
    if designator.kind not in _TYPES:
        raise ValueError(f"a designator of type {designator.kind!r}")
    return BaseVolume(designator.code_set, _TYPES[designator.kind], designator.data, key)


# -- updates --


def encode_update(ranges: Iterable[tuple[int, int]]) -> bytes:
    """pnfs_scsi_layoutupdate4 of (offset, length) pairs; for clients."""
    writer = Writer()
    pairs = list(ranges)
    writer.u32(len(pairs))
    for offset, length in pairs:
        writer.pack(_RANGE, offset, length)
    return bytes(writer.buffer)


def decode_update(body: bytes) -> list[tuple[int, int]]:
    """(offset, length) of what was written (RFC 8154 2.4), in order, neighbours joined.

    An empty body is an update of nothing. `XdrError`: malformed, an empty range, or one that ends
    behind the largest offset.
    """
    if not body:
        return []
    reader = Reader(body)
    ranges = []
    for _ in range(reader.count(RANGES_MAX, _RANGE.size)):
        offset, length = reader.unpack(_RANGE)
        if not length or offset + length > _END - 1:
            raise XdrError("a range of no length, or too long")
        ranges.append((offset, length))
    if not reader.done():
        raise XdrError("bytes behind the ranges")
    return joined(ranges)


# -- device addresses --


def encode_device_address(volumes: Sequence[ScsiVolume]) -> bytes:
    """pnfs_scsi_deviceaddr4 (RFC 8154 2.3). Layouts are about the last volume."""
    writer = Writer()
    writer.u32(len(volumes))
    for index, volume in enumerate(volumes):
        if isinstance(volume, BaseVolume):
            assert volume.key, "key 0 registers nobody"
            assert 0 < len(volume.designator) <= _DESIGNATOR_MAX
            writer.u32(VOLUME_BASE)
            writer.u32(volume.code_set)
            writer.u32(volume.designator_type)
            writer.opaque(volume.designator)
            writer.u64(volume.key)
        else:
            assert volume.volume < index
            writer.u32(VOLUME_SLICE)
            writer.pack(_SLICE, volume.start, volume.length, volume.volume)
    return bytes(writer.buffer)


def decode_device_address(body: bytes) -> list[ScsiVolume]:
    """pnfs_scsi_deviceaddr4 of base volumes and slices; for clients."""
    reader = Reader(body)
    volumes: list[ScsiVolume] = []
    for index in range(reader.count(_VOLUMES_MAX, 24)):
        kind = reader.u32()
        if kind == VOLUME_BASE:
            code_set, designator_type = reader.u32(), reader.u32()
            designator = reader.opaque(_DESIGNATOR_MAX)
            volumes.append(BaseVolume(code_set, designator_type, designator, reader.u64()))
        elif kind == VOLUME_SLICE:
            start, length, volume = reader.unpack(_SLICE)
            if volume >= index:
                raise XdrError("a slice of a volume that comes later")
            volumes.append(SliceVolume(start, length, volume))
        else:
            raise XdrError(f"volume type {kind}")
    if not reader.done():
        raise XdrError("bytes behind the volumes")
    return volumes
