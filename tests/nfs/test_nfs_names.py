"""Filehandles and names: LOOKUP and its kin, CREATE, REMOVE, RENAME, LINK, READLINK, SECINFO."""

from __future__ import annotations

import stat
import struct

import pytest

from extfs.core import ROOT_INODE, Cred, Filesystem
from extfs.nfs import changes
from extfs.nfs import constants as n
from extfs.nfs.xdr import Writer
from nfs.calls import (
    auth_sys,
    create,
    do,
    fails,
    fattr,
    getattr_,
    getfh,
    link,
    lookup,
    lookupp,
    mkdir,
    openattr,
    owner,
    path,
    putfh,
    putpubfh,
    putrootfh,
    readlink,
    remove,
    rename,
    restorefh,
    savefh,
    secinfo,
    secinfo_no_name,
    status_of,
)
from nfs.conftest import World
from nfs.file_calls import FileClient
from nfs.wire import Session as WireSession
from nfs.wire import encode, make_service, op, opaque, read_compound, u32

USER = auth_sys(1000, 1000, (2000,))
OTHER = auth_sys(1001, 1001)
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def tree(world: World) -> World:
    """/dir (0755 root), /dir/file, /link -> dir, /fifo, /open (0777), /tmp (1777)."""
    fs = world.fs
    directory = fs.mkdir(ROOT_INODE, b"dir", 0o755).ino
    fs.mknod(directory, b"file", FILE)
    fs.symlink(ROOT_INODE, b"link", b"dir")
    fs.mknod(ROOT_INODE, b"fifo", stat.S_IFIFO | 0o644)
    for name, mode in ((b"open", 0o777), (b"tmp", 0o1777)):
        fs.mkdir(ROOT_INODE, name, mode, Cred(umask=0))
    return world


def change(fs: Filesystem, *names: bytes) -> int:
    return changes.value(fs.resolve(b"/".join(names)))


# ---- filehandles -------------------------------------------------------------------------------


def test_putfh_of_what_getfh_gave_is_the_same_file(tree: World) -> None:
    session = tree.session()
    given = do(session, *path(b"dir", b"file"), getfh())[-1]
    again = do(session, putfh(given), getfh(), getattr_(n.FATTR4_FILEID, n.FATTR4_FILEHANDLE))
    assert again[1] == given
    assert again[2] == {
        n.FATTR4_FILEID: tree.fs.resolve(b"dir/file").ino,
        n.FATTR4_FILEHANDLE: given,
    }
    assert len(given) % 4 == 0
    assert len(given) <= n.NFS4_FHSIZE


def test_filehandles_outlive_a_restart(tree: World) -> None:
    given = do(tree.session(), *path(b"dir", b"file"), getfh())[-1]
    service, _ = make_service(tree.fs)
    session = WireSession(service, b"two", reclaim_complete=False)
    assert do(session, putfh(given), getfh())[-1] == given


def test_forged_filehandles_are_bad(tree: World) -> None:
    session = tree.session()
    given = do(session, *path(b"dir", b"file"), getfh())[-1]
    for position in range(len(given)):
        forged = bytearray(given)
        forged[position] ^= 1
        assert status_of(session, putfh(bytes(forged))) == "BADHANDLE"
    for length in range(len(given)):
        assert status_of(session, putfh(given[:length])) == "BADHANDLE"
    assert status_of(session, putfh(given + bytes(4))) == "BADHANDLE"
    assert status_of(session, putfh(b"abc")) == "BADHANDLE"


def test_a_filehandle_that_is_too_long_is_bad_xdr(tree: World) -> None:
    assert status_of(tree.session(), putfh(bytes(132))) == "BADXDR"


def test_the_filehandle_of_a_file_that_is_gone_is_stale(tree: World) -> None:
    session = tree.session()
    given = do(session, *path(b"dir", b"file"), getfh())[-1]
    do(session, *path(b"dir"), remove(b"file"))
    tree.fs.drain()
    assert status_of(session, putfh(given)) == "STALE"


