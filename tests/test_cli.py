"""The commands as a user or a script meets them: output, exit codes, one line for every error."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from surgeon import Surgeon

from extfs.check import layout
from extfs.check.layout import Tree
from extfs.cli.mapping import MapExtent, bar
from extfs.cli.output import parse_size, size_text

MIB = 1 << 20
COMMANDS = [
    *("mkfs", "info", "mount", "umount", "map", "layout", "status"),
    *("fsck", "dump", "install-helpers"),
]


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(64 * MIB)


@pytest.fixture
def formatted(image: Path, extfs: ExtfsRunner) -> Path:
    extfs("mkfs", image, "--label", "a label")
    return image


@pytest.fixture
def mountpoint(run_directory: rundir.RunDirectory) -> Path:
    return run_directory.new_mountpoint()


def fails(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line that begins "extfs: " and holds the words, and the exit code.

    mount may tell details in lines before it.
    """
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("extfs: ") for line in lines), result.stderr
    assert len(lines) == 1 or result.args[1] == "mount", result.stderr
    for word in words:
        assert word in lines[-1], (word, lines)


# ---- words and numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64M", 64 << 20),
        ("1g", 1 << 30),
        ("16T", 16 << 40),
        ("1.5G", 3 << 29),
        ("8MiB", 8 << 20),
        (" 2k ", 2048),
        ("100B", 100),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5", "1X", "12 34", "9" * 19 + "T", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 64 << 20, 10**9, 1 << 60)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "64 MiB",
        "954 MiB",
        "1 EiB",
    ]


def extent(first: int, count: int, state: str = "written", shared: bool = False) -> MapExtent:
    return MapExtent(first * 4096, 0, count * 4096, state, shared, False)


def test_the_bar_shows_each_state() -> None:
    extents = [extent(0, 2), extent(4, 2, "unwritten"), extent(6, 2, shared=True)]
    assert bar(10 * 4096, extents, 10) == "██··░░▓▓··"
    assert bar(10 * 4096, extents, 5) == "█·░▓·"
    assert bar(10 * 4096, extents, 3) == "▒▒▒"
    assert bar(0, [], 10) == ""
    assert bar(100, [extent(0, 1)], 10) == "█"
    assert bar(4096, [extent(0, 4)], 10) == "████", "past the end"
    assert bar(1 << 62, [], 40) == "·" * 40
    whole = bar((1 << 63) - 1, [extent(0, 1)], 10)
    assert whole == "▒" + "·" * 9


