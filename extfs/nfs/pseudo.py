"""The pseudo filesystem (RFC 8881 7.3): directories that lead to the exports.

It is read-only, made of the exports' paths, and shows each client only what leads to an export
that this client may use. Nodes have no inodes; their numbers are made of their paths, so their
filehandles outlive a restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from extfs.core import Stat
from extfs.nfs.exports import Export, ExportError, Exports, Rules

__all__ = ["PSEUDO", "Node", "PseudoTree"]

PSEUDO = Export(0, "", Rules(read_only=True, insecure=True), pseudo=True)
ROOT_NODE = 1
_MODE = 0o040555


@dataclass(frozen=True, slots=True)
class Node:
    """A directory of the pseudo filesystem; an export's own path has one too, to be mounted on."""

    ino: int
    path: str


def _number(path: str) -> int:
    """Of a node: above every inode of the filesystem, which counts from 1."""
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2 | 1 << 62


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _below(path: str, directory: str) -> bool:
    return path != directory and (directory == "/" or path.startswith(directory + "/"))


class PseudoTree:
    """The nodes, and which of them a host sees."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._by_path: dict[str, Node] = {"/": Node(ROOT_NODE, "/")}
        self._by_ino: dict[int, Node] = {ROOT_NODE: self._by_path["/"]}
        for export in exports.all:
            path = export.path
            while path not in self._by_path:
                self._add(Node(_number(path), path))
                path = _parent(path)
        what = repr([(export.path, export.rules) for export in exports.all]).encode()
        digest = hashlib.blake2b(what, digest_size=8).digest()
        self._change = int.from_bytes(digest, "big")
        self._created = exports.fs.super.created_sec

    def _add(self, node: Node) -> None:
        if node.ino in self._by_ino:
            raise ExportError(f"{node.path} and {self._by_ino[node.ino].path} have the same number")
        self._by_path[node.path] = self._by_ino[node.ino] = node

    @property
    def root(self) -> Node:
        """The top."""
        return self._by_path["/"]

    def node(self, ino: int) -> Node | None:
        """The node of a filehandle; None: the exports have changed, it is gone."""
        return self._by_ino.get(ino)

    def children(self, node: Node, host: str) -> dict[str, Node | Export]:
        """What a host sees in a directory, by name, in the order of the names."""
        found: dict[str, Node | Export] = {}
        prefix = "/" if node.path == "/" else node.path + "/"
        for export in self._exports.all:
            if not _below(export.path, node.path) or not export.allows(host):
                continue
            name, _, rest = export.path[len(prefix) :].partition("/")
            if not rest:
                found[name] = export
            elif name not in found:
                found[name] = self._by_path[prefix + name]
        return dict(sorted(found.items()))

    def listing(self, node: Node, host: str) -> list[tuple[int, bytes]]:
        """Cookies and names of what a host sees in a directory, in the order of the cookies."""
        prefix = "/" if node.path == "/" else node.path + "/"
        return sorted(
            (self._by_path[prefix + name].ino, name.encode(errors="surrogateescape"))
            for name in self.children(node, host)
        )

    def above(self, path: str, host: str) -> Node | Export | None:
        """What holds the directory at `path` for a host; None for the root.

        An export that encloses it, if the host may use it: there the parent is an ordinary inode.
        """
        if path == "/":
            return None
        parent = _parent(path)
        for export in reversed(self._exports.all):  # the longest path first, of those that enclose
            if (export.path == parent or _below(parent, export.path)) and export.allows(host):
                return export
        return self._by_path[parent]

    def mounted_on(self, export: Export, host: str) -> int | None:
        """Number of the node that an export hides; None where an export encloses it."""
        if isinstance(self.above(export.path, host), Node):
            return self._by_path[export.path].ino
        return None

    def layout_types(self, host: str) -> tuple[int, ...]:
        """LAYOUT4_* that some export offers that this host may use: clients ask the root first."""
        types = {export.layout_type(host) for export in self._exports.all if export.allows(host)}
        return tuple(sorted(types - {0}))

    def stat(self, node: Node) -> Stat:
        """Attributes; `size` in entries, as of any directory."""
        names = {
            export.path[len(node.path) :].lstrip("/").partition("/")[0]
            for export in self._exports.all
            if _below(export.path, node.path)
        }
        return Stat(
            ino=node.ino,
            generation=0,
            mode=_MODE,
            uid=0,
            gid=0,
            nlink=2 + len(names),
            flags=0,
            size=len(names),
            blocks=0,
            atime=self._created,
            mtime=self._created,
            ctime=self._created,
            btime=self._created,
            atime_ns=0,
            mtime_ns=0,
            ctime_ns=0,
            btime_ns=0,
            rdev=0,
            parent=0,
            change=self._change,
            subdirs=len(names),
            xattrs=0,
        )
