"""map: where a file's bytes are."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from dataclasses import asdict, dataclass
from typing import Any

import click

from extfs.cli.output import CommandError, print_json, size_text

BLOCK_SIZE = 4096

# native/extfs_ioctl.h
_HEAD = struct.Struct("=IIQQQQI20x")
_EXTENT = struct.Struct("=QQQII")
_EXTENTS = 500
_SIZE = _HEAD.size + _EXTENTS * _EXTENT.size
EXTFS_IOC_MAP = 3 << 30 | _SIZE << 16 | ord("X") << 8 | 0xE1
_END = (1 << 64) - 1
_SHARED, _LAYOUT = 1, 2
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
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    extents: list[MapExtent] = []
    size = start = 0
    try:
        while start != _END:
            buffer = bytearray(_SIZE)
            _HEAD.pack_into(buffer, 0, _SIZE, 0, start, _END, 0, 0, 0)
            try:
                fcntl.ioctl(descriptor, EXTFS_IOC_MAP, buffer, True)
            except OSError as error:
                if error.errno == errno.ENOTTY:
                    raise CommandError(f"{path}: not a regular file on extfs") from error
                raise CommandError(f"{path}: {error.strerror}") from error
            _size, _flags, _start, _length, start, size, count = _HEAD.unpack_from(buffer)
            for index in range(count):
                offset, physical, length, state, flags = _EXTENT.unpack_from(
                    buffer, _HEAD.size + index * _EXTENT.size
                )
                extents.append(
                    MapExtent(
                        offset,
                        physical,
                        length,
                        _STATES.get(state, str(state)),
                        bool(flags & _SHARED),
                        bool(flags & _LAYOUT),
                    )
                )
    finally:
        os.close(descriptor)
    return size, extents


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
    if rows:
        columns = zip(titles, *rows, strict=True)
        *widths, _last = [max(map(len, column)) for column in columns]
        for row in (titles, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
            click.echo("  ".join([*cells, row[-1]]))
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
