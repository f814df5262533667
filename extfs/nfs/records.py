"""What the layout server keeps over a restart (RFC 8881 8.4.2 to 8.4.3, 2.10.6.5), and how.

Every record is (number, bytes) in a tree of the filesystem; a set of them is written in one
transaction. Number 0 is the server's own: its secret (of the filehandles), its epoch (one more at
each start), its owner (server_owner4 and scope: the same after a restart). Other numbers have their
kind in the top byte and are never used twice in a server's life between two starts.

What is durable when
    a client            before CREATE_SESSION confirms it is answered
    RECLAIM_COMPLETE    before it is answered: from then on the client may reclaim after a restart
    a client expired    before the request that needed what it held is answered (8.4.3, first edge)
    the end of grace    before anything that is no reclaim is granted: who has not reclaimed by then
                        may not do it after the next restart either (8.4.3, second edge)
    a session           that is persistent: before CREATE_SESSION is answered; its end, before
                        DESTROY_SESSION is; what BACKCHANNEL_CTL sets, before that is
    of a *kept* client  its locks, delegations, layouts, and opens that deny anything: before the
                        answer that tells them; other opens within a second or so: a client whose
                        open is unknown after a restart opens the file again by itself, nobody could
                        be in its way, and no OPEN and CLOSE waits for a flush of the device

A change is *staged* in the protocol's thread, and `commit`, which blocks, writes all that is staged
in one transaction (or, when they are too many for it, one after the other in the order in which
they were staged): whoever waits for one that is under way finds his own changes in the next, so
that many requests share it. A COMPOUND that staged something commits before it is answered; every
COMPOUND does, while it is not durable that something was taken from a client, by a timer or an
event of the core, which has no answer to hold back.

A client is kept if it asked for it: it set CREATE_SESSION4_FLAG_PERSIST, as the Linux client does.
After a restart it has its client ID, stateids and layouts, so that nothing is to be reclaimed, and
nothing in flight is lost. So it is with the sessions that it made with that flag; what the flag in
csr_flags promises (18.36.3), that a request is not executed twice, is kept by marks (`riders`),
which are records too, but written by the transactions of the core that they are about. Where a
session could not be made durable the flag is not granted: after a restart it is NFS4ERR_BADSESSION,
and the client makes another under its client ID (2.10.13.1.3, 8.4.2.1).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.riders import SLOT_MAX, RiderRecord, rider_number
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.service import Service
    from extfs.nfs.sessions import Session

__all__ = [
    "ClientRecord",
    "DurableState",
    "Kind",
    "Records",
    "Restorer",
    "ServerRecord",
    "SessionRecord",
    "StateRecord",
]

log = logging.getLogger("extfs.nfs")

VERSION = 1
SECRET_BYTES = 16
OWNER_MAX = 1024
REPLY_MAX = 4096
STATE_MAX = 32768
TAG_MAX = 64
CB_AUTH_MAX = 1024
SESSION_BYTES = 16
BACK_SLOTS_MAX = 64
_KIND_SHIFT = 56
_NUMBER_MASK = (1 << _KIND_SHIFT) - 1


class Kind:
    """The top byte of a record's number."""

    CLIENT = 1
    STATE = 2
    SESSION = 3
    RIDER = 4
    """`riders.rider_number`."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """Record 0."""

    secret: bytes
    epoch: int
    owner: bytes

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.fixed(self.secret)
        out.u32(self.epoch)
        out.opaque(self.owner)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> ServerRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        return cls(reader.fixed(SECRET_BYTES), reader.u32(), reader.opaque(OWNER_MAX))


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client; the fields are those of `clients.Client`."""

    clientid: int
    owner: bytes
    verifier: bytes
    flavor: int
    uid: int
    eligible: bool
    reclaim_done: bool
    kept: bool
    minor: int
    sequence: int
    reply: bytes
    holder_id: int
    holder_key: int

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.u64(self.clientid)
        out.opaque(self.owner)
        out.fixed(self.verifier)
        out.u32(self.flavor)
        out.u32(self.uid)
        out.boolean(self.eligible)
        out.boolean(self.reclaim_done)
        out.boolean(self.kept)
        out.u32(self.minor)
        out.u32(self.sequence)
        out.opaque(self.reply)
        out.u64(self.holder_id)
        out.u64(self.holder_key)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> ClientRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        return cls(
            clientid=reader.u64(),
            owner=reader.opaque(OWNER_MAX),
            verifier=reader.fixed(8),
            flavor=reader.u32(),
            uid=reader.u32(),
            eligible=reader.boolean(),
            reclaim_done=reader.boolean(),
            kept=reader.boolean(),
            minor=reader.u32(),
            sequence=reader.u32(),
            reply=reader.opaque(REPLY_MAX),
            holder_id=reader.u64(),
            holder_key=reader.u64(),
        )


