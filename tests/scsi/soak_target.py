"""What takes too long for scripts/test, of the kernel's own target; run by scripts/soak-scsi."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from scsi import initiator
from scsi.san import San
from scsi.test_disk import FIRST, persist

pytestmark = pytest.mark.timeout(300)


def test_target_that_forgets(own_san: Callable[..., San]) -> None:
    """It serves everybody again, without a registration."""
    san = own_san()
    server, disk = san.server_guest, san.server.device
    persist(server, disk, f"-o -G -S {FIRST} -Z")
    persist(server, disk, f"-o -R -T 6 -K {FIRST}")
    san.restart_target(forgetful=True)
    assert "NO registered" in persist(server, disk, "-k")
    server.check(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct")


def test_what_is_under_way_does_not_arrive_after_a_fence(own_san: Callable[..., San]) -> None:
    """The unit takes a second for each write, and a client has some under way.

    The kernel's target does not abort them when it is told to preempt and abort: they arrive after
    the answer. After the confirmation of a fence none does, and whatever arrived, was there then.
    """
    san = own_san()
    first = san.server.device
    second = initiator.login(san.server_guest, nexus="second")
    run = "import sys; from scsi import slow_writes; slow_writes.main(*sys.argv[1:])"
    results = {}
    for how in ("preempt", "fence"):
        san.target.throttle("drive0", 1)
        told = san.server.python(run, first, second, how, seconds=120)
        san.target.throttle("drive0", 0)
        results[how] = json.loads(told.splitlines()[-1])
    print(results)
    assert results["preempt"]["then"] < results["preempt"]["later"], "nothing was under way"
    assert "confirmed" in results["fence"]["told"], results
    assert "the unit reset in" in results["fence"]["told"], results
    assert results["fence"]["then"] == results["fence"]["later"], results
