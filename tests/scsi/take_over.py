"""A second server takes the unit over, while a client writes by its layout.

story = TakeOver(san, "one")
story.write()               # pieces of a new file, each of them followed by fsync
story.lose("killed")        # or "cut": its cable to the unit is out; or "frozen"
story.take_over()
story.assert_nothing_lost()
story.old_comes_back()      # its cable is in again, it thaws: it is over for good
story.end()
"""

from __future__ import annotations

import itertools
from typing import Literal

from guest.machine import Job

from scsi import initiator
from scsi.san import MIB, STORAGE_NIC, San
from scsi.server import LEASE_SECONDS
from scsi.stories import keys

Loss = Literal["killed", "cut", "frozen"]

SIZE = 24 * MIB
PIECE = 64 << 10
_ACKED = "/tmp/acked"
_LATE = "written-too-late"
_SAID = "/tmp/said"
_OVER_SECONDS = 6 * LEASE_SECONDS
_JOB_SECONDS = 400
"""Of a command that goes on over the whole story, most of which is the other server's start."""

_seeds = itertools.count(0xE0F5_8000_0001)


class TakeOver:
    """The server changes; the client `name` of `san` should notice nothing but a pause."""

    def __init__(self, san: San, name: str) -> None:
        self.san = san
        self.standby = san.standby
        self.client = san.client_of(name)
        self.seed = next(_seeds)
        self.file = f"kept-{self.seed:x}"
        self.how: Loss = "killed"
        self._writer: Job | None = None
        self._late: Job | None = None
        self._before = keys(san)

    def write(self) -> None:
        """Begin a file by its layout; goes on until it is whole."""
        path = self.client.path(self.file)
        initiator.attend(self.client.guest)
        self._stats = self.client.stats()
        self._writer = self.client.guest.start(
            f"rm -f {_ACKED}; stamp write -d -f -a {_ACKED} {path} {self.seed} 0 {SIZE} {PIECE}",
            _JOB_SECONDS,
        )
        self.client.guest.check(
            f"until [ $(cat {_ACKED} 2>/dev/null | wc -l) -ge 20 ]; do usleep 20000; done"
        )

    def lose(self, how: Loss) -> None:
        """The server is gone, or does not know that it is."""
        self.how = how
        server = self.san.server
        if how == "killed":
            server.kill()
            return
        # It goes on with this for as long as it can: what it says that is durable must be so.
        late = server.path(_LATE)
        self._late = server.guest.start(
            f"echo >{late}; : >{_SAID}\n"
            f"while echo late >>{late} && sync {late}; do echo late >>{_SAID}; done",
            _JOB_SECONDS,
        )
        server.guest.check(f"until [ -s {_SAID} ]; do usleep 10000; done")
        if how == "cut":
            server.guest.plug(STORAGE_NIC, False)
        else:
            server.guest.pause()

    def refused(self) -> str:
        """What the standby says when it is not told to take over."""
        self.standby.begin()
        self.standby.wait_ended()
        return self.standby.log().splitlines()[-1]

    def take_over(self, *, by_agent: bool = False) -> None:
        """The standby serves when this returns."""
        self.san.take_over(by_agent=by_agent)

    def assert_nothing_lost(self) -> None:
        """Whatever fsync had returned for is there, at once; the client goes on by its layout, and
        at the end the file is whole."""
        assert self._writer is not None
        server = self.san.server
        acked = int(self.client.guest.check(f"tail -n 1 {_ACKED}"))
        assert 0 < acked < SIZE, f"nothing was under way: {acked}"
        path = server.path(self.file)
        server.guest.check(f"stamp check {path} {self.seed} 0 {acked}")
        self._writer.check()
        counted = self.client.stats() - self._stats
        assert counted["WRITE"] == 0, f"written through the server: {counted}"
        assert counted.pnfs_writes > 0, str(counted)
        server.guest.check(
            f"echo 1 >/proc/sys/vm/drop_caches; stamp check {path} {self.seed} 0 {SIZE}"
        )
        held = server.guest.check(
            f"sg_persist -n -r {server.device} || sg_persist -n -r {server.device}"
        )
        now = keys(self.san)
        assert len(set(self._before) - set(now)) == 1, (self._before, now)  # the old server's
        assert "Exclusive Access, registrants only" in held

    def old_comes_back(self) -> None:
        """It has its unit again: what it had queued is refused, it says so, and ends."""
        old = self.san.standby
        if self.how == "killed":
            return
        old.guest.resume()
        old.guest.plug(STORAGE_NIC, True)
        assert self._late is not None
        self._late.wait()
        old.wait_ended(_OVER_SECONDS)
        assert "this server is over" in old.log(), old.log()[-3000:]
        result = old.guest.run(
            f"dd if=/dev/zero of={old.device} bs=4k count=1 seek=100 oflag=direct 2>&1"
        )
        assert "Invalid exchange" in result.output, result.output
        said = int(old.guest.check(f"wc -l <{_SAID}"))
        there = int(self.san.server.guest.check(f"wc -l <{self.san.server.path(_LATE)}")) - 1
        assert 0 < said <= there, f"it said of {said} lines that they are durable, {there} are"

    def end(self) -> None:
        """The file goes; the old server's guest is one that may take over the next time."""
        if self.san.standby.guest.is_paused:
            self.san.standby.guest.resume()
        self.san.retire()
        for name in (self.file, _LATE):
            self.san.server.guest.check(f"rm -f {self.san.server.path(name)}")
