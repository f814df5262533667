"""The typed wrappers of layouts, what the policy makes of a real core, and the status document."""

from __future__ import annotations

import errno
import json
import math
import stat
from collections.abc import Iterator

import pytest
import trio

from extfs import core
from extfs.control.status import Status, percentiles
from extfs.core import (
    TO_THE_END,
    BridgeStats,
    CoreError,
    EventType,
    Filesystem,
    HolderKind,
    HolderSpec,
    HolderState,
    Iomode,
    Latency,
    LayoutEvent,
    LayoutState,
    SimDevice,
)
from extfs.layout import Attempt, CoreTable, Fencing, NoFence, Outcome

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644
BOOT = bytes(range(16))


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice(64 * MIB, seed=1) as device:
        with device.device() as handle:
            core.mkfs(handle, label="label")
        yield device


@pytest.fixture
def fs(sim: SimDevice) -> Iterator[Filesystem]:
    with Filesystem.open(sim.device(), no_heartbeat=True, recall_ms=500) as filesystem:
        yield filesystem


@pytest.fixture
def ino(fs: Filesystem) -> int:
    return fs.mknod(1, b"file", FILE).ino


def refused(number: int, error: pytest.ExceptionInfo[CoreError]) -> None:
    assert error.value.errno == number, error.value


# ---- holders -----------------------------------------------------------------------------------


def test_what_a_holder_said_of_itself_comes_back(fs: Filesystem) -> None:
    spec = HolderSpec(
        "näme", HolderKind.CLIENT, 1000, 4711, 1 << 40, BOOT, 1 << 63, "cgroup:/a/b c"
    )
    first, key = fs.layouts.register(spec)
    second, _ = fs.layouts.register(HolderSpec())
    holder = fs.layouts.holder(first)
    assert holder is not None
    assert holder.spec == spec
    assert (holder.id, holder.state, holder.grants) == (first, HolderState.LIVE, 0)
    assert [holder.id for holder in fs.layouts.holders()] == [first, second]
    assert [holder.id for holder in fs.layouts.holders(first)] == [second]
    assert len(fs.layouts.holders(limit=1)) == 1
    assert fs.layouts.holder(second + 1) is None
    assert fs.layouts.holder(0) is None
    fs.layouts.check(first, key)
    with pytest.raises(CoreError) as error:
        fs.layouts.check(first, key ^ 1)
    refused(errno.EKEYREJECTED, error)
    fs.layouts.gone(first)
    with pytest.raises(CoreError) as error:
        fs.layouts.check(first, key)
    refused(errno.ENOENT, error)


def test_more_holders_than_one_call_tells(fs: Filesystem) -> None:
    made = [fs.layouts.register(HolderSpec(str(number)))[0] for number in range(200)]
    assert [holder.id for holder in fs.layouts.holders()] == made
    assert len(fs.layouts.holders(limit=150)) == 150


@pytest.mark.parametrize(
    "spec", [HolderSpec("x" * 64), HolderSpec(fence="y" * 128), HolderSpec("a\0b")]
)
def test_texts_that_do_not_fit(fs: Filesystem, spec: HolderSpec) -> None:
    with pytest.raises(ValueError):
        fs.layouts.register(spec)
    assert fs.layouts.holders() == []


# ---- layouts -----------------------------------------------------------------------------------


