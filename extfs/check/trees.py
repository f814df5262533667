"""B+trees: a checked walk over all leaves, single lookups, and building one from sorted records.

Keys are handled as one integer, ``hi << 64 | lo``, which orders like the format's pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import lt

from extfs.check import layout
from extfs.check.layout import (
    BLOCK_SIZE,
    BRANCH_CODEC,
    MAX_HEIGHT,
    NODE_HEAD_SIZE,
    NODE_SLOT_MAX,
    RECORD_MAX,
    SLOT_CODEC,
    SLOT_SIZE,
    TREE_ROOT,
    Magic,
    Tree,
)
from extfs.check.report import Report
from extfs.check.volume import DamageError, Volume, new_block, seal

Slot = tuple[int, int, int, int, int]
"""Key hi, key lo, offset, length, reserved."""

KEY_END = 1 << 128
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Root:
    """Root of a tree as stored in the root block or an AG header."""

    block: int
    height: int
    records: int

    @classmethod
    def parse(cls, raw: bytes, offset: int = 0) -> Root:
        """Decode a tree_root_disk."""
        block, height, _reserved, records = TREE_ROOT.codec.unpack_from(raw, offset)
        return cls(block, height, records)

    def pack(self) -> bytes:
        """Encode."""
        return TREE_ROOT.codec.pack(self.block, self.height, 0, self.records)


EMPTY_ROOT = Root(0, 0, 0)


@dataclass
class Leaf:
    """One leaf that passed its checks."""

    block: int
    data: bytes
    slots: list[Slot]


def leaf_slots(data: bytes) -> list[Slot]:
    """Slots of a leaf, unchecked."""
    count = int.from_bytes(data[50:52], "little")
    return list(SLOT_CODEC.iter_unpack(data[NODE_HEAD_SIZE : NODE_HEAD_SIZE + count * SLOT_SIZE]))


def branch_slots(data: bytes) -> list[tuple[int, int, int]]:
    """(key hi, key lo, child) of a branch, unchecked."""
    count = int.from_bytes(data[50:52], "little")
    return list(BRANCH_CODEC.iter_unpack(data[NODE_HEAD_SIZE : NODE_HEAD_SIZE + count * SLOT_SIZE]))


def read_node(volume: Volume, block: int, tree: int, agno: int, level: int) -> bytes:
    """A node with header, level and count verified; raises `DamageError`."""
    data = volume.read_meta(block, Magic.NODE, layout.node_owner(tree, agno))
    found = int.from_bytes(data[48:50], "little")
    count = int.from_bytes(data[50:52], "little")
    if found != level:
        raise DamageError("NODE_LEVEL", block, f"level {found}, expected {level}")
    if not 1 <= count <= NODE_SLOT_MAX:
        raise DamageError("NODE_BOUNDS", block, f"{count} slots")
    return data


def _check_leaf(data: bytes, block: int, slots: list[Slot], size: int | None) -> None:
    heap = int.from_bytes(data[52:54], "little")
    dead = int.from_bytes(data[54:56], "little")
    if not NODE_HEAD_SIZE + len(slots) * SLOT_SIZE <= heap <= BLOCK_SIZE:
        raise DamageError("NODE_BOUNDS", block, f"records begin at {heap} of {len(slots)} slots")
    total = dead
    for _hi, _lo, offset, length, _reserved in slots:
        if length > RECORD_MAX or (size is not None and length != size):
            raise DamageError("RECORD_SHAPE", block, f"a record of {length} bytes")
        if length:
            if offset < heap or offset + length > BLOCK_SIZE or offset & 7:
                raise DamageError("NODE_BOUNDS", block, f"a record at {offset}, {length} bytes")
        elif offset:
            raise DamageError("NODE_BOUNDS", block, f"an empty record at {offset}")
        total += length
    if total != BLOCK_SIZE - heap:
        raise DamageError(
            "NODE_BOUNDS", block, f"records and dead bytes are {total}, not {BLOCK_SIZE - heap}"
        )
    places = sorted((slot[2], slot[3]) for slot in slots if slot[3])
    end = 0
    for offset, length in places:
        if offset < end:
            raise DamageError("NODE_BOUNDS", block, f"two records share the byte at {offset}")
        end = offset + length


@dataclass
class Walker:
    """Walks trees and tells the report what does not verify; remembers who owns which block."""

    volume: Volume
    report: Report
    nodes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Node block to (tree, AG number)."""
    damaged: set[tuple[int, int]] = field(default_factory=set)
    """(tree, AG number) of trees that could not be read whole."""
    progress: Callable[[int], None] | None = None
    repairs: dict[int, str] = field(default_factory=dict)
    """Tree to what repair does about damage in it."""

    def walk(self, root: Root, tree: int, agno: int = 0) -> Iterator[Leaf]:
        """All leaves that can be read, in key order. Damage is reported, its subtree left out."""
        where = f"{Tree(tree).title} tree" + (f" of AG {agno}" if tree >= 16 else "")
        if root.height == 0 and root.block == 0:
            if root.records:
                self._damage(tree, agno, "TREE_COUNT", where, f"empty, but {root.records} records")
            return
        if not 1 <= root.height <= MAX_HEIGHT:
            self._damage(tree, agno, "TREE_ROOT", where, f"height {root.height}")
            return
        count = 0
        for leaf in self._descend(root.block, root.height - 1, 0, KEY_END, tree, agno, where):
            count += len(leaf.slots)
            yield leaf
        if count != root.records and (tree, agno) not in self.damaged:
            self.report.add(
                "TREE_COUNT",
                where,
                f"the root counts {root.records} records, there are {count}",
                "set the count",
            )

    def _damage(self, tree: int, agno: int, code: str, where: str, text: str) -> None:
        self.damaged.add((tree, agno))
        self.report.add(code, where, text, self.repairs.get(tree, ""))

    def _descend(
        self, block: int, level: int, low: int, high: int, tree: int, agno: int, where: str
    ) -> Iterator[Leaf]:
        if not 0 < block < self.volume.super.total_blocks:
            self._damage(tree, agno, "META_RANGE", where, f"points to block {block}")
            return
        if block in self.nodes:
            self._damage(tree, agno, "NODE_SHARED", where, f"block {block} is part of a tree twice")
            return
        try:
            data = read_node(self.volume, block, tree, agno, level)
            if level == 0:
                leaf = self._leaf(data, block, low, high, tree)
            else:
                children = self._branch(data, block, low, high)
        except DamageError as damage:
            self._damage(tree, agno, damage.code, f"{where}, block {block}", damage.text)
            return
        self.nodes[block] = (tree, agno)
        if self.progress is not None:
            self.progress(1)
        if level == 0:
            yield leaf
            return
        for child_low, child_high, child in children:
            yield from self._descend(child, level - 1, child_low, child_high, tree, agno, where)

    @staticmethod
    def _leaf(data: bytes, block: int, low: int, high: int, tree: int) -> Leaf:
        slots = leaf_slots(data)
        keys = [slot[0] << 64 | slot[1] for slot in slots]
        if not all(map(lt, keys, keys[1:])):
            raise DamageError("NODE_ORDER", block, "keys are not in ascending order")
        if keys[0] < low or keys[-1] >= high:
            raise DamageError("NODE_RANGE", block, "keys outside what the parent says")
        _check_leaf(data, block, slots, layout.RECORD_SIZES[Tree(tree)])
        return Leaf(block, data, slots)

    @staticmethod
    def _branch(data: bytes, block: int, low: int, high: int) -> list[tuple[int, int, int]]:
        slots = branch_slots(data)
        keys = [slot[0] << 64 | slot[1] for slot in slots]
        if not all(map(lt, keys, keys[1:])):
            raise DamageError("NODE_ORDER", block, "keys are not in ascending order")
        if keys[0] != low or keys[-1] >= high:
            raise DamageError("NODE_RANGE", block, "keys outside what the parent says")
        if len(slots) < 2:
            raise DamageError("NODE_BOUNDS", block, "a branch with one child")
        keys.append(high)
        return [(keys[i], keys[i + 1], slot[2]) for i, slot in enumerate(slots)]


