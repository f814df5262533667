"""Reservations: the contract of a unit on the simulated one, as an object and as a kernel's ioctls;
what a server does when the unit, a client or another server does what it should not; the driver.

Real units are held to the same contract: see ``reservation_contract``.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reservation_contract as contract
import trio
from attempts import LoneAttempt
from reservation_contract import OTHER_CLIENT, SERVER, Nexuses, outcome_of
from simulated_unit import NAA, TYPE, KernelFace, SimulatedNexus, SimulatedTarget

from extfs.core import HolderKind, HolderRecord, HolderSpec, HolderState
from extfs.layout import keys as keys_module
from extfs.layout import scsi_unit
from extfs.layout.fencing import Outcome, Verdict
from extfs.layout.keys import (
    is_client_key,
    is_server_key,
    key_text,
    new_client_key,
    new_server_key,
)
from extfs.layout.reservation_fence import ReservationFence
from extfs.layout.reservations import (
    Capabilities,
    ConflictError,
    Designator,
    Held,
    ReservationType,
    UnitError,
    UnreachableError,
    UnsupportedError,
)
from extfs.layout.scsi_unit import (
    ScsiUnit,
    disk_of_number,
    parse_capabilities,
    parse_designators,
    parse_keys,
)
from extfs.layout.server_reservation import RefusedError, ServerReservation, Sight, State

CLIENT = contract.CLIENT


@pytest.fixture
def target() -> SimulatedTarget:
    return SimulatedTarget()


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KernelFace]:
    face = KernelFace()
    monkeypatch.setattr(scsi_unit.fcntl, "ioctl", face.ioctl)
    monkeypatch.setattr(scsi_unit, "whole_disk", lambda path: path)
    monkeypatch.setattr(scsi_unit, "LOCKS", tmp_path)
    return face


def scsi_device(face: KernelFace, nexus: SimulatedNexus, locks: Path) -> ScsiUnit:
    """The driver of real devices on the simulated kernel."""
    unit = ScsiUnit(os.devnull, locks=locks)
    os.close(unit._device)
    unit._device = face.open(nexus)
    return unit


def server(target: SimulatedTarget, host: str = "server") -> ServerReservation:
    reservation = ServerReservation.register(target.nexus(host))
    reservation.take()
    return reservation


def client(target: SimulatedTarget, host: str = "client", key: int = CLIENT) -> SimulatedNexus:
    nexus = target.nexus(host)
    nexus.register(key)
    return nexus


def confirmed(outcome: Outcome) -> bool:
    return outcome.verdict is Verdict.CONFIRMED


# ---- the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_simulated_unit(
    check: Callable[[Nexuses], None], target: SimulatedTarget
) -> None:
    check(Nexuses(target.nexus("one"), target.nexus("two")))


@pytest.mark.parametrize("aborts", [True, False])
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_through_ioctls(
    check: Callable[[Nexuses], None],
    aborts: bool,
    target: SimulatedTarget,
    face: KernelFace,
    tmp_path: Path,
) -> None:
    target.aborts = aborts
    face.vendor = b"SIMULATE" if aborts else b"LIO-ORG"
    nexuses = Nexuses(
        *(scsi_device(face, target.nexus(host), tmp_path / host) for host in ("one", "two"))
    )
    assert nexuses.first.capabilities().aborts is aborts
    check(nexuses)
    for unit in (nexuses.first, nexuses.second):
        unit.close()


def test_contract_finds_a_unit_that_breaks_it(target: SimulatedTarget) -> None:
    """A suite that passes whatever the unit does proves nothing: defects, and who finds them."""
    defects: dict[str, Callable[[SimulatedTarget], None]] = {
        "reserves for anybody": lambda t: setattr(t, "_own", lambda nexus, key: None),
        "serves everybody": lambda t: setattr(t, "serves", lambda nexus: True),
        "forgets at a reset": lambda t: setattr(t, "reset", lambda: t.restart(forget=True)),
        "no new generation": lambda t: setattr(type(t), "generation", property(lambda s: 7)),
        "registers over any key": lambda t: setattr(
            t,
            "register",
            lambda nexus, old, key, *, ignore: SimulatedTarget.register(
                t, nexus, old, key, ignore=True
            ),
        ),
        "keeps the preempted": lambda t: setattr(
            t, "preempt_abort", lambda nexus, key, victim, kind: None
        ),
    }
    for name, spoil in defects.items():
        spoilt = type("Spoilt", (SimulatedTarget,), {})()
        if name == "no new generation":
            type(spoilt).generation = property(lambda self: 7, lambda self, value: None)
        else:
            spoil(spoilt)
        found = 0
        for check in contract.CHECKS:
            nexuses = Nexuses(spoilt.nexus("one"), spoilt.nexus("two"))
            try:
                nexuses.wipe()
                check(nexuses)
            except Exception:
                found += 1
        assert found, name


# ---- keys --------------------------------------------------------------------------------------


def test_keys_tell_servers_from_clients() -> None:
    for _ in range(200):
        mine, theirs = new_server_key(), new_client_key(())
        assert is_server_key(mine)
        assert not is_client_key(mine)
        assert is_client_key(theirs)
        assert not is_server_key(theirs)
        assert mine >> 48 == theirs >> 48 == 0xE5F5
    assert key_text(0xE5F5 << 48 | 1) == "0xe5f5000000000001"
    for foreign in (0, 1, 0x123456789ABCDEF0, 0xE5F6 << 48, (1 << 64) - 1):
        assert not is_client_key(foreign)
        assert not is_server_key(foreign)


def test_a_key_that_is_taken_is_not_given_out(
    target: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collision: the generator repeats itself, the keys do not."""
    reservation = server(target)
    bits = itertools.chain([5, 5, 5, 6, 5, 6, 8], itertools.repeat(7))
    monkeypatch.setattr(keys_module.secrets, "randbits", lambda count: next(bits))
    first = new_client_key(())
    second = new_client_key({first})
    assert (first & 0xFF, second & 0xFF) == (5, 6)
    client(target, "client", first)  # registered, of a holder that is not known any more
    assert reservation.client_key({second}) & 0xFF == 8


