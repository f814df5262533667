"""External Data Representation (RFC 4506): a bounded reader and a writer.

Everything that comes from outside is read here: no length is believed before it was compared with
its limit and with what there is, and nothing but `XdrError` comes out of bad bytes.
"""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["BITMAP_WORDS_MAX", "Reader", "Writer", "XdrError"]

BITMAP_WORDS_MAX = 8

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_I64 = struct.Struct(">q")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class XdrError(Exception):
    """The bytes are not what was to be there; the message says what, for the log."""


class Reader:
    """Reads `buffer` from `pos` to `end` (None: all of it). Padding bytes may have any value."""

    __slots__ = ("buffer", "end", "pos")

    def __init__(self, buffer: bytes, pos: int = 0, end: int | None = None) -> None:
        self.buffer = buffer
        self.pos = pos
        self.end = len(buffer) if end is None else end

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fields of a struct of fixed size."""
        pos = self.pos
        if pos + layout.size > self.end:
            raise XdrError("truncated")
        self.pos = pos + layout.size
        return layout.unpack_from(self.buffer, pos)

    def u32(self) -> int:
        """Unsigned integer; an enum."""
        pos = self.pos
        if pos + 4 > self.end:
            raise XdrError("truncated")
        self.pos = pos + 4
        value: int = _U32.unpack_from(self.buffer, pos)[0]
        return value

    def u64(self) -> int:
        """Unsigned hyper integer."""
        pos = self.pos
        if pos + 8 > self.end:
            raise XdrError("truncated")
        self.pos = pos + 8
        value: int = _U64.unpack_from(self.buffer, pos)[0]
        return value

    def i64(self) -> int:
        """Hyper integer."""
        value: int = self.unpack(_I64)[0]
        return value

    def boolean(self) -> bool:
        """A bool: 0 or 1 and nothing else."""
        value = self.u32()
        if value > 1:
            raise XdrError("a bool that is neither 0 nor 1")
        return value == 1

    def fixed(self, length: int) -> bytes:
        """Opaque bytes of fixed length."""
        pos = self.pos
        after = pos + (length + 3 & ~3)
        if after > self.end:
            raise XdrError("truncated")
        self.pos = after
        return self.buffer[pos : pos + length]

    def opaque(self, limit: int) -> bytes:
        """Opaque bytes or a string of at most `limit` bytes."""
        length = self.u32()
        if length > limit:
            raise XdrError(f"{length} bytes where at most {limit} may be")
        return self.fixed(length)

    def count(self, limit: int, size: int = 4) -> int:
        """The length of an array of at most `limit` elements of at least `size` bytes each."""
        count = self.u32()
        if count > limit or count * size > self.end - self.pos:
            raise XdrError(f"an array of {count} elements")
        return count

    def bitmap(self) -> int:
        """A bitmap4 (RFC 8881 3.3.3) as a number: bit n of it is attribute n."""
        value = 0
        for index in range(self.count(BITMAP_WORDS_MAX)):
            value |= self.u32() << (32 * index)
        return value

    def done(self) -> bool:
        """Whether everything was read."""
        return self.pos == self.end


class Writer:
    """Appends to `buffer`."""

    __slots__ = ("buffer",)

    def __init__(self) -> None:
        self.buffer = bytearray()

    def __len__(self) -> int:
        return len(self.buffer)

    def pack(self, layout: struct.Struct, *fields: Any) -> None:
        """A struct of fixed size."""
        self.buffer += layout.pack(*fields)

    def u32(self, value: int) -> None:
        """Unsigned integer; an enum."""
        self.buffer += _U32.pack(value)

    def u64(self, value: int) -> None:
        """Unsigned hyper integer."""
        self.buffer += _U64.pack(value)

    def i64(self, value: int) -> None:
        """Hyper integer."""
        self.buffer += _I64.pack(value)

    def boolean(self, value: bool) -> None:
        """A bool."""
        self.buffer += b"\0\0\0\1" if value else b"\0\0\0\0"

    def raw(self, encoded: bytes | bytearray | memoryview) -> None:
        """What is encoded already."""
        self.buffer += encoded

    def fixed(self, content: bytes | bytearray | memoryview) -> None:
        """Opaque bytes of fixed length, padded to a multiple of four."""
        self.buffer += content
        self.buffer += _PADDING[len(content) & 3]

    def opaque(self, content: bytes | bytearray | memoryview) -> None:
        """Opaque bytes or a string, with the length in front."""
        buffer = self.buffer
        buffer += _U32.pack(len(content))
        buffer += content
        buffer += _PADDING[len(content) & 3]

    def bitmap(self, value: int) -> None:
        """A bitmap4, as `Reader.bitmap` returns it, in as few words as possible."""
        words = (value.bit_length() + 31) // 32
        self.u32(words)
        for index in range(words):
            self.u32(value >> (32 * index) & 0xFFFFFFFF)

    def truncate(self, length: int) -> None:
        """Take back what was written after `length` bytes."""
        del self.buffer[length:]

    def put_u32(self, pos: int, value: int) -> None:
        """Write over four bytes at `pos`."""
        _U32.pack_into(self.buffer, pos, value)
