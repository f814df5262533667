"""A SCSI unit with persistent reservations that several hosts see: state, nexuses, faults.

`SimulatedTarget` is the unit: registrations and the reservation by SPC-4 5.13, blocks, and the
writes that it has accepted and not completed (`SimulatedNexus.submit`, `SimulatedTarget.settle`):
what a fence has to reach. `SimulatedNexus` is one host's way to it, an `extfs.layout` Unit.
`KernelFace` is the same nexus as the ioctls of a kernel, bytes in and out, so that the driver of
real devices runs on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from extfs.layout.reservations import (
    Capabilities,
    ConflictError,
    Designator,
    Held,
    Keys,
    ReservationType,
    UnitError,
    UnreachableError,
    UnsupportedError,
)

NAA = Designator("naa", 1, bytes.fromhex("6001405a1b2c3d4e5f60718293a4b5c6"))
TYPE = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
_ALL_REGISTRANTS = (
    ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
    ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
)

Trouble = Literal["refused", "lost before", "lost after", "repeated", "hangs", "unsupported"]
"""What may come of a command: an error without effect; no answer, without and with the effect; the
effect, and then the answer to a repetition of it; nothing until `SimulatedTarget.released`."""


class StatusConflictError(Exception):
    """Status RESERVATION CONFLICT."""


class AttentionError(Exception):
    """CHECK CONDITION, UNIT ATTENTION: the command was not done."""


class IllegalRequestError(Exception):
    """CHECK CONDITION, ILLEGAL REQUEST."""


@dataclass
class Write:
    """A write that the unit has accepted."""

    nexus: str
    block: int
    contents: bytes


@dataclass
class SimulatedTarget:
    """The unit. Calls are atomic.

    `as_linux`: where the kernel's own target differs from SPC-4: an unregistration is not counted,
    RESERVE of who is not registered is an illegal request, a preempt aborts nothing of a registrant
    that does not hold the reservation.
    """

    as_linux: bool = False
    persistent: bool = True
    aptpl: bool = True
    types: frozenset[ReservationType] | None = frozenset({TYPE})
    aborts: bool = True
    tells: bool = True
    """That it aborts, or not, is known of it; else the server has to do without."""
    resets: bool = True
    designators: list[Designator] = field(default_factory=lambda: [NAA])
    registrations: dict[str, int] = field(default_factory=dict)
    holder: str | None = None
    type: int = 0
    generation: int = 0
    blocks: dict[int, bytes] = field(default_factory=dict)
    queue: list[Write] = field(default_factory=list)
    attentions: dict[str, int] = field(default_factory=dict)
    troubles: dict[tuple[str, str], list[Trouble]] = field(default_factory=dict)
    hooks: dict[tuple[str, str], list[object]] = field(default_factory=dict)
    claims: dict[str, object] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.aborts = self.aborts and not self.as_linux

    def nexus(self, name: str) -> SimulatedNexus:
        """One host's way to it. The same name again is the same host after a restart."""
        return SimulatedNexus(self, name)

    def trouble(self, nexus: str, command: str, *kinds: Trouble) -> None:
        """The next such commands from there end so."""
        self.troubles.setdefault((nexus, command), []).extend(kinds)

    def before(self, nexus: str, command: str, action: object) -> None:
        """Have something happen just before the next such command from there is done."""
        self.hooks.setdefault((nexus, command), []).append(action)

    # -- what happens to a target --

    def restart(self, *, forget: bool) -> None:
        """Power off and on. What it had accepted is gone; registrations too unless it kept them."""
        with self.lock:
            self.queue.clear()
            self.generation = 0
            self._attend(*self.attentions)
            if forget:
                self.registrations.clear()
                self.holder = None

    def settle(self) -> None:
        """Complete what was accepted, whoever is registered by now."""
        with self.lock:
            for write in self.queue:
                self.blocks[write.block] = write.contents
            self.queue.clear()

    def key_of_holder(self) -> int | None:
        """None: no reservation; 0 with the types of all registrants."""
        if self.holder is None:
            return None
        return 0 if self.type in _ALL_REGISTRANTS else self.registrations[self.holder]

    # -- commands --

    def serves(self, nexus: str) -> bool:
        """Whether a read or a write of this nexus is accepted now."""
        return self.holder is None or nexus in self.registrations

    def register(self, nexus: str, old: int, key: int, *, ignore: bool) -> None:
        here = self.registrations.get(nexus)
        if not ignore and old != (here or 0):
            raise StatusConflictError
        if here is None and not key:
            return
        self.generation += bool(key) or not self.as_linux
        if key:
            self.registrations[nexus] = key
        else:
            del self.registrations[nexus]
            self._release_if_gone()

    def reserve(self, nexus: str, key: int, kind: int) -> None:
        if self.as_linux and nexus not in self.registrations:
            raise IllegalRequestError
        self._own(nexus, key)
        if self.holder is None:
            self.holder, self.type = nexus, kind
        elif self.holder != nexus or self.type != kind:
            raise StatusConflictError

    def release(self, nexus: str, key: int, kind: int) -> None:
        self._own(nexus, key)
        if self.holder != nexus:
            return
        if self.type != kind:
            raise IllegalRequestError
        self.holder = None
        self._attend(*(other for other in self.registrations if other != nexus))

    def preempt_abort(self, nexus: str, key: int, victim: int, kind: int) -> None:
        self._own(nexus, key)
        if not victim:
            raise IllegalRequestError
        gone = [name for name, its in self.registrations.items() if its == victim]
        if victim == self.key_of_holder():
            gone = [name for name in gone if name != nexus]
            self.holder, self.type = nexus, kind
        elif not gone:
            raise StatusConflictError
        for name in gone:
            del self.registrations[name]
        self._release_if_gone()
        self.generation += 1
        self._attend(*(name for name in gone if name != nexus))
        if self.aborts:
            self.queue = [write for write in self.queue if write.nexus not in gone]

    def clear(self, nexus: str, key: int) -> None:
        self._own(nexus, key)
        self._attend(*(name for name in self.registrations if name != nexus))
        self.registrations.clear()
        self.holder = None
        self.generation += 1

    def reset(self) -> None:
        self.queue.clear()
        self._attend(*self.attentions)

    def _own(self, nexus: str, key: int) -> None:
        if self.registrations.get(nexus) != key:
            raise StatusConflictError

    def _release_if_gone(self) -> None:
        if self.holder is not None and self.holder not in self.registrations:
            self.holder = None
            self._attend(*self.registrations)

    def _attend(self, *names: str) -> None:
        for name in names:
            self.attentions[name] = self.attentions.get(name, 0) + 1


