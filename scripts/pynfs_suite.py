"""The pynfs suite against extfs, started by scripts/pynfs.

The suite calls this file, too, as its helper on the server ("reboot", "unlink", ...): then the
first argument is the state file of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

GROUPS = ("all", "block", "pnfs", "reboot", "courteous")
DEVICE_BYTES = 1 << 30
EXTFS = Path(sys.executable).with_name("extfs")
START_SECONDS = 30.0
# Some tests of the suite (BLOCK3, GETDLIST1, LAYOUTRET1) pack "" where Python 3 wants b"", and end
# in a TypeError before they have asked the server anything.
TOLERANT_XDRLIB = """
import xdrlib

strict = xdrlib.Packer.pack_fstring


def pack_fstring(self, n, s):
    strict(self, n, s.encode() if isinstance(s, str) else s)


xdrlib.Packer.pack_fstring = xdrlib.Packer.pack_fopaque = pack_fstring
"""

# An answer to a callback of a server that has died meanwhile would end the suite's polling thread,
# and with it everything that comes after.
ANSWERS_TO_THE_DEAD = "        self.writelist.add(pipe.fileno())\n"
NO_ANSWER = "        if pipe.fileno() < 0:\n            return\n"


@dataclass
class Served:
    """The filesystem under test."""

    image: str
    mountpoint: str
    log: str
    port: int
    lease: int
    pid: int = 0

    def configuration(self) -> Path:
        """The file for ``extfs mount --config``."""
        path = Path(self.image).with_suffix(".toml")
        path.write_text(
            f'device = "{self.image}"\n'
            f'mountpoint = "{self.mountpoint}"\n'
            'options = "recall=5"\n'
            "[nfs]\n"
            f'listen = ["127.0.0.1:{self.port}"]\n'
            f"lease = {self.lease}\n"
            f"grace = {self.lease}\n"
            "[[nfs.export]]\n"
            'path = "/"\n'
            'options = ["rw", "insecure", "no_root_squash", "layouts=block"]\n'
        )
        return path

    def start(self) -> None:
        """Mount and serve; returns when it answers."""
        with Path(self.log).open("ab") as log:
            daemon = subprocess.Popen(
                [EXTFS, "mount", "--foreground", "--config", self.configuration()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = daemon.pid
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if daemon.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise click.ClickException(f"the server does not start; see {self.log}")

    def kill(self) -> None:
        """As a crash."""
        os.kill(self.pid, signal.SIGKILL)
        for _ in range(200):
            if not Path(f"/proc/{self.pid}").exists() or _zombie(self.pid):
                break
            time.sleep(0.05)
        subprocess.run(["umount", "-l", self.mountpoint], check=False, capture_output=True)

    def save(self, path: Path) -> None:
        """For the helper."""
        path.write_text(json.dumps(asdict(self)))


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _help(state: Path, command: str, *arguments: str) -> None:
    """What the suite asks of whoever runs the server."""
    served = Served(**json.loads(state.read_text()))
    paths = [Path(served.mountpoint) / name.lstrip("/") for name in arguments]
    if command == "reboot":
        served.kill()
        served.start()
        served.save(state)
    elif command == "unlink":
        paths[0].unlink()
    elif command == "rename":
        paths[0].rename(paths[1])
    elif command == "link":
        paths[1].hardlink_to(paths[0])
    elif command == "chmod":
        paths[1].chmod(int(arguments[0], 8))
    else:
        sys.exit(f"unknown command {command}")


def _built(folder: Path, work: Path) -> tuple[Path, Path]:
    """A built copy of the suite, and the Python to run it with."""
    suite = work / "pynfs"
    shutil.copytree(folder, suite, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    if not (suite / "nfs4.1" / "testserver.py").exists():
        raise click.ClickException(f"{folder} does not hold pynfs")
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "ply", "setuptools"], check=True)
    rpc = suite / "rpc" / "rpc.py"
    text = rpc.read_text()
    rpc.write_text(text.replace(ANSWERS_TO_THE_DEAD, NO_ANSWER + ANSWERS_TO_THE_DEAD))
    (site,) = (work / "venv" / "lib").glob("python*/site-packages")
    (site / "tolerant_xdrlib.py").write_text(TOLERANT_XDRLIB)
    (site / "tolerant_xdrlib.pth").write_text("import tolerant_xdrlib\n")
    for part in ("xdr", "rpc", "nfs4.1"):
        subprocess.run(
            [python, "setup.py", "build"], cwd=suite / part, check=True, capture_output=True
        )
    return suite / "nfs4.1", python


def _report(results: list[dict[str, object]]) -> int:
    """A table of what failed, and the counts; returns the exit code. Skipped: not asked for."""
    counts: Counter[str] = Counter()
    table = Table("test", "why", title="failed")
    for case in results:
        failure = case.get("failure")
        counts["failed" if failure else "not asked for" if "skipped" in case else "passed"] += 1
        if isinstance(failure, dict):
            table.add_row(str(case["code"]), " ".join(str(failure["message"]).split())[:160])
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["failed"] or not counts["passed"] else 0


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("tests", nargs=-1)
@click.option("--lease", default=15, show_default=True, help="Lease and grace time, seconds.")
@click.option("--json", "keep", type=click.Path(path_type=Path), help="Keep the suite's results.")
def main(folder: Path, tests: tuple[str, ...], lease: int, keep: Path | None) -> None:
    """Run the suite in FOLDER."""
    work = Path(tempfile.mkdtemp(prefix="extfs-pynfs-"))
    served = Served(
        str(work / "device.img"), str(work / "mnt"), str(work / "server.log"), _free_port(), lease
    )
    state = work / "state.json"
    try:
        suite, python = _built(folder, work)
        Path(served.mountpoint).mkdir()
        with Path(served.image).open("wb") as image:
            image.truncate(DEVICE_BYTES)
        subprocess.run([EXTFS, "mkfs", served.image], check=True, capture_output=True)
        served.start()
        served.save(state)
        helper = work / "helper"
        helper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
        helper.chmod(0o755)
        output = work / "results.json"
        subprocess.run(
            [
                python, "testserver.py", f"127.0.0.1:{served.port}/", "--maketree",
                f"--serverhelper={helper}", f"--serverhelperarg={state}",
                f"--jsonout={output}", "--hidepass", *(tests or GROUPS),
            ],
            cwd=suite,
            check=False,
        )  # fmt: skip
        if not output.exists():
            print(Path(served.log).read_text(), file=sys.stderr)
            sys.exit(2)
        if keep is not None:
            shutil.copy(output, keep)
        sys.exit(_report(json.loads(output.read_text())["testcase"]))
    finally:
        if state.exists():
            Served(**json.loads(state.read_text())).kill()
        shutil.rmtree(work, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1].endswith("state.json"):
        _help(Path(sys.argv[1]), *sys.argv[2:])
    else:
        main()
