"""Attributes that clients set: SETATTR, CREATE, OPEN (RFC 8881 18.30), and who may set which.

The rules are Linux's: owner and group change as chown(2) has it, setuid and setgid go where it
takes them away, times need the owner or, for "now", the right to write.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import Cred, Filesystem, Stat
from extfs.nfs import constants as n
from extfs.nfs import credentials
from extfs.nfs.attributes import FATTR4_MODE_UMASK, FILE_BYTES_MAX, SETTABLE, supported
from extfs.nfs.errors import NfsError
from extfs.nfs.riders import carried
from extfs.nfs.rpc import Credential
from extfs.nfs.xdr import Reader, XdrError

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.riders import Ride

__all__ = [
    "MODES",
    "Change",
    "SetAttributes",
    "apply",
    "apply_created",
    "change_of",
    "creation",
    "decode",
    "more_than_mode",
    "more_than_size",
]

_VALUES_MAX = 65536
_ID_MAX = 0xFFFFFFFE
_NSEC = 1_000_000_000
_MODE_BITS = 0o7777
S_IFMT = 0o170000
S_IFREG = 0o100000
S_IFDIR = 0o040000
S_IFLNK = 0o120000
S_ISGID = 0o2000
S_ISUID = 0o4000
S_IXGRP = 0o010

MODES = 1 << n.FATTR4_MODE | 1 << n.FATTR4_MODE_SET_MASKED | 1 << FATTR4_MODE_UMASK

_NOW = (-1, _NSEC)
"""Stands for the server's time until it is known; no time is written like this."""

Time = tuple[int, int]


@dataclass(slots=True)
class SetAttributes:
    """What a client wants set. `mask`: which; the values of others are None."""

    mask: int = 0
    size: int | None = None
    mode: int | None = None
    mode_masked: tuple[int, int] | None = None
    umask: int = 0
    uid: int | None = None
    gid: int | None = None
    atime: Time | None = None
    mtime: Time | None = None

    def mode_over(self, mode: int | None) -> int | None:
        """The permission bits wanted where `mode` is there now; None: no change."""
        if self.mode_masked is not None and mode is not None:
            value, bits = self.mode_masked
            return (mode & ~bits | value & bits) & _MODE_BITS
        return self.mode


# ---- decoding ----------------------------------------------------------------------------------


def _mode(reader: Reader) -> int:
    mode = reader.u32()
    if mode & ~_MODE_BITS:
        raise NfsError(n.NFS4ERR_INVAL)
    return mode


def _number(reader: Reader) -> int:
    """A user or group: digits, as Linux clients send them with AUTH_SYS. NFS4ERR_BADOWNER."""
    text = reader.opaque(_VALUES_MAX)
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) > _ID_MAX:
        raise NfsError(n.NFS4ERR_BADOWNER)
    return int(text)


def _settime(reader: Reader) -> Time:
    how = reader.u32()
    if how == n.SET_TO_SERVER_TIME4:
        return _NOW
    if how != n.SET_TO_CLIENT_TIME4:
        raise XdrError("neither the server's time nor the client's")
    seconds, nseconds = reader.i64(), reader.u32()
    if nseconds >= _NSEC:
        raise NfsError(n.NFS4ERR_INVAL)
    return seconds, nseconds


def _values(reader: Reader, mask: int) -> SetAttributes:
    """In the order of the attributes' numbers."""
    wanted = SetAttributes(mask)
    if mask >> n.FATTR4_SIZE & 1:
        wanted.size = reader.u64()
    if mask >> n.FATTR4_MODE & 1:
        wanted.mode = _mode(reader)
    if mask >> n.FATTR4_OWNER & 1:
        wanted.uid = _number(reader)
    if mask >> n.FATTR4_OWNER_GROUP & 1:
        wanted.gid = _number(reader)
    if mask >> n.FATTR4_TIME_ACCESS_SET & 1:
        wanted.atime = _settime(reader)
    if mask >> n.FATTR4_TIME_MODIFY_SET & 1:
        wanted.mtime = _settime(reader)
    if mask >> n.FATTR4_MODE_SET_MASKED & 1:
        wanted.mode_masked = (_mode(reader), _mode(reader))
    if mask >> FATTR4_MODE_UMASK & 1:
        wanted.mode = _mode(reader)
        wanted.umask = _mode(reader) & 0o777
    return wanted


