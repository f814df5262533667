"""Opens of files with share access and deny (RFC 8881 9.7), and what the server keeps of one file.

Words.
    open    what one open-owner of one client has of one file: the union of the share_access and of
            the share_deny bits of all its OPENs. One stateid.
    pairs   the (share_access, share_deny) pairs of those OPENs, bit ``4 * access + deny`` of a
            number: what OPEN_DOWNGRADE may go back to (RFC 8881 18.18.3).
    FileState  everything about one inode: opens, locks, delegations, layouts. It keeps the inode
            open in the core as long as there is any state, see `extfs.nfs.state.States.add`.

Invariants.
    1. Of two opens of a file by different owners, neither denies what the other accesses.
    2. FileState counts the opens for each bit of access and deny; the counts equal the opens'.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.stateids import Kind, RecordHead, State
from extfs.nfs.xdr import Reader

if TYPE_CHECKING:
    from extfs.nfs.delegations import DelegationState
    from extfs.nfs.locks import LockState

__all__ = ["FileState", "OpenState"]

_SHARES = struct.Struct(">III")
_BITS = (n.OPEN4_SHARE_ACCESS_READ, n.OPEN4_SHARE_ACCESS_WRITE)


def _pair(access: int, deny: int) -> int:
    return 1 << (4 * access + deny)


class OpenState(State):
    """An open. `owner` is the open-owner's opaque name; change shares by `FileState.share`."""

    kind = Kind.OPEN
    __slots__ = ("access", "deny", "locks", "owner", "pairs")
    file: FileState

    def __init__(self, client: Any, file: FileState, other: bytes, owner: bytes) -> None:
        super().__init__(client, file, other)
        self.owner = owner
        self.access = 0
        self.deny = 0
        self.pairs = 0
        self.locks: set[LockState] = set()

    @property
    def urgent(self) -> bool:
        """See `State`: without it the client opens the file again, unless it denied somebody."""
        return self.deny != 0

    def to_record(self) -> bytes:
        """See `State`."""
        out = self.begin_record(self.mark)
        out.opaque(self.owner)
        out.pack(_SHARES, self.access, self.deny, self.pairs)
        return bytes(out.buffer)

    @classmethod
    def from_record(
        cls, record: Reader, client: Any, file: FileState, head: RecordHead
    ) -> tuple[OpenState, tuple[int, int, int]]:
        """The open, and what `FileState.share` is to be told when it is in the tables."""
        state = cls(client, file, head.other, record.opaque(n.NFS4_OPAQUE_LIMIT))
        access, deny, pairs = record.unpack(_SHARES)
        return state, (access, deny, pairs)

    def downgraded(self, access: int, deny: int) -> int:
        """The pairs that remain of a downgrade; INVAL: no subset of the OPENs has that union."""
        kept = got_access = got_deny = 0
        for have in range(1, 4):
            for denied in range(4):
                pair = _pair(have, denied)
                if self.pairs & pair and not have & ~access and not denied & ~deny:
                    kept |= pair
                    got_access |= have
                    got_deny |= denied
        if not kept or got_access != access or got_deny != deny:
            raise NfsError(n.NFS4ERR_INVAL)
        return kept


class FileState:
    """State of one file. `attached`: it is in the table of files and holds the inode open.

    `contended`: when (on the service's clock) somebody last got in a delegation's way.
    """

    __slots__ = (
        "_accessing",
        "_denying",
        "attached",
        "contended",
        "delegations",
        "generation",
        "ino",
        "layouts",
        "locks",
        "opens",
    )

    def __init__(self, ino: int, generation: int) -> None:
        self.ino = ino
        self.generation = generation
        self.attached = False
        self.contended: float | None = None
        self.opens: dict[tuple[Any, bytes], OpenState] = {}
        self.locks: dict[tuple[Any, bytes], LockState] = {}
        self.delegations: dict[Any, DelegationState] = {}
        self.layouts: set[State] = set()
        self._accessing = [0, 0]
        self._denying = [0, 0]

    def unused(self) -> bool:
        """Whether there is no state."""
        return not (self.opens or self.locks or self.delegations or self.layouts)

    # -- shares --

    def share(self, holder: OpenState, access: int, deny: int, pairs: int) -> None:
        """Set what an open has; zeros when it ends."""
        for index, bit in enumerate(_BITS):
            self._accessing[index] += bool(access & bit) - bool(holder.access & bit)
            self._denying[index] += bool(deny & bit) - bool(holder.deny & bit)
        holder.access, holder.deny, holder.pairs = access, deny, pairs

    def add_share(self, holder: OpenState, access: int, deny: int) -> None:
        """One more OPEN of the same owner."""
        self.share(
            holder,
            holder.access | access,
            holder.deny | deny,
            holder.pairs | _pair(access, deny),
        )

    def has_writers(self) -> bool:
        """Whether anybody has it open for writing."""
        return self._accessing[1] > 0

    def opened_by_others(self, client: Any) -> bool:
        """Whether another client has it open."""
        return any(holder.client is not client for holder in self.opens.values())

    def written_by_others(self, client: Any) -> bool:
        """Whether another client has it open for writing."""
        return self.has_writers() and any(
            holder.access & n.OPEN4_SHARE_ACCESS_WRITE and holder.client is not client
            for holder in self.opens.values()
        )

    def share_conflicts(
        self, mine: OpenState | None, access: int, deny: int
    ) -> Iterator[OpenState]:
        """Opens of others that deny `access`, or access what `deny` denies."""
        if not self._may_conflict(access, deny):
            return
        for holder in list(self.opens.values()):
            if holder is not mine and (access & holder.deny or deny & holder.access):
                yield holder

    def _may_conflict(self, access: int, deny: int) -> bool:
        return any(
            (access & bit and self._denying[index]) or (deny & bit and self._accessing[index])
            for index, bit in enumerate(_BITS)
        )
