"""File attributes (RFC 8881 5): fattr4 from what the core says of an inode.

GETATTR is what clients ask most, so a request is compiled: for the bitmap of attributes asked, a
plan of a few steps, each of which encodes a run of attributes of fixed size at once, or one string.
Plans are kept by bitmap and by what is the same for all files of an export and a kind of client.

Not supported: ACLs (`aclsupport` says 0: the POSIX ones of the filesystem count in every permission
check, but an NFSv4 ACL cannot be kept without loss), named attributes, quotas, retention, labels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from extfs.core import BLOCK_SIZE, Stat
from extfs.nfs import changes
from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.filehandles import Filehandle

__all__ = [
    "EXCLCREAT",
    "FATTR4_MODE_UMASK",
    "FILE_BYTES_MAX",
    "OPEN_WANTS",
    "READABLE",
    "SETTABLE",
    "WRITE_ONLY",
    "Plan",
    "plan",
    "supported",
]

FATTR4_MODE_UMASK = 81
"""RFC 8275."""

FILE_BYTES_MAX = (1 << 63) - 1
LINKS_MAX = 0x7FFFFFFF
NAME_MAX = 255

_FIRST_42 = n.FATTR4_CLONE_BLKSIZE
"""Attributes from here on came with NFSv4.2 (RFC 7862 12.1 and its extensions)."""


def _mask(*attributes: int) -> int:
    return sum(1 << attribute for attribute in attributes)


WRITE_ONLY = _mask(
    n.FATTR4_TIME_ACCESS_SET,
    n.FATTR4_TIME_MODIFY_SET,
    n.FATTR4_MODE_SET_MASKED,
    FATTR4_MODE_UMASK,
)
SETTABLE = WRITE_ONLY | _mask(n.FATTR4_SIZE, n.FATTR4_MODE, n.FATTR4_OWNER, n.FATTR4_OWNER_GROUP)
EXCLCREAT = SETTABLE & ~_mask(n.FATTR4_TIME_ACCESS_SET, n.FATTR4_TIME_MODIFY_SET)
"""What may be set with an EXCLUSIVE4_1 OPEN (suppattr_exclcreat); its verifier is in the times."""

# open_args_share_access_want4 (RFC 9754): bits that OPEN honours.
OPEN_WANTS = _mask(3, 4, 5)

# ---- attributes of fixed size, by file ---------------------------------------------------------

_TYPES = {
    0o10: n.NF4REG,
    0o04: n.NF4DIR,
    0o12: n.NF4LNK,
    0o06: n.NF4BLK,
    0o02: n.NF4CHR,
    0o01: n.NF4FIFO,
    0o14: n.NF4SOCK,
}


def _of_file(st: Stat, fsid: tuple[int, int], mounted_on: int) -> tuple[int, ...]:
    """The numbers that plans take from; `_FIXED` has their places."""
    mode = st.mode
    rdev = st.rdev
    return (
        _TYPES[mode >> 12],
        changes.value(st),
        st.size,
        fsid[0],
        fsid[1],
        st.ino,
        mode & 0o7777,
        st.nlink,
        rdev >> 8 & 0xFFF,
        rdev & 0xFF | rdev >> 12 & 0xFFF00,
        st.blocks * BLOCK_SIZE,
        st.atime,
        st.atime_ns,
        st.btime,
        st.btime_ns,
        st.ctime,
        st.ctime_ns,
        st.mtime,
        st.mtime_ns,
        mounted_on,
    )


_FIXED: dict[int, tuple[str, tuple[int, ...]]] = {
    n.FATTR4_TYPE: ("I", (0,)),
    n.FATTR4_CHANGE: ("Q", (1,)),
    n.FATTR4_SIZE: ("Q", (2,)),
    n.FATTR4_FSID: ("QQ", (3, 4)),
    n.FATTR4_FILEID: ("Q", (5,)),
    n.FATTR4_MODE: ("I", (6,)),
    n.FATTR4_NUMLINKS: ("I", (7,)),
    n.FATTR4_RAWDEV: ("II", (8, 9)),
    n.FATTR4_SPACE_USED: ("Q", (10,)),
    n.FATTR4_TIME_ACCESS: ("qI", (11, 12)),
    n.FATTR4_TIME_CREATE: ("qI", (13, 14)),
    n.FATTR4_TIME_METADATA: ("qI", (15, 16)),
    n.FATTR4_TIME_MODIFY: ("qI", (17, 18)),
    n.FATTR4_MOUNTED_ON_FILEID: ("Q", (19,)),
}

# ---- strings -----------------------------------------------------------------------------------

_OWNERS_KEPT = 4096
_owners: dict[int, bytes] = {}


def _owner(number: int) -> bytes:
    """A user or group as a string of digits (RFC 8881 5.9), with its length."""
    known = _owners.get(number)
    if known is None:
        out = Writer()
        out.opaque(b"%d" % number)
        if len(_owners) >= _OWNERS_KEPT:
            _owners.clear()
        known = _owners[number] = bytes(out.buffer)
    return known


def _opaque(content: bytes) -> bytes:
    out = Writer()
    out.opaque(content)
    return bytes(out.buffer)


_STRINGS: dict[int, Callable[[Filehandle, Stat], bytes]] = {
    n.FATTR4_OWNER: lambda _fh, st: _owner(st.uid),
    n.FATTR4_OWNER_GROUP: lambda _fh, st: _owner(st.gid),
    n.FATTR4_FILEHANDLE: lambda fh, _st: _opaque(fh.wire),
}

# ---- what is the same for a whole filesystem ---------------------------------------------------

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_TIME = struct.Struct(">qI")
_FALSE = _U32.pack(0)
_TRUE = _U32.pack(1)


def _bitmap(mask: int) -> bytes:
    out = Writer()
    out.bitmap(mask)
    return bytes(out.buffer)


def _open_arguments() -> bytes:
    """RFC 9754 4: share accesses, denies, wants, claims and createmodes of OPEN."""
    return (
        _bitmap(_mask(1, 2, 3))
        + _bitmap(_mask(0, 1, 2, 3))
        + _bitmap(OPEN_WANTS)
        + _bitmap(_mask(0, 1, 2, 4, 5))
        + _bitmap(_mask(0, 1, 2, 3))
    )


@dataclass(frozen=True, slots=True)
class _View:
    """What an export and a client have to do with each other, as far as attributes depend on it."""

    minor: int
    layouts: tuple[int, ...]
    pseudo: bool
    lease_seconds: int
    io_bytes: int


_BY_VIEW: dict[int, Callable[[_View], bytes]] = {
    n.FATTR4_SUPPORTED_ATTRS: lambda view: _bitmap(supported(view.minor)),
    n.FATTR4_FH_EXPIRE_TYPE: lambda _: _U32.pack(n.FH4_PERSISTENT),
    n.FATTR4_LINK_SUPPORT: lambda _: _TRUE,
    n.FATTR4_SYMLINK_SUPPORT: lambda _: _TRUE,
    n.FATTR4_NAMED_ATTR: lambda _: _FALSE,
    n.FATTR4_UNIQUE_HANDLES: lambda _: _TRUE,
    n.FATTR4_LEASE_TIME: lambda view: _U32.pack(view.lease_seconds),
    n.FATTR4_RDATTR_ERROR: lambda _: _U32.pack(n.NFS4_OK),
    n.FATTR4_ACLSUPPORT: lambda _: _U32.pack(0),
    n.FATTR4_CANSETTIME: lambda _: _TRUE,
    n.FATTR4_CASE_INSENSITIVE: lambda _: _FALSE,
    n.FATTR4_CASE_PRESERVING: lambda _: _TRUE,
    n.FATTR4_CHOWN_RESTRICTED: lambda _: _TRUE,
    n.FATTR4_HOMOGENEOUS: lambda _: _TRUE,
    n.FATTR4_MAXFILESIZE: lambda _: _U64.pack(FILE_BYTES_MAX),
    n.FATTR4_MAXLINK: lambda _: _U32.pack(LINKS_MAX),
    n.FATTR4_MAXNAME: lambda _: _U32.pack(NAME_MAX),
    n.FATTR4_MAXREAD: lambda view: _U64.pack(view.io_bytes),
    n.FATTR4_MAXWRITE: lambda view: _U64.pack(view.io_bytes),
    n.FATTR4_NO_TRUNC: lambda _: _TRUE,
    n.FATTR4_TIME_DELTA: lambda _: _TIME.pack(0, 1),
    n.FATTR4_FS_LAYOUT_TYPES: lambda view: _layout_types(view),
    n.FATTR4_LAYOUT_TYPES: lambda view: _layout_types(view),
    n.FATTR4_LAYOUT_BLKSIZE: lambda _: _U32.pack(BLOCK_SIZE),
    n.FATTR4_LAYOUT_ALIGNMENT: lambda _: _U32.pack(BLOCK_SIZE),
    n.FATTR4_SUPPATTR_EXCLCREAT: lambda view: _bitmap(EXCLCREAT & supported(view.minor)),
    n.FATTR4_CLONE_BLKSIZE: lambda _: _U32.pack(BLOCK_SIZE),
    n.FATTR4_CHANGE_ATTR_TYPE: lambda _: _U32.pack(n.NFS4_CHANGE_TYPE_IS_UNDEFINED),
    n.FATTR4_XATTR_SUPPORT: lambda view: _FALSE if view.pseudo else _TRUE,
    n.FATTR4_OPEN_ARGUMENTS: lambda _: _open_arguments(),
}


def _layout_types(view: _View) -> bytes:
    return b"".join(map(_U32.pack, (len(view.layouts), *view.layouts)))


# ---- space, asked of the core each time --------------------------------------------------------

_SPACE: dict[int, Callable[[Any], int]] = {
    n.FATTR4_SPACE_AVAIL: lambda space: int(space.avail) * BLOCK_SIZE,
    n.FATTR4_SPACE_FREE: lambda space: int(space.free) * BLOCK_SIZE,
    n.FATTR4_SPACE_TOTAL: lambda space: int(space.total) * BLOCK_SIZE,
    # Inodes are made of free space; this is how many more there can be.
    n.FATTR4_FILES_AVAIL: lambda space: int(space.avail),
    n.FATTR4_FILES_FREE: lambda space: int(space.free),
    n.FATTR4_FILES_TOTAL: lambda space: int(space.inodes) + int(space.free),
}

READABLE = _mask(*_FIXED, *_STRINGS, *_BY_VIEW, *_SPACE)
_SUPPORTED_42 = READABLE | WRITE_ONLY
_SUPPORTED_41 = _SUPPORTED_42 & ((1 << _FIRST_42) - 1)


def supported(minor: int) -> int:
    """The bitmap of supported attributes, those that can only be set too."""
    return _SUPPORTED_42 if minor >= 2 else _SUPPORTED_41


# ---- plans -------------------------------------------------------------------------------------

_Step = Callable[["Compound", "Filehandle", Stat, tuple[int, ...]], bytes]


def _fixed_step(attributes: list[int]) -> _Step:
    layout = struct.Struct(">" + "".join(_FIXED[attribute][0] for attribute in attributes))
    places = [place for attribute in attributes for place in _FIXED[attribute][1]]
    pack = layout.pack
    if len(places) == 1:
        only = places[0]
        return lambda _c, _fh, _st, numbers: pack(numbers[only])
    pick = itemgetter(*places)
    return lambda _c, _fh, _st, numbers: pack(*pick(numbers))


def _space_step(attributes: list[int]) -> _Step:
    layout = struct.Struct(f">{len(attributes)}Q")
    takes = [_SPACE[attribute] for attribute in attributes]

    def step(c: Compound, _fh: Filehandle, _st: Stat, _numbers: tuple[int, ...]) -> bytes:
        space = c.service.fs.statfs()
        return layout.pack(*(take(space) for take in takes))

    return step


def _string_step(attribute: int) -> _Step:
    encode = _STRINGS[attribute]
    return lambda _c, fh, st, _numbers: encode(fh, st)


def _constant_step(encoded: bytes) -> _Step:
    return lambda _c, _fh, _st, _numbers: encoded


def _kind(attribute: int) -> str:
    if attribute in _FIXED:
        return "fixed"
    if attribute in _STRINGS:
        return "string"
    return "space" if attribute in _SPACE else "constant"


def _steps(mask: int, view: _View) -> list[_Step]:
    """Runs of attributes of one kind, in the order of their numbers."""
    runs: list[tuple[str, list[int]]] = []
    for attribute in range(mask.bit_length()):
        if mask >> attribute & 1:
            kind = _kind(attribute)
            if kind != "string" and runs and runs[-1][0] == kind:
                runs[-1][1].append(attribute)
            else:
                runs.append((kind, [attribute]))
    steps = []
    for kind, attributes in runs:
        if kind == "fixed":
            steps.append(_fixed_step(attributes))
        elif kind == "string":
            steps.append(_string_step(attributes[0]))
        elif kind == "space":
            steps.append(_space_step(attributes))
        else:
            steps.append(_constant_step(b"".join(_BY_VIEW[a](view) for a in attributes)))
    return steps


class Plan:
    """How to encode a fattr4 with the attributes of `mask`, those which are supported."""

    __slots__ = ("_fsid", "_head", "_steps", "mask")

    def __init__(self, mask: int, view: _View, fsid: tuple[int, int]) -> None:
        self.mask = mask & READABLE & supported(view.minor)
        self._head = _bitmap(self.mask)
        self._steps = _steps(self.mask, view)
        self._fsid = fsid

    def values(self, c: Compound, fh: Filehandle, st: Stat) -> bytes:
        """The values, without bitmap and length: fattr4.attr_vals' contents."""
        crossing = c.service.exports.rooted_at(st.ino)
        if crossing is None or crossing is not fh.export:
            mounted_on = st.ino
        else:
            mounted_on = _mounted_on(c, fh, st)
        numbers = _of_file(st, self._fsid, mounted_on)
        return b"".join([step(c, fh, st, numbers) for step in self._steps])

    def encode(self, c: Compound, fh: Filehandle, st: Stat) -> bytes:
        """A fattr4."""
        values = self.values(c, fh, st)
        return b"".join((self._head, _U32.pack(len(values)), values))


