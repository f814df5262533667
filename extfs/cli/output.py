"""What commands print: sizes, errors, JSON, tables, a progress bar after a second."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _SizeBase = click.ParamType[int]
else:
    _SizeBase = click.ParamType  # generic only from click 8.2 on

_UNITS = "KMGTPE"
PROGRESS_AFTER_SECONDS = 1.0


class CommandError(Exception):
    """A command failed; `text` is for a person, without the leading "extfs: "."""

    def __init__(self, text: str, exit_code: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.exit_code = exit_code


def complain(text: str) -> None:
    """One line on standard error."""
    line = " ".join(text.split())
    click.echo(f"extfs: {line}", err=True)


def print_json(value: Any) -> None:
    """Indented JSON on standard output."""
    click.echo(json.dumps(value, indent=2))


def size_text(size: int) -> str:
    """Bytes for a person: 4.0 KiB, 12 GiB."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS))
    value = size / (1 << 10 * power)
    digits = 0 if value >= 100 or size % (1 << 10 * power) == 0 else 1
    return f"{value:.{digits}f} {_UNITS[power - 1]}iB"


def parse_size(text: str) -> int:
    """Bytes of "4096", "64M", "1.5G", "16TiB"; ValueError."""
    match = re.fullmatch(r"(\d{1,19})(?:\.(\d{1,6}))?\s*([kmgtpe]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    whole, fraction, unit = match.groups()
    shift = 10 * (_UNITS.lower().index(unit) + 1) if unit else 0
    size = int(whole) << shift
    if fraction:
        if not shift:
            raise ValueError(f"{text!r} is not a whole number of bytes")
        size += (int(fraction) << shift) // 10 ** len(fraction)
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is too large")
    return size


class SizeType(_SizeBase):
    """A click parameter: bytes, with or without a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (title, done, of) that draws a bar on standard error when it is a terminal.

    Nothing appears within the first second. `of` 0 or below `done`: a bar without an end.
    """
    if not sys.stderr.isatty():
        yield lambda title, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("", total=None)
    begin = time.monotonic()
    shown = False

    def step(title: str, done: int, of: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begin >= PROGRESS_AFTER_SECONDS:
            shown = True
            bar.start()
        if shown:
            total = of if of >= done else None
            bar.update(task, description=title, completed=done, total=total)

    try:
        yield step
    finally:
        if shown:
            bar.stop()


@contextlib.contextmanager
def waiting(title: str) -> Iterator[None]:
    """The bar without an end, for one long call that tells nothing."""
    import threading

    with progress() as step:
        done = threading.Event()

        def tick() -> None:
            while not done.wait(0.1):
                step(title, 1, 0)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _core_lines() -> list[str]:
    """What the core logged as warning or error since the last call."""
    from extfs import core

    return [text for level, text in core.log_lines() if level >= logging.WARNING]


@contextlib.contextmanager
def core_errors(what: str) -> Iterator[None]:
    """Turn the core's errors into CommandErrors; show its warnings when there was no error.

    `what`, mostly the device, begins the message.
    """
    try:
        yield
    except OSError as error:
        told = "; ".join(_core_lines())
        text = getattr(error, "text", None) or error.strerror or str(error)
        raise CommandError(f"{what}: {told or text}") from error
    for line in _core_lines():
        complain(f"{what}: {line}")


def write_fields(fields: dict[str, str]) -> None:
    """Aligned "name  value" lines."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{name:<{width}}  {value}")


def write_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns to the right, but for the last one; nothing when there are no rows."""
    if not rows:
        return
    columns = zip(titles, *rows, strict=True)
    *widths, _last = [max(map(len, column)) for column in columns]
    for row in (titles, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def write_tree(value: Any, indent: int = 0) -> None:
    """Nested dictionaries and lists as indented text; lists of flat dictionaries as tables."""
    pad = "  " * indent
    for name, item in value.items():
        if isinstance(item, dict):
            click.echo(f"{pad}{name}:")
            write_tree(item, indent + 1)
        elif isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
            click.echo(f"{pad}{name}:")
            _write_rows(item, pad + "  ")
        else:
            click.echo(f"{pad}{name}: {_plain(item)}")


def _plain(item: Any) -> str:
    if isinstance(item, list):
        return " ".join(map(_plain, item)) or "none"
    return str(item).replace("\n", "\\n")


def _write_rows(rows: list[dict[str, Any]], pad: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_plain(row.get(name, "")) for name in names] for row in rows]
    widths = [
        max(len(name), *(len(row[index]) for row in cells)) for index, name in enumerate(names)
    ]
    for row in [names, *cells]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(pad + line.rstrip())
