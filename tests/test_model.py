"""The core and the mount against the oracle: mixed operations, every answer compared."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import powerloss
from oracle.driver import WEIGHTS, Driver, random_ops
from oracle.model import Model
from oracle.subjects import CoreSubject, MountSubject

from extfs import core

numbers = st.integers(0, (1 << 32) - 1)
programs = st.lists(
    st.tuples(st.sampled_from(sorted(WEIGHTS)), numbers, numbers, numbers, numbers), max_size=40
)


@pytest.fixture(scope="module")
def formatted() -> Iterator[core.SimDevice]:
    sim = powerloss.formatted()
    yield sim
    sim.close()


def run_on_core(base: core.SimDevice, ops: list[Any], *, reopen: bool = True) -> None:
    """A program on a fresh filesystem; then the same state after a clean close and open."""
    sim = base.clone()
    try:
        with powerloss.open_fs(sim) as fs:
            driver = Driver(Model(), CoreSubject(fs))
            driver.run(ops)
            driver.check_all()
        if reopen:
            with powerloss.open_fs(sim) as fs:
                driver.subject = CoreSubject(fs)
                driver.check_all()
        assert powerloss.fsck(sim) == []
    finally:
        sim.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(ops=programs)
def test_programs_on_the_core(formatted: core.SimDevice, ops: list[Any]) -> None:
    run_on_core(formatted, ops)


@pytest.mark.parametrize("seed", range(6))
def test_long_programs_on_the_core(formatted: core.SimDevice, seed: int) -> None:
    run_on_core(formatted, random_ops(random.Random(seed), 1000))


@pytest.mark.fuse
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_long_programs_on_a_mount(
    extfs: Any, loop_device: Any, mount_extfs: Callable[..., Any], seed: int
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device)
    root = Path(mounted.mountpoint, "model")
    root.mkdir(mode=0o755)
    model = Model(os.stat(root).st_ino)
    driver = Driver(model, MountSubject(root, model))
    driver.run(random_ops(random.Random(1000 + seed), 1500))
    driver.check_all()
    mounted.unmount()
    extfs("fsck", loop_device)
    again = mount_extfs(loop_device)
    driver.subject = MountSubject(Path(again.mountpoint, "model"), model)
    driver.check_all()
