"""Failures in the middle of the layout server's tasks: each is of one client, or of nobody."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import trio
from conftest import LogWatch

from extfs.core import ROOT_INODE, Cred, EventType, LayoutEvent
from extfs.nfs import constants as n
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.effects import Steps, Waiting
from extfs.nfs.rpc import marked
from extfs.nfs.xdr import Reader, Writer
from nfs import wire
from nfs.conftest import World
from nfs.test_nfs_server import NULL, NULL_REPLY, Serve, call, connect, serve, with_session
from nfs.wire import Session

__all__ = ["serve"]


class BugError(Exception):
    """What nobody has thought of."""


def fail(*_: Any) -> None:
    raise BugError


async def test_a_bug_in_one_connection_ends_that_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    log_watch.expect("failed")
    async with serve() as server:
        other = await connect(server)
        assert await other.ask(NULL) == NULL_REPLY
        unlucky = await connect(server)
        assert await unlucky.ask(NULL) == NULL_REPLY
        with monkeypatch.context() as patched:
            patched.setattr(server.service, "receive", fail)
            assert await unlucky.ask(NULL) == b""
        assert await other.ask(NULL) == NULL_REPLY
        assert server.status()["connections"] == 1


async def test_a_bug_in_a_timer_ends_nothing(serve: Serve, log_watch: LogWatch) -> None:
    log_watch.expect("failed")
    async with serve() as server:
        client = await connect(server)
        called = trio.Event()
        server.service.timers.after(0, fail)
        server.service.timers.after(0, called.set)
        with trio.fail_after(10):
            await called.wait()
        assert await client.ask(NULL) == NULL_REPLY


async def test_a_bug_after_a_blocking_call_ends_nothing(serve: Serve, log_watch: LogWatch) -> None:
    log_watch.expect("failed")
    async with serve() as server:
        client = await connect(server)
        server.blocking(lambda: None, fail)
        server.blocking(fail, fail)
        assert await client.ask(NULL) == NULL_REPLY
        for _ in range(10):
            await trio.sleep(0.01)
        assert await client.ask(NULL) == NULL_REPLY


async def test_a_bug_in_an_event_of_the_core_is_not_its_readers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    log_watch.expect("failed")
    async with serve() as server:
        monkeypatch.setattr(server.service, "layout_event", fail)
        server.layout_event(LayoutEvent(EventType.OVERFLOW, 1, 0, 0, 0, 0, 0, 1, 0, 0))
        client = await connect(server)
        assert await client.ask(NULL) == NULL_REPLY


async def test_after_the_end_nothing_is_begun(serve: Serve) -> None:
    """Events of the core still come while the mount ends."""
    async with serve() as server:
        await with_session(server)
    server.blocking(lambda: None, fail)
    server.layout_event(LayoutEvent(EventType.OVERFLOW, 1, 0, 0, 0, 0, 0, 1, 0, 0))


def waits(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """Instead of EXCHANGE_ID; it takes part of the arguments for granted."""
    args.pos = args.end
    yield Waiting(0.05)


async def test_who_waited_for_a_timer_lets_the_next_request_in(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing blocks here: only the reply itself tells that there is room again."""
    async with serve(running=1) as server:
        monkeypatch.setitem(server.service.operations, n.OP_EXCHANGE_ID, Operation(waits))
        client = await connect(server)
        both = marked(call(1, wire.exchange_id(b"a"))) + marked(call(2, wire.exchange_id(b"b")))
        await client.stream.send_all(both)
        with trio.fail_after(5):
            assert Reader(await client.record()).u32() == 1
            assert Reader(await client.record()).u32() == 2


async def test_replies_to_requests_that_were_let_in_do_not_drop_their_client(serve: Serve) -> None:
    """A slow link and as many READs as there are slots; they are all done before one is sent."""
    many, size = 24, 1 << 20
    async with serve(backlog_bytes=1 << 20) as server:
        fs = server.service.fs
        made = fs.mknod(ROOT_INODE, b"file", 0o100644, 0, Cred(0, 0, 0))
        fs.write(made.ino, 0, bytes(size))
        client, session = await with_session(server)
        read = wire.op(n.OP_READ, bytes(16), wire.u64(0), wire.u32(size))
        find = wire.op(n.OP_LOOKUP, wire.opaque(b"file"))
        root = wire.op(n.OP_PUTROOTFH)
        sent = b"".join(
            marked(call(100 + slot, wire.sequence(session, 1, slot, slot), root, find, read))
            for slot in range(many)
        )
        await client.stream.send_all(sent)
        with trio.fail_after(20):
            while server.service.counters["server_reads"] < many:  # noqa: ASYNC110 - no event
                await trio.sleep(0.01)
        found = [await client.record() for _ in range(many)]
        assert sorted(Reader(record).u32() for record in found) == list(range(100, 100 + many))
        assert all(len(record) > size - 4096 for record in found)


async def test_one_session_does_not_take_all_connections(serve: Serve) -> None:
    async with serve(connections=24) as server:
        first, session = await with_session(server)
        for slot in range(1, 24):
            other = await connect(server)
            await other.ask(call(slot, wire.sequence(session, 1, slot, slot)))
        late = await connect(server)
        assert await late.ask(NULL) == NULL_REPLY
        assert await first.ask(NULL) == NULL_REPLY, "it has the backchannel"


def test_nothing_is_left_of_clients_that_come_and_go(world: World) -> None:
    """Objects of the server's own classes, after many handshakes and lost connections."""

    def count() -> Counter[str]:
        gc.collect()
        return Counter(
            type(found).__name__ for found in gc.get_objects() if _ours(type(found).__module__)
        )

    def round_(numbers: range) -> None:
        for number in numbers:
            session = Session(world.service, b"client %d" % (number % 7), b"%d" % number)
            session.wire.close()
            if number % 50 == 0:
                world.runner.advance(100)
        world.runner.advance(2 * 86400)

    round_(range(200))
    before = count()
    round_(range(200, 2200))
    after = count()
    grown = {name: (before[name], many) for name, many in after.items() if many > before[name] + 8}
    assert not grown
    assert len(world.service.clients) == 0
    assert len(world.service.sessions) == 0


def _ours(module: object) -> bool:
    # A class may have a descriptor of this name, as some of the standard library have.
    return isinstance(module, str) and module.startswith("extfs.nfs")
