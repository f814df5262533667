"""What the core gives to a file server in this process: calls that wait for nobody, permissions."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from surgeon import Surgeon

from extfs import core
from extfs.check.fsck import fsck
from extfs.check.layout import Tree
from extfs.core import (
    BLOCK_SIZE,
    RECORD_BYTES_MAX,
    TO_THE_END,
    CoreError,
    Device,
    EventType,
    Filesystem,
    HolderSpec,
    Iomode,
    Lock,
    SimDevice,
)

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644
BLOCKS = 16
SIZE = BLOCKS * BLOCK_SIZE


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice(64 * MIB, seed=1) as device:
        with device.device() as handle:
            core.mkfs(handle, label="label")
        yield device


@pytest.fixture
def fs(sim: SimDevice) -> Iterator[Filesystem]:
    with Filesystem.open(sim.device(), no_heartbeat=True, recall_ms=60_000) as filesystem:
        yield filesystem


# -- nowait --


@pytest.fixture
def held(fs: Filesystem) -> tuple[int, int]:
    """A file all of which is in a holder's hands: (inode, holder)."""
    ino = fs.mknod(1, b"held", FILE).ino
    fs.write(ino, 0, b"x" * SIZE)
    holder, _ = fs.layouts.register(HolderSpec(name="test"))
    fs.layouts.get(ino, holder, Iomode.RW, 0, SIZE)
    return ino, holder


def test_nowait_refuses_and_recalls(fs: Filesystem, held: tuple[int, int]) -> None:
    ino, holder = held
    other = fs.mknod(1, b"other", FILE).ino
    fs.write(other, 0, b"y" * SIZE)
    fs.setattr(ino, mode=0o4755)
    before = fs.getattr(ino)
    calls = {
        "write": lambda: fs.write(ino, 10, b"abc", kill_priv=True, nowait=True),
        "truncate": lambda: fs.truncate(ino, 5, kill_priv=True, nowait=True),
        "punch": lambda: fs.fallocate(
            ino, 0, SIZE, keep_size=True, punch_hole=True, kill_priv=True, nowait=True
        ),
        "copy": lambda: fs.copy(other, 1, ino, 0, 100, kill_priv=True, nowait=True),
        "clone into": lambda: fs.clone(other, 0, ino, 0, SIZE, kill_priv=True, nowait=True),
        "clone from": lambda: fs.clone(ino, 0, other, 0, SIZE, nowait=True),
    }
    for name, call in calls.items():
        with pytest.raises(CoreError) as error:
            call()
        assert error.value.errno == errno.EAGAIN, name
    assert fs.getattr(ino) == before
    assert fs.read(ino, 0, SIZE, nowait=True) == b"x" * SIZE
    recalls = [event for event in fs.layouts.events() if event.type == EventType.RECALL]
    assert recalls
    assert {event.holder for event in recalls} == {holder}
    assert (min(e.offset for e in recalls), max(e.offset + e.length for e in recalls)) == (0, SIZE)
    fs.layouts.give_all_back(holder)
    assert fs.write(ino, 10, b"abc", kill_priv=True, nowait=True) == 3
    assert fs.getattr(ino).mode == stat.S_IFREG | 0o755
    fs.truncate(ino, 5, nowait=True)
    assert fs.clone(other, 0, ino, 0, SIZE, nowait=True) == SIZE
    assert fs.read(ino, 0, SIZE) == b"y" * SIZE


def test_nowait_does_not_wait_behind_who_waits(fs: Filesystem, held: tuple[int, int]) -> None:
    ino, holder = held
    waiting = threading.Thread(target=lambda: fs.truncate(ino, 5))
    waiting.start()
    try:
        while not any(e.type == EventType.RECALL for e in fs.layouts.events()):
            time.sleep(0.005)
        with pytest.raises(CoreError) as error:
            fs.read(ino, 0, SIZE, nowait=True)
        assert error.value.errno == errno.EAGAIN
    finally:
        fs.layouts.give_all_back(holder)
        waiting.join()
    assert fs.read(ino, 0, SIZE, nowait=True) == b"xxxxx"


# -- who lost a name --


def test_what_lost_a_name(fs: Filesystem) -> None:
    first, second = (fs.mknod(1, name, FILE) for name in (b"first", b"second"))
    fs.link(first.ino, 1, b"again")
    assert fs.rename(1, b"first", 1, b"free") is None
    assert fs.rename(1, b"free", 1, b"again") is None, "both are of one inode"
    assert fs.rename(1, b"free", 1, b"second", exchange=True) is None
    lost = fs.rename(1, b"second", 1, b"free")
    assert lost is not None
    assert (lost.ino, lost.nlink, lost.generation) == (second.ino, 0, second.generation)
    gone = fs.unlink(1, b"again")
    assert (gone.ino, gone.nlink) == (first.ino, 1)
    directory = fs.mkdir(1, b"directory", 0o755)
    fs.mkdir(1, b"empty", 0o755)
    assert fs.rename(1, b"directory", 1, b"empty") is not None
    assert fs.rmdir(1, b"empty").ino == directory.ino


