"""Records of the NFS server: the shape of all of them, and which belong together.

What they say is the server's business (`extfs.nfs.records`), but for two things: client, state and
session say whose they are, in the bytes behind their version; and riders are the core's, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extfs.check import layout
from extfs.check.layout import NfsKind, Tree
from extfs.check.trees import Leaf

if TYPE_CHECKING:
    from extfs.check.inventory import Inventory

__all__ = ["ServerRecords"]

_CLIENTID = slice(4, 12)
_NUMBER = (1 << layout.NFS_KIND_SHIFT) - 1


class ServerRecords:
    """The pass over TREE_NFS_CLIENT."""

    def __init__(self, inventory: Inventory) -> None:
        self._inv = inventory
        self._report = inventory.report
        self._damaged = False
        self._keys: dict[int, list[int]] = {}
        """By number: keys of the parts."""
        self._clients: set[int] = set()
        self._sessions: dict[int, int] = {}
        """By number, without the kind: client ID."""
        self._riders: dict[int, int] = {}
        """By number: session."""

    def read(self) -> None:
        """Parts from 0 on without a gap; all but the last are full, and the last is not."""
        at, part, full, size = -1, 0, False, 0
        inv = self._inv
        for leaf in inv.walker.walk(inv.roots[Tree.NFS_CLIENT], Tree.NFS_CLIENT):
            for hi, lo, offset, length, _reserved in leaf.slots:
                if hi != at:
                    self._ends(at, full)
                    at, part, full, size = hi, 0, True, 0
                if lo != part or not full:
                    self._shape(hi, f"part {lo} comes after {part} parts")
                size += length
                if length > layout.NFS_PART_BYTES or size > layout.NFS_VALUE_MAX:
                    self._shape(hi, f"part {lo} has {length} bytes, all {size} so far")
                part, full = lo + 1, length >= layout.NFS_PART_BYTES
                self._note(leaf, hi, lo, offset, length)
        self._ends(at, full)
        if not self._damaged and not inv.has_damage(Tree.NFS_CLIENT):
            self._check()

    def _ends(self, number: int, full: bool) -> None:
        if full and number >= 0:
            self._shape(number, "its last part is missing")

    def _shape(self, number: int, text: str) -> None:
        self._damaged = True
        self._report.add("NFS_CLIENT_SHAPE", f"{Tree.NFS_CLIENT.title} {number}", text)

    def _note(self, leaf: Leaf, number: int, lo: int, offset: int, length: int) -> None:
        kind = number >> layout.NFS_KIND_SHIFT
        if kind in (NfsKind.SESSION, NfsKind.RIDER):
            self._keys.setdefault(number, []).append(number << 64 | lo)
        if lo:
            return
        record = leaf.data[offset : offset + length]
        clientid = int.from_bytes(record[_CLIENTID], "big")
        if kind == NfsKind.CLIENT:
            self._clients.add(clientid)
        elif kind == NfsKind.SESSION:
            self._sessions[number & _NUMBER] = clientid
        elif kind == NfsKind.RIDER:
            self._note_rider(number, record)

    def _note_rider(self, number: int, record: bytes) -> None:
        wrong = ""
        if len(record) != layout.RIDER.size:
            wrong = f"{len(record)} bytes"
        else:
            values = layout.RIDER.unpack(record)
            if layout.rider_number(values["session"], values["slot"]) != number:
                wrong = f"says that it is of slot {values['slot']} of session {values['session']}"
            elif not 0 < values["count"] <= layout.RIDER_MARKS:
                wrong = f"{values['count']} marks"
        if wrong:
            self._remove("NFS_RIDER", number, wrong)
        else:
            self._riders[number] = values["session"]

    def _remove(self, code: str, number: int, text: str) -> None:
        self._inv.fixes.remove[Tree.NFS_CLIENT].update(self._keys[number])
        self._report.add(code, f"{Tree.NFS_CLIENT.title} {number}", text, "remove it")

    def _check(self) -> None:
        """A session goes no later than its client. A rider may be left of a session that is gone:
        by an operation that was under way when it ended; the server removes it when it starts.
        """
        orphans = {
            session for session, clientid in self._sessions.items() if clientid not in self._clients
        }
        for session in sorted(orphans):
            number = NfsKind.SESSION << layout.NFS_KIND_SHIFT | session
            clientid = self._sessions[session]
            self._remove("NFS_SESSION_CLIENT", number, f"client {clientid:x} has no record")
        for number, session in self._riders.items():
            if session in orphans:
                self._remove("NFS_SESSION_CLIENT", number, f"of session {session}, an orphan")
            elif session not in self._sessions:
                self._report.note(
                    "NFS_RIDER_LEFT",
                    f"{Tree.NFS_CLIENT.title} {number}",
                    f"session {session} is gone",
                )
