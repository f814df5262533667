"""pNFS operations as calls, OPEN and CLOSE for them, and the client's side of the backchannel.

Calls take the layout type; a `File` has one for all of its calls.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from extfs.nfs import constants as n
from extfs.nfs import scsi_layout
from extfs.nfs.block_layout import BlockExtent, decode_layout, encode_update
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.stateids import Stateid
from extfs.nfs.xdr import Reader, Writer
from nfs.calls import Call, do, fattr, getfh, putfh, putrootfh
from nfs.conftest import World
from nfs.wire import Session, Wire, op, opaque, u32, u64

ALL = (1 << 64) - 1
BLOCK = 4096
BLOCK_TYPE, SCSI_TYPE = n.LAYOUT4_BLOCK_VOLUME, n.LAYOUT4_SCSI
READ, RW, ANY = n.LAYOUTIOMODE4_READ, n.LAYOUTIOMODE4_RW, n.LAYOUTIOMODE4_ANY


def encoded(stateid: Stateid) -> bytes:
    return struct.pack(">I12s", stateid.seqid, stateid.other)


def read_stateid(body: Reader) -> Stateid:
    return Stateid(body.u32(), body.fixed(12))


# ---- opens -------------------------------------------------------------------------------------


def open_(name: bytes, access: int = n.OPEN4_SHARE_ACCESS_BOTH, *, create: bool = True) -> Call:
    """OPEN of a name in the current directory; the result is its stateid."""
    how = u32(n.OPEN4_NOCREATE)
    if create:
        how = u32(n.OPEN4_CREATE) + u32(n.UNCHECKED4) + fattr({n.FATTR4_MODE: u32(0o644)})
    want = n.OPEN4_SHARE_ACCESS_WANT_NO_DELEG

    def decode(body: Reader) -> Stateid:
        stateid = read_stateid(body)
        body.boolean()
        body.u64()
        body.u64()
        body.u32()
        body.bitmap()
        kind = body.u32()
        assert kind in (n.OPEN_DELEGATE_NONE, n.OPEN_DELEGATE_NONE_EXT), kind
        if kind == n.OPEN_DELEGATE_NONE_EXT:
            body.u32()
        return stateid

    return Call(
        op(
            n.OP_OPEN,
            u32(0),
            u32(access | want),
            u32(n.OPEN4_SHARE_DENY_NONE),
            u64(0),
            opaque(b"owner"),
            how,
            u32(n.CLAIM_NULL),
            opaque(name),
        ),
        decode,
    )


def close(stateid: Stateid) -> Call:
    return Call(op(n.OP_CLOSE, u32(0), encoded(stateid)), read_stateid)


@dataclass
class File:
    """A file that a session has open. `layout`: the newest layout stateid, or None."""

    session: Session
    fh: bytes
    opened: Stateid
    layout: Stateid | None = None
    kind: int = BLOCK_TYPE

    def do(self, *calls: Call, slot: int = 0) -> Any:
        """The last call's result, on the file."""
        assert slot == 0
        return do(self.session, putfh(self.fh), *calls)[-1]

    def get(
        self,
        offset: int,
        length: int,
        least: int = BLOCK,
        iomode: int = RW,
        stateid: Stateid | None = None,
    ) -> Layout:
        layout = self.do(
            layoutget(
                offset,
                length,
                least,
                iomode,
                stateid or self.layout or self.opened,
                kind=self.kind,
            )
        )
        self.layout = layout.stateid
        assert isinstance(layout, Layout)
        return layout

    def commit(self, *ranges: tuple[int, int], last: int | None = None) -> int | None:
        assert self.layout is not None
        size = self.do(layoutcommit(list(ranges), self.layout, last, kind=self.kind))
        assert size is None or isinstance(size, int)
        return size

    def give_back(
        self, offset: int = 0, length: int = ALL, iomode: int = ANY, stateid: Stateid | None = None
    ) -> Stateid | None:
        assert self.layout is not None
        call = layoutreturn(offset, length, iomode, stateid or self.layout, layout_type=self.kind)
        self.layout = self.do(call)
        return self.layout


