"""What takes too long for scripts/test, of two servers; run by scripts/soak-scsi."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scsi.san import San
from scsi.take_over import Loss, TakeOver

pytestmark = pytest.mark.timeout(600)


def test_server_that_does_not_know_that_it_is_over(own_san: Callable[..., San]) -> None:
    """Its cable to the unit is out, or it is frozen, while another one takes over; then it has its
    unit again, with what it had queued. Back and forth between the two, and one that is killed."""
    san = own_san()
    san.tolerated.append(".")
    losses: tuple[Loss, ...] = ("cut", "frozen", "killed", "cut")
    for how in losses:
        story = TakeOver(san, "one")
        story.write()
        story.lose(how)
        story.take_over()
        story.assert_nothing_lost()
        story.old_comes_back()
        story.end()
    san.server.stop()
    san.server.extfs("fsck", san.server.device, seconds=120)


RUNNING, NOT_RUNNING = 0, 7


def test_the_agent_of_pacemaker_takes_over(own_san: Callable[..., San]) -> None:
    """On two nodes, with the unit's own reservation as what keeps the dead one out."""
    san = own_san()
    san.tolerated.append(".")
    story = TakeOver(san, "one")
    assert story.standby.agent("monitor") == NOT_RUNNING
    story.write()
    story.lose("killed")
    story.take_over(by_agent=True)
    assert san.server.agent("monitor") == RUNNING
    story.assert_nothing_lost()
    assert san.standby.agent("stop") == 0, san.standby.log()  # of what died with its daemon
    assert san.standby.agent("monitor") == NOT_RUNNING
    assert san.server.agent("stop") == 0, san.server.log()
    assert san.server.agent("monitor") == NOT_RUNNING
    san.server.extfs("fsck", san.server.device, seconds=120)
