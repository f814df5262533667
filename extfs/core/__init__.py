"""The native core, typed: the only importer of ``extfs._core``.

Every call of ``native/extfs_core.h`` has one method here. Numbers keep the header's units: offsets
and sizes of files are bytes, extents and space are filesystem blocks, times are seconds since the
epoch (negative before it) with nanoseconds beside them. Names and targets are ``bytes``.

A failed call raises `CoreError`, an ``OSError`` with the errno for the front and the core's own
code for the log. Calls that change something may find the journal full; then nothing was done. The
methods of `Filesystem` wait and try again, which blocks the thread for as long as a checkpoint
takes. From trio, where nothing may block, use ``await fs.changing(lambda fs: fs.mkdir(...))``,
which waits in a thread of its own; or `Filesystem.nowait`, whose methods raise `JournalFullError`.
"""

from __future__ import annotations

from extfs.core.bridge import (
    Bridge,
    BridgeStats,
    OpcodeServer,
    Transport,
    TransportError,
    opcodes,
)
from extfs.core.calls import Calls, Prepared
from extfs.core.delegations import Delegation, DelegationConflict, Delegations
from extfs.core.device import Device, MountedState, SimDevice, mkfs, mounted_state, read_super
from extfs.core.filesystem import Filesystem
from extfs.core.layouts import (
    TO_THE_END,
    EventType,
    FenceRecord,
    FenceState,
    Grant,
    HolderKind,
    HolderRecord,
    HolderSpec,
    HolderState,
    Iomode,
    Latency,
    Layout,
    LayoutEvent,
    LayoutExtent,
    Layouts,
    LayoutState,
    LostCause,
)
from extfs.core.locks import Lock, Locks
from extfs.core.native import (
    CoreError,
    JournalFullError,
    drain_log,
    io_flusher,
    log_fd,
    log_lines,
)
from extfs.core.records import RECORD_BYTES_MAX, RIDER_BYTES, Records, Rider
from extfs.core.values import (
    BLOCK_SIZE,
    ROOT_INODE,
    Atime,
    Cred,
    Dirent,
    Extent,
    ExtentState,
    Memory,
    Mutant,
    Space,
    Stat,
    Stats,
    Superblock,
)

__all__ = [
    "BLOCK_SIZE",
    "RECORD_BYTES_MAX",
    "RIDER_BYTES",
    "ROOT_INODE",
    "TO_THE_END",
    "Atime",
    "Bridge",
    "BridgeStats",
    "Calls",
    "CoreError",
    "Cred",
    "Delegation",
    "DelegationConflict",
    "Delegations",
    "Device",
    "Dirent",
    "EventType",
    "Extent",
    "ExtentState",
    "FenceRecord",
    "FenceState",
    "Filesystem",
    "Grant",
    "HolderKind",
    "HolderRecord",
    "HolderSpec",
    "HolderState",
    "Iomode",
    "JournalFullError",
    "Latency",
    "Layout",
    "LayoutEvent",
    "LayoutExtent",
    "LayoutState",
    "Layouts",
    "Lock",
    "Locks",
    "LostCause",
    "Memory",
    "MountedState",
    "Mutant",
    "OpcodeServer",
    "Prepared",
    "Records",
    "Rider",
    "SimDevice",
    "Space",
    "Stat",
    "Stats",
    "Superblock",
    "Transport",
    "TransportError",
    "drain_log",
    "io_flusher",
    "log_fd",
    "log_lines",
    "mkfs",
    "mounted_state",
    "opcodes",
    "read_super",
]

# They are known by the package's name, whichever module defines them.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = __name__
del _name
