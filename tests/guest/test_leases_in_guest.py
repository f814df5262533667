"""Guests that are away longer than their lease: courtesy while nobody needs what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from guest.client import MIB
from guest.served import stamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

LEASE = 6
AWAY = 2 * LEASE + 2
LOST = r"revoke|fence|quarantine|did not answer|recall|expire|lost"


def test_a_client_that_was_away_goes_on(own_world: Callable[..., World]) -> None:
    """Its lock and its open file are there, and it writes on, by layout."""
    world = own_world(lease=LEASE)
    client, served = world.client, world.served
    client.guest.check(f"stamp write {client.path('away')} 1 0 {MIB} 65536")
    job = client.guest.start(
        f"rangelock {client.path('away')} write 0 0 1000 >/tmp/lock", seconds=200
    )
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 30)
    client.guest.pause()
    time.sleep(AWAY)
    assert served.status()["nfs"]["clients"][0]["standing"] == "courtesy"
    client.guest.resume()
    with client.counted() as counted:
        client.guest.check(f"stamp write {client.path('away')} 2 {MIB} {MIB} 65536")
    counted.assert_by_layout(writes=True)
    assert counted["EXCHANGE_ID"] == 0, "it had to begin anew"
    other = world.second
    assert other.guest.run(f"rangelock {other.path('away')} read 5 1").output == "conflict\n"
    client.guest.check("kill $(pidof rangelock)")
    job.wait()
    assert served.path("away").read_bytes() == stamped(1, 0, MIB) + stamped(2, MIB, MIB)


def test_what_another_needs_is_taken_away(own_world: Callable[..., World]) -> None:
    """A lock of a client whose lease is over is given to who asks; the data of both are right."""
    world = own_world(lease=LEASE)
    world.tolerated.append(LOST)
    client, other, served = world.client, world.second, world.served
    client.guest.check(f"stamp write {client.path('lost')} 1 0 {MIB} 65536")
    client.guest.start(f"rangelock {client.path('lost')} write 0 0 1000 >/tmp/lock", seconds=200)
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 30)
    client.guest.pause()
    assert other.guest.run(f"rangelock {other.path('lost')} write 5 1").output == "conflict\n"
    time.sleep(AWAY)
    assert other.guest.check(f"rangelock {other.path('lost')} write 5 1", 40) == "locked\n"
    other.guest.check(f"stamp write {other.path('lost')} 2 0 65536 65536")
    client.guest.resume()
    client.guest.run(f"ls {client.mountpoint}", 60)  # it notices, and begins anew
    assert served.path("lost").read_bytes() == stamped(2, 0, 65536) + stamped(1, 65536, MIB - 65536)
    client.guest.check(f"stamp write {client.path('again')} 3 0 {MIB} 65536")
    assert served.path("again").read_bytes() == stamped(3, 0, MIB)


def test_a_rebooted_guest_is_a_new_client(own_world: Callable[..., World]) -> None:
    """Same name, other instance: what the one before held is gone at once, without a lease."""
    world = own_world(lease=60)
    world.tolerated.append(LOST)
    client, served = world.client, world.served
    client.guest.start(
        f"stamp write {client.path('before')} 1 0 {MIB} 65536\n"
        f"rangelock {client.path('before')} write 0 0 1000 >/tmp/lock",
        seconds=200,
    )
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 60)
    client.guest.power_off()
    world.forget(client)
    again = world.client
    assert again.guest.check(f"rangelock {again.path('before')} write 0 0") == "locked\n"
    again.guest.check(f"stamp check {again.path('before')} 1 0 {MIB}")
    owners = [known["owner"] for known in served.status()["nfs"]["clients"]]
    assert len(owners) == len(set(owners)), owners
