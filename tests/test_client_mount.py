"""The Python client, plain and for trio, and the daemon's fences, on a real mount."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rundir
import trio
from conftest import ExtfsRunner, Mounted

from extfs.cli.status import read_status
from extfs.control.client import (
    Descriptor,
    EventType,
    FileHandle,
    Iomode,
    LayoutState,
    MapState,
)
from extfs.control.waiting import TrioDescriptor
from extfs.core import Device, Filesystem, HolderState
from extfs.layout import Host

pytestmark = pytest.mark.fuse
MIB = 1 << 20


@pytest.fixture
def remount(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> Callable[[str], Mounted]:
    """remount(options): mount the formatted device, again and again."""
    extfs("mkfs", loop_device)
    return lambda options: mount_extfs(loop_device, options)


def create(directory: Path, size: int = 0, name: str = "file") -> Path:
    path = directory / name
    with open(path, "wb") as file:
        file.write(b"a" * size)
        os.fsync(file)
    return path


def write_device(device: Path, offset: int, content: bytes) -> None:
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwrite(descriptor, memory, offset) == len(content)
    finally:
        os.close(descriptor)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lost(mounted: Mounted) -> int:
    return int(read_status(str(mounted.mountpoint))[1]["holders"]["lost"])


# ---- the plain client --------------------------------------------------------------------------


def test_the_control_file_names_any_file(mounted: Mounted) -> None:
    path = create(mounted.mountpoint)
    with Descriptor.of(path) as descriptor:
        file = descriptor.handle()
    assert file.ino == path.stat().st_ino
    with Descriptor.control(mounted.mountpoint) as control:
        info = control.info()
        assert (info.block_size, info.device) == (4096, str(mounted.device))
        assert (info.recall_ms, info.quarantined) == (10_000, 0)
        assert len(info.uuid) == 16
        holder = control.register("writer")
        assert holder.recall_ms == 10_000
        got = holder.get(Iomode.RW, 100, 5000, file=file)
        assert (got.offset, got.next, got.file_size) == (0, 8192, 0)
        assert got.writable() == got.extents
        assert got.extents[0].state is LayoutState.INVALID_DATA
        write_device(mounted.device, got.extents[0].physical, b"x" * 8192)
        assert holder.commit([(0, 8192)], file_size=8192, seq=got.seq, file=file) == 8192
        assert path.read_bytes() == b"x" * 8192
        (extent,) = control.whole_map(file=file).extents
        assert (extent.offset, extent.physical) == (0, got.extents[0].physical)
        assert extent.state is MapState.WRITTEN
        assert [grant.seq for grant in control.grants(file=file)] == [got.seq]
        with pytest.raises(OSError) as error:
            holder.gone()
        assert error.value.errno == errno.EBUSY
        holder.give_all_back()
        holder.gone()
        with pytest.raises(OSError) as error:
            control.map(file=FileHandle(file.ino, file.generation + 1))
        assert error.value.errno == errno.ESTALE


def test_a_commit_of_more_ranges_than_an_ioctl_carries(mounted: Mounted) -> None:
    path = create(mounted.mountpoint)
    with Descriptor.of(path) as descriptor:
        file = descriptor.handle()
    count = 3000
    with Descriptor.control(mounted.mountpoint) as control:
        holder = control.register()
        (got,) = holder.get_all(Iomode.RW, 0, 2 * count * 4096, file=file)
        (extent,) = got.extents
        write_device(mounted.device, extent.physical, b"y" * extent.length)
        ranges = [(index * 8192, 4096) for index in range(count)]
        assert holder.commit(ranges, file_size=2 * count * 4096, file=file) == 0
        holder.give_all_back()
        holder.gone()
    content = path.read_bytes()
    assert content == (b"y" * 4096 + bytes(4096)) * count, "what was not committed reads as zeros"


def test_map_changes(mounted: Mounted) -> None:
    first = create(mounted.mountpoint, 8192)
    second = create(mounted.mountpoint, 8192, "second")
    with open(second, "r+b") as writer:
        writer.write(b"b" * 8192)
    with Descriptor.of(first, write=True) as one, Descriptor.of(second, write=True) as two:
        os.fsync(two.fileno())
        one.exchange(0, two.handle(), 4096, 4096)
        assert first.read_bytes() == b"b" * 4096 + b"a" * 4096
        assert second.read_bytes() == b"b" * 4096 + b"a" * 4096
        assert one.clone(8192, two.handle(), 0, 4096) == 4096
        assert any(extent.shared for extent in one.whole_map().extents)
        assert one.dedupe(4096, two.handle(), 4096, 4096) == 4096
        one.collapse(0, 4096)
        assert first.read_bytes() == b"a" * 4096 + b"b" * 4096
        one.insert(0, 4096)
        assert first.read_bytes() == bytes(4096) + b"a" * 4096 + b"b" * 4096


# ---- trio --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["own descriptor", "control file"])
async def test_a_recall_inside_one_process(mounted: Mounted, own: bool) -> None:
    """One holder waits for the other in the same process: neither blocks the interpreter."""
    path = create(mounted.mountpoint, MIB)

    def opened() -> Descriptor:
        return Descriptor.of(path, write=True) if own else Descriptor.control(mounted.mountpoint)

    with Descriptor.of(path) as plain:
        file = plain.handle()
    with opened() as first, opened() as second:
        owner = await TrioDescriptor(first).register("owner")
        waiter = await TrioDescriptor(second).register("waiter")
        await owner.get(Iomode.RW, 0, MIB, file=file)

        async def answer() -> None:
            (event,) = await TrioDescriptor(first).wait_events()
            assert (event.type, event.file) == (EventType.RECALL, file)
            assert (event.offset, event.length) == (65536, 4096)
            await owner.give_back(event.offset, event.length, file=file)

        with trio.fail_after(5):  # less than the recall time
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                got = await waiter.get(Iomode.RW, 65536, 4096, wait=True, file=file)
        assert got.next == 65536 + 4096
        for holder in (owner, waiter):
            await holder.give_all_back()
            await holder.gone()


async def test_a_waiting_get_is_cancelled(mounted: Mounted) -> None:
    """Its thread goes on; what it is granted then belongs to the holder, and can be returned."""
    path = create(mounted.mountpoint, MIB)
    with Descriptor.of(path, write=True) as first, Descriptor.of(path, write=True) as second:
        owner = await TrioDescriptor(first).register()
        waiter = await TrioDescriptor(second).register()
        await owner.get(Iomode.RW, 0, MIB)
        with trio.move_on_after(0.2) as scope:
            await waiter.get(Iomode.RW, 0, 4096, wait=True)
        assert scope.cancelled_caught
        await owner.give_all_back()

        def holders() -> list[int]:
            return [grant.holder for grant in first.grants()]

        await trio.to_thread.run_sync(until, lambda: holders() == [waiter.id])
        await waiter.give_back()
        assert holders() == []
        for holder in (owner, waiter):
            await holder.gone()


# ---- the daemon's fences -----------------------------------------------------------------------


@pytest.fixture
def holding() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """holding(file, fence=""): another process that has a RW layout of a file, until killed."""
    running = []

    def start(path: Path, fence: str = "") -> subprocess.Popen[str]:
        code = (
            "import sys, time\n"
            "from extfs.control.client import *\n"
            f"descriptor = Descriptor.of({str(path)!r}, write=True)\n"
            f"holder = descriptor.register('other', fence={fence!r})\n"
            f"holder.get(Iomode.RW, 0, {MIB})\n"
            "print(holder.id, flush=True)\n"
            "time.sleep(600)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in running:
        killed(process)


def killed(process: subprocess.Popen[Any]) -> None:
    process.kill()
    if process.stdout and not process.stdout.closed:
        process.communicate()


def test_the_record_of_a_holder_names_process_boot_and_host(
    remount: Callable[[str], Mounted], holding: Callable[..., subprocess.Popen[str]]
) -> None:
    mounted = remount("")
    path = create(mounted.mountpoint)
    process = holding(path, "cgroup:/some/where")
    mounted.kill()
    killed(process)
    mounted.force_off()
    with Filesystem.open(Device.open(str(mounted.device))) as fs:
        (holder,) = fs.layouts.holders()
        assert holder.state is HolderState.LOST
        spec = holder.spec
        assert (spec.name, spec.fence) == ("other", "cgroup:/some/where")
        assert (spec.pid, spec.boot_id) == (process.pid, Host().boot_id())
        assert spec.pid_start > 0
        assert spec.fence_key == Host().key()
        fs.layouts.fenced(holder.id)
        fs.layouts.settle()


def fencing_program(directory: Path, seen: Path) -> Path:
    path = directory / "fence"
    path.write_text(f"#!/bin/sh\nenv | grep ^EXTFS_ | sort > {seen}.new\nmv {seen}.new {seen}\n")
    path.chmod(0o755)
    return path


def test_a_command_fences(
    remount: Callable[[str], Mounted], holding: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    mounted = remount(f"recall=1,fence=command:{fencing_program(tmp_path, seen)}")
    process = holding(create(mounted.mountpoint))
    killed(process)
    until(lambda: seen.exists() and not lost(mounted))
    told = dict(line.split("=", 1) for line in seen.read_text().splitlines())
    assert told["EXTFS_PID"] == str(process.pid)
    assert told["EXTFS_DEVICE"] == str(mounted.device)
    assert told["EXTFS_MOUNTPOINT"] == str(mounted.mountpoint)
    assert told["EXTFS_UUID"] == str(uuid.UUID(read_status(str(mounted.mountpoint))[1]["uuid"]))
    assert ": confirmed, " in mounted.log.read_text()


def test_after_a_restart_a_holder_has_its_time_to_come_back(
    remount: Callable[[str], Mounted], holding: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    program = fencing_program(tmp_path, seen)
    mounted = remount(f"fence=command:{program}")
    path = create(mounted.mountpoint)
    with Descriptor.of(path, write=True) as descriptor:
        holder = descriptor.register("patient")
        holder.get(Iomode.RW, 0, MIB)
        other = holding(create(mounted.mountpoint, 0, "other"))
        mounted.kill()
    killed(other)
    mounted.force_off()
    begin = time.monotonic()
    mounted = remount(f"recall=2,fence=command:{program}")
    assert lost(mounted) == 2
    with Descriptor.of(mounted.mountpoint / path.name, write=True) as descriptor:
        again = descriptor.resume(holder.id, holder.key)
        assert [grant.holder for grant in descriptor.grants()] == [holder.id]
        until(lambda: not lost(mounted))
        assert time.monotonic() - begin > 1.9
        assert "EXTFS_NAME=other" in seen.read_text()
        again.commit([], file_size=0)
        again.give_all_back()
        again.gone()


def test_nobody_is_fenced_without_a_confirmation(
    remount: Callable[[str], Mounted], holding: Callable[..., subprocess.Popen[str]]
) -> None:
    mounted = remount("recall=1")
    path = create(mounted.mountpoint, MIB)
    process = holding(path)
    killed(process)
    until(lambda: lost(mounted))
    with open(path, "r+b", buffering=0) as writer:
        assert writer.write(b"b" * 4096) == 4096
        os.fsync(writer)
    time.sleep(1.5)
    status = read_status(str(mounted.mountpoint))[1]
    assert status["space"]["quarantined"] > 0
    assert [fence["attempts"] for fence in status["fences"]["waiting"]] == [1]
    with Descriptor.control(mounted.mountpoint) as control:
        (number,) = [holder["id"] for holder in status["holders"]["list"]]
        control.fenced(number)
        until(lambda: not control.info().quarantined)
    assert path.read_bytes()[:8192] == b"b" * 4096 + b"a" * 4096
