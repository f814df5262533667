"""What the server is: everything that it remembers, and the way of a record through it.

No sockets, no threads, no time of its own: whoever runs it (`extfs.nfs.server`, a simulation) hands
in records and events, runs blocking calls, and moves the clock. All methods are called in one
thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from extfs.core import Filesystem, LayoutEvent
from extfs.nfs import constants as n
from extfs.nfs.callbacks import Callbacks
from extfs.nfs.clients import ClientTable
from extfs.nfs.compound import Compound
from extfs.nfs.devices import Devices
from extfs.nfs.driver import Driver, Runner
from extfs.nfs.exports import Exports
from extfs.nfs.filehandles import Filehandles
from extfs.nfs.layouts import LayoutTable
from extfs.nfs.lease import Lease
from extfs.nfs.operations.table import OPERATIONS
from extfs.nfs.records import Records
from extfs.nfs.rpc import RejectedError, accepted, marked, read_call, reply_head
from extfs.nfs.scsi_layout import ScsiIdentity
from extfs.nfs.sessions import InProgress, Session, SessionTable
from extfs.nfs.state import Kind, States
from extfs.nfs.timers import Timers
from extfs.nfs.xdr import XdrError

__all__ = ["Connection", "Service", "ServiceOptions"]

log = logging.getLogger("extfs.nfs")

MIB = 1 << 20
CLIENTS_TOLD = 1000


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Limits and times. Bytes and seconds.

    `io_bytes`: of one READ or WRITE. `sessionless_bytes`: of the result of a COMPOUND without a
    session. `cached_bytes`: of a result that a slot keeps; `reply_cache_bytes`: of all that all
    slots may keep. `states`: opens, locks and delegations, of all clients and of one.
    `keep_clients`: those who ask for it survive a restart with all their state (records.py).
    `persistent_sessions`: so many sessions at most do so with them.
    `unit`: the device as a SCSI unit that can fence clients; without it there are no SCSI layouts.
    """

    device: str = ""
    lease_seconds: float = 90.0
    grace_seconds: float = 90.0
    callback_seconds: float = 10.0
    io_bytes: int = MIB
    sessionless_bytes: int = 4096
    cached_bytes: int = 16384
    slots: int = 64
    operations: int = 128
    clients: int = 4096
    sessions_of_client: int = 16
    reply_cache_bytes: int = 256 * MIB
    states: int = 1 << 19
    states_of_client: int = 1 << 17
    courtesy: bool = True
    keep_clients: bool = True
    persistent_sessions: int = 8192
    unit: ScsiIdentity | None = None

    @property
    def record_bytes(self) -> int:
        """The largest RPC record: a WRITE or READ and what stands around it."""
        return self.io_bytes + 8192


