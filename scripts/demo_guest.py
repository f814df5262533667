"""The end of scripts/demo: the Linux kernel of a virtual machine reads a file from the disk."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import rundir
from guest.client import Client
from guest.image import ImageError, ensure, why_no_guest
from guest.machine import Disk, Guest, GuestError
from rich.console import Console

WWN = 0x5000C5000E87F500


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serving(port: int) -> tuple[str, ...]:
    """What ``extfs mount`` is told besides."""
    return (
        "--nfs", f"127.0.0.1:{port}", "--export", "/:insecure,no_root_squash,layouts=block",
    )  # fmt: skip


def read_in_guest(
    console: Console,
    run_dir: rundir.RunDirectory,
    image: Path,
    file: Path,
    port: int,
    fail: Callable[[str], Exception],
) -> None:
    """Boot, mount, read `file`; its data must come from the disk and be what the mount says."""
    console.print(
        "\n[bold]# a Linux kernel on another machine reads that file from the disk[/bold]"
    )
    reason = why_no_guest()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return
    begin = time.monotonic()
    try:
        with Guest(
            ensure(lambda text: console.print(f"{text} (once)")),
            run_dir.path,
            name="demo",
            disks=[Disk(image, WWN)],
            environment=run_dir.environment(),
        ) as guest:
            client = Client(guest)
            client.prepare()
            client.mount(port)
            console.print(
                f"A virtual machine is up after {time.monotonic() - begin:.0f} s, has the disk "
                "attached, and has mounted with the stock NFS client:\n"
                f"mount -t nfs4 -o vers=4.2,port={port} SERVER:/ {client.mountpoint}",
                soft_wrap=True,
            )
            with client.counted() as counted:
                digest = client.digest(client.path(file.name))
            client.unmount()
    except (GuestError, ImageError) as error:
        raise fail(f"the guest: {error}") from error
    if digest != hashlib.sha256(file.read_bytes()).hexdigest():
        raise fail(f"the guest read {file.name} otherwise than the mount shows it")
    if counted["READ"] or not counted["LAYOUTGET"]:
        raise fail(f"the guest's data came through the server: {counted}")
    console.print(
        f"It read {file.stat().st_size >> 20} MiB, equal to what the mount shows: LAYOUTGET "
        f"{counted['LAYOUTGET']}, READ {counted['READ']}: no byte of it went through the server."
    )
