"""A process that mounts and is a file server's side, too: what it changes, local users have to see.

`MountedCore` evaluates expressions there; `fs` is the `Filesystem`, `f(path)` an inode's number.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import rundir

SERVER = """
import enum, json, os, stat, sys
import trio
from extfs.core import (Bridge, CoreError, DelegationConflict, Device, EventType, Filesystem,
    HolderKind, HolderSpec, Iomode, Transport)
from extfs.fuse import Session

device, mountpoint, recall_ms, more = sys.argv[1:]
fs = Filesystem.open(Device.open(device), recall_ms=int(recall_ms), early_bytes=16 << 20)
FILE = stat.S_IFREG | 0o644

def f(path):
    return fs.resolve(path.encode()).ino

exec(more)
transport = Transport[os.environ.get("EXTFS_TEST_TRANSPORT", "auto").upper()]
bridge = Bridge.start(fs, mountpoint, fsname=device, transport=transport)
session = Session(bridge.forward_fd, lambda: b"{}")

def serve():
    print("mounted", flush=True)
    for line in sys.stdin:
        try:
            answer = {"is": eval(line)}
        except CoreError as error:
            answer = {"errno": error.errno}
        print(json.dumps(answer, default=lambda value: None), flush=True)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        try:
            await trio.to_thread.run_sync(serve)
        finally:
            await trio.to_thread.run_sync(lambda: bridge.unmount(lazy=True))
            await trio.lowlevel.wait_readable(bridge.event_fd)
            session.stop()

trio.run(main)
session.close()
bridge.stop()
fs.close()
"""


class RefusedError(Exception):
    """A call of the server failed with this errno."""


class MountedCore:
    """The process that mounts; calling it evaluates an expression there."""

    def __init__(self, process: subprocess.Popen[str], mountpoint: Path) -> None:
        self.process = process
        self.mountpoint = mountpoint

    def __call__(self, expression: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "errno" in answer:
            raise RefusedError(answer["errno"])
        return answer["is"]


Kind = TypeVar("Kind", bound=MountedCore)


@contextmanager
def mounted_as(
    kind: type[Kind],
    device: rundir.LoopDevice,
    run_directory: rundir.RunDirectory,
    *,
    recall_ms: int = 60_000,
    more: str = "",
) -> Iterator[Kind]:
    """Mount `device`, which has been formatted; everything is gone at the end.

    `more` is run in the process before it mounts.
    """
    mountpoint = run_directory.new_mountpoint()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, device, mountpoint, str(recall_ms), more],
        env=run_directory.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mounted\n"
        yield kind(process, mountpoint)
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        for mount in rundir.mounts_below(mountpoint):
            rundir.abort_fuse(mount.device_minor)
            subprocess.run(["umount", "-l", "--", str(mount.mountpoint)], check=False, timeout=30)


def mounted_core(
    device: rundir.LoopDevice, run_directory: rundir.RunDirectory
) -> AbstractContextManager[MountedCore]:
    """The same, with nothing more."""
    return mounted_as(MountedCore, device, run_directory)
