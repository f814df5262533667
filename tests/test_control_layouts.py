"""Layouts through the control file of a real mount: a holder that writes the device itself."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Mounted
from control_calls import (
    ALL,
    ANY,
    ATOMIC,
    BLOCK,
    CLONE,
    COLLAPSE,
    EVENT_OVERFLOW,
    EVENT_PIN_EXPIRED,
    EVENT_RECALL,
    EXCHANGE,
    GET,
    INSERT,
    INVALID_DATA,
    LAZY,
    LIST,
    NONE_DATA,
    PIN,
    READ,
    READ_DATA,
    READ_WRITE_DATA,
    RECALL,
    RECALL_FLAG,
    RETURN,
    RW,
    WAIT,
    Holder,
    ListCall,
    PairCall,
    RecallCall,
    ReturnCall,
    ShiftCall,
    call,
    command,
    handle_of,
    has_events,
    layout_call,
    refusal,
    refused,
    take_events,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

MIB = 1 << 20
COMMIT_RANGES_MAX = 65000


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass
class World:
    """A mount, a control descriptor, an empty file, and a holder that can write the device."""

    root: Path
    control: int
    device: int
    path: Path
    file: int
    handle: Any
    holder: Holder

    def content(self, offset: int, length: int) -> bytes:
        """What others read, through the page cache."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def grants(self) -> list[tuple[int, int, int]]:
        answer = call(self.file, LIST, ListCall())
        return [
            (grant.offset, grant.length, grant.iomode) for grant in answer.grants[: answer.count]
        ]


@pytest.fixture
def world(mounted: Mounted) -> Iterator[World]:
    root = mounted.mountpoint
    path = root / "file"
    path.touch()
    with (
        descriptor(root / ".extfs/control", os.O_RDWR) as control,
        descriptor(mounted.device, os.O_RDWR | os.O_DIRECT) as device,
        descriptor(path, os.O_RDWR) as file,
    ):
        handle = handle_of(file)
        yield World(root, control, device, path, file, handle, Holder(control, device))


def states(layout: Any) -> list[tuple[int, int, int]]:
    return [(e.offset, e.length, e.state) for e in layout.extents[: layout.count]]


# ---- get, write, commit ------------------------------------------------------------------------


def test_what_a_holder_wrote_is_there_after_the_commit(world: World) -> None:
    holder, handle = world.holder, world.handle
    layout = holder.get(handle, 0, MIB)
    assert (layout.offset, layout.next, layout.file_size) == (0, MIB, 0)
    assert states(layout) == [(0, MIB, INVALID_DATA)]
    assert world.grants() == [(0, MIB, RW)]
    holder.write(layout, b"w")
    assert world.content(0, MIB) == b""
    answer = holder.commit(handle, [(0, MIB)], MIB - 5)
    assert answer.file_size == MIB - 5
    assert os.stat(world.path).st_size == MIB - 5
    assert world.content(0, MIB) == b"w" * (MIB - 5)
    again = holder.get(handle, 0, MIB)
    assert states(again) == [(0, MIB, READ_WRITE_DATA)]
    assert again.seq > layout.seq
    holder.give_back(handle)
    assert world.grants() == []


def test_get_rounds_outwards_and_says_so(world: World) -> None:
    layout = world.holder.get(world.handle, BLOCK + 1, BLOCK)
    assert (layout.offset, layout.next) == (BLOCK, 3 * BLOCK)
    assert states(layout) == [(BLOCK, 2 * BLOCK, INVALID_DATA)]


def test_an_answer_is_as_short_as_what_it_says(world: World) -> None:
    os.pwrite(world.file, b"x" * BLOCK, 0)
    kind = layout_call(4)
    holder = world.holder
    struct = kind(
        holder=holder.id, key=holder.key, file=world.handle, iomode=READ, count=4, length=BLOCK
    )
    ctypes.memset(struct.extents, 0xAB, ctypes.sizeof(struct.extents))
    call(world.control, GET, struct)
    assert struct.count == 1
    assert states(struct) == [(0, BLOCK, READ_DATA)]
    assert bytes(struct.extents)[32:] == b"\xab" * 96


