"""Devices, real and simulated, and what is done to one that is not mounted."""

from __future__ import annotations

import enum
import errno
import mmap
from typing import Any

from extfs.core.native import Closing, CoreError, checked, ffi, lib
from extfs.core.values import BLOCK_SIZE, Superblock, superblock_of


class Device(Closing):
    """An open block device or image. A `Filesystem` that opens it takes it over."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    @classmethod
    def open(cls, path: str | bytes, *, read_only: bool = False, shared: bool = False) -> Device:
        """Open by path. Exclusive on this host unless `shared` (for tools that only look).

        ERR_DEV_IN_USE, ENOENT, EACCES, ENOTBLK (neither block device nor regular file).
        """
        out = ffi.new("struct device **")
        flags = (lib.EXTFS_DEV_READ_ONLY if read_only else 0) | (
            lib.EXTFS_DEV_SHARED if shared else 0
        )
        name = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
        checked(lib.extfs_device_open(name, flags, out))
        return cls(out[0])

    @property
    def raw(self) -> Any:
        """The C pointer; raises ValueError when closed or owned by a filesystem."""
        if self._raw is None:
            raise ValueError("the device is closed, or a filesystem owns it")
        return self._raw

    @property
    def size(self) -> int:
        """Bytes."""
        return int(lib.extfs_device_size(self.raw))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at `offset`; both multiples of 4096."""
        memory = self._aligned(offset, length)
        checked(lib.extfs_device_read(self.raw, offset, ffi.from_buffer(memory), length))
        return memory[:]

    def write(self, offset: int, content: bytes) -> None:
        """Write, not durable by itself; `offset` and length multiples of 4096."""
        memory = self._aligned(offset, len(content))
        memory[:] = content
        checked(lib.extfs_device_write(self.raw, offset, ffi.from_buffer(memory), len(content)))

    @staticmethod
    def _aligned(offset: int, length: int) -> mmap.mmap:
        """Memory as direct I/O wants it."""
        if offset % BLOCK_SIZE or length % BLOCK_SIZE or offset < 0 or length <= 0:
            raise ValueError("device I/O is in whole blocks of 4096 bytes")
        return mmap.mmap(-1, length)

    def close(self) -> None:
        """Close unless closed, or given to a filesystem."""
        raw, self._raw = self._raw, None
        if raw is not None:
            lib.extfs_device_close(raw)

    def taken_over(self) -> None:
        """The C side owns it from now on."""
        self._raw = None


