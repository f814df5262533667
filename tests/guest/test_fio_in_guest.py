"""fio in a guest, with verification: what it wrote it reads back, by layouts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from guest import fio, knfsd
from guest.client import MIB, Client
from guest.machine import Disk, Guest
from guest.world import World

pytestmark = [pytest.mark.timeout(300)]

VERIFY: Mapping[str, str | int] = {
    "verify": "crc32c",
    "verify_fatal": 1,
    "verify_dump": 0,
    "randrepeat": 1,
    "size": "16m",
    "end_fsync": 1,
}

JOBS: dict[str, Mapping[str, str | int]] = {
    "sequential-direct": {"rw": "write", "bs": "1m", "direct": 1, "ioengine": "psync"},
    "random-direct": {
        "rw": "randwrite",
        "bs": "4k",
        "direct": 1,
        "ioengine": "libaio",
        "iodepth": 8,
        "size": "8m",
    },
    "sequential-buffered": {"rw": "write", "bs": "128k", "ioengine": "psync"},
    "random-buffered": {"rw": "randwrite", "bs": "4k", "ioengine": "psync", "size": "8m"},
    "mapped": {"rw": "randwrite", "bs": "4k", "ioengine": "mmap", "size": "4m"},
    "odd-sizes": {
        "rw": "write",
        "bssplit": "777/50:5000/30:33333/20",
        "bs_unaligned": 1,
        "ioengine": "psync",
        "size": "4m",
    },
    "mixed-direct": {
        "rw": "randrw",
        "bs": "16k",
        "direct": 1,
        "ioengine": "libaio",
        "iodepth": 4,
        "fsync": 16,
        "size": "8m",
    },
}


@pytest.mark.fuse
@pytest.mark.parametrize("job", JOBS)
def test_verified(world: World, job: str) -> None:
    client, name = world.client, f"fio-{job}"
    with client.counted() as counted:
        options = {"name": name, "filename": client.path(name), **VERIFY, **JOBS[job]}
        found = fio.run(client.guest, options)
    assert found["write"]["io_bytes"] > 0
    assert found["read"]["io_bytes"] > 0  # the verification
    counted.assert_by_layout(writes=True)
    client.guest.check("sync")
    client.drop_caches()
    assert client.digest(client.path(name)) == world.served.digest(name)
    assert world.served.device_digest(name) == world.served.digest(name)


def test_measured_jobs(boot: Callable[..., Guest], empty_disk: Disk) -> None:
    """The jobs of the benchmark run, here on the raw disk and on the kernel's own server."""
    guest = boot(disks=[empty_disk])
    (row,) = fio.compare({"raw": (guest, "/dev/sda", None)}, ["seq-write"], size=8 * MIB, seconds=1)
    assert row["bandwidth"] > 0
    assert row["latency_median"] > 0
    knfsd.serve(guest)
    client = Client(guest)
    client.prepare()
    client.mount(2049, server="127.0.0.1")
    fio.prepare_file(guest, client.path("file"), 8 * MIB)
    figures, found = fio.bench(
        guest, "rand-read", client.path("file"), size=8 * MIB, seconds=1, client=client
    )
    assert figures.iops > 0
    assert found["jobname"] == "rand-read"
