"""What protocol code asks of whoever runs it.

Operations run in one thread, one after the other. An operation that has to wait for the device, or
until something is durable, is a generator that yields `Blocking`; the call runs in another thread,
and its result (or its exception) comes back as the value of the yield. Meanwhile other operations
run: whatever was checked before a yield is to be checked again after it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

__all__ = ["Blocking", "Steps", "run_here"]

T = TypeVar("T")


class Blocking:
    """Run `call` where it may block; it must not touch the state of the server."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


Steps = Generator[Blocking, Any, T]
"""An operation in steps; `return` gives its result."""


def run_here(steps: Steps[T]) -> T:
    """Run to the end, blocking calls included, in this thread: simulations and tests."""
    try:
        wanted = next(steps)
        while True:
            try:
                result = wanted.call()
            except Exception as error:
                wanted = steps.throw(error)
            else:
                wanted = steps.send(result)
    except StopIteration as end:
        value: T = end.value
        return value
