"""The world of the layout simulation: time, network, disk, server, and what may be read.

One seed decides everything: how long messages, threads and I/O take, which connections break, when
the power goes. Time is virtual: `World.run` takes the next thing from a heap. The core is the real
one on the simulated device, which was full of a canary pattern before it was formatted.

Oracle. Every write of a block has a number, and all its sectors say it (`stamp`). A read of a block
must return, in each sector, zeros or the number of a write of this block of this file, and

  - not that of a write that reached the disk when its writer had no grant of it any more;
  - not one that is *overtaken*: a write that began after it had ended, was acknowledged (by
    LAYOUTCOMMIT, by WRITE, or locally) before the read began. Zeros are overtaken by all.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from oracle.canary_world import CANARY, number_of, stamp

from extfs.core import ROOT_INODE, CoreError, EventType, Filesystem, Iomode, Mutant, SimDevice, mkfs
from extfs.nfs.service import Service, ServiceOptions
from nfs.reference_client import Violation
from nfs.wire import Wire, make_service

BLOCK = 4096
SECTOR = 512
PER_BLOCK = BLOCK // SECTOR
DEVICE_BYTES = 48 << 20
RECALL_MS = 2000
FILES = 3
FILE_BLOCKS = 40
OPTIONS = ServiceOptions(grace_seconds=20.0, callback_seconds=3.0)


@dataclass(eq=False)
class Write:
    """A write of a block. Times are virtual seconds; infinity: not (yet)."""

    number: int
    file: int
    block: int
    began: float
    ended: float = float("inf")
    acknowledged: float = float("inf")
    forbidden: bool = False


@dataclass
class Oracle:
    """All writes, by number, and by (file, block)."""

    writes: list[Write | None] = field(default_factory=lambda: [None])
    of_block: dict[tuple[int, int], list[Write]] = field(default_factory=dict)

    def begin(self, file: int, block: int, now: float) -> Write:
        write = Write(len(self.writes), file, block, now)
        self.writes.append(write)
        self.of_block.setdefault((file, block), []).append(write)
        return write

    def check(self, file: int, block: int, content: bytes, began: float, how: str) -> None:
        """A read of a block that began at this time returned this (sectors behind the end cut)."""
        for at in range(0, len(content) - len(content) % SECTOR, SECTOR):
            self._check_sector(file, block, content[at : at + SECTOR], began, how)

    def _check_sector(self, file: int, block: int, sector: bytes, began: float, how: str) -> None:
        where = f"{how}: file {file} block {block}"
        number = number_of(sector)
        if number is None:
            what = "the canary" if sector[:16] in CANARY else "garbage"
            raise Violation(f"{where}: {what} {sector[:16].hex()}")
        ended = float("-inf")
        if number:
            write = self.writes[number]
            assert write is not None
            if (write.file, write.block) != (file, block):
                raise Violation(f"{where}: another's {write}")
            if write.forbidden:
                raise Violation(f"{where}: written without a grant: {write}")
            ended = write.ended
        for other in self.of_block.get((file, block), ()):
            if other.began > ended and other.acknowledged < began:
                raise Violation(f"{where}: {number}, ended {ended}, is overtaken by {other}")


class SlowWire(Wire):
    """A connection whose messages from the server take their time, or never come."""

    def __init__(self, world: World, deliver: Callable[[bytes], None]) -> None:
        self.world = world
        self.deliver = deliver
        self.instant = True
        super().__init__(world.service)

    def _got(self, *pieces: bytes) -> None:
        if self.instant:
            super()._got(*pieces)
            return
        for message in self.reader.feed(b"".join(pieces)):
            self.world.later(0.05, lambda message=message: self._arrive(message))  # type: ignore[misc]

    def _arrive(self, message: bytes) -> None:
        if self.open:
            self.deliver(message)

    def post(self, message: bytes) -> None:
        """To the server."""

        def arrive() -> None:
            if self.open:
                self.service.receive(self.connection, message)

        self.world.later(0.03, arrive)


class World:
    """See the module. `happened` counts what a run was about."""

    def __init__(self, seed: int, mutant: Mutant = Mutant.NONE) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.mutant = mutant
        self.now = 1.0
        self.epoch = 0
        self.oracle = Oracle()
        self.happened: dict[str, int] = {}
        self.restarted: list[Callable[[bool], None]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._settled = 0.0
        self._timer_at: float | None = None
        self._thread = ThreadPoolExecutor(1)
        self._settling: Future[None] | None = None
        self.service: Any = None
        self.instant = False
        """Blocking calls take no time: for handshakes."""
        self.sim = SimDevice(DEVICE_BYTES, seed=seed)
        for at in range(0, DEVICE_BYTES, 1 << 20):
            self.sim.poke(at, CANARY * ((1 << 20) // SECTOR))
        self.sim.settle()
        with self.sim.device() as device:
            mkfs(device)
        self._start()
        self.inos = [
            self.fs.mknod(ROOT_INODE, b"file%d" % index, 0o100644).ino for index in range(FILES)
        ]
        self.fs.sync()

    def _start(self) -> None:
        with self.sim.device() as device:  # the filesystem takes it over if it can be opened
            self.fs = Filesystem.open(
                device, recall_ms=RECALL_MS, no_heartbeat=True, mutant=self.mutant
            )
        self.fs.layouts.set_clock(int(self.now * 1e9))
        self._timer_at = None
        self.service: Service
        self.service, _ = make_service(self.fs, options=OPTIONS, runner=self)  # type: ignore[arg-type]

    def close(self) -> None:
        self._abandon()
        self._thread.shutdown()
        self.sim.close()

    def count(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # -- time --

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._numbers), call))

    def later(self, most: float, call: Callable[[], None]) -> None:
        """Within so many seconds, unless the server's machine loses its power before."""
        epoch = self.epoch
        # Mostly soon, sometimes late.
        seconds = most * self.random.random() ** 3

        def guarded() -> None:
            if epoch == self.epoch:
                call()

        self.at(self.now + seconds, guarded)

    def run(self, until: float, over: Callable[[], bool] = lambda: False) -> None:
        while self._heap and self._heap[0][0] <= until and not over():
            when, _, call = heapq.heappop(self._heap)
            self._move(when)
            call()
            self._look()
        if not over():
            self._move(until)

    def _move(self, when: float) -> None:
        self.now = max(self.now, when)
        if self.sim.crashed:
            return
        if self.now - self._settled > 0.02:
            self._settled = self.now
            self.fs.layouts.set_clock(int(self.now * 1e9))
            self._settle()

    def _settle(self) -> None:
        """Let the core's thread do what is due. It may wait for what only a later time brings,
        a revoke for another one that waits for somebody: then time goes on."""
        if self._settling is None or self._settling.done():
            self._settling = self._thread.submit(self.fs.layouts.settle)
        if not wait([self._settling], timeout=0.3).done:
            self.count("not settled")

    def _abandon(self) -> None:
        """Nobody may be in the core then."""
        while self._settling is not None and not self._settling.done():
            self.now += 0.5
            self.fs.layouts.set_clock(int(self.now * 1e9))
            wait([self._settling], timeout=0.1)
        self.fs.abandon()

    def _look(self) -> None:
        """After each thing that happened: the core's events, and the power."""
        if self.sim.crashed:
            self.power_cut()
            return
        for event in self.fs.layouts.events():
            if event.type is EventType.REVOKED:
                self.count("revoked")
            self.later(0.01, lambda event=event: self.service.layout_event(event))  # type: ignore[misc]

    # -- nfs.driver.Runner --

    def clock(self) -> float:
        return self.now

    def blocking(
        self, call: Callable[[], Any], done: Callable[[Any, Exception | None], None]
    ) -> None:
        def begin() -> None:
            try:
                result, error = call(), None
            except Exception as failed:
                result, error = None, failed
            if instant:
                done(result, error)
            else:
                self.later(0.02, lambda: done(result, error))

        instant = self.instant
        if instant:
            begin()
        else:
            self.later(0.01, begin)

    def timers_changed(self) -> None:
        if self.service is None or not hasattr(self.service, "timers"):
            return
        due = self.service.timers.next_due()
        if due is not None and (self._timer_at is None or due < self._timer_at):
            self._timer_at = due
            epoch = self.epoch
            self.at(max(due, self.now), lambda: self._run_timers(epoch))

    def _run_timers(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._timer_at = None
            self.service.timers.run()
            self.timers_changed()

    # -- the disk --

    def disk_write(self, storage: int, write: Write, ino: int, holder: int) -> None:
        """A client's write of a block reaches the disk now."""
        if self.sim.crashed:
            return
        write.ended = self.now
        if not self._granted(ino, holder, write.block * BLOCK, Iomode.RW):
            write.forbidden = True
            self.count("stale write")
        try:
            self.sim.poke(storage, stamp(write.number) * PER_BLOCK)
        except CoreError:
            if not self.sim.crashed:
                raise

    def _granted(self, ino: int, holder: int, offset: int, iomode: Iomode) -> bool:
        return any(
            g.holder == holder and g.iomode is iomode and g.offset <= offset < g.offset + g.length
            for g in self.fs.layouts.grants(ino)
        )

    def kill(self) -> None:
        """The server dies and is started again; disk and clients live on."""
        if self.sim.crashed:
            return
        self.count("kill")
        self._begin_again(power=False)

    def power_cut(self) -> None:
        """Server, disk and clients. (A disk that loses what it had acknowledged, beside clients
        that do not know it, breaks the promise that LAYOUTCOMMIT relies on.)"""
        self.count("power cut")
        self._begin_again(power=True)

    def _begin_again(self, *, power: bool) -> None:
        self.epoch += 1
        self._abandon()
        if power:
            self._power_on()
        try:
            self._start()
        except CoreError:
            if not self.sim.crashed:
                raise
            self.count("power cut in a start")
            power = True
            self.epoch += 1
            self.fs.abandon()
            self._power_on()
            self._start()
        self._settled = self.now
        self.timers_changed()
        for told in self.restarted:
            told(power)

    def _power_on(self) -> None:
        self.sim.crash_at(0)
        self.sim.restart(self.random.randrange(1 << 30))

    # -- users of the mount --

    def local_write(self, file: int, block: int) -> bool:
        """False: layouts are in the way, they are recalled."""
        write = self.oracle.begin(file, block, self.now)
        try:
            self.fs.write(
                self.inos[file], block * BLOCK, stamp(write.number) * PER_BLOCK, nowait=True
            )
            write.ended = self.now
            self.fs.fsync(self.inos[file])
        except CoreError as error:
            if error.errno == errno.EAGAIN:
                write.forbidden = True
                self.count("local write refused")
                return False
            if not self.sim.crashed:
                raise
            return True
        write.acknowledged = self.now
        self.count("local write")
        return True

    def local_read(self, file: int, blocks: Iterable[int]) -> bool:
        """False: something is in the way; to wait for it would stop the clock."""
        try:
            for block in blocks:
                content = self.fs.read(self.inos[file], block * BLOCK, BLOCK, nowait=True)
                self.oracle.check(file, block, content, self.now, "local read")
        except CoreError as error:
            if error.errno != errno.EAGAIN and not self.sim.crashed:
                raise
            return False
        return True
