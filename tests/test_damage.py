"""Damaged metadata and failing devices under a mount, and under the core by itself.

Whoever needs what cannot be read or written gets EIO, the log names the block and the failed
check, nothing is changed any more, and all that is not concerned stays readable.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, LogWatch, Mounted
from faults import MIB, REFUSED, SMALL, drop_caches, errno_of, small_tmpfs
from surgeon import Surgeon

from extfs.check import layout
from extfs.check.layout import Tree
from extfs.check.trees import leaf_slots
from extfs.cli.mapping import mounted_map

pytestmark = pytest.mark.fuse

BLOCK = 4096
TURNED = r"read-only from now on"
REQUEST = r"[A-Z]+ of inode \d+: "
"""Lines that say whose request failed, and why; not of every kind of request."""


def end_after_error(extfs: ExtfsRunner, mounted: Mounted) -> None:
    """Unmount what turned read-only: the daemon ends with exit code 1 and says why."""
    extfs("umount", mounted.mountpoint)
    assert mounted.daemon.wait(60) == 1
    assert f"{mounted.device}: closing: " in mounted.log.read_text()


def refuses_changes(root: Path) -> None:
    changes: list[Callable[[], object]] = [
        lambda: (root / "new file").touch(exist_ok=False),
        lambda: (root / "newdir").mkdir(),
        lambda: (root / "safe" / "file0").write_bytes(b"overwritten"),
        lambda: os.truncate(root / "safe" / "file1", 1),
        lambda: os.unlink(root / "safe" / "file2"),
        lambda: os.rename(root / "safe" / "file3", root / "safe" / "moved"),
        lambda: os.setxattr(root / "safe" / "file4", "user.x", b"v"),
        lambda: os.chmod(root / "safe" / "file5", 0o600),
        lambda: os.link(root / "safe" / "file6", root / "safe" / "second"),
        lambda: os.symlink("target", root / "safe" / "symlink"),
    ]
    assert [errno_of(change) in REFUSED for change in changes] == [True] * len(changes)


def safe_content(number: int) -> bytes:
    return b"safe %d " % number * 1000


def make_safe(root: Path) -> None:
    """The unrelated files, durable."""
    (root / "safe").mkdir()
    for number in range(100):
        with open(root / "safe" / f"file{number}", "wb") as file:
            file.write(safe_content(number))
            file.flush()
            os.fsync(file.fileno())
    for path in (root / "safe", root):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def check_safe(root: Path) -> None:
    """All of the unrelated files, byte for byte."""
    assert sorted(os.listdir(root / "safe")) == sorted(f"file{n}" for n in range(100))
    for number in range(100):
        assert (root / "safe" / f"file{number}").read_bytes() == safe_content(number)


def populate(root: Path) -> None:
    """Unrelated files in `safe`; a directory, a file with many extents, attributes, to damage."""
    make_safe(root)
    (root / "victim").mkdir()
    for number in range(300):
        (root / "victim" / f"a rather long name to fill leaves {number:4}").touch()
    with open(root / "sparse", "wb", buffering=0) as file:
        for number in range(600):
            os.pwrite(file.fileno(), b"%7d\n" % number * 512, number * 2 * BLOCK)
    (root / "tagged").write_bytes(b"content of tagged")
    for number in range(40):
        os.setxattr(root / "tagged", f"user.{number}", b"value %d" % number * 100)


def leaf_of(surgeon: Surgeon, tree: Tree, ino: int) -> int:
    """A leaf with records of this inode and of no other."""
    for block, content in surgeon.leaves(tree):
        if {slot[0] for slot in leaf_slots(content)} == {ino}:
            return block
    raise LookupError(tree)


@pytest.fixture
def populated(
    make_image: Callable[..., Path], extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> tuple[Path, dict[str, int]]:
    """An image with files, and their inode numbers."""
    image = make_image(SMALL)
    extfs("mkfs", image)
    mounted = mount_extfs(image)
    populate(mounted.mountpoint)
    inos = {
        name: (mounted.mountpoint / name).stat().st_ino for name in os.listdir(mounted.mountpoint)
    }
    mounted.unmount()
    return image, inos


def read_sparse(root: Path) -> None:
    with open(root / "sparse", "rb") as file:
        for number in range(600):
            assert os.pread(file.fileno(), BLOCK, number * 2 * BLOCK) == b"%7d\n" % number * 512


def read_tags(root: Path) -> None:
    assert len(os.listxattr(root / "tagged")) == 40
    for number in range(40):
        assert os.getxattr(root / "tagged", f"user.{number}") == b"value %d" % number * 100


VICTIMS: dict[str, tuple[Tree, str, Callable[[Path], object]]] = {
    "directory": (Tree.DIRENT, "victim", lambda root: os.listdir(root / "victim")),
    "extents": (Tree.EXTENT, "sparse", read_sparse),
    "attributes": (Tree.XATTR, "tagged", read_tags),
}


# scripts/test --fast does each damage and each victim once.
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        pytest.param(damage, kind, marks=[pytest.mark.slow] * (number != other))
        for number, damage in enumerate(["flipped", "zeroed", "misplaced"])
        for other, kind in enumerate(VICTIMS)
    ],
)
def test_a_damaged_metadata_block(
    populated: tuple[Path, dict[str, int]],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
    kind: str,
    damage: str,
) -> None:
    image, inos = populated
    tree, name, use = VICTIMS[kind]
    surgeon = Surgeon(image)
    block = leaf_of(surgeon, tree, inos[name])
    whole = bytes(surgeon.read(block))
    if damage == "flipped":
        surgeon.flip(block)
        check = "ERR_META_CRC"
    elif damage == "zeroed":
        surgeon.write(block, bytes(BLOCK), fix=False)
        check = "ERR_META_MAGIC"
    else:  # a write that went to the wrong place: everything verifies but the place
        other = next(b for b, _ in surgeon.leaves(Tree.INODE))
        surgeon.write(block, surgeon.read(other), fix=False)
        check = "ERR_META_BLOCKNO"
    log_watch.expect(rf"metadata block {block} \(.*\): .*\({check}\)")
    log_watch.expect(TURNED)
    log_watch.expect(REQUEST)

    mounted = mount_extfs(image)
    (mounted.mountpoint / "before").write_bytes(b"written while all was well")
    os.sync()
    assert errno_of(lambda: use(mounted.mountpoint)) == errno.EIO
    assert errno_of(lambda: use(mounted.mountpoint)) == errno.EIO  # not only the first time
    refuses_changes(mounted.mountpoint)
    drop_caches()
    check_safe(mounted.mountpoint)
    os.statvfs(mounted.mountpoint)
    end_after_error(extfs, mounted)

    # It is found, not by the core, and nothing that is there is thrown away.
    found = extfs("fsck", image, check=False)
    assert found.returncode == 4
    assert str(block) in found.stdout
    assert extfs("fsck", "--repair", image, check=False).returncode == 4
    surgeon.write(block, whole, fix=False)
    extfs("fsck", "--repair", image, check=False)
    assert "clean" in extfs("fsck", image).stdout
    mounted = mount_extfs(image)
    use(mounted.mountpoint)
    check_safe(mounted.mountpoint)


def test_damage_that_is_met_by_a_change(
    populated: tuple[Path, dict[str, int]],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
) -> None:
    """The tree of free space: only a change reads it."""
    image, _inos = populated
    surgeon = Surgeon(image)
    roots = [surgeon.tree_root(Tree.FREE_BY_LEN, agno) for agno in range(surgeon.super.ag_count)]
    for root in roots:
        surgeon.flip(root.block)
    log_watch.expect(r"metadata block \d+ \(.*\): .*\(ERR_META_CRC\)")
    log_watch.expect(TURNED)
    log_watch.expect(REQUEST)
    mounted = mount_extfs(image)
    check_safe(mounted.mountpoint)

    def write() -> None:
        with open(mounted.mountpoint / "new", "wb", buffering=0) as file:
            file.write(bytes(MIB))
            os.fsync(file.fileno())

    assert errno_of(write) == errno.EIO
    refuses_changes(mounted.mountpoint)
    check_safe(mounted.mountpoint)
    end_after_error(extfs, mounted)
    for root in roots:
        surgeon.flip(root.block)
    extfs("fsck", "--repair", image, check=False)
    assert "clean" in extfs("fsck", image).stdout
    check_safe(mount_extfs(image).mountpoint)


@pytest.mark.parametrize("block", [layout.ROOT_BLOCK, layout.AG0_HEADER_BLOCK])
def test_a_damaged_fixed_block_refuses_the_mount(
    populated: tuple[Path, dict[str, int]], extfs: ExtfsRunner, target: Path, block: int
) -> None:
    image, _inos = populated
    Surgeon(image).flip(block)
    result = extfs("mount", image, target, check=False)
    if block == layout.ROOT_BLOCK:
        assert result.returncode == 1
        assert f"metadata block {block} (root)" in result.stderr
        assert "ERR_META_CRC" in result.stderr
        assert "Traceback" not in result.stderr
    elif result.returncode == 0:  # read when it is needed
        check_safe(target)
        assert errno_of(lambda: (target / "new").write_bytes(bytes(MIB))) in (0, errno.EIO)
        extfs("umount", target, check=False)
    assert extfs("fsck", image, check=False).returncode == 4


@pytest.fixture
def target(run_directory: rundir.RunDirectory) -> Path:
    return run_directory.new_mountpoint()


# ---- a device that fails -----------------------------------------------------------------------


def direct_read(path: Path, offset: int, length: int) -> bytes:
    """Past every cache of the kernel, from the filesystem."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        memory = mmap.mmap(-1, length)
        count = os.preadv(descriptor, [memory], offset)
        return memory[:count]
    finally:
        os.close(descriptor)