def test_a_file_that_is_kept_open_stays_usable(tree: World) -> None:
    session = tree.session()
    given = do(session, *path(b"dir", b"file"), getfh())[-1]
    ino = tree.fs.resolve(b"dir/file").ino
    tree.fs.open_inode(ino)
    do(session, *path(b"dir"), remove(b"file"))
    tree.fs.drain()
    assert do(session, putfh(given), getattr_(n.FATTR4_NUMLINKS))[-1] == {n.FATTR4_NUMLINKS: 0}
    tree.fs.release(ino)
    tree.fs.drain()
    assert status_of(session, putfh(given)) == "STALE"


def test_a_current_filehandle_that_goes_stale_inside_a_compound(tree: World) -> None:
    session = tree.session()
    done = fails(
        session,
        *path(b"dir"),
        create(n.NF4FIFO, b"pipe"),
        savefh(),
        *path(b"dir"),
        remove(b"pipe"),
        restorefh(),
        getattr_(n.FATTR4_TYPE),
    )
    assert done.status == n.NFS4ERR_STALE


def test_without_a_filehandle(tree: World) -> None:
    session = tree.session()
    for call in (getfh(), savefh(), restorefh(), lookup(b"dir"), lookupp(), readlink()):
        assert status_of(session, call) == "NOFILEHANDLE"
    for call in (link(b"a"), rename(b"a", b"b")):
        assert status_of(session, putrootfh(), call) == "NOFILEHANDLE"


def test_saved_and_restored(tree: World) -> None:
    session = tree.session()
    values = do(session, *path(b"dir"), getfh(), savefh(), *path(b"tmp"), restorefh(), getfh())
    assert values[2] == values[-1]
    root, public = do(session, putrootfh(), getfh(), putpubfh(), getfh())[1::2]
    assert root == public


# ---- LOOKUP, LOOKUPP ---------------------------------------------------------------------------


def test_lookupp_leads_back(tree: World) -> None:
    session = tree.session()
    root, sub, back = do(
        session, putrootfh(), getfh(), lookup(b"dir"), getfh(), lookupp(), getfh()
    )[1::2]
    assert root == back != sub
    assert status_of(session, putrootfh(), lookupp()) == "NOENT"


@pytest.mark.parametrize(
    ("name", "status"), [(b"link", "SYMLINK"), (b"fifo", "NOTDIR"), (b"dir", "NOENT")]
)
def test_lookup_where_there_is_no_directory(tree: World, name: bytes, status: str) -> None:
    assert status_of(tree.session(), *path(name), lookup(b"missing")) == status


@pytest.mark.parametrize(("name", "status"), [(b"link", "SYMLINK"), (b"fifo", "NOTDIR")])
def test_lookupp_of_no_directory(tree: World, name: bytes, status: str) -> None:
    assert status_of(tree.session(), *path(name), lookupp()) == status


BAD_NAMES = [
    (b"", "INVAL"),
    (b".", "BADNAME"),
    (b"..", "BADNAME"),
    (b"a/b", "BADCHAR"),
    (b"a\0b", "BADCHAR"),
    (b"x" * 256, "NAMETOOLONG"),
    (b"abc" * 512, "NAMETOOLONG"),
    (b"\xc0\xc1", "INVAL"),
    (b"\xed\xa0\x80", "INVAL"),
    (b"\xfc\x80\x80\x80\x80\xaf", "INVAL"),
    (b"\xef\xbf\xbe", "INVAL"),
    (b"\xc0 ", "INVAL"),
]


