"""The sockets and threads of the layout server.

Each connection has a task that receives; what is answered at once is sent at once, by the task that
received it, and what the socket does not take is sent by a task of its own. A client that does not
read its replies, or sends more than `ServerOptions.running` requests at a time, is not read from
until it has caught up (back pressure); one that leaves records half sent costs no more than a
record.

Nothing that goes wrong in a task ends the daemon: a bug that a request, a timer or an event meets
is logged and counted, and costs one connection at most.

No memoryview outlives the statement that needs it: one that ends in a cycle of garbage, as frames
of cancelled tasks do, crashes the collector of CPython 3.11.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import trio

from extfs.core import Calls, Filesystem, LayoutEvent, Prepared
from extfs.nfs.driver import Done
from extfs.nfs.exports import Exports
from extfs.nfs.rpc import RecordError, RecordReader
from extfs.nfs.service import Connection, Service, ServiceOptions
from extfs.nfs.threads import Threads

__all__ = ["Server", "ServerOptions"]

log = logging.getLogger("extfs.nfs")

_RECEIVE_BYTES = 1 << 18
_BATCH = 32
"""Receives, or connections accepted, in a row before other tasks get a turn."""
_CONNECTIONS_OF_SESSION = 16
"""What Linux makes of one server at most (nconnect)."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """`listen`: addresses and ports. `backlog_bytes`: replies that one client has not
    read yet, beyond which no request of it is read; `running` of them may still add theirs."""

    listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 2049),)
    connections: int = 1024
    running: int = 128
    backlog_bytes: int = 8 << 20
    threads: int = 16


class _Peer:
    """A connection's socket, and what could not be sent yet."""

    def __init__(self, server: Server, sock: socket.socket, address: tuple[str, int]) -> None:
        self.server = server
        self.sock = sock
        self.queue: deque[bytes] = deque()
        self.sent = 0
        """Of the queue's first."""
        self.queued = 0
        self.sending = False
        self.scope = trio.CancelScope()
        self.room = trio.Event()
        self.used = trio.current_time()
        options, record_bytes = server.options, server.service.options.record_bytes
        # Requests that were let in are answered: all of them may be done before one reply is read.
        self._most = 2 * options.backlog_bytes + options.running * record_bytes
        self.connection: Connection = server.service.connected(address, self.send, self.close)

    def close(self) -> None:
        """End the connection's task."""
        self.scope.cancel()

    def send(self, *pieces: bytes | bytearray) -> None:
        """Send now what the socket takes; the rest later. The pieces must not change any more."""
        if not self.crowded():
            self.room.set()  # this is the reply of a request that is over
        if self.sending:
            self._queue(b"".join(pieces))
            return
        try:
            sent = self.sock.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent < sum(map(len, pieces)):
            self.sending = True
            self.sent = sent
            self.queued -= sent
            self.server.start(self._send_rest)
            self._queue(b"".join(pieces))

    def _queue(self, record: bytes) -> None:
        self.queue.append(record)
        self.queued += len(record)
        if self.queued > self._most:
            log.info("%s:%d does not read; dropped", self.connection.host, self.connection.port)
            self.close()

    def _send_queue(self) -> None:
        """What the socket takes now. BlockingIOError: it takes no more; OSError."""
        while self.queue:
            first = self.queue[0]
            with memoryview(first) as whole:
                sent = self.sock.send(whole[self.sent :])
            self.queued -= sent
            self.sent += sent
            if self.sent == len(first):
                self.queue.popleft()
                self.sent = 0

    async def _send_rest(self) -> None:
        try:
            while self.queue and not self.connection.closed:
                await trio.lowlevel.wait_writable(self.sock)
                with contextlib.suppress(BlockingIOError):
                    self._send_queue()
                if not self.crowded():
                    self.room.set()
        except (OSError, trio.ClosedResourceError):
            self.close()
        finally:
            self.sending = False

    def crowded(self) -> bool:
        """Whether to stop reading from it."""
        options = self.server.options
        return self.queued > options.backlog_bytes or self.connection.running >= options.running

    def spare(self) -> bool:
        """Whether its sessions have more connections than a client has a use for."""
        connection = self.connection
        return not connection.running and all(
            len(session.connections) > _CONNECTIONS_OF_SESSION
            and connection not in session.back_connections
            for session in connection.sessions
        )

    async def receive(self) -> None:
        """Until the connection ends."""
        reader = RecordReader(self.server.service.options.record_bytes)
        buffer = self.server.buffer
        batch = 0
        while True:
            try:
                count = self.sock.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
                self.used = trio.current_time()
                batch = 0
                continue
            if not count:
                return
            with memoryview(buffer) as whole:
                records = reader.feed(whole[:count])
            for record in records:
                self.server.service.receive(self.connection, record)
                while self.crowded():
                    self.room = trio.Event()
                    await self.room.wait()
            batch += 1
            if batch == _BATCH:
                batch = 0
                await trio.lowlevel.checkpoint()


