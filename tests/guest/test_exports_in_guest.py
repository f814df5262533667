"""Exports as the kernel's client sees them: the pseudo filesystem, squash, what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from guest.client import Client
from guest.machine import CommandError
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

NOBODY = 65534


def serve(world: World, export: str) -> None:
    """The same filesystem with another export."""
    world.served.stop()
    world.served.export = export
    world.served.start()


def refused(client: Client, world: World, path: str) -> str:
    """What mount says."""
    with pytest.raises(CommandError) as error:
        client.mount(world.served.port, path, options="retry=0")
    return str(error.value)


def test_an_export_below_the_root(own_world: Callable[..., World]) -> None:
    world = own_world()
    root = world.served.mountpoint
    (root / "a/b/c").mkdir(parents=True)
    (root / "secret").mkdir()
    for name in ("a/b", "a/b/c"):
        (root / name).chmod(0o777)
    client = Client(world.boot("exports", disk=False))
    client.prepare(block_layouts=False)
    serve(world, "/a/b:rw,insecure")

    client.mount(world.served.port)
    check = client.guest.check
    assert check(f"ls -A {client.mountpoint}").split() == ["a"]
    assert check(f"ls -A {client.path('a')}").split() == ["b"]
    assert check(f"ls -A {client.path('a/b')}").split() == ["c"]
    pseudo, real = check(f"stat -c %d {client.path('a')} {client.path('a/b')}").split()
    assert pseudo != real, "an export is a filesystem of its own"
    assert "Read-only" in client.guest.run(f"mkdir {client.path('a/new')}").output
    check(f"cd {client.path('a/b/c')}; echo squashed >file; cd ../..; ls ..")
    assert (root / "a/b/c/file").read_text() == "squashed\n"
    assert os.stat(root / "a/b/c/file").st_uid == NOBODY
    (root / "a/b/private").touch(mode=0o600)
    assert "denied" in client.guest.run(f"cat {client.path('a/b/private')}").output
    client.unmount()

    client.mount(world.served.port, "/a/b")
    assert check(f"ls {client.mountpoint}").split() == ["c", "private"]
    assert check(f"cat {client.path('c/file')}") == "squashed\n"
    client.unmount()

    serve(world, "/a/b:insecure,no_root_squash")
    client.mount(world.served.port, "/a/b")
    assert check(f"cat {client.path('private')}") == ""
    assert "Read-only" in client.guest.run(f"touch {client.path('c/new')}").output
    client.unmount()

    serve(world, "/a/b:rw")  # guests come from unprivileged ports
    assert "not permitted" in refused(client, world, "/a/b")
    serve(world, "/a/b:rw,insecure,192.0.2.0/24")  # and from this machine
    assert "No such file" in refused(client, world, "/a/b")
    assert not (root / "a/b/c/new").exists()
