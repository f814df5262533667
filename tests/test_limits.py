"""How large things may be, through the mount: files, names, directories, attributes, devices."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ExtfsRunner, Mounted
from faults import MIB, drop_caches, errno_of, wait_for

from extfs.cli.mapping import mounted_map

pytestmark = pytest.mark.fuse

BLOCK = 4096
LARGEST = (1 << 63) - 1
TIB = 1 << 40


def remounted(mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]) -> Mounted:
    """Unmount, fsck (clean), mount again at the same place."""
    mounted.unmount()
    result = extfs("fsck", mounted.device, check=False, timeout=300)
    assert result.returncode == 0, result.stdout
    return mount_extfs(mounted.device, mountpoint=mounted.mountpoint)


# ---- files -------------------------------------------------------------------------------------


def test_the_largest_file(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    path = mounted.mountpoint / "file"
    end = (1 << 63) - 1 - 4096
    free = os.statvfs(mounted.mountpoint).f_bfree
    with open(path, "w+b", buffering=0) as file:
        fd = file.fileno()
        assert os.pwrite(fd, b"near the end", end) == 12
        assert os.fstat(fd).st_size == end + 12
        assert os.pwrite(fd, b"E", LARGEST - 1) == 1
        assert os.fstat(fd).st_size == LARGEST
        assert os.pwrite(fd, b"middle", 1 << 62) == 6
        assert os.pread(fd, 100, end) == b"near the end" + bytes(88)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 62
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert os.lseek(fd, (1 << 62) + BLOCK, os.SEEK_DATA) == end & ~(BLOCK - 1)
        assert os.lseek(fd, LARGEST - 1, os.SEEK_HOLE) == LARGEST
        assert os.fstat(fd).st_blocks <= 5 * 8
        # Beyond: an error or a short write, never a wrapped one.
        assert errno_of(lambda: os.pwrite(fd, b"beyond", LARGEST)) in (errno.EFBIG, errno.EINVAL)
        assert errno_of(lambda: os.posix_fallocate(fd, LARGEST - 10, 100)) == errno.EFBIG
        os.fsync(fd)
    assert os.statvfs(mounted.mountpoint).f_bfree >= free - 64
    mounted = remounted(mounted, extfs, mount_extfs)
    with open(path, "r+b", buffering=0) as file:
        fd = file.fileno()
        assert os.fstat(fd).st_size == LARGEST
        assert os.pread(fd, 6, 1 << 62) == b"middle"
        os.truncate(fd, (1 << 62) + 3)
        os.truncate(fd, LARGEST)
        assert os.pread(fd, 6, 1 << 62) == b"mid" + bytes(3)
        assert os.pread(fd, 100, end) == bytes(100)
        assert os.lseek(fd, (1 << 62) + BLOCK, os.SEEK_HOLE) == (1 << 62) + BLOCK
        assert errno_of(lambda: os.lseek(fd, (1 << 62) + BLOCK, os.SEEK_DATA)) == errno.ENXIO
    path.unlink()
    mounted = remounted(mounted, extfs, mount_extfs)
    assert os.statvfs(mounted.mountpoint).f_bfree >= free - 64


def test_appending_at_the_end_of_the_largest_file(mounted: Mounted) -> None:
    path = mounted.mountpoint / "file"
    path.touch()
    os.truncate(path, LARGEST - 5)
    with open(path, "ab", buffering=0) as file:
        written = 0
        code = 0
        while not code and written < 20:
            try:
                written += file.write(b"0123456789"[written:] or b"x")
            except OSError as error:
                code = error.errno or -1
    assert code in (errno.EFBIG, errno.EINVAL)
    assert path.stat().st_size == LARGEST - 5 + written
    assert written <= 5


def fragmented(path: Path, count: int, written: int) -> None:
    """Every second block of a file: `count` extents, the first `written` of them with content."""
    with open(path, "wb", buffering=0) as file:
        for number in range(written):
            os.pwrite(file.fileno(), number.to_bytes(8, "little"), number * 2 * BLOCK)
        for number in range(written, count):
            os.posix_fallocate(file.fileno(), number * 2 * BLOCK, BLOCK)
        os.fsync(file.fileno())


SLOW_EXTENTS = [
    pytest.param(10**n, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for n in (5, 6)
]


@pytest.mark.parametrize("count", [20_000, *SLOW_EXTENTS])
def test_many_extents(
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    count: int,
) -> None:
    image = make_image(6 << 30)
    extfs("mkfs", image)
    mounted = mount_extfs(image)
    path = mounted.mountpoint / "file"
    (mounted.mountpoint / "other").write_bytes(b"other")
    mounted = remounted(mounted, extfs, mount_extfs)
    free = os.statvfs(mounted.mountpoint).f_bfree
    written = min(count, 50_000)
    begin = time.monotonic()
    fragmented(path, count, written)
    made = time.monotonic() - begin
    _size, extents = mounted_map(str(path))
    assert len(extents) == count
    assert [extent.offset for extent in extents] == [n * 2 * BLOCK for n in range(count)]
    mounted = remounted(mounted, extfs, mount_extfs)
    with open(path, "r+b", buffering=0) as file:
        for number in range(0, written, 97):
            content = os.pread(file.fileno(), BLOCK, number * 2 * BLOCK)
            assert content == number.to_bytes(8, "little").ljust(BLOCK, b"\0")
        # Truncating and unlinking it: more than one transaction can hold.
        os.truncate(file.fileno(), count * BLOCK)
        assert os.fstat(file.fileno()).st_blocks == count // 2 * 8
    begin = time.monotonic()
    path.unlink()
    took = time.monotonic() - begin
    wait_for(lambda: os.statvfs(mounted.mountpoint).f_bfree >= free - 16, "all blocks free", 60)
    freed = time.monotonic() - begin
    print(f"{count} extents: made in {made:.1f} s, unlink {took:.3f} s, freed in {freed:.1f} s")
    mounted = remounted(mounted, extfs, mount_extfs)
    assert os.statvfs(mounted.mountpoint).f_bfree == free


# ---- names -------------------------------------------------------------------------------------


def test_longest_names(mounted: Mounted) -> None:
    """255 bytes of any kind for every call that makes or takes a name; not 256."""
    root = os.fsencode(mounted.mountpoint)
    for fill in (b"n", b"\xff", "ü".encode()[:1], b"\n", b"\\", b" "):
        long, longer = root + b"/" + fill * 255, root + b"/" + fill * 256
        os.mkdir(long)
        os.rename(long, long[:-1] + b"#")
        os.rmdir(long[:-1] + b"#")
        os.symlink(b"target", long)
        os.unlink(long)
        os.mkfifo(long)
        os.link(long, long[:-1] + b"#")
        assert sorted(os.listdir(root)) == sorted([fill * 255, fill * 254 + b"#"])
        os.unlink(long[:-1] + b"#")
        calls: list[Callable[[], object]] = [
            lambda longer=longer: os.mkdir(longer),
            lambda longer=longer: os.stat(longer),
            lambda longer=longer: os.symlink(b"x", longer),
            lambda longer=longer: os.close(os.open(longer, os.O_CREAT)),
            lambda longer=longer, long=long: os.rename(long, longer),
            lambda longer=longer, long=long: os.link(long, longer),
            lambda longer=longer: os.unlink(longer),
        ]
        assert [errno_of(call) for call in calls] == [errno.ENAMETOOLONG] * len(calls)
        os.unlink(long)
    assert os.listdir(root) == []


def test_deep_paths(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """A thousand levels, far beyond PATH_MAX."""
    name = "a rather long name of a directory".ljust(100, "x")
    depth = 1000
    fd = os.open(mounted.mountpoint, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    leaf = os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.write(leaf, b"deep")
    os.close(leaf)
    os.close(fd)
    mounted = remounted(mounted, extfs, mount_extfs)
    found = subprocess.run(
        ["find", ".", "-name", "leaf", "-printf", "%d %s\n"],
        cwd=mounted.mountpoint,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout == f"{depth + 1} 4\n"
    subprocess.run(["rm", "-r", name], cwd=mounted.mountpoint, check=True)
    assert os.listdir(mounted.mountpoint) == []


def test_hard_link_counts(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    count = 5000
    path = mounted.mountpoint / "file"
    path.write_bytes(b"content")
    directory = mounted.mountpoint / "links"
    directory.mkdir()
    for number in range(count):
        os.link(path, directory / str(number))
    assert path.stat().st_nlink == count + 1
    mounted = remounted(mounted, extfs, mount_extfs)
    assert path.stat().st_nlink == count + 1
    for number in range(0, count, 2):
        os.unlink(directory / str(number))
    os.unlink(path)
    assert (directory / "1").stat().st_nlink == count // 2
    assert (directory / "1").read_bytes() == b"content"


def test_subdirectories_count_as_links(mounted: Mounted) -> None:
    for number in range(3000):
        (mounted.mountpoint / f"d{number}").mkdir()
    assert mounted.mountpoint.stat().st_nlink == 3002
    for number in range(3000):
        (mounted.mountpoint / f"d{number}").rmdir()
    assert mounted.mountpoint.stat().st_nlink == 2


# ---- directories -------------------------------------------------------------------------------


def large_directory(
    image: Path, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted], count: int
) -> None:
    """`count` names that stay, listed while others come and go."""
    extfs("mkfs", image)
    mounted = mount_extfs(image)
    directory = mounted.mountpoint / "dir"
    directory.mkdir()
    begin = time.monotonic()
    fd = os.open(directory, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"stay-{number}", dir_fd=fd)
    made = time.monotonic() - begin
    stop = threading.Event()
    failed: list[BaseException] = []

    def churn() -> None:
        try:
            for number in itertools.count():
                if stop.is_set():
                    return
                os.mknod(f"go-{number}", dir_fd=fd)
                if number >= 50:
                    os.unlink(f"go-{number - 50}", dir_fd=fd)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=churn)
    other.start()
    try:
        begin = time.monotonic()
        for _ in range(2):
            names = os.listdir(directory)
            stayed = [name for name in names if name.startswith("stay-")]
            assert len(stayed) == count
            assert len(set(stayed)) == count
            assert len(set(names)) == len(names)
        listed = (time.monotonic() - begin) / 2
    finally:
        stop.set()
        other.join()
    assert not failed, failed
    os.close(fd)
    drop_caches()
    assert all((directory / f"stay-{number}").exists() for number in range(0, count, count // 200))
    assert not (directory / f"stay-{count}").exists()
    mounted = remounted(mounted, extfs, mount_extfs)
    begin = time.monotonic()
    assert errno_of(directory.rmdir) == errno.ENOTEMPTY
    for name in os.listdir(directory):
        os.unlink(directory / name)
    gone = time.monotonic() - begin
    directory.rmdir()
    print(
        f"{count} entries: made in {made:.1f} s, listed in {listed:.2f} s, removed in {gone:.1f} s"
    )
    remounted(mounted, extfs, mount_extfs)


def test_large_directories(
    make_image: Callable[..., Path], extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    large_directory(make_image(), extfs, mount_extfs, 10_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [10**5, 10**6])
def test_larger_directories(
    make_image: Callable[..., Path],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    count: int,
) -> None:
    large_directory(make_image(4 << 30), extfs, mount_extfs, count)


def test_offsets_of_a_listing_stay_valid(mounted: Mounted) -> None:
    """seekdir to any entry goes on behind it, although others came and went."""
    directory = mounted.mountpoint / "dir"
    directory.mkdir()
    for number in range(2000):
        os.mknod(directory / f"stay-{number}")
        os.mknod(directory / f"go-{number}")
    script = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("len", ctypes.c_uint16),
                ("type", ctypes.c_uint8), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Dirent)
libc.readdir.argtypes = libc.rewinddir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
libc.telldir.restype = ctypes.c_long
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
path = os.fsencode(sys.argv[1])
stream = libc.opendir(path)
order = []
while entry := libc.readdir(stream):
    order.append((entry.contents.name, libc.telldir(stream)))
for number in range(2000):
    os.unlink(path + b"/go-%d" % number)
    os.mknod(path + b"/new-%d" % number)
stay = [(name, off) for name, off in order if name.startswith(b"stay-")]
assert len(stay) == 2000
for at in range(0, 1999, 61):
    libc.seekdir(stream, stay[at][1])
    while True:
        name = libc.readdir(stream).contents.name
        if name.startswith(b"stay-"):
            break
    assert name == stay[at + 1][0], (name, stay[at + 1])
print("good")
"""
    said = subprocess.run(
        ["python3", "-c", script, directory], capture_output=True, text=True, check=False
    )
    assert said.stdout == "good\n", said.stderr


