"""A holder, or the daemon, killed between any two steps of a layout.

After each kill, whoever reads finds what was committed and nothing else, the file can be written,
and the check of the device finds nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from control_calls import (
    BLOCK,
    EVENT_RECALL,
    EVENT_REVOKED,
    LIST,
    MAP,
    TO_THE_END,
    Holder,
    ListCall,
    MapCall,
    call,
    handle_of,
    info,
    refusal,
    take_events,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]

LENGTH = 64 * BLOCK
STEPS = ["register", "get", "write", "commit", "get again", "return"]

# Goes so many steps, says so, and stays.
HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from control_calls import *
LENGTH = 64 * BLOCK
control = os.open(sys.argv[2] + "/.extfs/control", os.O_RDWR)
device = os.open(sys.argv[3], os.O_RDWR | os.O_DIRECT)
handle = handle_of(os.open(sys.argv[2] + "/file", os.O_RDWR))
def steps():
    holder = Holder(control, device); yield
    layout = holder.get(handle, 0, LENGTH); yield
    holder.write(layout, b"h"); yield
    holder.commit(handle, [(0, LENGTH // 2)], LENGTH // 2); yield
    holder.get(handle, LENGTH, LENGTH); yield
    holder.give_back(handle); yield
for number, _ in enumerate(steps()):
    if number == int(sys.argv[4]):
        print("there", flush=True)
        time.sleep(60)
"""


@contextmanager
def holder_at(step: int, mounted: Mounted) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has done the steps up to this one; killed at the end."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            Path(__file__).parent,
            mounted.mountpoint,
            mounted.device,
            str(step),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def expected(step: int) -> bytes:
    return b"h" * (LENGTH // 2) if step >= STEPS.index("commit") else b""


def prove_usable(mounted: Mounted, step: int) -> None:
    """What is read is what was committed, and the whole file can be written, by everybody."""
    path = mounted.mountpoint / "file"
    assert path.read_bytes() == expected(step)
    begin = time.monotonic()
    with open(path, "r+b", buffering=0) as file:
        file.write(b"s" * 2 * LENGTH)
        os.fsync(file.fileno())
    assert time.monotonic() - begin < 10
    assert path.read_bytes() == b"s" * 2 * LENGTH


def prove_clean(mounted: Mounted, extfs: ExtfsRunner) -> None:
    mounted.unmount()
    extfs("fsck", mounted.device)


@pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
def test_a_holder_killed_between_two_steps(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    step: int,
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "recall=1")
    (mounted.mountpoint / "file").touch()
    with holder_at(step, mounted):
        assert (mounted.mountpoint / "file").read_bytes() == expected(step)
    prove_usable(mounted, step)
    prove_clean(mounted, extfs)


@pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
def test_the_daemon_killed_between_two_steps(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    step: int,
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "recall=1")
    (mounted.mountpoint / "file").touch()
    directory = os.open(mounted.mountpoint, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    with holder_at(step, mounted):
        mounted.kill()
    mounted.force_off()
    again = mount_extfs(loop_device, "recall=1")
    prove_usable(again, step)
    prove_clean(again, extfs)


def test_a_commit_after_the_revoke_is_refused_whole(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "recall=0.3")
    path = mounted.mountpoint / "file"
    path.write_bytes(b"o" * 4 * BLOCK)
    control = os.open(mounted.mountpoint / ".extfs/control", os.O_RDWR)
    device = os.open(mounted.device, os.O_RDWR | os.O_DIRECT)
    with open(path, "r+b", buffering=0) as file:
        handle = handle_of(file.fileno())
        holder = Holder(control, device)
        written = holder.get(handle, 0, 4 * BLOCK)
        hole = holder.get(handle, 4 * BLOCK, 4 * BLOCK)
        assert os.pwrite(file.fileno(), b"server!!" * BLOCK, 0) == 8 * BLOCK
        events: list[int] = []
        while EVENT_REVOKED not in events:
            events += [event.type for event in take_events(control)]
        assert events[0] == EVENT_RECALL
        # It goes on writing where it was told once: blocks that are nobody's any more.
        holder.write(written, b"x")
        holder.write(hole, b"x")
        before = call(file.fileno(), MAP, MapCall(length=TO_THE_END)).generation
        for ranges in ([(0, BLOCK)], [(4 * BLOCK, BLOCK)], [(0, BLOCK), (4 * BLOCK, BLOCK)]):
            error = refusal(partial(holder.commit, handle, ranges))
            assert error in ("EOWNERDEAD", "ENXIO")
        assert call(file.fileno(), MAP, MapCall(length=TO_THE_END)).generation == before
        assert call(file.fileno(), LIST, ListCall()).count == 0
        assert path.read_bytes() == b"server!!" * BLOCK
        assert info(control).quarantined == 8 * BLOCK
    os.close(device)
    os.close(control)
    prove_clean(mounted, extfs)
