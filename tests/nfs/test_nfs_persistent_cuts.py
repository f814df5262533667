"""Persistent sessions over power cuts: at every write and flush of a request that must not be done
twice the power goes, somebody else changes what he finds, and the client sends it again."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, CoreError, Filesystem, Mutant, SimDevice, mkfs
from extfs.nfs import constants as n
from nfs.calls import (
    Call,
    Failed,
    create,
    fattr,
    getfh,
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
from nfs.file_calls import NO_DELEG, by_name, open_op, putfh, read_stateid, stateid
from nfs.file_calls import create as how
from nfs.persistence import Host, Persistent
from nfs.wire import op, opaque, u32

FILE = stat.S_IFREG | 0o644
DEVICE_BYTES = 48 << 20


def exists(fs: Filesystem, name: bytes) -> bool:
    try:
        fs.resolve(name)
    except CoreError:
        return False
    return True


@dataclass(frozen=True)
class Case:
    """`calls`: a request. `happened`: whether the filesystem shows that it was done. `disturb`:
    what somebody else then does. `after`: whether it was done exactly once, with that change
    there."""

    calls: tuple[Call, ...]
    happened: Callable[[Filesystem], bool]
    disturb: Callable[[Filesystem], object]
    after: Callable[[Filesystem, bool], bool]


def make_victim(fs: Filesystem) -> None:
    fs.write(fs.mknod(ROOT_INODE, b"victim", FILE).ino, 0, b"another one")


def open_new(name: bytes, mode: int, verifier: bytes = b"") -> Call:
    encoded = open_op(
        by_name(name), 3 | NO_DELEG, owner=b"owner", how=how(mode, verifier, mode=u32(0o600))
    )

    def decode(body: Any) -> tuple[Any, ...]:
        held = read_stateid(body)
        info = body.boolean(), body.u64(), body.u64()
        body.u32(), body.bitmap(), body.u32(), body.u32()
        return held.seqid, info

    return Call(encoded, decode)


def setxattr(name: bytes, option: int, value: bytes) -> Call:
    return Call(
        op(n.OP_SETXATTR, u32(option), opaque(name), opaque(value)),
        lambda body: (body.boolean(), body.u64(), body.u64()),
    )


def removexattr(name: bytes) -> Call:
    return Call(
        op(n.OP_REMOVEXATTR, opaque(name)),
        lambda body: (body.boolean(), body.u64(), body.u64()),
    )


def xattrs(fs: Filesystem, name: bytes) -> dict[bytes, bytes]:
    ino = fs.resolve(name).ino
    return {key: fs.getxattr(ino, key) for key in fs.listxattr(ino)}


CASES: dict[str, Case] = {
    "remove": Case(
        (putrootfh(), remove(b"victim")),
        lambda fs: not exists(fs, b"victim"),
        make_victim,
        lambda fs, done: exists(fs, b"victim") == done,
    ),
    "rmdir": Case(
        (putrootfh(), remove(b"empty")),
        lambda fs: not exists(fs, b"empty"),
        lambda fs: fs.mkdir(ROOT_INODE, b"empty", 0o700),
        lambda fs, done: exists(fs, b"empty") == done,
    ),
    "rename": Case(
        (putrootfh(), savefh(), *path(b"dir"), rename(b"victim", b"moved")),
        lambda fs: not exists(fs, b"victim"),
        make_victim,
        lambda fs, done: (
            exists(fs, b"victim") == done
            and fs.read(fs.resolve(b"dir/moved").ino, 0, 100) == b"the first one"
        ),
    ),
    "rename over another": Case(
        (putrootfh(), savefh(), rename(b"victim", b"other")),
        lambda fs: not exists(fs, b"victim"),
        make_victim,
        lambda fs, done: (
            exists(fs, b"victim") == done
            and fs.read(fs.resolve(b"other").ino, 0, 100) == b"the first one"
        ),
    ),
    "link": Case(
        (*path(b"victim"), savefh(), *path(b"dir"), link(b"linked")),
        lambda fs: exists(fs, b"dir/linked"),
        lambda fs: fs.rename(fs.resolve(b"dir").ino, b"linked", ROOT_INODE, b"elsewhere"),
        lambda fs, done: (
            fs.resolve(b"victim").nlink == 2
            and exists(fs, b"elsewhere") == done
            and exists(fs, b"dir/linked") != done
        ),
    ),
    "mkdir": Case(
        (putrootfh(), mkdir(b"made"), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.mknod(fs.resolve(b"made").ino, b"inside", FILE),
        lambda fs, done: exists(fs, b"made/inside") == done,
    ),
    "mkdir, and gone since": Case(
        (putrootfh(), mkdir(b"made"), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.rmdir(ROOT_INODE, b"made"),
        lambda fs, done: exists(fs, b"made") != done,
    ),
    "symlink": Case(
        (putrootfh(), create(n.NF4LNK, b"made", target=b"to"), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.rename(ROOT_INODE, b"made", ROOT_INODE, b"elsewhere"),
        lambda fs, done: exists(fs, b"made") != done,
    ),
    "fifo of somebody": Case(
        (putrootfh(), create(n.NF4FIFO, b"made", fattr({n.FATTR4_OWNER: owner(5)})), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.rename(ROOT_INODE, b"made", ROOT_INODE, b"elsewhere"),
        lambda fs, done: (
            exists(fs, b"made") != done and fs.resolve(b"elsewhere" if done else b"made").uid == 5
        ),
    ),
    "open that makes a file": Case(
        (putrootfh(), open_new(b"made", n.GUARDED4), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.rename(ROOT_INODE, b"made", ROOT_INODE, b"elsewhere"),
        lambda fs, done: exists(fs, b"made") != done,
    ),
    "exclusive open": Case(
        (putrootfh(), open_new(b"made", n.EXCLUSIVE4_1, b"verifier"), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.setattr(fs.resolve(b"made").ino, atime=(1, 0)),
        lambda fs, done: (fs.resolve(b"made").atime == 1) == done,
    ),
    "two removals": Case(
        (putrootfh(), remove(b"victim"), remove(b"other")),
        lambda fs: not exists(fs, b"victim"),
        make_victim,
        lambda fs, done: exists(fs, b"victim") == done and not exists(fs, b"other"),
    ),
    "make, remove, make": Case(
        (putrootfh(), mkdir(b"made"), putrootfh(), remove(b"made"), mkdir(b"made"), getfh()),
        lambda fs: exists(fs, b"made"),
        lambda fs: fs.mknod(ROOT_INODE, b"inside", FILE),
        lambda fs, done: exists(fs, b"made") and exists(fs, b"inside") == done,
    ),
    "setattr": Case(
        (*path(b"victim"), setattr_({n.FATTR4_MODE: u32(0o600)})),
        lambda fs: fs.resolve(b"victim").mode == stat.S_IFREG | 0o600,
        lambda fs: fs.setattr(fs.resolve(b"victim").ino, mode=0o640),
        lambda fs, done: fs.resolve(b"victim").mode & 0o777 == (0o640 if done else 0o600),
    ),
    "setxattr that makes one": Case(
        (*path(b"victim"), setxattr(b"new", n.SETXATTR4_CREATE, b"value")),
        lambda fs: b"user.new" in xattrs(fs, b"victim"),
        lambda fs: fs.setxattr(fs.resolve(b"victim").ino, b"user.new", b"another"),
        lambda fs, done: xattrs(fs, b"victim")[b"user.new"] == (b"another" if done else b"value"),
    ),
    "removexattr": Case(
        (*path(b"victim"), removexattr(b"old")),
        lambda fs: b"user.old" not in xattrs(fs, b"victim"),
        lambda fs: fs.setxattr(fs.resolve(b"victim").ino, b"user.old", b"another"),
        lambda fs, done: (b"user.old" in xattrs(fs, b"victim")) == done,
    ),
}


@pytest.fixture(scope="module")
def prepared() -> Iterator[tuple[SimDevice, Persistent]]:
    """/dir, /empty, /victim, /other, and the client's session; the server is killed."""
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        host = Host(sim)
        fs = host.fs
        fs.mkdir(ROOT_INODE, b"dir", 0o755)
        fs.mkdir(ROOT_INODE, b"empty", 0o755)
        victim = fs.mknod(ROOT_INODE, b"victim", FILE).ino
        fs.write(victim, 0, b"the first one")
        fs.setxattr(victim, b"user.old", b"old value")
        fs.write(fs.mknod(ROOT_INODE, b"other", FILE).ino, 0, b"other")
        fs.sync()
        client = Persistent().establish(host)
        assert client.granted & n.CREATE_SESSION4_FLAG_PERSIST
        # A slot with a rider, and one that never had one.
        client.do(host, putrootfh(), mkdir(b"before"), slot=1)
        fs.abandon()
        sim.settle()
        yield sim, client


