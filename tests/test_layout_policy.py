"""Who is fenced, when, by what: the policy on a table of fake holders, on trio's virtual clock."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from extfs.core import (
    CoreError,
    EventType,
    FenceRecord,
    FenceState,
    HolderRecord,
    HolderSpec,
    HolderState,
    JournalFullError,
    LayoutEvent,
    LostCause,
)
from extfs.layout import (
    Attempt,
    Fencing,
    NoFence,
    Outcome,
    policy,
)

GRACE = 10.0


def record(number: int = 1, state: HolderState = HolderState.LOST, **spec: object) -> HolderRecord:
    return HolderRecord(number, state, HolderSpec(**spec), 1, 2, 3, 1)  # type: ignore[arg-type]


def event(kind: EventType, holder: int = 0, length: int = 0) -> LayoutEvent:
    return LayoutEvent(kind, 1, holder, 0, 0, 0, 0, length, 0, 0)


class FakeTable:
    """Holders without a core. `fenced` ends a lost holder, as the core does."""

    def __init__(self, *holders: HolderRecord) -> None:
        self.all = {holder.id: holder for holder in holders}
        self.pending: list[LayoutEvent] = []
        self.confirmed: list[tuple[int, float]] = []
        self.refuse: list[CoreError] = []
        self.waits = 0
        self.records: dict[int, FenceRecord] = {}
        self.puts: list[tuple[int, FenceState, int, float]] = []
        self.refuse_puts: list[CoreError] = []
        self.put_seconds = 0.0
        self._come = trio.Event()

    def post(self, *events: LayoutEvent) -> None:
        self.pending += events
        self._come.set()

    def lose(self, number: int) -> None:
        self.all[number] = dataclasses.replace(self.all[number], state=HolderState.LOST)
        self.post(event(EventType.FENCE_WANTED, number))

    def revive(self, number: int) -> None:
        assert number not in self.records, "the core would refuse it"
        self.all[number] = dataclasses.replace(self.all[number], state=HolderState.LIVE)

    def events(self) -> list[LayoutEvent]:
        events, self.pending = self.pending, []
        if self._come.is_set():
            self._come = trio.Event()
        return events

    def holders(self) -> list[HolderRecord]:
        return [self.all[number] for number in sorted(self.all)]

    def holder(self, holder: int) -> HolderRecord | None:
        return self.all.get(holder)

    async def wait_events(self) -> None:
        await self._come.wait()

    def fences(self) -> list[FenceRecord]:
        return [self.records[number] for number in sorted(self.records)]

    async def fence_put(self, holder: int, state: FenceState, tries: int) -> None:
        """As the core: a step that does not follow is refused; durable at the return."""
        await trio.sleep(self.put_seconds)
        if self.refuse_puts:
            raise self.refuse_puts.pop(0)
        found = self.all.get(holder)
        if found is None:
            raise CoreError(-errno.ENOENT)
        if found.state is not HolderState.LOST:
            raise CoreError(-errno.EBUSY)
        old = self.records.get(holder)
        before = None if old is None else old.state
        if state is FenceState.DECIDED:
            assert before in (None, FenceState.DECIDED)
        elif state is FenceState.ISSUED:
            assert before is not None
        else:
            assert before in (FenceState.ISSUED, FenceState.FAILED)
        assert old is None or tries >= old.tries
        self.records[holder] = FenceRecord(holder, state, tries, 1000)
        self.puts.append((holder, state, tries, trio.current_time()))

    def fenced(self, holder: int) -> None:
        if self.refuse:
            raise self.refuse.pop(0)
        found = self.all.get(holder)
        if found is None:
            raise CoreError(-errno.ENOENT)
        if found.state is not HolderState.LOST:
            raise CoreError(-errno.EBUSY)
        self.confirmed.append((holder, trio.current_time()))
        del self.all[holder]
        self.records.pop(holder, None)
        self.post(event(EventType.HOLDER_GONE, holder, length=1))

    async def wait_space(self) -> None:
        self.waits += 1
        await trio.sleep(1)


class Script:
    """A driver that does what the test says; the last step repeats."""

    name = "script"

    def __init__(
        self, *steps: Callable[[HolderRecord], Awaitable[Outcome]], harms: bool = False
    ) -> None:
        self.steps = list(steps)
        self.harms = harms
        self.calls: list[tuple[int, float]] = []
        self.cancelled = 0

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        self.calls.append((holder.id, trio.current_time()))
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        try:
            return await step(holder)
        except trio.Cancelled:
            self.cancelled += 1
            raise


async def yes(holder: HolderRecord) -> Outcome:
    await trio.lowlevel.checkpoint()
    return Outcome.confirmed("seen")


async def no(holder: HolderRecord) -> Outcome:
    await trio.lowlevel.checkpoint()
    return Outcome.failed("refused")


async def never(holder: HolderRecord) -> Outcome:
    await trio.sleep_forever()
    raise AssertionError


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


async def run_for(
    fencing: Fencing, seconds: float, *script: tuple[float, Callable[[], None]]
) -> None:
    """Let the policy run, with things that happen at given times."""
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fencing.run)
        for moment, act in script:
            await trio.sleep(begin + moment - trio.current_time())
            act()
        await trio.sleep(begin + seconds - trio.current_time())
        nursery.cancel_scope.cancel()


# ---- the policy --------------------------------------------------------------------------------


async def test_a_lost_holder_is_fenced_and_the_core_is_told(
    clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "extfs")
    table = FakeTable(record(7, HolderState.LIVE, name="writer", pid=42, uid=3))
    driver = Script(yes)
    await run_for(Fencing(table, driver), 10, (4, lambda: table.lose(7)))
    assert table.confirmed == [(7, 4.0)]
    assert driver.calls == [(7, 4.0)]
    text = caplog.text
    assert "holder 7 'writer' (process 42, user 3) is lost: fence wanted, by script" in text
    over = "its fence by script is over after 0.000 s, attempts 1: confirmed, seen"
    assert f"holder 7 'writer': {over}" in text
    assert text.count("is lost") == 1


async def test_nobody_else_is_fenced(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1, HolderState.LIVE), record(2, HolderState.LIVE), record(3))
    await run_for(Fencing(table, Script(yes)), 10)
    assert [holder for holder, _ in table.confirmed] == [3]
    assert sorted(table.all) == [1, 2]


@pytest.mark.expect_log("is not fenced, attempt 1 by script after 0.000 s: refused")
async def test_attempts_are_repeated_with_growing_pauses(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(5))
    driver = Script(no)
    fencing = Fencing(table, driver)
    await run_for(fencing, 400)
    times = [moment for _, moment in driver.calls]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not table.confirmed


@pytest.mark.expect_log("refused")
async def test_what_failed_is_told_and_forgotten(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(5))
    fencing = Fencing(table, Script(no, no, no, yes))
    seen: list[list[policy.FenceStatus]] = []
    await run_for(
        fencing,
        20,
        (2, lambda: seen.append(fencing.waiting())),
        (15, lambda: seen.append(fencing.waiting())),
    )
    ((status,), after) = seen
    assert (status.holder, status.attempts, status.waited) == (5, 2, 2.0)
    assert fencing.driver == "script"
    assert status.last_failure == "refused"
    assert after == []
    assert table.confirmed == [(5, 7.0)]


@pytest.mark.expect_log("fence driver script", "ValueError: broken")
async def test_a_driver_that_raises_failed(clock: trio.testing.MockClock) -> None:
    async def broken(holder: HolderRecord) -> Outcome:
        raise ValueError("broken")

    table = FakeTable(record(5))
    await run_for(Fencing(table, Script(broken, yes)), 20)
    assert table.confirmed == [(5, 1.0)]


async def test_after_a_restart_holders_may_come_back_before_they_are_harmed(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1), record(2), record(3, HolderState.LIVE))
    # The core says FENCE_WANTED for each at the mount; it must not undo the grace.
    table.post(event(EventType.FENCE_WANTED, 1))
    driver = Script(yes, harms=True)
    await run_for(
        Fencing(table, driver, grace=GRACE),
        30,
        (1, lambda: table.post(event(EventType.FENCE_WANTED, 2))),
        (2, lambda: table.revive(1)),
        (3, lambda: table.lose(3)),  # this one was here: no grace
        (4, lambda: None),
    )
    assert driver.calls == [(3, 3.0), (2, GRACE)]
    assert sorted(table.all) == [1]


async def test_one_that_came_back_and_is_lost_again_has_no_grace(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1))
    driver = Script(yes, harms=True)
    await run_for(
        Fencing(table, driver, grace=100),
        200,
        (1, lambda: table.revive(1)),
        (20, lambda: table.lose(1)),
    )
    assert driver.calls == [(1, 20.0)]


async def test_looking_needs_no_grace(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    await run_for(Fencing(table, Script(yes), grace=GRACE), 30)
    assert table.confirmed == [(1, 0.0)]


async def test_a_holder_that_comes_back_is_let_alone(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    driver = Script(never)
    fencing = Fencing(table, driver)
    await run_for(fencing, 60, (3, lambda: table.revive(1)), (20, lambda: None))
    assert driver.cancelled == 1
    assert len(driver.calls) == 1
    assert not table.confirmed
    assert fencing.waiting() == []


async def test_a_confirmation_of_an_earlier_life_does_not_count(
    clock: trio.testing.MockClock,
) -> None:
    """While the driver looked, the holder came back, did I/O, and was lost anew."""
    table = FakeTable(record(1))

    async def meanwhile(holder: HolderRecord) -> Outcome:
        await trio.sleep(1)
        # Unread when the driver answers: the policy has to look before it believes.
        table.pending.append(event(EventType.FENCE_WANTED, 1))
        return Outcome.confirmed("stale")

    async def later(holder: HolderRecord) -> Outcome:
        await trio.sleep(3)
        return Outcome.confirmed("true")

    driver = Script(meanwhile, later)
    await run_for(Fencing(table, driver), 20)
    assert [moment for _, moment in driver.calls] == [0.0, 1.0]
    assert table.confirmed == [(1, 4.0)]


async def test_somebody_else_confirms(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    fencing = Fencing(table, NoFence())
    waiting: list[int] = []
    await run_for(
        fencing,
        60,
        (5, lambda: waiting.append(len(fencing.waiting()))),
        (6, lambda: table.fenced(1)),
        (7, lambda: waiting.append(len(fencing.waiting()))),
    )
    assert table.confirmed == [(1, 6.0)]
    assert waiting == [1, 0]


async def test_lost_events_make_it_look_at_everybody(clock: trio.testing.MockClock) -> None:
    table = FakeTable(*[record(number, HolderState.LIVE) for number in range(1, 6)])

    def overflow() -> None:
        for number in (2, 4):
            table.all[number] = dataclasses.replace(table.all[number], state=HolderState.LOST)
        table.post(event(EventType.OVERFLOW, length=900))

    await run_for(Fencing(table, Script(yes)), 10, (1, overflow))
    assert sorted(table.confirmed) == [(2, 1.0), (4, 1.0)]


async def test_a_full_journal_is_waited_for(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    table.refuse = [JournalFullError(-errno.EAGAIN)] * 2
    await run_for(Fencing(table, Script(yes)), 10)
    assert (table.waits, table.confirmed) == (2, [(1, 2.0)])


@pytest.mark.expect_log("holder 1: telling that it is fenced")
async def test_a_core_that_fails_is_told_again(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    table.refuse = [CoreError(-errno.EIO)]
    await run_for(Fencing(table, Script(yes)), 10)
    assert table.confirmed == [(1, 1.0)]


async def test_many_lost_holders_are_fenced_side_by_side(clock: trio.testing.MockClock) -> None:
    async def slow(holder: HolderRecord) -> Outcome:
        await trio.sleep(2)
        return Outcome.confirmed("")

    table = FakeTable(*[record(number) for number in range(1, 301)])
    await run_for(Fencing(table, Script(slow)), 10)
    assert {moment for _, moment in table.confirmed} == {2.0}
    assert len(table.confirmed) == 300


async def test_other_events_are_passed_on(clock: trio.testing.MockClock) -> None:
    table = FakeTable()
    seen: list[LayoutEvent] = []
    told = [
        event(EventType.RECALL, 9),
        event(EventType.OVERFLOW, length=3),
        event(EventType.HOLDER_GONE, 9, length=1),
    ]
    fencing = Fencing(table, NoFence(), on_event=seen.append)
    await run_for(fencing, 5, *((1, lambda one=one: table.post(one)) for one in told))
    assert seen == told


# ---- records of fences -------------------------------------------------------------------------


def put_states(table: FakeTable) -> list[tuple[int, FenceState, int]]:
    return [(holder, state, tries) for holder, state, tries, _moment in table.puts]


class Harming(Script):
    """Says that it begins, and what was on disk then; then does a step of the script."""

    def __init__(self, table: FakeTable, *steps: Callable[[HolderRecord], Awaitable[Outcome]]):
        super().__init__(*steps, harms=True)
        self.table = table
        self.told: list[tuple[int, bool]] = []
        self.at_call: list[FenceState | None] = []
        self.at_harm: list[FenceState] = []

    def state(self, holder: HolderRecord) -> FenceState | None:
        found = self.table.records.get(holder.id)
        return None if found is None else found.state

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        self.told.append((attempt.number, attempt.issued_before))
        self.at_call.append(self.state(holder))
        await attempt.issued()
        await attempt.issued()  # harmless
        state = self.state(holder)
        assert state is not None
        self.at_harm.append(state)
        return await super().fence(holder, attempt)


async def test_decided_is_durable_before_the_driver_and_issued_before_the_harm(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1))
    table.put_seconds = 0.5
    driver = Harming(table, yes)
    await run_for(Fencing(table, driver), 10)
    assert driver.at_call == [FenceState.DECIDED]
    assert driver.at_harm == [FenceState.ISSUED]
    assert put_states(table) == [(1, FenceState.DECIDED, 1), (1, FenceState.ISSUED, 1)]
    assert table.confirmed == [(1, 1.0)]
    assert table.records == {}


@pytest.mark.expect_log("is not fenced")
async def test_a_driver_that_looks_leaves_no_record(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    await run_for(Fencing(table, Script(no, yes)), 10)
    assert table.confirmed == [(1, 1.0)]
    assert table.puts == []


@pytest.mark.expect_log("is not fenced, attempt 1 by script")
async def test_failures_are_counted_on_disk(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    driver = Harming(table, no, no, yes)
    await run_for(Fencing(table, driver), 10)
    assert driver.told == [(1, False), (2, True), (3, True)]
    assert put_states(table) == [
        (1, FenceState.DECIDED, 1),
        (1, FenceState.ISSUED, 1),
        (1, FenceState.FAILED, 1),
        (1, FenceState.ISSUED, 2),
        (1, FenceState.FAILED, 2),
        (1, FenceState.ISSUED, 3),
    ]


@pytest.mark.expect_log("no such target")
async def test_what_fails_before_the_harm_was_not_issued(clock: trio.testing.MockClock) -> None:
    class Careful(Harming):
        async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
            if attempt.number < 3:
                assert not attempt.issued_before
                return Outcome.failed("no such target")
            return await super().fence(holder, attempt)

    table = FakeTable(record(1))
    await run_for(Fencing(table, Careful(table, yes)), 10)
    assert put_states(table) == [
        (1, FenceState.DECIDED, 1),
        (1, FenceState.DECIDED, 1),
        (1, FenceState.DECIDED, 2),
        (1, FenceState.ISSUED, 3),
    ]


@pytest.mark.parametrize("state", list(FenceState))
async def test_after_a_restart_what_was_decided_goes_on_at_once(
    clock: trio.testing.MockClock, state: FenceState
) -> None:
    table = FakeTable(record(1), record(2))
    table.records[1] = FenceRecord(1, state, 4, 1000)
    driver = Harming(table, yes)
    await run_for(Fencing(table, driver, grace=GRACE), 30)
    assert table.confirmed == [(1, 0.0), (2, GRACE)]
    assert driver.told == [(5, state is not FenceState.DECIDED), (1, False)]
    assert put_states(table)[0] == (1, FenceState.ISSUED, 5), "decided is not written again"


async def test_what_is_decided_is_not_disturbed(clock: trio.testing.MockClock) -> None:
    """FENCE_WANTED anew, or lost events, do not cancel an attempt that may be doing harm."""

    async def slow(holder: HolderRecord) -> Outcome:
        await trio.sleep(5)
        return Outcome.confirmed("")

    table = FakeTable(record(1))
    driver = Harming(table, slow)
    await run_for(
        Fencing(table, driver),
        20,
        (1, lambda: table.post(event(EventType.FENCE_WANTED, 1))),
        (2, lambda: table.post(event(EventType.OVERFLOW, length=9))),
    )
    assert driver.cancelled == 0
    assert len(driver.calls) == 1
    assert table.confirmed == [(1, 5.0)]


@pytest.mark.expect_log("its fence cannot be recorded: ")
async def test_no_harm_without_a_record(clock: trio.testing.MockClock) -> None:
    table = FakeTable(record(1))
    table.refuse_puts = [CoreError(-errno.EIO)] * 2
    driver = Harming(table, yes)
    await run_for(Fencing(table, driver), 20)
    assert driver.calls == [(1, 3.0)]
    assert table.confirmed == [(1, 3.0)]


@pytest.mark.expect_log("its fence cannot be recorded: ")
async def test_no_harm_when_it_cannot_be_recorded_that_it_begins(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1))

    class Refusing(Harming):
        async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
            if attempt.number == 1:
                table.refuse_puts = [CoreError(-errno.EIO)]
            return await super().fence(holder, attempt)

    driver = Refusing(table, yes)
    await run_for(Fencing(table, driver), 20)
    assert driver.calls == [(1, 1.0)], "the script stands behind the record"
    assert table.confirmed == [(1, 1.0)]


async def test_one_that_came_back_before_it_was_decided_is_not_harmed(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1))
    table.put_seconds = 2
    driver = Harming(table, yes)
    fencing = Fencing(table, driver)
    await run_for(fencing, 20, (1, lambda: table.revive(1)))
    assert driver.calls == []
    assert driver.told == []
    assert [past.outcome for past in fencing.history()] == ["came back"]


async def test_one_that_is_fenced_by_hand_meanwhile_is_not_harmed(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(record(1))
    table.put_seconds = 2
    driver = Harming(table, yes)
    fencing = Fencing(table, driver)
    await run_for(fencing, 20, (3, lambda: table.fenced(1)))
    assert driver.told == [(1, False)]
    assert driver.calls == [], "it was decided, and gone before it was issued"
    assert [past.outcome for past in fencing.history()] == ["confirmed elsewhere"]


@pytest.mark.expect_log("refused")
async def test_a_fence_that_fails_blocks_nobody_else(clock: trio.testing.MockClock) -> None:
    async def stuck(holder: HolderRecord) -> Outcome:
        if holder.id == 1:
            return Outcome.failed("refused")
        if holder.id == 2:
            await trio.sleep_forever()
        return Outcome.confirmed("")

    table = FakeTable(*[record(number) for number in range(1, 51)])
    await run_for(Fencing(table, Harming(table, stuck)), 100)
    assert {moment for _, moment in table.confirmed} == {0.0}
    assert sorted(table.all) == [1, 2]


async def test_holders_of_a_scheme_have_its_driver(clock: trio.testing.MockClock) -> None:
    table = FakeTable(
        record(1, fence="scsi:1"), record(2, fence="cgroup:/scsi"), record(3, fence="scsi:2")
    )
    scsi, other = Harming(table, yes), Script(yes)
    fencing = Fencing(table, other, schemes={"scsi": scsi}, grace=GRACE)
    await run_for(fencing, 30)
    assert sorted(scsi.calls) == [(1, GRACE), (3, GRACE)]
    assert other.calls == [(2, 0.0)], "the one looks, the other harms"
    assert {holder for holder, _state, _tries in put_states(table)} == {1, 3}


# ---- what is told ------------------------------------------------------------------------------


@pytest.mark.expect_log("refused")
async def test_the_history(clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.time, "time", lambda: 5000.0 + trio.current_time())
    table = FakeTable(
        dataclasses.replace(record(1, name="deaf", fence="scsi:7"), cause=LostCause.MOUNT),
        record(2, HolderState.LIVE),
    )
    table.records[1] = FenceRecord(1, FenceState.ISSUED, 2, 4990)
    fencing = Fencing(table, Harming(table, no, yes))
    now: list[policy.FenceStatus] = []

    def lose() -> None:
        table.all[2] = dataclasses.replace(table.all[2], cause=LostCause.RECALL)
        table.lose(2)

    await run_for(fencing, 20, (0.5, lambda: now.extend(fencing.waiting())), (7, lose))
    (waiting,) = now
    assert (waiting.state, waiting.attempts, waiting.last_failure) == ("failed", 3, "refused")
    assert (waiting.begun, waiting.waited, waiting.cause) == (4990, 10.5, LostCause.MOUNT)
    first, second = fencing.history()
    assert first == policy.PastFence(
        1, LostCause.MOUNT, "deaf", "scsi:7", "script", 4990, 11.0, 4, "confirmed", "seen"
    )
    assert (second.holder, second.cause, second.begun, second.seconds, second.attempts) == (
        2,
        LostCause.RECALL,
        5007.0,
        0.0,
        1,
    )


async def test_the_history_is_bounded(clock: trio.testing.MockClock) -> None:
    table = FakeTable(*[record(number) for number in range(1, 301)])
    fencing = Fencing(table, Script(yes))
    await run_for(fencing, 10)
    assert len(fencing.history()) == policy.HISTORY_MAX


async def test_how_fences_end_without_a_confirmation_of_ours(
    clock: trio.testing.MockClock,
) -> None:
    table = FakeTable(*[record(number) for number in range(1, 5)])
    fencing = Fencing(table, NoFence())

    def returns() -> None:
        del table.all[2]
        table.post(event(EventType.HOLDER_GONE, 2))

    def unheard() -> None:
        del table.all[4]
        table.pending = []
        table.post(event(EventType.OVERFLOW, length=1))

    await run_for(
        fencing,
        60,
        (1, lambda: table.fenced(1)),
        (2, returns),
        (3, lambda: table.revive(3)),
        (20, unheard),
    )
    assert [(past.holder, past.outcome) for past in fencing.history()] == [
        (1, "confirmed elsewhere"),
        (2, "returned"),
        (3, "came back"),
        (4, "gone"),
    ]
    assert fencing.waiting() == []


@pytest.mark.expect_log("not registered")
@pytest.mark.parametrize("issued", [False, True])
async def test_who_returned_everything_and_was_not_harmed_needs_no_driver(
    clock: trio.testing.MockClock, issued: bool
) -> None:
    class Absent(Script):
        async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
            if issued:
                await attempt.issued()
            return Outcome.failed("its key is not registered: it may still register")

    table = FakeTable(record(1))
    fencing = Fencing(table, Absent(no, harms=True))

    def returns() -> None:
        table.all[1] = dataclasses.replace(table.all[1], returned=True)

    await run_for(fencing, 300, (5, returns))
    assert [moment for _, moment in table.confirmed] == ([] if issued else [7.0])
    assert [past.outcome for past in fencing.history()] == ([] if issued else ["confirmed"])
