"""What a server's reservation confirms and refuses: fences, targets that restart, two servers."""

from __future__ import annotations

import pytest
import reservation_contract as contract
from reservation_contract import OTHER_CLIENT, SERVER, outcome_of
from reservation_world import client, confirmed, server
from simulated_unit import TYPE, SimulatedNexus, SimulatedTarget

from extfs.layout import server_reservation
from extfs.layout.keys import (
    key_text,
    new_client_key,
    new_server_key,
)
from extfs.layout.reservations import (
    ConflictError,
    UnitError,
    UnreachableError,
)
from extfs.layout.server_reservation import (
    DRAIN_TRIES,
    RefusedError,
    ServerReservation,
    Sight,
    State,
)

CLIENT = contract.CLIENT


@pytest.fixture
def target() -> SimulatedTarget:
    return SimulatedTarget()


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


@pytest.mark.parametrize("aborts", [True, False])
def test_a_unit_of_which_it_is_not_known_whether_it_aborts_is_reset(
    aborts: bool, target: SimulatedTarget
) -> None:
    target.aborts, target.tells = aborts, False
    reservation = server(target)
    victim = client(target)
    victim.submit(7, b"stale")
    assert confirmed(outcome_of(reservation, CLIENT))
    assert ("server", "RESET") in target.told[-8:]
    assert target.queue == []


def test_where_no_reset_is_to_be_had_the_standard_is_believed_unless_it_is_known_to_be_broken(
    target: SimulatedTarget,
) -> None:
    target.tells = target.resets = False
    reservation = server(target)
    client(target)
    assert confirmed(outcome_of(reservation, CLIENT))
    reservation.close()
    again = server(target)  # nothing to refuse, either
    again.close()
    target.tells, target.aborts = True, False
    with pytest.raises(RefusedError, match="could not be reset"):
        server(target)
    again.capabilities = target.nexus("server").capabilities()
    client(target)
    outcome = outcome_of(again, CLIENT)
    assert not confirmed(outcome)
    assert "no reset" in outcome.detail


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


