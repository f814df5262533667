"""The demo proper, started by scripts/demo once everything is installed and built."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "scripts"))
import demo_guest  # noqa: E402 # the end of it
import fio_layout  # noqa: E402 # scripts/fio-layout's parts
import rundir  # noqa: E402 # the test harness's bookkeeping of mounts and loop devices

MIB = 1 << 20
DEVICE_SIZE = 2048 * MIB
DAEMON_SECONDS = 30

console = Console(highlight=False)


class DemoError(Exception):
    """Something that the demo relies on failed; the text says what."""


@dataclass(frozen=True)
class Job:
    """One fio workload; each has its own file."""

    name: str
    what: str
    options: tuple[str, ...]


JOBS = (
    Job(
        "random",
        "random 4 KiB, depth 16",
        (
            *("--rw=randwrite", "--bs=4k", "--size=64m", "--direct=1"),
            *("--ioengine=libaio", "--iodepth=16"),
        ),
    ),
    Job(
        "sequential",
        "sequential 1 MiB, depth 4",
        ("--rw=write", "--bs=1m", "--size=512m", "--direct=1", "--ioengine=libaio", "--iodepth=4"),
    ),
    Job(
        "buffered",
        "sequential 64 KiB, cached",
        ("--rw=write", "--bs=64k", "--size=128m", "--ioengine=psync", "--end_fsync=1"),
    ),
    Job(
        "mapped",
        "random 4 KiB, mmap",
        ("--rw=randwrite", "--bs=4k", "--size=32m", "--ioengine=mmap", "--end_fsync=1"),
    ),
)


def run(command: list[str], directory: rundir.RunDirectory, timeout: float = 300) -> str:
    """Run a command to its end and return its standard output."""
    result = subprocess.run(
        command,
        env=directory.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if result.returncode != 0:
        raise DemoError(
            f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}"
        )
    return result.stdout


def extfs(*arguments: object) -> list[str]:
    return [str(ROOT / ".venv" / "bin" / "extfs"), *map(str, arguments)]


def show_step(command: list[str]) -> None:
    shown = ["extfs" if word.endswith("/bin/extfs") else word for word in command]
    console.print(f"\n[bold]# {' '.join(shown)}[/bold]")


@contextmanager
def mounted(
    device: rundir.LoopDevice, mountpoint: Path, run_dir: rundir.RunDirectory, *options: str
) -> Iterator[None]:
    """Mount for the time of the block; the daemon is our child."""
    command = extfs("mount", device, mountpoint, "--foreground", *options)
    show_step(command)
    log = run_dir.path / "daemon.log"
    begin = time.monotonic()
    with open(log, "ab") as output:
        daemon = subprocess.Popen(
            command,
            env=run_dir.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while not rundir.mounts_below(mountpoint):
        if daemon.poll() is not None or time.monotonic() > begin + DAEMON_SECONDS:
            daemon.kill()
            daemon.wait()
            raise DemoError(f"not mounted:\n{log.read_text(errors='replace')}")
        time.sleep(0.005)
    console.print(f"mounted after {(time.monotonic() - begin) * 1000:.0f} ms")
    yield
    command = extfs("umount", mountpoint)
    show_step(command)
    run(command, run_dir)
    if daemon.wait(DAEMON_SECONDS) != 0:
        raise DemoError(
            f"the daemon exited {daemon.returncode}:\n{log.read_text(errors='replace')}"
        )


def fio(job: Job, mountpoint: Path, run_dir: rundir.RunDirectory, *extra: str) -> dict[str, float]:
    """Run a job with verification; its numbers: bytes and seconds, written and verified."""
    command = ["fio", f"--name={job.name}", f"--filename={mountpoint}/{job.name}", *job.options]
    command += [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--fallocate=none",
        *extra,
    ]
    text = run([*command, "--output-format=json"], run_dir)
    report = json.loads(text[text.index("{") :])["jobs"][0]
    if report["error"]:
        raise DemoError(f"fio job {job.name}: error {report['error']}")
    numbers = {}
    for name, part in (("written", report["write"]), ("verified", report["read"])):
        numbers[name] = part["io_bytes"] / MIB
        numbers[f"{name}_rate"] = part["bw_bytes"] / MIB
        numbers[f"{name}_iops"] = part["iops"]
    return numbers


def write_and_verify(mountpoint: Path, run_dir: rundir.RunDirectory) -> None:
    console.print("\n[bold]# fio: every block carries a crc32c, is read back and compared[/bold]")
    table = Table(box=None, pad_edge=False)
    table.add_column("\njob", no_wrap=True)
    for heading in ("written\nMiB", "\nMiB/s", "\nIOPS", "verified\nMiB", "\nMiB/s", "\nIOPS"):
        table.add_column(heading, justify="right")
    for job in JOBS:
        with console.status(f"fio: {job.what}"):
            numbers = fio(job, mountpoint, run_dir)
        if numbers["verified"] < numbers["written"]:
            raise DemoError(f"fio job {job.name}: verified less than it wrote: {numbers}")
        table.add_row(
            job.what,
            *(
                f"{numbers[f'{name}{unit}']:,.0f}"
                for name in ("written", "verified")
                for unit in ("", "_rate", "_iops")
            ),
        )
    console.print(table)
    console.print("The rates include fio's own checksums and, for writes, the first use of memory.")


def verify_again(mountpoint: Path, run_dir: rundir.RunDirectory) -> None:
    console.print("\n[bold]# fio again, verification only: what was written is still there[/bold]")
    total = 0.0
    for job in JOBS:
        with console.status(f"fio: verifying {job.name}"):
            total += fio(job, mountpoint, run_dir, "--verify_only=1")["verified"]
    if not total:
        raise DemoError("the second verification read nothing")
    console.print(f"{total:,.0f} MiB verified, no difference")


LOADS = (
    ("random 4 KiB, depth 16", fio_layout.Workload(128 * MIB, "randwrite", 4096, 16)),
    ("sequential 1 MiB, depth 4", fio_layout.Workload(256 * MIB, "write", MIB, 4)),
)


def two_paths(mountpoint: Path) -> None:
    """The same content written through the mount and through a layout, beside the raw device."""
    console.print(
        "\n[bold]# the same file, once through the mount and once through a layout[/bold]"
    )
    console.print(
        "Through a layout: LAYOUT_GET says which blocks of the device are the file's, fio writes "
        "them on the device itself,\nLAYOUT_COMMIT makes them part of the file. Both are "
        "verified through the mount.",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("\njob", no_wrap=True)
    for heading in ("mount\nMiB/s", "layout\nMiB/s", "raw device\nMiB/s", "layout\n/ raw"):
        table.add_column(heading, justify="right")
    calls = 0.0
    for number, (what, load) in enumerate(LOADS):
        through_mount, through_layout = (
            mountpoint / f"{way}-{number}" for way in ("mount", "layout")
        )
        pattern = fio_layout.new_pattern()
        # The device's memory is used for the first time before it is measured, on all paths.
        through_layout.touch()
        speeds = fio_layout.stock(through_layout, load, console, pattern, with_raw=True)
        through_mount.touch()
        warm_blocks(through_mount, load)
        mount = fio_layout.mount_path(through_mount, load, pattern)
        if not filecmp.cmp(through_mount, through_layout, shallow=False):
            raise DemoError(f"{through_mount} and {through_layout} differ")
        if speeds.raw is None:
            raise DemoError("the raw device was not measured")
        table.add_row(
            what,
            *(f"{rate:,.0f}" for rate in (mount, speeds.layout, speeds.raw)),
            f"{speeds.layout / speeds.raw:.2f}",
        )
        calls += speeds.calls
    console.print(table)
    console.print(
        f"Every block was verified, and the files are equal. Get, commit and return took "
        f"{calls * 1000:,.1f} ms for all layouts together."
    )


def warm_blocks(path: Path, load: fio_layout.Workload) -> None:
    """Allocate the file's blocks and write them on the device. Nothing of that is committed, so
    the file goes on reading as zeros, which is looked at."""
    with path.open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, load.size)
    with fio_layout.Descriptor.of(path, write=True) as descriptor:
        device = fio_layout.device_of(descriptor)
        with fio_layout.held(descriptor, load) as (_holder, extents):
            fio_layout.raw(device, extents, load)
    with path.open("rb") as file:
        while piece := file.read(MIB):
            if piece.count(0) != len(piece):
                raise DemoError(f"{path} shows bytes that nobody committed")


def show(command: list[str], run_dir: rundir.RunDirectory) -> None:
    """Run a command of ours and print what it says."""
    show_step(command)
    console.out(run(command, run_dir).rstrip(), highlight=False)


def demo(run_dir: rundir.RunDirectory) -> None:
    image = run_dir.new_image(DEVICE_SIZE)
    device = run_dir.attach(image)
    console.print(
        f"{device} is a loop device of {DEVICE_SIZE // MIB} MiB over the sparse file {image}"
    )
    mountpoint = run_dir.new_mountpoint()
    show(extfs("mkfs", device, "--label", "demo"), run_dir)
    with mounted(device, mountpoint, run_dir):
        write_and_verify(mountpoint, run_dir)
        show(extfs("map", mountpoint / "sequential"), run_dir)
        show(extfs("info", mountpoint), run_dir)
    port = demo_guest.free_port()
    with mounted(device, mountpoint, run_dir, *demo_guest.serving(port)):
        verify_again(mountpoint, run_dir)
        two_paths(mountpoint)
        written = mountpoint / "layout-0"
        show(extfs("map", written), run_dir)
        demo_guest.read_in_guest(console, run_dir, image, written, port, DemoError)
    show(extfs("fsck", device), run_dir)
    device.detach()
    image.unlink()


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    for what in rundir.sweep_stale():
        console.print(f"left over from an earlier run: {what}")
    if not os.path.exists("/dev/fuse"):
        console.print("scripts/demo: there is no /dev/fuse on this machine (modprobe fuse?)")
        return 1
    begin = time.monotonic()
    run_dir = rundir.RunDirectory()
    code = 0
    try:
        demo(run_dir)
    except KeyboardInterrupt:
        console.print("\ninterrupted, cleaning up")
        code = 130
    except (
        DemoError,
        fio_layout.LayoutRunError,
        OSError,
        subprocess.SubprocessError,
        TimeoutError,
    ) as error:
        console.print(f"\n[red]demo failed:[/red] {error}", markup=True)
        code = 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for what in run_dir.close():
            console.print(f"cleaned up: {what}")
    if code == 0:
        console.print(
            f"\nThe demo took {time.monotonic() - begin:.0f} s; everything it made is gone again. "
            "The command is .venv/bin/extfs."
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
