"""`scripts/bench nfs`: what compounds of the layout server cost on loopback, a peer beside it.

The client is a C program (nfs_calls.c) on a connection whose session was made here, so the times
are those of the server and of two wake-ups. The peer is NFS-Ganesha on a directory in memory, for
the compound that it has.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nfs import wire
from rich.table import Table

from extfs.nfs import constants as n
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.xdr import Reader

from . import nfs_guest, nfs_plot, nfs_where
from .mount import machine
from .targets import EXTFS, free_loop
from .targets import run as command
from .wide import wide_console

DEVICE_BYTES = 2 << 30
BLOCK = 4096
CONNECTIONS = 4
IDLE_CLIENTS = 500
LAYOUT_CALLS = {
    "layoutget_us": ("LAYOUTGET that allocates 1 MiB, durable", "< 250"),
    "layoutcommit_us": ("LAYOUTCOMMIT of one block, durable", "< 250"),
    "layoutget_flush_us": ("LAYOUTGET, device with a cache to flush", ""),
    "layoutcommit_flush_us": ("LAYOUTCOMMIT, device with a cache to flush", ""),
}
"""Medians in microseconds, and what is asked for."""
ALTERNATIONS = 4
CALLS_PER_SECOND = 4000
CLIENT_BYTES = 64 << 10

# What the Linux client asks of a file whose attributes have run out.
_ATTRIBUTES = wire.bitmap(
    n.FATTR4_TYPE, n.FATTR4_CHANGE, n.FATTR4_SIZE, n.FATTR4_FSID, n.FATTR4_FILEID, n.FATTR4_MODE,
    n.FATTR4_NUMLINKS, n.FATTR4_OWNER, n.FATTR4_OWNER_GROUP, n.FATTR4_RAWDEV,
    n.FATTR4_SPACE_USED, n.FATTR4_TIME_ACCESS, n.FATTR4_TIME_METADATA, n.FATTR4_TIME_MODIFY,
    n.FATTR4_MOUNTED_ON_FILEID,
)  # fmt: skip
_BEFORE_BODY = 4 + 24 + len(wire.ROOT) + 8
"""Mark, call header, credential and verifier."""
_EXTENT_BYTES = 44
_XID = 4
_SEQUENCE_NUMBER = _BEFORE_BODY + 12 + 4 + 16


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Client:
    """A client with a session, on a real socket. `path`: names from the root to its directory."""

    def __init__(self, port: int, owner: bytes, path: tuple[bytes, ...] = ()) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = RecordReader(1 << 24)
        self.xid = 1
        self.path = path
        verifier = struct.pack(">Q", time.time_ns())
        body = self._call(wire.exchange_id(owner, verifier))
        clientid, first = body.u64(), body.u32()
        self.id = self._call(wire.create_session(clientid, first)).fixed(16)
        self.number = 0
        self.run(wire.op(n.OP_RECLAIM_COMPLETE, wire.u32(0)))

    def close(self) -> None:
        """End the connection."""
        self.sock.close()

    def record(self, *operations: bytes) -> bytes:
        """A marked call."""
        self.xid += 1
        header = struct.pack(
            ">IIIIII", self.xid, n.RPC_CALL, n.RPC_VERSION, n.NFS4_PROGRAM, n.NFS_V4, 1
        )
        body = wire.encode(*operations, minor=1)
        return marked(header + wire.ROOT + struct.pack(">II", n.AUTH_NONE, 0) + body)

    def sequenced(self, *operations: bytes) -> bytes:
        """A marked call behind the next SEQUENCE."""
        self.number += 1
        return self.record(wire.sequence(self.id, self.number), *operations)

    def _answer(self) -> Reader:
        while True:
            received = self.sock.recv(1 << 16)
            if not received:
                raise RuntimeError("the server closed the connection")
            for message in self.reader.feed(received):
                if struct.unpack_from(">I", message, 4)[0] == n.RPC_REPLY:
                    return Reader(message, 24)

    def _call(self, *operations: bytes) -> Reader:
        """Results of the last of one operation, behind its status."""
        self.sock.sendall(self.record(*operations))
        return self._result(wire.read_compound(self._answer()))

    @staticmethod
    def _result(reply: wire.Reply) -> Reader:
        if reply.status != n.NFS4_OK:
            raise RuntimeError(n.STATUS_NAMES.get(reply.status, str(reply.status)))
        return wire.next_result(reply.body).body

    def run(self, *operations: bytes) -> Reader:
        """Run them; at the first result behind SEQUENCE's. During grace it is repeated."""
        for _ in range(200):
            self.sock.sendall(self.sequenced(*operations))
            reply = wire.read_compound(self._answer())
            if reply.status not in (n.NFS4ERR_GRACE, n.NFS4ERR_DELAY):
                break
            time.sleep(0.5)
        body = self._result(reply)
        body.fixed(16 + 20)
        return body

    def directory(self) -> bytes:
        """Filehandle of the directory to work in."""
        steps = [wire.op(n.OP_LOOKUP, wire.opaque(name)) for name in self.path]
        body = self.run(wire.op(n.OP_PUTROOTFH), *steps, wire.op(n.OP_GETFH))
        for _ in range(1 + len(steps)):
            wire.next_result(body)
        return wire.next_result(body).body.opaque(n.NFS4_FHSIZE)

    def create(self, name: bytes) -> tuple[bytes, bytes]:
        """A new open file: its filehandle and stateid."""
        open_ = wire.op(
            n.OP_OPEN, wire.u32(0), wire.u32(3 | n.OPEN4_SHARE_ACCESS_WANT_NO_DELEG), wire.u32(0),
            wire.u64(0), wire.opaque(b"bench"), wire.u32(n.OPEN4_CREATE), wire.u32(n.UNCHECKED4),
            wire.bitmap(n.FATTR4_MODE), wire.opaque(wire.u32(0o644)), wire.u32(n.CLAIM_NULL),
            wire.opaque(name),
        )  # fmt: skip
        body = self.run(wire.op(n.OP_PUTFH, wire.opaque(self.directory())), open_)
        wire.next_result(body)
        stateid = wire.next_result(body).body.fixed(16)
        lookup = wire.op(n.OP_LOOKUP, wire.opaque(name))
        put = wire.op(n.OP_PUTFH, wire.opaque(self.directory()))
        body = self.run(put, lookup, wire.op(n.OP_GETFH))
        wire.next_result(body)
        wire.next_result(body)
        return wire.next_result(body).body.opaque(n.NFS4_FHSIZE), stateid


