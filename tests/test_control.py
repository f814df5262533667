"""The control file of a mount: its names, calls about the filesystem, holders."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted
from control_calls import (
    ALL,
    BLOCK,
    CLIENT,
    EVENT_SOCKET,
    EXCHANGE,
    FENCED,
    HANDLE,
    HOLDER_GONE,
    HOLDER_REGISTER,
    MAP,
    RECALL,
    RESUME,
    RETURN,
    SHUTDOWN,
    WATCH,
    HandleCall,
    HolderCall,
    MapCall,
    PairCall,
    RecallCall,
    ReturnCall,
    WatchCall,
    as_user,
    call,
    handle_of,
    info,
    refusal,
    refused,
    register,
)

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(90)]

NATIVE = Path(__file__).resolve().parent.parent / "native"
USER = 12345


# ---- the header --------------------------------------------------------------------------------

EVERYTHING = """
#include "extfs_ioctl.h"
int use(struct extfs_ioc_layout *layout, struct extfs_ioc_commit *commit);
int use(struct extfs_ioc_layout *layout, struct extfs_ioc_commit *commit)
{
	unsigned long commands[] = {EXTFS_IOC_LAYOUT_GET(8), EXTFS_IOC_LAYOUT_COMMIT(8)};

	return (int)(layout->extents[0].state + commit->ranges[0].length + commands[0]);
}
"""


@pytest.mark.parametrize(
    "compiler",
    [
        ["gcc", "-std=c11", "-xc"],
        ["gcc", "-std=c99", "-xc"],
        ["g++", "-std=c++17", "-xc++"],
        ["g++", "-std=c++11", "-xc++"],
    ],
    ids=" ".join,
)
def test_the_header_alone_compiles_pedantically(compiler: list[str]) -> None:
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{NATIVE}", "-fsyntax-only", "-"]
    result = subprocess.run(
        [*compiler, *flags], input=EVERYTHING, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ---- names -------------------------------------------------------------------------------------


def test_the_control_directory_is_there_but_not_listed(root: Path) -> None:
    (root / "file").touch()
    assert os.listdir(root) == ["file"]
    assert sorted(os.listdir(root / ".extfs")) == ["control", "status"]
    with os.scandir(root / ".extfs") as entries:
        numbers = {entry.name: entry.inode() for entry in entries}
    modes = {".extfs": stat.S_IFDIR | 0o755, "control": stat.S_IFREG | 0o600}
    modes["status"] = stat.S_IFREG | 0o444
    for name, mode in modes.items():
        found = os.stat(root / ".extfs" / (name if name != ".extfs" else ""))
        assert (found.st_mode, found.st_uid, found.st_gid) == (mode, 0, 0)
        assert found.st_ino >= 1 << 62
        assert name == ".extfs" or numbers[name] == found.st_ino
    assert (root / ".extfs/..").stat().st_ino == root.stat().st_ino
    assert not (root / ".extfs/other").exists()


def test_nobody_takes_the_name_or_changes_what_it_names(root: Path) -> None:
    ours, mine = root / ".extfs", root / "mine"
    mine.mkdir()
    (root / "file").touch()
    assert refusal(ours.mkdir) == "EEXIST"
    assert refusal(lambda: os.symlink("x", ours)) == "EEXIST"
    assert refusal(lambda: os.link(root / "file", ours)) == "EEXIST"
    assert refusal(lambda: os.mknod(ours)) == "EEXIST"
    assert refusal(lambda: os.open(ours, os.O_CREAT | os.O_WRONLY)) == "EISDIR"
    assert refusal(ours.rmdir) == "EPERM"
    assert refusal(ours.unlink) in ("EISDIR", "EPERM")
    assert refusal(lambda: ours.rename(root / "other")) == "EPERM"
    assert refusal(lambda: ours.rename(mine / "other")) == "EPERM"
    assert refusal(lambda: mine.rename(ours)) == "EPERM"
    assert refusal(lambda: (root / "file").rename(ours / "file")) == "EPERM"
    assert refusal((ours / "directory").mkdir) == "EPERM"
    assert refusal((ours / "file").touch) == "EPERM"
    for name in ("control", "status"):
        inode = ours / name
        assert refusal(inode.unlink) == "EPERM"
        assert refusal(partial(inode.rename, root / "other")) == "EPERM"
        assert refusal(partial(os.link, inode, root / "other")) == "EPERM"
        assert refusal(partial(inode.chmod, 0o666)) == "EPERM"
        assert refusal(partial(os.truncate, inode, 0)) == "EPERM"
        assert refusal(partial(os.utime, inode)) == "EPERM"
        assert refusal(partial(os.setxattr, inode, "user.x", b"")) == "EPERM"
        assert os.listxattr(inode) == []
    assert sorted(os.listdir(root)) == ["file", "mine"]
    # Anywhere else it is a name like others.
    (mine / ".extfs").mkdir()
    (mine / ".extfs").rename(mine / "x")
    assert os.listdir(mine) == ["x"]


def test_what_files_do_the_control_file_does_not(root: Path, control: int, file: int) -> None:
    assert refusal(lambda: os.lseek(control, 0, os.SEEK_SET)) == "ESPIPE"
    assert refusal(lambda: os.fsync(control)) == "EINVAL"
    assert refusal(lambda: os.posix_fallocate(control, 0, BLOCK)) is not None
    assert refusal(lambda: os.copy_file_range(file, control, BLOCK, 0, 0)) is not None
    assert refusal(lambda: os.copy_file_range(control, file, BLOCK, 0, 0)) is not None
    # None of these answers made the kernel give up the call for other files.
    os.fsync(file)
    os.posix_fallocate(file, 0, BLOCK)
    assert os.copy_file_range(file, file, BLOCK, 0, 2 * BLOCK) == BLOCK


def test_only_root_opens_the_control_file(root: Path) -> None:
    path = root / ".extfs/control"
    assert as_user(USER, lambda: refusal(lambda: os.open(path, os.O_RDONLY))) == "EACCES"
    assert as_user(USER, lambda: str(sorted(os.listdir(root / ".extfs")))) == str(
        ["control", "status"]
    )


# ---- the filesystem and its files --------------------------------------------------------------


def test_info_is_the_same_on_every_descriptor(mounted: Mounted, control: int, file: int) -> None:
    answers = [info(fd) for fd in (control, file)]
    for answer in answers:
        space = os.statvfs(mounted.mountpoint)
        assert (answer.block_size, answer.version) == (BLOCK, 1)
        assert answer.device.decode() == str(mounted.device)
        assert answer.free == space.f_bavail * space.f_frsize
        assert answer.device_size == 1 << 30
        assert (answer.quarantined, answer.recall_ms) == (0, 10000)
    assert bytes(answers[0].uuid) == bytes(answers[1].uuid) != bytes(16)


def test_a_handle_names_one_file_for_ever(root: Path, control: int, file: int) -> None:
    handle = handle_of(file)
    assert handle.ino == os.fstat(file).st_ino
    directory = os.open(root, os.O_RDONLY)
    assert handle_of(directory).ino == 1
    assert refused(directory, MAP, MapCall(length=BLOCK)) == "ENOTTY"
    os.close(directory)
    assert refused(control, HANDLE, HandleCall()) == "EPERM"
    first = call(control, MAP, MapCall(file=handle, length=1 << 20))
    again = call(file, MAP, MapCall(length=1 << 20))
    assert call(file, MAP, MapCall(file=handle, length=1 << 20)).count == first.count
    assert (first.count, first.file_size) == (again.count, 4 * BLOCK)
    assert [first.extents[0].physical, first.generation] == [
        again.extents[0].physical,
        again.generation,
    ]
    os.unlink(root / "file")
    assert call(control, MAP, MapCall(file=handle, length=BLOCK)).count == 1
    other = root / "other"
    other.touch()
    with open(other, "rb") as another:
        assert refused(another.fileno(), MAP, MapCall(file=handle, length=BLOCK)) == "ESTALE"


def test_the_generation_of_a_map_changes_with_it(file: int) -> None:
    def generation() -> int:
        return int(call(file, MAP, MapCall(length=1 << 20)).generation)

    before = generation()
    os.pread(file, 10, 0)
    os.pwrite(file, b"in place", 0)
    os.fsync(file)
    assert generation() == before
    os.pwrite(file, b"x", 1 << 20)
    assert generation() != before


def test_a_handle_is_stale_once_its_file_is_gone(root: Path, control: int, file: int) -> None:
    path = root / "gone"
    path.write_bytes(b"x")
    with open(path, "rb") as opened_file:
        handle = handle_of(opened_file.fileno())
    path.unlink()
    deadline = time.monotonic() + 10
    while (error := refused(control, MAP, MapCall(file=handle, length=1))) != "ESTALE":
        assert error is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_others_files_by_handle_are_for_root(root: Path, file: int, control: int) -> None:
    handle = handle_of(file)
    # The descriptor was opened by root; it is the caller who counts.
    assert as_user(USER, lambda: refused(control, MAP, MapCall(file=handle, length=1))) == "EACCES"
    assert as_user(USER, lambda: refused(control, SHUTDOWN, HandleCall())) == "EPERM"
    assert as_user(USER, lambda: refused(control, FENCED, HolderCall())) == "EPERM"
    assert refused(file, SHUTDOWN, HandleCall()) == "EPERM"
    assert refused(file, FENCED, HolderCall()) == "EPERM"


@pytest.mark.expect_log("shutdown asked for by process")
def test_shutdown_stops_every_change(mounted: Mounted, mount_extfs: Callable[..., Mounted]) -> None:
    root = mounted.mountpoint
    (root / "file").write_bytes(b"before")
    with open(root / "file", "r+b", buffering=0) as file:
        os.fsync(file)
        control = os.open(root / ".extfs/control", os.O_RDONLY)
        call(control, SHUTDOWN, HandleCall())
        os.close(control)
        assert refusal((root / "new").touch) == "EROFS"
        assert refusal(lambda: os.pwrite(file.fileno(), b"x", 1 << 20)) == "EROFS"
        assert file.read() == b"before"
    mounted.force_off()
    again = mount_extfs(mounted.device).mountpoint
    assert os.listdir(again) == ["file"]
    assert (again / "file").read_bytes() == b"before"


def test_the_status_is_one_json_document_for_everybody(root: Path, control: int) -> None:
    """Read in any pieces, and with nine hundred holders in it."""
    for number in range(900):
        register(control, name=f"holder {number}".encode() + b"." * 40, fence=b"cgroup:/g")

    def names(content: bytes) -> set[str]:
        document = json.loads(content)
        return set(re.findall(r"holder \d+", json.dumps(document)))

    whole = (root / ".extfs/status").read_bytes()
    with open(root / ".extfs/status", "rb", buffering=0) as status:
        pieces = b"".join(iter(partial(status.read, 1000), b""))
    assert names(whole) == names(pieces)
    assert names(whole)
    path = root / ".extfs/status"
    assert as_user(USER, lambda: str(json.loads(path.read_bytes())["version"])) == str(
        json.loads(whole)["version"]
    )
    assert refusal(lambda: os.open(path, os.O_RDWR)) == "EACCES"


# ---- holders -----------------------------------------------------------------------------------


def test_a_holder_is_who_knows_its_key(control: int, file: int) -> None:
    first, second = register(control, name=b"first"), register(file, name=b"second")
    assert first.id != second.id
    assert first.key != second.key
    assert first.recall_ms == 10000
    handle = handle_of(file)

    def watch(holder: int, key: int) -> str | None:
        return refused(control, WATCH, WatchCall(holder=holder, key=key, file=handle))

    assert watch(first.id, first.key) is None
    assert watch(first.id, second.key) == "EKEYREJECTED"
    assert watch(second.id + 100, 0) == "ENOENT"
    gone = HolderCall(id=first.id, key=second.key)
    assert refused(control, HOLDER_GONE, gone) == "EKEYREJECTED"
    gone.key = first.key
    assert refused(control, HOLDER_GONE, gone) is None
    assert refused(control, HOLDER_GONE, gone) == "ENOENT"
    assert refused(control, FENCED, HolderCall(id=second.id)) == "EBUSY"
    assert refused(control, FENCED, HolderCall(id=first.id)) == "ENOENT"


def test_a_holder_ends_with_its_last_descriptor(root: Path, control: int) -> None:
    own = os.open(root / ".extfs/control", os.O_RDONLY)
    holder = register(own)
    second = os.dup(own)
    os.close(own)
    assert refused(control, RETURN, ReturnCall(flags=ALL, holder=holder.id, key=holder.key)) in (
        None,
        "EOPNOTSUPP",
    )
    os.close(second)  # RELEASE is not awaited by close(2)
    deadline = time.monotonic() + 10
    gone = HolderCall(id=holder.id, key=holder.key)
    while (error := refused(control, HOLDER_GONE, gone)) != "ENOENT":
        assert error is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_may_register(root: Path, control: int, file: int) -> None:
    def error(fd: int, **fields: object) -> str | None:
        return refused(fd, HOLDER_REGISTER, HolderCall(**fields))

    assert error(control, name=b"client", flags=CLIENT) is None
    assert error(file, flags=CLIENT) == "EPERM"
    assert error(control, flags=CLIENT | RESUME) == "EINVAL"
    assert as_user(USER, lambda: error(control, flags=CLIENT)) == "EPERM"
    assert as_user(USER, lambda: error(file)) == "EACCES"
    os.chown(root / "file", USER, USER)
    assert as_user(USER, lambda: error(file)) is None
    directory = os.open(root, os.O_RDONLY)
    assert error(directory) == "EISDIR"
    os.close(directory)


def test_a_user_has_so_many_holders(root: Path, control: int, file: int) -> None:
    os.chown(root / "file", USER, USER)

    def fill() -> str | None:
        for number in range(1000):
            error = refused(file, HOLDER_REGISTER, HolderCall())
            if error:
                return f"{number} {error}"
        return None

    assert as_user(USER, fill) == "256 EAGAIN"
    assert refused(control, HOLDER_REGISTER, HolderCall()) is None


@pytest.mark.parametrize(
    ("fence", "expected"),
    [
        (b"", None),
        (b"cgroup:/some/group", None),
        (b"cgroup:", "EINVAL"),
        (b"cgroup:/", "EINVAL"),
        (b"cgroup:some", "EINVAL"),
        (b"cgroup:/a/../b", "EINVAL"),
        (b"cgroup:/a/..", "EINVAL"),
        (b"command:/bin/true", "EINVAL"),
        (b"cgroup:/" + b"x" * 120, "EINVAL"),
    ],
)
def test_how_a_fence_is_named(control: int, fence: bytes, expected: str | None) -> None:
    struct = HolderCall()
    # Past the last byte: ctypes would keep it NUL-terminated.
    ctypes.memmove(ctypes.addressof(struct) + HolderCall.fence.offset, fence, len(fence))
    assert refused(control, HOLDER_REGISTER, struct) == expected


def test_nobody_names_a_cgroup_of_others_to_be_killed(root: Path, file: int) -> None:
    os.chown(root / "file", USER, USER)
    struct = HolderCall(fence=b"cgroup:/system.slice")
    assert as_user(USER, lambda: refused(file, HOLDER_REGISTER, struct)) == "EPERM"


def test_resume_needs_a_lost_holder_and_its_key(control: int) -> None:
    holder = register(control)
    again = {"flags": RESUME, "id": holder.id}
    assert refused(control, HOLDER_REGISTER, HolderCall(**again, key=holder.key)) == "EBUSY"
    assert refused(control, HOLDER_REGISTER, HolderCall(**again, key=1)) == "EKEYREJECTED"
    missing = HolderCall(flags=RESUME, id=holder.id + 1, key=holder.key)
    assert refused(control, HOLDER_REGISTER, missing) == "ENOENT"


# ---- mounts without layouts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"), [("ro", "EROFS"), ("writeback_cache", "EOPNOTSUPP")]
)
def test_mounts_without_layouts_say_so(
    loop_device: rundir.LoopDevice,
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
    options: str,
    expected: str,
) -> None:
    extfs("mkfs", loop_device)
    mounted = mount_extfs(loop_device)
    (mounted.mountpoint / "file").write_bytes(bytes(BLOCK))
    mounted.unmount()
    root = mount_extfs(loop_device, options).mountpoint
    control = os.open(root / ".extfs/control", os.O_RDONLY)
    file = os.open(root / "file", os.O_RDONLY)
    assert info(control).free == info(file).free
    assert call(file, MAP, MapCall(length=BLOCK)).count == 1
    handle = handle_of(file)
    for nr, struct in (
        (HOLDER_REGISTER, HolderCall()),
        (RECALL, RecallCall(file=handle, iomode=3, length=BLOCK)),
        (EXCHANGE, PairCall(file=handle, other=handle, other_offset=BLOCK, length=BLOCK)),
    ):
        assert refused(control, nr, struct) == expected
    os.close(file)
    os.close(control)


def test_unknown_commands_are_not_ours(control: int, file: int) -> None:
    for fd in (control, file):
        assert refused(fd, 0xDF, HandleCall()) == errno.errorcode[errno.ENOTTY]
        assert refused(fd, EVENT_SOCKET + 1, HandleCall()) == "ENOTTY"
