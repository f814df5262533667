"""Holders that stop answering, on a real mount: nobody waits for ever, no stale byte comes back.

A holder is a process that writes the device at the addresses of its layout, as fast as it can. It
is frozen (SIGSTOP) in the middle of that; a writer through the mount goes on after the recall
deadline, in other blocks; the holder is thawed, and what it still writes is nobody's. Then it is
killed, its cgroup is empty, and the blocks become free.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from faults import MIB, wait_for

from extfs.control.client import Descriptor, FileMap, Iomode
from extfs.layout.cgroups import CgroupError, Host, cgroup_root

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

SIZE = 4 * MIB
BLOCK = 4096
RECALL = "recall=1"

# Takes a RW layout of a file, says what it got, and writes its blocks for ever, whatever happens.
HOLDER = """
import json, mmap, os, sys
from extfs.control.client import Descriptor, Iomode
control, path, device, fence, size = sys.argv[1:6]
descriptor = Descriptor.control(control)
with Descriptor.of(path, write=True) as file:
    handle = file.handle()
holder = descriptor.register("frozen", fence=fence)
extents = []
for answer in holder.get_all(Iomode.RW, 0, int(size), wait=True, file=handle):
    extents += [(e.offset, e.physical, e.length) for e in answer.writable()]
print(json.dumps({"id": holder.id, "key": holder.key, "extents": extents}), flush=True)
fd = os.open(device, os.O_RDWR | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
count, size = 0, int(size) // 4096
while True:
    for offset, physical, length in extents:
        for at in range(0, length, 4096):
            block[:16] = b"STALE%011d" % count
            os.pwrite(fd, block, physical + at)
            count += 1
    if count == size:
        print(count, flush=True)
"""


@pytest.fixture
def cgroup() -> Iterator[tuple[str, Path]]:
    """An own cgroup (v2): its name below the root, its directory."""
    try:
        root = cgroup_root(Host())
        path = root / f"extfs-test-{os.getpid()}"
        path.mkdir()
    except (OSError, CgroupError) as error:
        pytest.skip(f"no cgroup v2 that can be written: {error}")
    yield f"cgroup:/{path.name}", path
    with contextlib.suppress(OSError):
        (path / "cgroup.kill").write_text("1")
    for _ in range(100):
        try:
            path.rmdir()
            break
        except OSError:
            time.sleep(0.05)


class Frozen:
    """A holder process in a cgroup; killed at the end of the block."""

    def __init__(
        self, mountpoint: Path, path: Path, device: object, cgroup: tuple[str, Path]
    ) -> None:
        fence, directory = cgroup

        def enter() -> None:
            (directory / "cgroup.procs").write_text(str(os.getpid()))

        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, mountpoint, path, str(device), fence, str(SIZE)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,
        )
        assert self.process.stdout is not None
        self.pipe = self.process.stdout
        self.said: dict[str, Any] = json.loads(self.pipe.readline())
        self.pipe.readline()  # one round is written

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: self.state() == "T", "the holder is frozen", 10)

    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def writes(self) -> int:
        """How often it has called write(2) so far."""
        said = Path(f"/proc/{self.process.pid}/io").read_text()
        return int(said.partition("syscw: ")[2].split()[0])

    def thaw(self) -> None:
        """Let it go on, and wait until it has written all its blocks once more."""
        self.process.send_signal(signal.SIGCONT)
        goal = self.writes() + SIZE // BLOCK
        wait_for(lambda: self.writes() > goal, "the holder writes", 20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def blocks_of(found: FileMap) -> set[int]:
    return {
        (extent.physical + at) // BLOCK
        for extent in found.extents
        for at in range(0, extent.length, BLOCK)
    }


def told(frozen: Frozen) -> set[int]:
    return {
        (physical + at) // BLOCK
        for _offset, physical, length in frozen.said["extents"]
        for at in range(0, length, BLOCK)
    }


def quarantined(mountpoint: Path) -> int:
    with Descriptor.control(mountpoint) as control:
        return control.info().quarantined


def fill(path: Path, byte: bytes, size: int = SIZE) -> None:
    """Through the mount, past the page cache where that is possible."""
    with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
        for offset in range(0, size, MIB):
            os.pwrite(file.fileno(), byte * min(MIB, size - offset), offset)
        os.fsync(file.fileno())


def read_all(path: Path) -> bytes:
    """What is on the device, not what the kernel remembers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: os.read(descriptor, MIB), b""))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("written_before", [False, True], ids=["new blocks", "written blocks"])
