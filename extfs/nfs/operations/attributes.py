"""GETATTR, SETATTR, VERIFY, NVERIFY, ACCESS (RFC 8881 18.1, 18.7, 18.15, 18.30, 18.31)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extfs.core import Stat
from extfs.nfs import attributes, credentials, filehandles, set_attributes
from extfs.nfs import constants as n
from extfs.nfs.compound import Operation
from extfs.nfs.delegations import Conflict
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError, status_of
from extfs.nfs.stateids import Stateid, read_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.filehandles import Filehandle

__all__ = ["OPERATIONS"]

S_IFMT = 0o170000
S_IFDIR = 0o040000

_HELD = 1 << n.FATTR4_SIZE | 1 << n.FATTR4_CHANGE | 1 << n.FATTR4_TIME_MODIFY
"""What the holder of a WRITE delegation knows better."""

_VALUES_MAX = 65536


def _delegated(c: Compound, filehandle: Filehandle, mask: int) -> bool:
    if not mask & _HELD or filehandle.pseudo:
        return False
    file = c.service.states.known_file(filehandle.ino)
    return file is not None and bool(file.delegations)


def _stat_with_holder(c: Compound, filehandle: Filehandle) -> Steps[Stat]:
    """Attributes as the holder of a WRITE delegation has them (RFC 8881 10.4.3)."""
    remote = yield from c.service.states.delegations.remote_attributes(c, filehandle.ino)
    found = filehandles.stat(c, filehandle)
    if remote is None:
        return found
    return found._replace(size=remote.size, change=remote.change)


def getattr_(c: Compound, args: Reader, out: Writer) -> Steps[None] | None:
    """GETATTR, RFC 8881 18.7."""
    mask = args.bitmap()
    current = c.current
    assert current is not None
    plan = attributes.plan(c, current, mask)
    if _delegated(c, current, plan.mask):
        return _getattr_held(c, current, plan, out)
    out.raw(plan.encode(c, current, filehandles.stat(c, current)))
    return None


def _getattr_held(
    c: Compound, current: Filehandle, plan: attributes.Plan, out: Writer
) -> Steps[None]:
    found = yield from _stat_with_holder(c, current)
    out.raw(plan.encode(c, current, found))


# ---- VERIFY, NVERIFY ---------------------------------------------------------------------------


def _same(c: Compound, args: Reader) -> Steps[bool]:
    """Whether the file has the attributes of the arguments."""
    mask = args.bitmap()
    values = args.opaque(_VALUES_MAX)
    current = c.current
    assert current is not None
    if mask & ~attributes.supported(c.minor):
        raise NfsError(n.NFS4ERR_ATTRNOTSUPP)
    if mask >> n.FATTR4_RDATTR_ERROR & 1:
        raise NfsError(n.NFS4ERR_INVAL)
    plan = attributes.plan(c, current, mask)
    if _delegated(c, current, mask):
        found = yield from _stat_with_holder(c, current)
    else:
        found = filehandles.stat(c, current)
    return plan.values(c, current, found) == values


def verify(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """VERIFY, RFC 8881 18.31."""
    if not (yield from _same(c, args)):
        raise NfsError(n.NFS4ERR_NOT_SAME)


def nverify(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """NVERIFY, RFC 8881 18.15."""
    if (yield from _same(c, args)):
        raise NfsError(n.NFS4ERR_SAME)


# ---- SETATTR -----------------------------------------------------------------------------------


def _bitmap(mask: int) -> bytes:
    out = Writer()
    out.bitmap(mask)
    return bytes(out.buffer)


def _opened(c: Compound, stateid: Stateid, wanted: set_attributes.SetAttributes) -> bool:
    """Whether the stateid gives the right to change the size; delegations of others make way."""
    assert c.current is not None
    c.service.states.about_to_change(c, c.current.ino, Conflict.SETATTR)
    if wanted.size is None:
        return False
    return c.service.states.io(c, stateid, Conflict.WRITE) is not None


def _set(c: Compound, args: Reader, changes: list[set_attributes.Change]) -> Steps[int]:
    """Returns the bitmap of what was set; `changes` gets what is tried, for a failure to tell."""
    stateid = read_stateid(args)
    wanted = set_attributes.decode(args, c.minor)
    if c.current is None:
        raise NfsError(n.NFS4ERR_NOFILEHANDLE)
    current = c.real()
    c.writable()
    found = filehandles.stat(c, current)
    if not wanted.mask:
        return 0
    if wanted.size is not None and found.mode & S_IFMT == S_IFDIR:
        raise NfsError(n.NFS4ERR_ISDIR)
    if c.done(n.OP_SETATTR) is not None:
        done = wanted.mask
        if found.mode & S_IFMT == set_attributes.S_IFLNK:
            done &= ~set_attributes.MODES
        return done
    change = set_attributes.change_of(c, found, wanted, _opened(c, stateid, wanted))
    changes.append(change)
    if set_attributes.more_than_size(wanted):
        change.ride = c.ride(n.OP_SETATTR)
    fs = c.service.fs
    yield Blocking(lambda: change.run(fs, current.ino))
    return change.done


def setattr_(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """SETATTR, RFC 8881 18.30. Its result has a bitmap of what was set whether it failed or not."""
    changes: list[set_attributes.Change] = []
    try:
        done = yield from _set(c, args, changes)
    except (NfsError, OSError, XdrError) as error:
        if isinstance(error, NfsError):
            status = error.status
        else:
            status = status_of(error) if isinstance(error, OSError) else n.NFS4ERR_BADXDR
        done = changes[0].done if changes else 0
        raise NfsError(status, _bitmap(done)) from error
    out.bitmap(done)


# ---- ACCESS ------------------------------------------------------------------------------------

ACCESS4_XAREAD = 0x40
ACCESS4_XAWRITE = 0x80
ACCESS4_XALIST = 0x100
"""RFC 8276 8.3."""

_R, _W, _X = credentials.READ, credentials.WRITE, credentials.EXECUTE
_OF_FILES = {
    n.ACCESS4_READ: _R,
    n.ACCESS4_MODIFY: _W,
    n.ACCESS4_EXTEND: _W,
    n.ACCESS4_EXECUTE: _X,
    ACCESS4_XAREAD: _R,
    ACCESS4_XAWRITE: _W,
    ACCESS4_XALIST: _R,
}
_OF_DIRECTORIES = {
    n.ACCESS4_READ: _R,
    n.ACCESS4_LOOKUP: _X,
    n.ACCESS4_MODIFY: _W | _X,
    n.ACCESS4_EXTEND: _W | _X,
    n.ACCESS4_DELETE: _W | _X,
    ACCESS4_XAREAD: _R,
    ACCESS4_XAWRITE: _W,
    ACCESS4_XALIST: _R,
}
_KNOWN_41 = 0x3F
_KNOWN_42 = 0x1FF


def access(c: Compound, args: Reader, out: Writer) -> None:
    """ACCESS, RFC 8881 18.1: rights as this server would check them now."""
    asked = args.u32()
    if asked & ~(_KNOWN_42 if c.minor >= 2 else _KNOWN_41):
        raise NfsError(n.NFS4ERR_INVAL)
    current = c.current
    assert current is not None
    found = filehandles.stat(c, current)
    table = _OF_DIRECTORIES if found.mode & S_IFMT == S_IFDIR else _OF_FILES
    rights = 0
    for right in (_R, _W, _X):
        rights |= credentials.allowed(c, current.ino, right)
    if current.export.rules.read_only:
        rights &= ~_W
    supported = granted = 0
    for bit, needed in table.items():
        if asked & bit:
            supported |= bit
            if rights & needed == needed:
                granted |= bit
    out.u32(supported)
    out.u32(granted)


OPERATIONS = {
    n.OP_GETATTR: Operation(getattr_, filehandle="current"),
    # Its result has a body in every case, so it looks for the filehandle itself.
    n.OP_SETATTR: Operation(setattr_),
    n.OP_VERIFY: Operation(verify, filehandle="current"),
    n.OP_NVERIFY: Operation(nverify, filehandle="current"),
    n.OP_ACCESS: Operation(access, filehandle="current"),
}
