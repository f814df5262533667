"""A populated image, and the ways in which tests break it. Import the fixtures by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from surgeon import Surgeon

from extfs import core
from extfs.check import layout
from extfs.check.fsck import Result
from extfs.check.layout import BLOCK_SIZE, ROOT, InodeFlag, Tree

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


# ---- damages ---------------------------------------------------------------------------------


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
