"""How much memory the cache of metadata may have when the mount does not say."""

from __future__ import annotations

import os

__all__ = ["CACHE_MAX", "CACHE_MIN", "SHARE", "cache_size"]

SHARE = 32
"""One part in so many of the machine's memory, or of what the cgroup may have."""
CACHE_MIN = 64 << 20
CACHE_MAX = 1 << 30


def cache_size(allowed: int | None, memory: int = 0) -> int:
    """Bytes. `allowed`: to the cgroup, None: any; `memory`: of the machine, 0: as it says."""
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if allowed is not None:
        memory = min(memory, allowed)
    return min(max(memory // SHARE, CACHE_MIN), CACHE_MAX)
