"""pNFS operations (RFC 8881 18.40 to 18.44, RFC 7862 15.6 and 15.7).

What is in the opaque bodies is the layout type's business (`extfs.nfs.layout_format`).
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

from extfs.core import HolderState, Iomode
from extfs.nfs import constants as n
from extfs.nfs.compound import Operation
from extfs.nfs.effects import Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_commit import commit
from extfs.nfs.layout_size import Wanted
from extfs.nfs.stateids import Kind, Stateid, read_stateid, write_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.layout_format import LayoutFormat

__all__ = ["OPERATIONS"]

log = logging.getLogger("extfs.nfs")

_ALL = n.NFS4_MAXFILELEN
_BLOCK = 4096
_NANOSECONDS = 1_000_000_000
_BODY_MAX = 1 << 24
_DEVICE_ADDRESS_HEAD = 8
"""Layout type and length, before da_addr_body."""
_ERRORS_MAX = 1024
_LAYOUTGET = struct.Struct(">IIIQQQI12sI")
_LAYOUTCOMMIT = struct.Struct(">QQII12s")
_LAYOUT_HEAD = struct.Struct(">QQII")
_DEVICE_ERROR = struct.Struct(">16sII")
_IO_INFO = struct.Struct(">QQ")
_IOMODES = {n.LAYOUTIOMODE4_READ: Iomode.READ, n.LAYOUTIOMODE4_RW: Iomode.RW}


def _format(c: Compound, layout_type: int) -> LayoutFormat:
    found = c.service.devices.formats.get(layout_type)
    if found is None:
        raise NfsError(n.NFS4ERR_UNKNOWN_LAYOUTTYPE)
    return found


def _end_of(offset: int, length: int) -> int | None:
    """The end of a range; None: of the file. `NfsError` INVAL (RFC 8881 18.43.3, 18.44.3)."""
    if not length or (length != _ALL and offset + length > _ALL):
        raise NfsError(n.NFS4ERR_INVAL)
    return None if length == _ALL else offset + length


# -- devices --


def getdeviceinfo(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """GETDEVICEINFO (RFC 8881 18.40). TOOSMALL tells how large gdia_maxcount has to be."""
    device = args.fixed(n.NFS4_DEVICEID4_SIZE)
    layout_type = args.u32()
    maxcount = args.u32()
    types = args.bitmap()
    known = _format(c, layout_type)
    devices = c.service.devices
    devices.refresh()
    assert c.client is not None
    if layout_type == n.LAYOUT4_SCSI and known.known(c.client, device):
        yield from _cleared(c)
    if not known.known(c.client, device):
        raise NfsError(n.NFS4ERR_NOENT)
    body = known.address(c.client) if maxcount else b""
    needed = _DEVICE_ADDRESS_HEAD + len(body)
    if maxcount and needed > min(maxcount, c.room()):
        raise NfsError(n.NFS4ERR_TOOSMALL, struct.pack(">I", needed))
    out.u32(layout_type)
    out.opaque(body)
    out.bitmap(devices.asked(c.client, device, types))


def _cleared(c: Compound) -> Steps[None]:
    """The client may be told its key. `NfsError`: not while it is to be fenced."""
    assert c.client is not None
    try:
        yield from c.service.layouts.holders.clear(c.client)
    except NfsError:
        raise NfsError(n.NFS4ERR_NOENT) from None
    # Nothing is waited for between this look and the answer: a fence that is confirmed because
    # nobody knows the key finds that it is so.
    record = c.service.fs.layouts.holder(c.client.holder_id)
    if record is None or record.state is not HolderState.LIVE:
        raise NfsError(n.NFS4ERR_NOENT)


def getdevicelist(c: Compound, args: Reader, out: Writer) -> None:
    """GETDEVICELIST (RFC 5661 18.41; RFC 8881 leaves it out, clients may still ask): the one.

    A client that never had a SCSI layout has no device of that type.
    """
    layout_type = args.u32()
    args.u32()  # maxdevices
    cookie = args.u64()
    args.fixed(n.NFS4_VERIFIER_SIZE)
    known = _format(c, layout_type)
    if cookie:
        raise NfsError(n.NFS4ERR_BAD_COOKIE)
    c.service.devices.refresh()
    assert c.client is not None
    there = layout_type != n.LAYOUT4_SCSI or c.service.layouts.holders.told(c.client)
    devices = [known.device(c.client)] if there else []
    out.u64(1)
    out.fixed(bytes(n.NFS4_VERIFIER_SIZE))
    out.u32(len(devices))
    for device in devices:
        out.fixed(device)
    out.boolean(True)


# -- layouts --


def layoutget(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """LAYOUTGET (RFC 8881 18.43)."""
    fields = args.unpack(_LAYOUTGET)
    signal, layout_type, iomode, offset, length, least, seqid, other, maxcount = fields
    if signal > 1:  # signal when available: we never promise to
        raise XdrError("a bool that is neither 0 nor 1")
    stateid = Stateid(seqid, other)
    asked = _format(c, layout_type)
    if iomode not in _IOMODES:
        raise NfsError(n.NFS4ERR_BADIOMODE)
    end = _end_of(offset, length)
    if least > length or offset + least > _ALL:
        raise NfsError(n.NFS4ERR_INVAL)
    _check_offered(c, layout_type)
    assert c.client is not None
    if c.service.lease.in_grace() or c.client.holder_old:
        # What RECLAIM_COMPLETE gives up is all that the core has of the client.
        raise NfsError(n.NFS4ERR_GRACE)
    if offset + least >= 1 << 63:
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
    c.service.devices.refresh()
    wanted = Wanted(_IOMODES[iomode], offset, None if end is None else length, least)
    granted = yield from c.service.layouts.get(c, wanted, stateid, maxcount, layout_type)
    out.boolean(True)  # logr_return_on_close
    write_stateid(out, granted.stateid)
    out.u32(1)
    out.pack(_LAYOUT_HEAD, granted.start, granted.end - granted.start, iomode, layout_type)
    out.opaque(asked.encode(granted.device, granted.layout.extents))
    c.set_stateid(granted.stateid)


def _check_offered(c: Compound, layout_type: int) -> None:
    """Not for directories, nor where the export or the client's host has no layouts, or others."""
    fh = c.current
    assert fh is not None
    offered = 0 if fh.pseudo else fh.export.layout_type(c.connection.host)
    if not offered:
        c.service.count("layoutget_not_offered")
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
    if offered != layout_type:
        c.service.count("layoutget_not_offered")
        raise NfsError(n.NFS4ERR_UNKNOWN_LAYOUTTYPE)
    try:
        c.regular()
    except NfsError:
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE) from None
    assert c.client is not None
    if not c.service.callbacks.path_up(c.client):
        if c.service.sessions.back_awaited(c.client):
            raise NfsError(n.NFS4ERR_DELAY)
        c.service.count("layoutget_no_backchannel")
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)  # it could not be recalled


