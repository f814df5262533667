"""One client writes and reads the disk itself; the local mount sees the same bytes.

Each test looks at what the client counted: data alone prove nothing about layouts.
"""

from __future__ import annotations

import hashlib
import os
import random

import pytest

from guest.client import MIB
from guest.served import assert_no_canary
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

KIB = 1 << 10


def sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def test_mount_and_list(world: World) -> None:
    """What is there locally is there in the guest, with its attributes; layouts are agreed on."""
    client = world.client
    root = world.served.path("listing")
    (root / "directory").mkdir(parents=True)
    (root / "file").write_bytes(b"twelve bytes")
    (root / "file").chmod(0o640)
    os.chown(root / "file", 1000, 1001)
    (root / "link").symlink_to("file")
    assert client.stats().layout == "LAYOUT_BLOCK_VOLUME"
    names = client.guest.check(f"ls -a {client.path('listing')}").split()
    assert names == [".", "..", "directory", "file", "link"]
    stat = client.guest.check(f"cd {client.path('listing')}; stat -c '%F %a %u %g %s %i' *")
    inode = {name: (root / name).lstat().st_ino for name in ("directory", "file", "link")}
    assert stat.splitlines()[1:] == [
        f"regular file 640 1000 1001 12 {inode['file']}",
        f"symbolic link 777 0 0 4 {inode['link']}",
    ]
    assert stat.splitlines()[0].startswith("directory 755 0 0 ")
    assert client.guest.check(f"cat {client.path('listing/link')}") == "twelve bytes"
    space = client.guest.check(f"stat -f -c '%S %b %f' {client.mountpoint}").split()
    local = os.statvfs(world.served.mountpoint)
    assert 0 <= local.f_frsize * local.f_blocks - int(space[0]) * int(space[1]) < int(space[0])


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_write_and_read_back(world: World, direct: bool) -> None:
    """64 MiB; nothing of them goes over the network, in either direction."""
    client, name = world.client, f"large-{'direct' if direct else 'buffered'}"
    source = client.random_file("source", 64 * MIB)
    with client.counted() as writing:
        client.copy_in(source, name, direct=direct)
    writing.assert_by_layout(writes=True)
    assert writing["LAYOUTGET"] > 0
    expected = client.digest(source)
    client.guest.check(f"rm {source}")
    assert world.served.digest(name) == expected
    assert world.served.device_digest(name) == expected
    client.drop_caches()
    with client.counted() as reading:
        assert client.digest(client.path(name), direct=direct) == expected
    reading.assert_by_layout(reads=True)


def test_what_was_written_locally_is_read_from_the_disk(world: World) -> None:
    client, content = world.client, os.urandom(8 * MIB + 1234)
    world.served.path("local").write_bytes(content)
    with client.counted() as counted:
        assert client.digest(client.path("local")) == sha256(content)
    counted.assert_by_layout(reads=True)
    assert counted["LAYOUTGET"] > 0


def test_overwriting_in_place(world: World) -> None:
    """Written blocks are written again where they are; the file was fsynced each time."""
    client = world.client
    client.guest.check(f"stamp write -d {client.path('inplace')} 1 0 {4 * MIB} {MIB}")
    before = world.served.extents("inplace")
    with client.counted() as counted:
        client.guest.check(f"stamp write -d -f {client.path('inplace')} 2 {MIB} {MIB} 65536")
    counted.assert_by_layout()
    assert counted.stats.pnfs_writes > 0
    assert world.served.extents("inplace") == before
    for seed, offset, length in ((1, 0, MIB), (2, MIB, MIB), (1, 2 * MIB, 2 * MIB)):
        client.guest.check(f"stamp check -d {client.path('inplace')} {seed} {offset} {length}")
    assert world.served.device_digest("inplace") == world.served.digest("inplace")


def test_partial_pages(world: World) -> None:
    """Buffered writes of any size at any offset, over data, holes and the end of the file."""
    client, dice = world.client, random.Random(5663)
    model = bytearray(os.urandom(300_000))
    world.served.path("partial").write_bytes(model)
    commands = []
    for step in range(40):
        offset, length = dice.randrange(400_000), dice.randint(1, 9000)
        fill = dice.randrange(1, 256)
        if len(model) < offset + length:
            model += bytes(offset + length - len(model))
        model[offset : offset + length] = bytes([fill]) * length
        commands.append(f"pwrite -q -S {fill:#x} {offset} {length}")
        if step % 8 == 7:
            commands.append("fsync")
    with client.counted() as counted:
        client.xfs_io("partial", *commands)
    counted.assert_by_layout(writes=True)
    assert world.served.path("partial").read_bytes() == bytes(model)
    assert world.served.device_digest("partial") == sha256(model)
    client.drop_caches()
    with client.counted() as reading:
        assert client.digest(client.path("partial")) == sha256(model)
    reading.assert_by_layout(reads=True)


