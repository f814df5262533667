"""Clients (RFC 8881 2.4, 18.35): who a client ID belongs to, and the table of all of them.

Definitions: an *owner* is what a client calls itself (co_ownerid); it stays when the client
restarts, its *verifier* does not. A *record* here is a `Client`: one client ID.

    PENDING    EXCHANGE_ID gave it out; CREATE_SESSION has not confirmed it. In memory only.
    CONFIRMED  its lease runs.
    COURTESY   its lease has run out, nobody needed what it holds yet (RFC 8881 8.4.2.4).
    GONE       nothing knows it any more.

Edges: `ClientTable.add` -> PENDING; `confirm` PENDING -> CONFIRMED; `Client.renew` COURTESY ->
CONFIRMED; `Lease` CONFIRMED -> COURTESY; `drop` any -> GONE.

Invariants: 1. an owner has at most one PENDING and one living other record. 2. A record that is not
PENDING is durable (`records.py`), but while CREATE_SESSION of its owner waits for that. 3. A record
that is GONE is in no table and has no sessions.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extfs.core import CoreError, Filesystem, HolderKind, HolderSpec
from extfs.nfs import constants as n
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.records import ClientRecord

if TYPE_CHECKING:
    from extfs.nfs.service import Service
    from extfs.nfs.sessions import Session

__all__ = [
    "Client",
    "ClientTable",
    "ScsiFence",
    "Standing",
    "fence_key_of",
    "in_background",
    "resume_holder",
    "retire_holder",
]

log = logging.getLogger("extfs.nfs")

PENDING_MAX = 1024
"""Client IDs that are not confirmed; the oldest makes room for the next."""
KEY_TRIES = 64
REGISTERING_MAX = 4
"""Holders that are registered at a time: their keys are asked of the unit, which may not answer for
long, and other requests need threads, too."""
_HOST_MAX = 64
"""Characters of an address, with its zone."""
_HOLDER_NAME_MAX = 60

Principal = tuple[int, int]
"""RPC flavor and user id: who may act for a client ID (RFC 8881 2.4.3)."""


class Standing(enum.IntEnum):
    """See the module."""

    PENDING = 1
    CONFIRMED = 2
    COURTESY = 3
    GONE = 4


class Client:
    """One client ID.

    `sequence` and `reply`: the slot of CREATE_SESSION (RFC 8881 18.36.4): the sequence number that
    succeeded last, and its result after the status. `renewed`: seconds of the service's clock.
    `reclaim_done`: it has sent RECLAIM_COMPLETE. `eligible`: it may reclaim after a restart of the
    server (8.4.3). `kept`: it and its states survive a restart of the server. `fence_key`: what the
    storage knows its holder by, or 0. `must_drop`: it may have layouts of a holder that was
    fenced; `dropped`: of this holder it has said that it has none (`layout_holders`).
    """

    __slots__ = (
        "clientid",
        "creating",
        "dropped",
        "eligible",
        "fence_key",
        "holder_id",
        "holder_key",
        "holder_old",
        "kept",
        "minor",
        "must_drop",
        "owner",
        "peer",
        "principal",
        "reclaim_done",
        "reclaimed_exports",
        "renewed",
        "reply",
        "sequence",
        "sessions",
        "standing",
        "verifier",
        "wants_callbacks",
        "wants_holder",
    )

    def __init__(
        self, clientid: int, owner: bytes, verifier: bytes, principal: Principal, renewed: float
    ) -> None:
        self.clientid = clientid
        self.owner = owner
        self.verifier = verifier
        self.principal = principal
        self.renewed = renewed
        self.standing = Standing.PENDING
        self.sequence = 0
        self.reply = b""
        self.creating = False
        self.sessions: list[Session] = []
        self.minor = 1
        self.peer = ""
        self.reclaim_done = False
        self.eligible = False
        self.kept = False
        self.reclaimed_exports: set[int] = set()
        self.wants_callbacks = False
        self.holder_id = 0
        self.holder_key = 0
        self.holder_old = False
        """The holder is from before a restart: what it was granted then is given up by
        RECLAIM_COMPLETE, for layouts are not reclaimed (RFC 8881 12.7.4)."""
        self.wants_holder = False
        self.fence_key = 0
        self.must_drop = False
        self.dropped = 0

    def forget_holder(self) -> None:
        """It has none any more."""
        self.holder_id = self.holder_key = self.fence_key = 0
        self.holder_old = False

    def renew(self, now: float) -> None:
        """Its lease begins anew; what it had by courtesy is its own again."""
        self.renewed = now
        if self.standing is Standing.COURTESY:
            self.standing = Standing.CONFIRMED

    @property
    def name(self) -> str:
        """The owner for people: other bytes than printable ASCII as dots."""
        return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in self.owner)

    def to_record(self) -> bytes:
        """What is durable of it."""
        return ClientRecord(
            clientid=self.clientid,
            owner=self.owner,
            verifier=self.verifier,
            flavor=self.principal[0],
            uid=self.principal[1],
            eligible=self.eligible,
            reclaim_done=self.reclaim_done,
            kept=self.kept,
            minor=self.minor,
            sequence=self.sequence,
            reply=self.reply if self.kept else b"",
            holder_id=self.holder_id,
            holder_key=self.holder_key,
        ).encode()

    @classmethod
    def from_record(cls, record: ClientRecord, renewed: float) -> Client:
        """A client whose client ID survived a restart of the server."""
        client = cls(
            record.clientid, record.owner, record.verifier, (record.flavor, record.uid), renewed
        )
        client.standing = Standing.CONFIRMED
        client.sequence, client.reply, client.minor = record.sequence, record.reply, record.minor
        client.eligible, client.reclaim_done = record.eligible, record.reclaim_done
        client.kept = True
        client.holder_id, client.holder_key = record.holder_id, record.holder_key
        return client

    def holder(self, service: Service) -> Steps[int]:
        """The core's holder that this client is; registered, durably, at its first layout.

        `NfsError`: DELAY while another request registers it, or requests do for too many others;
        EXPIRED if the client is gone by now.
        """
        if self.holder_id:
            return self.holder_id
        clients = service.clients
        if self.wants_holder or clients.registering >= REGISTERING_MAX:
            raise NfsError(n.NFS4ERR_DELAY)
        layouts = service.fs.layouts
        unit = service.options.unit
        if unit is None or not service.exports.offers(self.peer, n.LAYOUT4_SCSI):
            fence, new_key = f"nfs:{self.clientid:x}", None
        else:
            fence, new_key = str(ScsiFence.of(self)), unit.new_key
        spec = HolderSpec(name=self.name[:_HOLDER_NAME_MAX], kind=HolderKind.CLIENT, fence=fence)
        self.wants_holder = True
        clients.registering += 1
        try:
            registered: tuple[int, int, int] = yield Blocking(
                lambda: _register(service.fs, spec, new_key)
            )
        finally:
            clients.registering -= 1
            self.wants_holder = False
        holder, key, fence_key = registered
        if self.standing is Standing.GONE:
            yield Blocking(lambda: layouts.gone(holder))
            raise NfsError(n.NFS4ERR_EXPIRED)
        self.holder_id, self.holder_key, self.fence_key = holder, key, fence_key
        service.records.stage_client(self)
        yield Blocking(service.records.commit)
        return holder


@dataclass(frozen=True, slots=True)
class ScsiFence:
    """What is written into the record of a holder that the unit knows by a key: who registers it.

    `owner`: a digest, 16 hexadecimal digits; `host`: the address of the client.
    """

    clientid: int
    owner: str
    host: str

    @classmethod
    def of(cls, client: Client) -> ScsiFence:
        """Of a client as it is now."""
        digest = hashlib.blake2b(client.owner, digest_size=8, person=b"extfs owner")
        return cls(client.clientid, digest.hexdigest(), client.peer[:_HOST_MAX])

    @classmethod
    def read(cls, fence: str) -> ScsiFence | None:
        """Of `HolderSpec.fence`; None: it is of no such holder."""
        if not fence.startswith("scsi:") or fence.count(":") < 3:
            return None
        _, clientid, owner, host = fence.split(":", 3)
        return cls(int(clientid, 16), owner, host)

    def __str__(self) -> str:
        return f"scsi:{self.clientid:x}:{self.owner}:{self.host}"


def _register(
    fs: Filesystem, spec: HolderSpec, new_key: Callable[[], int] | None
) -> tuple[int, int, int]:
    """A new holder: (id, key, fence key), the last one no other holder has. Blocks.

    `OSError` EAGAIN: too many holders, or no such key.
    """
    fence_key = 0
    if new_key is not None:
        taken = {holder.spec.fence_key for holder in fs.layouts.holders()} | {0}
        keys = (new_key() for _ in range(KEY_TRIES))
        fence_key = next((one for one in keys if one not in taken), 0)
        if not fence_key:
            raise OSError(errno.EAGAIN, "every new key was one that a holder has")
        spec = replace(spec, fence_key=fence_key)
    return (*fs.layouts.register(spec), fence_key)


class ClientTable:
    """All clients of the server, but for those of before a restart, which `Lease` knows."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._by_id: dict[int, Client] = {}
        self._pending: dict[bytes, Client] = {}
        self._living: dict[bytes, Client] = {}
        self._last = 0
        self.registering = 0
        """Of clients, whose holders are being registered."""
        self.lost: list[Callable[[Client], None]] = []
        """Called with each client that goes, before its sessions go."""

    def __iter__(self) -> Iterator[Client]:
        """Every client ID."""
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    # -- look up --

    def get(self, clientid: int) -> Client | None:
        """The client of a client ID."""
        return self._by_id.get(clientid)

    def pending(self, owner: bytes) -> Client | None:
        """The PENDING client of an owner."""
        return self._pending.get(owner)

    def living(self, owner: bytes) -> Client | None:
        """The CONFIRMED or COURTESY client of an owner."""
        return self._living.get(owner)

    def all_living(self) -> list[Client]:
        """CONFIRMED and COURTESY ones, in the order in which they were confirmed."""
        return list(self._living.values())

    def all_pending(self) -> list[Client]:
        """PENDING ones, the oldest first."""
        return list(self._pending.values())

    def has_state(self, client: Client) -> bool:
        """Whether it holds opens, locks, delegations, layouts."""
        return self._service.states.has_state(client)

    # -- edges --

    def add(self, owner: bytes, verifier: bytes, principal: Principal) -> Client:
        """A PENDING client with a client ID that was never used; the owner's last one goes.

        `NfsError` DELAY: that one is about to be confirmed.
        """
        old = self._pending.get(owner)
        if old is not None:
            if old.creating:
                raise NfsError(n.NFS4ERR_DELAY)
            self.drop(old)
        if len(self._pending) >= PENDING_MAX:
            idle = next((one for one in self._pending.values() if not one.creating), None)
            if idle is None:
                raise NfsError(n.NFS4ERR_DELAY)
            self.drop(idle)
        self._last += 1
        service = self._service
        clientid = service.records.epoch << 32 | self._last
        client = Client(clientid, owner, verifier, principal, service.clock())
        self._by_id[clientid] = client
        self._pending[owner] = client
        return client

    def confirm(self, client: Client) -> None:
        """PENDING -> CONFIRMED; its record is durable and the owner has no other living one."""
        assert client.standing is Standing.PENDING
        assert client.owner not in self._living
        del self._pending[client.owner]
        self._living[client.owner] = client
        client.standing = Standing.CONFIRMED
        client.renewed = self._service.clock()

    def restore(self, record: ClientRecord) -> Client:
        """A kept client of before a restart, with its client ID; its lease begins now. Blocks."""
        client = Client.from_record(record, self._service.clock())
        holder, key = client.holder_id, client.holder_key
        if holder and not resume_holder(self._service.fs, holder, key):
            client.forget_holder()
        elif holder:
            client.fence_key = fence_key_of(self._service.fs, holder)
            self._service.layouts.resumed(client)
        # It had one before that was fenced, perhaps; a layout of this one tells otherwise
        # (`LayoutTable._restore`).
        client.must_drop = True
        self._by_id[client.clientid] = client
        self._living[client.owner] = client
        return client

    def make_room(self) -> None:
        """For one more confirmed client. `NfsError` DELAY: there is none."""
        if len(self._living) < self._service.options.clients:
            return
        courtesy = [c for c in self._living.values() if c.standing is Standing.COURTESY]
        if not courtesy:
            raise NfsError(n.NFS4ERR_DELAY)
        self.drop(min(courtesy, key=lambda client: client.renewed))

    def drop(self, client: Client, *, restarted: bool = False) -> None:
        """It is GONE, with sessions and states; its record is staged to be deleted.

        `restarted`: the client itself has begun anew, so nobody uses its layouts any more.
        """
        if client.standing is Standing.GONE:
            return
        service = self._service
        pending = client.standing is Standing.PENDING
        client.standing = Standing.GONE
        del self._by_id[client.clientid]
        table = self._pending if pending else self._living
        if table.get(client.owner) is client:
            del table[client.owner]
        for session in client.sessions:  # before the client: no record of theirs is without one
            service.sessions.not_kept(session)
        service.records.drop_client(client)
        if pending:
            return
        for told in self.lost:
            told(client)
        for session in list(client.sessions):
            service.sessions.destroy(session)
        service.callbacks.client_lost(client)
        service.states.client_lost(client)
        service.layouts.client_lost(client)
        service.count("clients_dropped")
        if client.holder_id:
            holder = client.holder_id
            end = retire_holder if restarted else _lose_holder
            in_background(service, lambda: end(service.fs, holder))

    def status(self) -> list[dict[str, Any]]:
        """For people: every client with its sessions."""
        now = self._service.clock()
        return [
            {
                "clientid": f"{client.clientid:016x}",
                "owner": client.name,
                "standing": client.standing.name.lower(),
                "address": client.peer,
                "minor_version": client.minor,
                "renewed_seconds_ago": round(now - client.renewed, 1),
                "reclaim_complete": client.reclaim_done,
                "survives_restart": client.kept,
                "holder": client.holder_id,
                "sessions": [session.status() for session in client.sessions],
            }
            for client in self._by_id.values()
        ]


