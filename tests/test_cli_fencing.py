"""`extfs fence`: what it prints of a mount, and what it finds out about units, simulated ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ExtfsRunner, Mounted
from reservation_contract import CLIENT, SERVER
from simulated_unit import TYPE, SimulatedNexus, SimulatedTarget

from extfs.cli import fencing
from extfs.control.client import Descriptor, Iomode
from extfs.layout import scsi_unit
from extfs.layout.examination import Finding, examine
from extfs.layout.keys import key_text
from extfs.layout.reservations import Held, Keys, ReservationType

fuse = pytest.mark.fuse
MIB = 1 << 20


def findings(unit: SimulatedNexus, *, reserve: bool = False) -> dict[str, Finding]:
    return {found.subject: found for found in examine(unit, reserve=reserve)}


@pytest.mark.parametrize("reserve", [False, True])
def test_a_unit_that_fits_is_left_as_it_was(reserve: bool) -> None:
    target = SimulatedTarget()
    found = findings(target.nexus("host"), reserve=reserve)
    assert all(one.fits is not False for one in found.values())
    assert found["register"].fits
    assert found["unregister"].fits
    assert (found["reserve"].fits is True) is reserve
    assert found["preempt"].fits is None
    assert (target.registrations, target.holder) == ({}, None)
    assert (("host", "RESERVE") in target.told) is reserve


@pytest.mark.parametrize(
    ("spoil", "subject", "says"),
    [
        ({"persistent": False}, "reservations", "no persistent reservations"),
        ({"designators": []}, "designators", "would not find"),
        ({"aptpl": False}, "APTPL", "no"),
        (
            {"types": frozenset({ReservationType.WRITE_EXCLUSIVE})},
            "reservation types",
            "write exclusive",
        ),
    ],
)
def test_what_a_unit_lacks_is_named(spoil: dict[str, Any], subject: str, says: str) -> None:
    found = findings(SimulatedTarget(**spoil).nexus("host"))
    assert found[subject].fits is False
    assert says in found[subject].text


def test_a_unit_that_does_not_abort_can_be_used() -> None:
    found = findings(SimulatedTarget(aborts=False, types=None).nexus("host"))
    assert all(one.fits is not False for one in found.values())
    assert "reset at each fence" in found["preempt and abort"].text
    assert "does not tell" in found["reservation types"].text


def test_a_unit_in_use_is_only_read() -> None:
    target = SimulatedTarget()
    other = target.nexus("other")
    other.register(SERVER)
    other.reserve(SERVER)
    found = findings(target.nexus("host"), reserve=True)
    assert "in use" in found["round trip"].text
    assert f"{key_text(SERVER)} (an extfs server)" in found["registrations"].text
    assert "type 6" in found["reservation"].text
    assert target.registrations == {"other": SERVER}
    assert not any(what in ("REGISTER", "RESERVE") for host, what in target.told if host == "host")


@pytest.mark.parametrize("command", ["REGISTER", "RESERVE", "READ KEYS", "PREEMPT", "READ"])
@pytest.mark.parametrize("trouble", ["refused", "lost before", "lost after"])
def test_trouble_on_the_way_leaves_nothing_behind(command: str, trouble: str) -> None:
    target = SimulatedTarget()
    unit = target.nexus("host")
    if command == "READ KEYS":
        target.before("host", "REGISTER", lambda: target.trouble("host", command, trouble))  # type: ignore[arg-type]
    else:
        target.trouble("host", command, trouble)  # type: ignore[arg-type]
    found = findings(unit, reserve=True)
    assert found["round trip"].fits is False
    assert (target.registrations, target.holder) == ({}, None)


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "confirm", "test"])
def test_every_command_has_help_with_exit_codes(command: str, extfs: ExtfsRunner) -> None:
    assert "Exit codes" in " ".join(extfs("fence", command, "--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fence", "list"], 2, "Missing argument"),
        (["fence", "list", "/etc"], 1, "no extfs is mounted here"),
        (["fence", "list", "/nonexistent"], 1, "No such file"),
        (["fence", "list", "/etc/passwd"], 1, "no block device"),
        (["fence", "confirm", "/etc"], 2, "Missing argument"),
        (["fence", "confirm", "/etc", "1"], 2, "--yes"),
        (["fence", "confirm", "/etc", "1", "--yes"], 1, "no extfs is mounted there"),
        (["fence", "confirm", "/etc", "x", "--yes"], 2, "not a number"),
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


def test_an_image_cannot_be_used(extfs: ExtfsRunner, make_image: Callable[..., Path]) -> None:
    image = make_image(MIB)
    result = extfs("fence", "test", image, check=False)
    assert result.returncode == 1
    assert "no block device" in result.stdout
    assert "cannot be used" in result.stdout
    said = json.loads(extfs("fence", "test", image, "--json", check=False).stdout)
    assert said["usable"] is False
    assert said["findings"][0]["fits"] is False


def test_a_loop_device_has_no_reservations(extfs: ExtfsRunner, loop_device: Path) -> None:
    result = extfs("fence", "test", loop_device, check=False)
    assert result.returncode == 1
    assert "does not take SCSI commands" in result.stdout


def test_the_test_of_a_unit(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    target = SimulatedTarget()
    monkeypatch.setattr(scsi_unit, "ScsiUnit", lambda device: target.nexus("host"))
    assert fencing.test.main(["/dev/x"], standalone_mode=False) == 0
    told = capsys.readouterr().out
    assert "layouts=scsi can be used" in told
    assert "naa.6001405a1b2c3d4e5f60718293a4b5c6" in told
    target.aptpl = False
    assert fencing.test.main(["/dev/x"], standalone_mode=False) == 1
    assert "NO" in capsys.readouterr().out


def test_keys_are_told_with_their_holders(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    keys = Keys(9, (SERVER, CLIENT, CLIENT, 0x77))
    held = Held(SERVER, TYPE)
    rows = fencing._key_rows(keys, held, [{"id": 12, "fence_key": key_text(CLIENT)}, {"id": 13}])
    assert [(row["key"], row["paths"], row["holder"], row["holds"]) for row in rows] == [
        (key_text(SERVER), 1, None, True),
        (key_text(CLIENT), 2, 12, False),
        (key_text(0x77), 1, None, False),
    ]
    fencing._write_keys("/dev/x", rows, None)
    told = capsys.readouterr().out
    assert "serves everybody" in told
    assert "not of extfs" in told


@fuse
def test_a_lost_holder_waits_and_is_confirmed(mounted: Mounted, extfs: ExtfsRunner) -> None:
    assert "no fence waits" in extfs("fence", "list", mounted.mountpoint).stdout
    file = mounted.mountpoint / "file"
    file.touch()
    with Descriptor.of(file, write=True) as descriptor:
        holder = descriptor.register("a writer")
        holder.get(Iomode.RW, 0, MIB)
    deadline = time.monotonic() + 20
    while True:
        said = json.loads(extfs("fence", "list", mounted.mountpoint, "--json").stdout)
        if said["fences"]["waiting"]:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert said["fences"]["waiting"][0]["holder"] == holder.id
    assert said["unit"]["error"]
    text = extfs("fence", "list", mounted.device).stdout  # the same, named by its device
    assert "fences that wait" in text
    extfs("fence", "confirm", mounted.mountpoint, str(holder.id), "--yes")
    text = extfs("fence", "list", mounted.mountpoint).stdout
    assert "no fence waits" in text
    assert "fences of this mount that are over" in text
    result = extfs("fence", "confirm", mounted.mountpoint, str(holder.id), "--yes", check=False)
    assert result.returncode == 1
    assert "there is no holder" in result.stderr
