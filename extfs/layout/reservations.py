"""SCSI persistent reservations as an interface: what a server needs of the unit below its device.

Words of SPC-4 5.13. A *unit* is a logical unit. A *nexus* is one path of one host to it: an
initiator port and a target port. A nexus *registers* a 64-bit *key*; the key names all
registrations that carry it. While one nexus *holds* a reservation of the type exclusive access,
registrants only, the unit refuses reads and writes of every nexus that is not registered
(RESERVATION CONFLICT). Whoever is registered may *preempt* a key: its registrations go, at once and
for all its nexuses; preempt *and abort* also ends the commands that the unit has accepted from
them and not completed. Nobody can be kept from registering: a reservation keeps out who does not
register, not who does.

Calls block, for as long as a command times out, so they are made in threads. Each is one
command, repeated inside where a unit attention only told that something had happened. Errors:

    UnitError                what the unit or the kernel said, in words
      ConflictError            RESERVATION CONFLICT: not registered, another key, or another holder
      UnsupportedError         this device, or this way to it, cannot do that
      UnreachableError         no answer came: whether the command had its effect is not known
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "Capabilities",
    "ConflictError",
    "Designator",
    "Held",
    "Keys",
    "ReservationType",
    "Unit",
    "UnitError",
    "UnreachableError",
    "UnsupportedError",
]


class UnitError(Exception):
    """A command failed; the message is for a person."""


class ConflictError(UnitError):
    """RESERVATION CONFLICT: this nexus is not registered, or not with that key, or the victim's key
    is not there, or somebody else holds the reservation."""


class UnsupportedError(UnitError):
    """It cannot be had here; the message says which requirement fails."""


class UnreachableError(UnitError):
    """No answer: a time-out, a path that is gone. The command may have had its effect, or may have
    it later."""


class ReservationType(enum.IntEnum):
    """SPC-4 table 62; the numbers of SCSI, not those of linux/pr.h."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8


@dataclass(frozen=True, slots=True)
class Designator:
    """A name of the unit itself, the same through every path: `data` in binary.

    NAA of 8 or 16 bytes, EUI-64 of 8, 12 or 16 (SPC-4 7.8.6). `code_set` is 1, binary, in the
    words of RFC 8154 2.3.2 too; `number` is its PS_DESIGNATOR_*.
    """

    kind: Literal["naa", "eui64"]
    code_set: int
    data: bytes

    @property
    def number(self) -> int:
        """PS_DESIGNATOR_EUI64 or PS_DESIGNATOR_NAA."""
        return 3 if self.kind == "naa" else 2

    def __str__(self) -> str:
        return f"{self.kind}.{self.data.hex()}"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the unit says that it can. `types`: None where it does not say.

    `aptpl`: registrations and the reservation can outlive a power loss of the target. `aborts`: a
    preempt and abort does end the accepted commands of a registrant that does not hold the
    reservation. SPC-4 5.13.11.2.6 demands that; not every target does it, and none tells. None: not
    known, so a reset stands for it where the unit can be reset, and the standard where it cannot.
    """

    aptpl: bool
    types: frozenset[ReservationType] | None
    aborts: bool | None = None

    @property
    def fits(self) -> bool:
        """Whether the one type that is used here is not ruled out."""
        needed = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
        return self.types is None or needed in self.types


@dataclass(frozen=True, slots=True)
class Keys:
    """READ KEYS. A key stands there once for each nexus that registered it.

    `generation` grows with each registration, preempt and clear, wraps at 2^32, and begins at 0
    when the target is switched on.
    """

    generation: int
    keys: tuple[int, ...]

    def __contains__(self, key: object) -> bool:
        return key in self.keys


@dataclass(frozen=True, slots=True)
class Held:
    """READ RESERVATION: the holder's key, 0 with the types of all registrants; type 6 is ours."""

    key: int
    type: int

    @property
    def right_type(self) -> bool:
        """Whether it is exclusive access, registrants only."""
        return self.type == ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY


class Unit(Protocol):
    """A unit through one nexus (or, with multipath, through all of a host's)."""

    @property
    def name(self) -> str:
        """For messages: the device."""
        ...

    def claim(self) -> None:
        """Be the only server of this host that reserves this unit, until `close`. UnitError."""
        ...

    def designators(self) -> list[Designator]:
        """Names of the unit, those that NFS clients find it by first; may be empty."""
        ...

    def capabilities(self) -> Capabilities:
        """UnsupportedError: it has no persistent reservations."""
        ...

    def register(self, key: int, *, old: int = 0, ignore: bool = False) -> None:
        """Register `key` in place of `old`, durably (APTPL); key 0: unregister.

        `old` 0: this nexus is not registered, else ConflictError. `ignore`: whatever it is
        registered with. The key `old` itself changes nothing, and so asks whether it is ours.
        """
        ...

    def reserve(self, key: int) -> None:
        """Exclusive access, registrants only. Who holds that already holds it on."""
        ...

    def release(self, key: int) -> None:
        """Give the reservation back; registrations stay."""
        ...

    def preempt_abort(self, key: int, victim: int) -> None:
        """Take away all registrations with the key `victim`, and abort what they had begun.

        If `victim` holds the reservation, this nexus holds it afterwards, without a gap.
        ConflictError: nobody is registered with it, or we are not registered with `key`.
        """
        ...

    def clear(self, key: int) -> None:
        """Take away the reservation and all registrations, our own too."""
        ...

    def keys(self) -> Keys:
        """All registrations, complete."""
        ...

    def reservation(self) -> Held | None:
        """None: nobody holds one, and the unit serves everybody."""
        ...

    def passes(self) -> bool:
        """Whether the unit serves this nexus now: it reads a block. False: RESERVATION CONFLICT."""
        ...

    def idle(self) -> bool:
        """Whether nothing of this host is under way at the unit, as far as the kernel tells."""
        ...

    def reset(self) -> None:
        """LOGICAL UNIT RESET: when it returns, what the unit had accepted from anybody is done or
        aborted. Registrations and the reservation stay (SPC-4 5.13.1)."""
        ...

    def close(self) -> None:
        """Forget descriptors and the claim; on the unit nothing changes."""
        ...
