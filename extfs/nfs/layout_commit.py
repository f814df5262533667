"""LAYOUTCOMMIT (RFC 8881 18.42): what clients wrote becomes part of files.

The core checks every range against the grants that the client has now. What is decided here is
which stateids are believed, and what the client is told when the core refuses: invariant 10 of
`extfs.nfs.layouts`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from extfs.core import BLOCK_SIZE, Filesystem, HolderState, Iomode
from extfs.nfs import constants as n
from extfs.nfs.effects import CoreCall, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.layout_recalls import covered
from extfs.nfs.layout_states import LayoutState
from extfs.nfs.stateids import Kind, Stateid

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.compound import Compound
    from extfs.nfs.layouts import LayoutTable

__all__ = ["commit", "refusal"]


def commit(
    table: LayoutTable,
    c: Compound,
    stateid: Stateid,
    ranges: list[tuple[int, int]],
    size: int,
    mtime: tuple[int, int] | None,
    *,
    layout_type: int,
    reclaim: bool,
) -> Steps[tuple[int, int]]:
    """Commit (offset, length) pairs of the current file; its size before and after that.

    `size`: the last byte written + 1, or 0; `mtime` in seconds and nanoseconds.
    """
    client = c.client
    assert client is not None
    ino, before = c.regular_size()
    _check_stateid(table, c, stateid, ino, layout_type, reclaim=reclaim)
    c.writable()
    holder = client.holder_id
    if not holder:
        raise NfsError(n.NFS4ERR_BAD_STATEID)
    fs = table.service.fs
    limit = -(-max(size, before) // BLOCK_SIZE) * BLOCK_SIZE
    try:
        after: int = yield _committing(fs, ino, holder, ranges, limit, size, mtime)
        _recall_behind(fs, ino, holder, ranges, limit)
    except OSError as error:
        if table.holders.is_gone(holder):
            table.holders.gone(holder)
            raise NfsError(n.NFS4ERR_BAD_STATEID) from None
        # Blocks that were written before may have been rewritten: no range says so.
        state = table.find(client, ino)
        writes = state is None or state.segments.has(Iomode.RW)
        table.service.count("layoutcommit_refused")
        raise refusal(error, bool(ranges) or size > before or writes) from None
    _check_not_revoked(table, client, holder, ino)
    table.service.count("layoutcommits")
    return before, after


def _check_not_revoked(table: LayoutTable, client: Client, holder: int, ino: int) -> None:
    """What was written in place, which no range says, was lost if something was revoked of which
    the event has not come yet, or if the client was fenced: who knows which writes were refused.
    Only a holder that missed a recall has anything revoked."""
    layouts = table.service.fs.layouts
    standing = layouts.state_of(holder)
    if standing is HolderState.LIVE:
        return
    if standing is None or standing is HolderState.GONE:
        table.holders.gone(holder)
        raise NfsError(n.NFS4ERR_BAD_STATEID)
    state = table.find(client, ino)
    mine = [g for g in layouts.grants(ino) if g.holder == holder]
    if state is not None and not covered(state, [(g.offset, g.length, g.iomode) for g in mine]):
        table.revoked(state)
        raise NfsError(n.NFS4ERR_BAD_STATEID)


def _check_stateid(
    table: LayoutTable, c: Compound, stateid: Stateid, ino: int, layout_type: int, *, reclaim: bool
) -> None:
    """The stateid is of a layout of this type. In grace it may be one of before the restart: the
    core knows what the client was told, and a client that does not say reclaim means it all the
    same."""
    grace = table.service.lease.in_grace()
    if reclaim and not grace:
        raise NfsError(n.NFS4ERR_NO_GRACE)
    try:
        state = table.believe(c, stateid, ino, Kind.LAYOUT)
    except NfsError as error:
        if not grace or error.status not in (n.NFS4ERR_STALE_STATEID, n.NFS4ERR_BAD_STATEID):
            raise
        assert c.client is not None
        holder = table.service.fs.layouts.holder(c.client.holder_id)
        # With blocks in quarantine something of it was revoked: it does not know of what.
        holders = table.holders
        if not c.client.holder_old or holder is None or holders.in_quarantine(holder):
            raise NfsError(n.NFS4ERR_BAD_STATEID) from None
        return
    assert isinstance(state, LayoutState)
    if state.layout_type != layout_type:
        raise NfsError(n.NFS4ERR_INVAL)


def refusal(error: OSError, loses: bool) -> Exception:
    """What the client is told. BADLAYOUT, success for Linux, only where nothing is lost."""
    if error.errno == errno.EINVAL:
        return NfsError(n.NFS4ERR_INVAL)
    if error.errno in (errno.ENXIO, errno.EOWNERDEAD, errno.ERANGE):
        if loses or error.errno == errno.EOWNERDEAD:
            return NfsError(n.NFS4ERR_BAD_STATEID)
        return NfsError(n.NFS4ERR_BADLAYOUT)
    return error


def _committing(
    fs: Filesystem,
    ino: int,
    holder: int,
    ranges: list[tuple[int, int]],
    limit: int,
    size: int,
    mtime: tuple[int, int] | None,
) -> CoreCall:
    """LAYOUT_COMMIT in the core; the file's size. Nothing becomes written behind `limit`, the end
    of the block in which the file ends."""
    inside = [(offset, min(length, limit - offset)) for offset, length in ranges if offset < limit]
    layouts = fs.layouts
    return CoreCall(
        layouts, lambda: layouts.prepare_commit(ino, holder, inside, size=size, mtime=mtime)
    )


def _recall_behind(
    fs: Filesystem, ino: int, holder: int, ranges: list[tuple[int, int]], limit: int
) -> None:
    """A client whose pages are larger than our blocks says that it has written the rest of its last
    page. It believes from now on that this is committed, so that is recalled: with the next layout
    it will know better."""
    end = max((offset + length for offset, length in ranges), default=0)
    if end > limit:
        fs.layouts.recall(ino, limit, -(-(end - limit) // BLOCK_SIZE) * BLOCK_SIZE, holder=holder)
