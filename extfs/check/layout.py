"""Every structure of the on-disk format, from native/FORMAT.md.

`STRUCTURES` gives name, fields, offsets and sizes; tests compare it with the C compiler's view of
native/format.h. All integers are little-endian. Hot paths use the codecs (``struct.Struct``) below
the tables directly.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Any

BLOCK_SIZE = 4096
BLOCK_SHIFT = 12
SECTOR_SIZE = 512
VERSION = 1

SUPER_BLOCK = 0
HEARTBEAT_BLOCK = 1
ROOT_BLOCK = 2
AG0_HEADER_BLOCK = 3
SUPER_COPY_BLOCK = 4096
JOURNAL_START_BLOCK = 4097
DEVICE_MIN_BLOCKS = 8192
JOURNAL_MIN_BLOCKS = 1024
JOURNAL_MAX_BLOCKS = 262144
AG_MIN_BLOCKS = 8192
AG_MAX_COUNT = 1024
DEVICE_MAX_BLOCKS = 1 << 48
FILE_MAX_BLOCKS = 1 << 51
FILE_MAX_BYTES = (1 << 63) - 1

ROOT_INODE = 1
LABEL_BYTES = 64
AG_FREELIST_MAX = 64
TREE_ROOT_COUNT = 16
NODE_HEAD_SIZE = 64
SLOT_SIZE = 24
NODE_SLOT_MAX = 168
RECORD_MAX = 1280
MAX_HEIGHT = 12
EXTENT_MAX_BLOCKS = 0x7FFFFFFF
JDESC_TAGS = 248
GROUP_MAX_IMAGES = 4096
XATTR_PART_BYTES = 1024
NFS_PART_BYTES = 1024
NFS_VALUE_MAX = 65536
NFS_KIND_SHIFT = 56
RIDER_MARKS = 8
XATTR_VALUE_MAX = 65536
SYMLINK_PART_BYTES = 1024
SYMLINK_MAX = 4095
DIR_HASH_BITS = 47
DIR_SEQ_BITS = 16
XATTR_HASH_BITS = 40


class Magic(enum.IntEnum):
    """First four bytes of a metadata block, as a little-endian number."""

    SUPER = 0x62735845
    HEARTBEAT = 0x62685845
    ROOT = 0x74725845
    AG = 0x67615845
    NODE = 0x6E625845
    JHEAD = 0x686A5845
    JDESC = 0x646A5845


class Tree(enum.IntEnum):
    """Types of trees; 0 to 15 are slots of the root block, 16 and 17 belong to an AG."""

    INODE = 0
    EXTENT = 1
    DIRENT = 2
    XATTR = 3
    SYMLINK = 4
    REFCOUNT = 5
    ORPHAN = 6
    INTENT = 7
    QUARANTINE = 8
    HOLDER = 9
    FENCE = 10
    EXPOSURE = 11
    NFS_CLIENT = 12
    FREE_BY_BLOCK = 16
    FREE_BY_LEN = 17

    @property
    def title(self) -> str:
        """As people say it: "inode", "free-by-block"."""
        return self.name.lower().replace("_", "-")


GLOBAL_TREES = tuple(tree for tree in Tree if tree < TREE_ROOT_COUNT)


class ExtentState(enum.IntEnum):
    """A hole has no record, so 0 is never on disk."""

    HOLE = 0
    UNWRITTEN = 1
    WRITTEN = 2


class InodeFlag(enum.IntFlag):
    """Bits of inode.flags."""

    SHARED = 1
    STAGING = 2
    ACL = 4
    DEFACL = 8
    PREALLOC = 16


FORK_DATA = 0
FORK_STAGING = 1
EXT_F_LAYOUT = 1
HEARTBEAT_CLEAN = 0
HEARTBEAT_MOUNTED = 1
INTENT_TYPES = {
    1: "free-tail",
    2: "punch",
    3: "atomic",
    4: "exchange",
    5: "collapse",
    6: "insert",
}
INTENT_STAGING = 1
"""Flag of a punch: of the staging fork."""
QUARANTINE_ANY = (1 << 64) - 1
EXPOSURE_INODE = 1 << 63
"""Bit of an exposure's key: it is about a whole inode."""


class ExposureFlag(enum.IntFlag):
    """Bits of exposure.flags."""

    STAGING = 1
    INODE = 2
    RW = 4


XATTR_PREFIXES = {1: b"user.", 2: b"trusted.", 3: b"security.", 4: b"system."}
XNS_SYSTEM = 4
HOLDER_KINDS = {1: "local", 2: "layout client"}
HOLDER_STATES = {1: "live", 2: "lost", 3: "gone"}


class NfsKind(enum.IntEnum):
    """The top byte of a number in TREE_NFS_CLIENT."""

    SERVER = 0
    CLIENT = 1
    STATE = 2
    SESSION = 3
    RIDER = 4


FENCE_STATES = {1: "decided", 2: "issued", 4: "failed"}


