"""A guest: an emulated machine with the kernel client, whose shell the tests command.

    with Guest(image, directory, name="one", disks=[Disk(path, wwn=0x5000C50015EA71AA)]) as guest:
        guest.run("mount -t nfs4 ...")            # Result(code=0, output="...")
        job = guest.start("dd if=... of=...")     # goes on while other commands run
        guest.power_off()                         # as pulling the plug does: nothing is flushed

Emulation without hardware help (TCG): one guest keeps one host CPU busy only while it computes.
The guest reaches 127.0.0.1 of the host as 10.0.2.2, and connects from unprivileged ports.

Guests reach each other on the segments that they have a `Nic` on, as eth1, eth2, ... in the order
given; nothing there has an address until a command gives it one.

Commands travel over virtio-serial, through a pair of sockets for each of PORTS agents; each runs
one command at a time (rootfs/usr/bin/agent says how). A command that does not answer in its time
takes its port out of use; the guest stays usable through the others.

Everything here blocks. A `Guest` may be used by several threads, a `Job` by one.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from guest.image import EMULATOR, Image

PORTS = 4
"""Commands that a guest can run at the same time."""

BOOT_SECONDS = 90
COMMAND_SECONDS = 60
_GRACE_SECONDS = 15
"""How much later than the guest itself the host gives a command up: emulation is slow."""

HOST = "10.0.2.2"
"""The address that reaches the host's 127.0.0.1."""


class GuestError(Exception):
    """The guest does not do what was asked: it did not boot, hangs, or is gone."""


class CommandError(GuestError):
    """A command ended with an exit code other than 0."""


@dataclass(frozen=True)
class Result:
    """How a command ended: exit code (137: its time was up) and what it wrote, both outputs."""

    code: int
    output: str


@dataclass(frozen=True)
class Disk:
    """A raw image that the guest sees as SCSI disk, and that others may write meanwhile.

    The kernel and blkmapd take disks with equal names for paths to one: give each its own `wwn`
    (NAA, 64 bits).
    """

    path: Path
    wwn: int
    read_only: bool = False


class Segment:
    """An Ethernet between guests: every frame reaches all of them, as multicast on loopback."""

    def __init__(self) -> None:
        # A group of the organisation-local scope (RFC 2365) that nobody else on this machine has.
        self.group = "239.192." + ".".join(str(1 + byte % 254) for byte in secrets.token_bytes(2))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])


@dataclass(frozen=True)
class Nic:
    """A guest's card on a segment; `station` (1 to 255) makes its MAC address."""

    segment: Segment
    station: int


