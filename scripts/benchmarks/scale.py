"""`scripts/bench scale`: does the cost of mounting and the daemon's memory stay bounded?"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rich.table import Table

from .targets import EXTFS, Target
from .targets import run as command
from .wide import wide_console

HUGE_BYTES = 16 << 40


def mount_seconds(device: str, mountpoint: Path, rounds: int = 5) -> float:
    """Median time of `extfs mount` until the filesystem answers, interpreter start included."""
    times = []
    for _ in range(rounds):
        start = time.monotonic()
        command(EXTFS, "mount", device, mountpoint)
        os.stat(mountpoint)
        times.append(time.monotonic() - start)
        command(EXTFS, "umount", mountpoint)
    return statistics.median(times)


def huge(work: Path) -> dict[str, float]:
    """mkfs and mount of a sparse 16 TiB image."""
    image, mountpoint = work / "huge.img", work / "huge.mnt"
    with image.open("wb") as file:
        file.truncate(HUGE_BYTES)
    mountpoint.mkdir()
    start = time.monotonic()
    command(EXTFS, "mkfs", image)
    made = time.monotonic() - start
    seconds = mount_seconds(str(image), mountpoint)
    used = image.stat().st_blocks * 512
    image.unlink()
    mountpoint.rmdir()
    return {"mkfs_s": made, "mount_s": seconds, "image_mib": used / (1 << 20)}


def many_files(work: Path, count: int) -> dict[str, float]:
    """Make and stat many files; the daemon's memory then; mount time of that filesystem."""
    target = Target("extfs", work, 4 << 30)
    try:
        target.set_up()
        start = time.monotonic()
        for directory in range(0, count, 10000):
            path = target.mountpoint / f"d{directory}"
            path.mkdir()
            base = os.fspath(path)
            for index in range(min(10000, count - directory)):
                os.close(os.open(f"{base}/{index}", os.O_CREAT | os.O_WRONLY))
        made = time.monotonic() - start
        for directory in os.scandir(target.mountpoint):
            for entry in os.scandir(directory.path):
                entry.stat()
        memory = target.resident_bytes()
        target._stop()
        target.undo.remove(target._stop)
        seconds = mount_seconds(target.device, target.mountpoint)
    finally:
        target.tear_down()
    return {
        "files": count,
        "creates_per_s": count / made,
        "resident_mib": memory / (1 << 20),
        "mount_s": seconds,
    }


def run(*, files: int, output: Path) -> None:
    """Measure, print, write OUTPUT.json."""
    console = wide_console()
    work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
    try:
        results = {"16 TiB": huge(work), "files": many_files(work, files)}
    except (RuntimeError, subprocess.SubprocessError) as error:
        console.print(f"bench: {error}", style="red")
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = Table(title="scale")
    table.add_column("filesystem")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, values in results.items():
        for key, value in values.items():
            table.add_row(name, key, f"{value:.2f}")
    console.print(table)
    path = output.with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {path}")
