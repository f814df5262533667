"""`extfs.control.client` for trio: calls run in threads, events are waited for without one.

Only a `TrioHolder.get` that waits for other holders can be cancelled, and a cancelled one is not
one that did not happen: its thread goes on, and what it is granted stays with the holder. It is
not returned behind the caller's back, because the range may overlap one that is in use. A recall
asks for it like for any other; `TrioHolder.give_back` of the range returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import trio

from extfs.control.client import (
    END,
    HERE,
    Descriptor,
    Event,
    FileHandle,
    Holder,
    Iomode,
    Layout,
)

__all__ = ["TrioDescriptor", "TrioHolder"]

_T = TypeVar("_T")


class TrioDescriptor:
    """A `Descriptor` in trio's hands; close it with the plain one's `close`."""

    def __init__(self, plain: Descriptor) -> None:
        self.plain = plain

    async def call(self, function: Callable[[Descriptor], _T]) -> _T:
        """Run any call of the plain one in a thread; it is not interrupted when cancelled."""
        return await trio.to_thread.run_sync(function, self.plain)

    async def register(
        self, name: str = "", *, fence: str = "", client: bool = False
    ) -> TrioHolder:
        """As `Descriptor.register`."""
        return TrioHolder(await self.call(lambda d: d.register(name, fence=fence, client=client)))

    async def resume(self, holder: int, key: int) -> TrioHolder:
        """As `Descriptor.resume`."""
        return TrioHolder(await self.call(lambda d: d.resume(holder, key)))

    async def wait_events(self) -> list[Event]:
        """The next events, at least one."""
        while True:
            # Before the look: what comes after it is told.
            told = self.plain.event_fd()
            found = self.plain.events()
            if found:
                await trio.lowlevel.checkpoint()
                return found
            await trio.lowlevel.wait_readable(told)


class TrioHolder:
    """A `Holder` in trio's hands."""

    def __init__(self, plain: Holder) -> None:
        self.plain = plain

    @property
    def id(self) -> int:
        """Its id."""
        return self.plain.id

    async def get(
        self,
        iomode: Iomode,
        offset: int,
        length: int,
        *,
        min_length: int = 0,
        time_ms: int = 0,
        wait: bool = False,
        atomic: bool = False,
        file: FileHandle = HERE,
    ) -> Layout:
        """As `Holder.get`. With `wait` it can be cancelled; see the module's text for what then."""
        return await trio.to_thread.run_sync(
            lambda: self.plain.get(
                iomode,
                offset,
                length,
                min_length=min_length,
                time_ms=time_ms,
                wait=wait,
                atomic=atomic,
                file=file,
            ),
            abandon_on_cancel=wait,
        )

    async def commit(
        self,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        file_size: int = 0,
        seq: int = 0,
        mtime: tuple[int, int] | None = None,
        lazy: bool = False,
        file: FileHandle = HERE,
    ) -> int:
        """As `Holder.commit`."""
        pairs = list(ranges)
        return await trio.to_thread.run_sync(
            lambda: self.plain.commit(
                pairs, file_size=file_size, seq=seq, mtime=mtime, lazy=lazy, file=file
            )
        )

    async def give_back(
        self,
        offset: int = 0,
        length: int = END,
        *,
        iomode: Iomode = Iomode.ANY,
        file: FileHandle = HERE,
    ) -> None:
        """As `Holder.give_back`."""
        await trio.to_thread.run_sync(
            lambda: self.plain.give_back(offset, length, iomode=iomode, file=file)
        )

    async def give_all_back(self) -> None:
        """As `Holder.give_all_back`."""
        await trio.to_thread.run_sync(self.plain.give_all_back)

    async def gone(self) -> None:
        """As `Holder.gone`."""
        await trio.to_thread.run_sync(self.plain.gone)
