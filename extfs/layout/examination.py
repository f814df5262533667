"""Tries what a unit can, for a person, and leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from extfs.layout.keys import is_client_key, is_server_key, key_text, new_server_key
from extfs.layout.reservations import Held, Keys, ReservationType, Unit, UnitError

__all__ = ["Finding", "examine", "key_owner"]

_T = TypeVar("_T")
_ABORTS = {
    True: "aborts",
    False: "does not abort: the unit is reset at each fence",
    None: "it cannot be seen whether it aborts: the unit is reset at each fence",
}
_TYPE = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `fits`: None: it decides nothing, or was not tried."""

    subject: str
    fits: bool | None
    text: str


def key_owner(key: int) -> str:
    """In words whose key this is by its form."""
    if is_server_key(key):
        return "an extfs server"
    return "a client of an extfs server" if is_client_key(key) else "not of extfs"


def examine(unit: Unit, *, reserve: bool = False) -> Generator[Finding, None, None]:
    """What the unit is and can, one by one.

    Registers a key and takes it back if nobody is registered. `reserve`: also reserves for a
    moment, in which the unit refuses every other host. Another host's key is not preempted, for
    that takes two hosts.
    """
    names = yield from _tried("designators", unit.designators)
    if names is not None:
        found = ", ".join(map(str, names)) or "no NAA, no EUI-64: clients would not find the unit"
        yield Finding("designators", bool(names), found)
    able = yield from _tried("reservations", unit.capabilities)
    if able is None:
        return
    if able.types is None:
        told = "the unit does not tell which"
    else:
        told = ", ".join(kind.name.lower().replace("_", " ") for kind in sorted(able.types))
    yield Finding("reservation types", able.fits, told)
    yield Finding("APTPL", able.aptpl, "kept through a power loss" if able.aptpl else "no")
    yield Finding(
        "preempt and abort",
        None,
        _ABORTS[able.aborts],
    )
    state = yield from _tried("registrations", lambda: (unit.keys(), unit.reservation()))
    if state is None:
        return
    keys, held = state
    yield Finding("registrations", None, _registrations(keys))
    yield Finding("reservation", None, _reservation(held))
    if keys.keys or held is not None:
        yield Finding("round trip", None, "not tried: the unit is in use")
        return
    yield from _round_trip(unit, keys, reserve=reserve)


def _tried(subject: str, call: Callable[[], _T]) -> Generator[Finding, None, _T | None]:
    try:
        return call()
    except UnitError as error:
        yield Finding(subject, False, str(error))
        return None


def _registrations(keys: Keys) -> str:
    listed = ", ".join(f"{key_text(key)} ({key_owner(key)})" for key in keys.keys)
    return f"{listed or 'none'}; generation {keys.generation}"


def _reservation(held: Held | None) -> str:
    if held is None:
        return "none"
    whose = f"key {key_text(held.key)} ({key_owner(held.key)})" if held.key else "all registrants"
    return f"{whose}, type {held.type}"


def _round_trip(unit: Unit, before: Keys, *, reserve: bool) -> Generator[Finding, None, None]:
    key = new_server_key()
    try:
        unit.register(key)
        now = unit.keys()
        fits = now.keys == (key,) and now.generation != before.generation
        seen = "read back" if fits else f"but READ KEYS told {_registrations(now)}"
        yield Finding("register", fits, f"key {key_text(key)}: {seen}")
        if reserve:
            yield _reserved(unit, key)
        else:
            yield Finding("reserve", None, "not tried: --reserve does, and refuses other hosts")
        unit.register(0, old=key)
        after = unit.keys()
        fits = not after.keys and unit.reservation() is None
        yield Finding("unregister", fits, "as before" if fits else _registrations(after))
    except UnitError as error:
        yield Finding("round trip", False, str(error))
    finally:
        with contextlib.suppress(UnitError):  # not registered any more, where all went well
            unit.register(0, old=key)
    yield Finding("preempt", None, "not tried: that takes a second host")


def _reserved(unit: Unit, key: int) -> Finding:
    unit.reserve(key)
    held = unit.reservation()
    if held != Held(key, _TYPE):
        return Finding("reserve", False, f"but READ RESERVATION told {_reservation(held)}")
    if not unit.passes():
        return Finding("reserve", False, "and the unit refuses us: it has other paths to this host")
    unit.preempt_abort(key, key)
    held = unit.reservation()
    fits = held == Held(key, _TYPE)
    return Finding("reserve", fits, "read back, and after a preempt of ourselves" if fits else "no")
