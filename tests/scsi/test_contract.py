"""A real target under the contract that the simulated unit is held to."""

from __future__ import annotations

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
