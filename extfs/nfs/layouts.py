"""Layouts: who has which parts of a file's map, and the rules of their races (RFC 8881 12.5).

Words. A *segment* is a byte range of a file with an iomode that one LAYOUTGET granted; the core has
a grant for it (native/layout.h). The *layout state* of a client and a file has all its segments of
that file and one stateid. Its *serial* is the seqid without wrap-around. A reply is *proven* when
the client is known to have received it: it has sent the next request on the same slot, or given up
the session, or answered a callback that had it as a referring call. A recall is *out* from the
core's event until what was wanted is back, or revoked.

Invariants. The core's grants are the truth about the blocks; these make sure that client, server
and core do not mean different things by a stateid:

  1. One layout state for a client and a file. The first LAYOUTGET that succeeds, with a stateid of
     an open, a lock or a delegation, makes it, with seqid 1; a later one with such a stateid goes
     on with it (12.5.2). It ends when its last segment is returned or dropped, or when anything of
     it is revoked.
  2. Each LAYOUTGET and LAYOUTRETURN that succeeds and each recall raises the serial by one
     (12.5.3). LAYOUTCOMMIT does not.
  3. Accepted seqids are the current one and `PARALLEL` before it; zero and newer ones are
     BAD_STATEID, older ones OLD_STATEID (12.5.5.2.1.4).
  4. Segments of a state of one iomode do not overlap: a newer one takes the place of older ones.
     They lie inside the core's grants of the client's holder, except while a LAYOUTRETURN runs.
  5. While LAYOUTGETs of a state run in a thread, LAYOUTRETURNs and recalls of it wait for them, and
     LAYOUTGETs wait for a LAYOUTRETURN that runs: `Gate`. So a return never takes back in the core
     what a LAYOUTGET is about to tell.
  6. While a recall of a state is out, LAYOUTGETs get RECALLCONFLICT. One CB_LAYOUTRECALL at a time:
     Linux answers DELAY to a second one with another seqid. What is wanted meanwhile is asked for
     with the next one, if it is still there then.
  7. A CB_LAYOUTRECALL has the raised serial, and the LAYOUTGETs of the state that are not proven as
     referring calls. It is sent again, with the same seqid, while there is no answer or DELAY.
  8. LAYOUTRETURN with serial s gives back segments in its range whose serial is not newer than s.
  9. NOMATCHING_LAYOUT and BAD_STATEID as the answer to a recall with serial s give back segments in
     its range, not newer than s, whose replies are proven; the recall goes on for others.
 10. The deadline of a recall is the core's (recall_ms): its event REVOKED ends the layout state.
     The stateid is bad from then on, so a LAYOUTCOMMIT gets BAD_STATEID: BADLAYOUT, BADIOMODE,
     GRACE and DELEG_REVOKED would count as success with the Linux client, whose data would be lost
     without a word. The stateid is not kept as a revoked one: Linux never frees those of layouts,
     and would recover for ever at the sight of SEQ4_STATUS_*_REVOKED.
 11. What a client does not return is not forgotten in the core: its holder is lost, and what it
     could reach is in quarantine, until the client has returned everything: no layout state is left
     and each revoked one was returned, too (by its old stateid, or with all of the filesystem).
     Then, and not while a LAYOUTGET of the client runs, the core is told so (`settle`).
 12. Only what the client returns is given back in the core: its writes may be under way with what
     it had before, in the same range, too. So not what a LAYOUTGET was granted for nothing, because
     its state was revoked or its client went meanwhile, unless the client had nothing of the file;
     not with one of several revoked stateids of a file; and nothing when a lease has ended.

13 and 14, about clients that were fenced, are in `extfs.nfs.layout_holders`.

Everything runs in the protocol's thread. A generator's `yield` lets others run: what is checked
before one is checked again after it, unless the gate of the state is held.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from extfs.core import TO_THE_END, CoreError, EventType, HolderState, Iomode, Layout
from extfs.nfs import constants as n
from extfs.nfs.block_layout import EXTENT_BYTES, LAYOUT_HEAD_BYTES
from extfs.nfs.clients import Standing
from extfs.nfs.effects import Blocking, CoreCall, Steps, Waiting
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_holders import Holders
from extfs.nfs.layout_recalls import Recalls
from extfs.nfs.layout_revoked import Revoked
from extfs.nfs.layout_segments import Received, Segment, merged
from extfs.nfs.layout_size import Wanted, asking
from extfs.nfs.layout_states import TRY_LATER, Gate, LayoutState
from extfs.nfs.stateids import Kind, RecordHead, State, Stateid
from extfs.nfs.xdr import Reader

if TYPE_CHECKING:
    from extfs.core import LayoutEvent
    from extfs.nfs.clients import Client
    from extfs.nfs.compound import Compound
    from extfs.nfs.opens import FileState
    from extfs.nfs.service import Service

__all__ = ["Granted", "LayoutTable"]

log = logging.getLogger("extfs.nfs")

BUSY_SECONDS = 0.01
BUSY_TRIES = 5
"""How often a LAYOUTGET is tried that only the server's own I/O was in the way of."""
STATES_MAX = 65536
"""Layout states of all clients; before there are more, clients are asked to return some."""
RECALL_ANY_SECONDS = 5.0
RECALL_ANY_KEEP = 16
SEGMENTS_MAX = 1 << 20
"""Segments of all clients, which are as many grants in the core."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What LAYOUTGET answers: [start, end) in the core's extents, on the client's `device`."""

    stateid: Stateid
    start: int
    end: int
    iomode: Iomode
    layout: Layout
    device: bytes


