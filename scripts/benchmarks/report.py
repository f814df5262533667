"""Table, JSON and plot of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import targets

FUSE_PEERS = ("fuse2fs", "ntfs3g")


def ratios(rates: Mapping[str, float]) -> dict[str, float]:
    """extfs divided by the better FUSE peer, XFS and the raw device, where measured."""
    if "extfs" not in rates:
        return {}
    result = {}
    peers = [rates[name] for name in FUSE_PEERS if name in rates]
    if peers:
        result["peer"] = rates["extfs"] / max(peers)
    for name in ("xfs", "raw"):
        if rates.get(name):
            result[name] = rates["extfs"] / rates[name]
    return result


def number(value: float) -> str:
    """Three significant digits, k for thousands."""
    if value >= 100_000:
        return f"{value / 1000:.0f} k"
    if value >= 1000:
        return f"{value / 1000:.1f} k"
    return f"{value:.0f}"


def table(
    titles: Mapping[str, tuple[str, str]], medians: Mapping[str, Mapping[str, float]]
) -> Table:
    """A row a job: the medians, then extfs's ratios."""
    names = sorted({name for rates in medians.values() for name in rates}, key=_order)
    result = Table(title="medians; ratios are extfs / other")
    result.add_column("job", no_wrap=True)
    result.add_column("unit", no_wrap=True)
    for name in names:
        result.add_column(name, justify="right")
    for heading in ("/ FUSE peer", "/ XFS", "/ raw"):
        result.add_column(heading, justify="right")
    for job, rates in medians.items():
        title, unit = titles[job]
        compared = ratios(rates)
        result.add_row(
            title,
            unit,
            *(number(rates[name]) if name in rates else "" for name in names),
            *(f"{compared[key]:.2f}" if key in compared else "" for key in ("peer", "xfs", "raw")),
        )
    return result


def _order(name: str) -> int:
    return targets.NAMES.index(name) if name in targets.NAMES else len(targets.NAMES)


def plot(
    titles: Mapping[str, tuple[str, str]], medians: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Bars of every target relative to the better FUSE peer, on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    jobs = [job for job, rates in medians.items() if any(peer in rates for peer in FUSE_PEERS)]
    names = sorted({name for job in jobs for name in medians[job]}, key=_order)
    colors = {
        "extfs": "#0b6e4f",
        "classic": "#5fae8b",
        "halting": "#3f8fa6",
        "writeback": "#a9d6c0",
        "fuse2fs": "#c8963e",
        "ntfs3g": "#b5543c",
        "xfs": "#46627f",
        "polling": "#8fa6bf",
        "raw": "#b8b8b8",
    }
    figure, axes = plt.subplots(figsize=(10, 0.62 * len(jobs) + 1.6))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        points = [
            (
                row,
                medians[job][name]
                / max(medians[job][peer] for peer in FUSE_PEERS if peer in medians[job]),
            )
            for row, job in enumerate(jobs)
            if name in medians[job]
        ]
        bars = axes.barh(
            [row + (place - len(names) / 2 + 0.5) * width for row, _ in points],
            [value for _, value in points],
            height=width,
            label=name,
            color=colors.get(name),
        )
        if name == "extfs":
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(jobs)), [titles[job][0] for job in jobs])
    axes.set_ylim(len(jobs) - 0.4, -0.6)
    axes.set_xlabel(
        "rate relative to the better of fuse2fs and ntfs-3g (log scale; longer is faster)"
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=5, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(
    console: Console,
    titles: Mapping[str, tuple[str, str]],
    medians: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Mapping[str, list[float]]],
    machine: Mapping[str, str | int],
    output: Path,
) -> None:
    """Print the table and write OUTPUT.json and OUTPUT.png."""
    console.print(table(titles, medians))
    json_path, png_path = output.with_suffix(".json"), output.with_suffix(".png")
    json_path.write_text(
        json.dumps(
            {
                "machine": machine,
                "jobs": {
                    job: {
                        "title": titles[job][0],
                        "unit": titles[job][1],
                        "median": rates,
                        "samples": samples[job],
                        "ratios": ratios(rates),
                    }
                    for job, rates in medians.items()
                },
            },
            indent=1,
        )
        + "\n"
    )
    written = [json_path]
    if any(peer in rates for rates in medians.values() for peer in FUSE_PEERS):
        plot(titles, medians, png_path)
        written.append(png_path)
    console.print("written:", *written)
