"""A SCSI disk as a unit: linux/pr.h ioctls to change registrations, SG_IO to read them.

linux/pr.h serves a disk and a multipath map alike, and `sd` asks for APTPL by itself; but no ioctl
of these kernels reads keys back, so PERSISTENT RESERVE IN goes through SG_IO, as does INQUIRY. The
kernel wants the whole disk for both, so for a partition its disk is opened.

Facts of linux/pr.h and drivers/scsi/sd.c: struct pr_preempt has *our* key in old_key and the
victim's in new_key. An ioctl that the unit did not do returns a positive number, a SCSI result: the
status in the low byte (0x18 RESERVATION CONFLICT, 0x02 CHECK CONDITION), the host's part in bits 16
to 23 (no path, time-out). The sense data are not told, so a check condition is repeated: a unit
attention, which the first command after a preempt, a reset or a restart meets, means that the
command was not done.

Layouts of parameter data are from SPC-4: READ KEYS 6.15.2, READ RESERVATION 6.15.3, REPORT
CAPABILITIES 6.15.4, Device Identification 7.8.6.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
from pathlib import Path
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

__all__ = [
    "ScsiUnit",
    "disk_of_number",
    "parse_capabilities",
    "parse_designators",
    "parse_keys",
    "parse_reservation",
    "whole_disk",
]

COMMAND_MS = 20_000
LOCKS = Path("/run/extfs")
_TRIES = 5
_BUSY_SECONDS = 0.1

# _IOW('p', n, struct) of asm-generic/ioctl.h.
_REGISTRATION = struct.Struct("=QQII")  # old_key, new_key, flags, pad
_RESERVATION = struct.Struct("=QII")  # key, type, flags
_PREEMPT = struct.Struct("=QQII")  # our key, the victim's, type, flags
_CLEAR = struct.Struct("=QII")  # key, flags, pad
_IGNORE_KEY = 1
_PR_EXCLUSIVE_ACCESS_REG_ONLY = 4


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | ord("p") << 8 | number


_PR_REGISTER = _iow(200, _REGISTRATION.size)
_PR_RESERVE = _iow(201, _RESERVATION.size)
_PR_RELEASE = _iow(202, _RESERVATION.size)
_PR_PREEMPT_ABORT = _iow(204, _PREEMPT.size)
_PR_CLEAR = _iow(205, _CLEAR.size)

_SG_IO = 0x2285
_SG_SCSI_RESET = 0x2284
_SG_RESET_DEVICE = 1
_SG_RESET_NO_ESCALATE = 0x100
_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272
_SG_HEADER = struct.Struct("@iiBBHIPPPIIiPBBBBHHiII0P")
"""struct sg_io_hdr of scsi/sg.h."""
_FROM_DEVICE = -3
_SENSE_BYTES = 64

_STATUS_CHECK = 0x02
_STATUS_BUSY = (0x08, 0x28)  # BUSY, TASK SET FULL
_STATUS_CONFLICT = 0x18
_KEY_ILLEGAL, _KEY_ATTENTION = 5, 6
_KEYS_AT_FIRST, _KEYS_MAX = 256, 8190  # an allocation length has 16 bits


# ---- what the unit answers ---------------------------------------------------------------------


def parse_designators(page: bytes) -> list[Designator]:
    """The binary names of the unit itself in VPD page 0x83, those that Linux clients take first.

    Udev names a disk by its longest NAA designator (wwn-0x...), so that comes first.
    """
    found: dict[Designator, None] = {}
    end = min(len(page), 4 + int.from_bytes(page[2:4], "big")) if len(page) >= 4 else 0
    at = 4
    while at + 4 <= end:
        code_set, association = page[at] & 0x0F, page[at + 1] >> 4 & 3
        kind, length = page[at + 1] & 0x0F, page[at + 3]
        data = page[at + 4 : at + 4 + length]
        at += 4 + length
        if at > end or code_set != 1 or association != 0:
            continue
        if kind == 3 and length in (8, 16):
            found[Designator("naa", 1, data)] = None
        elif kind == 2 and length in (8, 12, 16):
            found[Designator("eui64", 1, data)] = None

    def rank(designator: Designator) -> tuple[bool, bool, int]:
        length = len(designator.data)
        # The Linux client takes EUI-64 of 8 and 16 bytes.
        return length == 12, designator.kind != "naa", -length

    return sorted(found, key=rank)


_TYPE_BITS = (
    (4, 0x80, ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS),
    (4, 0x40, ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY),
    (4, 0x20, ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY),
    (4, 0x08, ReservationType.EXCLUSIVE_ACCESS),
    (4, 0x02, ReservationType.WRITE_EXCLUSIVE),
    (5, 0x01, ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS),
)


def parse_capabilities(answer: bytes, *, aborts: bool | None = None) -> Capabilities:
    """REPORT CAPABILITIES: PTPL_C, and the types if TMV says that they are told."""
    if len(answer) < 6:
        raise UnitError("REPORT CAPABILITIES answered too little")
    types = None
    if answer[3] & 0x80:
        types = frozenset(kind for byte, bit, kind in _TYPE_BITS if answer[byte] & bit)
    return Capabilities(aptpl=bool(answer[2] & 1), types=types, aborts=aborts)


def parse_keys(answer: bytes, room: int) -> Keys | None:
    """READ KEYS; None: they may not all be there.

    The length should tell of more keys than had room. The kernel's own target tells of those alone
    that it wrote, so an answer that fills the room is taken for a part, too.
    """
    if len(answer) < 8:
        raise UnitError("READ KEYS answered too little")
    generation, length = struct.unpack_from(">II", answer)
    if 8 + length + 8 > room or len(answer) < 8 + length:
        return None
    return Keys(generation, struct.unpack_from(f">{length // 8}Q", answer, 8))


def parse_reservation(answer: bytes) -> Held | None:
    """READ RESERVATION."""
    if len(answer) < 8 or int.from_bytes(answer[4:8], "big") == 0:
        return None
    if len(answer) < 24:
        raise UnitError("READ RESERVATION answered too little")
    return Held(int.from_bytes(answer[8:16], "big"), answer[21] & 0x0F)


def _sense(sense: bytes) -> tuple[int, int, int]:
    """(sense key, ASC, ASCQ), of fixed and of descriptor format."""
    if len(sense) >= 4 and sense[0] & 0x7F in (0x72, 0x73):
        return sense[1] & 0x0F, sense[2], sense[3]
    if len(sense) >= 14:
        return sense[2] & 0x0F, sense[12], sense[13]
    return (sense[2] & 0x0F if len(sense) > 2 else 0), 0, 0


# ---- the device --------------------------------------------------------------------------------


def whole_disk(path: str) -> str:
    """The device that takes reservations for `path`: its disk. UnsupportedError says why none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnsupportedError(f"{path}: {error.strerror}") from error
    if not stat.S_ISBLK(status.st_mode):
        raise UnsupportedError("it is no block device, so it has no persistent reservations")
    return disk_of_number(path, status.st_rdev)