def decode(reader: Reader, minor: int = 2) -> SetAttributes:
    """A fattr4 out of the arguments of SETATTR, CREATE or OPEN.

    NFS4ERR_ATTRNOTSUPP: one that is not supported. NFS4ERR_INVAL: one that cannot be set, two
    modes, a value that cannot be. NFS4ERR_BADOWNER.
    """
    mask = reader.bitmap()
    values = Reader(reader.opaque(_VALUES_MAX))
    if mask & ~supported(minor):
        raise NfsError(n.NFS4ERR_ATTRNOTSUPP)
    if mask & ~SETTABLE:
        raise NfsError(n.NFS4ERR_INVAL)
    if (mask & MODES).bit_count() > 1:
        raise NfsError(n.NFS4ERR_INVAL)
    wanted = _values(values, mask)
    if not values.done():
        raise XdrError("attributes longer than their values")
    if wanted.size is not None and wanted.size > FILE_BYTES_MAX:
        raise NfsError(n.NFS4ERR_FBIG)
    return wanted


# ---- a file that exists ------------------------------------------------------------------------


def _at(when: Time | None) -> Time | None:
    return divmod(time.time_ns(), _NSEC) if when == _NOW else when


@dataclass(slots=True)
class Change:
    """What is to be done to an inode, decided; `run` does it where it may block.

    `done`: the bitmap of what has been set, also when `run` fails in the middle. `ride`: for
    all but the size, which comes first.
    """

    size: int | None
    mode: int | None
    uid: int | None
    gid: int | None
    atime: Time | None
    mtime: Time | None
    mask: int
    kill_priv: bool
    done: int = 0
    ride: Ride | None = None

    def run(self, fs: Filesystem, ino: int) -> None:
        """Set, durably. EAGAIN: layouts are in the way of a new size, and nothing was done."""
        if self.size is not None:
            fs.truncate(ino, self.size, kill_priv=self.kill_priv, nowait=True)
            self.done |= 1 << n.FATTR4_SIZE
        rest = (self.mode, self.uid, self.gid, self.atime, self.mtime)
        if any(value is not None for value in rest):
            carried(self.ride, lambda: self._set(fs, ino))
        fs.fsync(ino)
        self.done = self.mask

    def _set(self, fs: Filesystem, ino: int) -> None:
        fs.setattr(
            ino,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            atime=_at(self.atime),
            mtime=_at(self.mtime),
        )


def _check_ids(who: Credential, st: Stat, wanted: SetAttributes) -> None:
    """As chown(2): root, or the owner who gives the file to a group of theirs."""
    if wanted.uid is not None or wanted.gid is not None:
        credentials.require_owner(who, st)
    if who.uid == 0:
        return
    if wanted.uid not in (None, st.uid):
        raise NfsError(n.NFS4ERR_PERM)
    if wanted.gid not in (None, st.gid) and not credentials.in_group(who, wanted.gid or 0):
        raise NfsError(n.NFS4ERR_PERM)


def _check_times(c: Compound, who: Credential, st: Stat, wanted: SetAttributes) -> None:
    given = [when for when in (wanted.atime, wanted.mtime) if when is not None]
    if not given or who.uid in (0, st.uid):
        return
    if any(when != _NOW for when in given):
        raise NfsError(n.NFS4ERR_PERM)
    credentials.require(c, st.ino, credentials.WRITE)


def _check_size(c: Compound, st: Stat, opened: bool) -> None:
    kind = st.mode & S_IFMT
    if kind == S_IFDIR:
        raise NfsError(n.NFS4ERR_ISDIR)
    if kind != S_IFREG:
        raise NfsError(n.NFS4ERR_INVAL)
    if not opened:
        credentials.require(c, st.ino, credentials.WRITE)


