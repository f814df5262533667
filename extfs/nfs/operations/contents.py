"""READ, WRITE, COMMIT, and of 4.2 ALLOCATE, DEALLOCATE, SEEK, READ_PLUS, IO_ADVISE.

This is the way for clients without the disk, and for what a client sends back to the server. The
core recalls layouts that are in the way; those calls fail with EAGAIN meanwhile: NFS4ERR_DELAY.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from extfs.core import CoreError, Filesystem
from extfs.nfs import constants as n
from extfs.nfs import credentials, server_io
from extfs.nfs.attributes import FILE_BYTES_MAX
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.delegations import Conflict
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.filehandles import Filehandle
from extfs.nfs.locks import LockState
from extfs.nfs.opens import OpenState
from extfs.nfs.stateids import Stateid, read_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = ["OPERATIONS", "check_range", "may_read", "may_write"]

_WRITTEN = struct.Struct(">II8s")
_HOLE = struct.Struct(">IQQ")
_DATA = struct.Struct(">IQI")
_READ_AROUND = 12
"""Bytes of a READ result around its data, padding included."""
_READ_PLUS_AROUND = 8
SEGMENTS_MAX = 64
"""Pieces of a READ_PLUS result."""


def may_read(c: Compound, stateid: Stateid, fh: Filehandle) -> None:
    """RFC 8881 18.22.3: with an open for reading a client has asked already.

    An open for writing alone may be read with, too, by a user who may read the file.
    """
    state = c.service.states.io(c, stateid, Conflict.READ, fh)
    opened = state.opened if isinstance(state, LockState) else state
    if not isinstance(opened, OpenState) or not opened.access & n.OPEN4_SHARE_ACCESS_READ:
        have = credentials.allowed(c, fh.ino, credentials.READ | credentials.EXECUTE)
        if not have:
            credentials.require(c, fh.ino, credentials.READ, owner_override=True)


def may_write(c: Compound, stateid: Stateid, fh: Filehandle) -> None:
    """The same for changes of contents and size."""
    c.writable()
    if c.service.states.io(c, stateid, Conflict.WRITE, fh) is None:
        credentials.require(c, fh.ino, credentials.WRITE, owner_override=True)


def check_range(offset: int, length: int) -> None:
    """FBIG: bytes that no file can have."""
    if offset + length > FILE_BYTES_MAX:
        raise NfsError(n.NFS4ERR_FBIG)


# -- READ, WRITE, COMMIT --


def read(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """READ (RFC 8881 18.22)."""
    stateid = read_stateid(args)
    offset = args.u64()
    count = args.u32()
    fh = c.regular()
    may_read(c, stateid, fh)
    fs, ino = c.service.fs, fh.ino
    count = max(0, min(count, c.service.options.io_bytes, c.room() - _READ_AROUND))
    count = min(count, max(0, fs.getattr(ino).size - offset))

    def read_it() -> tuple[bytearray, int]:
        """The memory is taken here: requests that wait for a thread have none yet."""
        contents = bytearray(count)
        return contents, fs.read_into(ino, offset, contents, nowait=True)

    contents, got = bytearray(), 0
    if count:
        contents, got = yield Blocking(read_it)
        server_io.count(c, "read", offset, got)
    out.boolean(offset + got >= fs.getattr(ino).size)
    out.opaque(contents if got == len(contents) else memoryview(contents)[:got])


def write(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """WRITE (RFC 8881 18.32)."""
    stateid = read_stateid(args)
    offset = args.u64()
    stable = args.u32()
    if stable > n.FILE_SYNC4:
        raise XdrError("no such stable_how")
    contents = args.opaque(args.end - args.pos)[: c.service.options.io_bytes]
    fh = c.regular()
    may_write(c, stateid, fh)
    check_range(offset, len(contents))
    fs, ino = c.service.fs, fh.ino
    kill_priv = c.user().uid != 0

    def write_it() -> int:
        count = fs.write(
            ino,
            offset,
            contents,
            dsync=stable == n.DATA_SYNC4,
            kill_priv=kill_priv,
            nowait=True,
        )
        if stable == n.FILE_SYNC4:
            fs.fsync(ino)
        return count

    count = 0
    if contents:
        count = yield Blocking(write_it)
        server_io.count(c, "write", offset, count)
    out.pack(_WRITTEN, count, stable, c.service.states.verifier)


def commit(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """COMMIT (RFC 8881 18.3): of the whole file, whatever the range."""
    args.u64()
    args.u32()
    fs, ino = c.service.fs, c.regular().ino
    yield Blocking(lambda: fs.fsync(ino, datasync=True))
    out.fixed(c.service.states.verifier)


# -- 4.2 --


def _range_arguments(args: Reader) -> tuple[Stateid, int, int]:
    stateid = read_stateid(args)
    offset = args.u64()
    length = args.u64()
    return stateid, offset, length


def allocate(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """ALLOCATE (RFC 7862 15.1): as fallocate(2), the size grows."""
    stateid, offset, length = _range_arguments(args)
    fh = c.regular()
    if not length:
        raise NfsError(n.NFS4ERR_INVAL)
    may_write(c, stateid, fh)
    check_range(offset, length)
    fs, ino = c.service.fs, fh.ino
    kill_priv = c.user().uid != 0

    def allocate_it() -> None:
        fs.fallocate(ino, offset, length, kill_priv=kill_priv, nowait=True)
        fs.fsync(ino)

    yield Blocking(allocate_it)


def deallocate(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """DEALLOCATE (RFC 7862 15.4): a hole; the size stays. It may reach beyond every file's end."""
    stateid, offset, length = _range_arguments(args)
    fh = c.regular()
    if not length:
        raise NfsError(n.NFS4ERR_INVAL)
    may_write(c, stateid, fh)
    if offset > FILE_BYTES_MAX:
        raise NfsError(n.NFS4ERR_FBIG)
    length = min(length, FILE_BYTES_MAX - offset)
    fs, ino = c.service.fs, fh.ino
    kill_priv = c.user().uid != 0

    def punch() -> None:
        fs.fallocate(
            ino,
            offset,
            length,
            keep_size=True,
            punch_hole=True,
            kill_priv=kill_priv,
            nowait=True,
        )
        fs.fsync(ino)

    if length:
        yield Blocking(punch)


