"""`scripts/bench layout`: I/O through a layout beside the raw device; the cost of control calls."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from extfs.control.client import Descriptor, Iomode, Layout, LayoutState

from .mount import DIRECT, machine
from .targets import EXTFS, Target
from .targets import run as command
from .wide import wide_console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fio_engine  # beside this package, shared with scripts/fio-layout

DEVICE_BYTES = 6 << 30
FILE_MIB = 512
NATIVE = Path(__file__).resolve().parents[2] / "native"

BARS = {
    "LAYOUT_GET, mapped": 25.0,
    "LAYOUT_GET, allocates, durable": 100.0,
    "LAYOUT_COMMIT, durable": 120.0,
    "LAYOUT_COMMIT, lazy": 60.0,
    "LAYOUT_COMMIT of 1,024 ranges": 1000.0,
    "write that recalls a layout": 300.0,
}
"""What is asked for: medians in microseconds."""


@dataclass(frozen=True)
class Job:
    """One fio workload."""

    name: str
    title: str
    unit: str
    options: tuple[str, ...]

    @property
    def writes(self) -> bool:
        """Whether it changes the file."""
        return "write" in self.options[0]


JOBS = [
    Job("rr1", "4 KiB random read, depth 1", "iops", ("--rw=randread", "--bs=4k", "--iodepth=1")),
    Job("rw1", "4 KiB random write, depth 1", "iops", ("--rw=randwrite", "--bs=4k", "--iodepth=1")),
    Job(
        "rr16", "4 KiB random read, depth 16", "iops", ("--rw=randread", "--bs=4k", "--iodepth=16")
    ),
    Job(
        "rw16",
        "4 KiB random write, depth 16",
        "iops",
        ("--rw=randwrite", "--bs=4k", "--iodepth=16"),
    ),
    Job("sr", "1 MiB sequential read, depth 4", "MiB/s", ("--rw=read", "--bs=1m", "--iodepth=4")),
    Job("sw", "1 MiB sequential write, depth 4", "MiB/s", ("--rw=write", "--bs=1m", "--iodepth=4")),
]


def fio(job: Job, seconds: float, *place: str) -> float:
    """One run; its rate in the job's unit."""
    said = command(
        "fio", "--name=job", "--output-format=json", "--time_based",
        f"--runtime={round(seconds * 1000)}ms", "--randrepeat=0", "--norandommap", "--direct=1",
        *job.options, *place,
    )  # fmt: skip
    result = json.loads(said[said.index("{") :])["jobs"][0]
    side = result["write" if job.writes else "read"]
    rate = float(side["iops"]) if job.unit == "iops" else side["bw_bytes"] / (1 << 20)
    if not rate:
        raise RuntimeError(f"fio did nothing: {job.name} on {place}: {said[-200:]}")
    return rate


def largest_extent(path: Path) -> tuple[int, int, int]:
    """Offset in the file, place on the device, length: all bytes."""
    extents = json.loads(command(EXTFS, "map", "--json", path))["extents"]
    best = max(extents, key=lambda extent: int(extent["length"]))
    if best["length"] < FILE_MIB << 19:
        raise RuntimeError(f"{path} is in pieces of at most {best['length']} bytes")
    return int(best["offset"]), int(best["physical"]), int(best["length"])


def one_piece(answers: Sequence[Layout], *, write: bool) -> tuple[int, int]:
    """Place on the device and length of what was granted: all bytes, in one piece."""
    extents = [extent for answer in answers for extent in answer.extents]
    states = {LayoutState.READ_WRITE_DATA} if write else {LayoutState.READ_DATA}
    first = extents[0]
    at = first.physical
    for extent in extents:
        if extent.state not in states or extent.physical != at:
            raise RuntimeError(f"granted in pieces: {extent}")
        at += extent.length
    return first.physical, at - first.physical


@contextmanager
def granted(path: Path, offset: int, length: int, job: Job) -> Iterator[tuple[str, ...]]:
    """As scripts/fio-layout: hold a layout, let stock fio have the granted extents, commit."""
    with Descriptor.of(path, write=True) as file:
        holder, device = file.register("bench"), file.info().device
        try:
            iomode = Iomode.RW if job.writes else Iomode.READ
            answers = holder.get_all(iomode, offset, length, wait=True)
            yield on_device(device, *one_piece(answers, write=job.writes))
            if job.writes:
                holder.commit([])
        finally:
            holder.give_all_back()


def on_device(device: str | Path, place: int, length: int) -> tuple[str, ...]:
    """Stock fio on a part of the device: bytes."""
    return (
        *DIRECT[1:], f"--filename={device}", f"--offset={place}", f"--size={length}",
        "--allow_mounted_write=1",
    )  # fmt: skip


