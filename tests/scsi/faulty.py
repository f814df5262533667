"""Runs a command of extfs that dies at a chosen step of a fence, as by kill -9:

    python -m scsi.faulty FAULT ARGUMENTS...

Faults: NAMES below. The step counts that comes first; the process dies once, there. "trace" is no
fault: the process says on standard error when it was inside of what takes time in a fence.
"""

from __future__ import annotations

import os
import signal
import sys
import time
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


def _trace() -> None:
    """Lines "trace WHAT BEGIN END", in seconds of one clock: `scsi.shares` reads them."""
    from extfs.core.layouts import Layouts
    from extfs.layout.policy import Fencing, _Fence
    from extfs.layout.reserved_mount import ReservedMount
    from extfs.layout.scsi_unit import ScsiUnit

    def say(what: str, begin: float) -> None:
        os.write(2, f"trace {what} {begin:.6f} {time.monotonic():.6f}\n".encode())

    def timed(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.monotonic()
            try:
                return original(*arguments, **options)
            finally:
                say(name, begin)

        setattr(owner, name, call)

    for name in ("register", "preempt_abort", "keys", "reservation", "passes", "reset"):
        timed(ScsiUnit, name)
    timed(Layouts, "fence_put")
    timed(ReservedMount, "_hold")
    begins: dict[int, float] = {}
    born, ends = _Fence.__init__, Fencing._end

    def wanted(self: _Fence, *arguments: Any) -> None:
        begins[arguments[0].id] = time.monotonic()
        born(self, *arguments)

    def over(self: Fencing, fence: _Fence, outcome: str, detail: str) -> None:
        say(f"fence-{outcome.replace(' ', '-')}", begins[fence.number])
        ends(self, fence, outcome, detail)

    _Fence.__init__, Fencing._end = wanted, over  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    from extfs.cli import main

    if sys.argv[1] == "trace":
        _trace()
    else:
        _arm(sys.argv[1])
    sys.argv[:2] = ["extfs"]
    main()
