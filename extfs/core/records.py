"""What the NFS server has to remember over a restart, as ``native/nfs_record.h`` defines it.

`Records` is ``filesystem.records``: byte strings by 64-bit number. What they say is the server's
business; number 0 is by convention its own record, the others are clients'. A `Rider` is such a
record, too; it is written in the transaction of an operation that it is about, see
``native/rider.h``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from extfs.core.native import checked, ffi, lib

if TYPE_CHECKING:
    from extfs.core.filesystem import Filesystem

__all__ = ["RECORD_BYTES_MAX", "RIDER_BYTES", "Records", "Rider"]

RECORD_BYTES_MAX = 65536
"""The longest value."""

RIDER_BYTES = int(lib.EXTFS_RIDER_BYTES)
"""Of the record of a rider."""

_ID_MAX = (1 << 64) - 1
_T = TypeVar("_T")


class Rider:
    """A ``struct rider_disk`` (native/format.h) for record `number`, for one call of the core."""

    __slots__ = ("_raw",)

    def __init__(self, number: int, record: bytes) -> None:
        assert len(record) == RIDER_BYTES
        self._raw = ffi.new("struct extfs_rider *")
        self._raw.id = number
        ffi.memmove(self._raw.record, record, RIDER_BYTES)

    def carry(self, call: Callable[[], _T]) -> _T:
        """Run `call`, which takes it along if it succeeds: one mknod, mkdir, symlink, link, unlink,
        rmdir, rename, setattr, setxattr or removexattr, in this thread."""
        lib.extfs_ride(self._raw)
        try:
            return call()
        finally:
            lib.extfs_ride(ffi.NULL)

    @property
    def written(self) -> bool:
        """Whether a transaction has it; it is durable with that transaction."""
        return bool(self._raw.written)

    def part(self, start: int, length: int) -> bytes:
        """Of the record, with what the core has filled in: inode and what is after, in the last
        mark."""
        return bytes(ffi.buffer(self._raw.record + start, length))


class Records:
    """Durable records of the server. Any thread."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._fs = filesystem

    @property
    def _raw(self) -> Any:
        return self._fs.raw

    def put(self, values: Mapping[int, bytes], delete: Iterable[int] = ()) -> None:
        """Set and delete, all of it or, after a crash, nothing; blocks until it is durable.

        To delete what does not exist is no error. EINVAL: a value is longer than
        `RECORD_BYTES_MAX`, or a number is in both. E2BIG: too much for one transaction; any 3
        records fit, and any 25 that are, and were, shorter than 1024 bytes. EROFS.
        """
        gone = list(delete)
        put = ffi.new("struct extfs_nfs_record[]", len(values))
        kept = []
        for raw, (number, value) in zip(put, values.items(), strict=True):
            memory = ffi.from_buffer(value)
            kept.append(memory)
            raw.id, raw.value, raw.len = number, memory, len(value)
        numbers = ffi.new("uint64_t[]", gone)
        self._fs.change(lambda: lib.extfs_nfs_put(self._raw, put, len(values), numbers, len(gone)))

    def load(self) -> dict[int, bytes]:
        """All records by number, in order.

        Each is whole; one that is put meanwhile may be there or not.
        """
        found: dict[int, bytes] = {}
        number = ffi.new("uint64_t *", 0)
        buffer = bytearray(RECORD_BYTES_MAX)
        memory = ffi.from_buffer(buffer)
        while True:
            length = lib.extfs_nfs_next(self._raw, number, memory, len(buffer))
            if length < 0 and lib.extfs_errno(length) == errno.ENOENT:
                return found
            found[int(number[0])] = bytes(memoryview(buffer)[: checked(length)])
            if number[0] == _ID_MAX:
                return found
            number[0] += 1
