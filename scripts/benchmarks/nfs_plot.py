"""The picture of `scripts/bench nfs`: `python -m benchmarks.nfs_plot RESULT.json PICTURE.png`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

JOBS = {
    "seq-read": "sequential\nread, 1 MiB",
    "seq-write": "sequential\nwrite, 1 MiB",
    "rand-read": "random\nread, 4 KiB",
    "rand-write": "random\nwrite, 4 KiB",
}
EXTFS, PEER, AIM = "#0b6e4f", "#c8963e", "#b5543c"


def _medians(rounds: list[dict[str, Any]]) -> list[float]:
    return [entry["median"] for entry in rounds]


def _calls(found: dict[str, Any], axes: Any) -> None:
    """Medians of compounds, with the least and the greatest of the rounds, and the aims."""
    samples = [
        ("GETATTR", _medians(found["getattr"]["extfs"]), EXTFS, 200),
        ("GETATTR,\nGanesha", _medians(found["getattr"]["ganesha"]), PEER, None),
        ("LAYOUTGET", found["layoutget_us"], EXTFS, 250),
        ("LAYOUT-\nCOMMIT", found["layoutcommit_us"], EXTFS, 250),
    ]
    for place, (_, values, color, aim) in enumerate(samples):
        if not values:
            continue
        middle = statistics.median(values)
        spread = [[middle - min(values)], [max(values) - middle]]
        axes.bar(place, middle, 0.6, color=color, yerr=spread, capsize=3)
        if aim is not None:
            axes.hlines(aim, place - 0.4, place + 0.4, color=AIM, linestyle="--")
    axes.set_xticks(range(len(samples)), [name for name, *_ in samples], fontsize=8)
    axes.set_ylabel("loopback, median, microseconds (dashed: aim)")
    axes.set_ylim(bottom=0)


def ratios(rows: list[dict[str, Any]], job: str, place: str) -> list[float]:
    """I/O rates of a place by those of the raw disk, round by round."""
    rates = {(row["round"], row["place"]): row["iops"] for row in rows if row["job"] == job}
    rounds = sorted({number for number, _ in rates})
    return [rates[number, place] / rates[number, "raw"] for number in rounds]


def _guests(rows: list[dict[str, Any]], axes: Any) -> None:
    """Of the raw disk, in a guest."""
    for number, (place, color) in enumerate((("extfs", EXTFS), ("knfsd", PEER))):
        for job_number, job in enumerate(JOBS):
            values = ratios(rows, job, place)
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            where = job_number + 0.4 * number - 0.2
            label = place if not job_number else None
            axes.bar(where, middle, 0.38, color=color, yerr=spread, capsize=3, label=label)
    axes.axhline(0.9, color=AIM, linestyle="--")
    axes.set_xticks(range(len(JOBS)), list(JOBS.values()), fontsize=8)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("in a guest: of the raw disk (dashed: aim)")
    axes.legend(fontsize=8)


def plot(found: dict[str, Any], path: Path) -> None:
    """Compounds and, where guests ran, their I/O."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    guests = found["guests"]
    figure, axes = plt.subplots(1, 2 if guests else 1, figsize=(10, 4.2), squeeze=False)
    _calls(found, axes[0][0])
    if guests:
        _guests(guests["rows"], axes[0][1])
    for one in axes[0]:
        one.grid(visible=True, axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
