"""The oracle against the layout server: mixed operations of a client, every answer compared.

After a power cut nothing may be missing that the client had an answer for: each of its operations
is durable before its reply, so only the last one, which had none, may have happened or not.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import oracle.driver
import pytest
from oracle import powerloss
from oracle.driver import Driver, random_ops
from oracle.model import Model

from extfs import core
from nfs.model_subject import NfsSubject
from nfs.wire import make_service


@pytest.fixture(autouse=True)
def names_that_clients_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the driver's names is not UTF-8."""
    names = [name.replace(b"\xff", "ÿ".encode()) for name in oracle.driver.NAMES]
    monkeypatch.setattr(oracle.driver, "NAMES", names)


@pytest.fixture(scope="module")
def formatted() -> Iterator[core.SimDevice]:
    sim = powerloss.formatted()
    yield sim
    sim.close()


def client(fs: core.Filesystem, owner: bytes = b"model") -> NfsSubject:
    """A client of a new server; its grace period is over."""
    service, runner = make_service(fs)
    runner.advance(1000)
    return NfsSubject(fs, service, owner)


@pytest.mark.parametrize("seed", range(6))
def test_programs(formatted: core.SimDevice, seed: int) -> None:
    """Then the same state through a server that was started anew, with the handles of the old."""
    sim = formatted.clone()
    try:
        with powerloss.open_fs(sim) as fs:
            subject = client(fs)
            driver = Driver(Model(), subject)
            driver.run(random_ops(random.Random(seed), 600))
            driver.check_all()
            handles = subject.handles
        with powerloss.open_fs(sim) as fs:
            again = client(fs, b"again")
            driver.subject = again
            driver.check_all()
            for ino, handle in again.handles.items():
                assert handles[ino] == handle
        assert powerloss.fsck(sim) == []
    finally:
        sim.close()


def run_until_cut(sim: core.SimDevice, seed: int) -> Driver:
    """Operations until the power goes; all that were answered are durable."""
    rng = random.Random(seed)
    fs = powerloss.open_fs(sim)
    driver = Driver(Model(), client(fs), keep_history=True)
    driver.begin()
    sim.crash_at(sim.events + rng.randrange(1, 60))
    program = random_ops(rng, 60, powerloss.THEMES[seed % len(powerloss.THEMES)])
    try:
        for op in program:
            before = driver.step
            driver.apply(op)
            if driver.step != before:
                driver.durable = driver.step
                for ino in driver.touched[driver.step]:
                    driver.synced[ino] = driver.step
    except OSError:
        if not sim.crashed:
            raise
    finally:
        fs.abandon()
    return driver


@pytest.mark.powerloss
@pytest.mark.parametrize("block", range(4))
def test_power_cuts(
    formatted: core.SimDevice, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "extfs.nfs")  # it says that the device is gone
    cut_short = 0
    for seed in range(block * 25, block * 25 + 25):
        sim = formatted.clone()
        try:
            driver = run_until_cut(sim, seed)
            cut_short += sim.crashed
            sim.restart(seed)
            powerloss.check(sim, driver, powerloss.Cut(seed))
        finally:
            sim.close()
    assert cut_short > 12, "the power hardly ever went"
