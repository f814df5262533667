"""What a compound costs in the server's own code, and which functions have the time.

    PYTHONPATH=scripts:tests .venv/bin/python -m benchmarks.nfs_profile [--calls N] [--top N]

The service runs in this process, without sockets, on a filesystem in a file in memory: what is left
are protocol, policy and the core; the time that a call waits for the journal is not counted. What
follows is each function's own share of the CPU time under cProfile.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import select
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfs import wire
from rich.table import Table

from extfs.core import Calls, Device, Filesystem, Prepared, mkfs
from extfs.nfs import constants as n
from extfs.nfs.driver import Done
from extfs.nfs.rpc import FRAGMENT_HEADER
from extfs.nfs.xdr import Reader

from .nfs import BLOCK, Client, getattr_operations, layoutcommit, layoutget
from .wide import wide_console

DEVICE_BYTES = 2 << 30
_FIRST = 1 << 30
_STEP = 1 << 20
_STATUS = slice(28, 32)
"""Of the COMPOUND, behind mark and header."""


class Loop:
    """A service and the calls of the core that it has begun."""

    def __init__(self, fs: Filesystem) -> None:
        self.service, _ = wire.make_service(fs)
        self.calls = Calls(fs)
        self.service.driver.begin = self._begin
        self.service.callbacks.path_up = lambda client: True  # type: ignore[method-assign]
        self.replies: list[bytes] = []
        self.connection = self.service.connected(("127.0.0.1", 700), self._sent, lambda: None)
        self.profile: cProfile.Profile | None = None
        self.core = 0.0

    def _sent(self, *pieces: bytes) -> None:
        self.replies.append(b"".join(pieces))

    def _begin(self, prepared: Prepared[Any], done: Done) -> tuple[Any, Exception | None] | None:
        begin = time.perf_counter()
        over = self.calls.begin(prepared, done)
        self.core += time.perf_counter() - begin
        return over

    def run(self, record: bytes) -> tuple[float, float]:
        """Seconds in Python and in the core until the record is answered."""
        self.replies.clear()
        self.core = busy = 0.0
        busy += self._timed(lambda: self.service.receive(self.connection, record))
        while not self.replies:
            select.select([self.calls], [], [])
            busy += self._timed(self._tell)
        return busy - self.core, self.core

    def _tell(self) -> None:
        for done, result, failed in self.calls.ended():
            done(result, failed)

    def _timed(self, call: Any) -> float:
        if self.profile is not None:
            self.profile.runcall(call)
            return 0.0
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class InProcess(Client):
    """A client of a service in this process."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.sock = self  # type: ignore[assignment] - sendall() is all that is asked of it
        self.xid, self.number, self.path = 1, 0, ()
        body = self._call(wire.exchange_id(b"profile", bytes(8)))
        clientid, first = body.u64(), body.u32()
        self.id = self._call(wire.create_session(clientid, first)).fixed(16)
        self.run(wire.op(n.OP_RECLAIM_COMPLETE, wire.u32(0)))

    def sendall(self, record: bytes) -> None:
        """As a socket has it."""
        self.loop.run(record[FRAGMENT_HEADER:])

    def _answer(self) -> Reader:
        return Reader(self.loop.replies.pop(0), FRAGMENT_HEADER + 24)


def records(client: InProcess, kind: str, count: int, name: bytes) -> Iterator[bytes]:
    """Marked calls of a kind, each to be answered before the next is asked for."""
    filehandle, opened = client.create(name)
    put = wire.op(n.OP_PUTFH, wire.opaque(filehandle))
    if kind == "GETATTR":
        for _ in range(count):
            yield client.sequenced(*getattr_operations(filehandle))
        return
    body = client.run(put, layoutget(opened, 0))
    wire.next_result(body)
    got = wire.next_result(body).body
    got.boolean()
    sequence, other = got.u32(), got.fixed(n.NFS4_OTHER_SIZE)
    for number in range(count):
        stateid = struct.pack(">I", sequence + number) + other
        get = client.sequenced(put, layoutget(stateid, _FIRST + number * _STEP))
        if kind == "LAYOUTGET":
            yield get
            continue
        client.sock.sendall(get)
        stateid = struct.pack(">I", sequence + number + 1) + other
        yield client.sequenced(put, layoutcommit(stateid, _FIRST + number * _STEP, BLOCK))


def measure(loop: Loop, client: InProcess, calls: int, top: int) -> None:
    """Both tables."""
    times = Table("compound", "Python, µs", "core, µs", title="medians")
    functions = {}
    for kind in ("GETATTR", "LAYOUTGET", "LAYOUTCOMMIT"):
        found = []
        for record in records(client, kind, calls, kind.encode()):
            found.append(loop.run(record[FRAGMENT_HEADER:]))
            assert loop.replies[0][_STATUS] == bytes(4), loop.replies[0].hex()
        half = found[len(found) // 2 :]
        python, core = (statistics.median(column) * 1e6 for column in zip(*half, strict=True))
        times.add_row(f"SEQUENCE+PUTFH+{kind}", f"{python:.1f}", f"{core:.1f}")
        profile = cProfile.Profile(time.thread_time)
        for record in records(client, kind, calls, kind.encode() + b" profiled"):
            loop.profile = profile
            loop.run(record[FRAGMENT_HEADER:])
            loop.profile = None
        functions[kind] = pstats.Stats(profile)
    wide_console().print(times)
    for kind, stats in functions.items():
        shown = Table("function", "%", title=f"{kind}, own time under cProfile")
        rows = {where: entry[2] for where, entry in stats.stats.items()}  # type: ignore[attr-defined]
        total = sum(rows.values())
        for where in sorted(rows, key=rows.__getitem__, reverse=True)[:top]:
            file, _, name = where
            module = "" if file == "~" else f"{Path(file).stem}."
            shown.add_row(f"{module}{name}", f"{rows[where] / total:.0%}")
        wide_console().print(shown)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--top", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        image = Path(directory, "image")
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        device = Device.open(str(image))
        mkfs(device)
        with Filesystem.open(device, no_heartbeat=True) as fs:
            loop = Loop(fs)
            measure(loop, InProcess(loop), options.calls, options.top)
            loop.calls.close()
            loop.service.records.finish()


if __name__ == "__main__":
    main()
