"""The one device of a filesystem as pNFS clients see it, in the format of each layout type.

What is told of it is the formats' (`extfs.nfs.layout_format`); here is who asked for it, and who is
told that it has changed. blkmapd and the Linux kernel look at whole disks only, so the place of the
filesystem on its disk is looked up here, too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from extfs.nfs import constants as n
from extfs.nfs.layout_format import BlockFormat, LayoutFormat, ScsiFormat
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.core import Superblock
    from extfs.nfs.clients import Client
    from extfs.nfs.service import Service

__all__ = ["Devices", "disk_offset", "encode_change", "encode_delete", "offset_of"]

_SECTOR = 512
ASKED_MAX = 64
"""Device ids that a client is told changes of: every size that the filesystem had is one."""
NOTIFIED = 1 << n.NOTIFY_DEVICEID4_CHANGE | 1 << n.NOTIFY_DEVICEID4_DELETE
"""The notifications that a client gets if it asks for them.

A block device is never deleted while the filesystem is served, so that one never comes for it. It
is promised because the Linux client asks for both, and keeps no address when it is promised only
one of them.
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

    `offset`: bytes before it on its disk. `formats`: by layout type; LAYOUT4_SCSI only on a unit
    that can fence. Those who asked are told when the filesystem has grown.
    """

    service: Service
    offset: int = 0
    formats: dict[int, LayoutFormat] = field(init=False)
    block: BlockFormat = field(init=False)
    superblock: Superblock = field(init=False)
    _asked: dict[Client, set[bytes]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.superblock = self.service.fs.super
        options = self.service.options
        if options.device:
            self.offset = disk_offset(options.device)
        self.block = BlockFormat(self)
        self.formats = {n.LAYOUT4_BLOCK_VOLUME: self.block}
        if options.unit is not None:
            options.unit.check()
            self.formats[n.LAYOUT4_SCSI] = ScsiFormat(self, options.unit)

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
        if self.service.fs.total_blocks == self.superblock.total_blocks:
            return False
        before, self.superblock = self.block.current, self.service.fs.super
        for client, ids in list(self._asked.items()):
            if before in ids:
                self._notify(client, encode_change(n.LAYOUT4_BLOCK_VOLUME, before))
        self.service.count("devices_grown")
        return True

    def deleted(self, client: Client, key: int) -> None:
        """The client has nothing any more that it was told with this key, and never will again."""
        scsi = self.formats.get(n.LAYOUT4_SCSI)
        if not isinstance(scsi, ScsiFormat):
            return
        device = scsi.id_of(key)
        of_client = self._asked.get(client, set())
        if device not in of_client:
            return
        of_client.discard(device)
        if not of_client:
            del self._asked[client]
        self.service.count("devices_deleted")
        self._notify(client, encode_delete(n.LAYOUT4_SCSI, device))

    def _notify(self, client: Client, body: bytes) -> None:
        if not self.service.callbacks.path_up(client):
            return
        done: Callable[[object], None] = lambda reply: None  # noqa: E731 - nothing depends on it
        self.service.callbacks.call(client, body, 1, done)


def encode_change(layout_type: int, device: bytes) -> bytes:
    """CB_NOTIFY_DEVICEID4args: the address of this id is another one now (RFC 8881 20.12)."""
    change = Writer()
    change.u32(layout_type)
    change.fixed(device)
    change.boolean(False)  # ndc_immediate: nothing that the old address says is wrong
    return _notification(n.NOTIFY_DEVICEID4_CHANGE, change)


def encode_delete(layout_type: int, device: bytes) -> bytes:
    """The same: this id is none any more."""
    delete = Writer()
    delete.u32(layout_type)
    delete.fixed(device)
    return _notification(n.NOTIFY_DEVICEID4_DELETE, delete)


def _notification(kind: int, what: Writer) -> bytes:
    out = Writer()
    out.u32(n.OP_CB_NOTIFY_DEVICEID)
    out.u32(1)
    out.bitmap(1 << kind)
    out.opaque(what.buffer)
    return bytes(out.buffer)
