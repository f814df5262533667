"""Decides when a lost holder is fenced, and tells the core when it was.

The core revokes by itself: it takes ranges back at the deadline of a recall and puts what the
holder can still reach into the quarantine. What is left to decide is when the quarantine may be
emptied. For every lost holder there is one task here, which runs its fence driver until that
confirms, with a growing pause between attempts.

A confirmation is about what the holder did *before* it. When the core says FENCE_WANTED anew, the
holder has spoken and been lost again in between, so the task starts over; and a confirmation counts
only if, with all events read, no such event has come. A new await between these two steps in
`Fencing._confirm` would break that.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import trio

from extfs.core import (
    CoreError,
    EventType,
    HolderRecord,
    HolderState,
    JournalFullError,
    LayoutEvent,
)
from extfs.layout.fencing import FenceDriver, Outcome, Verdict

__all__ = ["FenceStatus", "Fencing", "HolderTable"]

log = logging.getLogger("extfs")

_T = TypeVar("_T")
_A = TypeVar("_A")

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
CHECK_SECONDS = 5.0
"""How often a running attempt looks whether its holder has come back."""


class HolderTable(Protocol):
    """What the policy needs of the core's layouts."""

    def events(self) -> list[LayoutEvent]:
        """All that have come."""
        ...

    def holders(self) -> list[HolderRecord]:
        """All of them."""
        ...

    def holder(self, holder: int) -> HolderRecord | None:
        """One of them."""
        ...

    async def wait_events(self) -> None:
        """Until there are events."""
        ...

    def fenced(self, holder: int) -> None:
        """Tell that it is cut off. ENOENT; EBUSY: it is live; `JournalFullError`: not yet."""
        ...

    async def wait_space(self) -> None:
        """Until the journal has room."""
        ...


@dataclass(slots=True)
class FenceStatus:
    """The fence of one lost holder. `since` on trio's clock; `waited` in seconds, when asked."""

    holder: int
    since: float
    attempts: int = 0
    last_failure: str = ""
    waited: float = 0.0


@dataclass(slots=True)
class _Attempt:
    """`extfs.layout.fencing.Attempt`."""

    number: int
    issued_before: bool

    async def issued(self) -> None:
        """Remember it."""
        self.issued_before = True
        await trio.lowlevel.checkpoint()


def _described(holder: HolderRecord) -> str:
    spec = holder.spec
    named = f" {spec.name!r}" if spec.name else ""
    where = f", {spec.fence}" if spec.fence else ""
    return f"holder {holder.id}{named} (process {spec.pid}, user {spec.uid}{where})"


