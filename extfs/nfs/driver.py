"""Runs generators of effects: from one effect to the next, to the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from extfs.core import JournalFullError
from extfs.nfs.effects import Blocking, CoreCall, Steps, Waiting
from extfs.nfs.timers import Timers

if TYPE_CHECKING:
    from extfs.core.calls import Prepared

__all__ = ["Done", "Driver", "Runner"]

Done = Callable[[Any, Exception | None], None]
"""Told the result, or the exception."""

Begin = Callable[["Prepared[Any]", Done], "tuple[Any, Exception | None] | None"]


class Runner(Protocol):
    """Who has threads and a clock."""

    def blocking(self, call: Callable[[], Any], done: Done) -> None:
        """Run `call` in another thread, then `done` in the protocol's."""
        ...

    def timers_changed(self) -> None:
        """The timers have an earlier time than before."""
        ...


class Driver:
    """Runs steps with a runner's threads and with timers.

    `begin`: who has an event loop begins calls of the core (`CoreCall`) by it instead of blocking a
    thread. It returns result and exception, or None: `Done` will be told in the protocol's thread.
    """

    def __init__(self, runner: Runner, timers: Timers) -> None:
        self._runner = runner
        self._timers = timers
        self.begin: Begin | None = None

    def run(self, steps: Steps[Any], done: Done) -> None:
        """Up to the first effect now; `done` may be called in here."""
        self._advance(steps, done, None, None)

    def _advance(self, steps: Steps[Any], done: Done, value: Any, error: Exception | None) -> None:
        result: Any = None
        failed: Exception | None = None
        while True:
            try:
                wanted = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as end:
                result = end.value
                break
            except Exception as raised:
                failed = raised
                break
            if isinstance(wanted, Waiting):
                self._wait(steps, done, wanted)
                return
            over = self._begin(
                wanted, lambda value, error: self._advance(steps, done, value, error)
            )
            if over is None:
                return
            value, error = over
        try:
            done(result, failed)
        finally:
            del failed  # its traceback has this frame: a cycle otherwise

    def _begin(self, wanted: Blocking, done: Done) -> tuple[Any, Exception | None] | None:
        """Begin a call: how it ended, if it is over at once, else `done` is told."""
        begin = self.begin
        if begin is not None and isinstance(wanted, CoreCall):

            def ended(result: Any, failed: Exception | None) -> None:
                if isinstance(failed, JournalFullError):
                    self._runner.blocking(wanted.call, done)  # which waits for room in a thread
                else:
                    done(result, failed)

            try:
                prepared = wanted.prepare()
            except Exception as error:
                return None, error
            over = begin(prepared, ended)
            if over is None or not isinstance(over[1], JournalFullError):
                return over
        self._runner.blocking(wanted.call, done)
        return None

    def _wait(self, steps: Steps[Any], done: Done, waiting: Waiting) -> None:
        def resume() -> None:
            timer.cancel()
            waiting.resume = None
            self._advance(steps, done, waiting.woken, None)

        timer = self._timers.after(0 if waiting.woken else waiting.seconds, resume)
        if not waiting.woken:
            waiting.resume = resume