class Server:
    """The layout server of one filesystem: `bind`, then `run` is its task, then `close`.

    `listening`: the addresses and ports that it is bound to.
    """

    def __init__(
        self,
        fs: Filesystem,
        exports: Exports,
        options: ServerOptions,
        service_options: ServiceOptions,
    ) -> None:
        """Reads the durable records: blocks. OSError: they cannot be read or written."""
        self.options = options
        self.buffer = bytearray(_RECEIVE_BYTES)
        self._nursery: trio.Nursery | None = None
        self._threads: Threads | None = None
        self._calls: Calls | None = None
        self._fs = fs
        self._early: list[tuple[Callable[[], Any], Done]] = []
        """What the service began while it was made: the end of a grace period, say."""
        self._timers = trio.Event()
        self._peers: set[_Peer] = set()
        self.listening: list[tuple[str, int]] = []
        self._listeners: list[socket.socket] = []
        self.service = Service(fs, exports, service_options, self, time.monotonic)

    # -- what the service asks for (driver.Runner) --

    def blocking(self, call: Callable[[], Any], done: Done) -> None:
        """Run `call` in a thread; when the server runs, and not after it."""
        if self._threads is not None:
            self._threads.run(call, done)
        else:
            self._early.append((call, done))

    def timers_changed(self) -> None:
        """Wake the task that waits for the next timer."""
        self._timers.set()

    def start(self, task: Callable[..., Any], *args: Any) -> None:
        """Run a task as long as the server runs."""
        if self._nursery is not None:
            self._nursery.start_soon(task, *args)

    def _finished(self, done: Done, result: Any, failed: Exception | None) -> None:
        with self._contained("what follows a blocking call"):
            done(result, failed)
        self._let_go_on()

    def _begin(self, prepared: Prepared[Any], done: Done) -> tuple[Any, Exception | None] | None:
        """`Driver.begin`."""
        assert self._calls is not None
        over = self._calls.begin(prepared, done)
        if self._calls.pending:
            self.start(self._tell_ended)
        return over

    async def _tell_ended(self) -> None:
        """What follows calls of the core that have ended."""
        if self._calls is not None:
            for done, result, failed in self._calls.ended():
                self._finished(done, result, failed)

    async def _run_calls(self, calls: Calls) -> None:
        while True:
            await trio.lowlevel.wait_readable(calls)
            await self._tell_ended()

    async def _end_calls(self, calls: Calls) -> None:
        """No call runs any more when this returns; what it would have led to does not happen."""
        self.service.driver.begin = None
        self._calls = None
        with trio.CancelScope(shield=True):
            while calls.running:
                await trio.lowlevel.wait_readable(calls)
                for _ in calls.ended():
                    pass
        calls.close()

    @contextlib.contextmanager
    def _contained(self, what: str) -> Iterator[None]:
        """A bug ends here."""
        try:
            yield
        except Exception:
            log.exception("%s failed", what)
            self.service.count("server_faults")

    def _let_go_on(self) -> None:
        for peer in self._peers:
            if not peer.room.is_set() and not peer.crowded():
                peer.room.set()

    # -- events of the core --

    def layout_event(self, event: LayoutEvent) -> None:
        """An event of a layout holder, from the task that takes them all."""
        with self._contained("an event of the core"):
            self.service.layout_event(event)

    def status(self) -> dict[str, Any]:
        """For /.extfs/status; from a thread that trio started, or from trio's own."""
        try:
            return trio.from_thread.run_sync(self._status)
        except RuntimeError:  # not such a thread
            return self._status()

    def _status(self) -> dict[str, Any]:
        return {
            "listening": [f"{host}:{port}" for host, port in self.listening],
            "connections": len(self._peers),
            **self.service.status(),
        }

    # -- running --

    def bind(self) -> None:
        """Listen; who connects from now on waits for `run`. OSError: an address cannot be had."""
        for host, port in self.options.listen:
            listener = self._listener(host, port)
            self._listeners.append(listener)
            self.listening.append(listener.getsockname()[:2])

    def close(self) -> None:
        """Stop listening; after `run` has ended. A second time does nothing."""
        while self._listeners:
            self._listeners.pop().close()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._threads = Threads(self.options.threads, self._finished)
        calls = self._calls = Calls(self._fs)
        self.service.driver.begin = self._begin
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_timers)
                nursery.start_soon(self._run_calls, calls)
                early, self._early = self._early, []
                for call, done in early:
                    self._threads.run(call, done)
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener)
        finally:
            self._nursery = None  # nothing is begun any more
            await self._end_calls(calls)
            await self._threads.stop()
            # What has time to the next commit, an open that was closed: it would come back.
            with trio.CancelScope(shield=True), self._contained("the last of the records"):
                await trio.to_thread.run_sync(self.service.records.finish)

    @staticmethod
    def _listener(host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, port))
            listener.listen(256)
        except BaseException:
            listener.close()
            raise
        return listener

    async def _run_timers(self) -> None:
        timers = self.service.timers
        while True:
            self._timers = trio.Event()
            due = timers.next_due()
            if due is None:
                await self._timers.wait()
            else:
                with trio.move_on_after(max(0.0, due - time.monotonic())):
                    await self._timers.wait()
            with self._contained("a timer"):
                timers.run()  # what a failure leaves is still due

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_BATCH):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                        log.warning("a connection could not be accepted: %s", error.strerror)
                        self._drop_idle()
                        await trio.sleep(0.1)
                    break  # else the peer was gone before it was accepted
                try:
                    self._admit(sock, (address[0], address[1]))
                except OSError:  # reset before its options were set
                    sock.close()

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if len(self._peers) >= self.options.connections and not self._drop_idle():
            log.info("%s:%d: too many connections", *address)
            self.service.count("connections_refused")
            sock.close()
            return
        peer = _Peer(self, sock, address)
        self._peers.add(peer)
        self.start(self._serve, peer)

    def _drop_idle(self) -> bool:
        """Make room: drop the connection that has been idle the longest, of those without a
        session; if there are none, of those that their sessions can spare."""
        idle = [peer for peer in self._peers if not peer.connection.sessions]
        if not idle:
            idle = [peer for peer in self._peers if peer.spare()]
        if not idle:
            return False
        oldest = min(idle, key=lambda peer: peer.used)
        self.service.count("connections_dropped")
        self._peers.discard(oldest)
        oldest.close()
        return True

    async def _serve(self, peer: _Peer) -> None:
        try:
            with peer.scope:
                await peer.receive()
        except RecordError as error:
            self.service.count("records_refused")
            log.info("%s:%d dropped: %s", peer.connection.host, peer.connection.port, error)
        except OSError:
            pass  # reset by the peer
        except Exception:
            log.exception("connection %s:%d failed", peer.connection.host, peer.connection.port)
            self.service.count("server_faults")
        finally:
            self._peers.discard(peer)
            with self._contained("the end of a connection"):
                self.service.disconnected(peer.connection)
            peer.room.set()
            trio.lowlevel.notify_closing(peer.sock)
            peer.sock.close()