@pytest.mark.parametrize(("name", "status"), BAD_NAMES)
def test_bad_names(tree: World, name: bytes, status: str) -> None:
    session = tree.session()
    root = putrootfh()
    assert status_of(session, root, lookup(name)) == status
    assert status_of(session, root, mkdir(name)) == status
    assert status_of(session, root, remove(name)) == status
    assert status_of(session, root, secinfo(name)) == status
    assert status_of(session, root, savefh(), rename(name, b"new")) == status
    assert status_of(session, root, savefh(), rename(b"dir", name)) == status
    assert status_of(session, *path(b"fifo"), savefh(), root, link(name)) == status


@pytest.mark.parametrize(
    "name", [b"x" * 255, "ä€🙂".encode(), b"a b", b".x", b"...", b"back\\slash", b"\x7f\x01"]
)
def test_good_names(tree: World, name: bytes) -> None:
    session = tree.session()
    do(session, putrootfh(), mkdir(name))
    assert do(session, *path(name), getattr_(n.FATTR4_TYPE))[-1] == {n.FATTR4_TYPE: n.NF4DIR}
    assert tree.fs.lookup(ROOT_INODE, name)
    do(session, putrootfh(), remove(name))
    assert status_of(session, *path(name)) == "NOENT"


def test_lookup_needs_the_right_to_search(tree: World) -> None:
    tree.fs.setattr(tree.fs.resolve(b"dir").ino, mode=0o700)
    session = tree.session()
    assert status_of(session, *path(b"dir", b"file"), auth=USER) == "ACCESS"
    assert status_of(session, *path(b"dir"), lookupp(), auth=USER) == "ACCESS"
    assert status_of(session, *path(b"dir", b"file")) == "OK"


def test_the_control_directory_is_not_there(tree: World) -> None:
    session = tree.session()
    root = putrootfh()
    assert status_of(session, root, lookup(b".extfs")) == "NOENT"
    assert status_of(session, root, mkdir(b".extfs")) == "ACCESS"
    assert status_of(session, root, savefh(), rename(b"dir", b".extfs")) == "ACCESS"
    assert status_of(session, *path(b"fifo"), savefh(), root, link(b".extfs")) == "ACCESS"
    assert status_of(session, *path(b"dir"), mkdir(b".extfs")) == "OK"


# ---- READLINK, SECINFO, OPENATTR ---------------------------------------------------------------


def test_readlink(tree: World) -> None:
    session = tree.session()
    assert do(session, *path(b"link"), readlink())[-1] == b"dir"
    assert status_of(session, *path(b"dir"), readlink()) == "WRONG_TYPE"


def test_secinfo_says_auth_sys_and_takes_the_filehandle(tree: World) -> None:
    session = tree.session()
    assert do(session, putrootfh(), secinfo(b"dir"))[-1] == [n.AUTH_SYS]
    assert status_of(session, putrootfh(), secinfo(b"dir"), getfh()) == "NOFILEHANDLE"
    assert status_of(session, putrootfh(), secinfo(b"missing")) == "NOENT"
    assert status_of(session, *path(b"fifo"), secinfo(b"x")) == "NOTDIR"


def test_secinfo_no_name(tree: World) -> None:
    session = tree.session()
    here, above = n.SECINFO_STYLE4_CURRENT_FH, n.SECINFO_STYLE4_PARENT
    assert do(session, putrootfh(), secinfo_no_name(here))[-1] == [n.AUTH_SYS]
    assert do(session, *path(b"dir"), secinfo_no_name(above))[-1] == [n.AUTH_SYS]
    assert status_of(session, putrootfh(), secinfo_no_name(above)) == "NOENT"
    assert status_of(session, putrootfh(), secinfo_no_name(2)) == "BADXDR"
    assert status_of(session, putrootfh(), secinfo_no_name(here), getfh()) == "NOFILEHANDLE"


def test_there_are_no_named_attributes(tree: World) -> None:
    assert status_of(tree.session(), *path(b"dir"), openattr()) == "NOTSUPP"


# ---- CREATE ------------------------------------------------------------------------------------