def test_a_read_layout_allocates_nothing(world: World) -> None:
    os.pwrite(world.file, b"x" * BLOCK, 4 * BLOCK)
    layout = world.holder.get(world.handle, 0, 8 * BLOCK, READ)
    assert states(layout)[:2] == [(0, 4 * BLOCK, NONE_DATA), (4 * BLOCK, BLOCK, READ_DATA)]
    assert layout.extents[0].physical == 0
    memory = mmap.mmap(-1, BLOCK)
    assert os.preadv(world.device, [memory], layout.extents[1].physical) == BLOCK
    assert memory[:] == b"x" * BLOCK


def test_calls_on_the_files_own_descriptor(world: World) -> None:
    """The same calls without the control file, and without a handle."""
    holder = Holder(world.file, world.device)
    layout = holder.get((0, 0, 0), 0, 4 * BLOCK)
    holder.write(layout, b"o")
    holder.commit((0, 0, 0), [(0, 4 * BLOCK)], 4 * BLOCK, flags=LAZY)
    assert world.content(0, 4 * BLOCK) == b"o" * 4 * BLOCK
    holder.give_back((0, 0, 0))
    assert world.grants() == []


def test_pages_that_the_kernel_has_are_dropped(world: World) -> None:
    """Read, mapped and written through the mount before: both ways see each other."""
    os.pwrite(world.file, b"a" * 8 * BLOCK, 0)
    with mmap.mmap(world.file, 8 * BLOCK) as mapped:
        mapped[:BLOCK] = b"m" * BLOCK  # dirty in the page cache only
        assert mapped[BLOCK : 2 * BLOCK] == b"a" * BLOCK
        layout = world.holder.get(world.handle, 0, 8 * BLOCK)
        assert states(layout) == [(0, 8 * BLOCK, READ_WRITE_DATA)]
        memory = mmap.mmap(-1, BLOCK)
        os.preadv(world.device, [memory], layout.extents[0].physical)
        assert memory[:] == b"m" * BLOCK  # written back before the answer
        world.holder.write(layout, b"b")
        world.holder.commit(world.handle, [])
        assert mapped[:] == b"b" * 8 * BLOCK
    assert world.content(0, 8 * BLOCK) == b"b" * 8 * BLOCK
    world.holder.write(layout, b"c")
    world.holder.give_back(world.handle)
    assert world.content(0, 8 * BLOCK) == b"c" * 8 * BLOCK


@pytest.mark.parametrize("unaligned", [0, 16, BLOCK - 8])
def test_the_longest_commit_is_one_write(world: World, unaligned: int) -> None:
    """65,000 ranges, wherever in a page they begin."""
    holder, length = world.holder, 2 * COMMIT_RANGES_MAX * BLOCK
    layout = holder.get(world.handle, 0, length)
    while layout.next < length:
        layout = holder.get(world.handle, layout.next, length - layout.next)
    ranges = [(2 * at * BLOCK, BLOCK) for at in range(COMMIT_RANGES_MAX)]
    content = bytes(holder.commit_struct(world.handle, ranges, length))
    memory = mmap.mmap(-1, 2 * MIB)
    memory[unaligned : unaligned + len(content)] = content
    view = memoryview(memory)[unaligned : unaligned + len(content)]
    assert os.write(world.control, view) == len(content)
    view.release()
    assert os.stat(world.path).st_size == length
    assert world.content(BLOCK, BLOCK) == bytes(BLOCK)
    with open(world.path, "rb") as file:
        assert os.lseek(file.fileno(), BLOCK, os.SEEK_DATA) == 2 * BLOCK


