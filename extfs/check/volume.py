"""The device as fsck sees it: raw blocks, an overlay of changes in memory, verified metadata.

The device is read with ``os.pread`` through this module alone. Blocks that replay or repair changed
live in the overlay until `Volume.write_home` puts them on the device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extfs.check import layout
from extfs.check.checksum import block_crc
from extfs.check.layout import BLOCK_SHIFT, BLOCK_SIZE, Magic


class VolumeError(Exception):
    """The device cannot be checked at all: not there, in use, not extfs, too new, unreadable."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class DamageError(Exception):
    """A metadata block failed a check; `code` names the check."""

    def __init__(self, code: str, block: int, text: str) -> None:
        super().__init__(f"block {block}: {text}")
        self.code = code
        self.block = block
        self.text = text


def seal(block: bytearray, lsn: int) -> bytes:
    """Fill in lsn and checksum of a metadata block that is about to be written."""
    block[32:40] = lsn.to_bytes(8, "little")
    block[4:8] = block_crc(block).to_bytes(4, "little")
    return bytes(block)


def new_block(magic: int, number: int, uuid: bytes, owner: int = 0) -> bytearray:
    """A metadata block with its header filled in but for lsn and checksum."""
    block = bytearray(BLOCK_SIZE)
    layout.HDR_CODEC.pack_into(block, 0, magic, 0, number, uuid, 0, owner)
    return block


def verify_header(block: bytes, number: int, magic: int, uuid: bytes | None) -> None:
    """Check magic, checksum, block number and UUID; raises `DamageError`."""
    if len(block) != BLOCK_SIZE:
        raise DamageError("META_SHORT", number, "the device ends inside this block")
    found, crc, own, owner_uuid, _lsn, _owner = layout.HDR_CODEC.unpack_from(block)
    if found != magic:
        raise DamageError(
            "META_MAGIC", number, f"magic is {found:#010x}, expected {int(magic):#010x}"
        )
    actual = block_crc(block)
    if crc != actual:
        raise DamageError(
            "META_CRC", number, f"checksum is {crc:#010x}, the content's is {actual:#010x}"
        )
    if own != number:
        raise DamageError("META_BLOCKNO", number, f"it says that it is block {own}")
    if uuid is not None and owner_uuid != uuid:
        raise DamageError("META_UUID", number, "it belongs to another filesystem")


@dataclass(frozen=True)
class Super:
    """What the superblock says. `raw`: the whole block it was taken from."""

    uuid: bytes
    label: bytes
    total_blocks: int
    ag_blocks: int
    ag_count: int
    journal_start: int
    journal_blocks: int
    hash_key: tuple[int, int]
    created_sec: int
    compat: int
    ro_compat: int
    incompat: int
    version: int
    raw: bytes

    @property
    def log_blocks(self) -> int:
        """Journal blocks without the two headers."""
        return self.journal_blocks - 2

    def ag_header(self, agno: int) -> int:
        """Block of an AG's header."""
        return agno * self.ag_blocks if agno else layout.AG0_HEADER_BLOCK

    def ag_range(self, agno: int) -> tuple[int, int]:
        """First block of an AG, and the block after its last."""
        start = agno * self.ag_blocks
        end = self.total_blocks if agno == self.ag_count - 1 else start + self.ag_blocks
        return start, end

    def fixed_blocks(self) -> list[tuple[int, int, str]]:
        """(first block, blocks, what) of everything that never moves."""
        fixed = [
            (layout.SUPER_BLOCK, 1, "superblock"),
            (layout.HEARTBEAT_BLOCK, 1, "heartbeat"),
            (layout.ROOT_BLOCK, 1, "root block"),
            (layout.SUPER_COPY_BLOCK, 1, "superblock copy"),
            (self.journal_start, self.journal_blocks, "journal"),
        ]
        fixed += [(self.ag_header(n), 1, f"header of AG {n}") for n in range(self.ag_count)]
        return fixed


