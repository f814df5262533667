"""The server is killed and started again while guests write."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from guest.client import MIB
from guest.served import assert_no_canary, stamped, unstamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600)]

GRACE_SECONDS = 100
RESTART_WARNINGS = r"died|cleaning up|replay|grace|holder|recover"


@pytest.mark.parametrize(
    ("kills", "cleanly"), [(1, False), (3, False), (1, True)], ids=["kill", "three-kills", "umount"]
)
def test_nothing_fsynced_is_lost(
    own_world: Callable[..., World], kills: int, cleanly: bool
) -> None:
    """Writes go on over the restarts; whatever fsync(2) returned for is there, byte for byte."""
    world = own_world()
    world.tolerated.append(RESTART_WARNINGS)
    client, served = world.client, world.served
    size = 24 * MIB
    jobs = [
        client.guest.start(
            f"stamp write {flags} -f -a /tmp/acked-{name} {client.path(name)} {seed} 0 {size} "
            "65536",
            seconds=400,
        )
        for name, flags, seed in (("direct", "-d", 1), ("buffered", "", 2))
    ]
    for _ in range(kills):
        client.guest.check(
            "n=$(cat /tmp/acked-* 2>/dev/null | wc -l); while [ $(cat /tmp/acked-* 2>/dev/null |"
            " wc -l) -lt $((n + 20)) ]; do usleep 50000; done",
            seconds=GRACE_SECONDS + 60,
        )
        if cleanly:
            served.stop()
        else:
            served.kill()
        # Nobody but the guest's memory knows more than this.
        acked = {
            name: int(client.guest.check(f"tail -n 1 /tmp/acked-{name}") or 0)
            for name in ("direct", "buffered")
        }
        served.start()
        for name, seed in (("direct", 1), ("buffered", 2)):
            content = served.path(name).read_bytes()
            assert content[: acked[name]] == stamped(seed, 0, acked[name]), name
            assert_no_canary(content, name)
            assert not unstamped(content, [seed]), name
    for job in jobs:
        job.check()
    for name, seed in (("direct", 1), ("buffered", 2)):
        assert served.path(name).read_bytes() == stamped(seed, 0, size)
        assert served.device_digest(name) == served.digest(name)
    client.drop_caches()
    for name, seed in (("direct", 1), ("buffered", 2)):
        client.guest.check(f"stamp check {client.path(name)} {seed} 0 {size}")
    client.unmount()
    served.fsck()


def test_opens_and_locks_are_reclaimed(own_world: Callable[..., World]) -> None:
    """A client has its lock again after the grace period, and nobody else got it meanwhile."""
    world = own_world()
    world.tolerated.append(RESTART_WARNINGS)
    client, served = world.client, world.served
    served.path("file").write_bytes(bytes(1000))
    job = client.guest.start(
        f"rangelock {client.path('file')} write 0 100 1000 >/tmp/lock", seconds=300
    )
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 30)
    served.restart()
    # Anything that needs the server makes the client notice; it waits while the grace lasts.
    client.guest.check(f"echo new >{client.path('new')}; sync", seconds=GRACE_SECONDS + 60)
    other = world.second
    assert other.guest.run(f"rangelock {other.path('file')} read 50 1").output == "conflict\n"
    client.guest.check("kill $(pidof rangelock)")
    job.wait()
    assert other.guest.check(f"rangelock {other.path('file')} write 50 1") == "locked\n"


def test_a_clean_restart_ends_the_grace_early(own_world: Callable[..., World]) -> None:
    """When all clients of before have reclaimed, nobody waits for the rest of the grace period."""
    world = own_world()
    world.tolerated.append(RESTART_WARNINGS)
    client, served = world.client, world.served
    client.guest.check(f"echo before >{client.path('file')}; sync")
    served.stop()
    served.start()
    begin = time.monotonic()
    client.guest.check(f"echo after >{client.path('file2')}; sync", seconds=GRACE_SECONDS + 60)
    assert time.monotonic() - begin < 45
    assert served.path("file").read_bytes() == b"before\n"
    assert served.path("file2").read_bytes() == b"after\n"