def test_atomic_swaps_all_at_once(world: World) -> None:
    os.pwrite(world.file, b"old!" * BLOCK, 0)
    layout = world.holder.get(world.handle, 0, 4 * BLOCK, RW, ATOMIC)
    world.holder.write(layout, b"n")
    assert world.content(0, 4 * BLOCK) == b"old!" * BLOCK
    world.holder.commit(world.handle, [(0, BLOCK)])
    assert world.content(0, 4 * BLOCK) == b"n" * 4 * BLOCK


# ---- conflicts ---------------------------------------------------------------------------------


def answer_recalls(holder: Holder, handle: Any, stop: threading.Event, seen: list[Any]) -> None:
    """Return whatever is asked for."""
    while not stop.is_set():
        if not has_events(holder.control, 0.05):
            continue
        for event in take_events(holder.control):
            seen.append(event)
            if event.type == EVENT_RECALL:
                holder.give_back(handle, event.offset, event.length)


@contextmanager
def answering(holder: Holder, handle: Any) -> Iterator[list[Any]]:
    stop, seen = threading.Event(), list[Any]()
    thread = threading.Thread(target=answer_recalls, args=(holder, handle, stop, seen))
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_a_write_waits_for_the_return_and_no_longer(world: World) -> None:
    holder = world.holder
    layout = holder.get(world.handle, 0, 16 * BLOCK)
    holder.write(layout, b"h")
    holder.commit(world.handle, [(0, 16 * BLOCK)], 16 * BLOCK)
    with answering(holder, world.handle) as seen:
        begin = time.monotonic()
        os.pwrite(world.file, b"server", 4 * BLOCK)
        assert time.monotonic() - begin < 5
    recall = seen[0]
    assert (recall.type, recall.holder, recall.iomode) == (EVENT_RECALL, holder.id, RW)
    assert (recall.file.ino, recall.file.generation) == (world.handle.ino, world.handle.generation)
    assert recall.offset <= 4 * BLOCK < recall.offset + recall.length
    assert 0 < recall.left_ms <= 10000
    assert recall.grant_seq >= layout.seq
    assert world.content(4 * BLOCK, 8) == b"serverhh"
    assert (4 * BLOCK) not in [offset for offset, _, _ in world.grants()]


def test_a_conflict_is_again_later_or_waits(world: World) -> None:
    first, second = world.holder, Holder(world.control, world.device)
    first.get(world.handle, 0, 4 * BLOCK)

    def get(flags: int) -> Any:
        return second.get(world.handle, 0, 4 * BLOCK, RW, flags)

    assert refusal(lambda: get(0)) == "EAGAIN"
    os.set_blocking(world.control, False)
    assert refusal(lambda: take_events(world.control)) == "EAGAIN"
    assert refusal(lambda: get(RECALL_FLAG)) == "EAGAIN"
    assert [event.type for event in take_events(world.control)] == [EVENT_RECALL]
    second.get(world.handle, 4 * BLOCK, 4 * BLOCK)  # beside it
    first.give_back(world.handle)
    third = Holder(world.control, world.device)
    with answering(third, world.handle):
        third.get(world.handle, 0, 4 * BLOCK)
        assert first.get(world.handle, 0, 4 * BLOCK, RW, WAIT).next == 4 * BLOCK


