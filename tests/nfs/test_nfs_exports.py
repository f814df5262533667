"""Exports: how they are written, who sees them, squash, the pseudo filesystem."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterator

import pytest

from extfs.core import ROOT_INODE, Cred, Filesystem, SimDevice, mkfs
from extfs.nfs import constants as n
from extfs.nfs.credentials import squashed
from extfs.nfs.exports import Export, ExportError, Exports, Rules, Squash, export_id, parse_export
from extfs.nfs.rpc import NOBODY, Credential
from nfs.calls import (
    access,
    auth_sys,
    create,
    do,
    fattr,
    getattr_,
    getfh,
    link,
    lookupp,
    mkdir,
    path,
    putfh,
    putrootfh,
    readdir,
    remove,
    rename,
    savefh,
    setattr_,
    status_of,
)
from nfs.wire import Session, make_service, u32

FILE = stat.S_IFREG | 0o644
USER = auth_sys(1000, 1000)


# ---- how they are written ----------------------------------------------------------------------


def test_the_default_is_closed() -> None:
    rules = parse_export("/data").rules
    assert rules == Rules()
    assert rules.read_only
    assert rules.squash is Squash.ROOT
    assert not rules.insecure
    assert rules.layouts == ()
    export = parse_export("/data")
    assert export.allows("127.0.0.1")
    assert export.allows("::1")
    assert export.allows("::ffff:127.0.0.1")
    assert not export.allows("10.0.0.1")
    assert not export.allows("fe80::1%eth0")
    assert not export.allows("nonsense")


def test_everything_that_can_be_said() -> None:
    export = parse_export(
        "//data//x/:10.0.0.0/8,fd00::/8,192.168.1.5,rw,all_squash,anonuid=5,anongid=6,insecure,"
        "sec=sys,layouts=block@10.1.0.0/16+10.2.0.0/16"
    )
    assert export.path == "/data/x"
    assert export.id == export_id("/data/x")
    assert export.rules == Rules(
        networks=tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8", "192.168.1.5/32"))),
        read_only=False,
        squash=Squash.ALL,
        anonuid=5,
        anongid=6,
        insecure=True,
        layouts=tuple(map(ipaddress.ip_network, ("10.1.0.0/16", "10.2.0.0/16"))),
    )
    assert export.offers_layouts("10.1.2.3")
    assert not export.offers_layouts("10.3.0.1")
    assert not export.allows("127.0.0.1"), "loopback only where no network is given"


def test_layouts_for_all_of_the_exports_networks() -> None:
    export = parse_export("/:layouts=block,10.0.0.0/8")
    assert export.offers_layouts("10.9.9.9")
    assert not export.offers_layouts("11.0.0.1")
    assert not parse_export("/:layouts=none").offers_layouts("127.0.0.1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data", "must start with /"),
        ("", "must start with /"),
        ("/a/../b", "must not contain '..'"),
        ("/a:", None),
        ("/a:rw,", "an empty option"),
        ("/a:rw,ro", "ro and rw exclude each other"),
        ("/a:root_squash,all_squash", "exclude each other"),
        ("/a:rwx", "rwx: no such option"),
        ("/a:anonuid=-1", "anonuid=-1: is to be a number"),
        ("/a:anonuid=4294967295", "is to be a number"),
        ("/a:anonuid=1,anonuid=2", "anonuid is given twice"),
        ("/a:rw,rw", "rw is given twice"),
        ("/a:sec=krb5", "sec=krb5: only sys is supported"),
        ("/a:layouts=files", "layouts=files: is to be none, block, scsi"),
        ("/a:layouts=none@10.0.0.0/8", "is to be none, block"),
        ("/a:layouts=block@", "host names are not supported"),
        ("/a:layouts=block@10.0.0.1/8", "has host bits set"),
        ("/a:10.0.0.1/8", "has host bits set"),
        ("/a:host.example.org", "host names are not supported"),
        ("/a:1.2.3", "host names are not supported"),
        ("/" + "x" * 256, "no directory can have such a name"),
    ],
)
def test_errors_say_what_is_wrong(text: str, says: str | None) -> None:
    if says is None:
        assert parse_export(text).rules == Rules()
        return
    with pytest.raises(ExportError, match=says.replace("(", r"\(")):
        parse_export(text)


def test_ids_are_made_of_paths() -> None:
    assert export_id("/a") != export_id("/b")
    assert export_id("/a") == parse_export("/a:rw").id == parse_export("//a/").id
    assert 0 < export_id("/") < 1 << 32


# ---- squash ------------------------------------------------------------------------------------


def squash(text: str, *who: int, flavor: int = n.AUTH_SYS) -> tuple[int, int, tuple[int, ...]]:
    result = squashed(parse_export("/:" + text), Credential(flavor, who[0], who[1], who[2:]))
    return result.uid, result.gid, result.gids


def test_squash() -> None:
    assert squash("root_squash", 0, 0, 0, 5) == (65534, 65534, (65534, 5))
    assert squash("root_squash,anonuid=9,anongid=8", 0, 7) == (9, 7, ())
    assert squash("root_squash", 1000, 1000, 5) == (1000, 1000, (5,))
    assert squash("root_squash", 1000, 0) == (1000, 65534, ())
    assert squash("no_root_squash", 0, 0, 0) == (0, 0, (0,))
    assert squash("all_squash,anonuid=9,anongid=8", 1000, 1000, 5) == (9, 8, ())
    assert squash("no_root_squash", 0, 0, flavor=n.AUTH_NONE) == (65534, 65534, ())
    assert squashed(parse_export("/:no_root_squash"), NOBODY).uid == 65534


# ---- what clients see --------------------------------------------------------------------------


@pytest.fixture
def fs() -> Iterator[Filesystem]:
    """/a/b/c, /a/b/c/file, /d, /secret; all directories are open to everybody."""
    with SimDevice(64 << 20) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device(), no_heartbeat=True) as filesystem:
            at = ROOT_INODE
            for name in (b"a", b"b", b"c"):
                at = filesystem.mkdir(at, name, 0o777, Cred(umask=0)).ino
            filesystem.mknod(at, b"file", FILE)
            filesystem.mkdir(ROOT_INODE, b"d", 0o777, Cred(umask=0))
            filesystem.mkdir(ROOT_INODE, b"secret", 0o777, Cred(umask=0))
            yield filesystem


def session(fs: Filesystem, *exports: str, host: str = "127.0.0.1", owner: bytes = b"x") -> Session:
    service, _ = make_service(fs, exports)
    return Session(service, owner, host=host, reclaim_complete=False)


def names(session: Session, *where: bytes) -> list[bytes]:
    found: list[bytes] = do(session, *path(*where), readdir())[-1].names
    return sorted(found)


def test_there_must_be_such_a_directory(fs: Filesystem) -> None:
    with pytest.raises(ExportError, match="export /missing: there is no such directory"):
        Exports(fs, [parse_export("/missing")])
    with pytest.raises(ExportError, match="export /a/b/c/file: there is no such directory"):
        Exports(fs, [parse_export("/a/b/c/file")])
    with pytest.raises(ExportError, match="export /a is given twice"):
        Exports(fs, [parse_export("/a"), parse_export("/a:rw")])
    clash = Export(export_id("/a"), "/d")
    with pytest.raises(ExportError, match="have the same id"):
        Exports(fs, [parse_export("/a"), clash])


def test_the_pseudo_filesystem_leads_to_the_exports_only(fs: Filesystem) -> None:
    client = session(fs, "/a/b/c:rw,insecure", "/d")
    assert names(client) == [b"a", b"d"]
    assert names(client, b"a") == [b"b"]
    assert names(client, b"a", b"b") == [b"c"]
    assert names(client, b"a", b"b", b"c") == [b"file"]
    assert status_of(client, *path(b"secret")) == "NOENT"
    assert status_of(client, *path(b"a", b"x")) == "NOENT"


def test_lookupp_climbs_out_of_an_export(fs: Filesystem) -> None:
    client = session(fs, "/a/b/c", "/d")
    handles = do(
        client,
        *path(b"a"),
        getfh(),
        *path(b"a", b"b", b"c"),
        lookupp(),
        lookupp(),
        getfh(),
        lookupp(),
        getfh(),
        putrootfh(),
        getfh(),
    )
    a, again, root, root_again = (value for value in handles if value is not None)
    assert a == again
    assert root == root_again
    assert status_of(client, putrootfh(), lookupp()) == "NOENT"


def test_pseudo_directories_are_read_only(fs: Filesystem) -> None:
    client = session(fs, "/a/b/c:rw,no_root_squash", "/d:rw")
    a = path(b"a")
    assert status_of(client, *a, mkdir(b"x")) == "ROFS"
    assert status_of(client, *a, remove(b"b")) == "ROFS"
    assert status_of(client, *a, savefh(), rename(b"b", b"x")) == "ROFS"
    assert status_of(client, *a, setattr_({n.FATTR4_MODE: u32(0)})) == "ROFS"
    file = path(b"a", b"b", b"c", b"file")
    assert status_of(client, *file, savefh(), *a, link(b"x")) == "XDEV"
    assert do(client, *a, access(0x3F))[-1] == (0x1F, 0x03)


def test_attributes_of_the_pseudo_filesystem(fs: Filesystem) -> None:
    client = session(fs, "/a/b/c:layouts=block", "/d")
    wanted = getattr_(
        n.FATTR4_TYPE,
        n.FATTR4_FSID,
        n.FATTR4_FILEID,
        n.FATTR4_MODE,
        n.FATTR4_NUMLINKS,
        n.FATTR4_MOUNTED_ON_FILEID,
        n.FATTR4_FS_LAYOUT_TYPES,
        n.FATTR4_LAYOUT_BLKSIZE,
        n.FATTR4_CHANGE_ATTR_TYPE,
    )
    root = do(client, putrootfh(), wanted)[-1]
    assert root[n.FATTR4_TYPE] == n.NF4DIR
    assert root[n.FATTR4_MODE] == 0o555
    assert root[n.FATTR4_NUMLINKS] == 4
    assert root[n.FATTR4_FS_LAYOUT_TYPES] == [n.LAYOUT4_BLOCK_VOLUME]
    assert root[n.FATTR4_LAYOUT_BLKSIZE] == 4096
    assert root[n.FATTR4_FSID][1] == 0
    c = do(client, *path(b"a", b"b", b"c"), wanted)[-1]
    assert c[n.FATTR4_FSID] == (root[n.FATTR4_FSID][0], export_id("/a/b/c"))
    assert c[n.FATTR4_FILEID] == fs.resolve(b"a/b/c").ino
    assert c[n.FATTR4_MOUNTED_ON_FILEID] > 1 << 62, "the pseudo directory that it hides"
    listed = do(client, *path(b"a", b"b"), readdir(n.FATTR4_FSID, n.FATTR4_MOUNTED_ON_FILEID))[-1]
    assert listed.entries[0].attributes == {
        number: c[number] for number in (n.FATTR4_FSID, n.FATTR4_MOUNTED_ON_FILEID)
    }
    d = do(client, *path(b"d"), wanted)[-1]
    assert d[n.FATTR4_FSID] != c[n.FATTR4_FSID]
    assert d[n.FATTR4_FS_LAYOUT_TYPES] == []


def test_pseudo_handles_outlive_a_restart_and_exports_that_go(fs: Filesystem) -> None:
    client = session(fs, "/a/b/c", "/d")
    a = do(client, *path(b"a"), getfh())[-1]
    c = do(client, *path(b"a", b"b", b"c"), getfh())[-1]
    again = session(fs, "/a/b/c:rw")
    assert status_of(again, putfh(a), getattr_(n.FATTR4_TYPE)) == "OK"
    assert status_of(again, putfh(c), getattr_(n.FATTR4_TYPE)) == "OK"
    without = session(fs, "/d")
    assert status_of(without, putfh(a)) == "STALE"
    assert status_of(without, putfh(c)) == "STALE"


def test_cookies_of_pseudo_directories(fs: Filesystem) -> None:
    client = session(fs, "/a", "/d", "/secret")
    listing = do(client, putrootfh(), readdir())[-1]
    assert len(listing.entries) == 3
    for place, entry in enumerate(listing.entries):
        rest = do(client, putrootfh(), readdir(cookie=entry.cookie))[-1]
        assert rest.entries == listing.entries[place + 1 :]
        assert entry.cookie > 2


def test_the_root_itself(fs: Filesystem) -> None:
    client = session(fs, "/:rw,no_root_squash")
    assert names(client) == [b"a", b"d", b"secret"]
    found = do(client, putrootfh(), getattr_(n.FATTR4_FSID, n.FATTR4_MOUNTED_ON_FILEID))[-1]
    assert found[n.FATTR4_FSID][1] == export_id("/")
    assert found[n.FATTR4_MOUNTED_ON_FILEID] == ROOT_INODE


def test_an_export_inside_another(fs: Filesystem) -> None:
    """From its directory on its own rules count, and the way up leads into the outer one."""
    client = session(fs, "/:ro,no_root_squash", "/a/b:rw,no_root_squash")
    assert status_of(client, *path(b"a"), mkdir(b"x")) == "ROFS"
    assert status_of(client, *path(b"a", b"b"), mkdir(b"x")) == "OK"
    fsid = getattr_(n.FATTR4_FSID)
    assert do(client, *path(b"a", b"b"), fsid)[-1][n.FATTR4_FSID][1] == export_id("/a/b")
    up = do(client, *path(b"a"), getfh(), *path(b"a", b"b"), lookupp(), getfh())
    assert up[2] == up[-1]
    listed = do(client, *path(b"a"), readdir(n.FATTR4_FSID, n.FATTR4_MOUNTED_ON_FILEID))[-1]
    assert listed.entries[0].attributes == {
        n.FATTR4_FSID: do(client, *path(b"a", b"b"), fsid)[-1][n.FATTR4_FSID],
        n.FATTR4_MOUNTED_ON_FILEID: fs.resolve(b"a/b").ino,
    }
    file = path(b"a", b"b", b"c", b"file")
    assert status_of(client, *file, savefh(), putrootfh(), link(b"x")) == "XDEV"


def test_the_directory_of_an_export_is_not_removed_or_renamed(fs: Filesystem) -> None:
    client = session(fs, "/:rw,no_root_squash", "/d:rw")
    assert status_of(client, putrootfh(), remove(b"d")) == "FILE_OPEN"
    assert status_of(client, putrootfh(), savefh(), rename(b"d", b"x")) == "FILE_OPEN"
    assert status_of(client, putrootfh(), savefh(), rename(b"secret", b"d")) == "FILE_OPEN"


def test_a_directory_that_was_moved_out_does_not_lead_up(fs: Filesystem) -> None:
    client = session(fs, "/a")
    c = do(client, *path(b"a", b"b", b"c"), getfh())[-1]
    fs.rename(fs.resolve(b"a/b").ino, b"c", fs.resolve(b"secret").ino, b"c")
    assert status_of(client, putfh(c), lookupp()) == "STALE"
    fs.rename(fs.resolve(b"secret").ino, b"c", fs.resolve(b"a").ino, b"c")
    assert status_of(client, putfh(c), lookupp()) == "OK"


def test_an_export_whose_directory_is_gone(fs: Filesystem) -> None:
    client = session(fs, "/d", "/a")
    handle = do(client, *path(b"d"), getfh())[-1]
    fs.rmdir(ROOT_INODE, b"d")
    fs.drain()
    assert status_of(client, putfh(handle)) == "STALE"
    assert status_of(client, *path(b"d")) == "NOENT"
    fs.mkdir(ROOT_INODE, b"d", 0o755)
    assert status_of(client, *path(b"d")) == "OK"


# ---- who may come ------------------------------------------------------------------------------


def test_networks(fs: Filesystem) -> None:
    exports = ("/a:10.0.0.0/8", "/d:10.1.0.0/16")
    near = session(fs, *exports, host="10.1.0.1")
    assert names(near) == [b"a", b"d"]
    handle = do(near, *path(b"d"), getfh())[-1]
    far = session(fs, *exports, host="10.2.0.1")
    assert names(far) == [b"a"]
    assert status_of(far, *path(b"d")) == "NOENT"
    assert status_of(far, putfh(handle)) == "STALE", "as the kernel's server says it"
    nobody = session(fs, *exports, host="192.168.0.1")
    assert names(nobody) == []


def test_a_root_that_is_not_for_this_client(fs: Filesystem) -> None:
    exports = ("/:10.0.0.0/8", "/a/b:192.168.0.0/16")
    assert names(session(fs, *exports, host="10.0.0.1")) == [b"a", b"d", b"secret"]
    assert names(session(fs, *exports, host="192.168.0.1")) == [b"a"]


def test_an_inner_export_that_is_not_for_this_client(fs: Filesystem) -> None:
    exports = ("/:10.0.0.0/8", "/a:10.1.0.0/16")
    far = session(fs, *exports, host="10.2.0.1")
    assert status_of(far, *path(b"a")) == "ACCESS"
    listing = do(far, putrootfh(), readdir(n.FATTR4_TYPE, n.FATTR4_RDATTR_ERROR))[-1]
    errors = {entry.name: entry.attributes[n.FATTR4_RDATTR_ERROR] for entry in listing.entries}
    assert errors == {b"a": n.NFS4ERR_ACCESS, b"d": 0, b"secret": 0}
    assert status_of(far, putrootfh(), readdir(n.FATTR4_TYPE)) == "ACCESS"


def test_unprivileged_ports(fs: Filesystem) -> None:
    service, _ = make_service(fs, ("/a", "/d:insecure"))
    client = Session(service, b"x", reclaim_complete=False)
    handle = do(client, *path(b"a"), getfh())[-1]
    client.wire.connection.port = 40000
    assert status_of(client, *path(b"a")) == "PERM"
    assert status_of(client, putfh(handle)) == "PERM"
    assert status_of(client, *path(b"d")) == "OK"


def test_squash_in_a_directory(fs: Filesystem) -> None:
    client = session(fs, "/a:rw", "/d:rw,all_squash,anonuid=5,anongid=6")
    do(client, *path(b"a"), mkdir(b"x"))
    assert (fs.resolve(b"a/x").uid, fs.resolve(b"a/x").gid) == (65534, 65534)
    do(client, *path(b"d"), mkdir(b"x"), auth=USER)
    assert (fs.resolve(b"d/x").uid, fs.resolve(b"d/x").gid) == (5, 6)
    assert status_of(client, *path(b"a"), create(n.NF4BLK, b"b", device=(1, 2))) == "PERM"


def test_a_read_only_export(fs: Filesystem) -> None:
    client = session(fs, "/a:no_root_squash")
    a = path(b"a")
    assert status_of(client, *a, mkdir(b"x")) == "ROFS"
    assert status_of(client, *a, remove(b"b")) == "ROFS"
    assert status_of(client, *a, savefh(), rename(b"b", b"x")) == "ROFS"
    assert status_of(client, *path(b"a", b"b"), setattr_({n.FATTR4_MODE: u32(0)})) == "ROFS"
    assert do(client, *a, access(0x3F))[-1] == (0x1F, 0x03)
    assert status_of(client, *a, create(n.NF4DIR, b"x", fattr({}))) == "ROFS"
