"""A server on the simulated device whose power can be cut, and a client with a persistent session
that sends what was not answered again, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from extfs.core import Filesystem, Mutant, SimDevice
from extfs.nfs import constants as n
from extfs.nfs.service import Service, ServiceOptions
from nfs.calls import ROOT, Call, Failed
from nfs.handshake import CONFIRMED, PERSIST, RECLAIM_COMPLETE, created, identify, sequence_result
from nfs.wire import (
    Reply,
    Runner,
    Wire,
    create_session,
    encode,
    make_service,
    next_result,
    read_compound,
    sequence,
)

NEVER_MS = 3_600_000


class Host:
    """The server; it opens the device. Nothing is committed but what somebody waits for."""

    def __init__(
        self, sim: SimDevice, mutant: Mutant = Mutant.NONE, options: ServiceOptions | None = None
    ) -> None:
        self.sim = sim
        self.mutant = mutant
        self.options = options
        self.start()

    fs: Filesystem
    service: Service
    runner: Runner

    def start(self) -> None:
        self.fs = Filesystem.open(
            self.sim.device(), commit_ms=NEVER_MS, no_heartbeat=True, mutant=self.mutant
        )
        self.service, self.runner = make_service(self.fs, options=self.options)

    def kill(self) -> None:
        """The process is killed; the device goes on."""
        self.fs.abandon()
        self.start()

    def cut(self, seed: int) -> None:
        """A power cut now, if there was none; and everything is started again."""
        self.fs.abandon()
        self.sim.crash_at(0)
        self.sim.restart(seed)
        self.start()


def results(reply: Reply, calls: tuple[Call, ...]) -> list[Any]:
    """The values behind SEQUENCE; `Failed` when an operation failed."""
    values = []
    for index in range(reply.count - 1):
        result = next_result(reply.body)
        if result.status != n.NFS4_OK:
            raise Failed(result.status, index, result.body)
        values.append(calls[index].decode(result.body))
    assert reply.status == n.NFS4_OK
    assert reply.body.done()
    return values


class SequenceError(Exception):
    """SEQUENCE failed."""

    def __init__(self, status: int) -> None:
        super().__init__(n.STATUS_NAMES[status])
        self.status = status


@dataclass
class Persistent:
    """The client: `id` of its session, `numbers` of the requests in its slots, as it knows them."""

    owner: bytes = b"persistent"
    clientid: int = 0
    id: bytes = b""
    first: int = 0
    granted: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    flags: int = 0
    wire: Wire | None = None

    def establish(self, host: Host, flags: int = PERSIST) -> Persistent:
        self.wire = Wire(host.service)
        found = identify(self.wire, self.owner)
        self.clientid, self.first = found.clientid, found.sequence
        got = created(self.wire.compound(create_session(self.clientid, self.first, flags)))
        self.id, self.granted, self.numbers = got.id, got.flags, {}
        if not found.flags & CONFIRMED:
            reply = self.send(host, 0, self.next(0), Call(RECLAIM_COMPLETE))
            assert reply.status == n.NFS4_OK
        return self

    def connect(self, host: Host) -> None:
        """Over a new connection."""
        self.wire = Wire(host.service)

    def next(self, slot: int = 0) -> int:
        self.numbers[slot] = self.numbers.get(slot, 0) + 1
        return self.numbers[slot]

    def send(
        self, host: Host, slot: int, number: int, *calls: Call, auth: bytes = ROOT, cache: int = 1
    ) -> Reply:
        """One request; the reply, behind the result of SEQUENCE."""
        if self.wire is None or self.wire.service is not host.service:
            self.connect(host)
        assert self.wire is not None
        head = sequence(self.id, number, slot, slot, cache)
        body = encode(head, *(call.encoded for call in calls), minor=2)
        xid = self.wire.send(body, auth=auth)
        reply = read_compound(self.wire.results(xid))
        if reply.status != n.NFS4_OK and reply.count == 1:
            raise SequenceError(reply.status)
        _, values = sequence_result(reply)
        self.flags = values[4]
        return reply

    def again(self, host: Host, *calls: Call, slot: int = 0, auth: bytes = ROOT) -> list[Any]:
        """The last request of the slot once more."""
        return results(self.send(host, slot, self.numbers[slot], *calls, auth=auth), calls)

    def do(self, host: Host, *calls: Call, slot: int = 0, auth: bytes = ROOT) -> list[Any]:
        """A new request."""
        return results(self.send(host, slot, self.next(slot), *calls, auth=auth), calls)
