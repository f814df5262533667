"""GETATTR, SETATTR, VERIFY, NVERIFY, ACCESS: what is told, and who may change what."""

from __future__ import annotations

import stat
import struct
import time
from typing import Any

import pytest

from extfs.core import ROOT_INODE, Cred, HolderKind, HolderSpec, Iomode
from extfs.nfs import attributes, changes
from extfs.nfs import constants as n
from nfs import calls
from nfs.calls import (
    SERVER_TIME,
    access,
    auth_sys,
    client_time,
    do,
    fails,
    getattr_,
    getattr_all,
    nverify,
    owner,
    path,
    putrootfh,
    setattr_,
    status_of,
    verify,
)
from nfs.conftest import World
from nfs.wire import Session, bitmap, next_result, op, opaque, u32, u64

OWNER = auth_sys(1000, 1000, (2000,))
OTHER = auth_sys(1001, 1001)
FILE = stat.S_IFREG | 0o644

# RFC 8881 5.6, and suppattr_exclcreat
REQUIRED = (
    n.FATTR4_SUPPORTED_ATTRS,
    n.FATTR4_TYPE,
    n.FATTR4_FH_EXPIRE_TYPE,
    n.FATTR4_CHANGE,
    n.FATTR4_SIZE,
    n.FATTR4_LINK_SUPPORT,
    n.FATTR4_SYMLINK_SUPPORT,
    n.FATTR4_NAMED_ATTR,
    n.FATTR4_FSID,
    n.FATTR4_UNIQUE_HANDLES,
    n.FATTR4_LEASE_TIME,
    n.FATTR4_RDATTR_ERROR,
    n.FATTR4_FILEHANDLE,
    n.FATTR4_SUPPATTR_EXCLCREAT,
)


@pytest.fixture
def file(world: World) -> int:
    """/file of user 1000 with 5000 bytes."""
    made = world.fs.mknod(ROOT_INODE, b"file", FILE, 0, Cred(1000, 1000))
    world.fs.write(made.ino, 0, b"x" * 5000)
    return made.ino


def attrs(session: Session, *wanted: int) -> dict[int, Any]:
    found: dict[int, Any] = do(session, *path(b"file"), getattr_(*wanted))[-1]
    return found


# ---- GETATTR -----------------------------------------------------------------------------------


def test_all_required_attributes_are_there(world: World) -> None:
    found = do(world.session(), putrootfh(), getattr_(*REQUIRED))[-1]
    assert set(found) == set(REQUIRED)
    assert found[n.FATTR4_TYPE] == n.NF4DIR
    assert found[n.FATTR4_FH_EXPIRE_TYPE] == n.FH4_PERSISTENT
    assert found[n.FATTR4_LINK_SUPPORT]
    assert found[n.FATTR4_SYMLINK_SUPPORT]
    assert not found[n.FATTR4_NAMED_ATTR]
    assert found[n.FATTR4_UNIQUE_HANDLES]
    assert found[n.FATTR4_LEASE_TIME] == 90
    assert found[n.FATTR4_RDATTR_ERROR] == n.NFS4_OK


def test_every_supported_attribute_can_be_had_and_nothing_else(world: World) -> None:
    session = world.session()
    for minor in (1, 2):
        supported = do(session, putrootfh(), getattr_(n.FATTR4_SUPPORTED_ATTRS), minor=minor)[-1][0]
        readable = supported & ~attributes.WRITE_ONLY
        wanted = [number for number in range(90) if not attributes.WRITE_ONLY >> number & 1]
        found = do(session, putrootfh(), getattr_(*wanted), minor=minor)[-1]
        assert sum(1 << number for number in found) == readable
    assert supported >> n.FATTR4_XATTR_SUPPORT & 1
    of_41 = do(session, putrootfh(), getattr_(n.FATTR4_SUPPORTED_ATTRS), minor=1)[-1][0]
    assert of_41 == supported & (1 << n.FATTR4_CLONE_BLKSIZE) - 1


