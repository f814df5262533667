"""`scripts/bench load`: files that grow side by side, a full device, a sparse file, many fsyncs."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from . import targets
from .mount import machine
from .targets import EXTFS, Target
from .targets import run as command
from .wide import wide_console

DEVICE_BYTES = 2 << 30
SPARSE_GIB = 100
FULLNESS = (0, 25, 50, 75, 90, 95)
"""Percent of the space in use, with holes of single files between."""
THREADS = (1, 2, 4, 8, 16)
APPENDERS = ((4, 64), (8, 64), (4, 1024))
"""Files and KiB of each append."""
APPEND_MIB = 64
NAMES = ("extfs", "xfs")
COLORS = {"extfs": "#0b6e4f", "xfs": "#46627f"}

Row = dict[str, float]


def calls(program: Path, *arguments: object) -> list[Row]:
    """Run a workload of load_calls.c; the lines that it printed."""
    said = command(program, *(str(argument) for argument in arguments))
    return [json.loads(line) for line in said.splitlines()]


def extents(target: Target, path: Path) -> int:
    """How many extents a file has; neighbours that continue each other count as one."""
    if target.name == "extfs":
        found = re.search(r"([\d,]+) extents? map", command(EXTFS, "map", path))
    else:
        found = re.search(r"(\d+) extents? found", command("filefrag", path))
    if found is None:
        raise RuntimeError(f"the extents of {path} are not told")
    return int(found[1].replace(",", ""))


def appenders(target: Target, program: Path) -> dict[str, Row]:
    """Files that are appended to by turns: the rate, and the pieces that each is in."""
    result = {}
    for files, kib in APPENDERS:
        directory = target.mountpoint / f"append{files}-{kib}"
        directory.mkdir()
        rate = calls(program, "append", directory, files, APPEND_MIB, kib)[0]["mib_s"]
        pieces = [extents(target, path) for path in directory.iterdir()]
        result[f"{files} files, {kib} KiB"] = {
            "mib_s": rate,
            "extents_median": statistics.median(pieces),
            "extents_most": max(pieces),
        }
        shutil.rmtree(directory)
    return result


def fullness(target: Target, program: Path, seconds: float) -> list[Row]:
    """Files of 64 KiB written and deleted, as the device fills up with fragments."""
    result = []
    directory = target.mountpoint / "full"
    directory.mkdir()
    for percent in FULLNESS:
        if percent:
            calls(program, "fill", directory, percent)
        rate = calls(program, "churn", target.mountpoint, seconds)[0]["files_s"]
        result.append({"percent": float(percent), "files_s": rate})
    shutil.rmtree(directory)
    return result


def fsyncs(ready: list[Target], program: Path, rounds: int, seconds: float) -> dict[str, list[Row]]:
    """4 KiB write and fsync by more and more threads; medians of alternating rounds."""
    samples: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for threads in THREADS:
            for target in ready:
                rate = calls(program, "fsync", target.mountpoint, threads, seconds)[0]["iops"]
                samples.setdefault((target.name, threads), []).append(rate)
    return {
        target.name: [
            {"threads": float(n), "iops": statistics.median(samples[target.name, n])}
            for n in THREADS
        ]
        for target in ready
    }


def sparse(target: Target, program: Path, seconds: float) -> dict[str, Any]:
    """Random 4 KiB writes into a sparse file of SPARSE_GIB, until the time or the space is over."""
    path = target.mountpoint / "sparse"
    curve = calls(program, "sparse", path, SPARSE_GIB, seconds, max(seconds / 200, 0.25))
    result: dict[str, Any] = {"curve": curve, "extents": extents(target, path)}
    if target.daemon is not None:
        result["resident_mib"] = target.resident_bytes() / (1 << 20)
    path.unlink()
    return result


def table(results: dict[str, Any]) -> Table:
    """Everything that was measured, a row each."""
    shown = Table(title="load; ratio is extfs / XFS")
    names = [name for name in NAMES if name in results["fsync"]]
    for heading in ("what", "unit", *names, "ratio"):
        shown.add_column(heading, justify="left" if heading in ("what", "unit") else "right")

    def row(what: str, unit: str, values: list[float]) -> None:
        ratio = f"{values[0] / values[1]:.2f}" if len(values) == 2 and values[1] else ""
        shown.add_row(what, unit, *(f"{value:,.0f}" for value in values), ratio)

    for place, threads in enumerate(THREADS):
        row(
            f"4 KiB write + fsync, {threads} threads",
            "iops",
            [results["fsync"][name][place]["iops"] for name in names],
        )
    for place, percent in enumerate(FULLNESS):
        row(
            f"64 KiB files written and deleted, {percent} % in use",
            "files/s",
            [results["fullness"][name][place]["files_s"] for name in names],
        )
    for what in results["appenders"][names[0]]:
        of = [results["appenders"][name][what] for name in names]
        row(f"appends to {what}", "MiB/s", [each["mib_s"] for each in of])
        row(f"appends to {what}", "extents, most", [each["extents_most"] for each in of])
    curves = [results["sparse"][name]["curve"] for name in names]
    tenth = [max(len(curve) // 10, 1) for curve in curves]
    for when, rows in (
        ("first", [curve[:n] for curve, n in zip(curves, tenth, strict=True)]),
        ("last", [curve[-n:] for curve, n in zip(curves, tenth, strict=True)]),
    ):
        row(
            f"random write into {SPARSE_GIB} GiB, {when} tenth",
            "us",
            [statistics.median(each["us"] for each in part) for part in rows],
        )
    row("writes into it", "", [curve[-1]["writes"] for curve in curves])
    row("its extents", "", [float(results["sparse"][name]["extents"]) for name in names])
    return shown


def plot(results: dict[str, Any], path: Path) -> None:
    """Four curves: over threads, over fullness, over time, over the size of the map."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((left, right), (low, last)) = plt.subplots(2, 2, figsize=(11, 7))
    for name, color in COLORS.items():
        if name not in results["fsync"]:
            continue
        points = results["fsync"][name]
        left.plot(
            [p["threads"] for p in points],
            [p["iops"] for p in points],
            "o-",
            color=color,
            label=name,
        )
        points = results["fullness"][name]
        right.plot(
            [p["percent"] for p in points],
            [p["files_s"] for p in points],
            "o-",
            color=color,
            label=name,
        )
        points = results["sparse"][name]["curve"]
        low.plot(
            [p["seconds"] for p in points],
            [p["us"] for p in points],
            color=color,
            label=name,
            linewidth=1,
        )
        last.plot(
            [p["writes"] for p in points],
            [p["us"] for p in points],
            color=color,
            label=name,
            linewidth=1,
        )
    for axes, what, x, y in (
        (left, "4 KiB write + fsync", "threads", "per second"),
        (right, "64 KiB files written and deleted", "% of a fragmented device in use", "files/s"),
        (low, f"random 4 KiB writes into {SPARSE_GIB} GiB", "seconds", "us a write"),
        (last, "the same over the size of the file's map", "writes so far", "us a write"),
    ):
        axes.set_title(what, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compile_calls(work: Path) -> Path:
    """Build load_calls.c."""
    program = work / "load_calls"
    source = Path(__file__).with_name("load_calls.c")
    command("gcc", "-O2", "-pthread", "-o", program, source)
    return program


def measure(
    ready: list[Target], work: Path, rounds: int, seconds: float, sparse_seconds: float
) -> dict[str, Any]:
    """All of it on targets that are mounted."""
    program = compile_calls(work)
    results: dict[str, Any] = {
        "machine": machine(),
        "fsync": fsyncs(ready, program, rounds, seconds),
    }
    for what in ("appenders", "fullness", "sparse"):
        results[what] = {}
    for target in ready:
        results["appenders"][target.name] = appenders(target, program)
        results["fullness"][target.name] = fullness(target, program, seconds)
        results["sparse"][target.name] = sparse(target, program, sparse_seconds)
    return results


def run(*, rounds: int, seconds: float, sparse_seconds: float, gib: int, output: Path) -> None:
    """Measure, print the table, write OUTPUT.json and OUTPUT.png."""
    console = wide_console()
    work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
    ready: list[Target] = []
    try:
        for name in NAMES:
            why = targets.missing(name)
            if why:
                console.print(f"{name}: left out, {why}")
                continue
            target = Target(name, work, gib << 30)
            ready.append(target)
            target.set_up()
        results = measure(ready, work, rounds, seconds, sparse_seconds)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"bench: {error}", style="red")
        raise SystemExit(1) from None
    finally:
        for target in reversed(ready):
            target.tear_down()
        shutil.rmtree(work, ignore_errors=True)
    console.print(table(results))
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output.with_suffix(".png"))
    console.print(f"written: {output.with_suffix('.json')}, {output.with_suffix('.png')}")