class Violation(AssertionError):  # noqa: N818
    """A request was done twice, or not at all, or its answer is wrong."""


SEEDS = range(8)
"""Fates of the writes that the device had not made durable."""
LOST_POWER = "journal could not be written|records of clients|: .*(EIO|Errno 5)"

Prepared = tuple[SimDevice, Persistent]


def run(
    prepared: Prepared, case: Case, event: int, seed: int, slot: int, mutant: Mutant = Mutant.NONE
) -> tuple[bool, bool]:
    """One request with a cut at this event: whether it came so far, and whether it was done."""
    base, known = prepared
    with base.clone() as sim:
        host = Host(sim, mutant)
        client = Persistent(known.owner, known.clientid, known.id, numbers=dict(known.numbers))
        try:
            return once(host, client, case, event, seed, slot)
        finally:
            host.fs.abandon()


def once(
    host: Host, client: Persistent, case: Case, event: int, seed: int, slot: int
) -> tuple[bool, bool]:
    """`run` with server and client."""
    sim = host.sim
    client.do(host, putrootfh(), slot=slot)
    sim.crash_at(sim.events + event)
    first: list[Any] | None = None
    try:
        first = client.do(host, *case.calls, slot=slot)
    except Failed:
        if not sim.crashed:
            raise
    crashed = sim.crashed
    host.cut(seed)
    done = case.happened(host.fs)
    if first is not None and not done:
        raise Violation("what was answered is not done")
    if done:
        case.disturb(host.fs)
        host.fs.sync()
    try:
        again = client.again(host, *case.calls, slot=slot)
    except Failed as error:
        raise Violation(f"sent again: {error}") from error
    if first is not None and first != again:
        raise Violation(f"answered {again} after {first}")
    if not case.after(host.fs, done):
        raise Violation("not done exactly once")
    # And once more, in the same life; then the slot goes on.
    if client.again(host, *case.calls, slot=slot) != again:
        raise Violation("the cache answers otherwise")
    client.do(host, putrootfh(), slot=slot)
    return crashed, done


