"""Who owns which block: extents, reference counts, free space, and that nothing is owned twice."""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from extfs.check import layout
from extfs.check.inventory import AgState, Inventory
from extfs.check.layout import EXTENT_CODEC, EXTENT_MAX_BLOCKS, InodeFlag, Tree
from extfs.check.trees import Leaf

Run = tuple[int, int, int]
"""First block, blocks, references."""

_FILE_MASK = (1 << 56) - 1
_DIFFERENCES_LISTED = 100


def depth_runs(starts: Sequence[int], ends: Sequence[int]) -> Iterator[Run]:
    """Runs of equal depth of a set of intervals; neighbours of equal depth are one run."""
    starts, ends = sorted(starts), sorted(ends)
    count = len(starts)
    i = j = depth = position = 0
    run_start = run_depth = 0
    while j < count:
        here = ends[j]
        if i < count and starts[i] < here:
            here = starts[i]
        if here != position:
            if depth != run_depth:
                if run_depth:
                    yield run_start, position - run_start, run_depth
                run_start, run_depth = position, depth
            position = here
        while i < count and starts[i] == here:
            depth += 1
            i += 1
        while j < count and ends[j] == here:
            depth -= 1
            j += 1
    if depth != run_depth and run_depth:
        yield run_start, position - run_start, run_depth


