"""`scripts/bench mount`: the same fio and metadata jobs on every target, alternating, medians."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.progress import Progress

from . import report, targets
from .targets import Target
from .targets import run as command
from .wide import wide_console

DEVICE_BYTES = 2 << 30


@dataclass(frozen=True)
class Job:
    """One fio job; unit is "iops" or "MiB/s". `threads`: each has a file of its own."""

    name: str
    title: str
    unit: str
    options: tuple[str, ...]
    threads: int = 1


DIRECT = ("--direct=1", "--ioengine=io_uring")
BUFFERED = ("--direct=0", "--ioengine=psync", "--ramp_time=1500ms")
"""The ramp takes the pages that the job needs: in a virtual machine, memory that nobody used for a
while may have to come from the host first, at a tenth of the speed."""
JOBS = [
    Job(
        "rr1",
        "4 KiB random read, depth 1",
        "iops",
        (*DIRECT, "--rw=randread", "--bs=4k", "--iodepth=1"),
    ),
    Job(
        "rw1",
        "4 KiB random write, depth 1",
        "iops",
        (*DIRECT, "--rw=randwrite", "--bs=4k", "--iodepth=1"),
    ),
    Job(
        "rr16",
        "4 KiB random read, depth 16",
        "iops",
        (*DIRECT, "--rw=randread", "--bs=4k", "--iodepth=16"),
    ),
    Job(
        "rw16",
        "4 KiB random write, depth 16",
        "iops",
        (*DIRECT, "--rw=randwrite", "--bs=4k", "--iodepth=16"),
    ),
    Job(
        "sr",
        "1 MiB sequential read, depth 4",
        "MiB/s",
        (*DIRECT, "--rw=read", "--bs=1m", "--iodepth=4"),
    ),
    Job(
        "sw",
        "1 MiB sequential write, depth 4",
        "MiB/s",
        (*DIRECT, "--rw=write", "--bs=1m", "--iodepth=4"),
    ),
    Job(
        "br",
        "buffered sequential read",
        "MiB/s",
        (*BUFFERED, "--rw=read", "--bs=128k", "--invalidate=1"),
    ),
    Job("bw", "buffered sequential write", "MiB/s", (*BUFFERED, "--rw=write", "--bs=128k")),
    Job(
        "brw",
        "buffered 4 KiB random write",
        "iops",
        (*BUFFERED, "--rw=randwrite", "--bs=4k"),
    ),
    Job("fs", "4 KiB write + fsync", "iops", (*BUFFERED, "--rw=randwrite", "--bs=4k", "--fsync=1")),
    Job(
        "fs16",
        "4 KiB write + fsync, 16 threads and files",
        "iops",
        (*BUFFERED, "--rw=randwrite", "--bs=4k", "--fsync=1"),
        threads=16,
    ),
]
NAME_PHASES = ["create", "stat", "readdir", "list", "rename", "unlink"]


def fio(target: Target, job: Job, seconds: float, size_mib: int) -> float:
    """Run one job on one target; its rate in the job's unit."""
    each = size_mib // job.threads
    if target.name == "raw":
        place = [f"--filename={target.device}", f"--offset_increment={each}m"]
    elif job.threads > 1:
        place = [f"--directory={target.mountpoint}", "--filename_format=data-$jobnum"]
    else:
        place = [f"--filename={target.mountpoint / 'data'}"]
    said = command(
        "fio", "--name=job", "--output-format=json", "--group_reporting", "--thread",
        "--time_based", f"--runtime={round(seconds * 1000)}ms", f"--numjobs={job.threads}",
        f"--size={each}m", "--randrepeat=0", "--norandommap", *job.options, *place,
    )  # fmt: skip
    result = json.loads(said[said.index("{") :])["jobs"][0]
    side = result["write" if any("write" in word for word in job.options) else "read"]
    return float(side["iops"]) if job.unit == "iops" else side["bw_bytes"] / (1 << 20)


def lay_out(target: Target, size_mib: int) -> None:
    """Write the test file once, so that every job finds written blocks."""
    where = target.device if target.name == "raw" else str(target.mountpoint / "data")
    command(
        "fio", "--name=layout", "--rw=write", "--bs=1m", "--direct=1", "--ioengine=psync",
        f"--size={size_mib}m", f"--filename={where}", "--end_fsync=1",
    )  # fmt: skip


def names(target: Target, program: Path, count: int) -> dict[str, float]:
    """The metadata job on one target: operations a second by phase."""
    directory = target.mountpoint / "names"
    directory.mkdir(exist_ok=True)
    result: dict[str, float] = json.loads(command(program, directory, str(count)))
    directory.rmdir()
    return result


