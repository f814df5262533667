"""The calls of ``native/extfs_ioctl.h`` for tests: its structs once more, and nothing else.

Deliberately not the package's client: what tests say here is what a C program says.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

BLOCK = 4096
TO_THE_END = (1 << 64) - 1

MAP, INFO, HANDLE, HOLDER_REGISTER, HOLDER_GONE, FENCED = range(0xE1, 0xE7)
GET, COMMIT, RETURN, RECALL, LIST, WATCH, EVENTS = range(0xE7, 0xEE)
EXCHANGE, CLONE, DEDUPE, COLLAPSE, INSERT, SHUTDOWN, EVENT_SOCKET = range(0xEE, 0xF5)

READ, RW, ANY, PIN = 1, 2, 3, 4
READ_WRITE_DATA, READ_DATA, INVALID_DATA, NONE_DATA = range(4)
RESUME, CLIENT = 1, 2
WAIT, RECALL_FLAG, ATOMIC, LAZY, MTIME, ALL = 1, 2, 4, 8, 16, 32
EVENT_RECALL, EVENT_REVOKED, EVENT_MAP_CHANGED, EVENT_PIN_EXPIRED, EVENT_OVERFLOW = range(1, 6)

U64, U32, I64, I32 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int32


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


Handle = _struct("Handle", ("ino", U64), ("generation", U32), ("reserved", U32))
_HEAD = ("size", U32), ("flags", U32)
_HOLDER = ("holder", U64), ("key", U64)
_SPARE = ("reserved", U64 * 2)

Extent = _struct(
    "Extent", ("offset", U64), ("physical", U64), ("length", U64), ("state", U32), ("flags", U32)
)
MapCall = _struct(
    "MapCall",
    *_HEAD,
    ("file", Handle),
    *((name, U64) for name in ("start", "length", "next", "file_size", "generation")),
    ("count", U32),
    ("reserved", U32 * 3),
    ("extents", Extent * 500),
)
InfoCall = _struct(
    "InfoCall",
    *_HEAD,
    ("uuid", ctypes.c_uint8 * 16),
    ("block_size", U32),
    ("version", U32),
    *((name, U64) for name in ("device_size", "free", "quarantined", "recall_ms")),
    ("device", ctypes.c_char * 256),
    ("reserved", U64 * 8),
)
HandleCall = _struct("HandleCall", *_HEAD, ("file", Handle), _SPARE)
HolderCall = _struct(
    "HolderCall",
    *_HEAD,
    ("id", U64),
    ("key", U64),
    ("recall_ms", U64),
    ("name", ctypes.c_char * 64),
    ("fence", ctypes.c_char * 128),
    ("reserved", U64 * 4),
)
LayoutExtent = _struct(
    "LayoutExtent",
    ("offset", U64),
    ("physical", U64),
    ("length", U64),
    ("state", U32),
    ("reserved", U32),
)
Range = _struct("Range", ("offset", U64), ("length", U64))
ReturnCall = _struct(
    "ReturnCall",
    *_HEAD,
    *_HOLDER,
    ("file", Handle),
    ("iomode", U32),
    ("reserved0", U32),
    ("offset", U64),
    ("length", U64),
    _SPARE,
)
RecallCall = _struct(
    "RecallCall",
    *_HEAD,
    ("holder", U64),
    ("file", Handle),
    ("iomode", U32),
    ("reserved0", U32),
    ("offset", U64),
    ("length", U64),
    _SPARE,
)
Grant = _struct(
    "Grant",
    *((name, U64) for name in ("holder", "offset", "length", "seq")),
    ("iomode", U32),
    ("flags", U32),
)
ListCall = _struct(
    "ListCall",
    *_HEAD,
    ("file", Handle),
    ("offset", U64),
    ("next", U64),
    ("count", U32),
    ("reserved", U32 * 3),
    ("grants", Grant * 300),
)
WatchCall = _struct("WatchCall", *_HEAD, *_HOLDER, ("file", Handle), _SPARE)
Event = _struct(
    "Event",
    ("size", U32),
    ("type", U32),
    ("seq", U64),
    ("holder", U64),
    ("file", Handle),
    *((name, U64) for name in ("offset", "length", "grant_seq", "left_ms")),
    ("iomode", U32),
    ("reserved", U32),
)
EventsCall = _struct(
    "EventsCall", *_HEAD, ("count", U32), ("reserved", U32 * 3), ("events", Event * 100)
)
EventSocketCall = _struct("EventSocketCall", *_HEAD, ("fd", I32), ("reserved", U32 * 3))
PairCall = _struct(
    "PairCall",
    *_HEAD,
    ("file", Handle),
    ("other", Handle),
    *((name, U64) for name in ("offset", "other_offset", "length", "done")),
    _SPARE,
)
ShiftCall = _struct("ShiftCall", *_HEAD, ("file", Handle), ("offset", U64), ("length", U64), _SPARE)


def layout_call(n: int) -> type[ctypes.Structure]:
    """struct extfs_ioc_layout with room for n extents."""
    return _struct(
        "LayoutCall",
        *_HEAD,
        *_HOLDER,
        ("file", Handle),
        ("iomode", U32),
        ("count", U32),
        *((name, U64) for name in ("offset", "length", "min_length", "time_ms")),
        *((name, U64) for name in ("next", "seq", "generation", "file_size")),
        _SPARE,
        ("extents", LayoutExtent * n),
    )


def commit_call(n: int) -> type[ctypes.Structure]:
    """struct extfs_ioc_commit with n ranges."""
    return _struct(
        "CommitCall",
        *_HEAD,
        *_HOLDER,
        ("file", Handle),
        ("seq", U64),
        ("file_size", U64),
        ("mtime_sec", I64),
        ("mtime_nsec", U32),
        ("count", U32),
        _SPARE,
        ("ranges", Range * n),
    )


def command(nr: int, size: int) -> int:
    """_IOWR('X', nr, a struct of size bytes)."""
    return 3 << 30 | size << 16 | ord("X") << 8 | nr


def call(fd: int, nr: int, struct: Any) -> Any:
    """One ioctl with the struct, whose size is filled in unless it is given; returns it."""
    struct.size = struct.size or ctypes.sizeof(struct)
    fcntl.ioctl(fd, command(nr, ctypes.sizeof(struct)), struct, True)
    return struct


def refusal(function: Callable[[], object]) -> str | None:
    """The name of the errno with which the function fails; None: it does not."""
    try:
        function()
    except OSError as error:
        number = error.errno or 0
        return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode[number]
    return None


def refused(fd: int, nr: int, struct: Any) -> str | None:
    """The name of the errno of a call; None: it succeeded."""
    return refusal(lambda: call(fd, nr, struct))


def as_user(uid: int, function: Callable[[], str | None]) -> str | None:
    """refusal() in a child process that is this user."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(writing, (function() or "").encode())
        except BaseException:  # the parent shows it
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answers:
        answer = answers.read().decode()
    os.waitpid(child, 0)
    return answer or None


