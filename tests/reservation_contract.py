"""What a unit with persistent reservations does, as checks that hold for simulated and real ones.

    python -m reservation_contract [--wipe] DEVICE [DEVICE OF ANOTHER NEXUS]

prints one line for each check ("ok", "FAILED", "skipped", with its time) and a last line
"contract: N ok, M failed, K skipped". The unit must carry no registrations and serve nobody else:
the checks reserve it and take that away again, and write nothing. --wipe clears what is registered
there first. The second device is the same unit by another nexus: of another initiator, or another
session; without one, half of the checks are skipped. Exit: 0 all ok, 1 not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from extfs.layout.fencing import Outcome, Verdict
from extfs.layout.keys import key_text, new_client_key, new_server_key
from extfs.layout.reservations import ConflictError, Held, ReservationType, Unit, UnitError
from extfs.layout.scsi_unit import ScsiUnit
from extfs.layout.server_reservation import RefusedError, ServerReservation, Sight, State

TYPE = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY

SERVER = new_server_key()
OTHER_SERVER = new_server_key((SERVER,))
CLIENT = new_client_key(())
OTHER_CLIENT = new_client_key((CLIENT,))


class SkippedError(Exception):
    """The check needs a second nexus."""


@dataclass
class Nexuses:
    """The unit as one or two hosts see it. `second` raises where there is only one."""

    first: Unit
    other: Unit | None = None

    @property
    def second(self) -> Unit:
        if self.other is None:
            raise SkippedError
        return self.other

    def wipe(self) -> None:
        """No registrations, no reservation, no attentions that wait."""
        for unit in filter(None, (self.first, self.other)):
            unit.register(SERVER, ignore=True)
            unit.clear(SERVER)
        for unit in filter(None, (self.first, self.other)):
            unit.keys()
            assert unit.passes()


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except ConflictError:
        return
    raise AssertionError("no reservation conflict")


def register_both(n: Nexuses) -> None:
    n.first.register(SERVER)
    n.second.register(CLIENT)


# ---- checks ------------------------------------------------------------------------------------


def names_itself(n: Nexuses) -> None:
    """VPD page 0x83 names the unit, by every path the same."""
    names = n.first.designators()
    assert names
    assert names[0].code_set == 1
    assert len(names[0].data) in (8, 16)
    if n.other is not None:
        assert n.other.designators() == names


def has_what_is_needed(n: Nexuses) -> None:
    """APTPL and the one type."""
    can = n.first.capabilities()
    assert can.aptpl
    assert can.fits


def serves_everybody_without_a_reservation(n: Nexuses) -> None:
    """A registration alone keeps nobody out."""
    n.first.register(SERVER)
    assert n.first.passes()
    assert n.second.passes()
    assert n.first.reservation() is None


def registers_and_unregisters(n: Nexuses) -> None:
    """The key comes and goes. The generation grows with each key that comes."""
    before = n.first.keys()
    assert before.keys == ()
    n.first.register(SERVER)
    there = n.first.keys()
    assert there.keys == (SERVER,)
    assert there.generation > before.generation
    n.first.register(0, old=SERVER)
    gone = n.first.keys()
    assert gone.keys == ()
    assert gone.generation >= there.generation  # the kernel's target does not count this
    n.first.register(SERVER)
    assert n.first.keys().generation > gone.generation


def registers_in_place_of_the_right_key_only(n: Nexuses) -> None:
    """REGISTER asks for the old key, REGISTER AND IGNORE EXISTING KEY does not."""
    refused(lambda: n.first.register(SERVER, old=CLIENT))
    n.first.register(SERVER)
    refused(lambda: n.first.register(OTHER_SERVER))
    refused(lambda: n.first.register(OTHER_SERVER, old=CLIENT))
    refused(lambda: n.first.register(0, old=CLIENT))
    n.first.register(SERVER, old=SERVER)
    assert n.first.keys().keys == (SERVER,)
    n.first.register(OTHER_SERVER, old=SERVER)
    assert n.first.keys().keys == (OTHER_SERVER,)
    n.first.register(SERVER, ignore=True)
    assert n.first.keys().keys == (SERVER,)


def shows_a_key_once_for_each_nexus(n: Nexuses) -> None:
    """Two nexuses may have one key, and one preempt takes both."""
    n.first.register(SERVER)
    n.second.register(SERVER)
    assert n.first.keys().keys == (SERVER, SERVER)
    n.second.register(CLIENT, old=SERVER)
    assert sorted(n.first.keys().keys) == sorted((SERVER, CLIENT))


def reserves_for_a_registrant_only(n: Nexuses) -> None:
    """RESERVE needs the own key; holding it already is no error."""
    try:
        n.first.reserve(SERVER)
    except UnitError:  # the kernel's target has a check condition for who is not registered
        pass
    else:
        raise AssertionError("reserved for nobody")
    assert n.first.reservation() is None
    n.first.register(SERVER)
    refused(lambda: n.first.reserve(CLIENT))
    n.first.reserve(SERVER)
    n.first.reserve(SERVER)
    assert n.first.reservation() == Held(SERVER, TYPE)
    assert n.first.passes()


def has_one_holder(n: Nexuses) -> None:
    """A second RESERVE conflicts, registered or not."""
    register_both(n)
    n.first.reserve(SERVER)
    refused(lambda: n.second.reserve(CLIENT))
    assert n.second.reservation() == Held(SERVER, TYPE)


def serves_registrants_only(n: Nexuses) -> None:
    """Reads of a nexus conflict unless it is registered; nobody is kept from registering."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    assert not n.second.passes()
    n.second.register(CLIENT)
    assert n.second.passes()
    n.second.register(0, old=CLIENT)
    assert not n.second.passes()
    assert n.first.passes()


