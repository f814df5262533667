"""Layouts: grants, holders, recalls, fences, as ``native/layout.h`` defines them.

`Layouts` is ``filesystem.layouts``. Offsets and lengths are bytes, multiples of the block size;
length `TO_THE_END` reaches the end of every file. A holder is named by its id; whether a caller may
speak for it (`Layouts.check`) is the front's business. Failed calls raise `CoreError`.

What waits for device I/O or durability is marked "blocks"; with ``wait=True`` `Layouts.get` also
waits for other holders, until the recall deadline at most. Call those in a thread.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from extfs.core.calls import Prepared
from extfs.core.native import checked, ffi, lib, string

if TYPE_CHECKING:
    from extfs.core.filesystem import Filesystem

__all__ = [
    "TO_THE_END",
    "EventType",
    "FenceRecord",
    "FenceState",
    "Grant",
    "HolderKind",
    "HolderRecord",
    "HolderSpec",
    "HolderState",
    "Iomode",
    "Latency",
    "Layout",
    "LayoutEvent",
    "LayoutExtent",
    "LayoutState",
    "Layouts",
    "LostCause",
]

_T = TypeVar("_T")

TO_THE_END = (1 << 64) - 1
EXTENTS_MAX = 512
"""Extents in one answer of LAYOUT_GET."""

_EVENTFD_BYTES = 8


class Iomode(enum.IntEnum):
    """What a grant lets its holder do; ANY only where grants are selected."""

    READ = 1
    RW = 2
    ANY = 3
    PIN = 4


class LayoutState(enum.IntEnum):
    """State of an extent in a layout (RFC 5663 2.3)."""

    READ_WRITE_DATA = 0
    READ_DATA = 1
    INVALID_DATA = 2
    NONE_DATA = 3


_EXTENT_STATES = tuple(LayoutState)


class HolderKind(enum.IntEnum):
    """A process of this host, or a client of a layout server."""

    LOCAL = 1
    CLIENT = 2


class HolderState(enum.IntEnum):
    """LIVE answers recalls; LOST missed one, closed its descriptor, or was before the restart."""

    LIVE = 1
    LOST = 2
    GONE = 3


_STATES = {int(state): state for state in HolderState}


class LostCause(enum.IntEnum):
    """Why a holder is lost.

    RECALL: it did not answer one; ENDED: nobody speaks for it any more; MOUNT: it was there before.
    """

    NOT = 0
    RECALL = 1
    ENDED = 2
    MOUNT = 3


class FenceState(enum.IntEnum):
    """How far the fence of a lost holder is, on disk (native/fence.h).

    DECIDED: it was not harmed; ISSUED: it may have been; FAILED: the same, and the last attempt did
    not confirm.
    """

    DECIDED = 1
    ISSUED = 2
    FAILED = 4


class EventType(enum.IntEnum):
    """Events; FENCE_WANTED and HOLDER_GONE are for whoever decides about fences.

    HOLDER_GONE: `length` is 1 if it was fenced, 0 if it had nothing any more.

    LOCK_FREE: a lock that the NFS owner `holder` watches for could be had (see `Locks.watch`).
    LOCK_WANTED: a local process wants what the NFS owner `holder` has locked; once for an owner.

    Those of delegations (`Delegations`) name the file and, as `grant_seq`, the delegation.
    DELEGATION_ATTRS: a local user looked at the attributes of a write-delegated file; at most once
    a second for a file.
    """

    RECALL = 1
    REVOKED = 2
    MAP_CHANGED = 3
    PIN_EXPIRED = 4
    OVERFLOW = 5
    FENCE_WANTED = 6
    HOLDER_GONE = 7
    LOCK_FREE = 8
    DELEGATION_RECALL = 9
    DELEGATION_REVOKED = 10
    DELEGATION_ATTRS = 11
    LOCK_WANTED = 12


class Latency(enum.IntEnum):
    """What is timed: the three calls, and from a recall to the return that ended it."""

    GET = 0
    COMMIT = 1
    RETURN = 2
    RECALL = 3


@dataclass(frozen=True, slots=True)
class LayoutExtent:
    """Bytes [offset, offset + length) of a file at byte `device`, which NONE_DATA has not."""

    offset: int
    device: int
    length: int
    state: LayoutState


@dataclass(frozen=True, slots=True)
class Layout:
    """An answer of LAYOUT_GET: [offset asked for, next) is granted; the extents tile it.

    `seq`: of the grant; `generation`: of the extent map; `file_size` in bytes.
    """

    extents: list[LayoutExtent]
    next: int
    seq: int
    generation: int
    file_size: int


@dataclass(frozen=True, slots=True)
class HolderSpec:
    """Who holds. `pid_start` in clock ticks since boot (/proc/PID/stat 22); `boot_id` 16 bytes.

    `fence` is what a fence driver needs: "cgroup:PATH" of a local holder, or "".
    """

    name: str = ""
    kind: HolderKind = HolderKind.LOCAL
    uid: int = 0
    pid: int = 0
    pid_start: int = 0
    boot_id: bytes = bytes(16)
    fence_key: int = 0
    fence: str = ""


@dataclass(frozen=True, slots=True)
class HolderRecord:
    """A holder now. `quarantined`: blocks under its name; `missed`: recalls it did not answer.

    `cause`: why it is lost. `returned`: everything, since its fence was decided; forgotten at a
    restart.
    """

    id: int
    state: HolderState
    spec: HolderSpec
    grants: int
    quarantined: int
    recalls: int
    missed: int
    cause: LostCause = LostCause.NOT
    returned: bool = False


@dataclass(frozen=True, slots=True)
class FenceRecord:
    """The durable record of a fence.

    `tries` that began; `decided`: when, in seconds since the epoch.
    """

    holder: int
    state: FenceState
    tries: int
    decided: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Bytes [offset, offset + length) of a file in a holder's hands.

    `recalled_ns`: since when, on `Layouts.now`, a recall of it is not answered; 0: none is.
    """

    ino: int
    generation: int
    holder: int
    offset: int
    length: int
    seq: int
    iomode: Iomode
    atomic: bool
    recalled_ns: int


