"""Clients as holders of the core: made, lost, condemned, fenced, and here again.

    none        the client has no holder: before its first layout, and after it was fenced
    live        it has one (`of`); on a unit that can fence, with a key of its own
    lost        it missed a recall, or the server was restarted; `speak_again` makes it live
    condemned   it is lost and its fence is decided, durably: it never is live again
    given up    the client has forgotten it (`give_up`); it is lost, and never is live again
    gone        the fence is confirmed (`gone`): its layouts, stateids, delegations and device id
                are no more; the next LAYOUTGET makes another holder, with another key

Invariants, beside those of `extfs.nfs.layouts`:

 13. The layout states of a client are of its holder now. When that is gone they end together.
 14. A client is told its key (`clear`) only when no other holder that may have registered one on
     the same host can reach the device any more. The Linux client registers its key over the one
     that its path to the unit has: the older key would be gone from the unit, though nobody has
     fenced what was written with it, and the path would work. So an owner whose last holder is not
     through with waits for that one's fence; and the host of a client that was told its key is
     bound to its owner, until that client has gone with nothing in its hands: other clients of
     that host, in containers say, go through the server.

 15. A client whose last holder was fenced is told the next key only when it has said that it has no
     layouts, in answer to a CB_LAYOUTRECALL of all (`_recall_all`): each of its files has its own
     layout, and it knows of the fence only where it was refused. With the new key the unit would
     take what it writes with any of the others. Linux answers DELAY while I/O is under way with
     one. Replies to LAYOUTGETs that it may yet receive are referring calls.

Who has to wait for a fence, or to have answered that recall, is told to try again for
`FENCE_SECONDS`, and after that to go through the server. Linux then does not ask again for two
minutes, so this is longer than a target takes that first drops a session which does not answer.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import HolderState, LostCause
from extfs.nfs import constants as n
from extfs.nfs.clients import ScsiFence, Standing
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_states import TRY_LATER
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extfs.core import HolderRecord
    from extfs.nfs.callbacks import CallbackReply
    from extfs.nfs.clients import Client
    from extfs.nfs.layout_segments import Received
    from extfs.nfs.layouts import LayoutTable

__all__ = ["FENCE_SECONDS", "GivenUp", "Holders"]

log = logging.getLogger("extfs.nfs")

FENCE_SECONDS = 8.0
HOSTS_MAX = 65536
"""Hosts that are bound; after that the oldest is not any more."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A holder that its client does not speak for any more."""

    id: int
    key: int
    fence_key: int