class Connection:
    """A connection of a client, whatever carries it. `peer`: numeric address and port."""

    __slots__ = ("_close", "_send", "closed", "host", "peer", "port", "running", "sessions")

    def __init__(
        self,
        peer: tuple[str, int],
        send: Callable[..., None],
        close: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.host, self.port = peer
        self.closed = False
        self.sessions: set[Session] = set()
        self.running = 0
        """Requests under way."""
        self._send = send
        self._close = close

    def send(self, *pieces: bytes | bytearray) -> None:
        """A marked record in pieces; to a connection that is closed it is lost."""
        if not self.closed:
            self._send(*pieces)

    def close(self) -> None:
        """Drop it."""
        self._close()


class Service:
    """The server of one filesystem. `clock`: seconds, monotonic.

    ValueError: an export offers SCSI layouts, and there is no unit that can fence, or none that
    clients can find.
    """

    def __init__(
        self,
        fs: Filesystem,
        exports: Exports,
        options: ServiceOptions,
        runner: Runner,
        clock: Callable[[], float],
    ) -> None:
        types = exports.layout_types()
        if n.LAYOUT4_SCSI in types and options.unit is None:
            raise ValueError("layouts=scsi needs a unit with persistent reservations")
        if len(types) > 1:
            log.warning(
                "exports offer block and SCSI layouts: hosts with block layouts do not register,"
                " so a unit that is reserved refuses their I/O"
            )
        self.fs = fs
        self.exports = exports
        self.options = options
        self.clock = clock
        self.runner = runner
        self.counters: Counter[str] = Counter()
        self.operations = OPERATIONS
        self.connections: set[Connection] = set()
        self.timers = Timers(clock, runner.timers_changed)
        self.driver = Driver(runner, self.timers)
        self.records = Records(self)
        self.epoch = self.records.epoch
        self.filehandles = Filehandles(fs, exports, self.records.secret)
        self.callbacks = Callbacks(self)
        self.clients = ClientTable(self)
        self.sessions = SessionTable(self)
        self.lease = Lease(self)
        self.states = States(self)
        self.devices = Devices(self)
        self.layouts = LayoutTable(self)
        self.records.restore()

    def count(self, name: str, by: int = 1) -> None:
        """Something happened."""
        self.counters[name] += by

    # -- connections and records --

    def connected(
        self, peer: tuple[str, int], send: Callable[..., None], close: Callable[[], None]
    ) -> Connection:
        """A client has connected."""
        connection = Connection(peer, send, close)
        self.connections.add(connection)
        return connection

    def disconnected(self, connection: Connection) -> None:
        """The connection is gone."""
        connection.closed = True
        self.connections.discard(connection)
        self.sessions.connection_lost(connection)
        self.callbacks.connection_lost(connection)

    def receive(self, connection: Connection, record: bytes) -> None:
        """A record came. `rpc.RecordError`: drop the connection."""
        try:
            call = read_call(record)
        except RejectedError as rejected:
            self.count("rpc_rejected")
            connection.send(marked(rejected.reply))
            return
        if call is None:
            self.callbacks.reply(connection, record)
        elif call.procedure == n.NFSPROC4_NULL:
            connection.send(marked(accepted(call.xid)))
        else:
            compound = Compound(self, connection, call.credential)
            connection.running += 1
            self.driver.run(
                compound.run(call.arguments),
                lambda result, error: self._finish(connection, call.xid, result, error),
            )

    def _finish(
        self,
        connection: Connection,
        xid: int,
        result: bytes | bytearray | None,
        error: Exception | None,
    ) -> None:
        """A COMPOUND has ended, with its result or in an error of its own."""
        connection.running -= 1
        if error is None:
            assert result is not None
            connection.send(reply_head(xid, len(result)), result)
        elif isinstance(error, InProgress):
            self.count("retransmissions")  # answered, on this connection, when it ends
            error.slot.waiter = lambda late: connection.send(reply_head(xid, len(late)), late)
        elif isinstance(error, XdrError):
            self.count("garbage_arguments")
            connection.send(marked(accepted(xid, n.RPC_GARBAGE_ARGS)))
        else:
            log.error("a request failed", exc_info=error)
            self.count("server_faults")
            connection.send(marked(accepted(xid, n.RPC_SYSTEM_ERR)))

    def status(self) -> dict[str, Any]:
        """For /.extfs/status and ``extfs clients``."""
        clients = self.clients.status()
        for client, entry in zip(self.clients, clients, strict=True):
            held = Counter(state.kind.name.lower() for state in self.states.of_client(client))
            entry["states"] = {kind.name.lower(): held[kind.name.lower()] for kind in Kind}
            entry["callback_path"] = self.callbacks.path_up(client)
        return {
            "epoch": self.epoch,
            "lease": self.lease.status(),
            "clients": clients[:CLIENTS_TOLD],
            "more": max(0, len(clients) - CLIENTS_TOLD),
            "states": self.states.status(),
            "layouts": self.layouts.status(),
            "counters": dict(self.counters),
        }

    # -- the core's events --

    def layout_event(self, event: LayoutEvent) -> None:
        """An event of the core about a holder, which may be a client of ours or not."""
        self.layouts.core_event(event)
        self.states.core_event(event)
