"""READ, WRITE, COMMIT (RFC 8881 18.3, 18.22, 18.32), and operations on contents of RFC 7862."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from extfs.core import CoreError, HolderKind, HolderSpec, Iomode
from extfs.nfs import constants as n
from nfs.conftest import World
from nfs.file_calls import (
    ANONYMOUS,
    NO_DELEG,
    READ,
    WRITE,
    FileClient,
    Opened,
    StatusError,
    create,
    putfh,
    stateid,
)
from nfs.wire import auth_sys, op, opaque, u32, u64

BLOCK = 4096


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


def ino_of(world: World, name: bytes = b"f") -> int:
    return world.fs.lookup(1, name).ino


def seek(client: FileClient, file: Opened, offset: int, what: int) -> tuple[bool, int]:
    body = client.on(file.fh, op(n.OP_SEEK, stateid(file.stateid), u64(offset), u32(what)))
    return body.boolean(), body.u64()


def allocate(client: FileClient, file: Opened, offset: int, length: int) -> None:
    client.on(file.fh, op(n.OP_ALLOCATE, stateid(file.stateid), u64(offset), u64(length)))


def deallocate(client: FileClient, file: Opened, offset: int, length: int) -> None:
    client.on(file.fh, op(n.OP_DEALLOCATE, stateid(file.stateid), u64(offset), u64(length)))


def read_plus(
    client: FileClient, file: Opened, offset: int, count: int
) -> tuple[bool, list[tuple[int, int | bytes]]]:
    """eof; (offset, data or length of a hole)"""
    fields = (stateid(file.stateid), u64(offset), u32(count))
    body = client.on(file.fh, op(n.OP_READ_PLUS, *fields))
    eof = body.boolean()
    found: list[tuple[int, int | bytes]] = []
    for _ in range(body.u32()):
        if body.u32() == n.NFS4_CONTENT_HOLE:
            found.append((body.u64(), body.u64()))
        else:
            found.append((body.u64(), body.opaque(1 << 24)))
    assert body.done()
    return eof, found


# -- READ, WRITE, COMMIT --


def test_write_and_read(world: World, one: FileClient, file: Opened) -> None:
    """18.22.3: eof is true exactly when the last byte was told, or none is there."""
    assert one.write(file.fh, file.stateid, 5, b"contents")[:2] == (8, n.FILE_SYNC4)
    assert one.read(file.fh, file.stateid, 0, 100) == (bytes(5) + b"contents", True)
    assert one.read(file.fh, file.stateid, 0, 13) == (bytes(5) + b"contents", True)
    assert one.read(file.fh, file.stateid, 5, 7) == (b"content", False)
    assert one.read(file.fh, file.stateid, 13, 7) == (b"", True)
    assert one.read(file.fh, file.stateid, 1 << 63, 7) == (b"", True)
    assert one.read(file.fh, file.stateid, 0, 0) == (b"", False)
    assert world.fs.read(ino_of(world), 5, 100) == b"contents"
    assert world.service.counters["server_read_bytes"] == 13 + 13 + 7
    assert world.service.counters["server_reads_no_layout"] == 2
    assert world.service.counters["server_reads_unaligned"] == 1


@pytest.mark.parametrize("stable", [n.UNSTABLE4, n.DATA_SYNC4, n.FILE_SYNC4])
def test_committed_is_what_was_asked_for(one: FileClient, file: Opened, stable: int) -> None:
    """18.32.3; one verifier for WRITE and COMMIT."""
    count, committed, verifier = one.write(file.fh, file.stateid, 0, b"x" * 5000, stable)
    assert (count, committed) == (5000, stable)
    assert one.commit(file.fh) == verifier


def test_the_verifier_is_another_after_a_restart(world: World, one: FileClient) -> None:
    """18.32.3"""
    from nfs.wire import make_service

    service, _ = make_service(world.fs)
    assert service.states.verifier != world.service.states.verifier


@pytest.mark.parametrize("stable", [n.DATA_SYNC4, n.FILE_SYNC4, None])
def test_what_is_stable_outlives_a_power_cut(stable: int | None) -> None:
    """18.32.3, 18.3.3; None: UNSTABLE4 and a COMMIT."""
    from extfs.core import Filesystem, SimDevice, mkfs
    from nfs.wire import Session, make_service

    with SimDevice(64 << 20) as sim:
        with sim.device() as device:
            mkfs(device)
        fs = Filesystem.open(sim.device())
        service, _ = make_service(fs)
        client = FileClient(Session(service))
        file = client.create(b"f")
        how = n.UNSTABLE4 if stable is None else stable
        client.write(file.fh, file.stateid, 0, b"durable" * 1000, how)
        if stable is None:
            client.commit(file.fh)
        sim.crash_at(0)
        fs.abandon()
        sim.restart(5)
        with Filesystem.open(sim.device()) as again:
            assert again.read(again.lookup(1, b"f").ino, 0, 10000) == b"durable" * 1000


def test_open_modes(one: FileClient) -> None:
    """18.32.3, 18.22.3: a file open for writing may be read, not the other way round."""
    made = one.create(b"f")
    one.close(made.fh, made.stateid)
    reader = one.open(b"f", READ | NO_DELEG, owner=b"r")
    writer = one.open(b"f", WRITE | NO_DELEG, owner=b"w")
    assert status_of(one.write, made.fh, reader.stateid, 0, b"x") == n.NFS4ERR_OPENMODE
    one.write(made.fh, writer.stateid, 0, b"x")
    assert one.read(made.fh, writer.stateid, 0, 5) == (b"x", True)
    assert status_of(allocate, one, reader, 0, 5) == n.NFS4ERR_OPENMODE


def test_no_file_is_larger_than_a_file_can_be(one: FileClient, file: Opened) -> None:
    """FBIG, also where offset and length overflow."""
    for offset in ((1 << 63) - 2, (1 << 64) - 1):
        assert status_of(one.write, file.fh, file.stateid, offset, b"xyz") == n.NFS4ERR_FBIG
        assert status_of(allocate, one, file, offset, 4) == n.NFS4ERR_FBIG


def test_nothing_but_files_has_contents(world: World, one: FileClient) -> None:
    """18.22.4"""
    world.fs.mkdir(1, b"d", 0o755)
    world.fs.symlink(1, b"l", b"f")
    for name, expected in ((b"d", n.NFS4ERR_ISDIR), (b"l", n.NFS4ERR_SYMLINK)):
        body = one.last(op(n.OP_PUTROOTFH), op(n.OP_LOOKUP, opaque(name)), op(n.OP_GETFH))
        fh = body.opaque(128)
        assert status_of(one.read, fh, ANONYMOUS, 0, 1) == expected
        assert status_of(one.write, fh, ANONYMOUS, 0, b"x") == expected
        assert status_of(one.commit, fh) == expected


def test_reads_are_bounded_by_the_session(world: World) -> None:
    """2.10.6.4: less than asked for is told, with eof false."""
    from nfs.wire import Session, channel_attributes, create_session, exchange_id, next_result

    wire = world.wire()
    body = next_result(wire.compound(exchange_id(b"small")).body).body
    clientid, first = body.u64(), body.u32()
    reply = wire.compound(
        create_session(clientid, first, fore=channel_attributes(request=1 << 20, response=4096))
    )
    session = Session.__new__(Session)
    session.service, session.wire, session.numbers = world.service, wire, {}
    session.id = next_result(reply.body).body.fixed(16)
    session.run(op(n.OP_RECLAIM_COMPLETE, u32(0)))
    small = FileClient(session)
    file = small.create(b"f")
    small.write(file.fh, file.stateid, 0, b"x" * 10000)
    contents, eof = small.read(file.fh, file.stateid, 0, 10000)
    assert 3000 < len(contents) < 4096
    assert not eof
    eof, found = read_plus(small, file, 0, 10000)
    assert not eof
    assert isinstance(found[0][1], bytes)


def test_large_io(world: World, one: FileClient, file: Opened) -> None:
    """What is more than one WRITE may be is written in part (18.32.3)."""
    contents = bytes(range(256)) * 2000
    assert one.write(file.fh, file.stateid, 3, contents)[0] == len(contents)
    assert one.read(file.fh, file.stateid, 3, len(contents)) == (contents, True)


def test_writers_lose_setuid(world: World, one: FileClient) -> None:
    """As write(2) has it: who is not root takes setuid and setgid away."""
    how = create(mode=u32(0o6777))
    made = one.open(b"f", how=how)
    one.write(made.fh, made.stateid, 0, b"x")
    assert world.fs.lookup(1, b"f").mode & 0o7777 == 0o6777
    user = FileClient(world.session(b"user"), auth_sys(1000, 1000))
    opened = user.open(b"f")
    user.write(opened.fh, opened.stateid, 0, b"x")
    assert world.fs.lookup(1, b"f").mode & 0o7777 == 0o777


def test_recalled_layouts_delay(world: World, one: FileClient, file: Opened) -> None:
    """A holder of a layout is in the way of a write: DELAY, a recall, and then it is done."""
    fs = world.fs
    one.write(file.fh, file.stateid, 0, b"x" * BLOCK)
    ino = ino_of(world)
    holder, _ = fs.layouts.register(HolderSpec(name="h", kind=HolderKind.CLIENT))
    fs.layouts.get(ino, holder, Iomode.RW, 0, BLOCK)
    fs.layouts.events()
    assert status_of(one.write, file.fh, file.stateid, 0, b"y") == n.NFS4ERR_DELAY
    assert status_of(deallocate, one, file, 0, BLOCK) == n.NFS4ERR_DELAY
    truncate = create(n.UNCHECKED4, size=u64(0))
    assert status_of(one.open, b"f", how=truncate, owner=b"new") == n.NFS4ERR_DELAY
    assert world.service.states.status()["opens"] == 1
    assert one.read(file.fh, file.stateid, 0, 1) == (b"x", False)
    assert [event.holder for event in fs.layouts.events()] == [holder]
    fs.layouts.give_back(ino, holder)
    one.write(file.fh, file.stateid, 0, b"y")
    fs.layouts.gone(holder)


# -- 4.2 --


def test_allocate_and_deallocate(world: World, one: FileClient, file: Opened) -> None:
    """RFC 7862 15.1, 15.4"""
    allocate(one, file, 0, 2 * BLOCK)
    stat = world.fs.lookup(1, b"f")
    assert (stat.size, stat.blocks) == (2 * BLOCK, 2)
    one.write(file.fh, file.stateid, 0, b"x" * 2 * BLOCK)
    deallocate(one, file, 0, BLOCK)
    stat = world.fs.lookup(1, b"f")
    assert (stat.size, stat.blocks) == (2 * BLOCK, 1)
    assert one.read(file.fh, file.stateid, 0, 2 * BLOCK)[0] == bytes(BLOCK) + b"x" * BLOCK
    deallocate(one, file, BLOCK, n.NFS4_MAXFILELEN - BLOCK)
    assert world.fs.lookup(1, b"f").size == 2 * BLOCK
    assert one.read(file.fh, file.stateid, 0, 2 * BLOCK)[0] == bytes(2 * BLOCK)
    for call in (allocate, deallocate):
        assert status_of(call, one, file, 0, 0) == n.NFS4ERR_INVAL


def test_seek(one: FileClient, file: Opened) -> None:
    """RFC 7862 15.11.3"""
    data, hole = n.NFS4_CONTENT_DATA, n.NFS4_CONTENT_HOLE
    assert status_of(seek, one, file, 0, data) == n.NFS4ERR_NXIO
    one.write(file.fh, file.stateid, BLOCK, b"x" * BLOCK)
    one.write(file.fh, file.stateid, 4 * BLOCK, b"x")
    deallocate(one, file, 4 * BLOCK, BLOCK)
    assert seek(one, file, 0, data) == (False, BLOCK)
    assert seek(one, file, 0, hole) == (False, 0)
    assert seek(one, file, BLOCK, hole) == (False, 2 * BLOCK)
    assert seek(one, file, 2 * BLOCK, data) == (True, 4 * BLOCK + 1)
    assert status_of(seek, one, file, 4 * BLOCK + 1, hole) == n.NFS4ERR_NXIO
    assert status_of(seek, one, file, 0, 2) == n.NFS4ERR_UNION_NOTSUPP
    one.write(file.fh, file.stateid, 4 * BLOCK, b"y")
    assert seek(one, file, 4 * BLOCK, hole) == (True, 4 * BLOCK + 1)


def test_read_plus(one: FileClient, file: Opened) -> None:
    """RFC 7862 15.10"""
    assert read_plus(one, file, 0, 100) == (True, [])
    one.write(file.fh, file.stateid, BLOCK, b"x" * BLOCK)
    one.write(file.fh, file.stateid, 3 * BLOCK, b"yz")
    whole = [(0, BLOCK), (BLOCK, b"x" * BLOCK), (2 * BLOCK, BLOCK), (3 * BLOCK, b"yz")]
    assert read_plus(one, file, 0, 1 << 20) == (True, whole)
    assert read_plus(one, file, 0, 3 * BLOCK) == (False, whole[:3])
    assert read_plus(one, file, 100, 50) == (False, [(100, 50)])
    assert read_plus(one, file, BLOCK + 5, 5) == (False, [(BLOCK + 5, b"x" * 5)])
    assert read_plus(one, file, 1 << 40, 5) == (True, [])


def test_io_advise_promises_nothing(one: FileClient, file: Opened) -> None:
    """RFC 7862 15.5"""
    fields = (stateid(file.stateid), u64(0), u64(0), u32(1), u32(0x7FF))
    assert one.on(file.fh, op(n.OP_IO_ADVISE, *fields)).bitmap() == 0


# -- CLONE, COPY --


def both(source: Opened, target: Opened, operation: bytes) -> tuple[bytes, ...]:
    return putfh(source.fh), op(n.OP_SAVEFH), putfh(target.fh), operation


def clone(
    client: FileClient, source: Opened, target: Opened, offset: int, to: int, length: int
) -> None:
    fields = (stateid(source.stateid), stateid(target.stateid), u64(offset), u64(to), u64(length))
    client.last(*both(source, target, op(n.OP_CLONE, *fields)))


def copy(
    client: FileClient,
    source: Opened,
    target: Opened,
    offset: int,
    to: int,
    length: int,
    servers: bytes = b"\0\0\0\0",
) -> int:
    fields = (stateid(source.stateid), stateid(target.stateid), u64(offset), u64(to), u64(length))
    body = client.last(*both(source, target, op(n.OP_COPY, *fields, u32(1), u32(0), servers)))
    assert body.u32() == 0
    count = body.u64()
    assert body.u32() == n.FILE_SYNC4
    body.fixed(8)
    assert (body.boolean(), body.boolean()) == (True, True)
    return count


def test_clone_shares_blocks(world: World, one: FileClient, file: Opened) -> None:
    """RFC 7862 15.13"""
    contents = b"x" * BLOCK + b"y" * 100
    one.write(file.fh, file.stateid, 0, contents)
    target = one.create(b"g")
    clone(one, file, target, 0, 0, 0)
    assert one.read(target.fh, target.stateid, 0, 1 << 20) == (contents, True)
    assert next(world.fs.extents(ino_of(world, b"g"))).shared
    one.write(target.fh, target.stateid, 0, b"z")
    assert one.read(file.fh, file.stateid, 0, 1) == (b"x", False)
    clone(one, file, target, BLOCK, 2 * BLOCK, 100)
    assert one.read(target.fh, target.stateid, 2 * BLOCK, 200) == (b"y" * 100, True)


@pytest.mark.parametrize(
    ("offset", "to", "length"),
    [(1, 0, 0), (0, 1, 0), (0, 0, 5), (0, 0, 3 * BLOCK), (1 << 40, 0, 0), (0, 0, 1 << 63)],
)
def test_clone_refuses(one: FileClient, file: Opened, offset: int, to: int, length: int) -> None:
    """RFC 7862 15.13.3: not of whole blocks, beyond the end."""
    one.write(file.fh, file.stateid, 0, b"x" * 2 * BLOCK)
    target = one.create(b"g")
    assert status_of(clone, one, file, target, offset, to, length) == n.NFS4ERR_INVAL


def test_overlaps_are_refused(one: FileClient, file: Opened) -> None:
    """RFC 7862 15.2.3, 15.13.3"""
    one.write(file.fh, file.stateid, 0, b"x" * 4 * BLOCK)
    assert status_of(clone, one, file, file, 0, BLOCK, 2 * BLOCK) == n.NFS4ERR_INVAL
    assert status_of(copy, one, file, file, 0, 1, 2) == n.NFS4ERR_INVAL
    clone(one, file, file, 0, 8 * BLOCK, 2 * BLOCK)
    assert copy(one, file, file, 0, 7, 5) == 5


def test_copy(world: World, one: FileClient, file: Opened) -> None:
    """RFC 7862 15.2: any bytes; zero is to the end; sharing where it can."""
    contents = b"abc" * BLOCK
    one.write(file.fh, file.stateid, 0, contents)
    target = one.create(b"g")
    assert copy(one, file, target, 0, 0, 0) == len(contents)
    assert one.read(target.fh, target.stateid, 0, 1 << 20) == (contents, True)
    assert next(world.fs.extents(ino_of(world, b"g"))).shared
    assert copy(one, file, target, 1, 100000, 5) == 5
    assert one.read(target.fh, target.stateid, 100000, 9) == (b"bcabc", True)
    empty = one.create(b"e")
    assert copy(one, empty, target, 0, 0, 0) == 0
    assert status_of(copy, one, file, target, 1, 0, len(contents)) == n.NFS4ERR_INVAL
    other = u32(1) + u32(n.NL4_NAME) + opaque(b"server")
    assert status_of(copy, one, file, target, 0, 0, 0, other) == n.NFS4ERR_NOTSUPP


def test_a_copy_that_moves_bytes_is_short(world: World, one: FileClient, file: Opened) -> None:
    """RFC 7862 15.2.3: a thread is not held for long; the client goes on where it ended."""
    target = one.create(b"g")
    world.fs.truncate(ino_of(world, b"f"), 20 << 20)
    assert copy(one, file, target, 1, 0, 17 << 20) == 16 << 20
    assert copy(one, file, target, BLOCK, 0, 17 << 20) == 17 << 20
    assert copy(one, file, target, 1, BLOCK + 1, 17 << 20) == 17 << 20


def test_copy_asks_both_stateids(one: FileClient, file: Opened) -> None:
    """RFC 7862 15.2.3, 15.13.3"""
    one.write(file.fh, file.stateid, 0, b"x" * BLOCK)
    made = one.create(b"g")
    one.close(made.fh, made.stateid)
    target = one.open(b"g", READ | NO_DELEG)
    assert status_of(copy, one, file, target, 0, 0, 0) == n.NFS4ERR_OPENMODE
    assert status_of(clone, one, file, target, 0, 0, 0) == n.NFS4ERR_OPENMODE
    assert status_of(clone, one, made, file, 0, 0, 0) == n.NFS4ERR_BAD_STATEID


@pytest.mark.parametrize(
    "operation",
    [
        op(n.OP_COPY_NOTIFY, bytes(16), u32(n.NL4_NAME), opaque(b"x")),
        op(n.OP_OFFLOAD_CANCEL, bytes(16)),
        op(n.OP_OFFLOAD_STATUS, bytes(16)),
        op(n.OP_WRITE_SAME, bytes(16)),
    ],
)
def test_what_is_not_supported_says_so(one: FileClient, file: Opened, operation: bytes) -> None:
    assert status_of(one.on, file.fh, operation) == n.NFS4ERR_NOTSUPP
    assert status_of(one.on, file.fh, operation, minor=1) == n.NFS4ERR_OP_ILLEGAL


def test_truncated_writes_change_nothing(world: World, one: FileClient, file: Opened) -> None:
    """Bytes that did not come are not written."""
    whole = op(n.OP_WRITE, stateid(file.stateid), u64(0), u32(n.FILE_SYNC4), opaque(b"contents"))
    for cut in range(4, len(whole), 4):
        assert status_of(one.on, file.fh, whole[:cut]) == n.NFS4ERR_BADXDR
    liar = whole[:32] + struct.pack(">I", 0xFFFFFFF0)
    assert status_of(one.on, file.fh, liar) == n.NFS4ERR_BADXDR
    assert world.fs.lookup(1, b"f").size == 0


@pytest.mark.expect_log("READ: .Errno 5")
def test_a_failed_read_leaves_the_connection_usable(world: World, one: FileClient) -> None:
    """An error of the device: IO, and the next request is served."""
    file = one.create(b"f")
    one.write(file.fh, file.stateid, 0, b"x")
    real = world.fs.read_into

    def broken(*args: Any, **more: Any) -> int:
        raise CoreError(-5)

    world.fs.read_into = broken  # type: ignore[method-assign]
    try:
        assert status_of(one.read, file.fh, file.stateid, 0, 1) == n.NFS4ERR_IO
    finally:
        world.fs.read_into = real  # type: ignore[method-assign]
    assert one.read(file.fh, file.stateid, 0, 1) == (b"x", True)
