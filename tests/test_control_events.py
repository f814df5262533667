"""Events of holders: read(2) of the control file, EVENTS, EVENT_SOCKET, and what poll(2) says."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from struct import pack
from typing import Any

import pytest
import rundir
from conftest import Mounted
from control_calls import (
    BLOCK,
    EVENT_MAP_CHANGED,
    EVENT_OVERFLOW,
    EVENT_SOCKET,
    EVENTS,
    WATCH,
    Event,
    EventsCall,
    EventSocketCall,
    Holder,
    WatchCall,
    as_user,
    call,
    event_socket,
    handle_of,
    refusal,
    register,
    take_events,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

USER = 12345
EVENT_RING = 1024
"""Events that are kept for a reader, native/layout.h."""


# ---- events: read(2) ---------------------------------------------------------------------------


class Changes:
    """Events on demand: a watched file whose map changes."""

    def __init__(self, control: int, file: int) -> None:
        self.holder = Holder(control)
        self.file = file
        self.handle = handle_of(file)
        self.at = 1 << 20

    def happen(self, times: int = 1) -> None:
        for _ in range(times):
            self.holder.watch(self.handle)
            self.at += 2 * BLOCK
            os.pwrite(self.file, b"x", self.at)


@pytest.fixture
def changes(control: int, file: int) -> Changes:
    return Changes(control, file)


def test_read_returns_whole_events_in_order(control: int, changes: Changes) -> None:
    changes.happen(5)
    size = ctypes.sizeof(Event)
    assert refusal(lambda: os.read(control, size - 1)) == "EINVAL"
    first = os.read(control, 2 * size + size // 2)
    assert len(first) == 2 * size
    events = [Event.from_buffer_copy(first, at) for at in (0, size)] + take_events(control)
    assert [event.type for event in events] == [EVENT_MAP_CHANGED] * 5
    assert [event.seq - events[0].seq for event in events] == list(range(5))
    for event in events:
        assert (event.size, event.holder) == (size, changes.holder.id)
        assert (event.file.ino, event.file.generation) == (
            changes.handle.ino,
            changes.handle.generation,
        )


def test_read_does_not_wait_when_asked_not_to(root: Path, changes: Changes, control: int) -> None:
    os.set_blocking(control, False)
    assert refusal(lambda: os.read(control, 1000)) == "EAGAIN"
    changes.happen()
    assert len(take_events(control)) == 1
    assert refusal(lambda: os.read(control, 1000)) == "EAGAIN"
    without_holder = os.open(root / ".extfs/control", os.O_RDONLY | os.O_NONBLOCK)
    assert refusal(lambda: os.read(without_holder, 1000)) == "EAGAIN"
    os.close(without_holder)


def test_a_blocked_read_returns_with_the_event(control: int, changes: Changes) -> None:
    got: list[Any] = []
    readers = [threading.Thread(target=lambda: got.extend(take_events(control, 1)))]
    readers += [threading.Thread(target=lambda: got.extend(take_events(control, 1)))]
    for reader in readers:
        reader.start()
    time.sleep(0.1)
    assert not got
    changes.happen()
    changes.happen()
    for reader in readers:
        reader.join(10)
    assert len(got) == 2
    assert all(not reader.is_alive() for reader in readers)


class InterruptedTestError(Exception):
    pass


def test_a_signal_ends_a_blocked_read(control: int, changes: Changes) -> None:
    def handler(*_: object) -> None:
        raise InterruptedTestError

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(InterruptedTestError):
            os.read(control, 1000)
    finally:
        signal.signal(signal.SIGALRM, old)
    changes.happen()
    assert len(take_events(control)) == 1  # nothing was taken by the read that was interrupted


BLOCKED = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("reading", flush=True)
os.read(fd, 1000)
"""


