"""Bad input to the control file's calls: a clear error, and everything as it was.

Each table names what is wrong and the errno that says so. After every refused call the file's
bytes, size and map and the free space are what they were before.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ExtfsRunner, Mounted
from control_calls import (
    ALL,
    ANY,
    ATOMIC,
    BLOCK,
    CLONE,
    COLLAPSE,
    COMMIT,
    DEDUPE,
    EVENT_SOCKET,
    EVENTS,
    EXCHANGE,
    FENCED,
    GET,
    HANDLE,
    HOLDER_GONE,
    HOLDER_REGISTER,
    INFO,
    INSERT,
    INVALID_DATA,
    LIST,
    MAP,
    MTIME,
    PIN,
    READ,
    RECALL,
    RETURN,
    RW,
    SHUTDOWN,
    TO_THE_END,
    WAIT,
    WATCH,
    EventsCall,
    EventSocketCall,
    Handle,
    HandleCall,
    Holder,
    HolderCall,
    InfoCall,
    ListCall,
    MapCall,
    PairCall,
    RecallCall,
    ReturnCall,
    ShiftCall,
    WatchCall,
    as_user,
    call,
    command,
    commit_call,
    handle_of,
    info,
    layout_call,
    refusal,
    refused,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

USER = 12345
BLOCKS = 8
LIMIT = (1 << 63) - BLOCK
"""The last block of the largest file begins here."""


@dataclass
class World:
    """A mount with a file of whole blocks, a hole behind them, and two holders."""

    root: Path
    control: int
    file: int
    handle: Any
    holder: Holder
    other: Holder

    def state(self) -> tuple[object, ...]:
        os.lseek(self.file, 0, os.SEEK_SET)
        extents = call(self.file, MAP, MapCall(length=TO_THE_END))
        space = info(self.control)
        return (
            os.fstat(self.file).st_size,
            os.pread(self.file, BLOCKS * BLOCK, 0),
            bytes(extents.extents)[: 32 * extents.count],
            space.free,
            space.quarantined,
        )

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        before = self.state()
        yield
        assert self.state() == before

    def outcomes(self, cases: dict[str, tuple[str, Callable[[], object]]]) -> dict[str, str]:
        """What the calls were refused with, by what is wrong with them."""
        found = {}
        for what, (_, function) in cases.items():
            with self.nothing_changes():
                found[what] = refusal(function) or "done"
        return found

    def refuses(self, cases: dict[str, tuple[str, Callable[[], object]]]) -> None:
        assert self.outcomes(cases) == {what: expected for what, (expected, _) in cases.items()}


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def world(mounted: Mounted) -> Iterator[World]:
    root = mounted.mountpoint
    path = root / "file"
    path.write_bytes(b"content!" * (BLOCKS * BLOCK // 8))
    os.truncate(path, 2 * BLOCKS * BLOCK)
    with (
        descriptor(root / ".extfs/control", os.O_RDWR) as control,
        descriptor(path, os.O_RDWR) as file,
    ):
        os.fsync(file)
        yield World(root, control, file, handle_of(file), Holder(control), Holder(control))


# ---- every call --------------------------------------------------------------------------------


def every_call(world: World) -> dict[int, Any]:
    """Each call's number and a struct that is right, apart from being one of nothing."""
    who = {"holder": world.holder.id, "key": world.holder.key}
    target = {"file": world.handle, "offset": 0, "length": BLOCK}
    pair = {**target, "other": world.handle, "other_offset": 2 * BLOCK}
    commit = commit_call(1)(**who, file=world.handle, count=1)
    commit.ranges[0].length = BLOCK
    return {
        MAP: MapCall(file=world.handle, length=BLOCK),
        INFO: InfoCall(),
        HANDLE: HandleCall(),
        HOLDER_REGISTER: HolderCall(),
        HOLDER_GONE: HolderCall(id=world.other.id, key=world.other.key),
        FENCED: HolderCall(id=world.holder.id),
        GET: layout_call(4)(**who, **target, iomode=READ, count=4),
        COMMIT: commit,
        RETURN: ReturnCall(**who, **target, iomode=ANY),
        RECALL: RecallCall(**target, iomode=ANY),
        LIST: ListCall(file=world.handle),
        WATCH: WatchCall(**who, file=world.handle),
        EVENTS: EventsCall(),
        EXCHANGE: PairCall(**pair),
        CLONE: PairCall(**pair),
        DEDUPE: PairCall(**pair),
        COLLAPSE: ShiftCall(**target),
        INSERT: ShiftCall(**target),
        SHUTDOWN: HandleCall(),
        EVENT_SOCKET: EventSocketCall(fd=-1),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", -1),
        ("size", 1),
        ("flags", 1 << 31),
        ("flags", 0x40),
        ("reserved", 1),
    ],
    ids=["size too small", "size too large", "unknown flag", "another", "reserved"],
)
def test_a_struct_that_is_not_as_the_header_says(world: World, field: str, value: int) -> None:
    for nr, struct in every_call(world).items():
        struct.size = ctypes.sizeof(struct)
        if field == "size":
            struct.size += value
        elif field == "flags":
            struct.flags |= value
        else:
            struct.reserved[len(struct.reserved) - 1] = value
        for fd in (world.control, world.file):
            with world.nothing_changes():
                assert refused(fd, nr, struct) == "EINVAL", (hex(nr), field, fd)


