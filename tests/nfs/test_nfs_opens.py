"""OPEN, OPEN_DOWNGRADE, CLOSE; stateids (RFC 8881 8.2, 9.7, 18.2, 18.16, 18.18)."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from extfs.core import Filesystem
from extfs.nfs import constants as n
from extfs.nfs.opens import FileState, OpenState
from extfs.nfs.service import ServiceOptions
from extfs.nfs.stateids import INVALID, Stateid, check_seqid, next_seqid
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    BOTH,
    CURRENT,
    DENY_BOTH,
    DENY_READ,
    DENY_WRITE,
    GETFH,
    NO_DELEG,
    NOCREATE,
    PUTROOTFH,
    READ,
    WRITE,
    FileClient,
    StatusError,
    by_name,
    create,
    open_op,
    putfh,
    read_stateid,
    stateid,
)
from nfs.wire import auth_sys, next_result, op, opaque, u32, u64


@pytest.fixture
def one(world: World) -> FileClient:
    return FileClient(world.session(b"one"))


@pytest.fixture
def two(world: World) -> FileClient:
    return FileClient(world.session(b"two"))


def status_of(call: Any, *args: Any, **more: Any) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **more)
    return caught.value.status


# -- stateids --


def test_seqids_count_around_without_zero() -> None:
    """8.2.2"""
    assert next_seqid(1) == 2
    assert next_seqid(0xFFFFFFFF) == 1
    assert check_seqid(0, 7) == check_seqid(7, 7) == n.NFS4_OK
    assert check_seqid(6, 7) == n.NFS4ERR_OLD_STATEID
    assert check_seqid(8, 7) == n.NFS4ERR_BAD_STATEID
    assert check_seqid(0xFFFFFFFF, 1) == n.NFS4ERR_OLD_STATEID
    assert check_seqid(1, 0xFFFFFFFF) == n.NFS4ERR_BAD_STATEID


def test_each_open_of_an_owner_counts_and_close_ends_all(one: FileClient) -> None:
    """8.2.2, 9.9, 18.2: one stateid for an owner and file."""
    first = one.create(b"f", WRITE | NO_DELEG)
    assert first.stateid.seqid == 1
    second = one.open(b"f", READ | NO_DELEG)
    assert second.stateid == Stateid(2, first.stateid.other)
    assert status_of(one.close, second.fh, first.stateid) == n.NFS4ERR_OLD_STATEID
    assert one.close(second.fh, second.stateid) == INVALID
    assert status_of(one.close, second.fh, second.stateid) == n.NFS4ERR_BAD_STATEID


def test_other_stateids_are_refused(world: World, one: FileClient, two: FileClient) -> None:
    """8.2.4: foreign, stale, of another file, of another kind, reserved."""
    opened = one.create(b"f")
    other = one.create(b"g")
    held = opened.stateid
    stale = Stateid(1, struct.pack(">I", world.service.epoch - 1) + held.other[4:])
    unknown = Stateid(1, held.other[:4] + b"\x7f" * 8)
    assert status_of(two.read, opened.fh, held, 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.read, opened.fh, stale, 0, 1) == n.NFS4ERR_STALE_STATEID
    assert status_of(one.read, opened.fh, unknown, 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.read, other.fh, held, 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.locku, opened.fh, held, 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.read, opened.fh, Stateid(5, bytes(12)), 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.read, opened.fh, INVALID, 0, 1) == n.NFS4ERR_BAD_STATEID
    assert status_of(one.close, opened.fh, ANONYMOUS) == n.NFS4ERR_BAD_STATEID
    assert one.test(held, stale, unknown, ANONYMOUS, Stateid(9, held.other)) == [
        n.NFS4_OK,
        n.NFS4ERR_STALE_STATEID,
        n.NFS4ERR_BAD_STATEID,
        n.NFS4ERR_BAD_STATEID,
        n.NFS4ERR_BAD_STATEID,
    ]
    assert two.test(held) == [n.NFS4ERR_BAD_STATEID]
    assert status_of(one.free, held) == n.NFS4ERR_LOCKS_HELD
    one.read(opened.fh, Stateid(0, held.other), 0, 1)


def test_current_stateid(one: FileClient) -> None:
    """16.2.3.1.2: set by OPEN, kept with SAVEFH, gone with another filehandle."""
    close = op(n.OP_CLOSE, u32(0), stateid(CURRENT))
    how = create(mode=u32(0o644))

    def run(*operations: bytes) -> int:
        return one.run(PUTROOTFH, open_op(by_name(b"f"), how=how), *operations).status

    assert run(GETFH, close) == n.NFS4_OK
    assert run(PUTROOTFH, close) == n.NFS4ERR_BAD_STATEID
    save, restore = op(n.OP_SAVEFH), op(n.OP_RESTOREFH)
    assert run(save, PUTROOTFH, restore, close) == n.NFS4_OK
    write = op(n.OP_WRITE, stateid(CURRENT), u64(0), u32(n.FILE_SYNC4), opaque(b"abc"))
    assert run(write, close) == n.NFS4_OK
    assert one.run(PUTROOTFH, close).status == n.NFS4ERR_BAD_STATEID


# -- shares --


@pytest.mark.parametrize(
    ("deny", "access", "denies", "expected"),
    [
        (DENY_WRITE, WRITE, 0, n.NFS4ERR_SHARE_DENIED),
        (DENY_WRITE, READ, 0, n.NFS4_OK),
        (DENY_READ, READ, 0, n.NFS4ERR_SHARE_DENIED),
        (DENY_READ, WRITE, 0, n.NFS4_OK),
        (DENY_BOTH, READ, 0, n.NFS4ERR_SHARE_DENIED),
        (0, READ, DENY_WRITE, n.NFS4ERR_SHARE_DENIED),
        (0, READ, DENY_READ, n.NFS4ERR_SHARE_DENIED),
        (0, BOTH, 0, n.NFS4_OK),
    ],
)
def test_share_reservations(
    one: FileClient, two: FileClient, deny: int, access: int, denies: int, expected: int
) -> None:
    """9.7; between clients, and between owners of one client."""
    held = one.create(b"f", deny=deny)
    for client, owner in ((two, b"owner"), (one, b"another")):
        if expected:
            assert status_of(client.open, b"f", access | NO_DELEG, denies, owner) == expected
        else:
            opened = client.open(b"f", access | NO_DELEG, denies, owner)
            client.close(opened.fh, opened.stateid)
    one.close(held.fh, held.stateid)
    two.open(b"f", access | NO_DELEG, denies)


def test_an_owner_does_not_deny_itself(one: FileClient) -> None:
    """9.7: an upgrade is compared with others' opens."""
    one.create(b"f", READ | NO_DELEG, deny=DENY_WRITE)
    assert one.open(b"f", WRITE | NO_DELEG, DENY_READ).stateid.seqid == 2


