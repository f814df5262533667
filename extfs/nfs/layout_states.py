"""A layout state: the stateid of a client's layout of a file, its segments, and its gate.

The rules are numbered in `extfs.nfs.layouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from extfs.nfs import constants as n
from extfs.nfs.effects import Steps, Waiting
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_segments import Received, Segment, Segments
from extfs.nfs.stateids import SEQID_MAX, Kind, RecordHead, State, Stateid

if TYPE_CHECKING:
    from extfs.nfs.layout_recalls import Recall
    from extfs.nfs.opens import FileState
    from extfs.nfs.xdr import Reader

__all__ = ["PARALLEL", "TRY_LATER", "Gate", "LayoutState"]

PARALLEL = 1 << 20
"""VALID_SEQID_RANGE of RFC 8881 12.5.5.2.1.4; more than a client can have under way."""
SKIPPED = 1024
"""Serials between a record and what may have been told since it was written."""
TRY_LATER = bytes(4)
"""logr_will_signal_layout_avail: false; the body of NFS4ERR_LAYOUTTRYLATER."""
GATE_SECONDS = 30.0
"""Nobody is at a gate as long as this: device I/O is."""


class Gate:
    """Many may be inside together, or one alone; who asks to be alone goes before later others."""

    __slots__ = ("_alone", "_inside", "_queue")

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._queue: list[tuple[bool, Waiting]] = []

    @property
    def idle(self) -> bool:
        """Nobody is inside, nobody waits."""
        return not (self._inside or self._alone or self._queue)

    def enter(self, *, alone: bool = False) -> Steps[None]:
        """Wait until it may be entered, and do. `NfsError` DELAY: it took too long."""
        if not self._queue and self._may(alone):
            self._take(alone)
            return
        place = (alone, Waiting(GATE_SECONDS))
        self._queue.append(place)
        if not (yield place[1]):
            self._queue.remove(place)
            self._next()
            raise NfsError(n.NFS4ERR_DELAY)

    def leave(self, *, alone: bool = False) -> None:
        """Out; whoever can come in now does."""
        if alone:
            self._alone = False
        else:
            self._inside -= 1
        self._next()

    def _may(self, alone: bool) -> bool:
        return not self._alone and not (alone and self._inside)

    def _take(self, alone: bool) -> None:
        if alone:
            self._alone = True
        else:
            self._inside += 1

    def _next(self) -> None:
        while self._queue and self._may(self._queue[0][0]):
            alone, waiting = self._queue.pop(0)
            self._take(alone)
            waiting.wake()


class LayoutState(State):
    """See the module. `fh` is the filehandle that the client knows the file by; `layout_type` one
    of LAYOUT4_*, which a state has for as long as it is.

    After a restart of the server the serial is a guess until the client has shown its stateid
    (`known`), and seqids that look too new are learnt (`restored`): they are not durable.
    `wanted`: ranges (start, end) that the core wants back.
    """

    kind = Kind.LAYOUT
    __slots__ = (
        "export",
        "fh",
        "gate",
        "known",
        "layout_type",
        "recall",
        "recorded",
        "restored",
        "segments",
        "serial",
        "skipped",
        "wanted",
    )
    file: FileState

    def __init__(
        self,
        client: Any,
        file: FileState,
        other: bytes,
        fh: bytes,
        export: int,
        layout_type: int = n.LAYOUT4_BLOCK_VOLUME,
    ) -> None:
        super().__init__(client, file, other)
        self.layout_type = layout_type
        self.serial = self.recorded = 0
        self.fh = fh
        self.export = export
        self.known = True
        self.restored = False
        self.skipped = False
        self.segments = Segments()
        self.wanted: list[tuple[int, int]] = []
        self.recall: Recall | None = None
        self.gate = Gate()

    # -- seqids --

    def bump(self) -> Stateid:
        """The next serial (invariant 2)."""
        self.serial += 1
        stateid = self.stateid_of(self.serial)
        self.seqid = stateid.seqid
        return stateid

    def bump_for_reply(self) -> tuple[Stateid, bool]:
        """The same for LAYOUTGET and LAYOUTRETURN; and whether the record is to be written anew.

        The first one after a restart leaves out all that may have been told since the record was
        written, and that the client has not shown yet.
        """
        if self.restored and not self.skipped:
            self.serial += SKIPPED
            self.skipped = True
        stateid = self.bump()
        outdated = self.serial >= self.recorded + SKIPPED // 2
        if outdated:
            self.recorded = self.serial
        return stateid, outdated

    def stateid_of(self, serial: int) -> Stateid:
        """As the client was told it with this serial."""
        return Stateid((serial - 1) % SEQID_MAX + 1, self.other)

    def serial_of(self, seqid: int) -> int:
        """The serial that a client means. `NfsError`: invariant 3."""
        if not seqid:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        if self.restored and (seqid - self.seqid) % SEQID_MAX < SEQID_MAX // 2:
            self.serial = self.seqid = seqid
            self.known = True
        behind = (self.seqid - seqid) % SEQID_MAX
        if behind > SEQID_MAX // 2:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        if behind > PARALLEL or behind >= self.serial:
            raise NfsError(n.NFS4ERR_OLD_STATEID)
        return self.serial - behind

    def check(self, client: Any, seqid: int, ino: int | None) -> None:
        """As `State.check`, with the rules for seqids of layouts."""
        if self.client is not client:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        if self.mark:
            raise NfsError(self.mark)
        self.serial_of(seqid)
        if ino is not None and self.file.ino != ino:
            raise NfsError(n.NFS4ERR_BAD_STATEID)

    # -- over a restart of the server --

    def to_record(self) -> bytes:
        """See `State`. Segments are the core's to remember; the seqid is not worth a transaction
        for each LAYOUTGET: see `bump_for_reply`."""
        out = self.begin_record(self.mark)
        out.opaque(self.fh)
        out.u32(self.export)
        out.u32(self.layout_type)
        return bytes(out.buffer)

    @classmethod
    def from_record(
        cls, record: Reader, client: Any, file: FileState, head: RecordHead
    ) -> LayoutState:
        """The state, without segments. Records of before there were two types do not say theirs."""
        fh, export = record.opaque(n.NFS4_FHSIZE), record.u32()
        layout_type = n.LAYOUT4_BLOCK_VOLUME if record.done() else record.u32()
        state = cls(client, file, head.other, fh, export, layout_type)
        state.serial = state.seqid = state.recorded = head.seqid
        state.known, state.restored = False, True
        return state

    # -- segments --

    def add(self, segment: Segment) -> None:
        """A new one; it takes the place of what it overlaps (invariant 4)."""
        self.segments.add(segment)

    def takes(
        self, start: int, end: int, iomode: int, serial: int, *, proven: bool = False
    ) -> list[Segment]:
        """Parts of segments that a return of the range takes away (invariants 8 and 9)."""
        return self.segments.takes(start, end, iomode, serial, proven=proven)

    def remove(self, parts: Sequence[Segment]) -> None:
        """What `takes` said, after the core has taken it."""
        self.segments.remove(parts)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether there is a segment in the range."""
        return any(True for _ in self.segments.overlapping(start, end))

    def unproven(self) -> list[Received]:
        """Replies that a callback has to refer to (invariant 7)."""
        return self.segments.unproven()