@dataclass(frozen=True, slots=True)
class LayoutEvent:
    """An event. `seq` rises by one with each, lost ones included; OVERFLOW: `length` were lost."""

    type: EventType
    seq: int
    holder: int
    ino: int
    generation: int
    iomode: int
    offset: int
    length: int
    grant_seq: int
    left_ms: int


def _text(field: Any) -> str:
    return string(field)


def _fixed(text: str, capacity: int) -> bytes:
    """NUL-terminated text for a field of `capacity` bytes. ValueError: too long, or with a NUL."""
    encoded = text.encode("utf-8", "surrogateescape")
    if len(encoded) >= capacity or b"\0" in encoded:
        raise ValueError(f"{text!r} does not fit into {capacity - 1} bytes")
    return encoded


def _record_of(raw: Any) -> HolderRecord:
    spec = HolderSpec(
        name=_text(raw.name),
        kind=HolderKind(raw.kind),
        uid=raw.uid,
        pid=raw.pid,
        pid_start=raw.pid_start,
        boot_id=bytes(ffi.buffer(raw.boot_id)),
        fence_key=raw.fence_key,
        fence=_text(raw.fence),
    )
    return HolderRecord(
        raw.id,
        HolderState(raw.state),
        spec,
        raw.grants,
        raw.quarantined,
        raw.recalls,
        raw.missed,
        LostCause(raw.cause),
        bool(raw.returned),
    )


