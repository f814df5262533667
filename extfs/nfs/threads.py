"""Threads for the calls of the core that wait for the device.

A call and its answer cross over between two threads twice; through `trio.to_thread` that took 130
microseconds, half of which was its own work: a task for each call, a limit to be asked, a context
to be copied. Here threads wait at a queue, and answers come back by `TrioToken.run_sync_soon`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import trio

__all__ = ["Threads"]

Done = Callable[[Any, "Exception | None"], None]


class Threads:
    """Up to `most` threads, begun as they are needed. All methods belong to trio's thread.

    `finished` is called there with each call's `done`, result and exception; not after `stop`.
    """

    def __init__(self, most: int, finished: Callable[[Done, Any, Exception | None], None]) -> None:
        self._most = most
        self._finished = finished
        self._token = trio.lowlevel.current_trio_token()
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Done] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._wanted = 0
        """Calls that are waiting or running."""
        self._stopped = False

    def run(self, call: Callable[[], Any], done: Done) -> None:
        """Run `call` in a thread as soon as one is free."""
        if self._stopped:
            return
        self._wanted += 1
        if self._wanted > len(self._threads) < self._most:
            name = f"extfs-nfs-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._queue.put((call, done))

    async def stop(self) -> None:
        """No call runs any more when this returns; those that have not begun never do.

        A call that waits for the device ends when that answers or gives up, and the close of the
        filesystem needs the device anyway. What waits for somebody else has a limit of its own
        (`extfs.layout.reserved_mount.ReservedMount.new_key`).
        """
        self._stopped = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        threads, self._threads = self._threads, []

        def join() -> None:
            for thread in threads:
                thread.join()

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(join)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            call, done = item
            result: Any = None
            failed: Exception | None = None
            try:
                result = call()
            except Exception as error:
                failed = error
            try:
                self._token.run_sync_soon(self._over, done, result, failed)
            except trio.RunFinishedError:
                return
            del item, call, done, result, failed  # whoever waits keeps nothing alive

    def _over(self, done: Done, result: Any, failed: Exception | None) -> None:
        self._wanted -= 1
        if not self._stopped:
            self._finished(done, result, failed)
