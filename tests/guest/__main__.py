"""scripts/guest: the guest for people. See that file for its usage."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from guest import image
from guest.machine import Disk, Guest, GuestError

WWN = 0x5000C500_15EA7001


def _disks(paths: list[Path]) -> list[Disk]:
    return [Disk(path, WWN + index) for index, path in enumerate(paths)]


def _read_commands(guest: Guest, seconds: float) -> int:
    """One command a line from standard input; the last one's exit code."""
    code = 0
    if sys.stdin.isatty():
        print("guest: one shell command a line; Ctrl-D powers off", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            result = guest.run(line, seconds)
            sys.stdout.write(result.output)
            sys.stdout.flush()
            code = result.code
            if code != 0:
                print(f"[exit {code}]", file=sys.stderr)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/guest")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch")
    for name in ("boot", "run"):
        command = commands.add_parser(name)
        command.add_argument("--disk", type=Path, action="append", default=[])
        command.add_argument("--name", default="guest")
        command.add_argument("--memory", type=int, default=512, help="MiB")
        command.add_argument("--seconds", type=float, default=600, help="of a command")
        if name == "run":
            command.add_argument(
                "script", nargs="+", help="shell commands, or - for standard input"
            )
    arguments = parser.parse_args()

    reason = image.why_no_guest()
    if reason is not None:
        print(f"guest: no virtual machines here: {reason}", file=sys.stderr)
        return 3
    try:
        made = image.ensure(lambda text: print(f"guest: {text}", file=sys.stderr))
        if arguments.command == "fetch":
            return 0
        with tempfile.TemporaryDirectory(prefix="extfs-guest-") as directory:
            with Guest(
                made,
                Path(directory),
                name=arguments.name,
                disks=_disks(arguments.disk),
                memory=arguments.memory,
            ) as guest:
                if arguments.command == "boot":
                    return _read_commands(guest, arguments.seconds)
                script = " ".join(arguments.script)
                result = guest.run(sys.stdin.read() if script == "-" else script, arguments.seconds)
                sys.stdout.write(result.output)
                return result.code
    except (image.ImageError, GuestError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