def test_unaligned_direct_writes_go_through_the_server(world: World) -> None:
    """The client cannot write part of a block itself, and asks the server to; in any order."""
    client = world.client
    client.guest.check(f"stamp write -d {client.path('unaligned')} 3 0 65536 65536")
    model = bytearray(world.served.path("unaligned").read_bytes())
    with client.counted() as counted:
        client.xfs_io(
            "unaligned",
            "pwrite -q -S 0x11 512 1024",
            "pwrite -q -S 0x22 8192 4096",
            "pwrite -q -S 0x33 12288 512",
            flags="-d",
        )
    model[512:1536] = b"\x11" * 1024
    model[8192:12288] = b"\x22" * 4096
    model[12288:12800] = b"\x33" * 512
    assert counted["WRITE"] > 0
    assert world.served.path("unaligned").read_bytes() == bytes(model)
    client.drop_caches()
    assert client.digest(client.path("unaligned")) == sha256(model)


def test_holes(world: World) -> None:
    """What nobody wrote reads as zeros everywhere, also where blocks were allocated for it."""
    client = world.client
    model = bytearray(9 * MIB + 100 + 5000)
    pieces = ((0, 4096, 0x41), (MIB, 10_000, 0x42), (9 * MIB + 100, 5000, 0x43))
    commands = []
    for offset, length, fill in pieces:
        model[offset : offset + length] = bytes([fill]) * length
        commands.append(f"pwrite -q -S {fill:#x} {offset} {length}")
    with client.counted() as counted:
        client.xfs_io("holes", *commands, "fsync", flags="-f")
    counted.assert_by_layout(writes=True)
    content = world.served.path("holes").read_bytes()
    assert_no_canary(content, "holes")
    assert content == bytes(model)
    assert world.served.path("holes").stat().st_blocks * 512 < 8 * MIB
    for direct in (False, True):
        client.drop_caches()
        with client.counted() as reading:
            assert client.digest(client.path("holes"), direct=direct) == sha256(model)
        if not direct:  # a direct read up to the end of the file ends inside a block
            reading.assert_by_layout(reads=True)


def test_a_sparse_file_made_locally(world: World) -> None:
    client, served = world.client, world.served
    with open(served.path("sparse"), "wb") as file:
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"end", 32 * MIB - 3)
        os.posix_fallocate(file.fileno(), 16 * MIB, MIB)  # unwritten
    with client.counted() as counted:
        assert client.digest(client.path("sparse")) == served.digest("sparse")
    counted.assert_by_layout(reads=True)
    # Into the hole and into the unwritten blocks.
    with client.counted() as counted:
        client.xfs_io(
            "sparse",
            f"pwrite -q -S 0x77 {8 * MIB} 4096",
            f"pwrite -q -S 0x78 {16 * MIB + 8192} 100",
        )
        client.guest.check("sync")
    counted.assert_by_layout(writes=True)
    content = served.path("sparse").read_bytes()
    assert content[8 * MIB : 8 * MIB + 4096] == b"\x77" * 4096
    assert content[16 * MIB + 8192 : 16 * MIB + 8292] == b"\x78" * 100
    assert len(content) - content.count(0) == 4096 + 100 + len("beginend")


def test_truncate(world: World) -> None:
    """Down and up again, by the guest: what was cut off is gone, and does not come back."""
    client, served = world.client, world.served
    client.guest.check(f"stamp write {client.path('cut')} 4 0 {MIB} 65536")
    head = served.path("cut").read_bytes()[:5000]
    client.guest.check(f"truncate -s 5000 {client.path('cut')}")
    assert served.path("cut").read_bytes() == head
    client.guest.check(f"truncate -s 20000 {client.path('cut')}")
    assert served.path("cut").read_bytes() == head + bytes(15000)
    with client.counted() as counted:
        client.xfs_io("cut", "pwrite -q -S 0x55 15000 100", "fsync")
    counted.assert_by_layout(writes=True)
    expected = head + bytes(10000) + b"\x55" * 100 + bytes(4900)
    assert served.path("cut").read_bytes() == expected
    client.drop_caches()
    assert client.digest(client.path("cut")) == sha256(expected)
    client.guest.check(f": >{client.path('cut')}")
    assert served.path("cut").stat().st_size == 0
    assert served.path("cut").stat().st_blocks == 0


