"""Control groups, version 2: the local fence.

A holder that named a cgroup at its registration promised that it, and every process it gives
descriptors of the device to, runs in this cgroup and in no other. So when the cgroup is empty,
nobody is left to begin I/O. The same is true of every local holder when this host was restarted
since. What they began before must have ended too: dirty pages of the device
are written by an fsync, and requests in flight are waited for.

See Documentation/admin-guide/cgroup-v2.rst of Linux: cgroup.kill, cgroup.events.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import trio

from extfs.core import HolderKind, HolderRecord
from extfs.layout.fencing import Attempt, Outcome

__all__ = ["Cgroup", "CgroupError", "CgroupFence", "Host", "cgroup_root"]

KILL_SECONDS = 10.0
"""Time for killed processes to end: they may be in I/O that has to complete first."""
INFLIGHT_SECONDS = 30.0
_LOOK_SECONDS = 0.05
_WATCH_SECONDS = 1.0


class CgroupError(Exception):
    """A cgroup cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """This host, and where its kernel shows its state; tests show another one."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    machine_id: Path = Path("/etc/machine-id")

    def key(self) -> int:
        """As machine_key() of native/bridge_holder.c: FNV-1a of the machine id; 0: unknown."""
        try:
            text = self.machine_id.read_bytes().split(b"\n")[0]
        except OSError:
            return 0
        key = 0xCBF29CE484222325
        for byte in text:
            key = (key ^ byte) * 0x100000001B3 & (1 << 64) - 1
        return key if len(text) == 32 else 0

    def boot_id(self) -> bytes:
        """16 bytes; zeros when unknown."""
        try:
            text = (self.proc / "sys/kernel/random/boot_id").read_text()
            return bytes.fromhex(text.strip().replace("-", ""))
        except (OSError, ValueError):
            return bytes(16)

    def runs(self, pid: int, start: int) -> bool:
        """Whether the process that had this pid since `start` (clock ticks after boot) is there.

        A process that has ended and was not waited for does nothing any more: False.
        """
        try:
            text = (self.proc / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return False
        fields = text.rpartition(")")[2].split()  # from field 3 on
        return len(fields) > 19 and fields[0] not in "ZX" and int(fields[19]) == start


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def cgroup_root(host: Host) -> Path:
    """Where cgroup v2 is mounted; on hybrid hosts below the directory of v1. CgroupError."""
    with open(host.proc / "mounts", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if len(fields) > 2 and fields[2] == "cgroup2":
                return Path(_unescape(fields[1]))
    raise CgroupError("no cgroup v2 is mounted on this host")


class Cgroup:
    """One cgroup below the root. `path` is as in /proc/PID/cgroup, the leading / may be missing."""

    def __init__(self, root: Path, path: str) -> None:
        """CgroupError: the root itself, or a path that leads out of it."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or ".." in parts or "\0" in path:
            raise CgroupError(f"{path!r} does not name a cgroup below the root")
        self.path = "/" + "/".join(parts)
        self.directory = root.joinpath(*parts)

    def populated(self) -> bool:
        """Whether a process lives in it or below it; one that is gone is empty. CgroupError."""
        try:
            text = (self.directory / "cgroup.events").read_text()
        except (FileNotFoundError, NotADirectoryError):
            if self.directory.is_dir():
                raise CgroupError(f"{self.directory} is not a cgroup") from None
            return False
        except OSError as error:
            if error.errno == errno.ENODEV:  # removed while it was open
                return False
            raise CgroupError(f"{self.directory}: {error.strerror}") from error
        return ["populated", "0"] not in [line.split() for line in text.splitlines()]

    def check_killable(self, host: Host, uid: int) -> None:
        """Raise CgroupError unless its processes may be killed in the name of `uid`.

        That user must be able to do it without us, or a registration would be a way to kill
        anything; and this daemon must not be among them.
        """
        own = (host.proc / "self/cgroup").read_text().splitlines()
        for line in own:
            if line.startswith("0::") and (line[3:] + "/").startswith(self.path + "/"):
                raise CgroupError(f"this daemon itself runs in {self.path}")
        try:
            owner = (self.directory / "cgroup.kill").stat()
        except FileNotFoundError:
            if not self.directory.is_dir():
                return  # nobody is left to be killed
            raise CgroupError(f"{self.path} has no cgroup.kill (Linux 5.14 has)") from None
        if uid not in (0, owner.st_uid):
            raise CgroupError(f"{self.path} does not belong to the holder's user {uid}")

    def kill(self) -> None:
        """SIGKILL for every process in it and below it, forks included. CgroupError."""
        try:
            (self.directory / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise CgroupError(f"{self.path}: cgroup.kill: {error.strerror}") from error


def _fsync_device(path: str) -> None:
    """Write what the page cache of the device holds of it: nothing of the holder comes later."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class CgroupFence:
    """Confirms when the cgroup that a local holder named is empty, and `device` is quiet.

    With `kill` its processes are killed first; without, they are waited for. A holder that named
    none is confirmed only after a restart of this host.
    """

    device: str
    kill: bool = False
    host: Host = Host()

    @property
    def name(self) -> str:
        """For the log."""
        return "cgroup" if self.kill else "observe"

    @property
    def harms(self) -> bool:
        """Killing does."""
        return self.kill

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        """Kill or wait, then see that the device is quiet."""
        spec = holder.spec
        if spec.kind is not HolderKind.LOCAL:
            await trio.sleep_forever()
        boot = self.host.boot_id()
        if not any(boot) or not any(spec.boot_id):
            return Outcome.failed("the boot that it ran under is not known")
        if spec.boot_id != boot:
            if spec.fence_key and spec.fence_key == self.host.key():
                return Outcome.confirmed("this host has been restarted since")
            return Outcome.failed("it ran on another host, or on one without a machine id")
        if not spec.fence.startswith("cgroup:"):
            await trio.sleep_forever()
        if not spec.pid:
            return Outcome.failed("its process is not known, so it may be in any cgroup")
        try:
            cgroup = Cgroup(cgroup_root(self.host), spec.fence.removeprefix("cgroup:"))
            how = await self._emptied(cgroup, spec.uid, attempt)
        except (CgroupError, OSError) as error:
            return Outcome.failed(str(error))
        if self.host.runs(spec.pid, spec.pid_start):
            return Outcome.failed(
                f"{cgroup.path} is empty, but process {spec.pid}, which named it, runs"
            )
        return await self._quieted(how)

    async def _emptied(self, cgroup: Cgroup, uid: int, attempt: Attempt) -> str:
        """Until nobody is in it; returns in words how that came."""
        if not cgroup.populated():
            return f"{cgroup.path} is empty"
        if not self.kill:
            while cgroup.populated():  # noqa: ASYNC110 - the kernel's state, not a task's
                await trio.sleep(_WATCH_SECONDS)
            return f"{cgroup.path} has become empty"
        cgroup.check_killable(self.host, uid)
        await attempt.issued()
        cgroup.kill()
        deadline = trio.current_time() + KILL_SECONDS
        while cgroup.populated():
            if trio.current_time() >= deadline:
                raise CgroupError(
                    f"{cgroup.path} has processes {KILL_SECONDS:g} s after they were killed"
                )
            await trio.sleep(_LOOK_SECONDS)
        return f"the processes of {cgroup.path} were killed"

    async def _quieted(self, how: str) -> Outcome:
        try:
            await trio.to_thread.run_sync(_fsync_device, self.device)
        except OSError as error:
            return Outcome.failed(f"{how}, but fsync of {self.device}: {error.strerror}")
        if not await self._inflight_was_zero():
            return Outcome.failed(
                f"{how}, but {self.device} had requests in flight for {INFLIGHT_SECONDS:g} s"
            )
        return Outcome.confirmed(how)

    async def _inflight_was_zero(self) -> bool:
        """Whether there was a moment with no request in flight: then none of before is left.

        Two looks in a row, because a request that waits in a scheduler is not counted for a
        moment. Devices that are files have no counter: what their fsync did not wait for cannot be
        seen.
        """
        status = os.stat(self.device)
        if not stat.S_ISBLK(status.st_mode):
            return True
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        counter = self.host.sys / "dev/block" / number / "inflight"
        if not counter.exists():
            return True
        deadline = trio.current_time() + INFLIGHT_SECONDS
        quiet = 0
        while quiet < 2:
            busy = any(int(count) for count in counter.read_text().split())
            quiet = 0 if busy else quiet + 1
            if trio.current_time() >= deadline:
                return False
            await trio.sleep(_LOOK_SECONDS)
        return True
