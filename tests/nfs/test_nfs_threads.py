"""The server's threads for what waits for the device."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import trio
import trio.testing

from extfs.nfs.driver import Done
from extfs.nfs.threads import Threads


class Runs:
    """What came back, in order."""

    def __init__(self) -> None:
        self.over: list[tuple[Any, Exception | None]] = []
        self.changed = trio.Event()

    def finished(self, done: Done, result: Any, failed: Exception | None) -> None:
        done(result, failed)

    def done(self, result: Any, failed: Exception | None) -> None:
        self.over.append((result, failed))
        self.changed.set()
        self.changed = trio.Event()

    async def wait(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.over) < count:
                await self.changed.wait()


async def test_results_and_exceptions_come_back() -> None:
    runs = Runs()
    threads = Threads(2, runs.finished)
    threads.run(lambda: 5, runs.done)
    threads.run(lambda: 1 // 0, runs.done)
    await runs.wait(2)
    results = {result for result, _ in runs.over}
    assert results == {5, None}
    assert [type(failed) for result, failed in runs.over if result is None] == [ZeroDivisionError]
    await threads.stop()


async def test_no_more_threads_than_wanted_and_allowed() -> None:
    runs, here = Runs(), threading.active_count()
    threads = Threads(3, runs.finished)
    for count in range(1, 5):  # one after the other: one is enough
        threads.run(lambda: None, runs.done)
        await runs.wait(count)
    assert threading.active_count() == here + 1
    gate, inside = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        inside.release()
        assert gate.wait(10)

    for _ in range(20):
        threads.run(wait, runs.done)
    for _ in range(3):
        assert await trio.to_thread.run_sync(lambda: inside.acquire(timeout=10))
    assert not inside.acquire(blocking=False)
    gate.set()
    await runs.wait(24)
    await threads.stop()


async def test_stop_waits_for_what_runs_and_begins_nothing() -> None:
    runs = Runs()
    threads = Threads(1, runs.finished)
    gate, begun = threading.Event(), threading.Event()
    ended: list[int] = []

    def first() -> None:
        begun.set()
        gate.wait(10)
        ended.append(1)

    threads.run(first, runs.done)
    threads.run(lambda: ended.append(2), runs.done)
    assert await trio.to_thread.run_sync(lambda: begun.wait(10))

    async def open_gate() -> None:
        await trio.sleep(0.05)
        assert ended == []
        gate.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_gate)
        await threads.stop()
    assert ended == [1]
    threads.run(lambda: ended.append(3), runs.done)
    await trio.testing.wait_all_tasks_blocked()
    assert (ended, runs.over) == ([1], [])


async def test_a_thread_that_waits_keeps_nothing_alive() -> None:
    runs = Runs()
    threads = Threads(1, runs.finished)

    class Thing:
        def __call__(self) -> None: ...

    thing = Thing()
    gone = weakref.ref(thing)
    threads.run(thing, runs.done)
    del thing
    await runs.wait(1)
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        await trio.sleep(0.01)
    assert gone() is None
    await threads.stop()


@pytest.mark.parametrize("late", [True, False])
async def test_a_cancelled_task_stops_them_all_the_same(late: bool) -> None:
    runs = Runs()
    threads = Threads(2, runs.finished)
    threads.run(lambda: None, runs.done)
    if late:
        await runs.wait(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await threads.stop()
    assert not [one for one in threading.enumerate() if one.name.startswith("extfs-nfs")]
