"""Structures of a device as JSON-able dictionaries, for ``extfs dump``.

Bytes become hexadecimal strings, names text. Damaged blocks are shown with what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from extfs.check import layout
from extfs.check.layout import Magic, Structure, Tree
from extfs.check.log import place_of
from extfs.check.mapping import Image, type_word
from extfs.check.trees import Root, branch_slots, leaf_slots, records
from extfs.check.volume import DamageError, verify_header

Dump = dict[str, Any]

_TREES = {tree.title: tree for tree in layout.GLOBAL_TREES}
_RECORDS: dict[Tree, Structure] = {
    Tree.INODE: layout.INODE,
    Tree.EXTENT: layout.EXTENT,
    Tree.DIRENT: layout.DIRENT,
    Tree.XATTR: layout.XATTR,
    Tree.REFCOUNT: layout.REFCOUNT,
    Tree.ORPHAN: layout.ORPHAN,
    Tree.INTENT: layout.INTENT,
    Tree.QUARANTINE: layout.QUARANTINE,
    Tree.HOLDER: layout.HOLDER,
    Tree.FENCE: layout.FENCE,
    Tree.EXPOSURE: layout.EXPOSURE,
    Tree.FREE_BY_BLOCK: layout.FREE,
}
_TEXTS = {"label", "host", "name"}


class DumpError(Exception):
    """What was asked for does not exist; the text says why."""


def _value(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        if name in _TEXTS:
            return value.rstrip(b"\0").decode("utf-8", "backslashreplace")
        return value.hex()
    if isinstance(value, tuple):
        return list(value)
    if name == "magic":
        return f"{value:#010x}"
    return value


def _plain(values: dict[str, Any]) -> Dump:
    skip = ("reserved", "reserved0", "slots", "trees", "tags")
    return {name: _value(name, value) for name, value in values.items() if name not in skip}


def _block(image: Image, number: int, magic: int, structure: Structure) -> Dump:
    raw = image.volume.read(number)
    if len(raw) < layout.BLOCK_SIZE:
        raise DumpError(f"the device has no block {number}")
    found = {"block_number": number}
    try:
        verify_header(raw, number, magic, image.volume.super.uuid)
    except DamageError as damage:
        found["damage"] = f"{damage.code}: {damage.text}"  # type: ignore[assignment]
    return found | _plain(structure.unpack(raw))


def _root_words(root: Root) -> Dump:
    return {"block": root.block, "height": root.height, "records": root.records}


def dump_super(image: Image) -> Dump:
    """Both superblock copies."""
    return {
        "primary": _block(image, layout.SUPER_BLOCK, Magic.SUPER, layout.SUPER),
        "copy": _block(image, layout.SUPER_COPY_BLOCK, Magic.SUPER, layout.SUPER),
    }


def dump_heartbeat(image: Image) -> Dump:
    """Who has it mounted."""
    return _block(image, layout.HEARTBEAT_BLOCK, Magic.HEARTBEAT, layout.HEARTBEAT)


def dump_root(image: Image) -> Dump:
    """Counters and tree roots."""
    result = _block(image, layout.ROOT_BLOCK, Magic.ROOT, layout.ROOT)
    result["trees"] = {tree.title: _root_words(image.tree_root(tree)) for tree in Tree if tree < 16}
    return result


def dump_ag(image: Image, number: int) -> Dump:
    """Header of an allocation group and its free extents."""
    sb = image.volume.super
    if not 0 <= number < sb.ag_count:
        raise DumpError(f"there are {sb.ag_count} allocation groups, from 0")
    result = _block(image, sb.ag_header(number), Magic.AG, layout.AG)
    raw = image.volume.read(sb.ag_header(number))
    values = layout.AG.unpack(raw)
    by_block = Root.parse(values["by_block"])
    result["by_block"] = _root_words(by_block)
    result["by_len"] = _root_words(Root.parse(values["by_len"]))
    result["freelist"] = result["freelist"][: values["freelist_count"]]
    result["free"] = [
        {"block": key >> 64, "length": int.from_bytes(record, "little")}
        for key, record in records(image.volume, by_block, Tree.FREE_BY_BLOCK, number)
    ]
    return result


def dump_inode(image: Image, ino: int) -> Dump:
    """An inode, its attributes, its target."""
    values = image.inode(ino)
    if values is None:
        raise DumpError(f"there is no inode {ino}")
    result: Dump = {"ino": ino, "type": type_word(values["mode"])} | _plain(values)
    result["mode"] = f"{values['mode']:#o}"
    result["flags"] = [flag.name for flag in layout.InodeFlag if values["flags"] & flag]
    attributes = {
        name.decode("utf-8", "backslashreplace"): value.hex()
        for name, value in image.attributes(ino)
    }
    if attributes:
        result["attributes"] = attributes
    if result["type"] == "symbolic link":
        result["target"] = image.target(ino).decode("utf-8", "backslashreplace")
    return result


def dump_dir(image: Image, ino: int) -> Dump:
    """Entries of a directory."""
    if image.inode(ino) is None:
        raise DumpError(f"there is no inode {ino}")
    return {
        "ino": ino,
        "entries": [
            {
                "cookie": cookie,
                "ino": target,
                "type": kind,
                "name": name.decode("utf-8", "backslashreplace"),
            }
            for cookie, target, kind, name in image.entries(ino)
        ],
    }


def dump_extents(image: Image, ino: int) -> Dump:
    """Extents of a file, in blocks."""
    if image.inode(ino) is None:
        raise DumpError(f"there is no inode {ino}")
    return {
        "ino": ino,
        "extents": [
            {
                "fork": "staging" if extent.fork else "data",
                "file": extent.file,
                "block": extent.block,
                "length": extent.length,
                "state": layout.ExtentState(extent.state).name.lower(),
                "flags": extent.flags,
                "shared": extent.shared,
            }
            for extent in image.extents(ino)
        ],
    }


def dump_node(image: Image, number: int) -> Dump:
    """A tree node, slot by slot."""
    result = _block(image, number, Magic.NODE, layout.NODE)
    raw = image.volume.read(number)
    tree, agno = result["owner"] & 0xFF, result["owner"] >> 8
    result["tree"] = Tree(tree).title if tree in set(Tree) else f"unknown {tree}"
    result["ag"] = agno
    if "damage" in result:
        return result
    if result["level"]:
        result["children"] = [
            {"hi": hi, "lo": lo, "child": child} for hi, lo, child in branch_slots(raw)
        ]
    else:
        result["records"] = [
            {"hi": hi, "lo": lo, "offset": offset, "length": length}
            | _record(tree, hi, raw[offset : offset + length])
            for hi, lo, offset, length, _reserved in leaf_slots(raw)
        ]
    return result


def _is_rider(tree: int, number: int, record: bytes) -> bool:
    """Whether a record is one of the riders among those of the NFS server."""
    return (
        tree == Tree.NFS_CLIENT
        and number >> layout.NFS_KIND_SHIFT == layout.NfsKind.RIDER
        and len(record) == layout.RIDER.size
    )


def _rider(record: bytes) -> Dump:
    """A rider, mark by mark."""
    result = _plain(layout.RIDER.unpack(record))
    marks, size = bytes.fromhex(result.pop("marks")), layout.RIDER_MARK.size
    result["marks"] = []
    for number in range(min(result["count"], layout.RIDER_MARKS)):
        mark = layout.RIDER_MARK.unpack(marks, number * size)
        places = mark.pop("places")
        mark["places"] = [
            _plain(layout.RIDER_PLACE.unpack(places, place * layout.RIDER_PLACE.size))
            for place in range(2)
        ]
        result["marks"].append(mark)
    return result


def _record(tree: int, hi: int, record: bytes) -> Dump:
    if _is_rider(tree, hi, record):
        return _rider(record)
    structure = _RECORDS.get(Tree(tree)) if tree in set(Tree) else None
    if structure is None or len(record) < structure.size:
        return {"bytes": record.hex()} if record else {}
    result = _plain(structure.unpack(record))
    rest = record[structure.size :]
    if rest:
        result["rest"] = rest.decode("utf-8", "backslashreplace")
    return result


def dump_tree(image: Image, name: str) -> Dump:
    """All records of a global tree."""
    tree = _TREES.get(name)
    if tree is None:
        raise DumpError(f"no tree {name!r}: " + ", ".join(_TREES))
    root = image.tree_root(tree)
    return {
        "tree": name,
        "root": _root_words(root),
        "records": [
            {"hi": key >> 64, "lo": key & (1 << 64) - 1} | _record(tree, key >> 64, record)
            for key, record in records(image.volume, root, tree)
        ],
    }


def dump_journal(image: Image) -> Dump:
    """Headers, and the records that a mount would replay."""
    sb = image.volume.super
    log = image.log
    return {
        "start": sb.journal_start,
        "blocks": sb.journal_blocks,
        "headers": [
            _block(image, sb.journal_start + slot, Magic.JHEAD, layout.JHEAD) for slot in (0, 1)
        ],
        "fault": log.fault or (f"record behind the end: {log.gap.xid}" if log.gap else ""),
        "end_lsn": log.end_lsn,
        "next_xid": log.next_xid,
        "records": [
            {
                "lsn": record.lsn,
                "place": place_of(image.volume, record.lsn),
                "xid": record.xid,
                "sec": record.sec,
                "tail_lsn": record.tail_lsn,
                "images": list(record.homes),
            }
            for record in log.records
        ],
    }


def dump_block(image: Image, number: int) -> Dump:
    """Any metadata block, by its magic."""
    if not 0 <= number < image.volume.super.total_blocks:
        raise DumpError(f"the filesystem has no block {number}")
    raw = image.volume.read(number)
    magic = int.from_bytes(raw[:4], "little")
    kinds: dict[int, Structure] = {
        Magic.SUPER: layout.SUPER,
        Magic.HEARTBEAT: layout.HEARTBEAT,
        Magic.ROOT: layout.ROOT,
        Magic.AG: layout.AG,
        Magic.JHEAD: layout.JHEAD,
        Magic.JDESC: layout.JDESC,
    }
    if magic == Magic.NODE:
        return dump_node(image, number)
    if magic not in kinds:
        return {"block_number": number, "bytes": raw.hex()}
    return _block(image, number, magic, kinds[magic])


_SIMPLE: dict[str, Callable[[Image], Dump]] = {
    "super": dump_super,
    "heartbeat": dump_heartbeat,
    "root": dump_root,
    "journal": dump_journal,
}
_NUMBERED: dict[str, Callable[[Image, int], Dump]] = {
    "ag": dump_ag,
    "inode": dump_inode,
    "dir": dump_dir,
    "extents": dump_extents,
    "node": dump_node,
    "block": dump_block,
}


def dump(image: Image, what: list[str]) -> Dump:
    """What the words name: "super", "inode 1", "tree dirent", ... `DumpError`, `DamageError`."""
    word, *rest = what
    if word in _SIMPLE and not rest:
        return _SIMPLE[word](image)
    if word == "tree" and len(rest) == 1:
        return dump_tree(image, rest[0])
    if word in _NUMBERED and len(rest) == 1:
        try:
            number = int(rest[0], 0)
        except ValueError:
            raise DumpError(f"{rest[0]!r} is not a number") from None
        return _NUMBERED[word](image, number)
    known = [*_SIMPLE, *(f"{name} N" for name in _NUMBERED), "tree NAME"]
    raise DumpError(f"cannot dump {' '.join(what)!r}; there is: " + ", ".join(known))
