"""A full device: the guest is told, nothing hangs, and what was written before is right."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from guest.client import MIB
from guest.served import assert_no_canary, unstamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

SIZE = 96 * MIB


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_writing_until_it_is_full(own_world: Callable[..., World], direct: bool) -> None:
    world = own_world(size=SIZE)
    client, served = world.client, world.served
    flag = "-d" if direct else ""
    result = client.guest.run(
        f"stamp write {flag} {client.path('fills')} 1 0 {2 * SIZE} 262144", 200
    )
    assert result.code == 2, result
    assert "No space left" in result.output, result
    content = served.path("fills").read_bytes()
    assert len(content) > SIZE // 4
    assert_no_canary(content, "fills")
    assert not unstamped(content, [1])
    # Room is made, and used.
    os.unlink(served.path("fills"))
    client.guest.check(f"stamp write {flag} {client.path('again')} 2 0 {8 * MIB} 262144", 120)
    client.guest.check(f"stamp check {client.path('again')} 2 0 {8 * MIB}")
    client.unmount()
    served.fsck()