def test_a_command_that_carries_too_little(world: World) -> None:
    """The size of the command is not that of the struct."""

    def short(nr: int, content: bytearray) -> None:
        fcntl.ioctl(world.control, command(nr, len(content)), content)

    for nr, struct in every_call(world).items():
        for size in (4, 8, ctypes.sizeof(struct) - 8):
            content = bytearray(struct)[:size]
            content[:4] = size.to_bytes(4, "little")
            with world.nothing_changes():
                assert refusal(partial(short, nr, content)) == "EINVAL", (hex(nr), size)


def test_a_count_that_is_not_the_struct(world: World) -> None:
    get = every_call(world)[GET]
    for count in (0, 1, 3, 5, 1 << 28, (1 << 32) - 1):
        get.count = count
        with world.nothing_changes():
            assert refused(world.control, GET, get) == "EINVAL"
    commit = every_call(world)[COMMIT]
    for count in (0, 2, 1 << 28, (1 << 32) - 1):
        commit.count = count
        with world.nothing_changes():
            assert refused(world.control, COMMIT, commit) == "EINVAL"


# ---- files and who asks ------------------------------------------------------------------------

TARGETED = [MAP, GET, COMMIT, RETURN, RECALL, LIST, WATCH, EXCHANGE, CLONE, COLLAPSE, INSERT]


def test_handles_that_name_nothing(world: World) -> None:
    ino, generation = world.handle.ino, world.handle.generation
    for nr in TARGETED:
        struct = every_call(world)[nr]
        for handle, expected in (
            (Handle(ino, generation + 1), "ESTALE"),
            (Handle(ino + 1000, generation), "ESTALE"),
            (Handle(1 << 62, generation), "ESTALE"),
            (Handle((1 << 64) - 1, 0), "ESTALE"),
            (Handle(0, 0), "EINVAL"),
            (Handle(ino, generation, 1), "EINVAL"),
        ):
            struct.file = handle
            with world.nothing_changes():
                assert refused(world.control, nr, struct) == expected, (hex(nr), handle.ino)


def test_targets_that_have_no_layout(world: World) -> None:
    """A directory and a fifo, by their handles; a directory by its descriptor."""
    os.mkdir(world.root / "directory")
    with descriptor(world.root / "directory", os.O_RDONLY) as directory:
        handle = handle_of(directory)
        struct = every_call(world)[GET]
        struct.file = Handle()
        assert refused(directory, GET, struct) == "EISDIR"
    os.mkfifo(world.root / "fifo")
    fifo = Handle(os.stat(world.root / "fifo").st_ino, handle.generation)
    assert stat.S_ISFIFO(os.stat(world.root / "fifo").st_mode)
    for nr in TARGETED[1:]:
        struct = every_call(world)[nr]
        with world.nothing_changes():
            struct.file = handle
            assert refused(world.control, nr, struct) == "EISDIR", hex(nr)
            struct.file = fifo
            assert refused(world.control, nr, struct) in ("EINVAL", "ESTALE"), hex(nr)


def test_a_descriptor_that_is_open_for_reading(world: World) -> None:
    calls = every_call(world)
    calls[GET].iomode = RW
    pin = every_call(world)[GET]
    pin.iomode, pin.time_ms = PIN, 1000
    commit = commit_call(0)(holder=world.holder.id, key=world.holder.key, file_size=1)
    cases = [(GET, calls[GET]), (GET, pin), (COMMIT, commit)]
    cases += [(nr, calls[nr]) for nr in (EXCHANGE, CLONE, DEDUPE, COLLAPSE, INSERT)]
    with descriptor(world.root / "file", os.O_RDONLY) as reader:
        for nr, struct in cases:
            with world.nothing_changes():
                assert refused(reader, nr, struct) == "EBADF", hex(nr)


