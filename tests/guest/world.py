"""A served filesystem and the guests that have its disk, for many tests one after the other.

Booting takes seconds, so the world is kept from test to test; each uses files of its own name. A
world in which a test failed, or that does not answer, is thrown away with all its guests.
"""

from __future__ import annotations

import contextlib
import itertools

import rundir

from guest.client import Client
from guest.image import Image
from guest.machine import Disk, Guest, GuestError
from guest.served import EXPORT, IMAGE_SIZE, Served

_wwns = itertools.count(0x5000C500_15EB0000)


class World:
    """`served`, and clients in guests that see its disk: the first one is `client`."""

    def __init__(
        self,
        image: Image,
        directory: rundir.RunDirectory,
        *,
        export: str = EXPORT,
        size: int = IMAGE_SIZE,
        lease: int | None = None,
    ) -> None:
        self._image = image
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._clients: dict[str, Client] = {}
        self.guests: list[Guest] = []
        self.tolerated: list[str] = []
        """Patterns of warnings that the test at hand may bring up, and need not."""
        self.served = Served(directory, export=export, size=size, lease=lease)
        try:
            self._stack.enter_context(self.served)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Guests first: they hold layouts."""
        self._stack.close()

    @property
    def client(self) -> Client:
        """The mount of guest "one"."""
        return self.client_of("one")

    @property
    def second(self) -> Client:
        """The mount of guest "two"."""
        return self.client_of("two")

    def client_of(self, name: str) -> Client:
        """The mount of the guest of this name, which is booted at the first use."""
        if name not in self._clients:
            self._clients[name] = self.new_client(name)
        return self._clients[name]

    def new_client(self, name: str, *, disk: bool = True, options: str = "") -> Client:
        """Boot one more guest, with or without the disk, and mount."""
        guest = self.boot(name, disk=disk)
        client = Client(guest)
        client.prepare()
        client.debug()
        guest.check("dmesg -c >/dev/null")  # of the boot
        client.mount(self.served.port, options=options)
        return client

    def boot(self, name: str, *, disk: bool = True) -> Guest:
        """One more guest, without a mount; ended with the world."""
        guest = Guest(
            self._image,
            self._directory.path,
            name=name,
            disks=[Disk(self.served.image, next(_wwns))] if disk else [],
            environment=self._directory.environment(),
        )
        self._stack.enter_context(guest)
        self.guests.append(guest)
        return guest

    def forget(self, client: Client) -> None:
        """A guest has been powered off; the next use of its name boots another."""
        self._clients = {n: known for n, known in self._clients.items() if known is not client}

    def is_healthy(self) -> bool:
        """Whether the daemon serves, and the guests that are kept answer and have their mounts."""
        if not self.served.is_alive():
            return False
        for client in self._clients.values():
            try:
                if client.guest.run(f"stat {client.mountpoint}", seconds=10).code != 0:
                    return False
            except GuestError:
                return False
        return True

    def evidence(self) -> str:
        """What there is to see of a failure."""
        texts = [f"-- daemon\n{self.served.log_tail()}"]
        texts += [client.evidence() for client in self._clients.values()]
        texts += [guest.console_tail() for guest in self.guests]
        return "\n".join(texts)
