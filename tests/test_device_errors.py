"""Devices that fail, under the core alone: EIO for the caller, nothing durable lost.

The simulated device fails the I/O that a test names; what it holds can be mounted again.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Iterator

import pytest
from conftest import LogWatch
from faults import REFUSED, SMALL, errno_of, wait_for

from extfs import core

BLOCK = 4096
TURNED = r"read-only from now on"


class Sim:
    """A formatted simulated device with a file of 64 blocks, durable."""

    CONTENT = bytes(range(256)) * 16 * 64

    def __init__(self) -> None:
        self.sim = core.SimDevice(SMALL)
        with self.sim.device() as device:
            core.mkfs(device)
        self.fs = self.open()
        self.ino = self.fs.mknod(1, b"file", stat.S_IFREG | 0o644).ino
        self.fs.write(self.ino, 0, self.CONTENT)
        self.fs.sync()

    def open(self) -> core.Filesystem:
        return core.Filesystem.open(self.sim.device(), no_heartbeat=True, commit_ms=300_000)

    def place(self, file_block: int) -> int:
        """Byte on the device of a block of the file."""
        (extent,) = self.fs.map(self.ino, file_block, file_block + 1)
        return (extent.block + file_block - extent.file) * BLOCK

    def journal(self) -> tuple[int, int]:
        """Bytes of the journal on the device."""
        return self.fs.super.journal_start * BLOCK, self.fs.super.journal_blocks * BLOCK

    def again(self) -> core.Filesystem:
        """After the power came back."""
        self.fs.abandon()
        self.sim.fail(0, 0, 0, 0)
        self.sim.restart(1)
        self.fs = self.open()
        return self.fs


@pytest.fixture
def sim(log_watch: LogWatch) -> Iterator[Sim]:
    """The core's log goes to logger `extfs`, so that `log_watch` sees it."""
    core.log_lines()
    it = Sim()
    yield it
    it.fs.abandon()
    core.drain_log(logging.getLogger("extfs"))
    it.sim.close()


def test_a_failed_read_is_eio(sim: Sim) -> None:
    sim.sim.fail(sim.sim.READ, sim.place(7), BLOCK, 2)
    assert errno_of(lambda: sim.fs.read(sim.ino, 0, 64 * BLOCK)) == errno.EIO
    assert errno_of(lambda: sim.fs.read(sim.ino, 7 * BLOCK + 5, 1)) == errno.EIO
    assert sim.fs.read(sim.ino, 0, 64 * BLOCK) == sim.CONTENT  # the device is well again
    assert sim.fs.shutdown_error is None
    sim.fs.write(sim.ino, 0, b"writable")


def test_a_failed_write_in_place_is_eio(sim: Sim) -> None:
    sim.sim.fail(sim.sim.WRITE, sim.place(3), BLOCK)
    assert errno_of(lambda: sim.fs.write(sim.ino, 3 * BLOCK, b"x" * BLOCK)) == errno.EIO
    assert sim.fs.read(sim.ino, 0, 64 * BLOCK) == sim.CONTENT
    assert sim.fs.write(sim.ino, 3 * BLOCK, b"x" * BLOCK) == BLOCK
    sim.fs.fsync(sim.ino)
    assert sim.again().read(sim.ino, 3 * BLOCK, BLOCK) == b"x" * BLOCK


def test_a_failed_write_to_a_new_block_shows_nothing(sim: Sim) -> None:
    """Neither the bytes that did not arrive nor what the block held before."""
    free = sim.fs.statfs().free
    journal, length = sim.journal()
    sim.sim.fail(sim.sim.WRITE, journal + length, SMALL, 1)
    assert errno_of(lambda: sim.fs.write(sim.ino, 100 * BLOCK, b"y" * 8 * BLOCK)) == errno.EIO
    content = sim.fs.read(sim.ino, 0, 200 * BLOCK)
    assert content[: 64 * BLOCK] == sim.CONTENT
    assert not content[64 * BLOCK :].strip(b"\0y")
    assert sim.fs.write(sim.ino, 100 * BLOCK, b"z" * 8 * BLOCK) == 8 * BLOCK
    sim.fs.fsync(sim.ino)
    assert sim.fs.read(sim.ino, 100 * BLOCK, 8 * BLOCK) == b"z" * 8 * BLOCK
    assert free - sim.fs.statfs().free <= 16  # nothing lies around


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_a_failed_journal_write_turns_it_read_only(
    sim: Sim, log_watch: LogWatch, kind: str
) -> None:
    log_watch.expect(TURNED)
    other = sim.fs.mknod(1, b"other", stat.S_IFREG | 0o644).ino
    sim.fs.write(other, 0, b"never durable")
    if kind == "write":
        sim.sim.fail(sim.sim.WRITE, *sim.journal(), 1000)
    else:
        sim.sim.fail(sim.sim.FLUSH, 0, 0, 1000)
    assert errno_of(lambda: sim.fs.fsync(other)) == errno.EIO
    assert errno_of(lambda: sim.fs.fsync(other)) == errno.EIO  # it does not become durable later
    assert errno_of(sim.fs.sync) == errno.EIO
    assert sim.fs.shutdown_error is not None
    for change in (
        lambda: sim.fs.mkdir(1, b"dir", 0o755),
        lambda: sim.fs.write(sim.ino, 0, b"x"),
        lambda: sim.fs.write(sim.ino, 1 << 30, b"x"),
        lambda: sim.fs.unlink(1, b"file"),
        lambda: sim.fs.truncate(sim.ino, 0),
        lambda: sim.fs.setxattr(sim.ino, b"user.x", b"v"),
    ):
        assert errno_of(change) in REFUSED
    assert sim.fs.read(sim.ino, 0, 64 * BLOCK) == sim.CONTENT
    fs = sim.again()
    assert fs.read(sim.ino, 0, 64 * BLOCK) == sim.CONTENT
    assert fs.shutdown_error is None
    fs.write(sim.ino, 0, b"writable again")


def test_a_failed_checkpoint_write_loses_nothing(sim: Sim, log_watch: LogWatch) -> None:
    """Metadata cannot be written home: the log keeps it, and the next mount brings it home."""
    for number in range(50):
        sim.fs.mknod(1, b"f%d" % number, stat.S_IFREG | 0o644)
    sim.fs.sync()
    journal, length = sim.journal()
    sim.sim.fail(sim.sim.WRITE, 0, journal, 100000)
    sim.sim.fail(sim.sim.WRITE, journal + length, SMALL, 100000)
    log_watch.expect(TURNED)
    sim.fs.checkpoint()
    wait_for(lambda: sim.fs.shutdown_error is not None, "the checkpoint notices")
    assert errno_of(lambda: sim.fs.mkdir(1, b"dir", 0o755)) in REFUSED
    names = {entry.name for entry in sim.again().scandir(1)}
    assert names == {b"file", *(b"f%d" % n for n in range(50))}


@pytest.mark.expect_log("read-only from now on")
def test_close_reports_what_did_not_become_durable(sim: Sim) -> None:
    sim.fs.mkdir(1, b"dir", 0o755)
    sim.sim.fail(sim.sim.WRITE, *sim.journal(), 1000)
    assert errno_of(sim.fs.close) == errno.EIO
    sim.again()
