"""Clients with layouts, a lossy network, power cuts: see simulated_world.py for what must hold.

A failure prints the seed; ``python -m nfs.test_nfs_layouts_simulation SEED`` in tests/ repeats it.
"""

from __future__ import annotations

import logging
import sys

import pytest

from extfs.core import Mutant
from nfs.reference_client import Violation
from nfs.simulated_client import SimClient
from nfs.simulated_world import FILE_BLOCKS, FILES, World

SECONDS = 12.0
CLIENTS = 3


def simulate(seed: int, mutant: Mutant = Mutant.NONE) -> dict[str, int]:
    """One run; how often what happened. `Violation`."""
    world = World(seed, mutant)
    try:
        _simulate(world)
    finally:
        world.close()
    return world.happened


def _simulate(world: World) -> None:
    clients = [SimClient(world, b"c%d" % i, kept=i % 2 == 0) for i in range(CLIENTS)]
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
        elif what < 0.65:
            world.kill()
        elif what < 0.72:
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


@pytest.mark.parametrize("batch", range(2))
def test_no_promise_is_broken(batch: int, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("extfs.nfs").setLevel(logging.CRITICAL)
    total: dict[str, int] = {}
    try:
        for seed in range(batch * 20, batch * 20 + 20):
            try:
                for name, count in simulate(seed).items():
                    total[name] = total.get(name, 0) + count
            except Violation as violation:
                pytest.fail(f"python -m nfs.test_nfs_layouts_simulation {seed}: {violation}")
    finally:
        logging.getLogger("extfs.nfs").setLevel(logging.NOTSET)
    for happened in ("commit", "return", "disk write", "disk read", "power cut", "kill", "revoked"):
        assert total.get(happened, 0) > 2, f"{happened} hardly ever happens: {total}"


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[-1]) + 1):
        print(number, simulate(number))
