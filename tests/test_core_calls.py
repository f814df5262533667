"""Calls of the core that an event loop begins: the same answers as those that block, later."""

from __future__ import annotations

import errno
import select
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from extfs import core
from extfs.core import (
    Calls,
    CoreError,
    ExtentState,
    Filesystem,
    HolderSpec,
    Iomode,
    LayoutState,
    Prepared,
    SimDevice,
)

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice(64 * MIB, seed=1) as device:
        with device.device() as handle:
            core.mkfs(handle, label="label")
        yield device


@pytest.fixture
def fs(sim: SimDevice) -> Iterator[Filesystem]:
    with Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=60_000) as filesystem:
        yield filesystem


class Loop:
    """An event loop for one test: what has ended, by name."""

    def __init__(self, fs: Filesystem) -> None:
        self.calls = Calls(fs)
        self.over: dict[str, tuple[Any, Exception | None]] = {}

    def begin(self, name: str, prepared: Prepared[Any]) -> bool:
        """Whether it is over at once."""
        over = self.calls.begin(
            prepared, lambda result, failed: self.over.update({name: (result, failed)})
        )
        if over is not None:
            self.over[name] = over
        return over is not None

    def tell(self) -> None:
        for done, result, failed in self.calls.ended():
            done(result, failed)

    def wait(self) -> None:
        """Until nothing runs."""
        while self.calls.running:
            readable, _, _ = select.select([self.calls], [], [], 30)
            assert readable, "nothing ends"
            self.tell()

    def result(self, name: str) -> Any:
        self.wait()
        result, failed = self.over.pop(name)
        if failed is not None:
            raise failed
        return result


@pytest.fixture
def loop(fs: Filesystem) -> Iterator[Loop]:
    made = Loop(fs)
    yield made
    made.wait()
    made.calls.close()
    made.calls.close()


def test_answers_are_those_of_the_blocking_calls(fs: Filesystem, loop: Loop) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    holder, _ = fs.layouts.register(HolderSpec())
    loop.begin("get", fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB))
    got = loop.result("get")
    assert (got.next, [e.state for e in got.extents]) == (MIB, [LayoutState.INVALID_DATA])
    again = fs.layouts.get(ino, holder, Iomode.RW, 0, MIB)
    assert again.extents == got.extents
    commit = fs.layouts.prepare_commit(ino, holder, [(0, 8192)], size=8192)
    loop.begin("commit", commit)
    assert loop.result("commit") == 8192
    assert [(e.len, e.state) for e in fs.map(ino, 0, 2)] == [(2, ExtentState.WRITTEN)]
    loop.begin("return", fs.layouts.prepare_give_back(ino, holder))
    assert loop.result("return") is None
    assert fs.layouts.grants(ino) == []


def test_what_needs_no_change_is_over_at_once(fs: Filesystem, loop: Loop) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.write(ino, 0, bytes(MIB))
    fs.fsync(ino)
    holder, _ = fs.layouts.register(HolderSpec())
    fs.layouts.get(ino, holder, Iomode.RW, 0, MIB)
    fs.sync()
    assert loop.begin("get", fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB))
    assert [e.state for e in loop.result("get").extents] == [LayoutState.READ_WRITE_DATA]
    assert not loop.calls.running
    assert not loop.calls.pending


def test_errors_are_those_of_the_blocking_calls(fs: Filesystem, loop: Loop) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    holder, _ = fs.layouts.register(HolderSpec())
    loop.begin("unknown", fs.layouts.prepare_get(99_999, holder, Iomode.RW, 0, MIB))
    loop.begin("no room", fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB, limit=0))
    loop.begin("not held", fs.layouts.prepare_commit(ino, holder, [(0, 4096)], size=4096))
    found = {}
    for name in ("unknown", "no room", "not held"):
        with pytest.raises(CoreError) as refused:
            loop.result(name)
        found[name] = refused.value.errno
    assert found == {"unknown": errno.ENOENT, "no room": errno.EINVAL, "not held": errno.ENXIO}


def test_many_run_at_the_same_time(fs: Filesystem, loop: Loop) -> None:
    (first, _), (second, _) = (fs.layouts.register(HolderSpec()) for _ in range(2))
    inodes = [fs.mknod(1, b"%d" % number, FILE).ino for number in range(100)]
    for ino in inodes:
        fs.layouts.get(ino, first, Iomode.RW, 0, 65536)
        wanted = fs.layouts.prepare_get(ino, second, Iomode.RW, 0, 65536, wait=True)
        assert not loop.begin(str(ino), wanted)
    assert loop.calls.running == len(inodes)
    for ino in reversed(inodes):
        fs.layouts.give_back(ino, first)
    loop.wait()
    found = {ino: loop.result(str(ino)).next for ino in inodes}
    assert found == dict.fromkeys(inodes, 65536)


def test_a_call_begun_when_another_ends(fs: Filesystem, loop: Loop) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    holder, _ = fs.layouts.register(HolderSpec())

    def then(result: Any, failed: Exception | None) -> None:
        assert failed is None
        commit = fs.layouts.prepare_commit(ino, holder, [(0, 4096)], size=4096)
        loop.begin("commit", commit)

    over = loop.calls.begin(fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB), then)
    if over is not None:
        then(*over)
    loop.wait()
    assert loop.result("commit") == 4096


def test_two_wait_for_each_other_in_turn(fs: Filesystem, loop: Loop) -> None:
    """A GET waits for a return that begins after it."""
    ino = fs.mknod(1, b"file", FILE).ino
    (first, _), (second, _) = (fs.layouts.register(HolderSpec()) for _ in range(2))
    fs.layouts.get(ino, first, Iomode.RW, 0, MIB)
    loop.begin("wait", fs.layouts.prepare_get(ino, second, Iomode.RW, 0, MIB, wait=True))
    assert loop.calls.running == 1
    loop.begin("return", fs.layouts.prepare_give_back(ino, first))
    assert loop.result("return") is None
    assert loop.result("wait").next == MIB


def test_what_is_told_is_durable(sim: SimDevice) -> None:
    fs = Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=60_000)
    ino = fs.mknod(1, b"file", FILE).ino
    holder, _ = fs.layouts.register(HolderSpec())
    loop = Loop(fs)
    loop.begin("get", fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB))
    (extent,) = loop.result("get").extents
    loop.calls.close()
    fs.abandon()
    sim.restart(7)
    with Filesystem.open(sim.device(), no_heartbeat=True) as again:
        (found,) = again.map(ino, 0, MIB // 4096)
        assert (found.block * 4096, found.state) == (extent.device, ExtentState.UNWRITTEN)
        assert [grant.holder for grant in again.layouts.grants(ino)] == [holder]


def test_waiting_calls_hear_of_a_journal_that_fails(sim: SimDevice) -> None:
    fs = Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=60_000)
    ino = fs.mknod(1, b"file", FILE).ino
    holder, _ = fs.layouts.register(HolderSpec())
    fs.sync()
    loop = Loop(fs)
    start = fs.super.journal_start * 4096
    sim.fail(core.SimDevice.WRITE, start, fs.super.journal_blocks * 4096, 1000)
    loop.begin("get", fs.layouts.prepare_get(ino, holder, Iomode.RW, 0, MIB))
    with pytest.raises(CoreError) as failed:
        loop.result("get")
    assert failed.value.errno == errno.EIO
    loop.calls.close()
    fs.abandon()