def test_who_does_not_own_the_file(world: World) -> None:
    """Not even with a descriptor that is open for writing: nobody is to be stalled by a guest."""
    os.chmod(world.root / "file", 0o666)
    other = world.file
    calls = every_call(world)
    pin = every_call(world)[GET]
    pin.iomode, pin.time_ms = PIN, 1000
    rw = every_call(world)[GET]
    rw.iomode = RW
    for nr, struct in ((GET, calls[GET]), (GET, pin), (GET, rw), (RECALL, calls[RECALL])):
        for fd in (other, world.control):
            with world.nothing_changes():
                assert as_user(USER, partial(refused, fd, nr, struct)) == "EACCES"
    for nr in (LIST, WATCH):
        assert as_user(USER, partial(refused, world.control, nr, calls[nr])) == "EACCES"
    for nr in (EXCHANGE, CLONE, DEDUPE, COLLAPSE, INSERT):
        with world.nothing_changes():
            assert as_user(USER, partial(refused, world.control, nr, calls[nr])) == "EPERM"
    secret = world.root / "secret"
    secret.write_bytes(bytes(BLOCK))
    with open(secret, "rb") as source:
        calls[CLONE].other = handle_of(source.fileno())
    calls[CLONE].other_offset = 0
    with world.nothing_changes():
        assert as_user(USER, lambda: refused(other, CLONE, calls[CLONE])) == "EACCES"


def test_holders_that_are_not_the_callers(world: World) -> None:
    for nr in (GET, COMMIT, RETURN, WATCH):
        struct = every_call(world)[nr]
        for holder, key, expected in (
            (world.holder.id, world.holder.key ^ 1, "EKEYREJECTED"),
            (world.holder.id, world.other.key, "EKEYREJECTED"),
            (world.other.id + 1000, world.holder.key, "ENOENT"),
            (0, 0, "ENOENT"),
        ):
            struct.holder, struct.key = holder, key
            with world.nothing_changes():
                assert refused(world.control, nr, struct) == expected, hex(nr)


# ---- ranges ------------------------------------------------------------------------------------


def test_ranges_of_layout_get(world: World) -> None:
    get = world.holder.get
    handle = world.handle
    world.refuses(
        {
            "nothing": ("EINVAL", lambda: get(handle, 0, 0)),
            "overflow": ("EINVAL", lambda: get(handle, BLOCK, TO_THE_END - 1, READ)),
            "past the limit": ("EFBIG", lambda: get(handle, LIMIT, 2 * BLOCK)),
            "far past the limit": ("EFBIG", lambda: get(handle, 1 << 63, BLOCK)),
            "RW without an end": ("EINVAL", lambda: get(handle, 0, TO_THE_END)),
            "more at least": ("EINVAL", lambda: get(handle, 0, BLOCK, min_length=BLOCK + 1)),
            "iomode 0": ("EINVAL", lambda: get(handle, 0, BLOCK, 0)),
            "iomode ANY": ("EINVAL", lambda: get(handle, 0, BLOCK, ANY)),
            "iomode 5": ("EINVAL", lambda: get(handle, 0, BLOCK, 5)),
            "time without PIN": ("EINVAL", lambda: get(handle, 0, BLOCK, RW, time_ms=1)),
            "PIN without time": ("EINVAL", lambda: get(handle, 0, BLOCK, PIN)),
            "PIN too long": ("EINVAL", lambda: get(handle, 0, BLOCK, PIN, time_ms=60001)),
            "ATOMIC to read": ("EINVAL", lambda: get(handle, 0, BLOCK, READ, ATOMIC)),
            "too much room": ("EINVAL", lambda: get(handle, 0, BLOCK, room=401)),
        }
    )


