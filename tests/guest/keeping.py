"""Worlds of guests that are kept from test to test, as booting takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pytest

from guest import image

_WARNING_LINE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback |internal error")


class _Keepable(Protocol):
    def is_healthy(self) -> bool: ...
    def close(self) -> None: ...


K = TypeVar("K", bound=_Keepable)


class Keeper(Generic[K]):
    """Keeps one."""

    def __init__(self, make: Callable[[], K]) -> None:
        self._make = make
        self._kept: K | None = None

    def get(self, *, suits: Callable[[K], bool] = lambda _: True) -> K:
        """The one that is kept, if it is well and suits, or a new one."""
        if self._kept is not None and not (self._kept.is_healthy() and suits(self._kept)):
            self.discard()
        if self._kept is None:
            self._kept = self._make()
        return self._kept

    def discard(self) -> None:
        """The next test gets a new one."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            kept.close()


def warnings_in(lines: Iterable[str], tolerated: Collection[str]) -> list[str]:
    """The warnings among the lines of a daemon's log, but for patterns that are tolerated."""
    return [
        line
        for line in lines
        if _WARNING_LINE.search(line) and not any(re.search(pattern, line) for pattern in tolerated)
    ]


def mark(items: Iterable[pytest.Item], folder: Path) -> None:
    """The tests below `folder` need guests: marked, and skipped where there are none."""
    reason = image.why_no_guest()
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.slow)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
