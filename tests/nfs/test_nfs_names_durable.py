"""What a client has an answer for outlives a power cut, whatever the device made of held writes."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest

from extfs.core import ROOT_INODE, CoreError, Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from nfs.calls import (
    Call,
    create,
    do,
    fattr,
    link,
    mkdir,
    owner,
    path,
    putrootfh,
    remove,
    rename,
    savefh,
    setattr_,
)
from nfs.wire import Session, make_service, u32, u64

FILE = stat.S_IFREG | 0o644


def prepare(fs: Filesystem) -> None:
    """/dir, /dir/file with 10000 bytes, /old."""
    place = fs.mkdir(ROOT_INODE, b"dir", 0o755).ino
    file = fs.mknod(place, b"file", FILE).ino
    fs.write(file, 0, b"x" * 10000)
    fs.mknod(ROOT_INODE, b"old", FILE)
    fs.sync()


def exists(fs: Filesystem, name: bytes) -> bool:
    try:
        fs.resolve(name)
    except CoreError:
        return False
    return True


OWNED = fattr({n.FATTR4_MODE: u32(0o4755), n.FATTR4_OWNER: owner(5)})
ATTRIBUTES = {
    n.FATTR4_SIZE: u64(4000),
    n.FATTR4_MODE: u32(0o600),
    n.FATTR4_OWNER: owner(9),
}
Check = Callable[[Filesystem], bool]
CASES: dict[str, tuple[list[Call], Check]] = {
    "mkdir": ([putrootfh(), mkdir(b"new")], lambda fs: exists(fs, b"new")),
    "symlink": (
        [putrootfh(), create(n.NF4LNK, b"new", target=b"to")],
        lambda fs: fs.readlink(fs.resolve(b"new").ino) == b"to",
    ),
    "attributes of a new file": (
        [*path(b"dir"), create(n.NF4FIFO, b"new", OWNED)],
        lambda fs: (
            (fs.resolve(b"dir/new").uid, fs.resolve(b"dir/new").mode & 0o7777) == (5, 0o4755)
        ),
    ),
    "link": (
        [*path(b"dir", b"file"), savefh(), putrootfh(), link(b"new")],
        lambda fs: fs.resolve(b"new").nlink == 2,
    ),
    "remove": ([*path(b"dir"), remove(b"file")], lambda fs: not exists(fs, b"dir/file")),
    "rename": (
        [*path(b"dir"), savefh(), putrootfh(), rename(b"file", b"old")],
        lambda fs: fs.resolve(b"old").size == 10000 and not exists(fs, b"dir/file"),
    ),
    "setattr": (
        [*path(b"dir", b"file"), setattr_(ATTRIBUTES)],
        lambda fs: (
            (
                fs.resolve(b"dir/file").size,
                fs.resolve(b"dir/file").mode & 0o7777,
                fs.resolve(b"dir/file").uid,
            )
            == (4000, 0o600, 9)
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_it_outlives_a_power_cut(case: str, seed: int) -> None:
    calls, check = CASES[case]
    with SimDevice(64 << 20, seed=seed) as sim:
        with sim.device() as device:
            mkfs(device)
        fs = Filesystem.open(sim.device(), commit_ms=3_600_000, no_heartbeat=True)
        prepare(fs)
        service, _ = make_service(fs)
        session = Session(service)
        assert not check_quietly(check, fs)
        do(session, *calls)
        fs.abandon()
        sim.restart(seed)
        with Filesystem.open(sim.device(), no_heartbeat=True) as again:
            assert check(again)


def check_quietly(check: Check, fs: Filesystem) -> bool:
    """Before the operation: what `check` looks for is not there."""
    try:
        return check(fs)
    except CoreError:
        return False