class _Port:
    """The host's end of one agent's port, or of the emulator's monitor."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._received = bytearray()

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()

    def send(self, line: bytes, deadline: float) -> None:
        while line:
            try:
                line = line[self.ours.send(line) :]
            except BlockingIOError:
                self._wait(deadline, write=True)
            except OSError as error:
                raise GuestError("the guest is gone") from error

    def line(self, deadline: float) -> str:
        while b"\n" not in self._received:
            self._receive(deadline)
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        return line.decode()

    def take(self, length: int, deadline: float) -> bytes:
        while len(self._received) < length:
            self._receive(deadline)
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def _receive(self, deadline: float) -> None:
        self._wait(deadline)
        try:
            received = self.ours.recv(1 << 16)
        except OSError as error:
            raise GuestError("the guest is gone") from error
        if not received:
            raise GuestError("the guest is gone")
        self._received += received

    def _wait(self, deadline: float, *, write: bool = False) -> None:
        if self.ours.fileno() < 0:
            raise GuestError("the guest is gone")  # powered off
        poll = select.poll()
        poll.register(self.ours, select.POLLOUT if write else select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise GuestError("the guest does not answer")


class Job:
    """A command that was started."""

    def __init__(self, guest: Guest, port: _Port, script: str, deadline: float) -> None:
        self._guest = guest
        self._port = port
        self._deadline = deadline
        self.script = script

    def wait(self) -> Result:
        """Wait for the end; once. GuestError when the guest is gone or hangs."""
        try:
            code, length = map(int, self._port.line(self._deadline).split())
            output = self._port.take(length, self._deadline)
        except GuestError as error:
            raise GuestError(
                f"{self._guest.name}: {error}, in: {self.script}\n{self._guest.console_tail()}"
            ) from error
        self._guest._release(self._port)
        return Result(code, output.decode(errors="replace"))

    def check(self) -> str:
        """Wait for the end; the output. CommandError."""
        result = self.wait()
        if result.code != 0:
            raise CommandError(
                f"{self._guest.name}: exit {result.code}, in: {self.script}\n{result.output}"
            )
        return result.output


class Guest:
    """A running guest; also a context manager that ends it.

    `directory`: for its console's log. `name`: its host name; two guests of one name are one NFS
    client to a server, which takes the second for the first after a reboot. `memory`: MiB.
    `forwards`: port of the host's 127.0.0.1 to port of the guest. `drives`: raw images as /dev/vdb,
    /dev/vdc, ... `shares`: 9p tags and the directories of this machine that they show, read-only.
    `instruction_ns`: its clock moves by so much, 2 to the power of something, with each instruction
    that it runs, and with real time only when it is idle: what code costs does not depend on what
    else this machine does. It is slower.
    """

    def __init__(
        self,
        image: Image,
        directory: Path,
        *,
        name: str = "guest",
        disks: Sequence[Disk] = (),
        drives: Sequence[Path] = (),
        nics: Sequence[Nic] = (),
        shares: Mapping[str, Path] | None = None,
        memory: int = 512,
        instruction_ns: int = 0,
        forwards: Mapping[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        self.name = name
        self.disks = tuple(disks)
        self.console = directory / f"console-{name}-{time.monotonic_ns()}.log"
        self._ports = [_Port() for _ in range(PORTS)]
        self.is_paused = False
        self._monitor = _Port()
        self._free: list[_Port] = []
        self._ready = threading.Condition()
        fds = [port.theirs.fileno() for port in (self._monitor, *self._ports)]
        command = [
            *_machine(image, memory, name, instruction_ns),
            *_monitor(fds[0]),
            *_network(forwards or {}, nics),
            *_disks(image, self.disks, drives),
            *_shares(shares or {}),
            *_agents(fds[1:]),
        ]
        with open(self.console, "wb") as console:
            self._process = subprocess.Popen(
                command,
                env=dict(environment) if environment is not None else None,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is for the tests, which then end it
            )
        for port in (self._monitor, *self._ports):
            port.theirs.close()
        if wait:
            try:
                self.wait_booted()
            except BaseException:
                self.power_off()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.power_off()

    # -- life --

    @property
    def pid(self) -> int:
        """The emulator's process."""
        return self._process.pid

    def wait_booted(self, seconds: float = BOOT_SECONDS) -> None:
        """Wait until commands can be run; for several guests that boot at once."""
        deadline = time.monotonic() + seconds
        for port in self._ports:
            try:
                answer = port.line(deadline)
            except GuestError as error:
                raise GuestError(
                    f"{self.name} did not boot: {error}\n{self.console_tail()}"
                ) from error
            assert answer == "ready", answer
            self._release(port)

    def power_off(self) -> None:
        """End it at once, as a power cut does; once or often."""
        self.resume()
        self._process.kill()
        self._process.wait()
        for port in (self._monitor, *self._ports):
            port.close()
        with self._ready:
            self._free.clear()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        """Stop its time: it neither computes nor answers until `resume`."""
        self.is_paused = True
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self.is_paused = False

    def plug(self, nic: int, on: bool) -> None:
        """Plug the cable of eth`nic` in, or pull it out: the carrier goes, no frame passes."""
        self._ask("set_link", name=f"segment{nic}", up=on)

    def limit(self, *, operations: int = 0, size: int = 0) -> None:
        """Have each of `disks` do this many operations and bytes a second; 0: any number."""
        others = dict.fromkeys(("bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
        for number in range(len(self.disks)):
            self._ask(
                "block_set_io_throttle",
                device=f"disk{number}", bps=size, iops=operations, **others,
            )  # fmt: skip

    def throttle(self, drive: str, writes: int) -> None:
        """Have a drive ("drive0" is the first of `drives`) take this many writes a second; 0: any
        number."""
        limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd"), 0)
        self._ask("block_set_io_throttle", device=drive, iops_wr=writes, **limits)

    def _ask(self, command: str, **arguments: object) -> None:
        """Have the emulator do something (QMP); one thread at a time."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for request in (
            {"execute": "qmp_capabilities"},
            {"execute": command, "arguments": arguments},
        ):
            self._monitor.send(json.dumps(request).encode() + b"\n", deadline)
            while True:
                answer = json.loads(self._monitor.line(deadline))
                if "return" in answer or "error" in answer:
                    break  # the rest are a greeting and events
        if "error" in answer:
            raise GuestError(f"{self.name}: {command}: {answer['error']['desc']}")

    def console_tail(self, lines: int = 30) -> str:
        """The last lines of the console: kernel messages of warnings and worse."""
        text = self.console.read_text(errors="replace").splitlines()
        return "\n".join([f"-- console of {self.name}", *text[-lines:]])

    # -- commands --

    def _release(self, port: _Port) -> None:
        with self._ready:
            self._free.append(port)
            self._ready.notify()

    def start(self, script: str, seconds: float = COMMAND_SECONDS) -> Job:
        """Start a shell script; after `seconds` the guest kills it, with exit code 137."""
        if not self.is_running():
            raise GuestError(f"{self.name}: it is off\n{self.console_tail()}")
        with self._ready:
            if not self._ready.wait_for(lambda: self._free, seconds):
                raise GuestError(f"{self.name}: all {PORTS} agents are busy or hang")
            port = self._free.pop()
        deadline = time.monotonic() + seconds + _GRACE_SECONDS
        encoded = base64.b64encode(script.encode() + b"\n")
        port.send(b"%d %s\n" % (max(1, round(seconds)), encoded), deadline)
        return Job(self, port, script, deadline)

    def run(self, script: str, seconds: float = COMMAND_SECONDS) -> Result:
        """Run a shell script to its end."""
        return self.start(script, seconds).wait()

    def check(self, script: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run a shell script that has to succeed; its output. CommandError."""
        return self.start(script, seconds).check()

    def write_file(self, path: str, content: bytes) -> None:
        """Make a small file in the guest, such as a job description."""
        text = base64.b64encode(content).decode()
        self.check(f"base64 -d >'{path}' <<'END'\n{text}\nEND")


# ---- the emulator's command line ---------------------------------------------------------------


def _machine(image: Image, memory: int, name: str, instruction_ns: int) -> list[str]:
    arguments = (
        f"console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable random.trust_cpu=on "
        f"audit=0 guest.name={name}"
    )
    accelerator = ["-accel", "tcg,thread=multi"]
    if instruction_ns:
        shift = instruction_ns.bit_length() - 1
        accelerator = ["-accel", "tcg,thread=single", "-icount", f"shift={shift},sleep=on"]
    return [
        *(EMULATOR, *accelerator, "-cpu", "max", "-machine", "q35"),
        *("-m", str(memory), "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", arguments),
    ]


def _monitor(fd: int) -> list[str]:
    return ["-chardev", f"socket,id=monitor,fd={fd}", "-mon", "chardev=monitor,mode=control"]


def _network(forwards: Mapping[int, int], nics: Sequence[Nic]) -> list[str]:
    rules = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in forwards.items())
    arguments = [
        *("-netdev", f"user,id=net,ipv6=off{rules}"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
    ]
    for number, nic in enumerate(nics, 1):
        where = f"mcast={nic.segment.group}:{nic.segment.port},localaddr=127.0.0.1"
        mac = f"52:54:00:5c:51:{nic.station:02x}"
        arguments += [
            *("-netdev", f"socket,id=segment{number},{where}"),
            *("-device", f"virtio-net-pci,netdev=segment{number},mac={mac},romfile="),
        ]
    return arguments


def _shares(shares: Mapping[str, Path]) -> list[str]:
    arguments = []
    for tag, path in shares.items():
        how = f"local,id={tag},path={path},security_model=none,readonly=on,multidevs=remap"
        arguments += ["-fsdev", how, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return arguments


def _disks(image: Image, disks: Sequence[Disk], drives: Sequence[Path]) -> list[str]:
    # Not a SCSI disk: neither blkmapd nor a test can take it for a shared one.
    arguments = [
        *("-drive", _drive("tools", image.tools, read_only=True)),
        *("-device", "virtio-blk-pci,drive=tools"),
        *("-device", "virtio-scsi-pci,id=scsi"),
    ]
    for index, path in enumerate(drives):
        arguments += [
            *("-drive", _drive(f"drive{index}", path, read_only=False)),
            *("-device", f"virtio-blk-pci,drive=drive{index}"),
        ]
    for index, disk in enumerate(disks):
        name = f"disk{index}"
        arguments += [
            *("-drive", _drive(name, disk.path, read_only=disk.read_only)),
            "-device",
            f"scsi-hd,drive={name},bus=scsi.0,serial={disk.wwn:016x},wwn={disk.wwn:#018x}",
        ]
    return arguments


def _drive(name: str, path: Path, *, read_only: bool) -> str:
    # Without O_DIRECT the page cache of a file in memory is the file: nothing gets out of step.
    cache = "none" if _takes_direct(path) else "writeback"
    mode = "on" if read_only else "off"
    return (
        f"file={path},format=raw,cache={cache},file.locking=off,read-only={mode},if=none,id={name}"
    )


def _takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _agents(fds: Sequence[int]) -> list[str]:
    arguments = ["-device", "virtio-serial-pci,id=serial"]
    for index, fd in enumerate(fds):
        arguments += [
            *("-chardev", f"socket,id=agent{index},fd={fd}"),
            *("-device", f"virtserialport,bus=serial.0,chardev=agent{index},name=agent{index}"),
        ]
    return arguments