def layoutcommit(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """LAYOUTCOMMIT (RFC 8881 18.42). The range of the arguments says nothing that the update does
    not say: Linux sends 0 to the last byte."""
    offset, length, reclaim, seqid, other = args.unpack(_LAYOUTCOMMIT)
    if reclaim > 1:
        raise XdrError("a bool that is neither 0 nor 1")
    stateid = Stateid(seqid, other)
    last = args.u64() if args.boolean() else None
    mtime = _read_time(args) if args.boolean() else None
    layout_type = args.u32()
    body = args.opaque(_BODY_MAX)
    update = _format(c, layout_type)
    if length != _ALL and offset + length > _ALL:
        raise NfsError(n.NFS4ERR_INVAL)
    if last is not None and last >= 1 << 63:
        raise NfsError(n.NFS4ERR_FBIG)
    ranges = update.decode_update(body)
    size = 0 if last is None else last + 1
    table = c.service.layouts
    before, after = yield from commit(
        table, c, stateid, ranges, size, mtime, layout_type=layout_type, reclaim=bool(reclaim)
    )
    out.boolean(after > before)
    if after > before:
        out.u64(after)


def _read_time(args: Reader) -> tuple[int, int]:
    """nfstime4."""
    seconds, nanoseconds = args.i64(), args.u32()
    if nanoseconds >= _NANOSECONDS:
        raise NfsError(n.NFS4ERR_INVAL)
    return seconds, nanoseconds


def layoutreturn(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """LAYOUTRETURN (RFC 8881 18.44) of a range of a file, of a file system, of everything."""
    reclaim = args.boolean()
    layout_type = args.u32()
    iomode = args.u32()
    kind = args.u32()
    offset, length, stateid = 0, _ALL, Stateid(0, bytes(n.NFS4_OTHER_SIZE))
    if kind == n.LAYOUT4_RET_REC_FILE:
        offset, length = args.u64(), args.u64()
        stateid = read_stateid(args)
        args.opaque(_BODY_MAX)
    _format(c, layout_type)
    if kind not in (n.LAYOUT4_RET_REC_FILE, n.LAYOUT4_RET_REC_FSID, n.LAYOUT4_RET_REC_ALL):
        raise NfsError(n.NFS4ERR_INVAL)
    if not n.LAYOUTIOMODE4_READ <= iomode <= n.LAYOUTIOMODE4_ANY:
        raise NfsError(n.NFS4ERR_BADIOMODE)
    if kind != n.LAYOUT4_RET_REC_ALL and c.current is None:
        raise NfsError(n.NFS4ERR_NOFILEHANDLE)
    if reclaim and not c.service.lease.in_grace():
        raise NfsError(n.NFS4ERR_NO_GRACE)
    left = None
    if kind == n.LAYOUT4_RET_REC_FILE:
        end = _end_of(offset, length)
        if not reclaim and not c.ended(stateid):
            left = yield from c.service.layouts.give_back(
                c,
                stateid,
                -(-offset // _BLOCK) * _BLOCK,
                _ALL if end is None else end - end % _BLOCK,
                iomode,
                layout_type,
            )
    else:
        assert c.client is not None
        export = None
        if kind == n.LAYOUT4_RET_REC_FSID:
            assert c.current is not None
            export = c.current.export.id
        yield from c.service.layouts.give_all_back(c.client, export, layout_type)
    out.boolean(left is not None)
    if left is not None:
        write_stateid(out, left)
        c.set_stateid(left)


# -- what clients tell about their I/O --


def layouterror(c: Compound, args: Reader, out: Writer) -> None:
    """LAYOUTERROR (RFC 7862 15.6): the client could not use a layout. The errors are counted, and
    the first one is logged: a client sends as many, and as often, as it likes."""
    args.u64()
    args.u64()
    stateid = read_stateid(args)
    errors = [args.unpack(_DEVICE_ERROR) for _ in range(args.count(_ERRORS_MAX, 24))]
    fh = c.regular()
    c.service.layouts.believe(c, stateid, fh.ino, Kind.LAYOUT)
    assert c.client is not None
    if not errors:
        return
    c.service.count("layouterrors", len(errors))
    device, status, operation = errors[0]
    log.warning(
        "client %s cannot use device %s: %s in operation %d%s",
        c.client.name,
        device.hex(),
        n.STATUS_NAMES.get(status, status),
        operation,
        f", and {len(errors) - 1} more errors" if len(errors) > 1 else "",
    )


def layoutstats(c: Compound, args: Reader, out: Writer) -> None:
    """LAYOUTSTATS (RFC 7862 15.7): I/O of the client on the device; counted."""
    args.u64()
    args.u64()
    stateid = read_stateid(args)
    read_count, read_bytes = args.unpack(_IO_INFO)
    write_count, write_bytes = args.unpack(_IO_INFO)
    args.fixed(n.NFS4_DEVICEID4_SIZE)
    layout_type = args.u32()
    args.opaque(_BODY_MAX)
    _format(c, layout_type)
    fh = c.regular()
    c.service.layouts.believe(c, stateid, fh.ino, Kind.LAYOUT)
    service = c.service
    service.count("layoutstats")
    service.count("layoutstats_reads", read_count)
    service.count("layoutstats_read_bytes", read_bytes)
    service.count("layoutstats_writes", write_count)
    service.count("layoutstats_write_bytes", write_bytes)


OPERATIONS = {
    n.OP_GETDEVICEINFO: Operation(getdeviceinfo),
    n.OP_GETDEVICELIST: Operation(getdevicelist, filehandle="current"),
    n.OP_LAYOUTCOMMIT: Operation(layoutcommit, filehandle="current", reply_bytes=20),
    n.OP_LAYOUTGET: Operation(layoutget, filehandle="current"),
    n.OP_LAYOUTRETURN: Operation(layoutreturn, reply_bytes=28),
    n.OP_LAYOUTERROR: Operation(layouterror, minor=2, filehandle="current"),
    n.OP_LAYOUTSTATS: Operation(layoutstats, minor=2, filehandle="current"),
}
