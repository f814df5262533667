"""Extended attributes and symbolic link targets: their parts in sequence, counts and flags."""

from __future__ import annotations

import stat

from extfs.check import layout
from extfs.check.checksum import siphash_all
from extfs.check.inventory import Inventory
from extfs.check.layout import SYMLINK_PART_BYTES, XATTR_PART_BYTES, InodeFlag, Tree
from extfs.check.trees import Leaf

_HASH_MASK = (1 << layout.XATTR_HASH_BITS) - 1
_ACLS = {
    (layout.XNS_SYSTEM, b"posix_acl_access"): InodeFlag.ACL,
    (layout.XNS_SYSTEM, b"posix_acl_default"): InodeFlag.DEFACL,
}


class Attributes:
    """The pass over the xattr tree."""

    def __init__(self, inventory: Inventory) -> None:
        self.inv = inventory
        self._pending: list[tuple[int, int, bytes]] = []
        # The attribute being read: (inode, key without part), value bytes to come, next part.
        self._open: tuple[int, int] | None = None
        self._rest = 0
        self._next_part = 0

    def read(self) -> None:
        """Read all attributes."""
        inv = self.inv
        for leaf in inv.walker.walk(inv.roots[Tree.XATTR], Tree.XATTR):
            self._leaf(leaf)
            if len(self._pending) >= 4096:
                self._check_hashes()
        self._finish()
        self._check_hashes()

    def _leaf(self, leaf: Leaf) -> None:
        for hi, lo, offset, length, _reserved in leaf.slots:
            row = self.inv.index.get(hi, -1)
            if row < 0:
                self._stray(hi, lo)
                continue
            record = leaf.data[offset : offset + length]
            if lo & 0xFFFF == 0:
                self._finish()
                self._head(hi, lo, row, record)
            elif self._open != (hi, lo >> 16) or lo & 0xFFFF != self._next_part:
                self._bad(hi, lo, "a part without the one before it")
            elif length != min(self._rest, XATTR_PART_BYTES):
                self._bad(hi, lo, f"a part of {length} bytes where {self._rest} are left")
                self._open = None
            else:
                self._rest -= length
                self._next_part += 1

    def _head(self, ino: int, lo: int, row: int, record: bytes) -> None:
        if len(record) < layout.XATTR.size:
            self._bad(ino, lo, f"{len(record)} bytes")
            return
        ns, name_len, _reserved, value_len = layout.XATTR.codec.unpack_from(record)
        head = layout.XATTR.size + name_len
        here = min(value_len, XATTR_PART_BYTES - head)
        if (
            ns not in layout.XATTR_PREFIXES
            or not name_len
            or value_len > layout.XATTR_VALUE_MAX
            or len(record) != head + here
        ):
            self._bad(ino, lo, f"namespace {ns}, value of {value_len} bytes in {len(record)}")
            return
        name = record[layout.XATTR.size : head]
        self.inv.found_xattrs[row] += 1
        self.inv.found_flags[row] |= int(_ACLS.get((ns, name), 0))
        self._pending.append((ino, lo, bytes([ns]) + name))
        self._open = (ino, lo >> 16)
        self._rest = value_len - here
        self._next_part = 1

    def _finish(self) -> None:
        inv = self.inv
        if self._open is not None and self._rest and not inv.has_damage(Tree.XATTR):
            ino, key = self._open
            # Attributes of a deleted inode go record by record, from the end.
            if inv.nlink[inv.index[ino]]:
                self._bad(ino, key << 16, f"the last {self._rest} bytes of the value are missing")
        self._open = None
        self._rest = 0

    def _bad(self, ino: int, lo: int, text: str) -> None:
        self.inv.report.add("XATTR_SHAPE", f"inode {ino}", f"attribute record {lo:#x}: {text}")

    def _stray(self, ino: int, lo: int) -> None:
        inv = self.inv
        repair = ""
        if not inv.has_damage(Tree.INODE):
            inv.fixes.remove[Tree.XATTR].add(ino << 64 | lo)
            repair = "remove it"
        inv.report.add("XATTR_INODE", f"inode {ino}", "does not exist, but has attributes", repair)

    def _check_hashes(self) -> None:
        key = self.inv.volume.super.hash_key
        hashes = siphash_all(key, [name for _ino, _lo, name in self._pending])
        for (ino, lo, _name), value in zip(self._pending, hashes, strict=True):
            if lo >> 24 != value & _HASH_MASK:
                self._bad(ino, lo, "it lies under a key that its name does not have")
        self._pending.clear()

    def check(self) -> None:
        """Compare counts and ACL flags with the inodes."""
        inv = self.inv
        if inv.has_damage(Tree.XATTR) or inv.report.has("XATTR_SHAPE"):
            return
        acls = int(InodeFlag.ACL | InodeFlag.DEFACL)
        for row, ino in enumerate(inv.ino):
            if inv.xattrs[row] != inv.found_xattrs[row]:
                inv.fixes.inodes[ino]["xattrs"] = inv.found_xattrs[row]
                inv.report.add(
                    "XATTR_COUNT",
                    f"inode {ino}",
                    f"counts {inv.xattrs[row]} attributes, there are {inv.found_xattrs[row]}",
                    "set the count",
                )
            if inv.nlink[row] and inv.flags[row] & acls != inv.found_flags[row] & acls:
                fields = inv.fixes.inodes[ino]
                flags = fields.get("flags", inv.flags[row])
                fields["flags"] = flags & ~acls | inv.found_flags[row] & acls
                inv.report.add("ACL_FLAG", f"inode {ino}", "its ACL flags are wrong", "set them")


class Targets:
    """The pass over the symlink tree."""

    def __init__(self, inventory: Inventory) -> None:
        self.inv = inventory

    def read(self) -> None:
        """Read all targets."""
        inv = self.inv
        for leaf in inv.walker.walk(inv.roots[Tree.SYMLINK], Tree.SYMLINK):
            for hi, lo, _offset, length, _reserved in leaf.slots:
                row = inv.index.get(hi, -1)
                if row < 0:
                    repair = ""
                    if not inv.has_damage(Tree.INODE):
                        inv.fixes.remove[Tree.SYMLINK].add(hi << 64 | lo)
                        repair = "remove it"
                    inv.report.add(
                        "SYMLINK_INODE", f"inode {hi}", "does not exist, but has a target", repair
                    )
                    continue
                if not stat.S_ISLNK(inv.mode[row]):
                    inv.report.add("SYMLINK_INODE", f"inode {hi}", "has a target, but is no link")
                    continue
                if lo * SYMLINK_PART_BYTES != inv.found_target[row] or not (
                    0 < length <= SYMLINK_PART_BYTES
                ):
                    inv.report.add("SYMLINK_SHAPE", f"inode {hi}", f"part {lo}: {length} bytes")
                inv.found_target[row] += length

    def check(self) -> None:
        """Compare the lengths with the inodes."""
        inv = self.inv
        if inv.has_damage(Tree.SYMLINK):
            return
        for row, ino in enumerate(inv.ino):
            # The target of a deleted one goes before its inode does.
            if not stat.S_ISLNK(inv.mode[row]) or not inv.nlink[row]:
                continue
            if inv.found_target[row] != inv.size[row]:
                inv.report.add(
                    "SYMLINK_SIZE",
                    f"inode {ino}",
                    f"a target of {inv.size[row]} bytes, found {inv.found_target[row]}",
                )
