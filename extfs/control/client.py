"""The calls of a mounted extfs, for Python programs: ``native/extfs_ioctl.h`` says what they mean.

A `Descriptor` is /.extfs/control of a mount (`Descriptor.control`; root only; can name any file) or
a regular file of it (`Descriptor.of`; calls are about that file). `Descriptor.register` makes a
`Holder`, which ends with the descriptor; `Holder.get`, `commit` and `give_back` are LAYOUT_GET,
LAYOUT_COMMIT and LAYOUT_RETURN. Whoever knows the id and the key of a holder speaks for it:
`Descriptor.holder` makes one of them without registering.

Everything here blocks for as long as the call takes: use it from plain programs and threads.
`extfs.control.waiting` has the same for trio. Offsets and lengths are bytes, times milliseconds.
Errors are `OSError` with the errno that the header names.

This module needs no other part of extfs.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from extfs.control import structures as c

__all__ = [
    "CONTROL_NAME",
    "END",
    "HERE",
    "STATUS_NAME",
    "Descriptor",
    "Event",
    "EventType",
    "Extent",
    "FileHandle",
    "FileMap",
    "Grant",
    "Holder",
    "Info",
    "Iomode",
    "Layout",
    "LayoutExtent",
    "LayoutState",
    "MapState",
]

CONTROL_NAME = ".extfs/control"
STATUS_NAME = ".extfs/status"
"""Below the root of the mount; not listed there."""

END = c.END

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class Iomode(enum.IntEnum):
    """What a layout is for; ANY only where layouts are selected."""

    READ = 1
    RW = 2
    ANY = 3
    PIN = 4


class LayoutState(enum.IntEnum):
    """What the holder may do with an extent (RFC 5663 2.3)."""

    READ_WRITE_DATA = 0
    READ_DATA = 1
    INVALID_DATA = 2
    NONE_DATA = 3


class MapState(enum.IntEnum):
    """State of an extent of the map."""

    UNWRITTEN = 1
    WRITTEN = 2


class EventType(enum.IntEnum):
    """What an event says; OVERFLOW: `length` events before it were lost."""

    RECALL = 1
    REVOKED = 2
    MAP_CHANGED = 3
    PIN_EXPIRED = 4
    OVERFLOW = 5


@dataclass(frozen=True, slots=True)
class FileHandle:
    """A file: valid over restarts, never another's."""

    ino: int
    generation: int


HERE = FileHandle(0, 0)
"""On a file's own descriptor: that file."""