def test_every_type_that_create_makes(tree: World) -> None:
    session = tree.session()
    mode = fattr({n.FATTR4_MODE: u32(0o640)})
    for kind, name in (
        (n.NF4DIR, b"1"),
        (n.NF4LNK, b"2"),
        (n.NF4SOCK, b"3"),
        (n.NF4FIFO, b"4"),
        (n.NF4BLK, b"5"),
        (n.NF4CHR, b"6"),
    ):
        info, mask = do(
            session,
            *path(b"open"),
            create(kind, name, mode, target=b"to", device=(300, 70000)),
        )[-1]
        assert info.atomic
        assert info.after > info.before
        assert info.after == change(tree.fs, b"open")
        assert mask == (0 if kind == n.NF4LNK else 1 << n.FATTR4_MODE)
        wanted = getattr_(n.FATTR4_TYPE, n.FATTR4_RAWDEV, n.FATTR4_MODE)
        found = do(session, *path(b"open", name), wanted)[-1]
        assert found[n.FATTR4_TYPE] == kind
        assert found[n.FATTR4_MODE] == (0o777 if kind == n.NF4LNK else 0o640)
        device = (300, 70000) if kind in (n.NF4BLK, n.NF4CHR) else (0, 0)
        assert found[n.FATTR4_RAWDEV] == device
    made = tree.fs.resolve(b"open/5")
    assert (made.rdev >> 8 & 0xFFF, made.rdev & 0xFF | made.rdev >> 12 & 0xFFF00) == (300, 70000)


def test_the_new_object_is_the_current_one(tree: World) -> None:
    session = tree.session()
    made = do(session, putrootfh(), mkdir(b"new"), getfh())[-1]
    assert made == do(session, *path(b"new"), getfh())[-1]


def test_what_create_refuses(tree: World) -> None:
    session = tree.session()
    root = putrootfh()
    assert status_of(session, root, create(n.NF4REG, b"x")) == "BADTYPE"
    assert status_of(session, root, create(n.NF4NAMEDATTR, b"x")) == "BADTYPE"
    assert status_of(session, root, mkdir(b"dir")) == "EXIST"
    assert status_of(session, *path(b"fifo"), mkdir(b"x")) == "NOTDIR"
    assert status_of(session, root, create(n.NF4LNK, b"x", target=b"")) == "INVAL"
    assert status_of(session, root, create(n.NF4LNK, b"x", target=b"a\0b")) == "INVAL"
    too_long = create(n.NF4LNK, b"x", target=b"a" * 4096)
    assert status_of(session, root, too_long) == "NAMETOOLONG"
    assert status_of(session, root, create(n.NF4CHR, b"x", device=(4096, 0))) == "INVAL"
    assert status_of(session, root, create(n.NF4DIR, b"x", fattr({n.FATTR4_TYPE: u32(2)}))) == (
        "INVAL"
    )
    assert status_of(session, root, mkdir(b"x"), auth=USER) == "ACCESS"
    device = create(n.NF4BLK, b"x", device=(1, 2))
    assert status_of(session, *path(b"open"), device, auth=USER) == "PERM"
    foreign = create(n.NF4DIR, b"x", fattr({n.FATTR4_OWNER: owner(1001)}))
    assert status_of(session, *path(b"open"), foreign, auth=USER) == "PERM"
    assert tree.fs.readdir(tree.fs.resolve(b"open").ino) == []


def test_who_owns_what_is_made(tree: World) -> None:
    session = tree.session()
    do(session, *path(b"open"), mkdir(b"mine"), auth=USER)
    made = tree.fs.resolve(b"open/mine")
    assert (made.uid, made.gid) == (1000, 1000)
    given = fattr(
        {n.FATTR4_MODE: u32(0o4755), n.FATTR4_OWNER: owner(5), n.FATTR4_OWNER_GROUP: owner(6)}
    )
    mask = do(session, *path(b"open"), create(n.NF4FIFO, b"given", given))[-1][1]
    made = tree.fs.resolve(b"open/given")
    assert (made.uid, made.gid, made.mode & 0o7777) == (5, 6, 0o4755)
    assert mask == 1 << n.FATTR4_MODE | 1 << n.FATTR4_OWNER | 1 << n.FATTR4_OWNER_GROUP
    to_group = fattr({n.FATTR4_OWNER_GROUP: owner(2000)})
    do(session, *path(b"open"), create(n.NF4DIR, b"shared", to_group), auth=USER)
    assert tree.fs.resolve(b"open/shared").gid == 2000


