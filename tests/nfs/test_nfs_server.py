"""The sockets of the layout server: records, bad input, slow readers, many connections."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from extfs.core import Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.exports import Exports, parse_export
from extfs.nfs.records import Kind
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.server import Server, ServerOptions
from extfs.nfs.service import ServiceOptions
from extfs.nfs.xdr import Reader
from nfs import wire

Serve = Callable[..., AbstractAsyncContextManager[Server]]
streams: list[trio.SocketStream] = []
"""Of this test's clients, to be closed at its end."""
EXPORT = "/:rw,insecure,no_root_squash,layouts=block"


@pytest.fixture
def serve() -> Serve:
    """serve(**options of ServerOptions): an async context manager of a running server."""

    @contextlib.asynccontextmanager
    async def serving(**options: int) -> AsyncIterator[Server]:
        with SimDevice(64 << 20) as sim:
            with sim.device() as device:
                mkfs(device)
            with Filesystem.open(sim.device()) as fs:
                chosen = ServerOptions(listen=(("127.0.0.1", 0),), **options)
                exports = Exports(fs, [parse_export(EXPORT)])
                server = Server(fs, exports, chosen, ServiceOptions())
                server.bind()
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(server.run)
                        yield server
                        nursery.cancel_scope.cancel()
                finally:
                    server.close()
                    while streams:
                        streams.pop().socket.close()

    return serving


def call(xid: int, *operations: bytes, minor: int = 2, procedure: int = 1) -> bytes:
    """A record without its mark."""
    header = struct.pack(">IIIIII", xid, 0, 2, n.NFS4_PROGRAM, n.NFS_V4, procedure)
    return header + wire.ROOT + bytes(8) + wire.encode(*operations, minor=minor)


NULL = struct.pack(">IIIIII", 9, 0, 2, n.NFS4_PROGRAM, n.NFS_V4, 0) + bytes(16)
NULL_REPLY = struct.pack(">IIIIII", 9, 1, 0, 0, 0, 0)