def test_special_stateids_meet_denials(one: FileClient, two: FileClient) -> None:
    """8.2.3, 9.1.2: the anonymous one is denied, READ bypass is not."""
    held = one.create(b"f", deny=DENY_BOTH)
    bypass = Stateid(0xFFFFFFFF, b"\xff" * 12)
    assert status_of(two.read, held.fh, ANONYMOUS, 0, 1) == n.NFS4ERR_LOCKED
    assert status_of(two.write, held.fh, ANONYMOUS, 0, b"x") == n.NFS4ERR_LOCKED
    assert status_of(two.write, held.fh, bypass, 0, b"x") == n.NFS4ERR_LOCKED
    assert two.read(held.fh, bypass, 0, 1) == (b"", True)


def test_downgrade_goes_back_to_what_was_opened(one: FileClient, two: FileClient) -> None:
    """18.18"""
    one.create(b"f", READ | NO_DELEG)
    held = one.open(b"f", BOTH | NO_DELEG, DENY_WRITE)
    refused = one.downgrade
    assert status_of(refused, held.fh, held.stateid, WRITE) == n.NFS4ERR_INVAL
    assert status_of(refused, held.fh, held.stateid, READ, DENY_WRITE) == n.NFS4ERR_INVAL
    assert status_of(refused, held.fh, held.stateid, 0) == n.NFS4ERR_INVAL
    assert status_of(two.open, b"f", WRITE | NO_DELEG) == n.NFS4ERR_SHARE_DENIED
    down = one.downgrade(held.fh, held.stateid, READ)
    assert down == Stateid(3, held.stateid.other)
    assert status_of(one.write, held.fh, down, 0, b"x") == n.NFS4ERR_OPENMODE
    two.open(b"f", WRITE | NO_DELEG)


