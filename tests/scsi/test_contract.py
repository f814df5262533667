"""A real target under the contract that the simulated unit is held to."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from scsi import initiator
from scsi.san import San

pytestmark = pytest.mark.timeout(300)

_RUN = "import sys, reservation_contract; sys.exit(reservation_contract.main(sys.argv[1:]))"


def test_a_real_unit_keeps_the_contract(own_san: Callable[..., San]) -> None:
    """`python -m reservation_contract`, from one host by two nexuses."""
    san = own_san()
    first = san.server.device
    second = initiator.login(san.server_guest, nexus="second")
    told = san.server.python(_RUN, first, second, seconds=200)
    print(told)
    last = told.splitlines()[-1]
    assert last.startswith("contract: "), told
    assert " 0 failed, 0 skipped" in last, told
    told = san.server.extfs("fence", "test", "--reserve", first)
    print(told)
    assert "layouts=scsi can be used" in told


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
