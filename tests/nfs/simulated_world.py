"""The world of the layout simulation: time, network, disk, server, and what may be read.

One seed decides everything: how long messages, threads and I/O take, which connections break, when
the power goes. Time is virtual: `World.run` takes the next thing from a heap. The core is the real
one on the simulated device, which was full of a canary pattern before it was formatted.

Oracle. Every write of a block has a number, and all its sectors say it (`stamp`). A read of a block
must return, in each sector, zeros or the number of a write of this block of this file, and

  - not that of a write that reached the disk when its writer had no grant of it any more;
  - not one that is *overtaken*: a write that began after it had ended, was acknowledged (by
    LAYOUTCOMMIT, by WRITE, or locally) before the read began. Zeros are overtaken by all.

With `scsi` the disk is a unit that is reserved: it serves hosts that have registered a key. Who is
lost is fenced: decided, issued, preempted (with all that the host had sent by then), confirmed;
each after a while, and the server may die in between. Blocks that a fence set free are used again.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from oracle.canary_world import CANARY, number_of, stamp

from extfs.core import (
    ROOT_INODE,
    CoreError,
    EventType,
    FenceState,
    Filesystem,
    HolderState,
    Iomode,
    Mutant,
    SimDevice,
    mkfs,
)
from extfs.nfs.service import Service, ServiceOptions
from nfs.reference_client import Violation
from nfs.scsi_world import unit
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
    refused: bool = False


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

    def __init__(self, world: World, deliver: Callable[[bytes], None], host: str) -> None:
        self.world = world
        self.deliver = deliver
        self.instant = True
        super().__init__(world.service, host)

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

    def __init__(
        self, seed: int, mutant: Mutant = Mutant.NONE, *, scsi: bool = False, fences: bool = True
    ) -> None:
        """`fences`: the unit refuses who is fenced; without it only says so."""
        self.seed = seed
        self.scsi = scsi
        self.fences = fences
        self.unit = unit()
        self.registered: dict[str, int] = {}
        """Keys by host."""
        self.preempted: dict[str, float] = {}
        """When what a host had sent was aborted."""
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
        kind = "scsi" if self.scsi else "block"
        exports = (f"/:127.0.0.0/8,10.0.0.0/8,rw,insecure,no_root_squash,layouts={kind}",)
        options = replace(OPTIONS, unit=self.unit) if self.scsi else OPTIONS
        self.service, _ = make_service(self.fs, exports, options, self)  # type: ignore[arg-type]
        if self.scsi:
            self._rescan()

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
            elif event.type is EventType.FENCE_WANTED and self.scsi:
                self.later(0.1, lambda number=event.holder: self._decide(number))  # type: ignore[misc]
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

    # -- fences --

    def _rescan(self) -> None:
        """After a start: who was to be fenced is; others have time to come back."""
        decided = {record.holder for record in self.fs.layouts.fences()}
        for holder in self.fs.layouts.holders():
            if holder.state is HolderState.LOST:
                grace = 0.0 if holder.id in decided else RECALL_MS / 1000
                number, epoch = holder.id, self.epoch
                self.at(self.now + grace, lambda n=number, e=epoch: self._decide_in(n, e))  # type: ignore[misc]

    def _decide_in(self, number: int, epoch: int) -> None:
        if epoch == self.epoch:
            self._decide(number)

    def _still_lost(self, number: int) -> bool:
        record = self.fs.layouts.holder(number)
        return record is not None and record.state is HolderState.LOST and not self.sim.crashed

    def _put(self, number: int, state: FenceState) -> bool:
        try:
            self.fs.layouts.fence_put(number, state, 1)
        except CoreError as error:
            if self.sim.crashed or error.errno in (errno.EBUSY, errno.ENOENT):
                return False  # the power went; it came back in time; it is gone
            if error.errno != errno.EINVAL:  # a step back: another attempt has come further
                raise
        return True

    def _decide(self, number: int) -> None:
        if self._still_lost(number) and self._put(number, FenceState.DECIDED):
            self.count("fence decided")
            self.later(0.2, lambda: self._issue(number))

    def _issue(self, number: int) -> None:
        """READ KEYS, and the durable mark before the preempt. A key that is not there may yet be
        registered, or was by a server that died: then it waits."""
        if not self._still_lost(number):
            return
        record = self.fs.layouts.holder(number)
        assert record is not None
        key = record.spec.fence_key
        issued = {r.holder for r in self.fs.layouts.fences() if r.state is not FenceState.DECIDED}
        if key in self.registered.values():
            if self._put(number, FenceState.ISSUED):
                self.later(0.1, lambda: self._preempt(number, key))
        elif number in issued:
            self.later(0.1, lambda: self._confirm(number))
        else:
            self.count("fence of an absent key")
            self.later(2.0, lambda: self._issue(number))

    def _preempt(self, number: int, key: int) -> None:
        for host, one in list(self.registered.items()):
            if one == key and self.fences:
                del self.registered[host]
                self.preempted[host] = self.now
        self.later(0.1, lambda: self._confirm(number))

    def _confirm(self, number: int) -> None:
        if self._still_lost(number):
            self.count("fenced")
            self.fs.layouts.fenced(number)

    def register(self, host: str, key: int) -> None:
        """Over whatever is registered for this host."""
        if key != self.registered.get(host):
            self.count("registered")
        self.registered[host] = key

    def serves(self, host: str, sent: float) -> bool:
        """Whether the unit does what a host sent then."""
        if not self.scsi:
            return True
        return host in self.registered and sent > self.preempted.get(host, 0.0)

    # -- the disk --

    def disk_write(self, storage: int, write: Write, ino: int, holder: int, host: str) -> None:
        """A client's write of a block reaches the disk now."""
        if self.sim.crashed:
            return
        write.ended = self.now
        if not self.serves(host, write.began):
            write.refused = write.forbidden = True
            self.count("refused by the unit")
            return
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
