"""READDIR: cookies, limits, attributes of entries."""

from __future__ import annotations

import stat

import pytest

from extfs.core import ROOT_INODE, Cred
from extfs.nfs import constants as n
from nfs.calls import Entry, auth_sys, do, getattr_, getfh, path, putrootfh, readdir, status_of
from nfs.conftest import World
from nfs.wire import Session

FILE = stat.S_IFREG | 0o644
COUNT = 500


@pytest.fixture
def crowd(world: World) -> World:
    """/crowd with 500 files, names of 1 to 200 bytes."""
    place = world.fs.mkdir(ROOT_INODE, b"crowd", 0o755).ino
    for index in range(COUNT):
        world.fs.mknod(place, b"%d" % index + b"x" * (index % 200), FILE)
    return world


def whole(session: Session, *attributes: int, maxcount: int, dircount: int = 0) -> list[Entry]:
    entries: list[Entry] = []
    cookie = 0
    while True:
        call = readdir(*attributes, cookie=cookie, maxcount=maxcount, dircount=dircount)
        listing = do(session, *path(b"crowd"), call)[-1]
        entries += listing.entries
        if listing.eof:
            return entries
        assert listing.entries, "neither an entry nor the end"
        cookie = listing.entries[-1].cookie


def test_an_empty_directory(world: World) -> None:
    listing = do(world.session(), putrootfh(), readdir(n.FATTR4_TYPE))[-1]
    assert listing.entries == []
    assert listing.eof
    assert listing.verifier == bytes(8)


@pytest.mark.parametrize("maxcount", [700, 4096, 65536, 1 << 20, 0xFFFFFFFF])
def test_every_entry_once_whatever_the_limit(crowd: World, maxcount: int) -> None:
    session = crowd.session()
    entries = whole(session, n.FATTR4_FILEID, n.FATTR4_TYPE, maxcount=maxcount)
    place = crowd.fs.resolve(b"crowd").ino
    expected = {entry.name: entry.ino for entry in crowd.fs.scandir(place)}
    assert len(entries) == COUNT
    assert {entry.name: entry.attributes[n.FATTR4_FILEID] for entry in entries} == expected
    assert len({entry.cookie for entry in entries}) == COUNT
    assert min(entry.cookie for entry in entries) > 2


@pytest.mark.parametrize("maxcount", [400, 1000, 5000, 40000])
def test_maxcount_is_kept(crowd: World, maxcount: int) -> None:
    """RFC 8881 18.23.3: of the whole READDIR4resok."""
    session = crowd.session()
    call = readdir(n.FATTR4_SIZE, maxcount=maxcount)
    reply = session.run(*(step.encoded for step in path(b"crowd")), call.encoded)
    assert reply.status == n.NFS4_OK
    body = reply.body
    body.fixed(8 * 3)
    assert maxcount - 300 < body.end - body.pos <= maxcount


def test_dircount_limits_names(crowd: World) -> None:
    session = crowd.session()
    listing = do(session, *path(b"crowd"), readdir(n.FATTR4_SIZE, dircount=2000))[-1]
    named = sum(16 + (len(name) + 3 & ~3) for name in listing.names)
    assert 1700 < named <= 2000
    assert len(whole(session, maxcount=65536, dircount=1)) == COUNT, "one entry at least"


@pytest.mark.parametrize("maxcount", [0, 15, 16, 30])
def test_too_small_for_one_entry(crowd: World, maxcount: int) -> None:
    session = crowd.session()
    assert status_of(session, *path(b"crowd"), readdir(maxcount=maxcount)) == "TOOSMALL"


def test_too_small_is_not_the_end(crowd: World) -> None:
    """An empty directory fits where no entry does."""
    crowd.fs.mkdir(ROOT_INODE, b"empty", 0o755)
    listing = do(crowd.session(), *path(b"empty"), readdir(maxcount=16))[-1]
    assert listing.eof


def test_reserved_cookies_and_verifiers(crowd: World) -> None:
    session = crowd.session()
    for cookie in (1, 2):
        assert status_of(session, *path(b"crowd"), readdir(cookie=cookie)) == "BAD_COOKIE"
    assert status_of(session, *path(b"crowd"), readdir(verifier=b"x" * 8)) == "NOT_SAME"
    last = do(session, *path(b"crowd"), readdir(cookie=(1 << 64) - 1))[-1]
    assert last.eof
    assert last.entries == []


def test_a_listing_goes_on_behind_what_was_removed(crowd: World) -> None:
    session = crowd.session()
    first = do(session, *path(b"crowd"), readdir(maxcount=2000))[-1]
    place = crowd.fs.resolve(b"crowd").ino
    for name in first.names:
        crowd.fs.unlink(place, name)
    rest: list[bytes] = []
    cookie = first.entries[-1].cookie
    while True:
        listing = do(session, *path(b"crowd"), readdir(cookie=cookie, maxcount=9000))[-1]
        rest += listing.names
        if listing.eof:
            break
        cookie = listing.entries[-1].cookie
    assert len(rest) + len(first.names) == COUNT
    assert not set(rest) & set(first.names)


def test_attributes_and_filehandles_of_entries(world: World) -> None:
    session = world.session()
    world.fs.mkdir(ROOT_INODE, b"dir", 0o751, Cred(7, 8))
    world.fs.symlink(ROOT_INODE, b"link", b"dir")
    wanted = (
        n.FATTR4_TYPE,
        n.FATTR4_CHANGE,
        n.FATTR4_FILEHANDLE,
        n.FATTR4_MODE,
        n.FATTR4_OWNER,
        n.FATTR4_RDATTR_ERROR,
        n.FATTR4_MOUNTED_ON_FILEID,
    )
    listing = do(session, putrootfh(), readdir(*wanted))[-1]
    assert len(listing.entries) == 2
    for entry in listing.entries:
        handle, found = do(session, *path(entry.name), getfh(), getattr_(*wanted))[-2:]
        assert entry.attributes == found
        assert entry.attributes[n.FATTR4_FILEHANDLE] == handle


def test_names_that_are_not_utf8_are_listed(world: World) -> None:
    """Made on the server: they are there, although no client can say them."""
    world.fs.mknod(ROOT_INODE, b"\xff\xfe", FILE)
    assert do(world.session(), putrootfh(), readdir())[-1].names == [b"\xff\xfe"]


def test_the_right_to_read(crowd: World) -> None:
    crowd.fs.setattr(crowd.fs.resolve(b"crowd").ino, mode=0o711)
    session = crowd.session()
    user = auth_sys(1000, 1000)
    assert status_of(session, *path(b"crowd"), readdir(), auth=user) == "ACCESS"
    assert status_of(session, *path(b"crowd"), readdir()) == "OK"


def test_of_what_is_no_directory(world: World) -> None:
    session = world.session()
    world.fs.mknod(ROOT_INODE, b"file", FILE)
    world.fs.symlink(ROOT_INODE, b"link", b"file")
    assert status_of(session, *path(b"file"), readdir()) == "NOTDIR"
    assert status_of(session, *path(b"link"), readdir()) == "SYMLINK"
    assert status_of(session, readdir()) == "NOFILEHANDLE"
    assert status_of(session, putrootfh(), readdir(n.FATTR4_TIME_ACCESS_SET)) == "INVAL"
