"""The typed wrappers: errors, retries, ownership, and every kind of call on a simulated device."""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extfs import core
from extfs.core import (
    BLOCK_SIZE,
    CoreError,
    Cred,
    Device,
    ExtentState,
    Filesystem,
    JournalFullError,
    SimDevice,
)

MIB = 1 << 20
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def sim() -> Iterator[SimDevice]:
    with SimDevice(64 * MIB, seed=1) as device:
        with device.device() as handle:
            core.mkfs(handle, label="label", uuid=bytes(range(16)), now_sec=1_700_000_000)
        yield device


@pytest.fixture
def fs(sim: SimDevice) -> Iterator[Filesystem]:
    with Filesystem.open(sim.device(), no_heartbeat=True) as filesystem:
        yield filesystem


# ---- errors and ownership ----------------------------------------------------------------------


def test_error_carries_errno_symbol_and_text(fs: Filesystem) -> None:
    with pytest.raises(CoreError) as error:
        fs.lookup(1, b"missing")
    assert error.value.errno == errno.ENOENT
    assert error.value.name == "ENOENT"
    assert isinstance(error.value, OSError)


def test_private_codes_have_names_and_an_errno(sim: SimDevice) -> None:
    blank = SimDevice(64 * MIB)
    with blank, blank.device() as handle:
        with pytest.raises(CoreError) as error:
            core.read_super(handle)
    assert error.value.name == "ERR_NOT_EXTFS"
    assert error.value.errno == errno.EINVAL
    assert "extfs" in error.value.text
    assert error.value.code < -4095
    core.log_lines()


def test_paths_that_are_no_devices(tmp_path: Path) -> None:
    with pytest.raises(CoreError) as error:
        Device.open(str(tmp_path / "missing"))
    assert error.value.errno == errno.ENOENT
    with pytest.raises(CoreError) as error:
        Device.open(str(tmp_path))
    assert error.value.errno == errno.ENOTBLK


def test_a_filesystem_takes_its_device_over(sim: SimDevice) -> None:
    handle = sim.device()
    fs = Filesystem.open(handle, no_heartbeat=True)
    with pytest.raises(ValueError, match="owns it"):
        handle.read(0, 4096)
    handle.close()  # does nothing
    fs.close()
    fs.close()
    with pytest.raises(ValueError, match="closed"):
        fs.getattr(1)


def test_a_failed_open_leaves_the_device_alone() -> None:
    with SimDevice(64 * MIB) as blank, blank.device() as handle:
        with pytest.raises(CoreError):
            Filesystem.open(handle)
        assert len(handle.read(0, 4096)) == 4096
    core.log_lines()


def test_image_files_read_and_write(make_image: Callable[..., Path]) -> None:
    path = make_image(32 * MIB)
    with Device.open(str(path)) as device:
        assert device.size == 32 * MIB
        device.write(8192, b"x" * 4096)
        with pytest.raises(ValueError, match="4096"):
            device.write(100, b"x" * 4096)
        assert device.read(8192, 4096) == b"x" * 4096
        with pytest.raises(CoreError) as error:
            Device.open(str(path))
        assert error.value.name == "ERR_DEV_IN_USE"
    with Device.open(str(path), read_only=True) as device, pytest.raises(CoreError):
        device.write(0, bytes(4096))


def test_mkfs_checks_its_arguments(sim: SimDevice) -> None:
    with sim.device() as handle:
        with pytest.raises(ValueError, match="64"):
            core.mkfs(handle, label="x" * 65)
        with pytest.raises(ValueError, match="16"):
            core.mkfs(handle, uuid=b"short")
        with pytest.raises(CoreError) as error:
            core.mkfs(handle)
        assert error.value.name == "ERR_FOREIGN_FS"
        core.mkfs(handle, force=True, label=b"\xff" * 64)
        assert core.read_super(handle).label == b"\xff" * 64
    core.log_lines()