def test_get_write_commit_return(fs: Filesystem, sim: SimDevice, ino: int) -> None:
    holder, _ = fs.layouts.register(HolderSpec())
    got = fs.layouts.get(ino, holder, Iomode.RW, 0, MIB)
    assert (got.extents[0].offset, got.next) == (0, MIB)
    assert sum(extent.length for extent in got.extents) == MIB
    assert {extent.state for extent in got.extents} == {LayoutState.INVALID_DATA}
    (grant,) = fs.layouts.grants(ino)
    assert (grant.ino, grant.holder, grant.offset, grant.length) == (ino, holder, 0, MIB)
    assert (grant.iomode, grant.seq, grant.atomic) == (Iomode.RW, got.seq, False)
    assert grant.recalled_ns == 0
    assert list(fs.layouts.granted_inodes()) == [ino]
    sim.poke(got.extents[0].device, b"direct" * 700)
    size = fs.layouts.commit(ino, holder, [(0, 8192)], size=4200, mtime=(1234567890, 5))
    assert size == 4200
    assert fs.read(ino, 0, 5000) == b"direct" * 700
    found = fs.getattr(ino)
    assert (found.size, found.mtime, found.mtime_ns) == (4200, 1234567890, 5)
    fs.layouts.give_back(ino, holder)
    assert fs.layouts.grants(ino) == []
    fs.layouts.gone(holder)
    counters = fs.layouts.counters()
    assert (counters["gets"], counters["commits"], counters["granted_rw"]) == (1, 1, 1)
    assert sum(fs.layouts.latency(Latency.GET)) == 1
    assert sum(fs.layouts.latency(Latency.COMMIT)) == 1


def test_a_middle_part_is_returned(fs: Filesystem, ino: int) -> None:
    holder, _ = fs.layouts.register(HolderSpec())
    fs.layouts.get(ino, holder, Iomode.RW, 0, MIB)
    fs.layouts.give_back(ino, holder, 4096, 8192, iomode=Iomode.RW)
    parts = [(grant.offset, grant.length) for grant in fs.layouts.grants(ino)]
    assert parts == [(0, 4096), (12288, MIB - 12288)]
    assert len(fs.layouts.grants(ino, 1)) == 1
    fs.layouts.give_all_back(holder)
    assert fs.layouts.grants(ino) == []


def test_more_grants_than_one_call_tells(fs: Filesystem, ino: int) -> None:
    fs.truncate(ino, 8 * MIB)
    holder, _ = fs.layouts.register(HolderSpec())
    offsets = [number * 8192 for number in range(200)]
    for offset in offsets:
        fs.layouts.get(ino, holder, Iomode.READ, offset, 4096)
    assert [grant.offset for grant in fs.layouts.grants(ino)] == offsets


def test_refusals(fs: Filesystem, ino: int) -> None:
    layouts = fs.layouts
    first, _ = layouts.register(HolderSpec())
    second, _ = layouts.register(HolderSpec())
    layouts.get(ino, first, Iomode.RW, 0, 8192)
    with pytest.raises(CoreError) as error:
        layouts.get(ino, second, Iomode.RW, 4096, 8192)
    refused(errno.EAGAIN, error)
    assert layouts.events() == [], "nobody was asked"
    with pytest.raises(CoreError) as error:
        layouts.commit(ino, second, [(0, 4096)])
    refused(errno.ENXIO, error)
    with pytest.raises(CoreError) as error:
        layouts.gone(first)
    refused(errno.EBUSY, error)
    with pytest.raises(CoreError) as error:
        layouts.fenced(first)
    refused(errno.EBUSY, error)
    with pytest.raises(CoreError) as error:
        layouts.get(ino, 12345, Iomode.READ, 0, 4096)
    refused(errno.ENOENT, error)


def test_a_recall_is_an_event(fs: Filesystem, ino: int) -> None:
    layouts = fs.layouts
    first, _ = layouts.register(HolderSpec())
    second, _ = layouts.register(HolderSpec())
    got = layouts.get(ino, first, Iomode.RW, 0, 8192)
    with pytest.raises(CoreError):
        layouts.get(ino, second, Iomode.RW, 4096, 4096, recall=True)
    (recall,) = layouts.events()
    assert (recall.type, recall.holder, recall.ino) == (EventType.RECALL, first, ino)
    assert (recall.offset, recall.length, recall.grant_seq) == (4096, 4096, got.seq)
    assert recall.iomode == Iomode.RW
    assert 0 < recall.left_ms <= 500
    assert layouts.grants(ino)[0].recalled_ns > 0
    layouts.give_back(ino, first, recall.offset, recall.length)
    assert layouts.get(ino, second, Iomode.RW, 4096, 4096).next == 8192
    layouts.recall(ino, holder=second)
    assert [event.holder for event in layouts.events()] == [second]
    layouts.give_all_back(first)
    layouts.give_all_back(second)


