"""The oracle: a POSIX filesystem in plain Python objects, with the errors it would give.

Contents are immutable ``bytes``, so a snapshot of the whole state is cheap; nothing here knows
about blocks.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

NAME_MAX = 255


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The operation fails with this errno and changes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.number = number


@dataclass(eq=False)
class Node:
    """A file of any type. ``parent`` is kept for directories."""

    mode: int
    ino: int = 0
    nlink: int = 1
    content: bytes = b""
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    entries: dict[bytes, Node] = field(default_factory=dict)
    parent: Node | None = None

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def size(self) -> int:
        """What stat reports; for directories nothing is promised."""
        return len(self.target) if stat.S_ISLNK(self.mode) else len(self.content)


State = dict[int, tuple[object, ...]]
"""What a crash must preserve, by inode number: see ``describe``."""


def describe(node: Node) -> tuple[object, ...]:
    """A node's metadata as a value that compares equal exactly when nothing visible differs."""
    return (
        node.mode,
        node.nlink,
        0 if node.is_dir else node.size,
        node.target,
        frozenset(node.xattrs.items()),
        frozenset((name, child.ino) for name, child in node.entries.items()),
    )


class Model:
    """The tree below one root directory."""

    def __init__(self, root_ino: int = 1) -> None:
        self.root = Node(stat.S_IFDIR | 0o755, ino=root_ino, nlink=2)
        self.root.parent = self.root

    def walk(self) -> Iterator[Node]:
        """Every reachable node once; directories before what they hold."""
        seen: set[int] = set()
        queue = [self.root]
        while queue:
            node = queue.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            queue.extend(node.entries[name] for name in sorted(node.entries))

    def state(self) -> State:
        return {node.ino: describe(node) for node in self.walk()}

    def path(self, node: Node) -> list[bytes]:
        """Names that lead from the root to a node."""
        if node is self.root:
            return []
        for directory in self.walk():
            for name, child in directory.entries.items():
                if child is node:
                    return [*self.path(directory), name]
        raise LookupError("the node has no name")

    # ---- names ----

    def _free(self, directory: Node, name: bytes) -> None:
        if not 0 < len(name) <= NAME_MAX:
            raise Refused(errno.ENAMETOOLONG)
        if name in directory.entries:
            raise Refused(errno.EEXIST)

    def _find(self, directory: Node, name: bytes) -> Node:
        if name not in directory.entries:
            raise Refused(errno.ENOENT)
        return directory.entries[name]

    def add(self, directory: Node, name: bytes, mode: int, target: bytes = b"") -> Node:
        self._free(directory, name)
        node = Node(mode, target=target, parent=directory)
        if node.is_dir:
            node.nlink = 2
            directory.nlink += 1
        directory.entries[name] = node
        return node

    def link(self, node: Node, directory: Node, name: bytes) -> None:
        if node.is_dir:
            raise Refused(errno.EPERM)
        self._free(directory, name)
        directory.entries[name] = node
        node.nlink += 1

    def unlink(self, directory: Node, name: bytes) -> Node:
        node = self._find(directory, name)
        if node.is_dir:
            raise Refused(errno.EISDIR)
        del directory.entries[name]
        node.nlink -= 1
        return node

    def rmdir(self, directory: Node, name: bytes) -> Node:
        node = self._find(directory, name)
        if not node.is_dir:
            raise Refused(errno.ENOTDIR)
        if node.entries:
            raise Refused(errno.ENOTEMPTY)
        del directory.entries[name]
        directory.nlink -= 1
        node.nlink = 0
        return node

    def is_below(self, node: Node, ancestor: Node) -> bool:
        """Is it that directory, or a directory somewhere in it?"""
        while node is not self.root:
            if node is ancestor:
                return True
            assert node.parent is not None
            node = node.parent
        return node is ancestor

    def rename(
        self, old: Node, name: bytes, new: Node, new_name: bytes, *, noreplace: bool, exchange: bool
    ) -> None:
        node = self._find(old, name)
        other = new.entries.get(new_name)
        if exchange and other is None:
            raise Refused(errno.ENOENT)
        if noreplace and other is not None:
            raise Refused(errno.EEXIST)
        if node.is_dir and self.is_below(new, node):
            raise Refused(errno.EINVAL)
        if other is node:
            return
        if exchange:
            assert other is not None
            if other.is_dir and self.is_below(old, other):
                raise Refused(errno.EINVAL)
            self._place(old, name, other)
            self._place(new, new_name, node)
            old.nlink += other.is_dir - node.is_dir
            new.nlink += node.is_dir - other.is_dir
            return
        if other is not None:
            self._replace(node, new, new_name, other)
        del old.entries[name]
        self._place(new, new_name, node)
        old.nlink -= node.is_dir
        new.nlink += node.is_dir

    def _replace(self, node: Node, directory: Node, name: bytes, other: Node) -> None:
        if node.is_dir and not other.is_dir:
            raise Refused(errno.ENOTDIR)
        if not node.is_dir and other.is_dir:
            raise Refused(errno.EISDIR)
        if other.is_dir:
            self.rmdir(directory, name)
        else:
            self.unlink(directory, name)

    def _place(self, directory: Node, name: bytes, node: Node) -> None:
        directory.entries[name] = node
        if node.is_dir:
            node.parent = directory

    # ---- contents ----

    @staticmethod
    def write(node: Node, offset: int, content: bytes) -> None:
        old = node.content.ljust(offset, b"\0") if content else node.content
        node.content = old[:offset] + content + old[offset + len(content) :]

    @staticmethod
    def truncate(node: Node, size: int) -> None:
        node.content = node.content[:size].ljust(size, b"\0")

    @classmethod
    def fallocate(cls, node: Node, offset: int, length: int, mode: str) -> None:
        """Modes: allocate, keep, punch, zero, zero-keep."""
        end = offset + length
        if mode in ("allocate", "zero") and end > len(node.content):
            cls.truncate(node, end)
        if mode in ("punch", "zero", "zero-keep"):
            end = min(end, len(node.content))
            if offset < end:
                cls.write(node, offset, bytes(end - offset))

    @classmethod
    def copy(cls, source: Node, offset: int, node: Node, to: int, length: int) -> int:
        """Copied bytes; overlapping ranges of one file are refused."""
        length = max(0, min(length, len(source.content) - offset))
        if length and source is node and offset < to + length and to < offset + length:
            raise Refused(errno.EINVAL)
        cls.write(node, to, source.content[offset : offset + length])
        return length

    # ---- attributes ----

    @staticmethod
    def removexattr(node: Node, name: bytes) -> None:
        if name not in node.xattrs:
            raise Refused(errno.ENODATA)
        del node.xattrs[name]
