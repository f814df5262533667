"""The resource agent for Pacemaker: its actions, as a cluster calls them, on loop devices."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rundir
from conftest import ENABLE_URING, ExtfsRunner, Mounted, extfs_command, why_no_ring

AGENT = Path(__file__).resolve().parent.parent / "scripts" / "ocf" / "extfs"
PARAMETERS = {
    "config",
    "device",
    "mountpoint",
    "options",
    "nfs",
    "exports",
    "take_over",
    "busy_seconds",
    "answer_seconds",
    "extfs",
}

SUCCESS, GENERIC, ARGS, UNIMPLEMENTED, PERM, INSTALLED, CONFIGURED, NOT_RUNNING = range(8)


class Agent:
    """One resource. `said` is what the last action wrote to standard error."""

    def __init__(self, directory: rundir.RunDirectory, **parameters: object) -> None:
        self.parameters = {"extfs": extfs_command()[0], "busy_seconds": 1, **parameters}
        self.environment = directory.environment()
        self.said = ""

    def __call__(self, action: str, **more: object) -> int:
        words = {f"OCF_RESKEY_{k}": str(v) for k, v in {**self.parameters, **more}.items()}
        done = subprocess.run(
            [str(AGENT), action],
            env={**self.environment, "OCF_ROOT": "/usr/lib/ocf", **words},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        self.said = done.stderr
        return done.returncode


def daemons(device: os.PathLike[str]) -> list[int]:
    from extfs.cli.mounts import daemons_of

    return daemons_of(os.fspath(device))


def mounts(mountpoint: Path) -> list[rundir.Mount]:
    return rundir.mounts_below(mountpoint)


@pytest.fixture
def resource(
    run_directory: rundir.RunDirectory, extfs: ExtfsRunner, loop_device: rundir.LoopDevice
) -> Iterator[Agent]:
    """A formatted device and a mountpoint; stopped."""
    extfs("mkfs", loop_device)
    agent = Agent(run_directory, device=loop_device, mountpoint=run_directory.new_mountpoint())
    yield agent
    assert agent("stop") == SUCCESS, agent.said
    assert daemons(loop_device) == []


# ---- without a device ----------------------------------------------------------------------------


def test_the_meta_data_describe_all_parameters_and_actions(
    run_directory: rundir.RunDirectory,
) -> None:
    done = subprocess.run([str(AGENT), "meta-data"], capture_output=True, text=True, check=True)
    root = ET.fromstring(done.stdout)
    assert root.tag == "resource-agent"
    assert root.get("name") == "extfs"
    assert root.findtext("version") == "1.1"
    assert {p.get("name") for p in root.iter("parameter")} == PARAMETERS
    for parameter in root.iter("parameter"):
        assert parameter.find("content") is not None
        for text in ("longdesc", "shortdesc"):
            assert (parameter.findtext(text) or "").strip()
    actions = {action.get("name"): action.attrib for action in root.iter("action")}
    assert set(actions) == {"start", "stop", "monitor", "validate-all", "meta-data"}
    assert all("timeout" in action for action in actions.values())
    assert "interval" in actions["monitor"]
    # What the description names is what the script reads, each with a default.
    read = set(AGENT.read_text().split('"${OCF_RESKEY_')[1:])
    assert {text.split("=")[0].rstrip(":") for text in read} == PARAMETERS


def test_it_is_plain_sh() -> None:
    shell = shutil.which("dash") or "/bin/sh"
    subprocess.run([shell, "-n", str(AGENT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=sh", str(AGENT)], check=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["promote"], UNIMPLEMENTED), ([], ARGS), (["start", "now"], ARGS), (["usage"], SUCCESS)],
)
def test_other_actions(arguments: list[str], code: int) -> None:
    done = subprocess.run([str(AGENT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "usage: extfs {start|stop|monitor" in done.stderr


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "device and mountpoint must be set"),
        ({"device": "/dev/x"}, "device and mountpoint must be set"),
        ({"device": "/dev/x", "mountpoint": "srv"}, "not an absolute path"),
        (
            {"device": "/dev/x", "mountpoint": "/srv", "take_over": "maybe"},
            "neither true nor false",
        ),
        ({"device": "/dev/x", "mountpoint": "/srv", "busy_seconds": "long"}, "not a number"),
        ({"device": "/dev/x", "mountpoint": "/srv", "answer_seconds": "0"}, "in no time"),
        ({"device": "/dev/x", "mountpoint": "/srv", "exports": "/:rw"}, "nfs is not"),
        ({"device": "/dev/x", "config": "/etc/x.toml"}, "config says everything"),
    ],
)
@pytest.mark.parametrize("action", ["validate-all", "start", "stop", "monitor"])
def test_wrong_parameters_are_told(
    run_directory: rundir.RunDirectory, action: str, parameters: dict[str, str], said: str
) -> None:
    agent = Agent(run_directory, **parameters)
    assert agent(action) == CONFIGURED
    assert said in agent.said
    assert agent.said.startswith("ocf-exit-reason:")


def test_a_missing_program_is_told(run_directory: rundir.RunDirectory) -> None:
    agent = Agent(run_directory, device="/dev/x", mountpoint="/srv", extfs="/no/such/extfs")
    assert agent("validate-all") == INSTALLED
    assert "no program /no/such/extfs" in agent.said
    # On a node without it nothing can be running.
    assert agent("monitor") == NOT_RUNNING


def test_a_missing_configuration(run_directory: rundir.RunDirectory) -> None:
    agent = Agent(run_directory, config=run_directory.path / "nowhere.toml")
    assert agent("validate-all") == INSTALLED
    assert agent("start") == INSTALLED
    assert agent("monitor") == NOT_RUNNING
    assert agent("stop") == SUCCESS


@pytest.fixture
def recorder(run_directory: rundir.RunDirectory) -> tuple[Path, Path]:
    """A program in place of extfs, and the file in which it notes its arguments."""
    notes = run_directory.path / "notes"
    notes.unlink(missing_ok=True)
    program = run_directory.path / "recorder"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{notes}\necho refused >&2\nexit 1\n')
    program.chmod(0o755)
    return program, notes


def test_what_a_start_asks_for(
    run_directory: rundir.RunDirectory, recorder: tuple[Path, Path], make_image: Callable[..., Path]
) -> None:
    program, notes = recorder
    device, mountpoint = make_image(1 << 20), run_directory.new_mountpoint()
    agent = Agent(
        run_directory,
        extfs=program,
        device=device,
        mountpoint=mountpoint,
        options="noatime,recall=3",
        nfs="192.0.2.1:2049",
        exports="/a:rw,layouts=scsi /b:[::1],*",
        take_over="true",
    )
    assert agent("start") == GENERIC
    assert "ocf-exit-reason:refused" in agent.said
    assert notes.read_text().splitlines() == [
        "mount",
        str(device),
        str(mountpoint),
        "-o",
        "noatime,recall=3",
        "--nfs",
        "192.0.2.1:2049",
        "--export",
        "/a:rw,layouts=scsi",
        "--export",
        "/b:[::1],*",
        "--take-over",
    ]
    assert agent("start", take_over="no", nfs="", exports="", options="") == GENERIC
    assert notes.read_text().splitlines() == ["mount", str(device), str(mountpoint)]


def test_a_start_by_a_configuration_asks_for_it(
    run_directory: rundir.RunDirectory, recorder: tuple[Path, Path], make_image: Callable[..., Path]
) -> None:
    program, notes = recorder
    config = run_directory.path / "recorded.toml"
    config.write_text(
        f"# device = \"/dev/null\"\ndevice = '{make_image(1 << 20)}'  # a literal one\n"
        f'mountpoint="{run_directory.new_mountpoint()}"\n[nfs]\ndevice = "/not/this"\n'
    )
    agent = Agent(run_directory, extfs=program, config=config, take_over="yes")
    assert agent("start") == GENERIC
    assert notes.read_text().splitlines() == ["mount", "--config", str(config), "--take-over"]
    assert agent("validate-all", mountpoint="/elsewhere") == CONFIGURED


# ---- on a loop device ----------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_life(resource: Agent, extfs: ExtfsRunner) -> None:
    device, mountpoint = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    assert resource("validate-all") == SUCCESS
    assert resource("monitor") == NOT_RUNNING
    assert resource("stop") == SUCCESS, "not running is what a stop wants"
    assert resource("start") == SUCCESS, resource.said
    assert resource("monitor") == SUCCESS
    assert resource("status") == SUCCESS
    (mountpoint / "file").write_bytes(b"kept")
    daemon = daemons(device)
    assert resource("start") == SUCCESS, "running is what a start wants"
    assert daemons(device) == daemon
    assert len(mounts(mountpoint)) == 1
    assert resource("stop") == SUCCESS, resource.said
    assert mounts(mountpoint) == []
    assert daemons(device) == []
    assert resource("monitor") == NOT_RUNNING
    assert resource("stop") == SUCCESS
    extfs("fsck", device)
    assert resource("start") == SUCCESS
    assert (mountpoint / "file").read_bytes() == b"kept"


def synced(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"synced")
        file.flush()
        os.fsync(file.fileno())


def kill(device: os.PathLike[str]) -> None:
    """The daemon, as -9 does. It is nobody's child here."""
    (pid,) = daemons(device)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while daemons(device):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fuse
