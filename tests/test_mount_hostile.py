"""What a kernel, its caches and its signals do to a mount that trusts them too much."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
import rundir
import trio
from conftest import ExtfsRunner, LogWatch, Mounted

from extfs.fuse.operations import STATUS_NODE, Operations

pytestmark = pytest.mark.fuse

MIB = 1 << 20
NOBODY = 65534


def test_pieces_of_a_large_direct_append_keep_their_order(mounted: Mounted) -> None:
    """The kernel sends 8 MiB as parallel WRITE requests; the end moves with each that arrives."""
    size = 8 * MIB
    with mmap.mmap(-1, size) as written, mmap.mmap(-1, size) as found:
        for at in range(0, size, 4096):
            struct.pack_into("<Q", written, at, at)
        for number in range(15):
            path = mounted.mountpoint / f"{number}"
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_DIRECT
            fd = os.open(path, flags)
            try:
                for _ in range(2):
                    assert os.writev(fd, [written]) == size
                for offset in (0, size):
                    assert os.preadv(fd, [found], offset) == size
                    same = found[:] == written[:]  # to compare them in words takes minutes
                    assert same, f"round {number}, write at {offset}"
            finally:
                os.close(fd)
            path.unlink()


# Through libc, since Python repeats calls by itself.
UNDER_SIGNALS = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
failed, ticks = [], 0

def tick(*_):
    global ticks
    ticks += 1

def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        failed.append(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result

signal.signal(signal.SIGALRM, tick)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
deadline = time.monotonic() + 2
while time.monotonic() < deadline:
    fd = call("open", os.fsencode(sys.argv[1]), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    call("write", fd, b"x" * 5000, 5000)
    call("fsync", fd)
    call("close", fd)
signal.setitimer(signal.ITIMER_REAL, 0)
assert ticks > 100
sys.exit(f"{len(failed)} failures: {failed[:5]}" if failed else 0)
"""


def test_signals_do_not_interrupt_files(mounted: Mounted) -> None:
    """Only a wait for a lock may end with EINTR."""
    command = [sys.executable, "-c", UNDER_SIGNALS, str(mounted.mountpoint / "file")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


TAMPER = """
import ctypes, os, subprocess, sys
what, path, source = sys.argv[1:]
fd = os.open(path, os.O_WRONLY)
end = os.lseek(fd, 0, os.SEEK_END)
if what == "write":
    os.pwrite(fd, b"x", end)
elif what == "fallocate":
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    assert libc.fallocate(fd, 1 | 2, end + 4096, 4096) == 0
else:
    assert os.copy_file_range(os.open(source, os.O_RDONLY), fd, 10, 0, end) == 10
os.close(fd)
print(subprocess.run([path, "-u"], check=True, capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.parametrize("what", ["write", "fallocate", "copy_file_range"])
def test_a_changed_program_is_not_run_with_its_old_setuid(mounted: Mounted, what: str) -> None:
    """Nor from the mode that the kernel remembers: nobody asks for attributes in between."""
    program = mounted.mountpoint / "id"
    source = mounted.mountpoint / "source"
    source.write_bytes(b"0123456789")
    shutil.copyfile("/usr/bin/id", program)
    os.chmod(program, 0o4777)
    os.chmod(mounted.mountpoint, 0o755)

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, user=NOBODY, group=NOBODY, check=True, capture_output=True, text=True, cwd="/"
        ).stdout.strip()

    assert run(program, "-u") == "0"
    # Not sys.executable: who is nobody may not be able to reach it.
    assert run("/usr/bin/python3", "-c", TAMPER, what, program, source) == str(NOBODY)
    assert program.stat().st_mode & 0o7777 == 0o777


def open_file_lock(fd: int) -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)


def test_locks_of_an_open_file_go_with_it(mounted: Mounted) -> None:
    """No FLUSH names their owner. A duplicate keeps them."""
    path = mounted.mountpoint / "file"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    second = os.open(path, os.O_RDWR)
    try:
        open_file_lock(first)
        copy = os.dup(first)
        os.close(first)
        with pytest.raises(BlockingIOError):
            open_file_lock(second)
        os.close(copy)
        deadline = time.monotonic() + 5  # RELEASE comes after close(2) has returned
        while True:
            try:
                open_file_lock(second)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the lock outlived its open file"
                time.sleep(0.02)
    finally:
        os.close(second)


def test_closing_one_open_file_leaves_the_locks_of_another(mounted: Mounted) -> None:
    """POSIX locks taken after the close that dropped all, through another open file."""
    path = mounted.mountpoint / "file"
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    second = os.open(path, os.O_RDWR)
    fcntl.lockf(first, fcntl.LOCK_EX)
    os.close(first)
    fcntl.lockf(second, fcntl.LOCK_EX)
    time.sleep(0.2)  # RELEASE comes after close(2) has returned
    script = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    other = subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=False)
    assert b"BlockingIOError" in other.stderr
    os.close(second)


def test_a_copy_that_shares_no_blocks_comes_in_pieces(mounted: Mounted) -> None:
    """One request copied whatever was asked for: uninterruptible, a full disk of zeros at worst."""
    source, target = mounted.mountpoint / "source", mounted.mountpoint / "target"
    with open(source, "wb") as file:
        file.truncate(1 << 60)
    with open(source, "rb") as from_, open(target, "wb") as to:
        assert 0 < os.copy_file_range(from_.fileno(), to.fileno(), 1 << 59, 0, 1) <= 64 * MIB
        assert os.copy_file_range(from_.fileno(), to.fileno(), 1 << 59, 0, 0) == 1 << 59


def test_an_exception_in_python_fails_one_request(log_watch: LogWatch) -> None:
    """pyfuse3 ends its loop, so the mount, on whatever is no FUSEError."""

    def broken() -> bytes:
        raise RuntimeError("a bug")

    log_watch.expect("a request failed")
    operations = Operations(broken)
    node, flags = pyfuse3.InodeT(STATUS_NODE), pyfuse3.FlagT(os.O_RDONLY)
    with pytest.raises(pyfuse3.FUSEError) as error:
        trio.run(operations.open, node, flags, cast(pyfuse3.RequestContext, None))
    assert error.value.errno == errno.EIO


def test_what_the_kernel_has_not_written_back_yet_counts(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """With writeback_cache our file is shorter and emptier than the kernel's."""
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "writeback_cache")
    path = mounted.mountpoint / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"a" * 4096, 4096)
    assert os.lseek(fd, 0, os.SEEK_DATA) <= 4096
    direct = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"b" * 4096
        assert os.writev(direct, [page]) == 4096
    assert os.pread(fd, 3 * 4096, 0) == bytes(4096) + b"a" * 4096 + b"b" * 4096
    os.close(direct)
    os.close(fd)


def test_a_killed_process_ends_while_signals_do_not(mounted: Mounted) -> None:
    """A caller that is being killed is told from one that has a handler to run."""
    script = """
import os, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print("ready", flush=True)
while True:
    os.write(fd, b"x" * 4096)
    os.fsync(fd)
"""
    path = mounted.mountpoint / "file"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    with pytest.raises(OSError) as error:
        os.getxattr(path, "user.none")
    assert error.value.errno == errno.ENODATA
