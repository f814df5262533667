"""Wrong devices, wrong mountpoints, wrong words: a clear line, an exit code, nothing lost."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, LogWatch, Mounted, extfs_command
from faults import MIB, SMALL, as_nobody, assert_says, digest, unchanged
from surgeon import Surgeon

from extfs import cli
from extfs.check import layout

fuse = pytest.mark.fuse
Loop = Callable[..., rundir.LoopDevice]

READERS = (("info %s", 1), ("dump %s super", 1), ("fsck %s", 8), ("fsck --repair %s", 8))


@pytest.fixture
def target(run_directory: rundir.RunDirectory) -> Path:
    return run_directory.new_mountpoint()


@pytest.fixture
def image(make_image: Callable[..., Path], extfs: ExtfsRunner) -> Path:
    """A formatted image of 64 MiB."""
    path = make_image(SMALL)
    extfs("mkfs", path)
    return path


def refused_everywhere(extfs: ExtfsRunner, image: Path, target: Path, *phrases: str) -> None:
    """Mount and every command that reads the device refuse it with the phrases."""
    with unchanged(image):
        assert_says(extfs("mount", image, target, check=False), 1, *phrases)
        for line, code in READERS:
            words = [word.replace("%s", str(image)) for word in line.split()]
            assert_says(extfs(*words, check=False), code, *phrases)


# ---- what is on the device ---------------------------------------------------------------------


@fuse
@pytest.mark.parametrize("content", ["zeros", "noise", "text"])
def test_not_an_extfs_device(
    make_image: Callable[..., Path], extfs: ExtfsRunner, target: Path, content: str
) -> None:
    image = make_image(SMALL)
    with open(image, "r+b") as file:
        if content == "noise":
            file.write(os.urandom(20 * MIB))
        elif content == "text":
            file.write(b"a text that is no EXsb\n" * MIB)
    refused_everywhere(extfs, image, target, "not an extfs device")


@fuse
@pytest.mark.parametrize("size", [0, 511, 5000, 32 * MIB - 1])
def test_tiny_devices(
    make_image: Callable[..., Path], extfs: ExtfsRunner, target: Path, size: int
) -> None:
    image = make_image(size)
    with unchanged(image):
        assert_says(extfs("mkfs", image, check=False), 1, "at least 8192 blocks")
        assert_says(extfs("mkfs", "--force", image, check=False), 1, "at least 8192 blocks")
    refused_everywhere(extfs, image, target, "not an extfs device")


@fuse
@pytest.mark.parametrize("place", ["version", "incompat"])
def test_newer_features(extfs: ExtfsRunner, image: Path, target: Path, place: str) -> None:
    surgeon = Surgeon(image)
    change = {"version": 2} if place == "version" else {"incompat": 1 << 40}
    for block in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK):
        surgeon.set_fields(block, layout.SUPER, **change)
    for words in (("mount", image, target), ("info", image), ("fsck", image)):
        with unchanged(image):
            result = extfs(*words, check=False)
        assert_says(result, 8 if words[0] == "fsck" else 1)
        assert "features" in result.stderr
        assert ("version 2" if place == "version" else "0x10000000000") in result.stderr
    with unchanged(image):
        assert_says(extfs("mkfs", image, check=False), 1, "extfs", "of another version")


@fuse
def test_features_that_only_forbid_writing(
    extfs: ExtfsRunner,
    image: Path,
    target: Path,
    mount_extfs: Callable[..., Mounted],
) -> None:
    mounted = mount_extfs(image)
    (mounted.mountpoint / "file").write_bytes(b"content")
    mounted.unmount()
    surgeon = Surgeon(image)
    for block in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK):
        surgeon.set_fields(block, layout.SUPER, ro_compat=4)
    with unchanged(image):
        assert_says(extfs("mount", image, target, check=False), 1, "0x4", "read-only")
        mounted = mount_extfs(image, "ro")
        assert (mounted.mountpoint / "file").read_bytes() == b"content"
        mounted.unmount()


@fuse
def test_a_device_smaller_than_its_filesystem(
    extfs: ExtfsRunner, image: Path, target: Path, mount_extfs: Callable[..., Mounted]
) -> None:
    mounted = mount_extfs(image)
    (mounted.mountpoint / "file").write_bytes(b"still there")
    mounted.unmount()
    os.truncate(image, 40 * MIB)
    refused_everywhere(extfs, image, target, "16384 blocks", "only 10240")
    os.truncate(image, SMALL)
    mounted = mount_extfs(image)
    assert (mounted.mountpoint / "file").read_bytes() == b"still there"


FOREIGN = {
    "ext4": (["mkfs.ext4", "-q"], "ext4"),
    "xfs": (["mkfs.xfs", "-q"], "xfs"),
    "ntfs": (["mkfs.ntfs", "-q", "-Q", "-F"], "ntfs"),
    "swap": (["mkswap"], "swap"),
    "partitions": (["sfdisk", "-q"], "partition table of type dos"),
}


@fuse
@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=[pytest.mark.slow] * (kind != "ext4")) for kind in FOREIGN),
        "extfs",
    ],
)
def test_another_filesystem_is_not_overwritten(
    make_loop: Loop, extfs: ExtfsRunner, target: Path, kind: str
) -> None:
    device = make_loop(320 * MIB)
    if kind == "extfs":
        extfs("mkfs", device)
        said = "an extfs filesystem"
    else:
        command, said = FOREIGN[kind]
        if shutil.which(command[0]) is None:
            pytest.skip(f"there is no {command[0]}")
        subprocess.run(
            [*command, str(device)], input="2048,,L\n", text=True, check=True, capture_output=True
        )
    with unchanged(device.image):
        for path in (device.path, device.image):
            assert_says(extfs("mkfs", path, check=False), 1, "carries", said, "force")
        if kind != "extfs":
            assert_says(extfs("mount", device, target, check=False), 1, "not an extfs device")
    extfs("mkfs", "--force", device)
    assert "clean" in extfs("fsck", device).stdout
    # Nobody else finds a trace of what was there before.
    found = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "TYPE", device.image], capture_output=True, text=True
    )
    assert found.stdout == ""


# ---- who has the device ------------------------------------------------------------------------


@fuse
def test_the_device_is_mounted_already(
    mounted: Mounted,
    loop_device: rundir.LoopDevice,
    make_loop: Loop,
    extfs: ExtfsRunner,
    target: Path,
    run_directory: rundir.RunDirectory,
) -> None:
    """By its name, a link to it, its image, another loop device over that."""
    (mounted.mountpoint / "file").write_bytes(b"unharmed")
    link = run_directory.path / "link-to-device"
    link.symlink_to(loop_device.path)
    second = make_loop(image=loop_device.image)
    for path in (loop_device.path, link, loop_device.image, second.path):
        for words in (
            ("mount", path, target),
            ("mount", path, target, "-o", "ro"),
            ("mkfs", path),
            ("mkfs", "--force", path),
        ):
            assert_says(extfs(*words, check=False), 1, "the device is in use")
        for option in ([], ["--repair"]):
            assert_says(extfs("fsck", *option, path, check=False), 8, "the device is in use")
    link.unlink()
    assert (mounted.mountpoint / "file").read_bytes() == b"unharmed"
    mounted.unmount()
    assert "clean" in extfs("fsck", loop_device).stdout


@fuse
def test_the_image_is_mounted_and_its_loop_device_asked_for(
    make_loop: Loop, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted], target: Path
) -> None:
    device = make_loop(SMALL)
    extfs("mkfs", device)
    mounted = mount_extfs(device.image)
    (mounted.mountpoint / "file").write_bytes(b"unharmed")
    assert_says(extfs("mount", device, target, check=False), 1, "in use")
    assert_says(extfs("mkfs", "--force", device, check=False), 1, "in use")
    assert_says(extfs("fsck", device, check=False), 8, "in use")
    mounted.unmount()
    assert "clean" in extfs("fsck", device).stdout


def test_a_device_that_the_kernel_has_mounted(
    make_loop: Loop, extfs: ExtfsRunner, target: Path
) -> None:
    device = make_loop(SMALL)
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", "-t", "ext4", device, target], check=True)
    try:
        (target / "file").write_bytes(b"unharmed")
        for path in (device.path, device.image):
            assert_says(extfs("mkfs", "--force", path, check=False), 1, "in use")
        assert (target / "file").read_bytes() == b"unharmed"
    finally:
        subprocess.run(["umount", target], check=True)
    subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)


@fuse
def test_another_host_has_it_mounted(
    image: Path, extfs: ExtfsRunner, target: Path, mount_extfs: Callable[..., Mounted]
) -> None:
    """A device with two hosts: all that the second sees is a heartbeat that moves."""
    surgeon = Surgeon(image)

    def beat(number: int, host: bytes) -> None:
        surgeon.set_fields(
            layout.HEARTBEAT_BLOCK,
            layout.HEARTBEAT,
            seq=number,
            state=1,
            pid=4242,
            host=host.ljust(64, b"\0"),
            boot_id=b"another boot id!",
            interval_ms=400,
        )

    stop = threading.Event()

    def run() -> None:
        number = 10
        while not stop.is_set():
            number += 1
            beat(number, b"elsewhere")
            stop.wait(0.1)

    beat(10, b"elsewhere")
    other = threading.Thread(target=run)
    other.start()
    try:
        for words in (("mount", image, target), ("mkfs", "--force", image)):
            assert_says(extfs(*words, check=False), 1, "host elsewhere", "4242")
    finally:
        stop.set()
        other.join()
    # That host died: its heartbeat stands still, and the device can be had.
    mounted = mount_extfs(image)
    (mounted.mountpoint / "file").write_bytes(b"taken over")


@fuse
def test_a_read_only_mount_does_not_replay(
    image: Path,
    extfs: ExtfsRunner,
    target: Path,
    mount_extfs: Callable[..., Mounted],
) -> None:
    mounted = mount_extfs(image)
    with open(mounted.mountpoint / "file", "wb") as file:
        file.write(b"in the journal")
        file.flush()
        os.fsync(file.fileno())
    mounted.kill()
    mounted.force_off()
    with unchanged(image):
        assert_says(extfs("mount", image, target, "-o", "ro", check=False), 1, "to replay")
    mounted = mount_extfs(image)
    assert (mounted.mountpoint / "file").read_bytes() == b"in the journal"


# ---- mountpoints and privileges ----------------------------------------------------------------


@fuse
def test_wrong_mountpoints(
    image: Path, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> None:
    file = run_directory.path / "a-file"
    file.write_bytes(b"")
    loop = run_directory.path / "a-link"
    loop.symlink_to("a-link")
    with unchanged(image):
        for path, said in (
            (run_directory.path / "missing", "No such file or directory"),
            (run_directory.path / "missing" / "deeper", "No such file or directory"),
            (file, "not a directory"),
            (file / "below", "irectory"),
            (loop, "symbolic links"),
        ):
            assert_says(extfs("mount", image, path, check=False), 1, str(path), said)
    file.unlink()
    loop.unlink()


@fuse
def test_a_mountpoint_that_is_taken(mounted: Mounted, image: Path, extfs: ExtfsRunner) -> None:
    (mounted.mountpoint / "file").write_bytes(b"unharmed")
    with unchanged(image):
        assert_says(
            extfs("mount", image, mounted.mountpoint, check=False), 1, "mounted there already"
        )
    assert (mounted.mountpoint / "file").read_bytes() == b"unharmed"
    # A directory inside another mount is as good as any.
    inner = mounted.mountpoint / "inner"
    inner.mkdir()
    extfs("mount", image, inner)
    (inner / "file").write_bytes(b"inside")
    extfs("umount", inner)
    assert list(inner.iterdir()) == []


@fuse
def test_without_root(
    image: Path,
    make_loop: Loop,
    extfs: ExtfsRunner,
    target: Path,
    run_directory: rundir.RunDirectory,
) -> None:
    device = make_loop(SMALL)
    extfs("mkfs", device)
    image.chmod(0o666)
    with unchanged(image, device.image):
        assert_says(as_nobody(run_directory, "mount", image, target), 1, "mounting needs root")
        for command, code in (("mkfs", 1), ("info", 1), ("fsck", 8)):
            result = as_nobody(run_directory, command, device)
            assert_says(result, code, str(device), "Permission denied")
    # An image of one's own needs no root.
    result = as_nobody(run_directory, "fsck", image)
    assert (result.returncode, result.stderr) == (0, "")
    assert as_nobody(run_directory, "mkfs", "--force", image).returncode == 0


@fuse
def test_umount_without_root(
    mounted: Mounted, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> None:
    result = as_nobody(run_directory, "umount", mounted.mountpoint)
    assert_says(result, 1, str(mounted.mountpoint), "not permitted")
    assert mounted.is_mounted()
    (mounted.mountpoint / "file").write_bytes(b"it works")


_WITHOUT_FUSE = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
mkdir "$1/shm"
mount --rbind /dev/shm "$1/shm"
mknod "$1/null" c 1 3
mount --rbind "$1" /dev
shift
exec "$@"
"""