@dataclass(frozen=True, slots=True)
class Info:
    """The filesystem; sizes in bytes, `recall_ms`: a holder's time to answer."""

    uuid: bytes
    block_size: int
    version: int
    device_size: int
    free: int
    quarantined: int
    recall_ms: int
    device: str


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + length) of a file at byte `physical` of the device."""

    offset: int
    physical: int
    length: int
    state: MapState
    shared: bool
    layout: bool


@dataclass(frozen=True, slots=True)
class FileMap:
    """One answer of MAP: everything below `next` is told; what no extent covers is a hole."""

    extents: list[Extent]
    next: int
    file_size: int
    generation: int


@dataclass(frozen=True, slots=True)
class LayoutExtent:
    """Bytes [offset, offset + length) at byte `physical` of the device; NONE_DATA has no address.

    In a layout for writing READ_DATA is the old content of blocks that follow as INVALID_DATA.
    """

    offset: int
    physical: int
    length: int
    state: LayoutState


@dataclass(frozen=True, slots=True)
class Layout:
    """An answer of LAYOUT_GET: [offset, next) is granted, and the extents tile it."""

    offset: int
    next: int
    extents: list[LayoutExtent]
    iomode: Iomode
    seq: int
    generation: int
    file_size: int

    @property
    def length(self) -> int:
        """Bytes granted."""
        return self.next - self.offset

    def writable(self) -> list[LayoutExtent]:
        """The extents that may be written."""
        may = (LayoutState.READ_WRITE_DATA, LayoutState.INVALID_DATA)
        return [extent for extent in self.extents if extent.state in may]


@dataclass(frozen=True, slots=True)
class Grant:
    """A range of a file in a holder's hands."""

    holder: int
    offset: int
    length: int
    seq: int
    iomode: Iomode
    atomic: bool


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a holder of the descriptor. RECALL: return the range within `left_ms`.

    `seq` rises by one with every event of the descriptor, lost ones included.
    """

    type: EventType
    seq: int
    holder: int
    file: FileHandle
    offset: int
    length: int
    grant_seq: int
    left_ms: int
    iomode: Iomode | None


def _handle(file: FileHandle) -> c.Handle:
    return c.Handle(file.ino, file.generation, 0)


def _event(entry: c.EventEntry) -> Event:
    return Event(
        EventType(entry.type),
        entry.seq,
        entry.holder,
        FileHandle(entry.file.ino, entry.file.generation),
        entry.offset,
        entry.length,
        entry.grant_seq,
        entry.left_ms,
        Iomode(entry.iomode) if entry.iomode else None,
    )


def _fixed(text: str, capacity: int) -> bytes:
    encoded = os.fsencode(text)
    if len(encoded) >= capacity or b"\0" in encoded:
        raise ValueError(f"{text!r} does not fit into {capacity - 1} bytes")
    return encoded


class Descriptor:
    """An open descriptor that takes the calls, and what belongs to it: holders and their events."""

    def __init__(self, fd: int, name: str, *, control: bool) -> None:
        """Take `fd` over. `name` is for messages; `control`: it is /.extfs/control."""
        self._fd = fd
        self._told: socket.socket | None = None  # what says that there are events
        self._told_ended = False  # the mount has dropped it
        self._telling = threading.Lock()  # of these two
        self.name = name
        self.is_control = control

    @classmethod
    def control(cls, mountpoint: str | os.PathLike[str]) -> Self:
        """The control file of a mount. ENOENT: not an extfs; EACCES: not root."""
        path = Path(mountpoint) / CONTROL_NAME
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK), str(path), control=True)

    @classmethod
    def of(cls, path: str | os.PathLike[str], *, write: bool = False) -> Self:
        """A regular file. What changes it or claims its blocks needs `write`."""
        flags = os.O_RDWR if write else os.O_RDONLY
        name = os.fspath(path)
        return cls(os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK), name, control=False)

    # -- the descriptor --

    def fileno(self) -> int:
        """Its number; ValueError when closed."""
        if self._fd < 0:
            raise ValueError(f"{self.name} is closed")
        return self._fd

    def close(self) -> None:
        """Close. Holders that still have something become lost; a second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Closed it is in any case; what may fail is a dead mount, and nothing depends on it.
            with contextlib.suppress(OSError):
                os.close(fd)
        with self._telling:
            if self._told is not None:
                self._told.close()
                self._told = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, command: int, argument: ctypes.Structure | bytearray) -> None:
        """The ioctl, without the interpreter's lock: it may wait for a thread of this process.

        (``fcntl.ioctl`` keeps the lock when the argument is longer than 1,024 bytes.)
        """
        address = ctypes.addressof(
            argument
            if isinstance(argument, ctypes.Structure)
            else ctypes.c_char.from_buffer(argument)
        )
        if _libc.ioctl(self.fileno(), command, address) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), self.name)

    # -- the filesystem and its files --

    def info(self) -> Info:
        """INFO."""
        call = c.Info(size=ctypes.sizeof(c.Info))
        self._call(c.IOC_INFO, call)
        return Info(
            bytes(call.uuid),
            call.block_size,
            call.version,
            call.device_size,
            call.free,
            call.quarantined,
            call.recall_ms,
            os.fsdecode(call.device),
        )

    def handle(self) -> FileHandle:
        """HANDLE: of the file that this descriptor is of."""
        call = c.HandleCall(size=ctypes.sizeof(c.HandleCall))
        self._call(c.IOC_HANDLE, call)
        return FileHandle(call.file.ino, call.file.generation)

    def map(self, start: int = 0, length: int = END, *, file: FileHandle = HERE) -> FileMap:
        """MAP: up to 500 extents; below the end of the range ``start=answer.next`` has more."""
        call = c.Map(size=ctypes.sizeof(c.Map), file=_handle(file), start=start, length=length)
        self._call(c.IOC_MAP, call)
        extents = [
            Extent(
                e.offset,
                e.physical,
                e.length,
                MapState(e.state),
                bool(e.flags & c.EXTENT_SHARED),
                bool(e.flags & c.EXTENT_LAYOUT),
            )
            for e in call.extents[: call.count]
        ]
        return FileMap(extents, call.next, call.file_size, call.generation)

    def whole_map(self, *, file: FileHandle = HERE) -> FileMap:
        """All extents; the file may change between the answers that they come from."""
        answer = self.map(file=file)
        extents = list(answer.extents)
        while answer.next != END:
            answer = self.map(answer.next, file=file)
            extents += answer.extents
        return FileMap(extents, END, answer.file_size, answer.generation)

    def grants(self, *, file: FileHandle = HERE) -> Iterator[Grant]:
        """LIST: the grants on a file, by offset."""
        offset = 0
        while offset != END:
            call = c.List(size=ctypes.sizeof(c.List), file=_handle(file), offset=offset)
            self._call(c.IOC_LIST, call)
            for g in call.grants[: call.count]:
                atomic = bool(g.flags & c.LAYOUT_ATOMIC)
                yield Grant(g.holder, g.offset, g.length, g.seq, Iomode(g.iomode), atomic)
            offset = call.next

    def recall(
        self,
        offset: int = 0,
        length: int = END,
        *,
        iomode: Iomode = Iomode.ANY,
        holder: int = 0,
        file: FileHandle = HERE,
    ) -> None:
        """RECALL: have the holders (0: all) asked for a range. Root or the file's owner."""
        call = c.Recall(
            size=ctypes.sizeof(c.Recall),
            holder=holder,
            file=_handle(file),
            iomode=iomode,
            offset=offset,
            length=length,
        )
        self._call(c.IOC_RECALL, call)

    # -- holders --

    def register(self, name: str = "", *, fence: str = "", client: bool = False) -> Holder:
        """HOLDER_REGISTER: a new holder of this descriptor.

        `fence`: "" or "cgroup:/PATH", see the header; `client`: of a layout server. EAGAIN: this
        user has too many; EPERM: that cgroup is not the caller's; EOPNOTSUPP: no layouts on this
        mount; EROFS.
        """
        call = c.HolderCall(
            size=ctypes.sizeof(c.HolderCall),
            flags=c.HOLDER_CLIENT if client else 0,
            name=_fixed(name, 64),
            fence=_fixed(fence, 128),
        )
        self._call(c.IOC_HOLDER_REGISTER, call)
        return Holder(self, call.id, call.key, call.recall_ms)

    def resume(self, holder: int, key: int) -> Holder:
        """Go on as a holder that was lost. ENOENT, EKEYREJECTED, EBUSY: it is live."""
        call = c.HolderCall(
            size=ctypes.sizeof(c.HolderCall), flags=c.HOLDER_RESUME, id=holder, key=key
        )
        self._call(c.IOC_HOLDER_REGISTER, call)
        return Holder(self, call.id, call.key, call.recall_ms)

    def holder(self, holder: int, key: int) -> Holder:
        """Speak for a holder that belongs to somebody else's descriptor. Asks nothing."""
        return Holder(self, holder, key, 0)

    def fenced(self, holder: int) -> None:
        """FENCED: it is certain that this lost holder cannot reach the device any more.

        Root, on the control file. ENOENT, EBUSY: it is not lost.
        """
        self._call(c.IOC_FENCED, c.HolderCall(size=ctypes.sizeof(c.HolderCall), id=holder))

    # -- events --

    def event_fd(self) -> int:
        """A descriptor that is readable when there are events; for poll(2) and its like only.

        `events` makes it quiet again. It is made when it is asked for, and belongs to this
        `Descriptor`; ask each time, as it is another one after the mount has dropped it. An open
        file has one: what a process forks shares it.

        OSError EAGAIN: this user has too many; EOPNOTSUPP: the mount's daemon cannot reach
        descriptors of this process, see EVENT_SOCKET.
        """
        with self._telling:
            if self._told is None or self._told_ended:
                kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
                try:
                    self._call(
                        c.IOC_EVENT_SOCKET,
                        c.EventSocket(size=ctypes.sizeof(c.EventSocket), fd=theirs.fileno()),
                    )
                except BaseException:
                    ours.close()
                    raise
                finally:
                    theirs.close()
                if self._told is not None:
                    self._told.close()
                self._told, self._told_ended = ours, False
            return self._told.fileno()

    def _take_told(self) -> None:
        """What came to the socket is taken before the events: the next one sends anew."""
        with self._telling, contextlib.suppress(BlockingIOError):
            while self._told is not None and not self._told_ended:
                self._told_ended = not self._told.recv(16)

    def events(self) -> list[Event]:
        """The events that there are, in order, without waiting."""
        self._take_told()
        found = self._some_events()
        last = len(found)
        while last >= c.EVENTS_MAX:
            more = self._some_events()
            found += more
            last = len(more)
        return found

    def _some_events(self) -> list[Event]:
        """Up to EVENTS_MAX; fewer: there are none left."""
        if not self.is_control:
            call = c.Events(size=ctypes.sizeof(c.Events))
            self._call(c.IOC_EVENTS, call)
            return [_event(entry) for entry in call.events[: call.count]]
        size = ctypes.sizeof(c.EventEntry)
        try:
            raw = os.read(self.fileno(), c.EVENTS_MAX * size)
        except BlockingIOError:
            return []
        return [
            _event(c.EventEntry.from_buffer_copy(raw, at))
            for at in range(0, len(raw) - size + 1, size)
        ]

    def wait_events(self, seconds: float | None = None) -> list[Event]:
        """The next events; empty when time is over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            # Before the look: what comes after it is told.
            poll = select.poll()
            poll.register(self.event_fd(), select.POLLIN)
            found = self.events()
            left = None if deadline is None else deadline - time.monotonic()
            if found or (left is not None and left <= 0):
                return found
            poll.poll(None if left is None else left * 1000)

    # -- changes of maps --

    def _pair(
        self,
        command: int,
        offset: int,
        other: FileHandle,
        other_offset: int,
        length: int,
        file: FileHandle,
    ) -> int:
        call = c.Pair(
            size=ctypes.sizeof(c.Pair),
            file=_handle(file),
            other=_handle(other),
            offset=offset,
            other_offset=other_offset,
            length=length,
        )
        self._call(command, call)
        return int(call.done)

    def exchange(
        self,
        offset: int,
        other: FileHandle,
        other_offset: int,
        length: int,
        *,
        file: FileHandle = HERE,
    ) -> None:
        """EXCHANGE: two ranges of whole blocks change places, atomically."""
        self._pair(c.IOC_EXCHANGE, offset, other, other_offset, length, file)

    def clone(
        self,
        offset: int,
        other: FileHandle,
        other_offset: int,
        length: int,
        *,
        file: FileHandle = HERE,
    ) -> int:
        """CLONE: the range becomes a copy of `other`'s that shares its blocks; returns bytes."""
        return self._pair(c.IOC_CLONE, offset, other, other_offset, length, file)

    def dedupe(
        self,
        offset: int,
        other: FileHandle,
        other_offset: int,
        length: int,
        *,
        file: FileHandle = HERE,
    ) -> int:
        """DEDUPE: share the blocks if the bytes are equal; returns bytes. EBADE: they are not."""
        return self._pair(c.IOC_DEDUPE, offset, other, other_offset, length, file)

    def _shift(self, command: int, offset: int, length: int, file: FileHandle) -> None:
        call = c.Shift(
            size=ctypes.sizeof(c.Shift), file=_handle(file), offset=offset, length=length
        )
        self._call(command, call)

    def collapse(self, offset: int, length: int, *, file: FileHandle = HERE) -> None:
        """COLLAPSE: cut a range of whole blocks out."""
        self._shift(c.IOC_COLLAPSE, offset, length, file)

    def insert(self, offset: int, length: int, *, file: FileHandle = HERE) -> None:
        """INSERT: a hole of whole blocks."""
        self._shift(c.IOC_INSERT, offset, length, file)

    def shutdown(self) -> None:
        """SHUTDOWN: stop as a power cut would; for tests. Root, on the control file."""
        self._call(c.IOC_SHUTDOWN, c.HandleCall(size=ctypes.sizeof(c.HandleCall)))


