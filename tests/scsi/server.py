"""The project's server in a guest that has the disk by iSCSI.

Everything of this machine that it needs (the project, its Python environment, libraries) is the
machine's own root: shown to the guest by 9p, read-only, under a layer in the guest's memory that
takes what is written. The guest trusts what it has read once: the project's files must not change
while it lives.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from guest.machine import Guest, GuestError

ROOT = "/r"
MOUNTPOINT = "/mnt/extfs"
PROJECT = Path(__file__).resolve().parents[2]
PORT = 2049
RECALL_SECONDS = 3
LEASE_SECONDS = 20
READY_SECONDS = 60
_CONFIG = "/run/extfs.toml"
_LOG = "/run/extfs.log"
_PID = "/run/extfs.pid"

_PREPARE = f"""set -e
modprobe -a 9p 9pnet_virtio overlay fuse
mkdir -p /host /changes {ROOT}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /host
mount -t tmpfs changes /changes
mkdir /changes/upper /changes/work
layers=lowerdir=/host,upperdir=/changes/upper,workdir=/changes/work
mount -t overlay -o $layers,xino=off root {ROOT}
mount -t proc proc {ROOT}/proc
mount -t sysfs sys {ROOT}/sys
mount --bind /dev {ROOT}/dev
for directory in run dev/shm; do
  mkdir -p {ROOT}/$directory
  mount -t tmpfs $directory {ROOT}/$directory
done
mkdir -p {ROOT}{MOUNTPOINT}
"""
SHARES = {"root": Path("/")}


class ScsiServer:
    """The daemon on the disk `device` of `guest`, a guest with SHARES.

    `listen`: the address. `exports`: paths and their options. `options`: those of the mount.
    """

    def __init__(
        self, guest: Guest, listen: str, exports: dict[str, str], options: dict[str, str]
    ) -> None:
        self.guest = guest
        self.listen = listen
        self.exports = exports
        self.options = {"recall": str(RECALL_SECONDS), **options}
        self.lease = LEASE_SECONDS
        self.device = ""
        self._log_seen = 0

    def prepare(self) -> None:
        """Make the root; once."""
        self.guest.check(_PREPARE)

    def python(self, script: str, *arguments: str, seconds: float = 60) -> str:
        """Run Python with the project and its tests to import; the output. CommandError."""
        words = [sys.executable, "-c", script, *arguments]
        path = f"{PROJECT}:{PROJECT / 'tests'}"
        return self.guest.check(
            f"exec env PYTHONPATH={path} chroot {ROOT} {shlex.join(words)}", seconds
        )

    def extfs(self, *arguments: str, seconds: float = 60) -> str:
        """Run a command of extfs to its end; its output. CommandError."""
        return self.guest.check(f"exec {self._command(*arguments)}", seconds)

    def _command(self, *arguments: str, fault: str = "") -> str:
        words = [str(Path(sys.executable).with_name("extfs"))]
        if fault:
            words = ["env", f"PYTHONPATH={PROJECT / 'tests'}", sys.executable]
            words += ["-m", "scsi.faulty", fault]
        return f"chroot {ROOT} {shlex.join([*words, *arguments])}"

    # -- the daemon --

    def begin(self, *arguments: str, fault: str = "") -> None:
        """Start the daemon, which need not succeed; what it says is in `log`.

        `fault`: it dies at that step of a fence, see `scsi.faulty`.
        """
        self._configure()
        command = self._command(
            *("mount", "--foreground", "--config", _CONFIG, *arguments), fault=fault
        )
        self.guest.check(f"setsid {command} >>{_LOG} 2>&1 </dev/null &\necho $! >{_PID}\n")

    def _configure(self) -> None:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        text = (
            f'device = "{self.device}"\nmountpoint = "{MOUNTPOINT}"\noptions = "{options}"\n'
            f'[nfs]\nlisten = ["{self.listen}:{PORT}"]\n'
            f"lease = {self.lease}\ngrace = {self.lease}\n"
        )
        for path, words in self.exports.items():
            text += f'[[nfs.export]]\npath = "{path}"\noptions = {json.dumps(words.split(","))}\n'
        self.guest.write_file(f"{ROOT}{_CONFIG}", text.encode())

    def agent(self, action: str) -> int:
        """An action of Pacemaker's resource agent, with a take-over at a start; its exit code.

        What it said is in `log`; the daemon that it starts logs to the system, which this has not.
        """
        self._configure()
        program = Path(sys.executable).with_name("extfs")
        words = [
            *("chroot", ROOT, "env", f"OCF_RESKEY_config={_CONFIG}", "OCF_RESKEY_take_over=true"),
            *(f"OCF_RESKEY_extfs={program}", str(PROJECT / "scripts" / "ocf" / "extfs"), action),
        ]
        return self.guest.run(f"{shlex.join(words)} >>{_LOG} 2>&1", READY_SECONDS + 60).code

    def start(self, *arguments: str, fault: str = "") -> None:
        """Start the daemon; returns when the mount is there and the port answers."""
        self.begin(*arguments, fault=fault)
        ready = (
            f"for i in $(seq {READY_SECONDS * 20}); do\n"
            f"  kill -0 $(cat {_PID}) || exit 1\n"
            f"  if grep -q ' {ROOT}{MOUNTPOINT} fuse' /proc/mounts && "
            f"grep -q ':{PORT:04X} 00000000:0000 0A' /proc/net/tcp; then exit 0; fi\n"
            "  usleep 50000\n"
            "done\nexit 1"
        )
        result = self.guest.run(ready, READY_SECONDS + 10)
        assert result.code == 0, f"the daemon is not ready\n{self.log()}"

    def wait_ended(self, seconds: float = 60) -> int:
        """Wait until the daemon of `begin` has ended by itself; milliseconds waited, about."""
        begun = time.monotonic()
        self.guest.check(f"while kill -0 $(cat {_PID}) 2>/dev/null; do usleep 50000; done", seconds)
        return int((time.monotonic() - begun) * 1000)

    def is_alive(self) -> bool:
        return self.guest.run(f"kill -0 $(cat {_PID})").code == 0

    def kill(self) -> None:
        """As kill -9 does."""
        self.guest.check(
            f"pid=$(cat {_PID}); kill -9 $pid\n"
            "while kill -0 $pid 2>/dev/null; do usleep 10000; done"
        )

    def stop(self) -> None:
        """Unmount, and wait for the daemon's end."""
        self.extfs("umount", MOUNTPOINT)
        self.wait_ended()

    # -- what there is to see --

    def log(self) -> str:
        """All that daemons of this guest said."""
        try:
            return self.guest.run(f"cat {_LOG}").output
        except GuestError as error:
            return str(error)

    def new_log_lines(self) -> list[str]:
        """What daemons said since the last call."""
        lines = self.log().splitlines()
        new, self._log_seen = lines[self._log_seen :], len(lines)
        return new

    def status(self) -> dict[str, Any]:
        """/.extfs/status."""
        return dict(json.loads(self.guest.check(f"cat {ROOT}{MOUNTPOINT}/.extfs/status")))

    def path(self, name: str) -> str:
        """A file of the mount, as commands of the guest see it."""
        return f"{ROOT}{MOUNTPOINT}/{name}"