def test_a_device_that_fails_reads(
    make_loop: Callable[..., rundir.LoopDevice],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
) -> None:
    """The image under the loop device loses its second half: reads there fail."""
    device = make_loop(256 * MIB)
    extfs("mkfs", device)
    mounted = mount_extfs(device)
    root = mounted.mountpoint
    make_safe(root)
    with open(root / "big", "wb") as file:
        file.write(os.urandom(150 * MIB))
        os.fsync(file.fileno())
    _size, extents = mounted_map(str(root / "big"))
    lost = max(extents, key=lambda extent: extent.physical)
    kept = min(extents, key=lambda extent: extent.physical)
    cut = (lost.physical + lost.length // 2) & ~(MIB - 1)
    assert kept.physical + kept.length < cut or kept is lost
    log_watch.expect(r"read of \d+ bytes at byte \d+ failed")
    log_watch.expect(REQUEST)
    os.truncate(device.image, cut)
    drop_caches()
    offset = lost.offset + lost.length - BLOCK
    assert errno_of(lambda: direct_read(root / "big", offset, BLOCK)) == errno.EIO
    with open(root / "big", "rb", buffering=0) as file:
        assert errno_of(lambda: os.pread(file.fileno(), BLOCK, offset)) == errno.EIO
        assert len(os.pread(file.fileno(), BLOCK, kept.offset)) == BLOCK
    readable = 0
    for number in range(100):
        path = root / "safe" / f"file{number}"
        if any(e.physical + e.length > cut for e in mounted_map(str(path))[1]):
            assert errno_of(path.read_bytes) == errno.EIO
        else:
            assert path.read_bytes() == safe_content(number)
            readable += 1
    assert readable > 0
    # A failed read of data is that reader's: nothing else changes.
    (root / "new").write_bytes(b"still writable")
    assert (root / "new").read_bytes() == b"still writable"
    os.truncate(device.image, 256 * MIB)
    mounted.unmount()
    assert "clean" in extfs("fsck", device).stdout


@pytest.mark.parametrize("direct", [False, True])
def test_a_device_that_fails_writes(
    run_directory: rundir.RunDirectory,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
    direct: bool,
) -> None:
    """A sparse image on a tmpfs that is full: writes to new places fail, others work.

    Without a loop device: that takes a short write for a whole one.
    """
    with small_tmpfs(run_directory, 48 * MIB) as place:
        image = place / "image"
        with open(image, "wb") as file:
            file.truncate(256 * MIB)
        extfs("mkfs", image)
        mounted = mount_extfs(image)
        try:
            fail_writes(mounted, log_watch, place, direct)
            extfs("umount", mounted.mountpoint)
            # Metadata that is written home later may have failed too.
            code = mounted.daemon.wait(60)
            assert code in (0, 1)
            if TURNED in mounted.log.read_text():
                assert code == 1
                log_watch.expect(TURNED)
            (place / "ballast").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=300M", place], check=True)
            assert "clean" in extfs("fsck", "--repair", image, check=False).stdout
            assert "clean" in extfs("fsck", image).stdout
            mounted = mount_extfs(image)
            check_safe(mounted.mountpoint)
            mounted.unmount()
        finally:
            mounted.force_off()
            image.unlink()


def fail_writes(mounted: Mounted, log_watch: LogWatch, place: Path, direct: bool) -> None:
    """Write until the device fails; every failure reaches the caller."""
    root = mounted.mountpoint
    make_safe(root)
    log_watch.expect(r"write of \d+ bytes at byte \d+ failed")
    # fsync tells of a write that had its answer; what failed is in the log.
    log_watch.expect(REQUEST if direct else r"\d+ bytes at \d+ of inode \d+ were not written")
    page = mmap.mmap(-1, MIB)
    page[:] = b"w" * MIB
    flags = os.O_CREAT | os.O_RDWR | (os.O_DIRECT if direct else 0)
    big = os.open(root / "big", flags)
    written = 0

    def fill() -> None:
        nonlocal written
        while True:
            count = os.pwrite(big, page, written)
            assert count > 0
            if not direct:
                os.fsync(big)  # the write itself may have been answered early
            written += count

    assert errno_of(fill) == errno.EIO
    assert written >= 16 * MIB
    # What was acknowledged before is there.
    for offset in range(0, written, MIB):
        length = min(MIB, written - offset)
        assert direct_read(root / "big", offset, MIB)[:length] == page[:length], offset
    os.close(big)
    check_safe(root)


def test_a_device_that_fails_the_journal(
    run_directory: rundir.RunDirectory,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
) -> None:
    """No place of the log that is not written yet can be: fsync says so, all turns read-only."""
    with small_tmpfs(run_directory, 48 * MIB) as place:
        image, ballast = place / "image", place / "ballast"
        image.touch()
        os.truncate(image, 256 * MIB)
        extfs("mkfs", image)
        mounted = mount_extfs(image)
        try:
            root = mounted.mountpoint
            make_safe(root)
            durable: list[int] = []
            with open(ballast, "wb", buffering=0) as file:
                assert errno_of(lambda: exhaust(file)) == errno.ENOSPC
                assert errno_of(lambda: create_and_sync(root, durable)) == errno.EIO
            log_watch.expect(r"write of \d+ bytes at byte \d+ failed")
            log_watch.expect(r"journal: .*read-only from now on")
            log_watch.expect(REQUEST)
            refuses_changes(root)
            check_safe(root)
            end_after_error(extfs, mounted)
            ballast.unlink()
            subprocess.run(["mount", "-o", "remount,size=300M", place], check=True)
            assert "clean" in extfs("fsck", "--repair", image, check=False).stdout
            mounted = mount_extfs(image)
            check_safe(mounted.mountpoint)
            for number in durable:
                assert (mounted.mountpoint / f"durable-{number}").is_dir()
            mounted.unmount()
        finally:
            mounted.force_off()
            image.unlink()


def exhaust(file: RawIOBase) -> None:
    while True:
        file.write(bytes(64 << 10))


def create_and_sync(root: Path, durable: list[int]) -> None:
    """New directories, which need no data; appended to `durable` when fsync said so."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for number in range(100_000):
            (root / f"durable-{number}").mkdir()
            os.fsync(descriptor)
            durable.append(number)
    finally:
        os.close(descriptor)