def preempts_a_registrant(n: Nexuses) -> None:
    """The key goes, its nexus is refused, the reservation stays."""
    register_both(n)
    n.first.reserve(SERVER)
    assert n.second.passes()
    before = n.first.keys().generation
    n.first.preempt_abort(SERVER, CLIENT)
    after = n.first.keys()
    assert after.keys == (SERVER,)
    assert after.generation > before
    assert not n.second.passes()
    assert n.first.reservation() == Held(SERVER, TYPE)
    refused(lambda: n.first.preempt_abort(SERVER, CLIENT))


def preempts_with_its_own_key_only(n: Nexuses) -> None:
    """Who is not registered, or says another key, takes away nothing."""
    register_both(n)
    n.first.reserve(SERVER)
    refused(lambda: n.first.preempt_abort(OTHER_SERVER, CLIENT))
    n.second.register(0, old=CLIENT)
    refused(lambda: n.second.preempt_abort(CLIENT, SERVER))
    assert n.first.keys().keys == (SERVER,)
    assert n.first.reservation() == Held(SERVER, TYPE)


def moves_the_reservation_to_who_preempts_its_holder(n: Nexuses) -> None:
    """A take-over leaves no moment without a reservation behind, and the old holder outside."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    n.second.register(OTHER_SERVER)
    n.second.preempt_abort(OTHER_SERVER, SERVER)
    assert n.second.reservation() == Held(OTHER_SERVER, TYPE)
    assert n.second.keys().keys == (OTHER_SERVER,)
    assert not n.first.passes()
    assert n.second.passes()


def keeps_the_holder_who_preempts_himself(n: Nexuses) -> None:
    """Registration and reservation are there afterwards."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    n.first.preempt_abort(SERVER, SERVER)
    assert n.first.keys().keys == (SERVER,)
    assert n.first.reservation() == Held(SERVER, TYPE)