@fuse
def test_without_dev_fuse(image: Path, run_directory: rundir.RunDirectory, target: Path) -> None:
    """In a mount namespace of its own, where /dev has no fuse."""
    place, command = run_directory.new_mountpoint(), extfs_command("mount", image, target)
    with unchanged(image):
        result = subprocess.run(
            ["unshare", "-m", "sh", "-c", _WITHOUT_FUSE, "sh", place, *command],
            env=run_directory.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert_says(result, 1, "there is no /dev/fuse")


def test_what_is_not_a_device(
    extfs: ExtfsRunner, target: Path, run_directory: rundir.RunDirectory
) -> None:
    missing = run_directory.path / "missing"
    for path, said in ((missing, "No such file"), (target, "evice"), (Path("/dev/null"), "evice")):
        for command, code in (("mkfs", 1), ("fsck", 8)):
            assert_says(extfs(command, path, check=False), code, str(path), said)


@fuse
def test_what_is_not_a_device_cannot_be_mounted(
    extfs: ExtfsRunner, target: Path, run_directory: rundir.RunDirectory
) -> None:
    for path, said in (
        (run_directory.path / "missing", "No such file"),
        (target, "evice"),
        (Path("/dev/null"), "evice"),
    ):
        assert_says(extfs("mount", path, target, check=False), 1, str(path), said)


# ---- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "nonsense"),
        ("mkfs", "DEVICE"),
        ("mkfs IMAGE more", "more"),
        ("mkfs IMAGE --journal-size", "journal-size"),
        ("mkfs IMAGE --journal-size much", "much"),
        ("mkfs IMAGE --journal-size -4M", "-4M"),
        ("mkfs IMAGE --journal-size 1", "between 4 MiB and 1 GiB"),
        ("mkfs IMAGE --journal-size 4097K", "multiple of 4 KiB"),
        ("mkfs IMAGE --journal-size 5T", "between 4 MiB and 1 GiB"),
        ("mkfs IMAGE --label " + "x" * 65, "at most 64 bytes"),
        ("mkfs IMAGE --label " + "ü" * 33, "at most 64 bytes"),
        ("mkfs IMAGE --bogus", "--bogus"),
        ("mount", "DEVICE"),
        ("mount IMAGE", "MOUNTPOINT"),
        ("mount IMAGE TARGET more", "more"),
        ("mount IMAGE TARGET -o nonsense", "unknown mount option: nonsense"),
        ("mount IMAGE TARGET -o ro,cache=64M,bogus=1", "unknown mount option: bogus=1"),
        ("mount IMAGE TARGET -o cache=much", "'much' is not a size"),
        ("mount IMAGE TARGET -o cache=1", "cache"),
        ("mount IMAGE TARGET -o threads=0", "threads"),
        ("mount IMAGE TARGET -o threads=many", "'many' is not a number"),
        ("mount IMAGE TARGET -o commit=0", "commit"),
        ("mount IMAGE TARGET -o inode_cache=-1", "inode_cache"),
        ("umount", "MOUNTPOINT"),
        ("umount TARGET more", "more"),
        ("info", "DEVICE|MOUNTPOINT"),
        ("info IMAGE more", "more"),
        ("map", "FILE"),
        ("dump IMAGE", "WHAT"),
        ("fsck", "DEVICE"),
        ("fsck --bogus IMAGE", "--bogus"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str],
    make_image: Callable[..., Path],
    target: Path,
    line: str,
    said: str,
) -> None:
    image = make_image(SMALL)
    words = [{"IMAGE": str(image), "TARGET": str(target)}.get(w, w) for w in line.split()]
    with unchanged(image):
        code = cli.run(cli.extfs, words, "extfs")
    result = subprocess.CompletedProcess(words, code, *capsys.readouterr())
    assert_says(result, 16 if words[0] == "fsck" else 2, said)
    assert len(result.stderr.splitlines()) == 1


