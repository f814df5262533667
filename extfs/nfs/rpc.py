"""Remote procedure calls (RFC 5531) over TCP: records, headers of calls and replies.

A record is a sequence of fragments (RFC 5531 11). A connection whose bytes are no records, or whose
records are no RPC messages, is to be dropped: `RecordError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from extfs.nfs import constants as c
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = [
    "FRAGMENT_HEADER",
    "Call",
    "Credential",
    "RecordError",
    "RecordReader",
    "RejectedError",
    "accepted",
    "marked",
    "read_call",
    "read_reply",
    "reply_head",
    "write_call",
]

FRAGMENT_HEADER = 4
_LAST_FRAGMENT = 0x80000000
_FRAGMENTS_MAX = 64
_AUTH_BYTES_MAX = 400
_MACHINE_NAME_MAX = 255
_GIDS_MAX = 16
"""RFC 5531 8.2 and appendix A: limits of a credential."""

_CREDENTIAL_AT = 32
"""Where the bytes of a call's credential begin, behind their length."""
_CALL = struct.Struct(">IIIIII")
_ACCEPTED = struct.Struct(">IIIIII")
_DENIED_VERSION = struct.Struct(">IIIIII")
_DENIED_AUTH = struct.Struct(">IIIII")


class RecordError(Exception):
    """The peer does not speak this protocol: drop the connection."""


