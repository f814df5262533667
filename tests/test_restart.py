"""Daemons that die and come back: what fsync acknowledged is there, and nothing else is broken."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted, extfs_command
from faults import MIB, errno_of, wait_for

pytestmark = pytest.mark.fuse

Start = Callable[..., Mounted]
RECORD = 700
SLOTS = 64
STRIDE = 1024
"""Distance of slots: a record that is overwritten in place must not cross a block, because what is
not synced yet may reach the device for one block and not for the other."""


@pytest.fixture
def start(run_directory: rundir.RunDirectory) -> Iterator[Start]:
    """start(device, mountpoint): a daemon as our child, also where a dead mount lies."""
    mounts: list[Mounted] = []

    def run(device: os.PathLike[str], mountpoint: Path, *, wait: bool = True) -> Mounted:
        log = run_directory.path / f"restart-{len(mounts)}.log"
        with open(log, "wb") as output:
            daemon = subprocess.Popen(
                extfs_command("mount", device, mountpoint, "--foreground"),
                env=run_directory.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        mounted = Mounted(Path(os.fspath(device)), mountpoint, daemon, log)
        mounts.append(mounted)
        if wait:
            wait_for(lambda: is_ready(mounted), "the mount is ready", 60)
        return mounted

    yield run
    for mounted in reversed(mounts):
        mounted.force_off()


def is_ready(mounted: Mounted) -> bool:
    text = mounted.log.read_text(errors="replace")
    assert mounted.daemon.poll() is None, f"the daemon ended:\n{text}"
    return f"is mounted on {mounted.mountpoint}" in text


def is_dead(mountpoint: Path) -> bool:
    return errno_of(lambda: os.statvfs(mountpoint)) in (
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECANCELED,
    )


def problems(mounted: Mounted) -> list[str]:
    lines = mounted.log.read_text(errors="replace").splitlines()
    return [line for line in lines if " ERROR " in line or " WARNING " in line or "Trace" in line]


@pytest.fixture
def device(loop_device: rundir.LoopDevice, extfs: ExtfsRunner) -> rundir.LoopDevice:
    extfs("mkfs", loop_device)
    return loop_device


@pytest.fixture
def target(run_directory: rundir.RunDirectory) -> Path:
    return run_directory.new_mountpoint()


# ---- load --------------------------------------------------------------------------------------

# Writes, and says on its standard output what has become durable, one JSON list a line, as soon as
# it knows. Ends when the filesystem is gone.
_WRITER = """
import json, os, random, sys, zlib
root, number, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
RECORD, SLOTS, STRIDE = %RECORD%, %SLOTS%, %STRIDE%
rng = random.Random(number * 1000 + first)
home = os.path.join(root, f"writer-{number}")

def say(*what):
    os.write(1, (json.dumps(what) + chr(10)).encode())

def record(seq, slot):
    body = b"%d %d %d " % (number, slot, seq)
    body += bytes(rng.randbytes(RECORD - 4 - len(body)))
    return zlib.crc32(body).to_bytes(4, "little") + body

def run():
    os.makedirs(home, exist_ok=True)
    top = os.open(root, os.O_RDONLY)
    os.fsync(top)
    directory = os.open(home, os.O_RDONLY)
    fd = os.open(os.path.join(home, "records"), os.O_CREAT | os.O_RDWR)
    os.fsync(fd)
    os.fsync(directory)
    say("home")
    hidden = os.open(os.path.join(home, "hidden"), os.O_CREAT | os.O_RDWR)
    os.unlink(os.path.join(home, "hidden"))
    seq = first
    while True:
        seq += 1
        kind = rng.randrange(10)
        if kind < 6:
            slots = rng.sample(range(SLOTS), rng.randrange(1, 5))
            for slot in slots:
                os.pwrite(fd, record(seq, slot), slot * STRIDE)
            os.fdatasync(fd) if kind < 3 else os.fsync(fd)
            for slot in slots:
                say("record", slot, seq)
        elif kind < 8:
            name = f"file-{seq}"
            with open(os.path.join(home, name), "wb") as file:
                file.write(record(seq, 0) * rng.randrange(1, 40))
                file.flush()
                os.fsync(file.fileno())
            os.fsync(directory)
            say("file", name, seq)
        elif kind < 9:
            names = [n for n in os.listdir(home) if n.startswith("file-")]
            if names:
                name = rng.choice(names)
                say("removing", name)
                os.unlink(os.path.join(home, name))
                os.fsync(directory)
                say("removed", name)
        else:
            os.pwrite(hidden, bytes(rng.randrange(1 << 20)), rng.randrange(8 << 20))

try:
    run()
except OSError as error:
    say("error", error.errno)