def test_a_setgid_directory_hands_its_group_down(tree: World) -> None:
    session = tree.session()
    ino = tree.fs.resolve(b"open").ino
    tree.fs.setattr(ino, gid=77)
    tree.fs.setattr(ino, mode=0o2777)
    do(session, *path(b"open"), mkdir(b"sub"), auth=USER)
    made = tree.fs.resolve(b"open/sub")
    assert made.gid == 77
    assert made.mode & 0o7777 == 0o2755
    # A setgid file of a foreign group is not to be had (Linux: mode_strip_sgid).
    wanted = fattr({n.FATTR4_MODE: u32(0o2755)})
    do(session, *path(b"open"), create(n.NF4FIFO, b"pipe", wanted), auth=USER)
    assert tree.fs.resolve(b"open/pipe").mode & 0o7777 == 0o755


def test_a_mode_with_a_umask(tree: World) -> None:
    """RFC 8275: the umask counts where no default ACL does."""
    session = tree.session()
    wanted = fattr({81: u32(0o777) + u32(0o027)})
    mask = do(session, putrootfh(), create(n.NF4DIR, b"masked", wanted))[-1][1]
    assert mask == 1 << 81
    assert tree.fs.resolve(b"masked").mode & 0o7777 == 0o750
    for how in (n.UNCHECKED4, n.GUARDED4):
        name = b"file%d" % how
        wanted = fattr({81: u32(0o666) + u32(0o027)})
        opened = FileClient(session).open(name, how=u32(n.OPEN4_CREATE) + u32(how) + wanted)
        assert opened.attributes == 1 << 81
        assert tree.fs.resolve(name).mode & 0o7777 == 0o640
    exclusive = u32(n.OPEN4_CREATE) + u32(n.EXCLUSIVE4_1) + b"verifier" + wanted
    opened = FileClient(session).open(b"exclusive", how=exclusive)
    assert opened.attributes >> 81 & 1
    assert tree.fs.resolve(b"exclusive").mode & 0o7777 == 0o640


def test_a_default_acl_counts_instead_of_the_umask(tree: World) -> None:
    """RFC 8275: that is what the umask is sent for."""
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, 0xFFFFFFFF) for tag, rights in ((1, 7), (4, 7), (32, 5))
    )
    tree.fs.setxattr(tree.fs.resolve(b"open").ino, b"system.posix_acl_default", acl)
    session = tree.session()
    wanted = fattr({81: u32(0o777) + u32(0o077)})
    do(session, *path(b"open"), create(n.NF4DIR, b"sub", wanted))
    assert tree.fs.resolve(b"open/sub").mode & 0o7777 == 0o775


# ---- LINK, REMOVE, RENAME ----------------------------------------------------------------------


def test_link(tree: World) -> None:
    session = tree.session()
    info = do(session, *path(b"dir", b"file"), savefh(), putrootfh(), link(b"again"))[-1]
    assert info.atomic
    assert info.after == change(tree.fs)
    assert tree.fs.resolve(b"again").ino == tree.fs.resolve(b"dir/file").ino
    file = path(b"dir", b"file")
    assert status_of(session, *file, savefh(), putrootfh(), link(b"again")) == "EXIST"
    assert status_of(session, *path(b"dir"), savefh(), putrootfh(), link(b"x")) == "ISDIR"
    assert status_of(session, *file, savefh(), *path(b"fifo"), link(b"x")) == "NOTDIR"
    assert status_of(session, *file, savefh(), putrootfh(), link(b"x"), auth=USER) == "ACCESS"


