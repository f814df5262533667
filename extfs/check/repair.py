"""Putting right what needs no guess, so that an interrupted repair need only be run again.

Order of writes: nodes of trees that are built anew go to blocks that nobody owns, before and after;
then one commit record switches root block and AG headers over to them. Records changed in place go
through the log in earlier records, each of which is right by itself. So at any moment the device
holds a state that the next check understands, never worse than before.
"""

from __future__ import annotations

import stat
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Any

from extfs.check import layout
from extfs.check.inventory import Inventory
from extfs.check.layout import (
    AG_FREELIST_MAX,
    BLOCK_SIZE,
    DIR_SEQ_BITS,
    INODE,
    ROOT_INODE,
    Magic,
    Tree,
)
from extfs.check.log import Writer
from extfs.check.names import name_hash
from extfs.check.space import Space
from extfs.check.trees import (
    EMPTY_ROOT,
    Leaf,
    Root,
    Walker,
    build,
    build_size,
    records,
    records_from,
)
from extfs.check.volume import Volume, new_block, seal

LOST_AND_FOUND = b"lost+found"

Free = list[tuple[int, int]]

_FREELIST_SPARE = 24
"""Blocks on the freelist of an AG that was built anew."""


class RepairError(Exception):
    """Repair cannot go on; the text says why. Nothing was changed."""


def merge_runs(runs: Iterable[tuple[int, int]]) -> Free:
    """Sorted, overlapping and touching runs joined."""
    merged: Free = []
    for start, length in sorted(runs):
        if merged and start <= merged[-1][0] + merged[-1][1]:
            last_start, last_length = merged[-1]
            merged[-1] = (last_start, max(last_length, start + length - last_start))
        else:
            merged.append((start, length))
    return merged


def complement(used: Free, start: int, end: int) -> Free:
    """What of [start, end) the sorted, disjoint runs `used` leave."""
    free: Free = []
    at = start
    for first, length in used:
        if first + length <= at:
            continue
        if first >= end:
            break
        if first > at:
            free.append((at, first - at))
        at = first + length
    if at < end:
        free.append((at, end - at))
    return free


