"""Where the time of a guest's I/O goes: on its raw disk, and through a layout.

Beside the rates of `nfs_guest` this answers whose time it is. Jobs run for a while, with their
layouts warm, and meanwhile

    the guest's kernel is sampled (nfs_samples.c): microseconds of its one CPU for each I/O, by what
    it was doing
    the daemon is stopped (SIGSTOP) and let go on: I/O through a layout must not notice
    the guest's RPCs are counted
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest import fio
from guest.client import Client
from guest.machine import Guest
from rich.table import Table

SAMPLE_US = 2000
WARM_SECONDS = 2.0
SHARE = "bench"
PROGRAM = "nfs_samples"
_SECTOR = 512
_JOB_SECONDS = 600
_BYTES = {"seq-read": 1 << 20, "seq-write": 1 << 20, "rand-read": 4096, "rand-write": 4096}

KINDS = {
    "wait": "waiting for the disk (idle)",
    "fio": "fio itself",
    "nfs": "NFS client and its block layouts",
    "block": "block layer and SCSI",
    "notify": "handing requests to the emulator",
    "switch": "switching between tasks",
    "rest": "system calls, interrupts, memory",
}
_NFS = re.compile(r"\[(nfs|nfsv4|blocklayoutdriver|sunrpc)\]$")
_BLOCK = re.compile(r"^(__)?(blk_|submit_bio|blkdev_|bio_)|\[(scsi_mod|sd_mod|virtio_scsi)\]$")
_SWITCH = frozenset(("schedule", "__schedule", "worker_thread", "schedule_idle"))

Stack = tuple[str, ...]


def kind(stack: Stack) -> str:
    """What a stack, innermost function first, was doing; one of KINDS."""
    if stack[0] == "idle":
        return "wait"
    if stack[0] == "user":
        return "fio"
    if any(function.startswith("vp_notify") for function in stack):
        return "notify"
    for function in stack:
        if _NFS.search(function):
            return "nfs"
        if _BLOCK.search(function):
            return "block"
    return "switch" if _SWITCH & set(stack) else "rest"


@dataclass(frozen=True)
class Profile:
    """Samples of a guest during `ios` I/Os in `seconds`."""

    seconds: float
    ios: float
    stacks: Mapping[Stack, int]

    @property
    def per_io(self) -> dict[str, float]:
        """Microseconds of each of KINDS for an I/O; together the time from one I/O to the next."""
        found = Counter[str]()
        for stack, count in self.stacks.items():
            found[kind(stack)] += count
        scale = self.seconds * 1e6 / sum(found.values()) / self.ios
        return {name: found[name] * scale for name in KINDS}

    def inside(self, names: Sequence[str]) -> dict[str, float]:
        """Microseconds for an I/O in these functions and in what they call."""
        total, found = sum(self.stacks.values()), Counter[str]()
        for stack, count in self.stacks.items():
            plain = {function.partition("[")[0] for function in stack}
            found.update({name: count for name in names if name in plain})
        return {name: found[name] * self.seconds * 1e6 / total / self.ios for name in names}

    def innermost(self) -> Counter[str]:
        """Samples by the function that ran."""
        found = Counter[str]()
        for stack, count in self.stacks.items():
            found[stack[0]] += count
        return found


def build(directory: Path) -> Path:
    """The sampler, as a static program, in a directory for `Guest(shares={SHARE: ...})`."""
    directory.mkdir(exist_ok=True)
    source = Path(__file__).with_name(f"{PROGRAM}.c")
    options = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-static")
    subprocess.run(["gcc", *options, source, "-o", directory / PROGRAM], check=True)
    return directory


def prepare(guest: Guest) -> None:
    """Put the sampler into a guest that has the share."""
    guest.check(
        "modprobe -a 9p 9pnet_virtio\nmkdir -p /share\n"
        f"mount -t 9p -o trans=virtio,version=9p2000.L,ro {SHARE} /share\n"
        f"cp /share/{PROGRAM} /tmp/\numount /share\n"
        "echo 100 >/proc/sys/kernel/perf_cpu_time_max_percent"
    )


class Place:
    """A disk of a guest, and the path by which a job reaches it."""

    def __init__(self, guest: Guest, path: str, disk: str, client: Client | None) -> None:
        self.guest = guest
        self.path = path
        self.disk = disk
        self.client = client

    @contextmanager
    def job(self, name: str, *, size: int) -> Iterator[None]:
        """A job of fio, in its warm part; ended with the block."""
        options = fio.bench_options(name, self.path, size=size, seconds=_JOB_SECONDS)
        words = " ".join(f"--{key}={value}" for key, value in options.items())
        before = self.sectors()
        running = self.guest.start(
            f"cd /tmp; fio --output=/tmp/fio.log {words} & echo $! >/tmp/fio.pid; wait $!; true",
            _JOB_SECONDS,
        )
        try:
            while self.sectors() - before < 1000:
                time.sleep(0.2)
            time.sleep(WARM_SECONDS)
            yield
        finally:
            self.guest.check("kill -INT $(cat /tmp/fio.pid)")
            running.wait()

    def sectors(self) -> int:
        """Sectors read and written so far."""
        return _sectors(self.guest.check("cat /proc/diskstats"), self.disk)

    def rate(self, job: str, seconds: float) -> float:
        """I/Os a second of the job that runs."""
        return self._measure(job, f"sleep {seconds}")[0]

    def profile(self, job: str, seconds: float) -> Profile:
        """The guest's kernel while the job runs."""
        sampled = f"sh -c 'cat /proc/uptime /proc/diskstats >/tmp/then; sleep {seconds}; "
        sampled += "cat /proc/uptime /proc/diskstats >/tmp/now'"
        self.guest.check(f"/tmp/{PROGRAM} {SAMPLE_US} /tmp/stacks {sampled}", seconds + 60)
        ios, elapsed = self._between(job)
        stacks: dict[Stack, int] = {}
        for line in self.guest.check("cat /tmp/stacks").splitlines():
            count, _, names = line.partition(" ")
            if names != "lost":
                stacks[tuple(names.split(";"))] = int(count)
        return Profile(elapsed, ios, stacks)

    def _measure(self, job: str, command: str) -> tuple[float, float]:
        self.guest.check(
            f"cat /proc/uptime /proc/diskstats >/tmp/then; {command}; "
            "cat /proc/uptime /proc/diskstats >/tmp/now",
            120,
        )
        ios, seconds = self._between(job)
        return ios / seconds, seconds

    def _between(self, job: str) -> tuple[float, float]:
        then, now = (self.guest.check(f"cat /tmp/{name}") for name in ("then", "now"))
        sectors = _sectors(now, self.disk) - _sectors(then, self.disk)
        seconds = float(now.split()[0]) - float(then.split()[0])
        return sectors * _SECTOR / _BYTES[job], seconds


