"""All operations, by number."""

from __future__ import annotations

from extfs.nfs.compound import Operation
from extfs.nfs.operations import (
    attributes,
    contents,
    copies,
    delegations,
    directories,
    layouts,
    locks,
    names,
    opens,
    sessions,
    xattrs,
)

__all__ = ["OPERATIONS"]

_TABLES = (
    sessions.OPERATIONS,
    names.OPERATIONS,
    attributes.OPERATIONS,
    directories.OPERATIONS,
    opens.OPERATIONS,
    locks.OPERATIONS,
    delegations.OPERATIONS,
    contents.OPERATIONS,
    copies.OPERATIONS,
    xattrs.OPERATIONS,
    layouts.OPERATIONS,
)


def _joined() -> dict[int, Operation]:
    table: dict[int, Operation] = {}
    for part in _TABLES:
        assert not table.keys() & part.keys(), "an operation in two tables"
        table |= part
    return table


OPERATIONS = _joined()
