"""The drivers of fences, on fake and real control groups and on real programs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from attempts import LoneAttempt

from extfs.core import HolderKind, HolderRecord, HolderSpec, HolderState
from extfs.layout import (
    CgroupFence,
    CommandFence,
    FenceChoice,
    Host,
    NoFence,
    Outcome,
    Verdict,
    cgroups,
    parse_fence,
)
from extfs.layout.cgroups import Cgroup, CgroupError, cgroup_root


def record(number: int = 1, state: HolderState = HolderState.LOST, **spec: object) -> HolderRecord:
    return HolderRecord(number, state, HolderSpec(**spec), 1, 2, 3, 1)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


# ---- the option --------------------------------------------------------------------------------


def test_the_option() -> None:
    assert parse_fence("observe") == FenceChoice() == FenceChoice("observe")
    assert parse_fence("cgroup").kind == "cgroup"
    assert parse_fence(f"command:{sys.executable}") == FenceChoice("command", sys.executable)
    for wrong in ("", "kill", "cgroup:", "command", "command:", "command:true", "command:/etc"):
        with pytest.raises(ValueError):
            parse_fence(wrong)
    with pytest.raises(ValueError):
        parse_fence("command:/etc/passwd")


def test_what_the_option_chooses() -> None:
    def driver(text: str) -> object:
        return parse_fence(text).driver("/dev/null", {"EXTFS_DEVICE": "d"}, Host())

    assert driver("none") == NoFence()
    assert driver("observe") == CgroupFence("/dev/null")
    assert driver("cgroup") == CgroupFence("/dev/null", kill=True)
    assert driver(f"command:{sys.executable}") == CommandFence(
        sys.executable, {"EXTFS_DEVICE": "d"}
    )
    assert not CgroupFence("x").harms
    assert CgroupFence("x", kill=True).harms
    assert CommandFence("x").harms


def start_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---- the command -------------------------------------------------------------------------------


def program(directory: Path, text: str) -> str:
    path = directory / "fence"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


BOOT = uuid.UUID(int=5)
HELD = record(
    9,
    name="name with blanks",
    kind=HolderKind.CLIENT,
    uid=1000,
    pid=77,
    pid_start=123456,
    boot_id=BOOT.bytes,
    fence="cgroup:/a",
    fence_key=0xABC,
)


async def test_a_command_confirms_with_exit_0(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    path = program(tmp_path, f"env > {seen}; echo first; echo done it; exit 0\n")
    outcome = await CommandFence(path, {"EXTFS_DEVICE": "/dev/x"}).fence(HELD, LoneAttempt())
    assert outcome == Outcome.confirmed(f"{path}: exit 0, 'done it'")
    told = dict(line.split("=", 1) for line in seen.read_text().splitlines())
    assert {name: value for name, value in told.items() if name.startswith("EXTFS")} == {
        "EXTFS_HOLDER": "9",
        "EXTFS_KIND": "client",
        "EXTFS_NAME": "name with blanks",
        "EXTFS_UID": "1000",
        "EXTFS_PID": "77",
        "EXTFS_PID_START": "123456",
        "EXTFS_BOOT_ID": str(BOOT),
        "EXTFS_FENCE": "cgroup:/a",
        "EXTFS_FENCE_KEY": "0xabc",
        "EXTFS_QUARANTINED": "2",
        "EXTFS_DEVICE": "/dev/x",
    }
    assert "PATH" in told
    assert not told.keys() & {"HOME", "LD_PRELOAD"}


async def test_a_command_that_fails_confirms_nothing(tmp_path: Path) -> None:
    path = program(tmp_path, "echo no such target >&2; exit 3\n")
    outcome = await CommandFence(path).fence(HELD, LoneAttempt())
    assert outcome == Outcome.failed(f"{path}: exit 3, 'no such target'")
    assert (await CommandFence(path + "x").fence(HELD, LoneAttempt())).verdict is Verdict.FAILED
    killed = await CommandFence(program(tmp_path, "kill -9 $$\n")).fence(HELD, LoneAttempt())
    assert killed.verdict is Verdict.FAILED


async def test_a_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    path = program(tmp_path, f"echo $$ > {pids}; exec sleep 600\n")
    outcome = await CommandFence(path, seconds=0.3).fence(HELD, LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "longer than 0.3 s" in outcome.detail
    assert not alive(int(pids.read_text()))


# ---- control groups, fake ----------------------------------------------------------------------


@dataclasses.dataclass
class FakeHost:
    """A directory tree that looks like /proc, /sys and a hybrid host's cgroup mounts."""

    top: Path
    device: Path

    def host(self) -> Host:
        return Host(self.top / "proc", self.top / "sys", self.top / "machine-id")

    def cgroup(self, path: str, *, populated: bool = True) -> Path:
        directory = self.top / "unified" / path.lstrip("/")
        directory.mkdir(parents=True)
        (directory / "cgroup.kill").write_text("")
        self.populate(directory, populated)
        return directory

    @staticmethod
    def populate(directory: Path, populated: bool) -> None:
        (directory / "cgroup.events").write_text(f"populated {populated:d}\nfrozen 0\n")

    def process(self, pid: int, start: int, state: str = "S") -> None:
        (self.top / f"proc/{pid}").mkdir()
        fields = [state, *(["0"] * 18), str(start), "0", "0"]
        (self.top / f"proc/{pid}/stat").write_text(f"{pid} (a) b (c) {' '.join(fields)}\n")


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text(f"{BOOT}\n")
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/\n0::/system/extfs\n")
    unified = str(tmp_path / "unified").replace(" ", "\\040")
    (tmp_path / "proc/mounts").write_text(
        "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
        "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
        f"cgroup2 {unified} cgroup2 rw 0 0\n"
    )
    device = tmp_path / "image"
    device.write_bytes(bytes(4096))
    return FakeHost(tmp_path, device)


