"""What RFC 5663 puts into the opaque bodies of pNFS: block layouts, updates, device addresses.

Offsets and lengths are bytes. Encoders assert what the standard demands of a server; decoders raise
`XdrError` for what is malformed. What a decoded update may name is the core's business (it checks
every range against the grants); storage offsets of an update are not even read, because Linux sends
zeros (bl_ext_tree_encode) and a client's word about a device address is never to be used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from extfs.core import LayoutExtent, LayoutState
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = [
    "EXTENT_BYTES",
    "LAYOUT_HEAD_BYTES",
    "RANGES_MAX",
    "SIGNATURE_MAX",
    "VOLUME_SLICE",
    "BlockExtent",
    "Signature",
    "SimpleVolume",
    "SliceVolume",
    "Volume",
    "decode_device_address",
    "decode_layout",
    "decode_update",
    "encode_device_address",
    "encode_layout",
    "encode_update",
    "joined",
]

EXTENT_BYTES = 44
"""One pnfs_block_extent4."""
LAYOUT_HEAD_BYTES = 4
"""What stands before the extents."""
RANGES_MAX = 65536
"""Extents in one update; LAYOUT_MAX_RANGES of native/layout.h."""
SIGNATURE_MAX = 128
"""Bytes of a signature component that Linux accepts (PNFS_BLOCK_UUID_LEN)."""

SECTOR = 512
VOLUME_SIMPLE = 0
VOLUME_SLICE = 1
_VOLUMES_MAX = 64
_SIGNATURES_MAX = 16

_EXTENT = struct.Struct(">16sQQQI")
_SLICE = struct.Struct(">QQI")
_END = 1 << 64


@dataclass(frozen=True, slots=True)
class BlockExtent:
    """pnfs_block_extent4 (RFC 5663 2.3). `storage`: offset in the volume, 0 for NONE_DATA."""

    device: bytes
    offset: int
    length: int
    storage: int
    state: LayoutState


@dataclass(frozen=True, slots=True)
class Signature:
    """pnfs_block_sig_component4: these bytes stand there; a negative offset is from the end."""

    offset: int
    contents: bytes


@dataclass(frozen=True, slots=True)
class SimpleVolume:
    """A whole disk, known by what stands on it."""

    signatures: tuple[Signature, ...]


@dataclass(frozen=True, slots=True)
class SliceVolume:
    """[start, start + length) of another volume of the address, which is named by its index."""

    start: int
    length: int
    volume: int


Volume = SimpleVolume | SliceVolume

# -- layouts --


def encode_layout(device: bytes, extents: Iterable[LayoutExtent]) -> bytes:
    """pnfs_block_layout4 of the core's extents, all on one volume that is the filesystem.

    The order is the core's: by file offset, and READ_DATA before the INVALID_DATA that it is the
    copy-on-write source of; RFC 5663 2.3.1 and verify_extent() of Linux accept it so. A SCSI
    layout is the same bytes (RFC 8154 2.4).
    """
    assert len(device) == 16
    body = bytearray(LAYOUT_HEAD_BYTES)
    count = 0
    for extent in extents:
        assert not (extent.offset | extent.length | extent.device) % SECTOR
        assert extent.length
        body += _EXTENT.pack(device, extent.offset, extent.length, extent.device, extent.state)
        count += 1
    body[:LAYOUT_HEAD_BYTES] = count.to_bytes(LAYOUT_HEAD_BYTES, "big")
    return bytes(body)


def _state(number: int) -> LayoutState:
    try:
        return LayoutState(number)
    except ValueError:
        raise XdrError(f"extent state {number}") from None


def decode_layout(body: bytes) -> list[BlockExtent]:
    """pnfs_block_layout4; nothing may follow it."""
    reader = Reader(body)
    extents = []
    for _ in range(reader.count(RANGES_MAX, EXTENT_BYTES)):
        device, offset, length, storage, state = reader.unpack(_EXTENT)
        extents.append(BlockExtent(device, offset, length, storage, _state(state)))
    if not reader.done():
        raise XdrError("bytes behind the extents")
    return extents


# -- updates --


def encode_update(device: bytes, ranges: Iterable[tuple[int, int]]) -> bytes:
    """pnfs_block_layoutupdate4 as Linux writes it, of (offset, length) pairs; for clients."""
    writer = Writer()
    pairs = list(ranges)
    writer.u32(len(pairs))
    for offset, length in pairs:
        writer.pack(_EXTENT, device, offset, length, 0, LayoutState.READ_WRITE_DATA)
    return bytes(writer.buffer)


def decode_update(body: bytes) -> list[tuple[int, int]]:
    """(offset, length) of what was written (RFC 5663 2.3.2), in order, neighbours joined.

    An empty body is an update of nothing. `XdrError`: malformed, a state other than
    READ_WRITE_DATA, an empty extent, or one that ends behind the largest offset.
    """
    if not body:
        return []
    ranges = []
    for extent in decode_layout(body):
        if extent.state is not LayoutState.READ_WRITE_DATA:
            raise XdrError(f"{extent.state.name} in an update")
        if not extent.length or extent.offset + extent.length > _END - 1:
            raise XdrError("an extent of no length, or too long")
        ranges.append((extent.offset, extent.length))
    return joined(ranges)


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, and what touches or overlaps made one."""
    whole: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if whole and offset <= sum(whole[-1]):
            start, before = whole[-1]
            whole[-1] = (start, max(before, offset + length - start))
        else:
            whole.append((offset, length))
    return whole


# -- device addresses --


def encode_device_address(volumes: Sequence[Volume]) -> bytes:
    """pnfs_block_deviceaddr4 (RFC 5663 2.2.2). Layouts are about the last volume."""
    writer = Writer()
    writer.u32(len(volumes))
    for index, volume in enumerate(volumes):
        if isinstance(volume, SimpleVolume):
            assert 0 < len(volume.signatures) < _SIGNATURES_MAX
            writer.u32(VOLUME_SIMPLE)
            writer.u32(len(volume.signatures))
            for signature in volume.signatures:
                # Linux reads components without padding: only multiples of four are safe.
                assert 0 < len(signature.contents) <= SIGNATURE_MAX
                assert not len(signature.contents) % 4
                writer.i64(signature.offset)
                writer.opaque(signature.contents)
        else:
            assert volume.volume < index
            writer.u32(VOLUME_SLICE)
            writer.pack(_SLICE, volume.start, volume.length, volume.volume)
    return bytes(writer.buffer)


def decode_device_address(body: bytes) -> list[Volume]:
    """pnfs_block_deviceaddr4 of simple volumes and slices; for clients."""
    reader = Reader(body)
    volumes: list[Volume] = []
    for index in range(reader.count(_VOLUMES_MAX, 8)):
        kind = reader.u32()
        if kind == VOLUME_SIMPLE:
            count = reader.count(_SIGNATURES_MAX, 12)
            volumes.append(
                SimpleVolume(
                    tuple(Signature(reader.i64(), reader.opaque(4096)) for _ in range(count))
                )
            )
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
