"""Caches shrink when memory is short: who is heard, what follows when, and a mount that does it."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from conftest import ExtfsRunner, Mounted
from rundir import LoopDevice

from extfs.core import Filesystem, Memory, SimDevice, mkfs
from extfs.layout import Host
from extfs.layout.cgroups import CgroupError, cgroup_root
from extfs.memory import (
    MemoryLimit,
    Shrinker,
    Source,
    cache_size,
    find_limit,
    find_sources,
)
from extfs.memory.policy import CALM, CALM_MAX

MIB = 1 << 20


class FakeCaches:
    """As full as they may be, but for what `kept` says."""

    def __init__(self, *, kept: int = 0) -> None:
        self.cache = self.cache_asked = 64 * MIB
        self.inodes = self.inodes_asked = 16384
        self.kept = kept
        self.held = 64 * MIB
        self.checkpoints = 0
        self.settings: list[tuple[float, int, int]] = []

    def memory(self) -> Memory:
        return Memory(
            cache_bytes=self.held,
            cache_kept=self.kept,
            cache_resident=self.held,
            cache_limit=self.cache,
            cache_asked=self.cache_asked,
            inodes=self.inodes,
            inodes_unused=self.inodes,
            inode_limit=self.inodes,
            inode_asked=self.inodes_asked,
            inode_bytes=1000,
            lookup_bytes=0,
        )

    def limit_caches(self, cache_bytes: int, inodes: int) -> int:
        left = max(0, self.held - max(cache_bytes, self.kept))
        self.cache, self.inodes = cache_bytes, inodes
        self.held -= left
        return left

    def checkpoint(self) -> None:
        self.checkpoints += 1


@pytest.fixture
def bell() -> Iterator[tuple[Source, Callable[[], None]]]:
    """A source, and what makes it tell of pressure."""
    descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    copy = os.dup(descriptor)
    yield (
        Source("a bell", descriptor, select.EPOLLIN, stream=True),
        lambda: os.eventfd_write(copy, 1),
    )
    os.close(copy)


def running(test: Callable[[trio.Nursery], Any]) -> None:
    """Run it under a clock that jumps; what is for a thread is done at once, for a jump does not
    wait for threads."""

    async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(nursery)
            nursery.cancel_scope.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", at_once)
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# ---- the policy --------------------------------------------------------------------------------


def test_caches_are_halved_to_a_floor_and_grow_again(
    bell: tuple[Source, Callable[[], None]],
) -> None:
    source, ring = bell
    caches = FakeCaches()

    async def test(nursery: trio.Nursery) -> None:
        shrinker = Shrinker(caches, [source])
        nursery.start_soon(shrinker.run)
        limits = []
        for _ in range(5):
            ring()
            await trio.sleep(0.5)
            limits.append((caches.cache // MIB, caches.inodes))
        assert limits == [(32, 8192), (16, 4096), (8, 2048), (8, 2048), (8, 2048)]
        said = shrinker.status()
        assert (said["events"], said["shrinks"]) == (5, 3)
        assert said["given_back"] == 56 * MIB
        assert said["last"] is not None
        await trio.sleep(CALM - 1)
        assert caches.cache == 8 * MIB
        grown = []
        for _ in range(4):
            await trio.sleep(1 if not grown else CALM)
            grown.append((caches.cache // MIB, caches.inodes))
        assert grown == [(16, 4096), (32, 8192), (64, 16384), (64, 16384)]
        assert shrinker.status()["shrinks"] == 3

    running(test)


def test_pressure_after_growing_makes_the_next_growth_later(
    bell: tuple[Source, Callable[[], None]],
) -> None:
    source, ring = bell
    caches = FakeCaches()

    async def test(nursery: trio.Nursery) -> None:
        nursery.start_soon(Shrinker(caches, [source]).run)
        waits = []
        for _ in range(6):
            ring()
            begin = trio.current_time()
            await trio.sleep(0.1)
            before = caches.cache
            for _ in range(1000):
                await trio.sleep(0.5)
                if caches.cache != before:
                    break
            waits.append(trio.current_time() - begin)
            caches.held = caches.cache
        expected = [min(CALM * 2**n, CALM_MAX) for n in range(6)]
        assert waits == [pytest.approx(seconds, abs=1) for seconds in expected]
        # A long quiet time, and it is as at first.
        await trio.sleep(10 * CALM_MAX)
        ring()
        await trio.sleep(0.1)
        before = caches.cache
        await trio.sleep(CALM + 0.5)
        assert caches.cache > before

    running(test)


def test_what_the_journal_keeps_leaves_after_a_checkpoint(
    bell: tuple[Source, Callable[[], None]],
) -> None:
    source, ring = bell
    caches = FakeCaches(kept=48 * MIB)

    async def test(nursery: trio.Nursery) -> None:
        nursery.start_soon(Shrinker(caches, [source]).run)
        ring()
        await trio.sleep(0.1)
        assert (caches.cache, caches.held, caches.checkpoints) == (32 * MIB, 48 * MIB, 1)
        caches.kept = 0
        await trio.sleep(1.5)
        assert caches.held == 32 * MIB, "taken without another event"

    running(test)


def test_a_cgroup_that_is_nearly_full_counts_as_pressure(tmp_path: Path) -> None:
    caches = FakeCaches()
    limit = limit_of_v2(tmp_path, use=90 * MIB, pages=0, most=100 * MIB)

    async def test(nursery: trio.Nursery) -> None:
        shrinker = Shrinker(caches, [], why="a test", limit=limit)
        nursery.start_soon(shrinker.run)
        await trio.sleep(5.5)
        assert caches.cache == 8 * MIB
        said = shrinker.status()
        assert said["near_limit"] >= 3
        assert (said["events"], said["shrinks"], said["cgroup_limit"]) == (0, 3, 100 * MIB)
        await trio.sleep(3 * CALM)
        assert caches.cache == 8 * MIB, "as long as it is full"
        (tmp_path / "group/a/memory.current").write_text(str(10 * MIB))
        await trio.sleep(4 * CALM)
        assert caches.cache == 64 * MIB

    running(test)


def test_caches_may_not_fill_their_cgroup(tmp_path: Path) -> None:
    """Before they are full: pressure and looks would come too late."""
    caches = FakeCaches()
    caches.held = 4 * MIB
    limit = limit_of_v2(tmp_path, use=40 * MIB, pages=0, most=64 * MIB)

    async def test(nursery: trio.Nursery) -> None:
        shrinker = Shrinker(caches, [], why="a test", limit=limit)
        nursery.start_soon(shrinker.run)
        await trio.sleep(0.5)
        assert caches.cache == 20 * MIB, "what is there, and the room to seven eighths"
        caches.held = 20 * MIB
        (tmp_path / "group/a/memory.current").write_text(str(56 * MIB))
        await trio.sleep(3 * CALM)
        assert caches.cache == 20 * MIB
        (tmp_path / "group/a/memory.max").write_text("max")
        await trio.sleep(40 + 3 * CALM)
        assert caches.cache == 64 * MIB
        said = shrinker.status()
        assert (said["near_limit"], said["shrinks"]) == (0, 0)

    running(test)


def test_a_source_that_goes_is_not_pressure() -> None:
    ours, theirs = socket.socketpair()
    caches = FakeCaches()
    ours.setblocking(False)

    async def test(nursery: trio.Nursery) -> None:
        shrinker = Shrinker(
            caches, [Source("a socket", ours.detach(), select.EPOLLIN, stream=True)]
        )
        nursery.start_soon(shrinker.run)
        theirs.send(b"!")
        await trio.sleep(0.1)
        assert shrinker.status()["events"] == 1
        theirs.close()
        await trio.sleep(0.1)
        said = shrinker.status()
        assert (said["watched"], said["why"]) == ([], "a socket is gone")
        assert said["events"] <= 2
        await trio.sleep(100)

    running(test)


# ---- sources and limits ------------------------------------------------------------------------


def host_with(tmp_path: Path, group: str, mounts: str = "") -> Host:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "pressure").mkdir()
    (proc / "self/cgroup").write_text(group)
    (proc / "mounts").write_text(mounts)
    return Host(proc=proc)


def limit_of_v2(tmp_path: Path, *, use: int, pages: int, most: int) -> MemoryLimit:
    group = tmp_path / "group"
    (group / "a/b").mkdir(parents=True)
    for directory, limit in ((group / "a", str(most)), (group / "a/b", "max")):
        (directory / "memory.max").write_text(limit + "\n")
        (directory / "memory.high").write_text("max\n")
        (directory / "memory.current").write_text(f"{use}\n")
        (directory / "memory.stat").write_text(
            f"anon {use - pages}\nfile {pages}\ninactive_file {pages // 2}\n"
            f"active_file {pages - pages // 2}\n"
        )
    found = find_limit(host_with(tmp_path, "0::/a/b\n", f"cgroup2 {group} cgroup2 rw 0 0\n"))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("use", "pages", "near"), [(80, 0, False), (90, 0, True), (99, 50, False), (99, 5, True)]
)
def test_limits_above_count_and_pages_of_files_do_not(
    tmp_path: Path, use: int, pages: int, near: bool
) -> None:
    limit = limit_of_v2(tmp_path, use=use * MIB, pages=pages * MIB, most=100 * MIB)
    room = limit.room()
    assert room is not None
    assert (limit.bytes(), room < 0) == (100 * MIB, near)


def test_limits_of_version_1(tmp_path: Path) -> None:
    group = tmp_path / "memory"
    (group / "x").mkdir(parents=True)
    for directory, limit in ((group, 9223372036854771712), (group / "x", 64 * MIB)):
        (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (directory / "memory.usage_in_bytes").write_text(f"{60 * MIB}\n")
        (directory / "memory.stat").write_text(f"cache 7\ntotal_inactive_file {MIB}\n")
    host = host_with(tmp_path, "4:memory:/x\n0::/\n", f"cgroup {group} cgroup rw,memory 0 0\n")
    limit = find_limit(host)
    assert limit is not None
    assert (limit.bytes(), limit.room()) == (64 * MIB, (56 - 60 + 1) * MIB)
    (group / "x/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert (limit.bytes(), limit.room()) == (None, None)


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert find_limit(host_with(tmp_path, "")) is None
    assert find_limit(Host(proc=tmp_path / "nothing")) is None


def test_why_nothing_is_watched(tmp_path: Path) -> None:
    host = host_with(tmp_path, "0::/a\n", f"cgroup2 {tmp_path}/g cgroup2 rw 0 0\n")
    found, why = find_sources(host, {})
    assert not found
    assert "g/a/memory.pressure: No such file" in why
    assert "pressure/memory: No such file" in why
    (host.proc / "pressure/memory").write_text("")  # not of the kernel
    found, why = find_sources(host, {})
    assert (found, os.strerror(errno.EPERM) in why) == ([], True)
    assert find_sources(host, {"MEMORY_PRESSURE_WATCH": "/dev/null"})[1]
    found, why = find_sources(
        host, {"MEMORY_PRESSURE_WATCH": str(tmp_path), "MEMORY_PRESSURE_WRITE": ""}
    )
    assert (found, "neither" in why) == ([], True)


def test_a_service_manager_may_say_what_to_watch(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (source,), _ = find_sources(Host(), {"MEMORY_PRESSURE_WATCH": str(fifo)})
    with open(fifo, "wb", buffering=0) as writer:
        writer.write(b"x" * 5000)
    with select.epoll() as epoll:
        epoll.register(source.fd, source.events)
        assert epoll.poll(0)
        source.drain()
        assert not epoll.poll(0)
    source.close()
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        first = base64.b64encode(b"hello").decode()
        (source,), _ = find_sources(
            Host(), {"MEMORY_PRESSURE_WATCH": path, "MEMORY_PRESSURE_WRITE": first}
        )
        connection, _ = listening.accept()
        assert connection.recv(10) == b"hello"
        connection.close()
    source.close()


def test_the_kernel_takes_the_trigger() -> None:
    """Whoever we are: its window is one that needs no privilege."""
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no pressure stall information")
    sources, why = find_sources(environ={})
    if not sources:
        pytest.skip(why)
    with select.epoll() as epoll:
        epoll.register(sources[0].fd, sources[0].events)
        assert not [mask for _, mask in epoll.poll(0) if mask & select.EPOLLERR]
    sources[0].close()


# ---- the core, and a mount ---------------------------------------------------------------------


@pytest.mark.core
def test_the_core_obeys() -> None:
    with SimDevice(256 * MIB) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(
            sim.device(), no_heartbeat=True, cache_bytes=4 * MIB, inode_cache=300
        ) as fs:
            for number in range(1000):
                fs.mknod(1, b"f%d" % number, 0o100644)
            before = fs.memory()
            assert (before.cache_limit, before.cache_asked) == (4 * MIB, 4 * MIB)
            assert (before.inode_limit, before.inodes_unused) == (300, 300)
            left = fs.limit_caches(MIB, 100)
            after = fs.memory()
            assert (after.cache_limit, after.inode_limit) == (MIB, 100)
            assert after.inodes_unused == 100
            assert left == before.cache_bytes - after.cache_bytes + 200 * after.inode_bytes
            fs.sync()
            fs.limit_caches(1 << 60, 1 << 60)
            after = fs.memory()
            assert (after.cache_limit, after.inode_limit) == (4 * MIB, 300)
            assert len(list(fs.scandir(1))) == 1000


def resident(pid: int) -> int:
    """Bytes, exactly."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError(pid)


