"""Callbacks: CB_COMPOUND over the connections that a client bound to the backchannel of a session.

A request takes a slot of the backchannel (RFC 8881 2.10.6) and keeps it until its reply is there: a
slot cannot carry another request before that. So a request whose connection is lost is sent again,
the same bytes in the same slot, over the next connection; one that is not answered in time is told
to its caller as None, and keeps the slot until a late answer.

Definitions: a request is WAITING (no connection, or no free slot), SENT, or ENDED (its caller was
told). Edges: WAITING -> SENT in `_pump`; SENT -> WAITING in `connection_lost` and on NFS4ERR_DELAY
of CB_SEQUENCE; any -> ENDED in `_end`, once.

Of a persistent session (`sessions`) the client goes on counting when the server was restarted. So
it is durable, for each slot, between which numbers the last request lies that the client may have
executed: `floor` and `ceiling`; numbers are reserved `RESERVED` at a time, before the first of them
is sent. After a restart a slot is tried from ceiling + 1 downwards: what is too high the client
refuses as misordered, and the first number that it does not is its next. When it refuses all of
them it is told SEQ4_STATUS_BACKCHANNEL_FAULT, and makes another session (RFC 8881 18.46.3).
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.nfs import constants as n
from extfs.nfs.rpc import RecordError, marked, read_reply, write_call
from extfs.nfs.timers import Timer
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.service import Connection, Service
    from extfs.nfs.sessions import Session

__all__ = ["CallbackReply", "Callbacks", "Referring"]

log = logging.getLogger("extfs.nfs")

SLOTS_MAX = 16
DELAY_SECONDS = 0.05
RESERVED = 8
_TAG_MAX = 1024
_CB_SEQUENCE = struct.Struct(">16sIIII")


@dataclass(frozen=True, slots=True)
class Referring:
    """A call of the client that the callback is about (RFC 8881 2.10.6.3), on one session."""

    session: bytes
    sequence: int
    slot: int


@dataclass(slots=True)
class CallbackReply:
    """An answer: `status` of the CB_COMPOUND; `results` at the first result after CB_SEQUENCE."""

    status: int
    results: Reader


class _Request:
    """One CB_COMPOUND; `number` of its slot once it has one. `waits`: until it is durable how far
    the slot may have come."""

    __slots__ = (
        "body",
        "client",
        "connection",
        "count",
        "done",
        "number",
        "referring",
        "timer",
        "waits",
    )

    def __init__(
        self,
        client: Client,
        body: bytes,
        count: int,
        done: Callable[[CallbackReply | None], None],
        referring: Sequence[Referring],
    ) -> None:
        self.client = client
        self.body = body
        self.count = count
        self.done: Callable[[CallbackReply | None], None] | None = done
        self.referring = referring
        self.number = -1
        self.waits = False
        self.connection: Connection | None = None
        self.timer: Timer | None = None


class _Channel:
    """The backchannel of a session: for each slot the sequence number of its next request.

    `unsure`: slots whose number is a guess, see the module.
    """

    __slots__ = ("broken", "requests", "sequences", "session", "unsure")

    def __init__(self, session: Session) -> None:
        self.session = session
        slots = _slots(session)
        self.sequences = [1] * slots
        self.unsure: set[int] = set()
        self.requests: list[_Request | None] = [None] * slots
        self.broken = False
        if session.restored:
            for number, (_, ceiling) in enumerate(session.back_sequences[:slots]):
                self.sequences[number] = ceiling + 1
                if ceiling:
                    self.unsure.add(number)

    def lower(self, number: int) -> bool:
        """The guess was too high: the next one. False: there is none."""
        floor, _ = self.session.back_sequences[number]
        self.sequences[number] -= 1
        return self.sequences[number] > floor

    def reserve(self, number: int) -> bool:
        """Before a number is sent: whether the session's record has to say more than it does."""
        sequence = self.sequences[number]
        if not self.session.record:
            return False
        floor, ceiling = self.session.back_sequences[number]
        if sequence <= ceiling:
            return False
        if number in self.unsure:
            self.session.back_sequences[number] = floor, sequence
        else:
            self.session.back_sequences[number] = sequence - 1, sequence - 1 + RESERVED
        return True

    def connection(self) -> Connection | None:
        """One that is alive."""
        for connection in self.session.back_connections:
            if not connection.closed:
                return connection
        return None

    def free_slot(self) -> int:
        """The lowest free one, or -1."""
        for number, request in enumerate(self.requests):
            if request is None:
                return number
        return -1


def _slots(session: Session) -> int:
    return max(1, min(SLOTS_MAX, session.back.max_slots))