def test_without_words(extfs: ExtfsRunner) -> None:
    result = extfs(check=False)
    assert result.returncode == 2
    assert "Usage" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["umount", "TARGET"], "no extfs is mounted there"),
        (["umount", "TARGET/missing"], "no extfs is mounted there"),
        (["info", "TARGET"], "no extfs is mounted here"),
        (["info", "TARGET/missing"], "No such file"),
        (["map", "IMAGE"], "not a regular file on extfs"),
        (["map", "TARGET/missing"], "No such file"),
        (["dump", "IMAGE", "nonsense"], "nonsense"),
        (["dump", "IMAGE", "ag", "9999"], "there are 2 allocation groups"),
        (["dump", "IMAGE", "inode", "x"], "x"),
        (["dump", "IMAGE", "block", "99999999"], "99999999"),
        (["dump", "IMAGE", "tree", "oak"], "oak"),
    ],
)
def test_things_that_are_not_there(
    extfs: ExtfsRunner, image: Path, target: Path, words: list[str], said: str
) -> None:
    words = [w.replace("IMAGE", str(image)).replace("TARGET", str(target)) for w in words]
    with unchanged(image):
        assert_says(extfs(*words, check=False), 1, said)


@fuse
def test_a_mount_by_mount_8_passes_failures_on(
    image: Path, extfs: ExtfsRunner, target: Path, run_directory: rundir.RunDirectory
) -> None:
    """The names that mount(8) and fsck(8) call, with their exit codes."""
    names = run_directory.path / "names"
    names.mkdir()
    extfs("install-helpers", "--prefix", names)

    def helper(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [names / name, *words],
            env=run_directory.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    with unchanged(image):
        assert_says(helper("mount.extfs", image, target, "-o", "nonsense"), 1, "nonsense")
        assert_says(helper("mount.extfs", image, target / "missing"), 1, "No such file")
        assert_says(helper("mkfs.extfs", image), 1, "carries an extfs filesystem")
        assert_says(helper("mkfs.extfs"), 1, "DEVICE")
        assert_says(helper("fsck.extfs", "--bogus"), 16, "bogus")
        assert helper("fsck.extfs", "-a", image).returncode == 0
    shutil.rmtree(names)


# ---- the superblock ----------------------------------------------------------------------------


@fuse
@pytest.mark.parametrize("how", ["flipped", "zeroed"])
def test_a_damaged_primary_superblock(
    image: Path,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    log_watch: LogWatch,
    how: str,
) -> None:
    """The copy is used, and said; fsck finds it, and repairs it."""
    mounted = mount_extfs(image)
    (mounted.mountpoint / "file").write_bytes(b"content")
    mounted.unmount()
    surgeon = Surgeon(image)
    if how == "flipped":
        surgeon.flip(layout.SUPER_BLOCK, 100)
    else:
        surgeon.write(layout.SUPER_BLOCK, bytes(4096), fix=False)
    log_watch.expect(r"superblock \(block 0\): .*using the copy in block 4096")
    mounted = mount_extfs(image)
    assert (mounted.mountpoint / "file").read_bytes() == b"content"
    mounted.unmount()
    assert "superblock" in extfs("info", image).stdout
    found = extfs("fsck", image, check=False)
    assert found.returncode == 4
    assert "superblock, block 0" in found.stdout
    repaired = extfs("fsck", "--repair", image, check=False)
    assert repaired.returncode == 1
    assert extfs("fsck", image).returncode == 0
    mounted = mount_extfs(image)
    assert (mounted.mountpoint / "file").read_bytes() == b"content"


@fuse
def test_a_background_mount_says_that_the_copy_is_used(
    image: Path, extfs: ExtfsRunner, target: Path
) -> None:
    Surgeon(image).flip(layout.SUPER_BLOCK, 100)
    result = extfs("mount", image, target)
    assert "using the copy in block 4096" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    extfs("umount", target)


@fuse
def test_a_damaged_copy_of_the_superblock(
    image: Path, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    Surgeon(image).flip(layout.SUPER_COPY_BLOCK, 100)
    mount_extfs(image).unmount()
    assert extfs("fsck", image, check=False).returncode == 4
    assert extfs("fsck", "--repair", image, check=False).returncode == 1
    assert extfs("fsck", image).returncode == 0


@fuse
def test_both_superblocks_damaged(extfs: ExtfsRunner, image: Path, target: Path) -> None:
    surgeon = Surgeon(image)
    for block in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK):
        surgeon.flip(block, 100)
    refused = extfs("mount", image, target, check=False)
    assert refused.returncode == 1
    assert "both superblock copies are damaged" in refused.stderr
    with unchanged(image):
        assert_says(extfs("fsck", "--repair", image, check=False), 8, "both superblock copies")
        assert_says(extfs("mkfs", image, check=False), 1, "extfs", "damaged")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_blocks", 1 << 60),
        ("ag_blocks", 0),
        ("ag_count", 0),
        ("ag_count", 0xFFFFFFFF),
        ("journal_start", 0),
        ("journal_start", 1 << 40),
        ("journal_blocks", 2),
        ("journal_blocks", 1 << 50),
        ("block_size", 512),
        ("root_inode", 0),
    ],
)
@fuse
def test_impossible_geometry(
    extfs: ExtfsRunner, image: Path, target: Path, field: str, value: int
) -> None:
    """Checksums right, numbers wrong: refused, not believed."""
    surgeon = Surgeon(image)
    for block in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK):
        surgeon.set_fields(block, layout.SUPER, **{field: value})
    with unchanged(image):
        for words, code in ((("mount", image, target), 1), (("fsck", "--repair", image), 8)):
            result = extfs(*words, check=False)
            assert result.returncode == code, result.stderr
            assert "superblock copies are damaged" in result.stderr


def test_the_fingerprint_sees_one_byte(make_image: Callable[..., Path]) -> None:
    """`unchanged` would notice."""
    image = make_image(SMALL)
    before = digest(image)
    with open(image, "r+b") as file:
        file.seek(SMALL - 1)
        file.write(struct.pack("B", 1))
    assert digest(image) != before
