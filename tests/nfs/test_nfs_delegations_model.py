"""Delegations given, recalled, returned and revoked at random; some holders are deaf at times."""

from __future__ import annotations

import random

import pytest

from extfs.core import DelegationConflict
from extfs.nfs import constants as n
from extfs.nfs.stateids import Stateid
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    BOTH,
    NO_DELEG,
    READ,
    WANT_ANY,
    WANT_READ,
    WANT_WRITE,
    WRITE,
    FileClient,
    Opened,
    StatusError,
    read_stateid,
)
from nfs.layout_calls import answer, events, take_callbacks
from nfs.test_nfs_files_garbage import prove

CLIENTS = 3
STEPS = 1000
ACCESSES = [READ, READ | WANT_READ, READ | WANT_ANY, BOTH, BOTH | WANT_WRITE, WRITE | WANT_ANY]


class Holder:
    """A client; `deaf`: it gets recalls and does nothing about them."""

    def __init__(self, world: World, name: bytes) -> None:
        self.client = FileClient(world.session(name))
        self.opened: Opened | None = None
        self.held: Stateid | None = None
        self.deaf = False

    def hear(self) -> None:
        """Answer what came; the delegation is returned for a recall."""
        for callback in take_callbacks(self.client.session.wire):
            if self.deaf:
                answer(self.client.session.wire, callback, n.NFS4ERR_DELAY)
                continue
            answer(self.client.session.wire, callback, n.NFS4_OK)
            assert callback.op == n.OP_CB_RECALL
            if self.held is not None and read_stateid(callback.body).other == self.held.other:
                self.give_back()

    def give_back(self) -> None:
        if self.held is None or self.opened is None:
            return
        held, self.held = self.held, None
        if not self.was_revoked(held):
            self.client.delegreturn(self.opened.fh, held)

    def was_revoked(self, held: Stateid) -> bool:
        """It was asked, and too slow: then the stateid is freed."""
        (status,) = self.client.test(held)
        if status == n.NFS4ERR_DELEG_REVOKED:
            self.client.free(held)
        return status != n.NFS4_OK

    def open(self, access: int) -> bool:
        """False: it has to come again."""
        try:
            got = self.client.open(b"f", access)
        except StatusError as error:
            if error.status != n.NFS4ERR_DELAY:
                raise
            return False
        self.opened = got
        if got.delegation.given:
            assert self.held is None or self.was_revoked(self.held)
            self.held = got.delegation.stateid
        return True

    def close(self) -> None:
        if self.opened is None:
            return
        self.give_back()
        self.client.close(self.opened.fh, Stateid(0, self.opened.stateid.other))
        self.opened = None


@pytest.mark.parametrize("seed", range(8))
def test_model(world: World, seed: int) -> None:
    """After each step nobody has what contradicts a delegation; in the end all is given back."""
    dice = random.Random(seed)
    holders = [Holder(world, b"client %d" % number) for number in range(CLIENTS)]
    made = holders[0].client.create(b"f", BOTH | NO_DELEG)
    holders[0].client.close(made.fh, made.stateid)
    ino = world.fs.lookup(1, b"f").ino
    for _ in range(STEPS):
        holder = dice.choice(holders)
        what = dice.randrange(9)
        if what < 3:
            holder.open(dice.choice(ACCESSES))
        elif what < 5:
            holder.close()
        elif what == 5:
            holder.give_back()
        elif what == 6:
            holder.deaf = dice.random() < 0.3
        elif what == 7:
            kind = dice.choice(list(DelegationConflict))
            assert world.fs.delegations.make_way(ino, kind) in (True, False)
            events(world)
        else:
            world.runner.advance(dice.choice((1, 21, 30, 30)))
            for each in holders:  # their leases go on
                each.client.test()
        if dice.random() < 0.7:
            for each in holders:
                each.hear()
        prove(world.service.states)
        in_core = 0
        for client in world.service.clients.all_living():
            in_core += len(world.fs.delegations.of(client.holder_id)) if client.holder_id else 0
        assert in_core == world.service.states.status()["delegations"]
    for holder in holders:
        holder.close()
        holder.hear()
    events(world)
    world.runner.advance(1)
    assert holders[0].client.read(made.fh, ANONYMOUS, 0, 1) == (b"", True)
    for holder in holders:
        assert holder.open(BOTH | WANT_WRITE)
        holder.close()
    assert world.service.states.status()["delegations"] == 0
    assert world.service.states.delegations.recalls_in_progress() == 0
