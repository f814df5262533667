"""Names and attributes: what a guest changes is there locally at once, and the other way round."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable

import pytest

from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]


def eventually(condition: Callable[[], bool], seconds: float = 2) -> bool:
    """The local mount hears of changed names a moment later than the client has its answer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_names_made_by_the_guest(world: World) -> None:
    client, root = world.client, world.served.path("made")
    script = f"""set -e
mkdir {client.path("made")}
cd {client.path("made")}
mkdir -p a/b/c
echo content >a/file
ln a/file a/hard
ln -s ../a/file a/b/soft
mknod a/fifo p
mknod a/device c 1 3
mv a/b/c a/moved
echo other >victim
mv -f a/hard victim
touch 'with blank' "$(printf '\\303\\244')" "$(head -c 255 /dev/zero | tr '\\0' n)"
rm a/fifo
chmod 4755 a/file
chown 1000:1001 a/file
touch -d '2001-02-03 04:05:06' a/file
"""
    client.guest.check(script)
    assert sorted(os.listdir(root)) == sorted(["a", "n" * 255, "victim", "with blank", "ä"])
    assert sorted(os.listdir(root / "a")) == ["b", "device", "file", "moved"]
    assert os.readlink(root / "a/b/soft") == "../a/file"
    status = (root / "victim").stat()
    assert status.st_nlink == 2
    assert os.path.samefile(root / "victim", root / "a/file")
    assert (status.st_uid, status.st_gid, status.st_size) == (1000, 1001, 8)
    assert int(status.st_mtime) == 981173106
    device = (root / "a/device").stat()
    assert stat.S_ISCHR(device.st_mode)
    assert (os.major(device.st_rdev), os.minor(device.st_rdev)) == (1, 3)
    client.guest.check(f"rm -r {client.path('made')}")
    assert eventually(lambda: not root.exists())


def test_names_made_locally(world: World) -> None:
    client, root = world.client, world.served.path("local-names")
    root.mkdir()
    for number in range(300):
        (root / f"{number:03}").write_bytes(b"x" * number)
    listing = client.guest.check(f"ls -l {client.path('local-names')} | awk 'NF>5{{print $9, $5}}'")
    assert listing.splitlines() == [f"{number:03} {number}" for number in range(300)]
    (root / "000").rename(root / "renamed")
    (root / "001").unlink()
    (root / "new").mkdir()
    client.drop_caches()
    names = client.guest.check(f"ls {client.path('local-names')}").split()
    assert sorted(names) == sorted(os.listdir(root))
    assert client.guest.run(f"cat {client.path('local-names/001')}").code != 0


def test_a_directory_of_many_names(world: World) -> None:
    """Several READDIRs, while names come and go."""
    client, root = world.client, world.served.path("many")
    root.mkdir()
    for number in range(3000):
        (root / f"name-{number:05}-{'x' * 40}").touch()
    assert int(client.guest.check(f"ls {client.path('many')} | wc -l")) == 3000
    client.guest.check(f"cd {client.path('many')}; rm name-*5-*", 120)
    assert len(os.listdir(root)) == 2700
    client.drop_caches()
    assert int(client.guest.check(f"ls {client.path('many')} | wc -l")) == 2700


def test_an_open_file_outlives_its_name(world: World) -> None:
    """Unlinked by the guest (which renames it first), and by the local mount."""
    client, served = world.client, world.served
    output = client.guest.check(
        f"cd {client.mountpoint}; echo kept >open; exec 8<open; rm open; cat <&8; ls -a | grep nfs"
    )
    assert output.startswith("kept\n.nfs")
    left = [name for name in os.listdir(served.mountpoint) if name.startswith(".nfs")]
    assert left == [], "the client removes it when it closes the file"

    job = client.guest.start(
        f"cd {client.mountpoint}; echo held >held; exec 8<held; touch /tmp/open\n"
        "until [ -e /tmp/gone ]; do usleep 20000; done\n"
        "echo 3 >/proc/sys/vm/drop_caches; cat <&8",
    )
    client.guest.check("until [ -e /tmp/open ]; do usleep 20000; done")
    served.path("held").unlink()
    client.guest.check("touch /tmp/gone")
    assert job.check() == "held\n"


def test_permissions_are_those_of_the_user(world: World) -> None:
    client, served = world.client, world.served
    directory = served.path("permissions")
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "private").write_bytes(b"secret")
    (directory / "private").chmod(0o600)
    os.chown(directory / "private", 1001, 1001)

    def as_user(user: str, command: str) -> str:
        return client.guest.run(f"cd {client.path('permissions')}; su {user} -c '{command}'").output

    assert as_user("bob", "cat private") == "secret"
    assert "Permission denied" in as_user("alice", "cat private")
    assert as_user("alice", "echo hers >hers") == ""
    assert (directory / "hers").stat().st_uid == 1000
    directory.chmod(0o1777)
    assert "not permitted" in as_user("bob", "mv hers his")
    served.path("permissions/hers").chmod(0o666)
    client.drop_caches()
    assert as_user("bob", "echo more >>hers") == ""
    assert (directory / "hers").read_bytes() == b"hers\nmore\n"


def test_extended_attributes(world: World) -> None:
    """RFC 8276, as getfattr and setfattr of the guest use it."""
    client, served = world.client, world.served
    served.path("attributes").touch()
    os.setxattr(served.path("attributes"), "user.local", b"by the mount")
    path = client.path("attributes")
    assert (
        client.guest.check(f"getfattr --absolute-names --only-values -n user.local {path}")
        == "by the mount"
    )
    client.guest.check(f"setfattr -n user.remote -v by-the-guest {path}")
    assert os.getxattr(served.path("attributes"), "user.remote") == b"by-the-guest"
    listing = client.guest.check(f"getfattr -m - {path} 2>/dev/null").split()
    names = sorted(name for name in listing if name.startswith("user."))
    assert names == ["user.local", "user.remote"]
    client.guest.check(f"setfattr -x user.local {path}")
    assert os.listxattr(served.path("attributes")) == ["user.remote"]
    assert client.guest.run(f"getfattr -n user.local {path}").code != 0