def compare(
    target: Target, rounds: int, seconds: float, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """The same jobs on the mount, through layouts by our engine and by stock fio, and raw.

    All at the same addresses, alternating.
    """
    engine = f"--ioengine=external:{fio_engine.engine()}"
    path = target.mountpoint / "data"
    command(
        "fio", "--name=fill", "--rw=write", "--bs=1m", "--direct=1", "--ioengine=psync",
        f"--size={FILE_MIB}m", f"--filename={path}", "--end_fsync=1",
    )  # fmt: skip
    offset, place, length = largest_extent(path)
    inside = (f"--filename={path}", f"--offset={offset}", f"--size={length}")
    raw = on_device(target.device, place, length)
    places: dict[str, Callable[[Job], AbstractContextManager[tuple[str, ...]]]] = {
        "mount": lambda _: nullcontext((*DIRECT[1:], *inside)),
        "layout": lambda _: nullcontext((engine, *inside)),
        "extents": lambda job: granted(path, offset, length, job),
        "raw": lambda _: nullcontext(raw),
    }
    samples: dict[str, dict[str, list[float]]] = {}
    task = progress.add_task("", total=rounds * len(JOBS) * len(places))
    for turn in range(rounds):
        for job in JOBS:
            order = list(places) if turn % 2 == 0 else list(reversed(places))
            for name in order:
                progress.update(task, description=f"{turn + 1}/{rounds} {job.name} {name}")
                with places[name](job) as where:
                    rate = fio(job, seconds, *where)
                samples.setdefault(job.name, {}).setdefault(name, []).append(rate)
                progress.advance(task)
    return samples


def compile_calls(work: Path) -> Path:
    """Build layout_calls.c, as any user of extfs_ioctl.h would."""
    program = work / "layout_calls"
    source = Path(__file__).with_name("layout_calls.c")
    command(
        "gcc",
        "-O2",
        "-std=gnu11",
        "-D_GNU_SOURCE",
        "-pthread",
        f"-I{NATIVE}",
        "-o",
        program,
        source,
    )
    return program


def time_calls(
    target: Target, program: Path, *what: str, rounds: int, cpu: int | None = None
) -> Any:
    """Run it on the target; its JSON."""
    pin = ["taskset", "-c", str(cpu)] if cpu is not None else []
    control = target.mountpoint / ".extfs/control"
    return json.loads(command(*pin, program, control, target.mountpoint, str(rounds), *what))


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Cost of a call against extents and grants."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2))
    lines = [
        ("growth", "extents", "get", "LAYOUT_GET by extents of the file", "#0b6e4f", "o-"),
        ("growth", "extents", "commit", "LAYOUT_COMMIT (lazy) by extents", "#46627f", "s-"),
        ("segments", "segments", "get", "LAYOUT_GET by grants on the file", "#c8963e", "o--"),
        ("segments", "segments", "return", "LAYOUT_RETURN by grants", "#b5543c", "s--"),
    ]
    for curve, x, y, label, color, style in lines:
        points = curves.get(curve, [])
        axes.plot([p[x] for p in points], [p[y] for p in points], style, label=label, color=color)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("extents of the file, or grants on it (log scale)")
    axes.set_ylabel("median of a call, microseconds")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ratio(samples: dict[str, list[float]], name: str, to: str) -> str:
    """Median of the ratios of each round, and the least and the greatest of them."""
    each = [a / b for a, b in zip(samples[name], samples[to], strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def io_table(samples: dict[str, dict[str, list[float]]]) -> Table:
    """Rates by path, and ratios."""
    table = Table(title="one file, four ways; medians, ratios of each round (least-greatest)")
    names = ("mount", "layout", "extents", "raw")
    pairs = (("layout", "raw"), ("extents", "raw"), ("layout", "mount"))
    for heading in ("job", "unit", *names, *(f"{a} / {b}" for a, b in pairs)):
        table.add_column(heading, justify="left" if heading in ("job", "unit") else "right")
    for job in JOBS:
        rates = samples[job.name]
        table.add_row(
            job.title, job.unit, *(f"{statistics.median(rates[name]):,.0f}" for name in names),
            *(ratio(rates, a, b) for a, b in pairs),
        )  # fmt: skip
    return table


def calls_table(
    runs: Sequence[dict[str, dict[str, float]]], pinned: dict[str, dict[str, float]]
) -> Table:
    """Medians of the calls, and what was asked for."""
    table = Table(title="control calls, microseconds, round trip included")
    for heading in ("call", "median", "p99", "client pinned", "bar"):
        table.add_column(heading, justify="left" if heading == "call" else "right")
    for name in runs[0]:
        median = statistics.median(run[name]["median"] for run in runs)
        p99 = statistics.median(run[name]["p99"] for run in runs)
        bar = f"{BARS[name]:.0f}" if name in BARS else ""
        table.add_row(name, f"{median:.1f}", f"{p99:.1f}", f"{pinned[name]['median']:.1f}", bar)
    return table


def run(*, rounds: int, seconds: float, extents: int, segments: int, output: Path) -> None:
    """Measure, print the tables, write OUTPUT.json and OUTPUT.png."""
    console = wide_console()
    work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
    target = Target("extfs", work, DEVICE_BYTES)
    try:
        program = compile_calls(work)
        target.set_up()
        with Progress(console=console, transient=True) as progress:
            samples = compare(target, rounds, seconds, progress)
        calls = [time_calls(target, program, "calls", rounds=1000) for _ in range(max(3, rounds))]
        pinned = time_calls(target, program, "calls", rounds=1000, cpu=0)
        curves = {
            "growth": time_calls(target, program, "growth", str(extents), rounds=500),
            "segments": time_calls(target, program, "segments", str(segments), rounds=500),
        }
    except (RuntimeError, subprocess.SubprocessError, fio_engine.EngineError) as error:
        console.print(f"bench: {error}", style="red")
        raise SystemExit(1) from None
    finally:
        target.tear_down()
        shutil.rmtree(work, ignore_errors=True)
    medians = {
        job: {name: statistics.median(values) for name, values in by_place.items()}
        for job, by_place in samples.items()
    }
    console.print(io_table(samples))
    console.print(calls_table(calls, pinned))
    json_path, png_path = output.with_suffix(".json"), output.with_suffix(".png")
    json_path.write_text(
        json.dumps(
            {
                "machine": machine(),
                "io": {"median": medians, "samples": samples},
                "calls": calls,
                "calls_pinned": pinned,
                "curves": curves,
            },
            indent=1,
        )
        + "\n"
    )
    plot(curves, png_path)
    console.print(f"written: {json_path} {png_path}")
