"""The policy of fences on a real core: what is on disk at each step, and how long they take."""

from __future__ import annotations

import errno
import itertools
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from extfs import core
from extfs.core import (
    CoreError,
    EventType,
    FenceRecord,
    FenceState,
    Filesystem,
    HolderKind,
    HolderSpec,
    HolderState,
    Iomode,
    LayoutEvent,
    LostCause,
    SimDevice,
)
from extfs.layout import Attempt, CoreTable, Fencing, Outcome

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644
RECALL_MS = 200
SPEC = HolderSpec(name="deaf", kind=HolderKind.CLIENT, fence="scsi:1", fence_key=0xE5F5 << 48 | 7)


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice(64 * MIB, seed=1) as device:
        with device.device() as handle:
            core.mkfs(handle)
        yield device


def opened(sim: SimDevice) -> Filesystem:
    return Filesystem.open(sim.device(), no_heartbeat=True, recall_ms=RECALL_MS, commit_ms=3600_000)


def lose_one(fs: Filesystem, name: bytes = b"file", length: int = MIB) -> tuple[int, int]:
    """A holder with a RW layout, lost. Returns (holder, key)."""
    ino = fs.mknod(1, name, FILE).ino
    holder, key = fs.layouts.register(SPEC)
    fs.layouts.get(ino, holder, Iomode.RW, 0, length)
    fs.layouts.lost(holder)
    return holder, key


class Driver:
    """Harms; `at_call` and `at_harm` look; then it answers as `outcome` says, or never."""

    name = "test"
    harms = True

    def __init__(self, outcome: Outcome | None) -> None:
        self.outcome = outcome
        self.at_call: Callable[[], None] = lambda: None
        self.at_harm: Callable[[], None] = lambda: None
        self.attempts: list[tuple[int, int, bool]] = []
        self.called: list[float] = []

    async def fence(self, holder: core.HolderRecord, attempt: Attempt) -> Outcome:
        self.called.append(time.monotonic())
        self.at_call()
        self.attempts.append((holder.id, attempt.number, attempt.issued_before))
        await attempt.issued()
        self.at_harm()
        if self.outcome is None:
            await trio.sleep_forever()
        assert self.outcome is not None
        return self.outcome


def running(fs: Filesystem, driver: Driver, **options: Any) -> AbstractAsyncContextManager[Fencing]:
    @asynccontextmanager
    async def run() -> Any:
        fencing = Fencing(CoreTable(fs), driver, **options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fencing.run)
            with trio.fail_after(30):
                yield fencing
            nursery.cancel_scope.cancel()

    return run()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


def after_a_power_cut(sim: SimDevice) -> set[tuple[int, FenceState]]:
    """What a mount would find if the power went now, whatever the device's cache does."""
    found = set()
    for seed in range(4):
        with sim.clone() as copy:
            copy.restart(seed)
            with opened(copy) as fs:
                found |= {(record.holder, record.state) for record in fs.layouts.fences()}
    return found


async def test_what_is_on_disk_when_the_driver_is_called_and_when_it_harms(sim: SimDevice) -> None:
    with opened(sim) as fs:
        holder, key = lose_one(fs)
        driver = Driver(None)
        seen: list[set[tuple[int, FenceState]]] = []
        driver.at_call = driver.at_harm = lambda: seen.append(after_a_power_cut(sim))
        async with running(fs, driver):
            await until(lambda: len(seen) == 2)
            with pytest.raises(CoreError) as error:
                fs.layouts.resume(holder, key)
        assert seen == [{(holder, FenceState.DECIDED)}, {(holder, FenceState.ISSUED)}]
        assert error.value.errno == errno.EKEYREVOKED


async def test_a_fence_goes_on_after_a_crash_without_grace(sim: SimDevice) -> None:
    fs = opened(sim)
    first, _ = lose_one(fs)
    driver = Driver(None)
    async with running(fs, driver):
        await until(lambda: fs.layouts.fences()[:1] and driver.attempts)
        await until(lambda: fs.layouts.fences()[0].state is FenceState.ISSUED)
    second, key = lose_one(fs, b"second")
    fs.abandon()
    sim.restart(3)
    with opened(sim) as fs:
        driver = Driver(Outcome.confirmed("gone"))
        async with running(fs, driver, grace=3600.0) as fencing:
            await until(lambda: fs.layouts.holder(first) is None)
            assert [status.holder for status in fencing.waiting()] == [second]
            fs.layouts.resume(second, key)
            record = fs.layouts.holder(second)
        assert driver.attempts == [(first, 2, True)]
        assert record is not None
        assert (record.state, record.cause) == (HolderState.LIVE, LostCause.NOT)
        (past,) = fencing.history()
        assert (past.holder, past.cause, past.attempts) == (first, LostCause.MOUNT, 2)
        assert (past.outcome, past.name, past.fence) == ("confirmed", "deaf", "scsi:1")
        assert fs.layouts.fences() == []


async def test_a_fenced_client_comes_back_as_a_new_holder(sim: SimDevice) -> None:
    """Its lease lives: the server registers it anew as soon as the old one is gone."""
    with opened(sim) as fs:
        old, _ = lose_one(fs)
        ino = fs.lookup(1, b"file").ino
        events: list[LayoutEvent] = []
        driver = Driver(Outcome.confirmed(""))
        async with running(fs, driver, on_event=events.append):
            await until(lambda: any(event.type is EventType.HOLDER_GONE for event in events))
            new, _ = fs.layouts.register(SPEC)
            layout = fs.layouts.get(ino, new, Iomode.RW, 0, MIB)
        assert new > old
        assert layout.extents
        assert [event.length for event in events if event.type is EventType.HOLDER_GONE] == [1]
        with pytest.raises(CoreError) as error:
            fs.layouts.get(ino, old, Iomode.RW, 0, MIB)
        assert error.value.errno == errno.ENOENT


