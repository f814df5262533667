"""What happens around a client that writes all the time and does not hear the server any more.

    victim = Victim(san, "one")
    victim.write()              # it has a layout, and overwrites its file again and again
    victim.cut_off()            # or victim.freeze()
    victim.recall()             # the server needs the layout back
    victim.wait_fenced()
    successor = Successor(san); successor.write()    # gets the blocks that were the victim's
    victim.reconnect()          # or victim.thaw()
    successor.assert_intact()

Every sector that is written says for which file (programs/stamp.c): the raw disk tells whose bytes
are where.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from guest.machine import Guest, GuestError, Job

from scsi import initiator, target
from scsi.san import FILES_NIC, MIB, STORAGE_NIC, San, stamps_on
from scsi.server import RECALL_SECONDS

SIZE = 8 * MIB
_PIECE = MIB // 4
FENCE_SECONDS = RECALL_SECONDS + 60
_PROGRESS = "/tmp/progress"
_RETRY_SECONDS = 125
"""After that a client asks again for a device that it could not use: PNFS_DEVICE_RETRY_TIMEOUT of
fs/nfs/pnfs_dev.c, 120 s, and some."""

_seeds = itertools.count(0xE0F5_0000_0001)


def keys(san: San) -> list[str]:
    """Keys that are registered, as the server's kernel reads them from the unit."""
    command = f"sg_persist -n -k {san.server.device}"
    text = san.server_guest.check(f"{command} || {command}")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("0x")]


class Victim:
    """A client that is going to be fenced."""

    def __init__(self, san: San, name: str) -> None:
        self.san = san
        self.client = san.client_of(name)
        self.guest: Guest = self.client.guest
        self.seed = next(_seeds)
        self.file = f"victim-{self.seed:x}"
        self.places: set[int] = set()
        self.key: str | None = None
        self._fences_before = 0

    def write(self) -> None:
        """Write a file by its layout, and overwrite it from now on, without an end."""
        path = self.client.path(self.file)
        initiator.attend(self.guest)
        with self.client.counted() as counted:
            self.guest.check(f"stamp write -d {path} {self.seed} 0 {SIZE} {_PIECE}", 120)
        counted.assert_by_layout(writes=True)
        self.places = stamps_on(self.san.disk, self.seed)
        assert len(self.places) * 512 == SIZE
        self.guest.check(
            f"dmesg -c >/dev/null; rm -f {_PROGRESS}\n"
            f"stamp write -dl -a {_PROGRESS} {path} {self.seed} 0 {SIZE} {_PIECE} "
            ">/tmp/writer.log 2>&1 &"
        )
        self.wait_progress()
        self.key = self._registered()
        assert self.key in keys(self.san)
        self._fences_before = len(self._fences("history"))

    def _registered(self) -> str | None:
        return target.key_of(self.san.target, initiator.name(self.guest))

    def _fences(self, which: str) -> list[dict[str, Any]]:
        """Fences of this client in the server's status: those "waiting", or the "history"."""
        found = self.san.server.status()["fences"][which]
        return [fence for fence in found if fence["name"].endswith(f" {self.guest.name}")]

    def server_died(self) -> None:
        """The next daemon's history begins anew."""
        self._fences_before = 0

    def wait_progress(self, seconds: float = 30) -> None:
        """Wait until it has written some more."""
        wanted = (int(self.guest.run(f"cat {_PROGRESS} 2>/dev/null | wc -l").output)) + 3
        self.guest.check(
            f"until [ $(wc -l <{_PROGRESS}) -ge {wanted} ]; do usleep 20000; done", seconds
        )

    # -- it does not hear --

    def cut_off(self) -> None:
        """It does not reach the server any more; it does reach the disk."""
        self.guest.plug(FILES_NIC, False)
        self.wait_progress()

    def reconnect(self) -> None:
        self.guest.plug(FILES_NIC, True)

    def freeze(self) -> None:
        """Its time stands still, in the middle of what it was writing."""
        self.guest.pause()

    def thaw(self) -> None:
        self.guest.resume()

    # -- the server --

    def start_recall(self) -> Job:
        """The server empties the file, and so wants the layout back."""
        return self.san.server_guest.start(f": >{self.san.server.path(self.file)}", FENCE_SECONDS)

    def end_recall(self, job: Job, *, dies: bool = False) -> None:
        """The file is empty. `dies`: the server died meanwhile, so perhaps it is not."""
        result = job.wait()
        assert dies or result.code == 0, result.output

    def recall(self, *, dies: bool = False) -> None:
        """Both."""
        self.end_recall(self.start_recall(), dies=dies)

    def wait_fenced(self) -> dict[str, Any]:
        """Wait until the fence is confirmed; what the server's status says of it."""
        deadline = time.monotonic() + FENCE_SECONDS
        while len(self._fences("history")) <= self._fences_before or self._fences("waiting"):
            assert time.monotonic() < deadline, self.san.server.status()["fences"]
            time.sleep(0.2)
        fence = self._fences("history")[-1]
        assert fence["outcome"] == "confirmed", fence
        assert fence["driver"] == "reservation", fence
        assert fence["fence"].startswith("scsi:"), fence
        assert self.key not in keys(self.san)
        return fence

    def wait_keyless(self) -> None:
        """Wait until its fence is over, of which a daemon that died need not have told anybody."""
        deadline = time.monotonic() + FENCE_SECONDS
        while self.key in keys(self.san) or self._fences("waiting"):
            assert time.monotonic() < deadline, self.san.server.status()["fences"]
            time.sleep(0.2)

    def wait_refused(self, seconds: float = 30) -> None:
        """Wait until the unit has refused a write of it; from then on it writes nothing more."""
        self.guest.check(
            "until dmesg | grep -q 'reservation conflict'; do usleep 50000; done", seconds
        )

    def wait_over(self, seconds: float = 60) -> None:
        """Wait until it has been refused, or knows better: it was told in time that all its layouts
        are void, and has registered another key, or tried to."""
        deadline = time.monotonic() + seconds
        while self.guest.run("dmesg | grep -q 'reservation conflict'").code != 0:
            if self._registered() not in (None, self.key) or self._gave_the_disk_up():
                return
            assert time.monotonic() < deadline, "it is neither refused nor back"
            time.sleep(0.2)

    def _gave_the_disk_up(self) -> bool:
        """The registration of its new key was the first command that met the unit attention of its
        fence. Linux before 6.9 does not repeat it, and goes through the server for two minutes.

        What the layout driver says of that ends without a newline, and is not seen yet."""
        return self.guest.run("dmesg | grep -q 'PR command failed'").code == 0

    def assert_shut_out(self) -> None:
        """Whatever it sends to the disk now is refused."""
        disk = "/dev/disk/by-id/wwn-*"
        result = self.guest.run(
            f"dd if=/dev/urandom of=$(ls {disk}) bs=4k count=1 seek=100 oflag=direct 2>&1"
        )
        assert result.code != 0, "the unit took a write of a client that is fenced"
        assert "Invalid exchange" in result.output, result.output

    def come_back(self, seconds: float = 120) -> None:
        """The client goes on: it has its mount, and writes by layouts again, with another key."""
        self.guest.check(
            "pid=$(pidof stamp) && kill -9 $pid\n"
            "while pidof stamp >/dev/null; do usleep 50000; done",
            seconds,
        )
        if self._gave_the_disk_up():
            time.sleep(_RETRY_SECONDS)
        name = f"back-{self.seed:x}"
        path = self.client.path(name)
        initiator.attend(self.guest)
        self.guest.check(f"stamp write -d {path} {self.seed} 0 {_PIECE} {_PIECE}", seconds)
        with self.client.counted() as counted:
            self.guest.check(f"stamp write -d {path}.2 {self.seed} 0 {MIB} {_PIECE}", seconds)
        counted.assert_by_layout(writes=True)
        assert self._registered() not in (None, self.key), "it has no new key"
        for file in (self.file, name, f"{name}.2"):
            self.guest.check(f"rm -f {self.client.path(file)}", seconds)


