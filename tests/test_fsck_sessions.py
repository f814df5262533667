"""fsck and dump of the NFS server's sessions and riders: what a crash may leave, and what not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from broken import codes
from nfs.calls import mkdir, putrootfh
from nfs.persistence import Host, Persistent

from extfs import core
from extfs.check import layout
from extfs.check.dump import dump_tree
from extfs.check.fsck import fsck
from extfs.check.layout import NfsKind, rider_number
from extfs.check.mapping import Image
from extfs.nfs.records import SessionRecord
from extfs.nfs.riders import Mark, Place, RiderRecord

MIB = 1 << 20
CLIENT = 0x100000001


def rider(session: int, slot: int) -> RiderRecord:
    places = Place(1, 2, 3, 4, 5), Place()
    return RiderRecord(session, slot, 6, 7, [Mark(1, 28, 8, 9, places), Mark(2, 29, 10, 11)])


def session(clientid: int) -> bytes:
    five = (1, 2, 3, 4, 5)
    return SessionRecord(clientid, bytes(16), 1, five, five, 1, b"", False, ()).encode()


def number(kind: NfsKind, low: int) -> int:
    return kind << layout.NFS_KIND_SHIFT | low


Make = Callable[[dict[int, bytes]], Path]


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Make:
    """An image with these records, and those of a client with a session and a rider."""

    def make(values: dict[int, bytes]) -> Path:
        path = make_image(48 * MIB)
        with core.Device.open(str(path)) as device:
            core.mkfs(device, label="sessions")
        with core.Filesystem.open(core.Device.open(str(path)), no_heartbeat=True) as fs:
            client = (1).to_bytes(4, "big") + CLIENT.to_bytes(8, "big") + bytes(100)
            fs.records.put(
                {
                    number(NfsKind.CLIENT, 1): client,
                    number(NfsKind.SESSION, 1): session(CLIENT),
                    rider_number(1, 3): rider(1, 3).encode(),
                }
            )
            fs.records.put(values)
        return path

    return make


def loaded(path: Path) -> set[int]:
    with core.Filesystem.open(core.Device.open(str(path)), no_heartbeat=True) as fs:
        return set(fs.records.load())


def test_what_a_server_leaves_is_clean() -> None:
    with core.SimDevice(48 * MIB) as sim:
        with sim.device() as device:
            core.mkfs(device)
        host = Host(sim)
        client = Persistent().establish(host)
        client.do(host, putrootfh(), mkdir(b"made"))
        stored = host.fs.records.load()
        host.fs.close()
    kinds = {one >> layout.NFS_KIND_SHIFT for one in stored}
    assert kinds == {NfsKind.SERVER, NfsKind.CLIENT, NfsKind.SESSION, NfsKind.RIDER}
    [found] = [value for one, value in stored.items() if one >> 56 == NfsKind.RIDER]
    assert RiderRecord.decode(found).encode() == found


def test_the_dump_of_riders(image: Make) -> None:
    with Image(image({})) as looking:
        records = dump_tree(looking, "nfs-client")["records"]
    found = next(record for record in records if record["hi"] == rider_number(1, 3))
    assert (found["session"], found["slot"], found["sequence"], found["count"]) == (1, 3, 6, 2)
    assert [(mark["index"], mark["op"], mark["ino"]) for mark in found["marks"]] == [
        (1, 28, 9),
        (2, 29, 11),
    ]
    assert found["marks"][0]["places"][0]["after_sec"] == 4


def test_a_rider_that_is_left_is_worth_a_note(image: Make) -> None:
    path = image({rider_number(7, 0): rider(7, 0).encode()})
    result = fsck(path)
    assert result.report.clean
    assert codes(result) == set()
    assert result.report.has("NFS_RIDER_LEFT")


def test_a_session_without_its_client_is_removed(image: Make) -> None:
    path = image(
        {
            number(NfsKind.SESSION, 2): session(CLIENT + 1),
            rider_number(2, 0): rider(2, 0).encode(),
            rider_number(2, 65535): rider(2, 65535).encode(),
        }
    )
    assert codes(fsck(path)) == {"NFS_SESSION_CLIENT"}
    fsck(path, repair=True)
    result = fsck(path)
    assert result.report.findings == []
    assert loaded(path) == {
        number(NfsKind.CLIENT, 1),
        number(NfsKind.SESSION, 1),
        rider_number(1, 3),
    }


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        rider(1, 4).encode()[:-1],
        rider(1, 5).encode(),
        rider(2, 4).encode(),
        RiderRecord(1, 4, 1, 1, []).encode(),
        rider(1, 4).encode()[:20] + b"\x09" + rider(1, 4).encode()[21:],
    ],
    ids=["empty", "short", "slot", "session", "no mark", "marks"],
)
def test_riders_that_cannot_be(image: Make, broken: bytes) -> None:
    path = image({rider_number(1, 4): broken})
    assert codes(fsck(path)) == {"NFS_RIDER"}
    fsck(path, repair=True)
    assert fsck(path).report.findings == []
    assert rider_number(1, 4) not in loaded(path)