def test_remove(tree: World) -> None:
    session = tree.session()
    assert status_of(session, putrootfh(), remove(b"dir")) == "NOTEMPTY"
    info = do(session, *path(b"dir"), remove(b"file"))[-1]
    assert info.atomic
    assert info.after == change(tree.fs, b"dir")
    do(session, putrootfh(), remove(b"dir"))
    assert status_of(session, putrootfh(), remove(b"dir")) == "NOENT"
    assert status_of(session, *path(b"fifo"), remove(b"x")) == "NOTDIR"
    assert status_of(session, putrootfh(), remove(b"fifo"), auth=USER) == "ACCESS"


def test_the_sticky_bit(tree: World) -> None:
    session = tree.session()
    do(session, *path(b"tmp"), mkdir(b"mine"), auth=USER)
    tmp = path(b"tmp")
    assert status_of(session, *tmp, remove(b"mine"), auth=OTHER) == "PERM"
    assert status_of(session, *tmp, savefh(), rename(b"mine", b"x"), auth=OTHER) == "PERM"
    do(session, *tmp, mkdir(b"other"), auth=OTHER)
    assert status_of(session, *tmp, savefh(), rename(b"other", b"mine"), auth=OTHER) == "PERM"
    assert status_of(session, *tmp, savefh(), rename(b"mine", b"x"), auth=USER) == "OK"
    assert status_of(session, *tmp, remove(b"x"), auth=USER) == "OK"


def test_rename_between_directories(tree: World) -> None:
    session = tree.session()
    file = tree.fs.resolve(b"dir/file").ino
    source, target = do(session, *path(b"dir"), savefh(), *path(b"tmp"), rename(b"file", b"moved"))[
        -1
    ]
    assert source.atomic
    assert target.atomic
    assert (source.after, target.after) == (change(tree.fs, b"dir"), change(tree.fs, b"tmp"))
    assert tree.fs.resolve(b"tmp/moved").ino == file
    assert tree.fs.readdir(tree.fs.resolve(b"dir").ino) == []


def test_rename_in_one_directory_and_over_a_file(tree: World) -> None:
    session = tree.session()
    tree.fs.mknod(tree.fs.resolve(b"dir").ino, b"old", FILE)
    file = tree.fs.resolve(b"dir/file").ino
    source, target = do(session, *path(b"dir"), savefh(), rename(b"file", b"old"))[-1]
    assert source == target
    assert source.atomic
    assert tree.fs.resolve(b"dir/old").ino == file


def test_rename_that_does_nothing(tree: World) -> None:
    session = tree.session()
    tree.fs.link(tree.fs.resolve(b"dir/file").ino, ROOT_INODE, b"again")
    for calls in (
        [*path(), savefh(), rename(b"dir", b"dir")],
        [*path(b"dir"), savefh(), putrootfh(), rename(b"file", b"again")],
    ):
        source, target = do(session, *calls)[-1]
        assert source.before == source.after
        assert target.before == target.after
    assert tree.fs.resolve(b"dir/file").ino == tree.fs.resolve(b"again").ino


def test_what_rename_refuses(tree: World) -> None:
    session = tree.session()
    root = putrootfh()
    tree.fs.mkdir(tree.fs.resolve(b"tmp").ino, b"sub", 0o755)
    cases = [
        ([root, savefh(), rename(b"missing", b"x")], "NOENT"),
        ([root, savefh(), rename(b"dir", b"fifo")], "EXIST"),
        ([root, savefh(), rename(b"fifo", b"dir")], "EXIST"),
        ([root, savefh(), rename(b"open", b"dir")], "NOTEMPTY"),
        ([root, savefh(), *path(b"tmp", b"sub"), rename(b"tmp", b"x")], "INVAL"),
        ([*path(b"fifo"), savefh(), root, rename(b"a", b"b")], "NOTDIR"),
        ([root, savefh(), *path(b"link"), rename(b"dir", b"b")], "SYMLINK"),
    ]
    for calls, status in cases:
        assert status_of(session, *calls) == status
    assert status_of(session, root, savefh(), rename(b"fifo", b"x"), auth=USER) == "ACCESS"


