"""The bridge to /dev/fuse."""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import Any

from extfs.core.filesystem import Filesystem
from extfs.core.native import CoreError, checked, ffi, lib, string


@dataclass(frozen=True, slots=True)
class BridgeStats:
    """Requests since the mount; `by_opcode` by FUSE opcode number."""

    requests: int
    forwarded: int
    parked: int
    interrupted: int
    by_opcode: dict[int, int]
    by_ring: int = 0
    """Of the requests, those that came over io_uring."""
    transport: str = "classic"
    """How requests come: "uring" (FUSE over io_uring) or "classic" (/dev/fuse)."""
    transport_why: str = ""
    """What keeps it from "uring"; empty when nothing does."""
    idle_polls: int = 0
    """How often idle CPUs were asked to poll."""
    idle_poll_seconds: float = 0.0
    """For how long, in all."""
    idle_polling: bool = False
    """They do now."""
    idle_poll_why: str = ""
    """What keeps them from it; empty when nothing does."""


class Transport(enum.IntEnum):
    """How requests are to come from the kernel."""

    AUTO = 0
    """Over io_uring where the kernel offers it, else over /dev/fuse."""
    URING = 1
    CLASSIC = 2


class TransportError(CoreError):
    """There is no FUSE over io_uring, and it was demanded; `why` says what is missing."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code)
        self.why = why


class OpcodeServer(enum.IntEnum):
    """Who serves a FUSE opcode."""

    NONE = 0
    C = 1
    PYTHON = 2


def opcodes() -> dict[str, OpcodeServer]:
    """The bridge's table: every opcode that it knows, and who serves it."""
    found = {}
    server = ffi.new("int *")
    for number in range(64):
        name = lib.extfs_bridge_opcode(number, server)
        if name:
            found[string(name)] = OpcodeServer(server[0])
    return found


class Bridge:
    """The mount at /dev/fuse, served by the core's own threads; see native/bridge.h."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._idle_why = "not asked for"

    @classmethod
    def start(
        cls,
        fs: Filesystem,
        mountpoint: str,
        *,
        fsname: str,
        options: str = "",
        threads: int = 0,
        writeback_cache: bool = False,
        read_only: bool = False,
        transport: Transport = Transport.AUTO,
    ) -> Bridge:
        """Mount and serve. ENOENT, ENOTDIR, EBUSY (mountpoint), ENODEV (no /dev/fuse), EPERM.

        TransportError: `transport` is URING, which is not to be had. `options` are the mount(8)
        options left for the kernel; `threads` 0: one for each CPU, without io_uring up to 4.
        """
        keep = [
            ffi.new("char[]", text.encode("utf-8", "surrogateescape"))
            for text in (mountpoint, fsname, options)
        ]
        wanted = ffi.new("struct extfs_bridge_options *")
        wanted.mountpoint, wanted.fsname, wanted.options = keep
        wanted.threads = threads
        wanted.writeback_cache = writeback_cache
        wanted.read_only = read_only
        wanted.transport = int(transport)
        why = ffi.new("char[]", 256)
        wanted.why, wanted.why_len = why, len(why)
        out = ffi.new("struct bridge **")
        code = lib.extfs_bridge_start(fs.raw, wanted, out)
        if code == -errno.EOPNOTSUPP and transport is Transport.URING:
            raise TransportError(code, string(why))
        checked(code)
        return cls(out[0])

    @property
    def forward_fd(self) -> int:
        """Socket with the requests that Python serves; pyfuse3's mountpoint is /dev/fd/<this>.

        The caller's to close, once asked for.
        """
        return int(lib.extfs_bridge_forward_fd(self._raw))

    @property
    def event_fd(self) -> int:
        """Readable once unmounted."""
        return int(lib.extfs_bridge_event_fd(self._raw))

    def stats(self) -> BridgeStats:
        """Counts of requests."""
        out = ffi.new("struct extfs_bridge_stats *")
        lib.extfs_bridge_get_stats(self._raw, out)
        why = ffi.new("char **")
        transport = Transport(lib.extfs_bridge_transport(self._raw, why))
        return BridgeStats(
            requests=out.requests,
            forwarded=out.forwarded,
            parked=out.parked,
            interrupted=out.interrupted,
            by_ring=out.by_ring,
            by_opcode={number: count for number, count in enumerate(out.by_opcode) if count},
            transport=transport.name.lower(),
            transport_why=string(why[0]),
            idle_polls=out.idle_polls,
            idle_poll_seconds=out.idle_poll_ns / 1e9,
            idle_polling=bool(out.idle_polling),
            idle_poll_why=os.strerror(-out.idle_poll_error)
            if out.idle_poll_error
            else self._idle_why,
        )

    def poll_when_idle(self, descriptor: int | None, why: str) -> None:
        """Let idle CPUs poll while requests follow one another; once.

        `descriptor` is of /dev/cpu_dma_latency, and the bridge's from then on; None: they halt, and
        `why`. ENOMEM, EAGAIN: it is still the caller's.
        """
        if descriptor is not None:
            checked(lib.extfs_bridge_poll_when_idle(self._raw, descriptor))
        self._idle_why = why

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount. EBUSY while files are open, unless `lazy`. May wait for requests: blocks."""
        checked(lib.extfs_bridge_unmount(self._raw, lazy))

    def abort(self) -> None:
        """Fail every request from now on, as if unmounted."""
        checked(lib.extfs_bridge_abort(self._raw))

    def notify_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """Tell the kernel that bytes changed; length 0: to the end; offset -1: attributes."""
        checked(lib.extfs_bridge_notify_inode(self._raw, ino, offset, length))

    def notify_entry(self, directory: int, name: bytes) -> None:
        """Tell the kernel that a name changed."""
        checked(lib.extfs_bridge_notify_entry(self._raw, directory, name, len(name)))

    def stop(self) -> None:
        """Wait for the threads and free everything; what is still mounted is aborted. Blocks."""
        raw, self._raw = self._raw, None
        if raw is not None:
            checked(lib.extfs_bridge_stop(raw))
