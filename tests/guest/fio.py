"""fio in a guest: verification for tests, and measured jobs for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guest.client import Client
from guest.machine import Guest

Options = Mapping[str, str | float]


@dataclass(frozen=True)
class Measured:
    """One direction of a job: bytes and operations a second, latencies in microseconds."""

    bandwidth: float
    iops: float
    latency_median: float
    latency_p99: float


def run(guest: Guest, options: Options, *, seconds: float = 240) -> Mapping[str, Any]:
    """Run one job; what fio says of it, as fio names it. CommandError when fio reports an error."""
    words = " ".join(f"--{name}={value}" for name, value in options.items())
    # Problems go to standard error: they would stand in the middle of the JSON.
    text = guest.check(
        f"cd /tmp; fio --output-format=json --output=/tmp/fio.json {words} >/tmp/fio.log 2>&1 "
        "|| { cat /tmp/fio.log; head -c 2000 /tmp/fio.json; exit 1; }\n"
        "sed -n '/^{/,$p' /tmp/fio.json",
        seconds,
    )
    (job,) = json.loads(text)["jobs"]
    assert job["error"] == 0, text
    return dict(job)


def measured(job: Mapping[str, Any], direction: str) -> Measured:
    """The figures of "read" or "write" of a job."""
    row = job[direction]
    percentiles = row["clat_ns"].get("percentile", {})
    return Measured(
        bandwidth=float(row["bw_bytes"]),
        iops=float(row["iops"]),
        latency_median=percentiles.get("50.000000", 0) / 1000,
        latency_p99=percentiles.get("99.000000", 0) / 1000,
    )


# ---- benchmarks --------------------------------------------------------------------------------

JOBS: dict[str, Options] = {
    "seq-write": {"rw": "write", "bs": "1m"},
    "seq-read": {"rw": "read", "bs": "1m"},
    "rand-write": {"rw": "randwrite", "bs": "4k", "iodepth": 8},
    "rand-read": {"rw": "randread", "bs": "4k", "iodepth": 8},
}
"""Direct I/O on `size` bytes of one file, which is there and written before."""

PLACES = ("raw", "extfs", "knfsd")


def bench_options(job: str, path: str, *, size: int, seconds: float) -> Options:
    """The same job for every place."""
    return {
        "name": job,
        "filename": path,
        "size": size,
        "ioengine": "libaio",
        "direct": 1,
        "iodepth": 1,
        "randrepeat": 1,
        "norandommap": 1,
        "time_based": 1,
        "runtime": seconds,
        "percentile_list": "50:99",
        **JOBS[job],
    }


def bench(
    guest: Guest, job: str, path: str, *, size: int, seconds: float, client: Client | None = None
) -> tuple[Measured, Mapping[str, Any]]:
    """Measure one job on a disk or a file of the guest; the figures, and all that fio says.

    The file has to be written already: blocks that are new are another measurement. With `client`
    the job fails unless all its data went by layouts.
    """
    options = bench_options(job, path, size=size, seconds=seconds)
    direction = "read" if "read" in job else "write"
    if client is None:
        found = run(guest, options, seconds=seconds + 120)
        return measured(found, direction), found
    with client.counted() as counted:
        found = run(guest, options, seconds=seconds + 120)
    counted.assert_by_layout()
    return measured(found, direction), found


def prepare_file(guest: Guest, path: str, size: int) -> None:
    """Write all of it once, durably."""
    guest.check(f"dd if=/dev/zero of={path} bs=1M count={size >> 20} oflag=direct conv=fsync", 240)


def compare(
    places: Mapping[str, tuple[Guest, str, Client | None]],
    jobs: Sequence[str] = tuple(JOBS),
    *,
    size: int,
    seconds: float,
    rounds: int = 1,
) -> list[dict[str, Any]]:
    """Each job in each place, in turn: rows with place, job, round and the figures.

    `places`: by the names of PLACES, the guest, the path of disk or file, and the mount whose
    counters have to show that layouts were used. Only one guest works at a time.
    """
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        for job in jobs:
            for place, (guest, path, client) in places.items():
                figures, _ = bench(guest, job, path, size=size, seconds=seconds, client=client)
                rows.append({"place": place, "job": job, "round": number, **vars(figures)})
    return rows