def _check_geometry(number: int, s: dict[str, Any]) -> None:
    total, ag_blocks, count = s["total_blocks"], s["ag_blocks"], s["ag_count"]
    start, blocks = s["journal_start"], s["journal_blocks"]
    checks = (
        (s["block_size"] == BLOCK_SIZE, f"block size {s['block_size']}"),
        (layout.DEVICE_MIN_BLOCKS <= total <= layout.DEVICE_MAX_BLOCKS, f"{total} blocks"),
        (1 <= count <= layout.AG_MAX_COUNT, f"{count} allocation groups"),
        (ag_blocks >= layout.AG_MIN_BLOCKS, f"{ag_blocks} blocks in an allocation group"),
        ((count - 1) * ag_blocks < total, "more allocation groups than blocks"),
        (
            layout.JOURNAL_MIN_BLOCKS <= blocks <= layout.JOURNAL_MAX_BLOCKS,
            f"a journal of {blocks} blocks",
        ),
        (
            start > layout.SUPER_COPY_BLOCK and start + blocks <= total,
            f"a journal at blocks {start} to {start + blocks}",
        ),
        (s["root_inode"] == layout.ROOT_INODE, f"root inode {s['root_inode']}"),
    )
    for fine, what in checks:
        if not fine:
            raise DamageError("SUPER_SHAPE", number, f"impossible: {what}")


def parse_super(block: bytes, number: int) -> Super:
    """Decode one superblock copy; raises `DamageError`. Newer versions are not checked further."""
    verify_header(block, number, Magic.SUPER, None)
    s = layout.SUPER.unpack(block)
    if s["version"] == layout.VERSION and not s["incompat"]:
        _check_geometry(number, s)
    return Super(
        uuid=s["uuid"],
        label=s["label"].rstrip(b"\0"),
        total_blocks=s["total_blocks"],
        ag_blocks=s["ag_blocks"],
        ag_count=s["ag_count"],
        journal_start=s["journal_start"],
        journal_blocks=s["journal_blocks"],
        hash_key=s["hash_key"],
        created_sec=s["created_sec"],
        compat=s["compat"],
        ro_compat=s["ro_compat"],
        incompat=s["incompat"],
        version=s["version"],
        raw=block,
    )