@dataclass
class Repeated:
    """A call to be repeated: its record, and what grows from one to the next."""

    record: bytes
    patches: list[str] = field(default_factory=list)


def repeated(
    client: Client, *operations: bytes, grow: tuple[tuple[int, int, int], ...] = ()
) -> Repeated:
    """`grow`: (position behind SEQUENCE, width, step) of what grows besides xid and sequence."""
    record = client.sequenced(*operations)
    behind = _SEQUENCE_NUMBER + 16
    patches = [f"{_XID}:4:1", f"{_SEQUENCE_NUMBER}:4:1"]
    patches += [f"{behind + position}:{width}:{step}" for position, width, step in grow]
    return Repeated(record, patches)


def start(
    program: Path, client: Client, call: Repeated, count: int, work: Path
) -> subprocess.Popen[str]:
    """nfs_calls on the client's connection."""
    path = work / f"call-{client.sock.fileno()}"
    path.write_bytes(call.record)
    descriptor = client.sock.fileno()
    client.number += count - 1
    client.xid += count - 1
    return subprocess.Popen(
        [program, str(descriptor), path, str(count), *call.patches],
        pass_fds=(descriptor,), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def times(process: subprocess.Popen[str]) -> list[float]:
    """Microseconds of each call."""
    out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error.strip())
    return [int(line) / 1000 for line in out.split()]


