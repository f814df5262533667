"""Clients that cannot or may not use layouts: the same files, with the data through the server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest

from guest.client import MIB, Client
from guest.served import Served, stamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]


def exchange_files(client: Client, served: Served, name: str) -> None:
    """Read a local file in the guest, and write one there; all through the server."""
    content = os.urandom(3 * MIB + 777)
    served.path(f"{name}-in").write_bytes(content)
    with client.counted() as counted:
        expected = hashlib.sha256(content).hexdigest()
        assert client.digest(client.path(f"{name}-in")) == expected
        source = client.random_file(name, 5 * MIB + 333)
        client.copy_in(source, f"{name}-out")
        client.xfs_io(f"{name}-out", f"pwrite -q -S 0x31 {7 * MIB + 1} 100", "fsync")
    assert counted["READ"] > 0, str(counted)
    assert counted["WRITE"] > 0, str(counted)
    assert counted.stats.pnfs_reads == counted.stats.pnfs_writes == 0, str(counted)
    client.guest.check(f"xfs_io -c 'pwrite -q -S 0x31 {7 * MIB + 1} 100' {source}")
    assert served.digest(f"{name}-out") == client.digest(source)
    client.guest.check(f"rm {source}")


def test_a_guest_without_the_disk(world: World) -> None:
    """It is offered layouts, cannot find the disk, and goes through the server; silently."""
    client = world.new_client("diskless", disk=False)
    try:
        exchange_files(client, world.served, "diskless")
        # The same file, through the disk by one and through the server by the other.
        other = world.client
        other.guest.check(f"stamp write -d {other.path('mixed')} 1 0 {MIB} 65536")
        client.guest.check(f"stamp check {client.path('mixed')} 1 0 {MIB}")
        client.guest.check(f"stamp write {client.path('mixed')} 2 {MIB // 2} {MIB} 65536")
        other.guest.check(f"stamp check -d {other.path('mixed')} 2 {MIB // 2} {MIB}")
        other.guest.check(f"stamp check {other.path('mixed')} 1 0 {MIB // 2}")
        expected = stamped(1, 0, MIB // 2) + stamped(2, MIB // 2, MIB)
        assert world.served.path("mixed").read_bytes() == expected
        client.unmount()
    finally:
        client.guest.power_off()


def test_an_export_without_layouts(own_world: Callable[..., World]) -> None:
    """The client asks for none: the server does not say that it has them."""
    world = own_world(export="/:rw,no_root_squash,insecure")
    client = world.client
    assert client.stats().layout != "LAYOUT_BLOCK_VOLUME"
    with client.counted() as counted:
        exchange_files(client, world.served, "plain")
    assert counted["LAYOUTGET"] == 0
    client.unmount()
    world.served.fsck()


def test_a_read_only_export(own_world: Callable[..., World]) -> None:
    """Reads by layout; every change is refused with EROFS."""
    world = own_world(export="/:ro,no_root_squash,insecure,layouts=block")
    served = world.served
    content = os.urandom(2 * MIB)
    served.path("file").write_bytes(content)
    client = world.client
    with client.counted() as counted:
        expected = hashlib.sha256(content).hexdigest()
        assert client.digest(client.path("file")) == expected
    counted.assert_by_layout(reads=True)
    path = client.path("file")
    for change in (
        f"echo x >>{path}",
        f"touch {client.path('new')}",
        f"rm {path}",
        f"mv {path} {path}2",
        f"chmod 600 {path}",
        f"truncate -s 1 {path}",
        f"mkdir {client.path('directory')}",
        f"ln {path} {client.path('link')}",
        f"ln -s file {client.path('symlink')}",
    ):
        result = client.guest.run(change)
        assert result.code != 0, change
        assert "Read-only file system" in result.output, (change, result.output)
    assert served.path("file").read_bytes() == content
    assert os.listdir(served.mountpoint) == ["file"]


def test_root_is_squashed_by_default(own_world: Callable[..., World]) -> None:
    world = own_world(export="/:rw,insecure,layouts=block")
    served, client = world.served, world.client
    served.path("closed").mkdir(mode=0o755)
    served.path("open").mkdir()
    served.path("open").chmod(0o777)
    result = client.guest.run(f"touch {client.path('closed/file')}")
    assert "Permission denied" in result.output
    client.guest.check(f"stamp write {client.path('open/file')} 1 0 {MIB} 65536")
    status = served.path("open/file").stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)
    assert served.path("open/file").read_bytes() == stamped(1, 0, MIB)


def test_privileged_ports_are_asked_for_by_default(own_world: Callable[..., World]) -> None:
    """The user network connects from ports above 1023; without "insecure" nothing is answered."""
    world = own_world(export="/:rw,no_root_squash")
    client = Client(world.boot("insecure"))
    client.prepare()
    with pytest.raises(Exception, match=r"not permitted|denied|access"):
        client.mount(world.served.port, seconds=30)
