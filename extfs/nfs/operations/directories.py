"""READDIR (RFC 8881 18.23).

A cookie is the entry's own, and lives as long as the entry: a listing goes on behind it whatever
happens to the directory meanwhile, so the cookie verifier is always zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import Stat
from extfs.nfs import attributes, credentials, filehandles
from extfs.nfs import constants as n
from extfs.nfs.compound import Operation
from extfs.nfs.errors import NfsError, status_of
from extfs.nfs.operations.names import directory
from extfs.nfs.xdr import Reader, Writer

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.filehandles import Filehandle

__all__ = ["OPERATIONS"]

_VERIFIER = bytes(n.NFS4_VERIFIER_SIZE)
_END_BYTES = 8
"""After the last entry: that there is none more, and whether the directory ends."""

_REPLY_MAX = 65536
"""Bytes of entries in one reply: the server does nothing else while it encodes them."""

_BATCH = 64
_ENTRY = struct.Struct(">IQI")
_U32 = struct.Struct(">I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_RDATTR_ERROR = 1 << n.FATTR4_RDATTR_ERROR


@dataclass(frozen=True, slots=True)
class _Entry:
    """A name; what it leads to is looked up when it is encoded."""

    cookie: int
    name: bytes
    ino: int


def _entries(c: Compound, place: Filehandle, after: int) -> Iterator[_Entry]:
    """The directory's entries behind a cookie, in the order of their cookies."""
    if place.pseudo:
        table = c.service.filehandles.pseudo
        node = table.node(place.ino)
        if node is not None:
            for cookie, name in table.listing(node, c.connection.host):
                if cookie > after:
                    yield _Entry(cookie, name, 0)
        return
    while found := c.service.fs.readdir(place.ino, after, _BATCH):
        for entry in found:
            yield _Entry(entry.cookie, entry.name, entry.ino)
        after = found[-1].cookie


class _Listing:
    """Encodes the attributes of one directory's entries."""

    def __init__(self, c: Compound, place: Filehandle, mask: int) -> None:
        self.c = c
        self.place = place
        self.mask = mask
        self.plan = attributes.plan(c, place, mask)
        self.handles = bool(mask >> n.FATTR4_FILEHANDLE & 1)

    def attributes(self, entry: _Entry) -> bytes | None:
        """The entry's fattr4; None: it is gone."""
        try:
            return self._encode(entry)
        except (NfsError, OSError) as error:
            status = error.status if isinstance(error, NfsError) else status_of(error)
            if status in (n.NFS4ERR_NOENT, n.NFS4ERR_STALE):
                return None
            if not self.plan.mask & _RDATTR_ERROR:
                raise
            out = Writer()
            out.bitmap(_RDATTR_ERROR)
            out.opaque(_U32.pack(status))
            return bytes(out.buffer)

    def _encode(self, entry: _Entry) -> bytes:
        c, place = self.c, self.place
        if place.pseudo:
            return self._elsewhere(filehandles.named(c, place, entry.name))
        found = c.service.fs.getattr(entry.ino)
        crossing = c.service.exports.rooted_at(entry.ino)
        if crossing is not None and crossing is not place.export:
            return self._elsewhere(filehandles.child(c, place, found))
        return self.plan.encode(c, self._handle(found), found)

    def _handle(self, found: Stat) -> Filehandle:
        """The entry's filehandle where it is asked for; nothing else of it is looked at."""
        if not self.handles:
            return self.place
        return self.c.service.filehandles.make(self.place.export, found.ino, found.generation)

    def _elsewhere(self, filehandle: Filehandle) -> bytes:
        plan = attributes.plan(self.c, filehandle, self.mask)
        return plan.encode(self.c, filehandle, filehandles.stat(self.c, filehandle))


def readdir(c: Compound, args: Reader, out: Writer) -> None:
    """READDIR, RFC 8881 18.23."""
    cookie = args.u64()
    verifier = args.fixed(n.NFS4_VERIFIER_SIZE)
    dircount = args.u32()
    maxcount = args.u32()
    mask = args.bitmap()
    current = c.current
    assert current is not None
    directory(c, current)
    credentials.require(c, current.ino, credentials.READ)
    if cookie in (1, 2):
        raise NfsError(n.NFS4ERR_BAD_COOKIE)
    if verifier != _VERIFIER:
        raise NfsError(n.NFS4ERR_NOT_SAME)
    listing = _Listing(c, current, mask)
    room = min(maxcount, c.room(), _REPLY_MAX) - len(_VERIFIER) - _END_BYTES
    if room < 0:
        raise NfsError(n.NFS4ERR_TOOSMALL)
    out.fixed(_VERIFIER)
    eof = _write_entries(listing, cookie, room, dircount, out)
    out.boolean(False)
    out.boolean(eof)


def _write_entries(listing: _Listing, cookie: int, room: int, dircount: int, out: Writer) -> bool:
    """As many entries as fit; whether that is all. NFS4ERR_TOOSMALL: not even one does.

    `dircount`: bytes of names and cookies that the client wants at most, as a hint; 0: any.
    """
    written = 0
    for entry in _entries(listing.c, listing.place, cookie):
        encoded = listing.attributes(entry)
        if encoded is None:
            continue
        name = entry.name
        named = _ENTRY.size + len(name) + len(_PADDING[len(name) & 3])
        room -= named + len(encoded)
        dircount_left = dircount - written - named
        if room < 0 or (dircount and written and dircount_left < 0):
            if not written:
                raise NfsError(n.NFS4ERR_TOOSMALL)
            return False
        out.pack(_ENTRY, 1, entry.cookie, len(name))
        out.fixed(name)
        out.raw(encoded)
        written += named
    return True


OPERATIONS = {n.OP_READDIR: Operation(readdir, filehandle="current")}
