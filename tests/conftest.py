"""Fixtures for everything that needs a device, a mount, or an eye on the log.

All that a test makes lies in the session's run directory (see ``rundir``), and is cleared away
three times over: by the fixture that made it, at the end of the session, and, after a kill, by the
next run.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import guest.image as guests
import hypothesis
import pytest
import rundir

GIB = 1 << 30
DEVICE_SIZE = GIB
MOUNT_SECONDS = 30
UNMOUNT_SECONDS = 60

# On a busy machine a deadline per example fails at random; a failure prints what repeats it.
hypothesis.settings.register_profile("extfs", deadline=None, print_blob=True)
hypothesis.settings.load_profile("extfs")


ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
TRANSPORT = "EXTFS_TEST_TRANSPORT"
"""Environment of what mounts: how requests come from the kernel, as option transport= has it."""
FAILED = pytest.StashKey[bool]()
"""In a test's stash, for fixtures: it has failed so far."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport",
        choices=["auto", "uring", "classic"],
        default="classic",
        help="of the mounts of tests; with uring the kernel's switch is on for the session",
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ[TRANSPORT] = config.getoption("--transport")
    # SIGTERM (a time limit, a stopped CI run) ends the session as Ctrl-C does: with teardown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for what in rundir.sweep_stale():
        print(f"left over from an earlier run: {what}", file=sys.stderr)


def why_no_mount() -> str | None:
    """The reason why this machine cannot mount, or None when it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    return None


def _uses_core(item: pytest.Item) -> bool:
    """Whether the test's module imports extfs.core or something from it."""
    names = vars(getattr(item, "module", object)).values()
    origins = (
        name
        for value in names
        for name in (getattr(value, "__name__", None), getattr(value, "__module__", None))
    )
    return any(str(name).startswith("extfs.core") for name in origins)


def why_no_ring() -> str | None:
    """The reason why this machine has no FUSE over io_uring, or None when it has."""
    if not ENABLE_URING.exists():
        return "this kernel has no FUSE over io_uring"
    if not os.access(ENABLE_URING, os.W_OK):
        return "FUSE over io_uring is switched off, and cannot be switched on"
    return None


@pytest.fixture(scope="session", autouse=True)
def _ring_enabled(request: pytest.FixtureRequest) -> Iterator[None]:
    """For --transport=uring: the kernel's switch is on, and afterwards as it was."""
    if os.environ[TRANSPORT] != "uring" or why_no_ring() is not None:
        yield
        return
    before = ENABLE_URING.read_text()
    ENABLE_URING.write_text("Y")
    yield
    ENABLE_URING.write_text(before)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _uses_core(item) and not item.get_closest_marker("fuse"):
            item.add_marker(pytest.mark.core)
    reason = why_no_mount()
    if reason is None and os.environ[TRANSPORT] == "uring":
        reason = why_no_ring()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("fuse"):
            item.add_marker(pytest.mark.skip(reason=reason))


# ---- run directory, images, loop devices -------------------------------------------------------


@pytest.fixture(scope="session")
def run_directory() -> Iterator[rundir.RunDirectory]:
    """The session's run directory; what is left in it at the end fails the session."""
    directory = rundir.RunDirectory()
    atexit.register(directory.close)
    yield directory
    leftovers = directory.close()
    assert not leftovers, "a test did not clean up: " + "; ".join(leftovers)


@pytest.fixture
def make_image(run_directory: rundir.RunDirectory) -> Iterator[Callable[..., Path]]:
    """make_image(size=1 GiB): a new sparse file in memory, removed after the test."""
    made: list[Path] = []

    def make(size: int = DEVICE_SIZE) -> Path:
        made.append(run_directory.new_image(size))
        return made[-1]

    yield make
    for image in made:
        image.unlink(missing_ok=True)


@pytest.fixture
def scratch_image(make_image: Callable[..., Path]) -> Path:
    """A sparse image of 1 GiB, all zeros."""
    return make_image()