# ---- attributes --------------------------------------------------------------------------------


def test_attributes_of_every_size(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    path = mounted.mountpoint / "file"
    path.touch()
    sizes = [0, 1, 1000, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 5000, 30000, 65535, 65536]
    values = {f"user.size-{size}": os.urandom(size) for size in sizes}
    for name, value in values.items():
        os.setxattr(path, name, value)
    assert errno_of(lambda: os.setxattr(path, "user.large", bytes(65537))) == errno.E2BIG
    long = "user." + "n" * 250
    os.setxattr(path, long, b"long name")
    assert errno_of(lambda: os.setxattr(path, long + "n", b"")) == errno.ERANGE
    mounted = remounted(mounted, extfs, mount_extfs)
    assert sorted(os.listxattr(path)) == sorted([*values, long])
    for name, value in values.items():
        assert os.getxattr(path, name) == value, name
    # From large to small and back, in place.
    for size in (65536, 1, 40000, 0, 1024):
        os.setxattr(path, "user.size-4096", b"r" * size)
        assert os.getxattr(path, "user.size-4096") == b"r" * size
    for name in [*values, long]:
        os.removexattr(path, name)
    assert os.listxattr(path) == []


def test_many_attributes(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """More names than listxattr can return are refused by it, not forgotten."""
    path = mounted.mountpoint / "file"
    path.touch()
    for number in range(1000):
        os.setxattr(path, f"user.attribute-{number}", b"%d" % number)
    mounted = remounted(mounted, extfs, mount_extfs)
    assert len(os.listxattr(path)) == 1000
    assert os.getxattr(path, "user.attribute-777") == b"777"
    for number in range(1000, 6000):
        os.setxattr(path, f"user.attribute-{number}", b"%d" % number)
    assert errno_of(lambda: os.listxattr(path)) == errno.E2BIG
    assert os.getxattr(path, "user.attribute-5999") == b"5999"
    path.unlink()
    remounted(mounted, extfs, mount_extfs)


# ---- devices -----------------------------------------------------------------------------------


def test_a_sparse_device_of_16_tib(
    make_image: Callable[..., Path], extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    image = make_image(16 * TIB)
    begin = time.monotonic()
    extfs("mkfs", image)
    formatted = time.monotonic() - begin
    used = image.stat().st_blocks * 512
    assert used < 4 * MIB, f"mkfs wrote {used} bytes"
    begin = time.monotonic()
    mounted = mount_extfs(image)
    took = time.monotonic() - begin
    space = os.statvfs(mounted.mountpoint)
    assert space.f_blocks * space.f_frsize == 16 * TIB
    assert space.f_bfree > 0.999 * space.f_blocks
    path = mounted.mountpoint / "file"
    with open(path, "w+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 15 * TIB)
        os.pwrite(file.fileno(), b"far", 14 * TIB)
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 == 15 * TIB
        assert os.pread(file.fileno(), 3, 14 * TIB) == b"far"
    code = errno_of(lambda: fallocate(mounted.mountpoint / "more", 2 * TIB))
    assert code == errno.ENOSPC
    mounted = remounted(mounted, extfs, mount_extfs)
    path.unlink()
    wait_for(lambda: os.statvfs(mounted.mountpoint).f_bfree > 0.999 * space.f_blocks, "freed", 60)
    remounted(mounted, extfs, mount_extfs)
    print(
        f"16 TiB: formatted in {formatted:.2f} s, mounted in {took:.2f} s; the image takes "
        f"{used >> 10} KiB after mkfs, {image.stat().st_blocks >> 1} KiB at the end"
    )


def fallocate(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