def disk_of_number(path: str, device: int, sys: Path = Path("/sys")) -> str:
    """The same of the device number of `path`."""
    here = (sys / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}").resolve()
    disk = here.parent if (here / "partition").exists() else here
    mapping = disk / "dm" / "uuid"
    if mapping.exists() and not mapping.read_text().startswith("mpath-"):
        raise UnsupportedError(
            "it is a mapped device, not a disk or a multipath map: clients cannot find it"
        )
    if disk.name.startswith("nvme"):
        raise UnsupportedError(
            "it is an NVMe namespace: before Linux 6.19 no fence could be confirmed there, for "
            "linux/pr.h did not read registrations back, and none has been tried since"
        )
    if disk == here:
        return path
    for line in (disk / "uevent").read_text().splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.removeprefix("DEVNAME=")
    raise UnsupportedError(f"the disk of this partition, {disk.name}, has no device file")


class ScsiUnit:
    """`extfs.layout.reservations.Unit` of a block device. Calls from any thread, also at a time.

    UnsupportedError: the device is none that could have reservations.
    """

    def __init__(self, path: str, *, locks: Path = LOCKS) -> None:
        self.name = path
        self.disk = whole_disk(path)
        self._locks = locks
        self._lock = -1
        try:
            number = os.stat(self.disk).st_rdev
            self.sysfs = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
            self._device = os.open(self.disk, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnsupportedError(f"{self.disk}: {error.strerror}") from error

    # -- PERSISTENT RESERVE OUT --

    def register(self, key: int, *, old: int = 0, ignore: bool = False) -> None:
        """REGISTER, or REGISTER AND IGNORE EXISTING KEY; sd sets APTPL."""
        flags = _IGNORE_KEY if ignore else 0
        self._change(_PR_REGISTER, _REGISTRATION.pack(old, key, flags, 0), "REGISTER")
        if key:
            self._see_size()

    def reserve(self, key: int) -> None:
        """RESERVE."""
        record = _RESERVATION.pack(key, _PR_EXCLUSIVE_ACCESS_REG_ONLY, 0)
        self._change(_PR_RESERVE, record, "RESERVE")

    def release(self, key: int) -> None:
        """RELEASE."""
        record = _RESERVATION.pack(key, _PR_EXCLUSIVE_ACCESS_REG_ONLY, 0)
        self._change(_PR_RELEASE, record, "RELEASE")

    def preempt_abort(self, key: int, victim: int) -> None:
        """PREEMPT AND ABORT."""
        record = _PREEMPT.pack(key, victim, _PR_EXCLUSIVE_ACCESS_REG_ONLY, 0)
        self._change(_PR_PREEMPT_ABORT, record, "PREEMPT AND ABORT")

    def clear(self, key: int) -> None:
        """CLEAR."""
        self._change(_PR_CLEAR, _CLEAR.pack(key, 0, 0), "CLEAR")

    def _change(self, request: int, record: bytes, what: str) -> None:
        for _ in range(_TRIES):
            try:
                result = fcntl.ioctl(self._device, request, bytearray(record))
            except OSError as error:
                raise self._refusal(error, what) from error
            if result == 0:
                return
            if result & 0xFF == _STATUS_CONFLICT:
                raise ConflictError(f"{what}: reservation conflict")
            if result >> 16 & 0xFF:
                raise UnreachableError(f"{what}: no answer from the unit (result {result:#x})")
            if result & 0xFF in _STATUS_BUSY:
                time.sleep(_BUSY_SECONDS)
        raise UnitError(f"{what}: the unit did not do it (result {result:#x})")

    def _refusal(self, error: OSError, what: str) -> UnitError:
        text = f"{what}: {error.strerror}"
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return UnsupportedError("the device has no persistent reservations")
        if error.errno == errno.EBADE:
            return ConflictError(text)
        if error.errno in (errno.EINVAL, errno.EPERM, errno.EACCES):
            return UnitError(text)
        return UnreachableError(text)

    def _see_size(self) -> None:
        """Have the kernel read the capacity anew where it could not.

        Some targets refuse READ CAPACITY, too, to a host that is not registered: a disk that was
        found while it was reserved has the size 0.
        """
        size = bytearray(8)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._device, _BLKGETSIZE64, size)
            if not any(size):
                (self.sysfs / "device" / "rescan").write_text("1")

    # -- PERSISTENT RESERVE IN, INQUIRY --

    def keys(self) -> Keys:
        """READ KEYS, with more room until all have come."""
        count = _KEYS_AT_FIRST
        while True:
            room = 8 + 8 * count
            found = parse_keys(self._persistent_in(0, room, "READ KEYS"), room)
            if found is not None:
                return found
            if count == _KEYS_MAX:
                raise UnitError(f"READ KEYS: more than {_KEYS_MAX - 1} registrations")
            count = min(8 * count, _KEYS_MAX)

    def reservation(self) -> Held | None:
        """READ RESERVATION."""
        return parse_reservation(self._persistent_in(1, 64, "READ RESERVATION"))

    def capabilities(self) -> Capabilities:
        """REPORT CAPABILITIES, and the vendor.

        The kernel's own target, up to its newest version, marks a command with the key of the
        reservation's holder and looks for the victim's when it aborts: what a registrant that is
        not the holder has begun is not aborted. It is inside of other vendors' boxes, too, so no
        vendor is known to abort.
        """
        try:
            answer = self._persistent_in(2, 8, "REPORT CAPABILITIES")
        except UnsupportedError as error:
            raise UnsupportedError(f"the unit has no persistent reservations ({error})") from error
        vendor = self._command(_inquiry(None, 96), 96, "INQUIRY")[8:16]
        return parse_capabilities(answer, aborts=False if vendor == b"LIO-ORG " else None)

    def designators(self) -> list[Designator]:
        """VPD page 0x83."""
        room = 4096
        try:
            page = self._command(_inquiry(0x83, room), room, "INQUIRY")
        except UnsupportedError as error:
            raise UnsupportedError(f"it names no designators ({error})") from error
        return parse_designators(page)

    def _persistent_in(self, action: int, room: int, what: str) -> bytes:
        return self._command(struct.pack(">BB5xHB", 0x5E, action, room, 0), room, what)

    # -- the path --

    def passes(self) -> bool:
        """READ(16) of the first block."""
        size = bytearray(4)
        try:
            fcntl.ioctl(self._device, _BLKSSZGET, size)
        except OSError as error:
            raise self._refusal(error, "BLKSSZGET") from error
        try:
            self._command(struct.pack(">BBQIBB", 0x88, 0, 0, 1, 0, 0), _int(size), "READ")
        except ConflictError:
            return False
        return True

    def idle(self) -> bool:
        """By the block layer's count of requests (reads, writes) that the driver has."""
        try:
            counts = (self.sysfs / "inflight").read_text().split()
        except OSError:
            return True
        return not any(map(int, counts))

    def reset(self) -> None:
        """SG_SCSI_RESET of the device alone: a LOGICAL UNIT RESET, on transports that have it."""
        kind = bytearray(struct.pack("=i", _SG_RESET_DEVICE | _SG_RESET_NO_ESCALATE))
        try:
            fcntl.ioctl(self._device, _SG_SCSI_RESET, kind)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
                raise UnsupportedError(f"LOGICAL UNIT RESET: {error.strerror}") from error
            raise UnreachableError(f"LOGICAL UNIT RESET: {error.strerror}") from error

    def _command(self, command: bytes, room: int, what: str) -> bytes:
        """One command that reads; its answer, as long as it came."""
        for _ in range(_TRIES):
            answer, status, host, sense = self._sg_io(command, room, what)
            if host:
                raise UnreachableError(f"{what}: no answer from the unit (host status {host:#x})")
            if status == 0:
                return answer
            if status == _STATUS_CONFLICT:
                raise ConflictError(f"{what}: reservation conflict")
            if status in _STATUS_BUSY:
                time.sleep(_BUSY_SECONDS)
            elif status != _STATUS_CHECK:
                break
            key, asc, ascq = _sense(sense)
            if status == _STATUS_CHECK and key == _KEY_ILLEGAL:
                raise UnsupportedError(f"{what}: illegal request, {asc:02x}/{ascq:02x}")
            if status == _STATUS_CHECK and key != _KEY_ATTENTION:
                raise UnitError(f"{what}: sense key {key}, {asc:02x}/{ascq:02x}")
        raise UnitError(f"{what}: the unit did not do it (status {status:#x})")

    def _sg_io(self, command: bytes, room: int, what: str) -> tuple[bytes, int, int, bytes]:
        cdb = ctypes.create_string_buffer(command, len(command))
        answer = ctypes.create_string_buffer(room)
        sense = ctypes.create_string_buffer(_SENSE_BYTES)
        header = bytearray(
            _SG_HEADER.pack(
                ord("S"),
                _FROM_DEVICE,
                len(command),
                _SENSE_BYTES,
                0,
                room,
                ctypes.addressof(answer),
                ctypes.addressof(cdb),
                ctypes.addressof(sense),
                COMMAND_MS,
                *(0,) * 12,
            )
        )
        try:
            fcntl.ioctl(self._device, _SG_IO, header)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
                raise UnsupportedError("the device does not take SCSI commands") from error
            raise self._refusal(error, what) from error
        fields = _SG_HEADER.unpack(header)
        status, sense_bytes, host, residual = fields[13], fields[16], fields[17], fields[19]
        got = answer.raw[: room - max(0, residual)]
        return got, status, host, sense.raw[:sense_bytes]

    # -- this host --

    def claim(self) -> None:
        """A lock on a file that is named after the unit, so that every path to it is meant."""
        if self._lock >= 0:
            return
        named = self.designators()
        name = str(named[0]) if named else self.disk.replace("/", "-").lstrip("-")
        try:
            self._locks.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self._locks / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise UnitError(f"{self._locks}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise UnitError(f"another extfs on this host serves the unit {name}") from error
        self._lock = lock

    def close(self) -> None:
        """Forget descriptors and the claim."""
        for descriptor in (self._device, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._device = self._lock = -1


def _int(number: bytearray) -> int:
    return int(struct.unpack("=i", number)[0])


def _inquiry(page: Literal[0x83] | None, room: int) -> bytes:
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, room, 0)