def event_socket(fd: int) -> socket.socket:
    """EVENT_SOCKET: the end that is polled; it does not block."""
    ours, theirs = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    with theirs:
        call(fd, EVENT_SOCKET, EventSocketCall(fd=theirs.fileno()))
    return ours


def has_events(fd: int, seconds: float) -> bool:
    """Are there events within this time? With a socket for this one question."""
    with event_socket(fd) as end:
        return bool(select.select([end], [], [], seconds)[0]) and end.recv(1) != b""


def handle_of(fd: int) -> Any:
    return call(fd, HANDLE, HandleCall()).file


def info(fd: int) -> Any:
    return call(fd, INFO, InfoCall())


def register(fd: int, **fields: object) -> Any:
    """A new holder of this descriptor; `id` and `key` of the answer name it."""
    return call(fd, HOLDER_REGISTER, HolderCall(**fields))


class Holder:
    """A holder of a control descriptor, and the calls in its name.

    Files are named by their handles.
    """

    def __init__(self, control: int, device: int | None = None) -> None:
        self.control = control
        self.device = device
        record = register(control, name=b"test")
        self.id, self.key = record.id, record.key

    def get(
        self,
        file: Any,
        offset: int,
        length: int,
        iomode: int = RW,
        flags: int = 0,
        room: int = 64,
        **fields: int,
    ) -> Any:
        struct = layout_call(room)(
            flags=flags,
            holder=self.id,
            key=self.key,
            file=file,
            iomode=iomode,
            count=room,
            offset=offset,
            length=length,
            **fields,
        )
        return call(self.control, GET, struct)

    def commit_struct(
        self, file: Any, ranges: Sequence[tuple[int, int]], file_size: int = 0, **fields: int
    ) -> Any:
        kind = commit_call(len(ranges))
        struct = kind(
            size=ctypes.sizeof(kind),
            holder=self.id,
            key=self.key,
            file=file,
            file_size=file_size,
            count=len(ranges),
            **fields,
        )
        for at, (offset, length) in enumerate(ranges):
            struct.ranges[at] = Range(offset, length)
        return struct

    def commit(
        self, file: Any, ranges: Sequence[tuple[int, int]], file_size: int = 0, **fields: int
    ) -> Any:
        struct = self.commit_struct(file, ranges, file_size, **fields)
        return call(self.control, COMMIT, struct)

    def give_back(
        self, file: Any, offset: int = 0, length: int = TO_THE_END, iomode: int = ANY
    ) -> Any:
        struct = ReturnCall(
            holder=self.id, key=self.key, file=file, iomode=iomode, offset=offset, length=length
        )
        return call(self.control, RETURN, struct)

    def watch(self, file: Any) -> None:
        call(self.control, WATCH, WatchCall(holder=self.id, key=self.key, file=file))

    def write(self, layout: Any, fill: bytes) -> None:
        """Write the blocks of a RW layout to the device, each byte `fill`."""
        assert self.device is not None
        for extent in layout.extents[: layout.count]:
            if extent.state in (READ_WRITE_DATA, INVALID_DATA):
                memory = mmap.mmap(-1, extent.length)
                memory.write(fill * extent.length)
                assert os.pwrite(self.device, memory, extent.physical) == extent.length


def take_events(fd: int, room: int = 100) -> list[Any]:
    """read(2): the events there are, at least one."""
    content = os.read(fd, room * ctypes.sizeof(Event))
    size = ctypes.sizeof(Event)
    assert len(content) % size == 0
    return [Event.from_buffer_copy(content, at) for at in range(0, len(content), size)]
