"""The file of ``extfs mount --config``: one filesystem, its mount and its layout server, as TOML.

    device = "/dev/disk/by-id/..."
    mountpoint = "/srv/files"
    options = "noatime,recall=10"       # as -o

    [nfs]                               # without it nothing is served
    listen = ["192.0.2.1:2049"]         # ["127.0.0.1:2049"]
    lease = 90                          # seconds
    grace = 90                          # seconds after a start in which clients reclaim
    connections = 1024                  # at most
    clients = 4096                      # at most
    threads = 16                        # for what waits for the device

    [[nfs.export]]
    path = "/"
    networks = ["192.0.2.0/24"]         # ["127.0.0.0/8", "::1"]
    options = ["rw", "layouts=block"]   # as --export; "layouts=scsi": see extfs-mount(8)

msgspec reads it: a word that is not known, or of the wrong type, is an error that says where.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from extfs.cli.output import CommandError

if TYPE_CHECKING:
    from extfs.daemon import MountOptions, NfsOptions

__all__ = ["read_configuration"]

_FILE_BYTES_MAX = 1 << 20


class _Export(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    networks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def text(self) -> str:
        """As on the command line."""
        words = ",".join([*self.networks, *self.options])
        return f"{self.path}:{words}" if words else self.path


class _Nfs(msgspec.Struct, forbid_unknown_fields=True):
    listen: Annotated[tuple[str, ...], Meta(min_length=1)] = ("127.0.0.1:2049",)
    lease: Annotated[int, Meta(ge=5, le=3600)] = 90
    grace: Annotated[int, Meta(ge=0, le=3600)] = 90
    connections: Annotated[int, Meta(ge=2, le=100_000)] = 1024
    clients: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    threads: Annotated[int, Meta(ge=1, le=256)] = 16
    export: tuple[_Export, ...] = ()


class _Configuration(msgspec.Struct, forbid_unknown_fields=True):
    device: Annotated[str, Meta(min_length=1)]
    mountpoint: Annotated[str, Meta(min_length=1)]
    options: str = ""
    nfs: _Nfs | None = None


def _nfs_options(nfs: _Nfs) -> NfsOptions:
    from extfs import daemon

    exports = [export.text() for export in nfs.export]
    each = [daemon.parse_nfs(address, exports) for address in nfs.listen]
    listen = tuple(address for options in each for address in options.server.listen)
    first = each[0]
    return replace(
        first,
        server=replace(
            first.server, listen=listen, connections=nfs.connections, threads=nfs.threads
        ),
        service=replace(
            first.service,
            lease_seconds=float(nfs.lease),
            grace_seconds=float(nfs.grace),
            clients=nfs.clients,
        ),
    )


def read_configuration(path: str) -> MountOptions:
    """What the file says. `CommandError`: it cannot be read, or says something that is wrong."""
    from extfs import daemon

    try:
        with Path(path).open("rb") as file:
            text = file.read(_FILE_BYTES_MAX)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", 2) from error
    try:
        read = msgspec.toml.decode(text, type=_Configuration)
        options = daemon.parse_options(read.device, read.mountpoint, read.options)
        if read.nfs is not None:
            options = replace(options, nfs=_nfs_options(read.nfs))
    except (msgspec.DecodeError, UnicodeDecodeError, daemon.MountError) as error:
        raise CommandError(f"{path}: {error}", 2) from error
    return options