# ---- help and usage ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_exit_codes(command: str, extfs: ExtfsRunner) -> None:
    assert "Exit codes" in " ".join(extfs(command, "--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], 2),
        (["mkfs"], 2),
        (["mkfs", "a", "b"], 2),
        (["mkfs", "--nonsense", "a"], 2),
        (["mkfs", "a", "--journal-size", "big"], 2),
        (["fsck"], 16),
        (["fsck", "--what", "a"], 16),
        (["dump", "a"], 2),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, extfs: ExtfsRunner) -> None:
    fails(extfs(*arguments, check=False), code)


def test_no_arguments_shows_help(extfs: ExtfsRunner) -> None:
    result = extfs(check=False)
    assert "Commands:" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


# ---- mkfs and info -----------------------------------------------------------------------------


def test_mkfs_and_info(image: Path, extfs: ExtfsRunner) -> None:
    made = json.loads(
        extfs("mkfs", image, "--label", "täst", "--journal-size", "8M", "--json").stdout
    )
    assert made["label"] == "täst"
    assert made["size"] == 64 * MIB
    assert made["journal_size"] == 8 * MIB
    told = json.loads(extfs("info", image, "--json").stdout)
    for name in ("uuid", "label", "size", "journal_size", "allocation_groups"):
        assert told[name] == made[name]
    assert (told["inodes"], told["mountpoints"], told["unmounted_cleanly"]) == (1, [], True)
    text = extfs("info", image).stdout
    assert made["uuid"] in text
    assert "clean" in text
    assert "64 MiB" in text


def test_mkfs_refuses_what_it_would_destroy(image: Path, extfs: ExtfsRunner) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    before = image.read_bytes()
    fails(extfs("mkfs", image, check=False), 1, str(image), "ext4", "force")
    assert image.read_bytes() == before
    extfs("mkfs", image, "--force")
    fails(extfs("mkfs", image, check=False), 1, "extfs", "force")
    assert extfs("fsck", image).returncode == 0


def test_mkfs_refuses_bad_input(
    image: Path, tmp_path: Path, make_image: Callable[..., Path], extfs: ExtfsRunner
) -> None:
    fails(extfs("mkfs", tmp_path / "missing", check=False), 1, "No such file")
    fails(extfs("mkfs", tmp_path, check=False), 1, str(tmp_path))
    fails(extfs("mkfs", make_image(MIB), check=False), 1, "8192 blocks")
    fails(extfs("mkfs", image, "--label", "x" * 65, check=False), 2, "64 bytes")
    fails(extfs("mkfs", image, "--journal-size", "1M", check=False), 2, "4 MiB")
    fails(extfs("mkfs", image, "--journal-size", "64M", check=False), 1)
    fails(extfs("info", image, check=False), 1, "not an extfs device")
    fails(extfs("info", tmp_path / "missing", check=False), 1, "missing")
    fails(extfs("info", tmp_path, check=False), 1, "no extfs is mounted here")


def test_a_damaged_primary_superblock_is_said(formatted: Path, extfs: ExtfsRunner) -> None:
    Surgeon(formatted).flip(layout.SUPER_BLOCK)
    told = json.loads(extfs("info", formatted, "--json").stdout)
    assert told["label"] == "a label"
    assert "checksum" in told["super_damage"][0]
    assert "checksum" in extfs("info", formatted).stdout


# ---- fsck and dump -----------------------------------------------------------------------------


def test_fsck_exit_codes(
    formatted: Path, make_image: Callable[..., Path], extfs: ExtfsRunner
) -> None:
    assert "clean" in extfs("fsck", formatted).stdout
    surgeon = Surgeon(formatted)
    surgeon.edit_inode(1, nlink=5)
    surgeon.flip(layout.HEARTBEAT_BLOCK)
    result = extfs("fsck", formatted, check=False)
    assert result.returncode == 4
    assert "[LINK_COUNT]" in result.stdout
    assert "2 errors; --repair can put 2 of them right" in result.stdout
    found = json.loads(extfs("fsck", formatted, "--json", check=False).stdout)
    assert found["exit_code"] == 4
    assert {f["code"] for f in found["findings"]} == {"LINK_COUNT", "META_CRC"}
    assert all(f["repair"] for f in found["findings"])
    result = extfs("fsck", formatted, "--repair", check=False)
    assert result.returncode == 1
    assert "repaired" in result.stdout
    assert extfs("fsck", formatted, "--repair", check=False).returncode == 0
    surgeon.flip(next(surgeon.leaves(Tree.INODE))[0])
    result = extfs("fsck", formatted, "--repair", check=False)
    assert result.returncode == 4
    fails(extfs("fsck", make_image(64 * MIB), check=False), 8, "not an extfs device")
    fails(extfs("fsck", "/nonexistent", check=False), 8, "/nonexistent", "No such file")


def test_dump_shows_every_structure(formatted: Path, extfs: ExtfsRunner) -> None:
    def dump(*what: str) -> dict[str, object]:
        result = json.loads(extfs("dump", formatted, *what, "--json").stdout)
        assert isinstance(result, dict)
        assert extfs("dump", formatted, *what).stdout
        return result

    supers = dump("super")
    assert supers["primary"]["label"] == "a label"  # type: ignore[index]
    root = dump("root")
    assert root["inodes"] == 1
    node = root["trees"]["inode"]["block"]  # type: ignore[index]
    assert dump("ag", "0")["start"] == 0
    assert dump("inode", "1")["type"] == "directory"
    assert dump("dir", "1") == {"ino": 1, "entries": []}
    assert dump("extents", "1")["extents"] == []
    assert dump("node", str(node))["tree"] == "inode"
    assert dump("block", str(node))["tree"] == "inode"
    assert dump("block", "2")["inodes"] == 1
    assert len(dump("journal")["headers"]) == 2  # type: ignore[arg-type]
    assert dump("heartbeat")["state"] == 0
    for tree in layout.GLOBAL_TREES:
        assert dump("tree", tree.title)["tree"] == tree.title


def test_dump_refuses_what_there_is_not(formatted: Path, extfs: ExtfsRunner) -> None:
    for what, word in (
        (["nonsense"], "inode N"),
        (["inode", "77"], "no inode 77"),
        (["inode", "x"], "not a number"),
        (["ag", "9999"], "allocation groups"),
        (["tree", "oak"], "dirent"),
        (["node", "99999999"], "no block"),
    ):
        fails(extfs("dump", formatted, *what, check=False), 1, word)
    surgeon = Surgeon(formatted)
    block = next(surgeon.leaves(Tree.INODE))[0]
    surgeon.flip(block)
    assert "META_CRC" in extfs("dump", formatted, "node", str(block)).stdout
    fails(extfs("dump", formatted, "inode", "1", check=False), 1, f"block {block}", "checksum")


# ---- mount and umount --------------------------------------------------------------------------


@pytest.mark.fuse
def test_mount_in_the_background_and_umount(
    formatted: Path, mountpoint: Path, extfs: ExtfsRunner
) -> None:
    extfs(
        "mount", formatted, mountpoint, "-o", "noatime,nofail,x-systemd.automount", "-o", "cache=8M"
    )
    try:
        (mountpoint / "file").write_bytes(b"x" * 100_000)
        told = json.loads(extfs("info", mountpoint, "--json").stdout)
        assert told["device"] == str(formatted)
        assert told["mountpoints"] == [str(mountpoint)]
        assert told["label"] == "a label"
        assert f"mounted on {mountpoint}" in extfs("info", formatted).stdout
        fails(extfs("mount", formatted, mountpoint, check=False), 1, "mounted there already")
        fails(extfs("fsck", formatted, check=False), 8, "in use")
        fails(extfs("mkfs", "--force", formatted, check=False), 1, "in use")
        with open(mountpoint / "file", "rb"):
            fails(extfs("umount", mountpoint, check=False), 1, "in use")
    finally:
        extfs("umount", mountpoint)
    # The daemon is gone and has written everything: the device is free and clean at once.
    assert extfs("fsck", formatted).returncode == 0
    told = json.loads(extfs("info", formatted, "--json").stdout)
    assert (told["journal_records"], told["inodes"]) == (0, 2)
    fails(extfs("umount", mountpoint, check=False), 1, "no extfs is mounted")


@pytest.mark.fuse
def test_mount_errors(
    formatted: Path,
    mountpoint: Path,
    make_image: Callable[..., Path],
    tmp_path: Path,
    extfs: ExtfsRunner,
) -> None:
    def mount(
        device: Path | str, target: Path | str, *options: str
    ) -> subprocess.CompletedProcess[str]:
        return extfs("mount", str(device), str(target), *options, check=False)

    fails(mount(make_image(64 * MIB), mountpoint), 1, "not an extfs device")
    fails(mount(tmp_path / "missing", mountpoint), 1, "missing", "No such file")
    fails(mount(formatted, tmp_path / "missing"), 1, "missing", "No such file")
    (tmp_path / "file").touch()
    fails(mount(formatted, tmp_path / "file"), 1, "not a directory")
    fails(mount(formatted, mountpoint, "-o", "ro,colour=red"), 2, "colour=red")
    fails(mount(formatted, mountpoint, "-o", "cache=lots"), 2, "cache", "lots")
    fails(mount(formatted, mountpoint, "-o", "commit=0"), 2, "commit")
    surgeon = Surgeon(formatted)
    surgeon.set_fields(layout.SUPER_BLOCK, layout.SUPER, incompat=1 << 40)
    fails(mount(formatted, mountpoint), 1, "features")
    surgeon.set_fields(layout.SUPER_BLOCK, layout.SUPER, incompat=0)
    os.truncate(formatted, 48 * MIB)
    fails(mount(formatted, mountpoint), 1, "smaller")
    os.truncate(formatted, 64 * MIB)
    surgeon.flip(layout.SUPER_BLOCK)
    surgeon.flip(layout.SUPER_COPY_BLOCK)
    fails(mount(formatted, mountpoint), 1, "superblock")
    assert not rundir.mounts_below(mountpoint)


@pytest.mark.fuse
def test_a_mount_says_that_it_uses_the_superblock_copy(
    formatted: Path, mountpoint: Path, extfs: ExtfsRunner
) -> None:
    Surgeon(formatted).flip(layout.SUPER_BLOCK)
    result = extfs("mount", formatted, mountpoint)
    extfs("umount", mountpoint)
    assert "using the copy" in result.stderr
    assert extfs("fsck", formatted, "--repair", check=False).returncode == 1
    assert extfs("mount", formatted, mountpoint).stderr == ""
    extfs("umount", mountpoint)


@pytest.mark.fuse
def test_an_image_and_its_loop_device_are_one_device(
    make_loop: Callable[..., rundir.LoopDevice], mountpoint: Path, extfs: ExtfsRunner
) -> None:
    loop = make_loop(64 * MIB)
    extfs("mkfs", loop)
    for mounted, other in ((loop.path, loop.image), (loop.image, loop.path)):
        extfs("mount", mounted, mountpoint)
        try:
            for device in (mounted, other):
                fails(extfs("mount", device, "/mnt", check=False), 1, "in use")
                fails(extfs("mkfs", "--force", device, check=False), 1, "in use")
                fails(extfs("fsck", device, check=False), 8, "in use")
                fails(extfs("fsck", "--repair", device, check=False), 8, "in use")
        finally:
            extfs("umount", mountpoint)
        assert extfs("fsck", other).returncode == 0


@pytest.mark.fuse
def test_mounting_needs_root(formatted: Path, mountpoint: Path, extfs: ExtfsRunner) -> None:
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from extfs.cli import extfs, run\n"
        f"sys.exit(run(extfs, ['mount', {str(formatted)!r}, {str(mountpoint)!r}], 'extfs'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    fails(result, 1, "needs root")


@pytest.mark.fuse
def test_without_dev_fuse(formatted: Path, mountpoint: Path, extfs: ExtfsRunner) -> None:
    command = [
        str(Path(sys.executable).with_name("extfs")),
        "mount",
        str(formatted),
        str(mountpoint),
    ]
    script = 'mount -t tmpfs none /dev && exec "$@"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    fails(result, 1, "/dev/fuse")


@pytest.mark.fuse
def test_a_dead_mount_is_cleaned_up(
    formatted: Path, mountpoint: Path, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    mounted = mount_extfs(formatted, mountpoint=mountpoint)
    (mountpoint / "kept").write_bytes(b"kept")
    descriptor = os.open(mountpoint / "kept", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    mounted.daemon.send_signal(signal.SIGKILL)
    mounted.daemon.wait()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.statvfs(mountpoint)
    result = extfs("mount", formatted, mountpoint)
    try:
        assert "died; cleaning up its mount" in result.stderr
        assert (mountpoint / "kept").read_bytes() == b"kept"
        assert len(rundir.mounts_below(mountpoint)) == 1
    finally:
        extfs("umount", mountpoint)
    assert extfs("fsck", formatted).returncode == 0


@pytest.mark.fuse
def test_umount_of_a_dead_mount(
    formatted: Path, mountpoint: Path, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    mount_extfs(formatted, mountpoint=mountpoint).kill()
    extfs("umount", mountpoint)
    assert not rundir.mounts_below(mountpoint)


# ---- map ---------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_map_of_a_mounted_file_and_of_the_device(
    formatted: Path, mountpoint: Path, extfs: ExtfsRunner
) -> None:
    extfs("mount", formatted, mountpoint)
    try:
        path = mountpoint / "file"
        with open(path, "wb") as file:
            file.write(b"x" * 8192)
            file.seek(1 << 20)
            file.write(b"y" * 4096)
            file.flush()
            os.posix_fallocate(file.fileno(), 2 << 20, 1 << 20)
        mapped = json.loads(extfs("map", path, "--json").stdout)
        assert mapped["size"] == 3 << 20
        assert [(e["offset"], e["length"], e["state"]) for e in mapped["extents"]] == [
            (0, 8192, "written"),
            (1 << 20, 4096, "written"),
            (2 << 20, 1 << 20, "unwritten"),
        ]
        text = extfs("map", path).stdout
        assert "unwritten" in text
        assert "█" in text
        assert "3 extents map 1.0 MiB" in text
        fails(extfs("map", mountpoint, check=False), 1, "not a regular file on extfs")
        fails(extfs("map", __file__, check=False), 1, "not a regular file on extfs")
        fails(extfs("map", mountpoint / "missing", check=False), 1, "missing")
        assert json.loads(extfs("map", __file__ + "x", check=False).stdout or "{}") == {}
    finally:
        extfs("umount", mountpoint)
    again = json.loads(extfs("map", "--device", formatted, "/file", "--json").stdout)
    assert again["extents"] == mapped["extents"]
    content = formatted.read_bytes()
    first = again["extents"][0]
    assert content[first["physical"] : first["physical"] + 8192] == b"x" * 8192
    fails(extfs("map", "--device", formatted, "/nothing", check=False), 1, "/nothing")
    fails(extfs("map", "--device", formatted, "/", check=False), 1, "not a regular file")


@pytest.mark.fuse
def test_a_map_longer_than_one_ioctl(formatted: Path, mountpoint: Path, extfs: ExtfsRunner) -> None:
    extfs("mount", formatted, mountpoint)
    try:
        path = mountpoint / "many"
        with open(path, "wb") as file:
            for number in range(1300):
                os.pwrite(file.fileno(), b"z", number * 8192)
        extents = json.loads(extfs("map", path, "--json").stdout)["extents"]
        assert [e["offset"] for e in extents] == [n * 8192 for n in range(1300)]
    finally:
        extfs("umount", mountpoint)


# ---- the names that mkfs(8), fsck(8) and mount(8) call -----------------------------------------


@pytest.fixture
def sbin(tmp_path: Path, extfs: ExtfsRunner) -> Path:
    extfs("install-helpers", "--prefix", tmp_path)
    return tmp_path


def helper(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def test_helpers_are_linked_and_removed(sbin: Path, extfs: ExtfsRunner) -> None:
    names = {"mkfs.extfs", "fsck.extfs", "mount.extfs"}
    assert {path.name for path in sbin.iterdir()} == names
    extfs("install-helpers", "--prefix", sbin)  # again
    extfs("install-helpers", "--prefix", sbin, "--remove")
    assert list(sbin.iterdir()) == []
    (sbin / "fsck.extfs").write_text("somebody else's")
    fails(extfs("install-helpers", "--prefix", sbin, check=False), 1, "fsck.extfs")
    assert (sbin / "fsck.extfs").read_text() == "somebody else's"


def test_mkfs_and_fsck_helpers(sbin: Path, image: Path) -> None:
    result = helper(sbin / "mkfs.extfs", "-L", "label", image)
    assert result.returncode == 0, result.stderr
    fails(helper(sbin / "mkfs.extfs", image), 1, "force")
    assert helper(sbin / "mkfs.extfs", "-f", "-q", image).stdout == ""
    for options in (["-a"], ["-p"], ["-y"], ["-n"], ["-f"], ["-C", "0"], ["-a", "-f"], []):
        assert helper(sbin / "fsck.extfs", *options, image).returncode == 0, options
    surgeon = Surgeon(image)
    surgeon.edit_inode(1, nlink=5)
    assert helper(sbin / "fsck.extfs", "-n", image).returncode == 4
    assert helper(sbin / "fsck.extfs", "-n", "-y", image).returncode == 4
    assert helper(sbin / "fsck.extfs", "-p", image).returncode == 1
    assert helper(sbin / "fsck.extfs", image).returncode == 0
    assert helper(sbin / "fsck.extfs", "-Z", image).returncode == 16
    fails(helper(sbin / "fsck.extfs", "/nonexistent"), 8)


@pytest.mark.fuse
def test_mount_helper(sbin: Path, formatted: Path, mountpoint: Path, extfs: ExtfsRunner) -> None:
    program = sbin / "mount.extfs"
    assert helper(program, formatted, mountpoint, "-f", "-o", "ro").returncode == 0
    assert not rundir.mounts_below(mountpoint)
    fails(helper(program, formatted, mountpoint, "-o", "what"), 1, "what")
    result = helper(
        program, formatted, mountpoint, "-n", "-v", "-s", "-o", "rw,defaults,nodev,_netdev"
    )
    assert result.returncode == 0, result.stderr
    extfs("umount", mountpoint)


@pytest.mark.fuse
def test_mount_type_extfs(
    formatted: Path, mountpoint: Path, run_directory: rundir.RunDirectory
) -> None:
    """mount(8), mkfs(8) and fsck(8) themselves, in a mount namespace with another /sbin."""
    work = run_directory.new_mountpoint()
    program = Path(sys.executable).with_name("extfs")
    script = f"""set -e
mount -t tmpfs none {work}
mkdir {work}/up {work}/work
mount -t overlay none -o lowerdir=/usr/sbin,upperdir={work}/up,workdir={work}/work \
	/usr/sbin || exit 77
{program} install-helpers --prefix /sbin
fsck -t extfs {formatted} >/dev/null
mount -t extfs -o nodev,noatime {formatted} {mountpoint}
grep -q ' {mountpoint} .*nodev.* fuse.extfs ' /proc/self/mountinfo
echo there > {mountpoint}/file
{program} umount {mountpoint}
{program} dump {formatted} dir 1
mkfs -t extfs -f {formatted}
"""
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=run_directory.environment(),
    )
    work.rmdir()
    if result.returncode == 77:
        pytest.skip("no overlay filesystem for another /sbin")
    assert result.returncode == 0, result.stderr
    assert "file" in result.stdout


# ---- terminals ---------------------------------------------------------------------------------


def on_terminal(code: str) -> str:
    """Output of a Python program whose standard error is a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=child,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child)
    output = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:
            break
        if not piece:
            break
        output += piece
    os.close(parent)
    assert process.wait(20) == 0
    return output.decode(errors="replace")


STEPS = """
import time
from extfs.cli import output
output.PROGRESS_AFTER_SECONDS = 0.2
with output.progress() as step:
    for number in range({count}):
        step("extents", number, {count})
        time.sleep(0.05)
"""


def test_a_bar_appears_when_it_takes_long() -> None:
    assert "extents" in on_terminal(STEPS.format(count=12))
    assert on_terminal(STEPS.format(count=2)) == ""


def test_a_waiting_bar() -> None:
    code = STEPS.split("with")[0] + "with output.waiting('formatting'):\n    time.sleep(0.6)\n"
    assert "formatting" in on_terminal(code)


def test_no_bar_without_a_terminal(formatted: Path, extfs: ExtfsRunner) -> None:
    assert extfs("fsck", formatted).stderr == ""


def test_a_closed_pipe_is_no_traceback(formatted: Path) -> None:
    program = Path(sys.executable).with_name("extfs")
    result = subprocess.run(
        ["sh", "-c", f"{program} dump {formatted} tree inode | true; sleep 0.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_any_name_in_any_locale(formatted: Path, locale: str, extfs: ExtfsRunner) -> None:
    program = Path(sys.executable).with_name("extfs")
    name = os.fsencode(formatted) + b"-\xff\xfe\xe2\x96\x88"
    os.rename(formatted, name)
    environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    try:
        for command in ("fsck", "info", "map"):
            result = subprocess.run(
                [program, command, name], capture_output=True, check=False, env=environment
            )
            assert result.returncode == (1 if command == "map" else 0), result.stderr
            assert b"internal error" not in result.stderr
    finally:
        os.rename(name, formatted)


def test_commands_start_quickly(extfs: ExtfsRunner) -> None:
    """Nothing heavy is imported for a command that does not need it."""
    code = (
        "import sys; import extfs.cli\n"
        "heavy = {'trio', 'rich', 'pyfuse3', 'extfs._core'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - begin < 5


def test_modes_of_made_links(sbin: Path) -> None:
    assert all(stat.S_ISLNK(path.lstat().st_mode) for path in sbin.iterdir())
