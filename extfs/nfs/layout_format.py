"""What differs between the layout types: bodies, device ids, addresses. See `LayoutFormat`.

Everything else, who may have what and how it comes back, is the same for all (`extfs.nfs.layouts`).

A block device's id is the first half of the UUID and the size in blocks: the same for all clients
and after a restart, another one when the filesystem has grown; an id of the same filesystem when it
was smaller stays good, because nothing that it addressed has moved.

A SCSI device's id is the first half of the UUID and the client's own key. Nobody else may ask for
it, since its address tells the key. A client that was fenced comes back as another holder with
another key, so the id is another one, too, and the kernel registers anew; the old id is deleted.
It does not change when the filesystem grows: of two devices with one key the Linux client would
unregister the key with the first that it forgets. A unit that became larger is written behind its
old end through the server until the client mounts it again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from extfs.nfs import block_layout, scsi_layout
from extfs.nfs import constants as n
from extfs.nfs.block_layout import Signature, SimpleVolume, SliceVolume, Volume
from extfs.nfs.scsi_layout import ScsiIdentity, ScsiVolume, base_volume

if TYPE_CHECKING:
    from extfs.core import LayoutExtent
    from extfs.nfs.clients import Client
    from extfs.nfs.devices import Devices

__all__ = ["BlockFormat", "LayoutFormat", "ScsiFormat"]

_MAGIC = b"EXsb"  # MAGIC_SUPER, at the begin of the block
_UUID_OFFSET = 16  # of struct meta_hdr
_ID = struct.Struct(">8sQ")


class LayoutFormat(Protocol):
    """One layout type. Layouts of both types are one list of extents of 44 bytes."""

    @property
    def type(self) -> int:
        """LAYOUT4_*."""
        ...

    def encode(self, device: bytes, extents: Iterable[LayoutExtent]) -> bytes:
        """The body of a layout."""
        ...

    def decode_update(self, body: bytes) -> list[tuple[int, int]]:
        """(offset, length) of an update's body. `XdrError`."""
        ...

    def device(self, client: Client) -> bytes:
        """The id that layouts of this client name; it has a holder."""
        ...

    def known(self, client: Client, device: bytes) -> bool:
        """Whether the client may ask for this id: it is, or was, one of this filesystem."""
        ...

    def address(self, client: Client) -> bytes:
        """The body of the device's address, as this client is told it."""
        ...


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """RFC 5663: a client finds the disk by what stands on it.

    What is named here never changes while a filesystem exists: magic and UUID of the superblock, at
    their places in struct super_disk of native/format.h (its checksum and log position do change
    with the label). blkmapd looks at whole disks only, so for a partition the signature is told at
    its place on the disk, and the filesystem is a slice of that.
    """

    devices: Devices

    @property
    def type(self) -> int:
        """LAYOUT4_BLOCK_VOLUME."""
        return n.LAYOUT4_BLOCK_VOLUME

    def encode(self, device: bytes, extents: Iterable[LayoutExtent]) -> bytes:
        """pnfs_block_layout4."""
        return block_layout.encode_layout(device, extents)

    def decode_update(self, body: bytes) -> list[tuple[int, int]]:
        """pnfs_block_layoutupdate4."""
        return block_layout.decode_update(body)

    @property
    def current(self) -> bytes:
        """The id that new layouts name."""
        superblock = self.devices.superblock
        return _ID.pack(superblock.uuid[:8], superblock.total_blocks)

    def device(self, client: Client) -> bytes:
        """The same for all."""
        return self.current

    def known(self, client: Client, device: bytes) -> bool:
        """Whether it is, or was, one of this filesystem."""
        uuid, blocks = _ID.unpack(device)
        superblock = self.devices.superblock
        return bool(uuid == superblock.uuid[:8] and 0 < blocks <= superblock.total_blocks)

    def volumes(self) -> list[Volume]:
        """The disk, and the part of it that the filesystem is when that is not all of it."""
        offset, superblock = self.devices.offset, self.devices.superblock
        signatures = (
            Signature(offset, _MAGIC),
            Signature(offset + _UUID_OFFSET, superblock.uuid),
        )
        volumes: list[Volume] = [SimpleVolume(signatures)]
        if offset:
            size = superblock.total_blocks * superblock.block_size
            volumes.append(SliceVolume(offset, size, 0))
        return volumes

    def address(self, client: Client) -> bytes:
        """pnfs_block_deviceaddr4."""
        return block_layout.encode_device_address(self.volumes())


@dataclass(frozen=True, slots=True)
class ScsiFormat:
    """RFC 8154: a client finds the disk by its own name, and registers its key there."""

    devices: Devices
    unit: ScsiIdentity

    @property
    def type(self) -> int:
        """LAYOUT4_SCSI."""
        return n.LAYOUT4_SCSI

    def encode(self, device: bytes, extents: Iterable[LayoutExtent]) -> bytes:
        """pnfs_scsi_layout4."""
        return block_layout.encode_layout(device, extents)

    def decode_update(self, body: bytes) -> list[tuple[int, int]]:
        """pnfs_scsi_layoutupdate4."""
        return scsi_layout.decode_update(body)

    def device(self, client: Client) -> bytes:
        """Its own."""
        assert client.fence_key
        return self.id_of(client.fence_key)

    def id_of(self, key: int) -> bytes:
        """The id of the device for whoever has this key."""
        return _ID.pack(self.devices.superblock.uuid[:8], key)

    def known(self, client: Client, device: bytes) -> bool:
        """Whether it is this client's own."""
        return bool(client.fence_key) and device == self.id_of(client.fence_key)

    def volumes(self, key: int) -> list[ScsiVolume]:
        """The unit, and the part of it that the filesystem is when that is not all of it."""
        volumes: list[ScsiVolume] = [base_volume(self.unit.designator, key)]
        if self.unit.offset:
            superblock = self.devices.superblock
            size = superblock.total_blocks * superblock.block_size
            volumes.append(SliceVolume(self.unit.offset, size, 0))
        return volumes

    def address(self, client: Client) -> bytes:
        """pnfs_scsi_deviceaddr4."""
        self.unit.offered(client.fence_key)
        return scsi_layout.encode_device_address(self.volumes(client.fence_key))
