"""Layouts on the simulated device, whose every byte is a canary: no read, ever, returns one.

A failure prints one command that repeats it:

    python -m oracle.canary --seed N [--mutant NAME]        (in tests/)

Holders get layouts, write the device directly, commit, return, are asked and do not answer, go on
writing where they have lost everything; meanwhile files are written, truncated, punched, cloned,
exchanged and unlinked through the core; the daemon or the power goes at any write, and what is left
is opened again. Each 512-byte sector of each file must at all times be one of the values that the
model allows for it: zeros, or the number of a write that was made to this very sector and has not
been replaced for good. The canary is never one of them.

Time is virtual: a recall is missed because the clock is moved, not because somebody waits.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
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

    def allowed(self, sector: int, *, crashed: bool = False) -> set[int]:
        return (self.later if crashed else self.now).get(sector, {0})

    def put(self, sector: int, numbers: set[int], *, durable: bool = False) -> None:
        """The sector is one of these from now on."""
        self.now[sector] = set(numbers)
        old = set() if durable else self.later.get(sector, {0})
        self.later[sector] = old | numbers

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
        self.size = size
        self.sizes.add(size)

    def settled(self) -> None:
        """Synced: a crash brings nothing older back, except where holders write in place."""
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

    # -- calls that may wait for holders --

    def waiting(self, call: Callable[[], Any]) -> Any:
        """Run it in a thread while holders are asked, answer or do not, until it ends."""
        result: list[Any] = []

        def body() -> None:
            try:
                result.append(call())
            except OSError as error:
                result.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        for round_number in range(4000):
            thread.join(0.0005 if round_number < 4 else 0.005)
            if not thread.is_alive():
                break
            self.pump()
            if round_number and round_number % 4 == 0:
                self.advance()
        else:
            raise Violation("an operation waits for ever")
        self.pump()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

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
        code = lib.extfs_layout_return(self.fs.raw, ino, args)
        if code < 0 and -code != 2:
            checked(code)
        for key in [k for k in holder.held if k[0] == ino and first <= k[1] < last]:
            del holder.held[key]
            holder.atomic.discard(key)

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
        asked, before = int(args.size), file.size
        written = {block: holder.held[ino, block].written for block in blocks}
        code = self.patiently(holder, lambda: lib.extfs_layout_commit(self.fs.raw, ino, args))
        if code < 0:
            self.count(f"commit:{-code}")
            self.note(f"  {holder.id} commits", file.name, written, "size", asked, "refused", code)
            self.doubtful_commit(file, written, asked)
            return
        self.count("commit")
        self.note(f"  {holder.id} commits", file.name, blocks, "size", asked, "lazy" * lazy)
        size = max(file.size, asked)
        if args.size not in (size, max(before, asked)):
            raise Violation(f"size {args.size} after a commit, {size} expected")
        self.committed(holder, file, written, size, durable=not lazy)

    def doubtful_commit(self, file: File, written: dict[int, int], asked: int) -> None:
        """The power went: it may have happened."""
        if not self.sim.crashed:
            return
        for block, number in written.items():
            for sector in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
                file.later[sector] = file.later.get(sector, {0}) | {number}
        self.grown_in_doubt(file, max(file.size, asked))

    def grown_in_doubt(self, file: File, size: int) -> None:
        for sector, numbers in file.beyond.items():
            file.later[sector] = file.later.get(sector, {0}) | numbers
        file.sizes.add(size)

    def committed(
        self, holder: Holder, file: File, written: dict[int, int], size: int, *, durable: bool
    ) -> None:
        old = file.size
        for block, number in written.items():
            for sector in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
                if sector * SECTOR < size:
                    file.put(sector, {number}, durable=durable)
                else:
                    file.beyond[sector] = {0, number}
            holder.atomic.discard((file.ino, block))
            if told := holder.held.get((file.ino, block)):
                told.state, told.written = READ_WRITE, 0
        for sector, numbers in list(file.beyond.items()):
            if old <= sector * SECTOR < size:
                file.put(sector, numbers | file.allowed(sector))
                del file.beyond[sector]
        if size > old:
            file.size = size
            file.sizes = {size} if durable else file.sizes | {size}

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
            content = self.fs.read(file.ino, 0, max(found, 1))
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
            for sector in [s for s in file.now if s * SECTOR >= len(content)]:
                del file.now[sector]
            file.later = {s: set(v) for s, v in file.now.items()}
            file.sizes = {file.size}


Step = Callable[[World], None]
STEPS: dict[str, tuple[int, Step]] = {}


def step(weight: int) -> Callable[[Step], Step]:
    def note(call: Step) -> Step:
        STEPS[call.__name__] = (weight, call)
        return call

    return note


def some_file(w: World) -> File:
    if len(w.files) < FILES and (not w.files or w.rng.random() < 0.25):
        w.names += 1
        name = b"f%d" % w.names
        ino = w.fs.mknod(core.ROOT_INODE, name, 0o100644).ino
        w.sync()
        w.files[ino] = File(ino, name)
    return w.rng.choice(list(w.files.values()))


def some_holder(w: World) -> Holder:
    alive = [h for h in w.holders if not h.dead]
    if len(alive) < 3 and (not alive or w.rng.random() < 0.3):
        return w.register()
    return w.rng.choice(alive)


def some_range(w: World) -> tuple[int, int]:
    first = w.rng.randrange(FILE_BLOCKS)
    return first, w.rng.choice([1, 1, 2, 4, 8, 16])


@step(22)
def get_rw(w: World) -> None:
    first, count = some_range(w)
    flags = w.rng.choice([0, 0, WAIT, WAIT, RECALL])
    if w.rng.random() < 0.12:
        flags |= ATOMIC
    w.get(some_holder(w), some_file(w), first, count, RW, flags)


@step(6)
def get_read(w: World) -> None:
    first, count = some_range(w)
    iomode, flags = w.rng.choice([READ, READ, PIN]), w.rng.choice([0, WAIT])
    w.get(some_holder(w), some_file(w), first, count, iomode, flags)


@step(30)
def holder_writes(w: World) -> None:
    holder = some_holder(w)
    keys = sorted(holder.held)
    for key in w.rng.sample(keys, min(len(keys), w.rng.randint(1, 6))):
        w.write_device(holder, key)


@step(20)
def holder_commits(w: World) -> None:
    holder = some_holder(w)
    inodes = sorted({i for (i, b), told in holder.held.items() if told.written})
    if inodes:
        ino = w.rng.choice(inodes)
        mine = sorted(b for (i, b), told in holder.held.items() if i == ino and told.written)
        w.commit_blocks(holder, ino, sorted(w.rng.sample(mine, w.rng.randint(1, len(mine)))))


@step(4)
def commit_of_the_unheld(w: World) -> None:
    """Whole or nothing: refused, and nothing changes."""
    holder, file = some_holder(w), some_file(w)
    if holder.ghost:
        return  # what it was told before the restart it may commit, whatever it remembers
    free = [b for b in range(FILE_BLOCKS) if (file.ino, b) not in holder.held]
    if not free:
        return
    args = ffi.new("struct extfs_layout_args *")
    ranges = ffi.new("struct extfs_core_range[]", 2)
    mine = sorted(b for (i, b), told in holder.held.items() if i == file.ino and told.written)
    picked = sorted({w.rng.choice(free), *mine[:1]})
    for slot, block in zip(ranges, picked, strict=False):
        slot.offset, slot.length = block * BLOCK, BLOCK
    args.holder, args.ranges, args.nranges = holder.id, ranges, len(picked)
    args.size = (picked[-1] + 1) * BLOCK
    code = w.patiently(holder, lambda: lib.extfs_layout_commit(w.fs.raw, file.ino, args))
    if code >= 0 and w.run.mutant == core.Mutant.NONE:
        raise Violation(f"a commit of blocks {picked} was accepted; held: {mine}")
    if code >= 0:
        file.size = max(file.size, int(args.size))
        file.sizes.add(file.size)


@step(8)
def holder_returns(w: World) -> None:
    holder = some_holder(w)
    if holder.held:
        ino = w.rng.choice(sorted({i for i, _ in holder.held}))
        first, count = some_range(w)
        atomic = [b for i, b in holder.atomic if i == ino]
        if atomic:
            first, count = 0, FILE_BLOCKS * 4
        w.give_back(holder, ino, first, first + count)


@step(12)
def lost_holder_writes(w: World) -> None:
    """It was revoked, and does not know or does not care."""
    for holder in w.holders:
        for lost in w.rng.sample(holder.memory, min(len(holder.memory), 3)):
            number = w.next_number()
            w.note(f"  {holder.id} writes {number} where it was: {lost}")
            w.count("stale write")
            file = w.files.get(lost.ino)
            if file and lost.syncs == w.syncs:
                for sector in range(lost.block * PER_BLOCK, (lost.block + 1) * PER_BLOCK):
                    file.later[sector] = file.later.get(sector, {0}) | {number}
            w.sim.poke(lost.device * BLOCK, stamp(number) * PER_BLOCK)
        if holder.dead and holder.held:
            w.write_device(holder, w.rng.choice(sorted(holder.held)))


@step(14)
def server_write(w: World) -> None:
    file = some_file(w)
    sector = w.rng.randrange(FILE_BLOCKS * PER_BLOCK)
    count = w.rng.choice([1, 3, 8, 8, 16])
    number = w.next_number()
    old = file.size
    for s in range(sector, sector + count):
        file.later[s] = file.later.get(s, {0}) | {number}
    end = (sector + count) * SECTOR
    file.sizes.add(max(old, end))
    w.waiting(lambda: w.fs.write(file.ino, sector * SECTOR, stamp(number) * count))
    w.note("  write", number, file.name, "sectors", sector, count)
    if end > file.size:
        grow(file, end)
    for s in range(sector, sector + count):
        file.put(s, {number})
    w.taken(file, sector // PER_BLOCK, (sector + count - 1) // PER_BLOCK + 1)


def grow(file: File, size: int) -> None:
    for s in range((file.size + SECTOR - 1) // SECTOR, (size + SECTOR - 1) // SECTOR):
        file.put(s, {0})
    file.beyond.clear()
    file.size = size
    file.sizes.add(size)


@step(8)
def server_truncate(w: World) -> None:
    file = some_file(w)
    size = w.rng.randrange(FILE_BLOCKS * PER_BLOCK) * SECTOR
    file.sizes.add(size)
    for s in [s for s in file.later if s * SECTOR >= size]:
        file.later[s].add(0)
    w.waiting(lambda: w.fs.truncate(file.ino, size))
    w.note("  truncate", file.name, file.size, "to", size)
    file.resize(size)
    w.taken(file, size // BLOCK, 1 << 50)


@step(6)
def server_punch(w: World) -> None:
    file = some_file(w)
    first, count = some_range(w)
    span = range(first * PER_BLOCK, (first + count) * PER_BLOCK)
    for s in span:
        file.later.setdefault(s, {0}).add(0)
    offset, length = first * BLOCK, count * BLOCK
    w.waiting(
        lambda: w.fs.fallocate(file.ino, offset, length, keep_size=True, punch_hole=True)
    )
    for s in span:
        file.put(s, {0})
    w.taken(file, first, first + count)


@step(6)
def server_clone(w: World) -> None:
    source, target = some_file(w), some_file(w)
    first, count = some_range(w)
    end = min((first + count) * BLOCK, source.size // BLOCK * BLOCK)
    if source is target or end <= first * BLOCK:
        return
    w.waiting(lambda: lib.extfs_layout_settle(w.fs.raw))
    span = range(first * PER_BLOCK, end // SECTOR)
    for s in span:
        target.later[s] = target.later.get(s, {0}) | source.later.get(s, {0})
    target.sizes.add(max(target.size, end))
    done = w.waiting(
        lambda: checked(
            lib.extfs_clone(
                w.fs.raw, source.ino, first * BLOCK, target.ino, first * BLOCK, end - first * BLOCK
            )
        )
    )
    w.count("clone")
    if end > target.size:
        grow(target, end)
    if done != end - first * BLOCK:
        raise Violation(f"cloned {done} of {end - first * BLOCK}")
    for s in span:
        # the holders of the source may have written until the very moment
        target.put(s, source.allowed(s))
    w.taken(target, first, end // BLOCK)
    w.taken(source, first, end // BLOCK)


@step(3)
def server_exchange(w: World) -> None:
    one, other = some_file(w), some_file(w)
    first, count = some_range(w)
    end = min((first + count) * BLOCK, one.size // BLOCK * BLOCK, other.size // BLOCK * BLOCK)
    if one is other or end <= first * BLOCK:
        return
    span = range(first * PER_BLOCK, end // SECTOR)
    for s in span:
        both = one.later.get(s, {0}) | other.later.get(s, {0})
        one.later[s], other.later[s] = set(both), set(both)
    w.waiting(
        lambda: checked(
            lib.extfs_exchange(
                w.fs.raw, one.ino, first * BLOCK, other.ino, first * BLOCK, end - first * BLOCK
            )
        )
    )
    w.count("exchange")
    for s in span:
        mine, theirs = one.allowed(s), other.allowed(s)
        one.put(s, theirs)
        other.put(s, mine)
    w.taken(one, first, end // BLOCK)
    w.taken(other, first, end // BLOCK)


@step(3)
def unlink(w: World) -> None:
    if len(w.files) < 2:
        return
    file = w.rng.choice(list(w.files.values()))
    w.fs.unlink(core.ROOT_INODE, file.name)
    del w.files[file.ino]
    w.sync()


@step(4)
def missed_recall(w: World) -> None:
    """Somebody asks; time passes."""
    file = some_file(w)
    first, count = some_range(w)
    checked(lib.extfs_layout_recall(w.fs.raw, file.ino, 0, ANY, first * BLOCK, count * BLOCK))
    if w.rng.random() < 0.5:
        w.pump()
    w.advance()
    lib.extfs_layout_settle(w.fs.raw)
    w.pump()


@step(3)
def closes(w: World) -> None:
    """A holder's descriptor is closed; it goes on writing."""
    holder = some_holder(w)
    try:
        w.retry(lambda: lib.extfs_holder_lost(w.fs.raw, holder.id))
    except CoreError as error:
        if error.errno != errno.ENOENT or holder.held:
            raise Violation(f"holder {holder.id} is unknown, and holds {holder.held}") from error
    holder.dead = True
    w.note(f"  {holder.id} closes, holding", sorted(holder.held))


