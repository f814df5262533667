"""Opens and locks of several clients against a model that remembers every byte and every OPEN."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from extfs.nfs import constants as n
from extfs.nfs.stateids import Stateid
from nfs.conftest import World
from nfs.file_calls import BOTH, NO_DELEG, READ, WRITE, FileClient, StatusError
from nfs.test_nfs_files_garbage import prove

NAMES = (b"f", b"g")
OWNERS = (b"a", b"b")
CLIENTS = 3
BYTES = 24
STEPS = 400

Who = tuple[int, bytes]


@dataclass
class Open:
    """What one owner has of one file."""

    stateid: Stateid
    pairs: set[tuple[int, int]] = field(default_factory=set)
    locks: dict[bytes, Stateid] = field(default_factory=dict)

    @property
    def access(self) -> int:
        return self._union(0)

    @property
    def deny(self) -> int:
        return self._union(1)

    def _union(self, index: int) -> int:
        found = 0
        for pair in self.pairs:
            found |= pair[index]
        return found


@dataclass
class File:
    fh: bytes = b""
    opens: dict[Who, Open] = field(default_factory=dict)
    held: dict[tuple[int, Who], bool] = field(default_factory=dict)
    """Who has a lock on a byte: is it for writing?"""

    def denies(self, who: Who, access: int, deny: int) -> bool:
        return any(
            other != who and (access & o.deny or deny & o.access) for other, o in self.opens.items()
        )

    def in_the_way(self, owner: Who, start: int, last: int, write: bool) -> bool:
        return any(
            start <= byte <= last and other != owner and (write or writes)
            for (byte, other), writes in self.held.items()
        )

    def unlock(self, owner: Who, start: int, last: int) -> None:
        for byte in range(start, last + 1):
            self.held.pop((byte, owner), None)


class Run:
    """One sequence of random operations."""

    def __init__(self, world: World, seed: int) -> None:
        self.dice = random.Random(seed)
        self.world = world
        self.clients = [
            FileClient(world.session(b"client %d" % number)) for number in range(CLIENTS)
        ]
        self.files = {name: File() for name in NAMES}
        for name, file in self.files.items():
            made = self.clients[0].create(name)
            file.fh = made.fh
            self.clients[0].close(made.fh, made.stateid)

    def status(self, expected: int, call: object, *args: object, **more: object) -> object:
        """Call; its result, or None when it failed as expected."""
        try:
            result = call(*args, **more)  # type: ignore[operator]
        except StatusError as error:
            status, result = error.status, None
        else:
            status = n.NFS4_OK
        assert status == expected, (n.STATUS_NAMES[status], n.STATUS_NAMES[expected], args)
        return result

    def step(self) -> None:
        dice = self.dice
        name = dice.choice(NAMES)
        file = self.files[name]
        number = dice.randrange(CLIENTS)
        who = (number, dice.choice(OWNERS))
        steps = [self.open, self.open, self.close, self.downgrade, self.write]
        dice.choice([*steps, *[self.lock] * 4, self.unlock, self.unlock, self.reboot])(
            name, file, who
        )

    def open(self, name: bytes, file: File, who: Who) -> None:
        access = self.dice.choice((READ, WRITE, BOTH))
        deny = self.dice.choice((0, 0, 0, 0, 0, 1, 2))
        expected = n.NFS4ERR_SHARE_DENIED if file.denies(who, access, deny) else n.NFS4_OK
        got = self.status(
            expected, self.clients[who[0]].open, name, access | NO_DELEG, deny, who[1]
        )
        if got is None:
            return
        known = file.opens.setdefault(who, Open(got.stateid))  # type: ignore[attr-defined]
        assert known.stateid.other == got.stateid.other  # type: ignore[attr-defined]
        known.stateid = got.stateid  # type: ignore[attr-defined]
        known.pairs.add((access, deny))

    def close(self, name: bytes, file: File, who: Who) -> None:
        known = file.opens.pop(who, None)
        if known is None:
            return
        self.clients[who[0]].close(file.fh, known.stateid)
        for owner in known.locks:
            file.unlock((who[0], owner), 0, BYTES)

    def downgrade(self, name: bytes, file: File, who: Who) -> None:
        known = file.opens.get(who)
        if known is None:
            return
        access, deny = self.dice.choice((READ, WRITE, BOTH)), self.dice.choice((0, 0, 1, 2))
        kept = {p for p in known.pairs if not p[0] & ~access and not p[1] & ~deny}
        union = Open(known.stateid, kept)
        possible = bool(kept) and (union.access, union.deny) == (access, deny)
        got = self.status(
            n.NFS4_OK if possible else n.NFS4ERR_INVAL,
            self.clients[who[0]].downgrade,
            file.fh,
            known.stateid,
            access,
            deny,
        )
        if isinstance(got, Stateid):
            known.pairs, known.stateid = kept, got

    def write(self, name: bytes, file: File, who: Who) -> None:
        known = file.opens.get(who)
        if known is not None:
            expected = n.NFS4_OK if known.access & WRITE else n.NFS4ERR_OPENMODE
            self.status(expected, self.clients[who[0]].write, file.fh, known.stateid, 0, b"x", 0)

    def lock(self, name: bytes, file: File, who: Who) -> None:
        known = file.opens.get(who)
        if known is None:
            return
        client = self.clients[who[0]]
        lock_owner = b"lock " + who[1]  # one open for each lock-owner
        owner = (who[0], lock_owner)
        write = self.dice.random() < 0.5
        start = self.dice.randrange(BYTES)
        last = self.dice.randrange(start, BYTES)
        expected = n.NFS4_OK
        if not known.access & (WRITE if write else READ):
            expected = n.NFS4ERR_OPENMODE
        elif file.in_the_way(owner, start, last, write):
            expected = n.NFS4ERR_DENIED
        kind = n.WRITE_LT if write else n.READ_LT
        held = known.locks.get(lock_owner)
        if held is None or self.dice.random() < 0.2:
            args = (file.fh, known.stateid, lock_owner)
        else:
            args = (file.fh, held, None)  # type: ignore[assignment]
        got = self.status(expected, client.lock, *args, start, last - start + 1, kind)
        if isinstance(got, Stateid):
            known.locks[lock_owner] = got
            for byte in range(start, last + 1):
                file.held[byte, owner] = write

    def unlock(self, name: bytes, file: File, who: Who) -> None:
        known = file.opens.get(who)
        held = None if known is None else known.locks.get(b"lock " + who[1])
        if known is None or held is None:
            return
        start = self.dice.randrange(BYTES)
        last = self.dice.randrange(start, BYTES)
        got = self.clients[who[0]].locku(file.fh, held, start, last - start + 1)
        known.locks[b"lock " + who[1]] = got
        file.unlock((who[0], b"lock " + who[1]), start, last)

    def reboot(self, name: bytes, file: File, who: Who) -> None:
        """The client begins anew, and has nothing."""
        if self.dice.random() < 0.8:
            return
        boot = b"%08d" % self.dice.randrange(10**8)
        self.clients[who[0]] = FileClient(self.world.session(b"client %d" % who[0], boot))
        for each in self.files.values():
            each.opens = {w: o for w, o in each.opens.items() if w[0] != who[0]}
            each.held = {k: w for k, w in each.held.items() if k[1][0] != who[0]}

    def prove_locks(self) -> None:
        """Byte for byte, as a stranger sees them in the core's table."""
        for name, file in self.files.items():
            ino = self.world.fs.lookup(1, name).ino
            self.world.fs.open_inode(ino)
            for byte in range(BYTES):
                modes = [w for (b, _), w in file.held.items() if b == byte]
                for write in (False, True):
                    conflict = self.world.fs.locks.test(ino, 1 << 40, byte, 1, write)
                    assert (conflict is not None) == (bool(modes) and (write or any(modes)))
            self.world.fs.release(ino)
            known = self.world.service.states.known_file(ino)
            kept = sum(
                last - start + 1
                for state in (known.locks.values() if known is not None else ())
                for start, last, _ in state.ranges
            )
            assert kept == len(file.held), "what FREE_STATEID and a restart know"


@pytest.mark.parametrize("seed", range(6))
def test_model(world: World, seed: int) -> None:
    run = Run(world, seed)
    for _ in range(STEPS):
        run.step()
    run.prove_locks()
    prove(world.service.states)
