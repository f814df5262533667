"""What a persistent session pays for the marks of operations that must not be done twice.

    PYTHONPATH=scripts:tests .venv/bin/python -m benchmarks.nfs_marks [--calls N]

The service runs in this process, without sockets, on a filesystem in a file in memory. Two clients
take turns, one with the promise and one without: the same operations on the same directory, so that
whatever else the machine does meets both. A second table counts what the journal has written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from nfs.calls import Call, link, mkdir, path, putrootfh, remove, rename, savefh
from nfs.handshake import PERSIST
from nfs.persistence import Host, Persistent
from nfs.wire import make_service
from rich.table import Table

from extfs.core import Device, Filesystem, mkfs
from extfs.nfs import constants as n

from .wide import wide_console

DEVICE_BYTES = 1 << 30
CLIENTS = {"persistent": PERSIST, "without": n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN}


class Memory(Host):
    """A server on a file in memory instead of the simulated device."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.service, self.runner = make_service(fs)


def turn(name: bytes) -> dict[str, tuple[Call, ...]]:
    """Operations that leave nothing behind."""
    other, third = name + b"-2", name + b"-3"
    return {
        "CREATE": (putrootfh(), mkdir(name)),
        "RENAME": (putrootfh(), savefh(), rename(name, other)),
        "REMOVE": (putrootfh(), remove(other)),
        "LINK": (*path(b"file"), savefh(), putrootfh(), link(third)),
        "REMOVE of the link": (putrootfh(), remove(third)),
    }


def measure(host: Memory, calls: int) -> None:
    """Medians of both clients, and the ratio of the pairs."""
    clients = {name: Persistent(name.encode()).establish(host, CLIENTS[name]) for name in CLIENTS}
    host.fs.mknod(1, b"file", 0o100644)
    took: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    images: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for number in range(calls):
        names = list(clients) if number % 2 else list(clients)[::-1]
        for name in names:
            for what, request in turn(b"%s-%d" % (name.encode(), number)).items():
                before = host.fs.stats().images
                begin = time.perf_counter()
                clients[name].do(host, *request)
                took[what][name].append(time.perf_counter() - begin)
                images[what][name] += host.fs.stats().images - before
    table = Table("operation", "persistent", "without", "ratio", "blocks logged", "without")
    for what, of in took.items():
        pairs = [of[name] for name in CLIENTS]
        one, two = (statistics.median(times) * 1e6 for times in pairs)
        ratio = statistics.median(a / b for a, b in zip(*pairs, strict=True))
        logged = [f"{images[what][name] / calls:.2f}" for name in CLIENTS]
        table.add_row(what, f"{one:.0f} us", f"{two:.0f} us", f"{ratio:.2f}", *logged)
    wide_console().print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        image = Path(directory, "image")
        with image.open("wb") as file:
            file.truncate(DEVICE_BYTES)
        device = Device.open(str(image))
        mkfs(device)
        with Filesystem.open(device, no_heartbeat=True) as fs:
            host = Memory(fs)
            measure(host, options.calls)
            host.service.records.finish()


if __name__ == "__main__":
    main()