class Fencing:
    """The fences of one mounted filesystem. `run` is its task.

    `grace`: seconds that a holder which a restart made lost has for coming back, before a driver
    that harms is called. `on_event` is called with the events that are not for fencing, and with
    OVERFLOW: some of its own may be among the lost ones.
    """

    def __init__(
        self,
        table: HolderTable,
        driver: FenceDriver,
        *,
        grace: float = 0.0,
        on_event: Callable[[LayoutEvent], None] = lambda event: None,
    ) -> None:
        self._table = table
        self._driver = driver
        self._grace = grace
        self._on_event = on_event
        self._tasks: dict[int, trio.CancelScope] = {}
        self._status: dict[int, FenceStatus] = {}
        self._nursery: trio.Nursery | None = None
        self._clock: trio.abc.Clock | None = None
        self._restarted: set[int] = set()
        self._grace_ends = 0.0

    @property
    def driver(self) -> str:
        """Name of the driver."""
        return self._driver.name

    def waiting(self) -> list[FenceStatus]:
        """Fences that are not confirmed yet, by holder. From any thread."""
        if self._clock is None:
            return []
        now = self._clock.current_time()
        found = [
            replace(status, waited=now - status.since) for status in list(self._status.values())
        ]
        return sorted(found, key=lambda status: status.holder)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._clock = trio.lowlevel.current_clock()
            self._grace_ends = trio.current_time() + self._grace
            self._restarted = {h.id for h in self._table.holders() if h.state is HolderState.LOST}
            self._take_events()
            self._rescan()
            while True:
                await self._table.wait_events()
                self._take_events()

    # -- events --

    def _take_events(self) -> None:
        """Read all events and act on them. Synchronous: see the module's text."""
        for event in self._table.events():
            if event.type is EventType.FENCE_WANTED:
                self._start(event.holder)
            elif event.type is EventType.HOLDER_GONE:
                self._stop(event.holder)
            elif event.type is EventType.OVERFLOW:
                log.info("%d layout events were lost; looking at all holders", event.length)
                self._rescan()
                self._on_event(event)
            else:
                self._on_event(event)

    def _rescan(self) -> None:
        lost = [h.id for h in self._table.holders() if h.state is HolderState.LOST]
        for holder in lost:
            self._start(holder)
        for holder in self._tasks.keys() - set(lost):
            self._stop(holder)

    def _stop(self, holder: int) -> None:
        scope = self._tasks.pop(holder, None)
        self._status.pop(holder, None)
        if scope is not None:
            scope.cancel()

    def _start(self, holder: int) -> None:
        """Begin, or begin anew."""
        assert self._nursery is not None
        self._stop(holder)
        scope = trio.CancelScope()
        self._tasks[holder] = scope
        self._status[holder] = FenceStatus(holder, trio.current_time())
        self._nursery.start_soon(self._guarded, holder, scope)

    # -- one holder --

    async def _guarded(self, holder: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                if not scope.cancel_called:
                    await self._fence(holder, scope)
        finally:
            if self._tasks.get(holder) is scope:
                self._stop(holder)

    async def _fence(self, number: int, scope: trio.CancelScope) -> None:
        begin = trio.current_time()
        holder = self._lost(number)
        if holder is None:
            return
        log.info("%s is lost: fence wanted, by %s", _described(holder), self._driver.name)
        if self._driver.harms and number in self._restarted and begin < self._grace_ends:
            await self._while_lost(number, trio.sleep, self._grace_ends - begin)
        pause = FIRST_PAUSE
        while (holder := self._lost(number)) is not None:
            self._status[number].attempts += 1
            outcome = await self._while_lost(number, self._attempt, holder)
            if outcome is None:
                break
            seconds = trio.current_time() - begin
            if outcome.verdict is Verdict.FAILED:
                self._tell_failure(holder, outcome, seconds)
            elif await self._confirm(number, scope):
                log.info(
                    "%s is fenced, confirmed by %s after %.3f s: %s",
                    _described(holder),
                    self._driver.name,
                    seconds,
                    outcome.detail,
                )
                return
            await self._while_lost(number, trio.sleep, pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._restarted.discard(number)
        log.info("holder %d needs no fence any more", number)

    async def _attempt(self, holder: HolderRecord) -> Outcome:
        try:
            attempt = _Attempt(self._status[holder.id].attempts, False)
            return await self._driver.fence(holder, attempt)
        except Exception as error:
            log.exception("fence driver %s", self._driver.name)
            return Outcome.failed(f"{type(error).__name__}: {error}")

    def _tell_failure(self, holder: HolderRecord, outcome: Outcome, seconds: float) -> None:
        """A warning for the first one, a line for each that has another reason."""
        status = self._status[holder.id]
        if outcome.detail != status.last_failure:
            log.log(
                logging.INFO if status.last_failure else logging.WARNING,
                "%s is not fenced, attempt %d by %s after %.3f s: %s; it goes on",
                _described(holder),
                status.attempts,
                self._driver.name,
                seconds,
                outcome.detail,
            )
        status.last_failure = outcome.detail

    def _lost(self, number: int) -> HolderRecord | None:
        holder = self._table.holder(number)
        return holder if holder is not None and holder.state is HolderState.LOST else None

    async def _while_lost(
        self, number: int, call: Callable[[_A], Awaitable[_T]], argument: _A
    ) -> _T | None:
        """The call's result; None, and the call is cancelled, when the holder has come back."""
        result: _T | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while self._lost(number) is not None:  # noqa: ASYNC110 - no event tells it
                    await trio.sleep(CHECK_SECONDS)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            result = await call(argument)
            nursery.cancel_scope.cancel()
        return result

    async def _confirm(self, number: int, scope: trio.CancelScope) -> bool:
        """Tell the core, unless the confirmation is about an earlier life of the holder."""
        while True:
            self._take_events()
            if self._tasks.get(number) is not scope:
                return False  # cancelled: the next await ends this task
            try:
                self._table.fenced(number)
            except JournalFullError:
                await self._table.wait_space()
            except CoreError as error:
                if error.errno == errno.ENOENT:
                    return True  # somebody else confirmed
                if error.errno != errno.EBUSY:
                    log.error("holder %d: telling that it is fenced: %s", number, error.text)
                return False
            else:
                return True
