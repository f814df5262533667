"""Breaking an image on purpose: one field at a time, the checksum fixed up again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from extfs.check import layout
from extfs.check.layout import BLOCK_SIZE, INODE, ROOT, SLOT_CODEC, Structure, Tree
from extfs.check.trees import Root, leaf_slots, read_node
from extfs.check.volume import Volume, seal


class Surgeon:
    """Edits of an image that is not mounted and whose journal is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Volume(path, exclusive=False) as volume:
            volume.load_super()
            self.super = volume.super

    def read(self, number: int) -> bytearray:
        with open(self.path, "rb") as image:
            return bytearray(os.pread(image.fileno(), BLOCK_SIZE, number * BLOCK_SIZE))

    def write(self, number: int, block: bytes | bytearray, *, fix: bool = True) -> None:
        if fix:
            block = seal(bytearray(block), int.from_bytes(block[32:40], "little"))
        with open(self.path, "r+b") as image:
            os.pwrite(image.fileno(), block, number * BLOCK_SIZE)

    def flip(self, number: int, offset: int = 2000) -> None:
        """Change one byte and leave the checksum wrong."""
        block = self.read(number)
        block[offset] ^= 0xFF
        self.write(number, block, fix=False)

    def set_fields(self, number: int, structure: Structure, **fields: Any) -> None:
        """Change fields of a metadata block."""
        block = self.read(number)
        structure.pack_into(block, 0, structure.unpack(block) | fields)
        self.write(number, block)

    def fields(self, number: int, structure: Structure) -> dict[str, Any]:
        return structure.unpack(self.read(number))

    def tree_root(self, tree: Tree, agno: int = 0) -> Root:
        if tree < layout.TREE_ROOT_COUNT:
            return Root.parse(self.fields(layout.ROOT_BLOCK, ROOT)["trees"], int(tree) * 24)
        header = self.fields(self.super.ag_header(agno), layout.AG)
        return Root.parse(header["by_block" if tree == Tree.FREE_BY_BLOCK else "by_len"])

    def leaves(self, tree: Tree, agno: int = 0) -> Iterator[tuple[int, bytes]]:
        """(block, content) of all leaves."""
        root = self.tree_root(tree, agno)
        with Volume(self.path, exclusive=False) as volume:
            volume.load_super()
            level = [root.block] if root.height else []
            for depth in range(root.height - 1, 0, -1):
                nodes = [read_node(volume, block, tree, agno, depth) for block in level]
                level = [
                    int.from_bytes(node[64 + 24 * slot + 16 : 64 + 24 * slot + 24], "little")
                    for node in nodes
                    for slot in range(int.from_bytes(node[50:52], "little"))
                ]
            for block in level:
                yield block, read_node(volume, block, tree, agno, 0)

    def find(
        self, tree: Tree, wanted: Callable[[int, int, bytes], bool], agno: int = 0
    ) -> tuple[int, int, int, bytes]:
        """(block, slot, record offset, record) of the first record for which wanted(hi, lo, it)."""
        for block, content in self.leaves(tree, agno):
            for number, (hi, lo, offset, length, _reserved) in enumerate(leaf_slots(content)):
                record = content[offset : offset + length]
                if wanted(hi, lo, record):
                    return block, number, offset, record
        raise LookupError(tree)

    def edit(
        self,
        tree: Tree,
        wanted: Callable[[int, int, bytes], bool],
        change: Callable[[bytearray], None],
    ) -> None:
        """Change a record in place."""
        block, _slot, offset, record = self.find(tree, wanted)
        changed = bytearray(record)
        change(changed)
        assert len(changed) == len(record)
        content = self.read(block)
        content[offset : offset + len(record)] = changed
        self.write(block, content)

    def edit_inode(self, ino: int, **fields: Any) -> None:
        def change(record: bytearray) -> None:
            INODE.pack_into(record, 0, INODE.unpack(record) | fields)

        self.edit(Tree.INODE, lambda hi, _lo, _record: hi == ino, change)

    def inode(self, ino: int) -> dict[str, Any]:
        record = self.find(Tree.INODE, lambda hi, _lo, _record: hi == ino)[3]
        return INODE.unpack(record)

    def edit_key(
        self, tree: Tree, wanted: Callable[[int, int, bytes], bool], hi: int, lo: int
    ) -> None:
        """Change a record's key, keeping its place."""
        block, slot, _offset, _record = self.find(tree, wanted)
        content = self.read(block)
        at = 64 + slot * 24
        values = SLOT_CODEC.unpack_from(content, at)
        SLOT_CODEC.pack_into(content, at, hi, lo, *values[2:])
        self.write(block, content)

    def remove(self, tree: Tree, wanted: Callable[[int, int, bytes], bool]) -> None:
        """Take a record out of its leaf, and out of the tree's count."""
        block, slot, _offset, record = self.find(tree, wanted)
        content = self.read(block)
        count = int.from_bytes(content[50:52], "little")
        dead = int.from_bytes(content[54:56], "little")
        assert count > 1, "a leaf is never empty"
        slots = content[64 : 64 + 24 * count]
        del slots[24 * slot : 24 * slot + 24]
        content[64 : 64 + 24 * count] = slots + bytes(24)
        content[50:52] = (count - 1).to_bytes(2, "little")
        content[54:56] = (dead + len(record)).to_bytes(2, "little")
        self.write(block, content)
        trees = bytearray(self.fields(layout.ROOT_BLOCK, ROOT)["trees"])
        root = self.tree_root(tree)
        trees[tree * 24 : tree * 24 + 24] = Root(root.block, root.height, root.records - 1).pack()
        self.set_fields(layout.ROOT_BLOCK, ROOT, trees=bytes(trees))
