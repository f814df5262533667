"""Registration keys of SCSI persistent reservations: whose registration is it?

A key is 64 bits that a registrant chooses for itself. Ours begin with 0xE5F5, so that a key that is
seen on a unit tells whether extfs gave it out; bit 47 tells a server from a client; the 47 bits
below are random. Two servers, or two mounts, do not have the same key but by a chance of 2^-47; a
client's key is compared with all that are in use, because one preempt takes every registration
with that key.

A client's key belongs to one holder for the whole life of its record. A client that was fenced
comes back as a new holder with a new key, so that a key which was once preempted never means
somebody who may write.
"""

from __future__ import annotations

import secrets
from collections.abc import Container

__all__ = ["is_client_key", "is_server_key", "key_text", "new_client_key", "new_server_key"]

_PREFIX = 0xE5F5
_SERVER = 1 << 47
_RANDOM_BITS = 47


def new_server_key(taken: Container[int] = ()) -> int:
    """A key for a server that is not in `taken`."""
    return _new(_SERVER, taken)


def new_client_key(taken: Container[int]) -> int:
    """A key for a client's holder that is not in `taken`: the keys of all holders, and those that
    are registered on the unit."""
    return _new(0, taken)


def _new(kind: int, taken: Container[int]) -> int:
    while True:
        key = _PREFIX << 48 | kind | secrets.randbits(_RANDOM_BITS)
        if key not in taken:
            return key


def is_server_key(key: int) -> bool:
    """Whether an extfs server registers with it."""
    return key >> 48 == _PREFIX and bool(key & _SERVER)


def is_client_key(key: int) -> bool:
    """Whether an extfs server gave it to a client."""
    return key >> 48 == _PREFIX and not key & _SERVER


def key_text(key: int) -> str:
    """As tools print it: 0x and 16 digits."""
    return f"{key:#018x}"