def test_a_watch_tells_one_change(fs: Filesystem, ino: int) -> None:
    layouts = fs.layouts
    holder, _ = layouts.register(HolderSpec())
    before = fs.map_generation(ino)
    layouts.watch(ino, holder)
    fs.write(ino, 0, b"x" * 4096)
    fs.fsync(ino)
    (event,) = layouts.events()
    assert (event.type, event.holder, event.ino) == (EventType.MAP_CHANGED, holder, ino)
    assert fs.map_generation(ino) != before
    layouts.watch(ino, holder, False)


def test_maps_change_places_and_shift(fs: Filesystem, ino: int) -> None:
    other = fs.mknod(1, b"other", FILE).ino
    fs.write(ino, 0, b"a" * 8192 + b"b" * 4096)
    fs.write(other, 0, b"c" * 12288)
    fs.exchange(ino, 0, other, 4096, 8192)
    assert fs.read(ino, 0, 20000) == b"c" * 8192 + b"b" * 4096
    assert fs.read(other, 0, 20000) == b"c" * 4096 + b"a" * 8192
    fs.collapse(ino, 0, 4096)
    assert fs.read(ino, 0, 20000) == b"c" * 4096 + b"b" * 4096
    fs.insert(ino, 4096, 4096)
    assert fs.read(ino, 0, 20000) == b"c" * 4096 + bytes(4096) + b"b" * 4096
    assert fs.clone(ino, 0, other, 8192, 4096) == 4096
    assert fs.read(other, 8192, 4096) == b"c" * 4096
    assert fs.dedupe(other, 0, ino, 0, 4096) == 4096
    with pytest.raises(CoreError) as error:
        fs.dedupe(other, 0, ino, 8192, 4096)
    refused(errno.EBADE, error)


# ---- the policy on a real core -----------------------------------------------------------------


class Answer:
    """A driver that confirms at once, and remembers whom."""

    name = "answer"
    harms = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def fence(self, holder: core.HolderRecord, attempt: Attempt) -> Outcome:
        self.asked.append(holder.id)
        return Outcome.confirmed("")


async def test_a_lost_holder_is_fenced_in_the_core(fs: Filesystem, ino: int) -> None:
    layouts = fs.layouts
    holder, key = layouts.register(HolderSpec())
    layouts.get(ino, holder, Iomode.RW, 0, MIB)
    events: list[LayoutEvent] = []
    driver = Answer()
    fencing = Fencing(CoreTable(fs), driver, on_event=events.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fencing.run)
        await trio.sleep(0.05)
        assert driver.asked == []
        layouts.lost(holder)
        with trio.fail_after(20):
            while layouts.holder(holder) is not None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert driver.asked == [holder]
    assert fencing.waiting() == []
    assert layouts.grants(ino) == []
    await trio.to_thread.run_sync(layouts.settle)
    assert fs.statfs().quarantined == 0
    with pytest.raises(CoreError) as error:
        layouts.check(holder, key)
    refused(errno.ENOENT, error)


# ---- the status --------------------------------------------------------------------------------


def test_percentiles() -> None:
    assert percentiles([0] * 24)["p50_us"] is None
    one = percentiles([0, 0, 0, 1] + [0] * 20)
    assert (one["count"], one["p50_us"], one["p99.9_us"]) == (1, 16, 16)
    many = percentiles([50, 40, 9, 1] + [0] * 20)
    assert [many[name] for name in ("p50_us", "p90_us", "p99_us", "p99.9_us")] == [2, 4, 8, 16]
    assert percentiles([0] * 23 + [5])["p50_us"] is None, "without an upper end"
    assert math.isfinite(many["count"])