def _sectors(diskstats: str, disk: str) -> int:
    """Documentation/admin-guide/iostats.rst: fields 3 and 7 behind the name."""
    found = re.search(rf" {disk} (.*)", diskstats)
    assert found is not None, diskstats
    fields = found[1].split()
    return int(fields[2]) + int(fields[6])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def look(
    raw: Place, layout: Place, daemon: int, *, size: int, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """For each job: rates of both, with the daemon running and stopped; RPCs; profiles."""
    found: dict[str, Any] = {}
    for job in fio.JOBS:
        entry: dict[str, Any] = {}
        for name, place in (("raw", raw), ("extfs", layout)):
            with place.job(job, size=size):
                if place.client is not None:
                    with place.client.counted() as counted:
                        alternating: dict[str, list[float]] = {"running": [], "stopped": []}
                        for _ in range(3):
                            alternating["running"].append(place.rate(job, seconds / 2))
                            with stopped(daemon):
                                alternating["stopped"].append(place.rate(job, seconds / 2))
                    entry["rates"] = alternating
                    entry["rpcs"] = {
                        rpc: row.count for rpc, row in counted.stats.operations.items() if row.count
                    }
                profile = place.profile(job, seconds * 2)
            entry[name] = profile.per_io
            entry[f"{name}_samples"] = sum(profile.stacks.values())
            entry[f"{name}_functions"] = profile.innermost().most_common(40)
            if place.client is not None:
                entry["inside"] = profile.inside(_INSIDE)
        found[job] = entry
    return found


_INSIDE = (
    "nfs_direct_read_schedule_iovec", "nfs_direct_write_schedule_iovec", "nfs_create_request",
    "nfs_pageio_add_request", "bl_read_pagelist", "bl_write_pagelist", "pnfs_update_layout",
    "nfs_direct_read_completion", "nfs_direct_write_completion", "bl_read_cleanup",
    "bl_write_cleanup", "nfs_page_group_destroy", "nfs_release_request", "worker_thread",
)  # fmt: skip


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What it is, and a cell for each job."""
    entries = found.values()
    for name, title in KINDS.items():
        yield title, *(f"{e['raw'][name]:,.0f}, {e['extfs'][name]:,.0f}" for e in entries)
    sums = [tuple(sum(entry[place].values()) for place in ("raw", "extfs")) for entry in entries]
    yield "together", *(f"{raw:,.0f}, {layout:,.0f}" for raw, layout in sums)
    ratios = (statistics.median(stopped_ratios(entry)) for entry in entries)
    yield "rate while the daemon is stopped / runs", *(f"{ratio:.2f}" for ratio in ratios)
    yield "RPCs meanwhile", *(_named(entry["rpcs"]) for entry in entries)


def _named(rpcs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in rpcs.items()) or "0"


def table(found: Mapping[str, Any]) -> Table:
    """For each I/O: raw disk, layout."""
    shown = Table("µs of the guest's CPU for each I/O: raw disk, layout", *found)
    for cells in rows(found):
        shown.add_row(*cells)
    return shown


def stopped_ratios(entry: Mapping[str, Any]) -> list[float]:
    """Of rates of neighbouring spans, with the daemon stopped and running."""
    rates = entry["rates"]
    return [b / a for a, b in zip(rates["running"], rates["stopped"], strict=True)]