def getattr_operations(filehandle: bytes) -> tuple[bytes, bytes]:
    """PUTFH+GETATTR."""
    return wire.op(n.OP_PUTFH, wire.opaque(filehandle)), wire.op(n.OP_GETATTR, _ATTRIBUTES)


def layoutget(stateid: bytes, offset: int) -> bytes:
    """LAYOUTGET of a block, for writing, as Linux sends it."""
    return wire.op(
        n.OP_LAYOUTGET, wire.u32(0), wire.u32(n.LAYOUT4_BLOCK_VOLUME),
        wire.u32(n.LAYOUTIOMODE4_RW), wire.u64(offset), wire.u64(BLOCK), wire.u64(BLOCK),
        stateid, wire.u32(BLOCK),
    )  # fmt: skip


def layoutcommit(stateid: bytes, offset: int, length: int) -> bytes:
    """LAYOUTCOMMIT of what was written there."""
    extent = struct.pack(">16sQQQI", bytes(16), offset, length, 0, 0)
    return wire.op(
        n.OP_LAYOUTCOMMIT, wire.u64(offset), wire.u64(length), wire.u32(0), stateid,
        wire.u32(1), wire.u64(offset + length - 1), wire.u32(0), wire.u32(n.LAYOUT4_BLOCK_VOLUME),
        wire.opaque(wire.u32(1) + extent),
    )  # fmt: skip


def getattr_calls(client: Client, filehandle: bytes) -> Repeated:
    """SEQUENCE+PUTFH+GETATTR."""
    return repeated(client, *getattr_operations(filehandle))


def layout_calls(
    client: Client, program: Path, count: int, work: Path, name: bytes
) -> tuple[list[float], list[float]]:
    """LAYOUTGET of one new block each; LAYOUTCOMMIT of one each."""
    filehandle, stateid = client.create(name)
    put = wire.op(n.OP_PUTFH, wire.opaque(filehandle))
    body = client.run(put, layoutget(stateid, 0))
    wire.next_result(body)
    got = wire.next_result(body).body
    got.boolean()
    sequence, other = got.u32(), got.fixed(12)
    at = len(put)
    call = repeated(
        client, put, layoutget(wire.u32(sequence) + other, 1 << 30),
        grow=((at + 16, 8, 1 << 20), (at + 40, 4, 1)),
    )  # fmt: skip
    gets = times(start(program, client, call, count, work))
    commit = layoutcommit(wire.u32(sequence + count) + other, 1 << 30, BLOCK)
    extent_at = at + len(commit) - _EXTENT_BYTES + 16
    call = repeated(
        client, put, commit,
        grow=((at + 4, 8, 1 << 20), (at + 44, 8, 1 << 20), (extent_at, 8, 1 << 20)),
    )  # fmt: skip
    commits = times(start(program, client, call, count, work))
    return gets, commits


# ---- servers -----------------------------------------------------------------------------------


class Extfs:
    """The layout server on a loop device over a file in memory."""

    name = "extfs"
    path: tuple[bytes, ...] = ()

    def __init__(self, work: Path) -> None:
        self.port = free_port()
        image = work / "extfs.img"
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        self.device = free_loop(image)
        self.mountpoint = work / "mnt"
        self.mountpoint.mkdir()
        command(EXTFS, "mkfs", "--force", self.device)
        self.daemon = subprocess.Popen(
            [
                EXTFS, "mount", "--foreground", self.device, self.mountpoint,
                "--nfs", f"127.0.0.1:{self.port}",
                "--export", "/:rw,insecure,no_root_squash,layouts=block",
            ],
            stdin=subprocess.DEVNULL, stderr=(work / "extfs.log").open("wb"),
        )  # fmt: skip
        wait_for(self.port, self.daemon)

    def flushes(self, on: bool) -> None:
        """Whether the kernel takes the device for one whose cache has to be flushed."""
        cache = Path("/sys/block", Path(self.device).name, "queue/write_cache")
        cache.write_text("write back" if on else "write through")

    def memory(self) -> int:
        """Resident bytes of the daemon."""
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) << 10

    def stop(self) -> None:
        """End it and give the device back."""
        self.flushes(True)  # the loop device would keep that for its next user
        if os.path.ismount(self.mountpoint):
            command("umount", self.mountpoint)
        self.daemon.wait(60)
        command("losetup", "--detach", self.device)


