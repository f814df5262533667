"""The fence driver of reservations: its order with the record, threads without an answer."""

from __future__ import annotations

import threading

import pytest
import reservation_contract as contract
import trio
from attempts import LoneAttempt
from reservation_contract import OTHER_CLIENT
from reservation_world import client, confirmed, server
from simulated_unit import SimulatedTarget

from extfs.core import HolderKind, HolderRecord, HolderSpec, HolderState
from extfs.layout.fencing import Outcome
from extfs.layout.keys import (
    key_text,
    new_client_key,
)
from extfs.layout.reservation_fence import ReservationFence
from extfs.layout.server_reservation import State

CLIENT = contract.CLIENT


@pytest.fixture
def target() -> SimulatedTarget:
    return SimulatedTarget()


# ---- the driver --------------------------------------------------------------------------------


def holder(key: int = CLIENT) -> HolderRecord:
    spec = HolderSpec("client", HolderKind.CLIENT, fence_key=key, fence="scsi:1")
    return HolderRecord(1, HolderState.LOST, spec, 1, 2, 3, 1)


async def test_the_driver_issues_after_it_has_seen_the_key(target: SimulatedTarget) -> None:
    reservation = server(target)
    victim = client(target)
    seen: list[object] = []
    attempt = LoneAttempt(at_issue=lambda: seen.append((victim.passes(), target.told[-1])))
    driver = ReservationFence(reservation)
    outcome = await driver.fence(holder(), attempt)
    assert confirmed(outcome)
    assert key_text(CLIENT) in outcome.detail
    assert seen == [(True, ("client", "READ"))]
    assert ("server", "READ KEYS") in target.told
    assert attempt.issues == 1
    assert driver.harms
    assert driver.name == "reservation"


async def test_the_driver_issues_nothing_when_there_is_nothing_to_preempt(
    target: SimulatedTarget,
) -> None:
    driver = ReservationFence(server(target))
    attempt = LoneAttempt()
    assert not confirmed(await driver.fence(holder(), attempt))
    assert attempt.issues == 0
    attempt = LoneAttempt(number=2, issued_before=True)
    assert confirmed(await driver.fence(holder(), attempt))
    assert attempt.issues == 0


async def test_the_driver_tells_errors_and_goes_on(target: SimulatedTarget) -> None:
    driver = ReservationFence(server(target))
    victim = client(target)
    target.trouble("server", "PREEMPT", "lost after")
    attempt = LoneAttempt()
    outcome = await driver.fence(holder(), attempt)
    assert not confirmed(outcome)
    assert "no answer" in outcome.detail
    assert attempt.issues == 1
    assert confirmed(await driver.fence(holder(), LoneAttempt(2, issued_before=True)))
    assert not victim.passes()


async def test_whatever_the_record_refuses_is_not_done(target: SimulatedTarget) -> None:
    driver = ReservationFence(server(target))
    victim = client(target)

    def refuse() -> None:
        raise RuntimeError("the record cannot be written")

    with pytest.raises(RuntimeError):
        await driver.fence(holder(), LoneAttempt(at_issue=refuse))
    assert victim.passes()


async def test_a_command_without_an_answer_confirms_nothing_and_blocks_no_task(
    target: SimulatedTarget,
) -> None:
    """It hangs in its thread; the attempt ends, others end too, and later all is done."""
    reservation = server(target)
    victim = client(target)
    client(target, "other", OTHER_CLIENT)
    target.trouble("server", "PREEMPT", "hangs")
    driver = ReservationFence(reservation, seconds=0.2)
    begin = trio.current_time()
    try:
        outcome = await driver.fence(holder(), LoneAttempt())
        assert not confirmed(outcome)
        assert "has not answered" in outcome.detail
        other = await driver.fence(holder(OTHER_CLIENT), LoneAttempt())
        assert not confirmed(other)
        assert trio.current_time() - begin < 5
    finally:
        target.released.set()
    driver.seconds = 30
    assert confirmed(await driver.fence(holder(), LoneAttempt(2, issued_before=True)))
    assert confirmed(await driver.fence(holder(OTHER_CLIENT), LoneAttempt(2)))
    assert not victim.passes()


async def test_a_command_without_an_answer_keeps_the_unit_open(target: SimulatedTarget) -> None:
    """Its thread would go on with whatever file has the number then."""
    reservation = server(target)
    client(target)
    target.trouble("server", "PREEMPT", "hangs")
    try:
        assert not confirmed(
            await ReservationFence(reservation, seconds=0.2).fence(holder(), LoneAttempt())
        )
        reservation.close()
        assert target.claims == {"server": reservation.unit}
    finally:
        target.released.set()
    reservation.check()  # waits for the thread
    reservation.close()
    assert target.claims == {}


async def test_many_fences_beside_checks(target: SimulatedTarget) -> None:
    """From any number of tasks at a time; each is confirmed and nobody else is touched."""
    reservation = server(target)
    victims = {new_client_key(()): f"client {number}" for number in range(30)}
    for key, host in victims.items():
        client(target, host, key)
    bystander = client(target)
    driver = ReservationFence(reservation)
    results: list[Outcome] = []

    async def one(key: int) -> None:
        results.append(await driver.fence(holder(key), LoneAttempt()))

    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert reservation.check().state is State.HELD

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, look)
        async with trio.open_nursery() as fences:
            for key in victims:
                fences.start_soon(one, key)
        stop.set()
    assert len(results) == 30
    assert all(map(confirmed, results))
    assert bystander.passes()
    assert set(target.registrations) == {"server", "client"}
