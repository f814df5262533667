"""Power cuts on the simulated device, checked against the oracle. A failure prints one command:

    python -m oracle.powerloss --seed N [--mutant NAME]        (in tests/)

What must hold after a cut (DESIGN 4):

1. The journal replays and the filesystem opens; fsck finds nothing.
2. Metadata is that of a prefix of the operations: exactly the state after some step k, and k is
   not before the last change of any inode whose fsync has returned.
3. Each 512-byte sector of a file is what it was after some step >= k, and not before its last
   fsync: the device was flushed before the commit record of step k was written, and a sector is
   never torn. So nothing
   acknowledged is lost, and no byte appears that was never written to this file: neither another
   file's nor the canary that fills the device.
4. The filesystem goes on working: a new file can be written, synced and read, and fsck is clean.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from extfs import core
from extfs.check.fsck import check_volume
from extfs.check.volume import Volume

from .driver import WEIGHTS, Driver, Op, random_ops
from .model import Model, Node, State
from .subjects import CoreSubject

DEVICE_BYTES = 48 << 20
SECTOR = 512


THEMES: list[dict[str, int]] = [
    WEIGHTS,
    {"create": 1, "write": 8, "append": 4, "truncate": 12, "fsync": 6},
    {"create": 2, "write": 8, "copy": 8, "truncate": 3, "fallocate": 5, "fsync": 3, "unlink": 1},
]
"""Programs: of everything; of one or two files that shrink and grow; of shared blocks."""


@dataclass(frozen=True)
class Cut:
    """One run: a program and the event at which the power goes."""

    seed: int
    mutant: core.Mutant = core.Mutant.NONE
    steps: int = 60

    def program(self) -> list[Op]:
        rng = random.Random(self.seed)
        return random_ops(rng, self.steps, THEMES[self.seed % len(THEMES)])


def formatted() -> core.SimDevice:
    """A fresh filesystem on a simulated device; clone it instead of formatting again."""
    sim = core.SimDevice(DEVICE_BYTES, seed=1)
    device = sim.device()
    core.mkfs(device, now_sec=1)
    device.close()
    sim.settle()
    return sim


def open_fs(sim: core.SimDevice, mutant: core.Mutant = core.Mutant.NONE) -> core.Filesystem:
    """Open with a small commit interval, so that groups of many sizes close by themselves."""
    device = sim.device()
    try:
        return core.Filesystem.open(device, no_heartbeat=True, commit_ms=5, mutant=mutant)
    except OSError:
        device.close()
        raise


class Violation(AssertionError):  # noqa: N818
    """A promise is broken; the text says which."""


def run_until_cut(sim: core.SimDevice, cut: Cut) -> Driver:
    """Run the program until the power goes (or it ends); the driver knows what was promised."""
    rng = random.Random(cut.seed ^ 0x5EED)
    fs = open_fs(sim, cut.mutant)
    driver = Driver(Model(), CoreSubject(fs), keep_history=True)
    driver.begin()
    sim.crash_at(sim.events + int(rng.expovariate(1 / 120)) + 1)
    checkpoint_every = rng.choice([0, 0, 3, 10])
    try:
        for number, op in enumerate(cut.program()):
            if checkpoint_every and number % checkpoint_every == 0:
                fs.checkpoint()
            driver.apply(op)
    except OSError:
        if not sim.crashed:
            raise
    finally:
        fs.abandon()
    return driver


def check(sim: core.SimDevice, driver: Driver, cut: Cut) -> None:
    """Open what is left and hold it to the promises. Violation."""
    hold_to_fsck(sim)
    fs = open_fs(sim)
    try:
        subject = CoreSubject(fs)
        found = subject.state()
        name_the_doubtful(driver, found)
        steps = [k for k in range(driver.durable, len(driver.states)) if matches(driver, k, found)]
        if not steps:
            raise Violation(
                f"metadata is no state of the steps {driver.durable} to "
                f"{len(driver.states) - 1}: {closest(driver, found)}"
            )
        check_some_step(driver, steps, found, subject)
        fs.drain()
        go_on(fs, subject, found, cut)
    finally:
        fs.close()
    hold_to_fsck(sim)


def hold_to_fsck(sim: core.SimDevice) -> None:
    """Promise 1, as the independent reader sees it."""
    findings = fsck(sim)
    if findings:
        raise Violation("fsck: " + "; ".join(findings[:5]))


def check_some_step(driver: Driver, steps: list[int], found: State, subject: CoreSubject) -> None:
    """Promise 3 for all files and one of the steps whose metadata this is (they may look alike)."""
    violation = None
    for step in steps:
        try:
            for ino, contents in driver.contents.items():
                if ino in found:
                    since = max(step, driver.synced.get(ino, 0))
                    check_contents(ino, found[ino], contents, subject, since)
        except Violation as error:
            violation = violation or error
        else:
            return
    assert violation is not None
    raise violation


def name_the_doubtful(driver: Driver, found: State) -> None:
    """Give the file that the interrupted operation may have made the number it got, if it did."""
    state = driver.states[-1]
    unknown = found.keys() - set().union(*driver.states)
    if 0 not in state or len(unknown) != 1:
        return
    ino = unknown.pop()
    driver.states[-1] = {
        (ino if number == 0 else number): (
            *described[:5],
            frozenset((name, ino if child == 0 else child) for name, child in described[5]),  # type: ignore[attr-defined]
        )
        for number, described in state.items()
    }


def matches(driver: Driver, step: int, found: State) -> bool:
    """Is this the state after a step, or on the way to the next if that takes several transactions?

    Between two steps only the size of the file being written may lie in between.
    """
    state = driver.states[step]
    if state == found:
        return True
    if state.keys() != found.keys() or step + 1 == len(driver.states):
        return False
    following = driver.states[step + 1]
    return all(
        state[ino] == found[ino]
        or (ino in driver.touched[step + 1] and between(state[ino], found[ino], following[ino]))
        for ino in state
    )


def between(old: tuple[object, ...], found: tuple[object, ...], new: tuple[object, ...]) -> bool:
    """The same but for the size, which lies between the two."""
    if old[:2] != found[:2] or old[3:] != found[3:]:
        return False
    sizes = (old[2], found[2], new[2])
    assert all(isinstance(size, int) for size in sizes)
    return sizes[1] in range(min(sizes[0], sizes[2]), max(sizes[0], sizes[2]) + 1)  # type: ignore[type-var, arg-type]


def closest(driver: Driver, found: State) -> str:
    """The state with the fewest differences, for the message."""

    def distance(step: int) -> int:
        state = driver.states[step]
        return sum(state.get(ino) != found.get(ino) for ino in state.keys() | found.keys())

    best = min(range(len(driver.states)), key=distance)
    state = driver.states[best]
    lines = [
        f"inode {ino}: {state.get(ino)} != {found.get(ino)}"
        for ino in sorted(state.keys() | found.keys())
        if state.get(ino) != found.get(ino)
    ]
    return f"closest is step {best}: " + "; ".join(lines)


def check_contents(
    ino: int,
    described: tuple[object, ...],
    contents: list[tuple[int, bytes]],
    subject: CoreSubject,
    least: int,
) -> None:
    """Promise 3 for one file."""
    size = described[2]
    assert isinstance(size, int)
    got = subject.read(Node(0, ino=ino), 0, size + 1)
    if len(got) != size:
        raise Violation(f"inode {ino}: read {len(got)} bytes of {size}")
    before = [version for step, version in contents if step <= least][-1:]
    allowed = with_limits(before + [version for step, version in contents if step > least])
    if any(got == version for version, limit in allowed if limit >= size):
        return
    for start in range(0, size, SECTOR):
        sector = got[start : start + SECTOR]
        if not sector_allowed(sector, start, allowed):
            raise Violation(
                f"inode {ino}: sector {start // SECTOR} of {size} bytes holds {sector[:24]!r}..., "
                f"which it never held since step {least}"
            )


def with_limits(versions: list[bytes]) -> list[tuple[bytes, int]]:
    """Each version with the offset from which on its bytes may not be there yet.

    A truncate takes no byte away before it is durable, so while the metadata is of the first
    version, what a later one has behind the shortest size in between must not show: neither the
    zeros of growing again nor what was written there then.
    """
    result = [(version, sys.maxsize) for version in versions[:1]]
    limit = sys.maxsize
    for version in versions[1:]:
        limit = min(limit, len(version))
        result.append((version, limit))
    return result


def sector_allowed(sector: bytes, start: int, allowed: list[tuple[bytes, int]]) -> bool:
    """Is the sector a version's, up to that version's limit, and an earlier one's behind it?"""
    if any(piece_matches(sector, start, version, limit) for version, limit in allowed):
        return True
    for version, limit in allowed:
        cut = limit - start
        if 0 < cut < len(sector) and piece_matches(sector[:cut], start, version, limit):
            rest = sector[cut:]
            if any(piece_matches(rest, limit, other, most) for other, most in allowed):
                return True
    return False


