"""Where the kernel, or a service manager, tells of memory pressure: descriptors to wait for.

Pressure stall information (Documentation/accounting/psi.rst of Linux): a trigger is written to a
file, which is then ready for POLLPRI whenever tasks have waited for memory that long within the
window, once a window at most. The file of the daemon's own cgroup is asked first: it speaks of our
tasks alone, and a neighbour that thrashes within its own limit does not empty our caches. Where the
daemon is in no cgroup of version 2 below the root, the file of the whole system is.

A service manager may say what to watch instead, in MEMORY_PRESSURE_WATCH and MEMORY_PRESSURE_WRITE
(https://systemd.io/MEMORY_PRESSURE): such a file, a FIFO or a socket; /dev/null: nothing.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from extfs.layout.cgroups import Cgroup, CgroupError, Host, cgroup_root

__all__ = ["TRIGGER", "Source", "find_sources"]

TRIGGER = b"some 200000 2000000\0"
"""Some task waited for memory for a tenth of two seconds. Who lacks CAP_SYS_RESOURCE may only ask
for windows of whole pairs of seconds; and once in two seconds is often enough to halve a cache."""

_READ = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """A descriptor that is ready for `events` (of epoll) when there is pressure; not blocking.

    `stream`: what comes has to be read, or the descriptor stays ready.
    """

    name: str
    fd: int
    events: int
    stream: bool = False

    def drain(self) -> None:
        """Read what came."""
        if self.stream:
            with contextlib.suppress(OSError):  # all of it is read, or its other end is gone
                while len(os.read(self.fd, _READ)) == _READ:
                    pass

    def close(self) -> None:
        """Watch no more."""
        os.close(self.fd)


def _trigger(path: Path, trigger: bytes) -> Source:
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, trigger)
        # What is not of the kernel may be opened, but not waited for.
        with select.epoll() as epoll:
            epoll.register(descriptor, select.EPOLLPRI)
    except OSError:
        os.close(descriptor)
        raise
    return Source(str(path), descriptor, select.EPOLLPRI)


def _connected(path: str, first: bytes) -> Source:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        connection.connect(path)
        if first:
            connection.send(first)
        return Source(path, connection.detach(), select.EPOLLIN, stream=True)


def _ordered(path: str, write: str) -> Source:
    """What the service manager wants to be watched. OSError; ValueError: not base64."""
    first = base64.b64decode(write, validate=True)
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return _trigger(Path(path), first or TRIGGER)
    if stat.S_ISSOCK(mode):
        return _connected(path, first)
    if not stat.S_ISFIFO(mode):
        raise ValueError("neither a file, nor a FIFO or a socket")
    # With a writer of our own there is no end of file.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return Source(path, descriptor, select.EPOLLIN, stream=True)


def _own_group(host: Host) -> Path | None:
    """The pressure of the cgroup that this process is in; None: the root, or none."""
    try:
        for line in (host.proc / "self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return Cgroup(cgroup_root(host), line[3:]).directory / "memory.pressure"
    except (OSError, CgroupError):
        pass
    return None


def find_sources(
    host: Host | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[list[Source], str]:
    """What to watch, and, when that is nothing, why."""
    host = host or Host()
    refused = []
    ordered = environ.get("MEMORY_PRESSURE_WATCH", "")
    if ordered == "/dev/null":
        return [], "MEMORY_PRESSURE_WATCH says so"
    if ordered:
        try:
            return [_ordered(ordered, environ.get("MEMORY_PRESSURE_WRITE", ""))], ""
        except OSError as error:
            refused.append(f"{ordered}: {error.strerror}")
        except ValueError as error:
            refused.append(f"{ordered}: {error}")
    for path in filter(None, (_own_group(host), host.proc / "pressure/memory")):
        try:
            return [_trigger(path, TRIGGER)], ""
        except OSError as error:
            refused.append(f"{path}: {error.strerror}")
    return [], "; ".join(refused)
