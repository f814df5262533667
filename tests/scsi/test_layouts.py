"""SCSI layouts and the kernel's client: data move between it and the disk, never by the server."""

from __future__ import annotations

import pytest

from scsi.san import MIB, San, stamps_on
from scsi.stories import keys

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

SEED = 0xE0F5_1001


def test_written_and_read_by_layout(san: San) -> None:
    client = san.client_of("one")
    before = keys(san)
    path = client.path("file")
    with client.counted() as written:
        client.guest.check(f"stamp write -d {path} {SEED} 0 {4 * MIB} {MIB}")
    written.assert_by_layout(writes=True)
    assert written["LAYOUTGET"] > 0, str(written)
    assert len(stamps_on(san.disk, SEED)) == 4 * MIB // 512
    client.drop_caches()
    with client.counted() as read:
        client.guest.check(f"stamp check -d {path} {SEED} 0 {4 * MIB}")
        client.guest.check(f"stamp check {path} {SEED} 0 {4 * MIB}")
    read.assert_by_layout(reads=True)
    # The server sees what it was told of: its own view of the file.
    san.server_guest.check(f"stamp check {san.server.path('file')} {SEED} 0 {4 * MIB}")
    # It registered a key of its own; the server holds the reservation.
    now = keys(san)
    assert len(set(now)) == len(now) >= 2, (before, now)
    held = san.server_guest.check(f"sg_persist -n -r {san.server.device}")
    assert "Exclusive Access, registrants only" in held
    client.guest.check(f"rm {path}")


def test_second_client_has_another_key(san: San) -> None:
    """What one wrote the other reads, both by their own layouts."""
    one, other = san.client_of("one"), san.client_of("target")
    one.guest.check(f"stamp write -d {one.path('shared')} {SEED + 1} 0 {MIB} {MIB}")
    with other.counted() as read:
        other.guest.check(f"stamp check -d {other.path('shared')} {SEED + 1} 0 {MIB}")
    read.assert_by_layout(reads=True)
    now = keys(san)
    assert len(set(now)) == len(now) == 3, now
    one.guest.check(f"rm {one.path('shared')}")
