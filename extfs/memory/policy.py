"""When the caches shrink, and when they may grow again.

Each event halves both: to half of what they hold, or of what they may, whichever is less, but not
below an eighth of what the mount asked for. That floor matters because the waiting for memory may
be our own doing: the kernel writes dirty pages back through us, and a busy journal makes it wait.
Smaller caches then mean more reads on the same device, so their shrinking has an end, after three
events. Nothing of it does I/O, waits for the journal or drops what the journal needs; where that is
more than the limit, a checkpoint is asked for, and what it lets go leaves a little later.

After a time without an event the limits double, and again, until they are what the mount asked for.
When pressure follows at once, that time is doubled, so that the caches do not swing.

In a cgroup with a limit the caches may also not hold more than there is room for, as looked at once
a second: they can fill faster than any event comes, and what comes then is the end of the process.
"""

from __future__ import annotations

import logging
import math
import select
import time
from collections.abc import Sequence
from typing import Any, Protocol

import trio

from extfs.core import Memory
from extfs.memory.limit import MemoryLimit
from extfs.memory.sources import Source

__all__ = ["CALM", "CALM_MAX", "FLOOR", "Caches", "Shrinker"]

log = logging.getLogger("extfs")

CALM = 10.0
"""Seconds without pressure until the limits double for the first time."""
CALM_MAX = 160.0
FLOOR = 8
"""The limits do not fall below this fraction of what the mount asked for."""
_SETTLE = 1.0
_LOOK = 1.0
_LOOK_UNLIMITED = 30.0
_GONE = select.EPOLLERR | select.EPOLLHUP


class Caches(Protocol):
    """What shrinks: a `Filesystem`."""

    def memory(self) -> Memory:
        """What the caches hold, and their limits."""

    def limit_caches(self, cache_bytes: int, inodes: int) -> int:
        """Set both limits; returns the bytes that left."""

    def checkpoint(self) -> None:
        """Ask the journal to let blocks go; does not wait."""


