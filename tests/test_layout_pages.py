"""What the kernel keeps of a file whose blocks a holder writes, while pages of it are locked.

A page is locked while a READ or WRITE of it is not answered. One that waits for a holder keeps it
locked until that holder returns, or its recall time is over: whoever waits for the kernel to drop
pages must not wait for that one, and nobody may read what the holder has replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from control_calls import (
    BLOCK,
    EVENT_RECALL,
    RECALL,
    RW,
    WAIT,
    Holder,
    RecallCall,
    call,
    handle_of,
    has_events,
    take_events,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

BLOCKS = 64
HALF = BLOCKS // 2
RECALL_SECONDS = 4.0
AT_ONCE = 1.0
"""Far more than a call takes, and far less than the recall time."""
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class World:
    """A file full of "a", and as many holders of other descriptors as are asked for."""

    def __init__(self, mounted: Mounted, stack: contextlib.ExitStack) -> None:
        self.root = mounted.mountpoint
        self.stack = stack
        self.path = self.root / "file"
        self.device = self.descriptor(mounted.device, os.O_RDWR | os.O_DIRECT)
        self.path.write_bytes(b"a" * BLOCKS * BLOCK)
        self.file = self.descriptor(self.path, os.O_RDWR)
        # one READ is what was asked for, and no more
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)
        os.fsync(self.file)
        self.handle = handle_of(self.file)

    def descriptor(self, path: Path, flags: int) -> int:
        fd = os.open(path, flags)
        self.stack.callback(os.close, fd)
        return fd

    def holder(self) -> Holder:
        return Holder(self.descriptor(self.root / ".extfs/control", os.O_RDWR), self.device)

    def read(self, first: int, count: int) -> bytes:
        """One letter of each block, through the page cache."""
        content = os.pread(self.file, count * BLOCK, first * BLOCK)
        assert len(content) == count * BLOCK
        return content[::BLOCK]

    def aside(self, work: Callable[[], object]) -> threading.Thread:
        """What will wait for a holder."""
        thread = threading.Thread(target=work)
        thread.start()
        self.stack.callback(thread.join)
        return thread


@pytest.fixture
def world(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> Iterator[World]:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, f"recall={RECALL_SECONDS:g}")
    with contextlib.ExitStack() as stack:
        yield World(mounted, stack)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < AT_ONCE, f"took {took:.2f} s"


def hears_a_recall(holder: Holder) -> None:
    assert has_events(holder.control, AT_ONCE), "the recall is not heard of"
    assert [event.type for event in take_events(holder.control)] == [EVENT_RECALL]


def lock_the_middle(world: World) -> tuple[Holder, Any]:
    """The first half is granted to the holder that is returned.

    Another one has the second half, says nothing when it is asked for it, and keeps a punch
    waiting; behind this one stands a READ of four blocks of each half, whose pages are locked.
    """
    mine, other = world.holder(), world.holder()
    layout = mine.get(world.handle, 0, HALF * BLOCK)
    other.get(world.handle, HALF * BLOCK, HALF * BLOCK)
    assert world.read(0, HALF - 4) == b"a" * (HALF - 4)
    punching = world.descriptor(world.path, os.O_RDWR)
    half = ctypes.c_long(HALF * BLOCK)
    world.aside(lambda: ctypes.CDLL(None).fallocate(punching, PUNCH, half, half))
    hears_a_recall(other)
    reader = world.aside(lambda: os.pread(world.file, 8 * BLOCK, (HALF - 4) * BLOCK))
    time.sleep(0.2)
    assert reader.is_alive()
    world.stack.callback(other.give_back, world.handle)
    return mine, layout


def test_a_commit_does_not_wait_for_a_page_that_waits_for_another_holder(world: World) -> None:
    mine, layout = lock_the_middle(world)
    mine.write(layout, b"b")
    with at_once():
        mine.commit(world.handle, [])
        assert world.read(0, HALF - 4) == b"b" * (HALF - 4)


def test_a_return_does_not_wait_for_it_either(world: World) -> None:
    mine, layout = lock_the_middle(world)
    mine.write(layout, b"b")
    with at_once():
        mine.give_back(world.handle)
        assert world.read(0, HALF - 4) == b"b" * (HALF - 4)


def test_nobody_else_waits_behind_such_a_page(world: World) -> None:
    """Neither who polls for events nor who wants another file's layout."""
    mine, _ = lock_the_middle(world)
    third = world.holder()
    other = world.root / "other"
    other.write_bytes(b"o" * BLOCK)
    handle = handle_of(world.descriptor(other, os.O_RDWR))
    assert other.read_bytes() == b"o" * BLOCK
    committing = world.aside(lambda: mine.commit(world.handle, []))
    time.sleep(0.1)
    with at_once():
        layout = third.get(handle, 0, BLOCK, RW, WAIT)
        assert not has_events(third.control, 0)
        call(
            world.descriptor(world.root / ".extfs/control", os.O_RDWR),
            RECALL,
            RecallCall(file=handle, iomode=RW, offset=0, length=BLOCK),
        )
        hears_a_recall(third)
        third.write(layout, b"p")
        third.commit(handle, [])
        assert other.read_bytes() == b"p" * BLOCK
    committing.join()


@pytest.mark.parametrize("cached", [7, 8])
def test_a_commit_under_a_recall_is_seen(world: World, cached: int) -> None:
    """A writer waits for this very holder, with a page locked, or (8) one that it shares."""
    holder = world.holder()
    layout = holder.get(world.handle, 0, 16 * BLOCK)
    assert world.read(0, cached) == b"a" * cached
    assert world.read(9, 7) == b"a" * 7
    writing = world.descriptor(world.path, os.O_RDWR)
    writer = world.aside(lambda: os.pwrite(writing, b"w" * 100, 7 * BLOCK + 10))
    hears_a_recall(holder)
    holder.write(layout, b"b")
    with at_once():
        holder.commit(world.handle, [])
        assert world.read(0, cached) == b"b" * cached
        assert world.read(9, 7) == b"b" * 7
        holder.give_back(world.handle)
        writer.join()
        assert world.read(0, 16) == b"b" * 16
    assert os.pread(world.file, BLOCK, 7 * BLOCK) == b"b" * 10 + b"w" * 100 + b"b" * (BLOCK - 110)


def test_a_mapping_shows_what_was_committed(world: World) -> None:
    """Where nobody has a page locked, the pages are gone when the commit is answered."""
    holder = world.holder()
    layout = holder.get(world.handle, 0, BLOCKS * BLOCK)
    with mmap.mmap(world.file, BLOCKS * BLOCK, prot=mmap.PROT_READ) as mapped:
        for letter in (b"b", b"c"):
            assert mapped[::BLOCK] != letter * BLOCKS
            holder.write(layout, letter)
            with at_once():
                holder.commit(world.handle, [])
            assert mapped[::BLOCK] == letter * BLOCKS
