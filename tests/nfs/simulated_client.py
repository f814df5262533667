"""A client of the layout simulation: `LayoutHeader` of the reference client, with I/O and tasks.

A task is a generator. It yields a list of calls and gets (status, value of the last one), or a
number of seconds to sleep. `GoneError` is thrown into it when its client begins anew.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from extfs.nfs import constants as n
from extfs.nfs.scsi_layout import BaseVolume, decode_device_address
from extfs.nfs.stateids import ANONYMOUS, Stateid
from extfs.nfs.xdr import Reader
from nfs.calls import Call, getfh, putfh, putrootfh
from nfs.handshake import RECLAIM_COMPLETE, bind_conn, created, identify
from nfs.layout_calls import (
    ALL,
    ANY,
    BLOCK_TYPE,
    READ,
    RW,
    SCSI_TYPE,
    Callback,
    Layout,
    callback_reply,
    close,
    encoded,
    getdeviceinfo,
    layoutcommit,
    layoutget,
    layoutreturn,
    open_,
    read_callback,
    read_recall,
)
from nfs.reference_client import LayoutHeader, Tag, Violation, check_layout
from nfs.simulated_world import BLOCK, FILE_BLOCKS, FILES, PER_BLOCK, SlowWire, World, Write, stamp
from nfs.wire import (
    ROOT,
    create_session,
    encode,
    next_result,
    op,
    opaque,
    read_compound,
    sequence,
    u32,
    u64,
)

Task = Generator["list[Call] | float", Any, None]
SLOTS = 5
RETRY = (n.NFS4ERR_DELAY, n.NFS4ERR_GRACE)
TRY_LATER = (
    n.NFS4ERR_LAYOUTTRYLATER,
    n.NFS4ERR_RECALLCONFLICT,
    n.NFS4ERR_RETRY_UNCACHED_REP,  # the reply was lost with its connection
    *RETRY,
)
LOST = (n.NFS4ERR_BAD_STATEID, n.NFS4ERR_STALE_STATEID, n.NFS4ERR_OLD_STATEID)
PERSIST = n.CREATE_SESSION4_FLAG_PERSIST | n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN


class GoneError(Exception):
    """The client has begun anew."""


@dataclass
class Outstanding:
    """A request that has no answer, or one of LAYOUTGET whose answer is not through with: like
    Linux it has its slot until the device is known. `number` is its slot's sequence number."""

    calls: list[Call]
    task: Task
    number: int
    xid: int = 0
    answered: bool = False


@dataclass
class SimFile:
    """What a client has of a file. `busy`: disk I/O under way with its layout."""

    index: int
    fh: bytes = b""
    opened: Stateid | None = None
    header: LayoutHeader = field(default_factory=LayoutHeader)
    busy: int = 0
    getting: int = 0
    draining: bool = False
    committing: bool = False
    dirty: list[Write] = field(default_factory=list)
    size: int = 0


