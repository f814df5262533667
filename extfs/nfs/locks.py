"""Byte-range locks (RFC 8881 9.1 to 9.6, 18.10 to 18.12).

The core's table decides, where local POSIX locks stand too: a lock-owner of a client is a number
there. What an owner holds is also kept here, as `Ranges`: so that nothing is asked of the core to
know whether a lock stateid has locks, and so that they can be made again after a restart.

Words.
    lock-owner  (client, opaque name); has a `number` from its first lock state to its last
    lock state  what one lock-owner has of one file; one stateid. It belongs to the open that it was
                made from, and ends with it.
    waiter      a lock-owner that was refused a blocking lock and is told when it may try again
                (CB_NOTIFY_LOCK, RFC 8881 20.11)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.stateids import Kind, RecordHead, State
from extfs.nfs.xdr import Reader, Writer

if TYPE_CHECKING:
    from extfs.nfs.opens import FileState, OpenState

__all__ = ["LAST", "LockOwners", "LockState", "Ranges", "denied_body", "last_byte"]

LAST = (1 << 64) - 1
"""The last byte of a range that reaches the end of every file."""
STORED_MAX = 512
"""Locks of one lock state that outlive a restart; of one with more the client is told that it lost
them (ADMIN_REVOKED)."""

_STORED = struct.Struct(">QQI")


def last_byte(offset: int, length: int) -> int:
    """Of a range of LOCK, LOCKT, LOCKU; INVAL when it is empty or overflows (RFC 8881 18.10.3)."""
    if length == n.NFS4_MAXFILELEN:
        return LAST
    if length == 0 or offset + length - 1 > LAST:
        raise NfsError(n.NFS4ERR_INVAL)
    return offset + length - 1


class Ranges:
    """Locks of one owner on one file: disjoint (start, last, write), in order; `last` included."""

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: list[tuple[int, int, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._locks)

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        return iter(self._locks)

    def __len__(self) -> int:
        return len(self._locks)

    def clear(self, start: int, last: int) -> None:
        """Cut [start, last] out; what reaches beyond it remains."""
        kept = []
        for lock in self._locks:
            if lock[1] < start or lock[0] > last:
                kept.append(lock)
                continue
            if lock[0] < start:
                kept.append((lock[0], start - 1, lock[2]))
            if lock[1] > last:
                kept.append((last + 1, lock[1], lock[2]))
        self._locks = kept

    def set(self, start: int, last: int, write: bool) -> None:
        """Lock [start, last] so, whatever was there; neighbours of the same type become one."""
        self.clear(start, last)
        merged = []
        for lock in self._locks:
            if lock[2] == write and lock[0] <= last + 1 and lock[1] + 1 >= start:
                start, last = min(start, lock[0]), max(last, lock[1])
            else:
                merged.append(lock)
        merged.append((start, last, write))
        self._locks = sorted(merged)


class LockState(State):
    """The locks of a lock-owner on a file, made from `opened`."""

    kind = Kind.LOCK
    __slots__ = ("number", "opened", "owner", "ranges")
    file: FileState

    def __init__(
        self, client: Any, file: FileState, other: bytes, owner: bytes, opened: OpenState
    ) -> None:
        super().__init__(client, file, other)
        self.owner = owner
        self.opened = opened
        self.number = 0
        self.ranges = Ranges()

    def to_record(self) -> bytes:
        """See `State`."""
        lost = len(self.ranges) > STORED_MAX
        out = self.begin_record(n.NFS4ERR_ADMIN_REVOKED if lost else self.mark)
        out.fixed(self.opened.other)
        out.opaque(self.owner)
        out.u32(0 if lost else len(self.ranges))
        if not lost:
            for start, last, write in self.ranges:
                out.pack(_STORED, start, last, write)
        return bytes(out.buffer)

    @classmethod
    def from_record(
        cls, record: Reader, client: Any, head: RecordHead, opened: OpenState
    ) -> tuple[LockState, list[tuple[int, int, bool]]]:
        """The lock state, and the locks that it is to have; `record` behind the open's `other`."""
        state = cls(client, opened.file, head.other, record.opaque(n.NFS4_OPAQUE_LIMIT), opened)
        count = record.count(STORED_MAX, _STORED.size)
        stored = [record.unpack(_STORED) for _ in range(count)]
        return state, [(start, last, bool(write)) for start, last, write in stored]


@dataclass(slots=True)
class _Owner:
    number: int
    users: int


class LockOwners:
    """Numbers of lock-owners in the core's table: below 2**63, never used twice."""

    def __init__(self) -> None:
        self._owners: dict[tuple[Any, bytes], _Owner] = {}
        self._names: dict[int, tuple[Any, bytes]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._owners)

    def take(self, client: Any, name: bytes) -> int:
        """The owner's number, for one more user of it."""
        owner = self._owners.get((client, name))
        if owner is None:
            owner = self._owners[client, name] = _Owner(self._next, 0)
            self._names[self._next] = (client, name)
            self._next += 1
        owner.users += 1
        return owner.number

    def put(self, client: Any, name: bytes) -> None:
        """A user ends."""
        owner = self._owners[client, name]
        owner.users -= 1
        if not owner.users:
            del self._owners[client, name]
            del self._names[owner.number]

    def number(self, client: Any, name: bytes) -> int:
        """The owner's number; 0 when it has no locks anywhere: nobody's."""
        owner = self._owners.get((client, name))
        return owner.number if owner is not None else 0

    def numbers(self) -> list[int]:
        """Of all owners."""
        return list(self._names)

    def name(self, number: int) -> tuple[Any, bytes] | None:
        """(client, name) of a number; None: not one of ours."""
        return self._names.get(number)


_DENIED = struct.Struct(">QQIQ")


def denied_body(start: int, last: int, write: bool, clientid: int, owner: bytes) -> bytes:
    """LOCK4denied: who has which lock (RFC 8881 18.10.2)."""
    out = Writer()
    length = n.NFS4_MAXFILELEN if last == LAST else last - start + 1
    out.pack(_DENIED, start, length, n.WRITE_LT if write else n.READ_LT, clientid)
    out.opaque(owner)
    return bytes(out.buffer)
