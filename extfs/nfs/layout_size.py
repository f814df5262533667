"""How much of a file a LAYOUTGET gets: the policy, and the question to the core.

A client that asks for a block will ask for the next one, and each LAYOUTGET costs it a round trip.
On the other hand a grant that nobody needs is in the way of others, and a RW grant of a hole takes
space. So a grant ends where these meet:

    shared with another client  what was asked for, in whole blocks
    the least is all            the same: a client that would not take less of so much knows why
    READ                        at the end of file, or `READ_BYTES` behind what was asked for
    RW, mapped blocks           at the first hole, or `MAPPED_BYTES` behind what was asked for
    RW, reaching the end of file  a power of two near the size of the file, from `APPEND_LEAST` to
                                `APPEND_MOST`: a writer who appends needs as many grants as its file
                                has doubled; blocks behind the end are trimmed after the return
"""

from __future__ import annotations

from dataclasses import dataclass

from extfs.core import BLOCK_SIZE, ExtentState, Filesystem, Iomode, Layout, Prepared
from extfs.core.layouts import EXTENTS_MAX
from extfs.nfs.effects import CoreCall

__all__ = ["Wanted", "asking", "generous_end"]

MIB = 1 << 20
READ_BYTES = 1024 * MIB
MAPPED_BYTES = 1024 * MIB
APPEND_LEAST = MIB
APPEND_MOST = 64 * MIB
ALLOCATED_MOST = 1024 * MIB
"""A RW grant is never longer than this and its least length: it may be all holes."""
SPARE = 16
"""What nobody asked for is at most 1/SPARE of the free blocks."""
FILE_END = (1 << 63) - BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Wanted:
    """loga_iomode, loga_offset, loga_length (None: to the end of file), loga_minlength; bytes."""

    iomode: Iomode
    offset: int
    length: int | None
    least: int

    @property
    def start(self) -> int:
        """The first block's begin."""
        return self.offset - self.offset % BLOCK_SIZE

    @property
    def least_end(self) -> int:
        """Where a grant may not end before."""
        return _up(self.offset + max(self.least, 1))

    def touches(self, start: int, end: int) -> bool:
        """Whether a range is in the way of the least that is wanted."""
        return start < self.least_end and self.start < end


def _up(offset: int) -> int:
    return -(-offset // BLOCK_SIZE) * BLOCK_SIZE


def _asked_end(wanted: Wanted, size: int) -> int:
    """The end of what the client asked for in so many words."""
    end = _up(size if wanted.length is None else wanted.offset + wanted.length)
    if wanted.iomode is Iomode.RW:
        end = min(end, wanted.start + ALLOCATED_MOST)
    return min(max(end, wanted.least_end), FILE_END)


def _append_step(size: int) -> int:
    return int(min(max(1 << max(size - 1, 0).bit_length(), APPEND_LEAST), APPEND_MOST))


def _mapped_end(fs: Filesystem, ino: int, end: int) -> int:
    """Behind the blocks that are mapped from `end` on without a hole."""
    block = end // BLOCK_SIZE
    last = block + MAPPED_BYTES // BLOCK_SIZE
    for extent in fs.map(ino, block, last, holes=True, limit=EXTENTS_MAX // 4):
        if extent.state is ExtentState.HOLE or extent.file > block:
            break
        block = min(extent.file + extent.len, last)
    return block * BLOCK_SIZE


def generous_end(fs: Filesystem, ino: int, wanted: Wanted, alone: bool) -> int:
    """The end of the range to ask the core for; see the module. May read metadata."""
    size = fs.getattr(ino).size
    end = _asked_end(wanted, size)
    if not alone or (wanted.least > BLOCK_SIZE and wanted.least == wanted.length):
        return end
    if wanted.iomode is Iomode.READ:
        return min(max(end, _up(size)), end + READ_BYTES, FILE_END)
    if end < _up(size):
        end = _mapped_end(fs, ino, end)
    if end < _up(size):
        return end
    step = min(_append_step(size), fs.statfs().avail // SPARE * BLOCK_SIZE)
    step = 1 << max(step.bit_length() - 1, 0)
    return min(-(-end // step) * step, FILE_END) if step >= BLOCK_SIZE else end


def asking(
    fs: Filesystem, ino: int, holder: int, wanted: Wanted, limit: int, alone: bool
) -> CoreCall:
    """LAYOUT_GET in the core, of up to `limit` extents. `OSError`, EAGAIN: a conflict, the others
    were recalled. Somebody who is in the way only of what would be generous is not."""
    layouts, start = fs.layouts, wanted.start

    def prepare() -> Prepared[Layout]:
        return layouts.prepare_get(
            ino,
            holder,
            wanted.iomode,
            start,
            generous_end(fs, ino, wanted, alone) - start,
            min_length=wanted.least_end - start,
            recall=True,
            limit=min(limit, EXTENTS_MAX),
        )

    return CoreCall(layouts, prepare)
