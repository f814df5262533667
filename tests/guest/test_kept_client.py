"""A restart of the server takes nothing from the kernel's client: it asks for a persistent session,
so its client ID, session, opens, locks and layouts are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guest.client import MIB
from guest.served import stamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600)]

RESTART_WARNINGS = r"died|cleaning up|replay|grace|holder|recover"


def only_client(world: World) -> dict[str, Any]:
    """The guest, as the server sees it."""
    [client] = world.served.status()["nfs"]["clients"]
    found: dict[str, Any] = client
    return found


def test_layouts_opens_and_locks_go_on(own_world: Callable[..., World]) -> None:
    world = own_world()
    world.tolerated.append(RESTART_WARNINGS)
    client, served = world.client, world.served
    source = client.random_file("source", 4 * MIB)
    client.copy_in(source, "file", direct=True)
    # A process that holds the file open, with a lock.
    job = client.guest.start(
        f"rangelock {client.path('file')} write 0 100 1000 >/tmp/lock", seconds=300
    )
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 30)
    overwrite = (
        f"dd if={source} of={client.path('file')} bs=1M conv=notrunc,fsync oflag=direct 2>/dev/null"
    )
    client.guest.check(overwrite, 180)
    before = only_client(world)
    assert before["survives_restart"]
    served.restart()
    with client.counted() as counted:
        client.guest.check(overwrite, 180)
        client.guest.check(f"cmp {source} {client.path('file')}", 60)
    after = only_client(world)
    assert after["clientid"] == before["clientid"]
    assert [one["id"] for one in after["sessions"]] == [one["id"] for one in before["sessions"]]
    assert all(one["persistent"] and one["backchannel"] for one in after["sessions"])
    assert served.counter("sessions_kept") == 1
    assert served.counter("sessions_created") == 0
    assert served.counter("states_kept") >= 3
    assert counted["WRITE"] == 0, str(counted)
    assert counted["LOCK"] == 0, str(counted)
    assert counted["LAYOUTGET"] == 0, str(counted)
    # The lock is there for others.
    other = world.second
    assert other.guest.run(f"rangelock {other.path('file')} read 50 1").output == "conflict\n"
    client.guest.check("kill $(pidof rangelock)")
    job.wait()
    assert other.guest.check(f"rangelock {other.path('file')} write 50 1") == "locked\n"


def test_data_that_is_not_committed_is_not_dropped(own_world: Callable[..., World]) -> None:
    """On the disk before the restart, committed after it: the LAYOUTCOMMIT is honoured."""
    world = own_world()
    world.tolerated.append(RESTART_WARNINGS)
    client, served = world.client, world.served
    size = 64 * MIB
    # The kernel is not to commit by itself, nor stamp before the end, which it waits for.
    client.guest.check("echo 0 >/proc/sys/vm/dirty_writeback_centisecs")
    begin = client.stats()
    job = client.guest.start(f"stamp write -d {client.path('file')} 5 0 {size} 65536", seconds=300)
    client.guest.check(
        "until grep -q 'LAYOUTGET: [1-9]' /proc/self/mountstats; do usleep 20000; done\n"
        "usleep 300000; kill -STOP $(pidof stamp)",
        60,
    )
    stopped = client.stats() - begin
    assert stopped.pnfs_writes > 0, str(stopped)
    assert stopped["LAYOUTCOMMIT"] == 0, str(stopped)
    served.restart()
    with client.counted() as counted:
        client.guest.check("kill -CONT $(pidof stamp)")
        job.check()
    assert counted["WRITE"] == 0, str(counted)
    assert counted["LAYOUTCOMMIT"] >= 1, str(counted)
    assert served.path("file").read_bytes() == stamped(5, 0, size)
    assert served.device_digest("file") == served.digest("file")