@step(3)
def fence(w: World) -> None:
    dead = [h for h in w.holders if h.dead]
    if dead:
        holder = w.rng.choice(dead)
        w.note(f"  {holder.id} is fenced")
        holder.memory.clear()
        holder.held.clear()
        with contextlib.suppress(CoreError):
            w.retry(lambda: lib.extfs_holder_fenced(w.fs.raw, holder.id))
        w.holders.remove(holder)
        lib.extfs_layout_settle(w.fs.raw)


@step(6)
def sync(w: World) -> None:
    w.sync()


@step(10)
def look(w: World) -> None:
    w.pump()
    w.look()


@step(3)
def daemon_dies(w: World) -> None:
    """The process ends, the device and the holders live on."""
    w.fs.abandon()
    w.open()
    w.count("daemon died")
    w.look(crashed=True)
    for holder in list(w.holders):
        # a loss that was not durable did not happen
        holder.memory = [lost for lost in holder.memory if lost.syncs != w.syncs]
        if holder.dead:
            continue
        if not holder.held or w.rng.random() < 0.5:
            w.resume(holder)
        else:
            holder.dead = True


def run_one(run: Run) -> dict[str, int]:
    """Violation, with what broke. Returns what was done, by name."""
    w = World(run)
    names = list(STEPS)
    weights = [STEPS[n][0] for n in names]
    cut = w.rng.random() < 0.5
    if cut:
        w.sim.crash_at(w.sim.events + w.rng.randrange(5, 400))
    try:
        for name in w.rng.choices(names, weights, k=run.steps):
            w.count(name)
            w.note(name)
            STEPS[name][1](w)
        if not w.sim.crashed:
            w.look()
    except OSError as error:
        if not w.sim.crashed and error.errno != errno.ENOSPC:
            raise
        if not w.sim.crashed:
            w.count("full")
    if w.sim.crashed:
        after_the_cut(w)
    try:
        w.fs.close()
    except OSError:
        if not w.sim.crashed:
            raise
    return w.counts


