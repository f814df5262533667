"""Fixtures for storage networks; a network is kept from test to test, as booting takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import LogWatch
from guest import image

from scsi.san import San

HERE = Path(__file__).resolve().parent
_WARNING_LINE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback |internal error")
_failed = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = image.why_no_guest()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.slow)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.stash[_failed] = True


class Keeper:
    """Keeps one storage network from test to test."""

    def __init__(self, make: Callable[[], San]) -> None:
        self._make = make
        self._san: San | None = None

    def san(self) -> San:
        """The one that is kept, if it is well, or a new one."""
        if self._san is not None and not self._san.is_healthy():
            self.discard()
        if self._san is None:
            self._san = self._make()
        return self._san

    def idle(self) -> San:
        """One whose server has not been started."""
        if self._san is not None and self._san.is_serving:
            self.discard()
        return self.san()

    def discard(self) -> None:
        """The next test gets a new one."""
        if self._san is not None:
            san, self._san = self._san, None
            san.close()


@pytest.fixture(scope="session")
def guest_image() -> image.Image:
    """What guests boot."""
    return image.ensure()


@pytest.fixture(scope="session")
def keeper(guest_image: image.Image, run_directory: rundir.RunDirectory) -> Iterator[Keeper]:
    keeper = Keeper(lambda: San(guest_image, run_directory))
    yield keeper
    keeper.discard()


def _warnings(san: San) -> list[str]:
    """Those of the daemon since the last call."""
    return [
        line
        for line in san.server.new_log_lines()
        if _WARNING_LINE.search(line)
        and not any(re.search(pattern, line) for pattern in san.tolerated)
    ]


@pytest.fixture
def san(request: pytest.FixtureRequest, keeper: Keeper, log_watch: LogWatch) -> Iterator[San]:
    """The storage network that tests share; the daemon's warnings count for `log_watch`."""
    san = keeper.san()
    san.tolerated.clear()
    yield san
    log_watch.lines += _warnings(san)
    if request.node.stash.get(_failed, False):
        print(san.evidence())
        keeper.discard()


@pytest.fixture
def idle_san(request: pytest.FixtureRequest, keeper: Keeper) -> Iterator[San]:
    """The same, before a server runs: nobody is registered, and is afterwards."""
    san = keeper.idle()
    yield san
    if request.node.stash.get(_failed, False):
        print(san.evidence())
        keeper.discard()


@pytest.fixture
def own_san(
    request: pytest.FixtureRequest,
    guest_image: image.Image,
    run_directory: rundir.RunDirectory,
    log_watch: LogWatch,
) -> Iterator[Callable[..., San]]:
    """own_san(exports=...): a storage network for one test."""
    with ExitStack() as stack:
        made: list[San] = []

        def make(**options: Any) -> San:
            made.append(San(guest_image, run_directory, **options))
            stack.callback(made[-1].close)
            return made[-1]

        yield make
        for san in made:
            log_watch.lines += _warnings(san)
            if request.node.stash.get(_failed, False):
                print(san.evidence())