class LayoutTable:
    """All layout states of a server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.recalls = Recalls(self)
        self.holders = Holders(self)
        self._states: dict[tuple[Client, int], LayoutState] = {}
        self._of_client: dict[Client, set[LayoutState]] = {}
        self._revoked: dict[Client, Revoked] = {}
        self._unclean: set[Client] = set()
        self._settling: dict[Client, Gate] = {}
        self._asked_any = float("-inf")
        self._segments = 0
        """Of all states."""
        service.records.restorers[Kind.LAYOUT] = self._restore

    # -- look up --

    def find(self, client: Client, ino: int) -> LayoutState | None:
        """The state of a client and a file."""
        return self._states.get((client, ino))

    def of_client(self, client: Client) -> list[LayoutState]:
        """All of a client's."""
        return list(self._of_client.get(client, ()))

    def shared(self, client: Client, ino: int) -> bool:
        """Whether another client has a layout of the file."""
        file = self.service.states.known_file(ino)
        return file is not None and any(state.client is not client for state in file.layouts)

    def believe(self, c: Compound, stateid: Stateid, ino: int, *kinds: Kind) -> State:
        """`States.find`; but a client that is kept over restarts has not to hear of them: what is
        gone since is bad, not stale, or it would recover a lease that is in order."""
        try:
            return self.service.states.find(c, stateid, *kinds, file=ino)
        except NfsError as error:
            assert c.client is not None
            if error.status == n.NFS4ERR_STALE_STATEID and c.client.kept:
                raise NfsError(n.NFS4ERR_BAD_STATEID) from None
            raise

    # -- LAYOUTGET --

    def get(
        self, c: Compound, wanted: Wanted, stateid: Stateid, maxcount: int, layout_type: int
    ) -> Steps[Granted]:
        """RFC 8881 18.43, after the arguments by themselves were found to be good, and the current
        file to be a regular one."""
        client = c.client
        assert client is not None
        assert c.current is not None
        ino = c.current.ino
        self._check_stateid(c, stateid, ino, wanted.iomode)
        limit = min(maxcount, c.room()) - LAYOUTGET_HEAD_BYTES
        if limit < 2 * EXTENT_BYTES:  # a copy-on-write source and its copy belong together
            raise NfsError(n.NFS4ERR_TOOSMALL)
        waits = not client.holder_id or layout_type == n.LAYOUT4_SCSI
        holder = yield from self.holders.of(client)
        if layout_type == n.LAYOUT4_SCSI:
            if not client.fence_key:  # of before there was a unit that can fence
                self.service.count("layoutget_no_key")
                raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
            yield from self.holders.clear(client)
        if waits:
            self._check_stateid(c, stateid, ino, wanted.iomode)
        settling = self._settling.setdefault(client, Gate())
        yield from settling.enter()
        try:
            state = yield from self._enter(c, ino, layout_type)
            try:
                return (yield from self._get(c, state, holder, wanted, limit // EXTENT_BYTES))
            finally:
                self._left_state(state)
        finally:
            self._left(client, settling)

    def _get(
        self, c: Compound, state: LayoutState, holder: int, wanted: Wanted, limit: int
    ) -> Steps[Granted]:
        """With the gate of the state held."""
        client, ino = state.client, state.file.ino
        self._check_recalled(state)
        self._check_segments()
        fresh = self._holds_nothing(state, holder)
        layout = yield from self._ask_core(client, ino, holder, wanted, limit)
        try:
            return self._granted(c, state, holder, wanted, layout)
        except NfsError:
            if fresh and not state.serial and client.standing is not Standing.GONE:
                start, length = wanted.start, layout.next - wanted.start
                give, iomode = self.service.fs.layouts.give_back, wanted.iomode
                call = lambda: give(ino, holder, start, length, iomode=iomode)  # noqa: E731
                yield Blocking(lambda: _unless_gone(call))
            raise

    def _holds_nothing(self, state: LayoutState, holder: int) -> bool:
        """Invariant 12: whether a LAYOUTGET that fails may give back what it was granted. Of a
        state that has been told to the client it may not."""
        if state.serial:
            return False
        grants = self.service.fs.layouts.grants(state.file.ino)
        return not any(grant.holder == holder for grant in grants)

    def _enter(self, c: Compound, ino: int, layout_type: int) -> Steps[LayoutState]:
        """The state of the client and the current file, with its gate held."""
        while True:
            state = self._state_for(c, ino, layout_type)
            yield from state.gate.enter()
            if self._states.get((state.client, ino)) is state:
                return state
            state.gate.leave()  # it ended while we waited

    def _left(self, client: Client, settling: Gate) -> None:
        settling.leave()
        if settling.idle and self._settling.get(client) is settling:
            del self._settling[client]
            if client in self._unclean:
                self.settle(client)

    def _left_state(self, state: LayoutState) -> None:
        state.gate.leave()
        self.recalls.go_on(state)
        self._forget_empty(state)

    def _check_stateid(self, c: Compound, stateid: Stateid, ino: int, iomode: Iomode) -> None:
        """What a LAYOUTGET may come with (RFC 8881 18.43.3). `NfsError`."""
        found = self.believe(c, stateid, ino, Kind.OPEN, Kind.LOCK, Kind.DELEGATION, Kind.LAYOUT)
        if iomode is not Iomode.RW:
            return
        c.writable()
        file = found.file
        assert file is not None
        assert c.client is not None
        opens = (o for (client, _), o in file.opens.items() if client is c.client)
        delegation = file.delegations.get(c.client)
        if any(o.access & n.OPEN4_SHARE_ACCESS_WRITE for o in opens):
            return
        if delegation is None or not delegation.write:
            raise NfsError(n.NFS4ERR_OPENMODE)

    def _check_recalled(self, state: LayoutState) -> None:
        """With the gate held. `NfsError`: invariant 6."""
        if state.recall is not None:
            self.service.count("layoutget_recallconflict")
            raise NfsError(n.NFS4ERR_RECALLCONFLICT)

    def _check_segments(self) -> None:
        """`NfsError`: there are too many."""
        if self._segments < SEGMENTS_MAX:
            return
        self.service.count("layoutget_too_many")
        if self.recall_any():
            raise NfsError(n.NFS4ERR_LAYOUTTRYLATER, TRY_LATER)
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)

    def _state_for(self, c: Compound, ino: int, layout_type: int) -> LayoutState:
        """The state of this client and the current file; a new one is nowhere but in our table.

        `NfsError`: there is one of another layout type, by another export.
        """
        client, fh = c.client, c.current
        assert client is not None
        assert fh is not None
        state = self._states.get((client, ino))
        if state is None:
            states = self.service.states
            file = states.file(ino, fh.generation)
            other = states.new_other()
            state = LayoutState(client, file, other, fh.wire, fh.export.id, layout_type)
            self._states[client, ino] = state
        if state.layout_type != layout_type:
            raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
        return state

    def _forget_empty(self, state: LayoutState) -> None:
        """A LAYOUTGET made a state and got nothing."""
        key = (state.client, state.file.ino)
        if not state.serial and state.gate.idle and self._states.get(key) is state:
            del self._states[key]

    def _ask_core(
        self, client: Client, ino: int, holder: int, wanted: Wanted, limit: int
    ) -> Steps[Layout]:
        fs = self.service.fs
        alone = not self.shared(client, ino)
        for _ in range(BUSY_TRIES):
            try:
                layout: Layout = yield asking(fs, ino, holder, wanted, limit, alone)
                return layout
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    yield from self._refused(client, holder, error)
                    continue
            others = [g for g in fs.layouts.grants(ino) if g.holder != holder]
            if any(wanted.touches(g.offset, g.offset + g.length) for g in others):
                self._conflict(wanted)
            yield Waiting(BUSY_SECONDS)
        self.service.count("layoutget_trylater")
        raise NfsError(n.NFS4ERR_LAYOUTTRYLATER, TRY_LATER)

    def _conflict(self, wanted: Wanted) -> None:
        """Others have what was asked for. For RW they were asked to return it. Nobody is for READ,
        which may last: then the file is to be read through the server."""
        if wanted.iomode is Iomode.RW:
            self.service.count("layoutget_trylater")
            raise NfsError(n.NFS4ERR_LAYOUTTRYLATER, TRY_LATER)
        self.service.count("layoutget_unavailable")
        raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)

    def _refused(self, client: Client, holder: int, error: OSError) -> Steps[None]:
        """Not for a conflict. Returns when it is worth trying again."""
        if error.errno == errno.EOWNERDEAD:
            self._unclean.add(client)
            yield from self.holders.speak_again(client)
            return
        if error.errno == errno.ENOENT and self.holders.is_gone(holder):
            self.holders.gone(holder)
            raise NfsError(n.NFS4ERR_DELAY)
        if error.errno == errno.ENOSPC:
            if self.recall_any():
                raise NfsError(n.NFS4ERR_LAYOUTTRYLATER, TRY_LATER)
            raise NfsError(n.NFS4ERR_NOSPC)
        if error.errno in (errno.EFBIG, errno.ENOENT, errno.EBUSY):
            raise NfsError(n.NFS4ERR_LAYOUTUNAVAILABLE)
        raise error

    def _granted(
        self, c: Compound, state: LayoutState, holder: int, wanted: Wanted, layout: Layout
    ) -> Granted:
        """The core has granted it. `NfsError`: meanwhile the client, its holder, the file or the
        state went."""
        assert c.session is not None
        assert c.slot is not None
        client = state.client
        if client.standing is Standing.GONE:
            raise NfsError(n.NFS4ERR_EXPIRED)
        if client.holder_id != holder or self._states.get((client, state.file.ino)) is not state:
            raise NfsError(n.NFS4ERR_DELAY)
        if state.serial == 0:
            known = self.service.states.known_file(state.file.ino)
            if known is None or not _held_open(known, client):
                raise NfsError(n.NFS4ERR_BAD_STATEID)  # closed meanwhile: nothing to go with it
            try:
                self.service.states.add(state)
            except OSError:
                raise NfsError(n.NFS4ERR_STALE) from None
            self._of_client.setdefault(client, set()).add(state)
            if len(self._states) > STATES_MAX:
                self.recall_any()
        stateid = self._bump(state)
        reply = Received(self.service, c.session, c.slot)
        start, end = wanted.start, layout.next
        had = len(state.segments)
        state.add(Segment(start, end, wanted.iomode, state.serial, reply))
        self._segments += len(state.segments) - had
        self.service.count("layoutgets")
        device = self.service.devices.formats[state.layout_type].device(client)
        return Granted(stateid, start, end, wanted.iomode, layout, device)

    def _bump(self, state: LayoutState) -> Stateid:
        """The stateid of a reply."""
        stateid, outdated = state.bump_for_reply()
        if outdated:
            self.service.states.changed(state)
        return stateid

    # -- LAYOUTRETURN --

    def give_back(
        self,
        c: Compound,
        stateid: Stateid,
        start: int,
        end: int,
        iomode: int,
        layout_type: int,
    ) -> Steps[Stateid | None]:
        """LAYOUTRETURN of a range of a file (RFC 8881 18.44); None: nothing is left of its state.

        `start` and `end` are rounded inwards to blocks.
        """
        client, ino = c.client, c.regular().ino
        assert client is not None
        stateid = self.service.states.actual(c, stateid)
        revoked = self._revoked.get(client)
        if revoked is not None and revoked.is_of(stateid.other, ino):
            if start or end != n.NFS4_MAXFILELEN or iomode != n.LAYOUTIOMODE4_ANY:
                raise NfsError(n.NFS4ERR_BAD_STATEID)
            yield from self._give_back_revoked(client, stateid.other, ino)
            return None
        state = self.believe(c, stateid, ino, Kind.LAYOUT)
        assert isinstance(state, LayoutState)
        if state.layout_type != layout_type:
            raise NfsError(n.NFS4ERR_INVAL)
        serial = state.serial_of(stateid.seqid)
        yield from state.gate.enter(alone=True)
        with self._leaving(state):
            if self._states.get((client, ino)) is not state:
                raise NfsError(n.NFS4ERR_BAD_STATEID)  # it ended meanwhile
            parts = state.takes(start, end, iomode, serial)
            whole = start == 0 and end == n.NFS4_MAXFILELEN and len(parts) == len(state.segments)
            yield from self._take(state, parts)
            if self._states.get((client, ino)) is state:
                return self._bump(state) if state.segments else None
            if not whole:
                raise NfsError(n.NFS4ERR_BAD_STATEID)  # revoked meanwhile: what is left is lost
            self._revoked_returned(client, state.other)
        self.settle(client)
        return None

    def _revoked_returned(self, client: Client, other: bytes) -> None:
        revoked = self._revoked.get(client)
        if revoked is not None:
            revoked.returned(other)

    def _take(self, state: LayoutState, parts: list[Segment]) -> Steps[None]:
        """The core takes them back; the gate is held."""
        layouts, ino, holder = self.service.fs.layouts, state.file.ino, state.client.holder_id
        for part in merged(parts):
            length = TO_THE_END if part.end >= TO_THE_END else part.end - part.start
            give = partial(layouts.prepare_give_back, ino, holder, part.start, length)
            try:
                yield CoreCall(layouts, partial(give, iomode=part.iomode))
            except CoreError as error:
                if error.errno != errno.ENOENT:
                    raise
                break  # a holder that was fenced has nothing to give back
        had = len(state.segments)
        state.remove(parts)
        self._segments += len(state.segments) - had

    @contextlib.contextmanager
    def _leaving(self, state: LayoutState) -> Iterator[None]:
        """Ends what was done with the gate held alone. A state without segments ends before anybody
        can come in; then a recall may be over."""
        try:
            yield
        finally:
            if state.serial and not state.segments:
                self.drop(state)
            state.gate.leave(alone=True)
            self.recalls.go_on(state)

    def take_proven(self, state: LayoutState, start: int, end: int, serial: int) -> Steps[None]:
        """The client says that it has nothing of the recalled range (invariant 9)."""
        yield from state.gate.enter(alone=True)
        with self._leaving(state):
            parts = state.takes(start, end, Iomode.ANY, serial, proven=True)
            yield from self._take(state, parts)

    def _give_back_revoked(self, client: Client, other: bytes, ino: int) -> Steps[None]:
        """The client has stopped using a layout that was revoked before it said so."""
        layouts, holder = self.service.fs.layouts, client.holder_id
        gate = self._settling.setdefault(client, Gate())
        yield from gate.enter(alone=True)  # no LAYOUTGET of the client runs
        try:
            revoked = self._revoked.get(client)
            if self.find(client, ino) is None and revoked is not None and revoked.alone(other, ino):
                yield Blocking(lambda: _unless_gone(lambda: layouts.give_back(ino, holder)))
        finally:
            gate.leave(alone=True)
            if gate.idle and self._settling.get(client) is gate:
                del self._settling[client]
        self._revoked_returned(client, other)
        self.settle(client)

    def give_all_back(self, client: Client, export: int | None, layout_type: int) -> Steps[None]:
        """LAYOUTRETURN of an export's layouts of a type (FSID), or of all of that type (None)."""
        for state in self.of_client(client):
            if state.layout_type != layout_type or export not in (None, state.export):
                continue
            yield from state.gate.enter(alone=True)
            with self._leaving(state):
                yield from self._take(state, list(state.segments))
        if export is None:
            revoked = self._revoked.get(client)
            if revoked is not None:
                revoked.all_returned(layout_type)
            if layout_type == n.LAYOUT4_SCSI:
                self.holders.has_nothing(client)
            self._unclean.add(client)  # of before a restart, too
        self.settle(client)

    def settle(self, client: Client) -> None:
        """Invariant 11: tell the core when a client that was lost has returned everything."""
        if client not in self._unclean or self._of_client.get(client) or self._revoked.get(client):
            return
        if client in self._settling or not client.holder_id or client.standing is Standing.GONE:
            return

        def steps() -> Steps[None]:
            gate = self._settling.setdefault(client, Gate())
            yield from gate.enter(alone=True)
            try:
                layouts, holder = self.service.fs.layouts, client.holder_id
                if self.holders.is_over(holder):
                    return
                if client in self._unclean and not self._of_client.get(client):
                    yield Blocking(lambda: _unless_gone(lambda: layouts.give_all_back(holder)))
                    self._unclean.discard(client)
                    self.service.count("holders_settled")
            finally:
                gate.leave(alone=True)
                if gate.idle and self._settling.get(client) is gate:
                    del self._settling[client]

        self.service.driver.run(steps(), _logged("the end of a lost holder's layouts"))

    # -- the end of states --

    def drop(self, state: LayoutState) -> None:
        """It ends: returned, revoked, or its client is gone. The core is the caller's business."""
        if self._states.get((state.client, state.file.ino)) is state:
            del self._states[state.client, state.file.ino]
        of_client = self._of_client.get(state.client)
        if of_client is not None:
            of_client.discard(state)
            if not of_client:
                del self._of_client[state.client]
        self._segments -= len(state.segments)
        if state.layout_type == n.LAYOUT4_SCSI:
            self.holders.ended(state.client, state.unproven())
        state.segments.clear()
        state.wanted = []
        self.recalls.ended(state)
        self.service.states.drop(state)
        self.settle(state.client)

    def revoked(self, state: LayoutState) -> None:
        """The core took something of it back (invariant 10)."""
        client = state.client
        remembered = self._revoked.setdefault(client, Revoked())
        remembered.add(state.other, state.file.ino, state.layout_type)
        self._unclean.add(client)
        self.service.count("layouts_revoked")
        log.warning("client %s: the layout of inode %d was revoked", client.name, state.file.ino)
        self.drop(state)

    def closed(self, client: Client, file: FileState) -> None:
        """The client has closed the file for good: layouts are return-on-close (18.43.3)."""
        state = self._states.get((client, file.ino))
        if state is None or not state.serial:
            return
        if _held_open(file, client):
            return

        def steps() -> Steps[None]:
            yield from state.gate.enter(alone=True)
            with self._leaving(state):
                yield from self._take(state, list(state.segments))

        self.service.count("layouts_returned_on_close")
        self.service.driver.run(steps(), _logged("return on close"))

    def _restore(self, client: Client, body: bytes) -> LayoutState | None:
        """After a restart: a layout of a kept client, with what the core remembers of it.

        Nothing of a client that has blocks in quarantine: one of its layouts was revoked, perhaps
        so shortly before the restart that the record of this one does not know it.
        """
        record = Reader(body)
        head = RecordHead.read(record)
        layouts = self.service.fs.layouts
        holder = layouts.holder(client.holder_id)
        mine = [g for g in layouts.grants(head.ino) if g.holder == client.holder_id]
        if head.mark or not mine or holder is None or self.holders.in_quarantine(holder):
            return None
        if holder.state is not HolderState.LIVE:
            return None  # condemned: its fence is decided
        states = self.service.states
        file = states.file(head.ino, head.generation)
        state = LayoutState.from_record(record, client, file, head)
        if state.layout_type not in self.service.devices.formats:
            return None
        for grant in mine:
            end = min(grant.offset + grant.length, n.NFS4_MAXFILELEN)
            state.add(Segment(grant.offset, end, grant.iomode, 1, None))
        states.add(state)
        if state.layout_type == n.LAYOUT4_SCSI:
            client.must_drop = False  # it had said that it has none of before
        self._states[client, head.ino] = state
        self._of_client.setdefault(client, set()).add(state)
        self._segments += len(state.segments)
        return state

    def resumed(self, client: Client) -> None:
        """A kept client's holder speaks again after a restart. Stateids that were revoked before
        it are not known any more, and what the client could reach by them is in quarantine."""
        holder = self.service.fs.layouts.holder(client.holder_id)
        if holder is not None and self.holders.in_quarantine(holder):
            types = self.service.exports.layout_types()
            self._revoked.setdefault(client, Revoked()).forget(types)

    def holder_gone(self, client: Client) -> None:
        """The client has no holder any more (invariant 13)."""
        for state in self.of_client(client):
            self.service.count("layouts_fenced")
            self.drop(state)
        self._revoked.pop(client, None)
        self._unclean.discard(client)

    def client_lost(self, client: Client) -> None:
        """The client is GONE; `ClientTable.drop` tells the core."""
        for state in self.of_client(client):
            self.drop(state)
        self.holders.client_lost(client)
        self._revoked.pop(client, None)
        self._unclean.discard(client)
        self._settling.pop(client, None)
        self.service.devices.client_lost(client)

    # -- events, recalls of anything, status --

    def core_event(self, event: LayoutEvent) -> None:
        """RECALL, REVOKED and HOLDER_GONE of holders that are clients; others are not for us."""
        if event.type is EventType.OVERFLOW:
            self.holders.look()
            self.recalls.overflow()
        elif event.type is EventType.HOLDER_GONE:
            self.holders.gone(event.holder, fenced=event.length != 0)
        elif event.type in (EventType.RECALL, EventType.REVOKED):
            self._wanted_or_revoked(event)

    def _wanted_or_revoked(self, event: LayoutEvent) -> None:
        client = self.holders.client_of(event.holder)
        state = None if client is None else self._states.get((client, event.ino))
        if client is None:
            return
        if event.type is EventType.REVOKED:
            self._unclean.add(client)
            if state is not None and state.serial:
                self.revoked(state)
        elif state is not None:
            self.recalls.wanted(state, event.offset, event.offset + event.length)

    def recall_any(self) -> bool:
        """Space or memory is short: clients are asked to return what they can spare (20.6).

        False: there is nobody to ask, or they were asked a moment ago.
        """
        now = self.service.clock()
        if now < self._asked_any + RECALL_ANY_SECONDS or not self._of_client:
            return False
        self._asked_any = now
        for client, states in list(self._of_client.items()):
            self.recalls.recall_any(client, min(RECALL_ANY_KEEP, len(states) // 2))
        return True

    def __iter__(self) -> Iterator[LayoutState]:
        return iter([state for state in self._states.values() if state.serial])

    def status(self) -> dict[str, Any]:
        """For people."""
        states = list(self)
        return {
            "states": len(states),
            "segments": sum(len(state.segments) for state in states),
            "recalls": [
                {
                    "client": state.client.name,
                    "ino": state.file.ino,
                    "seconds": round(self.service.clock() - state.recall.since, 3),
                    "answers": list(state.recall.answers),
                }
                for state in states
                if state.recall is not None
            ],
            "revoked": sum(len(others) for others in self._revoked.values()),
            "unclean_clients": len(self._unclean),
            "devices": [self.service.devices.block.current.hex()],
        }


LAYOUTGET_HEAD_BYTES = 4 + 16 + 4 + 8 + 8 + 4 + 4 + 4 + LAYOUT_HEAD_BYTES
"""LAYOUTGET4resok with one layout, before its extents."""


def _held_open(file: FileState, client: Client) -> bool:
    """Whether the client has an open or a delegation of the file."""
    return client in file.delegations or any(owner is client for owner, _ in file.opens)


def _unless_gone(give_back: Callable[[], None]) -> None:
    """Of a holder that was fenced there is nothing to be given back. Blocks."""
    try:
        give_back()
    except CoreError as error:
        if error.errno != errno.ENOENT:
            raise


def _logged(what: str) -> Any:
    def done(_: object, error: Exception | None) -> None:
        if error is not None:
            log.warning("%s: %s", what, error)

    return done
