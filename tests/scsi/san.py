"""A storage network: a target, a server on its disk, and clients, each a guest.

    segment "storage", eth1, 192.168.77.0/24: iSCSI         target 1, server 2, others from 3 on
    segment "files", eth2, 192.168.78.0/24: NFS             the same numbers

So the network to the server can be cut while the disk stays, and the other way round. Clients mount
the address SERVICE, which moves from a server to its standby as a cluster's floating address does.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import rundir
from guest.client import Client
from guest.image import Image
from guest.machine import Guest, GuestError, Nic, Segment

from scsi import initiator, target
from scsi.server import SHARES, ScsiServer

MIB = 1 << 20
SIZE = 64 * MIB
MEMORY = 384
SERVER_MEMORY = 640
NETWORK = "192.168.78.0/24"
SERVICE = "192.168.78.100"
LAYOUT = "LAYOUT_SCSI"
EXPORTS = {"/": f"{NETWORK},rw,no_root_squash,layouts=scsi"}
STORAGE_NIC, FILES_NIC = 1, 2
EARLIER_SECONDS = 60

# Who has the address in its tables learns of the new station at once (RFC 5227: an announcement).
_ANNOUNCE = """
import socket
card, address = "eth2", socket.inet_aton("%s")
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
frames.bind((card, 0))
station = frames.getsockname()[4]
request = bytes.fromhex("0001080006040001") + station + address + bytes(6) + address
for _ in range(3):
    frames.send(b"\\xff" * 6 + station + b"\\x08\\x06" + request)