def test_attributes_are_those_of_the_core(world: World, file: int) -> None:
    world.fs.setattr(file, atime=(-5, 1), mtime=(1 << 33, 999_999_999))
    found = do(world.session(), *path(b"file"), getattr_all())[-1]
    st = world.fs.getattr(file)
    space = world.fs.statfs()
    assert found[n.FATTR4_TYPE] == n.NF4REG
    assert found[n.FATTR4_CHANGE] == changes.value(st)
    assert found[n.FATTR4_SIZE] == 5000
    assert found[n.FATTR4_SPACE_USED] == 8192
    assert found[n.FATTR4_FILEID] == found[n.FATTR4_MOUNTED_ON_FILEID] == file
    assert found[n.FATTR4_MODE] == 0o644
    assert found[n.FATTR4_NUMLINKS] == 1
    assert (found[n.FATTR4_OWNER], found[n.FATTR4_OWNER_GROUP]) == (b"1000", b"1000")
    assert found[n.FATTR4_TIME_ACCESS] == (-5, 1)
    assert found[n.FATTR4_TIME_MODIFY] == (1 << 33, 999_999_999)
    assert found[n.FATTR4_TIME_METADATA] == (st.ctime, st.ctime_ns)
    assert found[n.FATTR4_TIME_CREATE] == (st.btime, st.btime_ns)
    assert found[n.FATTR4_TIME_DELTA] == (0, 1)
    assert found[n.FATTR4_SPACE_TOTAL] == space.total * 4096
    assert found[n.FATTR4_SPACE_FREE] == space.free * 4096
    assert found[n.FATTR4_SPACE_AVAIL] == space.avail * 4096
    assert found[n.FATTR4_FILES_TOTAL] == space.inodes + space.free
    assert found[n.FATTR4_FS_LAYOUT_TYPES] == [n.LAYOUT4_BLOCK_VOLUME]
    assert found[n.FATTR4_LAYOUT_BLKSIZE] == 4096
    assert found[n.FATTR4_ACLSUPPORT] == 0
    assert found[n.FATTR4_MAXREAD] == found[n.FATTR4_MAXWRITE] == 1 << 20
    assert found[n.FATTR4_MAXFILESIZE] == (1 << 63) - 1
    assert found[n.FATTR4_CHANGE_ATTR_TYPE] == n.NFS4_CHANGE_TYPE_IS_UNDEFINED
    access_bits, deny, want, claim, mode = found[n.FATTR4_OPEN_ARGUMENTS]
    assert (access_bits, deny, mode) == (0b1110, 0b1111, 0b1111)
    assert claim & 0b10111 == 0b10111
    assert want == attributes.OPEN_WANTS


def test_any_subset_is_encoded_like_the_whole(world: World, file: int) -> None:
    """Plans join attributes into runs; whatever stands beside one, its value is the same."""
    session = world.session()
    whole = do(session, *path(b"file"), getattr_all())[-1]
    numbers = sorted(whole)
    seed = 12345
    for _ in range(200):
        seed = seed * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        chosen = [number for place, number in enumerate(numbers) if seed >> (place % 61) & 1]
        if n.FATTR4_CHANGE_ATTR_TYPE in chosen and len(chosen) < 2:
            continue
        found = attrs(session, *chosen)
        assert found == {number: whole[number] for number in chosen}


def test_a_bitmap_of_nothing_and_of_unknown_attributes(world: World) -> None:
    session = world.session()
    assert do(session, putrootfh(), getattr_())[-1] == {}
    assert do(session, putrootfh(), getattr_(200))[-1] == {}
    assert status_of(session, putrootfh(), getattr_(300)) == "BADXDR"


@pytest.mark.parametrize("number", [n.FATTR4_TIME_ACCESS_SET, n.FATTR4_TIME_MODIFY_SET, 74, 81])
def test_what_can_only_be_set_cannot_be_read(world: World, number: int) -> None:
    session = world.session()
    assert status_of(session, putrootfh(), getattr_(n.FATTR4_SIZE, number)) == "INVAL"
    assert status_of(session, putrootfh(), verify({number: bytes(8)})) == "INVAL"


