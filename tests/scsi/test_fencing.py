"""A client that does not answer is shut out by the storage, before what it had is used again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from scsi.san import San
from scsi.stories import Successor, Victim, cables_back

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

LOST = r"is lost|was revoked|fence|reservation|died|cleaning up|replay|grace|lease|recover"
"""What the server warns of when it loses a client."""


@contextmanager
def victim_of(san: San) -> Iterator[Victim]:
    san.tolerated.append(LOST)
    victim = Victim(san, "one")
    try:
        victim.write()
        yield victim
    finally:
        cables_back(san, victim)


def test_deaf_client(san: San) -> None:
    """Its network to the server is cut, its disk is not, and it writes all the time."""
    with victim_of(san) as victim:
        successor = Successor(san)
        victim.cut_off()
        victim.recall()
        fence = victim.wait_fenced()
        print(f"fenced {fence['seconds'] * 1000:.0f} ms after it was lost")
        victim.wait_refused()
        victim.assert_shut_out()
        successor.write(victim)
        victim.reconnect()
        successor.assert_intact()
        victim.come_back()


def test_frozen_client(san: San) -> None:
    """It stops in the middle of its writes, and goes on when others have its blocks."""
    with victim_of(san) as victim:
        successor = Successor(san)
        victim.freeze()
        victim.recall()
        victim.wait_fenced()
        successor.write(victim)
        victim.thaw()
        victim.wait_over()
        successor.assert_intact()
        victim.come_back()


def test_server_dies_between_revoke_and_preempt(san: San) -> None:
    """The next one knows from the disk whom it had decided to fence."""
    san.client_of("one")
    san.server.kill()
    san.server.start(fault="issued")
    with victim_of(san) as victim:
        successor = Successor(san, local=True)
        victim.cut_off()
        victim.recall(dies=True)
        san.server.wait_ended()
        victim.server_died()
        victim.wait_progress()  # nobody has fenced it yet
        san.server.start()
        victim.wait_fenced()
        victim.wait_refused()
        successor.write(victim)
        victim.reconnect()
        successor.assert_intact()
        victim.come_back()


def test_target_restarts(san: San) -> None:
    """Who was fenced before is shut out afterwards; who was not goes on."""
    with victim_of(san) as victim:
        successor = Successor(san, local=True)
        victim.cut_off()
        victim.recall()
        victim.wait_fenced()
        victim.wait_refused()
        san.restart_target()
        victim.assert_shut_out()
        successor.write(victim)
        victim.reconnect()
        successor.assert_intact()
        victim.come_back()
