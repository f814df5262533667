"""I/O that came through the server, counted by why it did not go to the device, as far as is known.

not_offered     the export or the client's host has no layouts, or they cannot be recalled
unaligned       not whole blocks of the file, which a client with a block layout would have to
                read or zero around
recalled        the client's layout is being recalled
layout_held     the client has a layout of just this range and came here all the same: it could
                not find the device, or its I/O to it failed
no_layout       the client has none there: it did not ask, or was told to try later
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound

__all__ = ["count"]

_BLOCK = 4096


def count(c: Compound, what: str, offset: int, length: int) -> None:
    """A "read" or "write" of the current file was served: requests and bytes, by reason."""
    service = c.service
    service.count(f"server_{what}s")
    service.count(f"server_{what}_bytes", length)
    service.count(f"server_{what}s_{_reason(c, offset, length)}")


def _reason(c: Compound, offset: int, length: int) -> str:
    client, fh = c.client, c.current
    assert client is not None
    assert fh is not None
    service = c.service
    if not fh.export.offers_layouts(c.connection.host) or not service.callbacks.path_up(client):
        return "not_offered"
    if offset % _BLOCK:
        return "unaligned"
    state = service.layouts.find(client, fh.ino)
    if state is None:
        return "no_layout"
    if state.recall is not None:
        return "recalled"
    return "layout_held" if state.overlaps(offset, offset + length) else "no_layout"
