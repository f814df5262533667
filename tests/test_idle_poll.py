"""Whether idle CPUs poll while requests follow one another: the choice, and a mount that does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rundir
from conftest import ExtfsRunner, Mounted

from extfs.fuse import IdlePoll, latency_device
from extfs.fuse.idle import CPUS_MAX, DEVICE

ENOUGH = 20_000
"""Requests that follow one another; 64 within 32 ms are asked for."""


class Machine:
    """One with this cpuidle driver and so many CPUs."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = tmp_path / "current_driver"
        self.device = tmp_path / "cpu_dma_latency"
        self._monkeypatch = monkeypatch

    def be(self, driver: str | None, cpus: int = 2, *, device: bool = True) -> None:
        self.driver.unlink(missing_ok=True)
        if driver is not None:
            self.driver.write_text(driver + "\n")
        self.device.unlink(missing_ok=True)
        if device:
            self.device.touch()
        self._monkeypatch.setattr(os, "cpu_count", lambda: cpus)

    def ask(self, choice: IdlePoll) -> str:
        """Why not; "" when it would."""
        descriptor, why = latency_device(choice, driver=self.driver, device=self.device)
        assert (descriptor is None) == bool(why)
        if descriptor is not None:
            assert os.readlink(f"/proc/self/fd/{descriptor}") == str(self.device)
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)
        return why


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_where_a_halt_leaves_a_small_virtual_machine(machine: Machine) -> None:
    machine.be("haltpoll", CPUS_MAX)
    assert machine.ask(IdlePoll.AUTO) == ""
    assert machine.ask(IdlePoll.ON) == ""
    assert machine.ask(IdlePoll.OFF) == "not asked for"


def test_not_unasked_on_others(machine: Machine) -> None:
    machine.be("haltpoll", CPUS_MAX + 1)
    assert machine.ask(IdlePoll.AUTO) == f"all {CPUS_MAX + 1} CPUs would"
    assert machine.ask(IdlePoll.ON) == ""
    machine.be("intel_idle", 4)
    assert machine.ask(IdlePoll.AUTO) == "CPUs wake up fast here (cpuidle driver intel_idle)"
    assert machine.ask(IdlePoll.ON) == ""


@pytest.mark.parametrize("driver", [None, "none"])
def test_not_where_nobody_would_listen(machine: Machine, driver: str | None) -> None:
    machine.be(driver)
    for choice in (IdlePoll.AUTO, IdlePoll.ON):
        assert machine.ask(choice) == "the kernel has no cpuidle driver"


def test_without_the_device(machine: Machine) -> None:
    machine.be("haltpoll", device=False)
    for choice in (IdlePoll.AUTO, IdlePoll.ON):
        assert machine.ask(choice) == f"{machine.device}: No such file or directory"


# ---- a mount ----


def bridge_of(mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((mountpoint / ".extfs/status").read_bytes())["bridge"]
    return found


def descriptors(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


def keep_busy(mountpoint: Path) -> None:
    for number in range(ENOUGH):
        with os.fdopen(os.open(mountpoint / "file", os.O_CREAT | os.O_WRONLY)):
            pass
        if number % 1000 == 0 and bridge_of(mountpoint)["idle_polling"]:
            return


_descriptor, why_not = latency_device(IdlePoll.ON)
if _descriptor is not None:
    os.close(_descriptor)


@pytest.mark.fuse
@pytest.mark.skipif(bool(why_not), reason=why_not)
def test_a_mount_asks_while_it_is_used(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "idle_poll=on")
    assert bridge_of(mounted.mountpoint)["idle_poll_why"] == ""
    assert descriptors(mounted.daemon.pid).count(str(DEVICE)) == 1
    keep_busy(mounted.mountpoint)
    assert bridge_of(mounted.mountpoint)["idle_polls"] > 0
    deadline = time.monotonic() + 20
    while (bridge := bridge_of(mounted.mountpoint))["idle_polling"]:
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.05)
    assert bridge["idle_poll_seconds"] > 0
    assert "polled" in extfs("status", mounted.mountpoint).stdout


@pytest.mark.fuse
def test_a_mount_that_must_not(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device, "idle_poll=off")
    keep_busy(mounted.mountpoint)
    bridge = bridge_of(mounted.mountpoint)
    assert (bridge["idle_polls"], bridge["idle_poll_why"]) == (0, "not asked for")
    assert str(DEVICE) not in descriptors(mounted.daemon.pid)
    assert "halt: not asked for" in extfs("status", mounted.mountpoint).stdout


def test_a_word_that_is_none(extfs: ExtfsRunner, tmp_path: Path) -> None:
    refused = extfs("mount", "/dev/null", tmp_path, "-o", "idle_poll=maybe", check=False)
    assert refused.returncode == 2
    assert "option idle_poll: 'maybe' is not auto, on or off" in refused.stderr
