"""A mount from begin to end: signals, refusals, dead daemons, and who serves which request."""

from __future__ import annotations

import errno
import inspect
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted, extfs_command

fuse = pytest.mark.fuse
ROOT = Path(__file__).resolve().parent.parent


def test_each_opcode_is_served_in_one_place() -> None:
    """The handlers in Python are exactly those that the bridge's table forwards.

    But for those of /.extfs/status, whose requests are forwarded because of the file.
    """
    import pyfuse3

    from extfs.core import OpcodeServer, opcodes
    from extfs.fuse.operations import Operations

    table = opcodes()
    forwarded = {name.lower() for name, server in table.items() if server is OpcodeServer.PYTHON}
    handlers = {
        name
        for name, member in vars(Operations).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }
    of_status = {"open", "read", "flush", "release"}
    assert handlers == forwarded - {"init"} | of_status  # libfuse answers INIT
    assert not forwarded & of_status
    assert all(hasattr(pyfuse3.Operations, name) for name in handlers)
    assert forwarded == {"init"}


def test_the_table_of_the_source_is_the_table_in_force() -> None:
    from extfs.core import OpcodeServer, opcodes

    source = (ROOT / "native" / "bridge_dispatch.c").read_text()
    rows = re.findall(r"^\t(C|FORWARD|NONE)\((\w+)", source, re.MULTILINE)
    servers = {"C": OpcodeServer.C, "FORWARD": OpcodeServer.PYTHON, "NONE": OpcodeServer.NONE}
    assert {name: servers[server] for server, name in rows} == opcodes()


@fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(mounted: Mounted, number: signal.Signals) -> None:
    (mounted.mountpoint / "file").write_bytes(b"kept")
    mounted.daemon.send_signal(number)
    assert mounted.daemon.wait(20) == 0
    assert not mounted.is_mounted()


@fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_right_after_the_mount_unmounts(
    scratch_image: Path,
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
    number: signal.Signals,
) -> None:
    """Before the daemon is ready, and says so."""
    extfs("mkfs", scratch_image)
    target = run_directory.new_mountpoint()
    for _ in range(5):
        daemon = subprocess.Popen(
            extfs_command("mount", scratch_image, target, "--foreground"),
            env=run_directory.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not rundir.mounts_below(target):
            assert daemon.poll() is None
        daemon.send_signal(number)
        assert daemon.wait(20) == 0
        assert not rundir.mounts_below(target)


@fuse
def test_what_was_written_is_there_after_a_remount(
    mounted: Mounted, mount_extfs: Callable[..., Mounted]
) -> None:
    content = os.urandom(3_000_000)
    (mounted.mountpoint / "file").write_bytes(content)
    mounted.unmount()
    assert (mount_extfs(mounted.device).mountpoint / "file").read_bytes() == content


@fuse
def test_a_hangup_is_ignored(mounted: Mounted) -> None:
    mounted.daemon.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    (mounted.mountpoint / "file").write_bytes(b"still here")
    assert mounted.daemon.poll() is None


@fuse
def test_a_signal_detaches_a_mount_in_use(mounted: Mounted) -> None:
    with open(mounted.mountpoint / "file", "w+b", buffering=0) as file:
        file.write(b"before")
        mounted.daemon.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while mounted.is_mounted() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not mounted.is_mounted()
        file.write(b" and after")
        file.seek(0)
        assert file.read() == b"before and after"
        assert mounted.daemon.poll() is None
    assert mounted.daemon.wait(20) == 0


@fuse
def test_a_read_only_mount_refuses_changes(
    mounted: Mounted, mount_extfs: Callable[..., Mounted]
) -> None:
    (mounted.mountpoint / "file").write_bytes(b"content")
    mounted.unmount()
    again = mount_extfs(mounted.device, "ro")
    assert (again.mountpoint / "file").read_bytes() == b"content"
    for change in (
        lambda: (again.mountpoint / "new").touch(),
        lambda: (again.mountpoint / "file").write_bytes(b"x"),
        lambda: os.unlink(again.mountpoint / "file"),
    ):
        with pytest.raises(OSError) as error:
            change()
        assert error.value.errno == errno.EROFS


@fuse
def test_options_of_the_kernel_are_passed_on(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "nosuid,nodev,noexec")
    line = next(
        line.split()
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[1] == str(mounted.mountpoint)
    )
    assert line[0] == str(loop_device)
    assert line[2] == "fuse.extfs"
    assert {"nosuid", "nodev", "noexec", "default_permissions"} <= set(line[3].split(","))


@fuse
def test_read_ahead_is_raised(mounted: Mounted) -> None:
    device = (mounted.mountpoint).stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(setting.read_text()) == 1024


@fuse
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nonsense", "unknown mount option: nonsense"),
        ("cache=much", "is not a size"),
        ("threads=99", "threads"),
    ],
)
def test_bad_options_are_refused(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    run_directory: rundir.RunDirectory,
    options: str,
    said: str,
) -> None:
    extfs("mkfs", loop_device)
    target = run_directory.new_mountpoint()
    result = extfs("mount", loop_device, target, "--foreground", "-o", options, check=False)
    assert result.returncode != 0
    assert said in result.stderr


