"""`scripts/bench sparse`: random small writes into a large sparse file, for as long as you like.

The device is larger than memory, and holds the zeros that are written without taking any
(`thin.Thin`), so what is seen over time is the allocator's, the extent map's and the journal's.
"""

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
from .load import COLORS, compile_calls
from .mount import machine
from .targets import Target
from .targets import run as command
from .thin import Thin
from .wide import wide_console

STEPS = 240
"""Points of the curve."""
TENTHS = 10


def extents(target: Target, path: Path) -> int:
    """How many extents a file has; millions of them are only counted."""
    if target.name == "xfs":
        found = re.search(r"(\d+) extents? found", command("filefrag", path))
        if found is None:
            raise RuntimeError(f"the extents of {path} are not told")
        return int(found[1])
    from extfs.control.client import END, Descriptor

    count, start = 0, 0
    with Descriptor.of(str(path)) as descriptor:
        while start != END:
            answer = descriptor.map(start)
            count += len(answer.extents)
            start = answer.next
    return count


def measure(target: Target, program: Path, *, file_gib: int, seconds: float) -> dict[str, Any]:
    """The curve of one target, and what it led to."""
    path = target.mountpoint / "sparse"
    with Thin(target.work / f"{target.name}.img") as thin:
        said = command(program, "sparse", path, str(file_gib), str(seconds), str(seconds / STEPS))
        if thin.error is not None:
            raise RuntimeError(f"giving zeros back: {thin.error}")
        found = extents(target, path)
        return {
            "curve": [json.loads(line) for line in said.splitlines()],
            "extents": found,
            "resident_mib": target.resident_bytes() / (1 << 20) if target.daemon else None,
            "device_mib": (target.work / f"{target.name}.img").stat().st_blocks / 2048,
            "given_back_mib": thin.given_back / (1 << 20),
        }


def table(results: dict[str, Any]) -> Table:
    """The median cost in each tenth of the time, and the longest write in it."""
    shown = Table(title=f"random 4 KiB writes into {results['file_gib']} GiB")
    for heading in ("system", "tenth", "writes so far", "us", "longest, ms"):
        shown.add_column(heading, justify="left" if heading == "system" else "right")
    for name, result in results["systems"].items():
        curve = result["curve"]
        for tenth in range(TENTHS):
            part = curve[tenth * len(curve) // TENTHS : (tenth + 1) * len(curve) // TENTHS]
            if part:
                shown.add_row(
                    name,
                    str(tenth + 1),
                    f"{part[-1]['writes']:,}",
                    f"{statistics.median(point['us'] for point in part):.1f}",
                    f"{max(point['longest_us'] for point in part) / 1000:.1f}",
                )
    return shown


def plot(results: dict[str, Any], path: Path) -> None:
    """Cost over time and over the writes so far; the longest write of each step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
    for name, result in results["systems"].items():
        curve = result["curve"]
        minutes = [point["seconds"] / 60 for point in curve]
        cost = [point["us"] for point in curve]
        longest = [point["longest_us"] / 1000 for point in curve]
        style = {"color": COLORS[name], "label": name, "linewidth": 1}
        left.plot(minutes, cost, **style)
        middle.plot([point["writes"] / 1e6 for point in curve], cost, **style)
        right.plot(minutes, longest, **style)
    for axes, what, x, y in (
        (left, "cost over time", "minutes", "us a write"),
        (middle, "cost over the size of the map", "millions of writes so far", "us a write"),
        (right, "the longest write", "minutes", "ms"),
    ):
        axes.set_title(what, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(f"random 4 KiB writes into a sparse file of {results['file_gib']} GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(*, minutes: float, file_gib: int, memory_mib: int, only: list[str], output: Path) -> None:
    """Measure, print the table, write OUTPUT.json and OUTPUT.png."""
    console = wide_console()
    work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
    results: dict[str, Any] = {"machine": machine(), "file_gib": file_gib, "systems": {}}
    results["machine"]["memory_limit_mib"] = memory_mib
    try:
        program = compile_calls(work)
        for name in only:
            why = targets.missing(name) if name in COLORS else "only extfs and xfs are compared"
            if why:
                raise RuntimeError(f"{name}: {why}")
            # A fifth more than the file: what is kept about it, and the log.
            target = Target(
                name, work, file_gib * 6 // 5 << 30, thin=True, memory_limit=memory_mib << 20
            )
            try:
                target.set_up()
                results["systems"][name] = measure(
                    target, program, file_gib=file_gib, seconds=minutes * 60
                )
            finally:
                target.tear_down()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"bench: {error}", style="red")
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(table(results))
    for name, result in results["systems"].items():
        resident = result["resident_mib"]
        console.print(
            f"{name}: {result['extents']:,} extents, {result['device_mib']:,.0f} MiB of the device"
            + (f", {resident:,.0f} MiB resident" if resident else "")
        )
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output.with_suffix(".png"))
    console.print(f"written: {output.with_suffix('.json')}, {output.with_suffix('.png')}")
