"""The core's tables of locks and delegations, as the protocol code uses them.

There NFS and local users of the mount meet: a local fcntl(2) lock and a LOCK are in each other's
way, and a local open recalls a delegation.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import TO_THE_END, CoreError, Lock
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
        self._fs = service.fs
        self._table = service.fs.locks

    def set(
        self, file: FileState, number: int, start: int, last: int, write: bool
    ) -> LockConflict | None:
        """Lock, or say who is in the way; never waits."""
        return _conflict(self._table.set(file.ino, number, start, _length(start, last), write))

    def clear(self, file: FileState, number: int, start: int, last: int) -> None:
        """Unlock a range, locked or not."""
        self._table.clear(file.ino, number, start, _length(start, last))

    def test(
        self, file: FileState, number: int, start: int, last: int, write: bool
    ) -> LockConflict | None:
        """Who would be in the way; number 0 is nobody's."""
        if not file.attached:
            self._fs.open_inode(file.ino)
        try:
            found = self._table.test(file.ino, number, start, _length(start, last), write)
        finally:
            if not file.attached:
                self._fs.release(file.ino)
        return _conflict(found)

    def release_owner(self, file: FileState, number: int) -> None:
        """The owner has no locks on the file any more."""
        if number:
            self._table.release_owner(file.ino, number)

    def watch(self, file: FileState, number: int, start: int, last: int, write: bool) -> None:
        """One event LOCK_FREE when the lock could be had. EAGAIN: too many are watched."""
        self._table.watch(file.ino, number, start, _length(start, last), write)

    def unwatch(self, ino: int, number: int) -> None:
        """No such event any more."""
        self._table.unwatch(ino, number)


def _length(start: int, last: int) -> int:
    return TO_THE_END if last == LAST else last - start + 1


def _conflict(found: Lock | None) -> LockConflict | None:
    if found is None:
        return None
    last = LAST if found.length == TO_THE_END else found.start + found.length - 1
    number = 0 if found.local else found.owner
    return LockConflict(found.start, last, found.write, number, found.pid)


class CoreDelegations:
    """Delegations against local use of the mount. Holders are those of the clients' layouts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._table = service.fs.delegations

    def holder(self, client: Client) -> Steps[int]:
        """The client's number in the core; the first time it is registered there."""
        return (yield from client.holder(self._service))

    def grant(self, ino: int, holder: int, *, write: bool) -> bool:
        """False: local users are in the way, or the holder is lost."""
        try:
            self._table.grant(ino, holder, write)
        except CoreError as error:
            if error.errno in (errno.EAGAIN, errno.EOWNERDEAD, errno.ENOENT, errno.EROFS):
                return False
            raise
        return True

    def give_back(self, ino: int, holder: int) -> None:
        """It is returned, or revoked."""
        try:
            self._table.give_back(ino, holder)
        except CoreError as error:
            if error.errno != errno.ENOENT:  # revoked by the core meanwhile
                log.warning("inode %d: return of a delegation: %s", ino, error)

    def recalled(self, holder: int) -> dict[int, bool]:
        """By inode: what the holder has, and whether the core is recalling it."""
        return {found.ino: found.left_ms is not None for found in self._table.of(holder)}
