"""A real target under the contract that the simulated unit is held to."""

from __future__ import annotations

import pytest

from scsi import initiator
from scsi.san import San

pytestmark = pytest.mark.timeout(300)

_RUN = "import sys, reservation_contract; sys.exit(reservation_contract.main(sys.argv[1:]))"


def test_a_real_unit_keeps_the_contract(idle_san: San) -> None:
    """`python -m reservation_contract`, from one host by two nexuses."""
    san = idle_san
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
    initiator.logout(san.server_guest, "second")
