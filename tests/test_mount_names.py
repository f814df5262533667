"""Names on the mount: creating, looking up, listing, renaming, linking, removing, forgetting."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Mounted

pytestmark = pytest.mark.fuse

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def rename2(old: Path, new: Path, flags: int) -> None:
    at = -100  # AT_FDCWD
    if _libc.renameat2(at, os.fsencode(old), at, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def counters(mounted: Mounted) -> dict[str, Any]:
    """What the daemon logs at SIGUSR1."""
    before = len(mounted.log.read_text())
    mounted.daemon.send_signal(signal.SIGUSR1)
    for _ in range(200):
        found = re.search(r"counters: (\{.*\})\n", mounted.log.read_text()[before:])
        if found:
            result: dict[str, Any] = json.loads(found[1])
            return result
        time.sleep(0.02)
    raise AssertionError("no counters in the log")


def test_the_kernel_forgets_every_lookup(mounted: Mounted) -> None:
    """Every entry that the kernel was told of is counted, and uncounted when it drops it."""
    root = mounted.mountpoint
    for directory in range(4):
        (root / f"d{directory}").mkdir()
        for number in range(60):
            (root / f"d{directory}" / f"f{number}").write_bytes(b"x")
        os.symlink("f0", root / f"d{directory}" / "symlink")
        os.link(root / f"d{directory}" / "f0", root / f"d{directory}" / "hard")
        os.mkfifo(root / f"d{directory}" / "fifo")
        os.rename(root / f"d{directory}" / "f1", root / f"d{directory}" / "renamed")
        os.unlink(root / f"d{directory}" / "f2")
    subprocess.run(["ls", "-lR", root], check=True, capture_output=True)
    assert counters(mounted)["core"]["lookups"] >= 240
    left = -1
    for _ in range(50):
        Path("/proc/sys/vm/drop_caches").write_text("2")
        left = counters(mounted)["core"]["lookups"]
        if left == 0:
            break
        time.sleep(0.1)
    assert left == 0
    assert sorted(os.listdir(root)) == ["d0", "d1", "d2", "d3"]


def test_names_of_any_bytes(mounted: Mounted) -> None:
    root = os.fsencode(mounted.mountpoint)
    names = [bytes([b]) * 255 for b in (1, 10, 32, 127, 128, 255)]
    names += [b"\xff\xfe", b" ", b"...", b"a\nb", "ü".encode()]
    for name in names:
        os.close(os.open(root + b"/" + name, os.O_CREAT | os.O_EXCL))
    assert sorted(os.listdir(root)) == sorted(names)
    with pytest.raises(OSError) as error:
        os.stat(root + b"/" + b"a" * 256)
    assert error.value.errno == errno.ENAMETOOLONG


def test_create_respects_exclusive_and_umask(mounted: Mounted) -> None:
    path = mounted.mountpoint / "file"
    old = os.umask(0o027)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o777))
        os.mkdir(mounted.mountpoint / "dir", 0o777)
        os.mknod(mounted.mountpoint / "node", 0o666 | stat.S_IFREG)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((mounted.mountpoint / n).stat().st_mode) for n in ("file", "dir", "node")]
    assert modes == [0o750, 0o750, 0o640]
    with pytest.raises(FileExistsError):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def test_special_files(mounted: Mounted) -> None:
    device = mounted.mountpoint / "null"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(mounted.mountpoint / "big", 0o600 | stat.S_IFBLK, os.makedev(4000, 700_000))
    assert device.stat().st_rdev == os.makedev(1, 3)
    assert (mounted.mountpoint / "big").stat().st_rdev == os.makedev(4000, 700_000)
    device.write_bytes(b"swallowed")
    assert device.read_bytes() == b""


def test_birth_time(mounted: Mounted) -> None:
    before = int(time.time())
    path = mounted.mountpoint / "file"
    path.write_bytes(b"x")
    os.utime(path, (1, 1))
    said = subprocess.run(["stat", "-c", "%W %Y", path], check=True, capture_output=True, text=True)
    birth, modified = said.stdout.split()
    if birth in ("0", "-"):
        pytest.skip("this kernel does not ask FUSE for birth times")
    assert before <= int(birth) <= time.time()
    assert int(modified) == 1


def test_symlinks(mounted: Mounted) -> None:
    for length in (1, 59, 60, 61, 4095):
        link = mounted.mountpoint / f"link{length}"
        os.symlink("t" * length, link)
        assert os.readlink(link) == "t" * length
        assert os.lstat(link).st_size == length
    with pytest.raises(OSError) as error:
        os.symlink("t" * 4096, mounted.mountpoint / "long")
    assert error.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileExistsError):
        os.symlink("x", mounted.mountpoint / "link1")


def test_hard_links(mounted: Mounted) -> None:
    one, two = mounted.mountpoint / "one", mounted.mountpoint / "two"
    one.write_bytes(b"content")
    os.link(one, two)
    assert one.stat().st_ino == two.stat().st_ino
    assert one.stat().st_nlink == 2
    os.unlink(one)
    assert two.stat().st_nlink == 1
    assert two.read_bytes() == b"content"
    (mounted.mountpoint / "dir").mkdir()
    with pytest.raises(PermissionError):
        os.link(mounted.mountpoint / "dir", mounted.mountpoint / "dir2")


def test_rename_flags(mounted: Mounted) -> None:
    one, two, three = (mounted.mountpoint / n for n in ("one", "two", "three"))
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    with pytest.raises(FileExistsError):
        rename2(one, two, RENAME_NOREPLACE)
    rename2(one, three, RENAME_NOREPLACE)
    assert not one.exists()
    rename2(two, three, RENAME_EXCHANGE)
    assert (two.read_bytes(), three.read_bytes()) == (b"1", b"2")
    with pytest.raises(FileNotFoundError):
        rename2(two, one, RENAME_EXCHANGE)
    with pytest.raises(OSError) as error:
        rename2(two, one, RENAME_WHITEOUT)
    assert error.value.errno == errno.EINVAL
    os.rename(two, three)
    assert three.read_bytes() == b"1"
    assert sorted(os.listdir(mounted.mountpoint)) == ["three"]


def test_rename_of_directories(mounted: Mounted) -> None:
    root = mounted.mountpoint
    (root / "a" / "b").mkdir(parents=True)
    (root / "c").mkdir()
    with pytest.raises(OSError) as error:
        os.rename(root / "a", root / "a" / "b" / "x")
    assert error.value.errno == errno.EINVAL
    os.rename(root / "a" / "b", root / "c" / "b")
    assert (root / "a").stat().st_nlink == 2
    assert (root / "c").stat().st_nlink == 3
    assert os.stat(root / "c" / "b" / "..").st_ino == (root / "c").stat().st_ino
    with pytest.raises(OSError) as error:
        os.rmdir(root / "c")
    assert error.value.errno == errno.ENOTEMPTY


def test_tmpfile_gets_a_name(mounted: Mounted) -> None:
    try:
        fd = os.open(mounted.mountpoint, os.O_TMPFILE | os.O_RDWR, 0o640)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this kernel does not pass O_TMPFILE to FUSE")
    os.write(fd, b"unnamed")
    assert os.fstat(fd).st_nlink == 0
    source, target = f"/proc/self/fd/{fd}".encode(), os.fsencode(mounted.mountpoint / "named")
    assert not _libc.linkat(-100, source, -100, target, 0x400)  # AT_SYMLINK_FOLLOW
    os.close(fd)
    assert (mounted.mountpoint / "named").read_bytes() == b"unnamed"
    assert (mounted.mountpoint / "named").stat().st_nlink == 1
    fd = os.open(mounted.mountpoint, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"gone with its descriptor")
    os.close(fd)
    assert os.listdir(mounted.mountpoint) == ["named"]


def test_an_unlinked_open_file_lives_on(mounted: Mounted) -> None:
    path = mounted.mountpoint / "file"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    space = os.statvfs(mounted.mountpoint)
    with open(path, "r+b", buffering=0) as file:
        os.unlink(path)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert file.read(len(content)) == content
        file.write(b"more")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == len(content) + 4
        path.write_bytes(b"another")
        file.seek(0)
        assert file.read(4) == content[:4]
    for _ in range(100):
        if os.statvfs(mounted.mountpoint).f_bfree >= space.f_bfree + 700:
            break
        time.sleep(0.1)
    else:
        pytest.fail("its blocks did not come back")


def test_a_removed_directory_is_empty(mounted: Mounted) -> None:
    path = mounted.mountpoint / "dir"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    path.rmdir()
    assert os.listdir(fd) == []
    with pytest.raises(FileNotFoundError):
        os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(fd)


@pytest.mark.parametrize("with_attributes", [False, True])
def test_listing_while_entries_come_and_go(mounted: Mounted, with_attributes: bool) -> None:
    """Every name that stays is seen exactly once, whatever happens to the others meanwhile."""
    root = mounted.mountpoint / "dir"
    root.mkdir()
    stay = {f"stay-{n:04}" for n in range(2000)}
    go = [f"go-{n:04}" for n in range(2000)]
    for name in [*stay, *go]:
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY))
    seen: list[str] = []
    with os.scandir(root) as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if with_attributes:
                entry.stat(follow_symlinks=False) if entry.name in stay else None
            if position % 2 == 0 and go:
                os.unlink(root / go.pop())
            if position % 3 == 0:
                os.close(os.open(root / f"new-{position}", os.O_CREAT | os.O_WRONLY))
    stayed = [name for name in seen if name in stay]
    assert len(stayed) == len(stay)
    assert set(stayed) == stay
    assert len(seen) == len(set(seen))


def test_a_kept_listing_shows_every_change(mounted: Mounted) -> None:
    """The kernel keeps a listing from the second unchanged reading on; changes reach it even so."""
    root = mounted.mountpoint / "dir"
    root.mkdir()
    names = {f"file-{n:04}" for n in range(2000)}
    for name in names:
        (root / name).touch()

    def requests_of_a_listing() -> int:
        before = counters(mounted)["bridge"]["requests"]
        assert set(os.listdir(root)) == names
        return int(counters(mounted)["bridge"]["requests"]) - before

    first, filling, kept = [requests_of_a_listing() for _ in range(3)]
    assert first >= 4  # the entries and the end, between an OPENDIR and a RELEASEDIR
    assert filling >= 4
    assert kept < first
    for round_ in range(3):
        os.unlink(root / f"file-{round_:04}")
        os.rename(root / f"file-{round_ + 10:04}", root / f"renamed-{round_:04}")
        (root / f"new-{round_:04}").touch()
        names -= {f"file-{round_:04}", f"file-{round_ + 10:04}"}
        names |= {f"renamed-{round_:04}", f"new-{round_:04}"}
        for _ in range(3):
            assert set(os.listdir(root)) == names


def test_dot_and_dotdot(mounted: Mounted) -> None:
    inner = mounted.mountpoint / "outer" / "inner"
    inner.mkdir(parents=True)
    lines = subprocess.run(["ls", "-ai", inner], check=True, capture_output=True, text=True).stdout
    numbers = {line.split()[1]: int(line.split()[0]) for line in lines.splitlines()}
    assert numbers == {".": inner.stat().st_ino, "..": inner.parent.stat().st_ino}


def _drop_nameless_inodes(mountpoint: Path) -> None:
    """Have the kernel forget inodes that nothing refers to. A RELEASE that is not answered yet
    refers to its inode (fs/fuse/file.c, fuse_prepare_release), and a dentry that was used since
    the last look at it gets a second chance, so: when nothing is under way, twice."""
    minor = os.minor(mountpoint.stat().st_dev)
    waiting = Path(f"/sys/fs/fuse/connections/{minor}/waiting")
    for _ in range(2):
        deadline = time.monotonic() + 10
        while int(waiting.read_text()) and time.monotonic() < deadline:
            time.sleep(0.001)
        Path("/proc/sys/vm/drop_caches").write_text("2")


def test_file_handles_outlive_the_cache(mounted: Mounted) -> None:
    """name_to_handle_at and open_by_handle_at, which need lookups of the inode itself."""
    path = mounted.mountpoint / "dir" / "file"
    path.parent.mkdir()
    path.write_bytes(b"by handle")
    buffer = ctypes.create_string_buffer(8 + 128)
    ctypes.memmove(buffer, (128).to_bytes(4, "little"), 4)
    mount_id = ctypes.c_int()
    assert not _libc.name_to_handle_at(
        -100, os.fsencode(path), buffer, ctypes.byref(mount_id), 0
    ), os.strerror(ctypes.get_errno())
    _drop_nameless_inodes(mounted.mountpoint)
    mount_fd = os.open(mounted.mountpoint, os.O_RDONLY)
    try:
        fd = _libc.open_by_handle_at(mount_fd, buffer, os.O_RDONLY)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        assert os.read(fd, 100) == b"by handle"
        os.close(fd)
        os.unlink(path)
        for _ in range(20):  # other users of the machine may hold up the shrinker
            _drop_nameless_inodes(mounted.mountpoint)
            fd = _libc.open_by_handle_at(mount_fd, buffer, os.O_RDONLY)
            if fd < 0:
                break
            os.close(fd)
        assert fd == -1
        assert ctypes.get_errno() == errno.ESTALE
    finally:
        os.close(mount_fd)