def _mounted_on(c: Compound, fh: Filehandle, st: Stat) -> int:
    node = c.service.filehandles.pseudo.mounted_on(fh.export, c.connection.host)
    return st.ino if node is None else node


_PLANS_KEPT = 1024


def plan(c: Compound, fh: Filehandle, mask: int) -> Plan:
    """The plan for the attributes of `mask` of files of an export, asked by this client.

    NFS4ERR_INVAL: some of them can only be set.
    """
    export = fh.export
    host = c.connection.host
    if export.pseudo:
        layouts = c.service.filehandles.pseudo.layout_types(host)
    else:
        offered = export.layout_type(host)
        layouts = (offered,) if offered else ()
    plans = c.service.filehandles.plans
    key = (mask, c.minor, export.id, layouts)
    known = plans.get(key)
    if known is None:
        if mask & WRITE_ONLY & supported(c.minor):
            raise NfsError(n.NFS4ERR_INVAL)
        view = _View(
            minor=c.minor,
            layouts=layouts,
            pseudo=export.pseudo,
            lease_seconds=int(c.service.options.lease_seconds),
            io_bytes=c.service.options.io_bytes,
        )
        if len(plans) >= _PLANS_KEPT:
            plans.clear()
        known = plans[key] = Plan(mask, view, (c.service.exports.fsid_major, export.id))
    return known