def test_ranges_of_layout_commit(world: World) -> None:
    commit = world.holder.commit
    handle = world.handle
    good = (0, BLOCK)
    world.refuses(
        {
            "nothing": ("EINVAL", lambda: commit(handle, [(0, 0)])),
            "unaligned offset": ("EINVAL", lambda: commit(handle, [good, (512, BLOCK)])),
            "unaligned length": ("EINVAL", lambda: commit(handle, [good, (BLOCK, 512)])),
            "overflow": ("EINVAL", lambda: commit(handle, [(1 << 63, 1 << 63)])),
            "to the end": ("EINVAL", lambda: commit(handle, [(0, TO_THE_END)])),
            "past the limit": ("EFBIG", lambda: commit(handle, [(LIMIT, 2 * BLOCK)])),
            "a size past the limit": ("EFBIG", lambda: commit(handle, [good], 1 << 63)),
            "a time not asked for": ("EINVAL", lambda: commit(handle, [good], mtime_sec=1)),
            "nanoseconds": (
                "EINVAL",
                lambda: commit(handle, [good], flags=MTIME, mtime_nsec=10**9),
            ),
        }
    )


def test_ranges_of_layout_return_and_recall(world: World) -> None:
    def give_back(offset: int, length: int, **fields: int) -> object:
        struct = ReturnCall(
            holder=world.holder.id,
            key=world.holder.key,
            file=world.handle,
            iomode=fields.pop("iomode", ANY),
            offset=offset,
            length=length,
            **fields,
        )
        return call(world.control, RETURN, struct)

    def recall(offset: int, length: int, **fields: int) -> object:
        struct = RecallCall(
            file=world.handle,
            iomode=fields.pop("iomode", ANY),
            offset=offset,
            length=length,
            **fields,
        )
        return call(world.control, RECALL, struct)

    world.refuses(
        {
            "return of nothing": ("EINVAL", lambda: give_back(0, 0)),
            "return, unaligned offset": ("EINVAL", lambda: give_back(1, BLOCK)),
            "return, unaligned length": ("EINVAL", lambda: give_back(0, BLOCK - 1)),
            "return, overflow": ("EINVAL", lambda: give_back(1 << 63, 1 << 63)),
            "return, iomode": ("EINVAL", lambda: give_back(0, BLOCK, iomode=0)),
            "return, padding": ("EINVAL", lambda: give_back(0, BLOCK, reserved0=1)),
            "return of all, padding": ("EINVAL", lambda: give_back(0, 0, flags=ALL, reserved0=1)),
            "recall of nothing": ("EINVAL", lambda: recall(0, 0)),
            "recall, overflow": ("EINVAL", lambda: recall(1 << 63, 1 << 63)),
            "recall past the limit": ("EFBIG", lambda: recall(LIMIT, 2 * BLOCK)),
            "recall, iomode": ("EINVAL", lambda: recall(0, BLOCK, iomode=9)),
            "recall, padding": ("EINVAL", lambda: recall(0, BLOCK, reserved0=1)),
        }
    )


def test_ranges_of_changes_of_the_map(world: World) -> None:
    cases: dict[str, tuple[str, Callable[[], object]]] = {}

    def pair(nr: int, offset: int, other_offset: int, length: int) -> Callable[[], object]:
        struct = PairCall(
            file=world.handle,
            other=world.handle,
            offset=offset,
            other_offset=other_offset,
            length=length,
        )
        return lambda: call(world.control, nr, struct)

    def shift(nr: int, offset: int, length: int) -> Callable[[], object]:
        struct = ShiftCall(file=world.handle, offset=offset, length=length)
        return lambda: call(world.control, nr, struct)

    for name, nr in (("exchange", EXCHANGE), ("clone", CLONE), ("dedupe", DEDUPE)):
        cases[f"{name} of nothing"] = ("EINVAL", pair(nr, 0, BLOCK, 0))
        cases[f"{name}, offset"] = ("EINVAL", pair(nr, 1, BLOCK, BLOCK))
        cases[f"{name}, other offset"] = ("EINVAL", pair(nr, 0, BLOCK + 1, BLOCK))
        cases[f"{name}, overflow"] = ("EFBIG", pair(nr, 0, BLOCK, TO_THE_END - BLOCK + 1))
        cases[f"{name} past the limit"] = ("EFBIG", pair(nr, LIMIT, 0, 2 * BLOCK))
    cases["exchange, length"] = ("EINVAL", pair(EXCHANGE, 0, BLOCK, 1))
    for name, nr in (("collapse", COLLAPSE), ("insert", INSERT)):
        cases[f"{name} of nothing"] = ("EINVAL", shift(nr, 0, 0))
        cases[f"{name}, offset"] = ("EINVAL", shift(nr, 1, BLOCK))
        cases[f"{name}, length"] = ("EINVAL", shift(nr, 0, BLOCK + 1))
        cases[f"{name}, overflow"] = ("EINVAL", shift(nr, 1 << 63, 1 << 63))
        cases[f"{name} past the limit"] = ("EFBIG", shift(nr, LIMIT, 2 * BLOCK))
    world.refuses(cases)