class Successor:
    """Another client, which fills what is free, and so gets the blocks that a victim had."""

    def __init__(self, san: San, *, local: bool = False) -> None:
        self.san = san
        self.client = None if local else san.client_of("target")
        self.seed = next(_seeds)
        self.file = f"successor-{self.seed:x}"
        self.size = 0
        self.places: set[int] = set()

    def write(self, victim: Victim) -> None:
        """Write a file that takes nearly all that is free, some of it the victim's."""
        server = self.san.server
        free = server.guest.check(f"stat -f -c '%a %S' {server.path('')}").split()
        self.size = (int(free[0]) * int(free[1]) - 2 * MIB) // MIB * MIB
        if self.client is None:
            path = server.path(self.file)
            server.guest.check(f"stamp write {path} {self.seed} 0 {self.size} {MIB}", 120)
        else:
            path = self.client.path(self.file)
            initiator.attend(self.client.guest)
            with self.client.counted() as counted:
                self.client.guest.check(
                    f"stamp write -d {path} {self.seed} 0 {self.size} {MIB}", 120
                )
            counted.assert_by_layout(writes=True)
        self.places = stamps_on(self.san.disk, self.seed)
        assert len(self.places) * 512 == self.size
        assert self.places & victim.places, "no block of the victim's was used again"

    def assert_intact(self) -> None:
        """All its bytes are on the disk where they were, and in the file; then remove it."""
        assert self.places == stamps_on(self.san.disk, self.seed)
        server = self.san.server
        path = server.path(self.file)
        server.guest.check(
            f"echo 1 >/proc/sys/vm/drop_caches; stamp check {path} {self.seed} 0 {self.size}", 120
        )
        server.guest.check(f"rm {path}", 60)


def cables_back(san: San, victim: Victim) -> None:
    """Whatever happened, the next story finds all cables plugged in and nobody frozen."""
    victim.guest.resume()
    for nic in (STORAGE_NIC, FILES_NIC):
        try:
            victim.guest.plug(nic, True)
        except GuestError:
            return