class Shrinker:
    """Watches `sources`, which it closes in the end, and `limit`. `why`: there is no source."""

    def __init__(
        self,
        caches: Caches,
        sources: Sequence[Source],
        *,
        why: str = "",
        limit: MemoryLimit | None = None,
    ) -> None:
        self._caches = caches
        self._sources = list(sources)
        self._why = why
        self._limit = limit
        self._limit_bytes = limit.bytes() if limit is not None else None
        self._events = self._near_limit = self._shrinks = self._given_back = 0
        self._last: float | None = None
        self._room: int | None = None
        self._calm = CALM
        # Times of trio's clock; infinite: not planned.
        self._grow_at = self._settle_at = self._look_at = math.inf
        self._grew_at: float | None = None

    def status(self) -> dict[str, Any]:
        """For the status document, as ``pressure`` in it."""
        return {
            "watched": [source.name for source in self._sources],
            "why": self._why,
            "cgroup_limit": self._limit_bytes,
            "events": self._events,
            "near_limit": self._near_limit,
            "shrinks": self._shrinks,
            "given_back": self._given_back,
            "last": self._last,
        }

    async def run(self) -> None:
        """Until cancelled."""
        try:
            with select.epoll() as epoll:
                for source in self._sources:
                    epoll.register(source.fd, source.events)
                if self._limit is not None:
                    self._look_at = trio.current_time()
                while True:
                    if await self._wait(epoll):
                        self._events += 1
                        await self._shrink()
                    await self._do_what_is_due()
        finally:
            for source in self._sources:
                source.close()

    # -- hearing of it --

    async def _wait(self, epoll: select.epoll) -> bool:
        """Until there is pressure (True), or something planned is due."""
        due = min(self._grow_at, self._settle_at, self._look_at)
        with trio.move_on_at(due):
            # trio does not wait for POLLPRI, but for an epoll descriptor that does.
            await trio.lowlevel.wait_readable(epoll.fileno())
            return self._heard(dict(epoll.poll(0)), epoll)
        return False

    def _heard(self, ready: dict[int, int], epoll: select.epoll) -> bool:
        """Whether it was pressure: a source may also have gone, with its cgroup or its peer.

        The kernel tells of an event of a trigger once, and trio's own look at `epoll` was that: so
        when nothing is ready any more, it was one.
        """
        pressed = not ready
        for source in self._sources[:]:
            events = ready.get(source.fd, 0)
            pressed |= bool(events & source.events)
            if events & source.events:
                source.drain()
            if events & _GONE:
                epoll.unregister(source.fd)
                source.close()
                self._sources.remove(source)
                self._why = f"{source.name} is gone"
                log.info("memory pressure: %s", self._why)
        return pressed

    async def _do_what_is_due(self) -> None:
        now = trio.current_time()
        if now >= self._look_at:
            await self._look()
        if now >= self._settle_at:
            self._settle_at = math.inf
            memory = self._caches.memory()
            await self._set_limits(memory.cache_limit, memory.inode_limit)
        if now >= self._grow_at:
            await self._grow()

    async def _look(self) -> None:
        """Whether the cgroup is nearly full. Reading its counters can take the kernel a while."""
        limit = self._limit
        if limit is None:
            return
        self._limit_bytes = await trio.to_thread.run_sync(limit.bytes)
        self._room = await trio.to_thread.run_sync(limit.room)
        memory = self._caches.memory()
        ceiling = self._ceiling(memory)
        if self._room is not None and self._room < 0:
            self._near_limit += 1
            await self._shrink()
        elif ceiling < memory.cache_limit:
            await self._set_limits(ceiling, memory.inode_limit)
            self._grow_at = min(self._grow_at, trio.current_time() + self._calm)
        pause = _LOOK_UNLIMITED if self._limit_bytes is None else _LOOK
        self._look_at = trio.current_time() + pause

    # -- what follows --

    async def _set_limits(self, cache_bytes: int, inodes: int) -> int:
        """In a thread: it is milliseconds in which the daemon has better things to do."""
        left = await trio.to_thread.run_sync(self._caches.limit_caches, cache_bytes, inodes)
        self._given_back += left
        return left

    async def _shrink(self) -> None:
        memory = self._caches.memory()
        cache = min(memory.cache_limit, memory.cache_bytes) // 2
        cache = min(max(cache, memory.cache_asked // FLOOR), memory.cache_limit)
        inodes = min(memory.inode_limit, memory.inodes_unused) // 2
        inodes = min(max(inodes, memory.inode_asked // FLOOR), memory.inode_limit)
        whole = (memory.cache_limit, memory.inode_limit) == (memory.cache_asked, memory.inode_asked)
        left = await self._set_limits(cache, inodes)
        if left or (cache, inodes) != (memory.cache_limit, memory.inode_limit):
            self._shrinks += 1
            self._last = time.time()
        if whole:
            log.info("memory is short: caches shrink to %d bytes, %d inodes", cache, inodes)
        if memory.cache_kept > cache:
            self._caches.checkpoint()
        now = trio.current_time()
        if self._grew_at is not None:
            soon = now - self._grew_at < self._calm
            self._calm = min(2 * self._calm, CALM_MAX) if soon else CALM
            self._grew_at = None
        self._settle_at = now + _SETTLE
        self._grow_at = now + self._calm

    def _ceiling(self, memory: Memory) -> int:
        """For metadata, so that neither cache, when full, fills the cgroup: that comes fast."""
        if self._room is None:
            return memory.cache_asked
        inodes = (memory.inode_limit - memory.inodes_unused) * memory.inode_bytes
        room = memory.cache_bytes + self._room - inodes
        return min(max(room, memory.cache_asked // FLOOR), memory.cache_asked)

    async def _grow(self) -> None:
        memory = self._caches.memory()
        ceiling = max(self._ceiling(memory), memory.cache_limit)
        cache = min(2 * memory.cache_limit, ceiling)
        inodes = min(2 * memory.inode_limit, memory.inode_asked)
        await self._set_limits(cache, inodes)
        now = trio.current_time()
        if (cache, inodes) != (memory.cache_limit, memory.inode_limit):
            self._grew_at = now
        if (cache, inodes) == (memory.cache_asked, memory.inode_asked):
            self._grow_at = math.inf
            log.info("memory is no longer short: caches may grow as before")
        else:
            self._grow_at = now + self._calm
