"""Who may still reach which blocks: holders, what they were told, staged blocks, the quarantine.

Four things must agree. An exposure belongs to a holder that has a record, and names blocks that the
file still maps at that place, in the fork that it says (a commit may since have moved them from the
staging fork to the data fork). Staged blocks belong to somebody who will finish or free them: an
exposure, or an intent. A run in quarantine names a holder that has a record, or everybody.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import Any

from extfs.check import layout
from extfs.check.inventory import Inventory
from extfs.check.layout import ExposureFlag, Tree

Mapped = tuple[int, int, int, int]
"""Fork, file block, device block, blocks."""


class Holders:
    """The pass over TREE_HOLDER, TREE_EXPOSURE, and what they say about extents and quarantine."""

    def __init__(self, inventory: Inventory) -> None:
        self.inv = inventory
        self.exposures: dict[int, list[dict[str, Any]]] = defaultdict(list)
        """Of unwritten blocks, by inode; ``file`` is the first file block."""

    def read(self) -> None:
        """Read the exposures; the other small trees have been read."""
        inv = self.inv
        for leaf in inv.walker.walk(inv.roots[Tree.EXPOSURE], Tree.EXPOSURE):
            for hi, lo, offset, _length, _reserved in leaf.slots:
                values = layout.EXPOSURE.unpack(leaf.data, offset)
                where = f"exposure {hi}/{lo:#x}"
                if self._shape(lo, values):
                    inv.report.add("EXPOSURE_SHAPE", where, self._shape(lo, values))
                elif values["holder"] not in inv.holders:
                    inv.report.add(
                        "EXPOSURE_HOLDER", where, f"holder {values['holder']} has no record"
                    )
                if not lo & layout.EXPOSURE_INODE:
                    values["file"] = lo
                    self.exposures[hi].append(values)
                    inv.watched_extents.setdefault(hi, [])

    def _shape(self, lo: int, values: dict[str, Any]) -> str:
        """What is wrong with a record as such."""
        flags, block, length = values["flags"], values["block"], values["length"]
        if flags & ~int(ExposureFlag.STAGING | ExposureFlag.INODE | ExposureFlag.RW):
            return f"flags {flags:#x}"
        if lo & layout.EXPOSURE_INODE:
            if not flags & ExposureFlag.INODE or block or length:
                return f"of an inode, with flags {flags:#x}, blocks {block} + {length}"
            if lo & ~layout.EXPOSURE_INODE != values["holder"]:
                return f"of holder {values['holder']} under another's key"
            return ""
        if flags & (ExposureFlag.INODE | ExposureFlag.RW):
            return f"of blocks, with flags {flags:#x}"
        if not length or not block or block + length > self.inv.volume.super.total_blocks:
            return f"blocks {block} + {length}"
        if lo + length > layout.FILE_MAX_BLOCKS:
            return f"file blocks {lo} + {length}"
        return ""

    def check(self) -> None:
        """Compare with the extents, which have been read."""
        if self.inv.has_damage(Tree.EXTENT):
            return
        for ino, exposures in self.exposures.items():
            mapped = sorted(self.inv.watched_extents.get(ino, []))
            end = 0
            for exposure in exposures:
                if exposure["file"] < end:
                    self._say(ino, exposure, "overlaps another")
                end = exposure["file"] + exposure["length"]
                if not self._is_mapped(mapped, exposure):
                    self._say(ino, exposure, "the file does not map these blocks there")
        self._check_staged()
        self._check_quarantine()

    def _say(self, ino: int, exposure: dict[str, Any], text: str) -> None:
        blocks = f"blocks {exposure['block']} + {exposure['length']}"
        where = f"inode {ino}, file block {exposure['file']}"
        self.inv.report.add(
            "EXPOSURE_MAP", where, f"{blocks} of holder {exposure['holder']}: {text}"
        )

    @staticmethod
    def _is_mapped(mapped: list[Mapped], exposure: dict[str, Any]) -> bool:
        """Is every block of it where it says, in either fork if it was staged?"""
        forks = (0, 1) if exposure["flags"] & ExposureFlag.STAGING else (0,)
        at, end = exposure["file"], exposure["file"] + exposure["length"]
        while at < end:
            want = exposure["block"] + at - exposure["file"]
            for fork in forks:
                place = bisect_right(mapped, (fork, at, 1 << 64, 0)) - 1
                if place < 0:
                    continue
                found, file, block, length = mapped[place]
                if found == fork and file <= at < file + length and block + at - file == want:
                    at = file + length
                    break
            else:
                return False
        return True

    def _check_staged(self) -> None:
        """Every staged block has somebody who will take it away."""
        owners: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for intent in self.inv.intents.values():
            kind = layout.INTENT_TYPES.get(intent["type"])
            if kind == "atomic" or (kind == "punch" and intent["flags"] & layout.INTENT_STAGING):
                owners[intent["ino"]].append((intent["a"], intent["b"]))
        for ino, exposures in self.exposures.items():
            owners[ino] += [
                (e["file"], e["file"] + e["length"])
                for e in exposures
                if e["flags"] & ExposureFlag.STAGING
            ]
        for ino, extents in self.inv.staged_extents.items():
            if ino in self.inv.orphans:
                continue
            for file, length in extents:
                at = file
                for start, end in sorted(owners[ino]):
                    if start <= at < end:
                        at = end
                if at < file + length:
                    self.inv.report.add(
                        "STAGED_BLOCKS",
                        f"inode {ino}, file block {at}",
                        "staged for nobody: no intent and no exposure names them",
                    )

    def _check_quarantine(self) -> None:
        for start, holder in self.inv.quarantine_holders:
            if holder != layout.QUARANTINE_ANY and holder not in self.inv.holders:
                self.inv.report.add(
                    "QUARANTINE_HOLDER", f"quarantine {start}", f"holder {holder} has no record"
                )
