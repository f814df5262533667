"""How a server stands to the unit that it reserves: the answers of server_reservation.py."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from extfs.layout.keys import is_client_key, is_server_key, key_text
from extfs.layout.reservations import (
    Capabilities,
    ConflictError,
    Designator,
    Keys,
    Unit,
    UnitError,
)

__all__ = ["RefusedError", "Sight", "Standing", "State", "registered_key", "requirements"]


class RefusedError(Exception):
    """This unit cannot be served; the message says which requirement fails, or who holds it."""


class State(enum.Enum):
    """HELD: it was in force. RESTORED: now it is. TAKEN: another server has it; stop writing."""

    HELD = "held"
    RESTORED = "restored"
    TAKEN = "taken"


@dataclass(frozen=True, slots=True)
class Standing:
    """What `check` found and did; `detail` is for the log, empty when there is nothing to tell.

    `holder`: the key that has the reservation, when TAKEN. After a target forgot: `unguarded`,
    seconds for which anybody may have been served, at most; `lost_keys`, clients' registrations
    that went with ours (these clients are refused now, until they register a new key); `fenced`,
    how many clients fenced by this mount may have written meanwhile, to blocks that others have.
    """

    state: State
    detail: str = ""
    holder: int | None = None
    unguarded: float | None = None
    lost_keys: tuple[int, ...] = ()
    fenced: int = 0


class Sight(enum.Enum):
    """What a fence finds: PRESENT, to be preempted; GONE, with evidence that it was shut out."""

    PRESENT = "present"
    GONE = "gone"


def requirements(unit: Unit) -> tuple[list[Designator], Capabilities]:
    """What the unit is named and can; `RefusedError` names the requirement that it fails."""
    try:
        designators, capabilities = unit.designators(), unit.capabilities()
    except UnitError as error:
        raise RefusedError(f"{unit.name}: {error}") from error
    if not designators:
        raise RefusedError(
            f"{unit.name}: no NAA or EUI-64 designator names the unit, so no client would find it"
        )
    if not capabilities.aptpl:
        raise RefusedError(
            f"{unit.name}: reservations do not outlive a power loss of the target (no APTPL)"
        )
    if not capabilities.fits:
        raise RefusedError(
            f"{unit.name}: no reservations of the type exclusive access, registrants only"
        )
    return designators, capabilities


def registered_key(unit: Unit, keys: Keys) -> int:
    """The key that this host's nexus is registered with: each is asked for, nothing changes."""
    for key in dict.fromkeys(keys.keys):
        try:
            unit.register(key, old=key)
        except ConflictError:
            continue
        if is_server_key(key):
            return key
        whose = "an NFS client" if is_client_key(key) else "another program"
        raise RefusedError(
            f"{unit.name}: {whose} on this host has registered key {key_text(key)}, which a server "
            "must not share"
        )
    raise RefusedError(f"{unit.name}: this host is registered with a key that READ KEYS lacks")
