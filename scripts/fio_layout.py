"""fio through a layout, started by scripts/fio-layout; scripts/demo uses its parts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fio_engine

from extfs.control.client import Descriptor, Holder, Iomode, LayoutExtent, LayoutState

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


@dataclass(frozen=True)
class Speeds:
    """One run; rates in MiB/s."""

    layout: float
    """fio on the extents, without the calls."""
    calls: float
    """Seconds that the calls took: get, commit and return."""
    raw: float | None
    """The device at the same addresses, just before; None: not asked for."""


def fio(*options: str) -> dict[str, float]:
    """One fio job: MiB and MiB/s, written and read. LayoutRunError: it found or made an error."""
    command = [
        "fio", "--name=layout", "--output-format=json", "--verify_state_save=0", "--thread",
        *options,
    ]  # fmt: skip
    # Not in our session: Ctrl-C is for us alone, who end it and wait until its I/O is over. It has
    # one process, because of --thread.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate()
        finally:
            process.kill()
            process.wait()
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if done.returncode != 0 or "{" not in done.stdout:
        # With a report on its standard output, the report's text is of no help.
        said = done.stderr.strip() or done.stdout.partition("{")[0].strip()
        raise LayoutRunError(f"{' '.join(command)}: exit {done.returncode}: {said}")
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


def new_pattern() -> str:
    """What fio is to write: eight random bytes, again and again."""
    return "0x" + secrets.token_hex(8)


def write_extents(
    device: str, extents: Sequence[LayoutExtent], patterns: Sequence[str], load: Workload
) -> float:
    """Let fio write every extent on the device with its pattern; the seconds that it took."""
    seconds = 0.0
    for extent, pattern in zip(extents, patterns, strict=True):
        whole = extent.length // load.block * load.block
        pieces = [(0, whole, load), (whole, extent.length - whole, replace(load, block=BLOCK))]
        for start, length, piece in pieces:
            if not length:
                continue
            numbers = fio(
                *piece.options(), "--ioengine=io_uring", f"--filename={device}",
                "--allow_mounted_write=1",
                f"--offset={extent.physical + start}", f"--size={length}",
                "--verify=pattern", f"--verify_pattern={pattern}", "--do_verify=0",
            )  # fmt: skip
            if round(numbers["written"] * MIB) != length:
                raise LayoutRunError(f"fio wrote {numbers['written']} MiB, not {length} bytes")
            seconds += numbers["written"] / numbers["write_rate"]
    return seconds


def verify_through_mount(
    path: Path, extents: Sequence[LayoutExtent], patterns: Sequence[str], load: Workload
) -> float:
    """Every block of every extent, read through the mount; MiB."""
    total = 0.0
    for extent, pattern in zip(extents, patterns, strict=True):
        block = load.block if extent.length % load.block == 0 else BLOCK
        total += fio(
            "--rw=read", f"--bs={block}", "--ioengine=psync", f"--filename={path}",
            f"--offset={extent.offset}", f"--size={extent.length}",
            "--verify=pattern", f"--verify_pattern={pattern}", "--verify_only=1",
            "--verify_fatal=1",
        )["read"]  # fmt: skip
    return total


@contextmanager
def held(file: Descriptor, load: Workload) -> Iterator[tuple[Holder, list[LayoutExtent]]]:
    """A layout of the whole workload, for writing; returned in the end, whatever happens."""
    holder = file.register("fio-layout")
    try:
        answers = holder.get_all(Iomode.RW, 0, load.size, wait=True)
        yield holder, [extent for answer in answers for extent in answer.writable()]
    finally:
        holder.give_all_back()


def stock(
    path: Path, load: Workload, console: Console, pattern: str = "", *, with_raw: bool = False
) -> Speeds:
    """Stock fio on the granted extents, verified through the mount.

    `pattern`: what to write; else each extent has its own. `with_raw`: first twice the raw device
    at the same addresses, once for the first use of its memory; that needs a new or empty file,
    whose blocks hold nothing yet.
    """
    raw_rate = None
    with Descriptor.of(path, write=True) as file:
        device, begin = device_of(file), time.monotonic()
        with held(file, load) as (holder, extents):
            calls = time.monotonic() - begin
            count = f"{len(extents)} extent{'s' if len(extents) != 1 else ''}"
            console.print(f"layout of {path.name}: {load.size / MIB:,.6g} MiB in {count}")
            if with_raw:
                if any(extent.state != LayoutState.INVALID_DATA for extent in extents):
                    raise LayoutRunError(f"{path} has written blocks: raw I/O would destroy them")
                raw(device, extents, load)
                raw_rate = raw(device, extents, load)
            patterns = [pattern or new_pattern() for _ in extents]
            seconds = write_extents(device, extents, patterns, load)
            begin = time.monotonic()
            holder.commit([(e.offset, e.length) for e in extents], file_size=load.size)
        calls += time.monotonic() - begin
    if path.stat().st_size != load.size:
        raise LayoutRunError(
            f"{path} has {path.stat().st_size} bytes after the commit, not {load.size}"
        )
    verified = verify_through_mount(path, extents, patterns, load)
    if round(verified * MIB) != load.size:
        raise LayoutRunError(f"only {verified:.0f} MiB were verified")
    return Speeds(load.size / MIB / seconds, calls, raw_rate)


def through_engine(path: Path, load: Workload, engine: Path) -> float:
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
    """The raw device at the same addresses; MiB/s. Destroys what is there: hold a layout."""
    seconds = write_extents(device, extents, [new_pattern() for _ in extents], load)
    return sum(extent.length for extent in extents) / MIB / seconds


def mount_path(path: Path, load: Workload, pattern: str) -> float:
    """The same workload through the mount, verified; MiB/s of the writes."""
    verify = ("--verify=pattern", f"--verify_pattern={pattern}", f"--filename={path}")
    numbers = fio(
        *load.options(), "--ioengine=io_uring", f"--size={load.size}", *verify, "--do_verify=0",
        "--fallocate=none",
    )  # fmt: skip
    read = fio(
        "--rw=read", f"--bs={load.block}", "--ioengine=psync", f"--size={load.size}", *verify,
        "--verify_only=1", "--verify_fatal=1",
    )["read"]  # fmt: skip
    if round(read * MIB) != load.size:
        raise LayoutRunError(f"only {read:.0f} MiB were verified")
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    load = Workload(parse_size(size), rw, parse_size(bs), iodepth)
    if load.size % load.block:
        raise click.ClickException(f"--size {size} is not a multiple of --bs {bs}")
    made = new_or_empty(path)
    try:
        run(path, load, console, with_engine=engine)
    except BaseException as error:
        # Nothing half written stays: the file is as it was.
        with contextlib.suppress(OSError):
            if made:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, 0)
        if isinstance(error, KeyboardInterrupt):
            console.print("interrupted: the layout was returned, the file is as it was")
            sys.exit(130)
        if isinstance(error, OSError):
            raise click.ClickException(reason(error, path, load)) from None
        if isinstance(error, LayoutRunError):
            raise click.ClickException(str(error)) from None
        raise


def new_or_empty(path: Path) -> bool:
    """Make the file; False: it was there, and is empty. ClickException: it cannot be used."""
    made = False
    try:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            made = True
        except FileExistsError:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise click.ClickException(f"{path} is not a regular file") from None
            if found.st_size:
                raise click.ClickException(
                    f"{path} is not empty: it would be overwritten"
                ) from None
        with Descriptor.of(path) as file:
            file.info()
    except OSError as error:
        if made:
            path.unlink()
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise click.ClickException(f"{path} is not on a mounted extfs") from None
        raise click.ClickException(f"{path}: {error.strerror}") from None
    return made


def reason(error: OSError, path: Path, load: Workload) -> str:
    """What went wrong, for people."""
    if error.errno == errno.ENOSPC:
        return f"{path}: no space for {load.size / MIB:,.6g} MiB; nothing was kept"
    if error.errno == errno.EOPNOTSUPP:
        return f"{path}: no layouts on this mount (writeback_cache)"
    if error.errno in (errno.ENXIO, errno.EOWNERDEAD):
        return f"{path}: the layout was recalled and taken while fio ran"
    return f"{error.filename or path}: {error.strerror or error}"


def run(path: Path, load: Workload, console: Console, *, with_engine: bool) -> None:
    """Both ways, and the table."""
    table = Table(box=None)
    table.add_column("path")
    table.add_column("MiB/s", justify="right")
    speeds = stock(path, load, console, with_raw=True)
    table.add_row("raw device, the same addresses", f"{speeds.raw:,.0f}")
    table.add_row("stock fio on the granted extents", f"{speeds.layout:,.0f}")
    if with_engine:
        try:
            built = fio_engine.engine()
        except fio_engine.EngineError as error:
            console.print(f"no engine: {error}")
        else:
            os.truncate(path, 0)
            table.add_row("fio with the engine", f"{through_engine(path, load, built):,.0f}")
            console.print(
                "the engine, for your own jobs: "
                f"fio --ioengine=external:{built} --direct=1 --filename=FILE ...",
                soft_wrap=True,
            )
    console.print(table)
    console.print(
        f"Every block was verified through the mount. Get, commit and return of the layout took "
        f"{speeds.calls * 1000:,.1f} ms together."
    )


if __name__ == "__main__":
    main()