class Ganesha:
    """NFS-Ganesha with its VFS backend on an XFS over a file in memory."""

    name = "ganesha"
    path = (b"export",)

    def __init__(self, work: Path) -> None:
        self.port = free_port()
        image = work / "ganesha.img"
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        self.device = free_loop(image)
        self.mountpoint = work / "ganesha"
        self.mountpoint.mkdir()
        command("mkfs.xfs", "-q", "-f", self.device)
        command("mount", "-t", "xfs", self.device, self.mountpoint)
        config = work / "ganesha.conf"
        config.write_text(
            f"NFS_CORE_PARAM {{ NFS_Port = {self.port}; Protocols = 4; Bind_addr = 127.0.0.1;"
            " Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }\n"
            "NFSv4 { Grace_Period = 5; Lease_Lifetime = 10; Graceless = true;"
            f' RecoveryBackend = fs; RecoveryRoot = "{work}"; }}\n'
            f'EXPORT {{ Export_Id = 1; Path = "{self.mountpoint}"; Pseudo = "/export";'
            " Access_Type = RW; Squash = No_Root_Squash; Protocols = 4; SecType = sys;"
            " PrivilegedPort = false; FSAL { Name = VFS; } }\n"
        )
        self.daemon = subprocess.Popen(
            ["ganesha.nfsd", "-F", "-f", config, "-L", work / "ganesha.log", "-p", work / "g.pid"],
            stdin=subprocess.DEVNULL,
        )
        wait_for(self.port, self.daemon)

    def stop(self) -> None:
        """End it and give the device back."""
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        command("umount", self.mountpoint)
        command("losetup", "--detach", self.device)


