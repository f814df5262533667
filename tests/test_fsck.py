"""fsck on images broken on purpose: what is found, what repair does, clean on the second pass.

The habit is e2fsprogs': a fixture is an image with one field changed and its checksum fixed up.
"""

# ruff: noqa: F811
from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from broken import (  # the fixtures among them are used by name
    SIZE,
    Break,
    ag_field,
    ag_free,
    beyond_device,
    bump_root,
    clear_flags,
    codes,
    contents,
    cross_link,
    first,
    flip_leaf,
    image,  # noqa: F401
    inode_field,
    inos,  # noqa: F401
    leaf_header,
    leave_a_log,
    longer_free,
    longer_value,
    lose_inode,
    lose_name,
    lose_name_of_deleted,
    move_part,
    named,
    number,
    of,
    one_free_tree,
    onto_metadata,
    overlap_in_file,
    overlapping_records,
    put,
    records_off,
    rename_in_place,
    swap_keys,
    template,  # noqa: F401
    used_on_freelist,
    xattr_record,
)
from surgeon import Surgeon

from extfs import core
from extfs.check import layout
from extfs.check.fsck import VolumeError, fsck, refuse_when_mounted_elsewhere
from extfs.check.layout import ROOT, InodeFlag, Tree
from extfs.check.volume import Volume


def test_a_populated_image_is_clean(image: Path) -> None:
    result = fsck(image)
    assert (result.exit_code, result.report.findings) == (0, [])
    assert result.report.facts["inodes"] == 1 + 2 + 3 + 1 + 400
    before = image.read_bytes()
    assert fsck(image, repair=True).exit_code == 0
    assert image.read_bytes() == before, "a clean image was written to"


@dataclass
class Case:
    """`found`: codes that must be among the findings. `left`: exit code after --repair."""

    name: str
    damage: Break
    found: set[str]
    left: int = 1
    same_files: bool = True
    untouched: bool = False


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
    Case("mode", inode_field("one", mode=0o644), {"INODE_SHAPE"}, 4, untouched=True),
    Case("size", inode_field("one", size=1 << 63), {"INODE_SHAPE"}, 4),
    Case("impossible name", rename_in_place(b"file-12", b"file/12"), {"DIRENT_NAME"}, 4),
    Case("file blocks mapped twice", overlap_in_file, {"EXTENT_OVERLAP"}, 4),
    Case("extent beyond the device", beyond_device, {"EXTENT_SHAPE"}, 4, untouched=True),
    Case("extent over the journal", onto_metadata, {"BLOCKS_SHARED"}, 4, untouched=True),
    Case(
        "extent state",
        lambda s, i: s.edit(Tree.EXTENT, of(i["three"]), put(12, b"\x07")),
        {"EXTENT_SHAPE"},
        4,
        untouched=True,
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
        assert again.exit_code == 4
        assert case.found <= codes(again)
        if case.untouched:
            assert image.read_bytes() == broken, "repair guessed"


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
