"""Delegations of the kernel's client, and local use that conflicts with them."""

from __future__ import annotations

import os
import time

import pytest

from guest.client import Client
from guest.machine import Job
from guest.served import RECALL_SECONDS
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]


def keep_delegated(world: World, name: str) -> Job:
    """Read a file and keep it open, with a delegation, until /tmp/release is made.

    Who has just written the file here may still have it open for the kernel: the last close of a
    file reaches a filesystem in user space a moment later.
    """
    for _ in range(10):
        granted = world.served.counter("delegations")
        job = keep_open(world.client, name)
        if world.served.counter("delegations") > granted:
            return job
        release(world.client, job)
    pytest.fail("no delegation was granted")


def keep_open(client: Client, name: str) -> Job:
    """Read a file and keep it open until /tmp/release is made."""
    client.guest.check("rm -f /tmp/release /tmp/opened")
    job = client.guest.start(
        f"exec 9<{client.path(name)}; cat <&9 >/dev/null\n"
        "touch /tmp/opened; until [ -e /tmp/release ]; do usleep 20000; done",
        120,
    )
    client.guest.check("until [ -e /tmp/opened ]; do usleep 20000; done")
    return job


def release(client: Client, job: Job) -> None:
    client.guest.check("touch /tmp/release")
    job.check()


def test_opening_again_needs_no_server(world: World) -> None:
    """With a read delegation the client opens, checks and closes by itself."""
    client = world.client
    world.served.path("delegated").write_bytes(b"content")
    job = keep_delegated(world, "delegated")
    with client.counted() as counted:
        for _ in range(5):
            assert client.guest.check(f"cat {client.path('delegated')}") == "content"
    assert counted["OPEN"] + counted["OPEN_NOATTR"] + counted["CLOSE"] == 0, str(counted)
    assert counted["READ"] == 0
    release(client, job)


@pytest.mark.parametrize("change", ["write", "truncate", "chmod", "rename", "unlink"])
def test_a_local_change_recalls_it(world: World, change: str) -> None:
    client, served = world.client, world.served
    name = f"delegated-{change}"
    path = served.path(name)
    path.write_bytes(b"before")
    job = keep_delegated(world, name)
    returned = served.counter("delegations_returned")
    begin = time.monotonic()
    match change:
        case "write":
            path.write_bytes(b"after!")
        case "truncate":
            os.truncate(path, 3)
        case "chmod":
            path.chmod(0o600)
        case "rename":
            path.rename(served.path(f"{name}-new"))
        case _:
            path.unlink()
    assert time.monotonic() - begin < RECALL_SECONDS
    assert served.counter("delegations_returned") == returned + 1
    release(client, job)
    client.drop_caches()  # names are cached for a while, by time
    match change:
        case "write":
            assert client.guest.check(f"cat {client.path(name)}") == "after!"
        case "truncate":
            assert client.guest.check(f"cat {client.path(name)}") == "bef"
        case "chmod":
            assert client.guest.check(f"stat -c %a {client.path(name)}") == "600\n"
        case _:
            assert client.guest.run(f"cat {client.path(name)}").code != 0


def test_local_readers_are_no_conflict(world: World) -> None:
    client = world.client
    path = world.served.path("read-by-both")
    path.write_bytes(b"content")
    job = keep_delegated(world, "read-by-both")
    returned = world.served.counter("delegations_returned")
    assert path.read_bytes() == b"content"
    assert world.served.counter("delegations_returned") == returned
    release(client, job)


def test_a_file_open_for_writing_here_is_not_delegated(world: World) -> None:
    client, served = world.client, world.served
    path = served.path("written-here")
    path.write_bytes(b"content")
    granted = served.counter("delegations")
    with open(path, "ab", buffering=0) as file:
        job = keep_open(client, "written-here")
        assert served.counter("delegations") == granted
        file.write(b" and more")
        assert client.guest.check(f"cat {client.path('written-here')}") == "content and more"
    release(client, job)