def test_quarantined_blocks_are_not_available(world: World) -> None:
    session = world.session()
    wanted = getattr_(n.FATTR4_SPACE_AVAIL, n.FATTR4_SPACE_FREE)
    found = do(session, putrootfh(), wanted)[-1]
    space = world.fs.statfs()
    assert found[n.FATTR4_SPACE_AVAIL] <= (space.total - space.quarantined) * 4096
    assert found[n.FATTR4_SPACE_AVAIL] <= found[n.FATTR4_SPACE_FREE]


# ---- VERIFY, NVERIFY ---------------------------------------------------------------------------


def test_verify_of_what_getattr_said(world: World, file: int) -> None:
    session = world.session()
    numbers = [number for number in REQUIRED if number != n.FATTR4_RDATTR_ERROR]
    raw = session.run(*(call.encoded for call in path(b"file")), calls.getattr_(*numbers).encoded)
    for _ in range(2):
        raw.body.fixed(8)
    raw.body.fixed(8)
    encoded = raw.body.buffer[raw.body.pos : raw.body.end]
    same = calls.Call(struct.pack(">I", n.OP_VERIFY) + encoded)
    other = calls.Call(struct.pack(">I", n.OP_NVERIFY) + encoded)
    assert status_of(session, *path(b"file"), same) == "OK"
    assert status_of(session, *path(b"file"), other) == "SAME"


def test_verify_of_something_else(world: World, file: int) -> None:
    session = world.session()
    size = {n.FATTR4_SIZE: u64(5001)}
    assert status_of(session, *path(b"file"), verify(size)) == "NOT_SAME"
    assert status_of(session, *path(b"file"), nverify(size)) == "OK"
    assert status_of(session, *path(b"file"), verify({n.FATTR4_SIZE: u64(5000)})) == "OK"
    assert status_of(session, *path(b"file"), verify({n.FATTR4_ACL: u32(0)})) == "ATTRNOTSUPP"
    assert status_of(session, *path(b"file"), verify({n.FATTR4_RDATTR_ERROR: u32(0)})) == "INVAL"
    assert status_of(session, verify(size)) == "NOFILEHANDLE"


# ---- SETATTR -----------------------------------------------------------------------------------


