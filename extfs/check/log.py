"""The journal: headers, reading the log, replay into the overlay, and writing a record.

The rules are FORMAT.md's: records are taken from the tail while they verify whole; a whole record
behind the first that does not verify means damage, not a power cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from extfs.check import layout
from extfs.check.layout import GROUP_MAX_IMAGES, JDESC, JDESC_TAGS, JHEAD, JTAG, Magic
from extfs.check.volume import DamageError, Volume, new_block, seal, verify_header

_HOME_MAGICS = (Magic.ROOT, Magic.AG, Magic.NODE)


@dataclass(frozen=True)
class Header:
    """One valid header copy."""

    slot: int
    seq: int
    tail_lsn: int
    tail_xid: int


@dataclass(frozen=True)
class Record:
    """One whole commit record; `homes` are the blocks of its images, in order."""

    lsn: int
    xid: int
    sec: int
    tail_lsn: int
    descriptors: int
    homes: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Log blocks that it takes."""
        return self.descriptors + len(self.homes)


@dataclass
class Log:
    """The journal as read from the device."""

    header: Header | None = None
    damages: list[DamageError] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    end_lsn: int = 0
    next_xid: int = 0
    seq: int = 0
    gap: Record | None = None
    """A whole record behind the end: the log is damaged."""
    fault: str = ""
    """Why the log cannot be replayed, besides a gap."""

    @property
    def tail_seen(self) -> int:
        """The newest tail that header or records name: older images are home already."""
        assert self.header is not None
        return max([self.header.tail_lsn, *(record.tail_lsn for record in self.records)])

    @property
    def usable(self) -> bool:
        """Whether replay may be trusted."""
        return self.header is not None and self.gap is None and not self.fault


def place_of(volume: Volume, lsn: int) -> int:
    """Device block of a log position."""
    return volume.super.journal_start + 2 + lsn % volume.super.log_blocks


def _read_header(volume: Volume, slot: int) -> Header:
    number = volume.super.journal_start + slot
    block = volume.read_raw(number)
    verify_header(block, number, Magic.JHEAD, volume.super.uuid)
    head = JHEAD.unpack(block)
    if (
        head["log_blocks"] != volume.super.log_blocks
        or head["seq"] & 1 != slot
        or not head["tail_lsn"]
        or not head["tail_xid"]
    ):
        raise DamageError("JHEAD_SHAPE", number, "impossible values in a journal header")
    return Header(slot, head["seq"], head["tail_lsn"], head["tail_xid"])


