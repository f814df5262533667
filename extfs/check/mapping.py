"""Looking at files of an unmounted device: paths, attributes, extents."""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from extfs.check import layout
from extfs.check.layout import DIR_SEQ_BITS, ROOT_INODE, Magic, Tree
from extfs.check.log import Log, read_log, replay
from extfs.check.names import name_hash
from extfs.check.trees import Root, records_from
from extfs.check.volume import DamageError, Volume, VolumeError


@dataclass(frozen=True)
class FileExtent:
    """A run of a file's blocks; `block` is its first device block. All numbers in blocks."""

    file: int
    block: int
    length: int
    state: int
    flags: int
    fork: int
    shared: bool


class Image:
    """A filesystem on a device, as its committed state is, read-only."""

    def __init__(self, path: str | os.PathLike[str], *, exclusive: bool = False) -> None:
        self.volume = Volume(path, exclusive=exclusive)
        self._shared_runs: list[tuple[int, int]] | None = None
        try:
            self.super_damages = self.volume.load_super()
            self.log: Log = read_log(self.volume)
            if self.log.usable:
                replay(self.volume, self.log)
            self.root = layout.ROOT.unpack(self.volume.read_meta(layout.ROOT_BLOCK, Magic.ROOT, 0))
        except DamageError as damage:
            self.volume.close()
            raise VolumeError(damage.code, f"{path}: {damage}") from damage
        except VolumeError:
            self.volume.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.volume.close()

    def tree_root(self, tree: Tree) -> Root:
        """Root of a global tree."""
        return Root.parse(self.root["trees"], int(tree) * 24)

    def tree_records(self, tree: Tree, hi: int, lo: int = 0) -> Iterator[tuple[int, bytes]]:
        """(low key word, record) under one high key word, from `lo` on."""
        for key, record in records_from(self.volume, self.tree_root(tree), tree, hi << 64 | lo):
            if key >> 64 != hi:
                return
            yield key & (1 << 64) - 1, record

    def inode(self, ino: int) -> dict[str, Any] | None:
        """An inode's record, or None."""
        for lo, record in self.tree_records(Tree.INODE, ino):
            return layout.INODE.unpack(record) if lo == 0 else None
        return None

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Inode of a name, or None."""
        first = name_hash(self.volume.super.hash_key, name) << DIR_SEQ_BITS
        for lo, record in self.tree_records(Tree.DIRENT, directory, first):
            if lo >= first + (1 << DIR_SEQ_BITS):
                return None
            if record[layout.DIRENT.size :] == name:
                return int.from_bytes(record[:8], "little")
        return None

    def resolve(self, path: bytes) -> int:
        """Inode of a path from the filesystem's root; FileNotFoundError. Links are not followed."""
        ino = ROOT_INODE
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            found = self.lookup(ino, name)
            if found is None:
                raise FileNotFoundError(
                    2, "no such file on the device", path.decode(errors="replace")
                )
            ino = found
        return ino

    def entries(self, directory: int) -> Iterator[tuple[int, int, int, bytes]]:
        """(cookie, inode, type, name) of a directory."""
        for cookie, record in self.tree_records(Tree.DIRENT, directory):
            ino, kind, length = layout.DIRENT_CODEC.unpack_from(record)
            yield cookie, ino, kind, record[layout.DIRENT.size : layout.DIRENT.size + length]

    def _shared(self, block: int, length: int) -> bool:
        """Whether some of these blocks have more than one user."""
        if self._shared_runs is None:
            self._shared_runs = [
                (key >> 64, (key >> 64) + int.from_bytes(record[:8], "little"))
                for key, record in records_from(
                    self.volume, self.tree_root(Tree.REFCOUNT), Tree.REFCOUNT, 0
                )
            ]
        at = bisect_left(self._shared_runs, (block + length, 0)) - 1
        return at >= 0 and self._shared_runs[at][1] > block

    def extents(self, ino: int) -> Iterator[FileExtent]:
        """Extents of a file, data fork first."""
        values = self.inode(ino)
        may_share = values is not None and values["flags"] & layout.InodeFlag.SHARED
        for lo, record in self.tree_records(Tree.EXTENT, ino):
            block, length, state, flags, _pad = layout.EXTENT_CODEC.unpack(record)
            shared = bool(may_share) and self._shared(block, length)
            yield FileExtent(lo & (1 << 56) - 1, block, length, state, flags, lo >> 56, shared)

    def target(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        return b"".join(record for _lo, record in self.tree_records(Tree.SYMLINK, ino))

    def attributes(self, ino: int) -> Iterator[tuple[bytes, bytes]]:
        """(full name, value) of extended attributes."""
        name, value = b"", b""
        for lo, record in self.tree_records(Tree.XATTR, ino):
            if lo & 0xFFFF:
                value += record
                continue
            if name:
                yield name, value
            ns, length, _reserved, _value_len = layout.XATTR.codec.unpack_from(record)
            head = layout.XATTR.size
            prefix = layout.XATTR_PREFIXES.get(ns, b"?.")
            name, value = prefix + record[head : head + length], record[head + length :]
        if name:
            yield name, value


def type_word(mode: int) -> str:
    """Type of an inode in words."""
    return {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }.get(stat.S_IFMT(mode), "unknown")