def mask(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def test_setattr_sets_everything_at_once(world: World, file: int) -> None:
    session = world.session()
    done = do(
        session,
        *path(b"file"),
        setattr_(
            {
                n.FATTR4_SIZE: u64(100),
                n.FATTR4_MODE: u32(0o4711),
                n.FATTR4_OWNER: owner(7),
                n.FATTR4_OWNER_GROUP: owner(8),
                n.FATTR4_TIME_ACCESS_SET: client_time(-1, 5),
                n.FATTR4_TIME_MODIFY_SET: client_time(10, 20),
            }
        ),
    )[-1]
    assert done == mask(4, 33, 36, 37, 48, 54)
    st = world.fs.getattr(file)
    assert (st.size, st.mode & 0o7777, st.uid, st.gid) == (100, 0o4711, 7, 8)
    assert (st.atime, st.atime_ns, st.mtime, st.mtime_ns) == (-1, 5, 10, 20)


def test_setattr_is_durable(world: World, file: int) -> None:
    before = world.fs.stats()
    do(world.session(), *path(b"file"), setattr_({n.FATTR4_MODE: u32(0o600)}))
    after = world.fs.stats()
    assert after.durable_xid > before.durable_xid


def test_the_servers_time(world: World, file: int) -> None:
    world.fs.setattr(file, atime=(0, 0), mtime=(0, 0))
    begin = time.time()
    do(world.session(), *path(b"file"), setattr_({n.FATTR4_TIME_MODIFY_SET: SERVER_TIME}))
    st = world.fs.getattr(file)
    assert begin - 1 <= st.mtime <= time.time() + 1
    assert st.atime == 0


def test_a_masked_mode(world: World, file: int) -> None:
    values = {n.FATTR4_MODE_SET_MASKED: u32(0o0111) + u32(0o0555)}
    assert do(world.session(), *path(b"file"), setattr_(values))[-1] == mask(74)
    assert world.fs.getattr(file).mode & 0o7777 == 0o644 & ~0o555 | 0o111


def test_setting_nothing(world: World, file: int) -> None:
    before = world.fs.getattr(file)
    assert do(world.session(), *path(b"file"), setattr_({}))[-1] == 0
    assert world.fs.getattr(file) == before


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({n.FATTR4_ACL: u32(0)}, "ATTRNOTSUPP"),
        ({n.FATTR4_HIDDEN: u32(1)}, "ATTRNOTSUPP"),
        ({n.FATTR4_TYPE: u32(2)}, "INVAL"),
        ({n.FATTR4_CHANGE: u64(1)}, "INVAL"),
        ({n.FATTR4_TIME_CREATE: bytes(12)}, "INVAL"),
        ({n.FATTR4_MODE: u32(0o10000)}, "INVAL"),
        ({n.FATTR4_MODE: u32(0), n.FATTR4_MODE_SET_MASKED: u32(0) + u32(0)}, "INVAL"),
        ({81: u32(0o777) + u32(0)}, "INVAL"),
        ({n.FATTR4_SIZE: u64(1 << 63)}, "FBIG"),
        ({n.FATTR4_SIZE: u64((1 << 64) - 1)}, "FBIG"),
        ({n.FATTR4_SIZE: u32(1)}, "BADXDR"),
        ({n.FATTR4_SIZE: u64(1) + u32(1)}, "BADXDR"),
        ({n.FATTR4_TIME_MODIFY_SET: u32(2)}, "BADXDR"),
        ({n.FATTR4_TIME_MODIFY_SET: client_time(0, 10**9)}, "INVAL"),
        ({n.FATTR4_OWNER: opaque(b"root@localdomain")}, "BADOWNER"),
        ({n.FATTR4_OWNER: opaque(b"")}, "BADOWNER"),
        ({n.FATTR4_OWNER: opaque(b"-1")}, "BADOWNER"),
        ({n.FATTR4_OWNER: opaque(b"4294967295")}, "BADOWNER"),
        ({n.FATTR4_OWNER_GROUP: opaque("٣".encode())}, "BADOWNER"),
    ],
)
def test_what_setattr_refuses(
    world: World, file: int, values: dict[int, bytes], status: str
) -> None:
    session = world.session()
    before = world.fs.getattr(file)
    failed = fails(session, *path(b"file"), setattr_(values))
    assert n.STATUS_NAMES[failed.status] == "NFS4ERR_" + status
    assert failed.body.bitmap() == 0, "a failed SETATTR returns attrsset too"
    assert failed.body.done()
    assert world.fs.getattr(file) == before


def test_setattr_without_a_filehandle_has_a_body_too(world: World) -> None:
    failed = fails(world.session(), setattr_({n.FATTR4_MODE: u32(0)}))
    assert failed.status == n.NFS4ERR_NOFILEHANDLE
    assert failed.body.bitmap() == 0
    assert failed.body.done()


def test_sizes_of_what_has_none(world: World) -> None:
    session = world.session()
    world.fs.mkdir(ROOT_INODE, b"dir", 0o755)
    world.fs.symlink(ROOT_INODE, b"link", b"x")
    size = setattr_({n.FATTR4_SIZE: u64(0)})
    assert status_of(session, *path(b"dir"), size) == "ISDIR"
    assert status_of(session, *path(b"link"), size) == "INVAL"
    mode = {n.FATTR4_MODE: u32(0o600), n.FATTR4_OWNER: owner(2)}
    assert do(session, *path(b"link"), setattr_(mode))[-1] == mask(n.FATTR4_OWNER)
    assert world.fs.resolve(b"link").mode & 0o7777 == 0o777
    assert status_of(session, *path(b"link"), setattr_({n.FATTR4_OWNER: owner(3)})) == "OK"
    assert world.fs.resolve(b"link").uid == 3


