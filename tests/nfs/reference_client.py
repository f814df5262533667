"""A layout client without I/O of its own, with the rules of the Linux kernel's.

Facts of Linux, from fs/nfs/blocklayout (verify_extent, bl_alloc_extent, ext_tree_insert and
ext_tree_mark_written, ext_tree_encode_commit), fs/nfs/pnfs.c (pnfs_layout_process) and
fs/nfs/callback_proc.c (pnfs_check_callback_stateid, initiate_file_draining,
referring_call_exists):

  extents   offsets and lengths are multiples of 512; they tile the range of the layout, in order.
            In a READ layout there are READ_DATA and NONE_DATA only. In a RW layout READ_WRITE_DATA
            and INVALID_DATA tile; READ_DATA may lie over INVALID_DATA, nowhere else, in order.
  trees     writable extents are one tree, readable ones another. What is in a tree stays as it is
            when a later layout overlaps it. A read looks at the readable tree first; a write takes
            its range out of that.
  commits   INVALID_DATA that was written is WRITTEN, with a LAYOUTCOMMIT under way COMMITTING, and
            after it READ_WRITE_DATA. If it fails it is WRITTEN again.
  recalls   a recall whose referring calls are under way is answered DELAY by CB_SEQUENCE; one with
            another stateid BAD_STATEID; one more than one seqid ahead DELAY; one that is not ahead
            OLD_STATEID; one of a range in which there is no segment NOMATCHING_LAYOUT.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from extfs.core import LayoutState
from extfs.nfs import constants as n
from extfs.nfs.stateids import Stateid
from nfs.layout_calls import ALL, BLOCK, READ, RW, Layout, Recall

SECTOR = 512


class Violation(AssertionError):  # noqa: N818
    """The server has broken a rule of the kernel client."""


def _rule(holds: bool, text: str, layout: Layout) -> None:
    if not holds:
        raise Violation(f"{text}: {layout}")


def check_layout(layout: Layout, offset: int, length: int, least: int) -> None:
    """What the kernel would accept, and RFC 8881 18.43 promises, for this request."""
    _rule(layout.offset <= offset, "the first byte is not covered", layout)
    _rule(layout.end >= offset + least, "less than loga_minlength", layout)
    _rule(layout.length > 0 and bool(layout.extents), "empty", layout)
    _rule(layout.end < ALL, "too long", layout)
    if length != ALL:
        _rule(layout.offset < offset + length, "behind the range", layout)
    check_extents(layout)


def check_extents(layout: Layout) -> None:
    """verify_extent() over all of them, and bl_alloc_lseg()'s end."""
    start = inval = cowread = layout.offset
    for e in layout.extents:
        _rule(not (e.offset | e.length | e.storage) % SECTOR, "sectors", layout)
        _rule(not (e.offset | e.length | e.storage) % BLOCK, "blocks", layout)
        _rule(e.length > 0, "an empty extent", layout)
        end = e.offset + e.length
        if layout.iomode == READ:
            readable = e.state in (LayoutState.READ_DATA, LayoutState.NONE_DATA)
            _rule(readable, "writable in a READ layout", layout)
            _rule(e.offset == start, "a gap", layout)
            start = end
        elif e.state is LayoutState.READ_WRITE_DATA:
            _rule(e.offset == start, "a gap", layout)
            _rule(cowread <= start, "a source of a copy over READ_WRITE_DATA", layout)
            start = inval = end
        elif e.state is LayoutState.INVALID_DATA:
            _rule(e.offset == start, "a gap", layout)
            start = end
        else:
            _rule(e.state is LayoutState.READ_DATA, "NONE_DATA in a RW layout", layout)
            _rule(inval <= e.offset <= start and e.offset >= cowread, "sources' order", layout)
            inval += e.length
            cowread = end
    _rule(start == layout.end, "does not end with the range", layout)
    _rule(cowread <= start, "a source without a copy", layout)
    _sources_lie_over_invalid(layout)


def _sources_lie_over_invalid(layout: Layout) -> None:
    if layout.iomode != RW:
        return
    invalid = set()
    for e in layout.extents:
        if e.state is LayoutState.INVALID_DATA:
            invalid.update(range(e.offset, e.offset + e.length, BLOCK))
    for e in layout.extents:
        if e.state is LayoutState.READ_DATA:
            blocks = set(range(e.offset, e.offset + e.length, BLOCK))
            _rule(blocks <= invalid, "a source where nothing is INVALID_DATA", layout)


class Tag(enum.Enum):
    """Of a writable block. VALID: READ_WRITE_DATA."""

    INVALID = 0
    WRITTEN = 1
    COMMITTING = 2
    VALID = 3


@dataclass
class Writable:
    """A block of the writable tree; `storage` is its byte offset on the device."""

    storage: int
    tag: Tag


