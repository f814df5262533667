"""map: where a file's bytes are."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import click

from extfs.cli.output import CommandError, print_json, size_text, write_table

BLOCK_SIZE = 4096
_STATES = {1: "unwritten", 2: "written"}


@dataclass(frozen=True)
class MapExtent:
    """One extent; all numbers in bytes."""

    offset: int
    physical: int
    length: int
    state: str
    shared: bool
    layout: bool


def mounted_map(path: str) -> tuple[int, list[MapExtent]]:
    """(file size, extents) of a file on a mounted extfs. CommandError, OSError."""
    from extfs.control.client import Descriptor

    with Descriptor.of(path) as descriptor:
        try:
            answer = descriptor.whole_map()
        except OSError as error:
            if error.errno == errno.ENOTTY:
                raise CommandError(f"{path}: not a regular file on extfs") from error
            raise CommandError(f"{path}: {error.strerror}") from error
    extents = [
        MapExtent(e.offset, e.physical, e.length, e.state.name.lower(), e.shared, e.layout)
        for e in answer.extents
    ]
    return answer.file_size, extents


def device_map(device: str, path: str) -> tuple[int, list[MapExtent]]:
    """The same for a file of an unmounted device, read by the decoder."""
    from extfs.check.mapping import Image
    from extfs.check.volume import DamageError, VolumeError

    try:
        with Image(device) as image:
            ino = image.resolve(os.fsencode(path))
            values = image.inode(ino)
            if values is None or values["mode"] >> 12 != 8:
                raise CommandError(f"{path}: not a regular file")
            extents = [
                MapExtent(
                    extent.file * BLOCK_SIZE,
                    extent.block * BLOCK_SIZE,
                    extent.length * BLOCK_SIZE,
                    _STATES.get(extent.state, str(extent.state)),
                    extent.shared,
                    bool(extent.flags & 1),
                )
                for extent in image.extents(ino)
                if extent.fork == 0
            ]
            return values["size"], extents
    except VolumeError as error:
        raise CommandError(error.text) from error
    except DamageError as error:
        raise CommandError(f"{device}: {error}") from error


# ---- the picture -------------------------------------------------------------------------------

_HOLE, _UNWRITTEN, _WRITTEN, _MIXED, _BOTH = "·", "░", "█", "▒", "▓"
LEGEND = (
    f"{_WRITTEN} written  {_BOTH} shared  {_UNWRITTEN} unwritten  {_HOLE} hole  {_MIXED} several"
)


def _symbol(extent: MapExtent) -> str:
    if extent.state != "written":
        return _UNWRITTEN
    return _BOTH if extent.shared else _WRITTEN


def bar(size: int, extents: list[MapExtent], width: int) -> str:
    """The file from its begin to its end in `width` characters; see LEGEND."""
    end = max([size, *(extent.offset + extent.length for extent in extents)])
    if not end:
        return ""
    cells = min(width, -(-end // BLOCK_SIZE))
    seen: list[dict[str, int]] = [{} for _ in range(cells)]
    for extent in extents:
        symbol = _symbol(extent)
        first = extent.offset * cells // end
        last = min((extent.offset + extent.length) * cells - 1, end * cells - 1) // end
        for cell in (first, last) if last > first else (first,):
            low, high = cell * end // cells, (cell + 1) * end // cells
            bytes_here = min(high, extent.offset + extent.length) - max(low, extent.offset)
            seen[cell][symbol] = seen[cell].get(symbol, 0) + max(bytes_here, 0)
        for cell in range(first + 1, last):
            seen[cell][symbol] = -(-end // cells)
    line = ""
    for number, symbols in enumerate(seen):
        room = (number + 1) * end // cells - number * end // cells
        covered = sum(symbols.values())
        if not covered:
            line += _HOLE
        elif len(symbols) > 1 or covered < room - BLOCK_SIZE:
            line += _MIXED
        else:
            line += next(iter(symbols))
    return line


def _table(size: int, extents: list[MapExtent]) -> None:
    titles = ("#", "file offset", "length", "device offset", "block", "state")
    rows = []
    for number, extent in enumerate(extents):
        state = extent.state
        state += ", shared" if extent.shared else ""
        state += ", for a layout" if extent.layout else ""
        state += ", past the end" if extent.offset >= size else ""
        rows.append(
            (
                str(number),
                f"{extent.offset:,}",
                size_text(extent.length),
                f"{extent.physical:,}",
                f"{extent.physical // BLOCK_SIZE:,}",
                state,
            )
        )
    write_table(titles, rows)
    mapped = sum(extent.length for extent in extents)
    click.echo(f"{len(extents):,} extents map {size_text(mapped)}; the file has {size_text(size)}")
    width = shutil.get_terminal_size().columns
    picture = bar(size, extents, max(20, min(width, 120) - 2))
    if picture:
        click.echo(f"[{picture}]")
        click.echo(LEGEND)


@click.command("map")
@click.argument("file")
@click.option("--device", metavar="DEVICE", help="FILE is a path on this device, not mounted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; all numbers in bytes.")
def show_map(file: str, device: str | None, as_json: bool) -> None:
    """Print the extent map of FILE: which bytes lie where on the device, and in which state.

    The bar shows the file from its begin to its end.
    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    size, extents = device_map(device, file) if device else mounted_map(file)
    if as_json:
        result: dict[str, Any] = {
            "file": file,
            "size": size,
            "extents": [asdict(extent) for extent in extents],
        }
        print_json(result)
    else:
        _table(size, extents)