class SimDevice(Closing):
    """The simulated device: it can lose power and fail, see native/device_sim.h. Sizes in bytes."""

    READ, WRITE, FLUSH = 0, 1, 2

    def __init__(self, size: int, *, align: int = 512, seed: int = 0, _raw: Any = None) -> None:
        if _raw is None:
            out = ffi.new("struct sim **")
            checked(lib.extfs_sim_create(size, align, seed, out))
            _raw = out[0]
        self._raw = _raw
        self.size = size

    @property
    def raw(self) -> Any:
        """The C pointer; raises ValueError when closed."""
        if self._raw is None:
            raise ValueError("the simulated device is closed")
        return self._raw

    def device(self) -> Device:
        """A device on it; one at a time."""
        out = ffi.new("struct device **")
        checked(lib.extfs_sim_device(self.raw, out))
        return Device(out[0])

    @property
    def events(self) -> int:
        """Writes and flushes that reached it so far."""
        return int(lib.extfs_sim_events(self.raw))

    def crash_at(self, event: int) -> None:
        """Lose power when `events` reaches this number; 0: never."""
        lib.extfs_sim_crash_at(self.raw, event)

    @property
    def crashed(self) -> bool:
        """Whether the power is gone."""
        return bool(lib.extfs_sim_crashed(self.raw))

    def restart(self, seed: int) -> None:
        """Power returns; the seed decides what became of each held write. No device may be open."""
        lib.extfs_sim_restart(self.raw, seed)

    def settle(self) -> None:
        """Everything held becomes durable, as at a clean power-off."""
        lib.extfs_sim_settle(self.raw)

    def fail(self, kind: int, offset: int, length: int, count: int = 1) -> None:
        """The next `count` I/Os of this kind (READ, WRITE, FLUSH) that touch the range fail."""
        lib.extfs_sim_fail(self.raw, kind, offset, length, count)

    def shuffle(self, on: bool = True) -> None:
        """Complete asynchronous I/O in an order that the seed decides."""
        lib.extfs_sim_shuffle(self.raw, on)

    def drop_flushes(self, count: int) -> None:
        """The next `count` flushes and FUA writes succeed without making anything durable."""
        lib.extfs_sim_drop_flushes(self.raw, count)

    def peek(self, offset: int, length: int) -> bytes:
        """What a reader of the device sees now."""
        buffer = bytearray(length)
        checked(lib.extfs_sim_peek(self.raw, offset, ffi.from_buffer(buffer), length))
        return bytes(buffer)

    def poke(self, offset: int, content: bytes) -> None:
        """Write as a holder of a layout would: through the volatile cache."""
        checked(lib.extfs_sim_poke(self.raw, offset, ffi.from_buffer(content), len(content)))

    def clone(self) -> SimDevice:
        """An independent copy of the whole state."""
        out = ffi.new("struct sim **")
        checked(lib.extfs_sim_clone(self.raw, out))
        return SimDevice(self.size, _raw=out[0])

    def close(self) -> None:
        """Free it; its device must be closed."""
        raw, self._raw = self._raw, None
        if raw is not None:
            lib.extfs_sim_destroy(raw)


def mkfs(
    device: Device,
    *,
    label: str | bytes = b"",
    journal_blocks: int = 0,
    force: bool = False,
    uuid: bytes | None = None,
    now_sec: int = 0,
    size_blocks: int = 0,
) -> None:
    """Format. Zeros mean: journal scaled with the device, the clock's time, the whole device.

    ERR_FOREIGN_FS (without `force`; the log names what was found), ERR_DEV_TINY, EINVAL.
    """
    if isinstance(label, str):
        label = label.encode()
    if len(label) > 64:
        raise ValueError("a label has at most 64 bytes")
    if uuid is not None and len(uuid) != 16:
        raise ValueError("a UUID has 16 bytes")
    options = ffi.new("struct extfs_mkfs_options *")
    label_memory = ffi.new("char[]", label)
    uuid_memory = ffi.NULL if uuid is None else ffi.new("uint8_t[]", uuid)
    options.label = label_memory if label else ffi.NULL
    options.journal_blocks = journal_blocks
    options.force = force
    options.uuid = uuid_memory
    options.now_sec = now_sec
    options.size_blocks = size_blocks
    checked(lib.extfs_mkfs(device.raw, options))


class MountedState(enum.Enum):
    """UNHEARD: marked as mounted by somebody who says no more: its host is off, or cut off."""

    NOT = "not mounted"
    UNHEARD = "mounted, and not heard of"
    NOW = "mounted"


def mounted_state(device: Device) -> MountedState:
    """Whether an extfs device is mounted by anybody; watches it for seconds. As `read_super`."""
    try:
        unheard = checked(lib.extfs_device_mounted(device.raw))
    except CoreError as error:
        if error.errno == errno.EBUSY:
            return MountedState.NOW
        raise
    return MountedState.UNHEARD if unheard else MountedState.NOT


def read_super(device: Device) -> Superblock:
    """The superblock, or its copy. ERR_NOT_EXTFS, ERR_SB_DAMAGED, ERR_INCOMPAT, ERR_DEV_SMALL."""
    out = ffi.new("struct extfs_super *")
    checked(lib.extfs_super_read(device.raw, out))
    return superblock_of(out)
