"""fio through a layout, started by scripts/fio-layout; scripts/demo uses its parts."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fio_engine

from extfs.control.client import Descriptor, Holder, Iomode, LayoutExtent

MIB = 1 << 20
BLOCK = 4096


class LayoutRunError(Exception):
    """Something that the run relies on failed; the text says what."""


@dataclass(frozen=True)
class Workload:
    """What fio does; sizes in bytes."""

    size: int
    rw: str = "randwrite"
    block: int = BLOCK
    iodepth: int = 16

    def options(self) -> list[str]:
        return [
            f"--rw={self.rw}", f"--bs={self.block}", f"--iodepth={self.iodepth}", "--direct=1",
        ]  # fmt: skip


def fio(*options: str) -> dict[str, float]:
    """One fio job: MiB and MiB/s, written and read. LayoutRunError: it found or made an error."""
    command = ["fio", "--name=layout", "--output-format=json", "--verify_state_save=0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "{" not in done.stdout:
        raise LayoutRunError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise LayoutRunError(f"{' '.join(command)}: error {job['error']}: {done.stderr}")
    return {
        "written": job["write"]["io_bytes"] / MIB,
        "write_rate": job["write"]["bw_bytes"] / MIB,
        "write_iops": job["write"]["iops"],
        "read": job["read"]["io_bytes"] / MIB,
    }


def device_of(descriptor: Descriptor) -> str:
    """The device, as the daemon opened it."""
    return descriptor.info().device


def write_extents(
    device: str, extents: Sequence[LayoutExtent], load: Workload
) -> tuple[list[str], float]:
    """Let fio write every extent on the device, each with a pattern of its own.

    Returns the patterns, and the seconds that it took.
    """
    patterns = []
    seconds = 0.0
    for extent in extents:
        patterns.append("0x" + secrets.token_hex(8))
        numbers = fio(
            *load.options(), "--ioengine=io_uring", f"--filename={device}",
            f"--offset={extent.physical}", f"--size={extent.length}",
            "--verify=pattern", f"--verify_pattern={patterns[-1]}", "--do_verify=0",
        )  # fmt: skip
        if round(numbers["written"] * MIB) != extent.length:
            raise LayoutRunError(
                f"fio wrote {numbers['written']} MiB of an extent of {extent.length} bytes"
            )
        seconds += numbers["written"] / numbers["write_rate"]
    return patterns, seconds


def verify_through_mount(
    path: Path, extents: Sequence[LayoutExtent], patterns: Sequence[str], load: Workload
) -> float:
    """Every block of every extent, read through the mount; MiB."""
    total = 0.0
    for extent, pattern in zip(extents, patterns, strict=True):
        total += fio(
            "--rw=read", f"--bs={load.block}", "--ioengine=psync", f"--filename={path}",
            f"--offset={extent.offset}", f"--size={extent.length}",
            "--verify=pattern", f"--verify_pattern={pattern}", "--verify_only=1",
            "--verify_fatal=1",
        )["read"]  # fmt: skip
    return total


def stock(path: Path, load: Workload, console: Console) -> float:
    """Stock fio on the granted extents; MiB/s of the writes."""
    with Descriptor.of(path, write=True) as file:
        holder: Holder = file.register("fio-layout")
        answers = holder.get_all(Iomode.RW, 0, load.size, wait=True)
        extents = [extent for answer in answers for extent in answer.writable()]
        console.print(f"layout of {path.name}: {load.size // MIB} MiB in {len(extents)} extents")
        patterns, seconds = write_extents(device_of(file), extents, load)
        holder.commit([(e.offset, e.length) for e in extents], file_size=load.size)
        holder.give_all_back()
    if path.stat().st_size != load.size:
        raise LayoutRunError(
            f"{path} has {path.stat().st_size} bytes after the commit, not {load.size}"
        )
    verified = verify_through_mount(path, extents, patterns, load)
    if round(verified * MIB) != load.size:
        raise LayoutRunError(f"only {verified:.0f} MiB were verified")
    return load.size / MIB / seconds


def with_engine(path: Path, load: Workload, engine: Path) -> float:
    """The engine maps offsets: fio's own headers carry the file's offsets; MiB/s."""
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, load.size)
    verify = ("--verify=crc32c", f"--filename={path}", f"--size={load.size}")
    numbers = fio(*load.options(), f"--ioengine=external:{engine}", *verify, "--do_verify=0")
    read = fio(
        f"--rw={load.rw}", f"--bs={load.block}", "--ioengine=psync", *verify, "--verify_only=1",
        "--verify_fatal=1",
    )["read"]  # fmt: skip
    if round(read * MIB) != load.size:
        raise LayoutRunError(f"only {read:.0f} MiB were verified")
    return numbers["write_rate"]


def raw(device: str, extents: Sequence[LayoutExtent], load: Workload) -> float:
    """The raw device at the same addresses, with nobody else; MiB/s. Destroys what is there."""
    _patterns, seconds = write_extents(device, extents, load)
    return sum(extent.length for extent in extents) / MIB / seconds


def mount_path(path: Path, load: Workload) -> float:
    """The same workload through the mount, verified; MiB/s."""
    numbers = fio(
        *load.options(), "--ioengine=io_uring", f"--filename={path}", f"--size={load.size}",
        "--verify=crc32c", "--verify_fatal=1", "--fallocate=none",
    )  # fmt: skip
    return numbers["write_rate"]


def parse_size(text: str) -> int:
    """Bytes, with a unit or without; whole blocks."""
    units = {"k": 10, "m": 20, "g": 30}
    shift = units.get(text[-1:].lower(), 0)
    digits = text[:-1] if shift else text
    if not digits.isdecimal() or not int(digits) or (int(digits) << shift) % BLOCK:
        raise click.BadParameter(f"{text!r} is not a size in whole blocks of 4096 bytes")
    return int(digits) << shift


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--size", default="256m", show_default=True, help="Bytes to write.")
@click.option(
    "--rw", default="randwrite", show_default=True, type=click.Choice(["randwrite", "write"])
)
@click.option("--bs", default="4k", show_default=True, help="Bytes of one transfer.")
@click.option("--iodepth", default=16, show_default=True, type=click.IntRange(1, 1024))
@click.option("--engine/--no-engine", default=True, help="Also with the engine of native/fio.")
def main(path: Path, size: str, rw: str, bs: str, iodepth: int, engine: bool) -> None:
    """Run fio through a layout of FILE (new, or empty) on a mounted extfs."""
    console = Console(highlight=False)
    load = Workload(parse_size(size), rw, parse_size(bs), iodepth)
    if path.exists() and path.stat().st_size:
        raise click.ClickException(f"{path} is not empty: it would be overwritten")
    made = not path.exists()
    try:
        path.touch()
        table = Table(box=None)
        table.add_column("path")
        table.add_column("MiB/s", justify="right")
        table.add_row("stock fio on the granted extents", f"{stock(path, load, console):,.0f}")
        if engine:
            try:
                built = fio_engine.engine()
            except fio_engine.EngineError as error:
                console.print(f"no engine: {error}")
            else:
                os.truncate(path, 0)
                table.add_row("fio with the engine", f"{with_engine(path, load, built):,.0f}")
                console.print(f"the engine, for your own jobs: --ioengine=external:{built}")
        console.print(table)
        console.print("every block was verified through the mount")
    except (LayoutRunError, OSError) as error:
        if made and path.exists() and not path.stat().st_size:
            path.unlink()
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