@pytest.fixture
def make_loop(
    run_directory: rundir.RunDirectory, make_image: Callable[..., Path]
) -> Iterator[Callable[..., rundir.LoopDevice]]:
    """make_loop(size=1 GiB, sector_size=512, image=None): an attached loop device."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    if not Path("/dev/loop-control").exists():
        pytest.skip("there is no /dev/loop-control")
    made: list[rundir.LoopDevice] = []

    def make(
        size: int = DEVICE_SIZE, *, sector_size: int = 512, image: Path | None = None
    ) -> rundir.LoopDevice:
        made.append(run_directory.attach(image or make_image(size), sector_size=sector_size))
        return made[-1]

    yield make
    with ExitStack() as stack:  # each is detached, whatever happens to the others
        for device in made:
            if device in rundir.loop_devices_below(run_directory.path):
                stack.callback(device.detach)


@pytest.fixture
def loop_device(make_loop: Callable[..., rundir.LoopDevice]) -> rundir.LoopDevice:
    """A loop device of 1 GiB with direct I/O over a sparse file in memory."""
    return make_loop()


# ---- the log -----------------------------------------------------------------------------------


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@dataclass
class LogWatch:
    """Warnings and errors of a test, from this process and from mounts' daemons."""

    expected: list[re.Pattern[str]]
    lines: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """Allow lines that match; at least one has to come."""
        self.expected.append(re.compile(pattern))

    def problems(self) -> list[str]:
        """What is wrong with the lines seen so far."""
        found = [
            f"unexpected in the log: {line}"
            for line in self.lines
            if not any(pattern.search(line) for pattern in self.expected)
        ]
        found += [
            f"expected in the log, but not there: {pattern.pattern}"
            for pattern in self.expected
            if not any(pattern.search(line) for line in self.lines)
        ]
        return found


@pytest.fixture(autouse=True)
def log_watch(request: pytest.FixtureRequest) -> Iterator[LogWatch]:
    """Fails the test when logger `extfs` warns unexpectedly, or does not warn as expected.

    What is expected: ``@pytest.mark.expect_log("pattern", ...)`` or ``log_watch.expect(pattern)``.
    """
    watch = LogWatch([])
    for marker in request.node.iter_markers("expect_log"):
        for pattern in marker.args:
            watch.expect(pattern)
    collector = _Collector()
    watch.lines = collector.lines
    logger = logging.getLogger("extfs")
    logger.addHandler(collector)
    yield watch
    logger.removeHandler(collector)
    skipped = getattr(request.node, "skipped_in_call", False)
    problems = watch.problems()
    if problems and not skipped:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when in ("setup", "call") and report.skipped:
        item.skipped_in_call = True  # type: ignore[attr-defined]
    if report.failed:
        item.stash[FAILED] = True


# ---- mounts ------------------------------------------------------------------------------------


def extfs_command(*arguments: str | os.PathLike[str]) -> list[str]:
    """The command line of the `extfs` that belongs to this interpreter."""
    return [str(Path(sys.executable).with_name("extfs")), *(os.fspath(word) for word in arguments)]


