"""The one device of a filesystem as pNFS clients see it: its id, and the volume that finds it.

A client knows the disk by the bytes that stand on it (RFC 5663 2.2.1). What is named here never
changes while a filesystem exists: magic and UUID of the superblock, at their places in struct
super_disk of native/format.h (its checksum and log position do change with the label). blkmapd
looks at whole disks only, so for a partition the signature is told at its place on the disk, and
the filesystem is a slice of that.

A device id is the first half of the UUID and the size in blocks. So it is the same after a restart,
and another one when the filesystem has grown; an id of the same filesystem when it was smaller
stays good, because nothing that it addressed has moved.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from extfs.nfs import constants as n
from extfs.nfs.block_layout import (
    Signature,
    SimpleVolume,
    SliceVolume,
    Volume,
    encode_device_address,
)
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.core import Superblock
    from extfs.nfs.clients import Client
    from extfs.nfs.service import Service

__all__ = ["Devices", "disk_offset", "encode_change", "offset_of"]

_MAGIC = b"EXsb"  # MAGIC_SUPER, at the begin of the block
_UUID_OFFSET = 16  # of struct meta_hdr
_SECTOR = 512
_ID = struct.Struct(">8sQ")
ASKED_MAX = 64
"""Device ids that a client is told changes of: every size that the filesystem had is one."""
NOTIFIED = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE
"""The notifications that a client gets if it asks for them.

No id is ever deleted while the filesystem is served, so that one never comes. It is promised
because the Linux client asks for both, and keeps no address when it is promised only one of them.
"""


def disk_offset(path: str, sys: Path = Path("/sys")) -> int:
    """Bytes from the begin of the disk to that of this device: of a partition, of a loop device.

    0 for a whole disk, for an image, and for what cannot be looked at. A partition of a loop device
    has both.
    """
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return offset_of(status.st_rdev, sys) if stat.S_ISBLK(status.st_mode) else 0


def offset_of(number: int, sys: Path = Path("/sys")) -> int:
    """The same of a device number."""
    here = sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    offset = _number(here / "start") * _SECTOR if (here / "partition").exists() else 0
    disk = here.resolve().parent if (here / "partition").exists() else here
    return offset + _number(disk / "loop" / "offset")


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


@dataclass(slots=True)
class Devices:
    """Device ids and addresses of the filesystem of a service.

    `offset`: bytes before it on its disk. `changed` is called with the id before and now when the
    filesystem has grown, for each client that asked to be told.
    """

    service: Service
    offset: int = 0
    _super: Superblock = field(init=False)
    _asked: dict[Client, set[bytes]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._super = self.service.fs.super
        if self.service.options.device:
            self.offset = disk_offset(self.service.options.device)

    @property
    def current(self) -> bytes:
        """The id that new layouts name."""
        return _ID.pack(self._super.uuid[:8], self._super.total_blocks)

    def known(self, device: bytes) -> bool:
        """Whether an id is, or was, one of this filesystem."""
        uuid, blocks = _ID.unpack(device)
        return bool(uuid == self._super.uuid[:8] and 0 < blocks <= self._super.total_blocks)

    def volumes(self) -> list[Volume]:
        """The disk, and the part of it that the filesystem is when that is not all of it."""
        signatures = (
            Signature(self.offset, _MAGIC),
            Signature(self.offset + _UUID_OFFSET, self._super.uuid),
        )
        volumes: list[Volume] = [SimpleVolume(signatures)]
        if self.offset:
            size = self._super.total_blocks * self._super.block_size
            volumes.append(SliceVolume(self.offset, size, 0))
        return volumes

    def address(self) -> bytes:
        """The body of device_addr4."""
        return encode_device_address(self.volumes())

    # -- notifications (RFC 8881 12.2.10, 18.40.3, 20.12) --

    def asked(self, client: Client, device: bytes, types: int) -> int:
        """GETDEVICEINFO with this bitmap of notifications; returns which of them will come."""
        granted = types & NOTIFIED
        of_client = self._asked.setdefault(client, set())
        if granted and len(of_client) < ASKED_MAX:
            of_client.add(device)
        elif granted and device not in of_client:
            granted = 0
        else:
            of_client.discard(device)
        if not of_client:
            del self._asked[client]
        return granted

    def client_lost(self, client: Client) -> None:
        """Nobody to be told any more."""
        self._asked.pop(client, None)

    def refresh(self) -> bool:
        """Look whether the filesystem has grown; then tell those who asked. True: it has."""
        now = self.service.fs.super
        if now.total_blocks == self._super.total_blocks:
            return False
        before, self._super = self.current, now
        for client, ids in list(self._asked.items()):
            if before in ids:
                self._notify(client, before)
        self.service.count("devices_grown")
        return True

    def _notify(self, client: Client, device: bytes) -> None:
        if not self.service.callbacks.path_up(client):
            return
        body = encode_change(device)
        done: Callable[[object], None] = lambda reply: None  # noqa: E731 - nothing depends on it
        self.service.callbacks.call(client, body, 1, done)


def encode_change(device: bytes) -> bytes:
    """CB_NOTIFY_DEVICEID4args: the address of this id is another one now (RFC 8881 20.12)."""
    change = Writer()
    change.u32(n.LAYOUT4_BLOCK_VOLUME)
    change.fixed(device)
    change.boolean(False)  # ndc_immediate: nothing that the old address says is wrong
    out = Writer()
    out.u32(n.OP_CB_NOTIFY_DEVICEID)
    out.u32(1)
    out.bitmap(1 << n.NOTIFY_DEVICEID4_CHANGE)
    out.opaque(change.buffer)
    return bytes(out.buffer)
