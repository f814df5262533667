"""Who may mount a reserved unit, and what a mount does about it until its end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from conftest import LogWatch
from reservation_contract import outcome_of
from simulated_unit import SimulatedNexus, SimulatedTarget

from extfs.core import ROOT_INODE, Device, Filesystem, HolderKind, HolderSpec, mkfs
from extfs.layout import reserved_mount
from extfs.layout.keys import is_client_key, new_client_key, new_server_key
from extfs.layout.reserved_mount import ASKING_MAX, ReservedMount, reserve, why_refused
from extfs.layout.server_reservation import RefusedError, State

OTHER = """
import sys, time
from extfs.core import Device, Filesystem
fs = Filesystem.open(Device.open(sys.argv[1]))
print("mounted", flush=True)
sys.stdin.read()
fs.close()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A formatted image."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    with Device.open(str(path)) as device:
        mkfs(device)
    return path


@pytest.fixture
def unit() -> SimulatedTarget:
    """The unit that the image is on."""
    return SimulatedTarget()


@pytest.fixture
def elsewhere(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the filesystem open."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"mounted\n"
    with process:
        yield process
        process.kill()


def other_server(unit: SimulatedTarget) -> int:
    """Another host's server, which holds the reservation; its key."""
    nexus, key = unit.nexus("other"), new_server_key()
    nexus.register(key)
    nexus.reserve(key)
    return key


def here(unit: SimulatedTarget) -> SimulatedNexus:
    return unit.nexus("here")


@contextlib.contextmanager
def mounted(image: Path, unit: SimulatedTarget) -> Iterator[ReservedMount]:
    mount = reserve(str(image), take_over=False, unit=here(unit))
    with Filesystem.open(Device.open(str(image))) as filesystem:
        mount.filesystem = filesystem
        yield mount


def test_a_free_unit_is_reserved(image: Path, unit: SimulatedTarget) -> None:
    mount = reserve(str(image), take_over=False, unit=here(unit))
    assert unit.key_of_holder() == mount.reservation.key
    assert unit.serves("here")
    assert not unit.serves("other")
    assert "APTPL" in mount.described()


def test_the_next_mount_of_this_host_goes_on(image: Path, unit: SimulatedTarget) -> None:
    first = reserve(str(image), take_over=False, unit=here(unit))
    first.reservation.close()
    second = reserve(str(image), take_over=False, unit=here(unit))
    assert second.reservation.key == first.reservation.key
    assert unit.key_of_holder() == second.reservation.key


def test_who_unmounted_is_preempted(
    image: Path, unit: SimulatedTarget, log_watch: LogWatch
) -> None:
    other_server(unit)
    mount = reserve(str(image), take_over=False, unit=here(unit))
    log_watch.expect("taken over from")
    assert unit.key_of_holder() == mount.reservation.key
    assert not unit.serves("other")


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("reserved", [False, True])
def test_a_living_mount_stays(
    image: Path,
    unit: SimulatedTarget,
    elsewhere: subprocess.Popen[bytes],
    take_over: bool,
    reserved: bool,
) -> None:
    """Also one without a reservation, which would lose its device."""
    key = other_server(unit) if reserved else None
    with pytest.raises(RefusedError, match=r"mounted by .* alive"):
        reserve(str(image), take_over=take_over, unit=here(unit))
    assert here(unit).keys().keys == (() if key is None else (key,))
    assert unit.serves("other")


def test_a_dead_mount_is_taken_over_when_asked_for(
    image: Path,
    unit: SimulatedTarget,
    elsewhere: subprocess.Popen[bytes],
    log_watch: LogWatch,
) -> None:
    key = other_server(unit)
    elsewhere.kill()
    elsewhere.wait()
    with pytest.raises(RefusedError, match=f"key {key:#018x}.*--take-over"):
        reserve(str(image), take_over=False, unit=here(unit))
    assert here(unit).keys().keys == (key,)
    mount = reserve(str(image), take_over=True, unit=here(unit))
    log_watch.expect("taken over from")
    assert unit.key_of_holder() == mount.reservation.key
    assert not unit.serves("other")


def test_a_stranger_is_not_preempted(image: Path, unit: SimulatedTarget) -> None:
    stranger = unit.nexus("other")
    stranger.register(0x1234)
    stranger.reserve(0x1234)
    for take_over in (False, True):
        with pytest.raises(RefusedError, match=r"0x0000000000001234.*no server"):
            reserve(str(image), take_over=take_over, unit=here(unit))
    assert unit.serves("other")
    assert stranger.keys().keys == (0x1234,)


def test_who_cannot_read_is_told_whose_it_is(image: Path, unit: SimulatedTarget) -> None:
    assert why_refused(str(image)) is None  # no unit at all
    assert why_refused(str(image), here(unit)) is None
    key = other_server(unit)
    told = why_refused(str(image), here(unit))
    assert told == f"{image} is reserved by an extfs server, with key {key:#018x}"


def test_keys_of_clients_are_new(image: Path, unit: SimulatedTarget) -> None:
    with mounted(image, unit) as mount:
        keys = {mount.new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(map(is_client_key, keys))


def test_no_answer_of_the_unit_is_waited_for_without_end(
    image: Path, unit: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for a key holds a thread that the end of the server waits for."""
    monkeypatch.setattr(reserved_mount, "KEY_SECONDS", 0.05)
    with mounted(image, unit) as mount:
        unit.trouble("here", "READ KEYS", "hangs")
        for _ in range(ASKING_MAX):
            with pytest.raises(OSError, match="has not answered for"):
                mount.new_key()
        with pytest.raises(OSError, match="has not answered earlier ones"):
            mount.new_key()
        unit.released.set()
        for _ in range(ASKING_MAX):  # one after the other they have their answers
            assert mount._asking.acquire(timeout=20)
        mount._asking.release(ASKING_MAX)
        monkeypatch.undo()
        assert is_client_key(mount.new_key())
        # What is left behind finds the filesystem closed.
        unit.released.clear()
        unit.trouble("here", "READ KEYS", "hangs")
        monkeypatch.setattr(reserved_mount, "KEY_SECONDS", 0.05)
        with pytest.raises(OSError, match="has not answered for"):
            mount.new_key()
        mount.let_go()
    unit.released.set()
    with pytest.raises(OSError, match="unmounted"):
        mount.new_key()


def test_a_unit_that_forgot_is_reserved_again(
    image: Path, unit: SimulatedTarget, log_watch: LogWatch
) -> None:
    with mounted(image, unit) as mount:
        assert mount.look().state is State.HELD
        unit.restart(forget=True)
        assert mount.look().state is State.RESTORED
        log_watch.expect("had lost its reservation")
        assert unit.key_of_holder() == mount.reservation.key
        assert not unit.serves("other")
        assert mount.look().state is State.HELD


def test_holders_whose_registration_is_lost_end(
    image: Path, unit: SimulatedTarget, log_watch: LogWatch
) -> None:
    """Their clients' I/O is refused, and would be as long as they have the same device id."""
    with mounted(image, unit) as mount:
        assert mount.filesystem is not None
        layouts = mount.filesystem.layouts
        keys = [mount.new_key() for _ in range(2)]
        holders = [
            layouts.register(HolderSpec(str(key), HolderKind.CLIENT, fence_key=key))[0]
            for key in keys
        ]
        unit.nexus("client").register(keys[0])
        assert mount.look().state is State.HELD
        unit.restart(forget=True)
        mount.look()
        log_watch.expect("1 registrations of clients are lost")
        assert mount.holder_keys() == {keys[1]}
        assert layouts.holder(holders[1]) is not None


def test_a_unit_that_another_host_mounted_meanwhile_is_left_alone(
    image: Path, unit: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forgot, and was mounted elsewhere without a reservation."""
    with mounted(image, unit) as mount:
        unit.restart(forget=True)
        monkeypatch.setattr(Filesystem, "mount_stands", lambda filesystem: False)
        assert mount.look().state is State.TAKEN
        assert unit.key_of_holder() is None


async def test_a_server_that_was_taken_over_stops(
    image: Path, unit: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserved_mount, "CHECK_SECONDS", 0.01)
    with mounted(image, unit) as mount:
        nexus, key = unit.nexus("other"), new_server_key()
        nexus.register(key)
        nexus.preempt_abort(key, mount.reservation.key)
        told: list[str] = []
        with trio.fail_after(20):
            await mount.keep(told.append)
        assert len(told) == 1
        assert "taken over" in told[0]
        assert not unit.serves("here")


def test_registrations_of_nobody_are_preempted(image: Path, unit: SimulatedTarget) -> None:
    """A client that was fenced by a mount before this one, and wakes up."""
    with mounted(image, unit) as mount:
        stray = unit.nexus("stray")
        key = new_client_key(())
        stray.register(key)
        assert unit.serves("stray")
        mount.look()
        assert not unit.serves("stray")
        assert key not in here(unit).keys().keys


def test_the_filesystem_begins_no_io_while_the_unit_is_reset(
    image: Path, unit: SimulatedTarget
) -> None:
    """What the kernel had has ended before the reset; what came meanwhile goes on after it."""
    with mounted(image, unit) as mount:
        filesystem = mount.filesystem
        assert filesystem is not None
        nexus = here(unit)
        nexus.submit(3, b"ours")
        seen: list[object] = []
        written = threading.Event()

        def sync() -> None:
            filesystem.mkdir(ROOT_INODE, b"new", 0o755)
            filesystem.sync()
            written.set()

        def at_reset() -> None:
            seen.append(nexus.idle())
            thread.start()
            seen.append(written.wait(0.3))

        thread = threading.Thread(target=sync)
        unit.before("here", "RESET", at_reset)
        threading.Timer(0.1, unit.settle).start()
        key = mount.new_key()
        mount.reservation.offered(key)
        unit.aborts = False
        mount.reservation.capabilities = replace(mount.reservation.capabilities, aborts=False)
        unit.nexus("client").register(key)
        outcome = outcome_of(mount.reservation, key)
        assert "the unit reset in" in outcome.detail
        assert seen == [True, False]
        assert written.wait(20)
        thread.join()
        assert unit.blocks[3] == b"ours"


def test_a_reset_without_an_answer_does_not_hold_the_filesystem_up(
    image: Path, unit: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserved_mount, "HOLD_SECONDS", 0.2)
    monkeypatch.setattr(reserved_mount, "QUIET_SECONDS", 0.1)
    with mounted(image, unit) as mount:
        filesystem = mount.filesystem
        assert filesystem is not None
        here(unit).submit(3, b"never ends")  # is waited for, but not for ever
        with mount.quiet():
            filesystem.mkdir(ROOT_INODE, b"new", 0o755)
            filesystem.sync()  # waits until nobody believes in the reset any more
        with mount.quiet():
            mount.let_go()  # an unmount meanwhile
        filesystem.sync()