# ---- commits by write(2) -----------------------------------------------------------------------


def test_a_write_that_is_not_a_commit(world: World) -> None:
    good = bytes(world.holder.commit_struct(world.handle, [(0, BLOCK)]))
    world.refuses(
        {
            "a word": ("EINVAL", lambda: os.write(world.control, b"word")),
            "one byte less": ("EINVAL", lambda: os.write(world.control, good[:-1])),
            "one byte more": ("EINVAL", lambda: os.write(world.control, good + b"\0")),
            "two at once": ("EINVAL", lambda: os.write(world.control, good + good)),
            "zeros": ("EINVAL", lambda: os.write(world.control, bytes(1 << 20))),
            "not held": ("ENXIO", lambda: os.write(world.control, good)),
        }
    )
    with descriptor(world.root / ".extfs/control", os.O_RDONLY) as reader:
        assert refusal(lambda: os.write(reader, good)) == "EBADF"


# ---- layouts that are not held -----------------------------------------------------------------


def test_commits_of_what_is_not_held(world: World) -> None:
    """Outside the grant, another holder's, newer than it knows of, after a return."""
    handle, holder, other = world.handle, world.holder, world.other
    start = BLOCKS * BLOCK  # in the hole
    layout = holder.get(handle, start, 4 * BLOCK)
    assert layout.next == start + 4 * BLOCK
    assert {extent.state for extent in layout.extents[: layout.count]} == {INVALID_DATA}
    world.refuses(
        {
            "before it": ("ENXIO", lambda: holder.commit(handle, [(start - BLOCK, BLOCK)])),
            "across its end": ("ENXIO", lambda: holder.commit(handle, [(start, 5 * BLOCK)])),
            "one of two": (
                "ENXIO",
                lambda: holder.commit(handle, [(start, BLOCK), (start + 4 * BLOCK, BLOCK)]),
            ),
            "another's": ("ENXIO", lambda: other.commit(handle, [(start, BLOCK)])),
            "newer than known": (
                "ENXIO",
                lambda: holder.commit(handle, [(start, BLOCK)], seq=layout.seq - 1),
            )
            if layout.seq > 1
            else ("EINVAL", lambda: holder.commit(handle, [(0, 0)])),
            "a size outside": (
                "ERANGE",
                lambda: holder.commit(handle, [(start, BLOCK)], 4 * BLOCKS * BLOCK),
            ),
        }
    )
    holder.give_back(handle, start + BLOCK, BLOCK)
    with world.nothing_changes():
        assert refusal(lambda: holder.commit(handle, [(start, 4 * BLOCK)])) == "ENXIO"
    holder.give_back(handle)
    with world.nothing_changes():
        assert refusal(lambda: holder.commit(handle, [(start, BLOCK)])) == "ENXIO"


def test_a_read_layout_commits_nothing(world: World) -> None:
    world.holder.get(world.handle, 0, BLOCK, READ)
    with world.nothing_changes():
        assert refusal(lambda: world.holder.commit(world.handle, [(0, BLOCK)])) == "ENXIO"


def test_no_space_half_way_leaves_nothing_behind(
    make_loop: Callable[..., Any], extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    device = make_loop(128 << 20)
    extfs("mkfs", device)
    root = mount_extfs(device).mountpoint
    (root / "file").touch()
    with (
        descriptor(root / ".extfs/control", os.O_RDWR) as control,
        descriptor(root / "file", os.O_RDWR) as file,
    ):
        handle, holder = handle_of(file), Holder(control)
        before = info(control).free
        for flags in (0, WAIT, ATOMIC, 0, WAIT, ATOMIC):
            get = partial(holder.get, handle, 0, 1 << 30, RW, flags, min_length=1 << 30)
            assert refusal(get) == "ENOSPC"
            assert call(file, MAP, MapCall(length=TO_THE_END)).count == 0
            assert call(file, LIST, ListCall()).count == 0
            # More: blocks that metadata kept in reserve were asked for too.
            assert info(control).free >= before
            before = info(control).free
