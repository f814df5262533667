"""Delegations of files (RFC 8881 10.2 to 10.4): to whom, how they come back, what holders know.

States of a delegation and who takes which edge:

    granted  -> recalled   `Delegations.recall`: somebody's operation is in conflict
    granted, recalled -> returned   DELEGRETURN, or the client is gone: `States.drop`
    recalled -> revoked    `_overdue`: no return for a lease time; `core_event`: the core says so

An operation that is in conflict never waits: it gets NFS4ERR_DELAY and comes again. The exception
is GETATTR of a file that another client may be changing, which waits a moment for CB_GETATTR.

Policy. READ: when nobody has the file open for writing. WRITE: to a client that is alone and asks
for it. Neither without a way to call back, nor soon after somebody was in conflict on this file.
The core knows of each, because local users of the mount are in conflict too.
"""

from __future__ import annotations

import enum
import logging
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extfs.nfs import changes
from extfs.nfs import constants as n
from extfs.nfs.callbacks import CallbackReply, Referring
from extfs.nfs.effects import Blocking, Steps, Waiting
from extfs.nfs.errors import NfsError
from extfs.nfs.stateids import Kind, RecordHead, State, write_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.core import LayoutEvent
    from extfs.nfs.clients import Client
    from extfs.nfs.compound import Compound
    from extfs.nfs.core_tables import CoreDelegations
    from extfs.nfs.opens import FileState
    from extfs.nfs.state import States
    from extfs.nfs.timers import Timer

__all__ = [
    "Conflict",
    "DelegationState",
    "Delegations",
    "RefusedError",
    "RemoteAttributes",
    "referring_of",
]

log = logging.getLogger("extfs.nfs")

CONTENDED_SECONDS = 20.0
"""After a conflict on a file nobody gets a delegation of it for this time."""
RESEND_SECONDS = 2.0
ANSWER_SECONDS = 1.0
"""How long a GETATTR waits for CB_GETATTR."""
REFUSALS = 3
"""So often a client says that it has no such delegation, until that is believed."""
DELEGATIONS_MAX = 65536

_ATTRIBUTES = 1 << n.FATTR4_CHANGE | 1 << n.FATTR4_SIZE
_TIMES = 1 << n.FATTR4_TIME_DELEG_ACCESS | 1 << n.FATTR4_TIME_DELEG_MODIFY
_ANSWER_MAX = 64
_STORED = struct.Struct(">IQQI")


class Conflict(enum.IntEnum):
    """What somebody is about to do with a file; numbers as in the core's delegation.h."""

    OPEN_READ = 1
    OPEN_WRITE = 2
    READ = 3
    WRITE = 4
    SETATTR = 5
    NAMESPACE = 6


_ONLY_READ = (Conflict.OPEN_READ, Conflict.READ)


class _Question:
    """Somebody waits for CB_GETATTR; `answer` is (change, size)."""

    __slots__ = ("answer", "waiting")

    def __init__(self) -> None:
        self.waiting = Waiting(ANSWER_SECONDS)
        self.answer: tuple[int, int] | None = None


class RefusedError(Exception):
    """No delegation; `why` is a why_no_delegation4 (RFC 8881 18.16.2)."""

    def __init__(self, why: int) -> None:
        super().__init__(why)
        self.why = why


