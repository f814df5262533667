"""Requests that have to wait, and what the kernel is told when a file changes behind its back."""

from __future__ import annotations

import functools
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from faults import wait_for

pytestmark = pytest.mark.fuse

STORM = """
import os, sys
base = os.path.join(sys.argv[1], sys.argv[2])
os.mkdir(base)
for n in range(600):
    path = f"{base}/{n}"
    with open(path, "wb") as file: file.write(b"x" * 100)
    os.rename(path, path + "r")
    os.symlink(path, path + "s")
    os.setxattr(path + "r", "user.a", b"v" * 100)
    if n % 2: os.unlink(path + "r")
assert len(os.listdir(base)) == 900
"""


def test_a_full_journal_makes_requests_wait_and_not_fail(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """A journal much smaller than the changes between two commits: parked, resumed, all done."""
    extfs("mkfs", loop_device, "--journal-size", "4M")
    mounted = mount_extfs(loop_device, "commit=100")
    workers = [
        subprocess.Popen([sys.executable, "-c", STORM, mounted.mountpoint, str(number)])
        for number in range(6)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * 6
    mounted.daemon.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while not (found := re.search(r"counters: (\{.*\})\n", mounted.log.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    counters = json.loads(found[1])
    assert counters["core"]["waits_for_space"] > 0
    assert counters["bridge"]["parked"] > 0


# Counts its reads in a file that we map.
READER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
count = memoryview(mmap.mmap(os.open(sys.argv[2], os.O_RDWR), 8)).cast("Q")
page = mmap.mmap(-1, 4096)
while True:
    os.preadv(fd, [page], 0)
    count[0] += 1
"""


def test_a_long_seek_keeps_nobody_waiting(mounted: Mounted, tmp_path: Path) -> None:
    """It walks 100,000 extents; whoever reads meanwhile is served."""
    small, counter = mounted.mountpoint / "small", tmp_path / "counter"
    small.write_bytes(b"x" * 4096)
    counter.write_bytes(bytes(8))
    fragmented = os.open(mounted.mountpoint / "fragmented", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fragmented, 100_000 * 8192)
    for number in range(100_000):
        os.posix_fallocate(fragmented, number * 8192, 4096)
    reader = subprocess.Popen([sys.executable, "-c", READER, small, counter])
    try:
        with open(counter, "r+b") as file, mmap.mmap(file.fileno(), 8) as mapped:
            count = functools.partial(int.from_bytes, mapped, sys.byteorder)
            wait_for(lambda: count() > 100, "the first reads")
            served = []
            for _ in range(5):
                before = count()
                with pytest.raises(OSError, match="No such device or address"):
                    os.lseek(fragmented, 0, os.SEEK_DATA)
                served.append(count() - before)
            assert sorted(served)[2] > 20, f"reads during each seek: {served}"
    finally:
        reader.kill()
        reader.wait()
        os.close(fragmented)


# In one process: a mount, a user of it (in a thread), and the core called directly. The user's
# system calls are served by the bridge's own threads, which need no Python.
BEHIND_THE_BACK = """
import os, sys, time
import trio
from extfs.core import Bridge, Device, Filesystem
from extfs.fuse import Session

device, mountpoint = sys.argv[1:]
fs = Filesystem.open(Device.open(device))
unsaid = fs.of_mount  # what the kernel is not told of
bridge = Bridge.start(fs, mountpoint, fsname=device)
STATUS = b"status " * 120000
session = Session(bridge.forward_fd, lambda: STATUS)

def until(condition):
    for _ in range(500):
        if condition(): return
        time.sleep(0.01)
    raise SystemExit("the kernel did not notice")

def user():
    path = os.path.join(mountpoint, "file")
    with open(path, "wb") as file: file.write(b"old " * 2000)
    fd = os.open(path, os.O_RDONLY)
    ino = os.fstat(fd).st_ino
    assert os.pread(fd, 4, 0) == b"old "

    unsaid.write(ino, 0, b"NEW ")
    unsaid.write(ino, 8000, b"longer")
    assert os.pread(fd, 4, 0) == b"old ", "nothing was cached, so nothing is proven"
    assert os.fstat(fd).st_size == 8000
    bridge.notify_inode(ino)
    until(lambda: os.pread(fd, 4, 0) == b"NEW ")
    until(lambda: os.fstat(fd).st_size == 8006)
    assert os.pread(fd, 100, 8000) == b"longer"
    os.close(fd)

    # The kernel appends where it thinks the end is, and must not keep that page there.
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    unsaid.write(ino, 8006, b"behind")
    os.write(fd, b"appended")
    whole = b"NEW " + b"old " * 1999 + b"longerbehindappended"
    until(lambda: os.pread(fd, 9000, 0) == whole)
    assert os.fstat(fd).st_size == len(whole)
    os.close(fd)

    assert not os.path.exists(path + "2")
    unsaid.link(ino, 1, b"file2")
    assert not os.path.exists(path + "2"), "the absence was not cached"
    bridge.notify_entry(1, b"file2")
    until(lambda: os.path.exists(path + "2"))
    assert os.readlink(os.symlink("target", path + "s") or path + "s") == "target"

    with open(os.path.join(mountpoint, ".extfs", "status"), "rb") as file:
        assert file.read() == STATUS

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        try:
            with trio.fail_after(60):
                await trio.to_thread.run_sync(user)
        finally:
            await trio.to_thread.run_sync(bridge.unmount)
            await trio.lowlevel.wait_readable(bridge.event_fd)
            session.stop()

trio.run(main)
session.close()
bridge.stop()
assert fs.stats().lookups == 0
fs.close()
print("proven")
"""


def test_notifications_reach_the_kernel(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> None:
    extfs("mkfs", loop_device)
    result = subprocess.run(
        [sys.executable, "-c", BEHIND_THE_BACK, loop_device, run_directory.new_mountpoint()],
        env=run_directory.environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (result.stdout, result.returncode) == ("proven\n", 0), result.stderr
