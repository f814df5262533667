"""Several threads on the same few files, then a power cut: a schedule of chance, a fixed verdict.

Two threads each own a file, write it, sync it, and clone it into files that never grow or are
written again; two others cut these clones short, remove and read them, and everybody disturbs
everybody through a few shared files. Every sector says who wrote it. What must hold, during the run
and after the cut:

1. a clone reads as the owner's file was when it was made, as far as it reaches;
2. what an fsync acknowledged of an owner's file is there, or something that its owner wrote later;
3. a shared file shows zeros and what was written to shared files, whole sectors of it;
4. fsck finds nothing, before the replay and after, and no block is lost when all is removed.

EXTFS_STRESS_SEEDS (number of cuts) makes it longer.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from oracle.powerloss import hold_to_fsck

from extfs import core

SECTOR = 512
OWN_SECTORS = 256
SHARED = 3
SHARED_BYTES = 200_000
ROOT = 1
IO_READ, IO_WRITE, IO_FLUSH = range(3)
TOLERATED = {errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENOSPC, errno.EINVAL}


def stamp(who: bytes, sequence: int) -> bytes:
    """One sector that tells its writer."""
    return (who + b"%07d" % sequence).ljust(16, b".") * (SECTOR // 16)


@dataclass
class Clone:
    """A file that only ever gets shorter."""

    ino: int
    name: bytes
    content: bytes
    durable: bool = False
    sizes: set[int] = field(default_factory=set)
    removed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Own:
    """An owner's file: per sector the sequence written last, and the one that is durable."""

    ino: int
    who: bytes
    written: list[int] = field(default_factory=lambda: [0] * OWN_SECTORS)
    durable: list[int] = field(default_factory=lambda: [0] * OWN_SECTORS)
    sequence: int = 0

    def content(self) -> bytes:
        return b"".join(stamp(self.who, n) for n in self.written)