@fuse
def test_a_busy_or_missing_mountpoint_is_refused(
    mounted: Mounted,
    extfs: ExtfsRunner,
    loop_device: rundir.LoopDevice,
    make_loop: Callable[..., rundir.LoopDevice],
) -> None:
    other = make_loop()
    extfs("mkfs", other)
    for target, said in (
        (mounted.mountpoint, "mounted there already"),
        (mounted.mountpoint / "missing", "no such file or directory"),
    ):
        result = extfs("mount", other, target, "--foreground", check=False)
        assert result.returncode != 0
        assert said in result.stderr.lower()
    (mounted.mountpoint / "file").write_bytes(b"the first mount is unharmed")


@fuse
def test_a_killed_daemon_leaves_a_dead_mount_and_loses_nothing_synced(
    mounted: Mounted, mount_extfs: Callable[..., Mounted]
) -> None:
    with open(mounted.mountpoint / "file", "wb") as file:
        file.write(b"synced")
        file.flush()
        os.fsync(file.fileno())
    mounted.kill()
    with pytest.raises(OSError) as error:
        os.listdir(mounted.mountpoint)
    # The last one over io_uring, for a moment: the kernel ends what it was about to hand over.
    assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)
    mounted.force_off()
    assert (mount_extfs(mounted.device).mountpoint / "file").read_bytes() == b"synced"


@fuse
def test_a_daemon_that_does_not_answer_keeps_no_other_mount(
    mounted: Mounted,
    make_image: Callable[..., Path],
    mount_extfs: Callable[..., Mounted],
    extfs: ExtfsRunner,
) -> None:
    """umount looks for the daemon among all open files, and asks none on another FUSE mount."""
    other = make_image()
    assert extfs("mkfs", other).returncode == 0
    second = mount_extfs(other)
    # Held by somebody else: a descriptor of ours would be flushed in every child that we start.
    with open(mounted.mountpoint / "file", "wb") as file:
        user = subprocess.Popen(["sleep", "60"], stdin=file)
    mounted.daemon.send_signal(signal.SIGSTOP)
    try:
        second.unmount(20)
    finally:
        mounted.daemon.send_signal(signal.SIGCONT)
        user.kill()
        user.wait()


@fuse
def test_many_processes_at_once(mounted: Mounted) -> None:
    """More requests at a time than threads, of every hot kind."""
    script = """
import os, sys
base = os.path.join(sys.argv[1], sys.argv[2])
os.mkdir(base)
for n in range(150):
    path = os.path.join(base, str(n))
    with open(path, "wb") as f: f.write(path.encode() * 100)
    os.rename(path, path + "r")
    with open(path + "r", "rb") as f: assert f.read() == path.encode() * 100
    if n % 3 == 0: os.unlink(path + "r")
    if n % 5 == 0: os.symlink(path, path + "s"); assert os.readlink(path + "s") == path
assert len(os.listdir(base)) == 130, len(os.listdir(base))
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", script, mounted.mountpoint, str(n)])
        for n in range(8)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * 8


@fuse
def test_as_many_descriptors_as_are_allowed(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        mounted = mount_extfs(loop_device)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    limits = Path(f"/proc/{mounted.daemon.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
    soft, hard = line.removeprefix("Max open files").split()[:2]
    assert soft == hard


@pytest.mark.parametrize(("options", "strict"), [("", "1"), ("writeback_cache", "0")])
def test_limits_of_dirty_memory(
    scratch_image: Path,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    options: str,
    strict: str,
) -> None:
    """A hundredth of the memory, but with writeback_cache what any filesystem may have."""
    extfs("mkfs", scratch_image)
    mounted = mount_extfs(scratch_image, options)
    number = mounted.mountpoint.stat().st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}")
    if not (bdi / "strict_limit").exists():
        pytest.skip("this kernel does not tell")
    (mounted.mountpoint / "file").write_bytes(b"x")  # after INIT was answered
    assert (bdi / "strict_limit").read_text().strip() == strict
    assert (bdi / "read_ahead_kb").read_text().strip() == "1024"


@fuse
def test_no_thread_waits_for_file_io_to_get_memory(mounted: Mounted) -> None:
    (mounted.mountpoint / "file").write_bytes(b"x")
    status = Path(f"/proc/{mounted.daemon.pid}/status").read_text()
    effective = int(re.findall(r"^CapEff:\t(\w+)$", status, re.MULTILINE)[0], 16)
    cap_sys_resource = 24  # include/uapi/linux/capability.h
    if not effective >> cap_sys_resource & 1:
        pytest.skip("without CAP_SYS_RESOURCE the kernel refuses PR_SET_IO_FLUSHER")
    memalloc_noio = 0x80000  # PF_MEMALLOC_NOIO of include/linux/sched.h
    for task in Path(f"/proc/{mounted.daemon.pid}/task").iterdir():
        name, _, rest = (task / "stat").read_text().rpartition(")")
        assert int(rest.split()[6]) & memalloc_noio, name