def _seek(fs: Filesystem, ino: int, offset: int, what: int) -> int | None:
    """Where the next data, or hole, begins; None: there is none."""
    try:
        if what == n.NFS4_CONTENT_DATA:
            return fs.seek_data(ino, offset)
        return fs.seek_hole(ino, offset)
    except CoreError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def seek(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """SEEK (RFC 7862 15.11). Every file ends in a hole that is not there: eof, at its size."""
    stateid = read_stateid(args)
    offset = args.u64()
    what = args.u32()
    fh = c.regular()
    if what not in (n.NFS4_CONTENT_DATA, n.NFS4_CONTENT_HOLE):
        raise NfsError(n.NFS4ERR_UNION_NOTSUPP)
    may_read(c, stateid, fh)
    fs, ino = c.service.fs, fh.ino
    if offset >= fs.getattr(ino).size:
        raise NfsError(n.NFS4ERR_NXIO)
    found = yield Blocking(lambda: _seek(fs, ino, offset, what))
    size = fs.getattr(ino).size
    out.boolean(found is None or found >= size)
    out.u64(size if found is None else found)


@dataclass(slots=True)
class _Segment:
    """`contents` of a piece that is data; None for a hole."""

    offset: int
    length: int
    contents: bytearray | None


def _segments(fs: Filesystem, ino: int, offset: int, end: int, room: int) -> list[_Segment]:
    """Data and holes from `offset` to `end` at most, as far as `room` bytes of results go."""
    found: list[_Segment] = []
    pos = offset
    while pos < end and len(found) < SEGMENTS_MAX:
        data = _seek(fs, ino, pos, n.NFS4_CONTENT_DATA)
        if data is None or data > pos:
            room -= _HOLE.size
            if room < 0:
                break
            upto = end if data is None else min(data, end)
            found.append(_Segment(pos, upto - pos, None))
            pos = upto
            continue
        hole = _seek(fs, ino, pos, n.NFS4_CONTENT_HOLE)
        upto = end if hole is None else min(hole, end)
        length = min(upto - pos, (room - _DATA.size) & ~3)
        if length <= 0:
            break
        contents = bytearray(length)
        got = fs.read_into(ino, pos, contents, nowait=True)
        if not got:
            break  # it was cut off meanwhile
        found.append(_Segment(pos, got, contents))
        room -= _DATA.size + (got + 3 & ~3)
        pos += got
        if got < length:
            break
    return found


def read_plus(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """READ_PLUS (RFC 7862 15.10)."""
    stateid = read_stateid(args)
    offset = args.u64()
    count = args.u32()
    fh = c.regular()
    may_read(c, stateid, fh)
    fs, ino = c.service.fs, fh.ino
    room = min(c.room() - _READ_PLUS_AROUND, c.service.options.io_bytes + _DATA.size)
    end = min(offset + count, fs.getattr(ino).size)
    found: list[_Segment] = []
    if offset < end:
        found = yield Blocking(lambda: _segments(fs, ino, offset, end, room))
    pos = found[-1].offset + found[-1].length if found else offset
    out.boolean(pos >= fs.getattr(ino).size)
    out.u32(len(found))
    for segment in found:
        if segment.contents is None:
            out.pack(_HOLE, n.NFS4_CONTENT_HOLE, segment.offset, segment.length)
        else:
            out.u32(n.NFS4_CONTENT_DATA)
            out.u64(segment.offset)
            out.opaque(memoryview(segment.contents)[: segment.length])
            server_io.count(c, "read", segment.offset, segment.length)


def io_advise(c: Compound, args: Reader, out: Writer) -> None:
    """IO_ADVISE (RFC 7862 15.5): no hint changes anything here, which is what the answer says."""
    stateid = read_stateid(args)
    args.u64()
    args.u64()
    args.bitmap()
    c.service.states.io(c, stateid, Conflict.READ, c.regular())
    out.bitmap(0)


OPERATIONS = {
    n.OP_READ: Operation(read, filehandle="current"),
    n.OP_WRITE: Operation(write, filehandle="current", reply_bytes=_WRITTEN.size),
    n.OP_COMMIT: Operation(commit, filehandle="current"),
    n.OP_ALLOCATE: Operation(allocate, minor=2, filehandle="current"),
    n.OP_DEALLOCATE: Operation(deallocate, minor=2, filehandle="current"),
    n.OP_SEEK: Operation(seek, minor=2, filehandle="current"),
    n.OP_READ_PLUS: Operation(read_plus, minor=2, filehandle="current"),
    n.OP_IO_ADVISE: Operation(io_advise, minor=2, filehandle="current"),
}
