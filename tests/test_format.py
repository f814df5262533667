"""FORMAT.md, the Python decoder and the C compiler agree on every offset, size and constant."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from extfs.check import layout
from extfs.check.checksum import block_crc, crc32c, siphash, siphash_all
from extfs.check.layout import STRUCTURES, Magic, Tree

NATIVE = Path(__file__).resolve().parent.parent / "native"

CONSTANTS = {
    "FORMAT_VERSION": layout.VERSION,
    "BLOCK_SIZE": layout.BLOCK_SIZE,
    "SUPER_BLOCK": layout.SUPER_BLOCK,
    "HEARTBEAT_BLOCK": layout.HEARTBEAT_BLOCK,
    "ROOT_BLOCK": layout.ROOT_BLOCK,
    "AG0_HEADER_BLOCK": layout.AG0_HEADER_BLOCK,
    "SUPER_COPY_BLOCK": layout.SUPER_COPY_BLOCK,
    "JOURNAL_START_BLOCK": layout.JOURNAL_START_BLOCK,
    "DEVICE_MIN_BLOCKS": layout.DEVICE_MIN_BLOCKS,
    "DEVICE_MAX_BLOCKS": layout.DEVICE_MAX_BLOCKS,
    "JOURNAL_MIN_BLOCKS": layout.JOURNAL_MIN_BLOCKS,
    "JOURNAL_MAX_BLOCKS": layout.JOURNAL_MAX_BLOCKS,
    "AG_MIN_BLOCKS": layout.AG_MIN_BLOCKS,
    "AG_MAX_COUNT": layout.AG_MAX_COUNT,
    "AG_FREELIST_MAX": layout.AG_FREELIST_MAX,
    "FORMAT_LABEL_LEN": layout.LABEL_BYTES,
    "FILE_MAX_BLOCKS": layout.FILE_MAX_BLOCKS,
    "FILE_MAX_BYTES": layout.FILE_MAX_BYTES,
    "TREE_ROOT_COUNT": layout.TREE_ROOT_COUNT,
    "NODE_SLOT_SIZE": layout.SLOT_SIZE,
    "NODE_SLOT_MAX": layout.NODE_SLOT_MAX,
    "RECORD_MAX": layout.RECORD_MAX,
    "BT_MAX_HEIGHT": layout.MAX_HEIGHT,
    "EXTENT_MAX_BLOCKS": layout.EXTENT_MAX_BLOCKS,
    "JDESC_TAGS": layout.JDESC_TAGS,
    "JOURNAL_GROUP_MAX": layout.GROUP_MAX_IMAGES,
    "XATTR_PART_BYTES": layout.XATTR_PART_BYTES,
    "XATTR_VALUE_MAX": layout.XATTR_VALUE_MAX,
    "NFS_PART_BYTES": layout.NFS_PART_BYTES,
    "NFS_VALUE_MAX": layout.NFS_VALUE_MAX,
    "RIDER_MARKS": layout.RIDER_MARKS,
    "NFS_RIDER_KEY(0x123456789aull, 77)": layout.rider_number(0x123456789A, 77),
    **{f"NFS_KIND_{kind.name}": int(kind) for kind in layout.NfsKind},
    "SYMLINK_PART_BYTES": layout.SYMLINK_PART_BYTES,
    "SYMLINK_MAX": layout.SYMLINK_MAX,
    "DIR_HASH_BITS": layout.DIR_HASH_BITS,
    "DIR_COOKIE_SEQ_BITS": layout.DIR_SEQ_BITS,
    "EXT_UNWRITTEN": layout.ExtentState.UNWRITTEN,
    "EXT_WRITTEN": layout.ExtentState.WRITTEN,
    "EXT_F_LAYOUT": layout.EXT_F_LAYOUT,
    "FORK_STAGING": layout.FORK_STAGING,
    "HB_MOUNTED": layout.HEARTBEAT_MOUNTED,
    "XNS_SYSTEM": layout.XNS_SYSTEM,
    "INTENT_INSERT": 6,
    "INTENT_F_STAGING": layout.INTENT_STAGING,
    "QUARANTINE_ANY": layout.QUARANTINE_ANY,
    **{f"FENCE_{word.upper()}": state for state, word in layout.FENCE_STATES.items()},
    "EXPOSURE_INODE_LO(0)": layout.EXPOSURE_INODE,
    **{f"EXPOSURE_F_{flag.name}": int(flag) for flag in layout.ExposureFlag},
    "OWNER_NODE(17, 9)": layout.node_owner(17, 9),
    "XATTR_KEY(0x123456789aull, 7, 3)": layout.xattr_key(0x123456789A, 7, 3),
    "EXTENT_KEY_LO(1, 77)": layout.extent_key(1, 77),
    **{f"MAGIC_{magic.name}": int(magic) for magic in Magic},
    **{f"TREE_{tree.name}": int(tree) for tree in Tree},
    **{f"INODE_F_{flag.name}": int(flag) for flag in layout.InodeFlag},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says: sizes, offsets, constants."""
    lines = []
    for name, structure in STRUCTURES.items():
        lines.append(f'P("{name}", sizeof(struct {name}));')
        for field in structure.fields:
            member = f"((struct {name} *)0)->{field.name}"
            lines.append(f'P("{name}.{field.name}", offsetof(struct {name}, {field.name}));')
            lines.append(f'P("{name}.{field.name} size", sizeof({member}));')
    lines += [f'P("{name}", {name});' for name in CONSTANTS]
    # meta_hdr is one member in C; the tables spell it out.
    body = "\n".join(lines)
    for name, structure in STRUCTURES.items():
        if name != "meta_hdr" and structure.fields[0].name == "magic":
            for field in layout.META_HDR.fields:
                body = body.replace(
                    f"(struct {name}, {field.name}))", f"(struct {name}, hdr.{field.name}))"
                )
                body = body.replace(
                    f"sizeof(((struct {name} *)0)->{field.name})",
                    f"sizeof(((struct {name} *)0)->hdr.{field.name})",
                )
    directory = tmp_path_factory.mktemp("layout")
    source = directory / "layout.c"
    source.write_text(
        '#include "format.h"\n#include "btree.h"\n#include "journal_impl.h"\n'
        '#include "fence.h"\n'
        '#define P(name, value) printf("%s=%llu\\n", name, (unsigned long long)(value))\n'
        "int main(void)\n{\n" + body + "\nreturn 0;\n}\n"
    )
    program = directory / "layout"
    subprocess.run(
        ["gcc", "-std=gnu11", "-D_GNU_SOURCE", f"-I{NATIVE}", "-o", program, source], check=True
    )
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {
        name: int(value)
        for name, value in (line.rsplit("=", 1) for line in output.split("\n") if line)
    }


