"""The ``extfs`` command.

Exit codes: 0 done; 1 failed, with one line on standard error that begins "extfs: "; 2 wrong usage.
``extfs fsck``: 0 clean, 1 repaired, 4 errors left, 8 could not check, 16 wrong usage.

The program also answers to the names mkfs.extfs, fsck.extfs and mount.extfs, with the arguments
that mkfs(8), fsck(8) and mount(8) pass; ``extfs install-helpers`` links them.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

import click

from extfs import __version__
from extfs.cli import (
    checking,
    clients,
    fencing,
    formatting,
    layouts,
    mapping,
    mounting,
    status,
    system,
)
from extfs.cli.output import CommandError, complain

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="extfs")
def extfs() -> None:
    """A filesystem in user space that owns a raw block device.

    DEVICE is a block device or an image file. Sizes are bytes, or have a unit: 64M, 1G, 16T.
    Exit codes: 0 done, 1 failed, 2 wrong usage; `extfs fsck --help` tells its own.
    """


for _command in (
    formatting.mkfs,
    formatting.show,
    mounting.mount,
    mounting.umount,
    mapping.show_map,
    layouts.layout,
    fencing.fence,
    status.status,
    clients.clients,
    checking.fsck,
    checking.dump,
    system.install_helpers,
):
    extfs.add_command(_command)

# Other names of this program: command and the exit code for wrong usage.
_NAMES: dict[str, tuple[click.Command, int]] = {
    "mkfs.extfs": (system.mkfs_helper, 1),
    "fsck.extfs": (system.fsck_helper, 16),
    "mount.extfs": (system.mount_helper, 1),
}


def _failed(error: Exception, usage_code: int, default: int) -> int:
    """Tell what went wrong in one line; returns the exit code."""
    if isinstance(error, CommandError):
        complain(error.text)
        return error.exit_code if error.exit_code is not None else default
    if isinstance(error, click.UsageError):
        hint = f" (try '{error.ctx.command_path} --help')" if error.ctx else ""
        complain(error.format_message().rstrip(".") + hint)
        return usage_code
    if isinstance(error, click.ClickException):
        complain(error.format_message())
        return default
    if isinstance(error, OSError):
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        complain(f"{name}{error.strerror or error}")
        return default
    complain(f"internal error: {type(error).__name__}: {error}")
    return default


def run(command: click.Command, arguments: Sequence[str], name: str, usage_code: int = 2) -> int:
    """Run a command; returns its exit code. Never raises, never shows a traceback.

    With EXTFS_DEBUG in the environment unexpected exceptions are raised instead.
    """
    is_fsck = name == "fsck.extfs" or (name == "extfs" and arguments[:1] == ["fsck"])
    default = 8 if is_fsck else 1
    usage_code = 16 if is_fsck else usage_code
    try:
        result = command.main(args=list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except click.Abort:
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush complains
        return default
    except Exception as error:
        known = isinstance(error, CommandError | click.ClickException | OSError)
        if os.environ.get("EXTFS_DEBUG") and not known:
            raise
        return _failed(error, usage_code, default)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point, under any of the names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # any name can be printed, in any locale
            stream.reconfigure(errors="backslashreplace")
    name = PurePath(sys.argv[0]).name
    if name in _NAMES:
        command, usage_code = _NAMES[name]
        sys.exit(run(command, sys.argv[1:], name, usage_code))
    sys.exit(run(extfs, sys.argv[1:], "extfs"))
