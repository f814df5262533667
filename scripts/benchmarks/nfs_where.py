"""Where the time of a guest's I/O goes: on its raw disk, and through a layout.

Beside the rates of `nfs_guest` this answers whose time it is, with jobs that have run for a while:

    costs        what the guest's CPU does for each I/O, by samples of its kernel (nfs_samples.c),
                 in a guest whose emulator counts instructions, and whose clock is that count: so
                 thousands of instructions are told, whatever else the host does
    undisturbed  in an ordinary guest: the daemon is stopped (SIGSTOP) and let go on in turn, which
                 I/O through a layout must not notice, and the client's RPCs are counted
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest import fio
from guest.client import Client
from guest.machine import Guest
from rich.table import Table

INSTRUCTION_NS = 4
"""Of the guest for `costs`."""
BOOT_SECONDS = 300
SAMPLE_US = 2000
WARM_SECONDS = 2.0
ALTERNATIONS = 3
SHARE = "bench"
PROGRAM = "nfs_samples"
_SECTOR = 512
_JOB_SECONDS = 600
_BYTES = {"seq-read": 1 << 20, "seq-write": 1 << 20, "rand-read": 4096, "rand-write": 4096}

KINDS = {
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
    """What a stack, innermost function first, was doing: one of KINDS, or "wait"."""
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

    def _scaled(self, found: Mapping[str, int], names: Iterable[str]) -> dict[str, float]:
        """Thousands of instructions for an I/O."""
        sample = self.seconds * 1e6 / INSTRUCTION_NS / sum(self.stacks.values())
        return {name: found.get(name, 0) * sample / self.ios for name in names}

    def by_kind(self) -> dict[str, float]:
        """Thousands of instructions for an I/O, of each of KINDS but the idle ones."""
        found = Counter[str]()
        for stack, count in self.stacks.items():
            found[kind(stack)] += count
        return self._scaled(found, KINDS)

    def inside(self, names: Sequence[str]) -> dict[str, float]:
        """Thousands of instructions for an I/O in these functions and in what they call."""
        found = Counter[str]()
        for stack, count in self.stacks.items():
            plain = {function.partition("[")[0] for function in stack}
            found.update({name: count for name in names if name in plain})
        return self._scaled(found, names)

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

    def __init__(self, guest: Guest, path: str, disk: str) -> None:
        self.guest = guest
        self.path = path
        self.disk = disk

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


def undisturbed(
    layout: Place, client: Client, daemon: int, *, size: int, seconds: float
) -> dict[str, Any]:
    """For each job: rates with the daemon running and stopped, in turn; RPCs meanwhile."""
    found: dict[str, Any] = {}
    for job in fio.JOBS:
        rates: dict[str, list[float]] = {"running": [], "stopped": []}
        with layout.job(job, size=size), client.counted() as counted:
            for _ in range(ALTERNATIONS):
                rates["running"].append(layout.rate(job, seconds))
                with stopped(daemon):
                    rates["stopped"].append(layout.rate(job, seconds))
        rpcs = {name: row.count for name, row in counted.stats.operations.items() if row.count}
        found[job] = {"rates": rates, "rpcs": rpcs}
    return found


def costs(places: Mapping[str, Place], *, size: int, seconds: float) -> dict[str, Any]:
    """For each job and each of "raw" and "extfs": thousands of instructions for an I/O."""
    found: dict[str, Any] = {}
    for job in fio.JOBS:
        found[job] = {}
        for name, place in places.items():
            with place.job(job, size=size):
                profile = place.profile(job, seconds)
            found[job][name] = profile.by_kind()
            found[job][f"{name}_samples"] = sum(profile.stacks.values())
            found[job][f"{name}_functions"] = profile.innermost().most_common(40)
            found[job][f"{name}_inside"] = profile.inside(_INSIDE)
    return found


_INSIDE = (
    "nfs_direct_read_schedule_iovec", "nfs_direct_write_schedule_iovec", "nfs_create_request",
    "nfs_pageio_add_request", "bl_read_pagelist", "bl_write_pagelist", "pnfs_update_layout",
    "nfs_direct_read_completion", "nfs_direct_write_completion", "bl_read_cleanup",
    "bl_write_cleanup", "nfs_page_group_destroy", "nfs_release_request", "worker_thread",
)  # fmt: skip


def rows(where: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What it is, and a cell for each job; `where` has what `costs` and `undisturbed` said."""
    entries = where["costs"].values()
    for name, title in KINDS.items():
        yield title, *(f"{e['raw'][name]:,.1f}, {e['extfs'][name]:,.1f}" for e in entries)
    sums = [tuple(sum(entry[place].values()) for place in ("raw", "extfs")) for entry in entries]
    yield "together", *(f"{raw:,.1f}, {layout:,.1f}" for raw, layout in sums)
    yield "raw disk / layout", *(f"{raw / layout:.2f}" for raw, layout in sums)
    ratios = (statistics.median(stopped_ratios(e)) for e in where["undisturbed"].values())
    yield "I/O rate while the daemon is stopped / runs", *(f"{ratio:.2f}" for ratio in ratios)
    yield "RPCs meanwhile", *(_named(entry["rpcs"]) for entry in where["undisturbed"].values())


def _named(rpcs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in rpcs.items()) or "0"


def table(where: Mapping[str, Any]) -> Table:
    """For each I/O: raw disk, layout."""
    shown = Table("1,000 instructions for each I/O: raw disk, layout", *where["costs"])
    for cells in rows(where):
        shown.add_row(*cells)
    return shown


def stopped_ratios(entry: Mapping[str, Any]) -> list[float]:
    """Of rates of neighbouring spans, with the daemon stopped and running."""
    rates = entry["rates"]
    return [b / a for a, b in zip(rates["running"], rates["stopped"], strict=True)]