# ---- devices that cannot -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"persistent": False}, "no persistent reservations"),
        ({"designators": []}, "no NAA or EUI-64 designator"),
        ({"aptpl": False}, "APTPL"),
        (
            {"types": frozenset({ReservationType.WRITE_EXCLUSIVE})},
            "exclusive access, registrants only",
        ),
    ],
)
def test_a_unit_that_lacks_a_requirement_is_refused_by_name(
    spoil: dict[str, object], says: str, face: KernelFace, tmp_path: Path
) -> None:
    for through_ioctls in (False, True):
        target = SimulatedTarget(**spoil)  # type: ignore[arg-type]
        nexus = target.nexus("host")
        unit = scsi_device(face, nexus, tmp_path) if through_ioctls else nexus
        with pytest.raises(RefusedError, match=says):
            ServerReservation.register(unit)
        assert target.registrations == {}


def test_a_unit_that_does_not_tell_its_types_is_tried(target: SimulatedTarget) -> None:
    target.types = None
    assert server(target).check().state is State.HELD


def test_a_second_server_of_the_host_is_kept_out(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    """It would find the host registered and take the first one's key for an earlier mount's."""
    one = scsi_device(face, target.nexus("host"), tmp_path)
    two = scsi_device(face, target.nexus("host"), tmp_path)
    first = ServerReservation.register(one)
    first.take()
    with pytest.raises(UnitError, match="another extfs on this host"):
        ServerReservation.register(two)
    assert first.check().state is State.HELD
    first.close()
    again = ServerReservation.register(scsi_device(face, target.nexus("host"), tmp_path))
    assert again.key == first.key
    again.close()


def test_a_host_that_another_program_registered_is_refused(target: SimulatedTarget) -> None:
    nexus = target.nexus("server")
    nexus.register(0x1234)
    with pytest.raises(RefusedError, match="another program on this host"):
        ServerReservation.register(target.nexus("server"))
    assert target.registrations == {"server": 0x1234}
    nexus.register(CLIENT, old=0x1234)
    with pytest.raises(RefusedError, match="an NFS client on this host"):
        ServerReservation.register(target.nexus("server"))


def test_backing_out_leaves_the_unit_as_it_was(target: SimulatedTarget) -> None:
    other = server(target, "other")
    reservation = ServerReservation.register(target.nexus("server"))
    assert reservation.foreign() == other.key
    reservation.back_out()
    assert target.registrations == {"other": other.key}
    assert target.claims == {"other": other.unit}
    # A host that was registered before stays registered.
    other.close()
    again = ServerReservation.register(target.nexus("other"))
    again.back_out()
    assert target.registrations == {"other": other.key}


def test_foreign_reservations_are_named(target: SimulatedTarget) -> None:
    cluster = target.nexus("cluster")
    cluster.register(0xABCD)
    cluster.reserve(0xABCD)
    reservation = ServerReservation.register(target.nexus("server"))
    assert reservation.foreign() == 0xABCD
    with pytest.raises(RefusedError, match="0x000000000000abcd"):
        reservation.take()
    with pytest.raises(RefusedError, match="0x000000000000abcd"):
        reservation.take(0xABCE)
    target.type = ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS
    assert reservation.foreign() == 0
    with pytest.raises(RefusedError, match="all registrants"):
        reservation.take(0)
    assert target.holder == "cluster"


def test_our_reservation_of_another_type_is_changed(target: SimulatedTarget) -> None:
    first = server(target)
    target.type = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
    reservation = ServerReservation.register(target.nexus("elsewhere"))
    assert reservation.foreign() == first.key
    first.close()
    again = ServerReservation.register(target.nexus("server"))
    again.take()
    assert target.type == TYPE
    target.type = ReservationType.WRITE_EXCLUSIVE
    assert again.check().state is State.RESTORED
    assert target.type == TYPE


# ---- what a fence confirms ---------------------------------------------------------------------


@pytest.mark.parametrize("aborts", [True, False])
def test_what_the_client_had_under_way_never_arrives_after_the_confirmation(
    aborts: bool, target: SimulatedTarget
) -> None:
    """The successor's bytes: accepted before the preempt, completed after it, is what kills them.

    On a target that does not abort a registrant's commands it takes the reset.
    """
    target.aborts = aborts
    reservation = server(target)
    victim, bystander = client(target), client(target, "bystander", OTHER_CLIENT)
    victim.submit(7, b"stale")
    assert confirmed(outcome_of(reservation, CLIENT))
    assert (("server", "RESET") in target.told[-8:]) is not aborts
    bystander.write(7, b"successor")
    target.settle()
    assert target.blocks[7] == b"successor"
    with pytest.raises(ConflictError):
        victim.write(7, b"stale")
    bystander.write(8, b"still served")


def test_without_the_reset_a_target_that_does_not_abort_loses_bytes(
    target: SimulatedTarget,
) -> None:
    """The test above can fail: believing the target that it aborts would do it."""
    reservation = server(target)
    target.aborts = False
    victim, bystander = client(target), client(target, "bystander", OTHER_CLIENT)
    victim.submit(7, b"stale")
    assert confirmed(outcome_of(reservation, CLIENT))
    bystander.write(7, b"successor")
    target.settle()
    assert target.blocks[7] == b"stale"


def test_all_nexuses_of_a_client_are_cut_off(target: SimulatedTarget) -> None:
    reservation = server(target)
    paths = [client(target, f"path {number}") for number in range(3)]
    for path in paths:
        path.submit(3, b"stale")
    assert confirmed(outcome_of(reservation, CLIENT))
    assert target.queue == []
    assert not any(path.passes() for path in paths)


@pytest.mark.parametrize("trouble", ["refused", "lost before"])
def test_a_preempt_without_effect_confirms_nothing_and_is_tried_again(
    trouble: str, target: SimulatedTarget
) -> None:
    reservation = server(target)
    victim = client(target)
    target.trouble("server", "PREEMPT", trouble)  # type: ignore[arg-type]
    assert reservation.sight(CLIENT, issued_before=False) is Sight.PRESENT
    with pytest.raises(UnitError):
        reservation.preempt(CLIENT)
    assert victim.passes()
    assert confirmed(outcome_of(reservation, CLIENT, issued=True))
    assert not victim.passes()


@pytest.mark.parametrize("trouble", ["lost after", "repeated"])
def test_a_preempt_whose_answer_was_lost_is_confirmed_after_a_reset_only(
    trouble: str, target: SimulatedTarget
) -> None:
    """The key is gone, but the abort may not have ended: the simulated target has not begun it."""
    reservation = server(target)
    victim = client(target)
    victim.submit(7, b"stale")
    target.aborts = False  # an abort under way, for as long as there is no reset
    target.trouble("server", "PREEMPT", trouble)  # type: ignore[arg-type]
    assert reservation.sight(CLIENT, issued_before=False) is Sight.PRESENT
    if trouble == "repeated":
        assert confirmed(reservation.preempt(CLIENT))
    else:
        with pytest.raises(UnreachableError):
            reservation.preempt(CLIENT)
        assert CLIENT not in target.registrations.values()
        assert len(target.queue) == 1
        assert confirmed(outcome_of(reservation, CLIENT, issued=True))
    assert target.queue == []
    target.settle()
    assert target.blocks == {}


def test_a_key_that_was_never_seen_is_not_confirmed(target: SimulatedTarget) -> None:
    """The client has its layout and its key, and sleeps before it registers."""
    reservation = server(target)
    late = target.nexus("client")
    outcome = outcome_of(reservation, CLIENT)
    assert not confirmed(outcome)
    assert "may yet register" in outcome.detail
    late.register(CLIENT)
    assert late.passes()
    assert confirmed(outcome_of(reservation, CLIENT))
    assert not late.passes()


def test_a_key_that_another_one_was_registered_over_is_not_confirmed(
    target: SimulatedTarget,
) -> None:
    """The nexus passes, under the other key; the key alone looks as after a fence."""
    reservation = server(target)
    victim = client(target)
    reservation.check()
    victim.register(OTHER_CLIENT, ignore=True)
    outcome = outcome_of(reservation, CLIENT)
    assert not confirmed(outcome)
    assert "another one in its place" in outcome.detail


def test_a_key_that_comes_back_before_the_confirmation_is_seen(target: SimulatedTarget) -> None:
    reservation = server(target)
    victim = client(target)
    assert reservation.sight(CLIENT, issued_before=False) is Sight.PRESENT
    target.before("server", "READ KEYS", lambda: target.register("client", 0, CLIENT, ignore=True))
    outcome = reservation.preempt(CLIENT)
    assert not confirmed(outcome)
    assert "registered again" in outcome.detail
    assert confirmed(outcome_of(reservation, CLIENT, issued=True))
    assert not victim.passes()


def test_a_key_that_comes_back_after_the_confirmation_is_preempted_again(
    target: SimulatedTarget,
) -> None:
    reservation = server(target)
    victim = client(target)
    assert confirmed(outcome_of(reservation, CLIENT))
    victim.register(CLIENT)
    standing = reservation.check()
    assert standing.state is State.RESTORED
    assert key_text(CLIENT) in standing.detail
    assert not victim.passes()
    assert reservation.check().detail == ""


def test_another_clients_key(target: SimulatedTarget) -> None:
    """Who registers with somebody else's key goes when that one is fenced, both of them."""
    reservation = server(target)
    rightful, impostor = client(target), client(target, "impostor")
    assert confirmed(outcome_of(reservation, CLIENT))
    assert not rightful.passes()
    assert not impostor.passes()


@pytest.mark.parametrize("key", [0, 0x1234, SERVER])
def test_a_holder_whose_key_is_no_clients_is_not_fenced(key: int, target: SimulatedTarget) -> None:
    reservation = server(target)
    stranger = target.nexus("stranger")
    if key:
        stranger.register(key)
    before = dict(target.registrations)
    for issued in (False, True):
        assert not confirmed(outcome_of(reservation, key, issued=issued))
    if key == 0x1234:
        assert target.registrations == before


def test_a_client_at_the_servers_own_nexus_is_never_confirmed(target: SimulatedTarget) -> None:
    """An NFS client on the server's host registers over the server's key."""
    reservation = server(target)
    local = target.nexus("server")
    local.register(CLIENT, ignore=True)
    standing = reservation.check()
    assert standing.state is State.RESTORED
    assert "on this host" in standing.detail
    assert target.registrations == {"server": reservation.key}
    assert target.key_of_holder() == reservation.key
    for issued in (False, True):
        outcome = outcome_of(reservation, CLIENT, issued=issued)
        assert not confirmed(outcome)
        assert "shares the server's own path" in outcome.detail


def test_a_unit_that_cannot_be_reset(target: SimulatedTarget) -> None:
    """An answered preempt still confirms; where only a reset could, a person has to."""
    reservation = server(target)
    target.resets = False
    client(target)
    assert confirmed(outcome_of(reservation, CLIENT))
    client(target, "other", OTHER_CLIENT)
    target.trouble("server", "PREEMPT", "lost after")
    with pytest.raises(UnreachableError):
        outcome_of(reservation, OTHER_CLIENT)
    outcome = outcome_of(reservation, OTHER_CLIENT, issued=True)
    assert not confirmed(outcome)
    assert "cannot be reset" in outcome.detail


def test_one_reset_serves_for_all_that_were_gone_by_then(target: SimulatedTarget) -> None:
    """After a restart hundreds may be found gone; a reset disturbs everybody."""
    reservation = server(target)
    gone = [new_client_key(()) for _ in range(20)]
    there = client(target)

    def resets() -> int:
        return target.told.count(("server", "RESET"))

    before = resets()
    for key in gone[:10]:
        assert confirmed(outcome_of(reservation, key, issued=True))
    assert resets() == before + 1  # one for all ten
    assert confirmed(outcome_of(reservation, CLIENT))  # our own preempt disturbs nothing
    assert not there.passes()
    assert confirmed(outcome_of(reservation, gone[10], issued=True))
    # Somebody registered and may have unregistered: what he began is not covered.
    guest = client(target, "guest", gone[11])
    guest.submit(5, b"stale")
    guest.register(0, old=gone[11])
    assert confirmed(outcome_of(reservation, gone[11], issued=True))
    assert target.queue == []
    assert resets() == before + 2


def test_strays_of_no_holder_are_swept(target: SimulatedTarget) -> None:
    reservation = server(target)
    kept, stray, foreign = client(target), client(target, "old", OTHER_CLIENT), target.nexus("x")
    foreign.register(0x77)
    assert reservation.sweep(lambda: {CLIENT}) == [OTHER_CLIENT]
    assert kept.passes()
    assert not stray.passes()
    assert foreign.passes()


# ---- a target that restarts --------------------------------------------------------------------


def test_a_target_that_keeps_registrations_is_as_before(target: SimulatedTarget) -> None:
    reservation = server(target)
    victim = client(target)
    target.restart(forget=False)
    assert reservation.check().state is State.HELD
    assert confirmed(outcome_of(reservation, CLIENT))
    assert not victim.passes()


def test_a_target_that_forgot_is_reserved_again_and_told(target: SimulatedTarget) -> None:
    reservation = server(target)
    fenced, live = client(target, "fenced", OTHER_CLIENT), client(target)
    assert confirmed(outcome_of(reservation, OTHER_CLIENT))
    reservation.check()
    target.restart(forget=True)
    assert fenced.passes()  # this is what it costs
    fenced.submit(1, b"stale")
    standing = reservation.check()
    assert standing.state is State.RESTORED
    assert standing.lost_keys == (CLIENT,)
    assert standing.fenced == 1
    assert standing.unguarded is not None
    assert "served everybody" in standing.detail
    assert target.queue == []  # what was accepted meanwhile does not arrive later
    assert not fenced.passes()
    assert not live.passes()
    assert target.key_of_holder() == reservation.key
    assert reservation.check().detail == ""


def test_a_fence_of_a_client_that_the_target_forgot_ends(target: SimulatedTarget) -> None:
    """It was seen registered, all registrations were lost since: no key stands in its place."""
    reservation = server(target)
    victim = client(target)
    reservation.check()
    target.restart(forget=True)
    victim.submit(4, b"stale")
    assert confirmed(outcome_of(reservation, CLIENT))
    assert target.queue == []
    assert not victim.passes()
    # What the fence found is told by the next check, once.
    assert "served everybody" in reservation.check().detail
    assert reservation.check().detail == ""


def test_a_key_told_again_is_no_evidence_of_what_was_seen_before(target: SimulatedTarget) -> None:
    """A client that was refused asks for the device again, and sleeps before it registers."""
    reservation = server(target)
    key = reservation.client_key(())
    reservation.offered(key)
    sleeper = client(target, "client", key)
    reservation.check()
    reservation.offered(key)
    target.restart(forget=True)
    assert reservation.check().state is State.RESTORED
    assert not confirmed(outcome_of(reservation, key))
    sleeper.register(key)
    assert confirmed(outcome_of(reservation, key))


def test_a_key_told_again_while_the_keys_are_read(target: SimulatedTarget) -> None:
    reservation = server(target)
    client(target)
    target.before("server", "READ KEYS", lambda: reservation.offered(CLIENT))
    reservation.check()
    target.restart(forget=True)
    assert not confirmed(outcome_of(reservation, CLIENT))


def test_a_key_that_nobody_was_told_is_confirmed_as_it_is(target: SimulatedTarget) -> None:
    reservation = server(target)
    untold, told = (reservation.client_key(()) for _ in range(2))
    reservation.offered(told)
    assert confirmed(outcome_of(reservation, untold))
    assert not confirmed(outcome_of(reservation, told))
    assert not confirmed(outcome_of(reservation, new_client_key(())))  # of an earlier mount


def test_a_reservation_lost_alone_is_no_evidence(target: SimulatedTarget) -> None:
    """Only our registration went: the client's may stand under another key from before."""
    reservation = server(target)
    victim = client(target)
    reservation.check()
    victim.register(OTHER_CLIENT, ignore=True)
    target.register("server", reservation.key, 0, ignore=False)
    assert target.holder is None
    assert reservation.check().state is State.RESTORED
    assert not confirmed(outcome_of(reservation, CLIENT))
    assert victim.passes()


def test_a_target_that_forgets_between_the_preempt_and_the_look(target: SimulatedTarget) -> None:
    """The key is gone then, too. The reservation, read after the keys, tells."""
    reservation = server(target)
    client(target)
    assert reservation.sight(CLIENT, issued_before=False) is Sight.PRESENT
    target.before("server", "READ RESERVATION", lambda: target.restart(forget=True))
    outcome = reservation.preempt(CLIENT)
    assert not confirmed(outcome)
    assert "lost the reservation" in outcome.detail
    assert confirmed(outcome_of(reservation, CLIENT, issued=True))


def test_a_fence_decided_before_a_restart_of_server_and_target(target: SimulatedTarget) -> None:
    """Both forgot: whether the client had registered is not known any more. A person has to say."""
    reservation = server(target)
    client(target)
    reservation.check()
    reservation.close()
    target.restart(forget=True)
    again = server(target)
    assert not confirmed(outcome_of(again, CLIENT))
    # With the preempt recorded as issued it was registered: that is enough.
    assert confirmed(outcome_of(again, CLIENT, issued=True))


def test_a_server_killed_between_decision_and_preempt_goes_on(target: SimulatedTarget) -> None:
    server(target).close()
    victim = client(target)
    again = server(target)
    assert confirmed(outcome_of(again, CLIENT))
    assert not victim.passes()


def test_a_new_nexus_of_the_server_registers_again(target: SimulatedTarget) -> None:
    """A session that was logged in anew; the reservation stays with the old one, under our key."""
    reservation = server(target)
    victim = client(target)
    assert isinstance(reservation.unit, SimulatedNexus)
    reservation.unit.host = "server, again"
    assert not reservation.unit.passes()
    standing = reservation.check()
    assert standing.state is State.RESTORED
    assert "not registered on its path" in standing.detail
    assert reservation.unit.passes()
    assert confirmed(outcome_of(reservation, CLIENT))
    assert not victim.passes()


def test_a_target_without_an_answer_is_no_news(target: SimulatedTarget) -> None:
    reservation = server(target)
    for command in ("READ KEYS", "READ RESERVATION", "READ"):
        target.trouble("server", command, "lost before")
        with pytest.raises(UnreachableError):
            reservation.check()
    assert reservation.check().state is State.HELD


# ---- two servers -------------------------------------------------------------------------------


def test_a_server_that_was_taken_over_is_over_for_good(target: SimulatedTarget) -> None:
    """Also when the new one has gone and the unit is free: the filesystem is not this mount's."""
    old = server(target, "old")
    new = ServerReservation.register(target.nexus("new"))
    new.take(old.key)
    standing = old.check()
    assert (standing.state, standing.holder) == (State.TAKEN, new.key)
    target.clear("new", new.key)
    assert old.check().state is State.TAKEN
    assert not confirmed(outcome_of(old, CLIENT))
    assert target.registrations == {}
    assert target.holder is None


def test_a_server_that_slept_through_everything_asks_before_it_goes_on(
    target: SimulatedTarget,
) -> None:
    """Taken over, then the target forgot: only the heartbeat on the device can tell."""
    answers = iter([False])
    old = ServerReservation.register(target.nexus("old"), may_restore=lambda: next(answers))
    old.take()
    target.restart(forget=True)
    assert old.check().state is State.TAKEN
    assert target.registrations == {}
    assert old.check().state is State.TAKEN


def test_commands_of_the_dead_server_do_not_arrive_after_the_take_over(
    target: SimulatedTarget,
) -> None:
    for aborts in (True, False):
        target = SimulatedTarget(aborts=aborts)
        old = server(target, "old")
        assert isinstance(old.unit, SimulatedNexus)
        old.unit.submit(0, b"journal of the old one")
        new = ServerReservation.register(target.nexus("new"))
        new.take(old.key)
        target.settle()
        assert target.blocks == {}
        with pytest.raises(ConflictError):
            old.unit.write(0, b"late")


def test_a_take_over_that_cannot_end_the_old_servers_commands_is_refused(
    target: SimulatedTarget,
) -> None:
    target.aborts = target.resets = False
    old = server(target, "old")
    new = ServerReservation.register(target.nexus("new"))
    with pytest.raises(RefusedError, match="cannot be reset"):
        new.take(old.key)


def test_two_servers_that_take_over_at_once(target: SimulatedTarget) -> None:
    dead = server(target, "dead")
    one = ServerReservation.register(target.nexus("one"))
    two = ServerReservation.register(target.nexus("two"))
    victims = one.foreign(), two.foreign()
    assert victims == (dead.key, dead.key)
    one.take(dead.key)
    with pytest.raises(RefusedError, match=key_text(one.key)):
        two.take(dead.key)
    assert target.key_of_holder() == one.key


def test_a_take_over_whose_answer_was_lost_can_be_repeated(target: SimulatedTarget) -> None:
    dead = server(target, "dead")
    new = ServerReservation.register(target.nexus("new"))
    target.trouble("new", "PREEMPT", "lost after")
    with pytest.raises(UnreachableError):
        new.take(dead.key)
    new.back_out()  # leaves the reservation where it is
    assert target.key_of_holder() == new.key
    again = ServerReservation.register(target.nexus("new"))
    assert again.foreign() is None
    again.take()
    assert again.check().state is State.HELD


def test_two_servers_after_a_target_that_forgot(target: SimulatedTarget) -> None:
    """Between our REGISTER and our RESERVE another one reserves: we are not registered then."""
    old = server(target, "old")
    target.restart(forget=True)
    new = target.nexus("new")

    def seize() -> None:
        key = new_server_key()
        target.register("new", 0, key, ignore=False)
        target.reserve("new", key, TYPE)

    target.before("old", "RESERVE", seize)
    standing = old.check()
    assert standing.state is State.TAKEN
    assert "old" not in target.registrations
    assert new.passes()


def test_another_server_that_registers_is_thrown_out(target: SimulatedTarget) -> None:
    reservation = server(target)
    intruder = ServerReservation.register(target.nexus("intruder"))
    assert intruder.unit.passes()
    assert "another server" in reservation.check().detail
    assert not intruder.unit.passes()
    intruder.back_out()  # finds itself preempted, which is no error


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


# ---- the device as bytes -----------------------------------------------------------------------


def test_many_keys_are_read_whole(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    """The simulated kernel target, as the real one, does not tell that some had no room."""
    unit = scsi_device(face, target.nexus("server"), tmp_path)
    for count in (255, 256, 257, 3000, 8189):
        target.registrations = {f"host {number}": number + 1 for number in range(count)}
        assert sorted(unit.keys().keys) == list(range(1, count + 1))
    target.registrations = {f"host {number}": number + 1 for number in range(8190)}
    with pytest.raises(UnitError, match="more than 8189"):
        unit.keys()
    unit.close()


def test_ioctl_results_become_errors(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    unit = scsi_device(face, target.nexus("server"), tmp_path)
    target.trouble("server", "REGISTER", "lost before")
    with pytest.raises(UnreachableError):
        unit.register(SERVER)
    assert target.registrations == {}
    target.trouble("server", "REGISTER", "lost after")
    with pytest.raises(UnreachableError):
        unit.register(SERVER)
    assert target.registrations == {"server": SERVER}
    target.trouble("server", "RESERVE", "refused", "refused")
    unit.reserve(SERVER)  # a check condition is repeated: it may be an attention
    target.trouble("server", "PREEMPT", *["refused"] * 10)
    with pytest.raises(UnitError, match="PREEMPT AND ABORT"):
        unit.preempt_abort(SERVER, CLIENT)
    target.resets = False
    with pytest.raises(UnsupportedError, match="RESET"):
        unit.reset()
    unit.close()
    with pytest.raises(UnreachableError):
        unit.keys()


def test_designators_in_the_order_that_clients_take_them() -> None:
    def page(*designators: tuple[int, int, int, bytes]) -> bytes:
        body = b"".join(
            bytes([code_set, association << 4 | kind, 0, len(data)]) + data
            for code_set, association, kind, data in designators
        )
        return bytes([0, 0x83]) + len(body).to_bytes(2, "big") + body

    naa8, naa16, eui8, eui12, eui16 = (bytes([n]) * n for n in (8, 16, 8, 12, 16))
    whole = page(
        (2, 0, 1, b"VENDOR  serial"),
        (1, 0, 2, eui12),
        (1, 0, 2, eui8),
        (1, 0, 3, naa8),
        (1, 1, 3, bytes(8)),  # of the target port
        (2, 0, 3, b"12345678"),  # not binary
        (1, 0, 2, eui16),
        (1, 0, 3, naa16),
        (1, 0, 3, naa8),
        (1, 0, 3, b"short"),
    )
    assert parse_designators(whole) == [
        Designator("naa", 1, naa16),
        Designator("naa", 1, naa8),
        Designator("eui64", 1, eui16),
        Designator("eui64", 1, eui8),
        Designator("eui64", 1, eui12),
    ]
    assert [d.number for d in parse_designators(whole)] == [3, 3, 2, 2, 2]
    assert str(NAA) == "naa.6001405a1b2c3d4e5f60718293a4b5c6"
    for length in range(len(whole)):  # cut off anywhere
        assert set(parse_designators(whole[:length])) <= set(parse_designators(whole))


def test_capabilities_and_keys_as_bytes() -> None:
    assert parse_capabilities(bytes([0, 8, 1, 0x80, 0x40, 0, 0, 0]), aborts=True) == Capabilities(
        aptpl=True, types=frozenset({TYPE}), aborts=True
    )
    silent = parse_capabilities(bytes([0, 8, 0, 0, 0, 0, 0, 0]), aborts=False)
    assert silent == Capabilities(aptpl=False, types=None, aborts=False)
    assert silent.fits
    everything = parse_capabilities(bytes([0, 8, 1, 0x80, 0xEA, 1, 0, 0]), aborts=True)
    assert everything.types == frozenset(ReservationType)
    two = struct.pack(">IIQQ", 9, 16, SERVER, CLIENT)
    found = parse_keys(two, 100)
    assert found is not None
    assert (found.generation, found.keys) == (9, (SERVER, CLIENT))
    assert parse_keys(two, 24) is None  # it may be a part
    assert parse_keys(struct.pack(">IIQ", 9, 800, SERVER), 16) is None
    for broken in (b"", bytes(7)):
        with pytest.raises(UnitError):
            parse_keys(broken, 100)
        with pytest.raises(UnitError):
            parse_capabilities(broken[:5], aborts=True)
    assert scsi_unit.parse_reservation(bytes(8)) is None
    held = struct.pack(">IIQ4xxB2x", 3, 16, SERVER, TYPE)
    assert scsi_unit.parse_reservation(held) == Held(SERVER, TYPE)
    assert scsi_unit._sense(bytes([0x72, 6, 0x29, 0])) == (6, 0x29, 0)


def fake_sys(root: Path, device: str, files: dict[str, str]) -> None:
    """A sysfs where the block device `device` (8:1) is `files`' first directory."""
    for name, text in files.items():
        path = root / "devices" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "dev" / "block").mkdir(parents=True)
    (root / "dev" / "block" / "8:1").symlink_to(root / "devices" / device)


@pytest.mark.parametrize(
    ("device", "files", "result"),
    [
        ("sda", {"sda/uevent": "DEVNAME=sda\n"}, "DEVICE"),
        (
            "sda/sda1",
            {"sda/uevent": "DEVTYPE=disk\nDEVNAME=sda\n", "sda/sda1/partition": "1\n"},
            "/dev/sda",
        ),
        ("dm-0", {"dm-0/dm/uuid": "mpath-3600\n", "dm-0/uevent": ""}, "DEVICE"),
        ("dm-0", {"dm-0/dm/uuid": "LVM-abc\n"}, "mapped device"),
        ("nvme0n1", {"nvme0n1/uevent": ""}, "NVMe"),
        (
            "nvme0n1/nvme0n1p1",
            {"nvme0n1/uevent": "", "nvme0n1/nvme0n1p1/partition": "1"},
            "NVMe",
        ),
    ],
)
def test_the_disk_of_a_device(
    device: str, files: dict[str, str], result: str, tmp_path: Path
) -> None:
    fake_sys(tmp_path, device, files)
    number = os.makedev(8, 1)
    if result in ("DEVICE", "/dev/sda"):
        wanted = "/dev/x" if result == "DEVICE" else result
        assert disk_of_number("/dev/x", number, tmp_path) == wanted
    else:
        with pytest.raises(UnsupportedError, match=result):
            disk_of_number("/dev/x", number, tmp_path)


def test_an_image_has_no_reservations(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with pytest.raises(UnsupportedError, match="no block device"):
        ScsiUnit(str(image))
    with pytest.raises(UnsupportedError, match="No such file"):
        ScsiUnit(str(tmp_path / "nothing"))


def test_records_are_what_the_tests_think() -> None:
    assert dataclasses.astuple(Held(5, TYPE)) == (5, 6)
    assert Held(5, TYPE).right_type
    assert not Held(5, 5).right_type