"""


class San:
    """Target and server; clients come with `client_of`. A context manager for the guests' lives."""

    def __init__(
        self,
        image: Image,
        directory: rundir.RunDirectory,
        *,
        size: int = SIZE,
        exports: dict[str, str] | None = None,
        options: dict[str, str] | None = None,
    ) -> None:
        self._image = image
        self._directory = directory
        self._exports, self._options = exports or EXPORTS, options or {}
        self._stack = contextlib.ExitStack()
        self._storage, self._files = Segment(), Segment()
        self._numbers: dict[str, int] = {}
        self._clients: dict[str, Client] = {}
        self._standby: ScsiServer | None = None
        self.is_serving = False
        """Whether `serve` has been called."""
        self.tolerated: list[str] = []
        """Patterns of warnings that the test at hand may bring up, and need not."""
        self.disk = directory.new_image(size, "unit")
        self._state = directory.new_image(target.STATE_SIZE, "registrations")
        self._stack.callback(self.disk.unlink, missing_ok=True)
        self._stack.callback(self._state.unlink, missing_ok=True)
        target.new_state(self._state)
        try:
            self.target = self._boot("target", memory=MEMORY, wait=False)
            self.server_guest = self._boot("server", memory=SERVER_MEMORY, wait=False)
            self._connect(self.target)
            self._connect(self.server_guest)
            target.start(self.target)
            self.server = self._server_on(self.server_guest)
            self._have_address(self.server_guest, True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all guests, and remove the disk."""
        self._stack.close()

    # -- servers --

    def _server_on(self, guest: Guest) -> ScsiServer:
        """A server that has the disk, and has not begun."""
        server = ScsiServer(guest, SERVICE, self._exports, self._options)
        server.prepare()
        initiator.start(guest)
        server.device = initiator.login(guest)
        return server

    def _have_address(self, guest: Guest, have: bool) -> None:
        """Give the guest the address that clients mount, or take it away."""
        guest.check(f"ip addr {'add' if have else 'del'} {SERVICE}/24 dev eth2")

    @property
    def standby(self) -> ScsiServer:
        """A second server, booted at the first use: it has the disk and does not serve."""
        if self._standby is None:
            guest = self._boot("standby", memory=SERVER_MEMORY, wait=False)
            self._connect(guest)
            self._standby = self._server_on(guest)
        return self._standby

    def take_over(self, *, by_agent: bool = False) -> None:
        """The standby takes address and unit; the server is the standby from now on.

        Whatever the old one does, clients do not reach it any more: its cable to them is out.
        `by_agent`: as Pacemaker would have it done.
        """
        old, new = self.server, self.standby
        if not old.guest.is_paused:
            old.guest.plug(FILES_NIC, False)
        self._have_address(new.guest, True)
        new.python(_ANNOUNCE % SERVICE)
        if by_agent:
            code = new.agent("start")
            assert code == 0, f"the agent's start: {code}\n{new.log()}"
        else:
            new.start("--take-over")
        self.server, self._standby = new, old
        self.server_guest = new.guest

    def retire(self) -> None:
        """After `take_over`, when the old server runs, has its cables and is over: its guest is one
        that could take over."""
        self._have_address(self.standby.guest, False)
        self.standby.guest.plug(FILES_NIC, True)

    # -- guests --

    def _boot(self, name: str, *, memory: int, wait: bool = True) -> Guest:
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        guest = Guest(
            self._image,
            self._directory.path,
            name=name,
            drives=[self.disk, self._state] if name == "target" else [],
            nics=[Nic(self._storage, number), Nic(self._files, 64 + number)],
            shares=SHARES if name in ("server", "standby") else {},
            memory=memory,
            environment=self._directory.environment(),
            wait=wait,
        )
        self._stack.enter_context(guest)
        return guest

    def _connect(self, guest: Guest) -> None:
        """Wait for the boot, and give the cards their addresses."""
        guest.wait_booted()
        number = self._numbers[guest.name]
        guest.check(
            "".join(
                f"ip addr add 192.168.{net}.{number}/24 dev {card}; ip link set {card} up\n"
                for card, net in (("eth1", 77), ("eth2", 78))
            )
        )

    def client_of(self, name: str) -> Client:
        """The mount of the guest of this name, booted and mounted at the first use.

        "target" is the target's guest, which then is a client of itself: a client more without a
        guest more.
        """
        self.serve()
        if name not in self._clients:
            if name == "target":
                guest = self.target
            else:
                guest = self.guest_of(name)
            self._clients[name] = self.mount(guest)
            self._wait_earlier_life(guest)
        client = self._clients[name]
        # A registration of an earlier life may have been preempted meanwhile.
        initiator.attend(client.guest)
        return client

    def _wait_earlier_life(self, guest: Guest) -> None:
        """Wait until nothing is left of what a client that has mounted was before it booted.

        The server fences it some time after the client's new session, or preempts its key as one
        that is no holder's. Then the unit tells of it who registers first: the guest's kernel (6.1)
        does not repeat that, and would read and write through the server for two minutes. Since the
        mount the client has no layout: a holder of its name, a key of its nexus is an earlier one.
        """
        deadline = time.monotonic() + EARLIER_SECONDS
        name = initiator.name(guest)
        key = target.key_of(self.target, name)
        said = "" if key in (None, *self._keys_of(guest)) else f"key {key} was registered and is no"
        while True:
            left = target.key_of(self.target, name), self._keys_of(guest)
            if left == (None, []) and said in self.server.log():
                return
            assert time.monotonic() < deadline, f"an earlier life is not over: {left}"
            time.sleep(0.1)

    def _keys_of(self, guest: Guest) -> list[str]:
        """Keys of the holders of this name that are not at their end."""
        holders = self.server.status()["holders"]["list"]
        mine = [h for h in holders if h["name"].endswith(f" {guest.name}") and h["state"] != "gone"]
        return [holder["fence_key"] for holder in mine]

    def guest_of(self, name: str) -> Guest:
        """Boot one more guest."""
        guest = self._boot(name, memory=MEMORY, wait=False)
        self._connect(guest)
        return guest

    def mount(self, guest: Guest) -> Client:
        """Have a guest log in to the disk and mount the server's root."""
        initiator.start(guest)
        initiator.login(guest)
        client = Client(guest, layout=LAYOUT)
        client.prepare(block_layouts=False)
        guest.check("modprobe blocklayoutdriver; dmesg -c >/dev/null")
        client.mount(2049, server=SERVICE)
        return client

    def restart_target(self, *, forgetful: bool = False) -> None:
        """Cut the target's power and start it again.

        LIO enforces a reservation from when its holder is logged in again, so until then nobody
        else reaches it. `forgetful`: it lost what it had saved, and everybody may come.
        """
        self._clients.pop("target", None)
        guests = [client.guest for client in self._clients.values()]
        others = [guest for guest in guests if not guest.is_paused]  # which reach nothing
        for guest in others:
            guest.plug(STORAGE_NIC, False)
        self.target.power_off()
        self.target = self._boot("target", memory=MEMORY, wait=False)
        self._connect(self.target)
        if forgetful:
            target.forget(self.target)
        target.start(self.target)
        name = initiator.name(self.server_guest)
        self.target.check(target.wait_session(name), 60)
        for guest in others:
            guest.plug(STORAGE_NIC, True)

    def serve(self) -> None:
        """Format the disk and start the server, unless it runs."""
        if not self.is_serving:
            self.server.extfs("mkfs", "--force", self.server.device)
            self.server.start()
            self.is_serving = True

    def is_healthy(self) -> bool:
        """Whether all guests answer, the server runs and the clients have their mounts."""
        try:
            if self.is_serving and not self.server.is_alive():
                return False
            for client in self._clients.values():
                if client.guest.run(f"stat {client.mountpoint}", seconds=20).code != 0:
                    return False
            guests = [self.target, self.server_guest]
            guests += [self._standby.guest] if self._standby is not None else []
            return all(guest.run("true").code == 0 for guest in guests)
        except GuestError:
            return False

    # -- evidence --

    def evidence(self) -> str:
        """What there is to see of a failure."""
        servers = [self.server] if self._standby is None else [self.server, self._standby]
        texts = [f"-- daemon of {s.guest.name}\n{s.log()[-20000:]}" for s in servers]
        texts += [client.evidence() for client in self._clients.values()]
        try:
            texts += ["-- target", target.registrations(self.target)]
        except GuestError as error:
            texts.append(str(error))
        return "\n".join(texts)


def stamps_on(disk: Path, seed: int) -> set[int]:
    """Numbers of the unit's sectors that carry a stamp of `seed` (programs/stamp.c)."""
    head = seed.to_bytes(8, "little")
    found = set()
    content = disk.read_bytes()
    at = content.find(head)
    while at >= 0:
        if at % 512 == 0 and content[at : at + 16] == content[at + 16 : at + 32]:
            found.add(at // 512)
            at += 511
        at = content.find(head, at + 1)
    return found
