"""Counters of /proc/self/mountstats: what an NFS client really sent.

Data alone prove nothing about layouts: a client that is displeased by one sends READ and WRITE to
the server instead, and says nothing. Formats: fs/nfs/super.c nfs_show_stats, net/sunrpc/stats.c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_EVENT_DELAY = 24  # include/linux/nfs_iostat.h: NFSIOS_DELAY, NFSIOS_PNFS_READ, NFSIOS_PNFS_WRITE
_EVENT_PNFS_READ = 25
_EVENT_PNFS_WRITE = 26


@dataclass(frozen=True)
class Operation:
    """One operation's row: RPCs begun, sent (more: retransmissions), failed; milliseconds."""

    count: int
    transmissions: int
    execute_ms: int
    errors: int


@dataclass(frozen=True)
class MountStats:
    """One mount's counters; the difference of two is what happened between them."""

    layout: str
    """What pnfs= says: LAYOUT_BLOCK_VOLUME, "not configured", ..."""
    operations: Mapping[str, Operation]
    pnfs_reads: int
    pnfs_writes: int
    delays: int
    """Answers NFS4ERR_DELAY."""

    def __getitem__(self, operation: str) -> int:
        """How often an operation was begun; 0 when the kernel does not know it."""
        row = self.operations.get(operation)
        return row.count if row else 0

    def __sub__(self, before: MountStats) -> MountStats:
        def less(name: str) -> Operation:
            now, then = self.operations[name], before.operations.get(name, Operation(0, 0, 0, 0))
            return Operation(
                now.count - then.count,
                now.transmissions - then.transmissions,
                now.execute_ms - then.execute_ms,
                now.errors - then.errors,
            )

        return MountStats(
            self.layout,
            {name: less(name) for name in self.operations},
            self.pnfs_reads - before.pnfs_reads,
            self.pnfs_writes - before.pnfs_writes,
            self.delays - before.delays,
        )

    def __str__(self) -> str:
        rows = " ".join(f"{name}={row.count}" for name, row in self.operations.items() if row.count)
        return (
            f"pnfs={self.layout} {rows} "
            f"(pnfs reads {self.pnfs_reads}, writes {self.pnfs_writes}, delays {self.delays})"
        )


def parse(text: str, mountpoint: str) -> MountStats:
    """The counters of the NFS mount at `mountpoint`. ValueError: there is none."""
    sections = re.split(r"^device ", text, flags=re.MULTILINE)
    found = [
        part for part in sections if re.match(rf"\S+ mounted on {re.escape(mountpoint)} with", part)
    ]
    if not found:
        raise ValueError(f"no mount at {mountpoint} in mountstats")
    section = found[-1]
    layout = re.search(r"\bpnfs=([A-Za-z_0-9 ]+)", section)
    events = re.search(r"^\s*events:\s*(.*)$", section, re.MULTILINE)
    if events is None:
        raise ValueError(f"the mount at {mountpoint} is not one of NFS")
    numbers = [int(word) for word in events[1].split()]
    operations = {}
    for name, row in re.findall(r"^\s*([A-Z_]+): ((?:\d+ ){7,}\d+)", section, re.MULTILINE):
        fields = [int(word) for word in row.split()]
        operations[name] = Operation(
            fields[0], fields[1], fields[7], fields[8] if len(fields) > 8 else 0
        )
    return MountStats(
        layout[1] if layout else "",
        operations,
        numbers[_EVENT_PNFS_READ],
        numbers[_EVENT_PNFS_WRITE],
        numbers[_EVENT_DELAY],
    )
