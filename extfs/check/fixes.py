"""What repair is going to change: collected while checking, carried out by ``repair``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from extfs.check.layout import Tree


@dataclass
class Fixes:
    """Changes that need no guess. Keys of records are ``hi << 64 | lo``."""

    supers: bool = False
    heartbeat: bool = False
    headers: bool = False
    root: bool = False
    """The root block's counters or record counts change."""
    refcounts: bool = False
    ags: set[int] = field(default_factory=set)
    """AGs whose header and free trees are built anew."""
    inodes: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """Inode number to fields that change."""
    remove: dict[Tree, set[int]] = field(default_factory=lambda: defaultdict(set))
    add: dict[Tree, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    replace: dict[Tree, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    """New content of records, of the same length."""
    entries: list[tuple[int, bytes, int, int]] = field(default_factory=list)
    """Directory entries to add: directory, name, inode, DT_* type."""
    reconnect: list[int] = field(default_factory=list)
    """Inodes without a name that get one in lost+found."""

    @property
    def metadata(self) -> bool:
        """Whether trees, root or AGs change."""
        return bool(
            self.root
            or self.refcounts
            or self.ags
            or self.inodes
            or self.reconnect
            or self.entries
            or any(self.remove.values())
            or any(self.add.values())
            or any(self.replace.values())
        )

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.metadata or self.supers or self.heartbeat or self.headers