def every_cut(prepared: Prepared, case: Case, slot: int, mutant: Mutant = Mutant.NONE) -> set[bool]:
    """Cuts at all events until the request is over: whether it was done, of those that hit it."""
    outcomes = set()
    for event in range(1, 100):
        found = [run(prepared, case, event, seed, slot, mutant) for seed in SEEDS]
        outcomes |= {done for crashed, done in found if crashed}
        if not any(crashed for crashed, _ in found):
            return outcomes
    raise AssertionError("the request has no end")


@pytest.mark.parametrize("slot", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_is_done_once(prepared: Prepared, name: str, slot: int, log_watch: LogWatch) -> None:
    """Slot 1 has a rider of an older request, slot 2 has none."""
    if name != "setattr":  # it tells its errors itself
        log_watch.expect(LOST_POWER)
    assert every_cut(prepared, CASES[name], slot) == {False, True}


@pytest.mark.expect_log(LOST_POWER)
@pytest.mark.parametrize("name", ["remove", "rename", "mkdir", "link", "open that makes a file"])
def test_a_mark_in_another_transaction_is_caught(prepared: Prepared, name: str) -> None:
    with pytest.raises(Violation):
        every_cut(prepared, CASES[name], 2, Mutant.RIDER_APART)


# ---- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lock", "unlock", "downgrade", "close"])
def test_a_state_is_changed_once(what: str, log_watch: LogWatch) -> None:
    """A cut at every write of a request that changes a durable state: its answer, and its seqid,
    are the same whether it had been durable or not."""
    with SimDevice(DEVICE_BYTES) as base:
        with base.device() as device:
            mkfs(device)
        host = Host(base)
        host.fs.mknod(ROOT_INODE, b"file", FILE)
        client = Persistent().establish(host)
        for access in (1, 3):
            opening = open_op(by_name(b"file"), access | NO_DELEG, n.OPEN4_SHARE_DENY_READ)
            _, held, fh = client.do(host, putrootfh(), Call(opening, opened_stateid), getfh())
        file = Call(putfh(fh))
        locker = u32(1) + u32(0) + stateid(held) + u32(0) + bytes(8) + opaque(b"locker")
        locking = u32(n.WRITE_LT), u32(0), bytes(15), b"\x64", locker
        lock = Call(op(n.OP_LOCK, *locking), read_stateid)
        request: tuple[Call, ...] = (file, lock)
        if what != "lock":
            _, locks = client.do(host, *request)
            unlocking = u32(n.WRITE_LT), u32(0), stateid(locks), bytes(15), b"\x64"
            request = {
                "unlock": (file, Call(op(n.OP_LOCKU, *unlocking), read_stateid)),
                "downgrade": (
                    file,
                    Call(
                        op(n.OP_OPEN_DOWNGRADE, stateid(held), u32(0), u32(1), u32(1)),
                        read_stateid,
                    ),
                ),
                "close": (file, Call(op(n.OP_CLOSE, u32(0), stateid(held)), read_stateid)),
            }[what]
        host.service.records.finish()
        host.fs.abandon()
        base.settle()
        answers = [cut_state(base, client, request, 1000, 0)[-1]]
        log_watch.expect("records of clients and states")
        for event in range(1, 4):
            answers += [cut_state(base, client, request, event, seed)[-1] for seed in SEEDS]
        assert len({answer.seqid for answer in answers}) == 1
        # A new state is of the life in which it was made: that is how to see that there were both.
        assert len({answer.other for answer in answers}) == (2 if what == "lock" else 1)


def opened_stateid(body: Any) -> Any:
    held = read_stateid(body)
    body.boolean(), body.u64(), body.u64(), body.u32(), body.bitmap(), body.u32(), body.u32()
    return held


def cut_state(
    base: SimDevice, known: Persistent, request: tuple[Call, ...], event: int, seed: int
) -> list[Any]:
    """The answer after a cut at this event."""
    with base.clone() as sim:
        host = Host(sim)
        client = Persistent(known.owner, known.clientid, known.id, numbers=dict(known.numbers))
        try:
            client.do(host, putrootfh())
            sim.crash_at(sim.events + event)
            first: list[Any] | None = None
            try:
                first = client.do(host, *request)
            except Failed:
                if not sim.crashed:
                    raise
            host.cut(seed)
            again = client.again(host, *request)
            assert first in (None, again)
            return again
        finally:
            host.fs.abandon()
