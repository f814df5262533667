"""Layouts: see oracle/canary.py for what must hold. scripts/soak canary runs many more."""

from __future__ import annotations

import pytest
from oracle import canary
from oracle.canary_world import Run, Violation

from extfs import core

pytestmark = pytest.mark.core

OF_LAYOUTS = [
    core.Mutant.STATE_BY_SIZE,
    core.Mutant.COMMIT_UNCHECKED,
    core.Mutant.QUARANTINE_DROPPED,
    core.Mutant.CONVERT_UNFLUSHED,
    core.Mutant.REVOKE_IN_PLACE,
    core.Mutant.HOLDERS_FORGOTTEN,
]
"""READ_UNHELD needs a read under way while its blocks go: native/tests/test_file_grants.c."""


@pytest.mark.parametrize("batch", range(4))
def test_no_read_returns_what_was_never_written(batch: int) -> None:
    total: dict[str, int] = {}
    for seed in range(batch * 150, batch * 150 + 150):
        try:
            for name, count in canary.run_one(Run(seed)).items():
                total[name] = total.get(name, 0) + count
        except Violation as violation:
            pytest.fail(f"python -m oracle.canary --seed {seed}: {violation}")
    often = ("commit", "revoked", "clone", "daemon died", "power cut", "stale write")
    for happened in (*often, "fence decided", "fence issued", "fence confirmed"):
        assert total.get(happened, 0) > 5, f"{happened} hardly ever happens: {total}"


@pytest.mark.parametrize("mutant", OF_LAYOUTS)
def test_mutants_are_caught(mutant: core.Mutant) -> None:
    """Each deliberate mistake shows within some sequences."""
    for seed in range(4000):
        try:
            canary.run_one(Run(seed, mutant))
        except Violation:
            return
    pytest.fail(f"{mutant.name} was not caught")