def open_file(
    session: Session,
    name: bytes,
    access: int = n.OPEN4_SHARE_ACCESS_BOTH,
    kind: int = BLOCK_TYPE,
) -> File:
    _, stateid, fh = do(session, putrootfh(), open_(name, access), getfh())
    return File(session, fh, stateid, kind=kind)


# ---- layouts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """LAYOUTGET4resok with its one layout."""

    stateid: Stateid
    return_on_close: bool
    offset: int
    length: int
    iomode: int
    extents: list[BlockExtent]
    kind: int = BLOCK_TYPE

    @property
    def end(self) -> int:
        return self.offset + self.length


def _layout(body: Reader) -> Layout:
    close_, stateid = body.boolean(), read_stateid(body)
    assert body.u32() == 1
    offset, length, iomode, kind = body.u64(), body.u64(), body.u32(), body.u32()
    extents = decode_layout(body.opaque(1 << 20))
    return Layout(stateid, close_, offset, length, iomode, extents, kind)


def layoutget(
    offset: int,
    length: int,
    least: int,
    iomode: int,
    stateid: Stateid,
    maxcount: int = 65536,
    kind: int = n.LAYOUT4_BLOCK_VOLUME,
) -> Call:
    return Call(
        op(
            n.OP_LAYOUTGET,
            u32(0),
            u32(kind),
            u32(iomode),
            u64(offset),
            u64(length),
            u64(least),
            encoded(stateid),
            u32(maxcount),
        ),
        _layout,
    )


def layoutcommit(
    ranges: list[tuple[int, int]],
    stateid: Stateid,
    last: int | None = None,
    *,
    mtime: tuple[int, int] | None = None,
    reclaim: bool = False,
    body: bytes | None = None,
    offset: int = 0,
    length: int = ALL,
    kind: int = BLOCK_TYPE,
) -> Call:
    if body is not None:
        update = body
    elif kind == SCSI_TYPE:
        update = scsi_layout.encode_update(ranges)
    else:
        update = encode_update(bytes(16), ranges)
    return Call(
        op(
            n.OP_LAYOUTCOMMIT,
            u64(offset),
            u64(length),
            u32(reclaim),
            encoded(stateid),
            u32(0) if last is None else u32(1) + u64(last),
            u32(0) if mtime is None else u32(1) + struct.pack(">qI", *mtime),
            u32(kind),
            opaque(update),
        ),
        lambda reader: reader.u64() if reader.boolean() else None,
    )


def _left(body: Reader) -> Stateid | None:
    return read_stateid(body) if body.boolean() else None


def layoutreturn(
    offset: int = 0,
    length: int = ALL,
    iomode: int = ANY,
    stateid: Stateid | None = None,
    *,
    kind: int = n.LAYOUT4_RET_REC_FILE,
    layout_type: int = n.LAYOUT4_BLOCK_VOLUME,
    reclaim: bool = False,
) -> Call:
    range_ = b""
    if kind == n.LAYOUT4_RET_REC_FILE:
        assert stateid is not None
        range_ = u64(offset) + u64(length) + encoded(stateid) + opaque(b"")
    return Call(
        op(n.OP_LAYOUTRETURN, u32(reclaim), u32(layout_type), u32(iomode), u32(kind), range_),
        _left,
    )


def getdeviceinfo(
    device: bytes, maxcount: int = 65536, types: int = 0, kind: int = BLOCK_TYPE
) -> Call:
    out = Writer()
    out.bitmap(types)

    def decode(body: Reader) -> tuple[bytes, int]:
        assert body.u32() == kind
        return body.opaque(1 << 16), body.bitmap()

    return Call(op(n.OP_GETDEVICEINFO, device, u32(kind), u32(maxcount), bytes(out.buffer)), decode)


def getdevicelist(kind: int = n.LAYOUT4_BLOCK_VOLUME, cookie: int = 0) -> Call:
    def decode(body: Reader) -> list[bytes]:
        body.u64()
        body.fixed(8)
        found = [body.fixed(16) for _ in range(body.u32())]
        assert body.boolean()
        return found

    return Call(op(n.OP_GETDEVICELIST, u32(kind), u32(64), u64(cookie), bytes(8)), decode)