class Stress:
    """One filesystem, its threads, and what they were promised."""

    def __init__(self, sim: core.SimDevice, seed: int) -> None:
        self.sim = sim
        self.seed = seed
        self.fs = open_fs(sim)
        self.clones: list[Clone] = []
        self.failures: list[str] = []
        self.errors_expected = False
        self.shared = [self.make(b"shared%d" % i) for i in range(SHARED)]
        self.owns = [Own(self.make(b"own%d" % i), b"own%d:" % i) for i in range(2)]
        for own in self.owns:
            self.write_own(own, 0, OWN_SECTORS)
            self.sync_own(own)

    def make(self, name: bytes) -> int:
        return self.fs.mknod(ROOT, name, 0o100644).ino

    def write_own(self, own: Own, first: int, count: int) -> None:
        own.sequence += 1
        sequence = own.sequence
        # From the start of the write on a cut may show it.
        for sector in range(first, first + count):
            own.written[sector] = sequence
        self.fs.write(own.ino, first * SECTOR, stamp(own.who, sequence) * count)

    def sync_own(self, own: Own) -> None:
        self.fs.fsync(own.ino)
        own.durable = list(own.written)

    def owner(self, own: Own, rng: random.Random) -> None:
        kind = rng.choices(["write", "sync", "clone"], [6, 2, 3])[0]
        if kind == "write":
            first = rng.randrange(OWN_SECTORS)
            self.write_own(own, first, rng.randint(1, min(64, OWN_SECTORS - first)))
        elif kind == "sync":
            self.sync_own(own)
        else:
            name = own.who + b"%d" % rng.getrandbits(40)
            content = own.content()
            clone = Clone(self.make(name), name, content, sizes={0, len(content)})
            copied = self.fs.copy(own.ino, 0, clone.ino, 0, len(content))
            clone.sizes.add(copied)
            self.fs.fsync(clone.ino)
            clone.sizes = {copied}
            clone.durable = True
            self.clones.append(clone)

    def reader(self, rng: random.Random) -> None:
        if not self.clones:
            return self.disturb(rng)
        clone = rng.choice(self.clones)
        with clone.lock:
            if clone.removed:
                return None
            kind = rng.choices(["read", "cut", "remove"], [3, 4, 2])[0]
            if kind == "read":
                self.compare(self.fs.read(clone.ino, 0, len(clone.content)), clone)
            elif kind == "cut":
                size = rng.randrange(min(clone.sizes) + 1)
                clone.sizes.add(size)
                self.fs.truncate(clone.ino, size)
                if rng.randrange(3) == 0:
                    self.fs.fsync(clone.ino)
                    clone.sizes = {size}
            else:
                clone.removed = True
                self.fs.unlink(ROOT, clone.name)
        return None

    def compare(self, found: bytes, clone: Clone) -> None:
        if len(found) not in clone.sizes:
            self.failures.append(f"{clone.name!r}: {len(found)} bytes, not {clone.sizes}")
        if found != clone.content[: len(found)]:
            at = next(i for i, byte in enumerate(found) if byte != clone.content[i])
            self.failures.append(
                f"{clone.name!r}: byte {at}: {found[at : at + 16]!r}, "
                f"not {clone.content[at : at + 16]!r}"
            )

    def disturb(self, rng: random.Random) -> None:
        fs, ino, other = self.fs, rng.choice(self.shared), rng.choice(self.shared)
        at = rng.randrange(SHARED_BYTES) // SECTOR * SECTOR
        length = rng.randint(1, 60) * SECTOR
        kind = rng.randrange(9)
        if kind < 3:
            fs.write(ino, at, stamp(b"shared:", rng.randrange(10**6)) * (length // SECTOR))
        elif kind == 3:
            fs.truncate(ino, at)
        elif kind == 4:
            modes = [
                {"keep_size": True, "punch_hole": True},
                {"zero_range": True},
                {"keep_size": True},
            ]
            fs.fallocate(ino, at, length, **rng.choice(modes))
        elif kind == 5:
            fs.copy(ino, at // 4096 * 4096, other, rng.randrange(40) * 4096, length)
        elif kind == 6:
            fs.fsync(ino)
        elif kind == 7:
            self.check_shared(ino)
        else:
            name = b"x%d" % rng.randrange(4)
            made = fs.mknod(ROOT, name, 0o100644).ino
            fs.copy(ino, 0, made, 0, SHARED_BYTES)
            fs.rename(ROOT, name, ROOT, b"x%d" % rng.randrange(4, 6))

    def check_shared(self, ino: int) -> None:
        content = self.fs.read(ino, 0, 2 * SHARED_BYTES)
        for at in range(0, len(content), SECTOR):
            sector = content[at : at + SECTOR]
            whole = sector[:16] * (SECTOR // 16)
            good = sector[:16].startswith(b"shared:") or not any(sector[:16])
            if not good or sector != whole[: len(sector)]:
                self.failures.append(f"inode {ino}, byte {at}: {sector[:32]!r}")
                return

    def run(self, trouble: Callable[[], None] = lambda: None) -> None:
        """Until the power goes, in four threads; `trouble` comes meanwhile."""
        steps: list[Callable[[random.Random], None]] = [
            lambda rng, own=own: self.mixed(lambda r: self.owner(own, r), rng) for own in self.owns
        ] + [lambda rng: self.mixed(self.reader, rng)] * 2
        threads = [
            threading.Thread(target=self.work, args=(step, self.seed * 10 + i), daemon=True)
            for i, step in enumerate(steps)
        ]
        for thread in threads:
            thread.start()
        trouble()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
        self.fs.abandon()

    def mixed(self, step: Callable[[random.Random], None], rng: random.Random) -> None:
        (self.disturb if rng.randrange(3) == 0 else step)(rng)

    def work(self, step: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not self.sim.crashed and not self.failures:
            try:
                step(rng)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EROFS) and self.errors_expected:
                    return
                if error.errno not in TOLERATED and not self.sim.crashed:
                    self.failures.append(f"{error!r}, shut down: {self.fs.shutdown_error!r}")
            except BaseException as error:
                self.failures.append(repr(error))
                raise

    def verify(self) -> None:
        """After the power has come back."""
        self.fs = open_fs(self.sim)
        found = {entry.ino: entry.name for entry in self.fs.scandir(ROOT)}
        for own in self.owns:
            self.check_own(own)
        for clone in self.clones:
            if clone.ino in found:
                self.compare(self.fs.read(clone.ino, 0, len(clone.content) + 1), clone)
            elif clone.durable and not clone.removed:
                self.failures.append(f"{clone.name!r} is gone")
        for ino, name in found.items():
            if name.startswith((b"shared", b"x")):
                self.check_shared(ino)

    def check_own(self, own: Own) -> None:
        content = self.fs.read(own.ino, 0, OWN_SECTORS * SECTOR)
        if len(content) != OWN_SECTORS * SECTOR:
            self.failures.append(f"{own.who!r}: {len(content)} bytes")
            return
        for sector in range(OWN_SECTORS):
            piece = content[sector * SECTOR : (sector + 1) * SECTOR]
            sequence = int(piece[5:12]) if piece.startswith(own.who) else -1
            promised = own.durable[sector] <= sequence <= own.written[sector]
            if not promised or piece != stamp(own.who, sequence):
                self.failures.append(
                    f"{own.who!r} sector {sector}: {piece[:32]!r}, durable "
                    f"{own.durable[sector]}, written {own.written[sector]}"
                )
                return

    def remove_all(self) -> None:
        for entry in list(self.fs.scandir(ROOT)):
            self.fs.unlink(ROOT, entry.name)
        self.fs.drain()


def open_fs(sim: core.SimDevice) -> core.Filesystem:
    return core.Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=7, inode_cache=8)


def free_blocks(fs: core.Filesystem) -> int:
    return fs.statfs().free


SEEDS = range(int(os.environ.get("EXTFS_STRESS_SEEDS", "6")))


def begin(seed: int) -> tuple[core.SimDevice, int]:
    """A fresh filesystem, and its free blocks."""
    sim = core.SimDevice(48 << 20, seed=seed + 1)
    device = sim.device()
    core.mkfs(device, journal_blocks=1024)
    device.close()
    fs = open_fs(sim)
    empty = free_blocks(fs)
    fs.close()
    sim.settle()
    return sim, empty


def judge(stress: Stress, restart: int, empty: int) -> None:
    sim = stress.sim
    assert not stress.failures
    sim.restart(restart)
    hold_to_fsck(sim)
    stress.verify()
    assert not stress.failures
    stress.remove_all()
    assert free_blocks(stress.fs) == empty
    stress.fs.close()
    hold_to_fsck(sim)
    sim.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_meet_a_power_cut(seed: int) -> None:
    rng = random.Random(seed)
    sim, empty = begin(seed)
    stress = Stress(sim, seed)
    sim.shuffle(True)
    sim.crash_at(sim.events + rng.randrange(200, 6000))
    stress.run()
    judge(stress, rng.getrandbits(32), empty)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_meet_device_errors(seed: int) -> None:
    """What fails somewhere ends who met it: nobody hangs, nothing lies."""
    rng = random.Random(seed)
    sim, empty = begin(seed)
    stress = Stress(sim, seed)
    stress.errors_expected = True
    sim.shuffle(True)
    start = sim.events
    sim.crash_at(start + 3000)

    def trouble() -> None:
        for _ in range(rng.randint(1, 4)):
            target = sim.events + rng.randrange(300)
            until = time.monotonic() + 0.2
            while sim.events < target and time.monotonic() < until:
                time.sleep(0.001)
            kind = rng.choices([IO_READ, IO_WRITE, IO_FLUSH], [1, 4, 1])[0]
            sim.fail(kind, 0, 48 << 20, rng.randint(1, 3))

    stress.run(trouble)
    sim.fail(IO_READ, 0, 0, 0)
    judge(stress, rng.getrandbits(32), empty)
