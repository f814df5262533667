"""Exchange, collapse, insert, clone, dedupe: against bytes, and as the checker sees them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import stat
import threading
from collections.abc import Callable, Iterator

import pytest
from oracle import powerloss

from extfs.core import CoreError, Filesystem, SimDevice

BLOCK = 4096
MIB = 1 << 20
FILE = stat.S_IFREG | 0o644
PIECES = 600  # ten transactions move them

# ---- against bytes -----------------------------------------------------------------------------


class Pair:
    """Two files and what they should hold."""

    def __init__(self, fs: Filesystem, rng: random.Random) -> None:
        self.fs = fs
        self.rng = rng
        self.inos = [fs.mknod(1, name, FILE).ino for name in (b"one", b"two")]
        self.bytes = [bytearray(), bytearray()]

    def blocks(self, most: int) -> int:
        return self.rng.randrange(most) * BLOCK

    def expect(self, valid: bool, call: Callable[[], object], refusal: int = errno.EINVAL) -> bool:
        if valid:
            call()
            return True
        with pytest.raises(CoreError) as error:
            call()
        assert error.value.errno == refusal
        return False

    def write(self) -> None:
        n, offset = self.rng.randrange(2), self.rng.randrange(40 * BLOCK)
        content = self.rng.randbytes(self.rng.randrange(1, 5 * BLOCK))
        self.fs.write(self.inos[n], offset, content)
        held = self.bytes[n]
        held.extend(bytes(max(0, offset + len(content) - len(held))))
        held[offset : offset + len(content)] = content

    def truncate(self) -> None:
        n, size = self.rng.randrange(2), self.rng.randrange(40 * BLOCK)
        self.fs.truncate(self.inos[n], size)
        held = self.bytes[n]
        held.extend(bytes(max(0, size - len(held))))
        del held[size:]

    def exchange(self) -> None:
        a, b, length = self.blocks(30), self.blocks(30), self.blocks(12) + BLOCK
        one, two = self.bytes
        fits = a + length <= len(one) and b + length <= len(two)
        if self.expect(fits, lambda: self.fs.exchange(self.inos[0], a, self.inos[1], b, length)):
            kept = one[a : a + length]
            one[a : a + length] = two[b : b + length]
            two[b : b + length] = kept

    def collapse(self) -> None:
        n, at, length = self.rng.randrange(2), self.blocks(30), self.blocks(6) + BLOCK
        held = self.bytes[n]
        fits = at + length < len(held)
        if self.expect(fits, lambda: self.fs.collapse(self.inos[n], at, length)):
            del held[at : at + length]

    def insert(self) -> None:
        n, at, length = self.rng.randrange(2), self.blocks(30), self.blocks(6) + BLOCK
        held = self.bytes[n]
        fits = at < len(held)
        if self.expect(fits, lambda: self.fs.insert(self.inos[n], at, length)):
            held[at:at] = bytes(length)

    def clone(self) -> None:
        a, b, length = self.blocks(30), self.blocks(30), self.blocks(12) + BLOCK
        one, two = self.bytes
        length = min(length, max(0, len(one) - a))
        whole = length % BLOCK == 0 or b + length >= len(two)
        fits = a < len(one) and whole
        if self.expect(
            fits, lambda: self.fs.clone(self.inos[0], a, self.inos[1], b, max(length, 1))
        ):
            two.extend(bytes(max(0, b + length - len(two))))
            two[b : b + length] = one[a : a + length]

    def dedupe(self) -> None:
        a, b, length = self.blocks(30), self.blocks(30), self.blocks(12) + BLOCK
        one, two = self.bytes
        if a + length > len(one) or b + length > len(two):
            return
        equal = (
            one[a + i : a + i + BLOCK] == two[b + i : b + i + BLOCK]
            for i in range(0, length, BLOCK)
        )
        same = BLOCK * len(list(itertools.takewhile(bool, equal)))
        done: list[int] = []
        if self.expect(
            same > 0,
            lambda: done.append(self.fs.dedupe(self.inos[0], a, self.inos[1], b, length)),
            errno.EBADE,
        ):
            assert done == [same]

    def look(self) -> None:
        for ino, held in zip(self.inos, self.bytes, strict=True):
            assert self.fs.read(ino, 0, len(held) + BLOCK) == held


@pytest.mark.parametrize("seed", range(3))
def test_maps_change_as_bytes_do(seed: int) -> None:
    rng = random.Random(seed)
    with powerloss.formatted() as sim:
        with powerloss.open_fs(sim) as fs:
            pair = Pair(fs, rng)
            steps = [pair.write, pair.write, pair.write, pair.truncate, pair.exchange]
            steps += [pair.exchange, pair.collapse, pair.insert, pair.clone, pair.dedupe]
            for _ in range(400):
                rng.choice(steps)()
            pair.look()
        assert powerloss.fsck(sim) == []
        with powerloss.open_fs(sim) as fs:
            pair.fs = fs
            pair.look()


# ---- power cuts --------------------------------------------------------------------------------


def piece(number: int) -> bytes:
    return number.to_bytes(4, "little") * (BLOCK // 4)


@pytest.fixture(scope="module")
def fragmented() -> Iterator[SimDevice]:
    """Files 2 and 3, written backwards, so that each block is an extent; file 4 is empty."""
    with powerloss.formatted() as sim:
        with powerloss.open_fs(sim) as fs:
            inos = [fs.mknod(1, name, FILE).ino for name in (b"one", b"two", b"other")]
            for number in reversed(range(PIECES)):
                for which, ino in enumerate(inos[:2], 1):
                    fs.write(ino, number * BLOCK, piece(which << 16 | number))
            for ino in inos:
                fs.fsync(ino)
        sim.settle()
        yield sim


@contextlib.contextmanager
def commits(fs: Filesystem, ino: int) -> Iterator[None]:
    """Somebody calls fsync without end, so that a long change becomes durable in many groups."""
    stop = threading.Event()

    def body() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                fs.write(ino, 0, b"x")
                fs.fsync(ino)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


CHANGES: dict[str, Callable[[Filesystem, int, int], None]] = {
    "exchange": lambda fs, one, two: fs.exchange(one, 0, two, 0, PIECES * BLOCK),
    "halves": lambda fs, one, two: fs.exchange(
        one, 0, one, PIECES // 2 * BLOCK, PIECES // 2 * BLOCK
    ),
    "collapse": lambda fs, one, two: fs.collapse(one, 40 * BLOCK, 200 * BLOCK),
    "insert": lambda fs, one, two: fs.insert(one, 40 * BLOCK, 200 * BLOCK),
}


def after(what: str, one: bytes, two: bytes) -> tuple[bytes, bytes]:
    half, start, length = PIECES // 2 * BLOCK, 40 * BLOCK, 200 * BLOCK
    return {
        "exchange": (two, one),
        "halves": (one[half:] + one[:half], two),
        "collapse": (one[:start] + one[start + length :], two),
        "insert": (one[:start] + bytes(length) + one[start:], two),
    }[what]


def contents(fs: Filesystem) -> tuple[bytes, bytes]:
    one, two = (fs.lookup(1, name).ino for name in (b"one", b"two"))
    return fs.read(one, 0, 8 * MIB), fs.read(two, 0, 8 * MIB)


@pytest.mark.parametrize("what", CHANGES)
def test_a_cut_change_is_all_or_nothing_and_never_wrong_on_disk(
    fragmented: SimDevice, what: str
) -> None:
    rng = random.Random(what)
    old = tuple(
        b"".join(piece(which << 16 | number) for number in range(PIECES)) for which in (1, 2)
    )
    new = after(what, *old)
    seen = {old: 0, new: 0}
    for _ in range(20):
        sim = fragmented.clone()
        with sim:
            fs = powerloss.open_fs(sim)
            inos = [fs.lookup(1, name).ino for name in (b"one", b"two", b"other")]
            sim.crash_at(sim.events + rng.randrange(1, 14))
            with commits(fs, inos[2]), contextlib.suppress(OSError):
                CHANGES[what](fs, inos[0], inos[1])
            fs.abandon()
            sim.restart(rng.randrange(1 << 30))
            # The log is replayed first; what is left of the change is still to be finished then.
            assert powerloss.fsck(sim) == []
            with powerloss.open_fs(sim) as again:
                found = contents(again)
                assert found in seen, "neither old nor new"
                seen[found] += 1
            assert powerloss.fsck(sim) == []
    assert seen[new]
