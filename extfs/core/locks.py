"""Record locks of the NFS server's owners, in one table with the mount's fcntl(2) locks.

`Locks` is ``filesystem.locks``. Owners are numbers of the server's choice; they are never those of
local processes, whatever their numbers. Ranges are bytes; length `TO_THE_END` reaches the end of
every file. The inode must be open (`Filesystem.open_inode`) as long as it has locks or watches.
Nothing here waits, and any thread may call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extfs.core.native import checked, ffi, lib

if TYPE_CHECKING:
    from extfs.core.filesystem import Filesystem

__all__ = ["Lock", "Locks"]


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock in the way. `local`: a process's; then `pid` is that process, else 0."""

    owner: int
    start: int
    length: int
    write: bool
    pid: int
    local: bool


def _lock_of(raw: Any) -> Lock:
    return Lock(raw.owner, raw.start, raw.length, bool(raw.write), raw.pid, bool(raw.local))


class Locks:
    """The lock calls of a `Filesystem`. All raise ENOENT when there is no such inode."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._fs = filesystem

    @property
    def _raw(self) -> Any:
        return self._fs.raw

    def set(self, ino: int, owner: int, start: int, length: int, write: bool) -> Lock | None:
        """Lock the range, or say what is in the way. EINVAL: not a range; ENOLCK."""
        conflict = ffi.new("struct extfs_lock *")
        refused = checked(lib.extfs_lock_set(self._raw, ino, owner, start, length, write, conflict))
        return _lock_of(conflict) if refused else None

    def test(self, ino: int, owner: int, start: int, length: int, write: bool) -> Lock | None:
        """What would be in the way. EINVAL."""
        conflict = ffi.new("struct extfs_lock *")
        refused = checked(
            lib.extfs_lock_test(self._raw, ino, owner, start, length, write, conflict)
        )
        return _lock_of(conflict) if refused else None

    def clear(self, ino: int, owner: int, start: int, length: int) -> None:
        """Unlock the range, locked or not. EINVAL; ENOLCK: no memory to split a lock."""
        checked(lib.extfs_lock_clear(self._raw, ino, owner, start, length))

    def release_owner(self, ino: int, owner: int) -> None:
        """The owner has no locks in this inode any more, and no watch."""
        checked(lib.extfs_lock_release(self._raw, ino, owner))

    def watch(self, ino: int, owner: int, start: int, length: int, write: bool) -> None:
        """One event LOCK_FREE (`holder`: the owner) when this lock could be had, maybe at once.

        Nothing is reserved: it has to be asked for again. An owner has one watch in an inode, the
        newest. EAGAIN: 65536 are being watched for.
        """
        checked(lib.extfs_lock_watch(self._raw, ino, owner, start, length, write))

    def unwatch(self, ino: int, owner: int) -> None:
        """No event any more, but one that is on its way."""
        checked(lib.extfs_lock_unwatch(self._raw, ino, owner))
