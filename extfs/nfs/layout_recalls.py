"""CB_LAYOUTRECALL and CB_RECALL_ANY: asking clients for layouts (RFC 8881 12.5.5, 20.3, 20.6).

The rules are numbered in `extfs.nfs.layouts`. The states of a recall, and who takes which edge:

    wanted    `Recalls.wanted`: the core wants something back; LAYOUTGETs get RECALLCONFLICT now
    asked     `_send`, when nothing of the layout state is under way: CB_LAYOUTRECALL is out
    agreed    `_answered` with NFS4_OK: the client will send LAYOUTRETURN; it is asked again only
              when it takes long, and then it may have forgotten what it agreed to
    over      `go_on`: nothing of what was wanted is left in the layout state; or `ended`: that is
              revoked, or its client is gone

From asked it goes back to asked after a pause (no answer, DELAY, an error), and on to over when the
client says that it has nothing. There is no time-out here: the core has one.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from extfs.core import Iomode
from extfs.nfs import constants as n
from extfs.nfs.stateids import write_stateid
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.nfs.callbacks import CallbackReply
    from extfs.nfs.clients import Client
    from extfs.nfs.layout_states import LayoutState
    from extfs.nfs.layouts import LayoutTable
    from extfs.nfs.timers import Timer

__all__ = ["Recall", "Recalls", "covered"]

log = logging.getLogger("extfs.nfs")

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
"""Between two attempts; it doubles."""
AGREED_PAUSE = 5.0
"""A client that agreed to return a layout is asked again after this time."""
ANSWERS_KEPT = 4


class Recall:
    """A recall that is out: of [start, end), of all iomodes, with the layout state's `serial`."""

    __slots__ = ("answers", "asked", "end", "pause", "serial", "since", "start", "timer")

    def __init__(self, since: float) -> None:
        self.since = since
        self.start = self.end = 0
        self.serial = 0
        self.asked = False
        self.pause = FIRST_PAUSE
        self.timer: Timer | None = None
        self.answers: deque[str] = deque(maxlen=ANSWERS_KEPT)


