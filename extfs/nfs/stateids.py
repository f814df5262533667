"""Stateids (RFC 8881 8.2): their form, the special ones, and what every state has.

A stateid is a seqid and 12 bytes `other`: the epoch of the server that made it (4 bytes) and a
number (8 bytes). `other` names a state for as long as it exists; the seqid counts its changes.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.xdr import Reader, Writer

if TYPE_CHECKING:
    from extfs.nfs.opens import FileState

__all__ = [
    "ANONYMOUS",
    "BYPASS",
    "CURRENT",
    "INVALID",
    "Kind",
    "RecordHead",
    "State",
    "Stateid",
    "check_seqid",
    "is_special",
    "next_seqid",
    "read_stateid",
    "write_stateid",
]

SEQID_MAX = 0xFFFFFFFF
_STATEID = struct.Struct(">I12s")
_HEAD = struct.Struct(">12sIIQI")


@dataclass(frozen=True, slots=True)
class Stateid:
    """stateid4."""

    seqid: int
    other: bytes


_ZEROS = bytes(n.NFS4_OTHER_SIZE)
_ONES = b"\xff" * n.NFS4_OTHER_SIZE

# RFC 8881 8.2.3
ANONYMOUS = Stateid(0, _ZEROS)
BYPASS = Stateid(SEQID_MAX, _ONES)
CURRENT = Stateid(1, _ZEROS)
INVALID = Stateid(SEQID_MAX, _ZEROS)


def read_stateid(args: Reader) -> Stateid:
    """A stateid4."""
    seqid, other = args.unpack(_STATEID)
    return Stateid(seqid, other)


def write_stateid(out: Writer, stateid: Stateid) -> None:
    """A stateid4."""
    out.pack(_STATEID, stateid.seqid, stateid.other)


def is_special(stateid: Stateid) -> bool:
    """Whether `other` is reserved: no state is named so."""
    return stateid.other in (_ZEROS, _ONES)


def next_seqid(seqid: int) -> int:
    """The seqid after this one; zero is left out (RFC 8881 8.2.2)."""
    return 1 if seqid == SEQID_MAX else seqid + 1


def check_seqid(given: int, current: int) -> int:
    """NFS4_OK, OLD_STATEID or BAD_STATEID (RFC 8881 8.2.2). Zero means the newest."""
    if given in (0, current):
        return n.NFS4_OK
    behind = (current - given) & SEQID_MAX
    return n.NFS4ERR_OLD_STATEID if behind < 1 << 31 else n.NFS4ERR_BAD_STATEID


class Kind(enum.IntEnum):
    """What a stateid stands for."""

    OPEN = 1
    LOCK = 2
    DELEGATION = 3
    LAYOUT = 4


@dataclass(frozen=True, slots=True)
class RecordHead:
    """What the record of every state of a file begins with."""

    other: bytes
    seqid: int
    mark: int
    ino: int
    generation: int

    @classmethod
    def read(cls, record: Reader) -> RecordHead:
        """`XdrError`: it is too short."""
        return cls(*record.unpack(_HEAD))


class State:
    """What a stateid names.

    `mark` is NFS4_OK while the state is good; a revoked one keeps the status that says so
    (ADMIN_REVOKED, EXPIRED, DELEG_REVOKED) until the client frees it (RFC 8881 8.3, 18.38).
    `file` is None for a state that is about no file. `tag`: which operation of which request in a
    persistent session changed it last (`Compound.tag`).
    """

    kind: ClassVar[Kind]
    __slots__ = ("client", "file", "mark", "other", "seqid", "tag")

    def __init__(self, client: Any, file: FileState | None, other: bytes) -> None:
        self.client = client
        self.file = file
        self.other = other
        self.seqid = 1
        self.mark = n.NFS4_OK
        self.tag = b""

    def stateid(self) -> Stateid:
        """As the client is to know it now."""
        return Stateid(self.seqid, self.other)

    def bump(self) -> Stateid:
        """After a change: the next seqid."""
        self.seqid = next_seqid(self.seqid)
        return Stateid(self.seqid, self.other)

    @property
    def urgent(self) -> bool:
        """Whether it is to be durable before the client is told (see records.py)."""
        return True

    def to_record(self) -> bytes:
        """What is to be known of it after a restart, for a client that is kept over one.

        A `RecordHead` and what the kind of state has; read again by ``from_record``.
        """
        raise NotImplementedError

    def begin_record(self, mark: int) -> Writer:
        """The head of a record."""
        assert self.file is not None
        out = Writer()
        out.pack(_HEAD, self.other, self.seqid, mark, self.file.ino, self.file.generation)
        return out

    def check(self, client: Any, seqid: int, ino: int | None) -> None:
        """RFC 8881 8.2.4 but for the kind: whose it is, whether it is good, seqid, file."""
        if self.client is not client:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        if self.mark:
            raise NfsError(self.mark)
        status = check_seqid(seqid, self.seqid)
        if status:
            raise NfsError(status)
        if ino is not None and (self.file is None or self.file.ino != ino):
            raise NfsError(n.NFS4ERR_BAD_STATEID)