def test_the_document(fs: Filesystem, ino: int) -> None:
    layouts = fs.layouts
    holder, key = layouts.register(HolderSpec("writer", uid=7, pid=8, fence="cgroup:/x"))
    layouts.get(ino, holder, Iomode.RW, 0, MIB)
    layouts.recall(ino, 4096, 8192)
    status = Status(
        fs,
        device="/dev/x",
        mountpoint="/mnt",
        read_only=False,
        recall_ms=500,
        fencing=Fencing(CoreTable(fs), NoFence()),
        bridge=lambda: BridgeStats(5, 4, 3, 2, {1: 5}),
    )
    text = status.json()
    said = json.loads(text)
    assert text.endswith(b"\n")
    assert str(key) not in text.decode()
    assert (said["label"], said["device"], said["mountpoint"]) == ("label", "/dev/x", "/mnt")
    assert said["error"] is None
    assert said["space"]["total"] == 64 * MIB
    assert said["holders"]["live"] == 1
    assert said["holders"]["more"] == 0
    (told,) = said["holders"]["list"]
    assert (told["id"], told["state"], told["name"], told["pid"]) == (holder, "live", "writer", 8)
    assert told["grants"] >= 1
    (file,) = said["grants"]["files"]
    assert file["ino"] == ino
    assert file["list"][0]["holder"] == holder
    (recall,) = said["recalls"]["list"]
    assert (recall["holder"], recall["ino"]) == (holder, ino)
    assert recall["age_ms"] < 60_000
    assert said["fences"] == {"driver": "none", "waiting": [], "history": []}
    assert said["layouts"]["counters"]["gets"] == 1
    assert said["layouts"]["latencies"]["get"]["count"] == 1
    assert said["bridge"]["requests"] == 5
    layouts.give_all_back(holder)
    said = json.loads(status.json())
    assert (said["grants"]["files"], said["recalls"]["list"]) == ([], [])


def test_the_document_is_bounded(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    from extfs.control import status as module

    monkeypatch.setattr(module, "HOLDERS_MAX", 3)
    monkeypatch.setattr(module, "FILES_MAX", 2)
    monkeypatch.setattr(module, "GRANTS_OF_A_FILE_MAX", 2)
    for number in range(4):
        ino = fs.mknod(1, b"%d" % number, FILE).ino
        fs.truncate(ino, MIB)
        holder, _ = fs.layouts.register(HolderSpec())
        for offset in range(0, 5 * 8192, 8192):
            fs.layouts.get(ino, holder, Iomode.READ, offset, 4096)
    status = Status(
        fs,
        device="",
        mountpoint="",
        read_only=True,
        recall_ms=1,
        fencing=None,
        bridge=lambda: BridgeStats(0, 0, 0, 0, {}),
    )
    said = status.document()
    assert len(said["holders"]["list"]) == 3
    assert (said["holders"]["live"], said["holders"]["more"]) == (4, 1)
    assert len(said["grants"]["files"]) == 2
    assert said["grants"]["more"] == -1
    assert [len(file["list"]) for file in said["grants"]["files"]] == [2, 2]
    assert [file["more"] for file in said["grants"]["files"]] == [-1, -1]
    assert TO_THE_END == core.TO_THE_END


def test_many_revokes_that_wait_for_a_reader_leave_room_for_his(fs: Filesystem, ino: int) -> None:
    """More than are let run at a time; each waits for a grant that only one more takes."""
    block, blocks = 4096, 40
    fs.layouts.set_clock(1)
    fs.write(ino, 0, b"x" * blocks * block)
    fs.sync()
    writer, _ = fs.layouts.register(HolderSpec("writer", HolderKind.CLIENT))
    reader, _ = fs.layouts.register(HolderSpec("reader", HolderKind.CLIENT))
    fs.layouts.get(ino, writer, Iomode.RW, 0, blocks * block)
    fs.layouts.get(ino, reader, Iomode.READ, 0, blocks * block)
    for at in range(0, blocks, 2):
        fs.layouts.recall(ino, at * block, block, holder=writer)
    for now in (600_000_000, 1_200_000_000, 1_800_000_000):
        fs.layouts.set_clock(now)
        fs.layouts.settle()
    left = [g for g in fs.layouts.grants(ino) if g.holder == writer]
    assert [g.offset // block for g in left] == list(range(1, blocks, 2))
    assert all(g.length == block for g in left)
    assert fs.read(ino, 0, blocks * block) == b"x" * blocks * block
