"""Delegations of NFSv4 against local use of the mount, as ``native/delegation.h`` defines them.

`Delegations` is ``filesystem.delegations``. A delegation is of one inode, to a holder (see
`Layouts.register`) of the kind CLIENT, and in memory only. Local operations that conflict with it
wait while it is recalled: event DELEGATION_RECALL, whose `grant_seq` is the number of the
delegation, and DELEGATION_REVOKED when it was not given back within the recall time of the mount.
None of these calls waits. Failed ones raise `CoreError`. Whoever finds that events were lost
(OVERFLOW) looks for delegations that are being recalled in `Delegations.of`.

What the server does itself is not held up: it asks `Delegations.make_way` first.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extfs.core.native import checked, ffi, lib

if TYPE_CHECKING:
    from extfs.core.filesystem import Filesystem

__all__ = ["Delegation", "DelegationConflict", "Delegations"]

_ROOM = 256


class DelegationConflict(enum.IntEnum):
    """What an operation does: those that read conflict with WRITE delegations, others with all.

    NAMESPACE: remove, rename (of the file or onto it), link.
    """

    OPEN_READ = 1
    OPEN_WRITE = 2
    READ = 3
    WRITE = 4
    SETATTR = 5
    NAMESPACE = 6


@dataclass(frozen=True, slots=True)
class Delegation:
    """A delegation now. `left_ms`: until it is revoked; None: it is not being recalled.

    `seq` is its number, which rises over all delegations and layouts, also over restarts.
    """

    ino: int
    generation: int
    write: bool
    seq: int
    left_ms: int | None


class Delegations:
    """The delegation calls of a `Filesystem`, for a server in this process and tests."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._fs = filesystem

    @property
    def _raw(self) -> Any:
        return self._fs.raw

    def grant(self, ino: int, holder: int, write: bool) -> int:
        """A READ or WRITE delegation for a holder; returns its number.

        A holder that has one keeps it; a READ one becomes a WRITE one, with a new number, when that
        is asked for and nothing is against it.
        EAGAIN: local users have the file open (READ: for writing) or are changing it, a process of
        this host has a layout of it, another holder has a delegation, or the holder's own is being
        recalled; ENOENT (inode or holder), EOWNERDEAD (a lost holder), EINVAL (not a client, not a
        regular file), EISDIR, EROFS.
        """
        seq = ffi.new("uint64_t *")
        checked(lib.extfs_delegation_grant(self._raw, ino, holder, write, seq))
        return int(seq[0])

    def give_back(self, ino: int, holder: int) -> None:
        """Return it. ENOENT: there is none, or none any more."""
        checked(lib.extfs_delegation_return(self._raw, ino, holder))

    def make_way(self, ino: int, operation: DelegationConflict, *, holder: int = 0) -> bool:
        """Whether nothing is in the way of an operation of the server; else it is recalled.

        `holder`: for whom the operation is, whose own delegation is not in the way. A lost holder's
        is revoked at once. ENOENT: no such inode.
        """
        code = lib.extfs_delegation_break(self._raw, ino, holder, operation)
        if code == -errno.EAGAIN:
            return False
        checked(code)
        return True

    def of(self, holder: int) -> list[Delegation]:
        """The delegations of a holder, by number; none of one that does not exist."""
        found: list[Delegation] = []
        seq = ffi.new("uint64_t *", 0)
        out = ffi.new("struct extfs_delegation_look[]", _ROOM)
        while count := int(lib.extfs_delegation_list(self._raw, holder, seq, out, _ROOM)):
            found += [
                Delegation(
                    d.ino,
                    d.generation,
                    bool(d.write),
                    d.seq,
                    d.left_ms if d.recalled else None,
                )
                for d in (out[index] for index in range(count))
            ]
        return found

    def local_opens(self, ino: int) -> tuple[int, int]:
        """Open files of the local mount with read access, and with write access. ENOENT.

        One that was opened for both counts in both; a mapping counts as the file it is of.
        """
        readers, writers = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        checked(lib.extfs_local_opens(self._raw, ino, readers, writers))
        return int(readers[0]), int(writers[0])