"""
for _name, _value in (("RECORD", RECORD), ("SLOTS", SLOTS), ("STRIDE", STRIDE)):
    _WRITER = _WRITER.replace(f"%{_name}%", str(_value))


class Promises:
    """What the writers were told, over all their lives."""

    def __init__(self) -> None:
        self.records: dict[tuple[int, int], int] = {}
        self.files: dict[tuple[int, str], int] = {}
        self.unknown: set[tuple[int, str]] = set()
        self.gone: set[tuple[int, str]] = set()
        self.seq = 0
        self.count = 0

    def take(self, number: int, line: str) -> None:
        kind, *rest = json.loads(line)
        self.count += 1
        if kind == "record":
            slot, seq = rest
            self.records[number, slot] = seq
            self.seq = max(self.seq, seq)
        elif kind == "file":
            name, seq = rest
            self.files[number, name] = seq
            self.seq = max(self.seq, seq)
        elif kind == "removing":
            self.unknown.add((number, rest[0]))
            self.files.pop((number, rest[0]), None)
        elif kind == "removed":
            self.unknown.discard((number, rest[0]))
            self.gone.add((number, rest[0]))
        elif kind == "error":
            # The last one for a moment, while the kernel takes back what it had in a ring.
            gone = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ECANCELED)
            assert rest[0] in gone, os.strerror(rest[0])

    def check(self, root: Path) -> None:
        """Everything acknowledged is there; a later state is fine when it is whole."""
        for (number, slot), seq in self.records.items():
            with open(root / f"writer-{number}" / "records", "rb") as file:
                record = os.pread(file.fileno(), RECORD, slot * STRIDE)
            _number, _slot, found = record_of(record)
            assert (_number, _slot) == (number, slot)
            assert found >= seq, f"writer {number}, slot {slot}: {seq} was durable, found {found}"
        for (number, name), seq in self.files.items():
            content = (root / f"writer-{number}" / name).read_bytes()
            assert content
            assert len(content) % RECORD == 0
            for at in range(0, len(content), RECORD):
                assert record_of(content[at : at + RECORD]) == (number, 0, seq)
        for number, name in self.gone:
            assert not (root / f"writer-{number}" / name).exists()
        assert not list(root.glob("*/hidden"))


def record_of(record: bytes) -> tuple[int, int, int]:
    assert zlib.crc32(record[4:]).to_bytes(4, "little") == record[:4], "a torn record"
    number, slot, seq, _ = record[4:].split(b" ", 3)
    return int(number), int(slot), int(seq)


@contextlib.contextmanager
def writers(root: Path, promises: Promises, count: int = 3) -> Iterator[None]:
    """Writers under `root` while the block runs, which has to end the daemon."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, root, str(number), str(promises.seq + 1000)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield
    except BaseException:
        for writer in running:
            writer.kill()
        raise
    finally:
        for number, writer in enumerate(running):
            said, _ = writer.communicate(timeout=60)
            for line in said.splitlines():
                promises.take(number, line)


