"""Power cuts: see oracle/powerloss.py for what must hold. scripts/soak powerloss runs many more."""

from __future__ import annotations

import pytest
from oracle import powerloss
from oracle.powerloss import Cut

from extfs import core

pytestmark = pytest.mark.powerloss

OF_THE_JOURNAL = [
    core.Mutant.COMMIT_BEFORE_FLUSH,
    core.Mutant.CHECKPOINT_NO_FLUSH,
    core.Mutant.META_REUSE_EARLY,
    core.Mutant.TAIL_ZERO_EARLY,
]
"""The others are about layouts: test_canary.py."""


@pytest.mark.parametrize("batch", range(8))
def test_cuts_keep_every_promise(batch: int) -> None:
    cuts = (Cut(seed) for seed in range(batch * 50, batch * 50 + 50))
    failed = [
        f"{powerloss.command(cut)}\n{violation}"
        for cut, violation in powerloss.violations(cuts)
        if violation
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", OF_THE_JOURNAL)
def test_mutants_are_caught(mutant: core.Mutant) -> None:
    """Each deliberate mistake in the order of writes breaks a promise within some cuts."""
    cuts = (Cut(seed, mutant) for seed in range(2000))
    assert any(violation for _, violation in powerloss.violations(cuts))
