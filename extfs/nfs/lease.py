"""Leases, courtesy, and the grace period after a restart (RFC 8881 8.3, 8.4).

Leases: every SEQUENCE renews its client's (`SessionTable.begin`). A client whose lease has run out
goes at once if it has neither state nor a session; else it is kept as a courtesy (8.4.2.4) until
somebody's request is in conflict with it (`conflict`), memory is short (`ServiceOptions.clients`),
or `COURTESY_SECONDS` are over; one that only has sessions, `IDLE_SECONDS`.

Grace: a restart forgets the states of clients (but of kept ones, see `records.py`). Who held some
may reclaim them, and meanwhile nobody else gets any. States of the period: CLOSED -> OPEN in
`restore`, if somebody may reclaim; OPEN -> ENDING when all who may have sent RECLAIM_COMPLETE, or
its time is over; ENDING -> CLOSED when it is durable that who did not reclaim may not do so later.
`in_grace` is true in OPEN and ENDING. A reclaim moves the end away by `EXTENSION_SECONDS`, up to
twice the length of the period.

Who may reclaim (8.4.3): clients with an *eligible* record. A client is eligible from its
RECLAIM_COMPLETE on, or from when it is confirmed again in a grace period in which its owner may
reclaim; until it is expired, or grace ends without its RECLAIM_COMPLETE.
"""

from __future__ import annotations

import enum
import errno
import logging
from typing import TYPE_CHECKING, Any

from extfs.core import CoreError
from extfs.nfs import constants as n
from extfs.nfs.clients import Client, Standing, fence_key_of, resume_holder, retire_holder
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.records import ClientRecord

if TYPE_CHECKING:
    from extfs.nfs.service import Service

__all__ = ["Grace", "Lease"]

log = logging.getLogger("extfs.nfs")

TICK_SECONDS = 1.0
COURTESY_SECONDS = 86400.0
IDLE_SECONDS = 3600.0
"""Not longer, because the next grace period waits for everybody who has not gone."""
EXTENSION_SECONDS = 2.0


class Grace(enum.IntEnum):
    """See the module."""

    CLOSED = 0
    OPEN = 1
    ENDING = 2