def keeps_the_reservation_when_the_holder_changes_his_key(n: Nexuses) -> None:
    """The nexus holds it, under whatever key."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    n.first.register(OTHER_SERVER, old=SERVER)
    assert n.first.reservation() == Held(OTHER_SERVER, TYPE)


def releases(n: Nexuses) -> None:
    """RELEASE of the holder; of anybody else it does nothing."""
    register_both(n)
    n.first.reserve(SERVER)
    n.second.release(CLIENT)
    assert n.first.reservation() == Held(SERVER, TYPE)
    n.first.release(SERVER)
    assert n.first.reservation() is None
    assert sorted(n.first.keys().keys) == sorted((SERVER, CLIENT))


def loses_the_reservation_with_the_holders_registration(n: Nexuses) -> None:
    """Which is why an unmount does not unregister."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    assert not n.second.passes()
    n.first.register(0, old=SERVER)
    assert n.first.reservation() is None
    assert n.second.passes()


def clears(n: Nexuses) -> None:
    """CLEAR takes everything, from any registrant."""
    register_both(n)
    n.first.reserve(SERVER)
    n.second.clear(CLIENT)
    assert n.first.keys().keys == ()
    assert n.first.reservation() is None


def keeps_registrations_through_a_reset(n: Nexuses) -> None:
    """A LOGICAL UNIT RESET aborts commands and nothing else."""
    n.first.register(SERVER)
    n.first.reserve(SERVER)
    n.first.reset()
    assert n.first.keys().keys == (SERVER,)
    assert n.first.reservation() == Held(SERVER, TYPE)
    assert n.first.passes()
    if n.other is not None:
        assert not n.other.passes()


def attentions_are_no_errors(n: Nexuses) -> None:
    """What the unit tells a nexus that it was preempted or cleared is not seen by the caller."""
    for change in range(3):
        register_both(n)
        n.first.reserve(SERVER)
        n.first.preempt_abort(SERVER, CLIENT)
        if change == 0:
            n.second.register(CLIENT)
        elif change == 1:
            assert not n.second.passes()
        else:
            assert n.second.keys().keys == (SERVER,)
        n.first.clear(SERVER)
        assert n.second.passes()


def reads_many_changes_back(n: Nexuses) -> None:
    """Each registration is seen at once, and the generation never goes back."""
    generation = n.first.keys().generation
    key = 0
    for _ in range(12):
        old, key = key, new_server_key((key,))
        n.first.register(key, old=old)
        now = n.first.keys()
        assert now.keys == (key,)
        assert now.generation > generation
        generation = now.generation


# ---- the server on top of it -------------------------------------------------------------------


def outcome_of(reservation: ServerReservation, victim: int, *, issued: bool = False) -> Outcome:
    """One attempt, as the driver makes it."""
    seen = reservation.sight(victim, issued_before=issued)
    if isinstance(seen, Outcome):
        return seen
    if seen is Sight.PRESENT:
        return reservation.preempt(victim)
    return reservation.confirm_gone(victim)


def a_server_takes_fences_and_leaves(n: Nexuses) -> None:
    """Register, take, a client writes, is fenced, and is refused also after the server has gone."""
    reservation = ServerReservation.register(n.first)
    assert reservation.foreign() is None
    reservation.take()
    assert reservation.check().state is State.HELD
    n.second.register(CLIENT)
    assert n.second.passes()
    outcome = outcome_of(reservation, CLIENT)
    assert outcome.verdict is Verdict.CONFIRMED, outcome
    assert not n.second.passes()
    n.second.register(CLIENT)  # nobody can be kept from that
    standing = reservation.check()
    assert standing.state is State.RESTORED, standing
    assert not n.second.passes()
    assert outcome_of(reservation, OTHER_CLIENT).verdict is Verdict.FAILED
    reservation.back_out()
    assert not n.second.passes()
    assert n.second.reservation() == Held(reservation.key, TYPE)


