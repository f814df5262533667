"""One mounted filesystem: a process that opens the core, starts the bridge, runs to the unmount.

Order of things: device, core (which replays the journal), bridge (which mounts), pyfuse3, "ready";
and back in reverse when the kernel says that it is unmounted. SIGTERM and SIGINT unmount; while
files are open the mountpoint is detached, and the daemon ends when the last of them is closed. A
second signal aborts the connection: everybody who still uses it gets errors. SIGUSR1 logs counters.
SIGHUP is ignored.

Whatever happens after a successful open, the core is closed: what fsync promised is durable anyway,
and a clean close leaves an empty journal.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import resource
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from extfs import core
from extfs.control.status import Status
from extfs.core import (
    Atime,
    Bridge,
    CoreError,
    Device,
    Filesystem,
    LayoutEvent,
    Transport,
    TransportError,
)
from extfs.fuse import IdlePoll, Session, latency_device
from extfs.layout import CoreTable, FenceChoice, Fencing, Host, parse_fence
from extfs.layout.reservation_fence import SCHEME
from extfs.layout.reserved_mount import ReservedMount, why_refused
from extfs.memory import Shrinker, cache_size, find_limit, find_sources

if TYPE_CHECKING:  # a mount that serves nobody does not load it
    from extfs.nfs.exports import Export
    from extfs.nfs.server import Server, ServerOptions
    from extfs.nfs.service import ServiceOptions

__all__ = [
    "MountError",
    "MountOptions",
    "NfsOptions",
    "parse_nfs",
    "parse_options",
    "run",
    "start",
]

log = logging.getLogger("extfs")

MIB = 1 << 20
RECALL_MS = 10_000
EARLY_BYTES = 16 * MIB


class MountError(Exception):
    """The filesystem could not be mounted; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class NfsOptions:
    """What the layout server is to do: where it listens, what it exports."""

    exports: tuple[Export, ...]
    server: ServerOptions
    service: ServiceOptions


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What ``extfs mount`` was asked for. Zeros mean the core's defaults."""

    device: str
    mountpoint: str
    read_only: bool = False
    cache_bytes: int = 0
    inode_cache: int = 0
    commit_ms: int = 0
    recall_ms: int = RECALL_MS
    fence: FenceChoice = field(default_factory=FenceChoice)
    atime: Atime = Atime.RELATIME
    threads: int = 0
    writeback_cache: bool = False
    transport: Transport = Transport.AUTO
    idle_poll: IdlePoll = IdlePoll.AUTO
    early_bytes: int = EARLY_BYTES
    take_over: bool = False
    """Of a reserved unit whose server is not heard of any more."""
    nfs: NfsOptions | None = None
    kernel: tuple[str, ...] = ()
    """Options of mount(8) that the kernel keeps: nosuid, nodev, ..."""


# Words of mount(8) that mean nothing to the kernel or to us: for the tools that read /etc/fstab.
_FSTAB_WORDS = frozenset(
    ("auto", "noauto", "user", "nouser", "users", "group", "owner", "_netdev", "nofail")
)
_KERNEL_WORDS = frozenset(
    ("defaults", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "diratime", "nodiratime")
) | frozenset(("async", "silent", "loud"))
_ATIME_WORDS = {
    "atime": Atime.RELATIME,
    "relatime": Atime.RELATIME,
    "strictatime": Atime.STRICT,
    "noatime": Atime.NONE,
}


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def _size(word: str, value: str, low: int, high: int) -> int:
    """Bytes, with a unit (64M, 1G) or without."""
    match = re.fullmatch(r"([0-9]{1,18})([kmgt]?)(i?b)?", value.lower())
    if match is None:
        raise MountError(f"option {word}: {value!r} is not a size")
    size = int(match[1]) << _UNITS[match[2]]
    if not low <= size <= high:
        raise MountError(f"option {word}: {value} is not between {low >> 20}M and {high >> 20}M")
    return size