@dataclass(frozen=True)
class Field:
    """One field: `code` as in the struct module, `count` > 1 for arrays of numbers."""

    name: str
    code: str
    offset: int
    size: int
    count: int = 1


@dataclass(frozen=True)
class Structure:
    """A structure: fields in order without gaps, so offsets follow from sizes."""

    name: str
    size: int
    fields: tuple[Field, ...]
    codec: struct.Struct = field(compare=False)

    def unpack(self, block: bytes | bytearray | memoryview, offset: int = 0) -> dict[str, Any]:
        """Field name to value; arrays as tuples; reserved fields as bytes."""
        values = iter(self.codec.unpack_from(block, offset))
        result: dict[str, Any] = {}
        for item in self.fields:
            if item.count > 1:
                result[item.name] = tuple(next(values) for _ in range(item.count))
            else:
                result[item.name] = next(values)
        return result

    def pack_into(self, block: bytearray, offset: int, values: dict[str, Any]) -> None:
        """Write all fields; names that `values` lacks become zero."""
        flat: list[Any] = []
        for item in self.fields:
            zero: Any = b"" if item.code.endswith("s") else 0
            if item.count > 1:
                flat.extend(values.get(item.name, (0,) * item.count))
            else:
                flat.append(values.get(item.name, zero))
        self.codec.pack_into(block, offset, *flat)

    def __getitem__(self, name: str) -> Field:
        return next(item for item in self.fields if item.name == name)


_CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q"}


def _structure(name: str, text: str) -> Structure:
    """`text`: lines of "type name"; types u8..u64, i64 (times), b<N> (bytes), u64x<N> (array)."""
    fields = []
    offset = 0
    for line in text.split("\n"):
        words = line.split()
        if not words:
            continue
        kind, title = words
        count = 1
        if kind.startswith("b"):
            code = f"{kind[1:]}s"
        else:
            kind, _, number = kind.partition("x")
            code = _CODES[kind]
            count = int(number or 1)
        size = struct.calcsize("<" + code) * count
        fields.append(Field(title, code, offset, size, count))
        offset += size
    codec = struct.Struct(
        "<" + "".join(f"{f.count}{f.code}" if f.count > 1 else f.code for f in fields)
    )
    assert codec.size == offset
    return Structure(name, offset, tuple(fields), codec)


_HDR = """
u32 magic
u32 crc
u64 block
b16 uuid
u64 lsn
u64 owner
"""

META_HDR = _structure("meta_hdr", _HDR)

SUPER = _structure(
    "super_disk",
    _HDR
    + """
u32 version
u32 block_size
u64 compat
u64 ro_compat
u64 incompat
u64 total_blocks
u64 ag_blocks
u32 ag_count
u32 flags
u64 journal_start
u64 journal_blocks
u64x2 hash_key
u64 root_inode
u64 created_sec
u64 super_copy
b64 label
b3872 reserved
""",
)

HEARTBEAT = _structure(
    "heartbeat_disk",
    _HDR
    + """
u64 seq
u64 sec
u32 state
u32 pid
b16 mount_id
b16 boot_id
b64 host
u32 interval_ms
u32 reserved
""",
)

TREE_ROOT = _structure(
    "tree_root_disk",
    """
u64 block
u32 height
u32 reserved
u64 records
""",
)

ROOT = _structure(
    "root_disk",
    _HDR
    + """
u64 next_inode
u64 next_intent
u64 next_holder
u64 reserved0
u64 free_blocks
u64 inodes
u64 quarantined_blocks
u32 next_generation
u32 flags
b384 trees
b3600 reserved
""",
)

AG = _structure(
    "ag_disk",
    _HDR
    + """
u64 start
u64 length
u64 free_blocks
b24 by_block
b24 by_len
u32 freelist_count
u32 reserved0
u64x64 freelist
b3456 reserved
""",
)

NODE = _structure(
    "node_disk",
    _HDR
    + """
u16 level
u16 count
u16 heap
u16 dead
b8 reserved
b4032 slots
""",
)

KEY = _structure("key_disk", "u64 hi\nu64 lo")

LEAF_SLOT = _structure(
    "leaf_slot",
    """
b16 key
u16 offset
u16 length
u32 reserved
""",
)

BRANCH_SLOT = _structure("branch_slot", "b16 key\nu64 child")

INODE = _structure(
    "inode_disk",
    """
u32 generation
u32 mode
u32 uid
u32 gid
u32 nlink
u32 flags
u64 size
u64 blocks
i64 atime
i64 mtime
i64 ctime
i64 btime
u32 atime_ns
u32 mtime_ns
u32 ctime_ns
u32 btime_ns
u64 rdev
u64 parent
u64 change
u32 subdirs
u32 xattrs
b72 reserved
""",
)

EXTENT = _structure(
    "extent_disk",
    """
u64 block
u32 length
u8 state
u8 flags
u16 reserved
""",
)

