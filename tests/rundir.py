"""Run directories: all that a test run or a demo makes outside its own memory, in one place.

A run directory holds the run's images and mountpoints. That makes ownership a matter of names: a
loop device is ours when its backing file lies in a run directory, a mount when its mountpoint does,
a process when its environment carries the directory's name. Nothing else is ever touched.

While the run lives it holds a lock on the file ``owner``. The kernel drops that lock however the
run ends, so a directory whose lock is free belongs to nobody any more, and ``sweep_stale`` clears
it away: mounts and their daemons first, then other processes, loop devices and files.

It uses only the standard library, and can be run as a program: ``rundir.py sweep``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "EXTFS_RUN_DIRECTORY"
_PREFIX = "extfs-run-"
_UMOUNT_SECONDS = 20
_TERMINATE_SECONDS = 5


def _roots() -> list[Path]:
    """Directories in which run directories may lie; the first that can be written to is used."""
    return [Path("/dev/shm"), Path(tempfile.gettempdir())]


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mountpoint: Path
    device_minor: int
    fstype: str


@dataclass(frozen=True)
class LoopDevice:
    """An attached loop device; usable as a path."""

    path: Path
    image: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def detach(self) -> None:
        """Detach, waiting until nobody has the device open any more (at most 10 s)."""
        subprocess.run(["losetup", "--detach", str(self.path)], check=True, capture_output=True)
        if not _wait(lambda: self not in loop_devices_below(self.image.parent), seconds=10):
            raise TimeoutError(f"{self.path} is still attached: who has it open?")


class RunDirectory:
    """A fresh run directory, locked for as long as this object is open."""

    def __init__(self) -> None:
        parent = next(root for root in _roots() if os.access(root, os.W_OK | os.X_OK))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.path.chmod(0o755)  # tests of permissions go through it as other users
        self._lock = open(self.path / "owner", "w", encoding="ascii")  # noqa: SIM115 # held open
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self._pid = os.getpid()

    def environment(self) -> dict[str, str]:
        """The environment for processes of this run: the mark by which a sweep knows them."""
        return {**os.environ, ENVIRONMENT: str(self.path)}

    def new_image(self, size: int, name: str = "image") -> Path:
        """A new sparse file of `size` bytes."""
        descriptor, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".img", dir=self.path)
        with open(descriptor, "wb") as image:
            image.truncate(size)
        return Path(path)

    def new_mountpoint(self) -> Path:
        """A new empty directory."""
        path = Path(tempfile.mkdtemp(prefix="mnt-", dir=self.path))
        path.chmod(0o755)
        return path

    def attach(self, image: Path, *, sector_size: int = 512) -> LoopDevice:
        """Attach an image of this run to a free loop device, with direct I/O where the kernel can.

        Kernels before 6.6 have no O_DIRECT on tmpfs; the device then goes through the page cache.
        """
        if not image.is_relative_to(self.path):
            raise ValueError(f"{image} does not belong to this run")
        command = ["losetup", "--show", "--find", f"--sector-size={sector_size}"]
        for options in (["--direct-io=on"], []):
            result = subprocess.run(
                [*command, *options, str(image)], capture_output=True, text=True, check=False
            )
            if result.returncode == 0:
                return LoopDevice(Path(result.stdout.strip()), image)
        raise OSError(f"no loop device for {image}: {result.stderr.strip()}")

    def close(self) -> list[str]:
        """Clear everything away; returns what had to be done by force, in words."""
        if os.getpid() != self._pid or self._lock.closed:
            return []  # a forked child, or closed before
        leftovers = clear(self.path)
        self._lock.close()
        return leftovers


def mounts_below(directory: Path) -> list[Mount]:
    """Mounts at or below `directory`, the innermost and latest first."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            mountpoint = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4]))
            if mountpoint.is_relative_to(directory):
                minor = int(fields[2].partition(":")[2])
                found.append(Mount(mountpoint, minor, fields[fields.index("-") + 1]))
    return found[::-1]


