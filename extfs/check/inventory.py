"""Reading everything: root block, AG headers, inodes and the small trees, into columns.

A million inodes are a million entries in a dozen arrays, not a million objects. `Inventory.index`
gives an inode's row; the passes in ``names``, ``attributes`` and ``space`` count into the rows what
they find, and compare at the end.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from extfs.check import layout
from extfs.check.fixes import Fixes
from extfs.check.layout import INODE_CODEC, RECORD_SIZES, InodeFlag, Magic, Tree
from extfs.check.report import Report
from extfs.check.server_records import ServerRecords
from extfs.check.trees import EMPTY_ROOT, Leaf, Root, Walker
from extfs.check.volume import DamageError, Volume

# Without one of these nobody knows which blocks are in use, or which inodes.
CORE_TREES = (
    Tree.INODE,
    Tree.EXTENT,
    Tree.DIRENT,
    Tree.XATTR,
    Tree.SYMLINK,
    Tree.QUARANTINE,
    Tree.INTENT,
    Tree.EXPOSURE,
    Tree.HOLDER,
    Tree.FENCE,
    Tree.NFS_CLIENT,
    Tree.ORPHAN,
)

KNOWN_FLAGS = int(
    InodeFlag.SHARED | InodeFlag.STAGING | InodeFlag.ACL | InodeFlag.DEFACL | InodeFlag.PREALLOC
)
_FORMATS = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    )
)


@dataclass
class AgState:
    """An AG's header; None where it is damaged."""

    number: int
    values: dict[str, Any] | None = None
    by_block: Root = EMPTY_ROOT
    by_len: Root = EMPTY_ROOT


def _numbers() -> array[int]:
    return array("Q")


