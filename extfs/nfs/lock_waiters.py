"""Who waits for locks: lock-owners of clients, and local processes behind clients that are away.

A lock-owner that was refused a blocking lock is told when it may be had (CB_NOTIFY_LOCK).

A client that sent LOCK with READW_LT or WRITEW_LT asks again by itself sooner or later: telling it
is a courtesy (RFC 8881 18.10.4, 20.11). So a waiter that is forgotten loses time and nothing else,
and there are never more than `WAITERS_MAX`.

The core sends one event LOCK_FREE for each `watch`; a waiter is told once, and then is none.

A local process that waits for a lock of a client is not answered by anybody but the core, which
says once that the lock is wanted (LOCK_WANTED). The client may lose its lease later: so that is
remembered until the lock-owner is no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import CoreError
from extfs.nfs import constants as n
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.opens import FileState
    from extfs.nfs.state import States

__all__ = ["LockWaiters", "WantedLocks"]

WAITERS_MAX = 16384
LOOK_SECONDS = 5.0
"""Between two looks whether the owner of a wanted lock has lost its lease."""


@dataclass(slots=True)
class _Waiter:
    client: Client
    owner: bytes
    fh: bytes


class LockWaiters:
    """By inode and number of the lock-owner: one wish each, the newest."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._waiters: dict[tuple[int, int], _Waiter] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(
        self,
        client: Client,
        file: FileState,
        fh: bytes,
        owner: bytes,
        start: int,
        last: int,
        write: bool,
    ) -> None:
        """Tell this client when the owner could have [start, last]."""
        if len(self._waiters) >= WAITERS_MAX:
            return
        number = self._states.owners.take(client, owner)
        key = (file.ino, number)
        if key in self._waiters:
            self._states.owners.put(client, owner)
        self._waiters[key] = _Waiter(client, owner, fh)
        try:
            self._states.locks.watch(file, number, start, last, write)
        except CoreError:  # too many
            del self._waiters[key]
            self._states.owners.put(client, owner)

    def remove(self, ino: int, client: Client, owner: bytes) -> None:
        """The owner has the lock, or does not want it any more."""
        number = self._states.owners.number(client, owner)
        if self._waiters.pop((ino, number), None) is not None:
            self._states.locks.unwatch(ino, number)
            self._states.owners.put(client, owner)

    def client_lost(self, client: Client) -> None:
        """Nobody is to be told."""
        for (ino, _), waiter in list(self._waiters.items()):
            if waiter.client is client:
                self.remove(ino, client, waiter.owner)

    def file_unused(self, ino: int) -> None:
        """Nobody has the file open any more."""
        for (other, _), waiter in list(self._waiters.items()):
            if other == ino:
                self.remove(ino, waiter.client, waiter.owner)

    def events_lost(self) -> None:
        """All are told: who comes too early waits again."""
        for ino, number in list(self._waiters):
            self._states.locks.unwatch(ino, number)
            self.free(ino, number)

    def free(self, ino: int, number: int) -> None:
        """The core's event: what the owner waits for may be had."""
        waiter = self._waiters.pop((ino, number), None)
        if waiter is None:
            return
        self._states.owners.put(waiter.client, waiter.owner)
        service = self._states.service
        service.count("lock_notifications")
        body = Writer()
        body.u32(n.OP_CB_NOTIFY_LOCK)
        body.opaque(waiter.fh)
        body.u64(waiter.client.clientid)
        body.opaque(waiter.owner)
        service.callbacks.call(waiter.client, bytes(body.buffer), 1, lambda reply: None)


class WantedLocks:
    """Lock-owners, by number, with locks that local processes want."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._numbers: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def events_lost(self) -> None:
        """Each lock may be wanted."""
        for number in self._states.owners.numbers():
            self.add(number)

    def add(self, number: int) -> None:
        """The core's event."""
        waits = bool(self._numbers)
        self._numbers.add(number)
        if not waits:
            self._look()

    def _look(self) -> None:
        """A client that is there by courtesy goes; owners that are no more are forgotten."""
        for number in list(self._numbers):
            owner = self._states.owners.name(number)
            if owner is None or self._states.expire_courtesy(owner[0]):
                self._numbers.discard(number)
        if self._numbers:
            self._states.service.timers.after(LOOK_SECONDS, self._look)
