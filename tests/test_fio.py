"""fio with verification, through the mount, and again after a remount."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from faults import MIB

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(shutil.which("fio") is None, reason="there is no fio"),
]

# What every job has: contents that tell where they belong, checked after the job's own writes.
COMMON = {
    "verify": "crc32c",
    "verify_fatal": "1",
    "verify_dump": "0",
    "randrepeat": "1",
    "allow_file_create": "1",
    "group_reporting": "1",
    "size": "24m",
}

JOBS: dict[str, dict[str, str]] = {
    "sequential-direct": {"rw": "write", "bs": "1m", "direct": "1", "ioengine": "psync"},
    "random-direct-libaio": {
        "rw": "randwrite",
        "bs": "4k",
        "direct": "1",
        "ioengine": "libaio",
        "iodepth": "16",
    },
    "random-direct-io_uring": {
        "rw": "randwrite",
        "bs": "4k",
        "direct": "1",
        "ioengine": "io_uring",
        "iodepth": "16",
    },
    "sequential-buffered": {"rw": "write", "bs": "128k", "ioengine": "psync"},
    "random-buffered": {"rw": "randwrite", "bs": "4k", "ioengine": "psync"},
    "random-mmap": {"rw": "randwrite", "bs": "4k", "ioengine": "mmap"},
    "sequential-mmap": {"rw": "write", "bs": "64k", "ioengine": "mmap"},
    "mixed-sizes-direct": {
        "rw": "randwrite",
        "bsrange": "4k-64k",
        "blockalign": "4k",
        "direct": "1",
        "ioengine": "libaio",
        "iodepth": "8",
    },
    "sectors-buffered": {
        "rw": "randwrite",
        "bsrange": "512-64k",
        "bs_unaligned": "1",
        "ioengine": "psync",
        "size": "8m",
        "verify_interval": "512",
    },
    "odd-sizes-buffered": {
        "rw": "write",
        "bssplit": "777/50:5000/30:33333/20",
        "bs_unaligned": "1",
        "ioengine": "psync",
        "size": "8m",
    },
    "read-write-direct": {
        "rw": "randrw",
        "bs": "8k",
        "direct": "1",
        "ioengine": "io_uring",
        "iodepth": "16",
    },
    "fsync-each": {
        "rw": "write",
        "bs": "4k",
        "fsync": "1",
        "ioengine": "psync",
        "size": "2m",
    },
    "preallocated": {
        "rw": "randwrite",
        "bs": "16k",
        "direct": "1",
        "ioengine": "libaio",
        "iodepth": "16",
        "fallocate": "native",
    },
}


def run_fio(directory: Path, name: str, options: dict[str, str]) -> dict[str, object]:
    """Run one job in `directory`; its report. A verification that fails fails the test."""
    words = [f"--{key}={value}" for key, value in (COMMON | options).items()]
    result = subprocess.run(
        ["fio", f"--name={name}", f"--directory={directory}", "--output-format=json", *words],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    report: dict[str, object] = json.loads(result.stdout[result.stdout.index("{") :])
    for job in report["jobs"]:  # type: ignore[attr-defined]
        assert job["error"] == 0, job
    return report


def bytes_done(report: dict[str, object], direction: str) -> int:
    return sum(job[direction]["io_bytes"] for job in report["jobs"])  # type: ignore[attr-defined]


def verify_only(directory: Path, name: str, options: dict[str, str]) -> None:
    """Only read and check what the same job wrote."""
    words = {key: value for key, value in options.items() if key not in ("fsync", "fallocate")}
    report = run_fio(directory, name, words | {"verify_only": "1"})
    assert bytes_done(report, "write") == 0 or "rw" in options


def remount(mounted: Mounted, extfs: ExtfsRunner, mount: Callable[..., Mounted]) -> Mounted:
    mounted.unmount()
    assert "clean" in extfs("fsck", mounted.device).stdout
    return mount(mounted.device)


# What scripts/test --fast runs: each way into the data path once.
FAST = {
    "random-direct-io_uring",
    "random-buffered",
    "random-mmap",
    "sectors-buffered",
    "preallocated",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in JOBS]
)
def test_verified(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted], name: str
) -> None:
    options = JOBS[name]
    # do_verify reads everything back when the writes are done.
    report = run_fio(mounted.mountpoint, name, options)
    assert bytes_done(report, "write") >= 1 * MIB
    assert bytes_done(report, "read") >= 1 * MIB
    again = remount(mounted, extfs, mount_extfs)
    verify_only(again.mountpoint, name, options)


def test_several_jobs_on_one_file(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """Four processes, each with its quarter of one file, direct and deep."""
    options = {
        "rw": "randwrite",
        "bs": "4k",
        "direct": "1",
        "ioengine": "libaio",
        "iodepth": "16",
        "numjobs": "4",
        "filename": "shared",
        "size": "8m",
        "offset_increment": "8m",
    }
    report = run_fio(mounted.mountpoint, "together", options)
    assert bytes_done(report, "write") == 4 * 8 * MIB
    assert (mounted.mountpoint / "shared").stat().st_size == 32 * MIB
    again = remount(mounted, extfs, mount_extfs)
    verify_only(again.mountpoint, "together", options)


def test_overwriting_and_verifying_again(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """The same places written several times by different ways; the last one counts."""
    base = {"filename": "file", "bs": "4k", "size": "8m", "direct": "1"}
    for loop, (engine, depth, rw) in enumerate(
        [("psync", "1", "write"), ("libaio", "16", "randwrite"), ("io_uring", "16", "randwrite")]
    ):
        last = base | {"ioengine": engine, "iodepth": depth, "rw": rw, "randseed": str(loop + 1)}
        run_fio(mounted.mountpoint, f"pass-{loop}", last)
    buffered = base | {"direct": "0", "ioengine": "psync", "rw": "randwrite", "randseed": "77"}
    run_fio(mounted.mountpoint, "last", buffered)
    again = remount(mounted, extfs, mount_extfs)
    verify_only(again.mountpoint, "last", buffered)


def test_fio_notices_a_changed_byte(mounted: Mounted) -> None:
    """The verification can fail."""
    options = JOBS["sequential-direct"] | {"filename": "file", "size": "4m"}
    run_fio(mounted.mountpoint, "job", options)
    with open(mounted.mountpoint / "file", "r+b") as file:
        file.seek(2 * MIB + 100_000)
        file.write(b"!")
    with pytest.raises(AssertionError, match="verify"):
        verify_only(mounted.mountpoint, "job", options)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_verified_for_longer(
    make_loop: Callable[..., rundir.LoopDevice],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    name: str,
) -> None:
    """Larger files, on a device with sectors of 4 KiB, with a small cache for metadata."""
    device = make_loop(sector_size=4096)
    extfs("mkfs", device)
    options = JOBS[name] | {"size": "4m" if "fsync" in JOBS[name] else "96m"}
    mounted = mount_extfs(device, "cache=4M,threads=2")
    run_fio(mounted.mountpoint, name, options)
    again = remount(mounted, extfs, mount_extfs)
    verify_only(again.mountpoint, name, options)