@dataclass(frozen=True, slots=True)
class StateRecord:
    """A stateid of a kept client. `body` is what its class makes of it (`DurableState`)."""

    clientid: int
    kind: int
    body: bytes
    tag: bytes = b""

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.u64(self.clientid)
        out.u32(self.kind)
        out.opaque(self.body)
        out.opaque(self.tag)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> StateRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        clientid, kind, body = reader.u64(), reader.u32(), reader.opaque(STATE_MAX)
        # There was none before there were persistent sessions.
        return cls(clientid, kind, body, b"" if reader.done() else reader.opaque(TAG_MAX))


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A persistent session; the fields are those of `sessions.Session`.

    `fore` and `back`: the five numbers of ChannelAttributes. `wants_back`: it has had a
    backchannel. `back_sequences`: (floor, ceiling) of each of its slots, see `callbacks`.
    """

    clientid: int
    identity: bytes
    minor: int
    fore: tuple[int, int, int, int, int]
    back: tuple[int, int, int, int, int]
    cb_program: int
    cb_auth: bytes
    wants_back: bool
    back_sequences: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.u64(self.clientid)
        out.fixed(self.identity)
        out.u32(self.minor)
        for value in (*self.fore, *self.back):
            out.u32(value)
        out.u32(self.cb_program)
        out.opaque(self.cb_auth)
        out.boolean(self.wants_back)
        out.u32(len(self.back_sequences))
        for floor, ceiling in self.back_sequences:
            out.u32(floor)
            out.u32(ceiling)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> SessionRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        found = cls(
            clientid=reader.u64(),
            identity=reader.fixed(SESSION_BYTES),
            minor=reader.u32(),
            fore=_five(reader),
            back=_five(reader),
            cb_program=reader.u32(),
            cb_auth=reader.opaque(CB_AUTH_MAX),
            wants_back=reader.boolean(),
            back_sequences=tuple(
                (reader.u32(), reader.u32()) for _ in range(reader.count(BACK_SLOTS_MAX, 8))
            ),
        )
        if not 0 < found.fore[-1] <= SLOT_MAX:
            raise XdrError(f"a session of {found.fore[-1]} slots")
        return found


def _five(reader: Reader) -> tuple[int, int, int, int, int]:
    return reader.u32(), reader.u32(), reader.u32(), reader.u32(), reader.u32()


class DurableState(Protocol):
    """A state whose client may be kept."""

    kind: ClassVar[Any]
    client: Any
    mark: int
    tag: bytes

    @property
    def urgent(self) -> bool:
        """Whether a client that was told of it could not do without it after a restart."""
        ...

    def to_record(self) -> bytes:
        """All that its restorer needs; `other` and seqid are to be the same afterwards."""
        ...


Restorer = Callable[["Client", bytes], "DurableState | None"]
"""Makes the state of a `to_record`, with all that hangs on it in tables and in the core, before any
request runs; may block. None: it cannot be had any more. `XdrError`, `OSError`: the same."""


def _reader(encoded: bytes) -> Reader:
    reader = Reader(encoded)
    version = reader.u32()
    if version != VERSION:
        raise XdrError(f"version {version} of a record")
    return reader


class Records:
    """The server's records. Opening it reads all of them and begins a new epoch: blocks.

    `OSError`: they cannot be read or written. All methods but `commit` belong to the protocol's
    thread.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.fs.records
        loaded = self._store.load()
        server = self._start(loaded.pop(0, None))
        self.secret = server.secret
        self.epoch = server.epoch
        self.owner = server.owner
        self._loaded = loaded
        self._last: dict[int, int] = {}
        for number in loaded:
            kind, last = number >> _KIND_SHIFT, number & _NUMBER_MASK
            if kind == Kind.RIDER:  # those of a session may be left when it is gone
                kind, last = Kind.SESSION, last >> 16
            self._last[kind] = max(self._last.get(kind, 0), last)
        self._numbers: dict[Client, int] = {}
        self._of_client: dict[Client, dict[DurableState, int]] = {}
        self._changed: dict[DurableState, None] = {}
        self._urgent: set[DurableState] = set()
        """Those whose record is of an urgent one."""
        self.restorers: dict[int, Restorer] = {}
        """By kind of state."""
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._staged: dict[int, bytes | None] = {}
        self.staged = 0
        """How often something urgent was staged; see `owes`."""
        self._revoked = 0
        self._settled = 0
        """Of `staged`: the last change that took something from a client; and how far all is
        durable."""

    def _start(self, stored: bytes | None) -> ServerRecord:
        if stored is None:
            owner = b"extfs-" + os.urandom(8).hex().encode()
            server = ServerRecord(os.urandom(SECRET_BYTES), 1, owner)
        else:
            try:
                old = ServerRecord.decode(stored)
            except XdrError as error:
                raise OSError(f"the layout server's own record: {error}") from None
            server = ServerRecord(old.secret, (old.epoch + 1) & 0xFFFFFFFF, old.owner)
        self._store.put({0: server.encode()})
        return server

    # -- staging --

    def new_number(self, kind: int) -> int:
        """A number for a record."""
        last = self._last[kind] = self._last.get(kind, 0) + 1
        return kind << _KIND_SHIFT | last

    def stage(self, number: int, value: bytes | None, *, urgent: bool = True) -> None:
        """Write the record at the next commit; None: delete it.

        What is not urgent waits for a commit of somebody else, or of `Lease`, every second.
        """
        with self._lock:
            self._staged[number] = value
        if urgent:
            self.staged += 1

    def stage_client(self, client: Client) -> None:
        """The client as it is now."""
        number = self._numbers.get(client)
        if number is None:
            number = self._numbers[client] = self.new_number(Kind.CLIENT)
        self.stage(number, client.to_record())

    def stage_session(self, session: Session) -> None:
        """The session as it is now; the first time it gets its record."""
        if not session.record:
            session.record = self.new_number(Kind.SESSION)
        self.stage(session.record, session.to_record())

    def drop_session(self, session: Session) -> None:
        """It has no record any more, nor have its slots. One that has none is no error."""
        number, session.record = session.record, 0
        if not number:
            return
        for slot in session.ridden:
            self.stage(rider_number(number & _NUMBER_MASK, slot), None)
        self.stage(number, None)

    def drop_client(self, client: Client) -> None:
        """It has no record any more. A client that has none is no error."""
        number = self._numbers.pop(client, None)
        if number is not None:
            self.stage(number, None)
            self._revoked = self.staged
        for state, one in self._of_client.pop(client, {}).items():
            self._changed.pop(state, None)
            self._urgent.discard(state)
            self.stage(one, None)

    def state_changed(self, state: DurableState) -> None:
        """A state was made, or is not as it was; of a client that is not kept this does nothing."""
        if state.client.kept:
            self._changed[state] = None

    def state_dropped(self, state: DurableState) -> None:
        """A state is no more. One that has no record is no error."""
        self._changed.pop(state, None)
        of_client = self._of_client.get(state.client)
        number = None if of_client is None else of_client.pop(state, None)
        if number is not None:
            urgent = state.urgent or state in self._urgent
            self._urgent.discard(state)
            self.stage(number, None, urgent=urgent)

    def keep(self, client: Client) -> None:
        """The client, which has no state yet, is to be kept."""
        client.kept = True
        self._of_client.setdefault(client, {})

    def _stage_changed(self) -> None:
        """Changed states as they are now."""
        changed, self._changed = self._changed, {}
        for state in changed:
            of_client = self._of_client.get(state.client)
            if of_client is None:
                continue
            number = of_client.get(state)
            if number is None:
                number = of_client[state] = self.new_number(Kind.STATE)
            record = StateRecord(
                state.client.clientid, int(state.kind), state.to_record(), state.tag
            )
            urgent = bool(state.urgent or state.mark or state in self._urgent)
            if state.urgent:
                self._urgent.add(state)
            else:
                self._urgent.discard(state)
            self.stage(number, record.encode(), urgent=urgent)
            if state.mark:
                self._revoked = self.staged

    def owes(self, staged: int) -> bool:
        """Whether a COMPOUND that began when `self.staged` was that has to commit at its end.

        It has staged something; or it is not durable yet that a client lost something: what others
        were given instead must not be told them before.
        """
        if self._changed:
            self._stage_changed()
        return self.staged != staged or self._revoked > self._settled

    @property
    def pending(self) -> bool:
        """Whether a commit has something to write."""
        return bool(self._staged) or bool(self._changed)

    def commit(self) -> None:
        """What was staged before the call is durable after it. Blocks. `OSError`: it is not.

        Runs in any thread. What could not be written stays staged.
        """
        with self._committing:
            with self._lock:
                batch, self._staged = self._staged, {}
            if not batch:
                return
            try:
                self._put(list(batch.items()))
            except BaseException:
                with self._lock:
                    self._staged = batch | self._staged
                raise

    def finish(self) -> None:
        """Make durable all that is pending, when no more requests come. Blocks. `OSError`."""
        self._stage_changed()
        self.commit()

    def _put(self, changes: list[tuple[int, bytes | None]]) -> None:
        """In the order in which they were staged, in as few transactions as they fit in."""
        try:
            self._store.put(
                {number: value for number, value in changes if value is not None},
                [number for number, value in changes if value is None],
            )
        except OSError as error:
            if error.errno != errno.E2BIG or len(changes) == 1:
                raise
            half = len(changes) // 2
            self._put(changes[:half])
            self._put(changes[half:])

    def durable(self) -> Steps[None]:
        """Wait until all that is staged now is durable."""
        if self._changed:
            self._stage_changed()
        reached = self.staged
        if self._staged or self._committing.locked():
            yield Blocking(self.commit)
        self._settled = max(self._settled, reached)

    # -- after a restart --

    def restore(self) -> None:
        """Hand the records of the last epoch to those whom they concern. Blocks."""
        loaded, self._loaded = self._loaded, {}
        clients: dict[int, ClientRecord] = {}
        states: list[tuple[int, int, StateRecord]] = []
        sessions: dict[int, SessionRecord] = {}
        riders: list[RiderRecord] = []
        for number, encoded in sorted(loaded.items()):
            kind = number >> _KIND_SHIFT
            with contextlib.suppress(XdrError, ValueError):
                if kind == Kind.SESSION:
                    sessions[number] = SessionRecord.decode(encoded)
                    continue
                if kind == Kind.RIDER:
                    riders.append(RiderRecord.decode(encoded))
                    continue
                if kind == Kind.CLIENT:
                    clients[number] = ClientRecord.decode(encoded)
                    continue
                if kind == Kind.STATE:
                    state = StateRecord.decode(encoded)
                    states.append((state.kind, number, state))
                    continue
            log.warning("record %x of the layout server is unknown, it stays as it is", number)
        kept = self._restore_clients(clients)
        self._restore_sessions(kept, sessions, riders)
        # By kind: locks need their opens.
        for _, number, state in sorted(states, key=lambda entry: entry[:2]):
            client = kept.get(state.clientid)
            if client is None or not self._restore_state(client, number, state):
                self.stage(number, None)
        self._service.lease.restore(clients)

    def _restore_clients(self, clients: dict[int, ClientRecord]) -> dict[int, Client]:
        """Take those that are kept out of `clients`; returns them by client ID."""
        service = self._service
        kept: dict[int, Client] = {}
        owners: dict[bytes, int] = {}
        for number, record in clients.items():
            owners[record.owner] = number  # of two the later one, it was about to replace the other
        for number in owners.values():
            record = clients[number]
            if not record.kept or not service.options.keep_clients:
                continue
            client = service.clients.restore(record)
            kept[client.clientid] = client
            self._numbers[client] = number
            self._of_client[client] = {}
        for number, record in list(clients.items()):
            if record.clientid in kept:
                del clients[number]
            elif owners[record.owner] != number:
                self.stage(number, None)
                del clients[number]
        return kept

    def _restore_sessions(
        self,
        kept: dict[int, Client],
        sessions: dict[int, SessionRecord],
        riders: list[RiderRecord],
    ) -> None:
        """Those of kept clients, with their riders; all others go."""
        of_session: dict[int, dict[int, RiderRecord]] = {}
        for rider in riders:
            of_session.setdefault(rider.session, {})[rider.slot] = rider
        for number, record in sessions.items():
            client = kept.get(record.clientid)
            if client is None:
                self.stage(number, None)
                continue
            mine = of_session.pop(number & _NUMBER_MASK, {})
            self._service.sessions.restore(client, number, record, mine)
            self._service.count("sessions_kept")
        for left in of_session.values():
            for rider in left.values():
                self.stage(rider.number, None)

    def _restore_state(self, client: Client, number: int, record: StateRecord) -> bool:
        restorer = self.restorers.get(record.kind)
        if restorer is None:
            return False
        try:
            state = restorer(client, record.body)
        except (XdrError, OSError) as error:
            # A file without a name is freed by a restart, perhaps just now.
            gone = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE)
            level = logging.INFO if gone else logging.WARNING
            log.log(level, "a state of client %s is lost: %s", client.name, error)
            return False
        if state is None:
            return False
        state.tag = record.tag
        self._of_client[client][state] = number
        if state.urgent:
            self._urgent.add(state)
        self._changed.pop(state, None)
        self._service.count("states_kept")
        return True