def records(volume: Volume, root: Root, tree: int, agno: int = 0) -> Iterator[tuple[int, bytes]]:
    """(key, record) of a whole tree that is known to be sound; raises `DamageError`."""
    yield from records_from(volume, root, tree, 0, agno)


def records_from(
    volume: Volume, root: Root, tree: int, start: int, agno: int = 0
) -> Iterator[tuple[int, bytes]]:
    """(key, record) from the first key at or above `start` on; raises `DamageError`."""
    if root.height == 0:
        return
    stack: list[tuple[int, int]] = [(root.block, root.height - 1)]
    while stack:
        block, level = stack.pop()
        if not 0 < block < volume.super.total_blocks:
            raise DamageError("META_RANGE", block, "outside the device")
        data = read_node(volume, block, tree, agno, level)
        if level:
            slots = branch_slots(data)
            keys = [slot[0] << 64 | slot[1] for slot in slots]
            first = max(bisect_right(keys, start) - 1, 0)
            stack += [(child, level - 1) for _hi, _lo, child in reversed(slots[first:])]
            continue
        for hi, lo, offset, length, _reserved in leaf_slots(data):
            key = hi << 64 | lo
            if key >= start:
                yield key, data[offset : offset + length]


# ---- building ----------------------------------------------------------------------------------