def test_superblock_and_space(fs: Filesystem) -> None:
    sb = fs.super
    assert (sb.label, sb.uuid, sb.created_sec) == (b"label", bytes(range(16)), 1_700_000_000)
    assert (sb.block_size, sb.total_blocks) == (BLOCK_SIZE, 64 * MIB // BLOCK_SIZE)
    assert not sb.from_copy
    space = fs.statfs()
    assert 0 < space.avail <= space.free < space.total
    assert space.inodes == 1


# ---- calls -------------------------------------------------------------------------------------


def test_names(fs: Filesystem) -> None:
    a = fs.mkdir(1, b"a", 0o750, Cred(5, 6, 0))
    assert (stat.S_IMODE(a.mode), a.uid, a.gid, a.nlink, a.parent) == (0o750, 5, 6, 2, 1)
    f = fs.mknod(a.ino, b"f", FILE)
    fs.link(f.ino, 1, b"\xff\xfe name")
    assert fs.getattr(f.ino).nlink == 2
    assert fs.resolve(b"/a/f").ino == f.ino
    assert {entry.name: entry.type for entry in fs.scandir(1)} == {b"a": 4, b"\xff\xfe name": 8}
    fs.rename(a.ino, b"f", 1, b"g")
    with pytest.raises(CoreError) as error:
        fs.rename(1, b"g", 1, b"a", noreplace=True)
    assert error.value.errno == errno.EEXIST
    fs.rename(1, b"g", 1, b"a", exchange=True)
    assert fs.lookup(1, b"a").ino == f.ino
    fs.unlink(1, b"a")
    fs.rmdir(1, b"g")
    link = fs.symlink(1, b"s", b"to/somewhere")
    assert fs.readlink(link.ino) == b"to/somewhere"
    device = fs.mknod(1, b"null", stat.S_IFCHR | 0o666, rdev=(1 << 8) | 3)
    assert (device.rdev, stat.S_ISCHR(device.mode)) == (259, True)
    with pytest.raises(CoreError) as error:
        fs.mkdir(1, b"x" * 256, 0o755)
    assert error.value.errno == errno.ENAMETOOLONG


def test_scandir_goes_on_where_it_was(fs: Filesystem) -> None:
    names = {b"%d" % n for n in range(1000)}
    for name in names:
        fs.mknod(1, name, FILE)
    found = [entry.name for entry in fs.scandir(1)]
    assert set(found) == names
    assert len(found) == 1000
    assert len(fs.readdir(1, limit=7)) == 7


def test_attributes(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"f", FILE).ino
    fs.setattr(ino, mode=stat.S_IFREG | 0o600, uid=7, gid=8, atime=(1, 2), mtime=(-3, 4))
    got = fs.getattr(ino)
    assert (stat.S_IMODE(got.mode), got.uid, got.gid) == (0o600, 7, 8)
    assert (got.atime, got.atime_ns, got.mtime, got.mtime_ns) == (1, 2, -3, 4)
    assert got.btime > 1_600_000_000
    fs.setxattr(ino, b"user.a", b"")
    fs.setxattr(ino, b"user.b", bytes(range(256)) * 256, create=True)
    assert fs.getxattr(ino, b"user.a") == b""
    assert fs.getxattr(ino, b"user.b") == bytes(range(256)) * 256
    assert set(fs.listxattr(ino)) == {b"user.a", b"user.b"}
    for kind, name, wanted in (("create", b"user.a", "EEXIST"), ("replace", b"user.c", "ENODATA")):
        with pytest.raises(CoreError) as error:
            fs.setxattr(ino, name, b"", **{kind: True})
        assert error.value.name == wanted
    fs.removexattr(ino, b"user.a")
    fs.removexattr(ino, b"user.b")
    assert fs.listxattr(ino) == []


def test_contents(fs: Filesystem) -> None:
    ino = fs.mknod(1, b"f", FILE).ino
    assert fs.write(ino, 5, b"hello") == 5
    assert fs.write(ino, 0, bytearray(b"!"), append=True, dsync=True) == 1
    assert fs.read(ino, 0, 100) == b"\0\0\0\0\0hello!"
    buffer = bytearray(4)
    assert fs.read_into(ino, 7, buffer) == 4
    assert buffer == b"llo!"
    fs.write(ino, 10 * BLOCK_SIZE, memoryview(b"x" * 2 * BLOCK_SIZE))
    fs.fallocate(ino, 20 * BLOCK_SIZE, 4 * BLOCK_SIZE, keep_size=True)
    assert fs.getattr(ino).size == 12 * BLOCK_SIZE
    extents = list(fs.extents(ino))
    assert [(e.file, e.len, e.state) for e in extents] == [
        (0, 1, ExtentState.WRITTEN),
        (10, 2, ExtentState.WRITTEN),
        (20, 4, ExtentState.UNWRITTEN),
    ]
    holes = fs.map(ino, 0, 12, holes=True)
    assert [(e.file, e.len, e.state) for e in holes][1] == (1, 9, ExtentState.HOLE)
    assert fs.seek_hole(ino, 0) == BLOCK_SIZE
    assert fs.seek_data(ino, BLOCK_SIZE) == 10 * BLOCK_SIZE
    copy = fs.mknod(1, b"copy", FILE).ino
    assert fs.copy(ino, 0, copy, 0, 12 * BLOCK_SIZE) == 12 * BLOCK_SIZE
    assert all(e.shared for e in fs.extents(copy))
    assert next(iter(fs.extents(copy))).block == extents[0].block
    fs.fallocate(ino, 0, BLOCK_SIZE, punch_hole=True, keep_size=True)
    fs.truncate(ino, 10 * BLOCK_SIZE + 1)
    assert fs.read(ino, 0, 1 << 20) == bytes(10 * BLOCK_SIZE) + b"x"
    assert fs.read(copy, 0, 11) == b"\0\0\0\0\0hello!"
    fs.fsync(ino)
    fs.fsync(ino, datasync=True)


def test_files_without_a_name_live_until_released(fs: Filesystem) -> None:
    tmp = fs.tmpfile(1, FILE).ino
    fs.write(tmp, 0, b"x" * MIB)
    gone = fs.mknod(1, b"gone", FILE)
    fs.open_inode(gone.ino)
    fs.unlink(1, b"gone")
    fs.handle_check(gone.ino, gone.generation)
    used = fs.statfs().free
    for ino in (tmp, gone.ino):
        fs.release(ino)
    fs.drain()
    assert fs.statfs().free >= used + MIB // BLOCK_SIZE
    with pytest.raises(CoreError) as error:
        fs.handle_check(gone.ino, gone.generation)
    assert error.value.errno == errno.ESTALE


def test_durability_and_counters(sim: SimDevice) -> None:
    fs = Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=60_000)
    ino = fs.mknod(1, b"kept", FILE).ino
    fs.write(ino, 0, b"kept")
    fs.sync()
    fs.mknod(1, b"lost", FILE)
    stats = fs.stats()
    assert stats.durable_xid < stats.running_xid
    assert stats.commits >= 1
    assert stats.dev_flushes >= 1
    fs.abandon()
    sim.restart(7)
    with Filesystem.open(sim.device(), no_heartbeat=True) as again:
        assert again.read(again.lookup(1, b"kept").ino, 0, 10) == b"kept"
        with pytest.raises(CoreError):
            again.lookup(1, b"lost")
        assert again.shutdown_error is None