class Layouts:
    """The layout calls of a `Filesystem`, for a layout server in this process, tools and tests."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._fs = filesystem

    @property
    def _raw(self) -> Any:
        return self._fs.raw

    # -- layouts --

    def run(self, prepared: Prepared[_T]) -> _T:
        """Make the call in this thread; blocks."""
        self._fs.change(lambda: prepared.blocking(self._raw, prepared.ino, prepared.args))
        return prepared.answer()

    def get(
        self,
        ino: int,
        holder: int,
        iomode: Iomode,
        offset: int,
        length: int,
        *,
        min_length: int = 0,
        time_ms: int = 0,
        wait: bool = False,
        recall: bool = False,
        atomic: bool = False,
        limit: int = EXTENTS_MAX,
    ) -> Layout:
        """As `prepare_get`; blocks."""
        return self.run(
            self.prepare_get(
                ino, holder, iomode, offset, length,
                min_length=min_length, time_ms=time_ms, wait=wait, recall=recall, atomic=atomic,
                limit=limit,
            )
        )  # fmt: skip

    def prepare_get(
        self,
        ino: int,
        holder: int,
        iomode: Iomode,
        offset: int,
        length: int,
        *,
        min_length: int = 0,
        time_ms: int = 0,
        wait: bool = False,
        recall: bool = False,
        atomic: bool = False,
        limit: int = EXTENTS_MAX,
    ) -> Prepared[Layout]:
        """LAYOUT_GET. Less than asked for is possible: go on with ``offset=answer.next``.

        `min_length` bytes at least (0: one block); `time_ms` for PIN; `limit` extents at most.
        EAGAIN: a conflict, without `wait` (with `recall` the others are asked nevertheless);
        ENOSPC: not `min_length`, nothing was allocated; EOWNERDEAD: the holder is lost; EROFS.
        """
        out = ffi.new("struct extfs_core_layout_extent[]", limit)
        args = self._args(holder, iomode, offset, length)
        args.min_length, args.time_ms = min_length, time_ms
        args.extents, args.cap = out, limit
        args.flags = (
            (lib.EXTFS_LAYOUT_F_WAIT if wait else 0)
            | (lib.EXTFS_LAYOUT_F_RECALL if recall else 0)
            | (lib.EXTFS_LAYOUT_F_ATOMIC if atomic else 0)
        )

        def answer() -> Layout:
            extents = [
                LayoutExtent(e.offset, e.device, e.length, _EXTENT_STATES[e.state])
                for e in out[0 : args.count]
            ]
            return Layout(extents, args.next, args.seq, args.map_gen, args.size)

        return Prepared(lib.extfs_layout_get, lib.extfs_calls_get, ino, args, answer, out)

    def commit(
        self,
        ino: int,
        holder: int,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        size: int = 0,
        seq: int = 0,
        mtime: tuple[int, int] | None = None,
        lazy: bool = False,
    ) -> int:
        """As `prepare_commit`; blocks."""
        prepared = self.prepare_commit(
            ino, holder, ranges, size=size, seq=seq, mtime=mtime, lazy=lazy
        )
        return self.run(prepared)

    def prepare_commit(
        self,
        ino: int,
        holder: int,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        size: int = 0,
        seq: int = 0,
        mtime: tuple[int, int] | None = None,
        lazy: bool = False,
    ) -> Prepared[int]:
        """LAYOUT_COMMIT of (offset, length) pairs, whole or nothing. The answer is the file size.

        `size`: last byte written + 1, or 0; `seq`: newest grant that counts, 0: all; `mtime` in
        seconds and nanoseconds, else now; `lazy`: a later fsync makes it durable.
        ENXIO: not held, ERANGE: `size` outside of what is held, EOWNERDEAD, EINVAL.
        """
        vector = ffi.new("struct extfs_core_range[]", list(ranges))
        args = self._args(holder, Iomode.RW, 0, 0)
        args.ranges, args.nranges = vector, len(vector)
        args.size, args.seq = size, seq
        args.flags = lib.EXTFS_LAYOUT_F_LAZY if lazy else 0
        if mtime is not None:
            args.flags |= lib.EXTFS_LAYOUT_F_MTIME
            args.mtime, args.mtime_ns = mtime
        return Prepared(
            lib.extfs_layout_commit,
            lib.extfs_calls_commit,
            ino,
            args,
            lambda: int(args.size),
            vector,
        )

    def give_back(
        self,
        ino: int,
        holder: int,
        offset: int = 0,
        length: int = TO_THE_END,
        *,
        iomode: Iomode = Iomode.ANY,
        lazy: bool = False,
    ) -> None:
        """As `prepare_give_back`; blocks."""
        self.run(self.prepare_give_back(ino, holder, offset, length, iomode=iomode, lazy=lazy))

    def prepare_give_back(
        self,
        ino: int,
        holder: int,
        offset: int = 0,
        length: int = TO_THE_END,
        *,
        iomode: Iomode = Iomode.ANY,
        lazy: bool = False,
    ) -> Prepared[None]:
        """LAYOUT_RETURN of a range. What is not held is no error."""
        args = self._args(holder, iomode, offset, length)
        args.flags = lib.EXTFS_LAYOUT_F_LAZY if lazy else 0
        return Prepared(lib.extfs_layout_return, lib.extfs_calls_return, ino, args, lambda: None)

    def give_all_back(self, holder: int) -> None:
        """LAYOUT_RETURN of everything; blocks.

        A lost holder is live again afterwards, unless its fence is decided.
        """
        args = self._args(holder, Iomode.ANY, 0, TO_THE_END)
        args.flags = lib.EXTFS_LAYOUT_F_ALL
        self._fs.change(lambda: lib.extfs_layout_return(self._raw, 0, args))

    def recall(
        self,
        ino: int,
        offset: int = 0,
        length: int = TO_THE_END,
        *,
        holder: int = 0,
        iomode: Iomode = Iomode.ANY,
    ) -> None:
        """Ask the holders (0: all) for a range; does not wait."""
        checked(lib.extfs_layout_recall(self._raw, ino, holder, iomode, offset, length))

    def watch(self, ino: int, holder: int, on: bool = True) -> None:
        """An event MAP_CHANGED for this holder when the map changes next; or none any more."""
        checked(lib.extfs_layout_watch(self._raw, ino, holder, on))

    @staticmethod
    def _args(holder: int, iomode: Iomode, offset: int, length: int) -> Any:
        args = ffi.new("struct extfs_layout_args *")
        args.holder, args.iomode, args.offset, args.length = holder, iomode, offset, length
        return args

    # -- holders; these may find the journal full --

    def register(self, spec: HolderSpec) -> tuple[int, int]:
        """A new holder; returns (id, key). Its events come out of `events`. EAGAIN: too many."""
        raw = ffi.new("struct extfs_holder *")
        raw.kind, raw.uid, raw.pid = spec.kind, spec.uid, spec.pid
        raw.pid_start, raw.fence_key = spec.pid_start, spec.fence_key
        raw.boot_id = spec.boot_id
        raw.name = _fixed(spec.name, len(raw.name))
        raw.fence = _fixed(spec.fence, len(raw.fence))
        self._fs.change(lambda: lib.extfs_holder_register(self._raw, raw))
        return int(raw.id), int(raw.key)

    def resume(self, holder: int, key: int) -> None:
        """A lost holder speaks again, with its grants. ENOENT, EKEYREJECTED, EBUSY (live).

        EKEYREVOKED: its fence is decided, so it will be gone.
        """
        self._fs.change(lambda: lib.extfs_holder_resume(self._raw, holder, key))

    def check(self, holder: int, key: int) -> None:
        """Who knows the key speaks for it. ENOENT, EKEYREJECTED; EOWNERDEAD: it is lost."""
        checked(lib.extfs_holder_check(self._raw, holder, key))

    def lost(self, holder: int) -> None:
        """It does not answer any more; with nothing held it is gone."""
        self._fs.change(lambda: lib.extfs_holder_lost(self._raw, holder))

    def gone(self, holder: int) -> None:
        """It has stopped and holds nothing. EBUSY: it does, or its fence is decided."""
        self._fs.change(lambda: lib.extfs_holder_gone(self._raw, holder))

    def fenced(self, holder: int) -> None:
        """It is certain that this lost holder cannot reach the device. ENOENT, EBUSY (live)."""
        self._fs.change(lambda: lib.extfs_holder_fenced(self._raw, holder))

    def holders(self, after: int = 0, limit: int | None = None) -> list[HolderRecord]:
        """Holders with ids above `after`, in order; all, or up to `limit`."""
        found: list[HolderRecord] = []
        position = ffi.new("uint64_t *", after)
        while limit is None or len(found) < limit:
            room = 64 if limit is None else min(64, limit - len(found))
            out = ffi.new("struct extfs_holder[]", room)
            count = lib.extfs_holder_list(self._raw, position, out, room)
            found += [_record_of(out[index]) for index in range(count)]
            if not count:
                break
        return found

    def holder(self, holder: int) -> HolderRecord | None:
        """One holder; None: there is none of this id."""
        found = self.holders(holder - 1, 1) if holder > 0 else []
        return found[0] if found and found[0].id == holder else None

    def state_of(self, holder: int) -> HolderState | None:
        """The same, of its state alone: cheap."""
        position, out = ffi.new("uint64_t *", holder - 1), ffi.new("struct extfs_holder *")
        count = lib.extfs_holder_list(self._raw, position, out, 1) if holder > 0 else 0
        return _STATES[out.state] if count and out.id == holder else None

    # -- fences --

    def fence_put(self, holder: int, state: FenceState, tries: int) -> None:
        """Record how far the fence of a lost holder is; durable at the return: blocks.

        ENOENT; EBUSY: it is live; EINVAL: not a step from where it is (native/fence.h).
        """
        self._fs.change(lambda: lib.extfs_fence_put(self._raw, holder, state, tries))

    def fences(self) -> list[FenceRecord]:
        """Records of fences that are not confirmed yet, by holder."""
        found: list[FenceRecord] = []
        position = ffi.new("uint64_t *", 0)
        out = ffi.new("struct extfs_fence[]", 64)
        while count := lib.extfs_fence_list(self._raw, position, out, 64):
            found += [
                FenceRecord(f.holder, FenceState(f.state), f.tries, f.decided)
                for f in (out[index] for index in range(count))
            ]
        return found

    # -- grants --

    def grants(self, ino: int, limit: int | None = None) -> list[Grant]:
        """Grants on an inode, by offset; all, or up to `limit`. ENOENT."""
        found: list[Grant] = []
        offset = ffi.new("uint64_t *", 0)
        while offset[0] != TO_THE_END and (limit is None or len(found) < limit):
            room = 64 if limit is None else min(64, limit - len(found))
            out = ffi.new("struct extfs_grant_look[]", room)
            count = checked(lib.extfs_grant_list(self._raw, ino, offset, out, room))
            found += [
                Grant(
                    g.ino,
                    g.generation,
                    g.holder,
                    g.offset,
                    g.length,
                    g.seq,
                    Iomode(g.iomode),
                    bool(g.flags & lib.EXTFS_LAYOUT_F_ATOMIC),
                    g.recalled_ns,
                )
                for g in (out[index] for index in range(count))
            ]
            if not count:
                break
        return found

    def granted_inodes(self, limit: int | None = None) -> Iterator[int]:
        """Inodes that somebody has grants of, in order; all, or up to `limit`."""
        after = ffi.new("uint64_t *", 0)
        out = ffi.new("uint64_t[]", 64)
        left = limit
        while left is None or left > 0:
            room = 64 if left is None else min(64, left)
            count = int(lib.extfs_grant_inodes(self._raw, after, out, room))
            yield from [int(out[index]) for index in range(count)]
            if not count:
                return
            left = None if left is None else left - count

    # -- events, clock, counters --

    @property
    def event_fd(self) -> int:
        """Readable while there are events. Owned by the core."""
        return checked(lib.extfs_layout_event_fd(self._raw))

    def events(self) -> list[LayoutEvent]:
        """All events that there are: of holders registered here, FENCE_WANTED, HOLDER_GONE."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.event_fd, _EVENTFD_BYTES)
        found = []
        out = ffi.new("struct extfs_layout_event *")
        while lib.extfs_layout_event(self._raw, out):
            found.append(
                LayoutEvent(
                    EventType(out.type),
                    out.seq,
                    out.holder,
                    out.ino,
                    out.generation,
                    out.iomode,
                    out.offset,
                    out.length,
                    out.grant_seq,
                    out.left_ms,
                )
            )
        return found

    def now(self) -> int:
        """The clock of the deadlines, in nanoseconds."""
        return int(lib.extfs_layout_now(self._raw))

    def set_clock(self, nanoseconds: int) -> None:
        """Make the clock virtual, and what it says."""
        lib.extfs_layout_set_clock(self._raw, nanoseconds)

    def settle(self) -> None:
        """Until nothing that is due now is left to be done; blocks."""
        lib.extfs_layout_settle(self._raw)

    def counters(self) -> dict[str, int]:
        """Everything that happened since the mount, by name; see LAYOUT_COUNTERS of layout.h."""
        found = {}
        value = ffi.new("uint64_t *")
        index = 0
        while name := lib.extfs_layout_counter(self._raw, index, value):
            found[string(name)] = int(value[0])
            index += 1
        return found

    def latency(self, of: Latency) -> list[int]:
        """A histogram: bucket n counts times below 2**(n + 1) microseconds, from 2**n on but for 0.

        The last bucket has no upper end.
        """
        buckets = ffi.new("uint64_t[]", lib.EXTFS_LATENCY_BUCKETS)
        lib.extfs_layout_latency(self._raw, of, buckets)
        return [int(count) for count in buckets]
