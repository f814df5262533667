"""Names of files (component4, RFC 8881 14) as they come from clients."""

from __future__ import annotations

from extfs.core import ROOT_INODE
from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.xdr import Reader

__all__ = ["NAME_MAX", "component", "creatable", "is_utf8"]

NAME_MAX = 255
_WIRE_MAX = 65536
"""Bytes of a name that is still read, to be refused as too long and not as bad XDR."""

RESERVED = b".extfs"
"""In the root of the local mount this is the control directory; the core does not have it."""

# Code points that are no characters (Unicode 23.7) of the basic plane's end; no text has them.
_NONCHARACTERS = (b"\xef\xbf\xbe", b"\xef\xbf\xbf")


def is_utf8(text: bytes) -> bool:
    """Whether this is UTF-8 of characters (utf8str_cs, RFC 8881 14)."""
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return not any(code in text for code in _NONCHARACTERS)


def component(reader: Reader) -> bytes:
    """A name out of the arguments.

    NFS4ERR_INVAL: empty, or not UTF-8. NFS4ERR_NAMETOOLONG. NFS4ERR_BADNAME: "." and "..".
    NFS4ERR_BADCHAR: a slash or a NUL in it.
    """
    name = reader.opaque(_WIRE_MAX)
    if not name:
        raise NfsError(n.NFS4ERR_INVAL)
    if len(name) > NAME_MAX:
        raise NfsError(n.NFS4ERR_NAMETOOLONG)
    if not is_utf8(name):
        raise NfsError(n.NFS4ERR_INVAL)
    if name in (b".", b".."):
        raise NfsError(n.NFS4ERR_BADNAME)
    if b"/" in name or b"\0" in name:
        raise NfsError(n.NFS4ERR_BADCHAR)
    return name


def creatable(directory: int, name: bytes) -> bytes:
    """A name that is to appear in a directory. NFS4ERR_ACCESS: it is reserved there."""
    if directory == ROOT_INODE and name == RESERVED:
        raise NfsError(n.NFS4ERR_ACCESS)
    return name
