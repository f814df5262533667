"""Several parties and one file: guests, the local mount, and those that disappear."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable

import pytest

from guest.client import MIB, Client
from guest.machine import Job
from guest.served import RECALL_SECONDS, assert_no_canary, stamped, unstamped
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

LEASE_SECONDS = 90
LOST_HOLDER = r"revoke|fence|quarantine|did not answer|recall"
"""What the daemon says of a client that is gone."""


def hold_layout(client: Client, name: str, seed: int, length: int) -> Job:
    """Write a file and keep it open, with its layout, until /tmp/release is made."""
    client.guest.check("rm -f /tmp/release /tmp/held")
    job = client.guest.start(
        f"exec 9<>{client.path(name)}\n"
        f"stamp write -d {client.path(name)} {seed} 0 {length} 65536 || exit 1\n"
        "touch /tmp/held\nwhile [ ! -e /tmp/release ]; do usleep 50000; done",
        seconds=200,
    )
    client.guest.check("until [ -e /tmp/held ]; do usleep 20000; done", 90)
    return job


def release(client: Client, job: Job) -> None:
    client.guest.check("touch /tmp/release")
    job.check()


def test_a_local_write_recalls_the_layout(world: World) -> None:
    """It waits for the return, then both sides see the same, and the guest writes on."""
    client, served = world.client, world.served
    job = hold_layout(client, "recalled", 1, MIB)
    before = served.counter("layout_recalls_sent")
    begin = time.monotonic()
    with open(served.path("recalled"), "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"L" * 8192, 65536)
        os.fsync(file.fileno())
    seconds = time.monotonic() - begin
    # The client may answer with LAYOUTRETURN, or that it has none (any more).
    assert served.counter("layout_recalls_sent") > before
    assert seconds < RECALL_SECONDS, "the recall was not answered, or not noticed"
    with client.counted() as counted:
        client.guest.check(f"stamp write -d {client.path('recalled')} 2 {MIB // 2} 65536 65536")
    assert counted["LAYOUTGET"] > 0
    counted.assert_by_layout()
    release(client, job)
    expected = bytearray(stamped(1, 0, MIB))
    expected[65536 : 65536 + 8192] = b"L" * 8192
    expected[MIB // 2 : MIB // 2 + 65536] = stamped(2, MIB // 2, 65536)
    assert served.path("recalled").read_bytes() == bytes(expected)
    client.drop_caches()
    assert client.digest(client.path("recalled")) == served.digest("recalled")
    assert served.device_digest("recalled") == served.digest("recalled")


def test_a_local_truncate_and_punch_under_a_layout(world: World) -> None:
    client, served = world.client, world.served
    job = hold_layout(client, "cut-locally", 3, MIB)
    os.truncate(served.path("cut-locally"), 300_000)
    assert client.guest.check(f"wc -c <{client.path('cut-locally')}").strip() == "300000"
    os.truncate(served.path("cut-locally"), MIB)
    release(client, job)
    expected = stamped(3, 0, 300_032)[:300_000] + bytes(MIB - 300_000)
    assert served.path("cut-locally").read_bytes() == expected
    client.drop_caches()
    assert client.digest(client.path("cut-locally")) == served.digest("cut-locally")


def test_both_sides_take_turns(world: World) -> None:
    """Close-to-open: each opens after the other has closed, and sees what it wrote."""
    client, served = world.client, world.served
    for turn in range(1, 7):
        offset = (turn - 1) * 65536
        if turn % 2:
            client.guest.check(f"stamp write {client.path('turns')} {turn} {offset} 65536 65536")
        else:
            with open(served.path("turns"), "r+b") as file:
                file.seek(offset)
                file.write(stamped(turn, offset, 65536))
        for earlier in range(1, turn + 1):
            begin = (earlier - 1) * 65536
            client.guest.check(f"stamp check {client.path('turns')} {earlier} {begin} 65536")
        content = served.path("turns").read_bytes()
        assert content == b"".join(stamped(t, (t - 1) * 65536, 65536) for t in range(1, turn + 1))


def test_two_guests_write_disjoint_halves(world: World) -> None:
    """At the same time, each by a layout of its own: nothing goes through the server."""
    one, two, half = world.client, world.second, 16 * MIB
    world.served.path("halves").touch()
    with one.counted() as first, two.counted() as second:
        jobs = [
            client.guest.start(
                f"stamp write -d {client.path('halves')} {seed} {offset} {half} {MIB}", 120
            )
            for client, seed, offset in ((one, 1, 0), (two, 2, half))
        ]
        for job in jobs:
            job.check()
    first.assert_by_layout(writes=True)
    second.assert_by_layout(writes=True)
    content = world.served.path("halves").read_bytes()
    assert content == stamped(1, 0, half) + stamped(2, half, half)
    for client, seed, offset in ((two, 1, 0), (one, 2, half)):  # each reads the other's
        client.drop_caches()
        client.guest.check(f"stamp check -d {client.path('halves')} {seed} {offset} {half}")
    assert world.served.device_digest("halves") == world.served.digest("halves")


def test_two_guests_write_every_other_block(world: World) -> None:
    """Their layouts are in each other's way all the time; each byte is its writer's."""
    clients, block, count = (world.client, world.second), 65536, 32
    world.served.path("woven").touch()
    jobs = [
        client.guest.start(
            f"i={index}\nwhile [ $i -lt {count} ]; do\n"
            f"  stamp write -d {client.path('woven')} {index + 1} $((i * {block})) {block} {block}"
            " || exit 1\n  i=$((i + 2))\ndone",
            200,
        )
        for index, client in enumerate(clients)
    ]
    for job in jobs:
        job.check()
    expected = b"".join(stamped(i % 2 + 1, i * block, block) for i in range(count))
    assert world.served.path("woven").read_bytes() == expected
    assert world.served.device_digest("woven") == world.served.digest("woven")
    for client in clients:
        client.drop_caches()
        assert client.digest(client.path("woven")) == world.served.digest("woven")


def test_a_guest_killed_in_the_middle_of_writing(world: World) -> None:
    """Its file can be read: what it fsynced is there, and what it did not write is no stale byte.

    Others write the file after the time of a recall, and what the guest had is not reused.
    """
    client, served = world.new_client("victim"), world.served
    world.tolerated.append(LOST_HOLDER)
    job = client.guest.start(
        f"stamp write -d -f -a /tmp/acked {client.path('victims')} 1 0 {256 * MIB} 262144", 200
    )
    client.guest.check("until [ -s /tmp/acked ] && [ $(wc -l </tmp/acked) -ge 8 ]; do :; done", 90)
    acked = int(client.guest.check("tail -n 1 /tmp/acked"))
    client.guest.power_off()
    del job
    content = served.path("victims").read_bytes()
    assert len(content) >= acked
    assert_no_canary(content, "victims")
    assert content[:acked] == stamped(1, 0, acked)
    assert not unstamped(content, [1])
    begin = time.monotonic()
    with open(served.path("victims"), "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"after" * 1000, 100)
    assert time.monotonic() - begin < LEASE_SECONDS
    again = bytearray(content)
    again[100:5100] = b"after" * 1000
    assert served.path("victims").read_bytes() == bytes(again)
    # Another guest sees the same, and writes where the first one did.
    other = world.client
    assert other.digest(other.path("victims")) == served.digest("victims")
    other.guest.check(f"stamp write -d {other.path('victims')} 2 0 {MIB} 65536")
    assert served.path("victims").read_bytes()[:MIB] == stamped(2, 0, MIB)


def test_a_guest_that_slept_through_a_recall(own_world: Callable[..., World]) -> None:
    """It writes by its old layout when it wakes up: into blocks that nobody reads any more."""
    world = own_world()
    world.tolerated.append(LOST_HOLDER)
    client, served = world.client, world.served
    served.path("slept").write_bytes(bytes(64 * MIB))
    # One long stream of writes in place: at any moment there are some under way. The file stays
    # open from one round to the next, or its layout would be returned at the close.
    job = client.guest.start(
        f"exec 9<>{client.path('slept')}\n"
        f"while [ ! -e /tmp/release ]; do stamp write -d {client.path('slept')} 5 0 {32 * MIB} "
        "65536 || exit 0; touch /tmp/going; done",
        200,
    )
    client.guest.check("until [ -e /tmp/going ]; do usleep 20000; done", 90)
    client.guest.pause()
    mine = b"written while the guest slept".ljust(4096, b".") * 16
    begin = time.monotonic()
    with open(served.path("slept"), "r+b", buffering=0) as file:
        for offset in range(0, 32 * MIB, len(mine)):
            os.pwrite(file.fileno(), mine, offset)
        os.fsync(file.fileno())
    assert time.monotonic() - begin >= RECALL_SECONDS - 0.5, "nobody was waited for"
    client.guest.resume()
    time.sleep(2)
    # Until it learns that its layout is gone it may write; through a new one it may, too.
    content = served.path("slept").read_bytes()
    assert_no_canary(content, "slept")
    for offset in range(0, 32 * MIB, 512):
        sector = content[offset : offset + 512]
        assert sector in (mine[offset % 65536 :][:512], stamped(5, offset, 512)), offset
    client.guest.check("touch /tmp/release")
    job.wait()
    assert served.device_digest("slept") == served.digest("slept")


def local_lock(path: str, kind: int, start: int, length: int) -> int | None:
    """Try a POSIX lock; a descriptor that holds it, or None."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def test_locks_of_a_guest_and_of_a_local_process(world: World) -> None:
    """They are one set: byte ranges conflict across the network, and are free when released."""
    client, served = world.client, world.served
    served.path("locked").write_bytes(bytes(1000))
    path, remote = str(served.path("locked")), client.path("locked")
    job = client.guest.start(f"rangelock {remote} write 100 100 1000 >/tmp/lock", 120)
    client.guest.check("until grep -q locked /tmp/lock; do usleep 20000; done", 30)
    assert local_lock(path, fcntl.LOCK_SH, 150, 10) is None
    # F_GETLK tells who is in the way.
    with open(path, "rb") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
        answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
        kind, _, start, length, _ = struct.unpack("hhqqi4x", answer)
    assert (kind, start, length) == (fcntl.F_WRLCK, 100, 100)
    beside = local_lock(path, fcntl.LOCK_EX, 200, 10)
    assert beside is not None
    assert client.guest.run(f"rangelock {remote} read 205 1").output == "conflict\n"
    os.close(beside)
    assert client.guest.check(f"rangelock {remote} write 205 1") == "locked\n"

    # A local process that waits gets it when the guest's process ends.
    got = threading.Event()

    def wait_for_it() -> None:
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 100, 100)
            got.set()

    waiting = threading.Thread(target=wait_for_it, daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert not got.is_set()
    client.guest.check("kill $(pidof rangelock)")
    job.wait()
    assert got.wait(20)
    waiting.join(5)


def test_locks_of_two_guests(world: World) -> None:
    one, two = world.client, world.second
    world.served.path("guests-lock").touch()
    job = one.guest.start(f"rangelock {one.path('guests-lock')} write 0 0 1000 >/tmp/lock2", 120)
    one.guest.check("until grep -q locked /tmp/lock2; do usleep 20000; done", 30)
    assert two.guest.run(f"rangelock {two.path('guests-lock')} read 5 1").output == "conflict\n"
    # flock(2) is a lock of the whole file over NFS; it waits, and gets its turn.
    waiting = two.guest.start(f"flock {two.path('guests-lock')} echo mine", 90)
    time.sleep(0.5)
    one.guest.check("kill $(pidof rangelock)")
    job.wait()
    assert waiting.check() == "mine\n"
