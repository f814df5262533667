"""The structs and numbers of ``native/extfs_ioctl.h``, as the C compiler lays them out.

A test compiles the header and compares every size, offset and number. All integers are in the
host's byte order, as in the header.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_int64, c_uint8, c_uint32, c_uint64

VERSION = 1
END = (1 << 64) - 1
"""As a length: to the end; as a cursor: nothing is left."""

# Flags of holders, gets, commits, returns, watches.
HOLDER_RESUME = 0x1
HOLDER_CLIENT = 0x2
LAYOUT_WAIT = 0x1
LAYOUT_RECALL = 0x2
LAYOUT_ATOMIC = 0x4
COMMIT_LAZY = 0x8
COMMIT_MTIME = 0x10
RETURN_ALL = 0x20
WATCH_OFF = 0x1
EXTENT_SHARED = 0x1
EXTENT_LAYOUT = 0x2

MAP_EXTENTS = 500
LAYOUT_EXTENTS_MAX = 400
LIST_GRANTS = 300
EVENTS_MAX = 100
COMMIT_IOCTL_MAX = 1000
COMMIT_RANGES_MAX = 65000
PIN_MAX_MS = 60000
IOCTL_BYTES_MAX = 16383
"""FUSE carries no more in one ioctl: the size field of a command number has 14 bits."""


class Handle(ctypes.Structure):
    """struct extfs_handle."""

    _fields_ = [("ino", c_uint64), ("generation", c_uint32), ("reserved", c_uint32)]


class MapExtent(ctypes.Structure):
    """struct extfs_ioc_extent."""

    _fields_ = [
        ("offset", c_uint64),
        ("physical", c_uint64),
        ("length", c_uint64),
        ("state", c_uint32),
        ("flags", c_uint32),
    ]


class Map(ctypes.Structure):
    """struct extfs_ioc_map."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("file", Handle),
        ("start", c_uint64),
        ("length", c_uint64),
        ("next", c_uint64),
        ("file_size", c_uint64),
        ("generation", c_uint64),
        ("count", c_uint32),
        ("reserved", c_uint32 * 3),
        ("extents", MapExtent * MAP_EXTENTS),
    ]


class Info(ctypes.Structure):
    """struct extfs_ioc_info."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("uuid", c_uint8 * 16),
        ("block_size", c_uint32),
        ("version", c_uint32),
        ("device_size", c_uint64),
        ("free", c_uint64),
        ("quarantined", c_uint64),
        ("recall_ms", c_uint64),
        ("device", c_char * 256),
        ("reserved", c_uint64 * 8),
    ]


class HandleCall(ctypes.Structure):
    """struct extfs_ioc_handle."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("file", Handle),
        ("reserved", c_uint64 * 2),
    ]


class HolderCall(ctypes.Structure):
    """struct extfs_ioc_holder."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("id", c_uint64),
        ("key", c_uint64),
        ("recall_ms", c_uint64),
        ("name", c_char * 64),
        ("fence", c_char * 128),
        ("reserved", c_uint64 * 4),
    ]


class LayoutExtent(ctypes.Structure):
    """struct extfs_layout_extent."""

    _fields_ = [
        ("offset", c_uint64),
        ("physical", c_uint64),
        ("length", c_uint64),
        ("state", c_uint32),
        ("reserved", c_uint32),
    ]


class LayoutGet(ctypes.Structure):
    """struct extfs_ioc_layout, without the extents that follow it."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("holder", c_uint64),
        ("key", c_uint64),
        ("file", Handle),
        ("iomode", c_uint32),
        ("count", c_uint32),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("min_length", c_uint64),
        ("time_ms", c_uint64),
        ("next", c_uint64),
        ("seq", c_uint64),
        ("generation", c_uint64),
        ("file_size", c_uint64),
        ("reserved", c_uint64 * 2),
    ]


class Range(ctypes.Structure):
    """struct extfs_range."""

    _fields_ = [("offset", c_uint64), ("length", c_uint64)]


class LayoutCommit(ctypes.Structure):
    """struct extfs_ioc_commit, without the ranges that follow it."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("holder", c_uint64),
        ("key", c_uint64),
        ("file", Handle),
        ("seq", c_uint64),
        ("file_size", c_uint64),
        ("mtime_sec", c_int64),
        ("mtime_nsec", c_uint32),
        ("count", c_uint32),
        ("reserved", c_uint64 * 2),
    ]


class LayoutReturn(ctypes.Structure):
    """struct extfs_ioc_return."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("holder", c_uint64),
        ("key", c_uint64),
        ("file", Handle),
        ("iomode", c_uint32),
        ("reserved0", c_uint32),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("reserved", c_uint64 * 2),
    ]


