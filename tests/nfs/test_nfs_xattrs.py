"""Extended attributes (RFC 8276)."""

from __future__ import annotations

from typing import Any

import pytest

from extfs.nfs import constants as n
from nfs.conftest import World
from nfs.file_calls import FileClient, Opened, StatusError, putfh
from nfs.wire import Session, auth_sys, make_service, op, opaque, u32, u64

EITHER, CREATE, REPLACE = n.SETXATTR4_EITHER, n.SETXATTR4_CREATE, n.SETXATTR4_REPLACE


@pytest.fixture
def one(world: World) -> FileClient:
    return FileClient(world.session(b"one"))


@pytest.fixture
def file(one: FileClient) -> Opened:
    return one.create(b"f")


def status_of(call: Any, *args: Any, **more: Any) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **more)
    return caught.value.status


def get(client: FileClient, file: Opened, name: bytes) -> bytes:
    return client.on(file.fh, op(n.OP_GETXATTR, opaque(name))).opaque(1 << 20)


def put(
    client: FileClient, file: Opened, name: bytes, value: bytes, how: int = EITHER
) -> tuple[bool, int, int]:
    body = client.on(file.fh, op(n.OP_SETXATTR, u32(how), opaque(name), opaque(value)))
    return body.boolean(), body.u64(), body.u64()


def remove(client: FileClient, file: Opened, name: bytes) -> None:
    client.on(file.fh, op(n.OP_REMOVEXATTR, opaque(name)))


def names(
    client: FileClient, file: Opened, cookie: int = 0, limit: int = 8192
) -> tuple[int, list[bytes], bool]:
    body = client.on(file.fh, op(n.OP_LISTXATTRS, u64(cookie), u32(limit)))
    after = body.u64()
    found = [body.opaque(255) for _ in range(body.u32())]
    return after, found, body.boolean()


def test_set_get_remove(world: World, one: FileClient, file: Opened) -> None:
    """8.4.1 to 8.4.4; on the wire there is no "user."."""
    assert status_of(get, one, file, b"a") == n.NFS4ERR_NOXATTR
    assert status_of(put, one, file, b"a", b"1", REPLACE) == n.NFS4ERR_NOXATTR
    atomic, before, after = put(one, file, b"a", b"1", CREATE)
    assert atomic
    assert after > before
    assert status_of(put, one, file, b"a", b"2", CREATE) == n.NFS4ERR_EXIST
    assert get(one, file, b"a") == b"1"
    ino = world.fs.lookup(1, b"f").ino
    assert world.fs.getxattr(ino, b"user.a") == b"1"
    put(one, file, b"a", b"", REPLACE)
    assert get(one, file, b"a") == b""
    remove(one, file, b"a")
    assert status_of(remove, one, file, b"a") == n.NFS4ERR_NOXATTR


def test_other_namespaces_are_not_reached(world: World, one: FileClient, file: Opened) -> None:
    """Names of the "user." namespace alone; a name with that prefix has it twice."""
    ino = world.fs.lookup(1, b"f").ino
    world.fs.setxattr(ino, b"trusted.t", b"secret")
    assert status_of(get, one, file, b"trusted.t") == n.NFS4ERR_NOXATTR
    assert names(one, file) == (0, [], True)
    put(one, file, b"user.a", b"1")
    assert world.fs.getxattr(ino, b"user.user.a") == b"1"


def test_names_and_values_have_limits(one: FileClient, file: Opened) -> None:
    """8.4.2: XATTR2BIG, NAMETOOLONG."""
    assert status_of(put, one, file, b"", b"x") == n.NFS4ERR_INVAL
    assert status_of(put, one, file, b"a\0b", b"x") == n.NFS4ERR_INVAL
    assert status_of(put, one, file, b"\xff", b"x") == n.NFS4ERR_INVAL
    assert status_of(put, one, file, b"x" * 251, b"x") == n.NFS4ERR_NAMETOOLONG
    put(one, file, b"x" * 250, b"x")
    assert status_of(put, one, file, b"a", b"x" * 65537) == n.NFS4ERR_XATTR2BIG
    put(one, file, b"big", b"x" * 65536)
    assert get(one, file, b"big") == b"x" * 65536
    assert status_of(put, one, file, b"a", b"x", 3) == n.NFS4ERR_BADXDR


def test_listing_in_pieces(one: FileClient, file: Opened) -> None:
    """8.4.3: cookies, TOOSMALL, BAD_COOKIE."""
    wanted = sorted(b"attribute %d" % index for index in range(40))
    for name in wanted:
        put(one, file, name, b"value")
    found: list[bytes] = []
    cookie, eof, calls = 0, False, 0
    while not eof:
        cookie, piece, eof = names(one, file, cookie, 128)
        assert piece
        found += piece
        calls += 1
    assert found == wanted
    assert calls > 5
    assert status_of(names, one, file, 0, 20) == n.NFS4ERR_TOOSMALL
    assert status_of(names, one, file, 41) == n.NFS4ERR_BAD_COOKIE
    assert names(one, file, 40) == (40, [], True)


def test_permissions(world: World, one: FileClient, file: Opened) -> None:
    """As for contents of the file."""
    put(one, file, b"a", b"1")
    user = FileClient(world.session(b"user"), auth_sys(1000, 1000))
    assert get(user, file, b"a") == b"1"
    assert status_of(put, user, file, b"a", b"2") == n.NFS4ERR_ACCESS
    assert status_of(remove, user, file, b"a") == n.NFS4ERR_ACCESS
    world.fs.setattr(world.fs.lookup(1, b"f").ino, mode=0o600)
    assert status_of(get, user, file, b"a") == n.NFS4ERR_ACCESS
    assert status_of(names, user, file) == n.NFS4ERR_ACCESS


def test_directories_have_them_links_not(world: World, one: FileClient, file: Opened) -> None:
    """As on Linux."""
    world.fs.symlink(1, b"l", b"f")
    lookup = op(n.OP_LOOKUP, opaque(b"l"))
    root = op(n.OP_PUTROOTFH)
    setting = op(n.OP_SETXATTR, u32(0), opaque(b"a"), opaque(b"1"))
    assert status_of(one.last, root, lookup, setting) == n.NFS4ERR_WRONG_TYPE
    one.last(root, setting)
    assert one.last(root, op(n.OP_GETXATTR, opaque(b"a"))).opaque(10) == b"1"


def test_they_are_of_4_2(one: FileClient, file: Opened) -> None:
    """RFC 8276 5"""
    reply = one.run(putfh(file.fh), op(n.OP_GETXATTR, opaque(b"a")), minor=1)
    assert reply.status == n.NFS4ERR_OP_ILLEGAL


def test_pseudo_directories_have_none(world: World) -> None:
    """They are read-only, and empty of attributes."""
    world.fs.mkdir(1, b"exported", 0o755)
    service, _ = make_service(world.fs, ("/exported:rw,insecure,no_root_squash",))
    client = FileClient(Session(service, b"pseudo"))
    root = op(n.OP_PUTROOTFH)
    body = client.last(root, op(n.OP_LISTXATTRS, u64(0), u32(8192)))
    assert (body.u64(), body.u32(), body.boolean()) == (0, 0, True)
    assert status_of(client.last, root, op(n.OP_GETXATTR, opaque(b"a"))) == n.NFS4ERR_NOXATTR
    setting = op(n.OP_SETXATTR, u32(0), opaque(b"a"), opaque(b"1"))
    assert status_of(client.last, root, setting) == n.NFS4ERR_ROFS
