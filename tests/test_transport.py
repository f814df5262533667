"""How requests come from the kernel: the choice of the transport, and what the ring must survive.

What a mount does is the business of the other tests, which run on both (--transport).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rundir
import transport_stress
from conftest import ENABLE_URING, ExtfsRunner, Mounted, extfs_command, why_no_ring

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(180)]

no_ring = why_no_ring()
needs_ring = pytest.mark.skipif(no_ring is not None, reason=str(no_ring))

WAITERS = 240


@contextmanager
def switched(value: str) -> Iterator[None]:
    """The kernel's switch; afterwards as it was. It counts for mounts that begin meanwhile."""
    before = ENABLE_URING.read_text()
    ENABLE_URING.write_text(value)
    try:
        yield
    finally:
        ENABLE_URING.write_text(before)


@pytest.fixture
def on() -> Iterator[None]:
    with switched("Y"):
        yield


def bridge_of(mountpoint: Path) -> dict[str, Any]:
    """What the status says of the bridge."""
    found: dict[str, Any] = json.loads((mountpoint / ".extfs/status").read_bytes())["bridge"]
    return found


@needs_ring
def test_requests_come_over_the_ring_and_the_status_says_so(
    on: None,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=uring")
    for number in range(50):
        (mounted.mountpoint / str(number)).write_bytes(b"x" * 5000)
    bridge = bridge_of(mounted.mountpoint)
    assert bridge["transport"] == "uring"
    assert bridge["transport_why"] == ""
    assert bridge["by_ring"] > 0.9 * bridge["requests"] > 100
    assert "FUSE over io_uring\n" in extfs("status", mounted.mountpoint).stdout


@needs_ring
def test_large_answers_at_once_are_whole(
    on: None,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    """More of them than entries that keep a large payload; memory is given back meanwhile."""
    size = 24 << 20  # one call, 24 READ requests at a time
    extfs("mkfs", loop_device)
    path = mount_extfs(loop_device, "transport=uring").mountpoint / "large"
    with mmap.mmap(-1, size) as written, mmap.mmap(-1, size) as found:
        written[:] = random.Random(1).randbytes(size)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwritev(fd, [written], 0) == size
            for turn in range(8):
                assert os.preadv(fd, [found], 0) == size
                same = found[:] == written[:]
                assert same, f"turn {turn}"
        finally:
            os.close(fd)


def test_classic_is_classic(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=classic")
    bridge = bridge_of(mounted.mountpoint)
    assert bridge["transport"] == "classic"
    assert bridge["by_ring"] == 0
    assert "not asked for" in extfs("status", mounted.mountpoint).stdout


@needs_ring
def test_switched_off_in_the_kernel(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """auto goes the other way and says why; uring refuses, and nothing is mounted."""
    extfs("mkfs", loop_device)
    with switched("N"):
        refused = extfs("mount", loop_device, "/mnt", "-o", "transport=uring", check=False)
        mounted = mount_extfs(loop_device, "transport=auto")
    assert refused.returncode == 1
    assert "transport=uring: switched off in the kernel; echo Y >" in refused.stderr
    bridge = bridge_of(mounted.mountpoint)
    assert bridge["transport"] == "classic"
    assert str(ENABLE_URING) in bridge["transport_why"]
    said = extfs("status", mounted.mountpoint).stdout
    assert "/dev/fuse; FUSE over io_uring: switched off in the kernel" in said


@needs_ring
def test_switched_off_while_it_is_in_use(
    on: None,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=uring")
    with switched("N"):
        (mounted.mountpoint / "file").write_bytes(b"still served")
        assert (mounted.mountpoint / "file").read_bytes() == b"still served"
        assert bridge_of(mounted.mountpoint)["transport"] == "uring"


def deny_io_uring() -> None:
    """From now on this process has no io_uring_setup(2): EPERM, as in containers."""
    load, jump_equal, give = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0), (jump_equal, 0, 1, 425), (give, 0, 0, 0x00050000 | errno.EPERM)]
    steps.append((give, 0, 0, 0x7FFF0000))
    packed = b"".join(
        code.to_bytes(2, sys.byteorder) + bytes((true, false)) + value.to_bytes(4, sys.byteorder)
        for code, true, false, value in steps
    )
    text = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(steps), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())


@needs_ring
def test_a_kernel_without_io_uring(
    on: None,
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
) -> None:
    image, mountpoint = make_image(), run_directory.new_mountpoint()
    extfs("mkfs", image)
    words = extfs_command("mount", image, mountpoint, "-o", "transport=auto")
    subprocess.run(words, preexec_fn=deny_io_uring, check=True, timeout=30)
    try:
        (mountpoint / "file").write_bytes(b"by poll(2)")
        bridge = bridge_of(mountpoint)
        assert bridge["transport"] == "classic"
        assert "Operation not permitted" in bridge["transport_why"]
    finally:
        extfs("umount", mountpoint)


# In a mount namespace of its own, where there seem to be six CPUs.
MORE_CPUS = """
set -e
echo 0-5 >{directory}/possible
mount --bind {directory}/possible /sys/devices/system/cpu/possible
{mount}
cat {mountpoint}/.extfs/status
echo data >{mountpoint}/file
cat {mountpoint}/file >&2
{umount}
"""


@needs_ring
@pytest.mark.skipif((os.cpu_count() or 1) > 5, reason="there are more CPUs than the test claims")
def test_a_refused_registration_leaves_the_mount_classic(
    on: None,
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
) -> None:
    """The kernel refuses a queue that it does not have, after it has taken others."""
    image, mountpoint = make_image(), run_directory.new_mountpoint()
    extfs("mkfs", image)
    script = MORE_CPUS.format(
        directory=run_directory.path,
        mountpoint=mountpoint,
        mount=" ".join(extfs_command("mount", image, mountpoint, "-o", "transport=auto")),
        umount=" ".join(extfs_command("umount", mountpoint)),
    )
    result = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        env=run_directory.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    bridge = json.loads(result.stdout)["bridge"]
    assert bridge["transport"] == "classic"
    assert "refused the ring" in bridge["transport_why"]
    assert bridge["by_ring"] == 0
    assert "data" in result.stderr


@needs_ring
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_a_daemon_that_may_not_run_everywhere(
    on: None,
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
) -> None:
    """Its threads stay where they may be, and serve the queues of all CPUs."""
    image, mountpoint = make_image(), run_directory.new_mountpoint()
    extfs("mkfs", image)
    cpus = sorted(os.sched_getaffinity(0))
    words = extfs_command("mount", image, mountpoint, "-o", "transport=uring")
    subprocess.run(["taskset", "-c", str(cpus[0]), *words], check=True, timeout=30)
    try:
        for cpu in cpus:
            line = ["taskset", "-c", str(cpu), "dd", "if=/dev/zero", f"of={mountpoint}/{cpu}"]
            subprocess.run([*line, "bs=64k", "count=50"], check=True, timeout=30)
        assert bridge_of(mountpoint)["transport"] == "uring"
    finally:
        extfs("umount", mountpoint)


# All on one CPU, and before anybody else may run there: more requests than there are entries, those
# that wait first, and last of all the one that they wait for.
BURST = """
import fcntl, os, sys, time
path, count = sys.argv[1], int(sys.argv[2])
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
held = os.open(path, os.O_RDWR | os.O_CREAT)
fcntl.lockf(held, fcntl.LOCK_EX)
reader, writer = os.pipe()
waiters = []
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
for _ in range(count):
    waiters.append(os.fork())
    if waiters[-1] == 0:
        file = os.open(path, os.O_RDWR)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
        os.read(reader, 1)
        fcntl.lockf(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_UN)
        os._exit(0)
time.sleep(0.5)
os.write(writer, b"x" * count)
fcntl.lockf(held, fcntl.LOCK_UN)
for waiter in waiters:
    assert os.waitpid(waiter, 0)[1] == 0
"""


@needs_ring
def test_waiters_do_not_keep_the_unlock_from_coming(
    on: None,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=uring")
    subprocess.run(
        [sys.executable, "-c", BURST, mounted.mountpoint / "lock", str(WAITERS)],
        check=True,
        timeout=40,
    )
    bridge = bridge_of(mounted.mountpoint)
    assert bridge["parked"] >= WAITERS


# The same with a layout: writers wait for its recall, and its holder gives it back last.
HOLDER = """
import fcntl, os, sys, time
sys.path.insert(0, sys.argv[1])
from control_calls import *
mountpoint, device, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
path = mountpoint + "/file"
control = os.open(mountpoint + "/.extfs/control", os.O_RDWR)
handle = handle_of(os.open(path, os.O_RDWR | os.O_CREAT))
holder = Holder(control, os.open(device, os.O_RDWR | os.O_DIRECT))
holder.get(handle, 0, 64 * BLOCK)
reader, writer = os.pipe()
waiters = []
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
for number in range(count):
    waiters.append(os.fork())
    if waiters[-1] == 0:
        file = os.open(path, os.O_RDWR | (os.O_DIRECT if number % 2 else 0))
        page = mmap.mmap(-1, BLOCK)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
        os.read(reader, 1)
        os.preadv(file, [page], number % 64 * BLOCK) if number % 3 else os.pwritev(
            file, [page], number % 64 * BLOCK)
        os._exit(0)
time.sleep(0.5)
os.write(writer, b"x" * count)
began = time.monotonic()
holder.give_back(handle)
for waiter in waiters:
    assert os.waitpid(waiter, 0)[1] == 0
print(time.monotonic() - began)
"""


@needs_ring
def test_requests_that_wait_for_a_layout_do_not_keep_its_return_from_coming(
    on: None,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=uring,recall=60")
    (mounted.mountpoint / "file").write_bytes(b"x" * (64 * 4096))
    result = subprocess.run(
        [
            *(sys.executable, "-c", HOLDER, Path(__file__).parent),
            *(mounted.mountpoint, loop_device, str(WAITERS)),
        ],
        check=True,
        timeout=50,
        capture_output=True,
        text=True,
    )
    assert float(result.stdout) < 30, "the recall ran into its time limit"


@needs_ring
@pytest.mark.parametrize("when", [0, 0.05])
def test_a_signal_ends_the_wait_for_a_lock_whenever_it_comes(
    on: None,
    when: float,
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    """Also one that comes while the kernel hands the request over, of which it does not tell."""
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "transport=uring")
    path = mounted.mountpoint / "lock"
    script = """
import fcntl, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
file = os.open(sys.argv[1], os.O_RDWR)
print(flush=True)
fcntl.lockf(file, fcntl.LOCK_EX)
"""
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        for _ in range(20):
            waiter = subprocess.Popen(
                [sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True
            )
            assert waiter.stdout is not None
            waiter.stdout.readline()
            time.sleep(when)
            waiter.send_signal(signal.SIGUSR1)
            assert waiter.wait(20) == 7
            waiter.stdout.close()


@needs_ring
def test_mounts_end_in_every_way_over_both_transports(
    on: None,
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
) -> None:
    """Twelve rounds; scripts/soak transports runs a hundred."""
    image = make_image()
    extfs("mkfs", image)
    transport_stress.stress(run_directory, image, 12, 0)
