"""Layout stateids of a client that were revoked, until the client returns them.

See invariants 10 to 12 of `extfs.nfs.layouts`: what the client could reach by them is in quarantine
until it says that it has stopped using them.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["REVOKED_MAX", "Revoked"]

REVOKED_MAX = 1024
"""Stateids that are remembered of a client."""


class Revoked:
    """Stateids of a client that were revoked and that it has not returned: of which file, which
    layout type. Of those that are too many to be remembered, the types: only all layouts of a type
    at once can be returned then."""

    __slots__ = ("_forgotten", "_known")

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[int, int]] = {}
        self._forgotten: set[int] = set()

    def __len__(self) -> int:
        return len(self._known) + len(self._forgotten)

    def add(self, other: bytes, ino: int, layout_type: int) -> None:
        """One more."""
        if len(self._known) < REVOKED_MAX:
            self._known[other] = ino, layout_type
        else:
            self._forgotten.add(layout_type)

    def forget(self, layout_types: Iterable[int]) -> None:
        """There are some of these types, nobody knows which."""
        self._forgotten.update(layout_types)

    def is_of(self, other: bytes, ino: int) -> bool:
        """Whether a stateid was revoked, and was of this file."""
        return self._known.get(other, (0, 0))[0] == ino

    def alone(self, other: bytes, ino: int) -> bool:
        """Whether no other one can be of this file."""
        mine = (one for one, (file, _) in self._known.items() if file == ino and one != other)
        return not self._forgotten and next(mine, None) is None

    def returned(self, other: bytes) -> None:
        """The client has returned this one."""
        self._known.pop(other, None)

    def all_returned(self, layout_type: int) -> None:
        """The client has returned all of a type."""
        self._forgotten.discard(layout_type)
        self._known = {one: of for one, of in self._known.items() if of[1] != layout_type}