@dataclass
class Inventory:
    """All that the passes find, and what repair needs to know."""

    volume: Volume
    report: Report
    fixes: Fixes
    progress: Callable[[int], None] | None = None
    root: dict[str, Any] = field(default_factory=dict)
    roots: list[Root] = field(default_factory=list)
    ags: list[AgState] = field(default_factory=list)
    walker: Walker = field(init=False)

    # One row for each inode.
    index: dict[int, int] = field(default_factory=dict)
    ino: array[int] = field(default_factory=_numbers)
    mode: array[int] = field(default_factory=lambda: array("I"))
    nlink: array[int] = field(default_factory=lambda: array("I"))
    flags: array[int] = field(default_factory=lambda: array("I"))
    size: array[int] = field(default_factory=_numbers)
    blocks: array[int] = field(default_factory=_numbers)
    parent: array[int] = field(default_factory=_numbers)
    subdirs: array[int] = field(default_factory=lambda: array("I"))
    xattrs: array[int] = field(default_factory=lambda: array("I"))
    # What was found for each row.
    names: array[int] = field(default_factory=lambda: array("I"))
    found_entries: array[int] = field(default_factory=_numbers)
    found_subdirs: array[int] = field(default_factory=lambda: array("I"))
    found_blocks: array[int] = field(default_factory=_numbers)
    found_xattrs: array[int] = field(default_factory=lambda: array("I"))
    found_target: array[int] = field(default_factory=_numbers)
    found_flags: array[int] = field(default_factory=lambda: array("I"))

    # One entry for each extent of an inode that exists.
    ext_start: array[int] = field(default_factory=_numbers)
    ext_end: array[int] = field(default_factory=_numbers)
    ext_row: array[int] = field(default_factory=_numbers)

    conflict: bool = False
    """Two owners claim a block, and neither claim can be derived from others."""
    orphans: set[int] = field(default_factory=set)
    intents: dict[int, dict[str, Any]] = field(default_factory=dict)
    quarantine: list[tuple[int, int]] = field(default_factory=list)
    quarantine_holders: list[tuple[int, int]] = field(default_factory=list)
    """(first block, holder) of each run."""
    holders: dict[int, int] = field(default_factory=dict)
    """State of each holder's record."""
    watched_extents: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    """(fork, file block, device block, blocks) of the inodes that have exposures."""
    staged_extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """(file block, blocks) of the staging fork, by inode."""
    data_runs: list[tuple[int, int, int]] = field(default_factory=list)
    """(first block, blocks, references) of all blocks that files use, in order."""

    def __post_init__(self) -> None:
        self.walker = Walker(self.volume, self.report, progress=self.progress)
        rebuilt = "build the tree anew"
        self.walker.repairs = {
            int(tree): rebuilt for tree in (Tree.REFCOUNT, Tree.FREE_BY_BLOCK, Tree.FREE_BY_LEN)
        }

    # -- state --

    @property
    def core_damaged(self) -> bool:
        """Whether it is unknown which inodes there are, or which blocks are in use.

        A tree that cannot be built anew is not readable as a whole, or owners contradict each
        other.
        """
        return self.conflict or any((int(tree), 0) in self.walker.damaged for tree in CORE_TREES)

    def mark_damaged(self, tree: Tree) -> None:
        """A record of a global tree makes no sense: what it stood for is unknown."""
        self.walker.damaged.add((int(tree), 0))

    def has_damage(self, tree: Tree) -> bool:
        """Whether part of a global tree is not readable."""
        return (int(tree), 0) in self.walker.damaged

    # -- fixed places --

    def load_root(self) -> bool:
        """Read the root block; False when it is damaged, and nothing more can be read."""
        try:
            block = self.volume.read_meta(layout.ROOT_BLOCK, Magic.ROOT, 0)
        except DamageError as damage:
            self.report.add(damage.code, f"root block {layout.ROOT_BLOCK}", damage.text)
            return False
        self.root = layout.ROOT.unpack(block)
        trees = self.root["trees"]
        self.roots = [Root.parse(trees, slot * 24) for slot in range(layout.TREE_ROOT_COUNT)]
        for slot in range(len(layout.GLOBAL_TREES), layout.TREE_ROOT_COUNT):
            if self.roots[slot] != EMPTY_ROOT:
                self.report.add("ROOT_SHAPE", "root block", f"reserved tree {slot} is in use")
        return True

    def load_ags(self) -> None:
        """Read all AG headers."""
        sb = self.volume.super
        for number in range(sb.ag_count):
            state = AgState(number)
            self.ags.append(state)
            where = f"AG {number}"
            try:
                block = self.volume.read_meta(sb.ag_header(number), Magic.AG, number)
            except DamageError as damage:
                self.fixes.ags.add(number)
                self.report.add(damage.code, where, damage.text, "build the AG anew")
                continue
            values = layout.AG.unpack(block)
            start, end = sb.ag_range(number)
            if (values["start"], values["length"]) != (start, end - start) or values[
                "freelist_count"
            ] > layout.AG_FREELIST_MAX:
                self.fixes.ags.add(number)
                self.report.add("AG_SHAPE", where, "impossible values", "build the AG anew")
                continue
            state.values = values
            state.by_block = Root.parse(values["by_block"])
            state.by_len = Root.parse(values["by_len"])

    # -- inodes --

    def read_inodes(self) -> None:
        """Fill the rows from the inode tree."""
        for leaf in self.walker.walk(self.roots[Tree.INODE], Tree.INODE):
            self._inode_leaf(leaf)
        count = len(self.ino)
        for column in (
            self.names,
            self.found_entries,
            self.found_subdirs,
            self.found_blocks,
            self.found_xattrs,
            self.found_target,
            self.found_flags,
        ):
            column.frombytes(bytes(count * column.itemsize))
        if layout.ROOT_INODE not in self.index:
            self.report.add("ROOT_INODE", "inode 1", "the root directory does not exist")
        elif not stat.S_ISDIR(self.mode[self.index[layout.ROOT_INODE]]):
            self.report.add("ROOT_INODE", "inode 1", "the root is not a directory")
        if self.has_damage(Tree.INODE):
            return
        if count != self.root["inodes"]:
            self.fixes.root = True
            self.report.add(
                "COUNT_INODES",
                "root block",
                f"counts {self.root['inodes']} inodes, there are {count}",
                "set the count",
            )
        if count and self.ino[-1] >= self.root["next_inode"]:
            self.fixes.root = True
            self.report.add(
                "NEXT_INODE",
                "root block",
                f"the next inode would be {self.root['next_inode']}, but {self.ino[-1]} exists",
                "raise it",
            )

    def _inode_leaf(self, leaf: Leaf) -> None:
        data = leaf.data
        row = len(self.ino)
        for hi, lo, offset, _length, _reserved in leaf.slots:
            v = INODE_CODEC.unpack_from(data, offset)
            mode, size = v[1], v[6]
            if lo or not hi or stat.S_IFMT(mode) not in _FORMATS or mode >> 16:
                self.report.add("INODE_SHAPE", f"inode {hi}", f"mode {mode:#o}, key {hi}/{lo}")
                self.mark_damaged(Tree.INODE)
                continue
            if size > layout.FILE_MAX_BYTES or v[5] & ~KNOWN_FLAGS or max(v[12:16]) > 999_999_999:
                self.report.add("INODE_SHAPE", f"inode {hi}", f"size {size}, flags {v[5]:#x}")
            self.index[hi] = row
            row += 1
            self.ino.append(hi)
            self.mode.append(mode)
            self.nlink.append(v[4])
            self.flags.append(v[5])
            self.size.append(size)
            self.blocks.append(v[7])
            self.parent.append(v[17])
            self.subdirs.append(v[19])
            self.xattrs.append(v[20])

    # -- the small trees --

    def read_small_trees(self) -> None:
        """Orphans, intents, quarantine, holders, fences, NFS clients."""
        self._read_orphans()
        self._read_intents()
        self._read_quarantine()
        self._read_holders()
        self._read_fences()
        ServerRecords(self).read()

    def _read_orphans(self) -> None:
        for leaf in self.walker.walk(self.roots[Tree.ORPHAN], Tree.ORPHAN):
            for hi, lo, _offset, _length, _reserved in leaf.slots:
                if hi in self.index and not lo:
                    self.orphans.add(hi)
                elif not self.has_damage(Tree.INODE):
                    self.fixes.remove[Tree.ORPHAN].add(hi << 64 | lo)
                    self.report.add(
                        "ORPHAN_INODE",
                        f"orphan {hi}",
                        "names an inode that does not exist",
                        "remove the entry",
                    )
                else:
                    self.report.add("ORPHAN_INODE", f"orphan {hi}", "its inode is not readable")

    def _read_intents(self) -> None:
        for leaf in self.walker.walk(self.roots[Tree.INTENT], Tree.INTENT):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                intent = layout.INTENT.unpack(leaf.data, offset)
                self.intents[hi] = intent
                if lo or intent["type"] not in layout.INTENT_TYPES:
                    self.report.add("INTENT_SHAPE", f"intent {hi}", f"type {intent['type']}")
                elif intent["ino"] not in self.index:
                    self.report.add(
                        "INTENT_INODE", f"intent {hi}", f"inode {intent['ino']} does not exist"
                    )
                if hi >= self.root["next_intent"]:
                    self.fixes.root = True
                    self.report.add(
                        "NEXT_INTENT", "root block", f"intent {hi} exists already", "raise it"
                    )

    def _read_quarantine(self) -> None:
        end = total = 0
        for leaf in self.walker.walk(self.roots[Tree.QUARANTINE], Tree.QUARANTINE):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                length, holder, _xid = layout.QUARANTINE.codec.unpack_from(leaf.data, offset)
                if lo or not length or hi < end or hi + length > self.volume.super.total_blocks:
                    self.report.add(
                        "QUARANTINE_SHAPE", f"quarantine {hi}", f"{length} blocks, key {hi}/{lo}"
                    )
                    self.mark_damaged(Tree.QUARANTINE)
                    continue
                end = hi + length
                total += length
                self.quarantine.append((hi, length))
                self.quarantine_holders.append((hi, holder))
        if total != self.root["quarantined_blocks"] and not self.has_damage(Tree.QUARANTINE):
            self.fixes.root = True
            self.report.add(
                "COUNT_QUARANTINE",
                "root block",
                f"counts {self.root['quarantined_blocks']} quarantined blocks, there are {total}",
                "set the count",
            )

    def _read_holders(self) -> None:
        for leaf in self.walker.walk(self.roots[Tree.HOLDER], Tree.HOLDER):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                state = layout.HOLDER.unpack(leaf.data, offset)["state"]
                self.holders[hi] = state
                if lo or state not in layout.HOLDER_STATES:
                    self.report.add("HOLDER_SHAPE", f"holder {hi}", f"state {state}")
                if hi >= self.root["next_holder"]:
                    self.fixes.root = True
                    self.report.add(
                        "NEXT_HOLDER", "root block", f"holder {hi} exists already", "raise it"
                    )

    def _read_fences(self) -> None:
        """The holder of each is there, and not yet known to be cut off."""
        for leaf in self.walker.walk(self.roots[Tree.FENCE], Tree.FENCE):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                values = layout.FENCE.unpack(leaf.data, offset)
                where, state = f"fence {hi}", values["state"]
                if lo or values["holder"] != hi or state not in layout.FENCE_STATES:
                    self.report.add(
                        "FENCE_SHAPE", where, f"state {state}, of holder {values['holder']}"
                    )
                elif layout.HOLDER_STATES.get(self.holders.get(hi, 0)) not in ("live", "lost"):
                    if self.has_damage(Tree.HOLDER):
                        self.report.add("FENCE_HOLDER", where, "its holder is not readable")
                        continue
                    self.fixes.remove[Tree.FENCE].add(hi << 64)
                    self.report.add(
                        "FENCE_HOLDER",
                        where,
                        "the holder is gone" if hi in self.holders else "the holder has no record",
                        "remove the record",
                    )

    def expected_records(self) -> int:
        """Records that the roots promise, for a progress bar."""
        total = sum(root.records for root in self.roots)
        return total + sum(ag.by_block.records + ag.by_len.records for ag in self.ags)


assert all(tree in RECORD_SIZES for tree in CORE_TREES)
