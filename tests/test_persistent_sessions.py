"""A client with a persistent session, and a daemon that is killed under it, over and over: each
request is done exactly once, whether it had an answer before or is sent again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted, extfs_command
from faults import wait_for
from nfs.calls import Call, mkdir, path, putrootfh, remove, rename, savefh
from nfs.handshake import PERSIST, RECLAIM_COMPLETE, created
from nfs.persistence import results
from nfs.wire import (
    ROOT,
    create_session,
    encode,
    exchange_id,
    next_result,
    read_compound,
    sequence,
)
from test_cli_nfs import free_port

from extfs.nfs import constants as n
from extfs.nfs.rpc import RecordReader, marked
from extfs.nfs.xdr import Reader

pytestmark = pytest.mark.fuse

SLOTS = 6
KILLS = 5


class Dialogue:
    """One connection, one thread."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.records = RecordReader(1 << 24)
        self.ready: list[bytes] = []

    def send(self, xid: int, body: bytes) -> None:
        head = struct.pack(">6I", xid, n.RPC_CALL, n.RPC_VERSION, n.NFS4_PROGRAM, n.NFS_V4, 1)
        self.socket.sendall(bytes(marked(head + ROOT + bytes(8) + body)))

    def reply(self) -> tuple[int, Reader]:
        """xid and results of the next answer; `ConnectionError`: there is none to come."""
        while not self.ready:
            piece = self.socket.recv(1 << 16)
            if not piece:
                raise ConnectionResetError
            self.ready += self.records.feed(piece)
        reader = Reader(self.ready.pop(0))
        xid, *header = (reader.u32() for _ in range(6))
        assert header[4] == n.RPC_SUCCESS
        return xid, reader

    def ask(self, body: bytes) -> Reader:
        self.send(0xFFFF, body)
        return self.reply()[1]


@dataclass
class SlotState:
    """What it has sent last, and the names of its directory if all that was done is done once."""

    calls: tuple[Call, ...] = ()
    number: int = 0
    names: set[bytes] = field(default_factory=set)
    after: set[bytes] = field(default_factory=set)
    serial: int = 0


class Client:
    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.rng = random.Random(seed)
        self.slots = [SlotState() for _ in range(SLOTS)]
        self.resent = 0
        dialogue = self.dialogue = Dialogue(port)
        body = next_result(read_compound(dialogue.ask(encode(exchange_id(b"once")))).body).body
        clientid, first = body.u64(), body.u32()
        asked = create_session(clientid, first, PERSIST)
        got = created(read_compound(dialogue.ask(encode(asked))))
        assert got.flags & n.CREATE_SESSION4_FLAG_PERSIST
        self.id = got.id
        self.request(0, Call(RECLAIM_COMPLETE))
        self.answered()
        for number in range(SLOTS):
            self.request(number, putrootfh(), mkdir(b"%d" % number))
            self.answered()

    def request(self, number: int, *calls: Call) -> None:
        slot = self.slots[number]
        slot.calls, slot.number = calls, slot.number + 1
        self.send(number)

    def send(self, number: int) -> None:
        slot = self.slots[number]
        head = sequence(self.id, slot.number, number, SLOTS - 1, 1)
        self.dialogue.send(number, encode(head, *(call.encoded for call in slot.calls)))

    def answered(self) -> int:
        """An answer comes, and says that all went well."""
        number, reader = self.dialogue.reply()
        reply = read_compound(reader)
        assert reply.status == n.NFS4_OK, (n.STATUS_NAMES[reply.status], self.slots[number])
        head = next_result(reply.body)
        head.body.fixed(16)
        assert head.body.u32() == self.slots[number].number
        for _ in range(4):
            head.body.u32()
        results(reply, self.slots[number].calls)
        return number

    def change(self, number: int) -> None:
        """Something that is to be done once, in the slot's own directory."""
        slot, home = self.slots[number], b"%d" % number
        slot.serial += 1
        new = b"%d" % slot.serial
        kind = self.rng.randrange(4)
        if kind == 0 or not slot.names:
            slot.after = slot.names | {new}
            self.request(number, *path(home), mkdir(new))
            return
        old = self.rng.choice(sorted(slot.names))
        if kind == 1:
            slot.after = slot.names - {old}
            self.request(number, *path(home), remove(old))
        elif kind == 2:
            slot.after = slot.names - {old} | {new}
            self.request(number, *path(home), savefh(), rename(old, new))
        else:
            # Removed and made again under the same name: done twice it would not be the same.
            slot.after = slot.names | {new}
            self.request(number, *path(home), remove(old), mkdir(old), *path(home), mkdir(new))

    def rounds(self, answers: int) -> set[int]:
        """Changes in all slots until there were so many answers; returns the slots without one."""
        waiting: set[int] = set()
        for number in range(SLOTS):
            self.change(number)
            waiting.add(number)
        for _ in range(answers):
            number = self.answered()
            self.slots[number].names = self.slots[number].after
            self.change(number)
        return waiting

    def resume(self, waiting: set[int]) -> None:
        """After a restart: over a new connection, what had no answer."""
        self.dialogue = Dialogue(self.port)
        for number in waiting:
            self.send(number)
        for _ in waiting:
            number = self.answered()
            self.slots[number].names = self.slots[number].after
            self.resent += 1


@dataclass
class Daemon:
    device: rundir.LoopDevice
    mountpoint: Path
    port: int
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        said = self.log.stat().st_size if self.log.exists() else 0
        words = ("--nfs", f"127.0.0.1:{self.port}", "--export", "/:rw,insecure,no_root_squash")
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                extfs_command("mount", self.device, self.mountpoint, "--foreground", *words),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        def ready() -> bool:
            assert self.process is not None
            text = self.log.read_text(errors="replace")
            assert self.process.poll() is None, text
            return f"is mounted on {self.mountpoint}" in text[said:]

        wait_for(ready, "the mount is ready", 60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def daemon(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> Iterator[Daemon]:
    extfs("mkfs", loop_device)
    found = Daemon(
        loop_device,
        run_directory.new_mountpoint(),
        free_port(),
        run_directory.environment(),
        run_directory.path / "sessions.log",
    )
    found.start()
    yield found
    assert found.process is not None
    Mounted(Path(os.fspath(loop_device)), found.mountpoint, found.process, found.log).force_off()


def test_requests_are_done_once(daemon: Daemon) -> None:
    client = Client(daemon.port, 5)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: client.dialogue.socket.close())
        kill_and_resume(daemon, client)
    status = json.loads((daemon.mountpoint / ".extfs" / "status").read_text())["nfs"]
    [told] = status["clients"]
    assert [one["id"] for one in told["sessions"]] == [client.id.hex()]
    assert status["counters"].get("replies_lost", 0) == 0


def kill_and_resume(daemon: Daemon, client: Client) -> None:
    rng = random.Random(7)
    for _ in range(KILLS):
        waiting = client.rounds(rng.randrange(60))
        daemon.kill()
        client.dialogue.socket.close()
        daemon.start()
        client.resume(waiting)
        for number, slot in enumerate(client.slots):
            assert set(os.listdir(os.fsencode(daemon.mountpoint) + b"/%d" % number)) == slot.names
    assert client.resent == KILLS * SLOTS