def test_a_frozen_holder_loses_its_blocks(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    cgroup: tuple[str, Path],
    written_before: bool,
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, RECALL)
    path = mounted.mountpoint / "file"
    path.touch()
    if written_before:
        fill(path, b"o")
    with Frozen(mounted.mountpoint, path, loop_device, cgroup) as frozen:
        frozen.stop()
        begin = time.monotonic()
        fill(path, b"n")
        waited = time.monotonic() - begin
        assert 0.5 < waited < 10, f"the writer waited {waited:.1f} s for a recall of 1 s"
        with Descriptor.of(path) as file:
            now = blocks_of(file.whole_map())
        assert not now & told(frozen), "the writer's blocks are within the frozen holder's reach"
        assert quarantined(mounted.mountpoint) == SIZE
        frozen.thaw()
        assert read_all(path) == b"n" * SIZE
        fill(mounted.mountpoint / "successor", b"s", 64 * MIB)
        frozen.thaw()
        assert set(read_all(mounted.mountpoint / "successor")) == {ord("s")}
        assert quarantined(mounted.mountpoint) == SIZE, "released before the fence was confirmed"
        frozen.kill()
        wait_for(lambda: quarantined(mounted.mountpoint) == 0, "the quarantine is empty", 20)
        assert read_all(path) == b"n" * SIZE
        mounted.unmount()
        extfs("fsck", loop_device)


def test_the_daemon_dies_while_the_holder_is_frozen(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    cgroup: tuple[str, Path],
) -> None:
    """A restart forgets no holder."""
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, RECALL)
    path = mounted.mountpoint / "file"
    fill(path, b"o")
    with Frozen(mounted.mountpoint, path, loop_device, cgroup) as frozen:
        frozen.stop()
        mounted.kill()
        mounted.force_off()
        again = mount_extfs(loop_device, RECALL)
        path = again.mountpoint / "file"
        fill(path, b"n")
        with Descriptor.of(path) as file:
            now = blocks_of(file.whole_map())
        assert not now & told(frozen)
        assert quarantined(again.mountpoint) >= SIZE
        frozen.thaw()
        assert read_all(path) == b"n" * SIZE
        frozen.kill()
        wait_for(lambda: quarantined(again.mountpoint) == 0, "the quarantine is empty", 20)
        assert read_all(path) == b"n" * SIZE
        again.unmount()
        extfs("fsck", loop_device)


def test_a_killed_holder_is_fenced_and_its_unwritten_blocks_are_trimmed(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    cgroup: tuple[str, Path],
) -> None:
    """kill -9: past the end of the file nothing stays allocated, inside it zeros are read."""
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, RECALL)
    path = mounted.mountpoint / "file"
    path.touch()
    os.truncate(path, MIB)
    before = os.statvfs(mounted.mountpoint).f_bfree
    with Frozen(mounted.mountpoint, path, loop_device, cgroup) as frozen:
        frozen.kill()

        def nothing_past_the_end() -> bool:
            with Descriptor.of(path) as file:
                extents = file.whole_map().extents
                return all(extent.offset + extent.length <= MIB for extent in extents)

        wait_for(nothing_past_the_end, "the preallocation past the end is trimmed", 20)
        assert read_all(path) == bytes(MIB)
        assert before - os.statvfs(mounted.mountpoint).f_bfree <= MIB // BLOCK + 64
        with Descriptor.of(path, write=True) as file:
            assert list(file.grants()) == []
            holder = file.register("next")
            answer = holder.get(Iomode.RW, 0, MIB)
            assert answer.next == MIB
            holder.give_all_back()
        mounted.unmount()
        extfs("fsck", loop_device)