def after_the_cut(w: World) -> None:
    """Everybody lost power. Holders come back, and write what they remember where it was."""
    w.fs.abandon()
    w.sim.restart(w.run.seed)
    w.open()
    w.count("power cut")
    w.look(crashed=True)
    for holder in w.holders:
        holder.memory += [
            Lost(t.device, *key, w.syncs) for key, t in holder.held.items() if t.state == INVALID
        ]
        holder.held.clear()
        holder.dead = True
    for _ in range(6):
        lost_holder_writes(w)
        server_write(w)
        server_punch(w)
        w.look()


def seeds(first: int, count: int) -> Iterator[int]:
    yield from range(first, first + count)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--mutant", default="NONE", choices=[m.name for m in core.Mutant])
    chosen = parser.parse_args()
    total: dict[str, int] = {}
    for seed in seeds(chosen.seed, chosen.count):
        run = Run(seed, core.Mutant[chosen.mutant], chosen.steps, chosen.trace)
        try:
            for name, n in run_one(run).items():
                total[name] = total.get(name, 0) + n
        except Violation as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            print(
                f"repeat: python -m oracle.canary --seed {seed} --steps {run.steps}"
                f" --mutant {run.mutant.name}",
                file=sys.stderr,
            )
            return 1
    print(", ".join(f"{name} {n}" for name, n in sorted(total.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
