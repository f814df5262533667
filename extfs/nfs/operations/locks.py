"""LOCK, LOCKT, LOCKU, TEST_STATEID, FREE_STATEID."""

from __future__ import annotations

import contextlib
import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import CoreError
from extfs.nfs import constants as n
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.delegations import DelegationState
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.locks import LockState, denied_body, last_byte
from extfs.nfs.opens import FileState, OpenState
from extfs.nfs.stateids import Kind, Stateid, read_stateid, write_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.core_tables import LockConflict

__all__ = ["OPERATIONS"]

STATEIDS_MAX = 4096
"""In one TEST_STATEID."""
_STATEID_BYTES = 16
_RANGE = struct.Struct(">QQ")
_WRITE_TYPES = (n.WRITE_LT, n.WRITEW_LT)
_BLOCKING_TYPES = (n.READW_LT, n.WRITEW_LT)
_ACCESS = {False: n.OPEN4_SHARE_ACCESS_READ, True: n.OPEN4_SHARE_ACCESS_WRITE}


@dataclass(slots=True)
class _Wish:
    """A lock: bytes `start` to `last`."""

    start: int
    last: int
    write: bool
    blocking: bool
    reclaim: bool = False


def _read_type(args: Reader) -> int:
    kind = args.u32()
    if not n.READ_LT <= kind <= n.WRITEW_LT:
        raise XdrError("no such nfs_lock_type4")
    return kind


def _read_owner(args: Reader) -> bytes:
    args.u64()  # the session says which client it is (RFC 8881 18.10.3)
    return args.opaque(n.NFS4_OPAQUE_LIMIT)


def _wish(kind: int, offset: int, length: int) -> _Wish:
    last = last_byte(offset, length)
    return _Wish(offset, last, kind in _WRITE_TYPES, kind in _BLOCKING_TYPES)


def _denied(c: Compound, conflict: LockConflict) -> NfsError:
    """NFS4ERR_DENIED, with who is in the way; a local process has no client ID."""
    name = c.service.states.owners.name(conflict.number) if conflict.number else None
    if name is None:
        clientid, owner = 0, b"local process %d" % conflict.pid
    else:
        clientid, owner = name[0].clientid, name[1]
    body = denied_body(conflict.start, conflict.last, conflict.write, clientid, owner)
    return NfsError(n.NFS4ERR_DENIED, body)


def _moved_away(c: Compound, conflict: LockConflict) -> bool:
    """Whether what is in the way was there by courtesy alone, and is gone."""
    name = c.service.states.owners.name(conflict.number) if conflict.number else None
    return name is not None and c.service.states.expire_courtesy(name[0])


def _set(c: Compound, file: FileState, number: int, wish: _Wish) -> LockConflict | None:
    while True:
        try:
            conflict = c.service.states.locks.set(file, number, wish.start, wish.last, wish.write)
        except OSError as error:
            if error.errno == errno.ENOLCK:
                raise NfsError(n.NFS4ERR_DELAY) from None
            raise
        if conflict is None or not _moved_away(c, conflict):
            return conflict


def _new_owner(c: Compound, stateid: Stateid, owner: bytes) -> LockState:
    """The lock state for an open and a lock-owner; one that is new is in no table yet."""
    states = c.service.states
    assert c.current is not None
    opened = states.find(c, stateid, Kind.OPEN, file=c.current.ino)
    assert isinstance(opened, OpenState)
    known = opened.file.locks.get((c.client, owner))
    if known is not None:
        return known
    return LockState(c.client, opened.file, states.new_other(), owner, opened)


def _lock(c: Compound, state: LockState, wish: _Wish) -> Stateid:
    """Take the lock for this state, or `NfsError` DENIED."""
    states = c.service.states
    fh, client = c.current, c.client
    assert fh is not None
    assert client is not None
    if c.did(state):
        return state.stateid()
    new = not state.number
    number = state.number or states.owners.take(client, state.owner)
    try:
        conflict = _set(c, state.file, number, wish)
        if conflict is not None:
            if wish.reclaim:
                raise NfsError(n.NFS4ERR_RECLAIM_CONFLICT)
            if wish.blocking:
                states.waiters.add(
                    client, state.file, fh.wire, state.owner, wish.start, wish.last, wish.write
                )
            raise _denied(c, conflict)
    except BaseException:
        if new:
            states.owners.put(client, state.owner)
        raise
    state.number = number
    state.ranges.set(wish.start, wish.last, wish.write)
    c.tag(state)
    if new:
        _add(c, state)
    else:
        state.bump()
        states.changed(state)
    states.waiters.remove(fh.ino, client, state.owner)
    return state.stateid()


def _add(c: Compound, state: LockState) -> None:
    """A state whose lock is taken; without room for it the lock is let go."""
    states = c.service.states
    try:
        states.add(state)
    except (NfsError, OSError):
        states.locks.release_owner(state.file, state.number)
        states.owners.put(state.client, state.owner)
        raise