def piece_matches(piece: bytes, start: int, version: bytes, limit: int) -> bool:
    """Does the version have these bytes there, below its limit? Behind its end it has zeros."""
    end = start + len(piece)
    return end <= limit and version[start:end].ljust(len(piece), b"\0") == piece


def go_on(fs: core.Filesystem, subject: CoreSubject, found: State, cut: Cut) -> None:
    """Promise 4: new files can be made, written, synced and read."""
    content = bytes(random.Random(cut.seed).randbytes(9000))
    ino = fs.mknod(1, b"after-the-cut", 0o100600).ino
    fs.write(ino, 100, content)
    fs.fsync(ino)
    if fs.read(ino, 0, 10000) != bytes(100) + content:
        raise Violation("a file written after the cut reads differently")
    if ino in found:
        raise Violation(f"inode number {ino} was reused")


class SimVolume(Volume):
    """The independent reader of the format on a simulated device: what it shows now."""

    def __init__(self, sim: core.SimDevice) -> None:
        self.sim = sim
        self.path = "simulated device"
        self.overlay = {}
        self.size = DEVICE_BYTES

    def read_raw(self, number: int) -> bytes:
        return self.sim.peek(number << 12, 4096)


def fsck(sim: core.SimDevice) -> list[str]:
    """What the independent checker finds, the log replayed in memory."""
    report = check_volume(SimVolume(sim)).report
    return [] if report.clean else [str(finding) for finding in report.findings]


