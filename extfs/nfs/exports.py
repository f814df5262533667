"""Exports: which directories clients see, who they may be, and what they may do there.

The words are those of exports(5) where it has them. Nothing is open that was not asked for: an
export without networks is for this machine only, root is squashed, and requests must come from a
privileged port.

An export's id is made of its path, so filehandles outlive a restart with other exports beside it.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from extfs.core import Filesystem
from extfs.nfs import constants as n

__all__ = [
    "LOOPBACK",
    "Export",
    "ExportError",
    "Exports",
    "Network",
    "Rules",
    "Squash",
    "clean_path",
    "export_id",
    "parse_export",
    "parse_networks",
]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK: tuple[Network, ...] = (
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv6Network("::1/128"),
)
NOBODY = 65534
PRIVILEGED_PORTS = 1024
_ID_MAX = 0xFFFFFFFE
_DIRECTORY = 0o040000
_HOSTS_KEPT = 4096


class ExportError(ValueError):
    """An export cannot be served as it is written; the message says what is wrong with it."""


class Squash(enum.Enum):
    """Whose ids become the anonymous ones."""

    ROOT = "root_squash"
    NONE = "no_root_squash"
    ALL = "all_squash"


@dataclass(frozen=True, slots=True)
class Rules:
    """What an export allows. `layouts`: networks whose hosts reach the disk; empty: nobody's do.

    `layout_type`: LAYOUT4_*, of the layouts that these hosts get.
    """

    networks: tuple[Network, ...] = LOOPBACK
    read_only: bool = True
    squash: Squash = Squash.ROOT
    anonuid: int = NOBODY
    anongid: int = NOBODY
    insecure: bool = False
    layouts: tuple[Network, ...] = ()
    layout_type: int = n.LAYOUT4_BLOCK_VOLUME


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A directory that clients see. `path`: in the filesystem, absolute, no slash at its end.

    Equal only to itself: it is a key of tables. What depends on a client's address is looked up
    here, by the address as text, and kept.
    """

    id: int
    path: str
    rules: Rules = Rules()
    pseudo: bool = False
    _allowed: dict[str, bool] = field(default_factory=dict, repr=False)
    _layouts: dict[str, bool] = field(default_factory=dict, repr=False)

    def allows(self, host: str) -> bool:
        """Whether requests from this address are served."""
        known = self._allowed.get(host)
        return _remember(self._allowed, host, self.rules.networks) if known is None else known

    def offers_layouts(self, host: str) -> bool:
        """Whether a client at this address may have layouts: it says it sees the disk."""
        known = self._layouts.get(host)
        return _remember(self._layouts, host, self.rules.layouts) if known is None else known

    def layout_type(self, host: str) -> int:
        """LAYOUT4_* of the layouts that a client at this address may have; 0: none."""
        return self.rules.layout_type if self.offers_layouts(host) else 0


def _remember(known: dict[str, bool], host: str, networks: tuple[Network, ...]) -> bool:
    if len(known) >= _HOSTS_KEPT:
        known.clear()
    known[host] = inside = _inside(host, networks)
    return inside


def _inside(host: str, networks: tuple[Network, ...]) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def export_id(path: str) -> int:
    """The number that stands for a path in filehandles and in fsid: 1 to 2^32 - 2."""
    digest = hashlib.blake2b(path.encode(), digest_size=8, person=b"extfs export").digest()
    return int.from_bytes(digest, "big") % _ID_MAX + 1


def clean_path(path: str) -> str:
    """The path of an export in its one form. `ExportError`: not absolute, or with "." or ".."."""
    if not path.startswith("/"):
        raise ExportError(f"export {path!r}: the path must start with /")
    names = [name for name in path.split("/") if name]
    for name in names:
        if name in (".", ".."):
            raise ExportError(f"export {path!r}: the path must not contain {name!r}")
        if len(name.encode(errors="surrogateescape")) > 255 or "\0" in name:
            raise ExportError(f"export {path!r}: no directory can have such a name")
    return "/" + "/".join(names)


def parse_networks(texts: Iterable[str], where: str) -> tuple[Network, ...]:
    """Networks or addresses. `ExportError`: not one; `where` begins the message."""
    networks = []
    for text in texts:
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ExportError(f"{where}: {error} (host names are not supported)") from None
    return tuple(networks)