class SimClient:
    """See the module. `kept`: it asks for PERSIST. `device`: the id of the unit that it has
    registered its key at; of a unit that refuses its I/O it forgets everything."""

    def __init__(self, world: World, name: bytes, *, kept: bool, host: str = "127.0.0.1") -> None:
        self.world = world
        self.name = name
        self.host = host
        self.kind = SCSI_TYPE if world.scsi else BLOCK_TYPE
        self.device: bytes | None = None
        self.kept = kept
        self.boots = 0
        self.frozen = 0.0
        self.down = False
        """Without power; it boots a while after the server's last start."""
        self.stopping = False
        self.tasks = 0
        self.generation = 0
        world.restarted.append(self.server_restarted)
        self.boot()

    def _unless_dark(self, handshake: Callable[[], None]) -> None:
        """A power cut in the middle of it brings the client down, too: see `server_restarted`."""
        try:
            handshake()
        except AssertionError:
            if not self.world.sim.crashed:
                raise
        finally:
            self._instant(False)

    # -- sessions --

    def boot(self) -> None:
        """A new instance of the client."""
        self._unless_dark(self._boot)

    def _boot(self) -> None:
        self.down = False
        self.boots += 1
        self.holder = 0
        self._begin_anew()
        verifier = b"boot%d" % self.boots
        self._instant(True)
        found = identify(self.wire, self.name, verifier)
        self.clientid, self.number = found.clientid, found.sequence
        self._session()
        assert self._now(RECLAIM_COMPLETE) == n.NFS4_OK
        self._instant(False)
        self.start(self._open_all())

    def _begin_anew(self) -> None:
        self.generation += 1
        self.files = [SimFile(index) for index in range(FILES)]
        self.slots: list[Outstanding | None] = [None] * SLOTS
        self.numbers = [0] * SLOTS
        self.queue: deque[tuple[Task, list[Call]]] = deque()
        self.tasks = 0
        self.ready = False
        self.device = None
        self.answered = Outstanding([], iter(()), 0)  # type: ignore[arg-type]
        """The request whose answer came last."""

    def _session(self) -> None:
        flags = PERSIST if self.kept else n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
        got = created(self.wire.compound(create_session(self.clientid, self.number, flags)))
        self.number += 1
        self.session = got.id
        self.numbers = [0] * SLOTS

    def _now(self, *operations: bytes) -> int:
        """A request that takes no time, in slot 0."""
        self.numbers[0] += 1
        first = sequence(self.session, self.numbers[0], 0, SLOTS - 1)
        return self.wire.compound(first, *operations).status

    def _instant(self, on: bool) -> None:
        """Handshakes take no time."""
        self.world.instant = on
        if on:
            self.wire = SlowWire(self.world, self.on_message, self.host)
        self.wire.instant = on

    def disconnect(self) -> None:
        """The connection breaks; later there is another one, and what has no answer is repeated."""
        self.world.count("connection lost")
        self.wire.close()
        generation, epoch = self.generation, self.world.epoch

        def again() -> None:
            if (generation, epoch) == (self.generation, self.world.epoch):
                self._unless_dark(reconnect)

        def reconnect() -> None:
            self._instant(True)
            both = bind_conn(self.session, n.CDFC4_FORE_OR_BOTH)
            assert self.wire.compound(both).status == n.NFS4_OK
            self._instant(False)
            for slot, waiting in enumerate(self.slots):
                if waiting is not None and not waiting.answered:
                    self._post(slot, waiting)

        self.world.later(0.5, again)

    def server_restarted(self, power: bool) -> None:
        """All connections are lost, all sessions are gone; without power, so is the client."""
        self.wire.open = False
        if power or self.down:
            self.down = True
            self.frozen = 0.0
            self._begin_anew()
            self.world.later(0.5, self.boot)
            return
        generation = self.generation
        self.world.later(0.3, lambda: self._come_back(generation))

    def _come_back(self, generation: int) -> None:
        if generation == self.generation:
            self._unless_dark(self._resume if self.kept else self._reclaim)

    def _resume(self) -> None:
        self._instant(True)
        self._session()
        self._instant(False)
        again = [one for one in self.slots if one is not None and not one.answered]
        self.slots = [None] * SLOTS
        for waiting in again:
            self.queue.appendleft((waiting.task, waiting.calls))
        self._pump()

    def _reclaim(self) -> None:
        """The same instance without PERSIST: it commits what it has written, and begins anew."""
        old = self.files
        self._begin_anew()
        self._instant(True)
        found = identify(self.wire, self.name, b"boot%d" % self.boots)
        self.clientid, self.number = found.clientid, found.sequence
        self._session()
        self._instant(False)
        self.start(self._commit_in_grace(old))

    def _commit_in_grace(self, old: list[SimFile]) -> Task:
        for file in old:
            stateid = file.header.stateid
            ranges = file.header.trees.begin_commit()
            if stateid is None or file.busy or not ranges:
                continue
            dirty = file.dirty
            reclaim = self.world.chance(0.5)
            call = layoutcommit(ranges, stateid, file.size - 1, reclaim=reclaim, kind=self.kind)
            status, _ = yield [putfh(file.fh), call]
            if status == n.NFS4_OK:
                self.world.count("commit in grace")
                for write in dirty:
                    write.acknowledged = self.world.now
        while True:
            status, _ = yield [Call(RECLAIM_COMPLETE)]
            if status in (n.NFS4_OK, n.NFS4ERR_COMPLETE_ALREADY):
                break
            yield 0.1
        yield from self._open_all()

    # -- tasks, slots --

    def start(self, task: Task) -> None:
        self.tasks += 1
        self._advance(task, None)

    def _advance(self, task: Task, value: Any) -> None:
        generation = self.generation
        try:
            wanted = task.send(value)
        except StopIteration:
            if generation == self.generation:
                self.tasks -= 1
            return
        if isinstance(wanted, list):
            self.queue.append((task, wanted))
            self._pump()
        else:
            when = max(self.world.now + wanted, self.frozen)
            self.world.at(when, lambda: self._wake(task, generation, None))

    def _wake(self, task: Task, generation: int, value: Any) -> None:
        if generation != self.generation:
            task.close()
        elif self.world.now < self.frozen:
            self.world.at(self.frozen, lambda: self._wake(task, generation, value))
        else:
            self._advance(task, value)

    def _pump(self) -> None:
        while self.queue and None in self.slots:
            task, calls = self.queue.popleft()
            slot = self.world.random.choice([i for i, o in enumerate(self.slots) if o is None])
            self.numbers[slot] += 1
            waiting = self.slots[slot] = Outstanding(calls, task, self.numbers[slot])
            self._post(slot, waiting)

    def _post(self, slot: int, waiting: Outstanding) -> None:
        self.wire.xid += 1
        waiting.xid = self.wire.xid
        first = sequence(self.session, waiting.number, slot, SLOTS - 1)
        body = encode(first, *(call.encoded for call in waiting.calls))
        header = struct.pack(
            ">IIIIII", waiting.xid, n.RPC_CALL, 2, n.NFS4_PROGRAM, n.NFS_V4, n.NFSPROC4_COMPOUND
        )
        self.wire.post(header + ROOT + struct.pack(">II", n.AUTH_NONE, 0) + body)
        if self.world.chance(0.01):
            self.world.later(0.05, lambda: self.wire.open and self.disconnect())

    # -- messages --

    def on_message(self, message: bytes) -> None:
        if self.world.now < self.frozen:
            wire = self.wire
            self.world.at(self.frozen, lambda: wire._arrive(message))
            return
        xid, kind = struct.unpack_from(">II", message)
        if kind == n.RPC_CALL:
            self._called(read_callback(message))
            return
        for waiting in self.slots:
            if waiting is not None and waiting.xid == xid and not waiting.answered:
                value = self._result(waiting.calls, message)
                waiting.answered = True
                self.answered = waiting
                if not waiting.calls[-1].encoded.startswith(u32(n.OP_LAYOUTGET)):
                    self._free(waiting)
                self._advance(waiting.task, value)
                self._pump()
                return

    def _free(self, waiting: Outstanding) -> None:
        """Its slot; that is another one's already when there is a new session."""
        self.slots = [None if one is waiting else one for one in self.slots]
        self._pump()

    @staticmethod
    def _result(calls: list[Call], message: bytes) -> tuple[int, Any]:
        reader = Reader(message)
        header = [reader.u32() for _ in range(6)]
        assert header[5] == n.RPC_SUCCESS
        reply = read_compound(reader)
        first = next_result(reply.body)
        if first.status:
            raise Violation(f"SEQUENCE: {n.STATUS_NAMES[first.status]}")
        reply.body.fixed(16)
        for _ in range(5):
            reply.body.u32()
        value = None
        for call in calls:
            result = next_result(reply.body)
            if result.status:
                return result.status, None
            value = call.decode(result.body)
        return n.NFS4_OK, value

    def _called(self, callback: Callback) -> None:
        """CB_COMPOUND."""
        for session, number, slot in callback.referring:
            waiting = self.slots[slot] if slot < SLOTS else None
            if session == self.session and waiting is not None and waiting.number == number:
                self.world.count("referring call")
                self._answer(callback, 0, n.NFS4ERR_DELAY)
                return
        status = n.NFS4_OK
        if callback.op == n.OP_CB_LAYOUTRECALL:
            status = self._recalled(callback)
        self._answer(callback, status)

    def _answer(self, callback: Callback, status: int, sequence_status: int = n.NFS4_OK) -> None:
        self.wire.post(callback_reply(callback, status, sequence_status))

    def _recalled(self, callback: Callback) -> int:
        recall = read_recall(callback)
        if recall.kind != n.LAYOUT4_RET_REC_FILE:
            self.world.count("recall of all")
            if any(f.busy or f.getting or f.draining or f.committing for f in self.files):
                return n.NFS4ERR_DELAY
            for file in self.files:
                self._forget(file)
            return n.NFS4ERR_NOMATCHING_LAYOUT
        file = next((f for f in self.files if f.fh == recall.fh), None)
        if file is None:
            return n.NFS4ERR_NOMATCHING_LAYOUT
        if self.world.chance(0.1):
            return n.NFS4ERR_DELAY
        status = file.header.recalled(recall)
        self.world.count(f"recall {n.STATUS_NAMES[status]}")
        if status == n.NFS4_OK and not file.draining:
            file.draining = True
            self.start(self._drain(file))
        return status

    # -- opens --

    def _open_all(self) -> Task:
        for file in self.files:
            opened = open_(b"file%d" % file.index)
            while not file.fh:
                status, fh = yield [putrootfh(), opened, getfh()]
                assert status in (n.NFS4_OK, *RETRY), n.STATUS_NAMES[status]
                file.fh = fh or b""
                yield 0.1
            while file.opened is None:
                status, file.opened = yield [putrootfh(), opened]
                assert status in (n.NFS4_OK, *RETRY), n.STATUS_NAMES[status]
                yield 0.1
        self.ready = True
        for _ in range(3):
            self.start(self._work())

    def _reopen(self, file: SimFile) -> Task:
        """CLOSE, with the layouts: what is not committed by then would be lost."""
        opened = file.opened
        if opened is None or file.draining or file.getting or file.header.lsegs:
            return
        file.opened = None
        yield [putfh(file.fh), close(opened)]
        self._forget(file)
        _, file.opened = yield [putrootfh(), open_(b"file%d" % file.index)]
        self.world.count("close")

    # -- what clients do --

    def _work(self) -> Task:
        random = self.world.random
        while not self.stopping:
            yield random.random() * 0.3
            file = random.choice(self.files)
            if file.opened is None:
                continue
            first = random.randrange(FILE_BLOCKS)
            count = min(random.randint(1, 6), FILE_BLOCKS - first)
            what = random.random()
            if what < 0.45:
                yield from self._write(file, first, count)
            elif what < 0.65:
                yield from self._read(file, first, count)
            elif what < 0.75:
                yield from self._commit(file)
            elif what < 0.82:
                yield from self._give_back(file, first, count)
            elif what < 0.87:
                yield from self._write_through_server(file, first)
            elif what < 0.90:
                yield from self._read_through_server(file, first)
            elif what < 0.93 and not (file.busy or file.draining or file.getting):
                if not file.dirty and not file.committing:
                    self._forget(file)
                    self.world.count("forgotten")
            elif what < 0.96:
                yield from self._reopen(file)

    def _forget(self, file: SimFile) -> None:
        file.header.forget()
        file.dirty.clear()

    def _layout(self, file: SimFile, first: int, count: int, iomode: int) -> Task:
        """LAYOUTGET; what came of it is in the header."""
        if file.draining or file.opened is None:
            return
        header = file.header
        stateid = header.stateid or file.opened
        offset, length = first * BLOCK, count * BLOCK
        if self.world.chance(0.2):
            length = ALL
        get = layoutget(offset, length, BLOCK, iomode, stateid, kind=self.kind)
        file.getting += 1
        status, layout = yield [putfh(file.fh), get]
        request = self.answered
        try:
            yield from self._got_layout(file, offset, length, status, layout, stateid)
        finally:
            file.getting -= 1
            self._free(request)

    def _got_layout(
        self,
        file: SimFile,
        offset: int,
        length: int,
        status: int,
        layout: Any,
        stateid: Stateid,
    ) -> Task:
        header = file.header
        if status == n.NFS4_OK:
            assert isinstance(layout, Layout)
            check_layout(layout, offset, length, BLOCK)
            if layout.kind != self.kind:
                raise Violation(f"a layout of type {layout.kind}")
            if self.world.scsi and not (yield from self._register(layout.extents[0].device)):
                if header.stateid is None or header.stateid.other == layout.stateid.other:
                    self._forget(file)
                return
            got = header.got(layout)
            self.world.count("layoutget" if got else "layoutget forgotten")
            if header.stateid is not None and not got:
                return
        elif status in LOST and stateid is not file.opened:
            if header.stateid is not None and header.stateid.other == stateid.other:
                if not file.busy:
                    self._forget(file)
                self.world.count("layout lost")
        else:
            self.world.count(f"layoutget {n.STATUS_NAMES[status]}")
            expected = (*TRY_LATER, *LOST, n.NFS4ERR_LAYOUTUNAVAILABLE, n.NFS4ERR_IO)
            if status not in expected:
                raise Violation(f"LAYOUTGET: {n.STATUS_NAMES[status]}")

    def _register(self, device: bytes) -> Task:
        """The key of a unit that is not known yet, once for each device id, whoever asks for it
        at the same time (bl_register_dev in fs/nfs/blocklayout/dev.c; what a reservation can
        promise rests on it, see `extfs.layout.server_reservation`). What it has from another device
        stays as it is, as with Linux. False: there is no such device."""
        while self.device != device:
            status, found = yield [getdeviceinfo(device, kind=self.kind)]
            if status == n.NFS4ERR_NOENT:
                self.world.count("device unknown")
                return False
            if status != n.NFS4_OK:
                assert status in TRY_LATER, n.STATUS_NAMES[status]
                yield 0.1
                continue
            volumes = decode_device_address(found[0])
            base = volumes[0]
            assert isinstance(base, BaseVolume)
            yield self.world.random.random() * 0.05
            if self.device != device:
                self.world.register(self.host, base.key)
                self.device = device
        return True

    def _refused_by_unit(self) -> None:
        """RESERVATION CONFLICT: nothing of the device is good any more."""
        self.device = None
        for file in self.files:
            if not file.busy:
                self._forget(file)

    def _write(self, file: SimFile, first: int, count: int) -> Task:
        blocks = range(first, first + count)
        if any(block not in file.header.trees.writable for block in blocks):
            yield from self._layout(file, first, count, RW)
        header = file.header
        if file.draining or file.opened is None or header.other is None:
            return
        mine = [b for b in blocks if b in header.trees.writable]
        if not mine:
            return
        ino, holder = self.world.inos[file.index], self._holder()
        file.busy += 1
        writes = []
        for block in mine:
            write = self.world.oracle.begin(file.index, block, self.world.now)
            writes.append(write)
            storage = header.trees.writable[block].storage
            late = max(0.0, self.frozen - self.world.now) * self.world.random.random()
            if self.world.chance(0.05):
                late += self.world.random.random()
            self._disk(late, storage, write, ino, holder)
        yield 0.0
        while any(w.ended == float("inf") for w in writes):
            yield 0.01
        file.busy -= 1
        if any(write.refused for write in writes):
            self._refused_by_unit()
            return
        if header.other is None:
            return
        for write in writes:
            if write.block in header.trees.writable:
                header.trees.wrote(write.block)
                file.dirty.append(write)
        file.size = max(file.size, (mine[-1] + 1) * BLOCK)
        self.world.count("disk write")
        if self.world.chance(0.1):
            self.frozen = self.world.now + self.world.random.random() * 5
            self.world.count("frozen")

    def _disk(self, late: float, storage: int, write: Write, ino: int, holder: int) -> None:
        generation = self.generation
        when = self.world.now + late + self.world.random.random() * 0.01

        def reach() -> None:
            if generation == self.generation:
                self.world.disk_write(storage, write, ino, holder, self.host)
            if write.ended == float("inf"):
                write.ended = self.world.now

        self.world.at(when, reach)

    def _holder(self) -> int:
        """Its number in the core, which stays over restarts of the server."""
        client = self.world.service.clients.get(self.clientid)
        if client is not None and client.holder_id:
            self.holder = client.holder_id
        return self.holder

    def _read(self, file: SimFile, first: int, count: int) -> Task:
        trees = file.header.trees
        blocks = range(first, first + count)
        if any(b not in trees.readable and b not in trees.writable for b in blocks):
            yield from self._layout(file, first, count, READ)
        if file.draining or file.header.other is None:
            return
        began = self.world.now
        file.busy += 1
        places: list[tuple[int, int]] = []
        for block in blocks:
            if block in trees.readable:
                storage = trees.readable[block]
            else:
                entry = trees.writable.get(block)
                storage = None if entry is None or entry.tag is Tag.INVALID else entry.storage
            if storage is not None:
                places.append((block, storage))
        holder, ino = self._holder(), self.world.inos[file.index]
        yield self.world.random.random() * 0.005
        file.busy -= 1
        if self.world.sim.crashed:
            return
        if not self.world.serves(self.host, began):
            self._refused_by_unit()
            return
        other = file.header.other
        live = any(state.other == other for state in self.world.service.layouts)
        mine = [g for g in self.world.fs.layouts.grants(ino) if g.holder == holder]
        grants = mine if live else []
        for block, storage in places:
            at = block * BLOCK
            if not any(g.offset <= at < g.offset + g.length for g in grants):
                self.world.count("stale read")
                continue  # revoked meanwhile: the client reads what it can, and nobody promises
            content = self.world.sim.peek(storage, BLOCK)
            self.world.oracle.check(file.index, block, content, began, "layout read")
            self.world.count("disk read")

    def _commit(self, file: SimFile) -> Task:
        header = file.header
        stateid = header.stateid
        if stateid is None or file.committing or not file.dirty:
            return
        file.committing = True
        ranges = header.trees.begin_commit()
        dirty, file.dirty = file.dirty, []
        call = layoutcommit(ranges, stateid, file.size - 1, kind=self.kind)
        while True:
            status, _ = yield [putfh(file.fh), call]
            if status not in RETRY:
                break
            yield 0.05
        file.committing = False
        header.trees.end_commit(status == n.NFS4_OK)
        if status == n.NFS4_OK:
            self.world.count("commit")
            for write in dirty:
                write.acknowledged = self.world.now
            return
        self.world.count(f"commit {n.STATUS_NAMES[status]}")
        if status in (n.NFS4ERR_BADLAYOUT, n.NFS4ERR_BADIOMODE, n.NFS4ERR_DELEG_REVOKED):
            raise Violation(f"a commit that Linux takes for done: {n.STATUS_NAMES[status]}")
        if status not in (*LOST, n.NFS4ERR_IO):
            raise Violation(f"LAYOUTCOMMIT: {n.STATUS_NAMES[status]}")
        if header.other == stateid.other and not file.busy:
            self._forget(file)

    def _give_back(self, file: SimFile, first: int, count: int) -> Task:
        """LAYOUTRETURN of a part, or of all; nothing may be under way with it."""
        if file.draining or file.getting or not file.header.lsegs:
            return
        whole = self.world.chance(0.4)
        start, end = (0, ALL) if whole else (first * BLOCK, (first + count) * BLOCK)
        file.draining = True
        yield from self._return(file, start, end)

    def _drain(self, file: SimFile) -> Task:
        """After a recall: everything of the file is committed and returned."""
        yield from self._return(file, 0, ALL)

    def _return(self, file: SimFile, start: int, end: int) -> Task:
        while file.busy or file.committing or file.getting:
            yield 0.02
        yield from self._commit(file)
        stateid = file.header.stateid
        if stateid is not None:
            length = ALL if end == ALL else end - start
            call = layoutreturn(start, length, ANY, stateid, layout_type=self.kind)
            while True:
                status, left = yield [putfh(file.fh), call]
                if status not in RETRY:
                    break
                yield 0.05
            if status == n.NFS4_OK and file.header.other == stateid.other:
                file.header.returned(start, end, left)
                self.world.count("return")
            elif status in LOST:
                self._forget(file)
                self.world.count("return of what is lost")
            elif status != n.NFS4_OK and status != n.NFS4ERR_IO:
                raise Violation(f"LAYOUTRETURN: {n.STATUS_NAMES[status]}")
        barrier = file.header.barrier
        file.draining = False
        if file.header.lsegs and barrier and (start, end) != (0, ALL):
            file.draining = True  # a recall came meanwhile: that wants all
            self.start(self._drain(file))

    # -- through the server --

    def _write_through_server(self, file: SimFile, block: int) -> Task:
        if file.header.lsegs or file.draining or file.getting:
            return  # Linux would use its layout
        write = self.world.oracle.begin(file.index, block, self.world.now)
        stateid = file.opened or ANONYMOUS
        call = op(
            n.OP_WRITE,
            encoded(stateid),
            u64(block * BLOCK),
            u32(n.FILE_SYNC4),
            opaque(stamp(write.number) * PER_BLOCK),
        )
        for _ in range(20):
            status, _ = yield [putfh(file.fh), Call(call, _written)]
            if status not in RETRY:
                break
            yield 0.1
        write.ended = self.world.now
        if status == n.NFS4_OK:
            write.acknowledged = self.world.now
            self.world.count("server write")

    def _read_through_server(self, file: SimFile, block: int) -> Task:
        began = self.world.now
        stateid = file.opened or ANONYMOUS
        call = op(n.OP_READ, encoded(stateid), u64(block * BLOCK), u32(BLOCK))
        status, content = yield [putfh(file.fh), Call(call, _contents)]
        if status == n.NFS4_OK:
            self.world.oracle.check(file.index, block, content, began, "READ")
            self.world.count("server read")

    # -- the end --

    def finish(self) -> Task:
        """Everything is committed and returned."""
        while any(file.draining for file in self.files):
            yield 0.1
        for file in self.files:
            file.draining = True
            yield from self._return(file, 0, ALL)

    def reboot(self) -> None:
        """The client's host restarts: what it was about to write is never written."""
        self.world.count("reboot")
        self.wire.close()
        self.frozen = 0.0
        self.boot()


def _written(body: Reader) -> None:
    body.u32()
    body.u32()
    body.fixed(8)


def _contents(body: Reader) -> bytes:
    body.boolean()
    return body.opaque(BLOCK)