def wait_for(port: int, daemon: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    for _ in range(600):
        if daemon.poll() is not None:
            raise RuntimeError("the server ended at its start")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the server does not answer")


# ---- the runs ----------------------------------------------------------------------------------


def measure_getattr(
    server: Extfs | Ganesha, program: Path, count: int, work: Path
) -> dict[str, Any]:
    """Latency on one connection; rate over several."""
    clients = [
        Client(server.port, b"bench-%d-%d" % (number, time.time_ns()), server.path)
        for number in range(CONNECTIONS)
    ]
    try:
        handles = [client.create(b"file-%d" % number)[0] for number, client in enumerate(clients)]
        one = times(start(program, clients[0], getattr_calls(clients[0], handles[0]), count, work))
        begin = time.perf_counter()
        running = [
            start(program, client, getattr_calls(client, handle), count, work)
            for client, handle in zip(clients, handles, strict=True)
        ]
        for process in running:
            times(process)
        rate = CONNECTIONS * count / (time.perf_counter() - begin)
    finally:
        for client in clients:
            client.close()
    return {
        "median": statistics.median(one),
        "p99": statistics.quantiles(one, n=100)[98],
        "rate": rate,
    }


def measure_layouts(server: Extfs, program: Path, count: int, work: Path) -> dict[str, float]:
    """Medians of LAYOUT_CALLS; with and without flushes of the device in turn."""
    found: dict[str, list[float]] = {name: [] for name in LAYOUT_CALLS}
    client = Client(server.port, b"layouts")
    try:
        for turn in range(2 * ALTERNATIONS):
            flushes = turn % 2 == 1
            server.flushes(flushes)
            calls = layout_calls(client, program, count // ALTERNATIONS, work, b"layouts-%d" % turn)
            for name, times_of_calls in zip(("layoutget", "layoutcommit"), calls, strict=True):
                found[f"{name}{'_flush' if flushes else ''}_us"] += times_of_calls
    finally:
        client.close()
    return {name: statistics.median(values) for name, values in found.items()}


def memory_of_clients(server: Extfs) -> float:
    """Resident bytes that an idle client with a session costs."""
    before = server.memory()
    clients = [Client(server.port, b"idle-%d" % number) for number in range(IDLE_CLIENTS)]
    cost = (server.memory() - before) / IDLE_CLIENTS
    for client in clients:
        client.close()
    return cost


def run(*, rounds: int, calls: int, guest_seconds: float, output: Path) -> None:
    """Measure, print, write OUTPUT.json. Servers are new in each round, in alternating order."""
    results: dict[str, list[dict[str, Any]]] = {"extfs": [], "ganesha": []}
    peers = [Extfs, Ganesha] if shutil.which("ganesha.nfsd") else [Extfs]
    layouts: dict[str, list[float]] = {name: [] for name in LAYOUT_CALLS}
    idle = 0.0
    for turn in range(rounds):
        for kind in peers if turn % 2 == 0 else reversed(peers):
            work = Path(tempfile.mkdtemp(prefix="extfs-bench-", dir="/dev/shm"))
            program = work / "nfs_calls"
            source = Path(__file__).with_name("nfs_calls.c")
            command("gcc", "-O2", "-std=gnu11", "-o", program, source)
            server = kind(work)
            try:
                results[kind.name].append(measure_getattr(server, program, calls, work))
                if isinstance(server, Extfs):
                    for name, median in measure_layouts(server, program, calls // 4, work).items():
                        layouts[name].append(median)
                    idle = memory_of_clients(server)
            finally:
                server.stop()
                shutil.rmtree(work, ignore_errors=True)
    guests = nfs_guest.run(rounds, guest_seconds, wide_console().print) if guest_seconds else None
    report(results, layouts, idle, guests, output)


def _median(rounds: list[dict[str, Any]], key: str) -> float | None:
    return statistics.median(entry[key] for entry in rounds) if rounds else None


def report(
    results: dict[str, list[dict[str, Any]]], layouts: dict[str, list[float]],
    idle: float, guests: dict[str, Any] | None, output: Path,
) -> None:  # fmt: skip
    """The table, the figures as JSON, and a plot."""
    medians = {
        name: {key: _median(rounds, key) for key in ("median", "p99", "rate")}
        for name, rounds in results.items()
    }
    ours, peer = medians["extfs"], medians["ganesha"]

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    table = Table("compound", "extfs", "NFS-Ganesha", "asked for", title="loopback, µs")
    name = "SEQUENCE+PUTFH+GETATTR"
    table.add_row(f"{name}, median", text(ours["median"]), text(peer["median"]), "< 200")
    table.add_row(f"{name}, 99 %", text(ours["p99"]), text(peer["p99"]), "")
    table.add_row(
        f"the same, calls/s, {CONNECTIONS} connections", text(ours["rate"]), text(peer["rate"]),
        f"> {CALLS_PER_SECOND:,}",
    )  # fmt: skip
    for name, (title, bar) in LAYOUT_CALLS.items():
        table.add_row(title, text(statistics.median(layouts[name])), "-", bar)
    table.add_row("memory of an idle client, KiB", f"{idle / 1024:.1f}", "-", "< 64")
    wide_console().print(table)
    if guests is not None:
        wide_console().print(nfs_guest.table(guests))
        wide_console().print(nfs_where.table(guests["where"]))
    found = {
        "machine": machine(),
        "getattr": results,
        **layouts,
        "idle_client_bytes": idle,
        "guests": guests,
    }
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    nfs_plot.plot(found, output.with_suffix(".png"))