def _anonymous(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 0xFFFFFFFE:
        raise ExportError("is to be a number from 0 to 4294967294")
    return int(text)


_LAYOUT_TYPES = {"block": n.LAYOUT4_BLOCK_VOLUME, "scsi": n.LAYOUT4_SCSI}


def _with_layouts(rules: Rules, text: str) -> Rules:
    kind, at, where = text.partition("@")
    if kind == "none" and not at:
        return replace(rules, layouts=())
    if kind not in _LAYOUT_TYPES:
        raise ExportError("is to be none, block, scsi, or one of these two and @NETWORK+NETWORK...")
    networks = parse_networks(where.split("+"), "layouts") if at else rules.networks
    return replace(rules, layouts=networks, layout_type=_LAYOUT_TYPES[kind])


_FLAGS: Mapping[str, Callable[[Rules], Rules]] = {
    "ro": lambda rules: replace(rules, read_only=True),
    "rw": lambda rules: replace(rules, read_only=False),
    "secure": lambda rules: replace(rules, insecure=False),
    "insecure": lambda rules: replace(rules, insecure=True),
    "root_squash": lambda rules: replace(rules, squash=Squash.ROOT),
    "no_root_squash": lambda rules: replace(rules, squash=Squash.NONE),
    "all_squash": lambda rules: replace(rules, squash=Squash.ALL),
}
_OPPOSITES = (
    ("ro", "rw"),
    ("secure", "insecure"),
    ("root_squash", "no_root_squash", "all_squash"),
)
_VALUES = ("anonuid", "anongid", "layouts", "sec")


def _parse_option(rules: Rules, option: str, layouts: list[str]) -> Rules:
    flag = _FLAGS.get(option)
    if flag is not None:
        return flag(rules)
    name, equals, value = option.partition("=")
    if name == "layouts" and equals:
        layouts.append(value)
        return rules
    if name == "anonuid" and equals:
        return replace(rules, anonuid=_anonymous(value))
    if name == "anongid" and equals:
        return replace(rules, anongid=_anonymous(value))
    if name == "sec" and equals:
        if value != "sys":
            raise ExportError("only sys is supported")
        return rules
    raise ExportError("no such option")


def _looks_like_network(option: str) -> bool:
    return "=" not in option and ("." in option or ":" in option or option[:1].isdigit())


def _check_opposites(options: list[str], where: str) -> None:
    for group in _OPPOSITES:
        given = [option for option in group if option in options]
        if len(given) > 1:
            raise ExportError(f"{where}: {' and '.join(given)} exclude each other")
    names = [option.partition("=")[0] for option in options if not _looks_like_network(option)]
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"{where}: {name} is given twice")


def parse_export(text: str) -> Export:
    """An export as ``PATH[:option,option,...]``; the path ends at the first colon.

    Options: networks and addresses of clients (default: loopback); ro (default) or rw; root_squash
    (default), no_root_squash, all_squash; anonuid=N, anongid=N (65534); secure (default: client
    ports below 1024 only) or insecure; sec=sys; layouts=none (default), layouts=block or
    layouts=scsi (all the export's networks), or one of these with @NETWORK+NETWORK behind it.
    `ExportError` names what is wrong.
    """
    path, _, rest = text.partition(":")
    path = clean_path(path)
    where = f"export {path}"
    options = [option.strip() for option in rest.split(",")] if rest else []
    if "" in options:
        raise ExportError(f"{where}: an empty option")
    _check_opposites(options, where)
    networks = parse_networks(filter(_looks_like_network, options), where)
    rules = Rules(networks=networks or LOOPBACK)
    layouts: list[str] = []
    for option in options:
        if _looks_like_network(option):
            continue
        try:
            rules = _parse_option(rules, option, layouts)
        except ExportError as error:
            raise ExportError(f"{where}: {option}: {error}") from None
    for option in layouts:
        try:
            rules = _with_layouts(rules, option)
        except ExportError as error:
            raise ExportError(f"{where}: layouts={option}: {error}") from None
    return Export(export_id(path), path, rules)


class Exports:
    """The exports of one filesystem, with the inodes of their directories.

    A directory is found by its path when the server starts, and from then on it is followed as an
    inode: renamed, it stays exported; removed, its path is looked up again.
    """

    def __init__(self, fs: Filesystem, exports: Iterable[Export]) -> None:
        self.fs = fs
        self.all = sorted(exports, key=lambda export: export.path)
        self.by_id: dict[int, Export] = {}
        self.fsid_major = int.from_bytes(fs.super.uuid[:8], "big")
        """fsid4.major of all of them; minor is the export's id, 0 for the pseudo filesystem."""
        self._roots: dict[int, tuple[int, int]] = {}
        self._crossings: dict[int, Export] = {}
        for export in self.all:
            other = self.by_id.get(export.id)
            if other is not None and other.path == export.path:
                raise ExportError(f"export {export.path} is given twice")
            if other is not None:
                raise ExportError(f"exports {other.path} and {export.path} have the same id")
            self.by_id[export.id] = export
            if self.root(export) is None:
                raise ExportError(f"export {export.path}: there is no such directory")

    def root(self, export: Export) -> tuple[int, int] | None:
        """Inode and generation of an export's directory; None when there is none now."""
        known = self._roots.get(export.id)
        if known is not None:
            try:
                self.fs.handle_check(*known)
            except OSError:
                del self._roots[export.id]
                self._crossings.pop(known[0], None)
            else:
                return known
        try:
            stat = self.fs.resolve(export.path.encode(errors="surrogateescape"))
        except OSError:
            return None
        if stat.mode & 0o170000 != _DIRECTORY:
            return None
        self._roots[export.id] = (stat.ino, stat.generation)
        self._crossings[stat.ino] = export
        return stat.ino, stat.generation

    def layout_types(self) -> set[int]:
        """LAYOUT4_* of the layouts that some export offers to somebody."""
        return {export.rules.layout_type for export in self.all if export.rules.layouts}

    def offers(self, host: str, layout_type: int) -> bool:
        """Whether some export offers such layouts to a client at this address."""
        return any(export.layout_type(host) == layout_type for export in self.all)

    def rooted_at(self, ino: int) -> Export | None:
        """The export whose directory this inode is."""
        return self._crossings.get(ino)

    def whole(self) -> Export | None:
        """The export of "/"."""
        return self.all[0] if self.all and self.all[0].path == "/" else None