_BRANCH_FILL = 150
_LEAF_SPARE = 256


def _leaf_block(number: int, uuid: bytes, owner: int, entries: list[tuple[int, bytes]]) -> bytes:
    block = new_block(Magic.NODE, number, uuid, owner)
    heap = BLOCK_SIZE
    dead = 0
    at = NODE_HEAD_SIZE
    for key, record in entries:
        offset = 0
        if record:
            space = len(record) + 7 & ~7
            heap -= space
            dead += space - len(record)
            offset = heap
            block[offset : offset + len(record)] = record
        SLOT_CODEC.pack_into(block, at, key >> 64, key & MASK64, offset, len(record), 0)
        at += SLOT_SIZE
    for place, value in ((48, 0), (50, len(entries)), (52, heap), (54, dead)):
        block[place : place + 2] = value.to_bytes(2, "little")
    return seal(block, 0)


def _branch_block(
    number: int, uuid: bytes, owner: int, level: int, children: list[tuple[int, int]]
) -> bytes:
    block = new_block(Magic.NODE, number, uuid, owner)
    at = NODE_HEAD_SIZE
    for key, child in children:
        BRANCH_CODEC.pack_into(block, at, key >> 64, key & MASK64, child)
        at += SLOT_SIZE
    for place, value in ((48, level), (50, len(children))):
        block[place : place + 2] = value.to_bytes(2, "little")
    return seal(block, 0)


def _group_leaves(entries: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    group: list[tuple[int, bytes]] = []
    used = NODE_HEAD_SIZE
    for key, record in entries:
        need = SLOT_SIZE + (len(record) + 7 & ~7)
        if group and used + need > BLOCK_SIZE - (_LEAF_SPARE if need <= _LEAF_SPARE else 0):
            yield group
            group, used = [], NODE_HEAD_SIZE
        group.append((key, record))
        used += need
    if group:
        yield group


def build_size(records_: int, length: int) -> int:
    """Nodes that `build` makes of this many records of one length (at most 232 bytes)."""
    need = SLOT_SIZE + (length + 7 & ~7)
    total = level = -(-records_ // ((BLOCK_SIZE - _LEAF_SPARE - NODE_HEAD_SIZE) // need))
    while level > 1:
        level = -(-level // _BRANCH_FILL)
        total += level
    return total


def build(
    volume: Volume,
    tree: int,
    agno: int,
    entries: Iterable[tuple[int, bytes]],
    take: Callable[[], int],
    put: Callable[[int, bytes], None],
) -> Root:
    """Build a tree from records in key order; `take` gives free blocks, `put` gets the nodes."""
    owner = layout.node_owner(tree, agno)
    uuid = volume.super.uuid
    count = 0
    level: list[tuple[int, int]] = []
    for group in _group_leaves(entries):
        number = take()
        put(number, _leaf_block(number, uuid, owner, group))
        level.append((group[0][0] if level else 0, number))
        count += len(group)
    if not level:
        return EMPTY_ROOT
    height = 1
    while len(level) > 1:
        parts = -(-len(level) // _BRANCH_FILL)
        above: list[tuple[int, int]] = []
        for part in range(parts):
            some = level[len(level) * part // parts : len(level) * (part + 1) // parts]
            number = take()
            put(number, _branch_block(number, uuid, owner, height, some))
            above.append((some[0][0], number))
        level = above
        height += 1
    return Root(level[0][1], height, count)