def _descriptor(volume: Volume, lsn: int, index: int) -> tuple[dict[str, int], bytes] | None:
    """Descriptor `index` of the record at `lsn`, if one is there."""
    number = place_of(volume, lsn + index)
    block = volume.read_raw(number)
    if block[:4] != Magic.JDESC.to_bytes(4, "little"):
        return None
    try:
        verify_header(block, number, Magic.JDESC, volume.super.uuid)
    except DamageError:
        return None
    desc = JDESC.unpack(block)
    images, count = desc["nimages"], desc["ndesc"]
    if (
        desc["lsn"] != lsn
        or desc["index"] != index
        or images > GROUP_MAX_IMAGES
        or count != max(1, -(-images // JDESC_TAGS))
        or images + count > volume.super.log_blocks
    ):
        return None
    return desc, block[128:]


def _image_valid(volume: Volume, lsn: int, position: int, home: int, crc: int) -> bool:
    block = volume.read_raw(place_of(volume, position))
    magic = int.from_bytes(block[:4], "little")
    if magic not in _HOME_MAGICS or int.from_bytes(block[32:40], "little") != lsn:
        return False
    if int.from_bytes(block[4:8], "little") != crc:
        return False
    try:
        verify_header(block, home, magic, volume.super.uuid)
    except DamageError:
        return False
    return True


def _read_record(volume: Volume, lsn: int) -> Record | None:
    """The record at `lsn` when all of it verifies."""
    first = _descriptor(volume, lsn, 0)
    if first is None:
        return None
    desc, tags = first
    for index in range(1, desc["ndesc"]):
        more = _descriptor(volume, lsn, index)
        if more is None or more[0]["xid"] != desc["xid"] or more[0]["nimages"] != desc["nimages"]:
            return None
        tags += more[1]
    homes = []
    for number in range(desc["nimages"]):
        home, crc, _flags = JTAG.codec.unpack_from(tags, number * JTAG.size)
        if not _image_valid(volume, lsn, lsn + desc["ndesc"] + number, home, crc):
            return None
        homes.append(home)
    return Record(lsn, desc["xid"], desc["sec"], desc["tail_lsn"], desc["ndesc"], tuple(homes))


def _home_plausible(volume: Volume, home: int) -> bool:
    s = volume.super
    return (
        layout.ROOT_BLOCK <= home < s.total_blocks
        and home != layout.SUPER_COPY_BLOCK
        and not s.journal_start <= home < s.journal_start + s.journal_blocks
    )


def _behind_end(volume: Volume, log: Log, header: Header) -> Record | None:
    """A whole record behind the end, as far as a record could reach."""
    limit = header.tail_lsn + volume.super.log_blocks
    if not log.damages:
        reach = GROUP_MAX_IMAGES + -(-GROUP_MAX_IMAGES // JDESC_TAGS) + 1
        limit = min(limit, log.end_lsn + reach)
    for lsn in range(log.end_lsn + 1, limit):
        found = _descriptor(volume, lsn, 0)
        if found and found[0]["xid"] > log.next_xid:
            record = _read_record(volume, lsn)
            if record is not None:
                return record
    return None


def read_log(volume: Volume) -> Log:
    """Read headers and records. Nothing is changed."""
    log = Log()
    for slot in (0, 1):
        try:
            header = _read_header(volume, slot)
        except DamageError as damage:
            log.damages.append(damage)
            continue
        if log.header is None or header.seq > log.header.seq:
            log.header = header
    if log.header is None:
        return log
    log.seq = log.header.seq
    log.end_lsn = log.header.tail_lsn
    log.next_xid = log.header.tail_xid
    limit = log.header.tail_lsn + volume.super.log_blocks
    while record := _read_record(volume, log.end_lsn):
        if record.xid != log.next_xid or record.lsn + record.blocks > limit:
            log.fault = f"record at position {record.lsn} has number {record.xid}"
            break
        for home in record.homes:
            if not _home_plausible(volume, home):
                log.fault = f"record {record.xid} names block {home}, where no metadata can be"
        if log.fault:
            break
        log.records.append(record)
        log.end_lsn += record.blocks
        log.next_xid += 1
    if not log.fault:
        log.gap = _behind_end(volume, log, log.header)
    return log


def replay(volume: Volume, log: Log) -> int:
    """Put every committed image into the overlay; returns how many blocks."""
    tail = log.tail_seen
    homes: dict[int, int] = {}
    for record in log.records:
        for number, home in enumerate(record.homes):
            position = record.lsn + record.descriptors + number
            if position >= tail:
                homes[home] = position
    for home, position in homes.items():
        volume.overlay[home] = volume.read_raw(place_of(volume, position))
    return len(homes)


def write_header(volume: Volume, seq: int, tail_lsn: int, tail_xid: int) -> None:
    """Write the header copy that `seq` belongs to, and flush."""
    number = volume.super.journal_start + (seq & 1)
    block = new_block(Magic.JHEAD, number, volume.super.uuid)
    JHEAD.codec.pack_into(
        block,
        0,
        *layout.HDR_CODEC.unpack_from(block),
        seq,
        tail_lsn,
        tail_xid,
        volume.super.log_blocks,
    )
    volume.write_block(number, seal(block, 0))
    volume.flush()


def _record_blocks(
    volume: Volume, images: Mapping[int, bytes], lsn: int, xid: int, tail_lsn: int
) -> Iterator[tuple[int, bytes]]:
    """(device block, content) of a record's descriptors and images."""
    homes = sorted(images)
    count = max(1, -(-len(homes) // JDESC_TAGS))
    sealed = [seal(bytearray(images[home]), lsn) for home in homes]
    for index in range(count):
        number = place_of(volume, lsn + index)
        block = new_block(Magic.JDESC, number, volume.super.uuid)
        values = JDESC.unpack(block) | {
            "xid": xid,
            "index": index,
            "ndesc": count,
            "nimages": len(homes),
            "sec": int(time.time()),
            "tail_lsn": tail_lsn,
        }
        tags = b"".join(
            JTAG.codec.pack(home, int.from_bytes(image[4:8], "little"), 0)
            for home, image in zip(
                homes[index * JDESC_TAGS : (index + 1) * JDESC_TAGS],
                sealed[index * JDESC_TAGS : (index + 1) * JDESC_TAGS],
                strict=True,
            )
        )
        JDESC.pack_into(block, 0, values | {"tags": tags})
        yield number, seal(block, lsn)
    for index, image in enumerate(sealed):
        yield place_of(volume, lsn + count + index), image


@dataclass
class Writer:
    """Changes metadata through the log, so that a power cut leaves all of a change or nothing.

    The log is empty between calls. Positions are never used twice: each emptying goes one whole
    turn of the log further.
    """

    volume: Volume
    seq: int
    lsn: int
    xid: int

    @classmethod
    def after_replay(cls, volume: Volume, log: Log) -> Writer:
        """Write the replayed overlay home and empty the log. Header copies are both rewritten."""
        volume.write_home()
        writer = cls(volume, log.seq, log.end_lsn + volume.super.log_blocks, log.next_xid)
        writer._empty()
        if log.damages:
            writer._empty()
        return writer

    def _empty(self) -> None:
        self.seq += 1
        write_header(self.volume, self.seq, self.lsn, self.xid)

    @property
    def capacity(self) -> int:
        """Images that one record may have."""
        return min(GROUP_MAX_IMAGES, self.volume.super.log_blocks // 2)

    def change(self, images: Mapping[int, bytes]) -> None:
        """Write blocks home, atomically; at most `capacity`."""
        assert 0 < len(images) <= self.capacity
        volume = self.volume
        blocks = list(_record_blocks(volume, images, self.lsn, self.xid, self.lsn))
        volume.flush()  # what the new blocks point to
        for number, content in blocks:
            volume.write_block(number, content)
        volume.flush()
        for home in images:
            volume.write_block(home, seal(bytearray(images[home]), self.lsn))
        volume.flush()
        self.lsn += len(blocks) + volume.super.log_blocks
        self.xid += 1
        self._empty()