# -- permissions --

R, W, X = 4, 2, 1
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF
OWNER, OWNING = 1000, 100


def acl(*entries: tuple[int, int, int]) -> bytes:
    """system.posix_acl_access: entries of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


LONG_ACL = acl(
    (USER_OBJ, R | W, NOBODY),
    (USER, R | W | X, 2000),
    (USER, 0, 2001),
    (GROUP_OBJ, R, NOBODY),
    (GROUP, W, 200),
    (GROUP, R | X, 201),
    (GROUP, X, 202),
    (MASK, R | W, NOBODY),
    (OTHER, X, NOBODY),
)


@pytest.mark.parametrize(
    ("uid", "gids", "mask", "expected"),
    [
        (OWNER, [200], R | W | X, R | W),
        (OWNER, [], X, 0),
        (2000, [201], R | W | X, R | W),
        (2000, [], X, 0),
        (2001, [OWNING], R | W | X, 0),
        (3000, [OWNING], R | W | X, R),
        (3000, [200], R | W | X, W),
        (3000, [OWNING, 200], R | W, R),
        (3000, [OWNING, 200], W, W),
        (3000, [OWNING, 202], R | X, R),
        (3000, [201], R | X, R),
        (3000, [202], X, 0),
        (3000, [300, 301], R | W | X, X),
        (3000, [], 0, 0),
        (0, [], R | W | X, R | W | X),
    ],
)
def test_access_with_an_acl(
    fs: Filesystem, uid: int, gids: list[int], mask: int, expected: int
) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.setattr(ino, uid=OWNER, gid=OWNING)
    fs.setxattr(ino, b"system.posix_acl_access", LONG_ACL)
    assert fs.access(ino, uid, gids, mask) == expected


def test_access_by_mode(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.setattr(ino, uid=OWNER, gid=OWNING, mode=0o641)
    assert fs.access(ino, OWNER, [OWNING], 7) == R | W
    assert fs.access(ino, 5, [7, OWNING], 7) == R
    assert fs.access(ino, 5, [], 7) == X
    assert fs.access(ino, 0, [], 7) == 7
    fs.setattr(ino, mode=0o047)
    assert fs.access(ino, OWNER, [OWNING], 7) == 0, "the owner is none of the others"
    fs.setattr(ino, mode=0o600)
    assert fs.access(ino, 0, [], 7) == R | W
    assert fs.access(1, 0, [], 7) == 7
    directory = fs.mkdir(1, b"directory", 0o600).ino
    assert fs.access(directory, 0, [], 7) == 7
    with pytest.raises(CoreError) as error:
        fs.access(ino, 5, [], 8)
    assert error.value.errno == errno.EINVAL
    with pytest.raises(CoreError) as error:
        fs.access(999_999, 5, [], 4)
    assert error.value.errno == errno.ENOENT


# -- records --


def test_records_survive_a_restart(sim: SimDevice) -> None:
    values = {
        0: b"server",
        7: b"",
        (1 << 64) - 1: bytes(range(256)) * 4,
        8: os.urandom(RECORD_BYTES_MAX),
    }
    with Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=3_600_000) as fs:
        assert fs.records.load() == {}
        fs.records.put(values)
        assert fs.records.load() == values
        fs.abandon()  # as a power cut: what was put is durable
    sim.restart(1)
    with Filesystem.open(sim.device(), no_heartbeat=True) as fs:
        assert fs.records.load() == values
        fs.records.put({7: b"changed"}, delete=[8, 9])
        del values[8]
        assert fs.records.load() == values | {7: b"changed"}
    for call in (
        {"values": {1: bytes(RECORD_BYTES_MAX + 1)}},
        {"values": {1: b""}, "delete": [1]},
    ):
        with (
            Filesystem.open(sim.device(), no_heartbeat=True) as fs,
            pytest.raises(CoreError) as error,
        ):
            fs.records.put(**call)  # type: ignore[arg-type]
        assert error.value.errno == errno.EINVAL


def test_too_many_records_for_one_transaction(fs: Filesystem) -> None:
    fs.records.put(dict.fromkeys(range(25), b"x" * 1023))
    before = fs.records.load()
    for values in (dict.fromkeys(range(26), b""), dict.fromkeys(range(4), b"x" * 65536)):
        with pytest.raises(CoreError) as error:
            fs.records.put(values)
        assert error.value.errno == errno.E2BIG
    assert fs.records.load() == before
    fs.records.put(dict.fromkeys(range(3), bytes(RECORD_BYTES_MAX)))


def test_records_from_several_threads(fs: Filesystem) -> None:
    def work(me: int) -> None:
        for turn in range(20):
            fs.records.put({1: bytes([me]) * 3000, 2: bytes([me]) * 3000, 10 + me: bytes([turn])})

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = fs.records.load()
    assert found[1] == found[2]
    assert [found[10 + me] for me in range(4)] == [bytes([19])] * 4


def test_fsck_looks_at_records(make_image: Callable[..., Path]) -> None:
    path = make_image(32 * MIB)
    values = {0: b"", 5: bytes(3 * 1024), 6: bytes(1023), 7: bytes(RECORD_BYTES_MAX)}
    with Device.open(str(path)) as device:
        core.mkfs(device, label="records")
    with Filesystem.open(Device.open(str(path)), no_heartbeat=True) as fs:
        fs.records.put(values)
    assert fsck(path).report.findings == []
    intact = path.read_bytes()
    breaks: dict[str, Callable[[Surgeon], object]] = {
        "gap": lambda s: s.remove(Tree.NFS_CLIENT, lambda hi, lo, _: (hi, lo) == (5, 1)),
        "start": lambda s: s.remove(Tree.NFS_CLIENT, lambda hi, lo, _: (hi, lo) == (5, 0)),
        "end": lambda s: s.remove(Tree.NFS_CLIENT, lambda hi, lo, _: (hi, lo) == (5, 3)),
        "last end": lambda s: s.remove(Tree.NFS_CLIENT, lambda hi, lo, _: (hi, lo) == (7, 64)),
        "joined": lambda s: s.edit_key(Tree.NFS_CLIENT, lambda hi, _lo, _: hi == 6, 5, 4),
    }
    for name, break_it in breaks.items():
        path.write_bytes(intact)
        break_it(Surgeon(path))
        found = {finding.code for finding in fsck(path).report.findings}
        assert "NFS_CLIENT_SHAPE" in found, name
        with Filesystem.open(Device.open(str(path)), no_heartbeat=True) as fs:
            with pytest.raises(CoreError) as error:
                fs.records.load()
            assert error.value.name == "ERR_RECORD_SHAPE", name


# -- locks --


def lock_events(fs: Filesystem) -> list[tuple[int, int]]:
    events = [event for event in fs.layouts.events() if event.type == EventType.LOCK_FREE]
    return [(event.ino, event.holder) for event in events]


def test_locks(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.open_inode(ino)
    locks = fs.locks
    assert locks.set(ino, 1, 0, 10, True) is None
    assert locks.set(ino, 2, 10, TO_THE_END, False) is None
    assert locks.set(ino, 1, 5, 10, False) is None
    assert locks.set(ino, 1, 5, 10, True) == Lock(2, 10, TO_THE_END, False, 0, False)
    assert locks.test(ino, 2, 0, 1, False) == Lock(1, 0, 5, True, 0, False)
    assert locks.test(ino, 1, 0, 10, True) is None
    locks.clear(ino, 1, 3, 2)
    assert locks.test(ino, 3, 3, 2, True) is None
    assert locks.test(ino, 3, 3, 3, True) == Lock(1, 5, 10, False, 0, False)
    locks.release_owner(ino, 2)
    assert locks.set(ino, 1, (1 << 64) - 1, 1, True) is None
    assert locks.test(ino, 2, 1 << 63, TO_THE_END, True) == Lock(
        1, (1 << 64) - 1, TO_THE_END, True, 0, False
    )
    for start, length in ((5, 0), ((1 << 64) - 1, 2)):
        with pytest.raises(CoreError) as error:
            locks.set(ino, 1, start, length, True)
        assert error.value.errno == errno.EINVAL
    with pytest.raises(CoreError) as error:
        locks.set(999_999, 1, 0, 1, True)
    assert error.value.errno == errno.ENOENT
    # Closing ends them, whether they were given back or not.


def test_watches(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.open_inode(ino)
    locks = fs.locks
    locks.set(ino, 1, 0, 10, True)
    assert locks.set(ino, 2, 5, 1, True) is not None
    locks.watch(ino, 2, 5, 1, True)
    locks.watch(ino, 3, 6, 1, True)
    locks.unwatch(ino, 3)
    assert lock_events(fs) == []
    locks.clear(ino, 1, 0, 5)
    assert lock_events(fs) == []
    locks.clear(ino, 1, 0, TO_THE_END)
    assert lock_events(fs) == [(ino, 2)]
    locks.watch(ino, 2, 5, 1, True)
    assert lock_events(fs) == [(ino, 2)], "it could be had already"
    locks.release_owner(ino, 1)
    assert lock_events(fs) == []


def test_locks_from_several_threads(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"file", FILE).ino
    fs.open_inode(ino)
    inside: list[int] = []
    wrong: list[str] = []

    def work(owner: int) -> None:
        for _ in range(300):
            if fs.locks.set(ino, owner, 0, 1, True) is None:
                inside.append(owner)
                if len(inside) != 1:
                    wrong.append(f"{inside}")
                inside.remove(owner)
                fs.locks.clear(ino, owner, 0, 1)
            else:
                fs.locks.watch(ino, owner, 0, 1, True)
            fs.layouts.events()

    threads = [threading.Thread(target=work, args=(owner,)) for owner in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