FILES = 12_000
IN_ONE_DIRECTORY = 500


def _name(number: int) -> str:
    return f"d{number // IN_ONE_DIRECTORY}/a-name-that-takes-some-room-{number}"


def _content(number: int, version: int) -> bytes:
    return hashlib.sha256(b"%d %d" % (number, version)).digest() * 20


class _Busy:
    """Readers and writers of a mount until told to stop; what they find must be right."""

    def __init__(self, root: Path, mine: int) -> None:
        self.failure: BaseException | None = None
        self.rounds = 0
        self.stop = threading.Event()
        self._root = root
        self._mine = mine
        self._versions = [0] * 50
        self._random = random.Random(mine)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                self._one()
                self.rounds += 1
        except BaseException as error:
            self.failure = error

    def _one(self) -> None:
        number = self._random.randrange(50)
        path = self._root / f"busy-{self._mine}-{number}"
        if self._versions[number]:
            assert path.read_bytes() == _content(number, self._versions[number])
        self._versions[number] += 1
        path.write_bytes(_content(number, self._versions[number]))
        other = self._random.randrange(FILES)
        assert (self._root / _name(other)).stat().st_size == other % 7

    def check(self) -> None:
        """End it; everything is as it wrote it."""
        self.stop.set()
        self.thread.join()
        if self.failure is not None:
            raise self.failure
        assert self.rounds > 0
        for number, version in enumerate(self._versions):
            if version:
                path = self._root / f"busy-{self._mine}-{number}"
                assert path.read_bytes() == _content(number, version)


