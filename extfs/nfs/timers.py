"""What is to be done later, on a clock that a simulation can move."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

__all__ = ["Timer", "Timers"]


class Timer:
    """One thing to be done; `cancel` takes it back."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """It will not be called. After its call this does nothing."""
        self.call = None


class Timers:
    """Timers in order of their time, in seconds of `clock`.

    `changed` is called when the next one is earlier than the one before was.
    """

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        self._clock = clock
        self._changed = changed
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call `call` once, `seconds` from now."""
        timer = Timer(self._clock() + seconds, call)
        heapq.heappush(self._heap, (timer.due, next(self._numbers), timer))
        if self._heap[0][2] is timer:
            self._changed()
        return timer

    def next_due(self) -> float | None:
        """When `run` has something to do, on the clock; None: never."""
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def run(self) -> None:
        """Call what is due."""
        now = self._clock()
        while (due := self.next_due()) is not None and due <= now:
            timer = heapq.heappop(self._heap)[2]
            call, timer.call = timer.call, None
            if call is not None:
                call()