class ExtfsRunner:
    """Runs `extfs` commands as processes of this run."""

    def __init__(self, directory: rundir.RunDirectory) -> None:
        self.directory = directory

    def __call__(
        self, *arguments: str | os.PathLike[str], check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; with `check` a non-zero exit fails the test and shows the output."""
        result = subprocess.run(
            extfs_command(*arguments),
            env=self.directory.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode != 0:
            pytest.fail(
                f"extfs {' '.join(map(str, arguments))}: exit {result.returncode}\n"
                f"{result.stdout}{result.stderr}",
                pytrace=False,
            )
        return result


@dataclass
class Mounted:
    """A mounted filesystem and its daemon, which runs in the foreground as our child."""

    device: Path
    mountpoint: Path
    daemon: subprocess.Popen[bytes]
    log: Path
    """The daemon's standard output and error."""

    def is_mounted(self) -> bool:
        return any(m.mountpoint == self.mountpoint for m in rundir.mounts_below(self.mountpoint))

    def is_ready(self) -> bool:
        """The daemon says that it is mounted. It mounts before it listens for NFS, so an entry in
        /proc/self/mountinfo alone does not mean that it serves."""
        return " is mounted on " in self.log.read_text(errors="replace")

    def unmount(self, timeout: float = UNMOUNT_SECONDS) -> None:
        """Unmount through `extfs umount` and wait for the daemon; fail the test on a hang."""
        try:
            result = subprocess.run(
                extfs_command("umount", self.mountpoint),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
            if result.returncode != 0:
                raise AssertionError(f"extfs umount: exit {result.returncode}\n{result.stderr}")
            code = self.daemon.wait(timeout)
        except BaseException as error:
            self.force_off()
            raise AssertionError(f"unmount failed: {error}\n{self.log_tail()}") from error
        if code != 0:
            raise AssertionError(f"the daemon exited {code}\n{self.log_tail()}")

    def kill(self) -> None:
        """Kill the daemon as -9 does; the mountpoint stays behind, dead."""
        self.daemon.kill()
        self.daemon.wait()

    def force_off(self) -> None:
        """Abort the connection, take the mount away, end the daemon."""
        for mount in rundir.mounts_below(self.mountpoint):
            rundir.abort_fuse(mount.device_minor)
            subprocess.run(["umount", "-l", "--", str(mount.mountpoint)], check=False, timeout=30)
        try:
            self.daemon.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


_WARNING_LINE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback ")


@pytest.fixture
def extfs(run_directory: rundir.RunDirectory) -> ExtfsRunner:
    """extfs("info", device): run a command to its end, as a process of this run."""
    return ExtfsRunner(run_directory)


@pytest.fixture
def mount_extfs(
    run_directory: rundir.RunDirectory, log_watch: LogWatch
) -> Iterator[Callable[..., Mounted]]:
    """mount_extfs(device, options="", mountpoint=None, more=()): mount a formatted device, `more`
    being further arguments; unmounted after the test, by force if need be. Warnings in the
    daemon's log count for `log_watch`."""
    reason = why_no_mount()
    if reason is not None:
        pytest.skip(reason)
    mounts: list[Mounted] = []

    def mount(
        device: os.PathLike[str] | str,
        options: str = "",
        *,
        mountpoint: Path | None = None,
        more: Sequence[str] = (),
    ) -> Mounted:
        target = mountpoint or run_directory.new_mountpoint()
        log = run_directory.path / f"daemon-{len(list(run_directory.path.glob('daemon-*')))}.log"
        arguments = ["mount", os.fspath(device), str(target), "--foreground", *more]
        if "transport=" not in options:
            options = ",".join(filter(None, (options, f"transport={os.environ[TRANSPORT]}")))
        arguments += ["-o", options]
        with open(log, "wb") as output:
            daemon = subprocess.Popen(
                extfs_command(*arguments),
                env=run_directory.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        mounted = Mounted(Path(os.fspath(device)), target, daemon, log)
        mounts.append(mounted)
        deadline = time.monotonic() + MOUNT_SECONDS
        while not (mounted.is_mounted() and mounted.is_ready()):
            if daemon.poll() is not None:
                pytest.fail(f"extfs mount: exit {daemon.returncode}\n{mounted.log_tail()}")
            if time.monotonic() > deadline:
                pytest.fail(f"not mounted after {MOUNT_SECONDS} s\n{mounted.log_tail()}")
            time.sleep(0.01)
        return mounted

    yield mount

    failures = []
    for mounted in reversed(mounts):
        if mounted.daemon.poll() is not None:
            mounted.force_off()  # ended already, by the test's will; the mountpoint may be left
        elif mounted.is_mounted():
            try:
                mounted.unmount()
            except AssertionError as error:
                failures.append(str(error))
        else:
            mounted.force_off()
    for mounted in mounts:
        lines = mounted.log.read_text(errors="replace").splitlines()
        log_watch.lines += [line for line in lines if _WARNING_LINE.search(line)]
    assert not failures, "\n".join(failures)


@pytest.fixture
def mounted(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> Mounted:
    """A fresh filesystem of 1 GiB, mounted."""
    extfs("mkfs", loop_device)
    return mount_extfs(loop_device)


# ---- the control file --------------------------------------------------------------------------


@pytest.fixture
def root(mounted: Mounted) -> Path:
    """Where the fresh filesystem is mounted."""
    return mounted.mountpoint


def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def control(root: Path) -> Iterator[int]:
    """The control file, open."""
    yield from _opened(root / ".extfs/control")


@pytest.fixture
def file(root: Path) -> Iterator[int]:
    """A file of four blocks, open for writing."""
    (root / "file").write_bytes(b"content!" * 2048)
    yield from _opened(root / "file")


# ---- guests ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def guest_image() -> guests.Image:
    """What guests boot."""
    return guests.ensure()
