"""Writers, truncates and clones against 32 holders that answer recalls at once, late, never, or
from inside a read of the very file: it ends, and every wait is bounded by the recall deadline."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from faults import MIB

from extfs.control.client import Descriptor, Event, EventType, Iomode
from extfs.control.client import Holder as LayoutHolder

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

HOLDERS = 32
FILES = 4
FILE_SIZE = 2 * MIB
BLOCK = 4096
RECALL_SECONDS = 1
SECONDS = 25
BOUND = 10 * RECALL_SECONDS
"""Seconds that one call may take, through the mount or of a holder.

First come, first served: one recall time for the holders in the way of a call, and one more for
each LAYOUT_GET before it in the queue that gets what it waits for and does not answer either. A
holder waits for one at a time, 16 answer late or never, and they choose among four files: 17 recall
times if all of them stood in one queue, five on average. Copies of what is revoked are of some
MiB at most. Whoever is overtaken again and again, or waits for himself, is far above. A copy
stands in two queues, one after the other.
"""


class Holder(threading.Thread):
    """Takes layouts, and answers recalls in its own way."""

    def __init__(self, root: Path, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"holder-{number}")
        self.root, self.stop = root, stop
        self.manner = ("at once", "late", "never", "inside a read")[number % 4]
        self.rng = random.Random(number)
        self.failed: BaseException | None = None
        self.got = self.answered = self.revoked = 0
        self.longest = ("", 0.0)

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                with Descriptor.control(self.root) as control:
                    self.live(control)
        except BaseException as error:
            self.failed = error

    def live(self, control: Descriptor) -> None:
        """One life of a holder: a few seconds."""
        holder = control.register(self.name)
        end = time.monotonic() + self.rng.uniform(1, 4)
        while time.monotonic() < end and not self.stop.is_set():
            path = self.root / f"f{self.rng.randrange(FILES)}"
            with Descriptor.of(path) as file:
                handle = file.handle()
            offset = self.rng.randrange(FILE_SIZE // BLOCK) * BLOCK
            mode = self.rng.choice([Iomode.RW, Iomode.RW, Iomode.READ])
            begin = time.monotonic()
            try:
                length = self.rng.choice([1, 4, 32]) * BLOCK
                holder.get(mode, offset, length, wait=self.rng.random() < 0.3, file=handle)
                self.got += 1
            except OSError as error:
                if error.errno == errno.EOWNERDEAD:
                    holder.give_all_back()
                elif error.errno not in (errno.EAGAIN, errno.ENOSPC, errno.ENXIO):
                    raise
            self.note("get", begin)
            for event in control.wait_events(0.05):
                self.answer(holder, event, path)
        if self.manner != "never":
            holder.give_all_back()

    def note(self, what: str, begin: float) -> None:
        self.longest = max(self.longest, (what, time.monotonic() - begin), key=lambda one: one[1])

    def answer(self, holder: LayoutHolder, event: Event, path: Path) -> None:
        if event.type is EventType.REVOKED:
            self.revoked += 1
        if event.type is not EventType.RECALL or self.manner == "never":
            return
        if self.manner == "late":
            self.stop.wait(self.rng.uniform(0.5, 2) * RECALL_SECONDS)
        elif self.manner == "inside a read":
            with open(path, "rb", buffering=0) as file:
                begin = time.monotonic()
                os.pread(file.fileno(), 4 * BLOCK, self.rng.randrange(FILE_SIZE))
                self.note("read", begin)
        begin = time.monotonic()
        holder.give_back(event.offset, event.length, file=event.file)
        self.note("give_back", begin)
        self.answered += 1


class Worker(threading.Thread):
    """Changes files through the mount, and remembers its longest wait in one queue."""

    def __init__(self, root: Path, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"worker-{number}")
        self.root, self.stop = root, stop
        self.rng = random.Random(1000 + number)
        self.failed: BaseException | None = None
        self.longest = ("", 0.0)
        self.done = 0

    def run(self) -> None:
        calls = [self.write, self.write, self.truncate, self.clone, self.extend, self.read]
        try:
            while not self.stop.is_set():
                call = self.rng.choice(calls)
                begin = time.monotonic()
                call(self.root / f"f{self.rng.randrange(FILES)}")
                queues = 2 if call == self.clone else 1
                took = (time.monotonic() - begin) / queues
                self.done += 1
                if took > self.longest[1]:
                    self.longest = (call.__name__, took)
        except BaseException as error:
            self.failed = error

    def write(self, path: Path) -> None:
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"w" * 3 * BLOCK, self.rng.randrange(FILE_SIZE))

    def read(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), FILE_SIZE, 0)

    def truncate(self, path: Path) -> None:
        os.truncate(path, self.rng.randrange(FILE_SIZE))

    def extend(self, path: Path) -> None:
        with open(path, "r+b", buffering=0) as file:
            os.ftruncate(file.fileno(), FILE_SIZE)

    def clone(self, path: Path) -> None:
        other = self.root / f"f{self.rng.randrange(FILES)}"
        if other == path:
            return
        with open(path, "rb") as source, open(other, "r+b") as target:
            os.copy_file_range(source.fileno(), target.fileno(), 64 * BLOCK, 0, 0)


def test_nobody_waits_longer_than_the_recall_deadline(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, f"recall={RECALL_SECONDS}")
    for number in range(FILES):
        (mounted.mountpoint / f"f{number}").write_bytes(b"0" * (FILE_SIZE // 2))
    stop = threading.Event()
    holders = [Holder(mounted.mountpoint, number, stop) for number in range(HOLDERS)]
    workers = [Worker(mounted.mountpoint, number, stop) for number in range(4)]
    for thread in [*holders, *workers]:
        thread.start()
    time.sleep(SECONDS)
    stop.set()
    for thread in [*holders, *workers]:
        thread.join(10 * BOUND)
        assert not thread.is_alive(), f"{thread.name} does not end"
        assert thread.failed is None, f"{thread.name}: {thread.failed!r}"
    for thread in [*holders, *workers]:
        print(thread.name, *thread.longest)
        assert thread.longest[1] < BOUND, f"{thread.name} waited: {thread.longest}"
    assert all(worker.done > 5 for worker in workers)
    assert sum(holder.got for holder in holders) > 100
    assert sum(holder.answered for holder in holders) > 10
    assert sum(holder.revoked for holder in holders) > 0
    mounted.unmount()
    extfs("fsck", loop_device)
