"""Runs generators of effects: from one effect to the next, to the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from extfs.nfs.effects import Blocking, Steps, Waiting
from extfs.nfs.timers import Timers

__all__ = ["Done", "Driver", "Runner"]

Done = Callable[[Any, Exception | None], None]
"""Told the result, or the exception."""


class Runner(Protocol):
    """Who has threads and a clock."""

    def blocking(self, call: Callable[[], Any], done: Done) -> None:
        """Run `call` in another thread, then `done` in the protocol's."""
        ...

    def timers_changed(self) -> None:
        """The timers have an earlier time than before."""
        ...


class Driver:
    """Runs steps with a runner's threads and with timers."""

    def __init__(self, runner: Runner, timers: Timers) -> None:
        self._runner = runner
        self._timers = timers

    def run(self, steps: Steps[Any], done: Done) -> None:
        """Up to the first effect now; `done` may be called in here."""
        self._advance(steps, done, None, None)

    def _advance(self, steps: Steps[Any], done: Done, value: Any, error: Exception | None) -> None:
        result: Any = None
        failed: Exception | None = None
        try:
            wanted = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            result = end.value
        except Exception as raised:
            failed = raised
        else:
            if isinstance(wanted, Blocking):
                self._runner.blocking(
                    wanted.call, lambda result, failed: self._advance(steps, done, result, failed)
                )
            else:
                self._wait(steps, done, wanted)
            return
        try:
            done(result, failed)
        finally:
            del failed  # its traceback has this frame: a cycle otherwise

    def _wait(self, steps: Steps[Any], done: Done, waiting: Waiting) -> None:
        def resume() -> None:
            timer.cancel()
            waiting.resume = None
            self._advance(steps, done, waiting.woken, None)

        timer = self._timers.after(0 if waiting.woken else waiting.seconds, resume)
        if not waiting.woken:
            waiting.resume = resume