def test_the_counts_of_shares_are_those_of_the_opens() -> None:
    """Invariant 2 of opens.py, over a sequence of changes."""
    file = FileState(5, 1)
    opens = [OpenState(object(), file, bytes([i]) * 12, b"o") for i in range(3)]
    for holder in opens:
        file.opens[holder.client, b"o"] = holder
    file.add_share(opens[0], READ, 0)
    file.add_share(opens[1], WRITE, DENY_READ)
    assert list(file.share_conflicts(opens[2], READ, 0)) == [opens[1]]
    assert list(file.share_conflicts(opens[2], WRITE, DENY_WRITE)) == [opens[1]]
    assert file.has_writers()
    assert file.written_by_others(opens[0].client)
    assert not file.written_by_others(opens[1].client)
    file.share(opens[1], 0, 0, 0)
    assert not file.has_writers()
    assert list(file.share_conflicts(opens[2], BOTH, DENY_WRITE)) == []
    assert list(file.share_conflicts(opens[2], WRITE, DENY_READ)) == [opens[0]]


# -- creation --


def test_unchecked_guarded_and_truncation(world: World, one: FileClient) -> None:
    """18.16.3"""
    made = one.open(b"f", how=create(n.GUARDED4, mode=u32(0o640)))
    assert made.attributes == 1 << n.FATTR4_MODE
    assert made.atomic
    assert made.after > made.before
    assert world.fs.lookup(1, b"f").mode & 0o7777 == 0o640
    one.write(made.fh, made.stateid, 0, b"contents")
    assert status_of(one.open, b"f", how=create(n.GUARDED4)) == n.NFS4ERR_EXIST
    again = one.open(b"f", how=create(n.UNCHECKED4, mode=u32(0o600), size=u64(3)))
    assert (again.attributes, again.before) == (0, again.after)
    stat = world.fs.lookup(1, b"f")
    assert (stat.size, stat.mode & 0o7777) == (8, 0o640)
    cut = one.open(b"f", how=create(n.UNCHECKED4, size=u64(0)))
    assert cut.attributes == 1 << n.FATTR4_SIZE
    assert world.fs.lookup(1, b"f").size == 0


@pytest.mark.parametrize("mode", [n.EXCLUSIVE4, n.EXCLUSIVE4_1])
def test_exclusive_create_is_known_again(world: World, one: FileClient, mode: int) -> None:
    """18.16.3: the same verifier is the same request; another one finds a file."""
    made = one.open(b"f", how=create(mode, b"verifier"))
    assert made.attributes & 1 << n.FATTR4_TIME_MODIFY
    ino = world.fs.lookup(1, b"f").ino
    again = one.open(b"f", how=create(mode, b"verifier"))
    assert (again.fh, again.stateid.seqid, again.before) == (made.fh, 2, again.after)
    assert status_of(one.open, b"f", how=create(mode, b"Verifier")) == n.NFS4ERR_EXIST
    assert world.fs.lookup(1, b"f").ino == ino
    one.write(made.fh, again.stateid, 0, b"x")
    assert status_of(one.open, b"f", how=create(mode, b"verifier")) == n.NFS4ERR_EXIST


def test_exclusive_create_does_not_set_times(one: FileClient) -> None:
    """18.16.3, 5.8.1.14: suppattr_exclcreat."""
    mtime = struct.pack(">IqI", n.SET_TO_CLIENT_TIME4, 5, 0)
    how = create(n.EXCLUSIVE4_1, b"verifier", mtime=mtime)
    assert status_of(one.open, b"f", how=how) == n.NFS4ERR_INVAL
    how = create(n.EXCLUSIVE4_1, b"verifier", mode=u32(0o604))
    assert one.open(b"f", how=how).attributes & 1 << n.FATTR4_MODE


def test_the_verifier_outlives_a_restart(world: World, one: FileClient) -> None:
    """18.16.3: also the name never appears without it."""
    one.open(b"f", how=create(n.EXCLUSIVE4_1, b"verifier"))
    stat = world.fs.lookup(1, b"f")
    assert struct.pack(">II", stat.atime, stat.mtime) == b"verifier"
    assert (stat.atime_ns, stat.mtime_ns, stat.nlink) == (0, 0, 1)