def _number(word: str, value: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except ValueError:
        raise MountError(f"option {word}: {value!r} is not a number") from None
    if not low <= number <= high:
        raise MountError(f"option {word}: {number} is not between {low} and {high}")
    return number


def _seconds(word: str, value: str, low: float, high: float) -> int:
    """Milliseconds of a number of seconds, which may have a fraction."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", value) is None:
        raise MountError(f"option {word}: {value!r} is not a number of seconds")
    seconds = float(value)
    if not low <= seconds <= high:
        raise MountError(f"option {word}: {value} is not between {low:g} and {high:g}")
    return round(1000 * seconds)


def _fence(value: str) -> FenceChoice:
    try:
        return parse_fence(value)
    except ValueError as error:
        raise MountError(f"option fence: {error}") from None


def _transport(value: str) -> Transport:
    try:
        return Transport[value.upper()]
    except KeyError:
        raise MountError(f"option transport: {value!r} is not auto, uring or classic") from None


def _idle_poll(value: str) -> IdlePoll:
    try:
        return IdlePoll(value)
    except ValueError:
        raise MountError(f"option idle_poll: {value!r} is not auto, on or off") from None


def _apply(options: MountOptions, word: str) -> MountOptions:
    name, equals, value = word.partition("=")
    if word in ("ro", "rw"):
        return replace(options, read_only=word == "ro")
    if word in _ATIME_WORDS:
        options = replace(options, atime=_ATIME_WORDS[word])
        return replace(options, kernel=(*options.kernel, word))
    if word in _KERNEL_WORDS:
        return replace(options, kernel=(*options.kernel, word))
    if word in _FSTAB_WORDS or word.startswith(("x-", "comment=")):
        return options
    if word == "allow_other":
        return options
    if word == "take_over":
        return replace(options, take_over=True)
    if word == "writeback_cache":
        return replace(options, writeback_cache=True)
    if equals and name == "cache":
        return replace(options, cache_bytes=_size(name, value, 4 * MIB, MIB << 20))
    if equals and name == "early_writes":
        return replace(
            options, early_bytes=0 if value == "0" else _size(name, value, MIB, MIB << 14)
        )
    if equals and name == "inode_cache":
        return replace(options, inode_cache=_number(name, value, 64, 1 << 24))
    if equals and name == "commit":
        return replace(options, commit_ms=1000 * _number(name, value, 1, 300))
    if equals and name == "recall":
        return replace(options, recall_ms=_seconds(name, value, 0.05, 3600))
    if equals and name == "fence":
        return replace(options, fence=_fence(value))
    if equals and name == "threads":
        return replace(options, threads=_number(name, value, 1, 64))
    if equals and name == "transport":
        return replace(options, transport=_transport(value))
    if equals and name == "idle_poll":
        return replace(options, idle_poll=_idle_poll(value))
    raise MountError(f"unknown mount option: {word}")


def parse_options(device: str, mountpoint: str, words: str = "") -> MountOptions:
    """Read the comma-separated words of ``-o``.

    Ours: ``cache=SIZE`` (metadata cache), ``inode_cache=N``, ``commit=SECONDS``, ``threads=N``,
    ``early_writes=SIZE`` (memory for buffered writes that are answered before they are on the
    device; 0: none are), ``writeback_cache``, ``transport=auto|uring|classic`` (how requests come
    from the kernel: FUSE over io_uring or /dev/fuse), ``idle_poll=auto|on|off`` (whether idle CPUs
    poll while requests follow one another), ``recall=SECONDS`` (a layout holder's time to answer),
    ``fence=WAY`` (what confirms that a lost holder cannot reach the device), ``take_over``
    (a reserved device whose server is not heard of any more); ``allow_other`` is always on.
    MountError: a word that nobody knows, or a number out of its range.
    """
    options = MountOptions(device, mountpoint)
    for word in words.split(","):
        if word:
            options = _apply(options, word)
    return options


def parse_nfs(listen: str, exports: Sequence[str]) -> NfsOptions:
    """ADDRESS:PORT and exports as ``extfs mount`` takes them. MountError: one is wrong."""
    from extfs.nfs.exports import ExportError, parse_export
    from extfs.nfs.server import ServerOptions
    from extfs.nfs.service import ServiceOptions

    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise MountError(f"--nfs {listen}: not a numeric ADDRESS:PORT") from None
    if not colon or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise MountError(f"--nfs {listen}: not an ADDRESS:PORT")
    try:
        parsed = tuple(parse_export(text) for text in exports)
    except ExportError as error:
        raise MountError(f"--export: {error}") from None
    if not parsed:
        raise MountError("--nfs without --export serves nothing")
    return NfsOptions(parsed, ServerOptions(listen=((host, int(port)),)), ServiceOptions())


# ---- opening ----------------------------------------------------------------------------------


def _explain(error: OSError, what: str) -> MountError:
    text = error.text if isinstance(error, CoreError) else os.strerror(error.errno or 0)
    return MountError(f"{what}: {text}")


def _explain_bridge(error: CoreError, options: MountOptions) -> MountError:
    messages = {
        errno.ENODEV: "there is no /dev/fuse (is the fuse module loaded?)",
        errno.EPERM: "mounting needs root",
        errno.EACCES: "mounting needs root",
        errno.EBUSY: f"{options.mountpoint}: something is mounted there already",
        errno.ENOENT: f"{options.mountpoint}: no such directory",
        errno.ENOTDIR: f"{options.mountpoint}: not a directory",
    }
    text = messages.get(error.errno or 0, f"{options.mountpoint}: {error.text}")
    return MountError(text)


def _check_mountpoint(path: str) -> None:
    """Fail before the device is touched; the bridge checks again."""
    try:
        directory = Path(path).is_dir() or not Path(path).exists()
        Path(path).stat()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(f"{path}: a dead mount is in the way; unmount it first") from None
        raise _explain(error, path) from None
    if not directory:
        raise MountError(f"{path}: not a directory")


@contextlib.contextmanager
def _opened(options: MountOptions) -> Iterator[Filesystem]:
    """The core, open. Closed at the end; a failure to close it clean is a MountError."""
    limit = find_limit()
    try:
        device = Device.open(options.device, read_only=options.read_only)
    except OSError as error:
        raise _explain(error, options.device) from error
    try:
        filesystem = Filesystem.open(
            device,
            read_only=options.read_only,
            cache_bytes=options.cache_bytes or cache_size(limit.bytes() if limit else None),
            inode_cache=options.inode_cache,
            commit_ms=options.commit_ms,
            recall_ms=options.recall_ms,
            early_bytes=options.early_bytes,
            atime=options.atime,
        )
    except OSError as error:
        device.close()
        raise MountError(
            why_refused(options.device) or str(_explain(error, options.device))
        ) from error
    try:
        yield filesystem
    finally:
        failed = filesystem.shutdown_error
        try:
            filesystem.close()
        except OSError as error:
            raise _explain(error, f"{options.device}: closing") from error
        if failed is not None:
            log.error("%s was turned read-only by an error: %s", options.device, failed.text)


@contextlib.contextmanager
def _reserved(options: MountOptions) -> Iterator[ReservedMount | None]:
    """The device reserved, if an export needs that. MountError: it cannot be, or is by others."""
    from extfs.nfs.constants import LAYOUT4_SCSI

    kinds = (
        {e.rules.layout_type for e in options.nfs.exports if e.rules.layouts}
        if options.nfs
        else set()
    )
    if LAYOUT4_SCSI not in kinds:
        yield None
        return
    from extfs.layout.reservations import UnitError
    from extfs.layout.reserved_mount import reserve
    from extfs.layout.server_reservation import RefusedError

    try:
        mount = reserve(options.device, take_over=options.take_over)
    except OSError as error:
        raise _explain(error, options.device) from error
    except (RefusedError, UnitError) as error:
        raise MountError(f"layouts=scsi: {error}") from error
    log.info("%s: %s", options.device, mount.described())
    try:
        yield mount
    finally:
        mount.reservation.close()


def _start_bridge(filesystem: Filesystem, options: MountOptions) -> Bridge:
    try:
        return Bridge.start(
            filesystem,
            options.mountpoint,
            fsname=options.device,
            options=",".join(options.kernel),
            threads=options.threads,
            writeback_cache=options.writeback_cache,
            read_only=options.read_only,
            transport=options.transport,
        )
    except TransportError as error:
        raise MountError(f"transport=uring: {error.why}") from error
    except CoreError as error:
        raise _explain_bridge(error, options) from error


def _poll_when_idle(bridge: Bridge, options: MountOptions) -> None:
    """As the option says; a mount is as good, only slower, without."""
    descriptor, why = latency_device(options.idle_poll)
    try:
        bridge.poll_when_idle(descriptor, why)
    except CoreError as error:
        if descriptor is not None:
            os.close(descriptor)
        bridge.poll_when_idle(None, error.text)
        why = error.text
    if why and options.idle_poll is IdlePoll.ON:
        log.warning("idle_poll=on: idle CPUs will halt: %s", why)


# ---- running ----------------------------------------------------------------------------------


async def _pass_log_on() -> None:
    """Hand the core's log lines to Python's logging as they come."""
    while True:
        await trio.lowlevel.wait_readable(core.log_fd())
        core.drain_log(log)


def _unmount(bridge: Bridge, mountpoint: str) -> None:
    try:
        bridge.unmount()
    except CoreError as error:
        if error.errno != errno.EBUSY:
            log.info("unmounting %s: %s", mountpoint, error.text)
        else:
            log.info("%s is in use: detached, ends when the last file is closed", mountpoint)
        with contextlib.suppress(CoreError):  # detached before, by somebody else
            bridge.unmount(lazy=True)


def _log_counters(filesystem: Filesystem, bridge: Bridge) -> None:
    """One line of JSON: the counters of core, bridge and layouts."""
    counters = {
        "core": asdict(filesystem.stats()),
        "bridge": asdict(bridge.stats()),
        "layouts": filesystem.layouts.counters(),
    }
    log.info("counters: %s", json.dumps(counters))


_OBEYED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """While there is a mount but nobody to unmount it yet, or any more: the signals that came.

    From the mount on a signal means to unmount. One that ended the process before it can
    would leave a mount without a daemon.
    """
    kept: list[int] = []
    before = {number: signal.getsignal(number) for number in _OBEYED}
    for number in _OBEYED:
        signal.signal(number, lambda number, frame: kept.append(number))
    try:
        yield kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _obey_signals(
    filesystem: Filesystem, bridge: Bridge, mountpoint: str, kept: list[int]
) -> None:
    with trio.open_signal_receiver(*_OBEYED) as signals:
        for number in kept:
            signal.raise_signal(number)
        first = True
        async for number in signals:
            if number == signal.SIGUSR1:
                _log_counters(filesystem, bridge)
                continue
            log.info("%s: unmounting %s", signal.Signals(number).name, mountpoint)
            if first:
                # May write out dirty pages, as requests to the bridge: not in this thread.
                await trio.to_thread.run_sync(_unmount, bridge, mountpoint)
            else:
                with contextlib.suppress(CoreError):
                    bridge.abort()
            first = False


def _fencing(
    filesystem: Filesystem,
    options: MountOptions,
    reserved: ReservedMount | None,
    on_event: Callable[[LayoutEvent], None],
) -> Fencing | None:
    """Who decides about lost layout holders; a read-only mount changes nothing about them."""
    if options.read_only:
        return None
    context = {
        "EXTFS_DEVICE": options.device,
        "EXTFS_MOUNTPOINT": options.mountpoint,
        "EXTFS_UUID": str(uuid.UUID(bytes=filesystem.super.uuid)),
    }
    driver = options.fence.driver(options.device, context, Host())
    return Fencing(
        CoreTable(filesystem),
        driver,
        schemes={SCHEME: reserved.fence} if reserved is not None else {},
        grace=options.recall_ms / 1000,
        on_event=on_event,
    )


def _check_service(options: MountOptions) -> None:
    """MountError: this mount cannot serve. Said before a unit is taken from another server."""
    if options.nfs is None:
        return
    if options.read_only:
        raise MountError("a read-only mount cannot serve NFS: clients must be remembered")
    if options.writeback_cache:
        raise MountError("writeback_cache is for exclusive local use: it excludes --nfs")


def _layout_server(
    filesystem: Filesystem, options: MountOptions, reserved: ReservedMount | None
) -> Server | None:
    """The layout server, listening. MountError: it cannot be."""
    nfs = options.nfs
    if nfs is None:
        return None
    from extfs.nfs.exports import Exports
    from extfs.nfs.server import Server

    service = replace(nfs.service, device=options.device)
    if reserved is not None:
        from extfs.nfs.devices import disk_offset
        from extfs.nfs.scsi_layout import ScsiIdentity

        offset = disk_offset(options.device)
        told = reserved.reservation.offered
        unit = ScsiIdentity(reserved.designator, offset, reserved.new_key, told)
        service = replace(service, unit=unit)
    try:
        server = Server(filesystem, Exports(filesystem, nfs.exports), nfs.server, service)
    except (ValueError, OSError) as error:
        raise MountError(f"the layout server cannot start: {error}") from error
    try:
        server.bind()
    except OSError as error:
        server.close()
        where = ", ".join(f"{host}:{port}" for host, port in nfs.server.listen)
        raise MountError(f"cannot listen on {where}: {os.strerror(error.errno or 0)}") from error
    return server


async def _serve(
    filesystem: Filesystem,
    bridge: Bridge,
    session: Session,
    fencing: Fencing | None,
    server: Server | None,
    reserved: ReservedMount | None,
    shrinker: Shrinker,
    mountpoint: str,
    kept: list[int],
) -> None:
    """Until unmounted."""

    def taken(why: str) -> None:
        """Another server has the device: whatever we have not written is its business now."""
        log.critical("%s", why)
        filesystem.shutdown(why)
        with contextlib.suppress(CoreError):
            bridge.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_pass_log_on)
        nursery.start_soon(_obey_signals, filesystem, bridge, mountpoint, kept)
        nursery.start_soon(shrinker.run)
        if fencing is not None:
            nursery.start_soon(fencing.run)
        if reserved is not None:
            nursery.start_soon(reserved.keep, taken)
        if server is not None:
            nursery.start_soon(server.run)
        async with trio.open_nursery() as serving:
            serving.start_soon(session.run)
            await trio.lowlevel.wait_readable(bridge.event_fd)
            session.stop()
        nursery.cancel_scope.cancel()


def _run_mounted(
    filesystem: Filesystem,
    bridge: Bridge,
    options: MountOptions,
    reserved: ReservedMount | None,
    kept: list[int],
    ready: Callable[[], None],
) -> None:
    """From the mount to the unmount."""
    server = _layout_server(filesystem, options, reserved)
    session = None
    try:
        on_event = server.layout_event if server is not None else lambda event: None
        fencing = _fencing(filesystem, options, reserved, on_event)
        sources, why = find_sources()
        shrinker = Shrinker(filesystem, sources, why=why, limit=find_limit())
        status = Status(
            filesystem,
            device=options.device,
            mountpoint=options.mountpoint,
            read_only=options.read_only,
            recall_ms=options.recall_ms,
            fencing=fencing,
            bridge=bridge.stats,
            nfs=server.status if server is not None else None,
            pressure=shrinker.status,
        )
        session = Session(bridge.forward_fd, status.json)
        core.drain_log(log)  # what there was to say is said to whoever mounts
        ready()
        log.info("%s is mounted on %s", options.device, options.mountpoint)
        for host, port in server.listening if server is not None else ():
            log.info("serving NFS on %s:%d", host, port)
        trio.run(
            _serve,
            filesystem,
            bridge,
            session,
            fencing,
            server,
            reserved,
            shrinker,
            options.mountpoint,
            kept,
        )
        log.info("%s is unmounted", options.mountpoint)
    finally:
        if session is not None:
            session.close()
        if server is not None:
            server.close()


def _allow_descriptors() -> None:
    """As many as the administrator allows: clients and holders' sockets are one each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(options: MountOptions, ready: Callable[[], None] = lambda: None) -> None:
    """Mount and serve in this process until unmounted. Logs to logger ``extfs``.

    `ready` is called when the filesystem can be used. MountError: it could not be mounted, or not
    be closed cleanly.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _allow_descriptors()
    _check_service(options)
    _check_mountpoint(options.mountpoint)
    try:
        core.io_flusher()
    except CoreError as error:
        log.info("memory may be slow to come where it is short: PR_SET_IO_FLUSHER: %s", error)
    try:
        with _reserved(options) as reserved, _opened(options) as filesystem:
            if reserved is not None:
                reserved.filesystem = filesystem
            try:
                with _signals_kept() as kept:
                    bridge = _start_bridge(filesystem, options)
                    try:
                        _poll_when_idle(bridge, options)
                        _run_mounted(filesystem, bridge, options, reserved, kept, ready)
                    finally:
                        bridge.stop()
            finally:
                if reserved is not None:
                    reserved.let_go()
    finally:
        core.drain_log(log)


# ---- in the background ------------------------------------------------------------------------


def _log_to_system() -> None:
    """Background daemons log to syslog where there is one."""
    handler: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):
        handler = logging.handlers.SysLogHandler("/dev/log")
        handler.setFormatter(logging.Formatter("extfs[%(process)d]: %(levelname)s %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)


def _detach_from_terminal() -> None:
    """Stand alone: no controlling terminal, no working directory, no open standard streams."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _background(options: MountOptions, pipe: int) -> int:
    """The child of `start`: its whole life. Returns the exit code."""

    def ready() -> None:
        _log_to_system()
        _detach_from_terminal()
        os.write(pipe, b"ready")
        os.close(pipe)

    try:
        run(options, ready)
    except MountError as error:
        with contextlib.suppress(OSError):  # after ready there is nobody to tell
            os.write(pipe, str(error).encode())
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("the daemon failed")
        with contextlib.suppress(OSError):
            os.write(pipe, b"internal error")
        return 1
    return 0


def start(options: MountOptions) -> int:
    """Mount in a process of its own; returns its pid once the filesystem can be used.

    Call it while this process has no other threads. MountError: it could not be mounted.
    """
    absolute = replace(
        options,
        device=os.path.abspath(options.device),
        mountpoint=os.path.abspath(options.mountpoint),
    )
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            code = _background(absolute, writer)
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    if said == b"ready":
        return pid
    os.waitpid(pid, 0)
    raise MountError(said.decode(errors="replace") or "the daemon ended without a word")
