"""What a client was granted of one file: segments, in order of their place in the file.

Those of one iomode never overlap (invariant 4 of layouts.py), so each iomode has a list sorted by
start, and whoever asks for a range touches what lies in it and a logarithm of the rest: a client
may hold tens of thousands of segments of a file that is written here and there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from extfs.core import Iomode
from extfs.nfs.callbacks import Referring

if TYPE_CHECKING:
    from extfs.nfs.service import Service
    from extfs.nfs.sessions import Session, Slot

__all__ = ["Received", "Segment", "Segments", "merged"]

PRUNED_AT = 64
"""Replies that are not known to be received, before those that are by now are dropped."""

_start = attrgetter("start")


class Received:
    """The reply to a request, and whether the client is known to have it."""

    __slots__ = ("_known", "_sequence", "_service", "_session", "_slot")

    def __init__(self, service: Service, session: Session, slot: Slot) -> None:
        self._service = service
        self._session = session
        self._slot = slot
        self._sequence = slot.sequence
        self._known = False

    def proven(self) -> bool:
        """Once true it stays so."""
        if not self._known:
            self._known = (
                self._slot.sequence != self._sequence
                or self._service.sessions.get(self._session.id) is not self._session
            )
        return self._known

    def settled(self) -> None:
        """The client has answered a callback that referred to it: it has received it, or never
        will believe that it did (RFC 8881 2.10.6.3)."""
        self._known = True

    def referring(self) -> Referring:
        """For callbacks about what it said."""
        return Referring(self._session.id, self._sequence, self._session.slots.index(self._slot))


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes [start, end) of a file, of the layout with this serial, told by `reply` (None: proven
    long ago)."""

    start: int
    end: int
    iomode: Iomode
    serial: int
    reply: Received | None = None

    def cut(self, start: int, end: int) -> Segment:
        """The part in [start, end), which is not empty."""
        return Segment(
            max(start, self.start), min(end, self.end), self.iomode, self.serial, self.reply
        )

    def outside(self, start: int, end: int) -> list[Segment]:
        """What lies outside of [start, end): two parts at most."""
        parts = []
        if self.start < start:
            parts.append(self.cut(self.start, start))
        if end < self.end:
            parts.append(self.cut(end, self.end))
        return parts


class Segments:
    """The segments of one client and file."""

    __slots__ = ("_by_iomode", "_replies")

    def __init__(self) -> None:
        self._by_iomode: dict[Iomode, list[Segment]] = {}
        self._replies: dict[int, Received] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_iomode.values()))

    def __iter__(self) -> Iterator[Segment]:
        """All, by iomode and place."""
        for segments in self._by_iomode.values():
            yield from segments

    def clear(self) -> None:
        """Nothing any more."""
        self._by_iomode.clear()
        self._replies.clear()

    @staticmethod
    def _within(segments: list[Segment], start: int, end: int) -> slice:
        """Those that overlap [start, end), which may be empty."""
        if start >= end:
            return slice(0, 0)
        low = bisect_left(segments, start, key=_start)
        if low and segments[low - 1].end > start:
            low -= 1
        return slice(low, max(low, bisect_left(segments, end, key=_start)))

    def has(self, iomode: Iomode) -> bool:
        """Whether there is any of this iomode."""
        return bool(self._by_iomode.get(iomode))

    def add(self, segment: Segment) -> None:
        """A new one; it takes the place of what it overlaps."""
        segments = self._by_iomode.setdefault(segment.iomode, [])
        where = self._within(segments, segment.start, segment.end)
        kept = [part for old in segments[where] for part in old.outside(segment.start, segment.end)]
        kept.append(segment)
        kept.sort(key=_start)
        segments[where] = kept
        if segment.reply is not None:
            self._replies[id(segment.reply)] = segment.reply
            if len(self._replies) >= PRUNED_AT:
                self.unproven()

    def overlapping(self, start: int, end: int) -> Iterator[Segment]:
        """Whole segments that overlap the range."""
        for segments in self._by_iomode.values():
            yield from segments[self._within(segments, start, end)]

    def takes(
        self, start: int, end: int, iomode: int, serial: int, *, proven: bool = False
    ) -> list[Segment]:
        """Parts of segments that a return of the range takes away (invariants 8 and 9)."""
        return [
            segment.cut(start, end)
            for segment in self.overlapping(start, end)
            if segment.serial <= serial
            and segment.iomode & iomode
            and not (proven and segment.reply is not None and not segment.reply.proven())
        ]

    def remove(self, parts: Sequence[Segment]) -> None:
        """What `takes` said, after the core has taken it; what came since stays."""
        for part in parts:
            segments = self._by_iomode.get(part.iomode, [])
            where = self._within(segments, part.start, part.end)
            kept: list[Segment] = []
            for old in segments[where]:
                same = old.serial == part.serial
                kept += old.outside(part.start, part.end) if same else [old]
            segments[where] = kept

    def unproven(self) -> list[Received]:
        """Replies that are not known to be received, in the order in which they were sent."""
        self._replies = {key: reply for key, reply in self._replies.items() if not reply.proven()}
        return list(self._replies.values())


def merged(parts: Sequence[Segment]) -> list[Segment]:
    """Fewer calls of the core: neighbours of one iomode joined."""
    joined: list[Segment] = []
    for part in sorted(parts, key=lambda p: (p.iomode, p.start)):
        last = joined[-1] if joined else None
        if last is not None and last.iomode is part.iomode and last.end == part.start:
            joined[-1] = Segment(last.start, part.end, part.iomode, part.serial, part.reply)
        else:
            joined.append(part)
    return joined
