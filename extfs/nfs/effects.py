"""What protocol code asks of whoever runs it.

Operations run in one thread, one after the other. An operation that has to wait for the device, or
until something is durable, is a generator that yields `Blocking`; the call runs in another thread,
and its result (or its exception) comes back as the value of the yield. Meanwhile other operations
run: whatever was checked before a yield is to be checked again after it. `CoreCall` is a `Blocking`
that a runner with an event loop can do without a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from extfs.core import Layouts
    from extfs.core.calls import Prepared

__all__ = ["Blocking", "CoreCall", "Effect", "Steps", "Waiting", "run_here"]

T = TypeVar("T")


class Blocking:
    """Run `call` where it may block; it must not touch the state of the server."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


class CoreCall(Blocking):
    """A call of the core that waits, and that an event loop may begin instead of blocking a thread
    (`extfs.core.calls`). `prepare` may read metadata; its exceptions are the call's."""

    __slots__ = ("prepare",)

    def __init__(self, layouts: Layouts, prepare: Callable[[], Prepared[Any]]) -> None:
        super().__init__(lambda: layouts.run(prepare()))
        self.prepare = prepare


class Waiting:
    """Go on when `wake` was called, with True, or after `seconds`, with False.

    `wake` may be called any time in the protocol's thread, also before this is yielded.
    """

    __slots__ = ("resume", "seconds", "woken")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.woken = False
        self.resume: Callable[[], None] | None = None

    def wake(self) -> None:
        """What was waited for has come."""
        self.woken = True
        resume, self.resume = self.resume, None
        if resume is not None:
            resume()


Effect = Blocking | Waiting
Steps = Generator[Effect, Any, T]
"""An operation in steps; `return` gives its result."""


def run_here(steps: Steps[T]) -> T:
    """Run to the end, blocking calls included, in this thread: simulations and tests.

    Nobody wakes a `Waiting` meanwhile.
    """
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, Waiting):
                wanted = steps.send(wanted.woken)
                continue
            try:
                result = wanted.call()
            except Exception as error:
                wanted = steps.throw(error)
            else:
                wanted = steps.send(result)
    except StopIteration as end:
        value: T = end.value
        return value