def lock(c: Compound, args: Reader, out: Writer) -> None:
    """LOCK (RFC 8881 18.10). A blocking type that is refused is told when to come again."""
    kind = _read_type(args)
    reclaim = args.boolean()
    offset, length = args.unpack(_RANGE)
    owner: bytes | None = None
    if args.boolean():
        args.u32()  # seqids, of 4.0
        stateid = read_stateid(args)
        args.u32()
        owner = _read_owner(args)
    else:
        stateid = read_stateid(args)
        args.u32()
    wish = _wish(kind, offset, length)
    wish.reclaim = reclaim
    c.regular()
    assert c.client is not None
    assert c.current is not None
    if not c.retry:
        c.service.lease.begin_open(c.client, reclaim)
    if owner is not None:
        state = _new_owner(c, stateid, owner)
    else:
        found = c.service.states.find(c, stateid, Kind.LOCK, file=c.current.ino)
        assert isinstance(found, LockState)
        state = found
    if c.retry and not c.did(state):
        c.service.lease.begin_open(c.client, reclaim)
    if not state.opened.access & _ACCESS[wish.write]:
        raise NfsError(n.NFS4ERR_OPENMODE)
    stateid = _lock(c, state, wish)
    write_stateid(out, stateid)
    c.set_stateid(stateid)


def lockt(c: Compound, args: Reader, out: Writer) -> None:
    """LOCKT (RFC 8881 18.11)."""
    kind = _read_type(args)
    offset, length = args.unpack(_RANGE)
    owner = _read_owner(args)
    wish = _wish(kind, offset, length)
    fh = c.regular()
    assert c.client is not None
    c.service.lease.begin_open(c.client, False)
    states = c.service.states
    number = states.owners.number(c.client, owner)
    while True:
        file = states.file(fh.ino, fh.generation)
        conflict = states.locks.test(file, number, wish.start, wish.last, wish.write)
        if conflict is None:
            return
        if not _moved_away(c, conflict):
            raise _denied(c, conflict)


def locku(c: Compound, args: Reader, out: Writer) -> None:
    """LOCKU (RFC 8881 18.12). Any range, locked or not, whole or in part."""
    _read_type(args)
    args.u32()  # seqid, of 4.0
    stateid = read_stateid(args)
    offset, length = args.unpack(_RANGE)
    last = last_byte(offset, length)
    assert c.current is not None
    states = c.service.states
    state = states.find(c, stateid, Kind.LOCK, file=c.current.ino)
    assert isinstance(state, LockState)
    if c.did(state):
        stateid = state.stateid()
    else:
        states.locks.clear(state.file, state.number, offset, last)
        state.ranges.clear(offset, last)
        stateid = state.bump()
        c.tag(state)
        states.changed(state)
    write_stateid(out, stateid)
    c.set_stateid(stateid)


def test_stateid(c: Compound, args: Reader, out: Writer) -> None:
    """TEST_STATEID (RFC 8881 18.48)."""
    stateids = [read_stateid(args) for _ in range(args.count(STATEIDS_MAX, _STATEID_BYTES))]
    if 4 + 4 * len(stateids) > c.room():
        raise NfsError(n.NFS4ERR_REP_TOO_BIG)
    out.u32(len(stateids))
    for stateid in stateids:
        out.u32(c.service.states.test(c, stateid))


def free_stateid(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """FREE_STATEID (RFC 8881 18.38).

    For a revoked delegation the file's change attribute moves once more. Linux returns a delegation
    with GETATTR and DELEGRETURN in one COMPOUND, and takes a change that the first one shows for
    its own although the second one fails: it would go on with the contents in its cache, and see
    no reason not to.
    """
    stateid = read_stateid(args)
    if c.ended(stateid):
        return
    state = c.service.states.free(c, stateid)
    if isinstance(state, DelegationState) and state.mark == n.NFS4ERR_DELEG_REVOKED:
        file, fs = state.file, c.service.fs
        with contextlib.suppress(CoreError):  # it may be gone
            fs.handle_check(file.ino, file.generation)
            found = fs.getattr(file.ino)
            mtime = (found.mtime, found.mtime_ns)
            yield Blocking(lambda: fs.setattr(file.ino, mtime=mtime))


OPERATIONS = {
    n.OP_LOCK: Operation(lock, filehandle="current", reply_bytes=_STATEID_BYTES),
    n.OP_LOCKT: Operation(lockt, filehandle="current"),
    n.OP_LOCKU: Operation(locku, filehandle="current", reply_bytes=_STATEID_BYTES),
    n.OP_TEST_STATEID: Operation(test_stateid),
    n.OP_FREE_STATEID: Operation(free_stateid),
}