def one(base: core.SimDevice, cut: Cut) -> bool:
    """Make one cut and check it; False if the program ended before the cut."""
    sim = base.clone()
    try:
        driver = run_until_cut(sim, cut)
        crashed = sim.crashed
        sim.restart(cut.seed)
        try:
            check(sim, driver, cut)
        except OSError as error:
            raise Violation(f"an operation after the cut failed: {error}") from error
        return crashed
    finally:
        sim.close()


def violations(
    cuts: Iterator[Cut], base: core.SimDevice | None = None
) -> Iterator[tuple[Cut, Violation | None]]:
    """Each cut with what it violated, if anything."""
    base = base or formatted()
    for cut in cuts:
        try:
            one(base, cut)
        except Violation as violation:
            yield cut, violation
        else:
            yield cut, None


def command(cut: Cut) -> str:
    """What repeats a cut."""
    mutant = "" if cut.mutant is core.Mutant.NONE else f" --mutant {cut.mutant.name}"
    return f"PYTHONPATH=tests .venv/bin/python -m oracle.powerloss --seed {cut.seed}{mutant}"


def main() -> int:
    """Command line: some cuts, a failure line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--mutant", choices=[m.name for m in core.Mutant], default="NONE")
    arguments = parser.parse_args()
    cuts = (
        Cut(seed, core.Mutant[arguments.mutant])
        for seed in range(arguments.seed, arguments.seed + arguments.cuts)
    )
    failed = 0
    for cut, violation in violations(cuts):
        if violation:
            failed += 1
            print(f"{command(cut)}\n    {violation}", flush=True)
    print(f"{arguments.cuts} power cuts, {failed} violations")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