class Lease:
    """Times of all clients, and who may reclaim. `seconds`: how long a lease is."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.seconds = service.options.lease_seconds
        self.grace = Grace.CLOSED
        self._grace_end = 0.0
        self._grace_limit = 0.0
        self._old: dict[bytes, tuple[int, ClientRecord]] = {}
        """By owner: clients of before the restart, with their record's number, that have not
        been confirmed again."""
        self._reclaiming: set[bytes] = set()
        """Owners that may reclaim and have not sent RECLAIM_COMPLETE since the restart."""
        service.timers.after(TICK_SECONDS, self._tick)

    # -- for operations --

    def in_grace(self) -> bool:
        """Whether only reclaims are granted."""
        return self.grace is not Grace.CLOSED

    def begin_open(self, client: Client, reclaim: bool) -> None:
        """Before a state is granted (RFC 8881 8.4.2.1, 18.51.3).

        `NfsError`: GRACE; for a reclaim NO_GRACE or RECLAIM_BAD.
        """
        if not reclaim:
            if self.grace is not Grace.CLOSED or not client.reclaim_done:
                raise NfsError(n.NFS4ERR_GRACE)
            return
        if client.reclaim_done or self.grace is not Grace.OPEN:
            raise NfsError(n.NFS4ERR_NO_GRACE)
        if client.owner not in self._reclaiming:
            raise NfsError(n.NFS4ERR_RECLAIM_BAD)
        end = self._service.clock() + EXTENSION_SECONDS
        self._grace_end = max(self._grace_end, min(end, self._grace_limit))

    def is_courtesy(self, client: Client) -> bool:
        """Whether its lease has run out, and what it holds is there for whoever needs it."""
        if client.standing is Standing.CONFIRMED:
            over = self._service.clock() - client.renewed > self.seconds
            # Who waits for an answer of ours is not away.
            return over and not any(session.busy() for session in client.sessions)
        return client.standing is Standing.COURTESY

    def conflict(self, client: Client) -> bool:
        """Somebody needs what `client` holds: if it is there by courtesy the client goes.

        True: it has nothing any more. The COMPOUND that asked commits before it is answered.
        """
        if client.standing is not Standing.GONE and not self.is_courtesy(client):
            return False
        self.expire(client)
        return True

    def expire(self, client: Client) -> None:
        """Drop the client with all its state."""
        if client.standing is not Standing.GONE:
            self._service.count("clients_expired")
            log.info("client %s expired", client.name)
            self._service.clients.drop(client)

    # -- confirmation and reclaim --

    def may_succeed(self, client: Client) -> bool:
        """Whether its principal is who had the owner before the restart, if anybody had."""
        old = self._old.get(client.owner)
        return old is None or (old[1].flavor, old[1].uid) == client.principal

    def confirmed(self, client: Client) -> Steps[None]:
        """CREATE_SESSION is about to confirm it: it takes over what its owner had of before.

        Its holder in the core is resumed, or given up if the client has restarted too (another
        verifier). Its record is durable when this returns, and the old record gone.
        """
        records = self._service.records
        old = self._old.pop(client.owner, None)
        if old is None:
            records.stage_client(client)
            yield from records.durable()
            return
        number, record = old
        client.eligible = client.owner in self._reclaiming
        same = record.verifier == client.verifier
        if record.holder_id and same:
            client.holder_id, client.holder_key = record.holder_id, record.holder_key
            client.holder_old = True
        records.stage_client(client)
        records.stage(number, None)
        yield from records.durable()
        holder, key = record.holder_id, record.holder_key
        if not holder:
            return
        fs = self._service.fs
        if not same:
            yield Blocking(lambda: retire_holder(fs, holder))
        elif (yield Blocking(lambda: resume_holder(fs, holder, key))):
            client.fence_key = fence_key_of(fs, holder)
        else:
            client.forget_holder()
            client.must_drop = True

    def reclaim_complete(self, client: Client) -> Steps[None]:
        """RECLAIM_COMPLETE for all file systems (RFC 8881 18.51); durable when it returns."""
        if client.reclaim_done:
            raise NfsError(n.NFS4ERR_COMPLETE_ALREADY)
        records, layouts = self._service.records, self._service.layouts
        was_eligible = client.eligible
        client.reclaim_done = client.eligible = True
        old = layouts.holders.give_up(client) if client.holder_old and client.fence_key else None
        records.stage_client(client)
        try:
            yield from records.durable()
        except BaseException:
            client.reclaim_done, client.eligible = False, was_eligible
            if old is not None:
                layouts.holders.take_back(client, old)
            raise
        if old is not None:
            layouts.holders.given_up(client, old)
            yield Blocking(lambda: retire_holder(self._service.fs, old.id))
        elif client.holder_old:
            yield from self._give_up_old(client)
        self._reclaiming.discard(client.owner)
        self._end_grace_if_due()

    def _give_up_old(self, client: Client) -> Steps[None]:
        """What it had of before the restart and did not reclaim; on a unit that knows no keys."""
        fs, holder = self._service.fs, client.holder_id
        try:
            yield Blocking(lambda: fs.layouts.give_all_back(holder))
        except CoreError as error:
            if error.errno != errno.ENOENT:  # it was fenced meanwhile
                raise
        finally:
            client.holder_old = False

    # -- restart --

    def restore(self, clients: dict[int, ClientRecord]) -> None:
        """The clients of before the restart, by number of their record."""
        for number, record in clients.items():
            self._old[record.owner] = (number, record)
        self._reclaiming.update(
            owner for owner, (_, record) in self._old.items() if record.eligible
        )
        if self._reclaiming:
            length = self._service.options.grace_seconds
            self.grace = Grace.OPEN
            self._grace_end = self._service.clock() + length
            self._grace_limit = self._grace_end + length
            log.info("grace period: %d clients may reclaim", len(self._reclaiming))
        else:
            self._end_grace()

    def _end_grace_if_due(self) -> None:
        if self.grace is not Grace.OPEN:
            return
        if not self._reclaiming or self._service.clock() >= self._grace_end:
            self._end_grace()

    def _end_grace(self) -> None:
        """Who has not reclaimed by now may not do it after the next restart."""
        service = self._service
        self.grace = Grace.ENDING
        late, self._reclaiming = self._reclaiming, set()
        for number, record in self._old.values():
            service.records.stage(number, None)
            if record.holder_id:
                log.info("client %r did not come back for its layouts", record.owner)
        self._old.clear()
        for owner in late:
            client = service.clients.living(owner)
            if client is not None and not client.reclaim_done:
                client.eligible = False
                service.records.stage_client(client)
        service.driver.run(service.records.durable(), self._grace_ended)

    def _grace_ended(self, _: object, error: Exception | None) -> None:
        if error is None:
            self.grace = Grace.CLOSED
            log.info("the grace period is over")
        else:
            log.error("the end of the grace period cannot be written down: %s", error)
            self._service.timers.after(
                TICK_SECONDS,
                lambda: self._service.driver.run(
                    self._service.records.durable(), self._grace_ended
                ),
            )

    # -- time --

    def _tick(self) -> None:
        service = self._service
        service.timers.after(TICK_SECONDS, self._tick)
        now = service.clock()
        for client in service.clients.all_pending():
            if now - client.renewed > self.seconds and not client.creating:
                service.clients.drop(client)
        for client in service.clients.all_living():
            if now - client.renewed > self.seconds:
                self._lease_over(client, now)
        self._end_grace_if_due()
        if service.records.pending:
            service.driver.run(service.records.durable(), self._written)

    def _lease_over(self, client: Client, now: float) -> None:
        service = self._service
        if any(session.busy() for session in client.sessions):
            return
        limit = 0.0
        if service.clients.has_state(client):
            limit = COURTESY_SECONDS
        elif client.sessions:
            limit = IDLE_SECONDS
        if service.options.courtesy and now - client.renewed < limit:
            if client.standing is not Standing.COURTESY:
                client.standing = Standing.COURTESY
                service.count("courtesy")
        else:
            self.expire(client)

    @staticmethod
    def _written(_: object, error: Exception | None) -> None:
        if error is not None:
            log.warning("client records cannot be written: %s", error)

    def status(self) -> dict[str, Any]:
        """For people."""
        now = self._service.clock()
        return {
            "seconds": self.seconds,
            "grace": self.grace.name.lower(),
            "grace_seconds_left": round(max(0.0, self._grace_end - now), 1)
            if self.grace is Grace.OPEN
            else 0,
            "may_reclaim": len(self._reclaiming),
        }
