"""Damaged arguments of operations on names and attributes: answered, and never a server fault."""

from __future__ import annotations

import random
import stat

import pytest

from extfs.core import ROOT_INODE
from extfs.nfs import constants as n
from nfs.calls import (
    access,
    client_time,
    create,
    do,
    fattr,
    getattr_all,
    getfh,
    link,
    lookup,
    nverify,
    owner,
    path,
    putfh,
    putrootfh,
    readdir,
    remove,
    rename,
    savefh,
    secinfo,
    secinfo_no_name,
    setattr_,
    verify,
)
from nfs.conftest import World
from nfs.wire import u32, u64

ROUNDS = 400
FILE = stat.S_IFREG | 0o644


def mutated(randomness: random.Random, encoded: bytes) -> bytes:
    """An operation with some of its argument bytes changed, cut or doubled."""
    body = bytearray(encoded)
    for _ in range(randomness.randint(1, 4)):
        kind = randomness.randrange(4)
        position = randomness.randrange(4, len(body) + 1)
        if kind == 0 and position < len(body):
            body[position] = randomness.choice((0, 1, 2, 4, 0x7F, 0x80, 0xFF))
        elif kind == 1 and position < len(body):
            body[position] ^= 1 << randomness.randrange(8)
        elif kind == 2:
            del body[max(4, position & ~3) :]
        else:
            body[position:position] = randomness.randbytes(4)
    return bytes(body)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_arguments(world: World, seed: int) -> None:
    randomness = random.Random(seed)
    fs = world.fs
    place = fs.mkdir(ROOT_INODE, b"dir", 0o755).ino
    fs.mknod(place, b"file", FILE)
    fs.symlink(place, b"link", b"to")
    session = world.session()
    handle = do(session, *path(b"dir", b"file"), getfh())[-1]
    everything = fattr(
        {
            n.FATTR4_MODE: u32(0o755),
            n.FATTR4_OWNER: owner(1),
            n.FATTR4_OWNER_GROUP: owner(2),
            n.FATTR4_TIME_ACCESS_SET: client_time(5),
        }
    )
    calls = [
        putfh(handle),
        lookup(b"file"),
        create(n.NF4DIR, b"a", everything),
        create(n.NF4LNK, b"b", everything, target=b"target"),
        create(n.NF4CHR, b"c", everything, device=(1, 2)),
        link(b"d"),
        remove(b"file"),
        rename(b"file", b"g"),
        secinfo(b"file"),
        secinfo_no_name(0),
        getattr_all(),
        setattr_({n.FATTR4_SIZE: u64(10), n.FATTR4_MODE: u32(0o600)}),
        verify({n.FATTR4_SIZE: u64(10)}),
        nverify({n.FATTR4_TYPE: u32(1)}),
        access(0x3F),
        readdir(n.FATTR4_TYPE, n.FATTR4_FILEHANDLE, n.FATTR4_RDATTR_ERROR),
    ]
    starts = [
        [putrootfh(), savefh()],
        [*path(b"dir"), savefh()],
        [putfh(handle), savefh(), putrootfh()],
        [putfh(handle)],
    ]
    statuses = set()
    for _ in range(ROUNDS):
        start = [call.encoded for call in randomness.choice(starts)]
        damaged = mutated(randomness, randomness.choice(calls).encoded)
        statuses.add(session.run(*start, damaged).status)
    assert n.NFS4ERR_SERVERFAULT not in statuses
    assert n.NFS4ERR_BADXDR in statuses
    assert len(statuses) > 8, "the damage is not varied enough"
    assert do(session, *path(b"dir"), getattr_all()), "the server still answers"


@pytest.mark.parametrize("seed", range(4))
def test_noise(world: World, seed: int) -> None:
    """Arguments that nobody ever wrote."""
    randomness = random.Random(seed)
    session = world.session()
    statuses = set()
    for _ in range(ROUNDS):
        number = randomness.choice(list(world.service.operations))
        if number in (n.OP_SEQUENCE, n.OP_DESTROY_SESSION, n.OP_DESTROY_CLIENTID):
            continue
        length = 4 * randomness.randrange(40)
        words = b"".join(
            u32(randomness.choice((0, 1, 2, 3, 8, randomness.getrandbits(32))))
            for _ in range(length // 4)
        )
        start = [call.encoded for call in (putrootfh(), savefh())]
        statuses.add(session.run(*start, u32(number) + words).status)
    assert n.NFS4ERR_SERVERFAULT not in statuses