def kill_cycle(
    device: rundir.LoopDevice,
    target: Path,
    start: Start,
    extfs: ExtfsRunner,
    kills: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    promises = Promises()
    times: list[float] = []
    for number in range(kills):
        # One that died early may have cleaned up, and not have mounted yet.
        dead = is_dead(target)
        assert dead or number % 3 == 0
        begin = time.monotonic()
        mounted = start(device, target)
        times.append(time.monotonic() - begin)
        said = mounted.log.read_text()
        assert ("died; cleaning up its mount" in said) == dead, said
        assert not problems(mounted), said
        promises.check(target)
        told = promises.count
        with writers(target, promises):
            time.sleep(rng.uniform(0.3, 1.2))
            mounted.kill()
        assert is_dead(target)
        assert promises.count > told or number == 0
        if number % 3 == 2:  # the next one dies too, while it replays or mounts
            early = start(device, target, wait=False)
            time.sleep(rng.uniform(0.05, 0.5))
            early.kill()
    mounted = start(device, target)
    promises.check(target)
    # Nothing is left of what was unlinked while open: the space is back, the checker agrees.
    extfs("umount", target)
    assert mounted.daemon.wait(60) == 0
    result = extfs("fsck", device, "--json", check=False)
    assert result.returncode == 0, result.stdout
    assert json.loads(result.stdout)["facts"]["orphans"] == 0
    assert promises.count > 20 * kills / 10
    assert min(times) < 5, f"a dead daemon's heartbeat must not be waited for: {times}"
    print(f"{kills} kills, {promises.count} promises kept, mounts took {times}")


def test_kills_under_load(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    kill_cycle(device, target, start, extfs, 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_under_load(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner, seed: int
) -> None:
    kill_cycle(device, target, start, extfs, 25, 100 + seed)


# ---- what a dead daemon leaves -----------------------------------------------------------------


def test_a_background_mount_cleans_up_after_a_dead_daemon(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    mounted = start(device, target)
    (target / "file").write_bytes(b"synced")
    os.sync()
    descriptor = os.open(target / "file", os.O_RDONLY)
    os.fsync(descriptor)
    mounted.kill()
    assert is_dead(target)
    with contextlib.suppress(OSError):
        os.close(descriptor)
    result = extfs("mount", device, target)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0] == f"extfs: {target}: the daemon of {device} died; cleaning up its mount"
    assert (target / "file").read_bytes() == b"synced"
    extfs("umount", target)
    assert "clean" in extfs("fsck", device).stdout


def test_space_of_unlinked_open_files_comes_back(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    mounted = start(device, target)
    (target / "kept").write_bytes(b"kept")
    os.sync()
    free = os.statvfs(target).f_bfree
    files = []
    for number in range(20):
        file = open(target / f"open-{number}", "w+b", buffering=0)  # noqa: SIM115
        file.write(os.urandom(2 * MIB))
        os.fsync(file.fileno())
        os.unlink(target / f"open-{number}")
        files.append(file)
    directory = os.open(target, os.O_RDONLY)
    os.fsync(directory)
    assert os.statvfs(target).f_bfree <= free - 20 * 512
    mounted.kill()
    for file in files:
        with contextlib.suppress(OSError):
            file.close()
    with contextlib.suppress(OSError):
        os.close(directory)
    start(device, target)
    wait_for(lambda: os.statvfs(target).f_bfree >= free - 64, "the space is back")
    assert os.listdir(target) == ["kept"]
    extfs("umount", target)
    result = json.loads(extfs("fsck", device, "--json").stdout)
    assert (result["clean"], result["facts"]["orphans"], result["facts"]["inodes"]) == (True, 0, 2)


def test_commands_on_a_dead_mount(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    mounted = start(device, target)
    (target / "file").write_bytes(b"x")
    mounted.kill()
    for words in (("info", target), ("map", target / "file")):
        result = extfs(*words, check=False)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1, result.stderr
    assert extfs("info", device).returncode == 0
    extfs("umount", target)
    assert os.listdir(target) == []


def test_requests_in_flight_end_when_the_daemon_dies(
    device: rundir.LoopDevice, target: Path, start: Start
) -> None:
    """Nobody hangs: all get an error at once."""
    mounted = start(device, target)
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    os.pwrite(fd, bytes(1 << 20), 0)\n"
        "    os.fsync(fd)\n"
    )
    users = [
        subprocess.Popen(
            [sys.executable, "-c", script, target / str(n)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for n in range(4)
    ]
    for user in users:
        assert user.stdout is not None
        assert user.stdout.readline() == b"go\n"
    time.sleep(0.3)
    mounted.kill()
    for user in users:
        assert user.wait(20) == 1
        assert user.stdout is not None
        user.stdout.close()
    assert is_dead(target)


# ---- ends as they should be --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    device: rundir.LoopDevice,
    target: Path,
    start: Start,
    extfs: ExtfsRunner,
    number: signal.Signals,
) -> None:
    """Written, never synced, and there after Ctrl-C: nothing to replay either."""
    mounted = start(device, target)
    content = os.urandom(5 * MIB)
    (target / "file").write_bytes(content)
    mounted.daemon.send_signal(number)
    assert mounted.daemon.wait(60) == 0
    assert not mounted.is_mounted()
    assert not problems(mounted)
    told = json.loads(extfs("info", device, "--json").stdout)
    assert told["unmounted_cleanly"]
    assert told["journal_records"] == 0
    assert "clean" in extfs("fsck", device).stdout
    start(device, target)
    assert (target / "file").read_bytes() == content


def test_mounting_again_and_again(
    device: rundir.LoopDevice, target: Path, extfs: ExtfsRunner
) -> None:
    """`umount` returns when the device can be used again, each time."""
    for number in range(3):
        extfs("mount", device, target)
        (target / f"file-{number}").write_bytes(b"%d" % number)
        extfs("umount", target)
        assert "clean" in extfs("fsck", device).stdout
    extfs("mount", device, target)
    assert sorted(os.listdir(target)) == [f"file-{number}" for number in range(3)]
    extfs("umount", target)


def test_umount_of_a_mount_in_use(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    mounted = start(device, target)
    with open(target / "file", "wb", buffering=0) as file:
        file.write(b"before")
        result = extfs("umount", target, check=False)
        assert result.returncode == 1
        assert result.stderr == f"extfs: {target}: cannot be unmounted: it is in use\n"
        file.write(b" and after")
        assert mounted.is_mounted()
    extfs("umount", target)
    assert mounted.daemon.wait(60) == 0
    start(device, target)
    assert (target / "file").read_bytes() == b"before and after"


def test_a_lazy_umount_ends_with_the_last_user(
    device: rundir.LoopDevice, target: Path, start: Start, extfs: ExtfsRunner
) -> None:
    mounted = start(device, target)
    with open(target / "file", "wb", buffering=0) as file:
        file.write(b"before")
        extfs("umount", "--lazy", target)
        assert not mounted.is_mounted()
        assert mounted.daemon.poll() is None
        file.write(b" and after")
    assert mounted.daemon.wait(60) == 0
    start(device, target)
    assert (target / "file").read_bytes() == b"before and after"
