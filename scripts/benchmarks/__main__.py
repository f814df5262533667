"""Command line of scripts/bench."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from . import layout, load, mount, nfs, scale, sparse


@click.group()
def main() -> None:
    """Measure extfs beside its peers on equal devices."""
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for loop devices and mounts")


@main.command("mount")
@click.option("--rounds", default=3, show_default=True, help="Rounds; medians are reported.")
@click.option("--seconds", default=3.0, show_default=True, help="Duration of each fio run.")
@click.option("--size", default=512, show_default=True, help="Size of the test file in MiB.")
@click.option("--files", default=20000, show_default=True, help="Files of the metadata job.")
@click.option("--tree-files", default=50000, show_default=True, help="Files of the source tree.")
@click.option("--only", default="", help="Targets, comma separated.")
@click.option("--jobs", default="", help="Jobs, comma separated.")
@click.option("--output", default="bench-mount", show_default=True, type=click.Path(path_type=Path))
def run_mount(
    rounds: int, seconds: float, size: int, files: int, tree_files: int, only: str, jobs: str,
    output: Path,
) -> None:  # fmt: skip
    """Compare the mount with fuse2fs, ntfs-3g, XFS and the raw device."""
    mount.run(
        rounds=rounds,
        seconds=seconds,
        size_mib=size,
        files=files,
        tree_files=tree_files,
        only=[name for name in only.split(",") if name],
        jobs=[name for name in jobs.split(",") if name],
        output=output,
    )


@main.command("scale")
@click.option("--files", default=1_000_000, show_default=True, help="Files to make and touch.")
@click.option("--output", default="bench-scale", show_default=True, type=click.Path(path_type=Path))
def run_scale(files: int, output: Path) -> None:
    """Mount time of a 16 TiB filesystem and of one with many files; memory of the daemon."""
    scale.run(files=files, output=output)


@main.command("layout")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each fio job.")
@click.option("--seconds", default=2.0, show_default=True, help="Duration of each fio run.")
@click.option("--extents", default=1_000_000, show_default=True, help="Where the curve ends.")
@click.option("--segments", default=100_000, show_default=True, help="Where the other one ends.")
@click.option(
    "--output", default="bench-layout", show_default=True, type=click.Path(path_type=Path)
)
def run_layout(rounds: int, seconds: float, extents: int, segments: int, output: Path) -> None:
    """I/O through a layout beside the raw device; what the control calls cost."""
    layout.run(rounds=rounds, seconds=seconds, extents=extents, segments=segments, output=output)


@main.command("load")
@click.option("--rounds", default=3, show_default=True, help="Rounds of the fsync jobs.")
@click.option("--seconds", default=2.0, show_default=True, help="Duration of each short run.")
@click.option(
    "--sparse-seconds",
    default=60.0,
    show_default=True,
    help="Duration of the random writes into a sparse file; an hour is 3600.",
)
@click.option("--gib", default=2, show_default=True, help="Size of each device.")
@click.option("--output", default="bench-load", show_default=True, type=click.Path(path_type=Path))
def run_load(rounds: int, seconds: float, sparse_seconds: float, gib: int, output: Path) -> None:
    """Growing files, a full device, a sparse file, threads that fsync: beside XFS."""
    load.run(rounds=rounds, seconds=seconds, sparse_seconds=sparse_seconds, gib=gib, output=output)


@main.command("sparse")
@click.option("--minutes", default=2.0, show_default=True, help="For each system.")
@click.option("--file-gib", default=100, show_default=True, help="Size of the sparse file.")
@click.option("--memory-mib", default=4096, show_default=True, help="Limit of a daemon's cgroup.")
@click.option("--only", default="extfs", show_default=True, help="extfs, xfs, or both.")
@click.option(
    "--output", default="bench-sparse", show_default=True, type=click.Path(path_type=Path)
)
def run_sparse(minutes: float, file_gib: int, memory_mib: int, only: str, output: Path) -> None:
    """Random 4 KiB writes into a sparse file: does a write's cost stay what it is?"""
    sparse.run(
        minutes=minutes,
        file_gib=file_gib,
        memory_mib=memory_mib,
        only=[name for name in only.split(",") if name],
        output=output,
    )


@main.command("nfs")
@click.option("--rounds", default=3, show_default=True, help="Rounds; medians are reported.")
@click.option("--calls", default=4000, show_default=True, help="Calls of each kind in a round.")
@click.option(
    "--guest-seconds",
    default=4.0,
    show_default=True,
    help="Duration of each fio run in a virtual machine; 0: none.",
)
@click.option("--output", default="bench-nfs", show_default=True, type=click.Path(path_type=Path))
def run_nfs(rounds: int, calls: int, guest_seconds: float, output: Path) -> None:
    """What compounds of the layout server cost; a kernel client's I/O through layouts."""
    nfs.run(rounds=rounds, calls=calls, guest_seconds=guest_seconds, output=output)


main()