class Callbacks:
    """All callbacks of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._channels: dict[bytes, _Channel] = {}
        self._of_client: dict[Client, list[_Channel]] = {}
        self._waiting: dict[Client, deque[_Request]] = {}
        self._sent: dict[int, tuple[_Channel, _Request]] = {}
        self._xid = 0

    # -- sessions and connections --

    def attach(self, session: Session) -> None:
        """The session has a backchannel, or another connection, program or credential for it."""
        channel = self._channels.get(session.id)
        if channel is None:
            channel = self._channels[session.id] = _Channel(session)
            self._of_client.setdefault(session.client, []).append(channel)
        channel.broken = False
        for request in channel.requests:
            if request is not None and request.connection is None:
                self._send(channel, request)
        self._pump(session.client)

    @staticmethod
    def reserve(session: Session) -> None:
        """The session is to survive a restart."""
        session.back_sequences = [(0, 0)] * _slots(session)

    def detach(self, session: Session) -> None:
        """The session is gone; what it carried goes over another one of the client."""
        channel = self._channels.pop(session.id, None)
        if channel is None:
            return
        of_client = self._of_client[session.client]
        of_client.remove(channel)
        if not of_client:
            del self._of_client[session.client]
        for xid in [xid for xid, (other, _) in self._sent.items() if other is channel]:
            del self._sent[xid]
        for request in channel.requests:
            if request is not None and request.done is not None:
                request.number, request.connection = -1, None
                self._waiting.setdefault(request.client, deque()).appendleft(request)
        self._pump(session.client)

    def client_lost(self, client: Client) -> None:
        """Nobody will answer for it any more."""
        for request in self._waiting.pop(client, ()):
            self._end(request, None)
        for channel in self._of_client.get(client, ()):
            for sent in channel.requests:
                if sent is not None:
                    self._end(sent, None)

    def connection_lost(self, connection: Connection) -> None:
        """What was not answered on it is sent again on another one of its session."""
        lost = [
            (xid, *sent) for xid, sent in self._sent.items() if sent[1].connection is connection
        ]
        for xid, channel, request in lost:
            del self._sent[xid]
            request.connection = None
            self._send(channel, request)

    def path_up(self, client: Client) -> bool:
        """Whether a callback would reach the client as far as is known."""
        return any(
            not channel.broken and channel.connection() is not None
            for channel in self._of_client.get(client, ())
        )

    # -- calls --

    def call(
        self,
        client: Client,
        operations: bytes,
        count: int,
        done: Callable[[CallbackReply | None], None],
        referring: Sequence[Referring] = (),
        seconds: float | None = None,
    ) -> None:
        """Send `count` encoded operations; `done` gets the answer, or None after `seconds`.

        `done` is called once, never from in here.
        """
        request = _Request(client, operations, count, done, referring)
        wait = self._service.options.callback_seconds if seconds is None else seconds
        request.timer = self._service.timers.after(wait, lambda: self._timed_out(request))
        self._waiting.setdefault(client, deque()).append(request)
        self._service.count("callbacks")
        self._pump(client)

    def _timed_out(self, request: _Request) -> None:
        self._service.count("callback_timeouts")
        waiting = self._waiting.get(request.client)
        if waiting is not None and request in waiting:
            waiting.remove(request)
        for channel in self._of_client.get(request.client, ()):
            if request in channel.requests:
                channel.broken = True
        self._end(request, None)

    def _end(self, request: _Request, reply: CallbackReply | None) -> None:
        if request.timer is not None:
            request.timer.cancel()
        done, request.done = request.done, None
        if done is not None:
            done(reply)

    def _pump(self, client: Client) -> None:
        """Send what waits for a slot and a connection."""
        waiting = self._waiting.get(client)
        while waiting:
            for channel in self._of_client.get(client, ()):
                slot = channel.free_slot()
                if slot >= 0 and not channel.broken and channel.connection() is not None:
                    break
            else:
                return
            request = waiting.popleft()
            request.number = slot
            channel.requests[slot] = request
            self._send(channel, request)
        self._waiting.pop(client, None)

    def _send(self, channel: _Channel, request: _Request) -> None:
        """In its slot, over a connection that is alive; without one it waits for `attach`."""
        connection = channel.connection()
        if connection is None or request.waits:
            return
        session = channel.session
        if channel.reserve(request.number):
            self._service.records.stage_session(session)
            request.waits = True
            self._service.driver.run(
                self._service.records.durable(),
                lambda _, error: self._reserved(channel, request, error),
            )
            return
        self._xid = (self._xid + 1) & 0xFFFFFFFF
        out = write_call(
            self._xid, session.cb_program, n.NFS_CB_VERSION, n.CB_COMPOUND, session.cb_auth
        )
        self._write_arguments(out, channel, request)
        request.connection = connection
        self._sent[self._xid] = (channel, request)
        connection.send(marked(out.buffer))

    def _reserved(self, channel: _Channel, request: _Request, error: Exception | None) -> None:
        request.waits = False
        if error is not None:  # it is sent: without it what is recalled would be revoked
            log.warning("records of sessions: %s", error)
        self._again(channel, request)

    @staticmethod
    def _write_arguments(out: Writer, channel: _Channel, request: _Request) -> None:
        """CB_COMPOUND4args: CB_SEQUENCE and what the caller wants (RFC 8881 20.2, 20.9)."""
        session = channel.session
        out.opaque(b"")
        out.u32(session.minor)
        out.u32(0)  # callback_ident, of 4.0
        out.u32(1 + request.count)
        out.u32(n.OP_CB_SEQUENCE)
        number = request.number
        highest = max(i for i, other in enumerate(channel.requests) if other is not None)
        out.pack(_CB_SEQUENCE, session.id, channel.sequences[number], number, highest, 0)
        by_session: dict[bytes, list[Referring]] = {}
        for call in request.referring:
            by_session.setdefault(call.session, []).append(call)
        out.u32(len(by_session))
        for identity, calls in by_session.items():
            out.fixed(identity)
            out.u32(len(calls))
            for call in calls:
                out.u32(call.sequence)
                out.u32(call.slot)
        out.raw(request.body)

    # -- answers --

    def reply(self, connection: Connection, record: bytes) -> None:
        """A reply came. `RecordError`: it is none, drop the connection."""
        xid, results = read_reply(record)
        sent = self._sent.get(xid)
        if sent is None or sent[1].connection is not connection:
            return  # to a call that was given up with its session
        del self._sent[xid]
        channel, request = sent
        request.connection = None
        if results is None:
            self._refused(channel, request)
            return
        try:
            self._read_results(channel, request, results)
        except XdrError as error:
            self._refused(channel, request)
            raise RecordError(f"callback reply: {error}") from None

    def _refused(self, channel: _Channel, request: _Request) -> None:
        """The client did not execute it: this backchannel is of no use (RFC 8881 18.46, FAULT)."""
        channel.broken = True
        if channel.requests[request.number] is request:
            channel.requests[request.number] = None
        self._end(request, None)

    def _read_results(self, channel: _Channel, request: _Request, results: Reader) -> None:
        status = results.u32()
        results.opaque(_TAG_MAX)
        count = results.u32()
        if count < 1 or results.u32() != n.OP_CB_SEQUENCE:
            raise XdrError("an answer without CB_SEQUENCE")
        sequence_status = results.u32()
        if sequence_status == n.NFS4ERR_DELAY:
            self._service.timers.after(DELAY_SECONDS, lambda: self._again(channel, request))
            return
        misordered = sequence_status in (n.NFS4ERR_SEQ_MISORDERED, n.NFS4ERR_SEQ_FALSE_RETRY)
        if misordered and request.number in channel.unsure:
            if channel.lower(request.number):
                self._send(channel, request)
            else:
                channel.session.back_fault = True
                self._refused(channel, request)
            return
        if misordered and channel.sequences[request.number] != 1:
            channel.sequences[request.number] = 1  # one side has restarted: begin the slot anew
            self._send(channel, request)
            return
        if sequence_status == n.NFS4ERR_RETRY_UNCACHED_REP:
            # It was executed; what came of it was lost with a connection.
            self._answered(channel, request, None)
            return
        if sequence_status != n.NFS4_OK:
            log.info("a client refuses callbacks: %s", n.STATUS_NAMES.get(sequence_status))
            self._refused(channel, request)
            return
        results.unpack(_CB_SEQUENCE)
        self._answered(channel, request, CallbackReply(status, results))

    def _answered(self, channel: _Channel, request: _Request, reply: CallbackReply | None) -> None:
        """It was executed: its slot is free, and at the next sequence number."""
        number = request.number
        channel.unsure.discard(number)
        channel.sequences[number] = (channel.sequences[number] + 1) & 0xFFFFFFFF
        channel.requests[number] = None
        channel.broken = False
        try:
            self._end(request, reply)
        finally:
            self._pump(request.client)

    def _again(self, channel: _Channel, request: _Request) -> None:
        """Unless it was sent, and answered, since: over a connection that was bound meanwhile."""
        if (
            self._channels.get(channel.session.id) is channel
            and channel.requests[request.number] is request
            and request.connection is None
        ):
            self._send(channel, request)