def in_background(service: Service, call: Callable[[], object]) -> None:
    """Run what may block, for no request; a failure is logged."""

    def steps() -> Steps[None]:
        yield Blocking(call)

    def done(_: object, error: Exception | None) -> None:
        if error is not None:
            log.warning("in the background: %s", error)

    service.driver.run(steps(), done)


def resume_holder(fs: Filesystem, holder: int, key: int) -> bool:
    """A holder of before a restart speaks again. False: it is no more. Blocks.

    One that is condemned does not, but stays what the client is until its fence is confirmed.
    """
    try:
        fs.layouts.resume(holder, key)
    except CoreError as error:
        log.info("holder %d is not resumed: %s", holder, error)
        return error.errno in (errno.EBUSY, errno.EKEYREVOKED)  # EBUSY: live already
    return True


def fence_key_of(fs: Filesystem, holder: int) -> int:
    """The key that a holder was registered with; 0: none, or no such holder."""
    record = fs.layouts.holder(holder)
    return 0 if record is None else record.spec.fence_key


def retire_holder(fs: Filesystem, holder: int) -> None:
    """The client behind it has begun anew: it has given everything back. Blocks.

    Of one that registered a key that is not enough: its memory is gone, but not what it has queued
    at the unit, where its key is still registered. It is to be fenced.
    """
    record = fs.layouts.holder(holder)
    if record is not None and ScsiFence.read(record.spec.fence) is None:
        try:
            fs.layouts.give_all_back(holder)
            fs.layouts.gone(holder)
        except CoreError as error:
            log.info("holder %d is not done with: %s", holder, error)
        else:
            return
    _lose_holder(fs, holder)


def _lose_holder(fs: Filesystem, holder: int) -> None:
    """The client behind it is gone; one that was fenced is no more. Blocks."""
    try:
        fs.layouts.lost(holder)
    except CoreError as error:
        if error.errno != errno.ENOENT:
            raise
