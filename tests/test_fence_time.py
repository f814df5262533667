"""From the deadline of a recall to the release of what was fenced: what of that is our own time.

The core, the policy and the fence are the real ones, the device is an image; the unit is simulated
and takes no time, so all that passes is ours and the journal's. `python tests/test_fence_time.py`
prints it.
"""

from __future__ import annotations

import stat
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trio
from simulated_unit import SimulatedTarget

from extfs.core import (
    Device,
    Filesystem,
    HolderKind,
    HolderSpec,
    Iomode,
    mkfs,
)
from extfs.layout import CoreTable, Fencing, NoFence
from extfs.layout.reservation_fence import SCHEME
from extfs.layout.reserved_mount import ReservedMount, reserve

RECALL = 0.05
LIMIT = 0.1
FENCES = 5
SIZE = 1 << 20
_ROOT = 1


async def fence_one(mount: ReservedMount, fencing: Fencing, unit: SimulatedTarget, n: int) -> float:
    """A client with a layout does not answer; seconds from its deadline to the release."""
    filesystem = mount.filesystem
    assert filesystem is not None
    key = mount.new_key()
    spec = HolderSpec(f"client {n}", HolderKind.CLIENT, fence=f"{SCHEME}:{n}", fence_key=key)
    holder, _ = filesystem.layouts.register(spec)
    ino = filesystem.mknod(_ROOT, f"file {n}".encode(), stat.S_IFREG | 0o644).ino
    filesystem.layouts.get(ino, holder, Iomode.RW, 0, SIZE)
    mount.reservation.offered(key)
    nexus = unit.nexus(f"client {n}")
    nexus.register(key)
    before = len(fencing.history())
    filesystem.layouts.recall(ino)
    deadline = time.monotonic() + RECALL
    while len(fencing.history()) == before:  # noqa: ASYNC110 - nothing tells it
        await trio.sleep(0.0005)
    seconds = time.monotonic() - deadline
    past = fencing.history()[-1]
    assert past.outcome == "confirmed", past
    assert "the unit reset in" in past.detail
    assert not nexus.passes()
    return seconds


async def measure(image: Path, fences: int) -> list[float]:
    """Of each of so many fences."""
    unit = SimulatedTarget(aborts=False)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    with Device.open(str(image)) as device:
        mkfs(device)
    mount = reserve(str(image), take_over=False, unit=unit.nexus("server"))
    device = Device.open(str(image))
    with Filesystem.open(device, recall_ms=round(1000 * RECALL)) as filesystem:
        mount.filesystem = filesystem
        fencing = Fencing(CoreTable(filesystem), NoFence(), schemes={SCHEME: mount.fence})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fencing.run)
            found = [await fence_one(mount, fencing, unit, n) for n in range(fences)]
            nursery.cancel_scope.cancel()
        mount.let_go()
    return found


async def test_a_fence_takes_little_time_besides_the_units(tmp_path: Path) -> None:
    """The best of some: others use this machine, too."""
    with trio.fail_after(60):
        found = await measure(tmp_path / "image", FENCES)
    assert min(found) < LIMIT, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        times = [1000 * s for s in trio.run(measure, Path(directory) / "image", count)]
        print(
            f"{count} fences, ms from the deadline: median {statistics.median(times):.1f}, "
            f"least {min(times):.1f}, most {max(times):.1f}"
        )
