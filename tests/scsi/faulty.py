"""Runs a command of extfs that dies at a chosen step of a fence, as by kill -9:

    python -m scsi.faulty FAULT ARGUMENTS...

Faults: STEPS below. The step counts that comes first; the process dies once, there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from extfs.cli import main
from extfs.core.layouts import FenceState, Layouts
from extfs.layout.scsi_unit import ScsiUnit


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


def _any(*_: object) -> bool:
    return True


def _recorded(state: FenceState) -> Callable[..., bool]:
    return lambda table, holder, recorded, *_: recorded is state


STEPS: dict[str, tuple[type, str, bool, Callable[..., bool]]] = {
    "before-decided": (Layouts, "fence_put", True, _recorded(FenceState.DECIDED)),
    "decided": (Layouts, "fence_put", False, _recorded(FenceState.DECIDED)),
    "issued": (Layouts, "fence_put", False, _recorded(FenceState.ISSUED)),
    "before-preempt": (ScsiUnit, "preempt_abort", True, _any),
    "preempted": (ScsiUnit, "preempt_abort", False, _any),
    "before-released": (Layouts, "fenced", True, _any),
    "released": (Layouts, "fenced", False, _any),
}


if __name__ == "__main__":
    _die_around(*STEPS[sys.argv[1]])
    sys.argv[:2] = ["extfs"]
    main()