class Client:
    """A connection that reads whole records."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.reader = RecordReader(1 << 24)
        self.records: list[bytes] = []

    async def record(self) -> bytes:
        """The next record; b"" at the end of the connection."""
        while not self.records:
            with trio.fail_after(20):
                try:
                    received = await self.stream.receive_some(1 << 16)
                except trio.BrokenResourceError:
                    return b""
            if not received:
                return b""
            self.records += self.reader.feed(received)
        return self.records.pop(0)

    async def ask(self, record: bytes) -> bytes:
        await self.stream.send_all(marked(record))
        return await self.record()


async def connect(server: Server) -> Client:
    host, port = server.listening[0]
    streams.append(await trio.open_tcp_stream(host, port))
    return Client(streams[-1])


async def with_session(server: Server, owner: bytes = b"one") -> tuple[Client, bytes]:
    client = await connect(server)
    reply = Reader(await client.ask(call(1, wire.exchange_id(owner))), 24)
    wire.read_compound(reply)
    body = wire.next_result(reply).body
    clientid, first = body.u64(), body.u32()
    reply = Reader(await client.ask(call(2, wire.create_session(clientid, first))), 24)
    assert wire.read_compound(reply).status == n.NFS4_OK
    return client, wire.next_result(reply).body.fixed(16)


async def test_what_has_time_is_durable_at_the_end(serve: Serve) -> None:
    """An open that was closed in the last second does not come back."""
    async with serve() as server:
        records = server.service.records
        records.stage(records.new_number(Kind.STATE), b"state", urgent=False)
        assert records.pending
    assert not records.pending


async def test_a_record_may_come_byte_by_byte_and_in_fragments(serve: Serve) -> None:
    """RFC 5531 section 11."""
    async with serve() as server:
        client = await connect(server)
        for byte in marked(NULL):
            await client.stream.send_all(bytes([byte]))
        assert await client.record() == NULL_REPLY
        pieces = [NULL[:4], b"", NULL[4:17], NULL[17:]]
        for number, piece in enumerate(pieces):
            last = 0x80000000 if number == len(pieces) - 1 else 0
            await client.stream.send_all(struct.pack(">I", last | len(piece)) + piece)
        assert await client.record() == NULL_REPLY


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 0x80000000 | 1 << 28),
        struct.pack(">I", 0x80000004) + b"half",
        struct.pack(">I", 0) * 100,
        struct.pack(">III", 0x80000008, 5, 7),
    ],
    ids=["other protocol", "too large", "no header", "empty fragments", "neither call nor reply"],
)
async def test_who_sends_no_records_is_dropped_and_nobody_else(serve: Serve, sent: bytes) -> None:
    async with serve() as server:
        other, session = await with_session(server)
        bad = await connect(server)
        await bad.stream.send_all(sent)
        assert await bad.record() == b""
        assert len(await other.ask(call(5, wire.sequence(session, 1)))) > 24


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        ((2, 100000, 4, 1), (1, 0, 0, 0, n.RPC_PROG_UNAVAIL)),
        ((2, n.NFS4_PROGRAM, 3, 1), (1, 0, 0, 0, n.RPC_PROG_MISMATCH, 4, 4)),
        ((2, n.NFS4_PROGRAM, 4, 2), (1, 0, 0, 0, n.RPC_PROC_UNAVAIL)),
        ((3, n.NFS4_PROGRAM, 4, 1), (1, n.MSG_DENIED, n.RPC_MISMATCH, 2, 2)),
    ],
    ids=["program", "program version", "procedure", "RPC version"],
)
async def test_calls_of_something_else_are_refused(
    serve: Serve, header: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    """RFC 5531 section 9."""
    async with serve() as server:
        client = await connect(server)
        record = struct.pack(">II4I", 3, 0, *header) + wire.ROOT + bytes(8)
        assert await client.ask(record) == struct.pack(f">{1 + len(answer)}I", 3, *answer)


@pytest.mark.parametrize(
    ("auth", "why"),
    [
        (struct.pack(">II", 6, 0), n.AUTH_TOOWEAK),
        (struct.pack(">II", 3, 0), n.AUTH_REJECTEDCRED),
        (struct.pack(">III", 1, 4, 0), n.AUTH_BADCRED),
        (struct.pack(">IIIIIIII", 1, 24, 0, 0, 0, 0, 17, 0), n.AUTH_BADCRED),
    ],
    ids=["GSS", "unknown", "short", "too many groups"],
)
async def test_credentials_that_are_none_are_refused(serve: Serve, auth: bytes, why: int) -> None:
    """RFC 5531 sections 9 and appendix A: at most 16 groups."""
    async with serve() as server:
        client = await connect(server)
        record = struct.pack(">IIIIII", 3, 0, 2, n.NFS4_PROGRAM, 4, 1) + auth + bytes(8)
        assert await client.ask(record) == struct.pack(">IIIII", 3, 1, 1, 1, why)


async def test_arguments_that_are_no_compound(serve: Serve) -> None:
    async with serve() as server:
        client = await connect(server)
        record = struct.pack(">IIIIII", 3, 0, 2, n.NFS4_PROGRAM, 4, 1) + bytes(16) + b"\xff" * 4
        garbage = struct.pack(">IIIIII", 3, 1, 0, 0, 0, n.RPC_GARBAGE_ARGS)
        assert await client.ask(record) == garbage


async def test_a_client_that_does_not_read_is_not_read_from(serve: Serve) -> None:
    """What it is owed stays bounded, others are served, and it gets all when it reads."""
    async with serve(backlog_bytes=1 << 16, running=8) as server:
        slow, session = await with_session(server)
        sock = slow.stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        listing = [wire.op(n.OP_PUTROOTFH), wire.op(n.OP_GETATTR, wire.bitmap(*range(1, 12)))] * 20
        count = 1500

        async def flood() -> None:
            for number in range(1, count + 1):
                record = call(number, wire.sequence(session, number), *listing)
                await slow.stream.send_all(marked(record))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            other, other_session = await with_session(server, b"two")
            for number in range(1, 50):
                assert await other.ask(call(number, wire.sequence(other_session, number)))
            owed = max(peer.queued for peer in server._peers)
            assert owed <= 1 << 17, owed
            seen = {struct.unpack_from(">I", await slow.record())[0] for _ in range(count)}
        assert seen == set(range(1, count + 1))


async def test_requests_in_a_row_are_all_answered(serve: Serve) -> None:
    """More at once than run at once; those that block end in any order."""
    async with serve(running=4, threads=2) as server:
        client, session = await with_session(server)
        root = wire.op(n.OP_PUTROOTFH)
        for slot in range(32):
            make = wire.op(
                n.OP_CREATE, wire.u32(n.NF4DIR), wire.opaque(b"d%d" % slot), wire.bitmap(),
                wire.opaque(b""),
            )  # fmt: skip
            record = call(100 + slot, wire.sequence(session, 1, slot, 31), root, make)
            await client.stream.send_all(marked(record))
        seen = set()
        for _ in range(32):
            reader = Reader(await client.record())
            seen.add(reader.u32())
            reader.pos = 24
            assert wire.read_compound(reader).status == n.NFS4_OK
        assert seen == set(range(100, 132))


async def test_connections_beyond_the_limit_push_out_the_idle_ones(serve: Serve) -> None:
    async with serve(connections=20) as server:
        keeper, session = await with_session(server)
        idle = [await connect(server) for _ in range(100)]
        last = await connect(server)
        assert await last.ask(NULL) == NULL_REPLY
        assert await keeper.ask(call(7, wire.sequence(session, 1)))
        assert len(server._peers) <= 20
        assert server.service.counters["connections_dropped"] >= 80
        assert await idle[0].record() == b""


async def test_ten_thousand_connections_that_are_left(serve: Serve) -> None:
    """They cost nothing that stays."""
    async with serve(connections=64) as server:
        keeper, session = await with_session(server)
        host, port = server.listening[0]

        async def leave() -> None:
            for _ in range(1000):
                with trio.socket.socket() as left:
                    # A reset: no port stays in TIME_WAIT.
                    left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    await left.connect((host, port))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(leave)
        assert await keeper.ask(call(7, wire.sequence(session, 1)))
        with trio.fail_after(20):
            while len(server._peers) > 1:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        assert len(server.service.connections) == 1


async def test_who_leaves_while_a_request_runs_is_forgotten(serve: Serve) -> None:
    async with serve() as server:
        client, session = await with_session(server)
        make = wire.op(
            n.OP_CREATE, wire.u32(n.NF4DIR), wire.opaque(b"d"), wire.bitmap(), wire.opaque(b"")
        )
        record = call(1, wire.sequence(session, 1), wire.op(n.OP_PUTROOTFH), make)
        await client.stream.send_all(marked(record))
        await client.stream.aclose()
        with trio.fail_after(20):
            while server._peers:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        again = await connect(server)
        assert await again.ask(NULL) == NULL_REPLY


async def test_what_is_begun_before_the_server_runs_is_done() -> None:
    """The end of a grace period that has something to write, say: it would never end."""
    told: list[tuple[object, Exception | None]] = []
    with SimDevice(64 << 20) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device()) as fs:
            exports = Exports(fs, [parse_export(EXPORT)])
            server = Server(
                fs, exports, ServerOptions(listen=(("127.0.0.1", 0),)), ServiceOptions()
            )
            done = trio.Event()

            def tell(result: object, error: Exception | None) -> None:
                told.append((result, error))
                done.set()

            server.blocking(lambda: "written", tell)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                with trio.fail_after(20):
                    await done.wait()
                nursery.cancel_scope.cancel()
    assert told == [("written", None)]