@dataclass
class SimulatedNexus:
    """A host's way to the unit, as the Unit of extfs/layout."""

    target: SimulatedTarget
    host: str
    retries: int = 3

    def __post_init__(self) -> None:
        self.target.attentions.setdefault(self.host, 0)

    @property
    def name(self) -> str:
        return f"simulated unit of {self.host}"

    @contextlib.contextmanager
    def command(self, what: str) -> Iterator[SimulatedTarget]:
        """Around one command as the target does it: hooks and attentions."""
        target = self.target
        with target.lock:
            target.told.append((self.host, what))
            hooks = target.hooks.get((self.host, what), [])
            while hooks:
                action = hooks.pop(0)
                assert callable(action)
                action()
            if target.attentions.get(self.host, 0) and what != "INQUIRY":
                target.attentions[self.host] = 0
                raise AttentionError
            if not target.persistent and what not in ("INQUIRY", "READ", "RESET"):
                raise IllegalRequestError
            yield target

    def next_trouble(self, what: str) -> Trouble | None:
        with self.target.lock:
            kinds = self.target.troubles.get((self.host, what), [])
            return kinds.pop(0) if kinds else None

    @contextlib.contextmanager
    def _done(self, what: str) -> Iterator[SimulatedTarget]:
        try:
            with self.command(what) as target:
                yield target
        except StatusConflictError as error:
            raise ConflictError(f"{what}: reservation conflict") from error
        except IllegalRequestError as error:
            raise UnsupportedError(f"{what}: illegal request") from error

    def _run(self, what: str, call: object) -> object:
        """With the trouble that waits for it; attentions are for the inside."""
        assert callable(call)
        trouble = self.next_trouble(what)
        if trouble == "hangs":
            self.target.released.wait()
            raise UnreachableError(f"{what}: no answer")
        if trouble == "refused":
            raise UnitError(f"{what}: the unit did not do it")
        if trouble == "unsupported":
            raise UnsupportedError(f"{what}: not here")
        if trouble == "lost before":
            raise UnreachableError(f"{what}: no answer")
        result = self._attended(what, call)
        if trouble == "lost after":
            raise UnreachableError(f"{what}: no answer")
        if trouble == "repeated":
            return self._attended(what, call)
        return result

    def _attended(self, what: str, call: object) -> object:
        assert callable(call)
        for _ in range(self.retries):
            try:
                with self._done(what) as target:
                    return call(target)
            except AttentionError:
                continue
        raise UnitError(f"{what}: unit attention")

    # -- Unit --

    def claim(self) -> None:
        with self.target.lock:
            if self.target.claims.setdefault(self.host, self) is not self:
                raise UnitError("another extfs on this host serves the unit")

    def designators(self) -> list[Designator]:
        return list(self.target.designators)

    def capabilities(self) -> Capabilities:
        if not self.target.persistent:
            raise UnsupportedError("the unit has no persistent reservations")
        known = self.target.aborts if self.target.tells else None
        return Capabilities(self.target.aptpl, self.target.types, known)

    def register(self, key: int, *, old: int = 0, ignore: bool = False) -> None:
        self._run("REGISTER", lambda unit: unit.register(self.host, old, key, ignore=ignore))

    def reserve(self, key: int) -> None:
        self._run("RESERVE", lambda unit: unit.reserve(self.host, key, TYPE))

    def release(self, key: int) -> None:
        self._run("RELEASE", lambda unit: unit.release(self.host, key, TYPE))

    def preempt_abort(self, key: int, victim: int) -> None:
        self._run("PREEMPT", lambda unit: unit.preempt_abort(self.host, key, victim, TYPE))

    def clear(self, key: int) -> None:
        self._run("CLEAR", lambda unit: unit.clear(self.host, key))

    def keys(self) -> Keys:
        found = self._run(
            "READ KEYS", lambda unit: Keys(unit.generation, tuple(unit.registrations.values()))
        )
        assert isinstance(found, Keys)
        return found

    def reservation(self) -> Held | None:
        def held(unit: SimulatedTarget) -> Held | None:
            key = unit.key_of_holder()
            return None if key is None else Held(key, unit.type)

        found = self._run("READ RESERVATION", held)
        assert found is None or isinstance(found, Held)
        return found

    def passes(self) -> bool:
        return bool(self._run("READ", lambda unit: unit.serves(self.host)))

    def idle(self) -> bool:
        with self.target.lock:
            return not any(write.nexus == self.host for write in self.target.queue)

    def reset(self) -> None:
        if not self.target.resets:
            raise UnsupportedError("LOGICAL UNIT RESET: not here")
        self._run("RESET", lambda unit: unit.reset())

    def close(self) -> None:
        with self.target.lock:
            if self.target.claims.get(self.host) is self:
                del self.target.claims[self.host]

    # -- what a client does with the unit --

    def submit(self, block: int, contents: bytes) -> None:
        """Have a write accepted; `SimulatedTarget.settle` completes it. ConflictError."""

        def accept(unit: SimulatedTarget) -> None:
            if not unit.serves(self.host):
                raise StatusConflictError
            unit.queue.append(Write(self.host, block, contents))

        self._run("WRITE", accept)

    def write(self, block: int, contents: bytes) -> None:
        """A write that is completed at once."""

        def do(unit: SimulatedTarget) -> None:
            if not unit.serves(self.host):
                raise StatusConflictError
            unit.blocks[block] = contents

        self._run("WRITE", do)


