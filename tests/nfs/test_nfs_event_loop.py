"""Calls of the core that a running server begins in its event loop instead of a thread."""

from __future__ import annotations

import errno
import stat
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from extfs.core import CoreError, Filesystem, HolderSpec, Iomode, Layout, SimDevice, mkfs
from extfs.nfs.effects import CoreCall, Steps
from extfs.nfs.exports import Exports, parse_export
from extfs.nfs.server import Server, ServerOptions
from extfs.nfs.service import ServiceOptions

MIB = 1 << 20
EXPORT = "/:rw,insecure,no_root_squash,layouts=block"


@pytest.fixture
def fs() -> Iterator[Filesystem]:
    with SimDevice(64 * MIB, seed=1) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device(), no_heartbeat=True, recall_ms=60_000) as filesystem:
            yield filesystem


class World:
    """A server and a file of which a holder has all, and another would like to."""

    def __init__(self, fs: Filesystem) -> None:
        options = ServerOptions(listen=(("127.0.0.1", 0),))
        self.fs = fs
        self.server = Server(fs, Exports(fs, [parse_export(EXPORT)]), options, ServiceOptions())
        self.ino = fs.mknod(1, b"file", stat.S_IFREG | 0o644).ino
        (self.owner, _), (self.other, _) = (fs.layouts.register(HolderSpec()) for _ in range(2))
        fs.layouts.get(self.ino, self.owner, Iomode.RW, 0, MIB)
        self.over: list[tuple[Any, Exception | None]] = []
        self.changed = trio.Event()

    def run(self, steps: Steps[Any]) -> None:
        self.server.service.driver.run(steps, self._done)

    def _done(self, result: Any, failed: Exception | None) -> None:
        self.over.append((result, failed))
        self.changed.set()

    def get(self, holder: int, *, wait: bool = False, ino: int = 0) -> CoreCall:
        layouts, ino = self.fs.layouts, ino or self.ino
        return CoreCall(
            layouts, lambda: layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB, wait=wait)
        )

    async def ended(self) -> tuple[Any, Exception | None]:
        with trio.fail_after(20):
            await self.changed.wait()
        return self.over[0]


def one(call: CoreCall) -> Steps[Layout]:
    return (yield call)


async def test_a_call_that_waits_is_in_nobodys_way(fs: Filesystem) -> None:
    world = World(fs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.server.run)
        await trio.testing.wait_all_tasks_blocked()
        before = threading.active_count()
        world.run(one(world.get(world.other, wait=True)))
        await trio.sleep(0.05)
        assert not world.over
        assert threading.active_count() == before
        found: list[Any] = []
        second = trio.Event()

        def done(result: Any, failed: Exception | None) -> None:
            found.extend((result, failed))
            second.set()

        free = fs.mknod(1, b"free", stat.S_IFREG | 0o644).ino
        world.server.service.driver.run(one(world.get(world.other, ino=free)), done)
        with trio.fail_after(20):
            await second.wait()
        assert found[0].next == MIB
        assert found[1] is None
        assert not world.over
        fs.layouts.give_back(world.ino, world.owner)
        result, failed = await world.ended()
        assert failed is None
        assert result.next == MIB
        nursery.cancel_scope.cancel()


async def test_the_server_ends_when_its_calls_have_and_they_lead_to_nothing(
    fs: Filesystem,
) -> None:
    world = World(fs)
    stopped = trio.Event()

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def serving() -> None:
            with scope:
                await world.server.run()
            stopped.set()

        nursery.start_soon(serving)
        await trio.testing.wait_all_tasks_blocked()
        world.run(one(world.get(world.other, wait=True)))
        scope.cancel()
        with trio.move_on_after(0.2):
            await stopped.wait()
        assert not stopped.is_set(), "the context of a call that runs was given back"
        fs.layouts.give_back(world.ino, world.owner)
        with trio.fail_after(20):
            await stopped.wait()
    assert world.over == []
    assert world.server.service.driver.begin is None


async def test_any_number_of_calls_that_are_over_at_once(fs: Filesystem) -> None:
    world = World(fs)

    def steps() -> Steps[int]:
        for _ in range(3000):
            yield world.get(world.owner)
        return 3000

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.server.run)
        await trio.testing.wait_all_tasks_blocked()
        world.run(steps())
        assert await world.ended() == (3000, None)
        nursery.cancel_scope.cancel()


async def test_errors_arrive_where_the_call_was_made(fs: Filesystem) -> None:
    world = World(fs)

    def steps() -> Steps[list[int]]:
        found = []
        for call in (world.get(world.other), world.get(world.owner, ino=99_999)):
            try:
                yield call
            except CoreError as error:
                found.append(error.errno)
        try:
            yield CoreCall(fs.layouts, refuses)
        except ZeroDivisionError:
            found.append(0)
        return found

    def refuses() -> Any:
        return 1 // 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.server.run)
        await trio.testing.wait_all_tasks_blocked()
        world.run(steps())
        assert await world.ended() == ([errno.EAGAIN, errno.ENOENT, 0], None)
        nursery.cancel_scope.cancel()