class Repair:
    """Carries out the fixes that one check collected."""

    def __init__(self, inventory: Inventory, space: Space, writer: Writer) -> None:
        self.inv = inventory
        self.fixes = inventory.fixes
        self.volume: Volume = inventory.volume
        self.writer = writer
        self.fresh: dict[int, bytes] = {}
        """New nodes, for blocks that nobody owns."""
        self.changed: dict[int, bytearray] = {}
        """Leaves with records changed in place."""
        self.roots = list(inventory.roots)
        self.next_inode: int = max(
            inventory.root["next_inode"], inventory.ino[-1] + 1 if inventory.ino else 0
        )
        self.next_generation: int = inventory.root["next_generation"]
        self.new_inodes = 0
        self.released: set[int] = set()
        """Nodes of trees that are built anew."""
        self._used = merge_runs((start, length) for start, length, _owner in space.used())
        self._pool = complement(self._used, 0, self.volume.super.total_blocks)
        self._pool.reverse()

    # -- blocks --

    def _take(self) -> int:
        while self._pool:
            start, length = self._pool.pop()
            if length > 1:
                self._pool.append((start + 1, length - 1))
            self._touch(start)
            return start
        raise RepairError("there is no free block to build trees in")

    def _put(self, number: int, block: bytes) -> None:
        self.fresh[number] = block

    def _touch(self, block: int) -> None:
        sb = self.volume.super
        self.fixes.ags.add(min(block // sb.ag_blocks, sb.ag_count - 1))

    # -- everything --

    def run(self) -> None:
        """Build all changes, then write them. `RepairError`: nothing was written."""
        if self.fixes.reconnect:
            self._reconnect()
        for directory, name, ino, kind in self.fixes.entries:
            self._add_entry(directory, name, ino, kind)
        for tree in sorted({*self.fixes.remove, *self.fixes.add}):
            if self.fixes.remove[tree] or self.fixes.add[tree]:
                self._rebuild(tree, self._edited(tree))
        if self.fixes.refcounts:
            self._rebuild_refcounts()
        self._patch_in_place()
        heads = self._build_ags()
        self._write(heads)

    # -- records --

    def _inode_edit(self, key: int, record: bytes) -> bytes:
        fields = self.fixes.inodes.get(key >> 64)
        if not fields:
            return record
        block = bytearray(record)
        INODE.pack_into(block, 0, INODE.unpack(record) | fields)
        return bytes(block)

    def _edited(self, tree: Tree) -> Iterator[tuple[int, bytes]]:
        """A tree's records with all fixes applied, in key order."""
        remove, replace = self.fixes.remove[tree], self.fixes.replace[tree]
        added = sorted(self.fixes.add[tree].items())
        at = 0
        for key, record in records(self.volume, self.inv.roots[tree], tree):
            while at < len(added) and added[at][0] < key:
                yield added[at]
                at += 1
            if key in remove:
                continue
            if tree == Tree.INODE:
                record = self._inode_edit(key, record)
            yield key, replace.get(key, record)
        yield from added[at:]

    def _rebuild(self, tree: Tree, entries: Iterable[tuple[int, bytes]]) -> None:
        self.roots[tree] = build(self.volume, tree, 0, entries, self._take, self._put)
        for block, (owner, _agno) in self.inv.walker.nodes.items():
            if owner == tree:
                self.released.add(block)
                self._touch(block)

    def _rebuild_refcounts(self) -> None:
        entries = (
            (start << 64, layout.REFCOUNT.codec.pack(length, refs, 0))
            for start, length, refs in self.inv.data_runs
            if refs > 1
        )
        self._rebuild(Tree.REFCOUNT, entries)

    def _patch_in_place(self) -> None:
        rebuilt = {tree for tree in Tree if self.fixes.remove.get(tree) or self.fixes.add.get(tree)}
        if self.fixes.inodes and Tree.INODE not in rebuilt:
            wanted = {ino << 64 for ino in self.fixes.inodes}
            for leaf, key, offset, length in self._find(Tree.INODE, wanted):
                self._store(
                    leaf, offset, self._inode_edit(key, leaf.data[offset : offset + length])
                )
        for tree, replace in self.fixes.replace.items():
            if replace and tree not in rebuilt:
                for leaf, key, offset, _length in self._find(tree, set(replace)):
                    self._store(leaf, offset, replace[key])

    def _find(self, tree: Tree, keys: set[int]) -> Iterator[tuple[Leaf, int, int, int]]:
        walker = Walker(self.volume, type(self.inv.report)())
        for leaf in walker.walk(self.inv.roots[tree], tree):
            for hi, lo, offset, length, _reserved in leaf.slots:
                if hi << 64 | lo in keys:
                    yield leaf, hi << 64 | lo, offset, length

    def _store(self, leaf: Leaf, offset: int, record: bytes) -> None:
        block = self.changed.setdefault(leaf.block, bytearray(leaf.data))
        block[offset : offset + len(record)] = record

    # -- names --

    def _current(self, ino: int, field: str, column: Any) -> int:
        value: int = self.fixes.inodes.get(ino, {}).get(field, column[self.inv.index[ino]])
        return value

    def _add_entry(self, directory: int, name: bytes, ino: int, kind: int) -> None:
        """An entry at the first free cookie of its hash."""
        base = directory << 64 | name_hash(self.volume.super.hash_key, name) << DIR_SEQ_BITS
        taken = set(self.fixes.add[Tree.DIRENT])
        for key, _record in records_from(
            self.volume, self.inv.roots[Tree.DIRENT], Tree.DIRENT, base
        ):
            if key >= base + (1 << DIR_SEQ_BITS):
                break
            if key not in self.fixes.remove[Tree.DIRENT]:
                taken.add(key)
        seq = next(seq for seq in range(1 << DIR_SEQ_BITS) if base + seq not in taken)
        record = layout.DIRENT.codec.pack(ino, kind, len(name), bytes(6)) + name
        self.fixes.add[Tree.DIRENT][base + seq] = record

    def _reconnect(self) -> None:
        """Names in lost+found for everything that has none."""
        inv = self.inv
        home = self._lost_and_found()
        entries = subdirs = 0
        for ino in self.fixes.reconnect:
            row = inv.index[ino]
            is_dir = stat.S_ISDIR(inv.mode[row])
            fields = self.fixes.inodes[ino]
            if is_dir:
                fields |= {"nlink": 2 + inv.found_subdirs[row], "parent": home}
                subdirs += 1
            else:
                fields["nlink"] = 1
            entries += 1
            self._add_entry(home, f"#{ino}".encode(), ino, inv.mode[row] >> 12)
        self._grow_directory(home, entries, subdirs)

    def _grow_directory(self, ino: int, entries: int, subdirs: int) -> None:
        key = ino << 64
        new = self.fixes.add[Tree.INODE].get(key)
        if new is not None:
            values = INODE.unpack(new)
            values["size"] += entries
            values["subdirs"] += subdirs
            values["nlink"] += subdirs
            block = bytearray(INODE.size)
            INODE.pack_into(block, 0, values)
            self.fixes.add[Tree.INODE][key] = bytes(block)
            return
        inv = self.inv
        row = inv.index[ino]
        self.fixes.inodes[ino] |= {
            "size": inv.found_entries[row] + entries,
            "subdirs": inv.found_subdirs[row] + subdirs,
            "nlink": 2 + inv.found_subdirs[row] + subdirs,
        }

    def _lost_and_found(self) -> int:
        """Inode of /lost+found; made when it is missing."""
        inv = self.inv
        root_key = ROOT_INODE << 64
        base = root_key | name_hash(self.volume.super.hash_key, LOST_AND_FOUND) << DIR_SEQ_BITS
        for key, record in records_from(self.volume, inv.roots[Tree.DIRENT], Tree.DIRENT, base):
            if key >= base + (1 << DIR_SEQ_BITS):
                break
            if record[layout.DIRENT.size :] == LOST_AND_FOUND:
                ino = int.from_bytes(record[:8], "little")
                row = inv.index.get(ino, -1)
                if row < 0 or not stat.S_ISDIR(inv.mode[row]):
                    raise RepairError("/lost+found exists and is not a directory")
                return ino
        if ROOT_INODE not in inv.index:
            raise RepairError("there is no root directory for lost+found")
        now = int(time.time())
        ino = self.next_inode
        self.next_inode += 1
        self.new_inodes += 1
        block = bytearray(INODE.size)
        times = dict.fromkeys(("atime", "mtime", "ctime", "btime"), now)
        values = {"mode": stat.S_IFDIR | 0o700, "nlink": 2, "parent": ROOT_INODE, "change": 1}
        values["generation"] = self.next_generation
        self.next_generation = self.next_generation + 1 & 0xFFFFFFFF
        INODE.pack_into(block, 0, values | times)
        self.fixes.add[Tree.INODE][ino << 64] = bytes(block)
        self._add_entry(ROOT_INODE, LOST_AND_FOUND, ino, 4)
        self._grow_directory(ROOT_INODE, 1, 1)
        return ino

    # -- free space --

    def _build_ags(self) -> dict[int, bytes]:
        """New headers and free trees of all AGs that need them."""
        heads: dict[int, bytes] = {}
        self._release_old_free_trees()
        final = self._final_used()
        taken: set[int] = set()
        for agno in sorted(self.fixes.ags):
            free = complement(final, *self.volume.super.ag_range(agno))
            heads[self.volume.super.ag_header(agno)] = self._build_ag(agno, free, taken)
        return heads

    def _release_old_free_trees(self) -> None:
        for block, (tree, agno) in self.inv.walker.nodes.items():
            if tree in (Tree.FREE_BY_BLOCK, Tree.FREE_BY_LEN) and agno in self.fixes.ags:
                self.released.add(block)

    def _final_used(self) -> Free:
        """Runs in use once everything is written, without the trees of AGs that are built anew."""
        inv = self.inv
        keep = [(start, length) for start, length, _what in self.volume.super.fixed_blocks()]
        keep += [(start, length) for start, length, _refs in inv.data_runs]
        keep += inv.quarantine
        keep += [(block, 1) for block in inv.walker.nodes if block not in self.released]
        keep += [(block, 1) for block in self.fresh]
        for ag in inv.ags:
            if ag.values is not None and ag.number not in self.fixes.ags:
                keep += [(b, 1) for b in ag.values["freelist"][: ag.values["freelist_count"]]]
        return merge_runs(keep)

    def _build_ag(self, agno: int, free: Free, taken: set[int]) -> bytes:
        """Free trees of one AG. Their nodes must be blocks that are not in use now either."""
        freelist, free = self._own_blocks(agno, free)
        by_block = by_len = EMPTY_ROOT
        if free:
            entries = [(start << 64, struct.pack("<Q", length)) for start, length in free]
            lengths = sorted((length << 64 | start, b"") for start, length in free)
            by_block = build(
                self.volume, Tree.FREE_BY_BLOCK, agno, entries, freelist.pop, self._put
            )
            by_len = build(self.volume, Tree.FREE_BY_LEN, agno, lengths, freelist.pop, self._put)
        return self._ag_header(agno, free, freelist, by_block, by_len)

    def _own_blocks(self, agno: int, free: Free) -> tuple[list[int], Free]:
        """Blocks for the AG's trees and freelist, and the free extents without them.

        Taking blocks changes the number of extents, so the number of blocks is found by trying.
        """
        usable = self._not_live(free)
        blocks = sum(length for _start, length in free)
        wanted = _free_tree_nodes(len(free)) + _FREELIST_SPARE
        if blocks <= wanted:
            wanted = AG_FREELIST_MAX
        for _ in range(8):
            freelist, rest = _split_off(free, usable, wanted)
            nodes = _free_tree_nodes(len(rest))
            if nodes <= len(freelist) <= nodes + AG_FREELIST_MAX:
                return freelist, rest
            if len(freelist) < wanted:
                break
            wanted = nodes + _FREELIST_SPARE
        raise RepairError(f"AG {agno} has no room for its own free space trees")

    def _not_live(self, free: Free) -> Free:
        """What of the free runs is not in use by the old trees either, and not taken."""
        live = merge_runs([*self._used, *((block, 1) for block in self.fresh)])
        usable: Free = []
        for start, length in free:
            usable += complement(live, start, start + length)
        return usable

    def _ag_header(
        self, agno: int, free: Free, freelist: list[int], by_block: Root, by_len: Root
    ) -> bytes:
        assert len(freelist) <= AG_FREELIST_MAX
        sb = self.volume.super
        start, end = sb.ag_range(agno)
        block = new_block(Magic.AG, sb.ag_header(agno), sb.uuid, agno)
        values = layout.AG.unpack(block) | {
            "start": start,
            "length": end - start,
            "free_blocks": sum(length for _start, length in free) + len(freelist),
            "by_block": by_block.pack(),
            "by_len": by_len.pack(),
            "freelist_count": len(freelist),
            "freelist": tuple(freelist) + (0,) * (AG_FREELIST_MAX - len(freelist)),
        }
        layout.AG.pack_into(block, 0, values)
        return bytes(block)

    # -- writing --

    def _root_block(self, heads: dict[int, bytes]) -> bytes:
        inv = self.inv
        free = 0
        for ag in inv.ags:
            header = heads.get(self.volume.super.ag_header(ag.number))
            if header is not None:
                free += layout.AG.unpack(header)["free_blocks"]
            elif ag.values is not None:
                free += ag.values["free_blocks"]
        roots = list(self.roots)
        for tree in layout.GLOBAL_TREES:
            if roots[tree] == inv.roots[tree] and not inv.has_damage(tree):
                roots[tree] = Root(
                    roots[tree].block, roots[tree].height, self._count_records(tree, roots[tree])
                )
        values = dict(inv.root)
        values["trees"] = b"".join(root.pack() for root in roots)
        values["free_blocks"] = free
        if not inv.has_damage(Tree.INODE):
            values["inodes"] = len(inv.ino) + self.new_inodes
        values["quarantined_blocks"] = sum(length for _start, length in inv.quarantine)
        values["next_inode"] = self.next_inode
        values["next_generation"] = self.next_generation
        if inv.intents:
            values["next_intent"] = max(values["next_intent"], max(inv.intents) + 1)
        if inv.holders:
            values["next_holder"] = max(values["next_holder"], max(inv.holders) + 1)
        block = bytearray(BLOCK_SIZE)
        layout.ROOT.pack_into(block, 0, values)
        return bytes(block)

    def _count_records(self, tree: Tree, root: Root) -> int:
        if not self.inv.report.has("TREE_COUNT"):
            return root.records
        return sum(1 for _ in records(self.volume, root, tree))

    def _write(self, heads: dict[int, bytes]) -> None:
        volume = self.volume
        final = {layout.ROOT_BLOCK: self._root_block(heads), **heads}
        if len(final) > self.writer.capacity:
            raise RepairError("too many AGs for one commit record of this journal")
        for number, block in self.fresh.items():
            volume.write_block(number, block)
        volume.flush()
        leaves = sorted(self.changed)
        for first in range(0, len(leaves), self.writer.capacity):
            some = leaves[first : first + self.writer.capacity]
            self.writer.change({number: bytes(self.changed[number]) for number in some})
        self.writer.change(final)


def _free_tree_nodes(extents: int) -> int:
    """Nodes of the two trees that hold this many free extents."""
    return build_size(extents, layout.FREE.size) + build_size(extents, 0)


def _split_off(free: Free, usable: Free, count: int) -> tuple[list[int], Free]:
    """`count` single blocks out of `usable`, and what of `free` remains without them."""
    taken: list[int] = []
    for start, length in usable:
        if len(taken) == count:
            break
        taken += range(start, start + min(length, count - len(taken)))
    rest: Free = []
    used = merge_runs((block, 1) for block in taken)
    for start, length in free:
        rest += complement(used, start, start + length)
    return taken, rest


def restore_super(volume: Volume) -> None:
    """Write both superblock copies from the valid one: the copy first, then the primary."""
    for number in (layout.SUPER_COPY_BLOCK, layout.SUPER_BLOCK):
        block = bytearray(volume.super.raw)
        block[8:16] = number.to_bytes(8, "little")
        volume.write_block(number, seal(block, 0))
        volume.flush()


def reset_heartbeat(volume: Volume, seq: int = 0) -> None:
    """A heartbeat that says: not mounted. `seq`: of the one before."""
    block = new_block(Magic.HEARTBEAT, layout.HEARTBEAT_BLOCK, volume.super.uuid)
    values = layout.HEARTBEAT.unpack(block) | {
        "seq": seq + 1,
        "sec": int(time.time()),
        "interval_ms": 2000,
    }
    layout.HEARTBEAT.pack_into(block, 0, values)
    volume.write_block(layout.HEARTBEAT_BLOCK, seal(block, 0))
    volume.flush()
