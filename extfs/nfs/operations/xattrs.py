"""GETXATTR, SETXATTR, LISTXATTRS, REMOVEXATTR (RFC 8276).

On the wire names are those of the "user." namespace, without that prefix; no other namespace is
reachable. Attributes belong to regular files and directories, as on Linux.
"""

from __future__ import annotations

import errno
import stat
from bisect import bisect_right
from collections.abc import Callable

from extfs.core import CoreError, Stat
from extfs.nfs import constants as n
from extfs.nfs import credentials, filehandles
from extfs.nfs.changes import CHANGE_INFO_BYTES, ChangeInfo
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.delegations import Conflict
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.riders import carried
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = ["OPERATIONS"]

PREFIX = b"user."
NAME_MAX = 255
"""Bytes, the prefix included."""
VALUE_MAX = 65536
_WIRE_MAX = 1 << 20
"""Bytes of a name or value that is still read, to be refused as too big and not as bad XDR."""

_LIST_AROUND = 20
"""Bytes of a LISTXATTRS result around its names: cookie, count, eof, and to spare."""


def _name(args: Reader) -> bytes:
    """A name with its prefix. INVAL: empty, not UTF-8; NAMETOOLONG (RFC 8276 8.4.1.2)."""
    name = args.opaque(_WIRE_MAX)
    if not name or b"\0" in name:
        raise NfsError(n.NFS4ERR_INVAL)
    if len(PREFIX) + len(name) > NAME_MAX:
        raise NfsError(n.NFS4ERR_NAMETOOLONG)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise NfsError(n.NFS4ERR_INVAL) from None
    return PREFIX + name


def _file(c: Compound, mask: int) -> Stat:
    """The current file: one that may have attributes, with permission `mask` for the user."""
    fh = c.real()
    found = filehandles.stat(c, fh)
    if not (stat.S_ISREG(found.mode) or stat.S_ISDIR(found.mode)):
        raise NfsError(n.NFS4ERR_WRONG_TYPE)
    credentials.require(c, fh.ino, mask)
    return found


def getxattr(c: Compound, args: Reader, out: Writer) -> None:
    """GETXATTR (RFC 8276 8.4.1). NOXATTR; TOOSMALL: the reply has no room for the value."""
    name = _name(args)
    if c.current is not None and c.current.pseudo:
        raise NfsError(n.NFS4ERR_NOXATTR)
    file = _file(c, credentials.READ)
    value = c.service.fs.getxattr(file.ino, name)
    if len(value) + 8 > c.room():
        raise NfsError(n.NFS4ERR_TOOSMALL)
    out.opaque(value)


def _change(c: Compound, out: Writer, op: int, call: Callable[[int], None]) -> Steps[None]:
    """Change attributes of the current file, durably; the result is change_info4."""
    mark = c.done(op)
    if mark is not None:
        mark.places[0].write(out)
        return
    c.writable()
    file = _file(c, credentials.WRITE)
    fs, ino = c.service.fs, file.ino
    if stat.S_ISREG(file.mode):
        c.service.states.about_to_change(c, ino, Conflict.SETATTR)

    ride = c.ride(op)

    def change() -> None:
        carried(ride, lambda: call(ino))
        fs.fsync(ino)

    before = fs.getattr(ino)
    if ride is not None:
        ride.before(0, before)
    yield Blocking(change)
    ChangeInfo(before, fs.getattr(ino)).write(out)


def setxattr(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """SETXATTR (RFC 8276 8.4.2). EXIST, NOXATTR, XATTR2BIG, NOSPC."""
    option = args.u32()
    if option > n.SETXATTR4_REPLACE:
        raise XdrError("no such setxattr_option")
    name = _name(args)
    value = args.opaque(_WIRE_MAX)
    if len(value) > VALUE_MAX:
        raise NfsError(n.NFS4ERR_XATTR2BIG)
    fs = c.service.fs
    create, replace = option == n.SETXATTR4_CREATE, option == n.SETXATTR4_REPLACE

    def set_it(ino: int) -> None:
        try:
            fs.setxattr(ino, name, value, create=create, replace=replace)
        except CoreError as error:
            if error.errno == errno.ERANGE:
                raise NfsError(n.NFS4ERR_XATTR2BIG) from None
            raise

    yield from _change(c, out, n.OP_SETXATTR, set_it)


def _names(c: Compound) -> list[bytes]:
    """Of the current file's attributes, in order; a directory of the pseudo filesystem has none."""
    if c.current is not None and c.current.pseudo:
        return []
    file = _file(c, credentials.READ)
    found = c.service.fs.listxattr(file.ino)
    return sorted(name[len(PREFIX) :] for name in found if name.startswith(PREFIX))


def listxattrs(c: Compound, args: Reader, out: Writer) -> None:
    """LISTXATTRS (RFC 8276 8.4.3).

    The cookie is a number of names that came before, in the order of the names: when names come or
    go between two calls others may be told twice or not, as the RFC has it.
    """
    cookie = args.u64()
    limit = args.u32()
    names = _names(c)
    if cookie > len(names):
        raise NfsError(n.NFS4ERR_BAD_COOKIE)
    room = min(limit, c.room()) - _LIST_AROUND
    ends = []
    used = 0
    for name in names[cookie:]:
        used += 4 + (len(name) + 3 & ~3)
        ends.append(used)
    count = bisect_right(ends, room)
    if room < 0 or (ends and not count):
        raise NfsError(n.NFS4ERR_TOOSMALL)
    out.u64(cookie + count)
    out.u32(count)
    for name in names[cookie : cookie + count]:
        out.opaque(name)
    out.boolean(cookie + count == len(names))


def removexattr(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """REMOVEXATTR (RFC 8276 8.4.4). NOXATTR."""
    name = _name(args)
    fs = c.service.fs
    yield from _change(c, out, n.OP_REMOVEXATTR, lambda ino: fs.removexattr(ino, name))


OPERATIONS = {
    n.OP_GETXATTR: Operation(getxattr, minor=2, filehandle="current"),
    n.OP_SETXATTR: Operation(
        setxattr, minor=2, filehandle="current", reply_bytes=CHANGE_INFO_BYTES
    ),
    n.OP_LISTXATTRS: Operation(listxattrs, minor=2, filehandle="current"),
    n.OP_REMOVEXATTR: Operation(
        removexattr, minor=2, filehandle="current", reply_bytes=CHANGE_INFO_BYTES
    ),
}