def test_a_size_that_a_layout_is_in_the_way_of_is_delayed(world: World, file: int) -> None:
    layouts = world.fs.layouts
    holder, _ = layouts.register(HolderSpec("somebody", HolderKind.CLIENT))
    layouts.get(file, holder, Iomode.RW, 0, 4096)
    session = world.session()
    values = {n.FATTR4_SIZE: u64(0), n.FATTR4_MODE: u32(0)}
    failed = fails(session, *path(b"file"), setattr_(values))
    assert failed.status == n.NFS4ERR_DELAY
    assert failed.body.bitmap() == 0
    assert world.fs.getattr(file).mode & 0o7777 == 0o644


MODE = {n.FATTR4_MODE: u32(0o600)}
NOW = {n.FATTR4_TIME_MODIFY_SET: SERVER_TIME}
THEN = {n.FATTR4_TIME_MODIFY_SET: client_time(0)}
SIZE = {n.FATTR4_SIZE: u64(0)}


@pytest.mark.parametrize(
    ("values", "auth", "mode", "status"),
    [
        (MODE, OWNER, 0o000, "OK"),
        (MODE, OTHER, 0o777, "PERM"),
        (NOW, OWNER, 0o000, "OK"),
        (NOW, OTHER, 0o002, "OK"),
        (NOW, OTHER, 0o004, "ACCESS"),
        (THEN, OWNER, 0o000, "OK"),
        (THEN, OTHER, 0o006, "PERM"),
        (SIZE, OWNER, 0o600, "OK"),
        (SIZE, OWNER, 0o400, "ACCESS"),
        (SIZE, OTHER, 0o602, "OK"),
        (SIZE, OTHER, 0o600, "ACCESS"),
        ({n.FATTR4_OWNER: owner(1000)}, OWNER, 0o600, "OK"),
        ({n.FATTR4_OWNER: owner(1001)}, OWNER, 0o600, "PERM"),
        ({n.FATTR4_OWNER: owner(1001)}, OTHER, 0o666, "PERM"),
        ({n.FATTR4_OWNER_GROUP: owner(2000)}, OWNER, 0o600, "OK"),
        ({n.FATTR4_OWNER_GROUP: owner(0)}, OWNER, 0o600, "PERM"),
        ({n.FATTR4_OWNER_GROUP: owner(1001)}, OTHER, 0o666, "PERM"),
    ],
)
def test_who_may_set_what(
    world: World, file: int, values: dict[int, bytes], auth: bytes, mode: int, status: str
) -> None:
    world.fs.setattr(file, mode=mode)
    assert status_of(world.session(), *path(b"file"), setattr_(values), auth=auth) == status


def test_setuid_and_setgid_go(world: World, file: int) -> None:
    session = world.session()

    def mode(values: dict[int, bytes], auth: bytes = calls.ROOT) -> int:
        world.fs.setattr(file, mode=0o6777)
        do(session, *path(b"file"), setattr_(values), auth=auth)
        return world.fs.getattr(file).mode & 0o7777

    assert mode({n.FATTR4_OWNER_GROUP: owner(2000)}, OWNER) == 0o777
    assert mode({n.FATTR4_OWNER: owner(1000)}) == 0o777
    assert mode({n.FATTR4_SIZE: u64(10)}, OWNER) == 0o777
    assert mode({n.FATTR4_SIZE: u64(20)}) == 0o6777, "root keeps them, as in Linux"
    world.fs.setattr(file, gid=3000)
    assert mode({n.FATTR4_MODE: u32(0o2755)}, OWNER) == 0o755, "not a group of the owner's"


# ---- ACCESS ------------------------------------------------------------------------------------

READ, LOOKUP, MODIFY, EXTEND, DELETE, EXECUTE = 1, 2, 4, 8, 16, 32


