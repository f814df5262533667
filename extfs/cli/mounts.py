"""Mounts and daemons as the kernel tells them: /proc/self/mountinfo, /proc/PID/fd."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import stat
import time
from dataclasses import dataclass
from pathlib import Path

FSTYPE = "fuse.extfs"
MNT_DETACH = 2


@dataclass(frozen=True)
class Mount:
    """A mounted extfs."""

    source: str
    mountpoint: str
    options: str


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of blanks, tabs, newlines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def all_mounts() -> list[Mount]:
    """All mounts of extfs, oldest first."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            head, _, tail = line.partition(" - ")
            fields, rest = head.split(), tail.split()
            if rest[0] == FSTYPE:
                source = _unescape(rest[1])
                mounts.append(Mount(source, _unescape(fields[4]), fields[5]))
    return mounts


def find_mount(path: str) -> Mount | None:
    """The extfs mounted exactly at `path`; the topmost one. Never touches a dead mount."""
    parent, name = os.path.split(os.path.abspath(path))
    # The last component is not followed: a dead mount answers nothing.
    wanted = {os.path.join(os.path.realpath(parent), name) if name else parent}
    with contextlib.suppress(OSError):
        wanted.add(os.path.realpath(path))
    found = [mount for mount in all_mounts() if mount.mountpoint in wanted]
    return found[-1] if found else None


def mounts_of_device(device: str) -> list[Mount]:
    """Where a device or image is mounted."""
    real = os.path.realpath(device)
    return [mount for mount in all_mounts() if os.path.realpath(mount.source) == real]


def detach(path: str, *, lazy: bool = False) -> None:
    """umount2(2); OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), MNT_DETACH if lazy else 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _is_same(path: str, wanted: os.stat_result) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    if stat.S_ISBLK(wanted.st_mode):
        return stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted.st_rdev
    return os.path.samestat(found, wanted)


def _other_fuse_mounts(wanted: os.stat_result) -> set[str]:
    """Numbers of the FUSE mounts that `wanted` is not on, as fdinfo tells them.

    Their files are not asked for attributes: a daemon that does not answer would hold up everybody.
    """
    numbers = set()
    own = f"{os.major(wanted.st_dev)}:{os.minor(wanted.st_dev)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            head, _, tail = line.partition(" - ")
            fields = head.split()
            if tail.startswith("fuse") and fields[2] != own:
                numbers.add(fields[0])
    return numbers


def _mount_number(process: Path, descriptor: str) -> str:
    """The number of the mount that a descriptor's file is on; empty when it is gone."""
    with contextlib.suppress(OSError):
        text = (process / "fdinfo" / descriptor).read_text()
        found = re.search(r"(?m)^mnt_id:\s*(\d+)", text)
        return found[1] if found else ""
    return ""


def daemons_of(device: str) -> list[int]:
    """Processes that have the device open, and /dev/fuse or nothing of FUSE any more."""
    try:
        wanted = os.stat(device)
    except OSError:
        return []
    others = _other_fuse_mounts(wanted)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            descriptors = os.listdir(entry / "fd")
        except OSError:
            continue
        if any(
            _mount_number(entry, number) not in others and _is_same(f"{entry}/fd/{number}", wanted)
            for number in descriptors
        ):
            found.append(int(entry.name))
    return found


def _is_daemon(pid: int) -> bool:
    """Whether a process serves FUSE."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse":
                    return True
    return False


class Daemons:
    """The daemons of a device, held by pidfd, so that their end can be waited for."""

    def __init__(self, device: str, *, serving: bool = True) -> None:
        self._pidfds: list[int] = []
        for pid in daemons_of(device):
            if serving and not _is_daemon(pid):
                continue
            with contextlib.suppress(OSError):
                self._pidfds.append(os.pidfd_open(pid))

    def wait(self, seconds: float | None = None) -> bool:
        """Until all have ended; False when time is over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for pidfd in self._pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left is None else left * 1000):
                return False
        return True

    def close(self) -> None:
        """Give the pidfds back."""
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()
