"""File contents on the mount: sparse, direct, mapped, appended, cut, shared, copied."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted

pytestmark = pytest.mark.fuse

BLOCK = 4096
MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("1")


@pytest.fixture
def path(mounted: Mounted) -> Path:
    return mounted.mountpoint / "file"


def test_what_was_written_is_read(path: Path) -> None:
    content = random.Random(1).randbytes(5 * MIB + 123)
    path.write_bytes(content)
    assert path.read_bytes() == content
    drop_caches()
    assert path.read_bytes() == content
    assert path.stat().st_size == len(content)
    assert path.stat().st_blocks * 512 >= len(content)


@pytest.mark.parametrize(("seed", "steps"), [(7, 60), pytest.param(8, 300, marks=pytest.mark.slow)])
def test_random_writes_agree_with_a_model(path: Path, seed: int, steps: int) -> None:
    """Buffered and direct writes, truncates and reads at random places against a bytearray."""
    rng = random.Random(seed)
    model = bytearray()
    buffered = os.open(path, os.O_RDWR | os.O_CREAT)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    aligned = mmap.mmap(-1, 64 * BLOCK)
    for _ in range(steps):
        kind = rng.random()
        if kind < 0.4:
            at, content = rng.randrange(MIB), rng.randbytes(rng.randrange(1, 20_000))
            os.pwrite(buffered, content, at)
        elif kind < 0.6:
            at, length = BLOCK * rng.randrange(256), BLOCK * rng.randrange(1, 64)
            content = rng.randbytes(length)
            aligned[:length] = content
            os.pwritev(direct, [memoryview(aligned)[:length]], at)
        elif kind < 0.7:
            size = rng.randrange(MIB)
            os.truncate(path, size)
            model[size:] = b""
            model.extend(bytes(size - len(model)))
            continue
        elif kind < 0.8:
            drop_caches()
            continue
        else:
            at, length = rng.randrange(MIB), rng.randrange(1, 50_000)
            assert os.pread(buffered, length, at) == bytes(model[at : at + length])
            continue
        model.extend(bytes(max(0, at + len(content) - len(model))))
        model[at : at + len(content)] = content
    assert path.read_bytes() == bytes(model)
    os.close(buffered)
    os.close(direct)


def test_sparse_files_and_seeking(path: Path) -> None:
    with open(path, "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * BLOCK, 10 * BLOCK)
        os.pwrite(file.fileno(), b"y", 100 * BLOCK)
        os.truncate(file.fileno(), 200 * BLOCK)
        fd = file.fileno()
        assert os.lseek(fd, 0, os.SEEK_DATA) == 10 * BLOCK
        assert os.lseek(fd, 10 * BLOCK, os.SEEK_HOLE) == 11 * BLOCK
        assert os.lseek(fd, 11 * BLOCK, os.SEEK_DATA) == 100 * BLOCK
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        with pytest.raises(OSError) as error:
            os.lseek(fd, 101 * BLOCK, os.SEEK_DATA)
        assert error.value.errno == errno.ENXIO
        assert os.fstat(fd).st_blocks * 512 == 2 * BLOCK
        assert os.pread(fd, 3, 100 * BLOCK - 1) == b"\0y\0"


def test_fallocate(path: Path) -> None:
    with open(path, "w+b", buffering=0) as file:
        fd = file.fileno()
        fallocate(fd, 0, 0, 64 * BLOCK)
        assert os.fstat(fd).st_size == 64 * BLOCK
        assert os.fstat(fd).st_blocks * 512 == 64 * BLOCK
        assert file.read() == bytes(64 * BLOCK)
        fallocate(fd, KEEP_SIZE, 64 * BLOCK, 64 * BLOCK)
        assert os.fstat(fd).st_size == 64 * BLOCK
        assert os.fstat(fd).st_blocks * 512 == 128 * BLOCK
        os.pwrite(fd, b"z" * (8 * BLOCK), 0)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, BLOCK + 100, 2 * BLOCK)
        expected = b"z" * (BLOCK + 100) + bytes(2 * BLOCK) + b"z" * (5 * BLOCK - 100)
        assert os.pread(fd, 8 * BLOCK, 0) == expected
        drop_caches()
        assert os.pread(fd, 8 * BLOCK, 0) == expected
        fallocate(fd, ZERO_RANGE, 4 * BLOCK, 70 * BLOCK)
        assert os.fstat(fd).st_size == 74 * BLOCK
        assert os.pread(fd, BLOCK, 4 * BLOCK) == bytes(BLOCK)
        for mode in (COLLAPSE, PUNCH_HOLE):
            with pytest.raises(OSError) as error:
                fallocate(fd, mode, 0, BLOCK)
            assert error.value.errno == errno.EOPNOTSUPP


def test_copy_file_range(path: Path) -> None:
    content = random.Random(3).randbytes(3 * MIB + 77)
    path.write_bytes(content)
    other = path.with_name("copy")
    with open(path, "rb") as source, open(other, "w+b") as target:
        done = 0
        while done < len(content):
            n = os.copy_file_range(source.fileno(), target.fileno(), len(content) - done)
            assert n > 0
            done += n
        assert os.copy_file_range(source.fileno(), target.fileno(), BLOCK) == 0
    assert other.read_bytes() == content
    with open(other, "r+b") as target:
        target.seek(MIB + 5)
        target.write(b"changed")
        # Unaligned, within one file.
        os.copy_file_range(target.fileno(), target.fileno(), 1000, 10, 2 * MIB + 3)
    drop_caches()
    changed = bytearray(content)
    changed[MIB + 5 : MIB + 12] = b"changed"
    changed[2 * MIB + 3 : 2 * MIB + 1003] = content[10:1010]
    assert other.read_bytes() == bytes(changed)
    assert path.read_bytes() == content


def test_shared_writable_mapping(path: Path) -> None:
    path.write_bytes(b"a" * (3 * BLOCK + 5))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[BLOCK : BLOCK + 5] = b"mapped"[:5]
        mapping[3 * BLOCK + 4] = ord("!")
        assert os.pread(file.fileno(), 5, BLOCK) == b"mappe"
        os.pwrite(file.fileno(), b"written", 100)
        assert mapping[100:107] == b"written"
        mapping.flush()
    drop_caches()
    content = path.read_bytes()
    assert content[BLOCK : BLOCK + 5] == b"mappe"
    assert content[100:107] == b"written"
    assert content[-1:] == b"!"
    assert len(content) == 3 * BLOCK + 5


def test_mapping_of_one_process_is_seen_by_another(path: Path) -> None:
    path.write_bytes(bytes(BLOCK))
    script = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as f, mmap.mmap(f.fileno(), 0) as m: m[7] = 42\n"
    )
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        subprocess.run([sys.executable, "-c", script, path], check=True)
        assert mapping[7] == 42


def test_two_processes_append_without_loss(path: Path) -> None:
    path.touch()
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for n in range(500): os.write(fd, f'{sys.argv[2]} {n:06}\\n'.encode())\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, path, who]) for who in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    for who in "ab":
        assert [line for line in lines if line[0] == who] == [f"{who} {n:06}" for n in range(500)]
    drop_caches()
    assert path.read_text().splitlines() == lines


def test_direct_append_goes_to_the_end(path: Path) -> None:
    path.write_bytes(b"x" * BLOCK)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_DIRECT)
    page = mmap.mmap(-1, BLOCK)
    page[:] = b"y" * BLOCK
    os.pwritev(fd, [page], 0)
    os.close(fd)
    assert path.read_bytes() == b"x" * BLOCK + b"y" * BLOCK


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_synchronous_writes_survive_a_kill(
    mounted: Mounted, path: Path, flag: str, mount_extfs: object
) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, flag))
    os.write(fd, b"durable" * 1000)
    directory = os.open(mounted.mountpoint, os.O_RDONLY)
    os.fsync(directory)
    mounted.kill()
    for descriptor in (fd, directory):
        with pytest.raises(OSError):
            os.fsync(descriptor)
        with contextlib.suppress(OSError):  # close(2) tells of the dead connection too
            os.close(descriptor)
    mounted.force_off()
    again = mount_extfs(mounted.device)  # type: ignore[operator]
    assert (again.mountpoint / "file").read_bytes() == b"durable" * 1000


def test_large_offsets(path: Path) -> None:
    last = (1 << 63) - 1
    with open(path, "w+b", buffering=0) as file:
        os.truncate(file.fileno(), last)
        assert os.fstat(file.fileno()).st_size == last
        os.pwrite(file.fileno(), b"end", last - 3)
        assert os.pread(file.fileno(), 3, last - 3) == b"end"
        with pytest.raises(OSError) as error:
            os.pwrite(file.fileno(), b"beyond", last)
        assert error.value.errno in (errno.EFBIG, errno.EINVAL)
        os.truncate(file.fileno(), 5)
        assert file.read() == bytes(5)


def test_o_trunc(path: Path) -> None:
    path.write_bytes(b"long content")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert os.fstat(fd).st_size == 0
    os.write(fd, b"short")
    os.close(fd)
    assert path.read_bytes() == b"short"


def test_full_disk_gives_enospc_and_recovers(
    make_loop: Callable[..., rundir.LoopDevice],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    device = make_loop(160 * MIB)
    extfs("mkfs", device)
    mounted = mount_extfs(device)
    path = mounted.mountpoint / "file"
    page = bytes(MIB)

    def fill() -> None:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(page)

    with pytest.raises(OSError) as error:
        fill()
    assert error.value.errno == errno.ENOSPC
    os.unlink(path)
    (mounted.mountpoint / "small").write_bytes(b"fits again")
    assert (mounted.mountpoint / "small").read_bytes() == b"fits again"


def test_extent_map_ioctl_refuses_unknown_commands(path: Path) -> None:
    path.write_bytes(b"x")
    with open(path, "rb") as file, pytest.raises(OSError) as error:
        fcntl.ioctl(file, 0x8004_5A5A, struct.pack("I", 0))
    assert error.value.errno == errno.ENOTTY