class Holder:
    """Somebody who may hold layouts: an id, a key, and the descriptor that its calls go through."""

    def __init__(self, descriptor: Descriptor, holder: int, key: int, recall_ms: int) -> None:
        self.descriptor = descriptor
        self.id = holder
        self.key = key
        self.recall_ms = recall_ms
        """Time to answer a recall; 0 when this holder was not registered here."""

    def get(
        self,
        iomode: Iomode,
        offset: int,
        length: int,
        *,
        min_length: int = 0,
        time_ms: int = 0,
        wait: bool = False,
        recall: bool = False,
        atomic: bool = False,
        limit: int = c.LAYOUT_EXTENTS_MAX,
        file: FileHandle = HERE,
    ) -> Layout:
        """LAYOUT_GET. Less than asked for is possible: go on with ``offset=answer.next``.

        `wait`: recall what is in the way and wait for it, at most for its recall time; else EAGAIN,
        with `recall` after having it recalled. `time_ms`: of a PIN, at most 60,000. `limit`: room
        for so many extents, at most 400. ENOSPC: not `min_length`; EINTR: a signal came.
        """
        if not 1 <= limit <= c.LAYOUT_EXTENTS_MAX:
            raise ValueError(f"{limit} extents: not between 1 and {c.LAYOUT_EXTENTS_MAX}")
        head = ctypes.sizeof(c.LayoutGet)
        buffer = bytearray(head + limit * ctypes.sizeof(c.LayoutExtent))
        call = c.LayoutGet.from_buffer(buffer)
        call.size = len(buffer)
        call.flags = (
            (c.LAYOUT_WAIT if wait else 0)
            | (c.LAYOUT_RECALL if recall else 0)
            | (c.LAYOUT_ATOMIC if atomic else 0)
        )
        call.holder, call.key, call.file = self.id, self.key, _handle(file)
        call.iomode, call.count = iomode, limit
        call.offset, call.length, call.min_length = offset, length, min_length
        call.time_ms = time_ms
        self.descriptor._call(c.layout_get_command(limit), buffer)
        raw = (c.LayoutExtent * call.count).from_buffer(buffer, head)
        extents = [LayoutExtent(e.offset, e.physical, e.length, LayoutState(e.state)) for e in raw]
        begin = extents[0].offset if extents else call.offset
        return Layout(begin, call.next, extents, iomode, call.seq, call.generation, call.file_size)

    def get_all(
        self,
        iomode: Iomode,
        offset: int,
        length: int,
        *,
        progress: Callable[[int], None] = lambda upto: None,
        wait: bool = False,
        atomic: bool = False,
        file: FileHandle = HERE,
    ) -> list[Layout]:
        """LAYOUT_GET until the range is complete. What was got stays, when a later one fails.

        An ATOMIC layout comes as one or not at all, so it is asked for once.
        """
        answers: list[Layout] = []
        end = offset + length
        while offset < end:
            answer = self.get(iomode, offset, end - offset, wait=wait, atomic=atomic, file=file)
            answers.append(answer)
            if answer.next <= offset:
                raise OSError(errno.EIO, "LAYOUT_GET made no progress", self.descriptor.name)
            offset = answer.next
            progress(offset)
        return answers

    def commit(
        self,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        file_size: int = 0,
        seq: int = 0,
        mtime: tuple[int, int] | None = None,
        lazy: bool = False,
        file: FileHandle = HERE,
    ) -> int:
        """LAYOUT_COMMIT of (offset, length) pairs, whole or nothing; returns the file's size.

        `file_size`: last byte written + 1, or 0; `mtime` in seconds and nanoseconds; `lazy`: a
        later fsync(2) makes it durable. More than 1,000 ranges go by write(2), which only the
        control file takes, and which does not tell the size: then 0 is returned.
        ENXIO: not held (any more); ERANGE: the size lies outside; EOWNERDEAD.
        """
        pairs: Sequence[tuple[int, int]] = list(ranges)
        if len(pairs) > c.COMMIT_RANGES_MAX:
            raise ValueError(f"{len(pairs)} ranges: at most {c.COMMIT_RANGES_MAX} in one commit")
        head = ctypes.sizeof(c.LayoutCommit)
        buffer = bytearray(head + len(pairs) * ctypes.sizeof(c.Range))
        call = c.LayoutCommit.from_buffer(buffer)
        call.size = len(buffer)
        call.flags = (c.COMMIT_LAZY if lazy else 0) | (c.COMMIT_MTIME if mtime else 0)
        call.holder, call.key, call.file = self.id, self.key, _handle(file)
        call.seq, call.file_size, call.count = seq, file_size, len(pairs)
        if mtime is not None:
            call.mtime_sec, call.mtime_nsec = mtime
        vector = (c.Range * len(pairs)).from_buffer(buffer, head)
        for index, (offset, length) in enumerate(pairs):
            vector[index] = c.Range(offset, length)
        if len(pairs) <= c.COMMIT_IOCTL_MAX:
            self.descriptor._call(c.layout_commit_command(len(pairs)), buffer)
            return int(call.file_size)
        if not self.descriptor.is_control:
            raise ValueError(
                f"{len(pairs)} ranges: more than {c.COMMIT_IOCTL_MAX} need the control file"
            )
        written = os.write(self.descriptor.fileno(), buffer)
        if written != len(buffer):
            raise OSError(errno.EIO, "the commit was cut off", self.descriptor.name)
        return 0

    def give_back(
        self,
        offset: int = 0,
        length: int = END,
        *,
        iomode: Iomode = Iomode.ANY,
        file: FileHandle = HERE,
    ) -> None:
        """LAYOUT_RETURN of a range: I/O on it has stopped. What is not held is no error."""
        self._return(0, offset, length, iomode, file)

    def give_all_back(self) -> None:
        """LAYOUT_RETURN of everything, of all files. A lost holder is live again."""
        self._return(c.RETURN_ALL, 0, END, Iomode.ANY, HERE)

    def _return(
        self, flags: int, offset: int, length: int, iomode: Iomode, file: FileHandle
    ) -> None:
        call = c.LayoutReturn(
            size=ctypes.sizeof(c.LayoutReturn),
            flags=flags,
            holder=self.id,
            key=self.key,
            file=_handle(file),
            iomode=iomode,
            offset=offset,
            length=length,
        )
        self.descriptor._call(c.IOC_LAYOUT_RETURN, call)

    def watch(self, on: bool = True, *, file: FileHandle = HERE) -> None:
        """WATCH: an event when the map changes next; asking for the map arms it again."""
        call = c.Watch(
            size=ctypes.sizeof(c.Watch),
            flags=0 if on else c.WATCH_OFF,
            holder=self.id,
            key=self.key,
            file=_handle(file),
        )
        self.descriptor._call(c.IOC_WATCH, call)

    def gone(self) -> None:
        """HOLDER_GONE: it has stopped and holds nothing. EBUSY: it does."""
        call = c.HolderCall(size=ctypes.sizeof(c.HolderCall), id=self.id, key=self.key)
        self.descriptor._call(c.IOC_HOLDER_GONE, call)
