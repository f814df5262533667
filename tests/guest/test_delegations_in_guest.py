"""Delegations of the kernel's client: what they spare it, and that nobody sees old contents."""

from __future__ import annotations

import os
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


def test_a_delegation_spares_opens(world: World) -> None:
    """The second and third time the guest opens the file by itself."""
    client = world.client
    read_with_delegation(world, client, "spared", b"contents\n")
    with client.counted() as counted:
        for _ in range(3):
            assert client.guest.check(f"cat {client.path('spared')}") == "contents\n"
    assert counted["OPEN"] == 0
    assert counted["READ"] == 0


def test_local_users_recall_it(world: World) -> None:
    """Each conflicting operation of the mount goes on, and the guest sees what it did."""
    client, served = world.client, world.served
    path = served.path("local-conflict")
    changes = [
        lambda: path.write_bytes(b"truncated and written\n"),
        lambda: os.truncate(path, 9),
        lambda: path.chmod(0o640),
        lambda: path.rename(served.path("renamed")) and None,
    ]
    for number, change in enumerate(changes):
        read_with_delegation(world, client, "local-conflict", b"contents %d\n" % number)
        recalls = served.counter("delegation_recalls")
        begin = time.monotonic()
        change()
        assert time.monotonic() - begin < RECALL_SECONDS, "the recall was not answered"
        assert served.counter("delegation_recalls") == recalls + 1
        name = "renamed" if served.path("renamed").exists() else "local-conflict"
        seen = client.guest.check(f"cat {client.path(name)}").encode()
        assert seen == served.path(name).read_bytes()
        assert client.guest.check(f"stat -c %a {client.path(name)}").strip() == (
            f"{served.path(name).stat().st_mode & 0o7777:o}"
        )
        time.sleep(0.1)
        served.path(name).unlink()
    assert client.guest.run(f"cat {client.path('local-conflict')}").code != 0


def test_another_guest_recalls_it(world: World) -> None:
    one, two = world.client, world.second
    read_with_delegation(world, one, "of-two", b"first\n")
    two.guest.check(f"echo second >{two.path('of-two')}")
    assert one.guest.check(f"cat {one.path('of-two')}") == "second\n"
    one.guest.check(f"echo third >{one.path('of-two')}")
    assert two.guest.check(f"cat {two.path('of-two')}") == "third\n"


def test_a_guest_that_sleeps_loses_it(world: World) -> None:
    """The local writer waits for the recall time, the guest finds out when it wakes."""
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
