"""`extfs layout` and `extfs status`, as a user meets them: on a mount, and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ExtfsRunner, Mounted, extfs_command

from extfs.cli.layouts import parse_range
from extfs.cli.status import duration_text

fuse = pytest.mark.fuse
MIB = 1 << 20


# ---- words and numbers -------------------------------------------------------------------------


def test_ranges() -> None:
    assert parse_range("0:4096") == (0, 4096)
    assert parse_range("1M:64k") == (MIB, 65536)
    for wrong in ("", "4096", "1:", ":1", "a:b", "1-2", "1:2:3", "-1:5"):
        with pytest.raises(ValueError):
            parse_range(wrong)


def test_durations() -> None:
    texts = [
        duration_text(seconds) for seconds in (0.04, 9.94, 59.4, 60, 3599, 3600, 12000, 190000)
    ]
    assert texts == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min",
        "59 min",
        "1 h 0 min",
        "3 h 20 min",
        "2 d 4 h",
    ]


@pytest.mark.parametrize("command", ["get", "commit", "return", "list", "recall", "fence"])
def test_every_command_has_help_with_exit_codes(command: str, extfs: ExtfsRunner) -> None:
    assert "Exit codes" in " ".join(extfs("layout", command, "--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["layout", "get"], 2, "Missing argument"),
        (["layout", "get", "x", "--for", "write"], 2, "'write'"),
        (["layout", "get", "x", "--atomic"], 2, "--for rw"),
        (["layout", "get", "x", "--length", "0"], 2, "holds nothing"),
        (["layout", "get", "x", "--offset", "-1"], 2, "not a size"),
        (["layout", "get", "/nonexistent/x"], 1, "No such file"),
        (["layout", "get", "/etc/passwd"], 1, "not a regular file on a mounted extfs"),
        (["layout", "commit", "x", "--key", "1", "--range", "0:4096"], 2, "--holder"),
        (["layout", "commit", "x", "--holder", "1", "--key", "1"], 2, "nothing to commit"),
        (["layout", "commit", "x", "--holder", "1", "--key", "0xzz", "--size", "1"], 2, "0xzz"),
        (["layout", "commit", "x", "--holder", "1", "--key", "1", "--range", "7"], 2, "OFFSET"),
        (["layout", "list", "/etc/passwd"], 1, "not a regular file on a mounted extfs"),
        (["layout", "recall", "/etc"], 1, "not a regular file on a mounted extfs"),
        (["layout", "return", "/etc/passwd", "--holder", "1", "--key", "1"], 1, "not a regular"),
        (["layout", "fence", "1", "--mount", "/etc"], 2, "--yes"),
        (["layout", "fence", "1", "--yes", "--mount", "/etc"], 1, "no extfs is mounted there"),
        (["layout", "fence", "x", "--yes", "--mount", "/etc"], 2, "not a number"),
        (["status", "/etc"], 1, "no extfs is mounted here"),
        (["mount", "d", "m", "-o", "recall=0"], 2, "recall"),
        (["mount", "d", "m", "-o", "recall=soon"], 2, "not a number of seconds"),
        (["mount", "d", "m", "-o", "fence=maybe"], 2, "fence"),
        (["mount", "d", "m", "-o", "fence=command:true"], 2, "absolute path"),
        (["mount", "d", "m", "-o", "fence=command:/nonexistent"], 2, "not an executable file"),
    ],
)
def test_wrong_usage_is_one_line(
    extfs: ExtfsRunner, arguments: list[str], code: int, words: str
) -> None:
    result = extfs(*arguments, check=False)
    assert result.returncode == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("extfs: ")
    assert words in line


# ---- the status of a directory that looks like a mount ------------------------------------------


def document() -> dict[str, Any]:
    latency = {"count": 0, "p50_us": None, "p99_us": None}
    return {
        "version": 1,
        "uuid": "u",
        "device": "/dev/x",
        "mountpoint": "/mnt",
        "read_only": False,
        "recall_ms": 10000,
        "uptime": 75.0,
        "time": 1000.0,
        "error": None,
        "space": {"total": 1 << 30, "free": 1 << 29, "quarantined": 8192, "inodes": 12},
        "layouts": {
            "counters": {"gets": 1234, "fences": 0},
            "latencies": {
                "get": {"count": 5, "p50_us": 16, "p99_us": 1 << 20},
                **dict.fromkeys(("commit", "return", "recall"), latency),
            },
        },
        "holders": {
            "live": 1,
            "lost": 1,
            "list": [
                {
                    "id": 7,
                    "state": "lost",
                    "grants": 3,
                    "quarantined": 8192,
                    "recalls": 2,
                    "recalls_missed": 1,
                    "pid": 99,
                    "name": "writer",
                    "fence": "cgroup:/a",
                }
            ],
            "more": 1,
        },
        "recalls": {
            "list": [
                {
                    "holder": 7,
                    "ino": 20,
                    "offset": 4096,
                    "length": (1 << 64) - 1,
                    "iomode": "rw",
                    "age_ms": 2500,
                }
            ],
            "more": 0,
        },
        "fences": {
            "driver": "observe",
            "waiting": [{"holder": 7, "seconds": 61, "attempts": 2, "last_failure": "not empty"}],
        },
        "memory": {
            "metadata": {"bytes": 7 << 20, "limit": 64 << 20, "effective_limit": 8 << 20},
            "inodes": {"unused": 2000, "limit": 16384, "effective_limit": 2048},
            "pressure": {
                "watched": [],
                "why": "no such file",
                "shrinks": 3,
                "given_back": 56 << 20,
                "last": 940.0,
            },
        },
        "core": {"commits": 1, "checkpoints": 2},
        "bridge": {
            "requests": 1000,
            "forwarded": 10,
            "transport": "classic",
            "transport_why": "the kernel has none",
            "idle_polls": 1200,
            "idle_poll_seconds": 61.0,
            "idle_polling": True,
            "idle_poll_why": "",
        },
    }


def test_status_for_people(extfs: ExtfsRunner, tmp_path: Path) -> None:
    (tmp_path / ".extfs").mkdir()
    (tmp_path / ".extfs/status").write_text(json.dumps(document()))
    text = extfs("status", tmp_path).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "mounted on /mnt, writable, for 1 min" in lines
    assert "quarantine 8 KiB wait for a fence" in lines
    assert "transport /dev/fuse; FUSE over io_uring: the kernel has none" in lines
    assert "idle CPUs polled 1,200 times, for 1 min in all, now too" in lines
    assert (
        "memory 7 MiB of 64 MiB for metadata, 2,000 of 16,384 unused inodes; while memory is short,"
        " at most 8 MiB and 2,048"
    ) in lines
    assert (
        "memory pressure caches shrank 3 times, gave back 56 MiB, last 1 min ago; the kernel does"
        " not tell of it: no such file"
    ) in lines
    assert "holders 1 live, 1 lost; 10 s to answer a recall" in lines
    assert "7 lost 3 8 KiB 2 1 99 writer cgroup:/a" in lines
    assert "and 1 more holders" in lines
    assert "7 20 4,096 to the end rw 2.5 s" in lines
    assert "7 1 min 2 not empty" in lines
    assert "get 5 < 16 µs < 1,049 ms" in lines
    assert "gets 1,234" in lines
    assert "fences 1 wait, by observe" in lines
    assert not any(line.startswith("commit ") for line in lines)


def test_a_status_that_is_not_understood(extfs: ExtfsRunner, tmp_path: Path) -> None:
    (tmp_path / ".extfs").mkdir()
    (tmp_path / ".extfs/status").write_text("{")
    result = extfs("status", tmp_path, check=False)
    assert result.returncode == 1
    assert "not understood" in result.stderr


# ---- on a mount ---------------------------------------------------------------------------------


class Get:
    """A running `extfs layout get --json`."""

    def __init__(self, environment: dict[str, str], *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            extfs_command("layout", "get", "--json", *arguments),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        if not lines:
            raise AssertionError(self.process.communicate()[1])
        self.said: dict[str, Any] = json.loads("".join(lines))
        self.environment = {
            "EXTFS_HOLDER": str(self.said["holder"]),
            "EXTFS_KEY": hex(self.said["key"]),
        }

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def get(extfs: ExtfsRunner) -> Iterator[Callable[..., Get]]:
    running: list[Get] = []

    def start(*arguments: str | Path) -> Get:
        running.append(Get(extfs.directory.environment(), *arguments))
        return running[-1]

    yield start
    for one in running:
        one.end(signal.SIGKILL)


@pytest.fixture
def speak(extfs: ExtfsRunner) -> Callable[..., subprocess.CompletedProcess[str]]:
    """An `extfs layout` command in the name of a holder, from another terminal."""

    def run(holder: Get, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            extfs_command("layout", *arguments),
            env=extfs.directory.environment() | holder.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def quick(loop_device: Any, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]) -> Mounted:
    """A mount whose holders have one second to answer."""
    extfs("mkfs", loop_device)
    return mount_extfs(loop_device, "recall=1")


def listed(extfs: ExtfsRunner, *files: Path) -> list[Any]:
    return [
        entry["layouts"] for entry in json.loads(extfs("layout", "list", "--json", *files).stdout)
    ]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def write_device(device: Path, offset: int, content: bytes) -> None:
    """As a holder does: past every cache."""
    import mmap

    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.pwrite(descriptor, memory, offset) == len(content)
    finally:
        os.close(descriptor)


@fuse
def test_get_write_commit_return(
    mounted: Mounted,
    extfs: ExtfsRunner,
    get: Callable[..., Get],
    speak: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    file = mounted.mountpoint / "file"
    file.touch()
    holder = get(file, "--for", "rw", "--length", "1M")
    assert (holder.said["offset"], holder.said["length"]) == (0, MIB)
    assert {extent["state"] for extent in holder.said["extents"]} == {"INVALID_DATA"}
    ((grant,),) = listed(extfs, file)
    assert (grant["holder"], grant["length"], grant["iomode"]) == (holder.said["holder"], MIB, "rw")
    content = os.urandom(8192)
    write_device(mounted.device, holder.said["extents"][0]["physical"], content)
    assert file.read_bytes() == b"", "nobody sees it before the commit"
    result = speak(holder, "commit", file, "--range", "0:8K", "--size", "8000")
    assert result.returncode == 0, result.stderr
    assert "8 KiB committed" in result.stdout
    assert file.read_bytes() == content[:8000]
    assert speak(holder, "return", file, "--offset", "512K").returncode == 0
    ((grant,),) = listed(extfs, file)
    assert grant["length"] == MIB // 2
    result = speak(holder, "commit", file, "--range", "512K:4K")
    assert result.returncode == 1
    assert "does not hold this range" in result.stderr
    assert holder.end()[0] == 0
    assert listed(extfs, file) == [[]]
    assert file.read_bytes() == content[:8000]
    assert "no layouts" in extfs("layout", "list", file).stdout


@fuse
def test_a_wrong_key_speaks_for_nobody(
    mounted: Mounted, get: Callable[..., Get], speak: Callable[..., Any]
) -> None:
    file = mounted.mountpoint / "file"
    file.write_bytes(bytes(8192))
    holder = get(file, "--for", "rw")
    holder.environment["EXTFS_KEY"] = "0x1"
    for command in (
        ["commit", file, "--range", "0:4K"],
        ["return", file],
        ["return", file, "--all"],
    ):
        result = speak(holder, *command)
        assert result.returncode == 1
        assert "key of the holder" in result.stderr
    holder.environment["EXTFS_HOLDER"] = "999999"
    assert "does not exist" in speak(holder, "return", file).stderr


@fuse
def test_a_recall_is_told_and_answered(
    quick: Mounted, extfs: ExtfsRunner, get: Callable[..., Get], speak: Callable[..., Any]
) -> None:
    file = quick.mountpoint / "file"
    file.write_bytes(bytes(MIB))
    reader = get(file, "--for", "read")
    writer = get(file, "--for", "rw", "--offset", "64K", "--length", "64K")
    extfs("layout", "recall", file, "--for", "read")
    code, errors = reader.process.wait(20), reader.end()[1]
    assert code == 0
    assert "recalled and returned" in errors
    assert "nothing is held any more" in errors
    extfs("layout", "recall", file)
    assert speak(writer, "return", file).returncode == 0
    code, errors = writer.process.wait(20), writer.end()[1]
    assert code == 0
    assert "to be returned in" in errors
    assert listed(extfs, file) == [[]]


@fuse
def test_who_does_not_answer_is_revoked(
    quick: Mounted, extfs: ExtfsRunner, get: Callable[..., Get]
) -> None:
    file = quick.mountpoint / "file"
    file.write_bytes(b"a" * MIB)
    holder = get(file, "--for", "rw")
    begin = time.monotonic()
    with open(file, "r+b", buffering=0) as writer:
        writer.write(b"b" * 4096)
        os.fsync(writer)
    assert time.monotonic() - begin > 0.9, "the recall time"
    status = json.loads(extfs("status", quick.mountpoint, "--json").stdout)
    assert status["holders"]["lost"] == 1
    assert status["space"]["quarantined"] > 0
    assert [fence["holder"] for fence in status["fences"]["waiting"]] == [holder.said["holder"]]
    # Its stale writes reach nobody.
    write_device(quick.device, holder.said["extents"][0]["physical"], b"x" * 4096)
    assert file.read_bytes()[:8192] == b"b" * 4096 + b"a" * 4096
    code, errors = holder.end()
    assert code == 1
    assert "revoked" in errors
    until(
        lambda: not json.loads((quick.mountpoint / ".extfs/status").read_text())["holders"]["lost"]
    )


@fuse
def test_a_get_that_was_killed_is_fenced_by_hand(
    quick: Mounted, extfs: ExtfsRunner, get: Callable[..., Get]
) -> None:
    file = quick.mountpoint / "file"
    file.touch()
    holder = get(file, "--for", "rw", "--length", "1M")
    number = str(holder.said["holder"])
    result = extfs("layout", "fence", number, "--yes", "--mount", quick.mountpoint, check=False)
    assert result.returncode == 1
    assert "is not lost" in result.stderr
    holder.end(signal.SIGKILL)
    until(lambda: "1 lost" in extfs("status", quick.mountpoint).stdout)
    extfs("layout", "fence", number, "--yes", "--mount", quick.mountpoint)
    until(lambda: "0 live, 0 lost" in extfs("status", quick.mountpoint).stdout)
    assert listed(extfs, file) == [[]]
    result = extfs("layout", "fence", number, "--yes", "--mount", quick.mountpoint, check=False)
    assert "there is no holder" in result.stderr


@fuse
def test_a_get_that_was_killed_is_ended_with_its_key(
    quick: Mounted, extfs: ExtfsRunner, get: Callable[..., Get], speak: Callable[..., Any]
) -> None:
    file = quick.mountpoint / "file"
    file.touch()
    holder = get(file, "--for", "rw", "--length", "1M")
    content = os.urandom(4096)
    write_device(quick.device, holder.said["extents"][0]["physical"], content)
    holder.end(signal.SIGKILL)
    until(lambda: "1 lost" in extfs("status", quick.mountpoint).stdout)
    result = speak(holder, "commit", file, "--range", "0:4K", "--size", "4K")
    assert result.returncode == 0, result.stderr
    result = speak(holder, "return", file, "--all")
    assert result.returncode == 0, result.stderr
    assert file.read_bytes() == content
    assert "0 live, 0 lost" in extfs("status", quick.mountpoint).stdout


@fuse
def test_a_conflict_and_waiting(
    quick: Mounted, extfs: ExtfsRunner, get: Callable[..., Get]
) -> None:
    file = quick.mountpoint / "file"
    file.write_bytes(bytes(MIB))
    first = get(file, "--for", "rw", "--on-recall", "return")
    result = extfs("layout", "get", file, "--for", "rw", "--hold", "0", check=False)
    assert result.returncode == 1
    assert "somebody else has a layout" in result.stderr
    extfs("layout", "get", file, "--for", "rw", "--hold", "0", "--wait")
    assert first.process.wait(20) == 0


@fuse
def test_holding_for_a_time_and_for_people(mounted: Mounted, extfs: ExtfsRunner) -> None:
    file = mounted.mountpoint / "file"
    file.write_bytes(b"x" * 8192)
    begin = time.monotonic()
    result = extfs("layout", "get", file, "--hold", "0.5")
    assert time.monotonic() - begin > 0.5
    first, titles, extent, export = result.stdout.splitlines()
    assert first == f"{file}: READ layout of 8 KiB at offset 0"
    assert titles.split() == ["file", "offset", "length", "device", "offset", "block", "state"]
    assert extent.split()[-1] == "READ_DATA"
    assert export.startswith("export EXTFS_HOLDER=")
    assert extfs("layout", "get", file, "--for", "pin", "--hold", "0").returncode == 0
    empty = mounted.mountpoint / "empty"
    empty.touch()
    result = extfs("layout", "get", empty, check=False)
    assert "--length says how much" in result.stderr
    assert extfs("layout", "get", mounted.mountpoint, check=False).returncode == 1


@fuse
def test_a_read_only_mount_has_a_status_and_no_layouts(
    mounted: Mounted, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    (mounted.mountpoint / "file").write_bytes(bytes(8192))
    mounted.unmount()
    again = mount_extfs(mounted.device, "ro")
    assert "read-only" in extfs("status", again.mountpoint).stdout
    result = extfs("layout", "get", again.mountpoint / "file", "--hold", "0", check=False)
    assert result.returncode == 1
    assert "read-only" in result.stderr


@fuse
def test_the_status_file(mounted: Mounted) -> None:
    path = mounted.mountpoint / ".extfs/status"
    assert json.loads(path.read_text())["mountpoint"] == str(mounted.mountpoint)
    with open(path, "rb", buffering=0) as early:
        first = early.read(100)
        (mounted.mountpoint / "new").touch()
        rest = b""
        while more := early.read(1000):
            rest += more
        assert json.loads(first + rest)["version"] == 1, "one moment, however it is read"
    with pytest.raises(PermissionError):
        os.open(path, os.O_RDWR)