def a_server_takes_over(n: Nexuses) -> None:
    """The second server sees the first and is refused; told to, it takes over. The first ends."""
    one = ServerReservation.register(n.first)
    one.take()
    two = ServerReservation.register(n.second)
    assert two.foreign() == one.key
    refusal = ""
    try:
        two.take()
    except RefusedError as error:
        refusal = str(error)
    assert key_text(one.key) in refusal
    assert one.check().state is State.RESTORED  # it preempts the registration of the other
    assert not n.second.passes()
    n.second.register(two.key)
    two.take(one.key)
    assert two.check().state is State.HELD
    standing = one.check()
    assert standing.state is State.TAKEN
    assert standing.holder == two.key
    assert not n.first.passes()
    assert outcome_of(one, CLIENT).verdict is Verdict.FAILED
    one.close()
    two.close()


def a_server_finds_its_own_key_again(n: Nexuses) -> None:
    """A second start on the same host goes on with key and reservation of the first."""
    one = ServerReservation.register(n.first)
    one.take()
    key = one.key
    again = ServerReservation.register(n.first)
    assert again.key == key
    assert again.foreign() is None
    again.take()
    assert again.check().state is State.HELD
    refused(lambda: n.first.register(new_server_key((key,))))
    assert n.first.keys().keys == (key,)


CHECKS: list[Callable[[Nexuses], None]] = [
    names_itself,
    has_what_is_needed,
    serves_everybody_without_a_reservation,
    registers_and_unregisters,
    registers_in_place_of_the_right_key_only,
    shows_a_key_once_for_each_nexus,
    reserves_for_a_registrant_only,
    has_one_holder,
    serves_registrants_only,
    preempts_a_registrant,
    preempts_with_its_own_key_only,
    moves_the_reservation_to_who_preempts_its_holder,
    keeps_the_holder_who_preempts_himself,
    keeps_the_reservation_when_the_holder_changes_his_key,
    releases,
    loses_the_reservation_with_the_holders_registration,
    clears,
    keeps_registrations_through_a_reset,
    attentions_are_no_errors,
    reads_many_changes_back,
    a_server_takes_fences_and_leaves,
    a_server_takes_over,
    a_server_finds_its_own_key_again,
]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reservation_contract")
    parser.add_argument("--wipe", action="store_true")
    parser.add_argument("devices", nargs="+", metavar="DEVICE")
    arguments = parser.parse_args(words)
    if len(arguments.devices) > 2:
        parser.error("one or two devices")
    try:
        units = [ScsiUnit(path) for path in arguments.devices]
        before = units[0].keys()
    except UnitError as error:
        print(f"contract: {error}")
        return 1
    if before.keys and not arguments.wipe:
        print(
            f"contract: registered already: {', '.join(map(hex, before.keys))}; --wipe clears them"
        )
        return 1
    counts = {"ok": 0, "FAILED": 0, "skipped": 0}
    with tempfile.TemporaryDirectory() as locks:
        for check in CHECKS:
            result, text = run(check, arguments.devices, Path(locks))
            counts[result] += 1
            print(f"{result:8}{check.__name__}{text}", flush=True)
    with contextlib.suppress(UnitError):
        Nexuses(*units).wipe()
    print(f"contract: {counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped")
    return 1 if counts["FAILED"] else 0


def run(check: Callable[[Nexuses], None], devices: list[str], locks: Path) -> tuple[str, str]:
    """One check on the real devices; what came, and the rest of the line.

    Each device claims the unit for itself, as two hosts do.
    """
    nexuses = Nexuses(
        *(ScsiUnit(path, locks=locks / str(number)) for number, path in enumerate(devices))
    )
    try:
        nexuses.wipe()
        begin = time.monotonic()
        check(nexuses)
    except SkippedError:
        return "skipped", ": needs a second nexus"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "FAILED", f": {type(error).__name__} {error} (line {where.lineno}: {where.line})"
    finally:
        for unit in filter(None, (nexuses.first, nexuses.other)):
            unit.close()
    return "ok", f", {1000 * (time.monotonic() - begin):.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
