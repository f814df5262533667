"""Clients with layouts, a lossy network, power cuts: see simulated_world.py for what must hold.

A failure prints the command that repeats it, in tests/:
``python -m nfs.test_nfs_layouts_simulation block|scsi SEED``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable

import pytest

from extfs.core import Mutant
from extfs.nfs import constants as n
from extfs.nfs import layout_commit
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_holders import Holders
from extfs.nfs.layout_states import LayoutState, Received
from extfs.nfs.layouts import LayoutTable
from nfs.reference_client import Violation
from nfs.simulated_client import SimClient
from nfs.simulated_world import FILE_BLOCKS, FILES, World

SECONDS = 12.0
CLIENTS = 3


def simulate(
    seed: int, mutant: Mutant = Mutant.NONE, *, scsi: bool = False, fences: bool = True
) -> dict[str, int]:
    """One run; how often what happened. `Violation`."""
    world = World(seed, mutant, scsi=scsi, fences=fences)
    try:
        _simulate(world)
    finally:
        world.close()
    return world.happened


def _simulate(world: World) -> None:
    clients = [
        SimClient(world, b"c%d" % i, kept=i % 2 == 0, host=f"10.0.0.{i + 1}")
        for i in range(CLIENTS)
    ]
    world.timers_changed()
    end = world.now + SECONDS
    if world.chance(0.4):
        world.sim.crash_at(world.sim.events + world.random.randrange(20, 600))
    while world.now < end:
        world.run(world.now + world.random.random())
        what = world.random.random()
        file, block = world.random.randrange(FILES), world.random.randrange(FILE_BLOCKS)
        if what < 0.3:
            world.local_write(file, block)
        elif what < 0.6:
            world.local_read(file, range(FILE_BLOCKS))
        elif what < 0.63:
            world.random.choice(clients).reboot()
        elif what < 0.67:
            world.kill()
        elif what < 0.74:
            client = world.random.choice(clients)
            if client.wire.open:
                client.disconnect()
    world.sim.crash_at(0)
    for client in clients:
        client.stopping = True
    settle(world, clients)
    for file in range(FILES):
        _until(world, lambda: world.local_read(file, range(FILE_BLOCKS)), "reads", clients)  # noqa: B023


def settle(world: World, clients: list[SimClient]) -> None:
    """Everybody ends what is under way, returns everything, and nothing is left out."""
    _until(world, lambda: all(c.ready and c.tasks == 0 for c in clients), "tasks", clients)
    for client in clients:
        client.start(client.finish())
    _until(world, lambda: all(c.tasks == 0 for c in clients), "returns", clients)
    _until(world, lambda: not world.service.layouts.status()["recalls"], "recalls", clients)


def _until(world: World, over: object, what: str, clients: list[SimClient]) -> None:
    limit = world.now + 90
    while not over():  # type: ignore[operator]
        if world.now >= limit:
            state = [(c.name, c.ready, c.tasks, c.slots, len(c.queue)) for c in clients]
            raise Violation(f"{what}: no end. {state} {world.service.layouts.status()}")
        world.run(world.now + 0.25)


HAPPENS = ("commit", "return", "disk write", "disk read", "power cut", "kill", "revoked")


@pytest.mark.parametrize(
    ("kind", "batch", "happens"),
    [
        ("block", 0, HAPPENS),
        ("block", 1, HAPPENS),
        ("scsi", 0, (*HAPPENS, "fenced", "registered", "refused by the unit")),
    ],
)
def test_no_promise_is_broken(
    kind: str, batch: int, happens: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("extfs.nfs").setLevel(logging.CRITICAL)
    total: dict[str, int] = {}
    try:
        for seed in range(batch * 12, batch * 12 + 12):
            try:
                for name, count in simulate(seed, scsi=kind == "scsi").items():
                    total[name] = total.get(name, 0) + count
            except Violation as violation:
                again = f"python -m nfs.test_nfs_layouts_simulation {kind} {seed}"
                pytest.fail(f"{again}: {violation}")
    finally:
        logging.getLogger("extfs.nfs").setLevel(logging.NOTSET)
    for happened in happens:
        assert total.get(happened, 0) > 2, f"{happened} hardly ever happens: {total}"


# ---- rules of `extfs.nfs.layouts` that are broken on purpose -------------------------------------


def _believes_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 9: who says it has nothing may not have received it yet."""
    monkeypatch.setattr(Received, "proven", lambda self: True)


def _commits_like_linux_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 10: a refusal that loses data must not be one that counts as success."""
    bad = NfsError(n.NFS4ERR_BADLAYOUT)
    monkeypatch.setattr(layout_commit, "refusal", lambda error, loses: bad)
    monkeypatch.setattr(layout_commit, "_check_stateid", lambda *given, **named: None)


def _forgets_the_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 11: what was not returned is still in somebody's hands."""
    seen = LayoutTable.revoked

    def revoked(self: LayoutTable, state: LayoutState) -> None:
        seen(self, state)
        holder = state.client.holder_id
        with contextlib.suppress(OSError):
            self.service.fs.layouts.give_all_back(holder)

    monkeypatch.setattr(LayoutTable, "revoked", revoked)


def _tells_keys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 15: a client that was fenced believes in its other layouts still."""
    monkeypatch.setattr(Holders, "_recall_all", Holders.has_nothing)


def test_a_fence_that_refuses_nothing_is_seen() -> None:
    _must_be_seen(scsi=True, fences=False)


@pytest.mark.slow
def test_keys_that_are_told_too_early_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _tells_keys_at_once(monkeypatch)
    _must_be_seen(scsi=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [_believes_everybody, _commits_like_linux_wants, _forgets_the_lost],
)
def test_broken_rules_are_seen(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    _must_be_seen()


def _must_be_seen(*, scsi: bool = False, fences: bool = True) -> None:
    logging.getLogger("extfs.nfs").setLevel(logging.CRITICAL)
    try:
        for seed in range(200):
            try:
                simulate(seed, scsi=scsi, fences=fences)
            except Violation as violation:
                print(seed, violation)
                return
    finally:
        logging.getLogger("extfs.nfs").setLevel(logging.NOTSET)
    pytest.fail("nothing was noticed")


if __name__ == "__main__":
    for number in range(int(sys.argv[2]), int(sys.argv[-1]) + 1):
        print(number, simulate(number, scsi=sys.argv[1] == "scsi"))