def test_a_directory_moves_only_if_it_may_be_written(tree: World) -> None:
    """Its entry ".." changes, as in Linux."""
    session = tree.session()
    open_ino = tree.fs.resolve(b"open").ino
    made = tree.fs.mkdir(open_ino, b"sub", 0o555, Cred(1001, 1001))
    calls = [*path(b"open"), savefh(), *path(b"tmp"), rename(b"sub", b"sub")]
    assert status_of(session, *calls, auth=USER) == "ACCESS"
    tree.fs.setattr(made.ino, mode=0o777)
    assert status_of(session, *calls, auth=USER) == "OK"


def test_changes_by_others_are_not_called_atomic(tree: World) -> None:
    place = tree.fs.resolve(b"dir").ino

    def busy() -> None:
        tree.fs.mkdir(place, b"mine", 0o755)
        tree.fs.mkdir(place, b"theirs", 0o755)

    _, info = changes.watched(tree.fs, place, busy)
    out = Writer()
    info.write(out)
    values = (changes.value(info.before), changes.value(info.after))
    assert bytes(out.buffer) == struct.pack(">IQQ", 0, *values)
    assert values[0] < values[1]


def test_a_change_attribute_does_not_come_back(tree: World) -> None:
    """A power cut takes changes back that were not durable; those after it have other values."""
    st = tree.fs.resolve(b"dir")
    lost = st._replace(change=st.change + 3, ctime=st.ctime + 10, ctime_ns=5)
    later = st._replace(change=st.change + 3, ctime=st.ctime + 20, ctime_ns=5)
    assert changes.value(later) > changes.value(lost) > changes.value(st)
    assert changes.value(st._replace(ctime=1 << 40)) < 1 << 64


def test_truncated_arguments_are_bad_xdr(tree: World) -> None:
    session = tree.session()
    for number, arguments in (
        (n.OP_LOOKUP, opaque(b"name")),
        (n.OP_CREATE, u32(n.NF4DIR) + opaque(b"name") + fattr({n.FATTR4_MODE: u32(0o755)})),
        (n.OP_REMOVE, opaque(b"name")),
        (n.OP_RENAME, opaque(b"name") + opaque(b"other")),
        (n.OP_SETATTR, bytes(16) + fattr({n.FATTR4_MODE: u32(0o755)})),
        (n.OP_GETATTR, u32(1) + u32(2)),
        (n.OP_READDIR, bytes(24) + u32(1) + u32(2)),
    ):
        for length in range(0, len(arguments), 4):
            reply = session.run(op(n.OP_PUTROOTFH), op(n.OP_SAVEFH), op(number, arguments[:length]))
            assert reply.status == n.NFS4ERR_BADXDR, (number, length)
    assert status_of(session, putrootfh(), lookup(b"name")) == "NOENT"


def test_a_tag_that_is_not_utf8(tree: World) -> None:
    """RFC 8881 16.2.3: it is answered, and nothing is executed."""
    wire = tree.wire()
    for tag in (b"\xc0\xc1", b"\xef\xbf\xbe", b"x\xff"):
        reply = read_compound(wire.results(wire.send(encode(op(n.OP_PUTROOTFH), tag=tag))))
        assert (reply.status, reply.count) == (n.NFS4ERR_INVAL, 0)
    reply = read_compound(wire.results(wire.send(encode(tag="ä".encode()))))
    assert (reply.status, reply.count) == (n.NFS4_OK, 0)