def test_what_cannot_be_opened(world: World, one: FileClient) -> None:
    """18.16.4"""
    fs: Filesystem = world.fs
    fs.mkdir(1, b"directory", 0o755)
    fs.symlink(1, b"link", b"f")
    fs.mknod(1, b"pipe", 0o010644)
    assert status_of(one.open, b"directory") == n.NFS4ERR_ISDIR
    assert status_of(one.open, b"link") == n.NFS4ERR_SYMLINK
    assert status_of(one.open, b"pipe") == n.NFS4ERR_WRONG_TYPE
    assert status_of(one.open, b"missing") == n.NFS4ERR_NOENT
    assert status_of(one.open, b"..") == n.NFS4ERR_BADNAME
    opened = one.create(b"f")
    assert status_of(one.open, b"g", fh=opened.fh) == n.NFS4ERR_NOTDIR
    invalid = one.open
    assert status_of(invalid, b"f", 0) == n.NFS4ERR_INVAL
    assert status_of(invalid, b"f", READ | 8) == n.NFS4ERR_INVAL
    assert status_of(invalid, b"f", READ | 0x600) == n.NFS4ERR_INVAL
    assert status_of(invalid, b"f", READ, deny=4) == n.NFS4ERR_INVAL
    how = create(n.UNCHECKED4)
    assert status_of(one.open, fh=opened.fh, how=how) == n.NFS4ERR_INVAL
    prev = u32(n.CLAIM_DELEG_PREV_FH)
    assert status_of(one.open, fh=opened.fh, claim=prev) == n.NFS4ERR_NOTSUPP
    prev = u32(n.CLAIM_DELEGATE_PREV) + opaque(b"f")
    assert status_of(one.open, claim=prev) == n.NFS4ERR_NOTSUPP


def test_claim_fh(one: FileClient) -> None:
    """18.16.3: CLAIM_FH opens what the filehandle says."""
    made = one.create(b"f")
    one.close(made.fh, made.stateid)
    opened = one.open(fh=made.fh, owner=b"second")
    assert opened.fh == made.fh
    one.write(made.fh, opened.stateid, 0, b"x")


def test_reclaim_is_only_for_grace(one: FileClient) -> None:
    """8.4.2.1, 18.51.3"""
    made = one.create(b"f")
    claim = u32(n.CLAIM_PREVIOUS) + u32(n.OPEN_DELEGATE_NONE)
    assert status_of(one.open, fh=made.fh, claim=claim) == n.NFS4ERR_NO_GRACE


def test_open_before_reclaim_complete(world: World) -> None:
    """18.51.3"""
    from nfs.wire import Session

    early = FileClient(Session(world.service, b"early", reclaim_complete=False))
    assert status_of(early.create, b"f") == n.NFS4ERR_GRACE


# -- permissions --


def test_permissions_are_of_the_open(world: World, one: FileClient) -> None:
    """OPEN asks; who has opened may go on although the mode changes, as locally."""
    made = one.open(b"f", how=create(mode=u32(0o600)))
    user = FileClient(world.session(b"user"), auth_sys(1000, 1000))
    assert status_of(user.open, b"f", READ | NO_DELEG) == n.NFS4ERR_ACCESS
    assert status_of(user.read, made.fh, ANONYMOUS, 0, 1) == n.NFS4ERR_ACCESS
    world.fs.setattr(world.fs.lookup(1, b"f").ino, mode=0o604)
    opened = user.open(b"f", READ | NO_DELEG)
    assert status_of(user.open, b"f", WRITE | NO_DELEG) == n.NFS4ERR_ACCESS
    world.fs.setattr(world.fs.lookup(1, b"f").ino, mode=0o600)
    assert user.read(opened.fh, opened.stateid, 0, 1) == (b"", True)
    assert status_of(user.create, b"g") == n.NFS4ERR_ACCESS


def test_the_creator_may_write_what_nobody_may(world: World) -> None:
    """As open(2) with O_CREAT: the mode counts from the next open on."""
    world.fs.mkdir(1, b"d", 0o777)
    world.fs.setattr(1, mode=0o777)
    user = FileClient(world.session(b"user"), auth_sys(1000, 1000))
    made = user.open(b"f", how=create(n.GUARDED4, mode=u32(0)))
    user.write(made.fh, made.stateid, 0, b"x")
    assert status_of(user.open, b"f", READ | NO_DELEG) == n.NFS4ERR_ACCESS


def test_executable_files_may_be_read(world: World, one: FileClient) -> None:
    """A client has to read what it executes."""
    one.open(b"f", how=create(mode=u32(0o711)))
    user = FileClient(world.session(b"user"), auth_sys(1000, 1000))
    opened = user.open(b"f", READ | NO_DELEG)
    assert user.read(opened.fh, opened.stateid, 0, 5) == (b"", True)