@dataclass
class Trees:
    """What the client knows of a file's blocks, by file block number."""

    readable: dict[int, int | None] = field(default_factory=dict)
    writable: dict[int, Writable] = field(default_factory=dict)

    def insert(self, layout: Layout) -> None:
        """A layout's extents, where there is nothing in the tree yet."""
        for e in layout.extents:
            for offset in range(0, e.length, BLOCK):
                block = (e.offset + offset) // BLOCK
                if e.state in (LayoutState.READ_DATA, LayoutState.NONE_DATA):
                    hole = e.state is LayoutState.NONE_DATA
                    self.readable.setdefault(block, None if hole else e.storage + offset)
                else:
                    valid = e.state is LayoutState.READ_WRITE_DATA
                    tag = Tag.VALID if valid else Tag.INVALID
                    self.writable.setdefault(block, Writable(e.storage + offset, tag))

    def wrote(self, block: int) -> None:
        """A write of the block has ended."""
        self.readable.pop(block, None)
        entry = self.writable[block]
        if entry.tag is Tag.INVALID:
            entry.tag = Tag.WRITTEN

    def begin_commit(self) -> list[tuple[int, int]]:
        """The ranges of a LAYOUTCOMMIT, in bytes."""
        ranges = []
        for block, entry in sorted(self.writable.items()):
            if entry.tag is Tag.WRITTEN:
                entry.tag = Tag.COMMITTING
                ranges.append((block * BLOCK, BLOCK))
        return ranges

    def end_commit(self, committed: bool) -> None:
        for entry in self.writable.values():
            if entry.tag is Tag.COMMITTING:
                entry.tag = Tag.VALID if committed else Tag.WRITTEN

    def dirty(self) -> bool:
        return any(e.tag in (Tag.WRITTEN, Tag.COMMITTING) for e in self.writable.values())

    def remove(self, start: int, end: int) -> None:
        """Bytes [start, end) were returned."""
        low, high = -(-start // BLOCK), end // BLOCK
        self.readable = {b: s for b, s in self.readable.items() if not low <= b < high}
        self.writable = {b: w for b, w in self.writable.items() if not low <= b < high}

    def clear(self) -> None:
        self.readable.clear()
        self.writable.clear()


@dataclass
class Lseg:
    """A segment that the client believes it has."""

    start: int
    end: int
    iomode: int
    seqid: int


@dataclass
class LayoutHeader:
    """A client's layout of one file. `seqid` is the highest that was seen, `barrier` the seqid of
    the recall that was agreed to: replies of before it are forgotten."""

    other: bytes | None = None
    seqid: int = 0
    barrier: int = 0
    lsegs: list[Lseg] = field(default_factory=list)
    trees: Trees = field(default_factory=Trees)
    seen: set[tuple[bytes, int]] = field(default_factory=set)

    @property
    def stateid(self) -> Stateid | None:
        return None if self.other is None else Stateid(self.seqid, self.other)

    def got(self, layout: Layout) -> bool:
        """A LAYOUTGET's reply. False: it is forgotten, a recall went past it."""
        key = (layout.stateid.other, layout.stateid.seqid)
        if key in self.seen:
            raise Violation(f"a seqid twice: {layout.stateid}")
        self.seen.add(key)
        if self.other is None:
            self.other, self.seqid, self.barrier = layout.stateid.other, 0, 0
        elif self.other != layout.stateid.other:
            return False
        if layout.stateid.seqid <= self.barrier:
            return False
        self.seqid = max(self.seqid, layout.stateid.seqid)
        self.lsegs.append(Lseg(layout.offset, layout.end, layout.iomode, layout.stateid.seqid))
        self.trees.insert(layout)
        return True

    def recalled(self, recall: Recall) -> int:
        """The status that CB_LAYOUTRECALL of the file is answered with."""
        if self.other is None:
            return n.NFS4ERR_NOMATCHING_LAYOUT
        assert recall.stateid is not None
        if recall.stateid.other != self.other:
            return n.NFS4ERR_BAD_STATEID
        if recall.stateid.seqid != self.barrier:
            if recall.stateid.seqid > self.seqid + 1:
                return n.NFS4ERR_DELAY
            if recall.stateid.seqid <= self.seqid:
                return n.NFS4ERR_OLD_STATEID
        self.seqid = self.barrier = recall.stateid.seqid
        end = recall.offset + recall.length
        if any(s.start < end and recall.offset < s.end for s in self.lsegs):
            return n.NFS4_OK
        return n.NFS4ERR_NOMATCHING_LAYOUT

    def returned(self, start: int, end: int, left: Stateid | None) -> None:
        """LAYOUTRETURN of a range has been answered."""
        self.trees.remove(start, end)
        kept = []
        for s in self.lsegs:
            if s.start < start:
                kept.append(Lseg(s.start, min(s.end, start), s.iomode, s.seqid))
            if s.end > end:
                kept.append(Lseg(max(s.start, end), s.end, s.iomode, s.seqid))
        self.lsegs = kept
        if left is None:
            if kept:
                raise Violation(f"no stateid is left, but {kept}")
            self.forget()
        elif left.other != self.other:
            raise Violation(f"another stateid after a return: {left}")
        else:
            self.seqid = max(self.seqid, left.seqid)

    def forget(self) -> None:
        """Everything, without a word."""
        self.other = None
        self.seqid = self.barrier = 0
        self.lsegs.clear()
        self.trees.clear()
