"""Operations on names and attributes as calls: arguments encoded, results decoded.

A `Call` is an operation with the decoder of its result, so several results of one COMPOUND can be
read one after the other: ``do(session, putrootfh(), lookup(b"a"), getattr_(n.FATTR4_SIZE))``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from extfs.nfs import constants as n
from extfs.nfs.xdr import Reader, Writer
from nfs.wire import ROOT, Session, auth_sys, bitmap, next_result, op, opaque, u32, u64

__all__ = ["ROOT", "Call", "Failed", "auth_sys", "do", "fails", "status_of"]

FATTR4_MODE_UMASK = 81
ANONYMOUS_STATEID = bytes(16)


def nothing(_: Reader) -> None:
    return None


@dataclass(frozen=True)
class Call:
    encoded: bytes
    decode: Callable[[Reader], Any] = nothing


class Failed(Exception):  # noqa: N818
    """The COMPOUND ended with this status, at this call; `body` is the reader behind it."""

    def __init__(self, status: int, index: int, body: Reader) -> None:
        super().__init__(f"{n.STATUS_NAMES.get(status, status)} at {index}")
        self.status = status
        self.index = index
        self.body = body


def do(session: Session, *calls: Call, auth: bytes = ROOT, minor: int = 2) -> list[Any]:
    """The results' values; `Failed` when an operation fails."""
    reply = session.run(*(call.encoded for call in calls), auth=auth, minor=minor)
    values = []
    for index in range(reply.count):
        result = next_result(reply.body)
        if result.status != n.NFS4_OK:
            raise Failed(result.status, index, result.body)
        values.append(calls[index].decode(result.body))
    assert reply.status == n.NFS4_OK
    assert reply.body.done(), "bytes behind the last result"
    return values


def status_of(session: Session, *calls: Call, auth: bytes = ROOT, minor: int = 2) -> str:
    """The name of the COMPOUND's status; a failure must be of its last operation."""
    try:
        do(session, *calls, auth=auth, minor=minor)
    except Failed as failed:
        if failed.index != len(calls) - 1:
            raise
        return n.STATUS_NAMES[failed.status].removeprefix("NFS4ERR_")
    return "OK"


def fails(session: Session, *calls: Call, auth: bytes = ROOT, minor: int = 2) -> Failed:
    try:
        do(session, *calls, auth=auth, minor=minor)
    except Failed as failed:
        return failed
    raise AssertionError("it did not fail")


# ---- filehandles and names ---------------------------------------------------------------------


def putrootfh() -> Call:
    return Call(op(n.OP_PUTROOTFH))


def putpubfh() -> Call:
    return Call(op(n.OP_PUTPUBFH))


def putfh(filehandle: bytes) -> Call:
    return Call(op(n.OP_PUTFH, opaque(filehandle)))


def getfh() -> Call:
    return Call(op(n.OP_GETFH), lambda body: body.opaque(128))


def savefh() -> Call:
    return Call(op(n.OP_SAVEFH))


def restorefh() -> Call:
    return Call(op(n.OP_RESTOREFH))


def lookup(name: bytes) -> Call:
    return Call(op(n.OP_LOOKUP, opaque(name)))


def lookupp() -> Call:
    return Call(op(n.OP_LOOKUPP))


def path(*names: bytes) -> list[Call]:
    return [putrootfh(), *(lookup(name) for name in names)]


def readlink() -> Call:
    return Call(op(n.OP_READLINK), lambda body: body.opaque(4096))


def _flavors(body: Reader) -> list[int]:
    return [body.u32() for _ in range(body.u32())]


def secinfo(name: bytes) -> Call:
    return Call(op(n.OP_SECINFO, opaque(name)), _flavors)


def secinfo_no_name(style: int) -> Call:
    return Call(op(n.OP_SECINFO_NO_NAME, u32(style)), _flavors)


def openattr() -> Call:
    return Call(op(n.OP_OPENATTR, u32(0)))


@dataclass(frozen=True)
class ChangeInfo:
    atomic: bool
    before: int
    after: int


