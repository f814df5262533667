"""A server that died is replaced by another one on the same unit; its clients go on."""

from __future__ import annotations

import pytest

from scsi.san import San
from scsi.take_over import TakeOver

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

CHANGED = r"taken over|died|cleaning up|replay|grace|holder|recover|heartbeat|mounted"


def test_server_killed(san: San) -> None:
    san.tolerated.append(CHANGED)
    story = TakeOver(san, "one")
    story.write()
    story.lose("killed")
    said = story.refused()
    assert "reserved by the server with key 0xe5f5" in said, said
    assert "--take-over preempts it" in said, said
    story.take_over()
    story.assert_nothing_lost()
    story.end()