def test_keys_of_nobody_known_are_told_once(
    target: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with a wrong key, or another program: it passes, and no fence would find it."""
    reservation = server(target)
    stranger = target.nexus("stranger")
    stranger.register(0x77)
    assert reservation.check().detail == ""  # it may be gone in a moment
    monkeypatch.setattr(server_reservation, "STRANGE_SECONDS", -1.0)
    standing = reservation.check()
    assert standing.state is State.HELD
    assert key_text(0x77) in standing.detail
    assert reservation.check().detail == ""
    assert stranger.passes()
    stranger.register(0, old=0x77)
    assert reservation.check().detail == ""
    stranger.register(0x77)
    assert key_text(0x77) in reservation.check().detail


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


def test_a_reset_says_nothing_of_who_was_registered_then(target: SimulatedTarget) -> None:
    """Where unregistering is not counted, the generation does not tell that he has gone since."""
    target = SimulatedTarget(as_linux=True)
    reservation = server(target)
    guest = client(target)
    assert confirmed(outcome_of(reservation, OTHER_CLIENT, issued=True))
    guest.submit(5, b"stale")
    guest.register(0, old=CLIENT)
    assert confirmed(outcome_of(reservation, CLIENT, issued=True))
    assert target.queue == []


def test_a_reset_says_nothing_of_who_came_and_went_beside_our_own_preempt(
    target: SimulatedTarget,
) -> None:
    reservation = server(target)
    client(target)
    assert confirmed(outcome_of(reservation, OTHER_CLIENT, issued=True))  # a reset
    guest, key = target.nexus("guest"), new_client_key(())

    def visit() -> None:
        guest.register(key)
        guest.submit(5, b"stale")
        guest.register(0, old=key)

    target.before("server", "PREEMPT", visit)
    assert confirmed(outcome_of(reservation, CLIENT))
    assert len(target.queue) == 1
    assert confirmed(outcome_of(reservation, key, issued=True))
    assert target.queue == []


def test_a_reservation_whose_type_was_changed_confirms_nothing(target: SimulatedTarget) -> None:
    """Of another type it may refuse writes to nobody."""
    reservation = server(target)
    client(target)
    assert reservation.sight(CLIENT, issued_before=False) is Sight.PRESENT
    target.before("server", "READ RESERVATION", lambda: setattr(target, "type", 5))
    outcome = reservation.preempt(CLIENT)
    assert not confirmed(outcome)
    assert "type 5" in outcome.detail


def test_strays_of_no_holder_are_swept(target: SimulatedTarget) -> None:
    reservation = server(target)
    kept, stray, foreign = client(target), client(target, "old", OTHER_CLIENT), target.nexus("x")
    foreign.register(0x77)
    assert reservation.sweep(lambda: {CLIENT}) == [OTHER_CLIENT]
    assert kept.passes()
    assert not stray.passes()
    assert foreign.passes()


@pytest.mark.parametrize("how", ["of no holder", "fenced", "another server"])
def test_what_a_stray_had_begun_does_not_arrive_after_it_was_thrown_out(
    how: str, target: SimulatedTarget
) -> None:
    """Its blocks may be others' by now, and a preempt alone leaves its commands alive."""
    target.aborts = False
    reservation = server(target)
    key = new_server_key() if how == "another server" else OTHER_CLIENT
    stray = client(target, "stray", key)
    if how == "fenced":
        assert confirmed(outcome_of(reservation, key))
        stray.register(key, ignore=True)
    successor = client(target)
    stray.submit(7, b"stale")
    if how == "of no holder":
        assert reservation.sweep(lambda: {CLIENT}) == [key]
    else:
        assert "had registered key" in reservation.check().detail
    successor.write(7, b"successor")
    target.settle()
    assert target.blocks[7] == b"successor"
    assert not stray.passes()


def test_strays_are_thrown_out_with_one_reset_and_none_where_the_unit_aborts(
    target: SimulatedTarget,
) -> None:
    for aborts, resets in ((True, 0), (False, 1)):
        target = SimulatedTarget(aborts=aborts)
        reservation = server(target)
        strays = [client(target, f"stray {n}", new_client_key(())) for n in range(3)]
        before = target.told.count(("server", "RESET"))
        assert len(reservation.sweep(lambda: ())) == 3
        assert target.told.count(("server", "RESET")) - before == resets
        assert not any(stray.passes() for stray in strays)
        assert reservation.sweep(lambda: ()) == []
        assert target.told.count(("server", "RESET")) - before == resets


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
    with pytest.raises(RefusedError, match="could not be reset"):
        new.take(old.key)


def test_a_server_that_registers_again_while_it_is_taken_over_lives(
    target: SimulatedTarget,
) -> None:
    old = server(target, "old")
    new = ServerReservation.register(target.nexus("new"))
    target.before("new", "READ KEYS", lambda: target.register("old", 0, old.key, ignore=True))
    with pytest.raises(RefusedError, match="its server lives"):
        new.take(old.key)


def test_a_reservation_that_another_path_holds_serves_not_us(target: SimulatedTarget) -> None:
    reservation = server(target)
    assert isinstance(reservation.unit, SimulatedNexus)
    reservation.unit.host = "another path"
    with pytest.raises(RefusedError, match="does not serve this host"):
        reservation.take()


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


def test_a_start_that_ended_after_its_preempt_leaves_no_command_of_the_old_server(
    target: SimulatedTarget,
) -> None:
    """The next start finds the reservation its own; what the old server had begun is there."""
    target.aborts = False
    old = server(target, "old")
    assert isinstance(old.unit, SimulatedNexus)
    old.unit.submit(0, b"journal of the old one")
    new = ServerReservation.register(target.nexus("new"))
    target.trouble("new", "RESET", *["lost before"] * DRAIN_TRIES)  # type: ignore[list-item]
    with pytest.raises(RefusedError, match="commands of the server before"):
        new.take(old.key)
    new.back_out()
    again = ServerReservation.register(target.nexus("new"))
    assert again.foreign() is None
    again.take()
    assert target.queue == []


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
