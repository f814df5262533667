"""Where the benchmarks print."""

from __future__ import annotations

import sys

from rich.console import Console

COLUMNS = 160
"""Of a file or a pipe: rich takes 80, and then shows the columns of a wide table empty."""


def wide_console() -> Console:
    """A console as wide as its terminal, or as the widest table where there is none."""
    return Console(width=None if sys.stdout.isatty() else COLUMNS)