class DelegationState(State):
    """A delegation. `fh` is the filehandle that the client knows, `change` as it was granted.

    `recalled`: when, on the service's clock. `holder`: the client's number in the core; 0: the core
    does not know of this delegation (any more).
    """

    kind = Kind.DELEGATION
    __slots__ = (
        "asking",
        "change",
        "fh",
        "holder",
        "recalled",
        "referring",
        "refusals",
        "size",
        "timer",
        "write",
    )
    file: FileState

    def __init__(
        self, client: Any, file: FileState, other: bytes, fh: bytes, *, write: bool
    ) -> None:
        super().__init__(client, file, other)
        self.fh = fh
        self.write = write
        self.holder = 0
        self.change = 0
        self.size = 0
        self.recalled: float | None = None
        self.referring: Sequence[Referring] = ()
        self.refusals = 0
        self.timer: Timer | None = None
        self.asking: list[_Question] = []

    def to_record(self) -> bytes:
        """See `State`."""
        out = self.begin_record(self.mark)
        out.opaque(self.fh)
        out.pack(_STORED, self.write, self.change, self.size, self.recalled is not None)
        return bytes(out.buffer)

    @classmethod
    def from_record(
        cls, record: Reader, client: Any, file: FileState, head: RecordHead
    ) -> tuple[DelegationState, bool]:
        """The delegation, and whether it was recalled."""
        fh = record.opaque(n.NFS4_FHSIZE)
        write, change, size, recalled = record.unpack(_STORED)
        state = cls(client, file, head.other, fh, write=bool(write))
        state.change, state.size = change, size
        return state, bool(recalled)


@dataclass(frozen=True, slots=True)
class RemoteAttributes:
    """Of a file that its delegation's holder has changed: bytes, and the change attribute now."""

    size: int
    change: int


