"""The control file of a mount: its names, calls about the filesystem, holders and their events."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from control_calls import (
    ALL,
    BLOCK,
    CLIENT,
    EVENT_MAP_CHANGED,
    EVENT_OVERFLOW,
    EVENTS,
    EXCHANGE,
    FENCED,
    HANDLE,
    HOLDER_GONE,
    HOLDER_REGISTER,
    MAP,
    RECALL,
    RESUME,
    RETURN,
    SHUTDOWN,
    WATCH,
    Event,
    EventsCall,
    HandleCall,
    Holder,
    HolderCall,
    MapCall,
    PairCall,
    RecallCall,
    ReturnCall,
    WatchCall,
    as_user,
    call,
    handle_of,
    info,
    refusal,
    refused,
    register,
    take_events,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

NATIVE = Path(__file__).resolve().parent.parent / "native"
USER = 12345
EVENT_RING = 1024
"""Events that are kept for a reader, native/layout.h."""


@pytest.fixture
def root(mounted: Mounted) -> Path:
    return mounted.mountpoint


def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    yield fd
    os.close(fd)


@pytest.fixture
def control(root: Path) -> Iterator[int]:
    yield from opened(root / ".extfs/control", os.O_RDWR)


@pytest.fixture
def file(root: Path) -> Iterator[int]:
    """A file of four blocks, open for writing."""
    (root / "file").write_bytes(b"content!" * (BLOCK // 2))
    yield from opened(root / "file", os.O_RDWR)


# ---- the header --------------------------------------------------------------------------------

EVERYTHING = """
#include "extfs_ioctl.h"
int use(struct extfs_ioc_layout *layout, struct extfs_ioc_commit *commit);
int use(struct extfs_ioc_layout *layout, struct extfs_ioc_commit *commit)
{
	unsigned long commands[] = {EXTFS_IOC_LAYOUT_GET(8), EXTFS_IOC_LAYOUT_COMMIT(8)};

	return (int)(layout->extents[0].state + commit->ranges[0].length + commands[0]);
}
"""


@pytest.mark.parametrize(
    "compiler",
    [
        ["gcc", "-std=c11", "-xc"],
        ["gcc", "-std=c99", "-xc"],
        ["g++", "-std=c++17", "-xc++"],
        ["g++", "-std=c++11", "-xc++"],
    ],
    ids=" ".join,
)
def test_the_header_alone_compiles_pedantically(compiler: list[str]) -> None:
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{NATIVE}", "-fsyntax-only", "-"]
    result = subprocess.run(
        [*compiler, *flags], input=EVERYTHING, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ---- names -------------------------------------------------------------------------------------


def test_the_control_directory_is_there_but_not_listed(root: Path) -> None:
    (root / "file").touch()
    assert os.listdir(root) == ["file"]
    assert sorted(os.listdir(root / ".extfs")) == ["control", "status"]
    with os.scandir(root / ".extfs") as entries:
        numbers = {entry.name: entry.inode() for entry in entries}
    modes = {".extfs": stat.S_IFDIR | 0o755, "control": stat.S_IFREG | 0o600}
    modes["status"] = stat.S_IFREG | 0o444
    for name, mode in modes.items():
        found = os.stat(root / ".extfs" / (name if name != ".extfs" else ""))
        assert (found.st_mode, found.st_uid, found.st_gid) == (mode, 0, 0)
        assert found.st_ino >= 1 << 62
        assert name == ".extfs" or numbers[name] == found.st_ino
    assert (root / ".extfs/..").stat().st_ino == root.stat().st_ino
    assert not (root / ".extfs/other").exists()


def test_nobody_takes_the_name_or_changes_what_it_names(root: Path) -> None:
    ours, mine = root / ".extfs", root / "mine"
    mine.mkdir()
    (root / "file").touch()
    assert refusal(ours.mkdir) == "EEXIST"
    assert refusal(lambda: os.symlink("x", ours)) == "EEXIST"
    assert refusal(lambda: os.link(root / "file", ours)) == "EEXIST"
    assert refusal(lambda: os.mknod(ours)) == "EEXIST"
    assert refusal(lambda: os.open(ours, os.O_CREAT | os.O_WRONLY)) == "EISDIR"
    assert refusal(ours.rmdir) == "EPERM"
    assert refusal(ours.unlink) in ("EISDIR", "EPERM")
    assert refusal(lambda: ours.rename(root / "other")) == "EPERM"
    assert refusal(lambda: ours.rename(mine / "other")) == "EPERM"
    assert refusal(lambda: mine.rename(ours)) == "EPERM"
    assert refusal(lambda: (root / "file").rename(ours / "file")) == "EPERM"
    assert refusal((ours / "directory").mkdir) == "EPERM"
    assert refusal((ours / "file").touch) == "EPERM"
    for name in ("control", "status"):
        inode = ours / name
        assert refusal(inode.unlink) == "EPERM"
        assert refusal(partial(inode.rename, root / "other")) == "EPERM"
        assert refusal(partial(os.link, inode, root / "other")) == "EPERM"
        assert refusal(partial(inode.chmod, 0o666)) == "EPERM"
        assert refusal(partial(os.truncate, inode, 0)) == "EPERM"
        assert refusal(partial(os.utime, inode)) == "EPERM"
        assert refusal(partial(os.setxattr, inode, "user.x", b"")) == "EPERM"
        assert os.listxattr(inode) == []
    assert sorted(os.listdir(root)) == ["file", "mine"]
    # Anywhere else it is a name like others.
    (mine / ".extfs").mkdir()
    (mine / ".extfs").rename(mine / "x")
    assert os.listdir(mine) == ["x"]


def test_what_files_do_the_control_file_does_not(root: Path, control: int, file: int) -> None:
    assert refusal(lambda: os.lseek(control, 0, os.SEEK_SET)) == "ESPIPE"
    assert refusal(lambda: os.fsync(control)) == "EINVAL"
    assert refusal(lambda: os.posix_fallocate(control, 0, BLOCK)) is not None
    assert refusal(lambda: os.copy_file_range(file, control, BLOCK, 0, 0)) is not None
    assert refusal(lambda: os.copy_file_range(control, file, BLOCK, 0, 0)) is not None
    # None of these answers made the kernel give up the call for other files.
    os.fsync(file)
    os.posix_fallocate(file, 0, BLOCK)
    assert os.copy_file_range(file, file, BLOCK, 0, 2 * BLOCK) == BLOCK


def test_only_root_opens_the_control_file(root: Path) -> None:
    path = root / ".extfs/control"
    assert as_user(USER, lambda: refusal(lambda: os.open(path, os.O_RDONLY))) == "EACCES"
    assert as_user(USER, lambda: str(sorted(os.listdir(root / ".extfs")))) == str(
        ["control", "status"]
    )


# ---- the filesystem and its files --------------------------------------------------------------


def test_info_is_the_same_on_every_descriptor(mounted: Mounted, control: int, file: int) -> None:
    answers = [info(fd) for fd in (control, file)]
    for answer in answers:
        space = os.statvfs(mounted.mountpoint)
        assert (answer.block_size, answer.version) == (BLOCK, 1)
        assert answer.device.decode() == str(mounted.device)
        assert answer.free == space.f_bavail * space.f_frsize
        assert answer.device_size == 1 << 30
        assert (answer.quarantined, answer.recall_ms) == (0, 10000)
    assert bytes(answers[0].uuid) == bytes(answers[1].uuid) != bytes(16)


def test_a_handle_names_one_file_for_ever(root: Path, control: int, file: int) -> None:
    handle = handle_of(file)
    assert handle.ino == os.fstat(file).st_ino
    directory = os.open(root, os.O_RDONLY)
    assert handle_of(directory).ino == 1
    assert refused(directory, MAP, MapCall(length=BLOCK)) == "ENOTTY"
    os.close(directory)
    assert refused(control, HANDLE, HandleCall()) == "EPERM"
    first = call(control, MAP, MapCall(file=handle, length=1 << 20))
    again = call(file, MAP, MapCall(length=1 << 20))
    assert call(file, MAP, MapCall(file=handle, length=1 << 20)).count == first.count
    assert (first.count, first.file_size) == (again.count, 4 * BLOCK)
    assert [first.extents[0].physical, first.generation] == [
        again.extents[0].physical,
        again.generation,
    ]
    os.unlink(root / "file")
    assert call(control, MAP, MapCall(file=handle, length=BLOCK)).count == 1
    other = root / "other"
    other.touch()
    with open(other, "rb") as another:
        assert refused(another.fileno(), MAP, MapCall(file=handle, length=BLOCK)) == "ESTALE"


def test_the_generation_of_a_map_changes_with_it(file: int) -> None:
    def generation() -> int:
        return int(call(file, MAP, MapCall(length=1 << 20)).generation)

    before = generation()
    os.pread(file, 10, 0)
    os.pwrite(file, b"in place", 0)
    os.fsync(file)
    assert generation() == before
    os.pwrite(file, b"x", 1 << 20)
    assert generation() != before


def test_a_handle_is_stale_once_its_file_is_gone(root: Path, control: int, file: int) -> None:
    path = root / "gone"
    path.write_bytes(b"x")
    with open(path, "rb") as opened_file:
        handle = handle_of(opened_file.fileno())
    path.unlink()
    deadline = time.monotonic() + 10
    while (error := refused(control, MAP, MapCall(file=handle, length=1))) != "ESTALE":
        assert error is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_others_files_by_handle_are_for_root(root: Path, file: int, control: int) -> None:
    handle = handle_of(file)
    # The descriptor was opened by root; it is the caller who counts.
    assert as_user(USER, lambda: refused(control, MAP, MapCall(file=handle, length=1))) == "EACCES"
    assert as_user(USER, lambda: refused(control, SHUTDOWN, HandleCall())) == "EPERM"
    assert as_user(USER, lambda: refused(control, FENCED, HolderCall())) == "EPERM"
    assert refused(file, SHUTDOWN, HandleCall()) == "EPERM"
    assert refused(file, FENCED, HolderCall()) == "EPERM"


@pytest.mark.expect_log("shutdown asked for by process")
def test_shutdown_stops_every_change(mounted: Mounted, mount_extfs: Callable[..., Mounted]) -> None:
    root = mounted.mountpoint
    (root / "file").write_bytes(b"before")
    with open(root / "file", "r+b", buffering=0) as file:
        os.fsync(file)
        control = os.open(root / ".extfs/control", os.O_RDONLY)
        call(control, SHUTDOWN, HandleCall())
        os.close(control)
        assert refusal((root / "new").touch) == "EROFS"
        assert refusal(lambda: os.pwrite(file.fileno(), b"x", 1 << 20)) == "EROFS"
        assert file.read() == b"before"
    mounted.force_off()
    again = mount_extfs(mounted.device).mountpoint
    assert os.listdir(again) == ["file"]
    assert (again / "file").read_bytes() == b"before"


def test_the_status_is_one_json_document_for_everybody(root: Path, control: int) -> None:
    """Read in any pieces, and with nine hundred holders in it."""
    for number in range(900):
        register(control, name=f"holder {number}".encode() + b"." * 40, fence=b"cgroup:/g")

    def names(content: bytes) -> set[str]:
        document = json.loads(content)
        return set(re.findall(r"holder \d+", json.dumps(document)))

    whole = (root / ".extfs/status").read_bytes()
    with open(root / ".extfs/status", "rb", buffering=0) as status:
        pieces = b"".join(iter(partial(status.read, 1000), b""))
    assert names(whole) == names(pieces)
    assert names(whole)
    path = root / ".extfs/status"
    assert as_user(USER, lambda: str(json.loads(path.read_bytes())["version"])) == str(
        json.loads(whole)["version"]
    )
    assert refusal(lambda: os.open(path, os.O_RDWR)) == "EACCES"


# ---- holders -----------------------------------------------------------------------------------


def test_a_holder_is_who_knows_its_key(control: int, file: int) -> None:
    first, second = register(control, name=b"first"), register(file, name=b"second")
    assert first.id != second.id
    assert first.key != second.key
    assert first.recall_ms == 10000
    handle = handle_of(file)

    def watch(holder: int, key: int) -> str | None:
        return refused(control, WATCH, WatchCall(holder=holder, key=key, file=handle))

    assert watch(first.id, first.key) is None
    assert watch(first.id, second.key) == "EKEYREJECTED"
    assert watch(second.id + 100, 0) == "ENOENT"
    gone = HolderCall(id=first.id, key=second.key)
    assert refused(control, HOLDER_GONE, gone) == "EKEYREJECTED"
    gone.key = first.key
    assert refused(control, HOLDER_GONE, gone) is None
    assert refused(control, HOLDER_GONE, gone) == "ENOENT"
    assert refused(control, FENCED, HolderCall(id=second.id)) == "EBUSY"
    assert refused(control, FENCED, HolderCall(id=first.id)) == "ENOENT"


def test_a_holder_ends_with_its_last_descriptor(root: Path, control: int) -> None:
    own = os.open(root / ".extfs/control", os.O_RDONLY)
    holder = register(own)
    second = os.dup(own)
    os.close(own)
    assert refused(control, RETURN, ReturnCall(flags=ALL, holder=holder.id, key=holder.key)) in (
        None,
        "EOPNOTSUPP",
    )
    os.close(second)  # RELEASE is not awaited by close(2)
    deadline = time.monotonic() + 10
    gone = HolderCall(id=holder.id, key=holder.key)
    while (error := refused(control, HOLDER_GONE, gone)) != "ENOENT":
        assert error is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_may_register(root: Path, control: int, file: int) -> None:
    def error(fd: int, **fields: object) -> str | None:
        return refused(fd, HOLDER_REGISTER, HolderCall(**fields))

    assert error(control, name=b"client", flags=CLIENT) is None
    assert error(file, flags=CLIENT) == "EPERM"
    assert error(control, flags=CLIENT | RESUME) == "EINVAL"
    assert as_user(USER, lambda: error(control, flags=CLIENT)) == "EPERM"
    assert as_user(USER, lambda: error(file)) == "EACCES"
    os.chown(root / "file", USER, USER)
    assert as_user(USER, lambda: error(file)) is None
    directory = os.open(root, os.O_RDONLY)
    assert error(directory) == "EISDIR"
    os.close(directory)


def test_a_user_has_so_many_holders(root: Path, control: int, file: int) -> None:
    os.chown(root / "file", USER, USER)

    def fill() -> str | None:
        for number in range(1000):
            error = refused(file, HOLDER_REGISTER, HolderCall())
            if error:
                return f"{number} {error}"
        return None

    assert as_user(USER, fill) == "256 EAGAIN"
    assert refused(control, HOLDER_REGISTER, HolderCall()) is None


@pytest.mark.parametrize(
    ("fence", "expected"),
    [
        (b"", None),
        (b"cgroup:/some/group", None),
        (b"cgroup:", "EINVAL"),
        (b"cgroup:/", "EINVAL"),
        (b"cgroup:some", "EINVAL"),
        (b"cgroup:/a/../b", "EINVAL"),
        (b"cgroup:/a/..", "EINVAL"),
        (b"command:/bin/true", "EINVAL"),
        (b"cgroup:/" + b"x" * 120, "EINVAL"),
    ],
)
def test_how_a_fence_is_named(control: int, fence: bytes, expected: str | None) -> None:
    struct = HolderCall()
    # Past the last byte: ctypes would keep it NUL-terminated.
    ctypes.memmove(ctypes.addressof(struct) + HolderCall.fence.offset, fence, len(fence))
    assert refused(control, HOLDER_REGISTER, struct) == expected


def test_nobody_names_a_cgroup_of_others_to_be_killed(root: Path, file: int) -> None:
    os.chown(root / "file", USER, USER)
    struct = HolderCall(fence=b"cgroup:/system.slice")
    assert as_user(USER, lambda: refused(file, HOLDER_REGISTER, struct)) == "EPERM"


def test_resume_needs_a_lost_holder_and_its_key(control: int) -> None:
    holder = register(control)
    again = {"flags": RESUME, "id": holder.id}
    assert refused(control, HOLDER_REGISTER, HolderCall(**again, key=holder.key)) == "EBUSY"
    assert refused(control, HOLDER_REGISTER, HolderCall(**again, key=1)) == "EKEYREJECTED"
    missing = HolderCall(flags=RESUME, id=holder.id + 1, key=holder.key)
    assert refused(control, HOLDER_REGISTER, missing) == "ENOENT"


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


# ---- events: poll(2), EVENTS -------------------------------------------------------------------


def ready(fd: int, events: int, milliseconds: int) -> int:
    """What poll(2) says."""
    poller = select.poll()
    poller.register(fd, events)
    return dict(poller.poll(milliseconds)).get(fd, 0)


def later(function: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(0.1, function)
    timer.start()
    return timer


def test_poll_wakes_with_an_event(control: int, changes: Changes) -> None:
    assert ready(control, select.POLLIN, 0) == 0
    assert ready(control, select.POLLIN, 50) == 0
    assert ready(control, select.POLLIN | select.POLLOUT, 0) == select.POLLOUT
    for _ in range(3):
        timer = later(changes.happen)
        assert ready(control, select.POLLIN, 5000) == select.POLLIN
        timer.join()
        assert len(take_events(control)) == 1
    assert ready(control, select.POLLIN, 0) == 0


@pytest.mark.parametrize("edge", [0, select.EPOLLET], ids=["level", "edge"])
def test_epoll_wakes_with_every_first_event(control: int, changes: Changes, edge: int) -> None:
    os.set_blocking(control, False)
    with select.epoll() as epoll:
        epoll.register(control, select.EPOLLIN | edge)
        assert epoll.poll(0.05) == []
        for _ in range(5):
            timer = later(changes.happen)
            assert epoll.poll(5) == [(control, select.EPOLLIN)]
            timer.join()
            assert len(take_events(control)) == 1
            assert epoll.poll(0) == []


def test_two_who_poll_are_both_woken(control: int, changes: Changes) -> None:
    woken: list[int] = []
    pollers = [
        threading.Thread(target=lambda: woken.append(ready(control, select.POLLIN, 5000)))
        for _ in range(2)
    ]
    for poller in pollers:
        poller.start()
    time.sleep(0.1)
    changes.happen()
    for poller in pollers:
        poller.join(10)
    assert woken == [select.POLLIN] * 2


def test_files_are_ready_always_and_exceptional_with_events(root: Path, file: int) -> None:
    everything = select.POLLIN | select.POLLOUT | select.POLLPRI
    always = select.POLLIN | select.POLLOUT
    assert ready(file, everything, 0) == always
    status = os.open(root / "file", os.O_RDONLY)
    assert ready(status, everything, 0) == always
    os.close(status)
    holder = register(file)

    def change() -> None:
        call(file, WATCH, WatchCall(holder=holder.id, key=holder.key))
        os.pwrite(file, b"x", 1 << 20)

    timer = later(change)
    assert ready(file, select.POLLPRI, 5000) == select.POLLPRI
    timer.join()
    answer = call(file, EVENTS, EventsCall())
    assert [event.type for event in answer.events[: answer.count]] == [EVENT_MAP_CHANGED]
    assert call(file, EVENTS, EventsCall()).count == 0
    assert ready(file, everything, 0) == always


def test_events_arrive_where_the_holder_was_registered(
    root: Path, control: int, changes: Changes
) -> None:
    other = os.open(root / ".extfs/control", os.O_RDONLY | os.O_NONBLOCK)
    changes.happen()
    assert refusal(lambda: os.read(other, 1000)) == "EAGAIN"
    assert call(control, EVENTS, EventsCall()).count == 1
    os.close(other)


# ---- mounts without layouts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"), [("ro", "EROFS"), ("writeback_cache", "EOPNOTSUPP")]
)
def test_mounts_without_layouts_say_so(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    options: str,
    expected: str,
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device)
    (mounted.mountpoint / "file").write_bytes(bytes(BLOCK))
    mounted.unmount()
    root = mount_extfs(loop_device, options).mountpoint
    control = os.open(root / ".extfs/control", os.O_RDONLY)
    file = os.open(root / "file", os.O_RDONLY)
    assert info(control).free == info(file).free
    assert call(file, MAP, MapCall(length=BLOCK)).count == 1
    handle = handle_of(file)
    for nr, struct in (
        (HOLDER_REGISTER, HolderCall()),
        (RECALL, RecallCall(file=handle, iomode=3, length=BLOCK)),
        (EXCHANGE, PairCall(file=handle, other=handle, other_offset=BLOCK, length=BLOCK)),
    ):
        assert refused(control, nr, struct) == expected
    os.close(file)
    os.close(control)


def test_unknown_commands_are_not_ours(control: int, file: int) -> None:
    for fd in (control, file):
        assert refused(fd, 0xDF, HandleCall()) == errno.errorcode[errno.ENOTTY]
        assert refused(fd, SHUTDOWN + 1, HandleCall()) == "ENOTTY"