def _change_info(body: Reader) -> ChangeInfo:
    return ChangeInfo(body.boolean(), body.u64(), body.u64())


def _created(body: Reader) -> tuple[ChangeInfo, int]:
    return _change_info(body), body.bitmap()


def create(
    kind: int,
    name: bytes,
    attributes: bytes = b"",
    *,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> Call:
    extra = b""
    if kind == n.NF4LNK:
        extra = opaque(target)
    elif kind in (n.NF4BLK, n.NF4CHR):
        extra = u32(device[0]) + u32(device[1])
    return Call(op(n.OP_CREATE, u32(kind), extra, opaque(name), attributes or fattr({})), _created)


def mkdir(name: bytes, mode: int = 0o755) -> Call:
    return create(n.NF4DIR, name, fattr({n.FATTR4_MODE: u32(mode)}))


def link(name: bytes) -> Call:
    return Call(op(n.OP_LINK, opaque(name)), _change_info)


def remove(name: bytes) -> Call:
    return Call(op(n.OP_REMOVE, opaque(name)), _change_info)


def rename(old: bytes, new: bytes) -> Call:
    return Call(
        op(n.OP_RENAME, opaque(old), opaque(new)),
        lambda body: (_change_info(body), _change_info(body)),
    )


# ---- attributes --------------------------------------------------------------------------------


def fattr(values: dict[int, bytes]) -> bytes:
    """A fattr4 of encoded values."""
    out = Writer()
    out.bitmap(sum(1 << number for number in values))
    out.opaque(b"".join(values[number] for number in sorted(values)))
    return bytes(out.buffer)


def client_time(seconds: int, nseconds: int = 0) -> bytes:
    return struct.pack(">IqI", n.SET_TO_CLIENT_TIME4, seconds, nseconds)


SERVER_TIME = u32(n.SET_TO_SERVER_TIME4)


def owner(number: int) -> bytes:
    return opaque(b"%d" % number)


def _time(body: Reader) -> tuple[int, int]:
    return body.i64(), body.u32()


def _text(body: Reader) -> bytes:
    return body.opaque(1024)


def _types(body: Reader) -> list[int]:
    return [body.u32() for _ in range(body.u32())]


_U32 = Reader.u32
_U64 = Reader.u64
_BOOL = Reader.boolean
_DECODERS: dict[int, Callable[[Reader], Any]] = {
    n.FATTR4_SUPPORTED_ATTRS: Reader.bitmap,
    n.FATTR4_TYPE: _U32,
    n.FATTR4_FH_EXPIRE_TYPE: _U32,
    n.FATTR4_CHANGE: _U64,
    n.FATTR4_SIZE: _U64,
    n.FATTR4_LINK_SUPPORT: _BOOL,
    n.FATTR4_SYMLINK_SUPPORT: _BOOL,
    n.FATTR4_NAMED_ATTR: _BOOL,
    n.FATTR4_FSID: lambda body: (body.u64(), body.u64()),
    n.FATTR4_UNIQUE_HANDLES: _BOOL,
    n.FATTR4_LEASE_TIME: _U32,
    n.FATTR4_RDATTR_ERROR: _U32,
    n.FATTR4_ACLSUPPORT: _U32,
    n.FATTR4_CANSETTIME: _BOOL,
    n.FATTR4_CASE_INSENSITIVE: _BOOL,
    n.FATTR4_CASE_PRESERVING: _BOOL,
    n.FATTR4_CHOWN_RESTRICTED: _BOOL,
    n.FATTR4_FILEHANDLE: lambda body: body.opaque(128),
    n.FATTR4_FILEID: _U64,
    n.FATTR4_FILES_AVAIL: _U64,
    n.FATTR4_FILES_FREE: _U64,
    n.FATTR4_FILES_TOTAL: _U64,
    n.FATTR4_HOMOGENEOUS: _BOOL,
    n.FATTR4_MAXFILESIZE: _U64,
    n.FATTR4_MAXLINK: _U32,
    n.FATTR4_MAXNAME: _U32,
    n.FATTR4_MAXREAD: _U64,
    n.FATTR4_MAXWRITE: _U64,
    n.FATTR4_MODE: _U32,
    n.FATTR4_NO_TRUNC: _BOOL,
    n.FATTR4_NUMLINKS: _U32,
    n.FATTR4_OWNER: _text,
    n.FATTR4_OWNER_GROUP: _text,
    n.FATTR4_RAWDEV: lambda body: (body.u32(), body.u32()),
    n.FATTR4_SPACE_AVAIL: _U64,
    n.FATTR4_SPACE_FREE: _U64,
    n.FATTR4_SPACE_TOTAL: _U64,
    n.FATTR4_SPACE_USED: _U64,
    n.FATTR4_TIME_ACCESS: _time,
    n.FATTR4_TIME_CREATE: _time,
    n.FATTR4_TIME_DELTA: _time,
    n.FATTR4_TIME_METADATA: _time,
    n.FATTR4_TIME_MODIFY: _time,
    n.FATTR4_MOUNTED_ON_FILEID: _U64,
    n.FATTR4_FS_LAYOUT_TYPES: _types,
    n.FATTR4_LAYOUT_TYPES: _types,
    n.FATTR4_LAYOUT_BLKSIZE: _U32,
    n.FATTR4_LAYOUT_ALIGNMENT: _U32,
    n.FATTR4_SUPPATTR_EXCLCREAT: Reader.bitmap,
    n.FATTR4_CLONE_BLKSIZE: _U32,
    n.FATTR4_CHANGE_ATTR_TYPE: _U32,
    n.FATTR4_XATTR_SUPPORT: _BOOL,
    n.FATTR4_OPEN_ARGUMENTS: lambda body: [body.bitmap() for _ in range(5)],
}
READABLE = sum(1 << number for number in _DECODERS)


def read_fattr(body: Reader) -> dict[int, Any]:
    mask = body.bitmap()
    values = Reader(body.opaque(1 << 20))
    found = {
        number: _DECODERS[number](values)
        for number in range(mask.bit_length())
        if mask >> number & 1
    }
    assert values.done(), "values that no attribute of the bitmap explains"
    return found


def getattr_(*attributes: int) -> Call:
    return Call(op(n.OP_GETATTR, bitmap(*attributes)), read_fattr)


def getattr_all() -> Call:
    return getattr_(*_DECODERS)


def setattr_(values: dict[int, bytes], stateid: bytes = ANONYMOUS_STATEID) -> Call:
    return Call(op(n.OP_SETATTR, stateid, fattr(values)), Reader.bitmap)


def verify(values: dict[int, bytes]) -> Call:
    return Call(op(n.OP_VERIFY, fattr(values)))


def nverify(values: dict[int, bytes]) -> Call:
    return Call(op(n.OP_NVERIFY, fattr(values)))


def access(mask: int) -> Call:
    return Call(op(n.OP_ACCESS, u32(mask)), lambda body: (body.u32(), body.u32()))


# ---- READDIR -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    cookie: int
    name: bytes
    attributes: dict[int, Any]


@dataclass(frozen=True)
class Listing:
    entries: list[Entry]
    eof: bool
    verifier: bytes

    @property
    def names(self) -> list[bytes]:
        return [entry.name for entry in self.entries]


def _listing(body: Reader) -> Listing:
    verifier = body.fixed(8)
    entries = []
    while body.boolean():
        entries.append(Entry(body.u64(), body.opaque(255), read_fattr(body)))
    return Listing(entries, body.boolean(), verifier)


def readdir(
    *attributes: int,
    cookie: int = 0,
    verifier: bytes = bytes(8),
    dircount: int = 0,
    maxcount: int = 65536,
) -> Call:
    return Call(
        op(
            n.OP_READDIR,
            u64(cookie),
            verifier,
            u32(dircount),
            u32(maxcount),
            bitmap(*attributes),
        ),
        _listing,
    )
