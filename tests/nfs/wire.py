"""A client that speaks the protocol to a `Service` without sockets, in one thread.

`Runner` runs blocking calls at once and has a clock that only the test moves. `Wire` is one
connection; `Session` a client with a session on it, which puts SEQUENCE in front of everything.
Operations are encoded by functions that return bytes; results are `Result`s, whose reader stands
behind the status.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from extfs.core import Filesystem
from extfs.nfs import constants as n
from extfs.nfs.exports import Exports, parse_export
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.service import Connection, Service, ServiceOptions
from extfs.nfs.xdr import Reader, Writer

CB_PROGRAM = 0x40000000


class Runner:
    """`extfs.nfs.driver.Runner` with a virtual clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.service: Service | None = None

    def clock(self) -> float:
        return self.now

    def blocking(
        self, call: Callable[[], Any], done: Callable[[Any, Exception | None], None]
    ) -> None:
        try:
            result = call()
        except Exception as error:
            done(None, error)
        else:
            done(result, None)

    def timers_changed(self) -> None:
        pass

    def advance(self, seconds: float) -> None:
        """Move the clock, and do what has become due."""
        assert self.service is not None
        end = self.now + seconds
        while (due := self.service.timers.next_due()) is not None and due <= end:
            self.now = max(self.now, due)
            self.service.timers.run()
        self.now = end


def make_service(
    fs: Filesystem,
    exports: tuple[str, ...] = ("/:rw,insecure,no_root_squash,layouts=block",),
    options: ServiceOptions | None = None,
    runner: Runner | None = None,
) -> tuple[Service, Runner]:
    """A server on `fs`."""
    runner = runner or Runner()
    parsed = [parse_export(text) for text in exports]
    service = Service(
        fs,
        Exports(fs, parsed),
        options or ServiceOptions(),
        runner,
        runner.clock,
    )
    runner.service = service
    return service, runner


@dataclass
class Result:
    """The result of one operation."""

    op: int
    status: int
    body: Reader

    def __repr__(self) -> str:
        name = n.OPERATION_NAMES.get(self.op, str(self.op))
        return f"{name}: {n.STATUS_NAMES.get(self.status, self.status)}"


@dataclass
class Reply:
    """A COMPOUND's status, the count of its results, and a reader at the first of them.

    Results have no lengths: each must be read by who knows what it is, before the next.
    """

    status: int
    count: int
    body: Reader


def auth_sys(uid: int = 0, gid: int = 0, gids: tuple[int, ...] = ()) -> bytes:
    """An encoded opaque_auth."""
    body = Writer()
    body.u32(0)
    body.opaque(b"client")
    body.u32(uid)
    body.u32(gid)
    body.u32(len(gids))
    for other in gids:
        body.u32(other)
    out = Writer()
    out.u32(n.AUTH_SYS)
    out.opaque(bytes(body.buffer))
    return bytes(out.buffer)


ROOT = auth_sys()


class Wire:
    """One connection. `calls` are the callbacks that came and were not answered yet."""

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 700) -> None:
        self.service = service
        self.reader = RecordReader(1 << 24)
        self.replies: dict[int, bytes] = {}
        self.calls: list[bytes] = []
        self.xid = 0
        self.open = True
        self.connection: Connection = service.connected((host, port), self._got, self.close)

    def _got(self, *pieces: bytes) -> None:
        for message in self.reader.feed(b"".join(pieces)):
            xid, kind = struct.unpack_from(">II", message)
            if kind == n.RPC_CALL:
                self.calls.append(message)
            else:
                self.replies[xid] = message

    def close(self) -> None:
        """The connection is lost."""
        if self.open:
            self.open = False
            self.service.disconnected(self.connection)

    def send(
        self, body: bytes, procedure: int = n.NFSPROC4_COMPOUND, auth: bytes = ROOT, xid: int = 0
    ) -> int:
        """Send a call; returns its xid."""
        if not xid:
            self.xid += 1
            xid = self.xid
        header = struct.pack(
            ">IIIIII", xid, n.RPC_CALL, n.RPC_VERSION, n.NFS4_PROGRAM, n.NFS_V4, procedure
        )
        record = header + auth + struct.pack(">II", n.AUTH_NONE, 0) + body
        for message in RecordReader(1 << 24).feed(marked(record)):
            self.service.receive(self.connection, message)
        return xid

    def results(self, xid: int) -> Reader:
        """What was answered, behind the RPC header."""
        message = self.replies.pop(xid)
        reader = Reader(message)
        header = [reader.u32() for _ in range(6)]
        assert header[1:3] == [n.RPC_REPLY, n.MSG_ACCEPTED], header
        assert header[5] == n.RPC_SUCCESS, f"accept_stat {header[5]}"
        return reader

    def compound(self, *operations: bytes, minor: int = 2, auth: bytes = ROOT) -> Reply:
        """Run operations without adding anything."""
        return read_compound(self.results(self.send(encode(*operations, minor=minor), auth=auth)))


