"""What tests of failures share: one-line errors, images that must not change, tmpfs that fills."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import rundir

MIB = 1 << 20
SMALL = 64 * MIB
"""A small device: two allocation groups, journal of 4 MiB."""

REFUSED = (errno.EIO, errno.EROFS)
"""What a change gets on a filesystem that turned read-only after an error."""


def assert_says(result: subprocess.CompletedProcess[str], code: int, *phrases: str) -> None:
    """The command failed with `code` and at most two lines on standard error: with all phrases."""
    said = result.stderr.splitlines()
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert 1 <= len(said) <= 2, result.stderr
    assert len(set(said)) == len(said), f"said twice: {result.stderr}"
    assert all(line.startswith("extfs: ") for line in said), result.stderr
    for phrase in phrases:
        assert phrase in result.stderr, (phrase, result.stderr)


def digest(path: Path) -> str:
    """Checksum of a whole image."""
    with open(path, "rb") as image:
        return hashlib.file_digest(image, "blake2b").hexdigest()


@contextlib.contextmanager
def unchanged(*images: Path) -> Iterator[None]:
    """Whatever is refused in this block changes not a byte of the images."""
    before = [digest(image) for image in images]
    yield
    assert [digest(image) for image in images] == before, "a refused command changed the image"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def drop_caches() -> None:
    """Make the kernel ask the filesystem again: clean pages, names, inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def errno_of(call: Callable[[], object]) -> int:
    """The errno with which `call` fails; 0 when it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@contextlib.contextmanager
def small_tmpfs(directory: rundir.RunDirectory, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes in the run directory: a sparse image on it fails writes when full."""
    place = Path(tempfile.mkdtemp(prefix="tmpfs-", dir=directory.path))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "extfs-test", place], check=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "--", place], check=True)
        place.rmdir()


_AS_NOBODY = """
import os, sys
import extfs.cli, extfs.core, extfs.daemon, extfs.check.fsck
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.argv[0] = "extfs"
extfs.cli.main()
"""


def as_nobody(
    directory: rundir.RunDirectory, *arguments: str | os.PathLike[str]
) -> subprocess.CompletedProcess[str]:
    """`extfs` without any privilege, wherever this checkout lies."""
    return subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, *map(os.fspath, arguments)],
        env=directory.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
