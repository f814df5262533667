"""A mount that ends in every way while it is used, over one transport and the other.

Each round mounts the same device, by /dev/fuse or over io_uring, lets processes read, write,
rename, wait for locks and list at the same time, and ends the mount under them: unmounted,
detached, aborted, its daemon told to end or killed, one of its users frozen. Then everybody must
have come to an end in time, what was fsynced must be there, and the check must find nothing.

    python -m transport_stress [--rounds N] [--seed FIRST]     (scripts/soak transports)
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rundir

ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
SECONDS = 30
"""In which all that has been told to end must have ended."""
WORKERS = 6
ENDS = ("unmount", "detach", "terminate", "kill", "abort", "freeze")

# Works until the mount is gone, and leaves a list of what fsync has promised.
WORKER = """
import errno, fcntl, os, random, sys, threading
root, number, promised = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "a", buffering=1)
try:
    os.chdir(root)  # stays in the mount when that is detached
    if os.stat(".").st_dev != int(sys.argv[4]):
        sys.exit()  # too late: it has gone already
except OSError:
    sys.exit()
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED, errno.ENODEV, errno.EIO}
rng = random.Random(number)
base = f"worker-{number}"

def durable():
    name = f"{rng.randrange(1 << 40):x}"
    text = name.encode() * rng.randrange(1, 2000)
    with open(os.path.join(base, name), "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(base, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    promised.write(f"{base}/{name}\\n")

def look():
    for entry in os.scandir(base):
        entry.stat()
        with open(entry.path, "rb") as file:
            if file.read() != entry.name.encode() * (entry.stat().st_size // len(entry.name)):
                sys.exit(f"{entry.path} is damaged")

def names():
    path = f"name-{rng.randrange(20)}"
    try:
        os.mkdir(path)
        os.rename(path, path + "-x")
        os.symlink("nowhere", path)
        os.unlink(path)
        os.rmdir(path + "-x")
    except OSError as error:
        if error.errno in GONE:
            raise

def locks():
    with open("lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.pread(file.fileno(), 4096, 0) if file.readable() else None
        fcntl.lockf(file, fcntl.LOCK_UN)

def work():
    try:
        os.makedirs(base, exist_ok=True)
        while True:
            rng.choice((durable, durable, look, names, locks, locks))()
    except OSError as error:
        if error.errno not in GONE | {errno.ENOENT, errno.EEXIST}:
            raise

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


class StressError(Exception):
    """A round went wrong; the message says how, and what repeats it."""


@dataclass
class Round:
    """One mount from its beginning to its end."""

    directory: rundir.RunDirectory
    device: Path
    transport: str
    end: str
    rng: random.Random

    def run(self) -> None:
        mountpoint = self.directory.new_mountpoint()
        log = self.directory.path / "stress.log"
        with open(log, "wb") as output:
            daemon = subprocess.Popen(
                [
                    *(extfs(), "mount", str(self.device), str(mountpoint), "--foreground"),
                    *("-o", f"transport={self.transport}"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.directory.environment(),
            )
        workers: list[subprocess.Popen[bytes]] = []
        promised = self.directory.path / "promised"
        try:
            self._wait(lambda: bool(mounts(mountpoint)) or daemon.poll() is not None, "the mount")
            if daemon.poll() is not None:
                raise StressError(log.read_text(errors="replace"))
            self._check_promises(mountpoint, promised)
            words = [sys.executable, "-c", WORKER, str(mountpoint)]
            device = str(mountpoint.stat().st_dev)
            workers = [
                subprocess.Popen(
                    [*words, str(number), str(promised), device],
                    stderr=subprocess.PIPE,
                    env=self.directory.environment(),
                )
                for number in range(WORKERS)
            ]
            time.sleep(self.rng.uniform(0.3, 1.5))
            self._end(mountpoint, daemon, workers)
            self._wait(lambda: daemon.poll() is not None, "the daemon's end")
            for worker in workers:
                self._wait(lambda worker=worker: worker.poll() is not None, "a worker's end")  # type: ignore[misc]
                assert worker.stderr is not None
                said = worker.stderr.read().decode(errors="replace")
                if worker.returncode > 0 or "Traceback" in said:
                    raise StressError(said)
        finally:
            for process in (*workers, daemon):
                process.kill()
            for mount in mounts(mountpoint):
                rundir.abort_fuse(mount.device_minor)
                subprocess.run(["umount", "-l", "--", str(mount.mountpoint)], check=False)
            for process in (*workers, daemon):
                process.wait(SECONDS)
            for worker in workers:
                assert worker.stderr is not None
                worker.stderr.close()
        checked = subprocess.run(
            [extfs(), "fsck", str(self.device)], capture_output=True, text=True, check=False
        )
        # 4: what only waits to be replayed after a kill is not damage.
        if checked.returncode not in (0, 4) or "damage" in checked.stdout:
            raise StressError(f"fsck: {checked.returncode}\n{checked.stdout}{checked.stderr}")

    def _check_promises(self, mountpoint: Path, promised: Path) -> None:
        if not promised.exists():
            return
        for line in promised.read_text().splitlines():
            worker, _, name = line.rpartition("/")
            path = mountpoint / Path(worker).name / name
            text = path.read_bytes()
            if not text or text != name.encode() * (len(text) // len(name)):
                raise StressError(f"{path}: what fsync promised is not there")
        for line in promised.read_text().splitlines():
            worker, _, name = line.rpartition("/")
            (mountpoint / Path(worker).name / name).unlink()
        promised.unlink()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise StressError(f"{what} did not come in {SECONDS} s")
            time.sleep(0.005)

    def _end(
        self,
        mountpoint: Path,
        daemon: subprocess.Popen[bytes],
        workers: list[subprocess.Popen[bytes]],
    ) -> None:
        minor = mounts(mountpoint)[0].device_minor
        if self.end == "kill":
            daemon.kill()
        elif self.end == "abort":
            rundir.abort_fuse(minor)
        elif self.end == "detach":
            subprocess.run(["umount", "-l", "--", str(mountpoint)], check=True)
            self._kill(workers)
        elif self.end == "terminate":
            daemon.terminate()  # detached, as it is used
            self._kill(workers)
        elif self.end == "freeze":
            workers[0].send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            daemon.terminate()
            self._kill(workers[1:])
            time.sleep(0.2)
            self._kill(workers[:1])
        else:
            self._kill(workers)
            for worker in workers:
                self._wait(lambda worker=worker: worker.poll() is not None, "a worker's end")  # type: ignore[misc]
            subprocess.run(["umount", "--", str(mountpoint)], check=True, timeout=SECONDS)

    @staticmethod
    def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
        for worker in workers:
            worker.kill()


def extfs() -> str:
    """The command of this interpreter's package."""
    return str(Path(sys.executable).with_name("extfs"))


def mounts(mountpoint: Path) -> list[rundir.Mount]:
    """What is mounted there."""
    return [m for m in rundir.mounts_below(mountpoint) if m.mountpoint == mountpoint]


def stress(directory: rundir.RunDirectory, device: Path, rounds: int, seed: int) -> None:
    """StressError: a round went wrong. The device is formatted."""
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        transport = ("uring", "classic")[number % 2] if rng.random() < 0.8 else "uring"
        end = ENDS[number // 2 % len(ENDS)] if number < 2 * len(ENDS) else rng.choice(ENDS)
        print(f"round {number}: {transport}, {end}", flush=True)
        try:
            Round(directory, device, transport, end, rng).run()
        except StressError as error:
            raise StressError(f"{error}\nrepeat: round {number}, {transport}, {end}") from error


def main(arguments: list[str]) -> int:
    """Rounds with the kernel's switch on; it is as it was afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rounds, seed = options.rounds, options.seed
    if os.geteuid() != 0 or not ENABLE_URING.exists():
        print(f"needs root, and a kernel that has {ENABLE_URING}", file=sys.stderr)
        return 2
    before = ENABLE_URING.read_text()
    directory = rundir.RunDirectory()
    try:
        ENABLE_URING.write_text("Y")
        image = directory.new_image(1 << 30)
        subprocess.run([extfs(), "mkfs", str(image)], check=True, capture_output=True)
        stress(directory, image, rounds, seed)
    except StressError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        ENABLE_URING.write_text(before)
        directory.close()
    print(f"{rounds} mounts ended as they should")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
