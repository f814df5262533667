"""Full disks, through the mount: ENOSPC, nothing else breaks, deleting always works.

What "the free space is what it was" means: to the block, after a remount, which trims what the
allocator keeps in hand.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ExtfsRunner, Mounted
from faults import MIB, SMALL, drop_caches, errno_of, wait_for

pytestmark = pytest.mark.fuse

BLOCK = 4096


@pytest.fixture
def small(
    make_image: Callable[..., Path], extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> Mounted:
    """A filesystem of 64 MiB that has been mounted before."""
    image = make_image(SMALL)
    extfs("mkfs", image)
    return mount_extfs(image)


def free_blocks(root: Path) -> int:
    return os.statvfs(root).f_bfree


def write_all(path: Path, content: bytes) -> int:
    """Write a new file until it is whole or ENOSPC; returns how much of it was acknowledged."""
    written = 0
    with open(path, "wb", buffering=0) as file:
        while written < len(content):
            try:
                count = file.write(content[written:])
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
            assert count > 0
            written += count
    return written


def pattern(number: int, size: int) -> bytes:
    return (b"file %7d\n" % number * (size // 13 + 1))[:size]


def fill_with_files(root: Path, size: int) -> dict[Path, int]:
    """Files of `size` bytes until nothing more goes in; paths and the bytes that each holds."""
    files: dict[Path, int] = {}
    for number in itertools.count():
        path = root / f"fill-{number}"
        try:
            files[path] = write_all(path, pattern(number, size))
        except OSError as error:  # no room for the name
            if error.errno != errno.ENOSPC:
                raise
            return files
        if files[path] < size:
            return files
    raise AssertionError


def check_files(files: dict[Path, int]) -> None:
    for number, (path, written) in enumerate(files.items()):
        content = path.read_bytes()
        assert content[:written] == pattern(number, written), path
        assert not content[written:].strip(b"\0"), path


def wait_for_free(root: Path, wanted: int) -> None:
    wait_for(lambda: free_blocks(root) >= wanted, f"{wanted} blocks free, not {free_blocks(root)}")


def remounted(mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]) -> Mounted:
    """Unmount, fsck (clean), mount again at the same place."""
    mounted.unmount()
    result = extfs("fsck", mounted.device, check=False)
    assert result.returncode == 0, result.stdout
    return mount_extfs(mounted.device, mountpoint=mounted.mountpoint)


@pytest.mark.parametrize("size", [5 * MIB, 300_000, pytest.param(5000, marks=pytest.mark.slow)])
def test_fill_with_data_and_delete(
    small: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted], size: int
) -> None:
    root = small.mountpoint
    (root / "first").write_bytes(b"was there before")
    os.sync()
    wait_for(lambda: free_blocks(root) > 0, "space")
    before = free_blocks(root)
    files = fill_with_files(root, size)
    total = sum(files.values())
    blocks = sum(-(-written // BLOCK) for written in files.values())
    assert blocks > 0.9 * before, (blocks, before)
    # Every file is whole, now and after a remount.
    check_files(files)
    assert (root / "first").read_bytes() == b"was there before"
    small = remounted(small, extfs, mount_extfs)
    check_files(files)
    # Deleting works, all of it, and gives all of it back.
    for path in files:
        path.unlink()
    wait_for_free(root, before - 64)
    small = remounted(small, extfs, mount_extfs)
    assert os.listdir(root) == ["first"]
    assert free_blocks(root) >= before - 1
    # And the disk can be filled as far as the first time.
    again = fill_with_files(root, size)
    assert abs(sum(again.values()) - total) <= max(size, total // 50)


def test_everything_comes_back_to_the_block(
    small: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    """Free space and inodes after mkfs, a full disk, and everything deleted: the same."""
    root = small.mountpoint
    small = remounted(small, extfs, mount_extfs)
    before = os.statvfs(root)
    fill_with_files(root, MIB)
    (root / "fill-1").unlink()
    with contextlib.suppress(OSError):
        for number in range(2000):
            (root / f"dir-{number}").mkdir()
            os.setxattr(root / f"dir-{number}", "user.x", b"x" * 3000)
    for path in root.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    small = remounted(small, extfs, mount_extfs)
    after = os.statvfs(root)
    assert after.f_bfree == before.f_bfree
    # Less what is set aside for nodes of the trees of free space, up to 64 in a group.
    assert abs(after.f_bavail - before.f_bavail) <= 128
    assert after.f_files - after.f_ffree == before.f_files - before.f_ffree


def fill_with_metadata(root: Path) -> int:
    """Long names, then attributes, until each gives ENOSPC; returns how many names there are."""
    directory = root / "names"
    directory.mkdir()
    for number in itertools.count():
        name = f"{number:07}".ljust(255, "n")
        code = errno_of(lambda name=name: os.mknod(directory / name))
        if code:
            assert code == errno.ENOSPC
            return number
    raise AssertionError


@pytest.mark.slow
def test_fill_with_metadata_and_delete(
    small: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    root = small.mountpoint
    (root / "ballast").write_bytes(b"")
    before = free_blocks(root)
    with open(root / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, (before - 1500) * BLOCK)
    count = fill_with_metadata(root)
    assert count > 5000
    attributes = 0
    for number in itertools.count():
        code = errno_of(
            lambda number=number: os.setxattr(root / "names", f"user.{number}", b"v" * 20000)
        )
        if code:
            assert code == errno.ENOSPC
            attributes = number
            break
    drop_caches()
    assert len(os.listdir(root / "names")) == count
    assert len(os.listxattr(root / "names")) == attributes
    small = remounted(small, extfs, mount_extfs)
    assert len(os.listdir(root / "names")) == count
    # Names go one by one although there is no room.
    for name in os.listdir(root / "names"):
        os.unlink(root / "names" / name)
    os.rmdir(root / "names")
    os.unlink(root / "ballast")
    small = remounted(small, extfs, mount_extfs)
    assert free_blocks(root) >= before - 1
    (root / "fits").write_bytes(bytes(50 * MIB))


@pytest.fixture
def full(small: Mounted) -> tuple[Mounted, dict[Path, int]]:
    """Full to the last block that a write of one block can get."""
    root = small.mountpoint
    (root / "old").write_bytes(pattern(0, MIB))
    (root / "directory").mkdir()
    os.setxattr(root / "old", "user.x", b"value")
    files = fill_with_files(root, 4 * MIB)
    with open(root / "last", "wb", buffering=0) as file:
        for _ in range(100_000):
            if errno_of(lambda: file.write(b"l" * BLOCK)):
                break
    files |= {root / "last": (root / "last").stat().st_size}
    return small, files


def test_overwriting_works_when_full(full: tuple[Mounted, dict[Path, int]]) -> None:
    root = full[0].mountpoint
    with open(root / "old", "r+b", buffering=0) as file:
        for offset in (0, 4096, 12345, MIB - 100):
            assert os.pwrite(file.fileno(), b"changed", offset) == 7
        os.fsync(file.fileno())
        assert errno_of(lambda: os.pwrite(file.fileno(), bytes(MIB), 100 * MIB)) == errno.ENOSPC
        os.fsync(file.fileno())  # the failed write does not stick to the file
    with open(root / "old", "r+b") as file, mmap.mmap(file.fileno(), MIB) as memory:
        memory[5000:5006] = b"mapped"
        memory.flush()
    drop_caches()
    content = (root / "old").read_bytes()
    expected = bytearray(pattern(0, MIB))
    for offset in (0, 4096, 12345, MIB - 100):
        expected[offset : offset + 7] = b"changed"
    expected[5000:5006] = b"mapped"
    assert content[:MIB] == expected
    assert (root / "old").stat().st_size >= MIB


def test_other_operations_when_full(full: tuple[Mounted, dict[Path, int]]) -> None:
    """Each works, or fails with ENOSPC and changes nothing."""
    root = full[0].mountpoint
    old = root / "old"
    for call in (
        lambda: os.rename(old, root / "renamed"),
        lambda: os.rename(root / "renamed", root / "directory" / "moved"),
        lambda: os.rename(root / "directory" / "moved", old),
    ):
        assert errno_of(call) in (0, errno.ENOSPC)
    where = [p for p in (old, root / "renamed", root / "directory" / "moved") if p.exists()]
    assert len(where) == 1
    assert where[0].read_bytes() == pattern(0, MIB)
    assert errno_of(lambda: os.truncate(where[0], MIB // 2 + 17)) == 0
    assert where[0].read_bytes() == pattern(0, MIB)[: MIB // 2 + 17]
    assert errno_of(lambda: os.chmod(where[0], 0o600)) == 0
    assert errno_of(lambda: os.utime(where[0], (1, 1))) == 0
    assert errno_of(lambda: os.removexattr(where[0], "user.x")) == 0
    assert errno_of(lambda: (root / "directory").rmdir()) in (0, errno.ENOTEMPTY)
    for make in (
        lambda: (root / "new").mkdir(),
        lambda: os.symlink("target", root / "link"),
        lambda: os.link(root / "last", root / "second name"),
        lambda: os.setxattr(root / "last", "user.big", b"b" * 60000),
    ):
        assert errno_of(make) in (0, errno.ENOSPC)


def test_space_that_is_nearly_there(full: tuple[Mounted, dict[Path, int]]) -> None:
    """A large write into little space is a short write or ENOSPC, and what it says is true."""
    mounted, files = full
    root = mounted.mountpoint
    victim = next(iter(files))
    free = free_blocks(root)
    os.truncate(victim, 4 * MIB - 40 * BLOCK)
    wait_for_free(root, free + 40)
    big = os.open(root / "big", os.O_CREAT | os.O_RDWR)
    try:
        written, block = 0, b"b" * (400 * BLOCK)
        with contextlib.suppress(OSError):
            while written < len(block):
                written += os.pwrite(big, block[written:], written)
        assert written < len(block)
        assert os.fstat(big).st_size >= written
        content = os.pread(big, len(block), 0)
        assert content[:written] == block[:written]
        assert not content[written:].strip(b"b\0")
        os.fsync(big)
    finally:
        os.close(big)
    # fallocate: all of it or nothing.
    os.truncate(root / "big", 0)
    os.sync()
    with open(root / "big", "r+b") as file:
        code = errno_of(lambda: os.posix_fallocate(file.fileno(), 0, 10 * MIB))
        assert code == errno.ENOSPC
        assert os.fstat(file.fileno()).st_size == 0


def test_mapped_writes_into_holes_when_full(full: tuple[Mounted, dict[Path, int]]) -> None:
    """There is no room for a dirty page: msync says so, others are unharmed."""
    root = full[0].mountpoint
    with open(root / "last", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        os.truncate(file.fileno(), size + 64 * BLOCK)
        with mmap.mmap(file.fileno(), size + 64 * BLOCK) as memory:
            memory[-32 * BLOCK :] = b"m" * 32 * BLOCK
            code = errno_of(memory.flush) or errno_of(lambda: os.fsync(file.fileno()))
        assert code in (0, errno.ENOSPC, errno.EIO)
        if not code:
            drop_caches()
            assert (root / "last").read_bytes()[-32 * BLOCK :] == b"m" * 32 * BLOCK
    assert (root / "old").read_bytes() == pattern(0, MIB)


def test_copies_share_when_full(full: tuple[Mounted, dict[Path, int]]) -> None:
    """A clone needs no data blocks; writing to it does, and fails without harm to the source."""
    root = full[0].mountpoint
    with open(root / "old", "rb") as source, open(root / "last", "r+b") as target:
        code = errno_of(lambda: os.copy_file_range(source.fileno(), target.fileno(), MIB, 0, 0))
        assert code in (0, errno.ENOSPC)
    os.sync()
    with open(root / "last", "r+b", buffering=0) as file:
        for offset in range(0, MIB, 16 * BLOCK):
            assert errno_of(lambda o=offset: os.pwrite(file.fileno(), b"w", o)) in (
                0,
                errno.ENOSPC,
            )
    assert (root / "old").read_bytes() == pattern(0, MIB)


def test_unlink_while_open_when_full(full: tuple[Mounted, dict[Path, int]]) -> None:
    mounted, files = full
    root = mounted.mountpoint
    victim = next(iter(files))
    free = free_blocks(root)
    with open(victim, "rb") as file:
        victim.unlink()
        assert file.read() == pattern(0, 4 * MIB)
    wait_for_free(root, free + 4 * MIB // BLOCK - 8)


def test_a_full_disk_survives_a_kill(
    full: tuple[Mounted, dict[Path, int]],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    """What replay and freeing after it need is there even when nothing is free."""
    mounted, files = full
    root = mounted.mountpoint
    names = [path for path in files if path.name != "last"]
    held = open(names[0], "rb")  # noqa: SIM115 # an orphan at the time of the kill
    names[0].unlink()
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    mounted.kill()
    with contextlib.suppress(OSError):
        held.close()
    mounted.force_off()
    again = mount_extfs(mounted.device, mountpoint=root)
    wait_for_free(root, 4 * MIB // BLOCK - 64)
    for number, path in enumerate(files):
        if path in names[1:]:
            assert path.read_bytes()[: files[path]] == pattern(number, files[path])
    assert not names[0].exists()
    shutil.rmtree(root / "directory")
    remounted(again, extfs, mount_extfs)


def test_small_files_while_another_deletes(small: Mounted) -> None:
    """On a disk that stays full: each write is whole, or says ENOSPC."""
    root = small.mountpoint
    fill_with_files(root, 8 * MIB)
    kept: dict[Path, bytes] = {}
    end = time.monotonic() + 3
    for number in itertools.count():
        if time.monotonic() > end:
            break
        path = root / f"small-{number}"
        content = pattern(number, 1 + number * 7919 % 200_000)
        try:
            if write_all(path, content) == len(content):
                kept[path] = content
                continue
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        path.unlink(missing_ok=True)
        victim = next(iter(kept), None) or next(root.glob("fill-*"), None)
        if victim is not None:
            kept.pop(victim, None)
            victim.unlink()
    assert len(kept) > 10
    for path, content in kept.items():
        assert path.read_bytes() == content


def test_names_find_the_space_of_what_was_just_removed(small: Mounted) -> None:
    """Blocks are freed after unlink(2) has returned; a mkdir that needs them now waits for it."""
    root = small.mountpoint
    with open(root / "big", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * MIB)
    with open(root / "filler", "wb") as file:
        at = 0
        for size in (MIB, BLOCK):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), at, size)
                    at += size
    names = (root / f"{'before':>200}{number}" for number in itertools.count())
    assert any(errno_of(name.mkdir) == errno.ENOSPC for name in names)
    (root / "big").unlink()
    for number in range(200):
        (root / f"{'after':>200}{number}").mkdir()
