"""Builds the fio engine native/fio/extfs_layout.c against the source of the installed fio.

An engine has to be compiled with the headers of the very version that loads it, and Debian has no
package of them; so the source package is fetched from the registry that this machine installs its
packages from. Once built, nothing is fetched again until fio or the engine changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "native/fio/extfs_layout.c"
HEADER = ROOT / "native/extfs_ioctl.h"
BUILD = ROOT / "native/build/fio"
CONFIGURE = ("--disable-native", "--prefix=/usr")


class EngineError(Exception):
    """The engine cannot be built here; the text says why."""


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise EngineError(f"{error.filename} is not installed") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise EngineError(f"{command[0]}: {lines[-1] if lines else done.returncode}")
    return done.stdout


def _source_lists(directory: Path) -> None:
    """The machine's own package sources, asked for source packages."""
    found = False
    lists = Path("/etc/apt/sources.list.d")
    for path in sorted(lists.glob("*.sources")):
        text, changed = re.subn(r"(?m)^Types:\s*deb\s*$", "Types: deb-src", path.read_text())
        if changed and "debian" in text:
            (directory / path.name).write_text(text)
            found = True
    plain = [Path("/etc/apt/sources.list"), *sorted(lists.glob("*.list"))]
    for number, path in enumerate(plain):
        lines = path.read_text().splitlines() if path.exists() else []
        wanted = [
            re.sub(r"^deb\s", "deb-src ", line)
            for line in lines
            if re.match(r"deb\s.*debian", line)
        ]
        if wanted:
            (directory / f"{number}.list").write_text("\n".join(wanted) + "\n")
            found = True
    if not found:
        raise EngineError("no Debian package source is configured")


def _fetch(work: Path) -> Path:
    """The unpacked source of the installed fio."""
    version = _run("dpkg-query", "-W", "-f", "${source:Version}", "fio").strip()
    parts, lists, place = work / "parts", work / "lists", work / "source"
    for directory in (parts, lists / "partial", place):
        directory.mkdir(parents=True)
    _source_lists(parts)
    options = [
        *("-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={parts}"),
        *("-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root", "-qq"),
        *("-o", "Acquire::Retries=3"),
    ]
    _run("apt-get", *options, "update")
    _run("apt-get", *options, "source", "--download-only", f"fio={version}", cwd=place)
    archive = next(place.glob("fio_*.orig.tar.*[!c]"), None)
    if archive is None:
        raise EngineError("the source package has no archive")
    _run("tar", "-xf", archive, cwd=place)
    return next(path for path in place.iterdir() if path.is_dir())


def _compile(tree: Path, target: Path) -> None:
    _run("sh", "./configure", *CONFIGURE, cwd=tree)
    new = target.with_suffix(".new")
    _run(
        "gcc", "-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-fPIC", "-shared", "-Wall",
        "-include", tree / "config-host.h", f"-I{tree}", f"-I{ROOT / 'native'}",
        "-o", new, SOURCE, "-luring",
    )  # fmt: skip
    os.replace(new, target)


def engine() -> Path:
    """The engine, built if it has to be. EngineError: it cannot be."""
    if shutil.which("fio") is None:
        raise EngineError("fio is not installed")
    state = hashlib.sha256()
    state.update(_run("fio", "--version").encode())
    state.update(SOURCE.read_bytes())
    state.update(HEADER.read_bytes())
    target, mark = BUILD / "extfs_layout.so", BUILD / "built-from"
    if target.exists() and mark.exists() and mark.read_text() == state.hexdigest():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="extfs-fio-") as name:
        _compile(_fetch(Path(name)), target)
    mark.write_text(state.hexdigest())
    return target
