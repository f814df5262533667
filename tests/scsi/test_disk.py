"""The rig itself: the target keeps reservations as SPC-4 says, and the kernel of a host sees it."""

from __future__ import annotations

import pytest
from guest.machine import Guest

from scsi import initiator, target
from scsi.san import STORAGE_NIC, San

pytestmark = pytest.mark.timeout(300)

FIRST, SECOND = "0xe5f5800000000001", "0xe5f5000000000002"


def persist(guest: Guest, disk: str, words: str) -> str:
    """PERSISTENT RESERVE IN or OUT; the first command after a preempt gets a unit attention."""
    command = f"sg_persist -n {words} {disk} 2>&1"
    return guest.check(f"{command} || {command}")


def test_preempted_host_is_refused(idle_san: San) -> None:
    """Two nexuses; the first preempts the second while that writes all the time."""
    san, server = idle_san, idle_san.server_guest
    first, second = san.server.device, initiator.login(server, nexus="second")
    try:
        persist(server, first, f"-o -G -S {FIRST} -Z")
        persist(server, second, f"-o -G -S {SECOND} -Z")
        persist(server, first, f"-o -R -T 6 -K {FIRST}")
        assert f"Key={FIRST}" in persist(server, first, "-r")
        writer = server.start(
            f"stamp write -d -l -a /tmp/progress {second} 0xE0F51 0 1048576 65536"
        )
        server.check("until [ -s /tmp/progress ]; do usleep 10000; done")
        persist(server, first, f"-o -A -T 6 -K {FIRST} -S {SECOND}")
        result = writer.wait()
        assert result.code == 2
        assert "stamp: write: Invalid exchange" in result.output  # EBADE
        assert SECOND not in persist(server, first, "-k")
        assert FIRST in persist(server, first, "-k")
        # Until somebody registers again.
        assert server.run(f"dd if={second} of=/dev/null bs=4k count=1 iflag=direct").code != 0
        persist(server, second, f"-o -G -S {SECOND} -Z")
        server.check(f"dd if={second} of=/dev/null bs=4k count=1 iflag=direct")
    finally:
        server.run(f"sg_persist -n -o -C -K {FIRST} {first}")
        initiator.logout(server, "second")


def test_registrations_outlive_the_target(idle_san: San) -> None:
    """Sessions come back by themselves, with the same nexus, and the reservation is in force."""
    san, server, disk = idle_san, idle_san.server_guest, idle_san.server.device
    persist(server, disk, f"-o -G -S {FIRST} -Z")
    persist(server, disk, f"-o -R -T 6 -K {FIRST}")
    san.restart_target()
    assert FIRST in persist(server, disk, "-k")
    assert f"Key={FIRST}" in persist(server, disk, "-r")
    server.check(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct")
    assert "Exclusive Access, Registrants Only" in target.registrations(san.target)
    server.check(f"sg_persist -n -o -C -K {FIRST} {disk}")


def test_cable(san: San) -> None:
    """A segment without its cable passes nothing; what was under way is done when it is back."""
    server, disk = san.server_guest, san.server.device
    server.plug(STORAGE_NIC, False)
    assert server.run("ping -c 1 -W 1 192.168.77.1").code != 0
    reader = server.start(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct 2>&1")
    assert server.run("usleep 300000; pidof dd").code == 0
    server.plug(STORAGE_NIC, True)
    reader.check()
