"""DELEGRETURN, WANT_DELEGATION, and what is not supported of delegations.

Delegations are not kept for another instance of a client (DELEGPURGE, RFC 8881 18.5.3), and there
are none of directories (GET_DIR_DELEGATION).
"""

from __future__ import annotations

from extfs.nfs import constants as n
from extfs.nfs import credentials
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.delegations import Conflict, RefusedError
from extfs.nfs.effects import Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.operations.opens import WANT_FLAGS, write_delegation
from extfs.nfs.stateids import Kind, read_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

__all__ = ["OPERATIONS"]

_WANTS = {
    n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG: n.OPEN4_SHARE_ACCESS_READ,
    n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG: n.OPEN4_SHARE_ACCESS_BOTH,
    n.OPEN4_SHARE_ACCESS_WANT_ANY_DELEG: n.OPEN4_SHARE_ACCESS_READ,
}
_RECLAIM_WANTS = {
    n.OPEN_DELEGATE_READ: n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG,
    n.OPEN_DELEGATE_WRITE: n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG,
}
_REPLY_BYTES = 64


def delegreturn(c: Compound, args: Reader, out: Writer) -> None:
    """DELEGRETURN (RFC 8881 18.6)."""
    stateid = read_stateid(args)
    assert c.current is not None
    assert c.client is not None
    states = c.service.states
    if c.ended(stateid):
        file = states.known_file(c.current.ino)
    else:
        delegation = states.find(c, stateid, Kind.DELEGATION, file=c.current.ino)
        file = delegation.file
        states.drop(delegation)
        c.service.count("delegations_returned")
    if file is not None:  # layouts are return-on-close
        c.service.layouts.closed(c.client, file)


def want_delegation(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """WANT_DELEGATION (RFC 8881 18.49): a delegation now, or none; later ones are not promised."""
    want = args.u32()
    claim = args.u32()
    reclaim = claim == n.CLAIM_PREVIOUS
    kind = args.u32() if reclaim else n.OPEN_DELEGATE_NONE
    if claim == n.CLAIM_DELEG_PREV_FH:
        raise NfsError(n.NFS4ERR_NOTSUPP)
    if claim not in (n.CLAIM_FH, n.CLAIM_PREVIOUS):
        raise XdrError("no such claim of a delegation")
    if reclaim:
        want = _RECLAIM_WANTS.get(kind, 0)
    want &= ~WANT_FLAGS
    if want not in _WANTS:
        raise NfsError(n.NFS4ERR_INVAL)
    fh = c.regular()
    assert c.client is not None
    c.service.lease.begin_open(c.client, reclaim)
    access = _WANTS[want]
    mask = credentials.READ
    what = Conflict.OPEN_READ
    if access & n.OPEN4_SHARE_ACCESS_WRITE:
        c.writable()
        mask |= credentials.WRITE
        what = Conflict.OPEN_WRITE
    credentials.require(c, fh.ino, mask)
    states = c.service.states
    states.about_to_change(c, fh.ino, what)
    try:
        file = states.file(fh.ino, fh.generation)
        delegation = yield from states.delegations.grant(c, file, access, want, reclaim=reclaim)
    except RefusedError as refused:
        write_delegation(c, out, None, refused.why)
        return
    write_delegation(c, out, delegation, None)
    c.set_stateid(delegation.stateid())


def _not_supported(c: Compound, args: Reader, out: Writer) -> None:
    """See the module."""
    raise NfsError(n.NFS4ERR_NOTSUPP)


OPERATIONS = {
    n.OP_DELEGRETURN: Operation(delegreturn, filehandle="current"),
    n.OP_WANT_DELEGATION: Operation(
        want_delegation, filehandle="current", reply_bytes=_REPLY_BYTES
    ),
    n.OP_DELEGPURGE: Operation(_not_supported),
    n.OP_GET_DIR_DELEGATION: Operation(_not_supported),
}
