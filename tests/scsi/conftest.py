"""Fixtures for storage networks; a network is kept from test to test, as booting takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import FAILED, LogWatch
from guest import image
from guest.keeping import Keeper, mark, warnings_in

from scsi.san import San

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, HERE)


@pytest.fixture(scope="session")
def keeper(guest_image: image.Image, run_directory: rundir.RunDirectory) -> Iterator[Keeper[San]]:
    keeper = Keeper(lambda: San(guest_image, run_directory))
    yield keeper
    keeper.discard()


def _warnings(san: San) -> list[str]:
    """Those of the daemon since the last call."""
    return warnings_in(san.server.new_log_lines(), san.tolerated)


@pytest.fixture
def san(request: pytest.FixtureRequest, keeper: Keeper[San], log_watch: LogWatch) -> Iterator[San]:
    """The storage network that tests share; the daemon's warnings count for `log_watch`."""
    san = keeper.get()
    san.tolerated.clear()
    yield san
    log_watch.lines += _warnings(san)
    if request.node.stash.get(FAILED, False):
        print(san.evidence())
        keeper.discard()


@pytest.fixture
def idle_san(request: pytest.FixtureRequest, keeper: Keeper[San]) -> Iterator[San]:
    """The same, before a server runs: nobody is registered, and is afterwards."""
    san = keeper.get(suits=lambda san: not san.is_serving)
    yield san
    if request.node.stash.get(FAILED, False):
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
            if request.node.stash.get(FAILED, False):
                print(san.evidence())
