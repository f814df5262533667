"""CRC-32C and SipHash-2-4, fast enough in Python for a million records.

Both use one trick: Python's integers are arbitrarily long, and one shift, xor or addition of a long
integer works on hundreds of machine words. CRC-32C treats a block as one polynomial and folds it in
half again and again; SipHash runs many names side by side in lanes of one integer.

Sources: RFC 3720 appendix B.4 (polynomial and test vectors of CRC-32C); Aumasson and Bernstein,
"SipHash: a fast short-input PRF", 2012.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

# CRC-32C's generator x^32 + ..., most significant coefficient first, without x^32.
_POLY = 0x1EDC6F41
_MASK64 = (1 << 64) - 1


def _reflect(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


def _power(exponent: int) -> int:
    """x^exponent modulo the generator."""
    value = 1
    for _ in range(exponent):
        value <<= 1
        if value >> 32:
            value = value & 0xFFFFFFFF ^ _POLY
    return value


def _table() -> list[int]:
    reflected = _reflect(_POLY, 32)
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (reflected if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def _folds(bits: int) -> list[tuple[int, int, list[int]]]:
    """Steps that bring a message of `bits` down to about 100: (low bits, their mask, shifts).

    In a little-endian reading the first bit of the message, the highest power of x, is bit 0: bit i
    of n stands for x^(n-1-i). A step takes the `low` first bits off, a polynomial times x^rest, and
    adds them to the rest times x^rest mod P instead. Each term x^k of that is a shift by
    rest - low - k, which is not negative because the rest is at least 31 bits longer.
    """
    steps = []
    while bits > 128:
        rest = (bits // 2 + 32 + 7) // 8 * 8
        low = bits - rest
        factor = _power(rest)
        shifts = [rest - low - k for k in range(32) if factor >> k & 1]
        steps.append((low, (1 << low) - 1, shifts))
        bits = rest
    return steps


_BLOCK_BITS = 4096 * 8
_STEPS = _folds(_BLOCK_BITS)
_CRC_FIELD = 0xFFFFFFFF << 32


def block_crc(block: bytes | bytearray | memoryview) -> int:
    """CRC-32C of a metadata block of 4096 bytes, its own crc field (bytes 4 to 8) taken as zero."""
    value = int.from_bytes(block, "little")
    value ^= value & _CRC_FIELD
    value ^= 0xFFFFFFFF
    bits = _BLOCK_BITS
    for low, mask, shifts in _STEPS:
        head = value & mask
        value >>= low
        bits -= low
        for shift in shifts:
            value ^= head << shift
    crc = 0
    table = _TABLE
    for byte in value.to_bytes(bits // 8, "little"):
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def crc32c(content: bytes | memoryview, crc: int = 0) -> int:
    """CRC-32C of any bytes, byte by byte; continue with an earlier result."""
    crc ^= 0xFFFFFFFF
    table = _TABLE
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


# ---- SipHash -----------------------------------------------------------------------------------

_LANE = 128  # bits; a 64-bit word and room for its carry and rotation


def siphash(key: tuple[int, int], content: bytes) -> int:
    """SipHash-2-4 of one string; `key` are two words of 8 key bytes each, little-endian."""
    return siphash_all(key, [content])[0]


def siphash_all(key: tuple[int, int], contents: Sequence[bytes]) -> list[int]:
    """SipHash-2-4 of each of many strings."""
    result = [0] * len(contents)
    groups: dict[int, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(len(content) >> 3, []).append(index)
    for words, indices in groups.items():
        for start in range(0, len(indices), 1024):
            some = indices[start : start + 1024]
            hashes = _lanes(key, words, [contents[i] for i in some])
            for index, value in zip(some, hashes, strict=True):
                result[index] = value
    return result


def _lanes(key: tuple[int, int], words: int, contents: Sequence[bytes]) -> Iterable[int]:
    """Hash strings of `words` full words each, and up to 7 bytes more."""
    count = len(contents)
    size = 8 * (words + 1)
    padded = b"".join(
        content.ljust(size - 1, b"\0") + (len(content) & 0xFF).to_bytes(1, "little")
        for content in contents
    )
    numbers = struct.unpack(f"<{count * (words + 1)}Q", padded)
    ones = int.from_bytes((b"\x01" + b"\0" * 15) * count, "little")
    mask = ones * _MASK64

    def spread(values: Sequence[int]) -> int:
        return int.from_bytes(b"".join([v.to_bytes(16, "little") for v in values]), "little")

    v0 = ones * (key[0] ^ 0x736F6D6570736575)
    v1 = ones * (key[1] ^ 0x646F72616E646F6D)
    v2 = ones * (key[0] ^ 0x6C7967656E657261)
    v3 = ones * (key[1] ^ 0x7465646279746573)

    def rotate(value: int, bits: int) -> int:
        value <<= bits  # at most 32: stays within the lane
        return value & mask | value >> 64 & mask

    def rounds(number: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(number):
            v0 = v0 + v1 & mask
            v1 = rotate(v1, 13) ^ v0
            v0 = rotate(v0, 32)
            v2 = v2 + v3 & mask
            v3 = rotate(v3, 16) ^ v2
            v0 = v0 + v3 & mask
            v3 = rotate(v3, 21) ^ v0
            v2 = v2 + v1 & mask
            v1 = rotate(v1, 17) ^ v2
            v2 = rotate(v2, 32)

    for word in range(words + 1):
        message = spread(numbers[word :: words + 1])
        v3 ^= message
        rounds(2)
        v0 ^= message
    v2 ^= ones * 0xFF
    rounds(4)
    folded = (v0 ^ v1 ^ v2 ^ v3).to_bytes(16 * count, "little")
    return struct.unpack(f"<{2 * count}Q", folded)[::2]