@pytest.mark.fuse
def test_a_mount_gives_memory_back_while_it_is_used(
    loop_device: LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "pressure"
    os.mkfifo(fifo)
    monkeypatch.setenv("MEMORY_PRESSURE_WATCH", str(fifo))
    extfs("mkfs", loop_device)
    options = "cache=16M"
    first = mount_extfs(loop_device, options)
    for number in range(FILES):
        path = first.mountpoint / _name(number)
        if number % IN_ONE_DIRECTORY == 0:
            path.parent.mkdir()
        path.write_bytes(b"x" * (number % 7))
        os.setxattr(path, "user.text", b"%d" % number * 60)  # no longer in the inode's record
    first.unmount()

    mounted = mount_extfs(loop_device, options)
    root = mounted.mountpoint

    def memory() -> dict[str, Any]:
        document: dict[str, Any] = json.loads((root / ".extfs/status").read_text())["memory"]
        return document

    def walk() -> None:
        for number in range(FILES):
            path = root / _name(number)
            assert path.stat().st_size == number % 7
            assert os.getxattr(path, "user.text") == b"%d" % number * 60

    walk()
    busy = [_Busy(root, mine) for mine in range(3)]
    while min(one.rounds for one in busy) < 500:  # what they need themselves is there
        assert all(one.failure is None for one in busy)
        time.sleep(0.05)
    full = memory()
    before = resident(mounted.daemon.pid)
    assert full["pressure"]["watched"] == [str(fifo)]
    assert full["metadata"]["effective_limit"] == full["metadata"]["limit"] == 16 * MIB
    with open(fifo, "wb", buffering=0) as bell:
        for event in range(1, 5):
            bell.write(b"!")
            while memory()["pressure"]["events"] < event:
                assert mounted.daemon.poll() is None
    # The event is counted before it is over.
    while memory()["inodes"]["effective_limit"] > full["inodes"]["limit"] // 8:
        assert mounted.daemon.poll() is None
    after = memory()
    fallen = before - resident(mounted.daemon.pid)
    text = extfs("status", root).stdout
    for one in busy:
        one.check()
    assert "while memory is short" in text
    assert "caches shrank" in text
    assert after["metadata"]["effective_limit"] == 2 * MIB
    assert after["inodes"]["effective_limit"] == full["inodes"]["limit"] // 8
    assert after["pressure"]["shrinks"] >= 3
    assert after["pressure"]["last"] is not None
    given_back = after["pressure"]["given_back"]
    assert given_back > 8 * MIB
    assert fallen > given_back // 2, (before, fallen, full, after)
    walk()
    again = memory()["inodes"]
    assert again["unused"] <= again["effective_limit"]
    mounted.unmount()
    assert "clean" in extfs("fsck", loop_device).stdout


_THRASH = """
import mmap, os, random, sys
path, group = sys.argv[1:]
with open(os.path.join(group, "cgroup.procs"), "w") as procs:
    procs.write(str(os.getpid()))
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    while True:
        pages[random.randrange(len(pages))]
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A cgroup with 48 MiB of memory, of either version."""
    name = f"extfs-test-{os.getpid()}"
    v1 = Path("/sys/fs/cgroup/memory")
    try:
        if (v1 / "memory.limit_in_bytes").exists():
            group, limit = v1 / name, "memory.limit_in_bytes"
        else:
            root = cgroup_root(Host())
            (root / "cgroup.subtree_control").write_text("+memory")
            group, limit = root / name, "memory.max"
        group.mkdir()
    except (OSError, CgroupError) as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    (group / limit).write_text(str(48 * MIB))
    yield group
    for _ in range(100):  # until the last of its processes is gone
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    group.rmdir()


@pytest.mark.fuse
def test_the_kernel_tells_of_real_pressure(
    loop_device: LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    monkeypatch: pytest.MonkeyPatch,
    small_group: Path,
) -> None:
    """Somebody reads more of a file of the mount than its cgroup can hold, over and over."""
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no pressure stall information")
    monkeypatch.setenv("MEMORY_PRESSURE_WATCH", "/proc/pressure/memory")
    # Any waiting that can be told from none.
    trigger = base64.b64encode(b"some 2000 2000000\0").decode()
    monkeypatch.setenv("MEMORY_PRESSURE_WRITE", trigger)
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device)
    path = mounted.mountpoint / "file"
    path.write_bytes(os.urandom(96 * MIB))

    def pressure() -> dict[str, Any]:
        text = (mounted.mountpoint / ".extfs/status").read_text()
        document: dict[str, Any] = json.loads(text)["memory"]["pressure"]
        return document

    assert pressure()["watched"] == ["/proc/pressure/memory"]
    before = pressure()["events"]
    thrashing = subprocess.Popen([sys.executable, "-c", _THRASH, path, small_group])
    try:
        deadline = time.monotonic() + 60
        while pressure()["events"] == before:
            assert thrashing.poll() is None
            assert time.monotonic() < deadline, Path("/proc/pressure/memory").read_text()
            time.sleep(0.1)
    finally:
        thrashing.kill()
        thrashing.wait()
    assert pressure()["shrinks"] >= 1


# ---- without a word about it ----


@pytest.mark.parametrize(
    ("memory", "allowed", "expected"),
    [
        (1 << 30, None, 64 << 20),
        (8 << 30, None, 256 << 20),
        (512 << 30, None, 1 << 30),
        (512 << 30, 16 << 30, 512 << 20),
        (512 << 30, 256 << 20, 64 << 20),
        (4 << 30, 64 << 30, 128 << 20),
    ],
)
def test_the_cache_is_a_share_of_the_memory(
    memory: int, allowed: int | None, expected: int
) -> None:
    assert cache_size(allowed, memory) == expected


def test_the_cache_without_cgroups() -> None:
    assert cache_size(None, 4 << 30) == 128 << 20
    assert 64 << 20 <= cache_size(None) <= 1 << 30