DIRENT = _structure(
    "dirent_disk",
    """
u64 ino
u8 type
u8 name_len
b6 reserved
""",
)

XATTR = _structure(
    "xattr_disk",
    """
u8 ns
u8 name_len
u16 reserved
u32 value_len
""",
)

REFCOUNT = _structure("refcount_disk", "u64 length\nu32 refs\nu32 reserved")
FREE = _structure("free_disk", "u64 length")
ORPHAN = _structure("orphan_disk", "u64 since\nu64 reserved")

INTENT = _structure(
    "intent_disk",
    """
u32 type
u32 flags
u64 ino
u64 a
u64 b
u64 c
u64 d
""",
)

QUARANTINE = _structure("quarantine_disk", "u64 length\nu64 holder\nu64 xid")

HOLDER = _structure(
    "holder_disk",
    """
u32 kind
u32 state
u64 fence_key
u32 pid
u32 uid
u64 pid_start
b16 boot_id
u64 key
u32 flags
u32 reserved
b64 name
b128 fence
""",
)

FENCE = _structure(
    "fence_disk",
    """
u64 holder
u32 state
u32 tries
u64 decided_sec
b40 reserved
""",
)

EXPOSURE = _structure("exposure_disk", "u64 block\nu32 length\nu32 flags\nu64 holder")

RIDER_PLACE = _structure(
    "rider_place_disk",
    "u64 before\nu64 before_value\nu64 after\ni64 after_sec\nu32 after_ns\nu32 reserved",
)

RIDER_MARK = _structure("rider_mark_disk", "u16 index\nu16 op\nu32 generation\nu64 ino\nb80 places")

RIDER = _structure(
    "rider_disk",
    """
u64 session
u32 slot
u32 sequence
u32 digest
u32 count
b24 reserved
b768 marks
""",
)

JHEAD = _structure(
    "jhead_disk",
    _HDR
    + """
u64 seq
u64 tail_lsn
u64 tail_xid
u64 log_blocks
""",
)

JTAG = _structure("jtag_disk", "u64 block\nu32 crc\nu32 flags")

JDESC = _structure(
    "jdesc_disk",
    _HDR
    + """
u64 xid
u32 index
u32 ndesc
u32 nimages
u32 flags
u64 sec
u64 tail_lsn
b40 reserved
b3968 tags
""",
)

STRUCTURES: dict[str, Structure] = {
    item.name: item
    for item in (
        META_HDR,
        SUPER,
        HEARTBEAT,
        TREE_ROOT,
        ROOT,
        AG,
        NODE,
        KEY,
        LEAF_SLOT,
        BRANCH_SLOT,
        INODE,
        EXTENT,
        DIRENT,
        XATTR,
        REFCOUNT,
        FREE,
        ORPHAN,
        INTENT,
        QUARANTINE,
        HOLDER,
        FENCE,
        EXPOSURE,
        RIDER_PLACE,
        RIDER_MARK,
        RIDER,
        JHEAD,
        JTAG,
        JDESC,
    )
}

# Codecs of hot paths.
HDR_CODEC = META_HDR.codec
SLOT_CODEC = struct.Struct("<QQHHI")  # leaf: key hi, key lo, offset, length, reserved
BRANCH_CODEC = struct.Struct("<QQQ")  # key hi, key lo, child
INODE_CODEC = INODE.codec
EXTENT_CODEC = EXTENT.codec
DIRENT_CODEC = struct.Struct("<QBB6x")

# Length of the record of each tree; None where it varies.
RECORD_SIZES: dict[Tree, int | None] = {
    Tree.INODE: INODE.size,
    Tree.EXTENT: EXTENT.size,
    Tree.DIRENT: None,
    Tree.XATTR: None,
    Tree.SYMLINK: None,
    Tree.REFCOUNT: REFCOUNT.size,
    Tree.ORPHAN: ORPHAN.size,
    Tree.INTENT: INTENT.size,
    Tree.QUARANTINE: QUARANTINE.size,
    Tree.HOLDER: HOLDER.size,
    Tree.FENCE: FENCE.size,
    Tree.EXPOSURE: EXPOSURE.size,
    Tree.NFS_CLIENT: None,
    Tree.FREE_BY_BLOCK: FREE.size,
    Tree.FREE_BY_LEN: 0,
}


def node_owner(tree: int, agno: int = 0) -> int:
    """meta_hdr.owner of a tree's nodes."""
    return tree | agno << 8


def rider_number(session: int, slot: int) -> int:
    """Number of the rider of a slot; `session`: number of the session's record without its kind."""
    return NfsKind.RIDER << NFS_KIND_SHIFT | session << 16 | slot


def xattr_key(hash40: int, seq: int, part: int) -> int:
    """Low key word of an attribute's record."""
    return hash40 << 24 | seq << 16 | part


def extent_key(fork: int, file_block: int) -> int:
    """Low key word of an extent's record."""
    return fork << 56 | file_block
