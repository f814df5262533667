"""The typed wrappers of delegations. What local users of a mount see: test_mount_delegations.py."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

import pytest

from extfs import core
from extfs.core import (
    CoreError,
    Delegation,
    DelegationConflict,
    EventType,
    Filesystem,
    HolderKind,
    HolderSpec,
    Iomode,
    SimDevice,
)

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644
RECALL_MS = 500
CLIENT = HolderSpec("client", HolderKind.CLIENT)
READING = (DelegationConflict.OPEN_READ, DelegationConflict.READ)


@pytest.fixture
def fs() -> Iterator[Filesystem]:
    with SimDevice(64 * MIB, seed=1) as sim:
        with sim.device() as handle:
            core.mkfs(handle)
        device = sim.device()
        with Filesystem.open(device, no_heartbeat=True, recall_ms=RECALL_MS) as filesystem:
            filesystem.layouts.set_clock(10**12)
            yield filesystem


@pytest.fixture
def ino(fs: Filesystem) -> int:
    return fs.mknod(1, b"file", FILE).ino


def client(fs: Filesystem) -> int:
    return fs.layouts.register(CLIENT)[0]


def refused(number: int, error: pytest.ExceptionInfo[CoreError]) -> None:
    assert error.value.errno == number, error.value


def forward(fs: Filesystem, milliseconds: int) -> None:
    fs.layouts.set_clock(fs.layouts.now() + milliseconds * 1_000_000)
    fs.layouts.settle()


def test_grant_and_give_back(fs: Filesystem, ino: int) -> None:
    first, second = client(fs), client(fs)
    number = fs.delegations.grant(ino, first, False)
    assert fs.delegations.grant(ino, first, False) == number
    assert fs.delegations.grant(ino, second, False) > number
    with pytest.raises(CoreError) as error:
        fs.delegations.grant(ino, second, True)
    refused(errno.EAGAIN, error)
    generation = fs.getattr(ino).generation
    assert fs.delegations.of(first) == [Delegation(ino, generation, False, number, None)]
    fs.delegations.give_back(ino, first)
    assert fs.delegations.of(first) == []
    with pytest.raises(CoreError) as error:
        fs.delegations.give_back(ino, first)
    refused(errno.ENOENT, error)
    upgraded = fs.delegations.grant(ino, second, True)
    assert fs.delegations.of(second) == [Delegation(ino, generation, True, upgraded, None)]
    counters = fs.layouts.counters()
    assert (counters["delegations_read"], counters["delegations_write"]) == (2, 1)
    assert counters["delegations_refused_held"] == counters["delegations_returned"] == 1


def test_who_cannot_have_one(fs: Filesystem, ino: int) -> None:
    local, _ = fs.layouts.register(HolderSpec())
    lost = client(fs)
    fs.layouts.get(ino, lost, Iomode.READ, 0, 4096)
    fs.layouts.lost(lost)
    for inode, holder, number in (
        (ino, local, errno.EINVAL),
        (ino, lost, errno.EOWNERDEAD),
        (ino, 4711, errno.ENOENT),
        (4711, client(fs), errno.ENOENT),
        (1, client(fs), errno.EISDIR),
        (fs.symlink(1, b"link", b"to").ino, client(fs), errno.EINVAL),
    ):
        with pytest.raises(CoreError) as error:
            fs.delegations.grant(inode, holder, False)
        refused(number, error)
    with pytest.raises(CoreError) as error:
        fs.delegations.local_opens(4711)
    refused(errno.ENOENT, error)
    assert fs.delegations.local_opens(ino) == (0, 0)
    assert fs.delegations.of(4711) == []


@pytest.mark.parametrize("operation", DelegationConflict)
@pytest.mark.parametrize("write", [False, True])
def test_make_way(fs: Filesystem, ino: int, operation: DelegationConflict, write: bool) -> None:
    has, asks = client(fs), client(fs)
    number = fs.delegations.grant(ino, has, write)
    assert fs.delegations.make_way(ino, operation, holder=has)
    assert fs.layouts.events() == []
    if operation in READING and not write:
        assert fs.delegations.make_way(ino, operation, holder=asks)
        return
    assert not fs.delegations.make_way(ino, operation, holder=asks)
    assert not fs.delegations.make_way(ino, operation)
    (event,) = fs.layouts.events()
    assert (event.type, event.holder, event.ino) == (EventType.DELEGATION_RECALL, has, ino)
    assert (event.grant_seq, event.left_ms) == (number, RECALL_MS)
    assert event.iomode == (Iomode.RW if write else Iomode.READ)
    (recalled,) = fs.delegations.of(has)
    assert recalled.left_ms == RECALL_MS
    forward(fs, RECALL_MS - 1)
    assert not fs.delegations.make_way(ino, operation)
    forward(fs, 1)
    (event,) = fs.layouts.events()
    assert (event.type, event.grant_seq) == (EventType.DELEGATION_REVOKED, number)
    assert fs.delegations.make_way(ino, operation)
    counters = fs.layouts.counters()
    assert counters["delegation_recalls"] == 1
    assert counters[f"delegation_recalls_{operation.name.lower()}"] == 1
    assert counters["delegations_revoked"] == 1


def test_more_than_one_call_tells(fs: Filesystem) -> None:
    has = client(fs)
    inodes = [fs.mknod(1, b"%d" % number, FILE).ino for number in range(600)]
    numbers = [fs.delegations.grant(inode, has, bool(inode % 2)) for inode in inodes]
    found = fs.delegations.of(has)
    assert [(d.ino, d.write, d.seq) for d in found] == [
        (inode, bool(inode % 2), number) for inode, number in zip(inodes, numbers, strict=True)
    ]
    fs.layouts.gone(has)
    assert fs.delegations.of(has) == []
    assert fs.layouts.counters()["delegations_dropped"] == 600


def test_an_unlinked_file_stays_until_it_is_returned(fs: Filesystem, ino: int) -> None:
    has = client(fs)
    fs.delegations.grant(ino, has, False)
    fs.unlink(1, b"file")
    fs.drain()
    assert fs.getattr(ino).nlink == 0
    fs.delegations.give_back(ino, has)
    fs.drain()
    with pytest.raises(CoreError) as error:
        fs.getattr(ino)
    refused(errno.ENOENT, error)