class Volume:
    """An open device with an overlay, locked against every other user.

    Not `exclusive`: for looking at a device that may be mounted; what is read may then be torn.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, writable: bool = False, exclusive: bool = True
    ) -> None:
        assert exclusive or not writable
        self.path = os.fspath(path)
        self.writable = writable
        self.exclusive = exclusive
        self.overlay: dict[int, bytes] = {}
        self._locks: list[int] = []
        self._fd = self._open()
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.close()
            raise VolumeError("DEVICE", f"{self.path}: {error.strerror}") from error
        self.super: Super

    def _open(self) -> int:
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            mode = os.stat(self.path).st_mode
            if stat.S_ISBLK(mode):
                fd = os.open(self.path, flags | (os.O_EXCL if self.exclusive else 0))
                backing = self._backing_file()
                if backing:
                    with contextlib.suppress(FileNotFoundError):
                        self._locks.append(os.open(backing, os.O_RDONLY | os.O_CLOEXEC))
            elif stat.S_ISREG(mode):
                fd = os.open(self.path, flags)
                self._locks.append(os.dup(fd))
            else:
                raise VolumeError(
                    "DEVICE", f"{self.path} is neither a block device nor a regular file"
                )
        except OSError as error:
            text = "the device is in use" if error.errno == 16 else error.strerror
            raise VolumeError("DEVICE", f"{self.path}: {text}") from error
        for lock in self._locks if self.exclusive else ():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                self._close_locks()
                raise VolumeError("DEVICE", f"{self.path}: the device is in use") from error
        return fd

    def _backing_file(self) -> str | None:
        rdev = os.stat(self.path).st_rdev
        base = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
        for place in (base, base.parent):
            with contextlib.suppress(OSError):
                return (place / "loop/backing_file").read_text().rstrip("\n")
        return None

    def _close_locks(self) -> None:
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    def close(self) -> None:
        """Close; what is only in the overlay is lost."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._close_locks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- superblock --

    def load_super(self) -> list[DamageError]:
        """Read both copies and take the first valid one; returns what is wrong with copies.

        `VolumeError`: NOT_EXTFS, SB_DAMAGED, INCOMPAT, DEV_SMALL.
        """
        damages: list[DamageError] = []
        found: list[Super] = []
        for number in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK):
            try:
                found.append(parse_super(self.read_raw(number), number))
            except DamageError as damage:
                damages.append(damage)
        if not found:
            if all(damage.code in ("META_MAGIC", "META_SHORT") for damage in damages):
                raise VolumeError("NOT_EXTFS", f"{self.path} is not an extfs device")
            text = "; ".join(str(damage) for damage in damages)
            raise VolumeError(
                "SB_DAMAGED", f"{self.path}: both superblock copies are damaged: {text}"
            )
        chosen = found[0]
        if chosen.version != layout.VERSION or chosen.incompat:
            raise VolumeError(
                "INCOMPAT",
                f"{self.path}: format version {chosen.version} with features "
                f"{chosen.incompat:#x} is newer than this program",
            )
        if self.size >> BLOCK_SHIFT < chosen.total_blocks:
            raise VolumeError(
                "DEV_SMALL",
                f"{self.path}: the filesystem has {chosen.total_blocks} blocks, "
                f"the device only {self.size >> BLOCK_SHIFT}",
            )
        if len(found) == 2 and _identity(found[0]) != _identity(found[1]):
            damages.append(
                DamageError(
                    "SUPER_DIFFERS", layout.SUPER_COPY_BLOCK, "the copy differs from the primary"
                )
            )
        self.super = chosen
        return damages

    # -- blocks --

    def read_raw(self, number: int) -> bytes:
        """A block as it is on the device; short past the end."""
        try:
            return os.pread(self._fd, BLOCK_SIZE, number << BLOCK_SHIFT)
        except OSError as error:
            raise DamageError("DEV_READ", number, f"cannot be read: {error.strerror}") from error

    def forget_cached(self, number: int) -> None:
        """Have the next read of a block ask the device: another host may have written it."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, number << BLOCK_SHIFT, BLOCK_SIZE, os.POSIX_FADV_DONTNEED)

    def read(self, number: int) -> bytes:
        """A block with the overlay's changes."""
        block = self.overlay.get(number)
        return self.read_raw(number) if block is None else block

    def read_meta(self, number: int, magic: int, owner: int) -> bytes:
        """A verified metadata block; raises `DamageError`."""
        block = self.read(number)
        verify_header(block, number, magic, self.super.uuid)
        found = int.from_bytes(block[40:48], "little")
        if found != owner:
            raise DamageError("META_OWNER", number, f"its owner is {found:#x}, expected {owner:#x}")
        return block

    def write_block(self, number: int, block: bytes) -> None:
        """Write a block to the device at once (not durable before `flush`)."""
        assert len(block) == BLOCK_SIZE
        try:
            written = os.pwrite(self._fd, block, number << BLOCK_SHIFT)
        except OSError as error:
            raise VolumeError("DEVICE", f"{self.path}: writing: {error.strerror}") from error
        if written != BLOCK_SIZE:
            raise VolumeError("DEVICE", f"{self.path}: short write at block {number}")

    def flush(self) -> None:
        """Make all writes durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise VolumeError("DEVICE", f"{self.path}: flush: {error.strerror}") from error

    def write_home(self) -> None:
        """Write the overlay to the device, flush, forget it."""
        for number in sorted(self.overlay):
            self.write_block(number, self.overlay[number])
        self.flush()
        self.overlay.clear()


def _identity(super_: Super) -> tuple[object, ...]:
    """What two copies have in common: all but the header's place, position and checksum."""
    raw = super_.raw
    return raw[:4], raw[16:32], raw[48:]