def source_tree(work: Path, files: int) -> Path:
    """An archive of files as source trees have them: 40 in a directory, 7 KiB the median."""
    random = Random(1)
    archive = work / "tree.tar"
    text = random.randbytes(1 << 17)
    with tarfile.open(archive, "w") as tar:
        for number in range(files):
            if number % 40 == 0:
                folder = tarfile.TarInfo(f"tree/{number // 1600}/{number // 40}")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(folder)
            entry = tarfile.TarInfo(f"{folder.name}/file-{number}.c")
            entry.size = min(int(random.lognormvariate(math.log(7168), 1.0)), len(text))
            tar.addfile(entry, io.BytesIO(text))
    return archive


def unpack(target: Target, archive: Path, files: int) -> dict[str, float]:
    """Unpack an archive of so many files and remove the tree: files a second of each."""
    begin = time.monotonic()
    command("tar", "--extract", "--file", archive, "--directory", target.mountpoint)
    unpacked = time.monotonic()
    command("rm", "--recursive", target.mountpoint / "tree")
    removed = time.monotonic()
    return {"unpack": files / (unpacked - begin), "remove": files / (removed - unpacked)}


def compile_names(work: Path) -> Path:
    """Build names.c."""
    program = work / "names"
    command("gcc", "-O2", "-o", program, Path(__file__).with_name("names.c"))
    return program


def machine() -> dict[str, str | int]:
    """What the figures were measured on, in words that fit a README."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if "model name" in line), "")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "kernel": platform.release().split("-")[0],
        "memory_limit_mib": targets.MEMORY_LIMIT >> 20,
    }


def run(
    *, rounds: int, seconds: float, size_mib: int, files: int, tree_files: int, only: list[str],
    jobs: list[str], output: Path,
) -> None:  # fmt: skip
    """Measure, print the table, write OUTPUT.json and OUTPUT.png."""
    console = wide_console()
    chosen = [job for job in JOBS if not jobs or job.name in jobs]
    work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
    systems = [
        Target(name, work, DEVICE_BYTES) for name in targets.NAMES if not only or name in only
    ]
    samples: dict[str, dict[str, list[float]]] = {}
    ready: list[Target] = []
    try:
        program = compile_names(work)
        for target in systems:
            why = targets.missing(target.name)
            if why:
                console.print(f"{target.name}: left out, {why}")
                continue
            ready.append(target)
            target.set_up()
            lay_out(target, size_mib)
        mounted = [target for target in ready if target.name != "raw"]
        by_name: dict[str, Callable[[Target], dict[str, float]]] = {}
        if not jobs or "names" in jobs:
            by_name["names"] = lambda target: names(target, program, files)
        if not jobs or "tar" in jobs:
            archive = source_tree(work, tree_files)
            by_name["tar"] = lambda target: unpack(target, archive, tree_files)
        total = len(chosen) * len(ready) + len(by_name) * len(mounted)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=rounds * total)
            for turn in range(rounds):
                for job in chosen:
                    for target in ready:
                        progress.update(
                            task, description=f"{turn + 1}/{rounds} {job.name} {target.name}"
                        )
                        with target.measured():
                            rate = fio(target, job, seconds, size_mib)
                        samples.setdefault(job.name, {}).setdefault(target.name, []).append(rate)
                        progress.advance(task)
                for name, measure in by_name.items():
                    for target in mounted:
                        progress.update(
                            task, description=f"{turn + 1}/{rounds} {name} {target.name}"
                        )
                        with target.measured():
                            rates = measure(target)
                        for phase, rate in rates.items():
                            samples.setdefault(phase, {}).setdefault(target.name, []).append(rate)
                        progress.advance(task)
    except (RuntimeError, subprocess.SubprocessError) as error:
        console.print(f"bench: {error}", style="red")
        raise SystemExit(1) from None
    finally:
        for target in reversed(ready):
            target.tear_down()
        shutil.rmtree(work, ignore_errors=True)
    titles = {job.name: (job.title, job.unit) for job in chosen}
    titles.update({phase: (f"{phase} of {files} files", "ops/s") for phase in NAME_PHASES})
    titles["list"] = (f"readdir and stat of {files} files", "ops/s")
    titles["unpack"] = (f"tar: unpack a tree of {tree_files} files", "files/s")
    titles["remove"] = (f"rm: remove a tree of {tree_files} files", "files/s")
    medians = {
        job: {name: statistics.median(values) for name, values in by_target.items()}
        for job, by_target in samples.items()
    }
    report.write(console, titles, medians, samples, machine(), output)
