"""READDIR (RFC 8881 18.23).

A cookie is the entry's own, and lives as long as the entry: a listing goes on behind it whatever
happens to the directory meanwhile, so the cookie verifier is always zero.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from extfs.core import Dirent, Filesystem, Stat
from extfs.nfs import attributes, credentials, filehandles
from extfs.nfs import constants as n
from extfs.nfs.compound import Operation
from extfs.nfs.effects import Blocking, Steps
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

_ENTRY = struct.Struct(">IQI")
_ENTRY_GUESS = 160
"""Bytes that an entry has in a reply as Linux asks for it, to know how many to read at once."""
_BATCH_MIN, _BATCH_MAX = 16, 512
_U32 = struct.Struct(">I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_RDATTR_ERROR = 1 << n.FATTR4_RDATTR_ERROR

_Found = tuple[Dirent, Stat | OSError]
"""An entry of a real directory, and its inode's attributes or why there are none."""


def _fetch(fs: Filesystem, directory_ino: int, after: int, limit: int) -> list[_Found]:
    """Entries behind a cookie. May block: nobody knows whether they are in memory."""
    found: list[_Found] = []
    for entry in fs.readdir(directory_ino, after, limit):
        try:
            found.append((entry, fs.getattr(entry.ino)))
        except OSError as error:
            found.append((entry, error))
    return found


class _Listing:
    """Encodes entries of one directory into a reply as long as they fit."""

    def __init__(
        self, c: Compound, place: Filehandle, mask: int, room: int, dircount: int, out: Writer
    ) -> None:
        self.c = c
        self.place = place
        self.mask = mask
        self.room = room
        self.dircount = dircount
        self.out = out
        self.named = 0
        """Bytes of names and cookies so far."""
        self.plan = attributes.plan(c, place, mask)
        self.handles = bool(mask >> n.FATTR4_FILEHANDLE & 1)

    def put(self, cookie: int, name: bytes, encode: Callable[[], bytes]) -> bool:
        """Append an entry; False: no more fit. NFS4ERR_TOOSMALL: not even one does."""
        encoded = self._attributes(encode)
        if encoded is None:
            return True  # it is gone
        named = _ENTRY.size + len(name) + len(_PADDING[len(name) & 3])
        size = named + len(encoded)
        full = self.dircount and self.named and self.named + named > self.dircount
        if size > self.room or full:
            if not self.named:
                raise NfsError(n.NFS4ERR_TOOSMALL)
            return False
        self.room -= size
        self.named += named
        self.out.pack(_ENTRY, 1, cookie, len(name))
        self.out.fixed(name)
        self.out.raw(encoded)
        return True

    def _attributes(self, encode: Callable[[], bytes]) -> bytes | None:
        """A fattr4; of an entry that fails just the error, if it was asked for; None: gone."""
        try:
            return encode()
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

    def real(self, found: Stat | OSError) -> bytes:
        """Attributes of an entry of a real directory."""
        if isinstance(found, OSError):
            raise found
        c, place = self.c, self.place
        crossing = c.service.exports.rooted_at(found.ino)
        if crossing is not None and crossing is not place.export:
            return self._elsewhere(filehandles.child(c, place, found))
        filehandle = place  # where it is not asked for, no more than its export is looked at
        if self.handles:
            filehandle = c.service.filehandles.make(place.export, found.ino, found.generation)
        return self.plan.encode(c, filehandle, found)

    def pseudo(self, name: bytes) -> bytes:
        """Attributes of an entry of a pseudo directory."""
        return self._elsewhere(filehandles.named(self.c, self.place, name))

    def _elsewhere(self, filehandle: Filehandle) -> bytes:
        plan = attributes.plan(self.c, filehandle, self.mask)
        return plan.encode(self.c, filehandle, filehandles.stat(self.c, filehandle))


def _list_pseudo(listing: _Listing, after: int) -> bool:
    """Whether that was all."""
    c, place = listing.c, listing.place
    table = c.service.filehandles.pseudo
    node = table.node(place.ino)
    entries = table.listing(node, c.connection.host) if node is not None else []
    return all(
        listing.put(cookie, name, partial(listing.pseudo, name))
        for cookie, name in entries
        if cookie > after
    )


def _list_real(listing: _Listing, after: int) -> Steps[bool]:
    """Whether that was all."""
    fs, ino = listing.c.service.fs, listing.place.ino
    while True:
        limit = min(max(listing.room // _ENTRY_GUESS, _BATCH_MIN), _BATCH_MAX)
        batch: list[_Found] = yield Blocking(partial(_fetch, fs, ino, after, limit))
        for entry, found in batch:
            if not listing.put(entry.cookie, entry.name, partial(listing.real, found)):
                return False
            after = entry.cookie
        if len(batch) < limit:
            return True


def readdir(c: Compound, args: Reader, out: Writer) -> Steps[None]:
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
    room = min(maxcount, c.room(), _REPLY_MAX) - len(_VERIFIER) - _END_BYTES
    if room < 0:
        raise NfsError(n.NFS4ERR_TOOSMALL)
    out.fixed(_VERIFIER)
    listing = _Listing(c, current, mask, room, dircount, out)
    if current.pseudo:
        eof = _list_pseudo(listing, cookie)
    else:
        eof = yield from _list_real(listing, cookie)
    out.boolean(False)
    out.boolean(eof)


OPERATIONS = {n.OP_READDIR: Operation(readdir, filehandle="current")}
