"""The guest's half of `scripts/bench nfs`: fio in a virtual machine, through layouts and beside it.

One guest has its raw disk and our filesystem; another is the kernel's own pNFS server and client at
once, on XFS. Both are emulated (TCG), so only the ratios say something; each ratio is between the
jobs of one round, one after the other. An emulated CPU makes the client's code many times dearer
beside a disk in memory than it is: so the jobs run again on disks that are held to what a disk can
do, and `nfs_where` tells what the CPU did for each I/O.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rundir
from guest import fio, knfsd
from guest.client import Client
from guest.image import Image, ensure, why_no_guest
from guest.machine import Disk, Guest
from guest.served import Served
from rich.table import Table

from . import nfs_where

MIB = 1 << 20
FILE_BYTES = 256 * MIB
DISK_BYTES = 512 * MIB
COLD_BYTES = 64 * MIB
SLOW_BYTES = 400 * MIB
SLOW_OPERATIONS = 2000
"""A second, of disks that are held back."""
MEMORY = 1024
"""MiB of a guest. With 512 fio was once killed for want of it."""
WWN = 0x5000C5000E87F600
TITLES = {
    "seq-read": "1 MiB sequential read",
    "seq-write": "1 MiB sequential write",
    "rand-read": "4 KiB random read, depth 8",
    "rand-write": "4 KiB random write, depth 8",
}


def run(rounds: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Rows of all jobs, and what a first write costs; None: no guests on this machine."""
    reason = why_no_guest()
    if reason is not None:
        say(f"no guests: {reason}")
        return None
    image = ensure(say)
    directory = rundir.RunDirectory()
    with ExitStack() as stack:
        stack.callback(directory.close)
        served = stack.enter_context(Served(directory))
        raw = directory.new_image(DISK_BYTES, "raw")
        peer_disk = directory.new_image(DISK_BYTES, "peer")
        guest = stack.enter_context(
            Guest(
                image, directory.path, name="client",
                disks=[Disk(served.image, WWN), Disk(raw, WWN + 1)], memory=MEMORY,
            )
        )  # fmt: skip
        peer = stack.enter_context(
            Guest(
                image, directory.path, name="peer", disks=[Disk(peer_disk, WWN + 2)], memory=MEMORY
            )
        )
        client = Client(guest)
        client.prepare()
        client.mount(served.port)
        knfsd.serve(peer)
        beside = Client(peer)
        beside.prepare()
        beside.mount(2049, server="127.0.0.1")
        for each in (client, beside):
            fio.prepare_file(each.guest, each.path("file"), FILE_BYTES)
        fio.prepare_file(guest, "/dev/sdb", FILE_BYTES)
        rows = fio.compare(
            {
                "raw": (guest, "/dev/sdb", None),
                "extfs": (guest, client.path("file"), client),
                "knfsd": (peer, beside.path("file"), beside),
            },
            size=FILE_BYTES, seconds=seconds, rounds=rounds,
        )  # fmt: skip
        slow = _on_slow_disks(guest, client, seconds, rounds)
        assert served.mounted is not None
        where = {
            "undisturbed": nfs_where.undisturbed(
                nfs_where.Place(guest, client.path("file"), "sda"), client,
                served.mounted.daemon.pid, size=FILE_BYTES, seconds=seconds / 2,
            ),
            "costs": _costs(image, directory, served, raw, seconds),
        }  # fmt: skip
        cold = {name: _first_write(each) for name, each in (("extfs", client), ("knfsd", beside))}
        for each in (client, beside):
            each.unmount()
    return {"rows": rows, "slow_rows": slow, "where": where, "cold_write_mib_s": cold}


def _costs(
    image: Image, directory: rundir.RunDirectory, served: Served, raw: Path, seconds: float
) -> dict[str, Any]:
    """In a guest of its own, that counts instructions."""
    with Guest(
        image, directory.path, name="counting",
        disks=[Disk(served.image, WWN + 3), Disk(raw, WWN + 4)],
        shares={nfs_where.SHARE: nfs_where.build(directory.path / "share")},
        instruction_ns=nfs_where.INSTRUCTION_NS, wait=False, memory=MEMORY,
    ) as guest:  # fmt: skip
        guest.wait_booted(nfs_where.BOOT_SECONDS)
        nfs_where.prepare(guest)
        client = Client(guest)
        client.prepare()
        client.mount(served.port)
        places = {
            "raw": nfs_where.Place(guest, "/dev/sdb", "sdb"),
            "extfs": nfs_where.Place(guest, client.path("file"), "sda"),
        }
        found = nfs_where.costs(places, size=FILE_BYTES, seconds=2 * seconds)
        client.unmount()
        return found


def _on_slow_disks(
    guest: Guest, client: Client, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    guest.limit(operations=SLOW_OPERATIONS, size=SLOW_BYTES)
    try:
        return fio.compare(
            {"raw": (guest, "/dev/sdb", None), "extfs": (guest, client.path("file"), client)},
            size=FILE_BYTES, seconds=seconds, rounds=rounds,
        )  # fmt: skip
    finally:
        guest.limit()


def _first_write(client: Client) -> float:
    """MiB/s of writing a new file: layouts are asked for, blocks allocated, commits sent."""
    found = fio.run(
        client.guest,
        {
            "name": "cold", "filename": client.path("cold"), "rw": "write", "bs": "1m",
            "size": COLD_BYTES, "ioengine": "psync", "direct": 1, "end_fsync": 1,
        },
    )  # fmt: skip
    return float(found["write"]["bw_bytes"]) / MIB


def table(result: dict[str, Any]) -> Table:
    """Medians over the rounds, and ratios within them."""
    shown = Table(
        "job in a guest", "raw disk", "extfs", "knfsd", "extfs / raw", "extfs / knfsd",
        "extfs / raw, disks held back",
        caption=f"held back: {SLOW_BYTES // MIB} MiB and {SLOW_OPERATIONS:,} I/Os a second",
    )  # fmt: skip
    rounds = sorted({row["round"] for row in result["rows"]})
    for job, title in TITLES.items():
        key = "bandwidth" if job.startswith("seq") else "iops"
        found = {
            (row["place"], row["round"]): row[key] for row in result["rows"] if row["job"] == job
        }

        def median(place: str, found: dict[Any, float] = found) -> float:
            return statistics.median(found[place, number] for number in rounds)

        def ratio(other: str, found: dict[Any, float] = found) -> float:
            return statistics.median(
                found["extfs", number] / found[other, number] for number in rounds
            )

        held = {
            (row["place"], row["round"]): row[key]
            for row in result["slow_rows"]
            if row["job"] == job
        }
        unit = 1 if key == "iops" else MIB
        shown.add_row(
            f"{title}, {'iops' if unit == 1 else 'MiB/s'}",
            *(f"{median(place) / unit:,.0f}" for place in ("raw", "extfs", "knfsd")),
            f"{ratio('raw'):.2f}", f"{ratio('knfsd'):.2f}", f"{ratio('raw', held):.2f}",
        )  # fmt: skip
    cold = result["cold_write_mib_s"]
    shown.add_row(
        "first write of a new file, 1 MiB, MiB/s", "", f"{cold['extfs']:,.0f}",
        f"{cold['knfsd']:,.0f}", "", f"{cold['extfs'] / cold['knfsd']:.2f}", "",
    )  # fmt: skip
    return shown
