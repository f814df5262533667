"""Buffered writes that are answered before their data is on the device: nobody sees the difference.

But when the device fails: then fsync and close tell what write(2) could not.
"""

from __future__ import annotations

import errno
import json
import mmap
import multiprocessing
import os
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, LogWatch, Mounted
from faults import MIB, errno_of, small_tmpfs

pytestmark = pytest.mark.fuse

BLOCK = 4096


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def counter(mounted: Mounted, name: str) -> int:
    status = json.loads((mounted.mountpoint / ".extfs" / "status").read_text())
    return int(status["core"][f"early_{name}"])


def direct(path: Path, offset: int, length: int) -> bytes:
    """Bytes as O_DIRECT reads them: from the filesystem, not from the kernel's pages."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as page:
            return page[: os.preadv(fd, [page], offset)]
    finally:
        os.close(fd)


@pytest.fixture
def path(mounted: Mounted) -> Path:
    return mounted.mountpoint / "file"


def test_they_are_counted(mounted: Mounted, path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for number in range(100):
            os.pwrite(file.fileno(), bytes([number]) * BLOCK, number * BLOCK)
        os.fsync(file.fileno())
    assert counter(mounted, "writes") >= 90  # few more are under way at once than is allowed
    assert counter(mounted, "errors") == 0
    assert 0 < counter(mounted, "bytes") <= 16 * MIB


def test_the_option_turns_them_off(
    loop_device: Path, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "early_writes=0")
    (mounted.mountpoint / "file").write_bytes(bytes(MIB))
    assert counter(mounted, "writes") == 0
    mounted.unmount()
    mounted = mount_extfs(loop_device, "early_writes=1M")
    with open(mounted.mountpoint / "file", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(bytes(100_000))
    assert counter(mounted, "writes") > 0
    assert counter(mounted, "bytes") <= MIB


@pytest.mark.parametrize("word", ["early_writes=1k", "early_writes=x", "early_writes"])
def test_a_wrong_size_is_refused(
    extfs: ExtfsRunner, loop_device: Path, tmp_path: Path, word: str
) -> None:
    result = extfs("mount", loop_device, tmp_path, "-o", word, check=False)
    assert result.returncode != 0
    assert "early_writes" in result.stderr


def test_direct_readers_see_what_was_written(path: Path) -> None:
    rng = random.Random(3)
    model = bytearray()
    with open(path, "wb", buffering=0) as file:
        for step in range(400):
            offset = rng.randrange(64) * BLOCK
            if step % 3 == 0:
                offset = rng.randrange(len(model) + 1)
            content = rng.randbytes(rng.choice([BLOCK, 100, 3 * BLOCK, 9999]))
            assert os.pwrite(file.fileno(), content, offset) == len(content)
            if offset > len(model):
                model.extend(bytes(offset - len(model)))
            model[offset : offset + len(content)] = content
            assert os.stat(path).st_size == len(model)
            if step % 2:
                start = offset // BLOCK * BLOCK
                assert direct(path, start, 4 * BLOCK) == model[start : start + 4 * BLOCK]
        assert path.read_bytes() == model
        drop_caches()
        assert path.read_bytes() == model


def test_attributes_do_not_change_afterwards(mounted: Mounted) -> None:
    """As tar does: write, set the times, look."""
    names = [mounted.mountpoint / f"f{number}" for number in range(100)]
    before = []
    for number, name in enumerate(names):
        with open(name, "wb", buffering=0) as file:
            file.write(os.urandom(7000 + number))
            os.utime(file.fileno(), (1_000_000, 2_000_000 + number))
        before.append(os.stat(name))
        assert before[-1].st_mtime == 2_000_000 + number
        assert (before[-1].st_size, before[-1].st_blocks) == (7000 + number, 16)
    for name in names:
        with open(name, "rb") as file:
            os.fsync(file.fileno())
    drop_caches()  # the kernel forgets what it knew
    assert [os.stat(name) for name in names] == before


def test_seeking_finds_data_at_once(path: Path) -> None:
    with open(path, "w+b", buffering=0) as file:
        fd = file.fileno()
        for number in range(100):
            offset = (200 - 2 * number) * BLOCK
            os.pwrite(fd, b"x", offset)
            assert os.lseek(fd, 0, os.SEEK_DATA) == offset
            assert os.lseek(fd, offset, os.SEEK_HOLE) == (offset + BLOCK if number else offset + 1)


def hammer(path: str, who: int, rounds: int) -> None:
    """Blocks of our own, written with buffers and read back by whoever reads fastest."""
    rng = random.Random(who)
    fd = os.open(path, os.O_RDWR)
    for step in range(rounds):
        block = rng.randrange(40) * 4 + who
        content = bytes([1 + step % 250]) * BLOCK
        os.pwrite(fd, content, block * BLOCK)
        assert os.fstat(fd).st_size >= (block + 1) * BLOCK
        if step % 3 == 0:
            assert direct(Path(path), block * BLOCK, BLOCK) == content
        if step % 50 == 0:
            os.fsync(fd)
    os.close(fd)


def test_processes_beside_each_other(path: Path) -> None:
    path.touch()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=hammer, args=(str(path), n, 400)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]


def test_truncate_and_unlink_right_after(mounted: Mounted, path: Path) -> None:
    for number in range(50):
        with open(path, "wb", buffering=0) as file:
            file.write(os.urandom(20_000))
            os.ftruncate(file.fileno(), 100 + number)
            assert os.fstat(file.fileno()).st_size == 100 + number
            os.pwrite(file.fileno(), b"z", 30_000)
            os.unlink(path)
    assert direct_size(mounted) == 0


def direct_size(mounted: Mounted) -> int:
    return sum(1 for entry in os.scandir(mounted.mountpoint) if entry.name != ".extfs")


def test_what_was_synced_survives_a_kill(
    mounted: Mounted, path: Path, mount_extfs: Callable[..., Mounted]
) -> None:
    content = os.urandom(3 * MIB + 77)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), 30_000):
            file.write(content[start : start + 30_000])
        os.fsync(file.fileno())
        os.fsync(os.open(mounted.mountpoint, os.O_RDONLY))
        os.pwrite(file.fileno(), b"?" * 100, len(content))
        mounted.kill()
        assert errno_of(file.close) in (0, errno.ENOTCONN, errno.ECONNABORTED)
    mounted.force_off()
    again = mount_extfs(mounted.device)
    assert (again.mountpoint / "file").read_bytes()[: len(content)] == content


def test_a_tree_by_tar(mounted: Mounted, tmp_path: Path) -> None:
    """What tar unpacks is what was packed, times and all, when nothing is in memory, too."""
    tree = Path(tempfile.mkdtemp(dir=tmp_path))
    rng = random.Random(1)
    for number in range(300):
        place = tree / f"d{number % 20}"
        place.mkdir(exist_ok=True)
        (place / f"f{number}").write_bytes(rng.randbytes(rng.randrange(20_000)))
        os.utime(place / f"f{number}", (5, number))
    subprocess.run(["tar", "-cf", tmp_path / "tree.tar", "-C", tree, "."], check=True)
    subprocess.run(["tar", "-xf", tmp_path / "tree.tar", "-C", mounted.mountpoint], check=True)
    drop_caches()
    compared = subprocess.run(
        ["tar", "-df", tmp_path / "tree.tar", "-C", mounted.mountpoint],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.stdout == ""


def test_fsync_and_close_tell_of_a_device_that_failed(
    run_directory: rundir.RunDirectory,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
) -> None:
    """A sparse image on a tmpfs that is full: writes to new places of it fail."""
    log_watch.expect(r"write of \d+ bytes at byte \d+ failed")
    log_watch.expect(r"were not written, after the answer")
    with small_tmpfs(run_directory, 48 * MIB) as place:
        image, ballast = place / "image", place / "ballast"
        with open(image, "wb") as file:
            file.truncate(256 * MIB)
        extfs("mkfs", image)
        mounted = mount_extfs(image, "commit=300")
        try:
            path = mounted.mountpoint / "file"
            fds = [os.open(path, os.O_CREAT | os.O_RDWR) for _ in range(3)]
            durable = [os.open(path, os.O_RDWR | os.O_DSYNC | more) for more in (0, os.O_DIRECT)]
            os.pwrite(fds[0], b"a" * 5000, 0)
            os.fsync(fds[0])
            with open(ballast, "wb", buffering=0) as file:
                assert errno_of(lambda: fill(file.fileno())) == errno.ENOSPC
            for number in range(1, 9):
                os.pwrite(fds[0], b"b" * MIB, number * MIB)
            assert os.fstat(fds[0]).st_size == 9 * MIB
            assert direct(path, 8 * MIB, MIB) == bytes(MIB), "it waits for the write, which fails"
            ballast.unlink()  # fsync needs the log, and that is to work
            with open(path, "rb") as file:
                assert errno_of(lambda: os.fsync(file.fileno())) == errno.EIO, "nobody was told yet"
            assert errno_of(lambda: os.fsync(fds[0])) == errno.EIO
            assert errno_of(lambda: os.fsync(fds[0])) == 0, "told once"
            assert errno_of(lambda: os.close(fds[0])) == 0
            assert errno_of(lambda: os.fsync(fds[1])) == errno.EIO, "to everybody who has it open"
            assert errno_of(lambda: os.close(fds[2])) == errno.EIO
            with open(path, "rb") as file:
                assert errno_of(lambda: os.fsync(file.fileno())) == 0, "after others were told"
            os.close(fds[1])
            with mmap.mmap(-1, 4096) as block:
                block[:] = b"a" * 4096
                for fd in durable:
                    assert errno_of(lambda fd=fd: os.pwritev(fd, [block], 0)) == errno.EIO
                    assert errno_of(lambda fd=fd: os.pwritev(fd, [block], 0)) == 0
                    os.close(fd)
            assert counter(mounted, "errors") > 0
            drop_caches()
            content = path.read_bytes()
            assert len(content) == 9 * MIB
            assert content[:5000] == b"a" * 5000
            assert set(content[5000:]) <= set(b"\0b"), "the device has nothing to show but zeros"
            mounted.unmount()
            assert "clean" in extfs("fsck", image).stdout
        finally:
            mounted.force_off()
            image.unlink()


def fill(fd: int) -> None:
    while True:
        os.write(fd, bytes(64 << 10))