@pytest.mark.expect_log("attempt 1 by test", "its fence cannot be recorded")
async def test_no_harm_when_the_device_fails(sim: SimDevice) -> None:
    with opened(sim) as fs:
        holder, _ = lose_one(fs)
        fs.sync()
        sim.fail(SimDevice.WRITE, 0, 64 * MIB, count=1 << 20)
        driver = Driver(Outcome.confirmed(""))
        async with running(fs, driver) as fencing:
            await until(lambda: fencing.waiting() and fencing.waiting()[0].last_failure)
        assert driver.attempts == []
        fs.abandon()
    assert holder == 1


def test_records_are_steps(sim: SimDevice) -> None:
    with opened(sim) as fs:
        holder, _ = lose_one(fs)
        with pytest.raises(CoreError) as error:
            fs.layouts.fence_put(holder, FenceState.ISSUED, 1)
        assert error.value.errno == errno.EINVAL
        fs.layouts.fence_put(holder, FenceState.DECIDED, 0)
        with pytest.raises(CoreError) as error:
            fs.layouts.fence_put(holder + 1, FenceState.DECIDED, 0)
        assert error.value.errno == errno.ENOENT
        (record,) = fs.layouts.fences()
        assert record == FenceRecord(holder, FenceState.DECIDED, 0, record.decided)
        holders = [lose_one(fs, b"file%d" % number, 4096)[0] for number in range(150)]
        for number in holders[::2]:
            fs.layouts.fence_put(number, FenceState.DECIDED, 0)
        assert [fence.holder for fence in fs.layouts.fences()] == [holder, *holders[::2]]


async def test_from_the_deadline_to_the_driver_it_takes_milliseconds(sim: SimDevice) -> None:
    """A writer waits for a holder that does not answer: from the deadline of the recall on."""
    rounds = 12
    late: list[float] = []
    fenced: list[float] = []
    with opened(sim) as fs:
        asked: list[float] = []

        def heard(event: LayoutEvent) -> None:
            if event.type is EventType.RECALL:
                asked.append(time.monotonic() + event.left_ms / 1000)

        driver = Driver(Outcome.confirmed(""))
        async with running(fs, driver, on_event=heard):
            for number in range(rounds):
                ino = fs.mknod(1, b"%d" % number, FILE).ino
                holder, _ = fs.layouts.register(SPEC)
                fs.layouts.get(ino, holder, Iomode.RW, 0, MIB)
                await trio.to_thread.run_sync(fs.write, ino, 0, b"x" * 4096)
                await until(lambda number=number: len(driver.called) > number)
                late.append(driver.called[-1] - asked[-1])
                await until(lambda holder=holder: fs.layouts.holder(holder) is None)
                fenced.append(time.monotonic() - asked[-1])
    assert len(asked) == len(driver.called) == rounds
    print(f"driver called after {[round(s * 1000, 1) for s in late]} ms")
    print(f"gone after {[round(s * 1000, 1) for s in fenced]} ms")
    assert statistics.median(late) < 0.02
    assert statistics.median(fenced) < 0.1
    assert all(a < b for a, b in itertools.pairwise(driver.called))


STOPPED = """
import sys, time
from extfs import core
from extfs.core import Filesystem, HolderSpec, Iomode, SimDevice
import stat, threading
answers = sys.argv[1] == "answers"
sim = SimDevice(64 << 20, seed=1)
with sim.device() as handle:
    core.mkfs(handle)
with Filesystem.open(sim.device(), no_heartbeat=True, recall_ms=1200) as fs:
    ino = fs.mknod(1, b"file", stat.S_IFREG | 0o644).ino
    holder, _ = fs.layouts.register(HolderSpec())
    fs.layouts.get(ino, holder, Iomode.RW, 0, 1 << 20)
    writer = threading.Thread(target=fs.write, args=(ino, 0, b"x" * 4096))
    writer.start()
    while not any(event.type is core.EventType.RECALL for event in fs.layouts.events()):
        time.sleep(0.001)
    before = time.monotonic()
    print("asked", flush=True)
    while time.monotonic() - before < 1:  # stopped here
        before = before if time.monotonic() - before > 0.5 else time.monotonic()
        time.sleep(0.001)
    time.sleep(0.1)  # the answer has come long ago; now it is read
    if answers:
        fs.layouts.give_back(ino, holder)
    began = time.monotonic()
    writer.join()
    record = fs.layouts.holder(holder)
    print(record.state.name, record.missed, time.monotonic() - began < 5, flush=True)
    fs.abandon()
"""


@pytest.mark.parametrize(
    ("answers", "said"), [("answers", "LIVE 0 True"), ("does not", "LOST 1 True")]
)
def test_a_server_that_stood_still_does_not_blame_its_holders(answers: str, said: str) -> None:
    """It is stopped (SIGSTOP) over the deadline of a recall; the answer waits to be read."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, answers], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            process.send_signal(signal.SIGCONT)
            assert process.stdout.readline() == said + "\n"
            assert process.wait(20) == 0
        finally:
            process.kill()
