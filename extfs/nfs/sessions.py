"""Sessions (RFC 8881 2.10, 18.46): slots, the reply cache, connections.

A *slot* carries one request after the other. Definitions, for a slot: IDLE, its last request is
answered; BUSY, one is executing. Edges: IDLE -> BUSY in `SessionTable.begin`, BUSY -> IDLE in
`SessionTable.end`, which every request that `begin` let through reaches, once.

Invariants: 1. a request is executed only in the step IDLE -> BUSY, and only if its sequence number
is the slot's plus one: so once. 2. The sequence number of a slot changes in that step alone.
3. `reply` is the answer to the request with the slot's sequence number, or None: it was not to be
cached, or the slot is BUSY. 4. A connection is in `Session.connections` exactly if the session is
in `Connection.sessions`; `back_connections` is a part of them.

What a retransmission gets: the cached reply; the reply when it is ready, if the request is still
executing (`InProgress`); NFS4ERR_RETRY_UNCACHED_REP; or NFS4ERR_SEQ_FALSE_RETRY when it is another
request than the one it repeats, which a digest of its first bytes tells nearly always (2.10.6.1.3.1
asks for no more).

Persistent sessions (2.10.6.5) have a record (`records`), and go on after a restart: any connection
may use them, by SEQUENCE; the backchannel is down until one is bound to it, which SEQUENCE tells.
Of a slot only its rider is durable (`riders`), which the last request left that did something that
must not be done twice. So after a restart a slot is UNSURE, until its first request is let through,
whatever its sequence number, if that is the rider's or comes after it (modulo 2**32, by less than
half of it). This is safe:
    - The number is the rider's, and the digest, too: it is that request, sent again. It is executed
      with its marks, so that nothing is done twice. With another digest it is
      NFS4ERR_SEQ_FALSE_RETRY: a client cannot have another request of that number in a slot.
    - A later number: it is new, or it is sent again. In that case it left no rider, for that would
      be the slot's: of what it did all can be done again (the table in `riders`). So nothing
      depends on which of the two it is; what asks is `Compound.retry`, and only where the answer to
      "did I end this, or change this" is in the state itself.
    - An earlier number: the client had an answer to it, or it would not have used the slot since.
      NFS4ERR_SEQ_MISORDERED. Between the two numbers the client can have sent as many as it likes,
      but for a wrap: 2**31 requests of one slot without a rider in them look like an earlier
      number, and the client is told to begin a new session, which is safe, too.
    - A client has one request in a slot at a time, and what it had sent over a connection to the
      killed server died with that: no second, older one comes after the first one was let through.
      One that does come is judged as always: it is not the next, and its digest is another.
    - The slot had no rider: nothing was done in it that must not be done twice. Any number will do.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extfs.nfs import constants as n
from extfs.nfs.clients import Client
from extfs.nfs.errors import NfsError
from extfs.nfs.records import SessionRecord
from extfs.nfs.riders import SLOT_MAX, Marks, RiderRecord
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.service import Connection, Service

__all__ = ["ChannelAttributes", "InProgress", "Session", "SessionTable", "Slot"]

RPC_REPLY_BYTES = 24
"""Header of an accepted reply with an empty verifier (RFC 5531 9)."""
SMALL_REPLY_BYTES = 512
"""A reply up to this size is kept although the client did not ask for it."""
SLOTS_MIN = 2
"""With one the Linux client waits for itself: GETDEVICEINFO for the slot of LAYOUTGET."""
_DIGEST_BYTES = 512
_U32_MAX = 0xFFFFFFFF
_HALF = 1 << 31
_RECORD_MASK = (1 << 56) - 1

_ARGUMENTS = struct.Struct(">16sIIII")
_RESULT = struct.Struct(">16sIIIII")
_OPERATION = struct.Struct(">II")
_IDENTITY = struct.Struct(">QII")


@dataclass(frozen=True, slots=True)
class ChannelAttributes:
    """channel_attrs4 (RFC 8881 18.36.1) as negotiated: bytes of RPC records, operations, slots."""

    max_request: int
    max_response: int
    max_cached: int
    max_ops: int
    max_slots: int

    def numbers(self) -> tuple[int, int, int, int, int]:
        """For a record."""
        return self.max_request, self.max_response, self.max_cached, self.max_ops, self.max_slots


class Slot:
    """See the module. `cached`: sa_cachethis of the request with this sequence number.

    `waiter` gets the result of the request that is executing, for a retransmission of it.
    `unsure`: of before a restart, and not used since; with its `rider`, if it has one.
    """

    __slots__ = ("busy", "cached", "digest", "reply", "rider", "sequence", "unsure", "waiter")

    def __init__(self, *, unsure: bool = False, rider: RiderRecord | None = None) -> None:
        self.unsure = unsure
        self.rider = rider
        self.sequence = 0
        self.digest = -1
        self.busy = False
        self.cached = False
        self.reply: bytes | None = None
        self.waiter: Callable[[bytes | bytearray], None] | None = None


class InProgress(Exception):  # noqa: N818  an answer that is to come, not an error
    """A retransmission of a request that is executing in `slot`: set its `waiter`."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot


class Session:
    """One session. `id`: sessionid4; `cb_auth`: the opaque_auth of calls on the backchannel.

    `record`: number of its record, 0 while it is not persistent. `riders`: by slot, of before a
    restart; `ridden`: the slots that may have one. `wants_back`: it has had a backchannel.
    `back_sequences`, `back_fault`: see `callbacks`. `back_awaited`: until then, on the service's
    clock, the client has time to bind a connection to the backchannel that it had. `restored`: it
    is from before a restart.
    """

    __slots__ = (
        "back",
        "back_awaited",
        "back_connections",
        "back_fault",
        "back_sequences",
        "cb_auth",
        "cb_program",
        "client",
        "connections",
        "fore",
        "id",
        "minor",
        "record",
        "restored",
        "ridden",
        "riders",
        "slots",
        "wants_back",
    )

    def __init__(
        self,
        identity: bytes,
        client: Client,
        minor: int,
        fore: ChannelAttributes,
        back: ChannelAttributes,
        cb_program: int,
        cb_auth: bytes,
    ) -> None:
        self.id = identity
        self.client = client
        self.minor = minor
        self.fore = fore
        self.back = back
        self.cb_program = cb_program
        self.cb_auth = cb_auth
        self.connections: set[Connection] = set()
        self.back_connections: list[Connection] = []
        self.slots: list[Slot | None] = [None] * fore.max_slots
        self.record = 0
        self.restored = False
        self.riders: dict[int, RiderRecord] = {}
        self.ridden: set[int] = set()
        self.wants_back = False
        self.back_awaited = 0.0
        self.back_fault = False
        self.back_sequences: list[tuple[int, int]] = []

    def to_record(self) -> bytes:
        """What is durable of it, if it is persistent."""
        return SessionRecord(
            self.client.clientid,
            self.id,
            self.minor,
            self.fore.numbers(),
            self.back.numbers(),
            self.cb_program,
            self.cb_auth,
            self.wants_back,
            tuple(self.back_sequences),
        ).encode()

    def new_slot(self, number: int) -> Slot:
        """A slot that is used for the first time in this life of the server."""
        slot = self.slots[number] = Slot(
            unsure=self.restored, rider=self.riders.pop(number, None) if self.restored else None
        )
        return slot

    def marks(self, number: int, slot: Slot) -> Marks | None:
        """For the request that is in the slot now; None: the session is not persistent."""
        if not self.record:
            return None
        known = slot.rider
        if known is None or known.sequence != slot.sequence:
            session = self.record & _RECORD_MASK
            known = RiderRecord(session, number, slot.sequence, slot.digest, [])
        slot.rider = None
        return Marks(known)

    @property
    def reserved(self) -> int:
        """Bytes of replies that its slots may keep."""
        return len(self.slots) * max(self.fore.max_cached, SMALL_REPLY_BYTES)

    def busy(self, but: Slot | None = None) -> bool:
        """Whether a slot other than `but` is executing."""
        return any(slot is not None and slot.busy and slot is not but for slot in self.slots)

    def status(self) -> dict[str, Any]:
        """For people."""
        slots = [slot for slot in self.slots if slot is not None]
        return {
            "id": self.id.hex(),
            "connections": [f"{c.peer[0]} {c.peer[1]}" for c in self.connections],
            "backchannel": bool(self.back_connections),
            "persistent": bool(self.record),
            "slots": self.fore.max_slots,
            "slots_used": len(slots),
            "slots_busy": sum(slot.busy for slot in slots),
            "cached_bytes": sum(len(slot.reply or b"") for slot in slots),
        }


