"""The systems that are compared: each on its own loop device over a file in memory.

Equal conditions: the backing files are of one size and wholly allocated beforehand; the loop
devices use direct I/O and report the same block size; every FUSE daemon runs in a memory cgroup
with the same limit (MEMORY_LIMIT); all read ahead equally far (READ_AHEAD_KIB). The limit counts
the daemon's own memory and the pages of the device that the host caches on its behalf, so a peer
that reads its device through the page cache cannot hold more of it than extfs can hold in its own
caches.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EXTFS = Path(__file__).resolve().parents[2] / ".venv/bin/extfs"
MEMORY_LIMIT = 256 << 20
"""Bytes that a daemon and its cached device pages may take."""
READ_AHEAD_KIB = 1024
"""What extfs sets for its mount; set for every other target too."""


def run(*command: str | Path) -> str:
    """Run a command; its output. A failure is a RuntimeError with what the command said."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}".strip())
    return done.stdout


def free_loop(backing: Path) -> str:
    """Attach a loop device with direct I/O."""
    return run(
        "losetup", "--find", "--show", "--direct-io=on", "--sector-size", "512", backing
    ).strip()


class MemoryGroup:
    """A memory cgroup (version 1 or 2) for one daemon."""

    def __init__(self, name: str, limit: int) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        if (v1 / "memory.limit_in_bytes").exists():
            self.path = v1 / name
            self.path.mkdir(exist_ok=True)
            (self.path / "memory.limit_in_bytes").write_text(str(limit))
        else:
            self.path = Path("/sys/fs/cgroup") / name
            self.path.mkdir(exist_ok=True)
            (self.path / "memory.max").write_text(str(limit))

    def enter(self) -> None:
        """Move the calling process (between fork and exec) into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def processes(self) -> list[int]:
        """Pids inside."""
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Remove the group once it is empty."""
        for _ in range(50):
            if not self.processes():
                break
            time.sleep(0.1)
        self.path.rmdir()


@dataclass
class Target:
    """One system under test."""

    name: str
    work: Path
    size: int
    thin: bool = False
    """The backing file is sparse: no equal condition, for a device larger than memory."""
    memory_limit: int = MEMORY_LIMIT
    """Bytes; of a daemon."""
    device: str = ""
    mountpoint: Path = field(default_factory=Path)
    daemon: subprocess.Popen[bytes] | None = None
    group: MemoryGroup | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)

    def set_up(self) -> None:
        """Make the device, the filesystem, the mount."""
        backing = self.work / f"{self.name}.img"
        with backing.open("wb") as file:
            if self.thin:
                file.truncate(self.size)
            else:
                os.posix_fallocate(file.fileno(), 0, self.size)
        self.undo.append(backing.unlink)
        self.device = free_loop(backing)
        self.undo.append(lambda: run("losetup", "--detach", self.device))
        if self.name == "raw":
            self._read_ahead(os.stat(self.device).st_rdev)
            return
        self.mountpoint = self.work / f"{self.name}.mnt"
        self.mountpoint.mkdir()
        self.undo.append(self.mountpoint.rmdir)
        getattr(self, "_mount_" + self.name)()
        self._read_ahead(os.stat(self.mountpoint).st_dev)

    def _read_ahead(self, device: int) -> None:
        number = f"{os.major(device)}:{os.minor(device)}"
        for bdi in Path("/sys/class/bdi").iterdir():
            if bdi.name in (number, f"{number}-fuseblk"):
                (bdi / "read_ahead_kb").write_text(str(READ_AHEAD_KIB))

    def tear_down(self) -> None:
        """Undo what set_up did, as far as it came; the last step first."""
        while self.undo:
            step = self.undo.pop()
            try:
                step()
            except (OSError, RuntimeError) as error:
                print(f"bench: cleaning up {self.name}: {error}")

    def _mount_xfs(self) -> None:
        run("mkfs.xfs", "-q", "-f", self.device)
        run("mount", "-t", "xfs", self.device, self.mountpoint)
        self.undo.append(lambda: run("umount", self.mountpoint))

    def _mount_polling(self) -> None:
        self._mount_xfs()

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """While something is measured: "polling" has what extfs asks for by itself."""
        if self.name != "polling":
            yield
            return
        with open("/dev/cpu_dma_latency", "wb", buffering=0) as latency:
            latency.write(struct.pack("i", 0))
            yield

    def _mount_extfs(self, *options: str) -> None:
        run(EXTFS, "mkfs", "--force", self.device)
        self._serve(
            str(EXTFS), "mount", "--foreground", *options, self.device, str(self.mountpoint)
        )

    def _mount_classic(self) -> None:
        self._mount_extfs("-o", "transport=classic")

    def _mount_writeback(self) -> None:
        self._mount_extfs("-o", "writeback_cache")

    def _mount_halting(self) -> None:
        self._mount_extfs("-o", "idle_poll=off")

    def _mount_fuse2fs(self) -> None:
        run("mkfs.ext4", "-q", "-F", self.device)
        self._serve(
            "fuse2fs", "-f", "-o", "fakeroot,allow_other", self.device, str(self.mountpoint)
        )

    def _mount_ntfs3g(self) -> None:
        run("mkfs.ntfs", "-q", "-f", "-F", self.device)
        self._serve("ntfs-3g", "-o", "no_detach,allow_other", self.device, str(self.mountpoint))

    def _serve(self, *command: str) -> None:
        group = self.group = MemoryGroup(
            f"extfs-bench-{os.getpid()}-{self.name}", self.memory_limit
        )
        self.undo.append(group.remove)
        log = (self.work / f"{self.name}.log").open("wb")
        self.daemon = subprocess.Popen(
            command, preexec_fn=group.enter, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        self.undo.append(self._stop)
        for _ in range(300):
            if os.path.ismount(self.mountpoint):
                return
            if self.daemon.poll() is not None:
                break
            time.sleep(0.05)
        said = (self.work / f"{self.name}.log").read_text(errors="replace")
        raise RuntimeError(f"{self.name} did not mount: {said.strip()}")

    def _stop(self) -> None:
        assert self.daemon is not None
        if os.path.ismount(self.mountpoint):
            run("umount", self.mountpoint)
        try:
            self.daemon.wait(60)
        except subprocess.TimeoutExpired:
            self.daemon.send_signal(signal.SIGKILL)
            self.daemon.wait()
            raise RuntimeError(f"the daemon of {self.name} did not end after the unmount") from None

    def resident_bytes(self) -> int:
        """Resident memory of the daemon now."""
        assert self.daemon is not None
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) << 10


NAMES = [
    *("extfs", "classic", "halting", "writeback"),
    *("fuse2fs", "ntfs3g", "xfs", "polling", "raw"),
]
"""`classic`: extfs by /dev/fuse, where it would take io_uring; `halting`: extfs with idle_poll=off;
`writeback`: with that option; `polling`: XFS while idle CPUs poll, as extfs has it."""


def missing(name: str) -> str:
    """Why a target cannot be measured here, or an empty string."""
    needs = {
        "xfs": "mkfs.xfs",
        "polling": "mkfs.xfs",
        "fuse2fs": "fuse2fs",
        "ntfs3g": "ntfs-3g",
        "extfs": str(EXTFS),
        "classic": str(EXTFS),
        "halting": str(EXTFS),
        "writeback": str(EXTFS),
    }
    tool = needs.get(name)
    if tool and not shutil.which(tool):
        return f"{tool} is not installed"
    if name == "xfs" and "\txfs" not in Path("/proc/filesystems").read_text():
        return "the kernel has no XFS"
    return ""
