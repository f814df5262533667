"""Reservations: the contract of a unit on the simulated one, as an object and as a kernel's ioctls;
keys; what makes a unit unfit; what the driver of real devices sends and reads.

Real units are held to the same contract: see ``reservation_contract``.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reservation_contract as contract
from reservation_contract import SERVER, Nexuses
from reservation_world import client, server
from simulated_unit import NAA, TYPE, KernelFace, SimulatedNexus, SimulatedTarget

from extfs.layout import keys as keys_module
from extfs.layout import scsi_unit
from extfs.layout.keys import (
    is_client_key,
    is_server_key,
    key_text,
    new_client_key,
    new_server_key,
)
from extfs.layout.reservations import (
    Capabilities,
    Designator,
    Held,
    ReservationType,
    UnitError,
    UnreachableError,
    UnsupportedError,
)
from extfs.layout.scsi_unit import (
    ScsiUnit,
    disk_of_number,
    parse_capabilities,
    parse_designators,
    parse_keys,
)
from extfs.layout.server_reservation import RefusedError, ServerReservation, State

CLIENT = contract.CLIENT


@pytest.fixture
def target() -> SimulatedTarget:
    return SimulatedTarget()


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KernelFace]:
    face = KernelFace()
    monkeypatch.setattr(scsi_unit.fcntl, "ioctl", face.ioctl)
    monkeypatch.setattr(scsi_unit, "whole_disk", lambda path: path)
    monkeypatch.setattr(scsi_unit, "LOCKS", tmp_path)
    return face


def scsi_device(face: KernelFace, nexus: SimulatedNexus, locks: Path) -> ScsiUnit:
    """The driver of real devices on the simulated kernel."""
    unit = ScsiUnit(os.devnull, locks=locks)
    os.close(unit._device)
    unit._device = face.open(nexus)
    return unit


# ---- the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_simulated_unit(
    check: Callable[[Nexuses], None], target: SimulatedTarget
) -> None:
    check(Nexuses(target.nexus("one"), target.nexus("two")))


@pytest.mark.parametrize("as_linux", [False, True])
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_through_ioctls(
    check: Callable[[Nexuses], None], as_linux: bool, face: KernelFace, tmp_path: Path
) -> None:
    target = SimulatedTarget(as_linux=as_linux)
    face.vendor = b"LIO-ORG" if as_linux else b"SIMULATE"
    nexuses = Nexuses(
        *(scsi_device(face, target.nexus(host), tmp_path / host) for host in ("one", "two"))
    )
    assert nexuses.first.capabilities().aborts is (False if as_linux else None)
    check(nexuses)
    for unit in (nexuses.first, nexuses.second):
        unit.close()


def test_contract_finds_a_unit_that_breaks_it(target: SimulatedTarget) -> None:
    """A suite that passes whatever the unit does proves nothing: defects, and who finds them."""
    defects: dict[str, Callable[[SimulatedTarget], None]] = {
        "reserves for anybody": lambda t: setattr(t, "_own", lambda nexus, key: None),
        "serves everybody": lambda t: setattr(t, "serves", lambda nexus: True),
        "forgets at a reset": lambda t: setattr(t, "reset", lambda: t.restart(forget=True)),
        "no new generation": lambda t: setattr(type(t), "generation", property(lambda s: 7)),
        "registers over any key": lambda t: setattr(
            t,
            "register",
            lambda nexus, old, key, *, ignore: SimulatedTarget.register(
                t, nexus, old, key, ignore=True
            ),
        ),
        "keeps the preempted": lambda t: setattr(
            t, "preempt_abort", lambda nexus, key, victim, kind: None
        ),
    }
    for name, spoil in defects.items():
        spoilt = type("Spoilt", (SimulatedTarget,), {})()
        if name == "no new generation":
            type(spoilt).generation = property(lambda self: 7, lambda self, value: None)
        else:
            spoil(spoilt)
        found = 0
        for check in contract.CHECKS:
            nexuses = Nexuses(spoilt.nexus("one"), spoilt.nexus("two"))
            try:
                nexuses.wipe()
                check(nexuses)
            except Exception:
                found += 1
        assert found, name


# ---- keys --------------------------------------------------------------------------------------


def test_keys_tell_servers_from_clients() -> None:
    for _ in range(200):
        mine, theirs = new_server_key(), new_client_key(())
        assert is_server_key(mine)
        assert not is_client_key(mine)
        assert is_client_key(theirs)
        assert not is_server_key(theirs)
        assert mine >> 48 == theirs >> 48 == 0xE5F5
    assert key_text(0xE5F5 << 48 | 1) == "0xe5f5000000000001"
    for foreign in (0, 1, 0x123456789ABCDEF0, 0xE5F6 << 48, (1 << 64) - 1):
        assert not is_client_key(foreign)
        assert not is_server_key(foreign)


def test_a_key_that_is_taken_is_not_given_out(
    target: SimulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collision: the generator repeats itself, the keys do not."""
    reservation = server(target)
    bits = itertools.chain([5, 5, 5, 6, 5, 6, 8], itertools.repeat(7))
    monkeypatch.setattr(keys_module.secrets, "randbits", lambda count: next(bits))
    first = new_client_key(())
    second = new_client_key({first})
    assert (first & 0xFF, second & 0xFF) == (5, 6)
    client(target, "client", first)  # registered, of a holder that is not known any more
    assert reservation.client_key({second}) & 0xFF == 8


