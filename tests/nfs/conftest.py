"""Fixtures of the layout server's tests: a server on the simulated device, without sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from extfs.core import Filesystem, SimDevice, mkfs
from extfs.nfs.service import Service
from nfs.wire import Runner, Session, Wire, make_service

DEVICE_BYTES = 64 << 20


@dataclass
class World:
    """A server, its runner and its filesystem."""

    fs: Filesystem
    service: Service
    runner: Runner
    sim: SimDevice

    def session(self, owner: bytes = b"one", verifier: bytes = b"boot") -> Session:
        """A client."""
        return Session(self.service, owner, verifier)

    def wire(self) -> Wire:
        """A connection without a session."""
        return Wire(self.service)


@pytest.fixture
def world() -> Iterator[World]:
    """An empty filesystem on the simulated device, exported whole to loopback."""
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device()) as fs:
            service, runner = make_service(fs)
            yield World(fs, service, runner, sim)