class Space:
    """The passes over extents, reference counts and AGs, and the map of owners."""

    def __init__(self, inventory: Inventory) -> None:
        self.inv = inventory
        self._last: tuple[int, int] = (0, 0)
        self._last_end = 0
        self.free: list[tuple[int, int]] = []
        """Free extents as the by-block trees say."""
        self.freelists: list[int] = []

    # -- extents --

    def read_extents(self) -> None:
        """Read all extent records."""
        inv = self.inv
        for leaf in inv.walker.walk(inv.roots[Tree.EXTENT], Tree.EXTENT):
            self._extent_leaf(leaf)

    def _extent_leaf(self, leaf: Leaf) -> None:
        inv = self.inv
        total = inv.volume.super.total_blocks
        data = leaf.data
        last, last_end = self._last, self._last_end
        owner = row = -1
        for hi, lo, offset, _length, _reserved in leaf.slots:
            if hi != owner:
                owner = hi
                row = inv.index.get(hi, -1)
            if row < 0:
                self._stray(hi, lo)
                continue
            block, length, state, flags, _pad = EXTENT_CODEC.unpack_from(data, offset)
            fork, file_block = lo >> 56, lo & _FILE_MASK
            if (
                not 0 < length <= EXTENT_MAX_BLOCKS
                or state not in (1, 2)
                or fork > 1
                or flags > 1
                or file_block + length > layout.FILE_MAX_BLOCKS
                or block + length > total
                or not block
            ):
                self._bad(hi, file_block, f"blocks {block} + {length}, state {state}, fork {fork}")
                inv.mark_damaged(Tree.EXTENT)
                continue
            if not stat.S_ISREG(inv.mode[row]):
                self._bad(hi, file_block, "the inode is not a regular file")
            if (hi, fork) != last:
                last, last_end = (hi, fork), 0
            if file_block < last_end:
                inv.report.add(
                    "EXTENT_OVERLAP", f"inode {hi}", f"two extents map file block {file_block}"
                )
            last_end = max(last_end, file_block + length)
            inv.found_blocks[row] += length
            if hi in inv.watched_extents:
                inv.watched_extents[hi].append((fork, file_block, block, length))
            if fork:
                inv.staged_extents.setdefault(hi, []).append((file_block, length))
                inv.found_flags[row] |= int(InodeFlag.STAGING)
            inv.ext_start.append(block)
            inv.ext_end.append(block + length)
            inv.ext_row.append(row)
        self._last, self._last_end = last, last_end

    def _bad(self, ino: int, file_block: int, text: str) -> None:
        self.inv.report.add("EXTENT_SHAPE", f"inode {ino}", f"extent at {file_block}: {text}")

    def _stray(self, ino: int, lo: int) -> None:
        inv = self.inv
        repair = ""
        if not inv.has_damage(Tree.INODE):
            inv.fixes.remove[Tree.EXTENT].add(ino << 64 | lo)
            repair = "remove the extent"
        inv.report.add("EXTENT_INODE", f"inode {ino}", "does not exist, but maps blocks", repair)

    def check_extents(self) -> None:
        """Compare block counts with the inodes, and gather the runs of used blocks."""
        inv = self.inv
        inv.data_runs = list(depth_runs(inv.ext_start, inv.ext_end))
        if inv.has_damage(Tree.EXTENT):
            return
        staging = int(InodeFlag.STAGING)
        for row, ino in enumerate(inv.ino):
            if inv.blocks[row] != inv.found_blocks[row]:
                inv.fixes.inodes[ino]["blocks"] = inv.found_blocks[row]
                inv.report.add(
                    "BLOCK_COUNT",
                    f"inode {ino}",
                    f"counts {inv.blocks[row]} blocks, maps {inv.found_blocks[row]}",
                    "set the count",
                )
            if inv.found_flags[row] & staging and not inv.flags[row] & staging:
                self._set_flag(row, staging, "has extents in the staging fork, but no flag for it")

    def _set_flag(self, row: int, flag: int, text: str) -> None:
        inv = self.inv
        fields = inv.fixes.inodes[inv.ino[row]]
        fields["flags"] = fields.get("flags", inv.flags[row]) | flag
        inv.report.add("INODE_FLAG", f"inode {inv.ino[row]}", text, "set the flag")

    # -- reference counts --

    def check_refcounts(self) -> None:
        """Compare the refcount tree with the number of mappings."""
        inv = self.inv
        stored: list[Run] = []
        end = 0
        for leaf in inv.walker.walk(inv.roots[Tree.REFCOUNT], Tree.REFCOUNT):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                length, refs, _pad = layout.REFCOUNT.codec.unpack_from(leaf.data, offset)
                if lo or not length or refs < 2 or hi < end:
                    inv.fixes.refcounts = True
                    inv.report.add(
                        "REFCOUNT_SHAPE",
                        f"refcount {hi}",
                        f"{length} blocks with {refs} references",
                        "build the tree anew",
                    )
                    continue
                end = hi + length
                stored.append((hi, length, refs))
        if inv.has_damage(Tree.REFCOUNT):
            inv.fixes.refcounts = True
        if inv.has_damage(Tree.EXTENT):
            return
        wanted = [run for run in inv.data_runs if run[2] > 1]
        if not inv.has_damage(Tree.REFCOUNT) and _merged(stored) != wanted:
            inv.fixes.refcounts = True
            self._tell_refcounts(_merged(stored), wanted)
        if wanted:
            self._check_shared_flags(wanted)

    def _tell_refcounts(self, stored: list[Run], wanted: list[Run]) -> None:
        have, want = set(stored), set(wanted)
        for number, (start, length, refs) in enumerate(sorted(want ^ have)):
            if number == _DIFFERENCES_LISTED:
                break
            where = f"blocks {start} + {length}"
            if (start, length, refs) in want:
                text = f"have {refs} references, which the refcount tree does not say"
            else:
                text = f"the refcount tree says {refs} references, which there are not"
            self.inv.report.add("REFCOUNT", where, text, "build the tree anew")

    def _check_shared_flags(self, shared: list[Run]) -> None:
        inv = self.inv
        starts = [run[0] for run in shared]
        ends = [run[0] + run[1] for run in shared]
        flag = int(InodeFlag.SHARED)
        told = set()
        for start, end, row in zip(inv.ext_start, inv.ext_end, inv.ext_row, strict=True):
            at = bisect_left(starts, end) - 1
            if at >= 0 and ends[at] > start and not inv.flags[row] & flag and row not in told:
                told.add(row)
                self._set_flag(row, flag, "maps shared blocks, but has no flag for it")

    # -- free space --

    def read_ags(self) -> None:
        """Read the free trees and freelists of all AGs."""
        inv = self.inv
        free_sum = 0
        for ag in inv.ags:
            if ag.values is None:
                continue
            free = self._read_free(ag)
            listed = list(ag.values["freelist"][: ag.values["freelist_count"]])
            self.freelists += listed
            self.free += free
            blocks = sum(length for _start, length in free) + len(listed)
            if blocks != ag.values["free_blocks"] and ag.number not in inv.fixes.ags:
                inv.fixes.ags.add(ag.number)
                inv.report.add(
                    "COUNT_FREE",
                    f"AG {ag.number}",
                    f"counts {ag.values['free_blocks']} free blocks, there are {blocks}",
                    "build the AG anew",
                )
            free_sum += ag.values["free_blocks"]
        if free_sum != inv.root["free_blocks"]:
            inv.fixes.root = True
            if not inv.fixes.ags:
                inv.report.add(
                    "COUNT_FREE",
                    "root block",
                    f"counts {inv.root['free_blocks']} free blocks, the AGs {free_sum}",
                    "set the count",
                )

    def _read_free(self, ag: AgState) -> list[tuple[int, int]]:
        inv = self.inv
        start, stop = inv.volume.super.ag_range(ag.number)
        free: list[tuple[int, int]] = []
        lengths: list[tuple[int, int]] = []
        end = -1
        where = f"AG {ag.number}"
        for leaf in inv.walker.walk(ag.by_block, Tree.FREE_BY_BLOCK, ag.number):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                length = int.from_bytes(leaf.data[offset : offset + 8], "little")
                if lo or not length or hi < start or hi + length > stop or hi <= end:
                    self._bad_ag(ag.number, where, f"free extent {hi} + {length}")
                    continue
                end = hi + length
                free.append((hi, length))
        for leaf in inv.walker.walk(ag.by_len, Tree.FREE_BY_LEN, ag.number):
            lengths += [(lo, hi) for hi, lo, _offset, _length, _reserved in leaf.slots]
        if any((int(tree), ag.number) in inv.walker.damaged for tree in _FREE_TREES):
            inv.fixes.ags.add(ag.number)
        elif sorted(lengths) != free:
            self._bad_ag(ag.number, where, "its two trees of free space differ")
        return free

    def _bad_ag(self, number: int, where: str, text: str) -> None:
        self.inv.fixes.ags.add(number)
        self.inv.report.add("FREE_SPACE", where, text, "build the AG anew")

    # -- owners --

    def used(self) -> list[tuple[int, int, str]]:
        """(first block, blocks, owner) of everything in use, free trees and freelists included."""
        inv = self.inv
        owners: list[tuple[int, int, str]] = list(inv.volume.super.fixed_blocks())
        owners += [(start, length, "data") for start, length, _refs in inv.data_runs]
        owners += [(start, length, "quarantine") for start, length in inv.quarantine]
        titles = {int(tree): f"{tree.title} tree" for tree in Tree}
        owners += [(block, 1, titles[tree]) for block, (tree, _agno) in inv.walker.nodes.items()]
        owners += [(block, 1, "freelist") for block in self.freelists]
        return owners

    def check_owners(self) -> None:
        """Everything is owned exactly once, and what nobody owns is free."""
        inv = self.inv
        total = inv.volume.super.total_blocks
        complete = not inv.core_damaged and not inv.has_damage(Tree.REFCOUNT)
        everything = self.used()
        everything += [(start, length, "free space") for start, length in self.free]
        everything.sort()
        end, last = 0, ""
        for start, length, owner in everything:
            if start > end and complete:
                self._lost(end, start - end)
            if start < end:
                self._shared(start, min(end, start + length) - start, last, owner)
            if start + length > end:
                end, last = start + length, owner
        if end < total and complete:
            self._lost(end, total - end)
        elif end > total:
            inv.report.add("META_RANGE", f"block {end - 1}", f"{last} lies outside the device")

    def _mark(self, start: int, length: int) -> None:
        sb = self.inv.volume.super
        first = min(start // sb.ag_blocks, sb.ag_count - 1)
        last = min((start + length - 1) // sb.ag_blocks, sb.ag_count - 1)
        self.inv.fixes.ags.update(range(first, last + 1))

    def _lost(self, start: int, length: int) -> None:
        sb = self.inv.volume.super
        agnos = range(
            min(start // sb.ag_blocks, sb.ag_count - 1),
            min((start + length - 1) // sb.ag_blocks, sb.ag_count - 1) + 1,
        )
        self._mark(start, length)
        if all(self._unreadable(agno) for agno in agnos):
            return  # the damage has been told
        self.inv.report.add(
            "BLOCKS_LOST",
            f"blocks {start} + {length}",
            "neither in use nor free",
            "build the AG's free space anew",
        )

    def _unreadable(self, agno: int) -> bool:
        inv = self.inv
        return inv.ags[agno].values is None or any(
            (int(tree), agno) in inv.walker.damaged for tree in _FREE_TREES
        )

    def _shared(self, start: int, length: int, one: str, other: str) -> None:
        free = {"free space", "freelist"}
        free_trees = {f"{tree.title} tree" for tree in _FREE_TREES}
        repair = ""
        if one in free | free_trees or other in free | free_trees:
            self._mark(start, length)
            repair = "build the AG's free space anew"
        else:
            self.inv.conflict = True
        self.inv.report.add(
            "BLOCKS_SHARED", f"blocks {start} + {length}", f"owned by {one} and {other}", repair
        )


_FREE_TREES = (Tree.FREE_BY_BLOCK, Tree.FREE_BY_LEN)


def _merged(runs: list[Run]) -> list[Run]:
    merged: list[Run] = []
    for start, length, refs in runs:
        if merged and merged[-1][2] == refs and merged[-1][0] + merged[-1][1] == start:
            start, length = merged[-1][0], merged[-1][1] + length
            merged.pop()
        merged.append((start, length, refs))
    return merged
