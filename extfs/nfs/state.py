"""All stateids of the server, and the files that have state (RFC 8881 8 to 10, 8.2.4).

`States.find` is the one place where a stateid of a client is believed. Who changes state goes
through `add`, `drop` and `revoke`, which keep these invariants:

    1. Every state is in `_states` by its `other`, and in `_of_client` of its client.
    2. A good state is in the tables of its FileState too; a revoked one (`mark`) is in none.
    3. A FileState is in `_files`, and its inode open in the core, while it has any state.
    4. The locks of a LockState are in the core's table while it is good.

All of it belongs to the protocol thread. A FileState, or an answer of `find`, may be out of date
after a `yield`: look again.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from extfs.core import CoreError
from extfs.nfs import constants as n
from extfs.nfs.clients import Standing
from extfs.nfs.core_tables import CoreDelegations, CoreLocks
from extfs.nfs.delegations import Conflict, Delegations, DelegationState
from extfs.nfs.errors import NfsError
from extfs.nfs.lock_waiters import LockWaiters, WantedLocks
from extfs.nfs.locks import LockOwners, LockState
from extfs.nfs.opens import FileState, OpenState
from extfs.nfs.stateids import (
    ANONYMOUS,
    BYPASS,
    CURRENT,
    INVALID,
    Kind,
    RecordHead,
    State,
    Stateid,
    is_special,
    read_stateid,
    write_stateid,
)
from extfs.nfs.xdr import Reader

if TYPE_CHECKING:
    from extfs.core import LayoutEvent
    from extfs.nfs.clients import Client
    from extfs.nfs.compound import Compound
    from extfs.nfs.filehandles import Filehandle
    from extfs.nfs.service import Service

__all__ = [
    "ANONYMOUS",
    "BYPASS",
    "CURRENT",
    "DELEGATION",
    "INVALID",
    "LAYOUT",
    "LOCK",
    "NAMESPACE",
    "OPEN",
    "OPEN_READ",
    "OPEN_WRITE",
    "READ",
    "SETATTR",
    "WRITE",
    "FileState",
    "Kind",
    "State",
    "Stateid",
    "States",
    "read_stateid",
    "write_stateid",
]

log = logging.getLogger("extfs.nfs")

OPEN = Kind.OPEN
LOCK = Kind.LOCK
DELEGATION = Kind.DELEGATION
LAYOUT = Kind.LAYOUT

OPEN_READ = Conflict.OPEN_READ
OPEN_WRITE = Conflict.OPEN_WRITE
READ = Conflict.READ
WRITE = Conflict.WRITE
SETATTR = Conflict.SETATTR
NAMESPACE = Conflict.NAMESPACE

_OTHER = struct.Struct(">IQ")
_SHARE = {READ: n.OPEN4_SHARE_ACCESS_READ, WRITE: n.OPEN4_SHARE_ACCESS_WRITE}
_FLAGS = {
    n.NFS4ERR_DELEG_REVOKED: n.SEQ4_STATUS_RECALLABLE_STATE_REVOKED,
    n.NFS4ERR_ADMIN_REVOKED: n.SEQ4_STATUS_ADMIN_STATE_REVOKED,
    n.NFS4ERR_EXPIRED: n.SEQ4_STATUS_EXPIRED_SOME_STATE_REVOKED,
}


class States:
    """Stateids and files."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.owners = LockOwners()
        self.locks = CoreLocks(service)
        self.waiters = LockWaiters(self)
        self.wanted_locks = WantedLocks(self)
        self.delegations = Delegations(self, CoreDelegations(service))
        self._states: dict[bytes, State] = {}
        self._files: dict[int, FileState] = {}
        self._of_client: dict[Client, dict[bytes, State]] = {}
        self._marked: dict[Client, dict[bytes, State]] = {}
        """The revoked ones of `_of_client`: every SEQUENCE asks for them."""
        self._number = 0
        self.verifier = struct.pack(">II", service.epoch, ~service.epoch & 0xFFFFFFFF)
        """Of unstable WRITEs (RFC 8881 18.32.3): another one after each start."""
        restorers = service.records.restorers
        restorers[OPEN] = self._restore_open
        restorers[LOCK] = self._restore_lock
        restorers[DELEGATION] = self._restore_delegation

    # -- the tables --

    def new_other(self) -> bytes:
        """`other` of a new state (RFC 8881 8.2.2)."""
        self._number += 1
        return _OTHER.pack(self.service.epoch, self._number)

    def file(self, ino: int, generation: int) -> FileState:
        """What is known of a file; an empty one when there is nothing, which `add` puts in."""
        found = self._files.get(ino)
        return found if found is not None else FileState(ino, generation)

    def known_file(self, ino: int) -> FileState | None:
        """The same; None when there is nothing."""
        return self._files.get(ino)

    def add(self, state: State) -> None:
        """A new state. Opens the inode for the first one of a file (ENOENT: it is gone).

        EXPIRED: the client went while its request was executing. DELAY: there are too many.
        """
        if state.client.standing is Standing.GONE:
            raise NfsError(n.NFS4ERR_EXPIRED)
        if state.kind is not LAYOUT and not self.has_room(state.client):
            raise NfsError(n.NFS4ERR_DELAY)
        file = state.file
        if file is not None:
            if not file.attached:
                known = self._files.get(file.ino)
                if known is not None:
                    file = state.file = known
                else:
                    self._attach(file)
            self._enter(file, state)
        self._register(state)
        self.changed(state)

    def _register(self, state: State) -> None:
        self._states[state.other] = state
        self._of_client.setdefault(state.client, {})[state.other] = state
        if state.mark:
            self._marked.setdefault(state.client, {})[state.other] = state

    def has_room(self, client: Client) -> bool:
        """Whether there may be one more; clients that are there by courtesy make room first.

        A layout takes no room of its own: there is one at most for each file that is open.
        """
        options = self.service.options
        mine = len(self._of_client.get(client, ()))
        if mine < options.states_of_client and len(self._states) >= options.states:
            for other in list(self._of_client):
                self.expire_courtesy(other)
        if mine < options.states_of_client and len(self._states) < options.states:
            return True
        self.service.count("states_refused")
        return False

    def _attach(self, file: FileState) -> None:
        self.service.fs.open_inode(file.ino)
        file.attached = True
        self._files[file.ino] = file

    @staticmethod
    def _enter(file: FileState, state: State) -> None:
        if isinstance(state, OpenState):
            file.opens[state.client, state.owner] = state
        elif isinstance(state, LockState):
            file.locks[state.client, state.owner] = state
            state.opened.locks.add(state)
        elif isinstance(state, DelegationState):
            file.delegations[state.client] = state
        else:
            file.layouts.add(state)

    def drop(self, state: State) -> None:
        """The state ends, revoked or not; an open takes its locks with it."""
        if self._states.pop(state.other, None) is None:
            return
        if not state.mark:
            self._leave(state)
        of_client = self._of_client[state.client]
        del of_client[state.other]
        if not of_client:
            del self._of_client[state.client]
        marked = self._marked.get(state.client)
        if marked is not None and marked.pop(state.other, None) is not None and not marked:
            del self._marked[state.client]
        self.service.records.state_dropped(state)

    def revoke(self, state: State, mark: int) -> None:
        """Taken away: its stateid answers `mark` until the client frees it (RFC 8881 8.3)."""
        if state.mark or state.other not in self._states:
            return
        self._leave(state)
        state.mark = mark
        self._marked.setdefault(state.client, {})[state.other] = state
        self.service.count("states_revoked")
        self.changed(state)

    def _leave(self, state: State) -> None:
        """Out of the tables of its file, with everything that it held."""
        file = state.file
        if file is None:
            return
        if isinstance(state, OpenState):
            for lock in list(state.locks):
                self.drop(lock)
            file.share(state, 0, 0, 0)
            file.opens.pop((state.client, state.owner), None)
        elif isinstance(state, LockState):
            self.locks.release_owner(file, state.number)
            self.owners.put(state.client, state.owner)
            state.opened.locks.discard(state)
            file.locks.pop((state.client, state.owner), None)
        elif isinstance(state, DelegationState):
            self.delegations.ended(state)
            file.delegations.pop(state.client, None)
        else:
            file.layouts.discard(state)
        self._detach_unused(file)

    def _detach_unused(self, file: FileState) -> None:
        if not file.attached or not file.unused():
            return
        file.attached = False
        del self._files[file.ino]
        self.waiters.file_unused(file.ino)
        try:
            self.service.fs.release(file.ino)
        except OSError as error:
            log.warning("inode %d: release: %s", file.ino, error)

    def changed(self, state: State) -> None:
        """`to_record` of it would not say what it said."""
        self.service.records.state_changed(state)

    # -- after a restart, for clients that are kept over one (`extfs.nfs.records`) --

    def _restore_open(self, client: Client, body: bytes) -> State | None:
        head, file, record = self._read_head(body)
        if file is None:
            return None
        state, shares = OpenState.from_record(record, client, file, head)
        if self._restored(state, head):
            state.file.share(state, *shares)
        return state

    def _restore_lock(self, client: Client, body: bytes) -> State | None:
        head, file, record = self._read_head(body)
        opened = self._states.get(record.fixed(n.NFS4_OTHER_SIZE))
        if file is None or not isinstance(opened, OpenState):
            return None
        state, ranges = LockState.from_record(record, client, head, opened)
        if self._restored(state, head):
            self._restore_ranges(state, ranges)
        return state

    def _restore_ranges(self, state: LockState, ranges: list[tuple[int, int, bool]]) -> None:
        state.number = self.owners.take(state.client, state.owner)
        for start, last, write in ranges:
            if self.locks.set(state.file, state.number, start, last, write) is not None:
                self.revoke(state, n.NFS4ERR_ADMIN_REVOKED)  # a local process was faster
                return
            state.ranges.set(start, last, write)

    def _restore_delegation(self, client: Client, body: bytes) -> State | None:
        head, file, record = self._read_head(body)
        if file is None:
            return None
        state, recalled = DelegationState.from_record(record, client, file, head)
        if self._restored(state, head):
            self.delegations.restore(state, recalled=recalled)
        return state

    def _read_head(self, body: bytes) -> tuple[RecordHead, FileState | None, Reader]:
        """None instead of a file that is gone: one without a name is freed by a restart."""
        record = Reader(body)
        head = RecordHead.read(record)
        try:
            self.service.fs.handle_check(head.ino, head.generation)
        except CoreError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            return head, None, record
        return head, self.file(head.ino, head.generation), record

    def _restored(self, state: State, head: RecordHead) -> bool:
        """It is in the tables again; False: as one that was revoked."""
        state.seqid, state.mark = head.seqid, head.mark
        if state.mark:
            self._register(state)
            return False
        self.add(state)
        return True

    # -- belief --

    def actual(self, c: Compound, stateid: Stateid) -> Stateid:
        """The current stateid, where it is meant (RFC 8881 16.2.3.1.2)."""
        if stateid != CURRENT:
            return stateid
        if c.stateid is None:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        return c.stateid

    def find(self, c: Compound, stateid: Stateid, *kinds: Kind, file: int | None = None) -> State:
        """The state that the client of `c` names, of one of `kinds`, of inode `file` (None: any).

        BAD_STATEID, OLD_STATEID, STALE_STATEID, EXPIRED, ADMIN_REVOKED, DELEG_REVOKED: RFC 8881
        8.2.4. Special stateids other than the current one are bad here.
        """
        stateid = self.actual(c, stateid)
        state = self._lookup(c, stateid)
        # Who has changed it in his own request before a restart names the seqid before that.
        state.check(c.client, 0 if c.did(state) else stateid.seqid, file)
        if state.kind not in kinds:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        return state

    def is_past(self, stateid: Stateid) -> bool:
        """Whether it may have been of a state that ended before the last restart."""
        if stateid.other in self._states or is_special(stateid):
            return False
        return bool(_OTHER.unpack(stateid.other)[0] != self.service.epoch)

    def _lookup(self, c: Compound, stateid: Stateid) -> State:
        """A client that is kept has not to hear of restarts: what it lost by one is bad, not stale,
        or it would recover a lease that is in order."""
        state = self._states.get(stateid.other)
        if state is not None:
            return state
        if not self.is_past(stateid) or (c.client is not None and c.client.kept):
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        raise NfsError(n.NFS4ERR_STALE_STATEID)

    def io(
        self, c: Compound, stateid: Stateid, access: Conflict, fh: Filehandle | None = None
    ) -> State | None:
        """May the client READ or WRITE (also SETATTR of the size, ALLOCATE, ...) with this stateid?

        The file is `fh`, or the current one. None: a special stateid, whose user's permission the
        caller has to check. OPENMODE: the open, or delegation, is not for this access; a file that
        is open for writing may be read (RFC 8881 18.22.3). LOCKED: somebody denies it. DELAY:
        delegations of others are being recalled.
        """
        if fh is None:
            fh = c.current
        assert fh is not None
        stateid = self.actual(c, stateid)
        if stateid in (ANONYMOUS, BYPASS):
            bypass = stateid == BYPASS and access == READ
            self._check_special(c, fh.ino, access, bypass)
            return None
        state = self.find(c, stateid, OPEN, LOCK, DELEGATION, file=fh.ino)
        opened = state.opened if isinstance(state, LockState) else state
        if isinstance(opened, OpenState):
            if access == WRITE and not opened.access & n.OPEN4_SHARE_ACCESS_WRITE:
                raise NfsError(n.NFS4ERR_OPENMODE)
        elif isinstance(opened, DelegationState) and access == WRITE and not opened.write:
            raise NfsError(n.NFS4ERR_OPENMODE)
        return state

    def _check_special(self, c: Compound, ino: int, access: Conflict, bypass: bool) -> None:
        file = self._files.get(ino)
        if file is not None and not bypass:
            for holder in file.share_conflicts(None, _SHARE[access], 0):
                if not self.expire_courtesy(holder.client):
                    raise NfsError(n.NFS4ERR_LOCKED)
        self.about_to_change(c, ino, access)

    def about_to_change(self, c: Compound, ino: int, what: Conflict) -> None:
        """Before an operation of kind `what`: DELAY while delegations of others are recalled.

        GRACE: somebody may yet reclaim a delegation or an open that would be in conflict (RFC 8881
        8.4.2.1). OPEN has asked for itself.
        """
        if what not in (OPEN_READ, OPEN_WRITE) and self.service.lease.in_grace():
            raise NfsError(n.NFS4ERR_GRACE)
        file = self._files.get(ino)
        if file is not None and file.delegations:
            self.delegations.make_way(c.client, file, what)

    # -- clients --

    def expire_courtesy(self, client: Client) -> bool:
        """A client whose lease is over is in the way: it goes. False: its lease is not over."""
        return self.service.lease.conflict(client)

    def client_lost(self, client: Client) -> None:
        """The client is gone, with all of its state."""
        self.waiters.client_lost(client)
        for state in list(self._of_client.get(client, {}).values()):
            self.drop(state)

    def of_client(self, client: Client, *kinds: Kind) -> Iterator[State]:
        """The client's states of these kinds (none: all), revoked ones too."""
        for state in list(self._of_client.get(client, {}).values()):
            if not kinds or state.kind in kinds:
                yield state

    def has_state(self, client: Client) -> bool:
        """Whether anything is held (DESTROY_CLIENTID, RFC 8881 18.50.3)."""
        return any(not state.mark for state in self._of_client.get(client, {}).values())

    def sequence_flags(self, client: Client) -> int:
        """sr_status_flags about revoked states (RFC 8881 18.46.3)."""
        marked = self._marked.get(client)
        if marked is None:
            return 0
        flags = 0
        for state in marked.values():
            flags |= _FLAGS.get(state.mark, 0)
        return flags

    def test(self, c: Compound, stateid: Stateid) -> int:
        """What TEST_STATEID says of it (RFC 8881 18.48.3)."""
        try:
            if is_special(stateid):
                raise NfsError(n.NFS4ERR_BAD_STATEID)
            self._lookup(c, stateid).check(c.client, stateid.seqid, None)
        except NfsError as error:
            return error.status
        return n.NFS4_OK

    def free(self, c: Compound, stateid: Stateid) -> State:
        """FREE_STATEID (RFC 8881 18.38.3): forgets a revoked state, or a lock state without locks.

        Returns what is gone. LOCKS_HELD for anything that is in use.
        """
        stateid = self.actual(c, stateid)
        state = self._lookup(c, stateid)
        if state.client is not c.client:
            raise NfsError(n.NFS4ERR_BAD_STATEID)
        if not state.mark:
            state.check(c.client, stateid.seqid, None)
            if not isinstance(state, LockState) or state.ranges:
                raise NfsError(n.NFS4ERR_LOCKS_HELD)
        self.drop(state)
        return state

    # -- events, status --

    def core_event(self, event: LayoutEvent) -> None:
        """DELEGATION_RECALL, _REVOKED, _ATTRS, LOCK_FREE, LOCK_WANTED, OVERFLOW."""
        kind = event.type.name
        if kind == "LOCK_FREE":
            self.waiters.free(event.ino, event.holder)
        elif kind == "LOCK_WANTED":
            self.wanted_locks.add(event.holder)
        elif kind == "OVERFLOW":
            self.delegations.events_lost()
            self.waiters.events_lost()
            self.wanted_locks.events_lost()
        elif kind.startswith("DELEGATION_"):
            self.delegations.core_event(event)

    def status(self) -> dict[str, Any]:
        """Counts, for the status document."""
        kinds = dict.fromkeys(Kind, 0)
        revoked = 0
        for state in self._states.values():
            revoked += bool(state.mark)
            kinds[state.kind] += not state.mark
        return {
            "files": len(self._files),
            "opens": kinds[OPEN],
            "locks": kinds[LOCK],
            "delegations": kinds[DELEGATION],
            "layouts": kinds[LAYOUT],
            "revoked": revoked,
            "recalls": self.delegations.recalls_in_progress(),
        }
