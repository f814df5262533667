"""Fixtures for guests: the image, booted guests, and what they leave for a failure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import LogWatch, why_no_mount

from guest import image
from guest.machine import Disk, Guest
from guest.world import World

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
DISK_SIZE = 512 * MIB

_wwns = itertools.count(0x5000C500_15EA7100)


def new_disk(path: Path, *, read_only: bool = False) -> Disk:
    """An image as a SCSI disk with a name that no other disk of this run has."""
    return Disk(path, next(_wwns), read_only)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = image.why_no_guest()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.slow)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def guest_image() -> image.Image:
    """What guests boot."""
    return image.ensure()


@pytest.fixture
def boot(
    guest_image: image.Image, run_directory: rundir.RunDirectory
) -> Iterator[Callable[..., Guest]]:
    """boot(name="guest", disks=[...], ...): a guest that is ended after the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> Guest:
            guest = Guest(
                guest_image, run_directory.path, environment=run_directory.environment(), **options
            )
            return stack.enter_context(guest)

        yield start


@pytest.fixture
def empty_disk(make_image: Callable[..., Path]) -> Disk:
    """A disk of 512 MiB, all zeros."""
    return new_disk(make_image(DISK_SIZE))


# ---- worlds: our own server and its clients ----------------------------------------------------

_WARNING_LINE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback ")
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.stash[_failed] = True


class Keeper:
    """Keeps one world from test to test."""

    def __init__(self, make: Callable[[], World]) -> None:
        self._make = make
        self._world: World | None = None

    def world(self) -> World:
        """The world that is kept, if it is well, or a new one."""
        if self._world is not None and not self._world.is_healthy():
            self.discard()
        if self._world is None:
            self._world = self._make()
        return self._world

    def discard(self) -> None:
        """The next test gets a new world."""
        if self._world is not None:
            world, self._world = self._world, None
            world.close()


@pytest.fixture(scope="session")
def keeper(guest_image: image.Image, run_directory: rundir.RunDirectory) -> Iterator[Keeper]:
    reason = why_no_mount()
    if reason is not None:
        pytest.skip(reason)
    keeper = Keeper(lambda: World(guest_image, run_directory))
    yield keeper
    keeper.discard()


def _warnings(world: World) -> list[str]:
    """Those of the daemon since the last call."""
    return [
        line
        for line in world.served.new_log_lines()
        if _WARNING_LINE.search(line)
        and not any(re.search(pattern, line) for pattern in world.tolerated)
    ]


@pytest.fixture
def world(request: pytest.FixtureRequest, keeper: Keeper, log_watch: LogWatch) -> Iterator[World]:
    """The world that tests share; the daemon's warnings count for `log_watch`."""
    world = keeper.world()
    world.tolerated.clear()
    yield world
    log_watch.lines += _warnings(world)
    if request.node.stash.get(_failed, False):
        print(world.evidence())
        keeper.discard()


@pytest.fixture
def own_world(
    request: pytest.FixtureRequest,
    guest_image: image.Image,
    run_directory: rundir.RunDirectory,
    log_watch: LogWatch,
) -> Iterator[Callable[..., World]]:
    """own_world(export=...): a world for one test, for one that breaks things."""
    reason = why_no_mount()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        made: list[World] = []

        def make(**options: Any) -> World:
            made.append(World(guest_image, run_directory, **options))
            stack.callback(made[-1].close)
            return made[-1]

        yield make
        for world in made:
            log_watch.lines += _warnings(world)
            if request.node.stash.get(_failed, False):
                print(world.evidence())
