"""Fixtures for guests: the image, booted guests, and what they leave for a failure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import FAILED, LogWatch, why_no_mount

from guest import image
from guest.keeping import Keeper, mark, warnings_in
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
    mark(items, HERE)


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


@pytest.fixture(scope="session")
def keeper(guest_image: image.Image, run_directory: rundir.RunDirectory) -> Iterator[Keeper[World]]:
    reason = why_no_mount()
    if reason is not None:
        pytest.skip(reason)
    keeper = Keeper(lambda: World(guest_image, run_directory))
    yield keeper
    keeper.discard()


def _warnings(world: World) -> list[str]:
    """Those of the daemon since the last call."""
    return warnings_in(world.served.new_log_lines(), world.tolerated)


@pytest.fixture
def world(
    request: pytest.FixtureRequest, keeper: Keeper[World], log_watch: LogWatch
) -> Iterator[World]:
    """The world that tests share; the daemon's warnings count for `log_watch`."""
    world = keeper.get()
    world.tolerated.clear()
    yield world
    log_watch.lines += _warnings(world)
    if request.node.stash.get(FAILED, False):
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
            if request.node.stash.get(FAILED, False):
                print(world.evidence())
