"""The Python client of the control file: its structs against the C header, and what it sends and
understands, against a kernel that the test plays."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from control_calls import refusal

from extfs.control import client, structures
from extfs.control.client import (
    END,
    HERE,
    Descriptor,
    EventType,
    Extent,
    FileHandle,
    Iomode,
    LayoutState,
    MapState,
)
from extfs.control.structures import STRUCTURES
from extfs.control.waiting import TrioDescriptor, TrioHolder

NATIVE = Path(__file__).resolve().parent.parent / "native"

NUMBERS = {
    "EXTFS_IOC_VERSION": structures.VERSION,
    "EXTFS_IOC_EXT_SHARED": structures.EXTENT_SHARED,
    "EXTFS_IOC_EXT_LAYOUT": structures.EXTENT_LAYOUT,
    "EXTFS_IOC_MAP_EXTENTS": structures.MAP_EXTENTS,
    "EXTFS_HOLDER_RESUME": structures.HOLDER_RESUME,
    "EXTFS_HOLDER_CLIENT": structures.HOLDER_CLIENT,
    "EXTFS_LAYOUT_WAIT": structures.LAYOUT_WAIT,
    "EXTFS_LAYOUT_RECALL": structures.LAYOUT_RECALL,
    "EXTFS_LAYOUT_ATOMIC": structures.LAYOUT_ATOMIC,
    "EXTFS_PIN_MAX_MS": structures.PIN_MAX_MS,
    "EXTFS_LAYOUT_EXTENTS_MAX": structures.LAYOUT_EXTENTS_MAX,
    "EXTFS_COMMIT_LAZY": structures.COMMIT_LAZY,
    "EXTFS_COMMIT_MTIME": structures.COMMIT_MTIME,
    "EXTFS_COMMIT_IOCTL_MAX": structures.COMMIT_IOCTL_MAX,
    "EXTFS_COMMIT_RANGES_MAX": structures.COMMIT_RANGES_MAX,
    "EXTFS_RETURN_ALL": structures.RETURN_ALL,
    "EXTFS_LIST_GRANTS": structures.LIST_GRANTS,
    "EXTFS_WATCH_OFF": structures.WATCH_OFF,
    "EXTFS_EVENTS_MAX": structures.EVENTS_MAX,
    **{f"EXTFS_{mode.name}": int(mode) for mode in Iomode},
    **{f"EXTFS_{state.name}": int(state) for state in LayoutState},
    **{f"EXTFS_IOC_{state.name}": int(state) for state in MapState},
    **{f"EXTFS_EVENT_{kind.name}": int(kind) for kind in EventType},
    **{
        f"EXTFS_{name}": getattr(structures, name)
        for name in vars(structures)
        if name.startswith("IOC_")
    },
    **{f"EXTFS_IOC_LAYOUT_GET({n})": structures.layout_get_command(n) for n in (1, 7, 400)},
    **{
        f"EXTFS_IOC_LAYOUT_COMMIT({n})": structures.layout_commit_command(n)
        for n in (0, 1, structures.COMMIT_IOCTL_MAX)
    },
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says: sizes, offsets, numbers."""
    lines = []
    for name, structure in STRUCTURES.items():
        lines.append(f'P("{name}", sizeof(struct {name}));')
        for field in structure._fields_:
            member = f"((struct {name} *)0)->{field[0]}"
            lines.append(f'P("{name}.{field[0]}", offsetof(struct {name}, {field[0]}));')
            lines.append(f'P("{name}.{field[0]} size", sizeof({member}));')
    lines += [f'P("{name}", {name});' for name in NUMBERS]
    directory = tmp_path_factory.mktemp("control")
    (directory / "control.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        '#include "extfs_ioctl.h"\n'
        '#define P(name, value) printf("%s=%llu\\n", name, (unsigned long long)(value))\n'
        "int main(void)\n{\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    program = directory / "control"
    subprocess.run(
        [
            "gcc",
            "-std=c11",
            "-Wall",
            "-Werror",
            f"-I{NATIVE}",
            "-o",
            program,
            program.with_suffix(".c"),
        ],
        check=True,
    )
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {
        name: int(value)
        for name, value in (line.rsplit("=", 1) for line in output.split("\n") if line)
    }


def test_every_struct_of_the_header_has_one_in_python() -> None:
    text = (NATIVE / "extfs_ioctl.h").read_text()
    assert set(re.findall(r"^(?:struct|EXTFS_OPEN_STRUCT) (\w+) \{", text, re.MULTILINE)) == set(
        STRUCTURES
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_c_and_python_lay_structs_out_alike(name: str, compiled: dict[str, int]) -> None:
    structure = STRUCTURES[name]
    assert ctypes.sizeof(structure) == compiled[name]
    end = 0
    for member, *_ in structure._fields_:
        field = getattr(structure, member)
        assert field.offset == compiled[f"{name}.{member}"], member
        assert field.size == compiled[f"{name}.{member} size"], member
        assert field.offset == end, f"padding before {member}"
        end = field.offset + field.size
    assert end == compiled[name], "padding at the end"


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str, compiled: dict[str, int]) -> None:
    assert NUMBERS[name] == compiled[name]


def test_every_number_of_the_header_is_known() -> None:
    text = (NATIVE / "extfs_ioctl.h").read_text()
    names = set(re.findall(r"^#define (EXTFS_\w+)", text, re.MULTILINE))
    names -= {"EXTFS_IOCTL_H", "EXTFS_OPEN_STRUCT"}
    for body in re.findall(r"^enum \w+ \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        names |= set(re.findall(r"^\t(EXTFS_\w+)", body, re.MULTILINE))
    assert names == {name.partition("(")[0] for name in NUMBERS}


# ---- a kernel that the test plays --------------------------------------------------------------


class Kernel:
    """Stands in for ioctl(2): `serve` is given the command and the argument's bytes to change."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.serve: Callable[[int, ctypes.Array[ctypes.c_char]], int] = lambda command, argument: 0

    def ioctl(self, fd: int, command: int, address: int) -> int:
        memory = (ctypes.c_char * (command >> 16 & 0x3FFF)).from_address(address)
        self.calls.append((command, memory.raw))
        error = self.serve(command, memory)
        if error:
            ctypes.set_errno(error)
            return -1
        return 0

    def sent(self, structure: type[ctypes.Structure], index: int = -1) -> ctypes.Structure:
        return structure.from_buffer_copy(self.calls[index][1])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(client, "_libc", fake)
    return fake


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Descriptor]:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with Descriptor.of(path, write=True) as descriptor:
        yield descriptor


def fill(memory: ctypes.Array[ctypes.c_char], structure: ctypes.Structure, at: int = 0) -> None:
    ctypes.memmove(
        ctypes.addressof(memory) + at, ctypes.addressof(structure), ctypes.sizeof(structure)
    )


def test_get_sends_and_understands(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        call = structures.LayoutGet.from_buffer_copy(memory.raw)
        call.count, call.next, call.seq, call.generation, call.file_size = 2, 12288, 9, 8, 5000
        call.offset = 4096
        fill(memory, call)
        head, size = ctypes.sizeof(structures.LayoutGet), ctypes.sizeof(structures.LayoutExtent)
        fill(memory, structures.LayoutExtent(4096, 1 << 40, 4096, 0, 0), head)
        fill(memory, structures.LayoutExtent(8192, 1 << 41, 4096, 2, 0), head + size)
        return 0

    kernel.serve = serve
    holder = file.holder(3, 4)
    answer = holder.get(
        Iomode.RW,
        5000,
        7000,
        min_length=4096,
        wait=True,
        atomic=True,
        limit=10,
        file=FileHandle(77, 6),
    )
    sent = kernel.sent(structures.LayoutGet)
    assert kernel.calls[0][0] == structures.layout_get_command(10)
    assert (sent.size, sent.flags, sent.count) == (len(kernel.calls[0][1]), 5, 10)
    assert (sent.holder, sent.key, sent.file.ino, sent.file.generation) == (3, 4, 77, 6)
    assert (sent.iomode, sent.offset, sent.length) == (2, 5000, 7000)
    assert (sent.min_length, sent.time_ms) == (4096, 0)
    assert (answer.offset, answer.next, answer.length) == (4096, 12288, 8192)
    assert (answer.seq, answer.generation, answer.file_size) == (9, 8, 5000)
    assert [(e.offset, e.physical, e.length, e.state) for e in answer.extents] == [
        (4096, 1 << 40, 4096, LayoutState.READ_WRITE_DATA),
        (8192, 1 << 41, 4096, LayoutState.INVALID_DATA),
    ]
    assert answer.writable() == answer.extents


def test_get_all_goes_on_where_the_answer_ended(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        call = structures.LayoutGet.from_buffer_copy(memory.raw)
        call.count, call.next = 1, min(call.offset + 8192, 20480)
        fill(memory, call)
        extent = structures.LayoutExtent(call.offset, 0, call.next - call.offset, 2, 0)
        fill(memory, extent, ctypes.sizeof(structures.LayoutGet))
        return 0

    kernel.serve = serve
    seen: list[int] = []
    answers = file.holder(1, 2).get_all(Iomode.RW, 0, 20480, progress=seen.append)
    assert [(a.offset, a.next) for a in answers] == [(0, 8192), (8192, 16384), (16384, 20480)]
    assert seen == [8192, 16384, 20480]


def test_an_answer_without_progress_is_an_error(kernel: Kernel, file: Descriptor) -> None:
    with pytest.raises(OSError) as error:
        file.holder(1, 2).get_all(Iomode.READ, 4096, 4096)
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize("limit", [0, 401, -1])
def test_room_that_the_call_has_not(kernel: Kernel, file: Descriptor, limit: int) -> None:
    with pytest.raises(ValueError):
        file.holder(1, 2).get(Iomode.READ, 0, 4096, limit=limit)
    assert not kernel.calls


def test_commit_sends_and_understands(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        call = structures.LayoutCommit.from_buffer_copy(memory.raw)
        call.file_size = 1 << 33
        fill(memory, call)
        return 0

    kernel.serve = serve
    size = file.holder(3, 4).commit(
        [(0, 4096), (1 << 40, 8192)], file_size=77, seq=5, mtime=(-3, 999), lazy=True
    )
    assert size == 1 << 33
    command, raw = kernel.calls[0]
    assert command == structures.layout_commit_command(2)
    sent = structures.LayoutCommit.from_buffer_copy(raw)
    assert (sent.size, sent.flags, sent.count) == (len(raw), 0x18, 2)
    assert (sent.holder, sent.key, sent.seq, sent.file_size) == (3, 4, 5, 77)
    assert (sent.mtime_sec, sent.mtime_nsec) == (-3, 999)
    ranges = (structures.Range * 2).from_buffer_copy(raw, ctypes.sizeof(structures.LayoutCommit))
    assert [(r.offset, r.length) for r in ranges] == [(0, 4096), (1 << 40, 8192)]


def test_long_commits_are_written_to_the_control_file(kernel: Kernel, tmp_path: Path) -> None:
    many = [(index * 8192, 4096) for index in range(structures.COMMIT_IOCTL_MAX + 1)]
    path = tmp_path / "control"
    path.write_bytes(b"")
    with Descriptor(os.open(path, os.O_RDWR), "control", control=True) as control:
        assert control.holder(1, 2).commit(many, file=FileHandle(5, 6)) == 0
    assert not kernel.calls
    raw = path.read_bytes()
    sent = structures.LayoutCommit.from_buffer_copy(raw)
    assert (sent.size, sent.count, sent.file.ino) == (len(raw), len(many), 5)
    with Descriptor.of(path, write=True) as file:
        with pytest.raises(ValueError, match="control file"):
            file.holder(1, 2).commit(many)
        file.holder(1, 2).commit(many[:-1])
        with pytest.raises(ValueError):
            file.holder(1, 2).commit([(0, 4096)] * (structures.COMMIT_RANGES_MAX + 1))
    assert len(kernel.calls) == 1


def test_the_other_calls(kernel: Kernel, file: Descriptor) -> None:
    holder = file.register("a name", fence="cgroup:/x", client=True)
    sent = kernel.sent(structures.HolderCall)
    assert (sent.name, sent.fence, sent.flags) == (b"a name", b"cgroup:/x", 2)
    file.resume(8, 9)
    sent = kernel.sent(structures.HolderCall)
    assert (sent.id, sent.key, sent.flags) == (8, 9, 1)
    file.fenced(8)
    assert kernel.calls[-1][0] == structures.IOC_FENCED
    assert kernel.sent(structures.HolderCall).id == 8
    holder = file.holder(8, 9)
    holder.give_back(4096, 8192, iomode=Iomode.READ)
    sent = kernel.sent(structures.LayoutReturn)
    assert (sent.holder, sent.key, sent.flags) == (8, 9, 0)
    assert (sent.iomode, sent.offset, sent.length) == (1, 4096, 8192)
    holder.give_all_back()
    sent = kernel.sent(structures.LayoutReturn)
    assert (sent.flags, sent.offset, sent.length, sent.iomode) == (0x20, 0, END, 3)
    holder.watch(False)
    assert kernel.sent(structures.Watch).flags == 1
    holder.gone()
    assert kernel.calls[-1][0] == structures.IOC_HOLDER_GONE
    file.recall(0, 4096, iomode=Iomode.RW, holder=4)
    sent = kernel.sent(structures.Recall)
    assert (sent.holder, sent.iomode, sent.offset, sent.length) == (4, 2, 0, 4096)
    other = FileHandle(5, 6)
    file.exchange(0, other, 8192, 4096)
    file.clone(0, other, 8192, 4096)
    file.dedupe(0, other, 8192, 4096)
    assert [command for command, _ in kernel.calls[-3:]] == [
        structures.IOC_EXCHANGE,
        structures.IOC_CLONE,
        structures.IOC_DEDUPE,
    ]
    sent = kernel.sent(structures.Pair)
    assert (sent.other.ino, sent.offset, sent.other_offset, sent.length) == (5, 0, 8192, 4096)
    file.collapse(4096, 8192)
    file.insert(4096, 8192)
    file.shutdown()
    for command, raw in kernel.calls:
        assert int.from_bytes(raw[:4], "little") == len(raw) == command >> 16 & 0x3FFF


@pytest.mark.parametrize(("name", "fence"), [("x" * 64, ""), ("", "y" * 128), ("a\0b", "")])
def test_texts_that_do_not_fit(kernel: Kernel, file: Descriptor, name: str, fence: str) -> None:
    with pytest.raises(ValueError):
        file.register(name, fence=fence)
    assert not kernel.calls


def test_errors_name_the_file(kernel: Kernel, file: Descriptor) -> None:
    kernel.serve = lambda command, memory: errno.ENXIO
    with pytest.raises(OSError) as error:
        file.holder(1, 2).commit([(0, 4096)])
    assert error.value.errno == errno.ENXIO
    assert error.value.filename == file.name


def test_a_map_and_its_continuation(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        call = structures.Map.from_buffer_copy(memory.raw)
        assert call.length == END
        first = call.start == 0
        call.next, call.count, call.file_size = (4096 if first else END), 1, 6000
        call.extents[0] = structures.MapExtent(call.start, 1 << 30, 4096, 2 if first else 1, 3)
        fill(memory, call)
        return 0

    kernel.serve = serve
    whole = file.whole_map()
    assert whole.file_size == 6000
    assert whole.extents == [
        Extent(0, 1 << 30, 4096, MapState.WRITTEN, True, True),
        Extent(4096, 1 << 30, 4096, MapState.UNWRITTEN, True, True),
    ]


def test_grants_and_their_continuation(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        call = structures.List.from_buffer_copy(memory.raw)
        call.next, call.count = (END if call.offset else 4096), 1
        call.grants[0] = structures.GrantEntry(7, call.offset, 4096, 3, 2, 4)
        fill(memory, call)
        return 0

    kernel.serve = serve
    assert [(g.holder, g.offset, g.iomode, g.atomic) for g in file.grants()] == [
        (7, 0, Iomode.RW, True),
        (7, 4096, Iomode.RW, True),
    ]


def entry(seq: int, kind: int = 1, iomode: int = 2) -> structures.EventEntry:
    size = ctypes.sizeof(structures.EventEntry)
    return structures.EventEntry(
        size, kind, seq, 5, structures.Handle(8, 9, 0), 4096, 8192, 3, 9000, iomode, 0
    )


class Teller:
    """What serves EVENTS and EVENT_SOCKET, and tells of events as the header says."""

    def __init__(self, kernel: Kernel) -> None:
        self.waiting: list[structures.EventEntry] = []
        self.socket: socket.socket | None = None
        self.sockets = 0
        self.refuses = 0
        kernel.serve = self.serve

    def serve(self, command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        if command == structures.IOC_EVENT_SOCKET and not self.refuses:
            given = structures.EventSocket.from_buffer_copy(memory.raw)
            assert (given.size, given.flags, *given.reserved) == (24, 0, 0, 0, 0)
            self.drop()
            self.socket = socket.socket(fileno=os.dup(given.fd))
            self.sockets += 1
            assert (self.socket.family, self.socket.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if self.waiting:
                self.tell()
        elif command == structures.IOC_EVENTS:
            call = structures.Events.from_buffer_copy(memory.raw)
            call.count = min(len(self.waiting), structures.EVENTS_MAX)
            for index in range(call.count):
                call.events[index] = self.waiting.pop(0)
            fill(memory, call)
        else:
            return self.refuses
        return 0

    def happen(self, *events: structures.EventEntry) -> None:
        first = not self.waiting
        self.waiting.extend(events)
        if first:
            self.tell()

    def tell(self) -> None:
        assert self.socket is not None
        self.socket.send(bytes(1))

    def drop(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None


@pytest.fixture
def teller(kernel: Kernel) -> Iterator[Teller]:
    teller = Teller(kernel)
    yield teller
    teller.drop()


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_events_of_a_files_own_descriptor(teller: Teller, file: Descriptor) -> None:
    begin = time.monotonic()
    assert file.wait_events(0.1) == []
    assert 0.09 < time.monotonic() - begin < 5
    threading.Timer(0.05, teller.happen, (entry(1), entry(2, kind=5, iomode=0))).start()
    recall, overflow = file.wait_events(10)
    assert (recall.type, recall.seq, recall.holder, recall.file) == (
        EventType.RECALL,
        1,
        5,
        FileHandle(8, 9),
    )
    assert (recall.offset, recall.length, recall.grant_seq, recall.left_ms) == (4096, 8192, 3, 9000)
    assert recall.iomode is Iomode.RW
    assert (overflow.type, overflow.length, overflow.iomode) == (EventType.OVERFLOW, 8192, None)
    assert teller.sockets == 1


def test_a_program_that_polls_by_itself(teller: Teller, file: Descriptor) -> None:
    teller.waiting = [entry(1)]
    fd = file.event_fd()
    assert file.event_fd() == fd
    assert readable(fd)
    assert [event.seq for event in file.events()] == [1]
    for number in (2, 3):
        assert not readable(fd)
        teller.happen(entry(number))
        assert readable(fd)
        assert [event.seq for event in file.events()] == [number]
    teller.happen(*(entry(number) for number in range(250)))
    assert [event.seq for event in file.events()] == list(range(250))
    assert not readable(fd)
    assert teller.sockets == 1


def test_a_socket_that_was_dropped_is_replaced(teller: Teller, file: Descriptor) -> None:
    file.event_fd()
    teller.drop()
    assert readable(file.event_fd())
    teller.waiting = [entry(1)]
    assert [event.seq for event in file.wait_events(10)] == [1]
    threading.Timer(0.05, teller.happen, (entry(2),)).start()
    assert [event.seq for event in file.wait_events(10)] == [2]
    assert teller.sockets == 2


def test_the_socket_is_closed_with_the_descriptor(teller: Teller, file: Descriptor) -> None:
    before = os.listdir("/proc/self/fd")
    file.event_fd()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)  # one less, and the teller's
    assert teller.socket is not None
    assert refusal(lambda: teller.tell()) == "EPIPE"
    with pytest.raises(ValueError, match="closed"):
        file.event_fd()
    with pytest.raises(ValueError, match="closed"):
        file.wait_events(0)


def test_a_socket_that_is_refused(teller: Teller, file: Descriptor) -> None:
    before = len(os.listdir("/proc/self/fd"))
    teller.refuses = errno.EOPNOTSUPP
    assert refusal(lambda: file.wait_events(10)) == "EOPNOTSUPP"
    assert len(os.listdir("/proc/self/fd")) == before
    teller.refuses = 0
    assert file.wait_events(0.01) == []


async def test_trio_waits_for_events_of_a_files_own_descriptor(
    teller: Teller, file: Descriptor
) -> None:
    waiting = TrioDescriptor(file)
    with trio.move_on_after(0.05) as scope:
        await waiting.wait_events()
    assert scope.cancelled_caught
    seen: list[int] = []

    async def wait() -> None:
        while 8 not in seen:
            seen.extend(event.seq for event in await waiting.wait_events())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(0.02)
        teller.happen(entry(7))
        await trio.sleep(0.02)
        teller.drop()
        await trio.sleep(0.02)
        teller.happen(entry(8))
    assert seen == [7, 8]


@pytest.fixture
def piped(teller: Teller) -> Iterator[tuple[Descriptor, Callable[..., None]]]:
    """A control descriptor, and what writes events to it."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def happen(*events: structures.EventEntry) -> None:
        os.write(writer, b"".join(map(bytes, events)))
        teller.tell()

    with Descriptor(reader, "control", control=True) as control:
        yield control, happen
    os.close(writer)


def test_events_of_the_control_file(piped: tuple[Descriptor, Callable[..., None]]) -> None:
    control, happen = piped
    assert control.events() == []
    assert control.wait_events(0.01) == []
    threading.Timer(0.05, happen, (entry(1), entry(2))).start()
    assert [event.seq for event in control.wait_events(10)] == [1, 2]
    happen(*[entry(3)] * 150)
    assert len(control.events()) == 150
    assert control.events() == []


async def test_trio_waits_for_events(piped: tuple[Descriptor, Callable[..., None]]) -> None:
    control, happen = piped
    waiting = TrioDescriptor(control)
    with trio.move_on_after(0.05) as scope:
        await waiting.wait_events()
    assert scope.cancelled_caught
    seen: list[int] = []

    async def collect() -> None:
        while 3 not in seen:
            seen.extend(event.seq for event in await waiting.wait_events())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        await trio.sleep(0.02)
        happen(entry(1))
        await trio.sleep(0.02)
        happen(entry(2), entry(3))
    assert seen == [1, 2, 3]


async def test_trio_calls(kernel: Kernel, file: Descriptor) -> None:
    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        assert threading.current_thread() is not threading.main_thread()
        return 0

    kernel.serve = serve
    waiting = TrioDescriptor(file)
    holder = await waiting.register("x")
    await holder.get(Iomode.READ, 0, 4096)
    await holder.commit([(0, 4096)])
    await holder.give_back(0, 4096)
    await holder.give_all_back()
    await holder.gone()
    await waiting.resume(1, 2)
    await waiting.call(lambda plain: plain.collapse(0, 4096))
    assert [command & 0xFF for command, _ in kernel.calls] == [
        0xE4,
        0xE7,
        0xE8,
        0xE9,
        0xE9,
        0xE5,
        0xE4,
        0xF1,
    ]


async def test_a_get_that_waits_can_be_cancelled(kernel: Kernel, file: Descriptor) -> None:
    """Its thread goes on, and does not return what it gets: that may overlap what is in use."""
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def serve(command: int, memory: ctypes.Array[ctypes.c_char]) -> int:
        entered.set()
        assert leave.wait(10)
        left.set()
        return 0

    kernel.serve = serve
    holder = TrioHolder(file.holder(1, 2))
    begin = time.monotonic()
    with trio.move_on_after(0.05) as scope:
        await holder.get(Iomode.RW, 0, 4096, wait=True)
    assert scope.cancelled_caught
    assert time.monotonic() - begin < 5
    assert entered.is_set()
    leave.set()
    assert await trio.to_thread.run_sync(left.wait, 10)
    assert len(kernel.calls) == 1


def test_the_interpreter_runs_while_a_call_waits(tmp_path: Path) -> None:
    """A holder whose LAYOUT_GET waits must be able to answer the recall that ends the wait."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    # read(2) stands in for an ioctl that blocks: the same way out of the interpreter.
    libc = client._libc
    thread = threading.Thread(target=tick)
    thread.start()
    threading.Timer(0.2, os.write, (writer, b"x")).start()
    buffer = ctypes.create_string_buffer(2000)
    assert libc.read(reader, buffer, 2000) == 1
    done.set()
    thread.join()
    os.close(reader)
    os.close(writer)
    assert ticks > 5


def test_a_closed_descriptor(file: Descriptor) -> None:
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.handle()


def test_files_that_are_not_on_extfs(file: Descriptor) -> None:
    for call in (file.handle, file.info, file.map, file.register):
        with pytest.raises(OSError) as error:
            call()
        assert error.value.errno == errno.ENOTTY
    with pytest.raises(FileNotFoundError):
        Descriptor.control(Path(file.name).parent)
    assert FileHandle(0, 0) == HERE
