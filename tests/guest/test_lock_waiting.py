"""Guests that wait for locks: the server tells them when one is free, so they wait no longer."""

from __future__ import annotations

import fcntl
import time

import pytest

from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

PROMPT_SECONDS = 12
"""Linux asks again by itself only after 30 seconds, when it was promised to be told."""


def test_behind_a_local_process(world: World) -> None:
    client, served = world.client, world.served
    path = served.path("awaited-locally")
    path.touch()
    told = served.counter("lock_notifications")
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        job = client.guest.start(f"flock {client.path(path.name)} echo mine", 90)
        time.sleep(3)
    begin = time.monotonic()
    assert job.check() == "mine\n"
    assert time.monotonic() - begin < PROMPT_SECONDS
    assert served.counter("lock_notifications") > told


def test_behind_another_guest(world: World) -> None:
    one, two, served = world.client, world.second, world.served
    served.path("awaited").touch()
    told = served.counter("lock_notifications")
    holding = one.guest.start(f"flock {one.path('awaited')} sh -c 'touch /tmp/has; sleep 6'", 90)
    one.guest.check("until [ -e /tmp/has ]; do usleep 20000; done; rm /tmp/has", 60)
    job = two.guest.start(f"flock {two.path('awaited')} echo mine", 90)
    holding.check()
    begin = time.monotonic()
    assert job.check() == "mine\n"
    assert time.monotonic() - begin < PROMPT_SECONDS
    assert served.counter("lock_notifications") > told
