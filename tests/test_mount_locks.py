"""Locks on the mount: POSIX and flock, across processes, waiting, interrupted, given up."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mounted

pytestmark = pytest.mark.fuse

PROMPT_SECONDS = 5
"""Far more than an answer takes, far less than a request that is never answered."""


class Peer:
    """Another process that works on one file, told line by line what to do."""

    SCRIPT = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGALRM, lambda number, frame: None)
signal.siginterrupt(signal.SIGALRM, True)
for line in sys.stdin:
    try:
        result = eval(line)
    except OSError as error:
        result = f"errno {error.errno}"
    print(result, flush=True)
"""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")

    def result(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, expression: str) -> str:
        self.start(expression)
        return self.result()

    def is_waiting(self, seconds: float = 0.3) -> bool:
        """Whether it has nothing to say for that long."""
        import select

        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PROMPT_SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def peer(mounted: Mounted) -> Iterator[Callable[[], Peer]]:
    path = mounted.mountpoint / "file"
    path.write_bytes(b"x" * 100)
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(path))
        return peers[-1]

    yield make
    for each in peers:
        each.end()


EXCLUSIVE = "fcntl.lockf(fd, fcntl.LOCK_EX, {length}, {start})"
TRY = "fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, {length}, {start})"
SHARED_TRY = "fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, {length}, {start})"
UNLOCK = "fcntl.lockf(fd, fcntl.LOCK_UN, {length}, {start})"


def test_posix_locks_of_ranges_exclude_each_other(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=10, length=10)) == "None"
    assert two.run(TRY.format(start=19, length=5)) == f"errno {errno.EAGAIN}"
    assert two.run(TRY.format(start=20, length=5)) == "None"
    assert one.run(UNLOCK.format(start=12, length=3)) == "None"  # splits
    assert two.run(TRY.format(start=12, length=3)) == "None"
    assert two.run(TRY.format(start=10, length=1)) == f"errno {errno.EAGAIN}"
    assert two.run(SHARED_TRY.format(start=10, length=1)) == f"errno {errno.EAGAIN}"


def test_getlk_names_the_holder(mounted: Mounted, peer: Callable[[], Peer]) -> None:
    import struct

    one = peer()
    assert one.run(TRY.format(start=10, length=10)) == "None"
    with open(mounted.mountpoint / "file", "r+b") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        told = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    kind, _, start, length, pid = struct.unpack("hhqqi4x", told)
    assert (kind, start, length, pid) == (fcntl.F_WRLCK, 10, 10, one.process.pid)


def test_a_waiting_lock_is_granted_when_the_holder_lets_go(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    two.start(EXCLUSIVE.format(start=5, length=1))
    assert two.is_waiting()
    assert one.run(UNLOCK.format(start=0, length=0)) == "None"
    assert two.result() == "None"


def test_a_lock_goes_with_its_process(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    two.start(EXCLUSIVE.format(start=0, length=0))
    assert two.is_waiting()
    one.process.kill()
    assert two.result() == "None"


def test_closing_any_descriptor_drops_posix_locks(
    mounted: Mounted, peer: Callable[[], Peer]
) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    path = mounted.mountpoint / "file"
    assert one.run(f"os.close(os.open({str(path)!r}, os.O_RDONLY))") == "None"
    assert two.run(TRY.format(start=0, length=0)) == "None"


def test_kill_9_ends_a_process_that_waits_for_a_lock(peer: Callable[[], Peer]) -> None:
    one, two, three = peer(), peer(), peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    two.start(EXCLUSIVE.format(start=0, length=0))
    three.start("fcntl.flock(fd, fcntl.LOCK_EX)")
    assert three.result() == "None"  # the two kinds do not see each other
    assert two.is_waiting()
    two.process.kill()
    two.process.wait(PROMPT_SECONDS)
    # Its request left the queue: the next in line gets the lock.
    assert one.run(UNLOCK.format(start=0, length=0)) == "None"
    assert three.run(TRY.format(start=0, length=0)) == "None"


def test_a_signal_interrupts_a_waiting_lock(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run("fcntl.flock(fd, fcntl.LOCK_EX)") == "None"
    # Python itself would start the call again; ctypes does not.
    two.start(
        "(lambda libc: (libc.flock(fd, 2), __import__('ctypes').get_errno()))"
        "(__import__('ctypes').CDLL(None, use_errno=True))"
    )
    assert two.is_waiting()
    two.process.send_signal(signal.SIGALRM)
    assert two.result() == f"(-1, {errno.EINTR})"


def test_flock_excludes_other_open_files(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run("fcntl.flock(fd, fcntl.LOCK_SH)") == "None"
    assert two.run("fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)") == "None"
    assert two.run("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)") == f"errno {errno.EAGAIN}"
    assert one.run("os.close(fd)") == "None"
    assert two.run("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)") == "None"


def test_a_deadlock_is_found(peer: Callable[[], Peer]) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=0, length=1)) == "None"
    assert two.run(TRY.format(start=1, length=1)) == "None"
    one.start(EXCLUSIVE.format(start=1, length=1))
    assert one.is_waiting()
    assert two.run(EXCLUSIVE.format(start=0, length=1)) == f"errno {errno.EDEADLK}"
    assert two.run(UNLOCK.format(start=1, length=1)) == "None"
    assert one.result() == "None"


def test_waiting_locks_occupy_no_thread(mounted: Mounted, peer: Callable[[], Peer]) -> None:
    """More waiters than the bridge has threads: everybody else is served all the same."""
    one = peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    waiters = [peer() for _ in range(8)]
    for waiter in waiters:
        waiter.start(EXCLUSIVE.format(start=0, length=0))
    assert all(waiter.is_waiting(0.1) for waiter in waiters)
    begin = time.monotonic()
    for number in range(200):
        path = mounted.mountpoint / f"other-{number}"
        path.write_bytes(b"other")
        assert path.read_bytes() == b"other"
    assert time.monotonic() - begin < PROMPT_SECONDS


def test_an_abort_ends_waiting_locks_and_the_daemon(
    mounted: Mounted, peer: Callable[[], Peer], log_watch: object
) -> None:
    one, two = peer(), peer()
    assert one.run(TRY.format(start=0, length=0)) == "None"
    two.start(EXCLUSIVE.format(start=0, length=0))
    assert two.is_waiting()
    mounted.daemon.send_signal(signal.SIGTERM)  # detaches: the file is open
    time.sleep(0.3)
    assert mounted.daemon.poll() is None
    mounted.daemon.send_signal(signal.SIGTERM)  # aborts
    assert two.result().startswith("errno")
    assert mounted.daemon.wait(PROMPT_SECONDS) == 0