class Holders:
    """The holders of all clients."""

    def __init__(self, table: LayoutTable) -> None:
        self._table = table
        self._service = table.service
        self._by_holder: dict[int, Client] = {}
        self._waiting: dict[Client, float] = {}
        """Since when a client waits for a fence."""
        self._bound: dict[str, tuple[str, int]] = {}
        """By host: owner and holder of the key that was told there last."""
        self._refused: set[Client] = set()
        self._asked: set[Client] = set()
        """Clients that a recall of all layouts is out to."""
        self._replies: dict[Client, list[Received]] = {}
        """Of layouts that ended, and the client may not have received them yet."""
        self._old_keys: dict[Client, list[int]] = {}
        """Those with which a client was told a device that is to be deleted."""

    def client_of(self, holder: int) -> Client | None:
        """The client that is this holder in the core."""
        client = self._by_holder.get(holder)
        if client is None or client.holder_id != holder or client.standing is Standing.GONE:
            living = self._service.clients.all_living()
            self._by_holder = {c.holder_id: c for c in living if c.holder_id}
            client = self._by_holder.get(holder)
        return client

    def of(self, client: Client) -> Steps[int]:
        """The client's holder, registered if it has none; durable."""
        holder = yield from client.holder(self._service)
        self._by_holder[holder] = client
        return holder

    # -- what a LAYOUTGET may have to wait for --

    def told(self, client: Client) -> bool:
        """Whether the client was told its key."""
        who = ScsiFence.of(client)
        return bool(client.fence_key) and self._bound.get(who.host) == (who.owner, client.holder_id)

    def clear(self, client: Client) -> Steps[None]:
        """Before the client, which has a key, is told it: invariant 14. `NfsError`: not yet, or not
        at all."""
        if self.told(client):
            return
        who, mine = ScsiFence.of(client), client.holder_id
        found: list[HolderRecord] = yield Blocking(self._service.fs.layouts.holders)
        if client.holder_id != mine:
            raise NfsError(n.NFS4ERR_DELAY)
        bound = self._bound.get(who.host)
        if bound is not None and bound[0] != who.owner:
            self._refuse(client)
        for record in found:
            other = ScsiFence.read(record.spec.fence)
            if other is None or record.id == mine or record.state is HolderState.GONE:
                continue
            if other.owner == who.owner:
                self._wait(client)
            if other.host == who.host and _may_write(record):
                self._refuse(client)
        if client.must_drop or (bound is not None and bound[1] != client.dropped):
            self._recall_all(client)
            self._wait(client)
        self._waiting.pop(client, None)
        if len(self._bound) >= HOSTS_MAX:
            del self._bound[next(iter(self._bound))]
        self._bound[who.host] = who.owner, mine

    # -- invariant 15 --

    def ended(self, client: Client, replies: Iterable[Received]) -> None:
        """A layout state of the client has ended, of which it may not have received these."""
        known = [reply for reply in self._replies.pop(client, []) if not reply.proven()]
        known += replies
        if known:
            self._replies[client] = known

    def _recall_all(self, client: Client) -> None:
        """Ask the client to say that it has no SCSI layouts, unless it is being asked."""
        if client in self._asked or not self._service.callbacks.path_up(client):
            return
        body = Writer()
        body.u32(n.OP_CB_LAYOUTRECALL)
        body.u32(n.LAYOUT4_SCSI)
        body.u32(n.LAYOUTIOMODE4_ANY)
        body.boolean(False)  # clora_changed
        body.u32(n.LAYOUT4_RET_REC_ALL)
        self.ended(client, ())
        referred = self._replies.get(client, [])

        def answered(reply: CallbackReply | None) -> None:
            self._asked.discard(client)
            if reply is not None and reply.status == n.NFS4ERR_NOMATCHING_LAYOUT:
                for one in referred:
                    one.settled()
                self.has_nothing(client)

        self._asked.add(client)
        self._service.count("layout_recalls_after_fence")
        self._service.callbacks.call(
            client, bytes(body.buffer), 1, answered, [one.referring() for one in referred]
        )

    def has_nothing(self, client: Client) -> None:
        """The client says that it has no SCSI layouts; nor is one on its way to it, is it?"""
        self.ended(client, ())
        if client in self._replies:
            return
        client.must_drop = False
        client.dropped = self._bound.get(ScsiFence.of(client).host, ("", 0))[1]
        for key in self._old_keys.pop(client, ()):
            self._service.devices.deleted(client, key)

    def _refuse(self, client: Client) -> None:
        """`NfsError`: another client of the host has registered there."""
        self._service.count("layoutget_other_client_of_host")
        if client not in self._refused:
            self._refused.add(client)
            log.info(
                "client %s gets no SCSI layouts: another client at %s has registered its key",
                client.name,
                client.peer,
            )
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)

    def speak_again(self, client: Client) -> Steps[None]:
        """A lost client is here: it goes on with what it has left. What it did not return stays in
        quarantine (invariant 11). `NfsError`: it cannot."""
        if client.standing is Standing.GONE:
            raise NfsError(n.NFS4ERR_EXPIRED)
        if not self._service.callbacks.path_up(client):
            raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
        layouts, holder, key = self._service.fs.layouts, client.holder_id, client.holder_key
        if self.is_over(holder):
            self._wait(client)
        try:
            yield Blocking(lambda: layouts.resume(holder, key))
        except OSError as error:
            if error.errno == errno.EKEYREVOKED:
                self._wait(client)
            if error.errno == errno.ENOENT:
                self.gone(holder)
                raise NfsError(n.NFS4ERR_DELAY) from None
            if error.errno != errno.EBUSY:  # live already
                raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE) from None
        self._service.count("holders_resumed")

    def _wait(self, client: Client) -> None:
        """`NfsError`: a fence is under way."""
        now = self._service.clock()
        since = self._waiting.setdefault(client, now)
        self._service.count("layoutget_waits_for_fence")
        if now < since + FENCE_SECONDS:
            raise NfsError(n.NFS4ERR_LAYOUTTRYLATER, TRY_LATER)
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)

    # -- a holder of before a restart, of a client that is not kept (RFC 8881 12.7.4) --

    def give_up(self, client: Client) -> GivenUp:
        """The client wants nothing more of it, and has another one from now on.

        Its word says nothing of what it queued at the unit before the restart: the holder is to be
        fenced, and until that is decided, too, nothing that the client says makes it live again. So
        the client forgets it, in one transaction with its RECLAIM_COMPLETE, before it is lost.
        """
        old = GivenUp(client.holder_id, client.holder_key, client.fence_key)
        client.forget_holder()
        return old

    def take_back(self, client: Client, old: GivenUp) -> None:
        """That could not be written down."""
        if not client.holder_id:
            client.holder_id, client.holder_key = old.id, old.key
            client.fence_key, client.holder_old = old.fence_key, True

    def given_up(self, client: Client, old: GivenUp) -> None:
        """It is durable: as if it were fenced, for the client."""
        self._by_holder.pop(old.id, None)
        self._ends(client, old.fence_key)

    # -- the end --

    def _ends(self, client: Client, key: int) -> None:
        """Nothing that the client has of its last holder, with this key, is good any more."""
        self._waiting.pop(client, None)
        self._table.holder_gone(client)
        if key:
            client.must_drop = True
            self._old_keys.setdefault(client, []).append(key)
            self._recall_all(client)

    def is_over(self, holder: int) -> bool:
        """Whether somebody has said for good that it is lost: its registration is, say. It is going
        to be fenced, also while that is not decided yet; live again it would never register."""
        record = self._service.fs.layouts.holder(holder)
        return (
            record is not None
            and record.state is HolderState.LOST
            and record.cause is LostCause.ENDED
        )

    def in_quarantine(self, holder: HolderRecord) -> bool:
        """Whether something that it can reach may be: under its name, or under nobody's, where the
        blocks go that more than one could reach."""
        fs = self._service.fs
        kept = fs.statfs().quarantined
        if holder.quarantined or not kept:
            return bool(holder.quarantined)
        return kept > sum(other.quarantined for other in fs.layouts.holders())

    def is_gone(self, holder: int) -> bool:
        """Whether the core has no such holder any more; asked of the core."""
        record = self._service.fs.layouts.holder(holder)
        return record is None or record.state is HolderState.GONE

    def gone(self, holder: int, *, fenced: bool = True) -> None:
        """The core says so; `fenced`: not because it had nothing in its hands.

        Of a client that has another holder by now this changes nothing.
        """
        if not fenced:
            hosts = [host for host, (_, one) in self._bound.items() if one == holder]
            for host in hosts:
                del self._bound[host]
        client = self.client_of(holder)
        self._by_holder.pop(holder, None)
        if client is None:
            return
        service, key = self._service, client.fence_key
        client.forget_holder()
        self._ends(client, key)
        service.states.delegations.holder_gone(holder)
        service.records.stage_client(client)
        service.count("holders_gone")
        log.info("client %s was fenced: what it held is gone", client.name)

    def look(self) -> None:
        """Events of the core were lost: which holders are gone?"""
        for client in self._service.clients.all_living():
            if client.holder_id and self.is_gone(client.holder_id):
                self.gone(client.holder_id)

    def client_lost(self, client: Client) -> None:
        """The client is GONE."""
        self._waiting.pop(client, None)
        self._refused.discard(client)
        self._asked.discard(client)
        self._replies.pop(client, None)
        self._old_keys.pop(client, None)


def _may_write(record: HolderRecord) -> bool:
    """Whether a holder may have something on its way to the device."""
    return bool(record.grants or record.quarantined or record.state is HolderState.LOST)
