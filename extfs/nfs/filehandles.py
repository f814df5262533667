"""Filehandles (RFC 8881 4): which export, which inode, which generation of it.

On the wire: version, export id, inode, generation, and a MAC under the server's secret, so a client
has only the handles that it was given. They are persistent (FH4_PERSISTENT): the secret is
durable, an export's id is made of its path, and an inode number comes back only with another
generation. A handle does not say by which path it was found: as with the kernel's server, a file
that is moved out of an exported directory stays usable through the handles that exist.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import Filesystem, Stat
from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.exports import PRIVILEGED_PORTS, Export, Exports
from extfs.nfs.pseudo import PSEUDO, Node, PseudoTree

if TYPE_CHECKING:
    from extfs.nfs.attributes import Plan
    from extfs.nfs.compound import Compound

__all__ = [
    "Filehandle",
    "Filehandles",
    "admit",
    "check",
    "child",
    "named",
    "parent",
    "root",
    "stat",
]

_FORM = 1
_FIELDS = struct.Struct(">B3xIQI")
_MAC_BYTES = 8
_WIRE_BYTES = _FIELDS.size + _MAC_BYTES
_KEPT = 16384
_DEPTH_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Filehandle:
    """A filehandle, decoded. `wire`: what the client has."""

    export: Export
    ino: int
    generation: int
    wire: bytes

    @property
    def pseudo(self) -> bool:
        """A directory of the pseudo filesystem: it has no inode."""
        return self.export.pseudo


class Filehandles:
    """Makes and reads filehandles; keeps the last ones, as neither is cheap.

    `secret`: 16 to 64 bytes that outlive a restart and that nobody else knows.
    """

    def __init__(self, fs: Filesystem, exports: Exports, secret: bytes) -> None:
        self.fs = fs
        self.exports = exports
        self.pseudo = PseudoTree(exports)
        self.plans: dict[tuple[int, int, int, tuple[int, ...]], Plan] = {}
        """Of GETATTR; `attributes.plan` keeps them here, as they depend on the exports."""
        self._secret = secret
        self._by_wire: dict[bytes, Filehandle] = {}
        self._by_file: dict[tuple[int, int, int], Filehandle] = {}

    def _mac(self, fields: bytes) -> bytes:
        return hashlib.blake2b(fields, digest_size=_MAC_BYTES, key=self._secret).digest()

    def _keep(self, filehandle: Filehandle) -> Filehandle:
        if len(self._by_wire) >= _KEPT:
            self._by_wire.clear()
            self._by_file.clear()
        self._by_wire[filehandle.wire] = filehandle
        key = (filehandle.export.id, filehandle.ino, filehandle.generation)
        self._by_file[key] = filehandle
        return filehandle

    def make(self, export: Export, ino: int, generation: int) -> Filehandle:
        """The filehandle of a file as a member of an export."""
        known = self._by_file.get((export.id, ino, generation))
        if known is not None:
            return known
        fields = _FIELDS.pack(_FORM, export.id, ino, generation)
        return self._keep(Filehandle(export, ino, generation, fields + self._mac(fields)))

    def of_node(self, node: Node) -> Filehandle:
        """The filehandle of a directory of the pseudo filesystem."""
        return self.make(PSEUDO, node.ino, 0)

    def decode(self, wire: bytes) -> Filehandle:
        """NFS4ERR_BADHANDLE: not one of ours; NFS4ERR_STALE: of an export that is no more."""
        known = self._by_wire.get(wire)
        if known is not None:
            return known
        fields = wire[: _FIELDS.size]
        if len(wire) != _WIRE_BYTES or wire[_FIELDS.size :] != self._mac(fields):
            raise NfsError(n.NFS4ERR_BADHANDLE)
        form, export_id, ino, generation = _FIELDS.unpack(fields)
        if form != _FORM:
            raise NfsError(n.NFS4ERR_BADHANDLE)
        export = self.exports.by_id.get(export_id) if export_id else PSEUDO
        if export is None:
            raise NfsError(n.NFS4ERR_STALE)
        return self._keep(Filehandle(export, ino, generation, wire))


def admit(c: Compound, export: Export) -> None:
    """Whether this client may use an export, by its address and port; as the kernel's server says.

    NFS4ERR_STALE: no such export for this address. NFS4ERR_PERM: its port is not a privileged one.
    """
    if export.pseudo:
        return
    if not export.allows(c.connection.host):
        raise NfsError(n.NFS4ERR_STALE)
    if c.connection.port >= PRIVILEGED_PORTS and not export.rules.insecure:
        raise NfsError(n.NFS4ERR_PERM)


def check(c: Compound, filehandle: Filehandle) -> Filehandle:
    """A filehandle that came from the client: may it be used, and is its file still there?"""
    export = filehandle.export
    if export.pseudo:
        if c.service.filehandles.pseudo.node(filehandle.ino) is None:
            raise NfsError(n.NFS4ERR_STALE)
        return filehandle
    admit(c, export)
    c.service.fs.handle_check(filehandle.ino, filehandle.generation)
    return filehandle


def stat(c: Compound, filehandle: Filehandle) -> Stat:
    """Attributes of a file or a pseudo directory; NFS4ERR_STALE when it is gone."""
    if filehandle.export.pseudo:
        table = c.service.filehandles
        node = table.pseudo.node(filehandle.ino)
        if node is None:
            raise NfsError(n.NFS4ERR_STALE)
        return table.pseudo.stat(node)
    try:
        found = c.service.fs.getattr(filehandle.ino)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NfsError(n.NFS4ERR_STALE) from None
        raise
    if found.generation != filehandle.generation:
        raise NfsError(n.NFS4ERR_STALE)
    return found


def _entry(c: Compound, export: Export) -> Filehandle:
    """The directory of an export; NFS4ERR_NOENT when somebody has removed it."""
    admit(c, export)
    table = c.service.filehandles
    found = table.exports.root(export)
    if found is None:
        raise NfsError(n.NFS4ERR_NOENT)
    return table.make(export, *found)


def root(c: Compound) -> Filehandle:
    """The root filehandle: the export of "/", else the top of the pseudo filesystem."""
    table = c.service.filehandles
    whole = table.exports.whole()
    if whole is not None and whole.allows(c.connection.host):
        return _entry(c, whole)
    return table.of_node(table.pseudo.root)


def child(c: Compound, directory: Filehandle, found: Stat) -> Filehandle:
    """The filehandle of what a name in `directory`, a real one, leads to.

    The directory of another export belongs to that export: its rules count from there on.
    NFS4ERR_ACCESS: they do not admit this client.
    """
    table = c.service.filehandles
    export = table.exports.rooted_at(found.ino)
    if export is None or export is directory.export:
        return table.make(directory.export, found.ino, found.generation)
    if not export.allows(c.connection.host):
        raise NfsError(n.NFS4ERR_ACCESS)
    return _entry(c, export)


def named(c: Compound, directory: Filehandle, name: bytes) -> Filehandle:
    """What a name in a pseudo directory leads to. NFS4ERR_NOENT."""
    table = c.service.filehandles
    node = table.pseudo.node(directory.ino)
    if node is None:
        raise NfsError(n.NFS4ERR_STALE)
    children = table.pseudo.children(node, c.connection.host)
    found = children.get(name.decode(errors="surrogateescape"))
    if found is None:
        raise NfsError(n.NFS4ERR_NOENT)
    return _entry(c, found) if isinstance(found, Export) else table.of_node(found)


def parent(c: Compound, directory: Filehandle, found: Stat) -> Filehandle:
    """The directory that holds `directory`. NFS4ERR_NOENT: it is the root of all.

    Nothing above an export's directory is reached through it, also when the directory was moved.
    """
    table = c.service.filehandles
    host = c.connection.host
    export = directory.export
    if export.pseudo:
        node = table.pseudo.node(directory.ino)
        above = table.pseudo.above(node.path, host) if node is not None else None
    elif table.exports.rooted_at(directory.ino) is export:
        above = table.pseudo.above(export.path, host)
    else:
        above = export
    if above is None:
        raise NfsError(n.NFS4ERR_NOENT)
    if isinstance(above, Node):
        return table.of_node(above)
    if export.pseudo:
        raise NfsError(n.NFS4ERR_STALE)  # an export encloses it now
    admit(c, above)
    _require_inside(c, above, found.parent)
    up = c.service.fs.getattr(found.parent)
    return table.make(above, up.ino, up.generation)


def _require_inside(c: Compound, export: Export, ino: int) -> None:
    """NFS4ERR_STALE when a directory is not below the export's directory any more."""
    fs = c.service.fs
    top = c.service.exports.root(export)
    for _ in range(_DEPTH_MAX):
        if top is not None and ino == top[0]:
            return
        above = fs.getattr(ino).parent
        if above in (0, ino):
            break
        ino = above
    raise NfsError(n.NFS4ERR_STALE)