def change_of(c: Compound, st: Stat, wanted: SetAttributes, opened: bool = False) -> Change:
    """Whether the user may set this on the inode, and what it comes to.

    `opened`: a stateid says that it is open for writing; a new size needs no other right then.
    NFS4ERR_PERM, NFS4ERR_ACCESS, NFS4ERR_ISDIR, NFS4ERR_INVAL. The mode of a symbolic link stays
    as it is, and the bitmap of what was set says so.
    """
    if wanted.mask >> FATTR4_MODE_UMASK & 1:
        raise NfsError(n.NFS4ERR_INVAL)  # for files that are being made (RFC 8275 4)
    who = credentials.user(c)
    _check_ids(who, st, wanted)
    _check_times(c, who, st, wanted)
    if wanted.size is not None:
        _check_size(c, st, opened)
    mode = wanted.mode_over(st.mode & _MODE_BITS)
    if mode is not None:
        credentials.require_owner(who, st)
        group = st.gid if wanted.gid is None else wanted.gid
        if who.uid and not credentials.in_group(who, group):
            mode &= ~S_ISGID
    mask = wanted.mask
    if st.mode & S_IFMT == S_IFLNK:
        mode = None
        mask &= ~MODES
    return Change(
        size=wanted.size,
        mode=mode,
        uid=wanted.uid,
        gid=wanted.gid,
        atime=wanted.atime,
        mtime=wanted.mtime,
        mask=mask,
        kill_priv=who.uid != 0,
    )


def apply(c: Compound, ino: int, wanted: SetAttributes, opened: bool = False) -> int:
    """Checks and sets, durably, where it may block; returns the bitmap of what was set."""
    change = change_of(c, c.service.fs.getattr(ino), wanted, opened)
    change.run(c.service.fs, ino)
    return change.done


# ---- a file that is being made -----------------------------------------------------------------


def creation(
    c: Compound, directory: Stat, wanted: SetAttributes, default_mode: int, kind: int = S_IFREG
) -> tuple[int, Cred]:
    """Permission bits, and as whom the core is to make a file: NFS4ERR_PERM for foreign owners.

    A mode that is not given is `default_mode`: it should be the owner's alone.
    """
    who = credentials.user(c)
    group = directory.gid if directory.mode & S_ISGID else who.gid
    if who.uid:
        if wanted.uid not in (None, who.uid):
            raise NfsError(n.NFS4ERR_PERM)
        if wanted.gid not in (None, group) and not credentials.in_group(who, wanted.gid or 0):
            raise NfsError(n.NFS4ERR_PERM)
    mode = wanted.mode_over(default_mode)
    if mode is None:
        mode = default_mode
    if kind != S_IFDIR and mode & S_ISGID and mode & S_IXGRP:
        final = group if wanted.gid is None else wanted.gid
        if who.uid and not credentials.in_group(who, final):
            mode &= ~S_ISGID
    return mode, Cred(who.uid, who.gid, wanted.umask)


def more_than_size(wanted: SetAttributes) -> bool:
    """Whether something is to be set that is no size."""
    return bool(wanted.mask & ~(1 << n.FATTR4_SIZE))


def more_than_mode(wanted: SetAttributes) -> bool:
    """Whether `apply_created` may have something to do for a regular file."""
    done = MODES | (1 << n.FATTR4_SIZE if wanted.size == 0 else 0)
    return bool(wanted.mask & ~done)


def apply_created(fs: Filesystem, st: Stat, wanted: SetAttributes) -> int:
    """Set on a new inode what could not be given when it was made; returns what holds now.

    Where it may block; not durable yet. The mode of a symbolic link is not set.
    """
    kind = st.mode & S_IFMT
    mask = wanted.mask
    uid = wanted.uid if wanted.uid != st.uid else None
    gid = wanted.gid if wanted.gid != st.gid else None
    moved = uid is not None or gid is not None
    if kind == S_IFLNK:
        mask &= ~MODES
    if wanted.size is not None and kind == S_IFREG and wanted.size != st.size:
        fs.truncate(st.ino, wanted.size, nowait=True)
    elif wanted.size is not None and kind != S_IFREG:
        mask &= ~(1 << n.FATTR4_SIZE)
    # A new owner takes the setuid bit away that was asked for together with it.
    mode = st.mode & _MODE_BITS if moved and st.mode & (S_ISUID | S_ISGID) else None
    if moved or wanted.atime is not None or wanted.mtime is not None:
        fs.setattr(
            st.ino, mode=mode, uid=uid, gid=gid, atime=_at(wanted.atime), mtime=_at(wanted.mtime)
        )
    return mask