def encode(*operations: bytes, minor: int = 2, tag: bytes = b"") -> bytes:
    """COMPOUND4args."""
    out = Writer()
    out.opaque(tag)
    out.u32(minor)
    out.u32(len(operations))
    for operation in operations:
        out.raw(operation)
    return bytes(out.buffer)


def read_compound(reader: Reader) -> Reply:
    """COMPOUND4res up to the first result."""
    status = reader.u32()
    reader.opaque(1024)
    return Reply(status, reader.u32(), reader)


def op(number: int, *fields: bytes) -> bytes:
    """An operation and its encoded arguments."""
    return struct.pack(">I", number) + b"".join(fields)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def opaque(content: bytes) -> bytes:
    return u32(len(content)) + content + b"\0" * (-len(content) % 4)


def bitmap(*attributes: int) -> bytes:
    """A bitmap4 of attribute numbers."""
    out = Writer()
    out.bitmap(sum(1 << number for number in attributes))
    return bytes(out.buffer)


def next_result(reader: Reader) -> Result:
    """The next result: opcode and status; its body is the caller's to read."""
    return Result(reader.u32(), reader.u32(), reader)


def exchange_id(owner: bytes, verifier: bytes = bytes(8), flags: int = 0) -> bytes:
    return op(
        n.OP_EXCHANGE_ID,
        verifier.ljust(8, b"\0"),
        opaque(owner),
        u32(flags),
        u32(n.SP4_NONE),
        u32(0),
    )


def channel_attributes(
    request: int = 1 << 20,
    response: int = 1 << 20,
    cached: int = 8192,
    ops: int = 64,
    slots: int = 32,
) -> bytes:
    """channel_attrs4."""
    return struct.pack(">IIIIIII", 0, request, response, cached, ops, slots, 0)


def create_session(clientid: int, sequence: int, flags: int = 2, fore: bytes = b"") -> bytes:
    return op(
        n.OP_CREATE_SESSION,
        u64(clientid),
        u32(sequence),
        u32(flags),
        fore or channel_attributes(),
        channel_attributes(4096, 4096, 0, 2, 8),
        u32(CB_PROGRAM),
        u32(1),
        u32(n.AUTH_NONE),
    )


def sequence(session: bytes, number: int, slot: int = 0, highest: int = 0, cache: int = 0) -> bytes:
    return op(n.OP_SEQUENCE, session, u32(number), u32(slot), u32(highest), u32(cache))


class Session:
    """A client with one session on its own connection."""

    def __init__(
        self,
        service: Service,
        owner: bytes = b"one",
        verifier: bytes = b"boot",
        host: str = "127.0.0.1",
        reclaim_complete: bool = True,
    ) -> None:
        self.service = service
        self.wire = Wire(service, host)
        reply = self.wire.compound(exchange_id(owner, verifier))
        assert reply.status == n.NFS4_OK, n.STATUS_NAMES[reply.status]
        body = next_result(reply.body).body
        self.clientid, self.first = body.u64(), body.u32()
        reply = self.wire.compound(create_session(self.clientid, self.first))
        assert reply.status == n.NFS4_OK, n.STATUS_NAMES[reply.status]
        self.id = next_result(reply.body).body.fixed(16)
        self.numbers: dict[int, int] = {}
        if reclaim_complete:
            done = self.run(op(n.OP_RECLAIM_COMPLETE, u32(0)))
            assert done.status == n.NFS4_OK, n.STATUS_NAMES[done.status]

    def run(self, *operations: bytes, slot: int = 0, minor: int = 2, auth: bytes = ROOT) -> Reply:
        """A COMPOUND behind SEQUENCE; the reply's reader stands at the first result after it."""
        self.numbers[slot] = self.numbers.get(slot, 0) + 1
        first = sequence(self.id, self.numbers[slot], slot, slot)
        reply = self.wire.compound(first, *operations, minor=minor, auth=auth)
        result = next_result(reply.body)
        assert (result.op, result.status) == (n.OP_SEQUENCE, n.NFS4_OK), result
        reply.body.fixed(16)
        for _ in range(5):
            reply.body.u32()
        reply.count -= 1
        return reply
