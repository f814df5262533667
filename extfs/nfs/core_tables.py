"""The core's tables of locks and delegations, as the protocol code uses them.

There NFS and local users of the mount meet: a local fcntl(2) lock and a LOCK are in each other's
way, and a local open recalls a delegation.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extfs.nfs.effects import Steps
from extfs.nfs.locks import LAST

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.opens import FileState
    from extfs.nfs.service import Service

__all__ = ["CoreDelegations", "CoreLocks", "LockConflict"]

log = logging.getLogger("extfs.nfs")


@dataclass(frozen=True, slots=True)
class LockConflict:
    """A lock in the way: bytes `start` to `last`, the last one included.

    `number`: of a lock-owner of ours; 0 for a local process, which is `pid`.
    """

    start: int
    last: int
    write: bool
    number: int
    pid: int


class CoreLocks:
    """Byte-range locks. The inode is kept open by its FileState."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _table(self) -> Any:
        return getattr(self._service.fs, "locks", None)

    def set(
        self, file: FileState, number: int, start: int, last: int, write: bool
    ) -> LockConflict | None:
        """Lock, or say who is in the way; never waits."""
        if self._table is None:
            return self._among_ours(file, number, start, last, write)
        return _conflict(self._table.set(file.ino, number, start, _length(start, last), write))

    def clear(self, file: FileState, number: int, start: int, last: int) -> None:
        """Unlock a range, locked or not."""
        if self._table is not None:
            self._table.clear(file.ino, number, start, _length(start, last))

    def test(
        self, file: FileState, number: int, start: int, last: int, write: bool
    ) -> LockConflict | None:
        """Who would be in the way."""
        if self._table is None:
            return self._among_ours(file, number, start, last, write)
        if not file.attached:
            self._service.fs.open_inode(file.ino)
        try:
            found = self._table.test(file.ino, number, start, _length(start, last), write)
        finally:
            if not file.attached:
                self._service.fs.release(file.ino)
        return _conflict(found)

    def release_owner(self, file: FileState, number: int) -> None:
        """The owner has no locks on the file any more."""
        if self._table is not None and number:
            self._table.release_owner(file.ino, number)

    def watch(self, file: FileState, number: int, start: int, last: int, write: bool) -> None:
        """One event LOCK_FREE when the lock could be had."""
        if self._table is not None:
            self._table.watch(file.ino, number, start, _length(start, last), write)

    def unwatch(self, ino: int, number: int) -> None:
        """No such event any more."""
        if self._table is not None:
            self._table.unwatch(ino, number)

    @staticmethod
    def _among_ours(
        file: FileState, number: int, start: int, last: int, write: bool
    ) -> LockConflict | None:
        for state in file.locks.values():
            if state.number == number:
                continue
            for have in state.ranges:
                if have[0] <= last and have[1] >= start and (write or have[2]):
                    return LockConflict(have[0], have[1], have[2], state.number, 0)
        return None


def _length(start: int, last: int) -> int:
    return LAST if last == LAST else last - start + 1


def _conflict(found: Any) -> LockConflict | None:
    if found is None:
        return None
    to_the_end = found.length == LAST
    last = LAST if to_the_end else found.start + found.length - 1
    number = 0 if found.local else found.owner
    return LockConflict(found.start, last, found.write, number, found.pid)


class CoreDelegations:
    """Delegations against local use of the mount."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _table(self) -> Any:
        return getattr(self._service.fs, "delegations", None)

    def holder(self, client: Client) -> Steps[int]:
        """The client's number in the core, the same as for its layouts; 0: it needs none."""
        if self._table is None:
            return 0
        return (yield from client.holder(self._service))

    def grant(self, ino: int, holder: int, *, write: bool) -> bool:
        """False: local users are in the way."""
        if self._table is None:
            return True
        try:
            self._table.grant(ino, holder, write)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOWNERDEAD, errno.ENOENT, errno.EROFS):
                return False
            raise
        return True

    def give_back(self, ino: int, holder: int) -> None:
        """It is returned, or revoked."""
        try:
            self._table.give_back(ino, holder)
        except OSError as error:
            if error.errno != errno.ENOENT:  # revoked by the core meanwhile
                log.warning("inode %d: return of a delegation: %s", ino, error)
