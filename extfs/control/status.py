"""What /.extfs/status says: the state of one mounted filesystem, as JSON.

The text is made when the file is opened, so one reader sees one moment. Lists are bounded; ``more``
beside one says how many entries it leaves out, -1: some. Sizes are bytes, times seconds unless a
name says otherwise. No keys of holders are in it: anybody may read it.

    version     of this document: 1
    uuid, label, device, mountpoint, read_only, block_size, recall_ms
    time, uptime    since the epoch; since the mount
    error       what turned the filesystem read-only, or null
    space       total, free, available, busy (free, but not reusable yet), quarantined; inodes
    layouts     counters (native/layout.h), latencies of get, commit, return and recall: a count,
                and upper bounds in microseconds of its percentiles
    holders     live, lost: how many; list
    grants      files: those of each inode
    recalls     of which holders do not have answered yet, with the age of the oldest in each
    fences      driver; waiting: fences that are not confirmed, each with its cause (recall, ended,
                mount), driver, state (waiting, decided, issued, failed), attempts, when it began
                and the seconds since; history: the last 256 that are over, oldest first, with
                their outcome (confirmed, confirmed elsewhere, returned, came back, gone)
    memory      metadata: bytes that cached blocks hold, resident (free pages, too), kept (dirty or
                only in the log), limit (of the mount), effective_limit (now); inodes: cached,
                unused, their limits (of unused), bytes; lookups: bytes of what the kernel knows of;
                pressure: what is watched (or why nothing is), cgroup_limit, events, near_limit (the
                cgroup was found nearly full), shrinks, given_back in all, and when last
    core, bridge    counters of both; how requests come, and whether idle CPUs poll meanwhile
    nfs         the layout server: where it listens, its clients, sessions, opens, locks, layouts,
                counters; null: none runs
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from extfs.core import (
    BLOCK_SIZE,
    BridgeStats,
    CoreError,
    Filesystem,
    Grant,
    HolderKind,
    HolderRecord,
    HolderState,
    Latency,
)
from extfs.layout import FenceStatus, Fencing, PastFence

__all__ = ["VERSION", "Status", "percentiles"]

VERSION = 1
HOLDERS_MAX = 1000
FILES_MAX = 500
GRANTS_MAX = 2000
GRANTS_OF_A_FILE_MAX = 100
RECALLS_MAX = 500

_PERCENTILES = (50, 90, 99, 99.9)


def percentiles(buckets: list[int]) -> dict[str, Any]:
    """Count, and upper bounds in microseconds, of a histogram of `Layouts.latency`.

    Of nothing, and above the last bucket, which has no upper end: None.
    """
    total = sum(buckets)
    result: dict[str, Any] = {"count": total}
    for percent in _PERCENTILES:
        rank = math.ceil(total * percent / 100)
        bound: int | None = None
        seen = 0
        for number, count in enumerate(buckets):
            seen += count
            if total and seen >= rank:
                bound = 1 << (number + 1) if number + 1 < len(buckets) else None
                break
        result[f"p{percent:g}_us"] = bound
    result["buckets"] = buckets
    return result


def _holder(holder: HolderRecord) -> dict[str, Any]:
    spec = holder.spec
    return {
        "id": holder.id,
        "state": holder.state.name.lower(),
        "kind": "client" if spec.kind is HolderKind.CLIENT else "local",
        "name": spec.name,
        "uid": spec.uid,
        "pid": spec.pid,
        "fence": spec.fence,
        "fence_key": f"{spec.fence_key:#018x}" if spec.fence.startswith("scsi:") else "",
        "boot_id": str(uuid.UUID(bytes=spec.boot_id)),
        "grants": holder.grants,
        "quarantined": holder.quarantined * BLOCK_SIZE,
        "recalls": holder.recalls,
        "recalls_missed": holder.missed,
    }


def _grant(grant: Grant) -> dict[str, Any]:
    return {
        "holder": grant.holder,
        "offset": grant.offset,
        "length": grant.length,
        "iomode": grant.iomode.name.lower(),
        "seq": grant.seq,
        "atomic": grant.atomic,
    }


def _fence(fence: FenceStatus | PastFence) -> dict[str, Any]:
    return {
        "holder": fence.holder,
        "name": fence.name,
        "fence": fence.fence,
        "cause": fence.cause.name.lower(),
        "driver": fence.driver,
        "begun": fence.begun,
        "attempts": fence.attempts,
    }


class Status:
    """Makes the document, in any thread. `bridge`, `nfs`, `pressure` are asked each time."""

    def __init__(
        self,
        filesystem: Filesystem,
        *,
        device: str,
        mountpoint: str,
        read_only: bool,
        recall_ms: int,
        fencing: Fencing | None,
        bridge: Callable[[], BridgeStats],
        nfs: Callable[[], dict[str, Any]] | None = None,
        pressure: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._filesystem = filesystem
        self._device = device
        self._mountpoint = mountpoint
        self._read_only = read_only
        self._recall_ms = recall_ms
        self._fencing = fencing
        self._bridge = bridge
        self._nfs = nfs
        self._pressure = pressure
        self._began = time.monotonic()

    def document(self) -> dict[str, Any]:
        """The state now. Some short calls of the core: milliseconds with thousands of grants."""
        fs = self._filesystem
        identity = fs.super
        error = fs.shutdown_error
        space = fs.statfs()
        grants, recalls = self._grants()
        return {
            "version": VERSION,
            "uuid": str(uuid.UUID(bytes=identity.uuid)),
            "label": identity.label.decode("utf-8", "backslashreplace"),
            "device": self._device,
            "mountpoint": self._mountpoint,
            "read_only": self._read_only,
            "block_size": identity.block_size,
            "recall_ms": self._recall_ms,
            "time": time.time(),
            "uptime": time.monotonic() - self._began,
            "error": None if error is None else error.text,
            "space": {
                "total": space.total * BLOCK_SIZE,
                "free": space.free * BLOCK_SIZE,
                "available": space.avail * BLOCK_SIZE,
                "busy": space.busy * BLOCK_SIZE,
                "quarantined": space.quarantined * BLOCK_SIZE,
                "inodes": space.inodes,
            },
            "layouts": {
                "counters": fs.layouts.counters(),
                "latencies": {
                    kind.name.lower(): percentiles(fs.layouts.latency(kind)) for kind in Latency
                },
            },
            "holders": self._holders(),
            "grants": grants,
            "recalls": recalls,
            "fences": self._fences(),
            "memory": self._memory(),
            "core": asdict(fs.stats()),
            "bridge": asdict(self._bridge()),
            "nfs": None if self._nfs is None else self._nfs(),
        }

    def json(self) -> bytes:
        """The document as text, with a newline at its end."""
        return json.dumps(self.document(), indent=1).encode() + b"\n"

    def _memory(self) -> dict[str, Any]:
        memory = self._filesystem.memory()
        return {
            "metadata": {
                "bytes": memory.cache_bytes,
                "resident": memory.cache_resident,
                "kept": memory.cache_kept,
                "limit": memory.cache_asked,
                "effective_limit": memory.cache_limit,
            },
            "inodes": {
                "cached": memory.inodes,
                "unused": memory.inodes_unused,
                "limit": memory.inode_asked,
                "effective_limit": memory.inode_limit,
                "bytes": memory.inodes * memory.inode_bytes,
            },
            "lookups": memory.lookup_bytes,
            "pressure": None if self._pressure is None else self._pressure(),
        }

    def _holders(self) -> dict[str, Any]:
        holders = self._filesystem.layouts.holders()
        return {
            "live": sum(holder.state is HolderState.LIVE for holder in holders),
            "lost": sum(holder.state is HolderState.LOST for holder in holders),
            "list": [_holder(holder) for holder in holders[:HOLDERS_MAX]],
            "more": max(0, len(holders) - HOLDERS_MAX),
        }

    def _grants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Grants by file, and recalls that are not answered."""
        layouts = self._filesystem.layouts
        now = layouts.now()
        left = GRANTS_MAX
        files: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        inodes = list(layouts.granted_inodes(FILES_MAX + 1))
        unseen = len(inodes) > FILES_MAX
        for ino in inodes[:FILES_MAX]:
            room = min(left, GRANTS_OF_A_FILE_MAX)
            if not room:
                unseen = True
                break
            try:
                found = layouts.grants(ino, room + 1)
            except CoreError:  # gone since
                continue
            if not found:
                continue
            told = found[:room]
            left -= len(told)
            files.append(
                {
                    "ino": ino,
                    "generation": told[0].generation,
                    "list": [_grant(grant) for grant in told],
                    "more": -1 if len(found) > room else 0,
                }
            )
            waiting += [
                {
                    "holder": grant.holder,
                    "ino": ino,
                    "offset": grant.offset,
                    "length": grant.length,
                    "iomode": grant.iomode.name.lower(),
                    "age_ms": max(0, now - grant.recalled_ns) // 1_000_000,
                }
                for grant in told
                if grant.recalled_ns
            ]
        recalls = {
            "list": waiting[:RECALLS_MAX],
            "more": -1 if unseen or len(waiting) > RECALLS_MAX else 0,
        }
        return {"files": files, "more": -1 if unseen else 0}, recalls

    def _fences(self) -> dict[str, Any]:
        if self._fencing is None:
            return {"driver": "none", "waiting": [], "history": []}
        return {
            "driver": self._fencing.driver,
            "waiting": [
                _fence(fence)
                | {
                    "state": fence.state,
                    "seconds": fence.waited,
                    "last_failure": fence.last_failure,
                }
                for fence in self._fencing.waiting()
            ],
            "history": [
                _fence(fence)
                | {"seconds": fence.seconds, "outcome": fence.outcome, "detail": fence.detail}
                for fence in self._fencing.history()
            ],
        }