# ---- the backchannel ---------------------------------------------------------------------------


@dataclass
class Callback:
    """A CB_COMPOUND that came: its CB_SEQUENCE, and its one other operation, undecoded."""

    xid: int
    session: bytes
    sequence: int
    slot: int
    referring: list[tuple[bytes, int, int]] = field(default_factory=list)
    op: int = 0
    body: Reader = field(default_factory=lambda: Reader(b""))


@dataclass(frozen=True)
class Recall:
    """CB_LAYOUTRECALL4args. `stateid` is None for one of a file system or of everything."""

    iomode: int
    changed: bool
    kind: int
    fh: bytes
    offset: int
    length: int
    stateid: Stateid | None
    layout_type: int = BLOCK_TYPE


def read_callback(message: bytes) -> Callback:
    reader = Reader(message)
    xid = reader.u32()
    assert reader.u32() == n.RPC_CALL
    assert reader.u32() == n.RPC_VERSION
    reader.u32()  # program
    reader.u32()
    assert reader.u32() == n.CB_COMPOUND
    for _ in range(2):
        reader.u32()
        reader.opaque(400)
    reader.opaque(1024)
    reader.u32()
    reader.u32()
    assert reader.u32() == 2
    assert reader.u32() == n.OP_CB_SEQUENCE
    session, sequence, slot = reader.fixed(16), reader.u32(), reader.u32()
    reader.u32()
    assert not reader.boolean()  # Linux refuses csa_cachethis
    referring = []
    for _ in range(reader.u32()):
        of = reader.fixed(16)
        referring += [(of, reader.u32(), reader.u32()) for _ in range(reader.u32())]
    return Callback(xid, session, sequence, slot, referring, reader.u32(), reader)


def read_recall(callback: Callback) -> Recall:
    assert callback.op == n.OP_CB_LAYOUTRECALL
    body = callback.body
    layout_type = body.u32()
    iomode, changed, kind = body.u32(), body.boolean(), body.u32()
    if kind == n.LAYOUT4_RET_REC_FILE:
        fh, offset, length = body.opaque(128), body.u64(), body.u64()
        stateid = read_stateid(body)
        recall = Recall(iomode, changed, kind, fh, offset, length, stateid, layout_type)
    else:
        recall = Recall(iomode, changed, kind, b"", 0, ALL, None, layout_type)
    assert body.done()
    return recall


def callback_reply(callback: Callback, status: int, sequence_status: int = n.NFS4_OK) -> bytes:
    """The answer, as a message; without the second result when CB_SEQUENCE failed."""
    out = Writer()
    for value in (callback.xid, n.RPC_REPLY, n.MSG_ACCEPTED, n.AUTH_NONE, 0, n.RPC_SUCCESS):
        out.u32(value)
    out.u32(sequence_status or status)
    out.opaque(b"")
    out.u32(1 if sequence_status else 2)
    out.u32(n.OP_CB_SEQUENCE)
    out.u32(sequence_status)
    if not sequence_status:
        out.fixed(callback.session)
        for value in (callback.sequence, callback.slot, 7, 7):
            out.u32(value)
        out.u32(callback.op)
        out.u32(status)
    return bytes(out.buffer)


def answer(wire: Wire, callback: Callback, status: int, sequence_status: int = n.NFS4_OK) -> None:
    for message in RecordReader(1 << 20).feed(
        marked(bytearray(callback_reply(callback, status, sequence_status)))
    ):
        wire.service.receive(wire.connection, message)


def take_callbacks(wire: Wire) -> list[Callback]:
    calls, wire.calls[:] = list(wire.calls), []
    return [read_callback(message) for message in calls]


def take_recall(session: Session) -> tuple[Callback, Recall]:
    """The one callback that came, which is a recall."""
    (callback,) = take_callbacks(session.wire)
    return callback, read_recall(callback)


def events(world: World) -> None:
    """What the core has to say reaches the server."""
    for event in world.fs.layouts.events():
        world.service.layout_event(event)
