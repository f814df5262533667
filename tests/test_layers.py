"""The layers of the design, as tables: who may import or include whom, how long a file may be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "extfs"
NATIVE = ROOT / "native"

MAX_LINES = 800
"""A file has one subject and rarely more than 600 lines; beyond this it has to be divided."""

AVOIDED_NAMES = re.compile(
    "common|data|helpers?|info|manager|misc|process|region|shared|sync|token|utils?"
)

# What each part of the package may import from the rest of it. A part is a module or a package
# directly below extfs/. Imports inside a part are free.
PYTHON_LAYERS: dict[str, set[str]] = {
    "core": {"_core", "errors"},
    "errors": set(),
    "check": {"errors"},
    "layout": {"core", "errors"},
    "memory": {"core", "errors", "layout"},
    "fuse": {"core", "errors", "layout"},
    "control": {"core", "errors", "layout"},
    "nfs": {"core", "errors", "layout"},
    "daemon": {"control", "core", "errors", "fuse", "layout", "memory", "nfs"},
    "cli": {"check", "control", "core", "daemon", "errors", "layout"},
}
# The wiring may know everything below it; these are the only modules that nothing imports.
NOT_IMPORTABLE = {"cli", "daemon"}
MAY_IMPORT_DAEMON = {"cli"}

# Layers of the C core, lowest first. A file may include headers of its own layer and of lower ones.
# A file stands where the longest listed part of its name stands: btree_change.c with btree. A name
# with its ending counts for that file alone: fs.h holds what all share, fs.c opens and closes it.
NATIVE_LAYERS: list[tuple[str, ...]] = [
    ("types", "errors", "format", "crc32c", "siphash", "lookup_table", "fuse_abi"),
    ("device", "sim", "ioctx", "log"),
    ("buffer", "fs.h"),
    ("trans", "journal"),
    ("btree",),
    ("alloc",),
    (
        "inode",
        "extmap",
        "refcount",
        "dir",
        "xattr",
        "acl",
        "segment",
        "plock",
        "nfs_record",
        "rider",
    ),
    ("reaper",),
    (
        "namei",
        "file",
        "data",
        "layout",
        "grant",
        "holder",
        "fence",
        "exposure",
        "event",
        "delegation",
    ),
    ("fs", "super", "mkfs", "heartbeat"),
    ("bridge", "core"),
]
# Where two modules need each other, the lower one's code, never its header, may include a header
# from above; each such place is named here with its reason.
UPCALLS: dict[tuple[str, str], str] = {
    ("btree.c", "alloc.h"): "a tree's blocks are allocated, and free space is kept in trees",
    ("btree_change.c", "alloc.h"): "a tree's blocks are allocated, and free space is kept in trees",
    ("buffer.c", "trans_pool.h"): "a block that a transaction holds is not evicted",
    ("trans.c", "alloc.h"): "a commit puts what it freed on the allocator's busy list",
    ("trans_inode.c", "inode.h"): "an inode's core follows the outcome of its transaction",
    ("reaper.c", "file_remap.h"): "its pieces are removals and moves like the data path's",
    ("reaper_intent.c", "file_remap.h"): "what it finishes are the data path's changes of maps",
    ("inode_table.c", "reaper.h"): "the last user of an unlinked inode leaves it to the reaper",
}
# The header that cffi reads and the one that C programs read stand above and beside the layers.
PUBLIC_HEADERS = {"extfs_core.h", "extfs_ioctl.h"}
FORBIDDEN_HEADERS = re.compile(r"^(Python\.h|fuse_lowlevel\.h|fuse\.h|fuse3?/.*)$")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def native_files() -> list[Path]:
    return sorted([*NATIVE.glob("*.[ch]"), *NATIVE.glob("tests/*.[ch]")])


def part_of(file: Path) -> str:
    """The name directly below extfs/ that a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(file: Path) -> Iterator[tuple[int, str]]:
    """(line, part) for each import of something in extfs, relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "extfs" and len(words) > 1:
                yield node.lineno, words[1]


def layer_of(name: str) -> int | None:
    """Index into NATIVE_LAYERS of the module that file `name` belongs to."""
    for index, modules in enumerate(NATIVE_LAYERS):
        if name in modules:
            return index
    stem = Path(name).stem
    while stem:
        for index, modules in enumerate(NATIVE_LAYERS):
            if stem in modules:
                return index
        stem = stem.rpartition("_")[0]
    return None


def test_python_imports_point_down() -> None:
    wrong = []
    for file in python_files():
        part = part_of(file)
        if part == "__init__":
            wrong += [
                f"{file}:{line}: the package itself imports extfs.{name}"
                for line, name in imported_parts(file)
            ]
            continue
        if part not in PYTHON_LAYERS:
            wrong.append(f"{file}: extfs.{part} has no place in PYTHON_LAYERS; give it one")
            continue
        for line, name in imported_parts(file):
            if name in PYTHON_LAYERS or name == "_core":
                if name != part and name not in PYTHON_LAYERS[part]:
                    wrong.append(f"{file}:{line}: extfs.{part} imports extfs.{name}")
            elif (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists():
                wrong.append(f"{file}:{line}: extfs.{name} has no place in PYTHON_LAYERS")
    assert not wrong, "\n".join(wrong)


def test_layer_table_agrees_with_its_rules() -> None:
    """The table above must not be edited into allowing what the design rules out."""
    fronts = {"fuse", "control", "nfs"}
    for front in fronts:
        assert not PYTHON_LAYERS[front] & (fronts - {front}), "fronts import each other"
    assert not PYTHON_LAYERS["layout"] & fronts
    assert not PYTHON_LAYERS["check"] & {"core", "_core"}, "fsck must not read through the C code"
    for part, allowed in PYTHON_LAYERS.items():
        assert "_core" not in allowed or part == "core"
        importable = NOT_IMPORTABLE - ({"daemon"} if part in MAY_IMPORT_DAEMON else set())
        assert not allowed & importable, f"{part} may not import {allowed & importable}"


def test_the_client_of_the_control_file_needs_nothing_of_the_daemon() -> None:
    """It is for other programs: they must not load the core, trio only for the trio client."""
    allowed = {"structures": set(), "client": {"structures"}, "waiting": {"client"}}
    wrong = []
    for name, modules in allowed.items():
        file = PACKAGE / "control" / f"{name}.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("extfs"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                known = {f"extfs.control.{module}" for module in modules}
                wrong += [
                    f"{file}:{node.lineno}: {found}"
                    for found in names
                    if not any(found.startswith(module) for module in known)
                ]
            elif isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
                if roots & {"extfs", "pyfuse3"} or ("trio" in roots and name != "waiting"):
                    wrong.append(f"{file}:{node.lineno}: {sorted(roots)}")
    assert not wrong, "\n".join(wrong)
    assert not (PACKAGE / "control" / "__init__.py").read_text().count("import")


def test_layout_and_protocol_code_own_no_sockets() -> None:
    """extfs/layout has no sockets; in extfs/nfs only server.py has."""
    network = {"socket", "ssl", "socketserver", "asyncio"}
    files = [*PACKAGE.glob("layout/**/*.py"), *PACKAGE.glob("nfs/**/*.py")]
    wrong = []
    for file in files:
        if file == PACKAGE / "nfs" / "server.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {node.module.split(".")[0]}
            else:
                continue
            wrong += [f"{file}:{node.lineno}: imports {name}" for name in sorted(names & network)]
    assert not wrong, "\n".join(wrong)


def test_native_includes_point_down() -> None:
    wrong = []
    upcalls = set()
    for file in sorted(NATIVE.glob("*.[ch]")):
        layer = layer_of(file.name)
        if layer is None and file.name not in PUBLIC_HEADERS:
            wrong.append(f"{file}: has no place in NATIVE_LAYERS; give it one")
            continue
        for kind, header in INCLUDE.findall(file.read_text(encoding="utf-8")):
            if FORBIDDEN_HEADERS.match(header):
                wrong.append(f"{file}: includes {header}")
            if kind == "<" or header in PUBLIC_HEADERS:
                continue
            if not (NATIVE / header).exists():
                wrong.append(f"{file}: includes {header}, which does not exist in native/")
                continue
            other = layer_of(header)
            if layer is not None and other is not None and other > layer:
                upcalls.add((file.name, header))
    wrong += [
        f"native/{name}: includes {header}, a higher layer"
        for name, header in sorted(upcalls - UPCALLS.keys())
    ]
    wrong += [
        f"native/{name} does not include {header} any more: remove it from UPCALLS"
        for name, header in sorted(UPCALLS.keys() - upcalls)
        if (NATIVE / name).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_headers_make_no_upcalls() -> None:
    assert all(name.endswith(".c") for name, _ in UPCALLS)


def test_public_core_header_stands_alone() -> None:
    """cffi reads it verbatim, so it has no preprocessor lines except plain constants."""
    header = NATIVE / "extfs_core.h"
    if not header.exists():
        pytest.skip("native/extfs_core.h does not exist yet")
    constant = re.compile(r"^\s*#\s*define\s+\w+\s+(-?\w+|\.\.\.)\s*(/\*.*)?$")
    wrong = [
        f"{header}:{number}: {line}"
        for number, line in enumerate(header.read_text(encoding="utf-8").splitlines(), 1)
        if line.lstrip().startswith("#") and not constant.match(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short_enough_to_have_one_subject() -> None:
    files = [*python_files(), *native_files(), *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {file: len(file.read_bytes().splitlines()) for file in files}
    wrong = [
        f"{file.relative_to(ROOT)}: {lines} lines, more than {MAX_LINES}: divide it by subject"
        for file, lines in lengths.items()
        if lines > MAX_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_a_module_is_about() -> None:
    names = [
        *python_files(),
        *native_files(),
        *(path.parent for path in PACKAGE.rglob("__init__.py")),
    ]
    wrong = [
        f"{path.relative_to(ROOT)}: say what it is about instead"
        for path in names
        if AVOIDED_NAMES.fullmatch(path.stem)
    ]
    assert not wrong, "\n".join(wrong)


def test_top_level_holds_only_what_was_agreed() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    allowed = {"pyproject.toml", "extfs", "native", "tests", "scripts", "README.md", "LICENSE"}
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    present = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    unknown = {name for name in present if not name.startswith(".")} - allowed
    assert not unknown, f"not part of the agreed top level: {sorted(unknown)}"