def test_every_structure_of_the_header_has_a_table() -> None:
    text = (NATIVE / "format.h").read_text()
    in_c = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert in_c == set(STRUCTURES)


@pytest.mark.parametrize("name", STRUCTURES)
def test_c_and_python_lay_structures_out_alike(name: str, compiled: dict[str, int]) -> None:
    structure = STRUCTURES[name]
    assert compiled[name] == structure.size
    for field in structure.fields:
        assert compiled[f"{name}.{field.name}"] == field.offset, field.name
        assert compiled[f"{name}.{field.name} size"] == field.size, field.name


def test_c_and_python_have_the_same_constants(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == {
        name: int(value) for name, value in CONSTANTS.items()
    }


def documented() -> dict[str, tuple[int, list[tuple[int, int, str]]]]:
    """FORMAT.md's tables: structure to its size and (offset, size, field) rows."""
    found: dict[str, tuple[int, list[tuple[int, int, str]]]] = {}
    rows: list[tuple[int, int, str]] = []
    for line in (NATIVE / "FORMAT.md").read_text().splitlines():
        if match := re.match(r"### (\w+), (\d+) bytes$", line):
            rows = []
            found[match[1]] = (int(match[2]), rows)
        elif match := re.match(r"\| (\d+) \| (\d+) \| [\w\[\]]+ \| (\w+) \|", line):
            rows.append((int(match[1]), int(match[2]), match[3]))
    return found


def test_format_md_says_the_same() -> None:
    expected = {
        name: (structure.size, [(f.offset, f.size, f.name) for f in structure.fields])
        for name, structure in STRUCTURES.items()
    }
    assert documented() == expected


def test_format_md_names_every_magic_and_tree() -> None:
    text = (NATIVE / "FORMAT.md").read_text()
    for magic in Magic:
        name = int(magic).to_bytes(4, "little").decode()
        assert f"| {int(magic):#010x} | {name} |" in text
    for tree in Tree:
        assert re.search(rf"^\| {int(tree)} \| {tree.title}\b", text, re.MULTILINE), tree


def test_crc32c_against_published_vectors() -> None:
    # RFC 3720 appendix B.4
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_folded_crc_of_a_block_is_the_plain_one() -> None:
    for seed in range(1, 8):
        block = b"".join((seed * n * 2654435761 % 2**32).to_bytes(4, "little") for n in range(1024))
        assert block_crc(block) == crc32c(block[:4] + bytes(4) + block[8:])


def test_siphash_against_its_authors_vectors() -> None:
    raw = bytes(range(16))
    key = (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
    assert siphash(key, b"") == 0x726FDB47DD0E0E31
    assert siphash(key, bytes(range(15))) == 0xA129CA6149BE45E5
    names = [bytes(range(n % 60)) * (n % 3 + 1) for n in range(3000)]
    assert siphash_all(key, names) == [siphash(key, name) for name in names]


def test_unpack_and_pack_are_inverse() -> None:
    raw = bytes(n * 7 & 0xFF for n in range(4096))
    for structure in STRUCTURES.values():
        block = bytearray(structure.size)
        structure.pack_into(block, 0, structure.unpack(raw))
        assert block == raw[: structure.size], structure.name
