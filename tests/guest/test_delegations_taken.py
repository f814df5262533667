"""Delegations that a guest gives up for others, or that are taken from it: no old contents."""

from __future__ import annotations

import time

import pytest

from guest.client import Client
from guest.served import RECALL_SECONDS
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

REVOKED = r"revoked|recall|did not answer|lost"


def read_with_delegation(world: World, client: Client, name: str, content: bytes) -> None:
    """A file made locally, read by the guest, which keeps a READ delegation of it."""
    world.served.path(name).write_bytes(content)
    before = world.served.counter("delegations")
    assert client.guest.check(f"cat {client.path(name)}").encode() == content
    assert world.served.counter("delegations") == before + 1


def test_another_guest_recalls_it(world: World) -> None:
    one, two = world.client, world.second
    read_with_delegation(world, one, "of-two", b"first\n")
    two.guest.check(f"echo second >{two.path('of-two')}")
    assert one.guest.check(f"cat {one.path('of-two')}") == "second\n"
    one.guest.check(f"echo third >{one.path('of-two')}")
    assert two.guest.check(f"cat {two.path('of-two')}") == "third\n"


def test_a_guest_that_sleeps_loses_it(world: World) -> None:
    """The local writer waits for the recall time; the guest reads the new contents when it wakes.

    Linux takes the change that it sees while it returns a delegation that is no more for its own;
    see FREE_STATEID in `extfs.nfs.operations.locks`.
    """
    client, served = world.client, world.served
    world.tolerated.append(REVOKED)
    read_with_delegation(world, client, "asleep", b"old\n")
    client.guest.pause()
    try:
        begin = time.monotonic()
        served.path("asleep").write_bytes(b"new\n")
        seconds = time.monotonic() - begin
    finally:
        client.guest.resume()
    assert seconds < RECALL_SECONDS + 10
    deadline = time.monotonic() + 60
    while client.guest.check(f"cat {client.path('asleep')}") != "new\n":
        assert time.monotonic() < deadline, "the guest goes on with what it had"
        time.sleep(1)
    read_with_delegation(world, client, "awake", b"again\n")