class Delegations:
    """All delegations of a server."""

    def __init__(self, states: States, core: CoreDelegations) -> None:
        self._states = states
        self._service = states.service
        self._core = core
        self._by_holder: dict[tuple[int, int], DelegationState] = {}
        self._recalled: set[DelegationState] = set()
        self._count = 0

    def recalls_in_progress(self) -> int:
        """Delegations that are recalled and not back."""
        return len(self._recalled)

    # -- conflicts, recalls --

    def make_way(self, client: Client | None, file: FileState, what: Conflict) -> None:
        """DELAY while delegations of clients other than `client` are in the way of `what`."""
        waiting = False
        for delegation in list(file.delegations.values()):
            if delegation.client is client:
                continue
            if what in _ONLY_READ and not delegation.write:
                continue
            if self._states.expire_courtesy(delegation.client):
                continue
            self.recall(delegation)
            waiting = True
        if waiting:
            raise NfsError(n.NFS4ERR_DELAY)

    def recall(self, delegation: DelegationState) -> None:
        """Ask for it; once."""
        now = self._service.clock()
        delegation.file.contended = now
        if delegation.recalled is not None or delegation.mark:
            return
        delegation.recalled = now
        self._recalled.add(delegation)
        self._states.changed(delegation)
        self._service.count("delegation_recalls")
        delegation.timer = self._service.timers.after(
            self._service.lease.seconds, lambda: self._overdue(delegation)
        )
        self._send_recall(delegation)

    def _send_recall(self, delegation: DelegationState) -> None:
        """CB_RECALL (RFC 8881 20.2)."""
        if delegation not in self._recalled:
            return
        body = Writer()
        body.u32(n.OP_CB_RECALL)
        write_stateid(body, delegation.stateid())
        body.boolean(False)
        body.opaque(delegation.fh)
        self._service.callbacks.call(
            delegation.client,
            bytes(body.buffer),
            1,
            lambda reply: self._recall_answered(delegation, reply),
            delegation.referring,
        )

    def _recall_answered(self, delegation: DelegationState, reply: CallbackReply | None) -> None:
        if delegation not in self._recalled:
            return
        status = n.NFS4ERR_DELAY if reply is None else reply.status
        if status == n.NFS4_OK:
            return  # it will come with DELEGRETURN, or be overdue
        if status in (n.NFS4ERR_BAD_STATEID, n.NFS4ERR_BADHANDLE):
            # The reply that gave it may still be on its way to the client.
            delegation.refusals += 1
            if delegation.refusals >= REFUSALS:
                self._states.drop(delegation)
                return
        self._service.timers.after(RESEND_SECONDS, lambda: self._send_recall(delegation))

    def _overdue(self, delegation: DelegationState) -> None:
        if delegation in self._recalled:
            self._service.count("delegations_revoked")
            self._states.revoke(delegation, n.NFS4ERR_DELEG_REVOKED)

    def ended(self, delegation: DelegationState) -> None:
        """It is returned, revoked or lost: `States` takes it out of its tables."""
        self._count -= 1
        self._recalled.discard(delegation)
        if delegation.timer is not None:
            delegation.timer.cancel()
        if delegation.holder:
            self._by_holder.pop((delegation.holder, delegation.file.ino), None)
            self._core.give_back(delegation.file.ino, delegation.holder)
            delegation.holder = 0
        asking, delegation.asking = delegation.asking, []
        for question in asking:
            question.waiting.wake()

    def core_event(self, event: LayoutEvent) -> None:
        """A local user is in conflict, or did not want to wait any longer."""
        delegation = self._by_holder.get((event.holder, event.ino))
        if delegation is None:
            return
        kind = event.type.name
        if kind == "DELEGATION_RECALL":
            self._wanted_locally(delegation)
        elif kind == "DELEGATION_REVOKED":
            self._taken(delegation)
        elif kind == "DELEGATION_ATTRS":
            self._service.driver.run(
                self._tell_core(delegation), lambda result, error: self._told(error)
            )

    def holder_gone(self, holder: int) -> None:
        """The core has dropped all delegations of a holder with it."""
        mine = [one for (of, _), one in self._by_holder.items() if of == holder]
        for delegation in mine:
            self._taken(delegation)

    def events_lost(self) -> None:
        """What the core recalls, or has revoked, is to be seen from its table."""
        by_holder: dict[int, list[DelegationState]] = {}
        for (holder, _), delegation in self._by_holder.items():
            by_holder.setdefault(holder, []).append(delegation)
        for holder, delegations in by_holder.items():
            recalled = self._core.recalled(holder)
            for delegation in delegations:
                if delegation.file.ino not in recalled:
                    self._taken(delegation)
                elif recalled[delegation.file.ino]:
                    self._wanted_locally(delegation)

    def _wanted_locally(self, delegation: DelegationState) -> None:
        if not self._states.expire_courtesy(delegation.client):
            self.recall(delegation)

    def _taken(self, delegation: DelegationState) -> None:
        """The core has revoked it."""
        self._by_holder.pop((delegation.holder, delegation.file.ino), None)
        delegation.holder = 0
        self._service.count("delegations_revoked")
        self._states.revoke(delegation, n.NFS4ERR_DELEG_REVOKED)

    def _tell_core(self, delegation: DelegationState) -> Steps[None]:
        """A local user looks at the attributes: the holder's are set in the core."""
        yield from self._ask(delegation)

    @staticmethod
    def _told(error: Exception | None) -> None:
        if error is not None and not isinstance(error, NfsError):
            log.warning("attributes of a delegated file: %s", error)

    def recall_any(self, client: Client, keep: int) -> None:
        """CB_RECALL_ANY (RFC 8881 20.6): the client is to return all but `keep` delegations."""
        body = Writer()
        body.u32(n.OP_CB_RECALL_ANY)
        body.u32(keep)
        body.bitmap(1 << n.RCA4_TYPE_MASK_RDATA_DLG | 1 << n.RCA4_TYPE_MASK_WDATA_DLG)
        self._service.count("recall_any")
        self._service.callbacks.call(client, bytes(body.buffer), 1, lambda reply: None)

    # -- grants --

    def grant(
        self, c: Compound, file: FileState, access: int, want: int, *, reclaim: bool = False
    ) -> Steps[DelegationState]:
        """A delegation for who has just opened the current file with `access`; `RefusedError`.

        `want`: one of OPEN4_SHARE_ACCESS_WANT_*. A reclaim gets one even when it can only be
        recalled at once.
        """
        assert c.client is not None
        mine = file.delegations.get(c.client)
        if mine is not None and c.did(mine):
            return mine
        self._choose(c.client, file, access, want, reclaim=reclaim)
        try:
            holder = yield from self._core.holder(c.client)
        except (NfsError, OSError):  # another request of the client registers it just now
            raise RefusedError(n.WND4_RESOURCE) from None
        file = self._states.file(file.ino, file.generation)
        write = self._choose(c.client, file, access, want, reclaim=reclaim)
        return self._grant(c, file, holder, write=write)

    def _choose(
        self, client: Client, file: FileState, access: int, want: int, *, reclaim: bool
    ) -> bool:
        """Whether it is to be a WRITE delegation."""
        if want == n.OPEN4_SHARE_ACCESS_WANT_NO_DELEG:
            raise RefusedError(n.WND4_NOT_WANTED)
        if want == n.OPEN4_SHARE_ACCESS_WANT_CANCEL:
            raise RefusedError(n.WND4_CANCELLED)
        self._check_resources(client, file, reclaim=reclaim)
        mine = file.delegations.get(client)
        if mine is not None:
            raise RefusedError(self._why_not_again(mine, want))
        if any(other.write for other in file.delegations.values()):
            raise RefusedError(n.WND4_CONTENTION)
        if not access & n.OPEN4_SHARE_ACCESS_WRITE:
            if want == n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG and reclaim:
                return self._alone(client, file)
            if file.has_writers():
                raise RefusedError(n.WND4_CONTENTION)
            return False
        if want not in (n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG, n.OPEN4_SHARE_ACCESS_WANT_ANY_DELEG):
            raise RefusedError(n.WND4_NOT_WANTED if not want else n.WND4_CONTENTION)
        return self._alone(client, file)

    def _check_resources(self, client: Client, file: FileState, *, reclaim: bool) -> None:
        if self._count >= DELEGATIONS_MAX:
            self.recall_any(client, 0)
            raise RefusedError(n.WND4_RESOURCE)
        if not self._states.has_room(client):
            raise RefusedError(n.WND4_RESOURCE)
        if reclaim:
            return
        if not self._service.callbacks.path_up(client):
            raise RefusedError(n.WND4_RESOURCE)
        recent = self._service.clock() - CONTENDED_SECONDS
        if file.contended is not None and file.contended > recent:
            raise RefusedError(n.WND4_CONTENTION)

    @staticmethod
    def _why_not_again(mine: DelegationState, want: int) -> int:
        if mine.recalled is not None:
            return n.WND4_CONTENTION
        if want == n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG and not mine.write:
            return n.WND4_NOT_SUPP_UPGRADE
        if want == n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG and mine.write:
            return n.WND4_NOT_SUPP_DOWNGRADE
        return n.WND4_RESOURCE

    @staticmethod
    def _alone(client: Client, file: FileState) -> bool:
        if file.delegations or file.opened_by_others(client):
            raise RefusedError(n.WND4_CONTENTION)
        return True

    def _grant(self, c: Compound, file: FileState, holder: int, *, write: bool) -> DelegationState:
        fh = c.current
        assert fh is not None
        stat = self._service.fs.getattr(file.ino)
        if not self._core.grant(file.ino, holder, write=write):
            raise RefusedError(n.WND4_CONTENTION)
        delegation = DelegationState(c.client, file, self._states.new_other(), fh.wire, write=write)
        delegation.holder = holder
        delegation.change, delegation.size = changes.value(stat), stat.size
        delegation.referring = referring_of(c)
        c.tag(delegation)
        try:
            self._states.add(delegation)
        except (NfsError, OSError):  # the client, or the file, is gone
            self._core.give_back(file.ino, holder)
            raise RefusedError(n.WND4_RESOURCE) from None
        self._count += 1
        if holder:
            self._by_holder[holder, file.ino] = delegation
        self._service.count("delegations")
        return delegation

    def restore(self, delegation: DelegationState, *, recalled: bool) -> None:
        """One of before a restart, which is in the tables again; the core has to learn of it."""
        holder = delegation.client.holder_id
        self._count += 1
        if not self._core.grant(delegation.file.ino, holder, write=delegation.write):
            self._states.revoke(delegation, n.NFS4ERR_DELEG_REVOKED)
            return
        delegation.holder = holder
        self._by_holder[holder, delegation.file.ino] = delegation
        if recalled:
            self.recall(delegation)

    # -- attributes that the holder knows better --

    def remote_attributes(self, c: Compound, ino: int) -> Steps[RemoteAttributes | None]:
        """For GETATTR of a file that another client has a WRITE delegation of (RFC 8881 10.4.3).

        None: the server's own attributes are right. DELAY: no answer in time, it is recalled.
        """
        file = self._states.known_file(ino)
        if file is None:
            return None
        for delegation in file.delegations.values():
            if delegation.write and delegation.client is not c.client:
                return (yield from self._ask(delegation))
        return None

    def _ask(self, delegation: DelegationState) -> Steps[RemoteAttributes | None]:
        """CB_GETATTR, one at a time of a delegation; who comes meanwhile waits for the same."""
        if self._states.expire_courtesy(delegation.client):
            return None
        ino = delegation.file.ino
        question = _Question()
        delegation.asking.append(question)
        if len(delegation.asking) == 1:
            self._send_getattr(delegation)
        answered = yield question.waiting
        if not answered:
            if question in delegation.asking:
                delegation.asking.remove(question)
            self.recall(delegation)
            raise NfsError(n.NFS4ERR_DELAY)
        if question.answer is None or question.answer[0] == delegation.change:
            return None
        # The file's own change attribute has to move: nobody may see a value of it twice with
        # different contents, also after the delegation is back.
        now = divmod(time.time_ns(), 1_000_000_000)
        yield Blocking(lambda: self._service.fs.setattr(ino, mtime=now))
        return RemoteAttributes(question.answer[1], self._service.fs.getattr(ino).change)

    def _send_getattr(self, delegation: DelegationState) -> None:
        """CB_GETATTR (RFC 8881 20.1)."""
        body = Writer()
        body.u32(n.OP_CB_GETATTR)
        body.opaque(delegation.fh)
        body.bitmap(_ATTRIBUTES)
        self._service.count("callback_getattrs")
        self._service.callbacks.call(
            delegation.client,
            bytes(body.buffer),
            1,
            lambda reply: self._getattr_answered(delegation, reply),
            delegation.referring,
        )

    def _getattr_answered(self, delegation: DelegationState, reply: CallbackReply | None) -> None:
        if reply is None or reply.status != n.NFS4_OK:
            return  # who waits will find that it has waited long enough
        try:
            answer = _read_attributes(reply.results)
        except XdrError as error:
            log.info("CB_GETATTR: %s", error)
            return
        asking, delegation.asking = delegation.asking, []
        for question in asking:
            question.answer = answer
            question.waiting.wake()


def _read_attributes(results: Reader) -> tuple[int, int]:
    """The result of CB_GETATTR: (change, size)."""
    if results.u32() != n.OP_CB_GETATTR or results.u32() != n.NFS4_OK:
        raise XdrError("not a result of CB_GETATTR")
    mask = results.bitmap()
    values = Reader(results.opaque(_ANSWER_MAX))
    if mask & _ATTRIBUTES != _ATTRIBUTES or mask & ~(_ATTRIBUTES | _TIMES):
        raise XdrError("not the attributes that were asked for")
    # Times, which a client may add (RFC 9754), come behind these.
    return values.u64(), values.u64()


def referring_of(c: Compound) -> Sequence[Referring]:
    """The call that is being answered, for callbacks about its result (RFC 8881 2.10.6.3)."""
    if c.session is None or c.slot is None:
        return ()
    return (Referring(c.session.id, c.slot.sequence, c.session.slots.index(c.slot)),)