# ---- the same as ioctls ------------------------------------------------------------------------

_GOOD, _CHECK, _CONFLICT, _NO_PATH = 0, 0x02, 0x18, 0x0001_0000
_ATTENTION_SENSE = bytes([0x70, 0, 6, *[0] * 9, 0x2A, 0x05, *[0] * 4])
_ILLEGAL_SENSE = bytes([0x70, 0, 5, *[0] * 9, 0x24, 0x00, *[0] * 4])


@dataclass
class KernelFace:
    """The ioctls of a block device, for `extfs.layout.scsi_unit` instead of fcntl.ioctl.

    Results are a 6.1 kernel's: positive SCSI results from linux/pr.h. READ KEYS hides what had no
    room, as the kernel's own target does.
    """

    nexuses: dict[int, SimulatedNexus] = field(default_factory=dict)
    vendor: bytes = b"SIMULATE"
    size: int = 1 << 30

    def open(self, nexus: SimulatedNexus) -> int:
        """A descriptor of the device."""
        descriptor = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.nexuses[descriptor] = nexus
        return descriptor

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        if descriptor not in self.nexuses:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        nexus = self.nexuses[descriptor]
        if request == 0x2285:
            return self._sg_io(nexus, argument)
        if request == 0x2284:
            assert argument == bytearray(struct.pack("=i", 0x101))
            if not nexus.target.resets:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            with nexus.target.lock:
                nexus.target.reset()
            return 0
        if request == 0x80081272:
            argument[:] = struct.pack("=Q", self.size)
            return 0
        if request == 0x1268:
            argument[:] = struct.pack("=i", 512)
            return 0
        return self._reserve_out(nexus, request, bytes(argument))

    def _reserve_out(self, nexus: SimulatedNexus, request: int, record: bytes) -> int:
        assert (request >> 30, request >> 16 & 0x3FFF, request >> 8 & 0xFF) == (
            1,
            len(record),
            ord("p"),
        )
        name, call = _OUT[request & 0xFF]
        trouble = nexus.next_trouble(name)
        if trouble == "lost before":
            return _NO_PATH
        if trouble == "refused":
            return _CHECK
        try:
            with nexus.command(name) as target:
                call(target, nexus.host, record)
        except StatusConflictError:
            return _CONFLICT
        except (AttentionError, IllegalRequestError):
            return _CHECK
        return _NO_PATH if trouble == "lost after" else _GOOD

    def _sg_io(self, nexus: SimulatedNexus, header: bytearray) -> int:
        fields = list(struct.unpack("@iiBBHIPPPIIiPBBBBHHiII0P", header))
        assert (fields[0], fields[1]) == (ord("S"), -3)
        command = ctypes.string_at(fields[7], fields[2])
        status, sense, answer = _GOOD, b"", b""
        try:
            answer = self._read(nexus, command)[: fields[5]]
        except StatusConflictError:
            status = _CONFLICT
        except AttentionError:
            status, sense = _CHECK, _ATTENTION_SENSE
        except IllegalRequestError:
            status, sense = _CHECK, _ILLEGAL_SENSE
        ctypes.memmove(fields[6], answer, len(answer))
        ctypes.memmove(fields[8], sense, len(sense))
        fields[13], fields[16], fields[19] = status, len(sense), fields[5] - len(answer)
        header[:] = struct.pack("@iiBBHIPPPIIiPBBBBHHiII0P", *fields)
        return 0

    def _read(self, nexus: SimulatedNexus, command: bytes) -> bytes:
        if command[0] == 0x12:
            with nexus.command("INQUIRY") as target:
                return self._inquiry(target, command)
        if command[0] == 0x88:
            with nexus.command("READ") as target:
                if not target.serves(nexus.host):
                    raise StatusConflictError
                return bytes(512)
        assert command[0] == 0x5E
        room = int.from_bytes(command[7:9], "big")
        name = ("READ KEYS", "READ RESERVATION", "REPORT CAPABILITIES")[command[1]]
        with nexus.command(name) as target:
            if command[1] == 0:
                keys = list(target.registrations.values())[: (room - 8) // 8]
                return struct.pack(f">II{len(keys)}Q", target.generation, 8 * len(keys), *keys)
            if command[1] == 1:
                key = target.key_of_holder()
                if key is None:
                    return struct.pack(">II", target.generation, 0)
                return struct.pack(">IIQ4xxB2x", target.generation, 16, key, target.type)
            bits = 0x40 if target.types is None or TYPE in target.types else 0x02
            return bytes(
                [0, 8, target.aptpl, 0x80 if target.types is not None else 0, bits, 0, 0, 0]
            )

    def _inquiry(self, target: SimulatedTarget, command: bytes) -> bytes:
        if not command[1]:
            return bytes(8) + self.vendor.ljust(8) + bytes(20)
        page = b"".join(
            bytes([0x01, 3 if one.kind == "naa" else 2, 0, len(one.data)]) + one.data
            for one in target.designators
        )
        # Names of the vendor and of the target port, which do not name the unit.
        other = bytes([0x02, 0x01, 0, 4]) + b"name" + bytes([0x51, 0x93, 0, 8]) + b"portport"
        page = other + page
        return bytes([0, 0x83]) + len(page).to_bytes(2, "big") + page


def _pr_register(target: SimulatedTarget, host: str, record: bytes) -> None:
    old, new, flags, _pad = struct.unpack("=QQII", record)
    target.register(host, old, new, ignore=bool(flags & 1))


def _pr_reserve(target: SimulatedTarget, host: str, record: bytes) -> None:
    key, kind, _flags = struct.unpack("=QII", record)
    assert kind == 4
    target.reserve(host, key, TYPE)


def _pr_release(target: SimulatedTarget, host: str, record: bytes) -> None:
    key, kind, _flags = struct.unpack("=QII", record)
    assert kind == 4
    target.release(host, key, TYPE)


def _pr_preempt_abort(target: SimulatedTarget, host: str, record: bytes) -> None:
    key, victim, kind, _flags = struct.unpack("=QQII", record)
    assert kind == 4
    target.preempt_abort(host, key, victim, TYPE)


def _pr_clear(target: SimulatedTarget, host: str, record: bytes) -> None:
    target.clear(host, struct.unpack("=QII", record)[0])


_OUT = {
    200: ("REGISTER", _pr_register),
    201: ("RESERVE", _pr_reserve),
    202: ("RELEASE", _pr_release),
    204: ("PREEMPT", _pr_preempt_abort),
    205: ("CLEAR", _pr_clear),
}
