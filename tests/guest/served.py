"""A filesystem that is mounted here and served to guests over NFS.

The image is full of a canary before mkfs: bytes that no test writes and nobody may ever read. The
daemon has the image through a loop device, guests as a SCSI disk of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import rundir
from conftest import Mounted, extfs_command

from extfs.control.client import STATUS_NAME, Descriptor, Extent, MapState

MIB = 1 << 20
IMAGE_SIZE = 768 * MIB
CANARY = b"NOBODY MAY READ THIS CANARY BYTE"
EXPORT = "/:rw,no_root_squash,insecure,layouts=block"
READY_SECONDS = 30
RECALL_SECONDS = 3


class Served:
    """The daemon, its mountpoint and its port; a context manager.

    `export`: see `extfs mount --help`. `lease`: seconds, of the grace period too. The daemon may be
    killed and started again; port, device and mountpoint stay. Guests reach it as 10.0.2.2.
    """

    def __init__(
        self,
        directory: rundir.RunDirectory,
        *,
        export: str = EXPORT,
        options: str = f"recall={RECALL_SECONDS}",
        size: int = IMAGE_SIZE,
        lease: int | None = None,
    ) -> None:
        self.directory = directory
        self.export = export
        self.options = options
        self.lease = lease
        self.port = _free_port()
        self.image = directory.new_image(size, "served")
        _fill(self.image, size)
        self.device = directory.attach(self.image)
        self.mountpoint = directory.new_mountpoint()
        self.log = directory.path / f"served-{self.image.stem}.log"
        self._log_seen = 0
        self.mounted: Mounted | None = None

    def __enter__(self) -> Self:
        try:
            self._command("mkfs", self.device)
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the daemon --

    def start(self) -> None:
        """Start the daemon; returns when the mount is there and the port answers."""
        command = extfs_command("mount", "--foreground", *self._arguments())
        with open(self.log, "ab") as output:
            daemon = subprocess.Popen(
                command,
                env=self.directory.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.mounted = Mounted(self.device.path, self.mountpoint, daemon, self.log)
        deadline = time.monotonic() + READY_SECONDS
        while not (self.mounted.is_mounted() and self.answers()):
            assert daemon.poll() is None, f"exit {daemon.returncode}\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"not ready\n{self.log_tail()}"
            time.sleep(0.02)

    def _arguments(self) -> list[str]:
        if self.lease is None:
            words = [str(self.device), str(self.mountpoint), "-o", self.options]
            return [*words, "--nfs", f"127.0.0.1:{self.port}", "--export", self.export]
        path, _, options = self.export.partition(":")
        file = self.log.with_suffix(".toml")
        file.write_text(
            f'device = "{self.device}"\nmountpoint = "{self.mountpoint}"\n'
            f'options = "{self.options}"\n[nfs]\nlisten = ["127.0.0.1:{self.port}"]\n'
            f"lease = {self.lease}\ngrace = {self.lease}\n"
            f'[[nfs.export]]\npath = "{path}"\noptions = {json.dumps(options.split(","))}\n'
        )
        return ["--config", str(file)]

    def answers(self) -> bool:
        """Whether somebody listens on the port."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    def is_alive(self) -> bool:
        return self.mounted is not None and self.mounted.daemon.poll() is None and self.answers()

    def kill(self) -> None:
        """As kill -9 does."""
        assert self.mounted is not None
        self.mounted.kill()

    def restart(self) -> None:
        """Kill the daemon, and start another, which clears the dead mount away."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Unmount as a user does; fails when the daemon does not end cleanly."""
        assert self.mounted is not None
        self.mounted.unmount()
        self.mounted = None

    def close(self) -> None:
        """Take everything away, by force if need be."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.image.unlink, missing_ok=True)
            stack.callback(self.device.detach)
            if self.mounted is not None and self.mounted.daemon.poll() is None:
                with contextlib.suppress(AssertionError):
                    self.mounted.unmount(timeout=20)
            if self.mounted is not None:
                self.mounted.force_off()

    def _command(self, *arguments: str | os.PathLike[str]) -> str:
        done = subprocess.run(
            extfs_command(*arguments),
            env=self.directory.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr}"
        return done.stdout

    def fsck(self) -> None:
        """Unmount and check; the filesystem has to be clean."""
        self.stop()
        self._command("fsck", self.device)

    def status(self) -> dict[str, Any]:
        """/.extfs/status."""
        return dict(json.loads((self.mountpoint / STATUS_NAME).read_text()))

    def counter(self, name: str) -> int:
        """A counter of the layout server."""
        return int(self.status()["nfs"]["counters"].get(name, 0))

    # -- its log --

    def new_log_lines(self) -> list[str]:
        """What the daemon logged since the last call."""
        lines = self.log.read_text(errors="replace").splitlines()
        new, self._log_seen = lines[self._log_seen :], len(lines)
        return new

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # -- files, through the local mount --

    def path(self, name: str) -> Path:
        return self.mountpoint / name

    def digest(self, name: str) -> str:
        """SHA-256 of a file's contents, as the local mount has them."""
        with open(self.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def extents(self, name: str) -> list[Extent]:
        """The map of a file, after what was written is on the device."""
        with Descriptor.of(self.path(name)) as descriptor:
            os.fsync(descriptor.fileno())
            return descriptor.whole_map().extents

    def device_digest(self, name: str) -> str:
        """SHA-256 of a file's contents, put together from the device by the map.

        So it is seen that the bytes are where the map says, whatever caches tell.
        """
        content = bytearray(self.path(name).stat().st_size)
        with open(self.image, "rb") as device:
            for extent in self.extents(name):
                if extent.state is MapState.WRITTEN and extent.offset < len(content):
                    device.seek(extent.physical)
                    piece = device.read(min(extent.length, len(content) - extent.offset))
                    content[extent.offset : extent.offset + len(piece)] = piece
        return hashlib.sha256(content).hexdigest()

    def clone(self, source: str, target: str) -> None:
        """Make `target` a file that shares all blocks of `source`."""
        self.path(target).touch()
        with (
            Descriptor.of(self.path(source)) as old,
            Descriptor.of(self.path(target), write=True) as new,
        ):
            os.fsync(old.fileno())
            length = self.path(source).stat().st_size
            assert new.clone(0, old.handle(), 0, length) == length

    def assert_no_canary(self, name: str) -> None:
        """Nobody reads through this file what others left on the device."""
        assert_no_canary(self.path(name).read_bytes(), name)


def assert_no_canary(content: bytes, name: str) -> None:
    at = content.find(CANARY)
    assert at < 0, f"{name}: stale bytes of the device at {at}"


def stamped(seed: int, offset: int, length: int) -> bytes:
    """What `stamp write` of a guest leaves in these bytes (programs/stamp.c)."""
    assert offset % 512 == length % 512 == 0
    head = seed.to_bytes(8, "little")
    first = offset // 512 + 1
    return b"".join(
        (head + number.to_bytes(8, "little")) * 32 for number in range(first, first + length // 512)
    )


def unstamped(content: bytes, seeds: Sequence[int], *, zeros: bool = True) -> list[str]:
    """Sectors of a whole file that are neither stamped with one of `seeds` nor zeros; in words."""
    wrong = []
    zero = bytes(512)
    for offset in range(0, len(content), 512):
        sector = content[offset : offset + 512]
        if zeros and sector == zero[: len(sector)]:
            continue
        if not any(sector == stamped(seed, offset, 512)[: len(sector)] for seed in seeds):
            wrong.append(f"byte {offset}: {sector[:32].hex()}")
    return wrong


def _fill(image: Path, size: int) -> None:
    piece = CANARY * (MIB // len(CANARY))
    with open(image, "r+b") as file:
        for _ in range(0, size, MIB):
            file.write(piece)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