def test_a_failed_journal_write_shuts_writes_down(sim: SimDevice) -> None:
    fs = Filesystem.open(sim.device(), no_heartbeat=True, commit_ms=60_000)
    fs.mknod(1, b"f", FILE)
    sim.fail(SimDevice.WRITE, 0, sim.size, 1000)
    with pytest.raises(CoreError) as error:
        fs.sync()
    assert error.value.errno == errno.EIO
    assert fs.shutdown_error is not None
    assert fs.shutdown_error.errno == errno.EIO
    with pytest.raises(CoreError):
        fs.mknod(1, b"g", FILE)
    assert fs.getattr(1).size == 1, "reading goes on"
    fs.abandon()


def write_fails(handle: Device) -> bool:
    try:
        handle.write(4096, b"d" * 4096)
    except CoreError:
        return True
    return False


def test_simulated_device(sim: SimDevice) -> None:
    sim.poke(0, b"a" * 4096)
    sim.settle()
    copy = sim.clone()
    sim.poke(0, b"b" * 4096)
    assert sim.peek(0, 3) == b"bbb"
    assert copy.peek(0, 3) == b"aaa"
    events = sim.events
    with sim.device() as handle:
        handle.write(4096, b"c" * 4096)
    assert sim.events > events
    sim.crash_at(sim.events + 1)
    with sim.device() as handle:
        results = [write_fails(handle) for _ in range(3)]
    assert results[-1]
    assert sim.crashed
    sim.restart(3)
    assert not sim.crashed
    copy.close()


