"""What a file server in the process of the mount does, as local users see it, and the other way.

Locks are in each other's way, permissions are decided as the kernel does, and the kernel's caches
follow changes that did not come through it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import random
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner
from faults import errno_of, wait_for
from mounted_core import MountedCore, RefusedError, mounted_core

pytestmark = pytest.mark.fuse

TO_THE_END = (1 << 64) - 1
PAGE = mmap.PAGESIZE


@pytest.fixture
def server(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> Iterator[MountedCore]:
    extfs("mkfs", loop_device)
    with mounted_core(loop_device, run_directory) as core:
        core.mountpoint.chmod(0o755)
        yield core


# -- locks --

FLOCK = struct.Struct("hhqqi4x")


def getlk(fd: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
    """(type, start, length, pid) of what is in the way, length 0: to the end."""
    asked = FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    found, _whence, start, length, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return found, start, length, pid


def test_locks_of_both_sides(server: MountedCore) -> None:
    path = server.mountpoint / "file"
    path.write_bytes(b"x" * 100)
    ino = path.stat().st_ino
    server(f"fs.open_inode({ino})")
    assert server(f"fs.locks.set({ino}, 5, 10, 20, True)") is None
    assert server(f"fs.locks.set({ino}, 5, 1000, {TO_THE_END}, False)") is None
    with path.open("r+b") as file:
        fd = file.fileno()
        assert getlk(fd, fcntl.F_RDLCK, 0, 50) == (fcntl.F_WRLCK, 10, 20, 0)
        assert getlk(fd, fcntl.F_WRLCK, 50, 0) == (fcntl.F_RDLCK, 1000, 0, 0)
        assert getlk(fd, fcntl.F_RDLCK, 50, 0)[0] == fcntl.F_UNLCK
        with pytest.raises(BlockingIOError):
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 29)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 30)
        found = server(
            f"[getattr(fs.locks.set({ino}, 6, 35, 100, False), name)"
            " for name in ('start', 'length', 'write', 'pid', 'local')]"
        )
        assert found == [30, 10, True, os.getpid(), True]
        server(f"fs.locks.watch({ino}, 6, 35, 100, False)")
        free = "[e.holder for e in fs.layouts.events() if e.type == EventType.LOCK_FREE]"
        assert server(free) == []
    # Its close gives the lock back.
    assert server(free) == [6]
    assert server(f"fs.locks.set({ino}, 6, 35, 100, False)") is None


def test_a_local_lock_waits_for_one_of_the_server(server: MountedCore) -> None:
    path = server.mountpoint / "file"
    path.touch()
    ino = path.stat().st_ino
    server(f"fs.open_inode({ino})")
    server(f"fs.locks.set({ino}, 5, 0, 1, True)")
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "print('go', flush=True)\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(0.2)
        os.set_blocking(process.stdout.fileno(), False)
        assert process.stdout.readline() == ""
        os.set_blocking(process.stdout.fileno(), True)
        server(f"fs.locks.release_owner({ino}, 5)")
        assert process.stdout.readline() == "locked\n"
    assert server(f"fs.locks.test({ino}, 5, 0, 1, True)") is None


def test_a_lock_that_a_local_process_wants_is_told_once(server: MountedCore) -> None:
    path = server.mountpoint / "file"
    path.touch()
    ino = path.stat().st_ino
    server(f"fs.open_inode({ino})")
    server(f"fs.locks.set({ino}, 5, 0, 10, True)")
    told = "[e.holder for e in fs.layouts.events() if e.type.name == 'LOCK_WANTED']"
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 50)
        assert server(told) == []
        for expected in ([5], []):
            with pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
            assert server(told) == expected
    server(f"fs.locks.release_owner({ino}, 5)")
    server(f"fs.release({ino})")


# -- permissions --

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
UIDS = (1000, 1001, 1002, 0)
GIDS = (2000, 2001, 2002, 2003)


def random_acl(rng: random.Random) -> bytes:
    """With a mask that allows something: else the kernel ignores the ACL, which acl(5) does not."""
    entries = [(USER_OBJ, rng.randrange(8), 0xFFFFFFFF)]
    entries += [(USER, rng.randrange(8), uid) for uid in UIDS[:3] if rng.random() < 0.4]
    entries.append((GROUP_OBJ, rng.randrange(8), 0xFFFFFFFF))
    entries += [(GROUP, rng.randrange(8), gid) for gid in GIDS if rng.random() < 0.4]
    entries += [(MASK, rng.randrange(1, 8), 0xFFFFFFFF), (OTHER, rng.randrange(8), 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def kernels_answers(paths: list[Path], uid: int, gids: list[int]) -> list[list[bool]]:
    """For each path whether the kernel allows each of the masks 0 to 7."""
    program = (
        "import json, os, sys\n"
        "uid, gids, paths = json.loads(sys.argv[1])\n"
        "os.setgroups(gids)\n"
        "os.setresgid(gids[0], gids[0], gids[0])\n"
        "os.setresuid(uid, uid, uid)\n"
        "print(json.dumps([[os.access(p, m) for m in range(8)] for p in paths]))\n"
    )
    arguments = json.dumps([uid, gids, [str(path) for path in paths]])
    output = subprocess.run(
        [sys.executable, "-c", program, arguments], stdout=subprocess.PIPE, check=True
    ).stdout
    answers: list[list[bool]] = json.loads(output)
    return answers


def test_permissions_as_the_kernel_decides(server: MountedCore) -> None:
    rng = random.Random(4)
    paths = []
    for number in range(60):
        path = server.mountpoint / f"file-{number}"
        if number % 5 == 0:
            path.mkdir()
        else:
            path.touch()
        os.chown(path, rng.choice(UIDS), rng.choice(GIDS))
        path.chmod(rng.randrange(0o1000))
        if number % 3:
            os.setxattr(path, "system.posix_acl_access", random_acl(rng))
        paths.append(path)
    inos = [path.stat().st_ino for path in paths]
    for _ in range(8):
        uid = rng.choice(UIDS)
        gids = rng.sample([*GIDS, 3000], rng.randrange(1, 4))
        wanted = kernels_answers(paths, uid, gids)
        answers = server(
            f"[[fs.access(ino, {uid}, {gids}, mask) for mask in range(8)] for ino in {inos}]"
        )
        for path, kernel, core in zip(paths, wanted, answers, strict=True):
            allowed = [core[mask] == mask for mask in range(8)]
            assert allowed == kernel, (path, path.stat(), uid, gids)


# -- the kernel's caches --


def seen(condition: Callable[[], bool], what: str) -> None:
    """It is told later, but not much."""
    wait_for(condition, what)


def test_names(server: MountedCore) -> None:
    root = server.mountpoint
    new, other = root / "new", root / "other"
    assert not new.exists(), "now the kernel knows that there is no such name"
    assert os.listdir(root) == []
    assert os.listdir(root) == [], "and that the directory is empty"
    server("fs.mknod(1, b'new', FILE).ino")
    seen(new.exists, "a new name")
    assert os.listdir(root) == ["new"]
    before = new.stat()
    server("fs.link(f('new'), 1, b'other').ino")
    seen(other.exists, "a link")
    assert other.stat().st_nlink == new.stat().st_nlink == 2
    server("fs.unlink(1, b'new').ino")
    seen(lambda: not new.exists(), "an unlink")
    assert other.stat().st_nlink == 1
    assert other.stat().st_ino == before.st_ino
    server("fs.rename(1, b'other', 1, b'new')")
    seen(lambda: new.exists() and not other.exists(), "a rename")
    server("fs.mkdir(1, b'dir', 0o755).ino")
    seen((root / "dir").is_dir, "a directory")
    assert root.stat().st_nlink == 3
    assert sorted(os.listdir(root)) == ["dir", "new"]
    server("fs.symlink(1, b'other', b'new').ino")
    seen(other.is_symlink, "a symbolic link")
    server("fs.rename(1, b'other', 1, b'new', exchange=True)")
    seen(new.is_symlink, "an exchange")
    assert other.stat().st_ino == before.st_ino
    server("fs.rmdir(1, b'dir').ino")
    seen(lambda: not (root / "dir").exists(), "an rmdir")
    assert root.stat().st_nlink == 2


def test_a_name_that_is_in_use(server: MountedCore) -> None:
    """Somebody has the file that loses its name open, or works in the directory that moves."""
    root = server.mountpoint
    (root / "file").write_bytes(b"old")
    (root / "dir/below").mkdir(parents=True)
    working = os.open(root / "dir/below", os.O_RDONLY)
    with (root / "file").open("rb") as file:
        server("fs.mknod(1, b'spare', FILE).ino")
        server("fs.write(f('spare'), 0, b'new')")
        server("fs.rename(1, b'spare', 1, b'file')")
        seen(lambda: (root / "file").read_bytes() == b"new", "a file that was replaced")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert file.read() == b"old"
    server("fs.rename(1, b'dir', 1, b'moved')")
    seen(lambda: not (root / "dir").exists(), "a directory that moved")
    assert (root / "moved/below").stat().st_ino == os.fstat(working).st_ino
    os.close(working)


def test_attributes(server: MountedCore) -> None:
    path = server.mountpoint / "file"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        server("fs.setattr(f('file'), mode=0o600, uid=5, gid=6, mtime=(7, 8))")
        now = os.fstat(file.fileno())
        assert (now.st_mode & 0o7777, now.st_uid, now.st_gid) == (0o600, 5, 6)
        assert now.st_mtime_ns == 7 * 10**9 + 8
        assert now.st_ctime_ns > before.st_ctime_ns
        server("fs.truncate(f('file'), 12345)")
        assert os.fstat(file.fileno()).st_size == 12345
        acl = struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", tag, perm, 0xFFFFFFFF)
            for tag, perm in ((USER_OBJ, 6), (GROUP_OBJ, 4), (OTHER, 4))
        )
        server(f"fs.setxattr(f('file'), b'system.posix_acl_access', {acl!r})")
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o644


def test_contents(server: MountedCore) -> None:
    path = server.mountpoint / "file"
    path.write_bytes(b"a" * 8 * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8 * PAGE) as pages:
        fd = file.fileno()
        assert bytes(pages) == b"a" * 8 * PAGE
        server(f"fs.write(f('file'), {PAGE + 10}, b'b' * 10)")
        seen(lambda: pages[PAGE : PAGE + 25] == b"a" * 10 + b"b" * 10 + b"a" * 5, "a write")
        assert os.pread(fd, 12, PAGE + 9) == b"a" + b"b" * 10 + b"a"
        assert pages[:PAGE] == b"a" * PAGE
        server(f"fs.fallocate(f('file'), {2 * PAGE}, {PAGE}, keep_size=True, punch_hole=True)")
        seen(lambda: pages[2 * PAGE : 3 * PAGE] == bytes(PAGE), "a hole")
        server("fs.mknod(1, b'other', FILE).ino")
        server(f"fs.write(f('other'), 0, b'c' * {8 * PAGE})")
        server(f"fs.clone(f('other'), {PAGE}, f('file'), {4 * PAGE}, {PAGE})")
        seen(lambda: pages[4 * PAGE : 5 * PAGE] == b"c" * PAGE, "a clone")
        server(f"fs.copy(f('other'), 1, f('file'), {5 * PAGE}, {PAGE})")
        seen(lambda: pages[5 * PAGE : 6 * PAGE] == b"c" * PAGE, "a copy")
        server(f"fs.exchange(f('other'), 0, f('file'), 0, {PAGE})")
        seen(lambda: pages[:PAGE] == b"c" * PAGE, "an exchange")
        server(f"fs.collapse(f('file'), 0, {PAGE})")
        seen(lambda: pages[10:20] == b"b" * 10, "a collapse")
        assert os.fstat(fd).st_size == 7 * PAGE
        server("fs.truncate(f('file'), 0)")
        server(f"fs.write(f('file'), {PAGE}, b'd' * {PAGE})")
        seen(lambda: os.pread(fd, 3 * PAGE, 0) == bytes(PAGE) + b"d" * PAGE, "a truncate")


def test_contents_that_were_cached_long_ago(server: MountedCore) -> None:
    """The kernel keeps pages of files that nobody has open, longer than the core keeps inodes."""
    path = server.mountpoint / "file"
    path.write_bytes(b"a" * PAGE)
    assert path.read_bytes() == b"a" * PAGE
    server("[fs.mknod(1, b'name-%d' % n, FILE) for n in range(20000)] and None")
    server("fs.write(f('file'), 0, b'b')")
    seen(lambda: path.read_bytes()[:2] == b"ba", "a write")


def linux() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def test_nobody_waits_for_the_kernel(server: MountedCore) -> None:
    """A local user holds a directory's lock, as long as his request waits for a client."""
    root = server.mountpoint
    (root / "file").write_bytes(b"x")
    (root / "cached").write_bytes(b"y" * PAGE)
    assert (root / "cached").read_bytes() == b"y" * PAGE
    assert not (root / "new").exists()
    (root / "dir").mkdir()
    below = os.open(root / "dir", os.O_RDONLY)
    assert errno_of(lambda: os.stat("new", dir_fd=below)) == errno.ENOENT
    client = server("fs.layouts.register(HolderSpec('client', HolderKind.CLIENT))[0]")
    ino = (root / "file").stat().st_ino

    def granted() -> bool:
        with contextlib.suppress(RefusedError):
            server(f"fs.delegations.grant({ino}, {client}, False)")
            return True
        return False

    wait_for(granted, "a delegation")
    with subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.unlink(sys.argv[1])", root / "file"]
    ) as process:
        wait_for(
            lambda: bool(server("[e.ino for e in fs.layouts.events()]")), "the unlink's recall"
        )
        began = time.monotonic()
        server("fs.mknod(1, b'new', FILE).ino")
        server("fs.mknod(f('dir'), b'new', FILE).ino")
        server("fs.write(f('cached'), 0, b'z')")
        # Nor does a grant, which has the kernel drop its pages first.
        server(f"fs.layouts.get(f('cached'), {client}, Iomode.RW, 0, {PAGE}, wait=True).next")
        assert time.monotonic() - began < 20
        # Names come one after the other, but too many are dropped together, which needs no lock.
        assert errno_of(lambda: os.stat("new", dir_fd=below)) == errno.ENOENT
        if linux() >= (6, 16):
            server("[fs.mknod(f('dir'), b'many-%d' % n, FILE) for n in range(66000)] and None")
            assert errno_of(lambda: os.stat("new", dir_fd=below)) == 0
        assert process.poll() is None
        server(f"fs.layouts.give_all_back({client})")
        server(f"fs.delegations.give_back({ino}, {client})")
        assert process.wait(20) == 0
    os.close(below)
    seen((root / "new").exists, "a name that changed meanwhile")
    seen(lambda: (root / "cached").read_bytes()[:2] == b"zy", "a write")


def test_requests_of_the_mount_are_not_told_to_it(server: MountedCore) -> None:
    """SYMLINK and LINK are served in Python: the kernel holds the directory's lock meanwhile."""
    root = server.mountpoint
    for number in range(200):
        os.symlink("target", root / f"symlink-{number}")
        os.link(root / "symlink-0", root / f"link-{number}")
    assert os.lstat(root / "symlink-0").st_nlink == 201
    os.setxattr(root, "user.a", b"b")
    os.removexattr(root, "user.a")
    with pytest.raises(OSError) as error:
        os.getxattr(root, "user.a")
    assert error.value.errno == errno.ENODATA
