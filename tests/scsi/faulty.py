"""Runs a command of extfs that dies at a chosen step of a fence, as by kill -9:

    python -m scsi.faulty FAULT ARGUMENTS...

Faults: NAMES below. The step counts that comes first; the process dies once, there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

NAMES = (
    "before-decided",
    "decided",
    "issued",
    "before-preempt",
    "preempted",
    "before-released",
    "released",
)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_around(owner: type, name: str, before: bool, at: Callable[..., bool]) -> None:
    """Have a method's call that `at` picks by its arguments die before or after its work."""
    original = getattr(owner, name)

    def dies(*arguments: Any, **options: Any) -> Any:
        if before and at(*arguments):
            _die()
        result = original(*arguments, **options)
        if at(*arguments):
            _die()
        return result

    setattr(owner, name, dies)


def _arm(fault: str) -> None:
    from extfs.core.layouts import FenceState, Layouts
    from extfs.layout.scsi_unit import ScsiUnit

    def always(*_: object) -> bool:
        return True

    def recorded(state: FenceState) -> Callable[..., bool]:
        return lambda table, holder, wanted, *_: wanted is state

    steps: dict[str, tuple[type, str, bool, Callable[..., bool]]] = {
        "before-decided": (Layouts, "fence_put", True, recorded(FenceState.DECIDED)),
        "decided": (Layouts, "fence_put", False, recorded(FenceState.DECIDED)),
        "issued": (Layouts, "fence_put", False, recorded(FenceState.ISSUED)),
        "before-preempt": (ScsiUnit, "preempt_abort", True, always),
        "preempted": (ScsiUnit, "preempt_abort", False, always),
        "before-released": (Layouts, "fenced", True, always),
        "released": (Layouts, "fenced", False, always),
    }
    assert steps.keys() == set(NAMES)
    _die_around(*steps[fault])


if __name__ == "__main__":
    from extfs.cli import main

    _arm(sys.argv[1])
    sys.argv[:2] = ["extfs"]
    main()