class Recall(ctypes.Structure):
    """struct extfs_ioc_recall."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("holder", c_uint64),
        ("file", Handle),
        ("iomode", c_uint32),
        ("reserved0", c_uint32),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("reserved", c_uint64 * 2),
    ]


class GrantEntry(ctypes.Structure):
    """struct extfs_grant."""

    _fields_ = [
        ("holder", c_uint64),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("seq", c_uint64),
        ("iomode", c_uint32),
        ("flags", c_uint32),
    ]


class List(ctypes.Structure):
    """struct extfs_ioc_list."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("file", Handle),
        ("offset", c_uint64),
        ("next", c_uint64),
        ("count", c_uint32),
        ("reserved", c_uint32 * 3),
        ("grants", GrantEntry * LIST_GRANTS),
    ]


class Watch(ctypes.Structure):
    """struct extfs_ioc_watch."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("holder", c_uint64),
        ("key", c_uint64),
        ("file", Handle),
        ("reserved", c_uint64 * 2),
    ]


class EventEntry(ctypes.Structure):
    """struct extfs_event."""

    _fields_ = [
        ("size", c_uint32),
        ("type", c_uint32),
        ("seq", c_uint64),
        ("holder", c_uint64),
        ("file", Handle),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("grant_seq", c_uint64),
        ("left_ms", c_uint64),
        ("iomode", c_uint32),
        ("reserved", c_uint32),
    ]


class Events(ctypes.Structure):
    """struct extfs_ioc_events."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("count", c_uint32),
        ("reserved", c_uint32 * 3),
        ("events", EventEntry * EVENTS_MAX),
    ]


class EventSocket(ctypes.Structure):
    """struct extfs_ioc_event_socket."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("fd", c_int32),
        ("reserved", c_uint32 * 3),
    ]


class Pair(ctypes.Structure):
    """struct extfs_ioc_pair."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("file", Handle),
        ("other", Handle),
        ("offset", c_uint64),
        ("other_offset", c_uint64),
        ("length", c_uint64),
        ("done", c_uint64),
        ("reserved", c_uint64 * 2),
    ]


class Shift(ctypes.Structure):
    """struct extfs_ioc_shift."""

    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("file", Handle),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("reserved", c_uint64 * 2),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "extfs_handle": Handle,
    "extfs_ioc_extent": MapExtent,
    "extfs_ioc_map": Map,
    "extfs_ioc_info": Info,
    "extfs_ioc_handle": HandleCall,
    "extfs_ioc_holder": HolderCall,
    "extfs_layout_extent": LayoutExtent,
    "extfs_ioc_layout": LayoutGet,
    "extfs_range": Range,
    "extfs_ioc_commit": LayoutCommit,
    "extfs_ioc_return": LayoutReturn,
    "extfs_ioc_recall": Recall,
    "extfs_grant": GrantEntry,
    "extfs_ioc_list": List,
    "extfs_ioc_watch": Watch,
    "extfs_event": EventEntry,
    "extfs_ioc_events": Events,
    "extfs_ioc_event_socket": EventSocket,
    "extfs_ioc_pair": Pair,
    "extfs_ioc_shift": Shift,
}
"""By the names that they have in C."""


def command(number: int, size: int) -> int:
    """_IOWR('X', number, a struct of `size` bytes)."""
    if size > IOCTL_BYTES_MAX:
        raise ValueError(f"{size} bytes do not fit into an ioctl")
    return 3 << 30 | size << 16 | ord("X") << 8 | number


def layout_get_command(extents: int) -> int:
    """EXTFS_IOC_LAYOUT_GET(extents)."""
    return command(0xE7, ctypes.sizeof(LayoutGet) + extents * ctypes.sizeof(LayoutExtent))


def layout_commit_command(ranges: int) -> int:
    """EXTFS_IOC_LAYOUT_COMMIT(ranges)."""
    return command(0xE8, ctypes.sizeof(LayoutCommit) + ranges * ctypes.sizeof(Range))


IOC_MAP = command(0xE1, ctypes.sizeof(Map))
IOC_INFO = command(0xE2, ctypes.sizeof(Info))
IOC_HANDLE = command(0xE3, ctypes.sizeof(HandleCall))
IOC_HOLDER_REGISTER = command(0xE4, ctypes.sizeof(HolderCall))
IOC_HOLDER_GONE = command(0xE5, ctypes.sizeof(HolderCall))
IOC_FENCED = command(0xE6, ctypes.sizeof(HolderCall))
IOC_LAYOUT_RETURN = command(0xE9, ctypes.sizeof(LayoutReturn))
IOC_RECALL = command(0xEA, ctypes.sizeof(Recall))
IOC_LIST = command(0xEB, ctypes.sizeof(List))
IOC_WATCH = command(0xEC, ctypes.sizeof(Watch))
IOC_EVENTS = command(0xED, ctypes.sizeof(Events))
IOC_EXCHANGE = command(0xEE, ctypes.sizeof(Pair))
IOC_CLONE = command(0xEF, ctypes.sizeof(Pair))
IOC_DEDUPE = command(0xF0, ctypes.sizeof(Pair))
IOC_COLLAPSE = command(0xF1, ctypes.sizeof(Shift))
IOC_INSERT = command(0xF2, ctypes.sizeof(Shift))
IOC_SHUTDOWN = command(0xF3, ctypes.sizeof(HandleCall))
IOC_EVENT_SOCKET = command(0xF4, ctypes.sizeof(EventSocket))
