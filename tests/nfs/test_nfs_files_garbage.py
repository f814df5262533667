"""Prefixes and mutations of operations on files: protocol errors, and nothing else comes of it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from extfs.nfs import constants as n
from extfs.nfs.state import States
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    BOTH,
    DENY_BOTH,
    PUTROOTFH,
    READ,
    WANT_ANY,
    WANT_WRITE,
    FileClient,
    Opened,
    by_name,
    create,
    open_op,
    putfh,
    stateid,
)
from nfs.wire import Reply, bitmap, op, opaque, u32, u64

ROUNDS = 150
"""Mutations of each operation."""


@pytest.fixture
def one(world: World) -> Iterator[FileClient]:
    client = FileClient(world.session(b"one"))
    yield client
    prove(world.service.states)


def prove(states: States) -> None:
    """The invariants of state.py, by counting."""
    files = {}
    for state in states._states.values():
        assert states._of_client[state.client][state.other] is state
        assert bool(state.mark) == (state.other in states._marked.get(state.client, {}))
        if not state.mark and state.file is not None:
            assert state.file.attached
            files[state.file.ino] = state.file
    assert files == states._files
    for file in files.values():
        opens = file.opens.values()
        for index, bit in enumerate((1, 2)):
            assert file._accessing[index] == sum(bool(o.access & bit) for o in opens)
            assert file._denying[index] == sum(bool(o.deny & bit) for o in opens)
        for lock in file.locks.values():
            assert lock in lock.opened.locks
            assert lock.opened in opens
        for holder, delegation in file.delegations.items():
            others = [o for o in opens if o.client is not holder]
            assert not others if delegation.write else not any(o.access & 2 for o in others)
            assert not delegation.write or len(file.delegations) == 1
    assert len(states.owners) == len(
        {(s.client, s.owner) for f in files.values() for s in f.locks.values()}
        | {(w.client, w.owner) for w in states.waiters._waiters.values()}
    )


def opens() -> list[bytes]:
    """With the root as the current filehandle."""
    verifier = b"verifier"
    hows = [
        create(mode=u32(0o644)),
        create(n.GUARDED4, mode=u32(0o600), size=u64(5)),
        create(n.EXCLUSIVE4, verifier),
        create(n.EXCLUSIVE4_1, verifier, mode=u32(0o640)),
        u32(n.OPEN4_NOCREATE),
    ]
    found = [open_op(by_name(b"f"), BOTH, 0, how=how) for how in hows]
    found += [open_op(by_name(b"name %d" % i), READ | WANT_ANY, how=hows[0]) for i in range(2)]
    cur = u32(n.CLAIM_DELEGATE_CUR) + stateid(ANONYMOUS) + opaque(b"f")
    found.append(open_op(cur, READ))
    return found


def on_file(file: Opened, lock: bytes) -> list[bytes]:
    """With the file as the current and the saved filehandle."""
    held = stateid(file.stateid)
    new = u32(1) + u32(0) + held + u32(0) + u64(0) + opaque(b"lock owner")
    ranges = u64(0) + u64(10)
    return [
        open_op(u32(n.CLAIM_FH), READ, DENY_BOTH, b"another"),
        open_op(u32(n.CLAIM_PREVIOUS) + u32(n.OPEN_DELEGATE_WRITE)),
        open_op(u32(n.CLAIM_DELEG_CUR_FH) + held),
        op(n.OP_CLOSE, u32(0), held),
        op(n.OP_OPEN_DOWNGRADE, held, u32(0), u32(BOTH), u32(0)),
        op(n.OP_LOCK, u32(n.WRITEW_LT), u32(0), ranges, new),
        op(n.OP_LOCK, u32(n.READ_LT), u32(0), ranges, u32(0) + lock + u32(0)),
        op(n.OP_LOCKT, u32(n.READ_LT), ranges, u64(0), opaque(b"other")),
        op(n.OP_LOCKU, u32(n.WRITE_LT), u32(0), lock, ranges),
        op(n.OP_TEST_STATEID, u32(2), held, lock),
        op(n.OP_FREE_STATEID, lock),
        op(n.OP_DELEGRETURN, held),
        op(n.OP_WANT_DELEGATION, u32(WANT_WRITE), u32(n.CLAIM_FH)),
        op(n.OP_WANT_DELEGATION, u32(0), u32(n.CLAIM_PREVIOUS), u32(1)),
        op(n.OP_READ, held, u64(0), u32(100)),
        op(n.OP_WRITE, held, u64(0), u32(n.FILE_SYNC4), opaque(b"contents")),
        op(n.OP_COMMIT, u64(0), u32(0)),
        op(n.OP_ALLOCATE, held, u64(0), u64(4096)),
        op(n.OP_DEALLOCATE, held, u64(0), u64(4096)),
        op(n.OP_SEEK, held, u64(0), u32(0)),
        op(n.OP_READ_PLUS, held, u64(0), u32(100)),
        op(n.OP_IO_ADVISE, held, u64(0), u64(100), bitmap(3)),
        op(n.OP_CLONE, held, held, u64(0), u64(1 << 20), u64(0)),
        op(n.OP_COPY, held, held, u64(0), u64(1 << 20), u64(0), u32(1), u32(1), u32(0)),
        op(n.OP_GETXATTR, opaque(b"a")),
        op(n.OP_SETXATTR, u32(0), opaque(b"a"), opaque(b"value")),
        op(n.OP_LISTXATTRS, u64(0), u32(1000)),
        op(n.OP_REMOVEXATTR, opaque(b"a")),
    ]


def calls(client: FileClient, world: World) -> list[tuple[bytes, ...]]:
    """Each operation behind what sets the filehandles, with a file that is open and locked."""
    file = client.create(b"f", BOTH | WANT_WRITE)
    client.write(file.fh, file.stateid, 0, b"contents")
    lock = client.lock(file.fh, file.stateid, b"owner", 100, 10)
    both = (putfh(file.fh), op(n.OP_SAVEFH))
    return [(PUTROOTFH, call) for call in opens()] + [
        (*both, call) for call in on_file(file, stateid(lock))
    ]


def check(reply: Reply) -> None:
    assert reply.status != n.NFS4ERR_SERVERFAULT


def test_every_prefix(world: World, one: FileClient) -> None:
    """BADXDR, wherever the arguments end."""
    for *before, call in calls(one, world):
        for end in range(4, len(call), 4):
            reply = one.run(*before, call[:end])
            assert reply.status in (
                n.NFS4ERR_BADXDR,
                n.NFS4ERR_INVAL,  # of an attribute or a name that was read before the end
                n.NFS4ERR_BADNAME,
            ), (call, end, reply.status)


@pytest.mark.parametrize("seed", range(4))
def test_mutations(world: World, one: FileClient, seed: int) -> None:
    """Words replaced by others, bytes turned around: nothing breaks, and the tables agree."""
    dice = random.Random(seed)
    words = [0, 1, 2, 3, 4, 5, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
    for *before, call in calls(one, world):
        for _ in range(ROUNDS // 4):
            bad = bytearray(call)
            for _ in range(dice.choice((1, 1, 2, 5))):
                at = dice.randrange(1, len(bad) // 4) * 4 if len(bad) > 8 else 4
                if dice.random() < 0.6:
                    bad[at : at + 4] = u32(dice.choice(words))
                else:
                    bad[dice.randrange(4, len(bad))] ^= 1 << dice.randrange(8)
            check(one.run(*before, bytes(bad)))
            one.session.wire.calls.clear()
    prove(world.service.states)
