"""Decides when a lost holder is fenced, and tells the core when it was.

The core revokes by itself: it takes ranges back at the deadline of a recall and puts what the
holder can still reach into the quarantine. What is left to decide is when the quarantine may be
emptied. For every lost holder there is one task here, which runs its fence driver until that
confirms, with a growing pause between attempts.

    wanted --grace, after a restart--> [decided, durable] --> attempt --> confirmed, the core knows
                                            ^  [issued, durable, then harm]  |
                                            +------ pause <---- failed ------+

What stands in brackets is of drivers that harm. A holder whose fence is decided does not come back
(native/fence.h), so after a restart its fence goes on at once.

A confirmation is about what the holder did *before* it. When the core says FENCE_WANTED anew, the
holder has spoken and been lost again in between, so the task starts over; and a confirmation counts
only if, with all events read, no such event has come. A new await between these two steps in
`Fencing._confirm` would break that. Once the fence is decided there is no such thing, and an
attempt that may be doing harm is not disturbed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import trio

from extfs.core import (
    CoreError,
    EventType,
    FenceRecord,
    FenceState,
    HolderRecord,
    HolderState,
    JournalFullError,
    LayoutEvent,
    LostCause,
)
from extfs.layout.fencing import FenceDriver, FenceOverError, Outcome, Verdict

__all__ = ["FenceStatus", "Fencing", "HolderTable", "PastFence"]

log = logging.getLogger("extfs")

_T = TypeVar("_T")
_A = TypeVar("_A")

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
CHECK_SECONDS = 5.0
"""How often a running attempt looks whether its holder has come back."""
HISTORY_MAX = 256

_CAUSES = {
    LostCause.NOT: "",
    LostCause.RECALL: ", it did not answer a recall",
    LostCause.ENDED: ", it ended with layouts",
    LostCause.MOUNT: ", it was there before the mount",
}


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

    def fences(self) -> list[FenceRecord]:
        """Those with a record."""
        ...

    async def fence_put(self, holder: int, state: FenceState, tries: int) -> None:
        """Make durable how far a fence is. ENOENT; EBUSY: the holder is live; EINVAL; EIO."""
        ...

    def fenced(self, holder: int) -> None:
        """Tell that it is cut off. ENOENT; EBUSY: it is live; `JournalFullError`: not yet."""
        ...

    async def wait_space(self) -> None:
        """Until the journal has room."""
        ...


@dataclass(slots=True)
class FenceStatus:
    """The fence of one lost holder.

    `cause`, `name`, `fence`: of the holder. `state`: "waiting" (nothing is decided), "decided",
    "issued" or "failed". `begun`: seconds since the epoch; of one with a record, when it was
    decided. `waited`: seconds since then, when asked. `attempts`: those of before a restart, too.
    """

    holder: int
    cause: LostCause
    name: str
    fence: str
    driver: str
    begun: float
    state: str = "waiting"
    attempts: int = 0
    last_failure: str = ""
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class PastFence:
    """A fence that is over.

    `outcome`: "confirmed"; "confirmed elsewhere": by hand, say; "returned": it had nothing any
    more; "came back"; "gone": the events that would say how it ended were lost.
    """

    holder: int
    cause: LostCause
    name: str
    fence: str
    driver: str
    begun: float
    seconds: float
    attempts: int
    outcome: str
    detail: str


def _described(holder: HolderRecord) -> str:
    spec = holder.spec
    named = f" {spec.name!r}" if spec.name else ""
    where = f", {spec.fence}" if spec.fence else ""
    return f"holder {holder.id}{named} (process {spec.pid}, user {spec.uid}{where})"


class _Attempt:
    """`extfs.layout.fencing.Attempt`."""

    def __init__(self, number: int, issued_before: bool, issue: Callable[[], Awaitable[None]]):
        self.number = number
        self.issued_before = issued_before
        self.is_issued = False
        self._issue = issue

    async def issued(self) -> None:
        """See there."""
        if not self.is_issued:
            await self._issue()
            self.is_issued = True


class _Fence:
    """The task of one lost holder; `since` on trio's clock."""

    def __init__(self, holder: HolderRecord, driver: FenceDriver, record: FenceRecord | None):
        self.number = holder.id
        self.driver = driver
        self.scope = trio.CancelScope()
        self.record = record
        now = time.time()
        self.since = trio.current_time()
        self.status = FenceStatus(
            holder.id,
            holder.cause,
            holder.spec.name,
            holder.spec.fence,
            driver.name,
            now if record is None else record.decided,
            "waiting" if record is None else record.state.name.lower(),
            0 if record is None else record.tries,
        )
        # A record says whole seconds, of a clock that may have been set since.
        self._earlier = 0.0 if record is None else max(0.0, now - record.decided)

    @property
    def was_issued(self) -> bool:
        return self.record is not None and self.record.state is not FenceState.DECIDED

    def seconds(self, now: float) -> float:
        """Since it began; `now` on trio's clock."""
        return self._earlier + now - self.since

    def recorded(self, state: FenceState, tries: int) -> None:
        decided = int(self.status.begun) if self.record is None else self.record.decided
        self.record = FenceRecord(self.number, state, tries, decided)
        self.status.state = state.name.lower()


