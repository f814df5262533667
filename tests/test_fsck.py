"""fsck on images broken on purpose: what is found, what repair does, clean on the second pass.

The habit is e2fsprogs': a fixture is an image with one field changed and its checksum fixed up.
"""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from surgeon import Surgeon

from extfs import core
from extfs.check import layout
from extfs.check.fsck import Result, VolumeError, fsck, refuse_when_mounted_elsewhere
from extfs.check.layout import BLOCK_SIZE, ROOT, InodeFlag, Tree
from extfs.check.log import place_of
from extfs.check.mapping import Image
from extfs.check.volume import Volume

MIB = 1 << 20
SIZE = 64 * MIB
Break = Callable[[Surgeon, dict[str, int]], None]


def populate(fs: core.Filesystem) -> dict[str, int]:
    """A little of everything; names to inode numbers."""
    inos = {"root": 1}
    inos["dir"] = fs.mkdir(1, b"dir", 0o755).ino
    inos["sub"] = fs.mkdir(inos["dir"], b"sub", 0o755).ino
    for name in ("one", "two", "three"):
        inos[name] = fs.mknod(inos["sub"], name.encode(), stat.S_IFREG | 0o644).ino
        fs.write(inos[name], 0, name.encode() * 10000)
    fs.write(inos["one"], 1 << 30, b"far")
    fs.fallocate(inos["one"], 1 << 20, 1 << 18)
    fs.copy(inos["one"], 0, inos["two"], 0, 16384)
    fs.link(inos["three"], 1, b"hard")
    inos["link"] = fs.symlink(1, b"link", b"target/" * 300).ino
    fs.setxattr(inos["three"], b"user.small", b"value")
    fs.setxattr(inos["three"], b"user.big", b"v" * 5000)
    acl = bytes.fromhex("0200000001000700ffffffff020007000000000004000500ffffffff")
    fs.setxattr(
        inos["three"],
        b"system.posix_acl_access",
        acl + bytes.fromhex("10000700ffffffff20000500ffffffff"),
    )
    for number in range(400):
        fs.mknod(inos["dir"], b"file-%d" % number, stat.S_IFREG | 0o600)
    return inos


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, bytes], dict[str, int]]:
    """Blocks of a populated, cleanly closed image, and its inode numbers."""
    path = tmp_path_factory.mktemp("fsck") / "image"
    with open(path, "wb") as image:
        image.truncate(SIZE)
    with core.Device.open(str(path)) as device:
        core.mkfs(device, label="fixture", journal_blocks=1024)
    with core.Filesystem.open(core.Device.open(str(path))) as fs:
        inos = populate(fs)
    blocks = {}
    with open(path, "rb") as image:
        for number in range(SIZE // BLOCK_SIZE):
            block = image.read(BLOCK_SIZE)
            if block.count(0) != BLOCK_SIZE:
                blocks[number] = block
    path.unlink()
    return blocks, inos


@pytest.fixture
def image(
    template: tuple[dict[int, bytes], dict[str, int]], make_image: Callable[..., Path]
) -> Path:
    path = make_image(SIZE)
    with open(path, "r+b") as out:
        for number, block in template[0].items():
            os.pwrite(out.fileno(), block, number * BLOCK_SIZE)
    return path


@pytest.fixture
def inos(template: tuple[dict[int, bytes], dict[str, int]]) -> dict[str, int]:
    return template[1]


def codes(result: Result) -> set[str]:
    return {f.code for f in result.report.findings if f.severity.value == "error"}


def contents(path: Path) -> dict[str, bytes]:
    """All regular files of an image by path, read through the core."""
    found: dict[str, bytes] = {}
    with core.Filesystem.open(core.Device.open(str(path))) as fs:
        todo = [(b"", 1)]
        while todo:
            prefix, directory = todo.pop()
            for entry in fs.scandir(directory):
                name = prefix + b"/" + entry.name
                if entry.type == 4:
                    todo.append((name, entry.ino))
                elif entry.type == 8:
                    size = min(fs.getattr(entry.ino).size, 1 << 20)
                    found[name.decode()] = fs.read(entry.ino, 0, size)
    return found


def test_a_populated_image_is_clean(image: Path) -> None:
    result = fsck(image)
    assert (result.exit_code, result.report.findings) == (0, [])
    assert result.report.facts["inodes"] == 1 + 2 + 3 + 1 + 400
    before = image.read_bytes()
    assert fsck(image, repair=True).exit_code == 0
    assert image.read_bytes() == before, "a clean image was written to"


# ---- one thing broken --------------------------------------------------------------------------


@dataclass
class Case:
    """`found`: codes that must be among the findings. `left`: exit code after --repair."""

    name: str
    damage: Break
    found: set[str]
    left: int = 1
    same_files: bool = True


def named(name: bytes) -> Callable[[int, int, bytes], bool]:
    return lambda _hi, _lo, record: record[16:] == name


def first(_hi: int, _lo: int, _record: bytes) -> bool:
    return True


def of(ino: int) -> Callable[[int, int, bytes], bool]:
    return lambda hi, _lo, _record: hi == ino


def put(offset: int, value: bytes) -> Callable[[bytearray], None]:
    def change(record: bytearray) -> None:
        record[offset : offset + len(value)] = value

    return change


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def bump_root(field: str, by: int) -> Break:
    def damage(s: Surgeon, _inos: dict[str, int]) -> None:
        value = s.fields(layout.ROOT_BLOCK, ROOT)[field]
        s.set_fields(layout.ROOT_BLOCK, ROOT, **{field: value + by})

    return damage


def inode_field(name: str, **fields: int) -> Break:
    return lambda s, inos: s.edit_inode(inos[name], **fields)


def clear_flags(name: str, flag: InodeFlag) -> Break:
    def damage(s: Surgeon, inos: dict[str, int]) -> None:
        s.edit_inode(inos[name], flags=s.inode(inos[name])["flags"] & ~int(flag))

    return damage


def records_off(tree: Tree) -> Break:
    def damage(s: Surgeon, _inos: dict[str, int]) -> None:
        trees = bytearray(s.fields(layout.ROOT_BLOCK, ROOT)["trees"])
        trees[tree * 24 + 16] ^= 1
        s.set_fields(layout.ROOT_BLOCK, ROOT, trees=bytes(trees))

    return damage


def leaf_header(tree: Tree, offset: int, value: bytes) -> Break:
    def damage(s: Surgeon, _inos: dict[str, int]) -> None:
        block, _content = next(s.leaves(tree))
        content = s.read(block)
        content[offset : offset + len(value)] = value
        s.write(block, content)

    return damage


def flip_leaf(tree: Tree) -> Break:
    return lambda s, _inos: s.flip(next(s.leaves(tree))[0])


def ag_field(**fields: object) -> Break:
    return lambda s, _inos: s.set_fields(s.super.ag_header(0), layout.AG, **fields)


def ag_free(by: int) -> Break:
    def damage(s: Surgeon, _inos: dict[str, int]) -> None:
        number = s.super.ag_header(0)
        s.set_fields(number, layout.AG, free_blocks=s.fields(number, layout.AG)["free_blocks"] + by)

    return damage


def used_on_freelist(s: Surgeon, inos: dict[str, int]) -> None:
    header = s.super.ag_header(0)
    block = int.from_bytes(s.find(Tree.EXTENT, of(inos["three"]))[3][:8], "little")
    values = s.fields(header, layout.AG)
    s.set_fields(header, layout.AG, freelist=(block, *values["freelist"][1:]))


def longer_free(s: Surgeon, _inos: dict[str, int]) -> None:
    s.edit(Tree.FREE_BY_BLOCK, first, lambda r: r.__setitem__(0, r[0] ^ 1))


def one_free_tree(tree: Tree) -> Break:
    return lambda s, _inos: s.flip(s.tree_root(tree).block)


def lose_name(name: bytes) -> Break:
    return lambda s, _inos: s.remove(Tree.DIRENT, named(name))


def lose_name_of_deleted(s: Surgeon, inos: dict[str, int]) -> None:
    ino = int.from_bytes(s.find(Tree.DIRENT, named(b"file-7"))[3][:8], "little")
    s.remove(Tree.DIRENT, named(b"file-7"))
    s.edit_inode(ino, nlink=0)
    s.edit_inode(inos["dir"], size=400)


def lose_inode(s: Surgeon, inos: dict[str, int]) -> None:
    s.remove(Tree.INODE, of(inos["three"]))


def rename_in_place(name: bytes, new: bytes) -> Break:
    return lambda s, _inos: s.edit(Tree.DIRENT, named(name), put(16, new))


def cross_link(s: Surgeon, inos: dict[str, int]) -> None:
    block = s.find(Tree.EXTENT, of(inos["three"]))[3][:8]
    s.edit(Tree.EXTENT, lambda hi, lo, _r: hi == inos["one"] and lo > 1000, put(0, block))


def overlap_in_file(s: Surgeon, inos: dict[str, int]) -> None:
    s.edit(Tree.EXTENT, lambda hi, lo, _r: hi == inos["one"] and lo == 0, put(8, number(300, 4)))


def beyond_device(s: Surgeon, inos: dict[str, int]) -> None:
    s.edit(Tree.EXTENT, of(inos["three"]), put(0, number(SIZE // BLOCK_SIZE - 1)))


def onto_metadata(s: Surgeon, inos: dict[str, int]) -> None:
    s.edit(Tree.EXTENT, of(inos["three"]), put(0, number(layout.JOURNAL_START_BLOCK)))


def xattr_record(part: int) -> Callable[[int, int, bytes], bool]:
    return lambda _hi, lo, record: lo & 0xFFFF == part and (part > 0 or len(record) > 1000)


def longer_value(record: bytearray) -> None:
    record[4:8] = number(9000, 4)


def move_part(ino: int) -> Break:
    def damage(s: Surgeon, _inos: dict[str, int]) -> None:
        keys: list[int] = []
        s.find(
            Tree.XATTR, lambda hi, lo, _r: hi == ino and lo & 0xFFFF == 4 and not keys.append(lo)
        )
        s.edit_key(Tree.XATTR, lambda hi, lo, _r: (hi, lo) == (ino, keys[0]), ino, keys[0] + 1)

    return damage


def swap_keys(s: Surgeon, _inos: dict[str, int]) -> None:
    block, _content = next(s.leaves(Tree.INODE))
    content = s.read(block)
    content[64:88], content[88:112] = content[88:112], content[64:88]
    s.write(block, content)


def overlapping_records(s: Surgeon, _inos: dict[str, int]) -> None:
    block, _content = next(s.leaves(Tree.INODE))
    content = s.read(block)
    content[64 + 16 : 64 + 18] = content[88 + 16 : 88 + 18]
    s.write(block, content)


CASES = [
    Case("primary super", lambda s, _i: s.flip(layout.SUPER_BLOCK), {"META_CRC"}),
    Case("super copy", lambda s, _i: s.flip(layout.SUPER_COPY_BLOCK, 1), {"META_MAGIC"}),
    Case(
        "super copies differ",
        lambda s, _i: s.set_fields(layout.SUPER_COPY_BLOCK, layout.SUPER, label=b"other"),
        {"SUPER_DIFFERS"},
    ),
    Case("heartbeat", lambda s, _i: s.flip(layout.HEARTBEAT_BLOCK), {"META_CRC"}),
    Case("journal header 0", lambda s, _i: s.flip(s.super.journal_start), {"META_CRC"}),
    Case("journal header 1", lambda s, _i: s.flip(s.super.journal_start + 1, 9), {"META_CRC"}),
    Case("root free blocks", bump_root("free_blocks", 5), {"COUNT_FREE"}),
    Case("root inodes", bump_root("inodes", -1), {"COUNT_INODES"}),
    Case("root quarantine", bump_root("quarantined_blocks", 3), {"COUNT_QUARANTINE"}),
    Case(
        "next inode",
        lambda s, _i: s.set_fields(layout.ROOT_BLOCK, ROOT, next_inode=20),
        {"NEXT_INODE"},
    ),
    Case("records of the inode tree", records_off(Tree.INODE), {"TREE_COUNT"}),
    Case("records of the dirent tree", records_off(Tree.DIRENT), {"TREE_COUNT"}),
    Case("free blocks of an AG", ag_free(-3), {"COUNT_FREE"}),
    Case("AG header", lambda s, _i: s.flip(s.super.ag_header(0)), {"META_CRC"}),
    Case("AG length", ag_field(length=77), {"AG_SHAPE"}),
    Case("freelist count", ag_field(freelist_count=1000), {"AG_SHAPE"}),
    Case("freelist names a used block", used_on_freelist, {"BLOCKS_SHARED", "BLOCKS_LOST"}),
    Case("free extent length", longer_free, {"FREE_SPACE"}),
    Case("free-by-block node", one_free_tree(Tree.FREE_BY_BLOCK), {"META_CRC"}),
    Case("free-by-len node", one_free_tree(Tree.FREE_BY_LEN), {"META_CRC"}),
    Case("link count of a file", inode_field("three", nlink=7), {"LINK_COUNT"}),
    Case("link count of a directory", inode_field("dir", nlink=9), {"LINK_COUNT"}),
    Case("link count of the root", inode_field("root", nlink=2), {"LINK_COUNT"}),
    Case("entries", inode_field("dir", size=3), {"DIR_ENTRIES"}),
    Case("subdirectories", inode_field("dir", subdirs=0), {"DIR_SUBDIRS"}),
    Case("parent", inode_field("sub", parent=1), {"DIR_PARENT"}),
    Case("parent of the root", inode_field("root", parent=5), {"DIR_PARENT"}),
    Case("block count", inode_field("one", blocks=1), {"BLOCK_COUNT"}),
    Case("xattr count", inode_field("three", xattrs=1), {"XATTR_COUNT"}),
    Case("ACL flag lost", clear_flags("three", InodeFlag.ACL), {"ACL_FLAG"}),
    Case("shared flag lost", clear_flags("two", InodeFlag.SHARED), {"INODE_FLAG"}),
    Case(
        "entry type",
        lambda s, _i: s.edit(Tree.DIRENT, named(b"two"), put(8, b"\x04")),
        {"DIRENT_TYPE"},
    ),
    Case(
        "entry of nothing",
        lambda s, _i: s.edit(Tree.DIRENT, named(b"file-9"), put(0, number(10**9))),
        {"DIRENT_INODE", "UNREACHABLE"},
        same_files=False,
    ),
    Case(
        "entry under another name's cookie",
        rename_in_place(b"file-11", b"FILE-11"),
        {"DIRENT_HASH"},
        same_files=False,
    ),
    Case(
        "file without a name",
        lose_name(b"file-8"),
        {"UNREACHABLE", "DIR_ENTRIES"},
        same_files=False,
    ),
    Case("directory without a name", lose_name(b"sub"), {"UNREACHABLE"}, same_files=False),
    Case("lost orphan", lose_name_of_deleted, {"ORPHAN_MISSING"}, same_files=False),
    Case(
        "lost inode",
        lose_inode,
        {"DIRENT_INODE", "EXTENT_INODE", "XATTR_INODE", "COUNT_INODES"},
        same_files=False,
    ),
    Case(
        "references", lambda s, _i: s.edit(Tree.REFCOUNT, first, put(8, number(9, 4))), {"REFCOUNT"}
    ),
    Case(
        "refcount of one",
        lambda s, _i: s.edit(Tree.REFCOUNT, first, put(8, number(1, 4))),
        {"REFCOUNT_SHAPE"},
    ),
    Case("refcount node", flip_leaf(Tree.REFCOUNT), {"META_CRC"}),
    Case("two files on one block", cross_link, {"REFCOUNT", "BLOCKS_LOST"}, same_files=False),
    # What needs a guess stays as it is.
    Case(
        "both journal headers",
        lambda s, _i: [s.flip(s.super.journal_start + n) for n in (0, 1)] and None,
        {"JOURNAL"},
        4,
    ),
    Case("root block", lambda s, _i: s.flip(layout.ROOT_BLOCK), {"META_CRC"}, 4),
    Case("inode leaf", flip_leaf(Tree.INODE), {"META_CRC"}, 4),
    Case("extent leaf", flip_leaf(Tree.EXTENT), {"META_CRC"}, 4),
    Case("dirent leaf", flip_leaf(Tree.DIRENT), {"META_CRC"}, 4),
    Case("xattr leaf", flip_leaf(Tree.XATTR), {"META_CRC"}, 4),
    Case("level", leaf_header(Tree.INODE, 48, number(1, 2)), {"NODE_LEVEL"}, 4),
    Case("owner", leaf_header(Tree.INODE, 40, number(4)), {"META_OWNER"}, 4),
    Case("block number", leaf_header(Tree.INODE, 8, number(99)), {"META_BLOCKNO"}, 4),
    Case("uuid", leaf_header(Tree.INODE, 16, b"another filesyst"), {"META_UUID"}, 4),
    Case("magic", leaf_header(Tree.INODE, 0, b"EXag"), {"META_MAGIC"}, 4),
    Case("slot count", leaf_header(Tree.INODE, 50, number(0, 2)), {"NODE_BOUNDS"}, 4),
    Case("heap", leaf_header(Tree.INODE, 52, number(64, 2)), {"NODE_BOUNDS"}, 4),
    Case("dead bytes", leaf_header(Tree.INODE, 54, number(999, 2)), {"NODE_BOUNDS"}, 4),
    Case("keys out of order", swap_keys, {"NODE_ORDER"}, 4),
    Case("records overlap", overlapping_records, {"NODE_BOUNDS"}, 4),
    Case(
        "record length",
        lambda s, _i: s.write(
            (b := next(s.leaves(Tree.INODE))[0]), (c := s.read(b))[:82] + number(8, 2) + c[84:]
        ),
        {"RECORD_SHAPE"},
        4,
    ),
    Case("mode", inode_field("one", mode=0o644), {"INODE_SHAPE"}, 4),
    Case("size", inode_field("one", size=1 << 63), {"INODE_SHAPE"}, 4),
    Case("impossible name", rename_in_place(b"file-12", b"file/12"), {"DIRENT_NAME"}, 4),
    Case("file blocks mapped twice", overlap_in_file, {"EXTENT_OVERLAP"}, 4),
    Case("extent beyond the device", beyond_device, {"EXTENT_SHAPE"}, 4),
    Case("extent over the journal", onto_metadata, {"BLOCKS_SHARED"}, 4),
    Case(
        "extent state",
        lambda s, i: s.edit(Tree.EXTENT, of(i["three"]), put(12, b"\x07")),
        {"EXTENT_SHAPE"},
        4,
    ),
    Case("part of a value lost", lambda s, i: move_part(i["three"])(s, i), {"XATTR_SHAPE"}, 4),
    Case(
        "end of a value lost",
        lambda s, _i: s.edit(Tree.XATTR, xattr_record(0), longer_value),
        {"XATTR_SHAPE"},
        4,
    ),
    Case(
        "attribute name",
        lambda s, _i: s.edit(Tree.XATTR, xattr_record(0), put(8, b"X")),
        {"XATTR_SHAPE"},
        4,
    ),
    Case("target size", inode_field("link", size=5), {"SYMLINK_SIZE"}, 4),
    Case(
        "part of a target lost",
        lambda s, i: s.remove(Tree.SYMLINK, lambda _h, lo, _r: lo == 0),
        {"SYMLINK_SHAPE"},
        4,
    ),
    Case(
        "directory in itself",
        lambda s, i: s.edit(Tree.DIRENT, named(b"one"), put(0, number(i["dir"]))),
        {"DIR_NAMES"},
        4,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_found_and_repaired(case: Case, image: Path, inos: dict[str, int]) -> None:
    files = contents(image) if case.left == 1 and case.same_files else {}
    case.damage(Surgeon(image), inos)
    broken = image.read_bytes()
    found = fsck(image)
    assert found.exit_code == 4
    assert case.found <= codes(found), found.report.findings
    assert image.read_bytes() == broken, "a check wrote to the image"
    repaired = fsck(image, repair=True)
    assert repaired.exit_code == case.left, (repaired.report.findings, repaired.messages)
    again = fsck(image)
    if case.left == 1:
        assert repaired.repaired
        assert again.report.findings == []
        after = contents(image)  # the core takes it
        if case.same_files:
            assert after == files
        assert fsck(image).exit_code == 0, "the core and fsck disagree about a repaired image"
    else:
        assert case.found <= codes(again) or again.exit_code == 4


def test_nothing_is_freed_while_a_tree_is_not_readable(image: Path, inos: dict[str, int]) -> None:
    surgeon = Surgeon(image)
    surgeon.edit_inode(inos["three"], nlink=9)
    surgeon.flip(next(surgeon.leaves(Tree.EXTENT))[0])
    free = surgeon.fields(layout.ROOT_BLOCK, ROOT)["free_blocks"]
    result = fsck(image, repair=True)
    assert result.exit_code == 4
    assert any("not readable" in message for message in result.messages)
    assert surgeon.inode(inos["three"])["nlink"] == 9
    assert surgeon.fields(layout.ROOT_BLOCK, ROOT)["free_blocks"] == free


def test_lost_files_are_found_again(image: Path, inos: dict[str, int]) -> None:
    surgeon = Surgeon(image)
    surgeon.remove(Tree.DIRENT, named(b"sub"))
    surgeon.remove(Tree.DIRENT, named(b"file-5"))
    assert fsck(image, repair=True).exit_code == 1
    files = contents(image)
    assert files[f"/lost+found/#{inos['sub']}/two"][16384:30000] == (b"two" * 10000)[16384:30000]
    assert sum(name.startswith("/lost+found/") for name in files) == 4
    # A second loss goes to the same directory.
    surgeon.remove(Tree.DIRENT, named(b"file-6"))
    assert fsck(image, repair=True).exit_code == 1
    assert sum(name.startswith("/lost+found/") for name in contents(image)) == 5


# ---- the journal -------------------------------------------------------------------------------


def leave_a_log(path: Path) -> int:
    """Change things and stop as a power cut would; returns an inode whose name is gone."""
    fs = core.Filesystem.open(core.Device.open(str(path)), commit_ms=60_000)
    for number in range(50):
        ino = fs.mknod(1, b"logged-%d" % number, stat.S_IFREG | 0o644).ino
        fs.write(ino, 0, b"logged" * 1000)
        if number % 10 == 9:
            fs.sync()
    fs.open_inode(ino)
    fs.unlink(1, b"logged-49")
    fs.sync()
    fs.abandon()
    return ino


def test_a_log_is_replayed_in_memory_and_written_by_repair(image: Path) -> None:
    orphan = leave_a_log(image)
    before = image.read_bytes()
    result = fsck(image)
    assert result.exit_code == 0, result.report.findings
    assert result.report.has("JOURNAL_REPLAYED")
    assert result.report.facts["orphans"] == 1
    assert image.read_bytes() == before
    with Image(image) as looking:
        assert looking.lookup(1, b"logged-48") is not None
        assert looking.inode(orphan) is not None
    result = fsck(image, repair=True)
    assert result.exit_code == 0
    with Image(image) as looking:
        assert looking.log.records == []
        assert looking.lookup(1, b"logged-48") is not None
    assert "/logged-3" in contents(image)
    assert fsck(image).report.facts["orphans"] == 0, "the mount has freed it"


def test_replay_agrees_with_the_core(image: Path, make_image: Callable[..., Path]) -> None:
    leave_a_log(image)
    other = make_image(SIZE)
    other.write_bytes(image.read_bytes())
    fsck(image, repair=True)
    assert contents(image) == contents(other)
    assert fsck(other).exit_code == 0


def test_a_torn_last_record_is_the_end_and_a_torn_earlier_one_is_damage(image: Path) -> None:
    leave_a_log(image)
    surgeon = Surgeon(image)
    with Image(image) as looking:
        records = looking.log.records
        assert len(records) > 2
        places = [place_of(looking.volume, record.lsn + 1) for record in records]
    whole = image.read_bytes()
    surgeon.flip(places[-1])
    result = fsck(image)
    assert result.exit_code == 0
    assert fsck(image, repair=True).exit_code == 0
    image.write_bytes(whole)
    surgeon.flip(places[1])
    result = fsck(image)
    assert result.exit_code == 4
    assert codes(result) == {"JOURNAL"}
    broken = image.read_bytes()
    assert fsck(image, repair=True).exit_code == 4
    assert image.read_bytes() == broken, "a damaged log must not be thrown away"


def test_attributes_of_an_orphan_may_be_half_gone(image: Path) -> None:
    fs = core.Filesystem.open(core.Device.open(str(image)), commit_ms=60_000)
    orphan = fs.mknod(1, b"doomed", stat.S_IFREG | 0o644).ino
    fs.setxattr(orphan, b"user.big", b"v" * (1024 - 8 - 3 + 4 * 1024))  # the last part is full
    fs.open_inode(orphan)
    fs.unlink(1, b"doomed")
    fs.sync()
    fs.abandon()
    fsck(image, repair=True)
    surgeon = Surgeon(image)
    # As if the last parts were gone: the head speaks of more than there is.
    surgeon.edit(Tree.XATTR, lambda hi, lo, _r: hi == orphan and not lo & 0xFFFF, longer_value)
    assert codes(fsck(image)) == set()
    surgeon.edit_inode(orphan, nlink=1)
    assert "XATTR_SHAPE" in codes(fsck(image))
    surgeon.edit_inode(orphan, nlink=0)
    move_part(orphan)(surgeon, {})
    assert "XATTR_SHAPE" in codes(fsck(image)), "a part in the middle"


def test_orphans_with_a_name_and_orphans_of_nothing(image: Path, inos: dict[str, int]) -> None:
    orphan = leave_a_log(image)
    fsck(image, repair=True)
    surgeon = Surgeon(image)
    surgeon.edit_inode(orphan, nlink=1)
    result = fsck(image)
    assert "UNREACHABLE" in codes(result)
    assert fsck(image, repair=True).exit_code == 1
    assert f"/lost+found/#{orphan}" in contents(image)


# ---- repair under a power cut ------------------------------------------------------------------


class PowerCutError(Exception):
    pass


class Cut:
    """Lets `writes` writes through; at the cut, a random part of what was not flushed is undone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, seed: int) -> None:
        self.left = writes
        self.random = random.Random(seed)
        self.held: list[tuple[int, bytes]] = []
        real_write, real_flush = Volume.write_block, Volume.flush

        def write(volume: Volume, number: int, block: bytes) -> None:
            if self.left == 0:
                for place, old in reversed(self.held):
                    if self.random.random() < 0.5:
                        real_write(volume, place, old)
                raise PowerCutError
            self.left -= 1
            self.held.append((number, volume.read_raw(number)))
            real_write(volume, number, block)

        def flush(volume: Volume) -> None:
            real_flush(volume)
            self.held.clear()

        monkeypatch.setattr(Volume, "write_block", write)
        monkeypatch.setattr(Volume, "flush", flush)


def break_much(surgeon: Surgeon, inos: dict[str, int]) -> None:
    surgeon.remove(Tree.DIRENT, named(b"sub"))
    surgeon.edit_inode(inos["dir"], nlink=77, size=1)
    surgeon.edit(Tree.REFCOUNT, first, put(8, number(9, 4)))
    surgeon.edit(Tree.DIRENT, named(b"file-3"), put(8, b"\x04"))
    surgeon.flip(surgeon.super.ag_header(0))
    surgeon.flip(surgeon.super.journal_start)
    surgeon.flip(layout.SUPER_BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_repair_is_finished_by_the_next(
    seed: int, image: Path, inos: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_much(Surgeon(image), inos)
    broken = image.read_bytes()
    with monkeypatch.context() as patch:
        counter = Cut(patch, 10**9, 0)
        assert fsck(image, repair=True).exit_code == 1
        writes = 10**9 - counter.left
    files = contents(image)
    assert writes > 20
    for cut_at in range(seed, writes, 3):
        image.write_bytes(broken)
        with monkeypatch.context() as patch:
            Cut(patch, cut_at, seed * 1000 + cut_at)
            with pytest.raises(PowerCutError):
                fsck(image, repair=True)
        result = fsck(image, repair=True)
        assert result.exit_code in (0, 1), (cut_at, result.report.findings)
        assert fsck(image).report.findings == [], cut_at
    assert contents(image) == files


# ---- anything broken ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(int(os.environ.get("EXTFS_FSCK_SEEDS", "8"))))
def test_no_damage_makes_fsck_fail_itself(seed: int, image: Path) -> None:
    """Random bytes of random metadata blocks, checksums fixed: findings, never an exception."""
    chance = random.Random(seed)
    with Image(image) as looking:
        uuid = looking.volume.super.uuid
    whole = image.read_bytes()
    metadata = [
        n
        for n in range(len(whole) // BLOCK_SIZE)
        if whole[n * BLOCK_SIZE + 16 : n * BLOCK_SIZE + 32] == uuid
        and not layout.JOURNAL_START_BLOCK + 2 <= n < layout.JOURNAL_START_BLOCK + 1024
        and n not in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK)
    ]
    surgeon = Surgeon(image)
    for _ in range(12):
        for _ in range(chance.choice((1, 1, 2, 5))):
            block_number = chance.choice(metadata)
            block = surgeon.read(block_number)
            at = chance.choice((chance.randrange(48, 256), chance.randrange(32, 4096)))
            block[at] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
            surgeon.write(block_number, block)
        first_pass = fsck(image)
        result = fsck(image, repair=True)
        second = fsck(image)
        if result.exit_code in (0, 1):
            assert second.exit_code == 0, second.report.findings[:5]
        assert first_pass.exit_code in (0, 4)
        with open(image, "r+b") as out:
            out.write(whole)


# ---- the device --------------------------------------------------------------------------------


def test_what_cannot_be_checked(
    make_image: Callable[..., Path], image: Path, tmp_path: Path
) -> None:
    with pytest.raises(VolumeError) as error:
        fsck(make_image(SIZE))
    assert error.value.code == "NOT_EXTFS"
    with pytest.raises(VolumeError):
        fsck(tmp_path)
    with pytest.raises(VolumeError):
        fsck(tmp_path / "missing")
    surgeon = Surgeon(image)
    surgeon.set_fields(layout.SUPER_BLOCK, layout.SUPER, incompat=4)
    with pytest.raises(VolumeError) as error:
        fsck(image)
    assert error.value.code == "INCOMPAT"
    surgeon.set_fields(layout.SUPER_BLOCK, layout.SUPER, incompat=0)
    os.truncate(image, SIZE // 2)
    with pytest.raises(VolumeError) as error:
        fsck(image)
    assert error.value.code == "DEV_SMALL"
    surgeon.flip(layout.SUPER_BLOCK)
    surgeon.flip(layout.SUPER_COPY_BLOCK)
    with pytest.raises(VolumeError) as error:
        fsck(image)
    assert error.value.code == "SB_DAMAGED"


def test_a_device_that_another_host_has_mounted_is_refused(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surgeon = Surgeon(image)
    beat = {"state": 1, "pid": 77, "boot_id": b"another boot ..", "interval_ms": 2000}

    def write_beat(seq: int) -> None:
        surgeon.set_fields(layout.HEARTBEAT_BLOCK, layout.HEARTBEAT, host=b"far", seq=seq, **beat)

    write_beat(5)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with Volume(image) as volume:
        volume.load_super()
        refuse_when_mounted_elsewhere(volume, waited.append)
        assert waited == [3.0], "silent: it died"
        with pytest.raises(VolumeError, match="host far by process 77"):
            refuse_when_mounted_elsewhere(volume, lambda _seconds: write_beat(6))


def test_repair_takes_the_mounted_mark_away(image: Path) -> None:
    leave_a_log(image)
    assert fsck(image).report.has("NOT_UNMOUNTED")
    fsck(image, repair=True)
    assert fsck(image).report.findings == []


def test_a_device_in_use_is_refused(image: Path) -> None:
    with core.Filesystem.open(core.Device.open(str(image))):
        with pytest.raises(VolumeError, match="in use"):
            fsck(image)
    with Volume(image):
        with pytest.raises(core.CoreError) as error:
            core.Device.open(str(image))
        assert error.value.name == "ERR_DEV_IN_USE"


@pytest.mark.slow
def test_a_hundred_thousand_files_take_seconds(make_image: Callable[..., Path]) -> None:
    path = make_image(1 << 30)
    with core.Device.open(str(path)) as device:
        core.mkfs(device)
    with core.Filesystem.open(core.Device.open(str(path))) as fs:
        for group in range(100):
            directory = fs.mkdir(1, b"dir-%d" % group, 0o755).ino
            for item in range(1000):
                ino = fs.mknod(directory, b"some-file-%d" % item, stat.S_IFREG | 0o644).ino
                if item % 10 == 0:
                    fs.write(ino, 0, b"x")
    begin = time.monotonic()
    result = fsck(path)
    seconds = time.monotonic() - begin
    assert result.report.findings == []
    assert result.report.facts["inodes"] == 100_101
    print(f"{seconds:.2f} s for 100,000 files")
    assert seconds < 30