class SessionTable:
    """All sessions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._clock = service.clock
        self._sessions: dict[bytes, Session] = {}
        self._last = 0
        self._reserved = 0
        self._persistent = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, identity: bytes) -> Session | None:
        """The session with this sessionid4."""
        return self._sessions.get(identity)

    # -- life --

    def admitted(self, fore: ChannelAttributes) -> ChannelAttributes:
        """The same with as many slots as there is memory for the replies that they keep.

        `NfsError` NOSPC: not even for the least.
        """
        free = self._service.options.reply_cache_bytes - self._reserved
        slot = max(fore.max_cached, SMALL_REPLY_BYTES)
        # An eighth of what is left: the more sessions there are, the less each new one gets.
        slots = min(fore.max_slots, max(SLOTS_MIN, free // 8 // slot))
        if slots * slot > free:
            raise NfsError(n.NFS4ERR_NOSPC)
        return fore if slots == fore.max_slots else replace(fore, max_slots=slots)

    def create(
        self,
        client: Client,
        minor: int,
        fore: ChannelAttributes,
        back: ChannelAttributes,
        cb_program: int,
        cb_auth: bytes,
    ) -> Session:
        """A new session, without a connection. Its id was never used before."""
        self._last += 1
        identity = _IDENTITY.pack(client.clientid, self._service.records.epoch, self._last)
        session = Session(identity, client, minor, fore, back, cb_program, cb_auth)
        self._add(session)
        self._service.count("sessions_created")
        return session

    def persistent(self, fore: ChannelAttributes) -> bool:
        """Whether one more session may be one that survives a restart, as far as limits go."""
        limit = self._service.options.persistent_sessions
        return fore.max_slots <= SLOT_MAX and self._persistent < limit

    def keep(self, session: Session) -> None:
        """It is to survive a restart: its record is staged."""
        self._service.records.stage_session(session)
        self._persistent += 1

    def not_kept(self, session: Session) -> None:
        """It is not to survive a restart after all, or is no more.

        One that was not to is no error.
        """
        self._persistent -= bool(session.record)
        self._service.records.drop_session(session)

    def restore(
        self, client: Client, number: int, record: SessionRecord, riders: dict[int, RiderRecord]
    ) -> None:
        """A session of before a restart, without connections; `riders` by slot."""
        session = Session(
            record.identity,
            client,
            record.minor,
            ChannelAttributes(*record.fore),
            ChannelAttributes(*record.back),
            record.cb_program,
            record.cb_auth,
        )
        session.record, session.restored = number, True
        session.riders, session.ridden = riders, set(riders)
        session.wants_back = record.wants_back
        session.back_sequences = list(record.back_sequences)
        client.wants_callbacks |= record.wants_back
        self._persistent += 1
        self._add(session)

    def _add(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._reserved += session.reserved
        session.client.sessions.append(session)

    def destroy(self, session: Session) -> None:
        """Nobody can use it any more; a request that is executing in it ends unheard.

        That its record is gone is staged.
        """
        if self._sessions.pop(session.id, None) is None:
            return
        self.not_kept(session)
        self._reserved -= session.reserved
        session.client.sessions.remove(session)
        for connection in session.connections:
            connection.sessions.discard(session)
        session.connections.clear()
        session.back_connections.clear()
        self._service.callbacks.detach(session)

    # -- connections (RFC 8881 2.10.3.1, 2.10.5) --

    def bind(
        self, session: Session, connection: Connection, *, fore: bool = False, back: bool = False
    ) -> None:
        """Associate a connection with channels of a session."""
        if fore or back:
            session.connections.add(connection)
            connection.sessions.add(session)
        if back:
            if connection not in session.back_connections:
                session.back_connections.append(connection)
            session.client.wants_callbacks = session.wants_back = True
            self._service.callbacks.attach(session)  # also when bound again: it is to be tried anew

    def connection_lost(self, connection: Connection) -> None:
        """It is closed."""
        for session in connection.sessions:
            session.connections.discard(connection)
            if connection in session.back_connections:
                session.back_connections.remove(connection)
        connection.sessions.clear()

    def back_awaited(self, client: Client) -> bool:
        """Whether the client is about to bind a connection to a backchannel."""
        now = self._clock()
        return any(session.back_awaited > now for session in client.sessions)

    # -- SEQUENCE --

    def begin(self, c: Compound, args: Reader, out: Writer) -> bytes | None:
        """SEQUENCE (RFC 8881 18.46): let the request through, or give the result of its first run.

        Sets client, session, slot and limit of `c` and writes the body of the SEQUENCE result.
        `InProgress`: see there. `NfsError`: refused, the slot is as before.
        """
        identity, sequence, number, highest, caching = args.unpack(_ARGUMENTS)
        if caching > 1:
            raise XdrError("a bool that is neither 0 nor 1")
        session = self._sessions.get(identity)
        if session is None:
            raise NfsError(n.NFS4ERR_BADSESSION)
        connection = c.connection
        if connection not in session.connections and not connection.closed:
            # Allowed without a BIND_CONN_TO_SESSION: all clients here are SP4_NONE (2.10.3.1).
            self.bind(session, connection, fore=True)
            if not session.client.peer:
                session.client.peer = connection.host  # kept over a restart: no EXCHANGE_ID comes
            if session.wants_back and not session.back_connections:
                session.back_awaited = self._clock() + self._service.options.callback_seconds
        slots = session.slots
        if number >= len(slots):
            raise NfsError(n.NFS4ERR_BADSLOT)
        if highest >= len(slots):
            raise NfsError(n.NFS4ERR_BAD_HIGH_SLOT)
        slot = slots[number]
        if slot is None:
            slot = session.new_slot(number)
        client = session.client
        client.renew(self._clock())
        pos = args.pos
        length = args.end - pos
        digest = zlib.crc32(
            args.buffer[pos : pos + _DIGEST_BYTES], (length ^ c.credential.uid) & _U32_MAX
        )
        if slot.unsure:
            self._check_unsure(slot, sequence, digest)
        elif sequence != (slot.sequence + 1) & _U32_MAX or slot.busy:
            return self._again(c, session, slot, sequence, number, digest)
        fore = session.fore
        if c.op_count > fore.max_ops:
            raise NfsError(n.NFS4ERR_TOO_MANY_OPS)
        if c.request_bytes > fore.max_request:
            raise NfsError(n.NFS4ERR_REQ_TOO_BIG)
        limit = fore.max_response
        if caching and fore.max_cached < limit:
            limit = fore.max_cached
        limit -= RPC_REPLY_BYTES
        if len(out) + _RESULT.size > limit:
            raise NfsError(n.NFS4ERR_REP_TOO_BIG_TO_CACHE if caching else n.NFS4ERR_REP_TOO_BIG)
        c.retry, slot.unsure = slot.unsure, False
        slot.sequence = sequence
        slot.busy = True
        slot.cached = caching == 1
        slot.digest = digest
        slot.reply = None
        c.client = client
        c.session = session
        c.slot = slot
        c.limit = limit
        c.marks = session.marks(number, slot)
        self._write_result(out, session, sequence, number)
        return None

    def _check_unsure(self, slot: Slot, sequence: int, digest: int) -> None:
        """The first request of a slot after a restart. `NfsError`: see the module."""
        rider = slot.rider
        if rider is None:
            return
        ahead = (sequence - rider.sequence) & _U32_MAX
        if ahead >= _HALF:
            raise NfsError(n.NFS4ERR_SEQ_MISORDERED)
        if not ahead:
            if digest != rider.digest:
                raise NfsError(n.NFS4ERR_SEQ_FALSE_RETRY)
            self._service.count("retransmissions")

    def end(self, c: Compound, result: bytes | bytearray) -> None:
        """The request that `begin` let through has this result."""
        slot = c.slot
        assert slot is not None
        slot.busy = False
        if slot.cached or len(result) <= SMALL_REPLY_BYTES or c.op_count == 1:
            slot.reply = bytes(result)
        waiter = slot.waiter
        if waiter is not None:
            slot.waiter = None
            waiter(result)

    def _write_result(self, out: Writer, session: Session, sequence: int, number: int) -> None:
        last = len(session.slots) - 1
        out.pack(_RESULT, session.id, sequence, number, last, last, self._flags(session))

    def _flags(self, session: Session) -> int:
        """SEQ4_STATUS_*."""
        service, client = self._service, session.client
        flags: int = service.states.sequence_flags(client)
        if client.wants_callbacks:
            if not service.callbacks.path_up(client):
                flags |= n.SEQ4_STATUS_CB_PATH_DOWN
            if not session.back_connections:
                flags |= n.SEQ4_STATUS_CB_PATH_DOWN_SESSION
            if session.back_fault:
                flags |= n.SEQ4_STATUS_BACKCHANNEL_FAULT
        return flags

    def _again(
        self, c: Compound, session: Session, slot: Slot, sequence: int, number: int, digest: int
    ) -> bytes:
        """A request that is not the slot's next: what it gets (RFC 8881 2.10.6.1.3)."""
        if sequence != slot.sequence or slot.digest < 0:
            raise NfsError(n.NFS4ERR_SEQ_MISORDERED)
        if digest != slot.digest:
            raise NfsError(n.NFS4ERR_SEQ_FALSE_RETRY)
        self._service.count("retransmissions")
        if slot.busy:
            raise InProgress(slot)
        if slot.reply is not None:
            return slot.reply
        # SEQUENCE succeeds, the operation after it gets the error (18.46.3).
        counted = len(c.out) - _OPERATION.size - 4
        out = Writer()
        out.raw(c.out.buffer)
        self._write_result(out, session, sequence, number)
        out.pack(_OPERATION, Reader(c.arguments.buffer, c.arguments.pos).u32(), 0)
        out.put_u32(len(out) - 4, n.NFS4ERR_RETRY_UNCACHED_REP)
        out.put_u32(0, n.NFS4ERR_RETRY_UNCACHED_REP)
        out.put_u32(counted, 2)
        return bytes(out.buffer)
