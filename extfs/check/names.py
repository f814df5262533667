"""Directory entries against inodes: names, types, link counts, parents, reachability."""

from __future__ import annotations

import stat

from extfs.check import layout
from extfs.check.checksum import siphash_all
from extfs.check.inventory import Inventory
from extfs.check.layout import DIR_HASH_BITS, DIR_SEQ_BITS, DIRENT, DIRENT_CODEC, ROOT_INODE, Tree
from extfs.check.trees import Leaf

_HASH_MASK = (1 << DIR_HASH_BITS) - 1
_BATCH = 4096


def name_hash(key: tuple[int, int], name: bytes) -> int:
    """Hash part of a name's cookie."""
    return siphash_all(key, [name])[0] & _HASH_MASK or 1


def show(name: bytes) -> str:
    """A name for a message: quoted, odd bytes escaped."""
    return "'" + name.decode("utf-8", "backslashreplace").replace("\n", "\\n") + "'"


class Names:
    """The pass over the dirent tree, and what follows from it."""

    def __init__(self, inventory: Inventory) -> None:
        self.inv = inventory
        self.dir_of: dict[int, int] = {}
        """Directory to the directory that has its entry."""
        self._pending: list[tuple[int, int, bytes, int, int]] = []
        self._group: tuple[int, int] = (0, 0)
        self._group_names: set[bytes] = set()

    def read(self) -> None:
        """Read all entries."""
        for leaf in self.inv.walker.walk(self.inv.roots[Tree.DIRENT], Tree.DIRENT):
            self._leaf(leaf)
            if len(self._pending) >= _BATCH:
                self._check_hashes()
        self._check_hashes()

    def _leaf(self, leaf: Leaf) -> None:
        inv = self.inv
        data = leaf.data
        index = inv.index
        head = DIRENT.size
        directory = row = -1
        usable = False
        for hi, lo, offset, length, _reserved in leaf.slots:
            if hi != directory:
                directory = hi
                row = index.get(hi, -1)
                usable = row >= 0 and stat.S_ISDIR(inv.mode[row])
            ino, kind, name_len = DIRENT_CODEC.unpack_from(data, offset)
            name = data[offset + head : offset + length]
            if not name_len or length != head + name_len:
                inv.report.add("DIRENT_SHAPE", f"directory {hi}", f"entry {lo:#x}: {length} bytes")
                inv.mark_damaged(Tree.DIRENT)
                continue
            if not usable:
                self._stray(hi, lo, name, row)
                continue
            if b"/" in name or b"\0" in name or name in (b".", b".."):
                inv.report.add("DIRENT_NAME", f"directory {hi}", f"impossible name {show(name)}")
            self._pending.append((hi, lo, name, ino, kind))
            self._check_duplicate(hi, lo, name)
            target = index.get(ino, -1)
            if target < 0:
                self._dangling(hi, lo, name, ino)
                continue
            inv.found_entries[row] += 1
            inv.names[target] += 1
            mode = inv.mode[target]
            if mode >> 12 != kind:
                self._wrong_type(leaf, hi, lo, offset, length, name, mode >> 12)
            if mode >> 12 == 4:
                inv.found_subdirs[row] += 1
                if ino in self.dir_of or ino == ROOT_INODE:
                    inv.report.add(
                        "DIR_NAMES", f"directory {ino}", f"has another name {show(name)} in {hi}"
                    )
                self.dir_of[ino] = hi

    def _stray(self, directory: int, cookie: int, name: bytes, row: int) -> None:
        inv = self.inv
        if row < 0 and not inv.has_damage(Tree.INODE):
            inv.fixes.remove[Tree.DIRENT].add(directory << 64 | cookie)
            repair = "remove the entry"
        else:
            repair = ""
        inv.report.add(
            "DIRENT_DIRECTORY",
            f"directory {directory}",
            f"entry {show(name)}: " + ("no such inode" if row < 0 else "not a directory"),
            repair,
        )

    def _dangling(self, directory: int, cookie: int, name: bytes, ino: int) -> None:
        inv = self.inv
        repair = ""
        if not inv.has_damage(Tree.INODE):
            inv.fixes.remove[Tree.DIRENT].add(directory << 64 | cookie)
            repair = "remove the entry"
        inv.report.add(
            "DIRENT_INODE",
            f"directory {directory}",
            f"entry {show(name)} names inode {ino}, which does not exist",
            repair,
        )

    def _wrong_type(
        self,
        leaf: Leaf,
        directory: int,
        cookie: int,
        offset: int,
        length: int,
        name: bytes,
        dt: int,
    ) -> None:
        record = bytearray(leaf.data[offset : offset + length])
        record[8] = dt
        self.inv.fixes.replace[Tree.DIRENT][directory << 64 | cookie] = bytes(record)
        self.inv.report.add(
            "DIRENT_TYPE",
            f"directory {directory}",
            f"entry {show(name)} has another type than its inode",
            "take the inode's type",
        )

    def _check_duplicate(self, directory: int, cookie: int, name: bytes) -> None:
        group = (directory, cookie >> DIR_SEQ_BITS)
        if group != self._group:
            self._group = group
            self._group_names = {name}
        elif name in self._group_names:
            self.inv.report.add(
                "DIRENT_TWICE", f"directory {directory}", f"two entries {show(name)}"
            )
        else:
            self._group_names.add(name)

    def _check_hashes(self) -> None:
        key = self.inv.volume.super.hash_key
        hashes = siphash_all(key, [entry[2] for entry in self._pending])
        for (directory, cookie, name, ino, kind), value in zip(self._pending, hashes, strict=True):
            if cookie >> DIR_SEQ_BITS == (value & _HASH_MASK or 1):
                continue
            self.inv.report.add(
                "DIRENT_HASH",
                f"directory {directory}",
                f"entry {show(name)} lies under cookie {cookie:#x}, not its name's",
                "move it",
            )
            self.inv.fixes.remove[Tree.DIRENT].add(directory << 64 | cookie)
            if ino in self.inv.index:
                self.inv.fixes.entries.append((directory, name, ino, kind))
        self._pending.clear()

    # -- comparing --

    def check(self) -> None:
        """Compare what was counted with what the inodes say."""
        inv = self.inv
        if inv.has_damage(Tree.DIRENT) or inv.has_damage(Tree.INODE):
            return
        for row, ino in enumerate(inv.ino):
            if stat.S_ISDIR(inv.mode[row]):
                self._check_directory(row, ino)
            elif inv.names[row]:
                self._check_links(row, ino)
            else:
                self._check_nameless(row, ino)
        self._check_reachable()

    def _set(self, ino: int, field: str, have: int, want: int, code: str, text: str) -> None:
        if have != want:
            self.inv.fixes.inodes[ino][field] = want
            self.inv.report.add(code, f"inode {ino}", f"{text}: {have}, found {want}", "correct it")

    def _check_links(self, row: int, ino: int) -> None:
        inv = self.inv
        self._set(ino, "nlink", inv.nlink[row], inv.names[row], "LINK_COUNT", "link count")
        if ino in inv.orphans:
            self._not_orphan(ino)

    def _not_orphan(self, ino: int) -> None:
        self.inv.fixes.remove[Tree.ORPHAN].add(ino << 64)
        self.inv.report.add(
            "ORPHAN_NAMED",
            f"inode {ino}",
            "is an orphan, but has a name",
            "remove the orphan entry",
        )

    def _check_nameless(self, row: int, ino: int) -> None:
        inv = self.inv
        if inv.nlink[row] == 0:
            if ino not in inv.orphans:
                inv.fixes.add[Tree.ORPHAN][ino << 64] = layout.ORPHAN.codec.pack(0, 0)
                inv.report.add(
                    "ORPHAN_MISSING",
                    f"inode {ino}",
                    "has link count 0 and is not on the orphan list",
                    "put it there, so that the next mount frees it",
                )
            return
        if ino in inv.orphans:
            inv.fixes.remove[Tree.ORPHAN].add(ino << 64)
        inv.fixes.reconnect.append(ino)
        inv.report.add(
            "UNREACHABLE",
            f"inode {ino}",
            f"has no name, but link count {inv.nlink[row]}",
            "give it a name in lost+found",
        )

    def _check_directory(self, row: int, ino: int) -> None:
        inv = self.inv
        is_root = ino == ROOT_INODE
        self._set(ino, "size", inv.size[row], inv.found_entries[row], "DIR_ENTRIES", "entry count")
        found = inv.found_subdirs[row]
        self._set(ino, "subdirs", inv.subdirs[row], found, "DIR_SUBDIRS", "subdirectories")
        if inv.names[row] or is_root:
            self._set(ino, "nlink", inv.nlink[row], 2 + found, "LINK_COUNT", "link count")
            parent = ROOT_INODE if is_root else self.dir_of[ino]
            self._set(ino, "parent", inv.parent[row], parent, "DIR_PARENT", "parent")
            if ino in inv.orphans:
                self._not_orphan(ino)
        elif inv.nlink[row] == 0 and inv.found_entries[row]:
            inv.report.add("ORPHAN_NOT_EMPTY", f"directory {ino}", "is deleted, but has entries")
        else:
            self._check_nameless(row, ino)

    def _check_reachable(self) -> None:
        """Every directory with a name leads to the root, or to one that is reported already."""
        fine = {ROOT_INODE}
        for start in self.dir_of:
            chain = []
            seen = set()
            at: int | None = start
            while at is not None and at not in fine and at not in seen:
                seen.add(at)
                chain.append(at)
                at = self.dir_of.get(at)
            if at is not None and at in seen:
                self.inv.report.add(
                    "DIR_CYCLE", f"directory {at}", "lies below itself, not below the root"
                )
            fine.update(chain)