def test_log_lines_reach_a_logger(caplog: pytest.LogCaptureFixture) -> None:
    core.log_lines()
    with SimDevice(1 * MIB) as tiny, tiny.device() as handle, pytest.raises(CoreError):
        core.mkfs(handle)
    logger = logging.getLogger("test_core_api")
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        count = core.drain_log(logger)
    assert count >= 1
    assert any("8192 blocks" in record.getMessage() for record in caplog.records)
    assert core.drain_log(logger) == 0


# ---- a full journal ----------------------------------------------------------------------------


def test_wrappers_wait_for_room_in_the_journal(fs: Filesystem) -> None:
    """Far more metadata than the smallest journal holds goes through without an error."""
    for group in range(30):
        directory = fs.mkdir(1, b"%d" % group, 0o755).ino
        for item in range(200):
            ino = fs.mknod(directory, b"%d" % item, FILE).ino
            fs.setxattr(ino, b"user.a", b"v" * 1000)
    assert fs.statfs().inodes == 1 + 30 + 6000


def full_once(fs: Filesystem, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[str]:
    """Make `name` of the C module answer "journal full" `times` times; returns the log of calls."""
    from extfs.core import filesystem, native

    code = next(
        -number
        for number in range(4096, 4200)
        if native.lib.extfs_error_name(-number) != native.ffi.NULL
        and native.string(native.lib.extfs_error_name(-number)) == "ERR_JOURNAL_FULL"
    )
    calls: list[str] = []
    real = native.lib

    class Lib:
        def __getattr__(self, attribute: str) -> object:
            if attribute == name and calls.count(name) < times:

                def answer(*_arguments: object) -> int:
                    calls.append(name)
                    return code

                return answer
            if attribute == "extfs_wait_space":
                calls.append("wait")
            return getattr(real, attribute)

    monkeypatch.setattr(filesystem, "lib", Lib())
    return calls


def test_a_full_journal_is_waited_for(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = full_once(fs, monkeypatch, "extfs_mkdir", 2)
    fs.mkdir(1, b"d", 0o755)
    assert calls == ["extfs_mkdir", "wait", "extfs_mkdir", "wait"]
    assert fs.lookup(1, b"d")


def test_nowait_raises_instead(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = full_once(fs, monkeypatch, "extfs_mkdir", 1)
    with pytest.raises(JournalFullError) as error:
        fs.nowait.mkdir(1, b"d", 0o755)
    assert error.value.name == "ERR_JOURNAL_FULL"
    assert calls == ["extfs_mkdir"]
    fs.nowait.mkdir(1, b"d", 0o755)


async def test_changing_waits_in_a_thread(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = full_once(fs, monkeypatch, "extfs_mkdir", 2)
    made = await fs.changing(lambda view: view.mkdir(1, b"d", 0o755))
    assert made.nlink == 2
    assert calls.count("extfs_mkdir") == 2
    assert calls.count("wait") == 2
