"""What calls take and return: dataclasses for the structs of ``native/extfs_core.h``."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from extfs.core.native import ffi

ROOT_INODE = 1
BLOCK_SIZE = 4096


class ExtentState(enum.IntEnum):
    """What a reader of the file sees there: holes and unwritten extents read as zeros."""

    HOLE = 0
    UNWRITTEN = 1
    WRITTEN = 2


class Atime(enum.IntEnum):
    """When reading updates the access time, as in mount(8)."""

    RELATIME = 0
    STRICT = 1
    NONE = 2


class Mutant(enum.IntEnum):
    """Deliberate violations of the ordering rules; tests set them to prove that they are caught."""

    NONE = 0
    COMMIT_BEFORE_FLUSH = 1
    CHECKPOINT_NO_FLUSH = 2
    META_REUSE_EARLY = 3
    TAIL_ZERO_EARLY = 4
    STATE_BY_SIZE = 5
    COMMIT_UNCHECKED = 6
    QUARANTINE_DROPPED = 7
    CONVERT_UNFLUSHED = 8
    REVOKE_IN_PLACE = 9
    HOLDERS_FORGOTTEN = 10
    READ_UNHELD = 11
    RIDER_APART = 12


@dataclass(frozen=True, slots=True)
class Superblock:
    """Geometry and identity, sizes in blocks. `from_copy`: the primary is damaged."""

    uuid: bytes
    label: bytes
    compat: int
    ro_compat: int
    incompat: int
    total_blocks: int
    ag_blocks: int
    journal_blocks: int
    journal_start: int
    ag_count: int
    block_size: int
    created_sec: int
    from_copy: bool


@dataclass(frozen=True, slots=True)
class Space:
    """Blocks: `avail` is what users may still take; `busy` is free but not reusable yet."""

    total: int
    free: int
    avail: int
    busy: int
    quarantined: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the mount.

    But `bufs`, `dirty`, `logged`, `log_*`, `lookups` and `early_bytes` are levels now.
    """

    commits: int
    flush_only: int
    images: int
    checkpoints: int
    home_writes: int
    log_blocks: int
    log_used: int
    waits_for_space: int
    bufs: int
    dirty: int
    logged: int
    hits: int
    misses: int
    evictions: int
    lookups: int
    dev_reads: int
    dev_writes: int
    dev_flushes: int
    durable_xid: int
    running_xid: int
    early_writes: int
    early_waits: int
    early_errors: int
    early_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What the caches hold, and their limits: those of now, and those the mount asked for.

    `cache_*` are bytes of metadata blocks: `kept` is dirty or only in the log, `resident` counts
    free pages, too. `inode_limit` bounds `inodes_unused`; an inode takes `inode_bytes`.
    `lookup_bytes`: of the table of what the kernel knows of, which is its own to shrink.
    """

    cache_bytes: int
    cache_kept: int
    cache_resident: int
    cache_limit: int
    cache_asked: int
    inodes: int
    inodes_unused: int
    inode_limit: int
    inode_asked: int
    inode_bytes: int
    lookup_bytes: int


class Stat(NamedTuple):
    """Attributes of an inode. `size` in bytes (a directory: entries), `blocks` in device blocks.

    A tuple in the order of struct extfs_stat, because it is made for every request of a client.
    """

    ino: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    flags: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    btime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int
    parent: int
    change: int
    subdirs: int
    xattrs: int


_STAT = struct.Struct("=Q6I2Q4q4I3Q2I")
if ffi.sizeof("struct extfs_stat") != _STAT.size:
    raise ImportError("struct extfs_stat is not what extfs.core.Stat says")
STATS_FIELDS = tuple(Stats.__dataclass_fields__)
MEMORY_FIELDS = tuple(Memory.__dataclass_fields__)


def stat_of(raw: Any) -> Stat:
    """From a struct extfs_stat."""
    return Stat._make(_STAT.unpack(ffi.buffer(raw)))


@dataclass(frozen=True, slots=True)
class Cred:
    """Who creates something: filesystem ids and umask of the caller."""

    uid: int = 0
    gid: int = 0
    umask: int = 0o022


@dataclass(frozen=True, slots=True)
class Dirent:
    """A directory entry. `cookie` is its readdir offset; `type` is a DT_* number."""

    ino: int
    cookie: int
    type: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of file blocks `file`.. that lives in device blocks `block`.. (0 for a hole); all in
    blocks. `shared`: other files map some of it too."""

    file: int
    block: int
    len: int
    state: ExtentState
    flags: int
    shared: bool


def superblock_of(raw: Any) -> Superblock:
    """From a struct extfs_super."""
    return Superblock(
        uuid=bytes(ffi.buffer(raw.uuid, 16)),
        label=bytes(ffi.buffer(raw.label, 64)).rstrip(b"\0"),
        compat=raw.compat,
        ro_compat=raw.ro_compat,
        incompat=raw.incompat,
        total_blocks=raw.total_blocks,
        ag_blocks=raw.ag_blocks,
        journal_blocks=raw.journal_blocks,
        journal_start=raw.journal_start,
        ag_count=raw.ag_count,
        block_size=raw.block_size,
        created_sec=raw.created_sec,
        from_copy=bool(raw.from_copy),
    )


def cred_struct(cred: Cred) -> Any:
    """A struct extfs_cred."""
    return ffi.new("struct extfs_cred *", (cred.uid, cred.gid, cred.umask))
