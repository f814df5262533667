"""What the canary proof knows: the filesystem under test, its holders, and what may be read.

See ``canary`` for what is proven and how.
"""

from __future__ import annotations

import errno
import functools
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from extfs import core
from extfs.core.native import CoreError, checked, ffi, lib

DEVICE_BYTES = 40 << 20
BLOCK = 4096
SECTOR = 512
PER_BLOCK = BLOCK // SECTOR
CANARY = b"\xca\xfe" * (SECTOR // 2)
RECALL_MS = 1000
FILE_BLOCKS = 48
FILES = 4
MAGIC = 0x7E57_B10C

READ, RW, ANY, PIN = 1, 2, 3, 4
READ_WRITE, READ_DATA, INVALID, NONE = 0, 1, 2, 3
WAIT, RECALL, ATOMIC, LAZY, ALL = 1, 2, 4, 8, 32


class Violation(AssertionError):  # noqa: N818
    """A promise is broken; the text says which."""


def stamp(number: int) -> bytes:
    """The 512 bytes of write `number`; 0 is zeros."""
    return struct.pack("<QQ", MAGIC, number) * (SECTOR // 16) if number else bytes(SECTOR)


def number_of(sector: bytes) -> int | None:
    """Which write this is; None: none at all (a canary, or torn inside a sector)."""
    if sector == bytes(SECTOR):
        return 0
    magic, number = struct.unpack_from("<QQ", sector)
    return number if magic == MAGIC and sector == stamp(number) else None


@dataclass
class Doing:
    """Somebody has asked for it and has no answer: it may have happened, or happen yet."""

    seen: set[int]
    """What the size was when it was asked for, and what others have made of it since."""
    base: set[int]
    """The same, without what was before something that is durable."""
    sectors: dict[int, set[int]]
    grows: int
    """The size becomes this at least."""
    size: int | None
    """If given, it becomes this, whatever it was."""
    certain: bool
    """It is not refused: only a crash can keep it from happening."""

    def sizes(self, before: set[int]) -> set[int]:
        return {max(size, self.grows) for size in before} if self.size is None else {self.size}


@dataclass
class File:
    """What may be read. Sectors that are not mentioned are zeros."""

    ino: int
    name: bytes
    size: int = 0
    sizes: set[int] = field(default_factory=lambda: {0})
    """What the size may be after a crash."""
    now: dict[int, set[int]] = field(default_factory=dict)
    later: dict[int, set[int]] = field(default_factory=dict)
    """What may be there after a crash; always contains `now`."""
    beyond: dict[int, set[int]] = field(default_factory=dict)
    """What holders wrote behind the end of the file into blocks that are theirs."""
    doing: list[Doing] = field(default_factory=list)

    def allowed(self, sector: int, *, crashed: bool = False) -> set[int]:
        return (self.later if crashed else self.now).get(sector, {0})

    def put(self, sector: int, numbers: set[int], *, durable: bool = False) -> None:
        """The sector is one of these from now on."""
        self.now[sector] = set(numbers)
        old = set() if durable else self.later.get(sector, {0})
        self.later[sector] = old | numbers
        for op in self.doing:
            if op.certain:
                self.later[sector] |= op.sectors.get(sector, set())

    @contextmanager
    def under_way(
        self,
        sectors: dict[int, set[int]],
        *,
        grows: int = 0,
        size: int | None = None,
        certain: bool = True,
    ) -> Iterator[Doing]:
        """From being asked for until the answer. Others come before or after it."""
        op = Doing({self.size}, {self.size}, sectors, grows, size, certain)
        if certain:
            self.may_happen(op)
        self.doing.append(op)
        try:
            yield op
        finally:
            self.doing.remove(op)

    def may_happen(self, op: Doing) -> None:
        """A crash may show it from here on."""
        self.sizes |= op.sizes(op.base)
        for sector, numbers in op.sectors.items():
            self.later[sector] = self.later.get(sector, {0}) | numbers

    def sizes_answered(self, op: Doing) -> set[int]:
        """What the size may be when `op` has happened, and others that are under way or not."""
        return self._sizes_with(op, op.seen, [o for o in self.doing if o is not op])

    def sizes_left(self, op: Doing) -> set[int]:
        """What a crash may leave then: others of which it is not certain have theirs to say."""
        others = [o for o in self.doing if o is not op and o.certain]
        return self._sizes_with(op, op.base, others)

    @staticmethod
    def _sizes_with(op: Doing, before: set[int], others: list[Doing]) -> set[int]:
        sizes = op.sizes(before.union(*(o.sizes(before) for o in others)))
        return sizes.union(*(o.sizes(sizes) for o in others))

    def resized(self, size: int, *, durable: bool = False) -> None:
        """The size is this one, for good if it is durable; others may still change it."""
        self.size = size
        sizes = {size}.union(*(op.sizes({size}) for op in self.doing if op.certain))
        self.sizes = sizes if durable else self.sizes | sizes
        for op in self.doing:
            op.seen.add(size)
            op.base = {size} if durable else op.base | {size}

    def may(self, sector: int, number: int) -> None:
        """Somebody writes in place: old or new."""
        self.now[sector] = self.allowed(sector) | {number}
        self.later[sector] = self.later.get(sector, {0}) | {number}

    def resize(self, size: int) -> None:
        """Truncate: what is cut off reads as zeros when the file grows again."""
        low = min(size, self.size) // SECTOR
        for sector in [s for s in self.now if s >= low and s * SECTOR >= size]:
            self.put(sector, {0})
        if size > self.size:
            for sector in range(self.size // SECTOR, (size + SECTOR - 1) // SECTOR):
                if sector * SECTOR >= self.size:
                    self.put(sector, {0})
        self.beyond.clear()
        self.resized(size)

    def settled(self) -> None:
        """Synced: a crash brings nothing older back, except where holders write in place."""
        assert not self.doing
        self.sizes = {self.size}


@dataclass
class Told:
    """One block that a holder was told."""

    device: int
    state: int
    written: int = 0
    """The number of its last write that was not committed (INVALID), else 0."""


@dataclass(frozen=True)
class Lost:
    """A device block, and where it was. Until that loss is durable, a crash undoes it."""

    device: int
    ino: int
    block: int
    syncs: int


@dataclass
class Holder:
    """A client: what it believes to hold, and what it still remembers after it lost it."""

    id: int
    key: int
    polite: bool
    held: dict[tuple[int, int], Told] = field(default_factory=dict)
    """(inode, file block): RW blocks it holds, as far as it knows."""
    memory: list[Lost] = field(default_factory=list)
    """Blocks that it lost; it may still write there until it is fenced."""
    ghost: bool = False
    """It came back after a restart: it counts as holding everything of its files."""
    atomic: set[tuple[int, int]] = field(default_factory=set)
    dead: bool = False
    fence: core.FenceState | None = None
    """The last step of its fence that is durable. From ISSUED on the unit refuses its writes."""

    def lose(self, ino: int, first: int, last: int, syncs: int) -> None:
        for key in [k for k in self.held if k[0] == ino and first <= k[1] < last]:
            self.memory.append(Lost(self.held.pop(key).device, *key, syncs))
            self.atomic.discard(key)


@dataclass(frozen=True)
class Run:
    """One random program."""

    seed: int
    mutant: core.Mutant = core.Mutant.NONE
    steps: int = 40
    trace: bool = False


_prototype: list[core.SimDevice] = []


def formatted() -> core.SimDevice:
    """A fresh filesystem on a device full of canaries."""
    if not _prototype:
        sim = core.SimDevice(DEVICE_BYTES, seed=1)
        for offset in range(0, DEVICE_BYTES, 1 << 20):
            sim.poke(offset, CANARY * ((1 << 20) // SECTOR))
        device = sim.device()
        core.mkfs(device, now_sec=1, journal_blocks=1024)
        device.close()
        sim.settle()
        _prototype.append(sim)
    return _prototype[0].clone()


class World:
    """The filesystem, its holders, and what is allowed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rng = random.Random(run.seed)
        self.sim = formatted()
        self.files: dict[int, File] = {}
        self.holders: list[Holder] = []
        self.numbers = 0
        self.syncs = 0
        self.names = 0
        self.clock = 1_000_000_000
        self.counts: dict[str, int] = {}
        self.open()

    # -- the filesystem --

    def open(self) -> None:
        device = self.sim.device()
        options = ffi.new("struct extfs_mount_options *")
        options.no_heartbeat = 1
        options.commit_ms = 5
        options.recall_ms = RECALL_MS
        options.mutant = int(self.run.mutant)
        out = ffi.new("struct fs **")
        code = lib.extfs_open(device.raw, options, out)
        if code < 0:
            device.close()
            checked(code)
        device.taken_over()
        self.fs = core.Filesystem(out[0])
        lib.extfs_layout_set_clock(self.fs.raw, self.clock)

    def advance(self) -> None:
        self.clock += (RECALL_MS + 1) * 1_000_000
        lib.extfs_layout_set_clock(self.fs.raw, self.clock)

    def sync(self) -> None:
        """Everything is durable."""
        self.fs.sync()
        self.syncs += 1
        for file in self.files.values():
            file.settled()

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def check_fences(self) -> None:
        """After a restart: what was decided about holders is known, and none of them comes back."""
        found = {record.holder: record.state for record in self.fs.layouts.fences()}
        for holder in self.holders:
            if holder.fence is None:
                continue
            if (state := found.get(holder.id)) is None or state < holder.fence:
                raise Violation(f"fence of {holder.id}: {holder.fence!r} has become {state!r}")
            code = lib.extfs_holder_resume(self.fs.raw, holder.id, holder.key)
            if code != -errno.EKEYREVOKED:
                raise Violation(f"holder {holder.id} comes back from its fence: {code}")

    # -- calls that may wait for holders --

    def waiting(self, call: Callable[[], Any], *, asked: bool = True) -> Any:
        """Run it in a thread while holders are asked, answer or do not, until it ends.

        Not `asked`: they hear nothing, and only time passes.
        """
        result: list[Any] = []

        def body() -> None:
            try:
                result.append(call())
            except OSError as error:
                result.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        try:
            self._until_it_ends(thread, asked=asked)
        except OSError:
            # an answer of a holder met the power cut; the filesystem may be closed after that
            self._until_it_ends(thread, asked=False)
            raise
        if asked:
            self.pump()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    def _until_it_ends(self, thread: threading.Thread, *, asked: bool) -> None:
        for round_number in range(4000):
            thread.join(0.0005 if round_number < 4 else 0.005)
            if not thread.is_alive():
                return
            if asked:
                self.pump()
            if round_number and round_number % 4 == 0:
                self.advance()
        raise Violation("an operation waits for ever")

    def patiently(self, holder: Holder, call: Callable[[], int]) -> int:
        """A call of a holder that may wait for a pin; it answers nobody meanwhile."""
        polite, holder.polite = holder.polite, False
        try:
            return int(self.waiting(call))
        finally:
            holder.polite = polite

    def taken(self, file: File, first: int, last: int) -> None:
        """The map of these blocks changed: whoever is lost has lost them, told or not."""
        for holder in self.holders:
            if holder.dead:
                holder.lose(file.ino, first, last, self.syncs)

    def pump(self) -> None:
        """Let the holders see their events."""
        event = ffi.new("struct extfs_layout_event *")
        while lib.extfs_layout_event(self.fs.raw, event):
            holder = next((h for h in self.holders if h.id == event.holder), None)
            if holder is None:
                continue
            first = event.offset // BLOCK
            last = (min(event.offset + event.length, 1 << 62) + BLOCK - 1) // BLOCK
            if event.type == lib.EXTFS_EV_RECALL and holder.polite and not holder.dead:
                self.give_back(holder, event.ino, first, last)
            elif event.type == lib.EXTFS_EV_REVOKED:
                self.count("revoked")
                self.note(f"  {holder.id} hears that", event.ino, first, last, "were revoked")
                holder.lose(event.ino, first, last, self.syncs)

    def note(self, *what: object) -> None:
        """For whoever repeats a failure."""
        if self.run.trace:
            print(*what, file=sys.stderr)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def give_back(self, holder: Holder, ino: int, first: int, last: int) -> None:
        """Commit some of it, and return the range."""
        blocks = sorted(b for i, b in holder.held if i == ino and first <= b < last)
        if any((ino, b) in holder.atomic for b in blocks):
            blocks = sorted(b for i, b in holder.held if i == ino)
            first, last = 0, FILE_BLOCKS * 4
        if self.rng.random() < 0.7:
            self.commit_blocks(holder, ino, [b for b in blocks if holder.held[ino, b].written])
        args = ffi.new("struct extfs_layout_args *")
        args.holder, args.iomode = holder.id, ANY
        args.offset, args.length = first * BLOCK, (last - first) * BLOCK
        call = functools.partial(lib.extfs_layout_return, self.fs.raw, ino, args)
        code = self.waiting(call, asked=False)
        if code == -errno.EINVAL:  # a part of an ATOMIC one
            first, last = 0, FILE_BLOCKS * 4
            args.offset, args.length = 0, last * BLOCK
            code = self.waiting(call, asked=False)
        # also if the power goes meanwhile: whoever sends a return has ended its writes there
        if code >= 0 or code == -errno.ENOENT or self.sim.crashed:
            for key in [k for k in holder.held if k[0] == ino and first <= k[1] < last]:
                del holder.held[key]
                holder.atomic.discard(key)
        if code != -errno.ENOENT:
            checked(code)

    # -- what holders do --

    def register(self) -> Holder:
        raw = ffi.new("struct extfs_holder *")
        raw.kind = lib.EXTFS_HOLDER_LOCAL
        raw.name = b"canary"
        self.retry(lambda: lib.extfs_holder_register(self.fs.raw, raw))
        holder = Holder(int(raw.id), int(raw.key), polite=self.rng.random() < 0.5)
        self.holders.append(holder)
        return holder

    def resume(self, holder: Holder) -> None:
        """It comes back. One that never had anything may be forgotten."""
        try:
            self.retry(lambda: lib.extfs_holder_resume(self.fs.raw, holder.id, holder.key))
            holder.ghost = True
        except CoreError as error:
            if error.errno != errno.ENOENT or holder.held:
                raise Violation(f"holder {holder.id} cannot come back: {error}") from error
            self.holders.remove(holder)  # its number may be given again: nobody ever knew it

    def retry(self, call: Callable[[], int]) -> int:
        while lib.extfs_is_retry(code := call()):
            self.fs.wait_space()
        return checked(code)

    def get(
        self, holder: Holder, file: File, first: int, count: int, iomode: int, flags: int
    ) -> None:
        args = ffi.new("struct extfs_layout_args *")
        room = ffi.new("struct extfs_core_layout_extent[]", 128)
        args.holder, args.iomode, args.flags = holder.id, iomode, flags
        args.offset, args.length = first * BLOCK, count * BLOCK
        args.extents, args.cap = room, 128
        args.time_ms = 500 if iomode == PIN else 0
        call = lambda: lib.extfs_layout_get(self.fs.raw, file.ino, args)  # noqa: E731
        code = self.waiting(call) if flags & WAIT else call()
        if code < 0:
            self.count(f"get:{-code}")
            return
        self.count("get")
        self.note(f"  {holder.id} gets", file.name, first, count, iomode, flags, "next", args.next)
        at = args.offset
        for i in range(args.count):
            extent = room[i]
            again = i and extent.offset == room[i - 1].offset and extent.state == INVALID
            if not again and extent.offset != at:
                raise Violation(f"extents do not tile: {extent.offset} after {at}")
            at = extent.offset + extent.length
            self.tell(holder, file, iomode, flags, extent)
        if at != args.next:
            raise Violation(f"extents end at {at}, the grant at {args.next}")

    def tell(self, holder: Holder, file: File, iomode: int, flags: int, extent: Any) -> None:
        """The holder learns of one extent."""
        if iomode != RW:
            if extent.state not in (READ_DATA, NONE):
                raise Violation(f"state {extent.state} in a READ layout")
            return
        for i in range(extent.length // BLOCK):
            block = extent.offset // BLOCK + i
            device = extent.device // BLOCK + i
            if extent.state == NONE:
                raise Violation("NONE in a RW layout")
            self.count(f"told:{extent.state}")
            if extent.state == READ_DATA:
                continue
            old = holder.held.get((file.ino, block))
            if old and old.device == device and old.state == extent.state:
                continue
            if old and old.written:
                # what was not committed and is mapped anew is not what was written
                holder.memory.append(Lost(old.device, file.ino, block, self.syncs))
            holder.held[file.ino, block] = Told(device, extent.state)
            if flags & ATOMIC:
                holder.atomic.add((file.ino, block))

    def write_device(self, holder: Holder, key: tuple[int, int]) -> None:
        """One block, where it was told."""
        told = holder.held[key]
        file = self.files.get(key[0])
        number = self.next_number()
        self.note(f"  {holder.id} writes {number}", file and file.name, key[1], told)
        self.count(f"wrote:{told.state}")
        if told.state == INVALID:
            told.written = number
        elif file:
            for sector in range(key[1] * PER_BLOCK, (key[1] + 1) * PER_BLOCK):
                if sector * SECTOR < file.size:
                    file.may(sector, number)
                else:
                    file.beyond.setdefault(sector, {0}).add(number)
                    # the end may have moved here by what a crash undoes
                    file.later[sector] = file.later.get(sector, {0}) | {number}
        self.sim.poke(told.device * BLOCK, stamp(number) * PER_BLOCK)

    def commit_blocks(self, holder: Holder, ino: int, blocks: list[int]) -> None:
        """Commit what was written to INVALID blocks."""
        file = self.files.get(ino)
        if not blocks or file is None:
            return
        if any((ino, b) in holder.atomic for b in blocks):
            mine = sorted(b for i, b in holder.held if (i, b) in holder.atomic and i == ino)
            if any(not holder.held[ino, b].written for b in mine):
                return
            blocks = mine
        args = ffi.new("struct extfs_layout_args *")
        ranges = ffi.new("struct extfs_core_range[]", len(blocks))
        for slot, block in zip(ranges, blocks, strict=True):
            slot.offset, slot.length = block * BLOCK, BLOCK
        lazy = self.rng.random() < 0.3
        args.holder, args.flags = holder.id, LAZY if lazy else 0
        args.ranges, args.nranges = ranges, len(blocks)
        end = (blocks[-1] + 1) * BLOCK - self.rng.choice([0, 0, 512, 1536])
        inside = (blocks[-1] + 1) * BLOCK <= file.size
        args.size = end if not inside or self.rng.random() < 0.8 else 0
        asked = int(args.size)
        written = {block: holder.held[ino, block].written for block in blocks}
        sectors = {
            sector: {number}
            for block, number in written.items()
            for sector in range(block * PER_BLOCK, (block + 1) * PER_BLOCK)
        }
        with file.under_way(sectors, grows=asked, certain=False) as doing:
            try:
                code = self.patiently(
                    holder, lambda: lib.extfs_layout_commit(self.fs.raw, ino, args)
                )
            except OSError:  # somebody else met the power cut first
                self.doubtful_commit(file, doing)
                raise
            if code >= 0:
                self.note(f"  {holder.id} commits", file.name, blocks, "size", asked, "lazy" * lazy)
                self.committed(holder, file, written, int(args.size), doing, durable=not lazy)
            else:
                self.count(f"commit:{-code}")
                self.note(f"  {holder.id} commits", file.name, blocks, "refused", code)
                if self.sim.crashed:
                    self.doubtful_commit(file, doing)

    def doubtful_commit(self, file: File, doing: Doing) -> None:
        """The power went: it may have happened."""
        file.may_happen(doing)
        for sector, numbers in file.beyond.items():
            file.later[sector] = file.later.get(sector, {0}) | numbers

    def committed(
        self,
        holder: Holder,
        file: File,
        written: dict[int, int],
        answer: int,
        doing: Doing,
        *,
        durable: bool,
    ) -> None:
        self.count("commit")
        sizes = file.sizes_answered(doing)
        if answer not in sizes:
            raise Violation(f"size {answer} after a commit, not of {sorted(sizes)}")
        sizes = file.sizes_left(doing)
        old, size = file.size, max(file.size, doing.grows)
        for block, number in written.items():
            for sector in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
                if sector * SECTOR < size:
                    file.put(sector, {number}, durable=durable)
                else:
                    file.beyond[sector] = {0, number}
                    file.later[sector] = file.later.get(sector, {0}) | {number}
            holder.atomic.discard((file.ino, block))
            if told := holder.held.get((file.ino, block)):
                told.state, told.written = READ_WRITE, 0
        for sector, numbers in list(file.beyond.items()):
            if old <= sector * SECTOR < size:
                file.put(sector, numbers | file.allowed(sector))
        file.resized(size, durable=durable)
        file.sizes |= sizes

    # -- looking --

    def look(self, *, crashed: bool = False) -> None:
        """Read everything, and hold it to the model."""
        for file in self.files.values():
            found = self.fs.getattr(file.ino).size
            sizes = file.sizes if crashed else {file.size}
            if found not in sizes:
                raise Violation(f"{file.name!r}: size {found}, not of {sorted(sizes)}")
            if crashed:
                file.size = found
            content = self.waiting(
                functools.partial(self.fs.read, file.ino, 0, max(found, 1)), asked=False
            )
            self.look_at(file, content, crashed=crashed)

    def look_at(self, file: File, content: bytes, *, crashed: bool) -> None:
        for sector in range((len(content) + SECTOR - 1) // SECTOR):
            raw = content[sector * SECTOR : (sector + 1) * SECTOR]
            number = number_of(raw.ljust(SECTOR, b"\0")) if len(raw) == SECTOR else 0
            allowed = file.allowed(sector, crashed=crashed)
            if number is None:
                what = "a canary" if raw == CANARY else f"torn bytes {raw[:16].hex()}"
                raise Violation(f"{file.name!r} sector {sector}: {what}")
            if number not in allowed:
                raise Violation(
                    f"{file.name!r} sector {sector}: write {number}, not of {sorted(allowed)}"
                )
            if crashed:
                file.now[sector] = {number}
                file.later[sector] = {number} | (allowed if False else set())
        if crashed:
            # What was behind the end when the crash came stays in the last block. A holder that
            # counts as holding that block may have written it: nobody zeroes it before its commit.
            for sector in {*file.now, *file.later}:
                if sector * SECTOR < len(content):
                    continue
                if sector // PER_BLOCK == len(content) // BLOCK:
                    file.beyond[sector] = file.allowed(sector, crashed=True) | {0}
                file.now.pop(sector, None)
            file.later = {s: set(v) for s, v in file.now.items()}
            file.sizes = {file.size}
