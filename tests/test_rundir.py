"""The harness's promise: whatever a killed run leaves behind is found and cleared, and no more."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import LogWatch

TESTS = Path(__file__).resolve().parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")


def killed_run(body: str) -> Path:
    """Have another process run `body` with a RunDirectory `run`, and kill it; its directory."""
    program = "\n".join(
        [
            "import subprocess, time, rundir",
            "run = rundir.RunDirectory()",
            body,
            "print(run.path, flush=True)",
            "time.sleep(60)",
        ]
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=TESTS
    ) as process:
        assert process.stdout
        directory = Path(process.stdout.readline().strip())
        process.kill()
    assert directory.name.startswith("extfs-run-")
    assert directory.is_dir()
    return directory


def test_living_run_is_left_alone() -> None:
    run = rundir.RunDirectory()
    image = run.new_image(4096)
    rundir.sweep_stale()
    assert image.exists()
    assert run.close() == []
    assert not run.path.exists()


def test_killed_run_leaves_processes_that_are_ended() -> None:
    directory = killed_run(
        "subprocess.Popen(['sleep', '1000'], env=run.environment(), stdout=subprocess.DEVNULL)"
    )
    pids = list(rundir.processes_of(directory))
    assert len(pids) == 1
    swept = rundir.sweep_stale()
    assert any(f"ended process {pids[0]} (sleep 1000)" in what for what in swept)
    assert not list(rundir.processes_of(directory))
    assert not directory.exists()


def test_process_of_nobody_is_not_touched() -> None:
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        directory = killed_run("pass")
        rundir.sweep_stale()
        assert not directory.exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@needs_root
def test_killed_run_leaves_a_mount_on_a_loop_device() -> None:
    directory = killed_run("""
device = run.attach(run.new_image(64 << 20))
subprocess.run(['mkfs.ext4', '-q', str(device)], check=True)
subprocess.run(['mount', str(device), str(run.new_mountpoint())], check=True)
""")
    assert len(rundir.loop_devices_below(directory)) == 1
    assert [mount.fstype for mount in rundir.mounts_below(directory)] == ["ext4"]
    rundir.sweep_stale()
    assert not rundir.loop_devices_below(directory)
    assert not rundir.mounts_below(directory)
    assert not directory.exists()


@needs_root
def test_image_of_somebody_else_is_refused(tmp_path: Path) -> None:
    run = rundir.RunDirectory()
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(ValueError, match="does not belong"):
        run.attach(image)
    run.close()


@needs_root
def test_loop_device_reads_its_image(
    make_loop: Callable[..., rundir.LoopDevice], make_image: Callable[..., Path]
) -> None:
    image = make_image(1 << 20)
    image.write_bytes(b"extfs" + bytes((1 << 20) - 5))
    device = make_loop(image=image)
    assert device.path.is_block_device()
    with device.path.open("rb") as file:
        assert file.read(5) == b"extfs"


@pytest.mark.expect_log("^WARNING extfs.test: as expected$")
def test_expected_warning_passes() -> None:
    logging.getLogger("extfs.test").warning("as expected")


def test_log_watch_tells_unexpected_from_expected() -> None:
    watch = LogWatch([], lines=["WARNING extfs: one"])
    assert watch.problems() == ["unexpected in the log: WARNING extfs: one"]
    watch.expect("one$")
    assert watch.problems() == []
    watch.expect("two$")
    assert watch.problems() == ["expected in the log, but not there: two$"]