# ---- devices that cannot -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"persistent": False}, "no persistent reservations"),
        ({"designators": []}, "no NAA or EUI-64 designator"),
        ({"aptpl": False}, "APTPL"),
        (
            {"types": frozenset({ReservationType.WRITE_EXCLUSIVE})},
            "exclusive access, registrants only",
        ),
    ],
)
def test_a_unit_that_lacks_a_requirement_is_refused_by_name(
    spoil: dict[str, object], says: str, face: KernelFace, tmp_path: Path
) -> None:
    for through_ioctls in (False, True):
        target = SimulatedTarget(**spoil)  # type: ignore[arg-type]
        nexus = target.nexus("host")
        unit = scsi_device(face, nexus, tmp_path) if through_ioctls else nexus
        with pytest.raises(RefusedError, match=says):
            ServerReservation.register(unit)
        assert target.registrations == {}


def test_a_unit_that_does_not_tell_its_types_is_tried(target: SimulatedTarget) -> None:
    target.types = None
    assert server(target).check().state is State.HELD


def test_a_second_server_of_the_host_is_kept_out(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    """It would find the host registered and take the first one's key for an earlier mount's."""
    one = scsi_device(face, target.nexus("host"), tmp_path)
    two = scsi_device(face, target.nexus("host"), tmp_path)
    first = ServerReservation.register(one)
    first.take()
    with pytest.raises(UnitError, match="another extfs on this host"):
        ServerReservation.register(two)
    assert first.check().state is State.HELD
    first.close()
    again = ServerReservation.register(scsi_device(face, target.nexus("host"), tmp_path))
    assert again.key == first.key
    again.close()


def test_a_host_that_another_program_registered_is_refused(target: SimulatedTarget) -> None:
    nexus = target.nexus("server")
    nexus.register(0x1234)
    with pytest.raises(RefusedError, match="another program on this host"):
        ServerReservation.register(target.nexus("server"))
    assert target.registrations == {"server": 0x1234}
    nexus.register(CLIENT, old=0x1234)
    with pytest.raises(RefusedError, match="an NFS client on this host"):
        ServerReservation.register(target.nexus("server"))


def test_backing_out_leaves_the_unit_as_it_was(target: SimulatedTarget) -> None:
    other = server(target, "other")
    reservation = ServerReservation.register(target.nexus("server"))
    assert reservation.foreign() == other.key
    reservation.back_out()
    assert target.registrations == {"other": other.key}
    assert target.claims == {"other": other.unit}
    # A host that was registered before stays registered.
    other.close()
    again = ServerReservation.register(target.nexus("other"))
    again.back_out()
    assert target.registrations == {"other": other.key}


def test_foreign_reservations_are_named(target: SimulatedTarget) -> None:
    cluster = target.nexus("cluster")
    cluster.register(0xABCD)
    cluster.reserve(0xABCD)
    reservation = ServerReservation.register(target.nexus("server"))
    assert reservation.foreign() == 0xABCD
    with pytest.raises(RefusedError, match="0x000000000000abcd"):
        reservation.take()
    with pytest.raises(RefusedError, match="0x000000000000abcd"):
        reservation.take(0xABCE)
    target.type = ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS
    assert reservation.foreign() == 0
    with pytest.raises(RefusedError, match="all registrants"):
        reservation.take(0)
    assert target.holder == "cluster"


def test_our_reservation_of_another_type_is_changed(target: SimulatedTarget) -> None:
    first = server(target)
    target.type = ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
    reservation = ServerReservation.register(target.nexus("elsewhere"))
    assert reservation.foreign() == first.key
    first.close()
    again = ServerReservation.register(target.nexus("server"))
    again.take()
    assert target.type == TYPE
    target.type = ReservationType.WRITE_EXCLUSIVE
    assert again.check().state is State.RESTORED
    assert target.type == TYPE


# ---- the device as bytes -----------------------------------------------------------------------


def test_many_keys_are_read_whole(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    """The simulated kernel target, as the real one, does not tell that some had no room."""
    unit = scsi_device(face, target.nexus("server"), tmp_path)
    for count in (255, 256, 257, 3000, 8189):
        target.registrations = {f"host {number}": number + 1 for number in range(count)}
        assert sorted(unit.keys().keys) == list(range(1, count + 1))
    target.registrations = {f"host {number}": number + 1 for number in range(8190)}
    with pytest.raises(UnitError, match="more than 8189"):
        unit.keys()
    unit.close()


def test_ioctl_results_become_errors(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    unit = scsi_device(face, target.nexus("server"), tmp_path)
    target.trouble("server", "REGISTER", "lost before")
    with pytest.raises(UnreachableError):
        unit.register(SERVER)
    assert target.registrations == {}
    target.trouble("server", "REGISTER", "lost after")
    with pytest.raises(UnreachableError):
        unit.register(SERVER)
    assert target.registrations == {"server": SERVER}
    target.trouble("server", "RESERVE", "refused", "refused")
    unit.reserve(SERVER)  # a check condition is repeated: it may be an attention
    target.trouble("server", "PREEMPT", *["refused"] * 10)
    with pytest.raises(UnitError, match="PREEMPT AND ABORT"):
        unit.preempt_abort(SERVER, CLIENT)
    target.resets = False
    with pytest.raises(UnsupportedError, match="RESET"):
        unit.reset()
    unit.close()
    with pytest.raises(UnreachableError):
        unit.keys()


def test_a_disk_that_was_found_while_it_was_reserved_gets_its_size(
    target: SimulatedTarget, face: KernelFace, tmp_path: Path
) -> None:
    """Some targets refuse READ CAPACITY to who is not registered."""
    unit = scsi_device(face, target.nexus("server"), tmp_path)
    unit.sysfs = tmp_path
    rescan = tmp_path / "device" / "rescan"
    rescan.parent.mkdir()
    unit.register(SERVER)
    assert not rescan.exists()
    face.size = 0
    unit.register(0, old=SERVER)
    assert not rescan.exists()
    unit.register(SERVER)
    assert rescan.read_text() == "1"
    unit.close()


def test_designators_in_the_order_that_clients_take_them() -> None:
    def page(*designators: tuple[int, int, int, bytes]) -> bytes:
        body = b"".join(
            bytes([code_set, association << 4 | kind, 0, len(data)]) + data
            for code_set, association, kind, data in designators
        )
        return bytes([0, 0x83]) + len(body).to_bytes(2, "big") + body

    naa8, naa16, eui8, eui12, eui16 = (bytes([n]) * n for n in (8, 16, 8, 12, 16))
    whole = page(
        (2, 0, 1, b"VENDOR  serial"),
        (1, 0, 2, eui12),
        (1, 0, 2, eui8),
        (1, 0, 3, naa8),
        (1, 1, 3, bytes(8)),  # of the target port
        (2, 0, 3, b"12345678"),  # not binary
        (1, 0, 2, eui16),
        (1, 0, 3, naa16),
        (1, 0, 3, naa8),
        (1, 0, 3, b"short"),
    )
    assert parse_designators(whole) == [
        Designator("naa", 1, naa16),
        Designator("naa", 1, naa8),
        Designator("eui64", 1, eui16),
        Designator("eui64", 1, eui8),
        Designator("eui64", 1, eui12),
    ]
    assert [d.number for d in parse_designators(whole)] == [3, 3, 2, 2, 2]
    assert str(NAA) == "naa.6001405a1b2c3d4e5f60718293a4b5c6"
    for length in range(len(whole)):  # cut off anywhere
        assert set(parse_designators(whole[:length])) <= set(parse_designators(whole))


def test_capabilities_and_keys_as_bytes() -> None:
    assert parse_capabilities(bytes([0, 8, 1, 0x80, 0x40, 0, 0, 0]), aborts=True) == Capabilities(
        aptpl=True, types=frozenset({TYPE}), aborts=True
    )
    silent = parse_capabilities(bytes([0, 8, 0, 0, 0, 0, 0, 0]))
    assert silent == Capabilities(aptpl=False, types=None, aborts=None)
    assert silent.fits
    everything = parse_capabilities(bytes([0, 8, 1, 0x80, 0xEA, 1, 0, 0]), aborts=True)
    assert everything.types == frozenset(ReservationType)
    two = struct.pack(">IIQQ", 9, 16, SERVER, CLIENT)
    found = parse_keys(two, 100)
    assert found is not None
    assert (found.generation, found.keys) == (9, (SERVER, CLIENT))
    assert parse_keys(two, 24) is None  # it may be a part
    assert parse_keys(struct.pack(">IIQ", 9, 800, SERVER), 16) is None
    for broken in (b"", bytes(7)):
        with pytest.raises(UnitError):
            parse_keys(broken, 100)
        with pytest.raises(UnitError):
            parse_capabilities(broken[:5], aborts=True)
    assert scsi_unit.parse_reservation(bytes(8)) is None
    held = struct.pack(">IIQ4xxB2x", 3, 16, SERVER, TYPE)
    assert scsi_unit.parse_reservation(held) == Held(SERVER, TYPE)
    assert scsi_unit._sense(bytes([0x72, 6, 0x29, 0])) == (6, 0x29, 0)


def fake_sys(root: Path, device: str, files: dict[str, str]) -> None:
    """A sysfs where the block device `device` (8:1) is `files`' first directory."""
    for name, text in files.items():
        path = root / "devices" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "dev" / "block").mkdir(parents=True)
    (root / "dev" / "block" / "8:1").symlink_to(root / "devices" / device)


@pytest.mark.parametrize(
    ("device", "files", "result"),
    [
        ("sda", {"sda/uevent": "DEVNAME=sda\n"}, "DEVICE"),
        (
            "sda/sda1",
            {"sda/uevent": "DEVTYPE=disk\nDEVNAME=sda\n", "sda/sda1/partition": "1\n"},
            "/dev/sda",
        ),
        ("dm-0", {"dm-0/dm/uuid": "mpath-3600\n", "dm-0/uevent": ""}, "DEVICE"),
        ("dm-0", {"dm-0/dm/uuid": "LVM-abc\n"}, "mapped device"),
        ("nvme0n1", {"nvme0n1/uevent": ""}, "NVMe"),
        (
            "nvme0n1/nvme0n1p1",
            {"nvme0n1/uevent": "", "nvme0n1/nvme0n1p1/partition": "1"},
            "NVMe",
        ),
    ],
)
def test_the_disk_of_a_device(
    device: str, files: dict[str, str], result: str, tmp_path: Path
) -> None:
    fake_sys(tmp_path, device, files)
    number = os.makedev(8, 1)
    if result in ("DEVICE", "/dev/sda"):
        wanted = "/dev/x" if result == "DEVICE" else result
        assert disk_of_number("/dev/x", number, tmp_path) == wanted
    else:
        with pytest.raises(UnsupportedError, match=result):
            disk_of_number("/dev/x", number, tmp_path)


def test_an_image_has_no_reservations(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with pytest.raises(UnsupportedError, match="no block device"):
        ScsiUnit(str(image))
    with pytest.raises(UnsupportedError, match="No such file"):
        ScsiUnit(str(tmp_path / "nothing"))


def test_records_are_what_the_tests_think() -> None:
    assert dataclasses.astuple(Held(5, TYPE)) == (5, 6)
    assert Held(5, TYPE).right_type
    assert not Held(5, 5).right_type