def named(path: str = "/app", **more: object) -> HolderRecord:
    return record(3, boot_id=BOOT.bytes, fence=f"cgroup:{path}", pid=50, pid_start=900, **more)


async def test_an_empty_cgroup_confirms(fake: FakeHost) -> None:
    fake.cgroup("/app", populated=False)
    driver = CgroupFence(str(fake.device), host=fake.host())
    assert await driver.fence(named(), LoneAttempt()) == Outcome.confirmed("/app is empty")
    assert await driver.fence(named("app"), LoneAttempt()) == Outcome.confirmed("/app is empty")


async def test_a_cgroup_that_is_gone_confirms(fake: FakeHost) -> None:
    fake.cgroup("/other")
    outcome = await CgroupFence(str(fake.device), host=fake.host()).fence(
        named("/app/worker"), LoneAttempt()
    )
    assert outcome.verdict is Verdict.CONFIRMED


async def test_observing_waits_until_the_cgroup_is_empty(
    fake: FakeHost, clock: trio.testing.MockClock
) -> None:
    directory = fake.cgroup("/app")
    driver = CgroupFence(str(fake.device), host=fake.host())
    done: list[Outcome] = []

    async def ask() -> None:
        done.append(await driver.fence(named(), LoneAttempt()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1000)
        assert not done
        fake.populate(directory, False)
    assert done == [Outcome.confirmed("/app has become empty")]
    assert (directory / "cgroup.kill").read_text() == "", "observing harms nobody"


async def test_killing(fake: FakeHost, clock: trio.testing.MockClock) -> None:
    directory = fake.cgroup("/app")
    driver = CgroupFence(str(fake.device), kill=True, host=fake.host())
    done: list[Outcome] = []

    async def ask() -> None:
        done.append(await driver.fence(named(uid=os.getuid()), LoneAttempt()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(3)
        assert (directory / "cgroup.kill").read_text() == "1"
        assert not done
        fake.populate(directory, False)
    assert done == [Outcome.confirmed("the processes of /app were killed")]


async def test_processes_that_do_not_die_are_not_fenced(
    fake: FakeHost, clock: trio.testing.MockClock
) -> None:
    fake.cgroup("/app")
    driver = CgroupFence(str(fake.device), kill=True, host=fake.host())
    outcome = await driver.fence(named(uid=os.getuid()), LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "after they were killed" in outcome.detail
    assert trio.current_time() == pytest.approx(cgroups.KILL_SECONDS, abs=0.1)


@pytest.mark.parametrize("path", ["/system", "/system/extfs", "system/extfs/"])
async def test_the_daemon_does_not_kill_itself(fake: FakeHost, path: str) -> None:
    directory = fake.cgroup(path)
    driver = CgroupFence(str(fake.device), kill=True, host=fake.host())
    outcome = await driver.fence(named(path), LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "daemon itself" in outcome.detail
    assert (directory / "cgroup.kill").read_text() == ""


async def test_a_user_cannot_have_others_killed(fake: FakeHost) -> None:
    """The registration names any path; only what that user may kill anyway is killed."""
    directory = fake.cgroup("/system/database")
    driver = CgroupFence(str(fake.device), kill=True, host=fake.host())
    outcome = await driver.fence(named("/system/database", uid=os.getuid() + 12345), LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "does not belong to the holder's user" in outcome.detail
    assert (directory / "cgroup.kill").read_text() == ""


@pytest.mark.parametrize("path", ["", "/", "//", "/../x", "a/../../b", "/a/.."])
def test_paths_that_are_no_cgroup_below_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(CgroupError):
        Cgroup(tmp_path, path)


async def test_a_directory_that_is_no_cgroup_confirms_nothing(fake: FakeHost) -> None:
    (fake.top / "unified/plain").mkdir(parents=True)
    outcome = await CgroupFence(str(fake.device), host=fake.host()).fence(
        named("/plain"), LoneAttempt()
    )
    assert outcome.verdict is Verdict.FAILED


async def test_a_process_that_never_was_in_its_cgroup_is_not_fenced(fake: FakeHost) -> None:
    """It named an empty cgroup and runs elsewhere: an empty cgroup proves nothing about it."""
    fake.cgroup("/app", populated=False)
    fake.process(50, 900)
    driver = CgroupFence(str(fake.device), host=fake.host())
    outcome = await driver.fence(named(), LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "process 50" in outcome.detail


@pytest.mark.parametrize(("start", "state"), [(901, "S"), (900, "Z")])
async def test_another_process_of_the_same_number_is_not_it(
    fake: FakeHost, start: int, state: str
) -> None:
    fake.cgroup("/app", populated=False)
    fake.process(50, start, state)
    outcome = await CgroupFence(str(fake.device), host=fake.host()).fence(named(), LoneAttempt())
    assert outcome.verdict is Verdict.CONFIRMED


@pytest.mark.parametrize("fence", ["cgroup:/app", ""])
async def test_a_restart_of_this_host_ends_every_local_holder(fake: FakeHost, fence: str) -> None:
    """Of another host nothing is known, whatever its boot."""
    machine = fake.top / "machine-id"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    old = uuid.UUID(int=4).bytes
    mine = record(3, boot_id=old, fence=fence, fence_key=fake.host().key())
    driver = CgroupFence(str(fake.device), host=fake.host())
    outcome = await driver.fence(mine, LoneAttempt())
    assert outcome == Outcome.confirmed("this host has been restarted since")
    for fence_key in (0, fake.host().key() ^ 1):
        other = record(3, boot_id=old, fence=fence, fence_key=fence_key)
        assert (await driver.fence(other, LoneAttempt())).verdict is Verdict.FAILED
    machine.write_text("")
    assert fake.host().key() == 0
    unknown = record(3, boot_id=old, fence=fence, fence_key=0)
    assert (await driver.fence(unknown, LoneAttempt())).verdict is Verdict.FAILED
    (fake.top / "proc/sys/kernel/random/boot_id").unlink()
    assert (await driver.fence(mine, LoneAttempt())).verdict is Verdict.FAILED


def test_the_key_of_a_host_is_that_of_the_core(fake: FakeHost, tmp_path: Path) -> None:
    """FNV-1a, from its definition."""
    (fake.top / "machine-id").write_text("a" * 32)
    key = 14695981039346656037
    for byte in b"a" * 32:
        key = (key ^ byte) * 1099511628211 % 2**64
    assert fake.host().key() == key
    (fake.top / "machine-id").write_text("a" * 31)
    assert fake.host().key() == 0


async def test_an_unknown_process_may_be_anywhere(fake: FakeHost) -> None:
    fake.cgroup("/app", populated=False)
    holder = record(3, boot_id=BOOT.bytes, fence="cgroup:/app")
    outcome = await CgroupFence(str(fake.device), host=fake.host()).fence(holder, LoneAttempt())
    assert outcome.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    "holder",
    [record(1, boot_id=BOOT.bytes), record(1, kind=HolderKind.CLIENT, fence="cgroup:/app")],
)
async def test_who_named_no_cgroup_is_never_confirmed(
    fake: FakeHost, clock: trio.testing.MockClock, holder: HolderRecord
) -> None:
    fake.cgroup("/app", populated=False)
    for kill in (False, True):
        with trio.move_on_after(3600) as scope:
            await CgroupFence(str(fake.device), kill=kill, host=fake.host()).fence(
                holder, LoneAttempt()
            )
        assert scope.cancelled_caught


async def test_a_host_without_cgroups(fake: FakeHost) -> None:
    (fake.top / "proc/mounts").write_text("proc /proc proc rw 0 0\n")
    outcome = await CgroupFence(str(fake.device), host=fake.host()).fence(named(), LoneAttempt())
    assert outcome == Outcome.failed("no cgroup v2 is mounted on this host")


async def test_a_device_that_is_gone_confirms_nothing(fake: FakeHost) -> None:
    fake.cgroup("/app", populated=False)
    outcome = await CgroupFence(str(fake.top / "missing"), host=fake.host()).fence(
        named(), LoneAttempt()
    )
    assert outcome.verdict is Verdict.FAILED
    assert "fsync" in outcome.detail


async def test_requests_in_flight_are_waited_for(
    fake: FakeHost, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.cgroup("/app", populated=False)
    zero = os.stat("/dev/zero")
    block = os.stat_result((0o60600, 1, 5, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": zero.st_rdev})
    counter = fake.top / f"sys/dev/block/{os.major(zero.st_rdev)}:{os.minor(zero.st_rdev)}/inflight"
    counter.parent.mkdir(parents=True)
    counter.write_text("       0        3\n")
    real = os.stat
    device = str(fake.device)
    monkeypatch.setattr(
        cgroups.os, "stat", lambda path, **more: block if path == device else real(path, **more)
    )
    driver = CgroupFence(device, host=fake.host())
    done: list[Outcome] = []

    async def ask() -> None:
        done.append(await driver.fence(named(), LoneAttempt()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(5)
        assert not done
        counter.write_text("       0        0\n")
    assert [outcome.verdict for outcome in done] == [Verdict.CONFIRMED]
    counter.write_text("       1        0\n")
    outcome = await driver.fence(named(), LoneAttempt())
    assert outcome.verdict is Verdict.FAILED
    assert "in flight" in outcome.detail


# ---- control groups, real ----------------------------------------------------------------------


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """A cgroup v2 of this test, below the root."""
    try:
        directory = cgroup_root(Host()) / f"extfs-test-{os.getpid()}"
        directory.mkdir()
    except (CgroupError, OSError) as error:
        pytest.skip(f"no cgroup v2 can be made here: {error}")
    if not (directory / "cgroup.kill").exists():
        directory.rmdir()
        pytest.skip("this kernel has no cgroup.kill")
    yield directory
    (directory / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 10
    while "populated 1" in (directory / "cgroup.events").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    directory.rmdir()


FORKING = "import os,time\nos.fork()\nos.setsid() if os.fork()==0 else 0\ntime.sleep(600)"


def start_inside(directory: Path) -> subprocess.Popen[bytes]:
    """A process with forks of its own that left its session, all in the cgroup."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"open({str(directory / 'cgroup.procs')!r}, 'w').write('0')\n{FORKING}",
        ]
    )
    deadline = time.monotonic() + 20
    while len((directory / "cgroup.procs").read_text().split()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


async def test_a_real_cgroup_is_killed_with_its_forks(real_cgroup: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    process = await trio.to_thread.run_sync(start_inside, real_cgroup)
    start = start_of(process.pid)
    holder = record(
        1,
        boot_id=Host().boot_id(),
        pid=process.pid,
        pid_start=start,
        fence=f"cgroup:/{real_cgroup.name}",
    )
    assert Host().runs(process.pid, start)
    with trio.move_on_after(1.5) as scope:
        await CgroupFence(str(image)).fence(holder, LoneAttempt())
    assert scope.cancelled_caught, "observing confirms while it lives"
    outcome = await CgroupFence(str(image), kill=True).fence(holder, LoneAttempt())
    assert outcome.verdict is Verdict.CONFIRMED, outcome
    assert (real_cgroup / "cgroup.procs").read_text() == ""
    assert process.wait(10) == -9
    assert not Host().runs(process.pid, start)
    outcome = await CgroupFence(str(image)).fence(holder, LoneAttempt())
    assert outcome == Outcome.confirmed(f"/{real_cgroup.name} is empty")