def loop_devices_below(directory: Path) -> list[LoopDevice]:
    """Loop devices whose backing file lies (or lay) in `directory`."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = Path(entry.read_text().rstrip("\n").removesuffix(" (deleted)"))
        except OSError:  # detached in between
            continue
        if backing.is_relative_to(directory):
            found.append(LoopDevice(Path("/dev") / entry.parts[3], backing))
    return found


def processes_of(directory: Path) -> Iterator[int]:
    """Process ids whose environment names `directory` as their run, this process left out."""
    mark = f"{ENVIRONMENT}={directory}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def abort_fuse(minor: int) -> None:
    """Abort a FUSE connection: every request in it, waiting or to come, ends with an error."""
    control = Path("/sys/fs/fuse/connections")
    if control.is_dir() and not any(control.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=False, timeout=5)
    with contextlib.suppress(OSError):
        (control / str(minor) / "abort").write_text("1")


def users_of(mountpoint: Path, directory: Path) -> Iterator[int]:
    """Processes of the run `directory` that have a file open or their place below `mountpoint`."""
    for pid in processes_of(directory):
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            for link in (process / "cwd", *(process / "fd").iterdir()):
                with contextlib.suppress(OSError):
                    if link.readlink().is_relative_to(mountpoint):
                        yield pid
                        break


def unmount(mount: Mount, directory: Path) -> bool:
    """Unmount what belongs to the run `directory`; its processes that use the mount are ended
    first, and a filesystem that does not answer is aborted. True when it went without force."""
    command = ["umount", "--", str(mount.mountpoint)]
    for pid in users_of(mount.mountpoint, directory):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _wait(lambda: not any(users_of(mount.mountpoint, directory)), seconds=2)
    try:
        result = subprocess.run(command, capture_output=True, timeout=_UMOUNT_SECONDS, check=False)
        if result.returncode == 0:
            return True
    except subprocess.TimeoutExpired:
        pass
    if mount.fstype.startswith("fuse"):
        abort_fuse(mount.device_minor)
    subprocess.run(["umount", "--lazy", *command[1:]], capture_output=True, timeout=60, check=False)
    return False


def clear(directory: Path) -> list[str]:
    """Remove a run directory and all that belongs to it; returns what was left over, in words."""
    leftovers = []
    mounts = mounts_below(directory)
    for mount in mounts:
        forced = "" if unmount(mount, directory) else ", by force"
        leftovers.append(f"unmounted {mount.mountpoint} ({mount.fstype}){forced}")
    # The daemons of these mounts, and what else is about to end, now end by themselves.
    _wait(lambda: not any(processes_of(directory)), _TERMINATE_SECONDS if mounts else 0.5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        remaining = list(processes_of(directory))
        for pid in remaining:
            with contextlib.suppress(OSError):
                leftovers.append(f"ended process {pid} ({_command(pid)}) by {number.name}")
                os.kill(pid, number)
        if remaining:
            _wait(lambda: not any(processes_of(directory)), seconds=_TERMINATE_SECONDS)
    for device in loop_devices_below(directory):
        try:
            device.detach()
            leftovers.append(f"detached {device}")
        except (subprocess.CalledProcessError, TimeoutError) as error:
            leftovers.append(f"could not detach {device}: {error}")
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        leftovers.append(f"could not remove {directory}")
    return leftovers


def sweep_stale() -> list[str]:
    """Clear every run directory of this user whose run is over; returns what was left over."""
    leftovers = []
    for root in _roots():
        for directory in sorted(root.glob(f"{_PREFIX}*")):
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            try:
                lock = open(directory / "owner", encoding="ascii")  # noqa: SIM115 # see below
            except FileNotFoundError:
                # Either a run that is starting at this moment, or the remains of one that was
                # killed before it made anything: only an old one is removed.
                if time.time() - directory.stat().st_mtime > 60:
                    leftovers += clear(directory)
                continue
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # in use
                leftovers += [f"{directory.name}: {what}" for what in clear(directory)]
    return leftovers


def _command(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return " ".join(words).strip()[:80]


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def main() -> int:
    if sys.argv[1:] != ["sweep"]:
        print("usage: rundir.py sweep", file=sys.stderr)
        return 2
    for what in sweep_stale():
        print(f"left over from an earlier run: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
