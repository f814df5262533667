"""Marks of operations that are done, for persistent sessions (RFC 8881 2.10.6.5, 18.36.3).

A persistent session promises that a request which is sent again after the server was killed is not
done twice. Whole replies are not stored for that. An operation that must not be done twice leaves a
*mark*, with what its result needs, in the transaction that does it (`extfs.core.Rider`): after a
crash both are there, or neither. The retransmission is executed again, but what has a mark is not:
it is answered from the mark.

Definitions.
    slot's rider  the record of one slot of one session: a request (sequence number, digest of its
                  arguments) and the marks of its operations so far. The next request of the slot
                  that leaves a mark overwrites it: of an older request no answer is owed, for the
                  client has used the slot again.
    ride          one operation on its way to its mark

Which operations leave one, and why the others need none.
    REMOVE, RENAME, LINK, CREATE,      a rider. Executed again they would fail (NOENT, EXIST), or do
    OPEN that makes a file             it to what somebody else has put there meanwhile
    SETXATTR, REMOVEXATTR              a rider: EXIST and NOXATTR, as above
    SETATTR                            a rider for modes, owners and times, lest it undoes what
                                       others changed. A new size is set again, like WRITE
    OPEN, OPEN_DOWNGRADE, LOCK, LOCKU  the state's own record has the request that changed it last
                                       (`Compound.tag`): it is answered as it is, its seqid with it
    CLOSE, DELEGRETURN, FREE_STATEID,  nothing: what is to be ended and is not known any more has
    LAYOUTRETURN                       ended (`Compound.ended`)
    RECLAIM_COMPLETE                   the client's record says that it came
    LAYOUTGET                          nothing: it is granted what it holds; layout seqids skip some
                                       at a restart (`layout_states`)
    WRITE, COMMIT, ALLOCATE,           nothing: the same bytes come to the same place again. Between
    DEALLOCATE, CLONE, COPY,           the two no other request of this client was answered that
    LAYOUTCOMMIT                       depends on this one; who is in a race with it had no answer
                                       that told the order, and locks are held all the time
    DESTROY_SESSION, CREATE_SESSION    their own rules (18.37.3, 18.36.4); records of their own
    all others                         change nothing that outlives the server

The results of operations without a mark are those of now. If one of them fails before an operation
that is done, what the first answer was is not known any more: the request is answered as one whose
reply was not cached (NFS4ERR_RETRY_UNCACHED_REP), which is never wrong.

A request leaves at most `MARKS` marks: another such operation in it is NFS4ERR_TOO_MANY_OPS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from extfs.core import RIDER_BYTES, Rider, Stat
from extfs.nfs import changes
from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.xdr import Writer

__all__ = ["MARKS", "Mark", "Marks", "Place", "Ride", "RiderRecord", "carried", "rider_number"]

T = TypeVar("T")

MARKS = 8
"""Of one request (RIDER_MARKS)."""
SLOT_MAX = 1 << 16
_KIND = 4
_SLOT_BITS = 16

_HEAD = struct.Struct("<QIIII24x")
_MARK = struct.Struct("<HHIQ")
_PLACE = struct.Struct("<QQQqI4x")
_MARK_BYTES = _MARK.size + 2 * _PLACE.size
assert _HEAD.size + MARKS * _MARK_BYTES == RIDER_BYTES


def rider_number(session: int, slot: int) -> int:
    """NFS_RIDER_KEY: the number of a slot's rider; `session` is that of the session's record."""
    return _KIND << 56 | session << _SLOT_BITS | slot


@dataclass(slots=True)
class Place:
    """rider_place_disk: a directory, or the file itself, on both sides of an operation."""

    before: int = 0
    before_value: int = 0
    after: int = 0
    after_sec: int = 0
    after_ns: int = 0

    @property
    def atomic(self) -> bool:
        """Exactly one change between the two looks: it was this one."""
        return self.after - self.before == 1

    @property
    def value_after(self) -> int:
        """Change attribute."""
        return changes.value_of(self.after, self.after_sec, self.after_ns)

    def write(self, out: Writer) -> None:
        """change_info4, as the operation answered it, or would have."""
        out.boolean(self.atomic)
        out.u64(self.before_value)
        out.u64(self.value_after)


@dataclass(slots=True)
class Mark:
    """rider_mark_disk: operation number `op` is done, at `index` of its COMPOUND, to this inode."""

    index: int
    op: int
    generation: int = 0
    ino: int = 0
    places: tuple[Place, Place] = field(default_factory=lambda: (Place(), Place()))

    def encode(self) -> bytes:
        """As it is stored."""
        return _MARK.pack(self.index, self.op, self.generation, self.ino) + b"".join(
            _PLACE.pack(p.before, p.before_value, p.after, p.after_sec, p.after_ns)
            for p in self.places
        )

    @classmethod
    def decode(cls, encoded: bytes, at: int) -> Mark:
        """The mark that is stored at `at`."""
        index, op, generation, ino = _MARK.unpack_from(encoded, at)
        first, second = (
            Place(*_PLACE.unpack_from(encoded, at + _MARK.size + number * _PLACE.size))
            for number in range(2)
        )
        return cls(index, op, generation, ino, (first, second))


@dataclass(slots=True)
class RiderRecord:
    """rider_disk."""

    session: int
    slot: int
    sequence: int
    digest: int
    marks: list[Mark]

    @property
    def number(self) -> int:
        """Of the record."""
        return rider_number(self.session, self.slot)

    def encode(self) -> bytes:
        """As it is stored."""
        head = _HEAD.pack(self.session, self.slot, self.sequence, self.digest, len(self.marks))
        return (head + b"".join(mark.encode() for mark in self.marks)).ljust(RIDER_BYTES, b"\0")

    @classmethod
    def decode(cls, encoded: bytes) -> RiderRecord:
        """`ValueError`: it is none."""
        if len(encoded) != RIDER_BYTES:
            raise ValueError(f"{len(encoded)} bytes")
        session, slot, sequence, digest, count = _HEAD.unpack_from(encoded)
        if not 0 < count <= MARKS or slot >= SLOT_MAX:
            raise ValueError(f"{count} marks of slot {slot}")
        starts = range(_HEAD.size, _HEAD.size + count * _MARK_BYTES, _MARK_BYTES)
        marks = [Mark.decode(encoded, at) for at in starts]
        return cls(session, slot, sequence, digest, marks)


class Marks:
    """Those of one request. `record.marks`: of its last life, if it is sent again; and new ones."""

    __slots__ = ("_known", "_last", "record")

    def __init__(self, record: RiderRecord) -> None:
        self.record = record
        self._known = {mark.index: mark for mark in record.marks}
        self._last = max(self._known, default=-1)

    def done(self, index: int, op: int) -> Mark | None:
        """The mark of an operation that was done before the server was killed."""
        mark = self._known.get(index)
        return mark if mark is not None and mark.op == op else None

    def before_done(self, index: int) -> bool:
        """Whether an operation that is done comes at `index` or later."""
        return index <= self._last

    def ride(self, index: int, op: int) -> Ride:
        """For an operation that is about to be done. `NfsError`: the request has done enough."""
        if len(self.record.marks) >= MARKS:
            raise NfsError(n.NFS4ERR_TOO_MANY_OPS)
        return Ride(self.record, Mark(index, op))


class Ride:
    """An operation whose mark is to be written with it. Its methods may be called in any thread,
    while the operation waits for them."""

    __slots__ = ("_mark", "_record")

    def __init__(self, record: RiderRecord, mark: Mark) -> None:
        self._record = record
        self._mark = mark

    def before(self, place: int, st: Stat) -> None:
        """What a directory is like before."""
        known = self._mark.places[place]
        known.before, known.before_value = st.change, changes.value(st)

    def carry(self, call: Callable[[], T]) -> T:
        """Run one call of the core with the mark in its transaction."""
        record = self._record
        record.marks.append(self._mark)
        try:
            rider = Rider(record.number, record.encode())
            result = rider.carry(call)
        except BaseException:
            record.marks.pop()
            raise
        if rider.written:
            at = _HEAD.size + (len(record.marks) - 1) * _MARK_BYTES
            record.marks[-1] = Mark.decode(rider.part(at, _MARK_BYTES), 0)
        else:  # there was nothing to do, nor will there be
            record.marks.pop()
        return result


def carried(ride: Ride | None, call: Callable[[], T]) -> T:
    """`Ride.carry`, where there is one."""
    return call() if ride is None else ride.carry(call)