def test_access_of_files(world: World, file: int) -> None:
    session = world.session()
    assert do(session, *path(b"file"), access(0x3F))[-1] == (0x2D, READ | MODIFY | EXTEND)
    assert do(session, *path(b"file"), access(0x3F), auth=OTHER)[-1] == (0x2D, READ)
    world.fs.setattr(file, mode=0o070)
    assert do(session, *path(b"file"), access(0x3F), auth=OWNER)[-1] == (0x2D, 0)
    assert do(session, *path(b"file"), access(READ | LOOKUP), auth=OTHER)[-1] == (READ, 0)
    world.fs.setattr(file, mode=0o711)
    assert do(session, *path(b"file"), access(EXECUTE), auth=OTHER)[-1] == (EXECUTE, EXECUTE)


def test_access_of_directories(world: World) -> None:
    session = world.session()
    everything = READ | LOOKUP | MODIFY | EXTEND | DELETE
    world.fs.mkdir(ROOT_INODE, b"dir", 0o751, Cred(1000, 1000))
    assert do(session, *path(b"dir"), access(0x3F))[-1] == (everything, everything)
    assert do(session, *path(b"dir"), access(0x3F), auth=OWNER)[-1] == (everything, everything)
    assert do(session, *path(b"dir"), access(0x3F), auth=OTHER)[-1] == (everything, LOOKUP)
    assert status_of(session, *path(b"dir"), access(0x200)) == "INVAL"
    assert do(session, *path(b"dir"), access(0x1C0))[-1] == (0x1C0, 0x1C0)
    assert status_of(session, *path(b"dir"), access(0x40), minor=1) == "INVAL"


def test_an_acl_of_the_filesystem_counts(world: World, file: int) -> None:
    """A POSIX ACL that gives user 1001 reading and writing."""
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, who)
        for tag, rights, who in (
            (1, 6, 0xFFFFFFFF),
            (2, 6, 1001),
            (4, 4, 0xFFFFFFFF),
            (16, 6, 0xFFFFFFFF),
            (32, 0, 0xFFFFFFFF),
        )
    )
    world.fs.setxattr(file, b"system.posix_acl_access", acl)
    session = world.session()
    asked = access(READ | MODIFY)
    assert do(session, *path(b"file"), asked, auth=OTHER)[-1][1] == READ | MODIFY
    nobody = auth_sys(1002, 1002)
    assert do(session, *path(b"file"), asked, auth=nobody)[-1][1] == 0
    assert status_of(session, *path(b"file"), setattr_(SIZE), auth=OTHER) == "OK"


def test_a_plan_is_made_once(world: World, file: int) -> None:
    linux = (1, 3, 4, 8, 20, 33, 35, 36, 37, 41, 45, 47, 52, 53, 55)
    session = world.session()
    attrs(session, *linux)
    plans = dict(world.service.filehandles.plans)
    assert plans
    attrs(session, *linux)
    assert world.service.filehandles.plans == plans


def test_setattr_that_is_not_run_has_its_bitmap_too(world: World) -> None:
    """18.30.2: attrsset follows every status."""
    set_nothing = op(n.OP_SETATTR, bytes(16), bitmap(), opaque(b""))
    reply = world.wire().compound(set_nothing)
    assert (reply.status, reply.count) == (n.NFS4ERR_OP_NOT_IN_SESSION, 1)
    next_result(reply.body)
    assert (reply.body.bitmap(), reply.body.done()) == (0, True)
    reply = world.session().run(set_nothing)
    assert reply.status == n.NFS4ERR_NOFILEHANDLE
    next_result(reply.body)
    assert (reply.body.bitmap(), reply.body.done()) == (0, True)
    reply = world.session(b"two").run(op(n.OP_PUTROOTFH), op(n.OP_SETATTR, bytes(12)))
    assert reply.status == n.NFS4ERR_BADXDR
    next_result(reply.body)
    next_result(reply.body)
    assert (reply.body.bitmap(), reply.body.done()) == (0, True)