def test_append(world: World) -> None:
    """Small appends, each durable: the end of the file moves with each, for everybody."""
    client, served = world.client, world.served
    expected = b""
    with client.counted() as counted:
        for number in range(12):
            piece = bytes([65 + number]) * (700 * number + 1)
            expected += piece
            client.guest.check(
                f"head -c {len(piece)} /dev/zero | tr '\\0' '{chr(65 + number)}' "
                f">>{client.path('log')}; sync"
            )
            assert served.path("log").stat().st_size == len(expected)
            assert served.path("log").read_bytes() == expected
    assert counted["WRITE"] == 0, str(counted)
    assert counted["LAYOUTCOMMIT"] >= 11  # the first is of one byte
    # And behind what somebody else appended meanwhile.
    with open(served.path("log"), "ab") as file:
        file.write(b"locally")
    client.guest.check(f"echo -n remotely >>{client.path('log')}")
    assert served.path("log").read_bytes() == expected + b"locallyremotely"


def test_mapped_writes(world: World) -> None:
    """Pages dirtied through mmap go by layout too."""
    client = world.client
    world.served.path("mapped").write_bytes(bytes(MIB))
    with client.counted() as counted:
        client.xfs_io(
            "mapped",
            f"mmap -rw 0 {MIB}",
            "mwrite -S 0x61 0 10000",
            "mwrite -S 0x62 500000 1",
            "msync -s",
        )
    counted.assert_by_layout(writes=True)
    expected = bytearray(MIB)
    expected[:10000] = b"\x61" * 10000
    expected[500000] = 0x62
    assert world.served.path("mapped").read_bytes() == bytes(expected)


def test_a_clone_is_copied_on_write(world: World) -> None:
    """Shared blocks: the layout has the old ones to read and new ones to write (RFC 5663 2.3.4)."""
    client, served = world.client, world.served
    original = os.urandom(8 * MIB)
    served.path("original").write_bytes(original)
    served.clone("original", "clone")
    assert all(extent.shared for extent in served.extents("clone"))
    expected = bytearray(original)
    with client.counted() as counted:
        client.guest.check(f"stamp write -d {client.path('clone')} 9 {MIB} {MIB} 65536")
        client.xfs_io("clone", "pwrite -q -S 0x5a 5000000 3", "fsync")  # part of one block
    counted.assert_by_layout(writes=True)
    stamped = served.path("clone").read_bytes()[MIB : 2 * MIB]
    assert stamped != original[MIB : 2 * MIB]
    expected[MIB : 2 * MIB] = stamped
    expected[5000000:5000003] = b"\x5a" * 3
    client.guest.check(f"stamp check -d {client.path('clone')} 9 {MIB} {MIB}")
    assert served.path("clone").read_bytes() == bytes(expected)
    assert served.device_digest("clone") == sha256(expected)
    assert served.path("original").read_bytes() == original
    assert served.device_digest("original") == sha256(original)
    client.drop_caches()
    with client.counted() as reading:
        assert client.digest(client.path("clone")) == sha256(expected)
        assert client.digest(client.path("original")) == sha256(original)
    reading.assert_by_layout(reads=True)
    shared = sum(extent.length for extent in served.extents("clone") if extent.shared)
    assert 5 * MIB < shared <= 7 * MIB - 4 * KIB


def test_operations_of_version_4_2(world: World) -> None:
    """ALLOCATE, DEALLOCATE, SEEK, CLONE and COPY, as the kernel's client sends them."""
    client, served = world.client, world.served
    client.guest.check(f"stamp write {client.path('v42')} 6 0 {4 * MIB} {MIB}")
    content = bytearray(served.path("v42").read_bytes())
    with client.counted() as counted:
        client.xfs_io(
            "v42",
            f"fpunch {MIB} 65536",
            f"falloc {8 * MIB} {MIB}",
            "seek -h 0",
            f"seek -d {MIB}",
        )
        client.xfs_io("v42-clone", f"reflink {client.path('v42')}", flags="-f")
        client.xfs_io("v42-copy", f"copy_range {client.path('v42')}", flags="-f")
    content[MIB : MIB + 65536] = bytes(65536)
    content += bytes(9 * MIB - len(content))
    for name in ("v42", "v42-clone", "v42-copy"):
        assert served.path(name).read_bytes() == bytes(content), name
        client.drop_caches()
        assert client.digest(client.path(name)) == sha256(content), name
    for operation in ("ALLOCATE", "DEALLOCATE", "SEEK", "CLONE", "COPY"):
        assert counted[operation] > 0, f"{operation}: {counted}"
    assert any(extent.shared for extent in served.extents("v42-clone"))
