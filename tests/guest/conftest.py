"""Fixtures for guests: the image, booted guests, and what they leave for a failure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rundir

from guest import image
from guest.machine import Disk, Guest

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