def test_a_dead_daemon_is_seen_and_started_again(resource: Agent) -> None:
    device, mountpoint = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    assert resource("start") == SUCCESS, resource.said
    synced(mountpoint / "file")
    kill(device)
    assert resource("monitor") == GENERIC
    assert "is dead" in resource.said
    assert resource("start") == SUCCESS, resource.said
    assert resource("monitor") == SUCCESS
    assert (mountpoint / "file").read_bytes() == b"synced"
    assert len(mounts(mountpoint)) == 1


@pytest.mark.fuse
def test_a_stop_clears_away_what_a_dead_daemon_left(resource: Agent, extfs: ExtfsRunner) -> None:
    device, mountpoint = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    assert resource("start") == SUCCESS, resource.said
    # Somebody sits in it: no ordinary unmount would do.
    user = subprocess.Popen(["sleep", "60"], cwd=mountpoint)
    try:
        kill(device)
        assert resource("monitor") == GENERIC
        assert resource("stop") == SUCCESS, resource.said
        assert resource("monitor") == NOT_RUNNING
    finally:
        user.kill()
        user.wait()
    assert mounts(mountpoint) == []


@pytest.mark.fuse
def test_a_stop_with_open_files(resource: Agent, extfs: ExtfsRunner) -> None:
    device, mountpoint = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    assert resource("start") == SUCCESS, resource.said
    synced(mountpoint / "file")
    script = 'exec 3>"$0/open"; echo ready; read go; echo more >&3'
    user = subprocess.Popen(
        ["sh", "-c", script, str(mountpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == b"ready\n"
    begin = time.monotonic()
    assert resource("stop") == SUCCESS, resource.said
    assert "is in use" in resource.said
    assert 1 <= time.monotonic() - begin < 40
    assert daemons(device) == []
    user.communicate(b"go\n", timeout=20)
    assert user.returncode != 0, "a write after the stop was accepted"
    extfs("fsck", device)
    assert resource("start") == SUCCESS, resource.said
    assert (mountpoint / "file").read_bytes() == b"synced"


@pytest.mark.fuse
def test_a_stop_waits_for_who_closes_in_time(resource: Agent) -> None:
    mountpoint = Path(str(resource.parameters["mountpoint"]))
    assert resource("start") == SUCCESS, resource.said
    script = 'exec 3>"$0/open"; echo ready; sleep 2; echo more >&3'
    user = subprocess.Popen(["sh", "-c", script, str(mountpoint)], stdout=subprocess.PIPE)
    assert user.stdout is not None
    assert user.stdout.readline() == b"ready\n"
    assert resource("stop", busy_seconds=30) == SUCCESS
    assert "in use" not in resource.said
    assert user.wait(20) == 0
    user.stdout.close()
    assert resource("start") == SUCCESS, resource.said
    assert (mountpoint / "open").read_bytes() == b"more\n"


@pytest.fixture(params=["classic", "uring"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the kernel's switch for it. Over io_uring nobody can kill who waits for an answer."""
    if request.param == "classic":
        yield "classic"
        return
    why = why_no_ring()
    if why is not None:
        pytest.skip(why)
    before = ENABLE_URING.read_text()
    ENABLE_URING.write_text("Y")
    try:
        yield "uring"
    finally:
        ENABLE_URING.write_text(before)


@pytest.mark.fuse
@pytest.mark.slow
def test_a_daemon_that_does_not_answer_is_failed_and_killed(
    resource: Agent, extfs: ExtfsRunner, transport: str
) -> None:
    resource.parameters["options"] = f"transport={transport}"
    device, mountpoint = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    assert resource("start") == SUCCESS, resource.said
    synced(mountpoint / "file")
    (pid,) = daemons(device)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert resource("monitor", answer_seconds=1) == GENERIC
        assert "has not answered for 1 s" in resource.said
        assert resource("stop") == SUCCESS, resource.said
        assert "does not end" in resource.said
    finally:
        if pid in daemons(device):
            os.kill(pid, signal.SIGCONT)
    assert daemons(device) == []
    assert mounts(mountpoint) == []
    assert resource("start") == SUCCESS, resource.said
    assert (mountpoint / "file").read_bytes() == b"synced"


@pytest.mark.fuse
@pytest.mark.parametrize("take_over", ["false", "true"])
def test_by_a_configuration(
    run_directory: rundir.RunDirectory,
    extfs: ExtfsRunner,
    loop_device: rundir.LoopDevice,
    take_over: str,
) -> None:
    extfs("mkfs", loop_device)
    mountpoint = run_directory.new_mountpoint()
    config = run_directory.path / "agent.toml"
    text = f'device = "{loop_device}"\nmountpoint = "{mountpoint}"\noptions = "noatime"\n'
    config.write_text(text)
    agent = Agent(run_directory, config=config, take_over=take_over)
    try:
        assert agent("monitor") == NOT_RUNNING
        assert agent("start") == SUCCESS, agent.said
        assert agent("monitor") == SUCCESS
        config.unlink()
        # It cannot say what runs, so it must not say that nothing does.
        assert agent("stop") == GENERIC
        assert agent("monitor") == GENERIC
    finally:
        config.write_text(text)
        assert agent("stop") == SUCCESS, agent.said
    assert daemons(loop_device) == []


@pytest.mark.fuse
def test_failover(resource: Agent, run_directory: rundir.RunDirectory) -> None:
    """Another node starts it after the first one died; what is left there is no harm to it."""
    device, first = resource.parameters["device"], Path(str(resource.parameters["mountpoint"]))
    second = run_directory.new_mountpoint()
    other = Agent(run_directory, device=device, mountpoint=second, take_over="true")
    assert resource("start") == SUCCESS, resource.said
    synced(first / "file")
    assert other("start") == GENERIC, "two at a time"
    assert resource("monitor") == SUCCESS
    kill(device)
    try:
        assert other("start") == SUCCESS, other.said
        assert (second / "file").read_bytes() == b"synced"
        assert resource("monitor") == GENERIC
        assert resource("stop") == SUCCESS, resource.said
        assert mounts(first) == []
        assert other("monitor") == SUCCESS
        assert resource("start") == GENERIC
    finally:
        assert other("stop") == SUCCESS, other.said


@pytest.mark.fuse
def test_what_cannot_start(
    run_directory: rundir.RunDirectory, loop_device: rundir.LoopDevice
) -> None:
    mountpoint = run_directory.new_mountpoint()
    agent = Agent(run_directory, device=loop_device, mountpoint=mountpoint)
    assert agent("start") == GENERIC, "there is no filesystem on it"
    assert agent.said.count("ocf-exit-reason:") == 1
    assert agent("start", options="nonsense") == CONFIGURED
    assert agent("start", device=f"{loop_device}-missing") == INSTALLED
    assert agent("start", mountpoint=mountpoint / "missing") == INSTALLED
    assert agent("monitor") == NOT_RUNNING
    assert daemons(loop_device) == []


@pytest.mark.fuse
def test_a_mount_of_somebody_else_is_left_alone(
    run_directory: rundir.RunDirectory,
    mounted: Mounted,
    make_loop: Callable[..., rundir.LoopDevice],
    extfs: ExtfsRunner,
) -> None:
    agent = Agent(run_directory, device=mounted.device, mountpoint=run_directory.new_mountpoint())
    assert agent("monitor") == NOT_RUNNING
    assert agent("stop") == SUCCESS
    assert "left alone" in agent.said
    assert mounted.daemon.poll() is None
    # Another device at our mountpoint is not ours either.
    other = make_loop()
    extfs("mkfs", other)
    agent = Agent(run_directory, device=other, mountpoint=mounted.mountpoint)
    assert agent("monitor") == NOT_RUNNING
    assert agent("start") == GENERIC
    assert "mounted there already" in agent.said
    assert agent("stop") == SUCCESS
    assert mounted.is_mounted()
    assert mounted.daemon.poll() is None
