"""CLONE and COPY, which share blocks where they can; what there is not of server-side copy.

A COPY is done when it is answered, whatever the client would have liked: so there is nothing to be
cancelled or asked about, and OFFLOAD_CANCEL and OFFLOAD_STATUS are not supported. Nor are copies
between servers (COPY_NOTIFY) and WRITE_SAME.
"""

from __future__ import annotations

import struct

from extfs.core import BLOCK_SIZE
from extfs.nfs import constants as n
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.filehandles import Filehandle
from extfs.nfs.operations.contents import check_range, may_read, may_write
from extfs.nfs.stateids import read_stateid
from extfs.nfs.xdr import Reader, Writer

__all__ = ["OPERATIONS"]

COPY_BYTES_MAX = 256 << 20
"""Of one COPY: the client goes on where it ends (RFC 7862 15.2.3)."""
COPY_BYTES_MOVED = 16 << 20
"""The same where blocks cannot be shared: bytes are moved, in one of the server's threads."""

_SERVERS_MAX = 64
_COPIED = struct.Struct(">IQI8sII")
_RANGES = struct.Struct(">QQQ")


def _files(c: Compound) -> tuple[Filehandle, Filehandle]:
    """Source (the saved filehandle) and destination: regular files of one export."""
    source, target = c.saved, c.regular()
    assert source is not None
    c.current = source
    try:
        c.regular()
    finally:
        c.current = target
    if source.export is not target.export:
        raise NfsError(n.NFS4ERR_XDEV)
    return source, target


def _check_overlap(
    source: Filehandle, target: Filehandle, offset: int, to: int, length: int
) -> None:
    if source.ino == target.ino and offset < to + length and to < offset + length:
        raise NfsError(n.NFS4ERR_INVAL)


def clone(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """CLONE (RFC 7862 15.13): all of the range, sharing all of its blocks."""
    from_stateid = read_stateid(args)
    to_stateid = read_stateid(args)
    offset, to, length = args.unpack(_RANGES)
    source, target = _files(c)
    may_read(c, from_stateid, source)
    may_write(c, to_stateid, target)
    fs = c.service.fs
    size = fs.getattr(source.ino).size
    if offset > size or (length and offset + length > size):
        raise NfsError(n.NFS4ERR_INVAL)
    length = length or size - offset
    check_range(to, length)
    to_the_end = offset + length == size
    if offset % BLOCK_SIZE or to % BLOCK_SIZE or (length % BLOCK_SIZE and not to_the_end):
        raise NfsError(n.NFS4ERR_INVAL)
    _check_overlap(source, target, offset, to, length)
    kill_priv = c.user().uid != 0

    def clone_it() -> None:
        done = fs.clone(
            source.ino, offset, target.ino, to, length, kill_priv=kill_priv, nowait=True
        )
        if done < length:
            raise NfsError(n.NFS4ERR_DELAY)  # the source was cut off meanwhile
        fs.fsync(target.ino)

    if length:
        yield Blocking(clone_it)


def copy(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """COPY (RFC 7862 15.2), within this server, synchronous and in order; it may be short."""
    from_stateid = read_stateid(args)
    to_stateid = read_stateid(args)
    offset, to, length = args.unpack(_RANGES)
    args.boolean()  # consecutive: always
    args.boolean()  # synchronous: always
    if args.count(_SERVERS_MAX):
        raise NfsError(n.NFS4ERR_NOTSUPP)
    source, target = _files(c)
    may_read(c, from_stateid, source)
    may_write(c, to_stateid, target)
    fs = c.service.fs
    size = fs.getattr(source.ino).size
    if offset > size or (length and offset + length > size):
        raise NfsError(n.NFS4ERR_INVAL)
    length = length or size - offset
    check_range(to, length)
    _check_overlap(source, target, offset, to, length)
    length = min(length, COPY_BYTES_MOVED if (offset - to) % BLOCK_SIZE else COPY_BYTES_MAX)
    kill_priv = c.user().uid != 0

    def copy_it() -> int:
        done = fs.copy(source.ino, offset, target.ino, to, length, kill_priv=kill_priv, nowait=True)
        fs.fsync(target.ino)
        return done

    done = 0
    if length:
        done = yield Blocking(copy_it)
        c.service.count("copied_bytes", done)
    # write_response4 without a callback's stateid, then copy_requirements4.
    out.pack(_COPIED, 0, done, n.FILE_SYNC4, c.service.states.verifier, 1, 1)


def _not_supported(c: Compound, args: Reader, out: Writer) -> None:
    """See the module."""
    raise NfsError(n.NFS4ERR_NOTSUPP)


OPERATIONS = {
    n.OP_CLONE: Operation(clone, minor=2, filehandle="both"),
    n.OP_COPY: Operation(copy, minor=2, filehandle="both", reply_bytes=_COPIED.size),
    n.OP_COPY_NOTIFY: Operation(_not_supported, minor=2),
    n.OP_OFFLOAD_CANCEL: Operation(_not_supported, minor=2),
    n.OP_OFFLOAD_STATUS: Operation(_not_supported, minor=2),
    n.OP_WRITE_SAME: Operation(_not_supported, minor=2),
}
