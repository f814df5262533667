"""The rig itself: guests do what they are told, and the kernel's own pNFS server works in one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guest import knfsd, mountstats
from guest.client import MIB, Client
from guest.conftest import new_disk
from guest.machine import CommandError, Disk, Guest, GuestError

pytestmark = pytest.mark.timeout(180)

MOUNTSTATS = """\
device proc mounted on /proc with fstype proc
device 10.0.2.2:/ mounted on /mnt/nfs with fstype nfs4 statvers=1.1
\topts:\trw,vers=4.2
\tnfsv4:\tbm0=0xfdffbfff,acl=0x3,sessions,pnfs=LAYOUT_BLOCK_VOLUME,lease_time=90
\tevents:\t1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27
\tper-op statistics
\t        NULL: 1 1 0 44 24 20 0 20 0
\t        READ: 0 0 0 0 0 0 0 0 0
\t   LAYOUTGET: 18 19 0 5328 3312 0 7 110 2
"""


def test_mountstats_are_parsed() -> None:
    stats = mountstats.parse(MOUNTSTATS, "/mnt/nfs")
    assert stats.layout == "LAYOUT_BLOCK_VOLUME"
    assert (stats["READ"], stats["LAYOUTGET"], stats["NO_SUCH"]) == (0, 18, 0)
    assert stats.operations["LAYOUTGET"] == mountstats.Operation(18, 19, 110, 2)
    assert (stats.delays, stats.pnfs_reads, stats.pnfs_writes) == (25, 26, 27)
    nothing = stats - stats
    assert not any(row.count for row in nothing.operations.values())
    for text, mountpoint in ((MOUNTSTATS, "/mnt"), (MOUNTSTATS, "/proc"), ("", "/mnt/nfs")):
        with pytest.raises(ValueError, match=r"no mount|not one of NFS"):
            mountstats.parse(text, mountpoint)


def test_commands(boot: Callable[..., Guest]) -> None:
    """Exit codes, output, parallel commands, time limits, and power off."""
    guest = boot(name="one")
    assert guest.check("hostname") == "one\n"
    result = guest.run("echo to stdout; echo to stderr >&2; exit 3")
    assert (result.code, result.output) == (3, "to stdout\nto stderr\n")
    with pytest.raises(CommandError, match="exit 7"):
        guest.check("exit 7")
    content = os.urandom(100_000)
    guest.write_file("/tmp/file", content)
    assert guest.check("wc -c </tmp/file").strip() == "100000"

    waiting = guest.start("while ! [ -e /tmp/go ]; do usleep 1000; done; echo went")
    guest.check("touch /tmp/go")
    assert waiting.check() == "went\n"
    assert guest.run("sleep 60", seconds=1).code == 137

    job = guest.start("sleep 60")
    guest.power_off()
    assert not guest.is_running()
    with pytest.raises(GuestError, match="gone"):
        job.wait()
    with pytest.raises(GuestError):
        guest.run("true", seconds=0.1)


def test_a_disk_is_shared(boot: Callable[..., Guest], make_image: Callable[..., Path]) -> None:
    """The host and two guests see each other's writes, in both directions, without delay."""
    path = make_image(64 * MIB)
    guests = [boot(name=name, disks=[new_disk(path)], wait=False) for name in ("one", "two")]
    for guest in guests:
        guest.wait_booted()
    one, two = guests
    for number, guest in enumerate((one, two, one)):
        guest.check(
            f"echo written {number} | dd of=/dev/sda bs=4096 conv=sync oflag=direct 2>/dev/null"
        )
        with open(path, "rb") as file:
            assert file.read(9) == b"written %d" % number
        other = two if guest is one else one
        read = "dd if=/dev/sda bs=4096 count=1 iflag=direct 2>/dev/null | head -n 1"
        assert other.check(read) == f"written {number}\n"
    with open(path, "r+b") as file:
        file.write(b"by the host\n")
    assert one.check("dd if=/dev/sda bs=4096 count=1 iflag=direct 2>/dev/null | head -n 1") == (
        "by the host\n"
    )


def test_a_paused_guest_goes_on(boot: Callable[..., Guest]) -> None:
    guest = boot()
    job = guest.start("sleep 0.2; echo done")
    guest.pause()
    time.sleep(1)
    guest.resume()
    assert job.check() == "done\n"


def test_kernel_server(boot: Callable[..., Guest], empty_disk: Disk) -> None:
    """knfsd and the client in one guest move data by layouts: the rig shows what it is to show."""
    guest = boot(disks=[empty_disk])
    knfsd.serve(guest)
    client = Client(guest)
    client.prepare()
    client.mount(2049, server="127.0.0.1")
    source = client.random_file("source", 4 * MIB)
    with client.counted() as counted:
        client.copy_in(source, "file", block=64 << 10, direct=True)
        assert client.digest(client.path("file"), direct=True) == client.digest(source)
    counted.assert_by_layout(reads=True, writes=True)
    assert counted["LAYOUTGET"] > 0
    assert counted["GETDEVICEINFO"] > 0
    client.unmount()
    assert client.digest(f"{knfsd.EXPORT}/file") == client.digest(source)


def test_what_goes_through_the_server_is_told(boot: Callable[..., Guest], empty_disk: Disk) -> None:
    """Without blkmapd the client cannot use layouts: data are right, and the counters say so."""
    guest = boot(disks=[empty_disk])
    knfsd.serve(guest)
    client = Client(guest)
    client.prepare(block_layouts=False)
    client.mount(2049, server="127.0.0.1")
    source = client.random_file("source", MIB)
    with client.counted() as counted:
        client.copy_in(source, "file")
        client.drop_caches()
        assert client.digest(client.path("file")) == client.digest(source)
    assert counted["READ"] > 0
    assert counted["WRITE"] > 0
    with pytest.raises(AssertionError, match="through the server"):
        counted.assert_by_layout()