class Recalls:
    """All recalls of a layout table."""

    def __init__(self, table: LayoutTable) -> None:
        self._table = table
        self._service = table.service

    # -- edges --

    def wanted(self, state: LayoutState, start: int, end: int) -> None:
        """The core wants a range back."""
        state.wanted.append((start, end))
        if state.recall is None:
            state.recall = Recall(self._service.clock())
            self._service.count("layout_recalls")
        self.go_on(state)

    def go_on(self, state: LayoutState) -> None:
        """Something of the state has ended: is the recall over, or can it be sent?"""
        recall = state.recall
        if recall is None or not state.gate.idle:
            return
        state.wanted = [w for w in state.wanted if state.overlaps(*w)]
        if not state.wanted:
            self._over(state)
        elif not recall.asked:
            self._begin(state, recall)
        elif not state.overlaps(recall.start, recall.end):
            self._begin(state, recall)  # that was returned; this was wanted since

    def ended(self, state: LayoutState) -> None:
        """The layout state is no more."""
        self._over(state)

    def _over(self, state: LayoutState) -> None:
        recall, state.recall = state.recall, None
        state.wanted = []
        if recall is not None:
            if recall.timer is not None:
                recall.timer.cancel()
            if recall.asked:
                self._service.count("layout_recalls_over")

    def _begin(self, state: LayoutState, recall: Recall) -> None:
        """A new CB_LAYOUTRECALL, of everything that is wanted now (invariant 6)."""
        recall.start = min(start for start, _ in state.wanted)
        recall.end = max(end for _, end in state.wanted)
        state.bump()
        recall.serial = state.serial
        recall.asked, recall.pause = True, FIRST_PAUSE
        if recall.timer is not None:
            recall.timer.cancel()
            recall.timer = None
        self._send(state, recall)

    def _send(self, state: LayoutState, recall: Recall) -> None:
        """CB_LAYOUTRECALL4args for a file (invariant 7)."""
        recall.timer = None
        serial = recall.serial
        body = Writer()
        body.u32(n.OP_CB_LAYOUTRECALL)
        body.u32(state.layout_type)
        body.u32(n.LAYOUTIOMODE4_ANY)
        body.boolean(False)  # clora_changed: what was written is to be committed
        if state.known:
            body.u32(n.LAYOUT4_RET_REC_FILE)
            body.opaque(state.fh)
            body.u64(recall.start)
            body.u64(min(recall.end - recall.start, n.NFS4_MAXFILELEN))
            write_stateid(body, state.stateid_of(recall.serial))
        else:
            body.u32(n.LAYOUT4_RET_REC_ALL)  # after a restart the seqid is not known
        self._service.count("layout_recalls_sent")
        referred = state.unproven()

        def answered(reply: CallbackReply | None) -> None:
            self._answered(state, recall, serial, reply)
            if reply is not None:
                # After the answer was judged: the client may have had the reply, but not yet the
                # layout that it brought. What it says the next time is about that, too.
                for one in referred:
                    one.settled()

        self._service.callbacks.call(
            state.client,
            bytes(body.buffer),
            1,
            answered,
            [one.referring() for one in referred],
        )

    # -- answers --

    def _answered(
        self, state: LayoutState, recall: Recall, serial: int, reply: CallbackReply | None
    ) -> None:
        if state.recall is not recall or recall.serial != serial:
            return  # over, or another one by now
        status = None if reply is None else reply.status
        recall.answers.append("none" if status is None else n.STATUS_NAMES.get(status, str(status)))
        if status == n.NFS4_OK:
            recall.pause = AGREED_PAUSE
            self._again(state, recall)  # in case it forgets: it will say so
            return
        if status in (n.NFS4ERR_NOMATCHING_LAYOUT, n.NFS4ERR_BAD_STATEID):
            self._has_nothing(state, recall)
        elif status == n.NFS4ERR_OLD_STATEID:
            self._begin(state, recall)  # it knows a newer seqid: a LAYOUTRETURN overtook us
        else:
            self._again(state, recall)

    def _has_nothing(self, state: LayoutState, recall: Recall) -> None:
        """Invariant 9. What is not proven may be on its way: ask again until it is."""
        self._service.count("layout_recalls_nomatching")
        start, end = (recall.start, recall.end) if state.known else (0, n.NFS4_MAXFILELEN)

        def done(_: object, error: Exception | None) -> None:
            if error is not None:
                log.warning("a layout that the client does not have: %s", error)
            if state.recall is recall and recall.timer is None:
                self._again(state, recall)

        self._service.driver.run(self._table.take_proven(state, start, end, recall.serial), done)

    def _again(self, state: LayoutState, recall: Recall) -> None:
        """The same once more after a pause."""
        pause = recall.pause
        recall.pause = min(2 * pause, LONGEST_PAUSE)
        if recall.timer is not None:
            recall.timer.cancel()

        def send() -> None:
            if state.recall is recall:
                self._send(state, recall)

        recall.timer = self._service.timers.after(pause, send)

    # -- others --

    def overflow(self) -> None:
        """Events of the core were lost: look at all grants for what they said."""
        grants = self._service.fs.layouts.grants
        for state in self._table:
            holder = state.client.holder_id
            try:
                mine = [g for g in grants(state.file.ino) if g.holder == holder]
            except OSError:
                mine = []
            spans = [(g.offset, g.length, g.iomode) for g in mine]
            if state.gate.idle and not covered(state, spans):
                self._table.revoked(state)
                continue
            for grant in mine:
                end = grant.offset + grant.length
                if grant.recalled_ns and not any(
                    start <= grant.offset and end <= upto for start, upto in state.wanted
                ):
                    self.wanted(state, grant.offset, end)

    def recall_any(self, client: Client, keep: int) -> None:
        """CB_RECALL_ANY: the client is to return all but `keep` layouts, whichever it likes."""
        if not self._service.callbacks.path_up(client):
            return
        body = Writer()
        body.u32(n.OP_CB_RECALL_ANY)
        body.u32(keep)
        body.bitmap(1 << n.RCA4_TYPE_MASK_BLK_LAYOUT)
        self._service.count("layout_recall_any")
        self._service.callbacks.call(client, bytes(body.buffer), 1, lambda reply: None)


def covered(state: LayoutState, grants: list[tuple[int, int, Iomode]]) -> bool:
    """Whether the core's grants (offset, length, iomode) cover the segments of a state."""
    for segment in state.segments:
        at = segment.start
        for offset, length, iomode in sorted(grants):
            if iomode is segment.iomode and offset <= at < offset + length:
                at = offset + length
        if at < segment.end:
            return False
    return True
