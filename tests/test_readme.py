"""The README's program is what a reader would compile: with the header alone, and it works."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import Mounted

ROOT = Path(__file__).resolve().parent.parent


def compiled(directory: Path) -> Path:
    """The C program of the README; nothing but extfs_ioctl.h can be included from native/."""
    blocks = re.findall(r"(?ms)^```c\n(.*?)^```$", (ROOT / "README.md").read_text())
    assert len(blocks) == 1
    source, program = directory / "example.c", directory / "example"
    source.write_text(blocks[0])
    (directory / "extfs_ioctl.h").symlink_to(ROOT / "native" / "extfs_ioctl.h")
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def test_the_header_is_enough(tmp_path: Path) -> None:
    assert compiled(tmp_path).exists()


@pytest.mark.fuse
def test_what_the_example_writes_is_read_through_the_mount(
    mounted: Mounted, tmp_path: Path
) -> None:
    program, file = compiled(tmp_path), mounted.mountpoint / "file"
    file.touch()
    for _ in range(2):  # new blocks, then in place
        done = subprocess.run([program, file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert file.read_bytes() == b"x" * (1 << 20)
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the file:")