def test_a_blocked_reader_can_be_killed(root: Path, file: int) -> None:
    for _ in range(3):
        reader = subprocess.Popen(
            [sys.executable, "-c", BLOCKED, root / ".extfs/control"], stdout=subprocess.PIPE
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        time.sleep(0.05)
        reader.kill()
        assert reader.wait(5) == -signal.SIGKILL
        reader.stdout.close()
    os.pwrite(file, b"still served", 0)


def test_a_dying_mount_lets_readers_go(mounted: Mounted) -> None:
    reader = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, mounted.mountpoint / ".extfs/control"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"reading\n"
    time.sleep(0.05)
    (found,) = rundir.mounts_below(mounted.mountpoint)
    rundir.abort_fuse(found.device_minor)
    assert reader.wait(10) == 1
    reader.stdout.close()
    assert mounted.daemon.wait(30) is not None


def test_an_overflow_says_how_many_were_lost(control: int, changes: Changes) -> None:
    os.set_blocking(control, False)
    changes.happen(EVENT_RING + 100)
    events: list[Any] = []
    while refusal(lambda: events.extend(take_events(control, 50))) is None:
        pass
    assert EVENT_RING // 2 < len(events) <= EVENT_RING + 1
    overflows = [event for event in events if event.type == EVENT_OVERFLOW]
    assert overflows
    told = sum(event.type == EVENT_MAP_CHANGED for event in events)
    assert told + sum(event.length for event in overflows) == EVENT_RING + 100
    numbers = [event.seq for event in events]
    assert numbers == sorted(numbers)
    changes.happen()
    assert [event.type for event in take_events(control)] == [EVENT_MAP_CHANGED]


# ---- what poll(2) says of files ----------------------------------------------------------------

FUSE_READ, FUSE_POLL = 15, 40


def ready(fd: int, events: int = select.POLLIN, milliseconds: int = 0) -> int:
    """What poll(2) says."""
    poller = select.poll()
    poller.register(fd, events)
    return dict(poller.poll(milliseconds)).get(fd, 0)


def requests(root: Path, opcode: int) -> int:
    """How many of them the mount has had."""
    status = json.loads((root / ".extfs/status").read_bytes())
    return int(status["bridge"]["by_opcode"].get(str(opcode), 0))


def test_the_kernel_asks_nobody_whether_files_are_ready(
    root: Path, file: int, control: int
) -> None:
    """Else it would ask before every io_uring read and write."""
    everything = select.POLLIN | select.POLLOUT | select.POLLPRI
    status = os.open(root / ".extfs/status", os.O_RDONLY)
    assert requests(root, FUSE_POLL) == 0
    for _ in range(100):
        for fd in (control, status, file):
            assert ready(fd, everything) == select.POLLIN | select.POLLOUT
        os.pread(file, BLOCK, 0)
    os.close(status)
    assert requests(root, FUSE_POLL) == 1


def test_io_uring_reads_are_one_request_each(root: Path, file: int) -> None:
    """fio's, which do not go through the page cache."""
    os.pwrite(file, bytes(1 << 20), 0)
    job = ["--name=job", "--ioengine=io_uring", "--rw=randread", "--bs=4k", "--direct=1"]
    job += ["--iodepth=8", "--number_ios=256", "--size=1m", f"--filename={root / 'file'}"]
    subprocess.run(["fio", *job], check=True, capture_output=True)
    assert requests(root, FUSE_READ) >= 256
    assert requests(root, FUSE_POLL) <= 1


# ---- events: EVENTS, EVENT_SOCKET --------------------------------------------------------------

SEQPACKET = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
CLONE_FILES = 0x400
SOCKETS_PER_UID = 256
"""native/bridge_socket.c."""


def give(fd: int, end: socket.socket | int) -> None:
    number = end if isinstance(end, int) else end.fileno()
    call(fd, EVENT_SOCKET, EventSocketCall(fd=number))


def words(end: socket.socket) -> int:
    """How many datagrams there are; they are taken."""
    for number in range(100):
        try:
            assert end.recv(100) == bytes(1)
        except BlockingIOError:
            return number
    raise AssertionError("no end of datagrams")


def ended(end: socket.socket) -> bool:
    return ready(end.fileno()) & select.POLLHUP != 0 and end.recv(100) == b""


def later(function: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(0.1, function)
    timer.start()
    return timer


def sockets(mounted: Mounted) -> int:
    """Of the daemon's descriptors."""
    count = 0
    for one in Path(f"/proc/{mounted.daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(one).startswith("socket:")
    return count


def stuff(end: socket.socket) -> None:
    """As much into it as it takes."""
    with suppress(BlockingIOError):
        while True:
            end.send(bytes(1000))


def settled(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_socket_wakes_who_polls_it(control: int, changes: Changes) -> None:
    with event_socket(control) as end:
        assert ready(end.fileno()) == 0
        assert ready(end.fileno(), milliseconds=50) == 0
        for _ in range(3):
            timer = later(changes.happen)
            assert ready(end.fileno(), milliseconds=5000) == select.POLLIN
            timer.join()
            assert words(end) == 1
            assert len(take_events(control)) == 1
        assert ready(end.fileno()) == 0


@pytest.mark.parametrize("edge", [0, select.EPOLLET], ids=["level", "edge"])
def test_epoll_wakes_with_every_first_event(control: int, changes: Changes, edge: int) -> None:
    os.set_blocking(control, False)
    with event_socket(control) as end, select.epoll() as epoll:
        epoll.register(end.fileno(), select.EPOLLIN | edge)
        assert epoll.poll(0.05) == []
        for _ in range(5):
            timer = later(changes.happen)
            assert epoll.poll(5) == [(end.fileno(), select.EPOLLIN)]
            timer.join()
            assert words(end) == 1
            assert len(take_events(control)) == 1
            assert epoll.poll(0) == []


def test_two_who_poll_are_both_woken(control: int, changes: Changes) -> None:
    woken: list[int] = []
    with event_socket(control) as end:

        def wait() -> None:
            woken.append(ready(end.fileno(), milliseconds=5000))

        pollers = [threading.Thread(target=wait) for _ in range(2)]
        for poller in pollers:
            poller.start()
        time.sleep(0.1)
        changes.happen()
        for poller in pollers:
            poller.join(10)
    assert woken == [select.POLLIN] * 2


def test_no_second_datagram_before_all_events_were_taken(control: int, changes: Changes) -> None:
    os.set_blocking(control, False)
    with event_socket(control) as end:
        changes.happen(5)
        assert words(end) == 1
        changes.happen(5)
        assert len(take_events(control, 4)) == 4
        changes.happen()
        assert words(end) == 0
        assert len(take_events(control)) == 7
        changes.happen()
        assert words(end) == 1
        assert call(control, EVENTS, EventsCall()).count == 1
        changes.happen()
        assert words(end) == 1


def test_events_that_wait_are_told_at_once(control: int, changes: Changes) -> None:
    changes.happen(3)
    with event_socket(control) as end:
        assert words(end) == 1
        changes.happen()
        assert words(end) == 0
        with event_socket(control) as another:
            assert words(another) == 1
            assert ended(end)


def test_a_socket_is_replaced_and_taken_away(
    mounted: Mounted, control: int, changes: Changes
) -> None:
    os.set_blocking(control, False)
    before = sockets(mounted)
    with event_socket(control) as first, event_socket(control) as second:
        assert sockets(mounted) == before + 1
        changes.happen()
        assert ended(first)
        assert words(second) == 1
        take_events(control)
        give(control, -1)
        assert sockets(mounted) == before
        changes.happen()
        assert ended(second)
        take_events(control)
        give(control, -1)


def test_a_socket_ends_with_the_open_file(mounted: Mounted) -> None:
    before = sockets(mounted)
    fd = os.open(mounted.mountpoint / ".extfs/control", os.O_RDWR)
    other = os.dup(fd)
    with event_socket(fd) as end:
        os.close(fd)
        assert ready(end.fileno(), milliseconds=100) == 0
        os.close(other)
        assert ready(end.fileno(), milliseconds=5000) == select.POLLIN | select.POLLHUP
        assert end.recv(100) == b""
    assert sockets(mounted) == before


def test_a_socket_ends_with_a_dying_mount(mounted: Mounted) -> None:
    control = os.open(mounted.mountpoint / ".extfs/control", os.O_RDWR)
    with event_socket(control) as end:
        (found,) = rundir.mounts_below(mounted.mountpoint)
        rundir.abort_fuse(found.device_minor)
        assert ready(end.fileno(), milliseconds=20000) == select.POLLIN | select.POLLHUP
    with suppress(OSError):
        os.close(control)
    assert mounted.daemon.wait(30) is not None


def test_nobody_at_the_other_end(mounted: Mounted, control: int, changes: Changes) -> None:
    os.set_blocking(control, False)
    before = sockets(mounted)
    event_socket(control).close()
    assert sockets(mounted) == before + 1
    changes.happen()
    assert sockets(mounted) == before
    assert len(take_events(control)) == 1
    with event_socket(control) as end:
        changes.happen()
        assert words(end) == 1


def test_a_full_socket_keeps_nobody_waiting(control: int, changes: Changes) -> None:
    os.set_blocking(control, False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        stuff(theirs)
        give(control, theirs)
        began = time.monotonic()
        for _ in range(3):
            changes.happen()
            assert len(take_events(control)) == 1
        assert time.monotonic() - began < 5
        while refusal(lambda: ours.recv(1000)) is None:
            pass
        changes.happen()
        assert words(ours) == 1


def test_a_files_own_descriptor_has_a_socket_too(root: Path, file: int) -> None:
    holder = register(file)

    def change(offset: int) -> None:
        call(file, WATCH, WatchCall(holder=holder.id, key=holder.key))
        os.pwrite(file, b"x", offset)

    with event_socket(file) as end:
        for offset in (1 << 20, 2 << 20):
            timer = later(partial(change, offset))
            assert ready(end.fileno(), milliseconds=5000) == select.POLLIN
            timer.join()
            assert words(end) == 1
            answer = call(file, EVENTS, EventsCall())
            assert [event.type for event in answer.events[: answer.count]] == [EVENT_MAP_CHANGED]
            assert call(file, EVENTS, EventsCall()).count == 0
    directory = os.open(root, os.O_RDONLY)
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
    with ours, theirs:
        assert refusal(lambda: give(directory, theirs)) == "EISDIR"
        assert refusal(lambda: give(directory, -1)) == "EISDIR"
    os.close(directory)


def test_any_thread_of_any_user_gives_a_socket(root: Path, file: int) -> None:
    """By the number that it has for the caller, not for the daemon or for another process."""
    holder = register(file)
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)

    def in_a_thread() -> str | None:
        outcome: list[str | None] = []

        def run() -> None:
            high = os.dup2(theirs.fileno(), 900)
            outcome.append(refusal(lambda: give(file, high)))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
        return outcome[0]

    with ours, theirs:
        assert as_user(USER, in_a_thread) is None
        call(file, WATCH, WatchCall(holder=holder.id, key=holder.key))
        os.pwrite(file, b"x", 1 << 20)
        assert ready(ours.fileno(), milliseconds=5000) == select.POLLIN
        assert words(ours) == 1


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="no PIDFD_THREAD"
)
def test_a_thread_with_descriptors_of_its_own(control: int, changes: Changes) -> None:
    outcome: list[str | None] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)

    def run() -> None:
        assert not ctypes.CDLL(None).unshare(CLONE_FILES)
        outcome.append(refusal(lambda: give(control, os.dup2(theirs.fileno(), 901))))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    theirs.close()
    with ours:
        assert outcome == [None]
        assert refusal(lambda: give(control, 901)) == "EBADF"  # not in this thread's
        changes.happen()
        assert words(ours) == 1


def test_a_user_has_so_many(mounted: Mounted, file: int) -> None:
    path = mounted.mountpoint / "file"
    before = sockets(mounted)

    def fill() -> str | None:
        held = []
        for _ in range(SOCKETS_PER_UID):
            held.append(os.open(path, os.O_RDONLY))
            event_socket(held[-1]).close()
        held.append(os.open(path, os.O_RDONLY))
        refused_with = refusal(lambda: event_socket(held[-1]))
        give(held[0], -1)
        event_socket(held[-1]).close()
        return refused_with

    assert as_user(USER, fill) == "EAGAIN"
    settled(lambda: sockets(mounted) == before)
    assert as_user(USER, fill) == "EAGAIN"


def test_what_is_no_such_socket(
    mounted: Mounted, root: Path, file: int, control: int, changes: Changes
) -> None:
    """And the one that was given before stays."""
    os.set_blocking(control, False)
    with ExitStack() as stack:
        enter = stack.enter_context
        end = enter(event_socket(control))
        before = sockets(mounted)
        numbers = [*os.pipe(), os.dup(file), os.dup(control)]
        numbers += [os.open(path, os.O_RDONLY) for path in (root / ".extfs/status", "/dev/null")]
        for number in numbers:
            stack.callback(os.close, number)
        stream = [enter(one) for one in socket.socketpair(socket.AF_UNIX)]
        datagram = [enter(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
        listening = enter(socket.socket(socket.AF_UNIX, SEQPACKET))
        listening.bind(b"\0" + os.urandom(8).hex().encode())
        listening.listen()
        tcp = enter(socket.create_server(("localhost", 0)))
        connected = enter(socket.create_connection(tcp.getsockname()))
        cases: list[tuple[socket.socket | int, str]] = [
            *((number, "ENOTSOCK") for number in numbers),
            (stream[0], "EINVAL"),
            (datagram[0], "EINVAL"),
            (tcp, "EINVAL"),
            (connected, "EINVAL"),
            (listening, "ENOTCONN"),
            (enter(socket.socket(socket.AF_UNIX, SEQPACKET)), "ENOTCONN"),
        ]
        for wrong, expected in cases:
            assert refusal(partial(give, control, wrong)) == expected, wrong
        unused = os.dup(file)
        os.close(unused)
        for number in (unused, 1 << 20, (1 << 31) - 1, -2, -(1 << 31)):
            assert refusal(partial(give, control, number)) == "EBADF", number
        # What was no such socket is closed by the daemon, and the mount goes on.
        os.pwrite(file, b"x", 0)
        settled(lambda: sockets(mounted) == before)
        changes.happen()
        assert words(end) == 1


def test_a_socket_does_not_keep_the_file_open_that_keeps_it(mounted: Mounted) -> None:
    """An open file in a message to the socket that the open file has."""
    before = sockets(mounted)
    for message in (b"x", b""):
        ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        with ours, theirs:
            fd = os.open(mounted.mountpoint / ".extfs/control", os.O_RDWR)
            ours.send(b"")
            socket.send_fds(ours, [message], [fd])
            give(fd, theirs)
            assert refusal(lambda end=ours: end.send(b"more")) == "EPIPE"  # type: ignore[misc]
            theirs.close()
            assert not ready(ours.fileno(), milliseconds=50)
            os.close(fd)
            assert ready(ours.fileno(), milliseconds=10000) & select.POLLHUP
    settled(lambda: sockets(mounted) == before)


def test_a_descriptor_whose_closing_takes_long_holds_nobody_else_up(
    root: Path, control: int, file: int, changes: Changes
) -> None:
    """A TCP connection that lingers, and whose peer does not read."""
    os.set_blocking(control, False)
    with ExitStack() as stack, socket.create_server(("localhost", 0)) as server:
        callers, peers = [], []
        for _ in range(8):
            stuffed = socket.create_connection(server.getsockname())
            peers.append(stack.enter_context(server.accept()[0]))
            stuffed.setblocking(False)
            stuff(stuffed)
            stuffed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 60))
            ours, theirs = socket.socketpair(socket.AF_UNIX, SEQPACKET)
            stack.enter_context(ours)
            stack.enter_context(theirs)
            # In flight in what is given: whoever takes it from there is the last to close it.
            socket.send_fds(ours, [b"x"], [stuffed.fileno()])
            os.close(stuffed.detach())
            fd = os.open(root / "file", os.O_RDONLY)
            stack.callback(os.close, fd)
            callers.append(threading.Thread(target=give, args=(fd, theirs)))
        for caller in callers:
            caller.start()
        time.sleep(0.3)
        assert all(caller.is_alive() for caller in callers)
        began = time.monotonic()
        os.pwrite(file, b"x", 0)
        os.fsync(file)
        with event_socket(control) as end:
            changes.happen()
            assert words(end) == 1
        assert time.monotonic() - began < 10
        for peer in peers:
            peer.close()
        for caller in callers:
            caller.join(20)
            assert not caller.is_alive()


def test_events_arrive_where_the_holder_was_registered(
    root: Path, control: int, changes: Changes
) -> None:
    other = os.open(root / ".extfs/control", os.O_RDONLY | os.O_NONBLOCK)
    changes.happen()
    assert refusal(lambda: os.read(other, 1000)) == "EAGAIN"
    assert call(control, EVENTS, EventsCall()).count == 1
    os.close(other)