class Fencing:
    """The fences of one mounted filesystem. `run` is its task.

    `driver` fences all holders but those whose `HolderSpec.fence` begins with a scheme of
    `schemes`, "scsi:..." say: these have that scheme's driver. `grace`: seconds that a holder which
    a restart made lost has for coming back, before a driver that harms is called. `on_event` is
    called with the events that are not for fencing, with HOLDER_GONE, and with OVERFLOW: some of
    its own may be among the lost ones.
    """

    def __init__(
        self,
        table: HolderTable,
        driver: FenceDriver,
        *,
        schemes: Mapping[str, FenceDriver] | None = None,
        grace: float = 0.0,
        on_event: Callable[[LayoutEvent], None] = lambda event: None,
    ) -> None:
        self._table = table
        self._driver = driver
        self._schemes = dict(schemes or {})
        self._grace = grace
        self._on_event = on_event
        self._fences: dict[int, _Fence] = {}
        self._history: deque[PastFence] = deque(maxlen=HISTORY_MAX)
        self._nursery: trio.Nursery | None = None
        self._clock: trio.abc.Clock | None = None
        self._restarted: set[int] = set()
        self._records: dict[int, FenceRecord] = {}
        """Of before the start, of holders whose task has not begun."""
        self._grace_ends = 0.0

    @property
    def driver(self) -> str:
        """Name of the driver of those who are in no scheme."""
        return self._driver.name

    def waiting(self) -> list[FenceStatus]:
        """Fences that are not confirmed yet, by holder. From any thread."""
        if self._clock is None:
            return []
        now = self._clock.current_time()
        found = [
            replace(fence.status, waited=fence.seconds(now))
            for fence in list(self._fences.values())
        ]
        return sorted(found, key=lambda status: status.holder)

    def history(self) -> list[PastFence]:
        """The last `HISTORY_MAX` that are over, oldest first. From any thread."""
        return list(self._history)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._clock = trio.lowlevel.current_clock()
            self._grace_ends = trio.current_time() + self._grace
            self._restarted = {h.id for h in self._table.holders() if h.state is HolderState.LOST}
            self._records = {record.holder: record for record in self._table.fences()}
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
                self._gone(event.holder, fenced=event.length == 1)
                self._on_event(event)
            elif event.type is EventType.OVERFLOW:
                log.info("%d layout events were lost; looking at all holders", event.length)
                self._rescan()
                self._on_event(event)
            else:
                self._on_event(event)

    def _rescan(self) -> None:
        lost = [h.id for h in self._table.holders() if h.state is HolderState.LOST]
        for number in lost:
            self._start(number)
        for number in self._fences.keys() - set(lost):
            there = self._table.holder(number)
            came_back = there is not None and there.state is HolderState.LIVE
            self._end(self._fences[number], "came back" if came_back else "gone", "")

    def _gone(self, number: int, *, fenced: bool) -> None:
        fence = self._fences.get(number)
        if fence is not None:
            self._end(fence, "confirmed elsewhere" if fenced else "returned", "")

    def _end(self, fence: _Fence, outcome: str, detail: str) -> None:
        """The task ends, and is remembered; once."""
        if self._fences.get(fence.number) is not fence:
            return
        del self._fences[fence.number]
        self._restarted.discard(fence.number)
        fence.scope.cancel()
        status = fence.status
        seconds = fence.seconds(trio.current_time())
        log.info(
            "holder %d%s: its fence by %s is over after %.3f s, attempts %d: %s%s",
            status.holder,
            f" {status.name!r}" if status.name else "",
            status.driver,
            seconds,
            status.attempts,
            outcome,
            f", {detail}" if detail else "",
        )
        self._history.append(
            PastFence(
                status.holder,
                status.cause,
                status.name,
                status.fence,
                status.driver,
                status.begun,
                seconds,
                status.attempts,
                outcome,
                detail,
            )
        )

    def _start(self, number: int) -> None:
        """Begin, or begin anew; one that is decided goes on."""
        assert self._nursery is not None
        old = self._fences.get(number)
        if old is not None:
            if old.record is not None:
                return
            del self._fences[number]
            old.scope.cancel()
        holder = self._lost(number)
        if holder is None:
            return
        scheme = holder.spec.fence.partition(":")[0]
        driver = self._schemes.get(scheme, self._driver)
        fence = _Fence(holder, driver, self._records.pop(number, None))
        self._fences[number] = fence
        self._nursery.start_soon(self._guarded, fence)

    # -- one holder --

    async def _guarded(self, fence: _Fence) -> None:
        with fence.scope:
            if not fence.scope.cancel_called:
                await self._fence(fence)

    async def _fence(self, fence: _Fence) -> None:
        number = fence.number
        if (holder := self._lost(number)) is not None:
            log.info(
                "%s is lost%s: fence %s, by %s",
                _described(holder),
                _CAUSES[holder.cause],
                "wanted" if fence.record is None else f"goes on, it was {fence.status.state}",
                fence.driver.name,
            )
        grace = self._grace_ends - trio.current_time()
        if fence.driver.harms and fence.record is None and number in self._restarted and grace > 0:
            await self._while_lost(number, trio.sleep, grace)
        pause = FIRST_PAUSE
        while (holder := self._lost(number)) is not None:
            outcome = await self._while_lost(number, self._attempt, (fence, holder))
            if outcome is None:
                break
            if outcome.verdict is Verdict.FAILED and self._needless(fence):
                outcome = Outcome.confirmed("it was not harmed, and has returned everything")
            if outcome.verdict is Verdict.FAILED:
                self._tell_failure(fence, holder, outcome)
                await self._record_failure(fence)
            elif await self._confirm(fence):
                self._end(fence, "confirmed", outcome.detail)
                return
            await self._while_lost(number, trio.sleep, pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        there = self._table.holder(number)
        came_back = there is not None and there.state is HolderState.LIVE
        self._end(fence, "came back" if came_back else "gone", "")

    def _needless(self, fence: _Fence) -> bool:
        """It can end without its driver: as a return ends a loss that nothing was decided about.

        `returned` is not durable. After a restart such a holder counts as one that has returned
        nothing, so it is fenced or waits for a person: longer than need be, never less.
        """
        holder = self._lost(fence.number)
        return holder is not None and holder.returned and not fence.was_issued

    async def _attempt(self, of: tuple[_Fence, HolderRecord]) -> Outcome | None:
        """One call of the driver. None: the holder is not to be fenced any more."""
        fence, holder = of
        fence.status.attempts += 1
        try:
            if fence.driver.harms and fence.record is None:
                await self._put(fence, FenceState.DECIDED)
            attempt = _Attempt(
                fence.status.attempts,
                fence.was_issued,
                lambda: self._put(fence, FenceState.ISSUED),
            )
            return await fence.driver.fence(holder, attempt)
        except FenceOverError:
            return None
        except CoreError as error:
            return Outcome.failed(f"its fence cannot be recorded: {error.text}")
        except Exception as error:
            log.exception("fence driver %s", fence.driver.name)
            return Outcome.failed(f"{type(error).__name__}: {error}")

    async def _put(self, fence: _Fence, state: FenceState) -> None:
        """Make the state durable. `FenceOverError`: the holder is gone or live."""
        tries = fence.status.attempts
        try:
            await self._table.fence_put(fence.number, state, tries)
        except CoreError as error:
            if error.errno in (errno.ENOENT, errno.EBUSY):
                raise FenceOverError(error.text) from error
            raise
        fence.recorded(state, tries)

    async def _record_failure(self, fence: _Fence) -> None:
        """Count it on disk. What cannot be counted is not: the fence goes on all the same."""
        if fence.record is None or not fence.driver.harms:
            return
        try:
            await self._put(fence, FenceState.FAILED if fence.was_issued else FenceState.DECIDED)
        except FenceOverError:
            pass  # the loop sees it
        except CoreError as error:
            log.debug("holder %d: a failed fence is not counted: %s", fence.number, error.text)

    def _tell_failure(self, fence: _Fence, holder: HolderRecord, outcome: Outcome) -> None:
        """A warning for the first one, a line for each that has another reason."""
        status = fence.status
        if outcome.detail != status.last_failure:
            log.log(
                logging.INFO if status.last_failure else logging.WARNING,
                "%s is not fenced, attempt %d by %s after %.3f s: %s; it goes on",
                _described(holder),
                status.attempts,
                fence.driver.name,
                fence.seconds(trio.current_time()),
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

    async def _confirm(self, fence: _Fence) -> bool:
        """Tell the core, unless the confirmation is about an earlier life of the holder."""
        while True:
            self._take_events()
            if self._fences.get(fence.number) is not fence:
                return False  # cancelled: the next await ends this task
            try:
                self._table.fenced(fence.number)
            except JournalFullError:
                if not await self._have_space(fence):
                    return False
            except CoreError as error:
                if error.errno == errno.ENOENT:
                    return True  # somebody else confirmed
                if error.errno != errno.EBUSY:
                    log.error("holder %d: telling that it is fenced: %s", fence.number, error.text)
                return False
            else:
                return True

    async def _have_space(self, fence: _Fence) -> bool:
        """Wait for room in the journal. False: there will be none; the filesystem is shut down."""
        try:
            await self._table.wait_space()
        except CoreError as error:
            log.error("holder %d: telling that it is fenced: %s", fence.number, error.text)
            return False
        return True
