"""Attributes on the mount: modes, owners, times, extended attributes, ACLs, lost privileges."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Mounted

pytestmark = pytest.mark.fuse

SOMEBODY = 4711


@pytest.fixture
def path(mounted: Mounted) -> Path:
    mounted.mountpoint.chmod(0o777)
    path = mounted.mountpoint / "file"
    path.write_bytes(b"content")
    return path


def as_somebody(script: str, *arguments: str | Path, groups: str = "") -> str:
    """Run Python as another user; returns what it prints, or "errno N"."""
    wrapped = (
        f"import os, sys\nos.setgroups([{groups}])\n"
        f"os.setresgid({SOMEBODY}, {SOMEBODY}, {SOMEBODY})\n"
        f"os.setresuid({SOMEBODY}, {SOMEBODY}, {SOMEBODY})\n"
        f"try:\n    {script}\nexcept OSError as error:\n    print('errno', error.errno)\n"
    )
    command = [sys.executable, "-c", wrapped, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_chmod_chown_utime(path: Path) -> None:
    os.chmod(path, 0o1641)
    os.chown(path, 12, 34)
    os.utime(path, ns=(123_456_789_012_345_678, -987_654_321))
    os.sync()
    found = path.stat()
    assert found.st_mode & 0o7777 == 0o1641
    assert (found.st_uid, found.st_gid) == (12, 34)
    assert (found.st_atime_ns, found.st_mtime_ns) == (123_456_789_012_345_678, -987_654_321)


def test_writing_moves_mtime_and_ctime(path: Path) -> None:
    os.utime(path, (1, 1))
    before = path.stat()
    with open(path, "ab") as file:
        file.write(b"more")
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    directory = path.parent.stat()
    (path.parent / "another").touch()
    assert path.parent.stat().st_mtime_ns > directory.st_mtime_ns


def test_permissions_hold_for_others(path: Path) -> None:
    os.chmod(path, 0o600)
    assert as_somebody("open(sys.argv[1])", path) == f"errno {errno.EACCES}"
    os.chmod(path, 0o644)
    assert as_somebody("print(open(sys.argv[1]).read())", path) == "content"
    assert as_somebody("open(sys.argv[1], 'a')", path) == f"errno {errno.EACCES}"
    assert as_somebody("os.chmod(sys.argv[1], 0o777)", path) == f"errno {errno.EPERM}"


def test_a_write_by_another_user_clears_setuid(path: Path) -> None:
    os.chmod(path, 0o6777)
    as_somebody("open(sys.argv[1], 'r+').write('x')", path)
    assert path.stat().st_mode & 0o7777 == 0o777
    os.chmod(path, 0o6777)
    as_somebody("os.truncate(sys.argv[1], 3)", path)
    assert path.stat().st_mode & 0o7777 == 0o777
    # Root has CAP_FSETID.
    os.chmod(path, 0o6777)
    with open(path, "r+") as file:
        file.write("x")
    assert path.stat().st_mode & 0o7777 == 0o6777


def test_a_new_owner_clears_setuid_and_capabilities(path: Path) -> None:
    os.chmod(path, 0o6755)
    os.chown(path, SOMEBODY, -1)
    assert path.stat().st_mode & 0o7777 == 0o755
    # cap_net_raw=ep, version 2
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(path, "security.capability", capability)
    assert os.getxattr(path, "security.capability") == capability
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(OSError) as error:
        os.getxattr(path, "security.capability")
    assert error.value.errno == errno.ENODATA


def test_extended_attributes(path: Path) -> None:
    values = {
        "user.a": b"",
        "user.b": bytes(range(256)),
        "trusted.t": b"t",
        "user.long": b"v" * 60_000,
    }
    for name, value in values.items():
        os.setxattr(path, name, value)
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == values
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.a", b"x", os.XATTR_CREATE)
    with pytest.raises(OSError) as error:
        os.setxattr(path, "user.new", b"x", os.XATTR_REPLACE)
    assert error.value.errno == errno.ENODATA
    os.setxattr(path, "user.a", b"replaced", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"replaced"
    os.removexattr(path, "user.long")
    with pytest.raises(OSError) as error:
        os.removexattr(path, "user.long")
    assert error.value.errno == errno.ENODATA
    with pytest.raises(OSError) as error:
        os.setxattr(path, "nonsense.x", b"x")
    assert error.value.errno == errno.EOPNOTSUPP
    # The longest name, which reaches into the page where the value is put.
    longest = "user." + "n" * 250
    os.setxattr(path, longest, b"w" * 5000)
    assert os.getxattr(path, longest) == b"w" * 5000
    assert "trusted.t" not in as_somebody("print(os.listxattr(sys.argv[1]))", path)


def test_access_acls_are_enforced(path: Path) -> None:
    os.chmod(path, 0o600)
    subprocess.run(["setfacl", "-m", f"u:{SOMEBODY}:r", path], check=True)
    assert as_somebody("print(open(sys.argv[1]).read())", path) == "content"
    assert as_somebody("open(sys.argv[1], 'a')", path) == f"errno {errno.EACCES}"
    assert path.stat().st_mode & 0o777 == 0o640  # the group bits show the mask
    os.chmod(path, 0o600)  # the mask cuts the entry off
    assert as_somebody("open(sys.argv[1])", path) == f"errno {errno.EACCES}"
    subprocess.run(["setfacl", "-b", path], check=True)
    assert "system.posix_acl_access" not in os.listxattr(path)


def test_default_acls_are_inherited(path: Path) -> None:
    directory = path.parent / "dir"
    directory.mkdir()
    subprocess.run(["setfacl", "-d", "-m", f"u:{SOMEBODY}:rwx,o::-", directory], check=True)
    old = os.umask(0o077)  # does not count where there is a default ACL
    try:
        (directory / "file").write_bytes(b"inherited")
        (directory / "sub").mkdir()
    finally:
        os.umask(old)
    assert as_somebody("print(open(sys.argv[1]).read())", directory / "file") == "inherited"
    assert (directory / "file").stat().st_mode & 0o777 == 0o660
    said = subprocess.run(
        ["getfacl", "-cd", directory / "sub"], check=True, capture_output=True, text=True
    )
    assert f"user:{SOMEBODY}:rwx" in said.stdout


def test_setgid_directories_hand_their_group_down(path: Path) -> None:
    directory = path.parent / "dir"
    directory.mkdir()
    os.chown(directory, -1, SOMEBODY + 1)
    os.chmod(directory, 0o2777)
    (directory / "file").touch()
    (directory / "sub").mkdir()
    assert (directory / "file").stat().st_gid == SOMEBODY + 1
    assert (directory / "sub").stat().st_gid == SOMEBODY + 1
    assert (directory / "sub").stat().st_mode & 0o2000


def test_statfs_tells_the_truth(mounted: Mounted) -> None:
    before = os.statvfs(mounted.mountpoint)
    assert before.f_bsize == before.f_frsize == 4096
    assert before.f_namemax == 255
    (mounted.mountpoint / "file").write_bytes(os.urandom(8 << 20))
    after = os.statvfs(mounted.mountpoint)
    assert 2048 <= before.f_bfree - after.f_bfree <= 2048 + 64
    assert after.f_blocks == before.f_blocks


def test_relatime_and_noatime(mounted: Mounted, mount_extfs: object) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(b"x" * 4096)
    os.utime(path, (1, path.stat().st_mtime))
    Path("/proc/sys/vm/drop_caches").write_text("1")
    path.read_bytes()
    assert path.stat().st_atime > 1
    os.utime(path, (1, path.stat().st_mtime))
    mounted.unmount()
    again = mount_extfs(mounted.device, "noatime")  # type: ignore[operator]
    path = again.mountpoint / "file"
    path.read_bytes()
    assert path.stat().st_atime == 1
