"""Heads of calls are read once and known then: nothing but the same bytes may pass for one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from extfs.nfs import constants as n
from extfs.nfs import rpc
from nfs import wire


def call(xid: int = 1, *, credential: bytes = wire.ROOT, verifier: bytes = bytes(8)) -> bytes:
    fixed = (xid, n.RPC_CALL, n.RPC_VERSION, n.NFS4_PROGRAM, n.NFS_V4, n.NFSPROC4_COMPOUND)
    return struct.pack(">6I", *fixed) + credential + verifier + b"arguments..."


def arguments(record: bytes) -> tuple[int, rpc.Credential, bytes]:
    found = rpc.read_call(record)
    assert found is not None
    reader = found.arguments
    return found.xid, found.credential, reader.buffer[reader.pos : reader.end]


def test_the_second_call_is_read_like_the_first() -> None:
    for credential in (wire.ROOT, wire.auth_sys(5, 6, (7, 8)), struct.pack(">II", 0, 0)):
        first, second = (
            arguments(call(1, credential=credential)),
            arguments(call(2, credential=credential)),
        )
        assert (first[0], second[0]) == (1, 2)
        assert first[1:] == second[1:] == (first[1], b"arguments...")


def test_users_are_told_apart() -> None:
    users = [wire.auth_sys(uid, gid) for uid in range(3) for gid in range(3)]
    for _ in range(2):
        found = [arguments(call(credential=user))[1] for user in users]
        assert [(who.uid, who.gid) for who in found] == [
            (uid, gid) for uid in range(3) for gid in range(3)
        ]


def test_every_prefix_of_a_known_call_is_none() -> None:
    whole = call()
    arguments(whole)
    for length in range(len(whole) - len(b"arguments...")):
        with pytest.raises(rpc.RecordError):
            rpc.read_call(whole[:length])


def outcome(read: Callable[[bytes], rpc.Call | None], record: bytes) -> Any:
    try:
        found = read(record)
    except (rpc.RecordError, rpc.RejectedError) as error:
        return type(error), getattr(error, "reply", b"")
    return found and (found.xid, found.procedure, found.credential, found.arguments.pos)


def test_every_changed_byte_counts() -> None:
    whole = call()
    rpc.read_call(whole)
    for position in range(4, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        record = bytes(changed)
        first = outcome(rpc.read_call, record)
        assert first == outcome(rpc.read_call, record) == outcome(rpc._read_call, record)


def test_a_verifier_with_a_body_is_no_part_of_the_arguments() -> None:
    record = call(verifier=struct.pack(">II", 0, 4) + b"body")
    for _ in range(2):
        assert arguments(record)[2] == b"arguments..."


def test_there_is_an_end_of_what_is_known() -> None:
    for uid in range(3000):
        assert arguments(call(credential=wire.auth_sys(uid)))[1].uid == uid
    assert len(rpc._heads) <= 1024