class RecordReader:
    """Puts records of at most `limit` bytes together from what arrives."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._input = bytearray()
        self._record = bytearray()
        self._fragments = 0

    def feed(self, received: bytes | bytearray | memoryview) -> list[bytes]:
        """The records that are complete now, without their marks."""
        buffer = self._input
        if not (buffer or self._record):
            length = len(received) - FRAGMENT_HEADER
            mark = int.from_bytes(received[:FRAGMENT_HEADER])
            if mark == _LAST_FRAGMENT | length and length <= self._limit:
                self._fragments = 0
                return [bytes(received[FRAGMENT_HEADER:])]
        buffer += received
        found: list[bytes] = []
        pos = 0
        while len(buffer) - pos >= FRAGMENT_HEADER:
            mark = int.from_bytes(buffer[pos : pos + FRAGMENT_HEADER], "big")
            length = mark & ~_LAST_FRAGMENT
            if len(self._record) + length > self._limit:
                raise RecordError(f"a record of more than {self._limit} bytes")
            begin, end = pos + FRAGMENT_HEADER, pos + FRAGMENT_HEADER + length
            if len(buffer) < end:
                break
            with memoryview(buffer) as whole:
                fragment = bytes(whole[begin:end])
            pos = end
            self._collect(fragment, last=bool(mark & _LAST_FRAGMENT), found=found)
        if pos:
            del buffer[:pos]
        return found

    def _collect(self, fragment: bytes, *, last: bool, found: list[bytes]) -> None:
        if last and not self._record:
            found.append(fragment)
            self._fragments = 0
            return
        self._record += fragment
        self._fragments += 1
        if self._fragments > _FRAGMENTS_MAX:
            raise RecordError(f"a record of more than {_FRAGMENTS_MAX} fragments")
        if last:
            found.append(bytes(self._record))
            self._record.clear()
            self._fragments = 0

    @property
    def waiting(self) -> int:
        """Bytes kept of a record that is not complete."""
        return len(self._input) + len(self._record)


def marked(record: bytes | bytearray) -> bytes:
    """A record as one fragment."""
    return (_LAST_FRAGMENT | len(record)).to_bytes(4, "big") + record


def reply_head(xid: int, length: int) -> bytes:
    """Mark and header of an accepted reply with results of `length` bytes, which follow."""
    mark = _LAST_FRAGMENT | (_ACCEPTED.size + length)
    return mark.to_bytes(4, "big") + accepted(xid)


@dataclass(frozen=True, slots=True)
class Credential:
    """Who calls, as the client says (AUTH_SYS, RFC 5531 appendix A); AUTH_NONE is nobody."""

    flavor: int
    uid: int
    gid: int
    gids: tuple[int, ...] = ()
    machine: bytes = b""


NOBODY = Credential(c.AUTH_NONE, 65534, 65534)


class RejectedError(Exception):
    """The call is answered with this reply, nothing was executed."""

    def __init__(self, reply: bytes) -> None:
        super().__init__()
        self.reply = reply


@dataclass(slots=True)
class Call:
    """A call: `procedure` of NFSv4 with its arguments at `arguments`."""

    xid: int
    procedure: int
    credential: Credential
    arguments: Reader


def _read_auth_sys(body: bytes) -> Credential:
    reader = Reader(body)
    reader.u32()  # stamp
    machine = reader.opaque(_MACHINE_NAME_MAX)
    uid, gid = reader.u32(), reader.u32()
    gids = tuple(reader.u32() for _ in range(reader.count(_GIDS_MAX)))
    return Credential(c.AUTH_SYS, uid, gid, gids, machine)


def _denied(xid: int, why: int) -> RejectedError:
    return RejectedError(_DENIED_AUTH.pack(xid, c.RPC_REPLY, c.MSG_DENIED, c.RPC_AUTH_ERROR, why))


def _accepted_error(xid: int, status: int, body: bytes = b"") -> RejectedError:
    return RejectedError(accepted(xid, status) + body)


def accepted(xid: int, status: int = c.RPC_SUCCESS) -> bytes:
    """Header of an accepted reply; the results follow."""
    return _ACCEPTED.pack(xid, c.RPC_REPLY, c.MSG_ACCEPTED, c.AUTH_NONE, 0, status)


def _read_credential(xid: int, reader: Reader) -> Credential:
    flavor = reader.u32()
    body = reader.opaque(_AUTH_BYTES_MAX)
    if flavor == c.AUTH_NONE:
        return NOBODY
    if flavor != c.AUTH_SYS:
        raise _denied(xid, c.AUTH_TOOWEAK if flavor == 6 else c.AUTH_REJECTEDCRED)
    try:
        return _read_auth_sys(body)
    except XdrError:
        raise _denied(xid, c.AUTH_BADCRED) from None


_HEADS_MAX = 1024
_heads: dict[bytes, Credential] = {}
"""What stood between xid and arguments of COMPOUNDs that were good, and who it says calls: of one
user the same bytes each time."""


def read_call(record: bytes) -> Call | None:
    """A call of NFSv4 out of a record; None: the record is a reply.

    `RejectedError`: answer with its reply. `RecordError`: not even an RPC message.
    """
    end = _CREDENTIAL_AT + (int.from_bytes(record[_CREDENTIAL_AT - 4 : _CREDENTIAL_AT]) + 3 & ~3)
    end += 8  # the verifier, as everybody sends it: empty
    known = _heads.get(record[4:end])
    if known is not None:
        xid = int.from_bytes(record[:4])
        return Call(xid, c.NFSPROC4_COMPOUND, known, Reader(record, end))
    call = _read_call(record)
    if call is not None and call.procedure == c.NFSPROC4_COMPOUND and call.arguments.pos == end:
        if len(_heads) >= _HEADS_MAX:
            _heads.clear()
        _heads[record[4:end]] = call.credential
    return call


def _read_call(record: bytes) -> Call | None:
    reader = Reader(record)
    try:
        xid, kind = reader.u32(), reader.u32()
        if kind == c.RPC_REPLY:
            return None
        if kind != c.RPC_CALL:
            raise RecordError("neither call nor reply")
        version, program, program_version, procedure = (
            reader.u32(),
            reader.u32(),
            reader.u32(),
            reader.u32(),
        )
        if version != c.RPC_VERSION:
            raise RejectedError(
                _DENIED_VERSION.pack(xid, c.RPC_REPLY, c.MSG_DENIED, c.RPC_MISMATCH, 2, 2)
            )
        credential = _read_credential(xid, reader)
        reader.u32()
        reader.opaque(_AUTH_BYTES_MAX)
    except XdrError as error:
        raise RecordError(str(error)) from None
    if program != c.NFS4_PROGRAM:
        raise _accepted_error(xid, c.RPC_PROG_UNAVAIL)
    if program_version != c.NFS_V4:
        both = struct.pack(">II", c.NFS_V4, c.NFS_V4)
        raise _accepted_error(xid, c.RPC_PROG_MISMATCH, both)
    if procedure not in (c.NFSPROC4_NULL, c.NFSPROC4_COMPOUND):
        raise _accepted_error(xid, c.RPC_PROC_UNAVAIL)
    return Call(xid, procedure, credential, reader)


def read_reply(record: bytes) -> tuple[int, Reader | None]:
    """A reply to a callback: its xid, and where its results are (None: it was not executed)."""
    reader = Reader(record)
    try:
        xid = reader.u32()
        if reader.u32() != c.RPC_REPLY or reader.u32() != c.MSG_ACCEPTED:
            return xid, None
        reader.u32()
        reader.opaque(_AUTH_BYTES_MAX)
        return xid, reader if reader.u32() == c.RPC_SUCCESS else None
    except XdrError as error:
        raise RecordError(str(error)) from None


def write_call(xid: int, program: int, version: int, procedure: int, credential: bytes) -> Writer:
    """A call, to which the arguments are to be appended. `credential`: encoded opaque_auth."""
    out = Writer()
    out.pack(_CALL, xid, c.RPC_CALL, c.RPC_VERSION, program, version, procedure)
    out.raw(credential)
    out.u32(c.AUTH_NONE)
    out.u32(0)
    return out