WAITING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from control_calls import *
control = os.open(sys.argv[2], os.O_RDWR)
holder = Holder(control)
file = os.open(sys.argv[3], os.O_RDWR)
handle = handle_of(file)
print("waiting", flush=True)
{operation}
"""


@pytest.mark.parametrize(
    "operation",
    [
        "holder.get(handle, 0, BLOCK, RW, WAIT)",
        "os.pwrite(file, b'x' * BLOCK, 0)",
        "os.ftruncate(file, 0)",
        "call(control, COLLAPSE, ShiftCall(file=handle, offset=0, length=BLOCK))",
    ],
    ids=["get", "write", "truncate", "collapse"],
)
def test_who_waits_for_a_holder_can_be_killed(world: World, operation: str) -> None:
    os.pwrite(world.file, b"o" * 4 * BLOCK, 0)
    layout = world.holder.get(world.handle, 0, 4 * BLOCK)
    waiter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WAITING.format(operation=operation),
            Path(__file__).parent,
            world.root / ".extfs/control",
            world.path,
        ],
        stdout=subprocess.PIPE,
    )
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == b"waiting\n"
    assert has_events(world.control, 10)
    assert take_events(world.control)[0].type == EVENT_RECALL
    waiter.kill()
    assert waiter.wait(3) == -signal.SIGKILL
    waiter.stdout.close()
    # Nothing was done, and the layout is good until it is given back.
    world.holder.write(layout, b"h")
    world.holder.commit(world.handle, [(0, 4 * BLOCK)])
    world.holder.give_back(world.handle)
    assert world.content(0, 4 * BLOCK) == b"h" * 4 * BLOCK


class AlarmTestError(Exception):
    pass


def test_a_signal_ends_a_get_that_waits(world: World) -> None:
    def handler(*_: object) -> None:
        raise AlarmTestError

    other = Holder(world.control, world.device)
    world.holder.get(world.handle, 0, BLOCK)
    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        begin = time.monotonic()
        with pytest.raises((AlarmTestError, InterruptedError)):
            other.get(world.handle, 0, BLOCK, RW, WAIT)
        assert time.monotonic() - begin < 3
    finally:
        signal.signal(signal.SIGALRM, old)
    assert world.grants() == [(0, BLOCK, RW)]


def test_recall_asks_and_does_not_wait(world: World) -> None:
    world.holder.get(world.handle, 0, 4 * BLOCK)
    struct = RecallCall(file=world.handle, iomode=ANY, offset=BLOCK + 1, length=1)
    call(world.control, RECALL, struct)
    (event,) = take_events(world.control)
    assert (event.type, event.offset, event.length) == (EVENT_RECALL, BLOCK, BLOCK)
    world.holder.give_back(world.handle, BLOCK, BLOCK)
    assert world.grants() == [(0, BLOCK, RW), (2 * BLOCK, 2 * BLOCK, RW)]


def test_a_thousand_recalls_that_nobody_reads(world: World) -> None:
    """Bounded memory: an overflow says how many were lost."""
    for at in range(1100):
        world.holder.get(world.handle, 2 * at * BLOCK, BLOCK)
    call(world.control, RECALL, RecallCall(file=world.handle, iomode=ANY, length=1 << 40))
    os.set_blocking(world.control, False)
    events: list[Any] = []
    while refusal(lambda: events.extend(take_events(world.control))) is None:
        pass
    lost = sum(event.length for event in events if event.type == EVENT_OVERFLOW)
    assert lost > 0
    assert sum(event.type == EVENT_RECALL for event in events) + lost == 1100
    struct = ReturnCall(flags=ALL, holder=world.holder.id, key=world.holder.key)
    call(world.control, RETURN, struct)
    assert world.grants() == []


def test_list_goes_on_from_its_cursor(world: World) -> None:
    for at in range(700):
        world.holder.get(world.handle, 2 * at * BLOCK, BLOCK)
    found, cursor = [], 0
    while cursor != (1 << 64) - 1:
        answer = call(world.control, LIST, ListCall(file=world.handle, offset=cursor))
        found += [(grant.offset, grant.length) for grant in answer.grants[: answer.count]]
        cursor = answer.next
    assert found == [(2 * at * BLOCK, BLOCK) for at in range(700)]


def test_a_pin_keeps_the_map_for_its_time(world: World) -> None:
    os.pwrite(world.file, b"p" * 4 * BLOCK, 0)
    pin = world.holder.get(world.handle, 0, 4 * BLOCK, PIN, time_ms=500)
    assert states(pin) == [(0, 4 * BLOCK, READ_DATA)]
    begin = time.monotonic()
    os.ftruncate(world.file, 0)
    assert 0.3 < time.monotonic() - begin < 5
    assert EVENT_PIN_EXPIRED in [event.type for event in take_events(world.control)]


# ---- changes of the map ------------------------------------------------------------------------


def filled(path: Path, letters: bytes) -> None:
    path.write_bytes(b"".join(bytes([letter]) * BLOCK for letter in letters))


def letters_of(path: Path) -> bytes:
    content = path.read_bytes()
    assert all(
        content[at : at + BLOCK] == content[at : at + 1] * BLOCK
        for at in range(0, len(content), BLOCK)
    )
    return content[::BLOCK]


def test_exchange_collapse_and_insert_are_seen_through_the_cache(world: World) -> None:
    """The kernel has pages of everything, mapped too; every change is what the next reader sees."""
    filled(world.path, b"abcdefgh")
    other = world.root / "other"
    filled(other, b"ABCDEFGH")
    with descriptor(other, os.O_RDWR) as fd:
        there = handle_of(fd)
        assert letters_of(world.path) + letters_of(other) == b"abcdefghABCDEFGH"
        pair = PairCall(
            file=world.handle, other=there, offset=BLOCK, other_offset=4 * BLOCK, length=2 * BLOCK
        )
        with mmap.mmap(world.file, 8 * BLOCK) as mapped:
            mapped[BLOCK : 2 * BLOCK] = b"m" * BLOCK
            assert call(world.control, EXCHANGE, pair).done == 2 * BLOCK
            assert mapped[BLOCK : BLOCK + 1] == b"E"
        assert letters_of(world.path) == b"aEFdefgh"
        assert letters_of(other) == b"ABCDmcGH"
        call(fd, COLLAPSE, ShiftCall(offset=BLOCK, length=2 * BLOCK))
        assert other.stat().st_size == 6 * BLOCK
        assert letters_of(other) == b"ADmcGH"
        call(fd, INSERT, ShiftCall(offset=BLOCK, length=BLOCK))
        assert letters_of(other) == b"A\0DmcGH"
        clone = PairCall(other=world.handle, offset=0, other_offset=4 * BLOCK, length=4 * BLOCK)
        assert call(fd, CLONE, clone).done == 4 * BLOCK
        assert letters_of(other) == b"efghcGH"
        assert os.pread(fd, BLOCK, 0) == b"e" * BLOCK


# ---- holders that go away ----------------------------------------------------------------------

HOLDING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from control_calls import *
control = os.open(sys.argv[2], os.O_RDWR)
holder = Holder(control)
file = os.open(sys.argv[3], os.O_RDWR)
holder.get(handle_of(file), 0, 4 * BLOCK)
print("holding", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_stalls_nobody(world: World) -> None:
    """Nothing was committed: a hole, and who writes there goes on without a deadline."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDING,
            Path(__file__).parent,
            world.root / ".extfs/control",
            world.path,
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"holding\n"
    assert world.grants() == [(0, 4 * BLOCK, RW)]
    holder.kill()
    holder.wait()
    holder.stdout.close()
    begin = time.monotonic()
    os.pwrite(world.file, b"server", BLOCK)
    assert time.monotonic() - begin < 5
    assert world.content(0, 2 * BLOCK) == bytes(BLOCK) + b"server"


def test_a_command_of_another_size_is_another_room(world: World) -> None:
    """The number of extents is in the command: one call for each size, small ones stay small."""
    holder = world.holder
    for room in (1, 8, 400):
        kind = layout_call(room)
        struct = kind(
            holder=holder.id,
            key=holder.key,
            file=world.handle,
            iomode=RW,
            count=room,
            length=BLOCK,
        )
        assert ctypes.sizeof(kind) == 128 + 32 * room
        assert command(GET, ctypes.sizeof(kind)) >> 16 & 0x3FFF == 128 + 32 * room
        assert call(world.control, GET, struct).count == 1
    assert refused(world.control, GET, layout_call(401)(count=401)) == "EINVAL"