# -- life --


def test_a_removed_file_lives_while_it_is_open(world: World, one: FileClient) -> None:
    """The inode is kept open by the state of the file, and no longer."""
    made = one.create(b"f")
    one.write(made.fh, made.stateid, 0, b"contents")
    world.fs.unlink(1, b"f")
    assert one.read(made.fh, made.stateid, 0, 100) == (b"contents", True)
    assert world.service.states.status()["files"] == 1
    one.close(made.fh, made.stateid)
    assert world.service.states.status()["files"] == 0
    world.fs.drain()
    assert status_of(one.read, made.fh, ANONYMOUS, 0, 1) == n.NFS4ERR_STALE


def test_a_client_that_goes_leaves_nothing(world: World, one: FileClient) -> None:
    """Also no entry for its lock-owners."""
    made = one.create(b"f", deny=DENY_BOTH)
    one.lock(made.fh, made.stateid, b"lock", 0, 10)
    FileClient(world.session(b"one", b"reboot"))
    assert world.service.states.status()["files"] == 0
    assert len(world.service.states.owners) == 0


def test_conflict_with_a_courtesy_client(world: World, one: FileClient) -> None:
    """8.4.2.4: a client whose lease is over loses what somebody needs."""
    made = one.create(b"f", deny=DENY_BOTH)
    two = FileClient(world.session(b"two"))
    assert status_of(two.open, b"f") == n.NFS4ERR_SHARE_DENIED
    world.runner.advance(world.service.options.lease_seconds + 5)
    opened = two.open(b"f", deny=DENY_BOTH)
    assert opened.fh == made.fh
    assert world.service.states.status()["opens"] == 1


def test_a_thousand_courtesy_clients_in_the_way(world: World) -> None:
    """All of them go with one request."""
    for index in range(300):
        client = FileClient(world.session(b"client %d" % index))
        client.open(b"f", WRITE | NO_DELEG, how=create(n.UNCHECKED4, mode=u32(0o644)))
    world.runner.advance(world.service.options.lease_seconds + 5)
    breaker = FileClient(world.session(b"breaker"))
    breaker.open(b"f", READ | NO_DELEG, DENY_WRITE)
    assert world.service.states.status()["opens"] == 1


@pytest.mark.parametrize("cut", range(0, 60, 4))
def test_truncated_arguments(one: FileClient, cut: int) -> None:
    """Every prefix of OPEN is BADXDR and leaves nothing."""
    whole = open_op(by_name(b"name"), how=create(mode=u32(0o644)))
    reply = one.run(PUTROOTFH, whole[: 4 + cut])
    next_result(reply.body)
    assert next_result(reply.body).status == n.NFS4ERR_BADXDR


def test_read_only_export(world: World, one: FileClient) -> None:
    """ROFS for writers, nothing else."""
    from nfs.wire import Session, make_service

    one.create(b"f")
    service, runner = make_service(world.fs, ("/:ro,insecure,no_root_squash",))
    runner.advance(2 * service.options.grace_seconds)
    client = FileClient(Session(service, b"ro"))
    assert status_of(client.open, b"f") == n.NFS4ERR_ROFS
    assert status_of(client.create, b"new", READ) == n.NFS4ERR_ROFS
    client.open(b"f", READ | NO_DELEG, how=NOCREATE)


def test_putfh_and_open_in_one_compound_give_the_same_file(one: FileClient) -> None:
    made = one.create(b"f")
    reply = one.run(putfh(made.fh), open_op(u32(n.CLAIM_FH), READ | NO_DELEG, owner=b"x"), GETFH)
    next_result(reply.body)
    next_result(reply.body)
    assert read_stateid(reply.body).seqid == 1


def test_states_are_bounded(world: World) -> None:
    """Of one client, and of all; courtesy clients make room first."""
    from nfs.wire import Session, make_service

    options = ServiceOptions(states=12, states_of_client=5)
    service, runner = make_service(world.fs, options=options)
    runner.advance(2 * options.grace_seconds)

    def opens(owner: bytes, count: int) -> None:
        client = FileClient(Session(service, owner))
        for number in range(count):
            client.create(b"f%d" % number)
        assert status_of(client.create, b"one more") == n.NFS4ERR_DELAY

    opens(b"a", 5)
    opens(b"b", 5)
    opens(b"c", 2)
    assert service.counters["states_refused"] == 3
    runner.advance(options.lease_seconds + 5)
    opens(b"d", 5)
