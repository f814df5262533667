"""mkfs and info."""

from __future__ import annotations

import contextlib
import datetime
import os
import stat
import uuid
from typing import Any

import click

from extfs.cli.mounts import Mount, find_mount, mounts_of_device
from extfs.cli.output import (
    CommandError,
    SizeType,
    core_errors,
    print_json,
    size_text,
    waiting,
    write_fields,
)
from extfs.cli.status import read_status, transport_text

BLOCK_SIZE = 4096


def make_filesystem(device: str, label: str, journal_size: int, force: bool) -> dict[str, Any]:
    """Format `device`; returns what was made. CommandError, click.UsageError."""
    from extfs import core

    if len(label.encode()) > 64:
        raise click.UsageError("a label has at most 64 bytes")
    if journal_size and (journal_size % BLOCK_SIZE or not 4 << 20 <= journal_size <= 1 << 30):
        raise click.UsageError("the journal size is a multiple of 4 KiB between 4 MiB and 1 GiB")
    with core_errors(device), core.Device.open(device) as handle:
        with waiting("formatting"):
            core.mkfs(handle, label=label, journal_blocks=journal_size // BLOCK_SIZE, force=force)
        made = core.read_super(handle)
    return {
        "device": device,
        "uuid": str(uuid.UUID(bytes=made.uuid)),
        "label": made.label.decode("utf-8", "backslashreplace"),
        "size": made.total_blocks * BLOCK_SIZE,
        "journal_size": made.journal_blocks * BLOCK_SIZE,
        "allocation_groups": made.ag_count,
        "block_size": made.block_size,
    }


@click.command()
@click.argument("device")
@click.option(
    "--label", default="", metavar="LABEL", help="Name of the filesystem, up to 64 bytes."
)
@click.option(
    "--journal-size", type=SizeType(), default=0, metavar="SIZE", help="Default: by the device."
)
@click.option("--force", is_flag=True, help="Even when the device carries another filesystem.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def mkfs(device: str, label: str, journal_size: int, force: bool, as_json: bool) -> None:
    """Make a filesystem on DEVICE. What was on it is lost.

    Refuses a device that is in use, or that carries another filesystem (without --force).
    Exit codes: 0 made, 1 failed, 2 wrong usage.
    """
    made = make_filesystem(device, label, journal_size, force)
    if as_json:
        print_json(made)
    else:
        named = f" {made['label']!r}" if made["label"] else ""
        click.echo(
            f"{device}: extfs{named} of {size_text(made['size'])}, "
            f"journal {size_text(made['journal_size'])}, UUID {made['uuid']}"
        )


def _when(seconds: int) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(seconds).astimezone()
    except (OverflowError, OSError, ValueError):
        return str(seconds)
    return moment.isoformat(sep=" ", timespec="seconds")


def _device_facts(device: str, mounts: list[Mount]) -> dict[str, Any]:
    """What the device says, whether it is mounted or not. Mounts of dead daemons do not count."""
    from extfs.check import layout
    from extfs.check.mapping import Image
    from extfs.check.volume import VolumeError

    live: dict[str, os.statvfs_result] = {}
    for mount in mounts:
        with contextlib.suppress(OSError):
            live[mount.mountpoint] = os.statvfs(mount.mountpoint)
    try:
        with Image(device) as image:
            sb = image.volume.super
            beat = layout.HEARTBEAT.unpack(image.volume.read(layout.HEARTBEAT_BLOCK))
            facts: dict[str, Any] = {
                "device": device,
                "mountpoints": list(live),
                "label": sb.label.decode("utf-8", "backslashreplace"),
                "uuid": str(uuid.UUID(bytes=sb.uuid)),
                "created_sec": sb.created_sec,
                "block_size": BLOCK_SIZE,
                "size": sb.total_blocks * BLOCK_SIZE,
                "free": image.root["free_blocks"] * BLOCK_SIZE,
                "quarantined": image.root["quarantined_blocks"] * BLOCK_SIZE,
                "inodes": image.root["inodes"],
                "journal_size": sb.journal_blocks * BLOCK_SIZE,
                "journal_records": len(image.log.records),
                "allocation_groups": sb.ag_count,
                "features": {
                    "compat": sb.compat,
                    "ro_compat": sb.ro_compat,
                    "incompat": sb.incompat,
                },
                "super_damage": [str(damage) for damage in image.super_damages],
                "unmounted_cleanly": beat["state"] == layout.HEARTBEAT_CLEAN,
            }
    except VolumeError as error:
        raise CommandError(error.text) from error
    facts["transport"] = None
    for mountpoint, numbers in live.items():
        facts["free"] = numbers.f_bfree * numbers.f_frsize
        facts["inodes"] = numbers.f_files - numbers.f_ffree
        with contextlib.suppress(CommandError):
            facts["transport"] = transport_text(read_status(mountpoint)[1]["bridge"])
        break
    return facts


def _state(facts: dict[str, Any]) -> str:
    if facts["mountpoints"]:
        return "mounted on " + ", ".join(facts["mountpoints"])
    if facts["unmounted_cleanly"] and not facts["journal_records"]:
        return "clean"
    return "not unmounted; a mount will replay the journal"


@click.command("info")
@click.argument("target", metavar="DEVICE|MOUNTPOINT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes.")
def show(target: str, as_json: bool) -> None:
    """Tell what DEVICE, or the filesystem mounted on MOUNTPOINT, is.

    Of a mounted device this shows what is on the device at the moment, which lags behind.
    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    if stat.S_ISDIR(os.stat(target).st_mode):
        mount = find_mount(target)
        if mount is None:
            raise CommandError(f"{target}: no extfs is mounted here")
        device = mount.source
    else:
        device = target
    facts = _device_facts(device, mounts_of_device(device))
    if as_json:
        print_json(facts)
        return
    used = facts["size"] - facts["free"]
    fields = {
        "device": device,
        "state": _state(facts),
        "label": facts["label"] or "none",
        "UUID": facts["uuid"],
        "created": _when(facts["created_sec"]),
        "size": f"{size_text(facts['size'])} in {facts['allocation_groups']} allocation groups",
        "used": f"{size_text(used)} ({100 * used / facts['size']:.1f} %), "
        f"free {size_text(facts['free'])}",
        "inodes": f"{facts['inodes']:,}",
        "journal": f"{size_text(facts['journal_size'])}, "
        f"{facts['journal_records']} records to replay",
    }
    if facts["transport"]:
        fields["transport"] = facts["transport"]
    if facts["quarantined"]:
        fields["quarantine"] = size_text(facts["quarantined"])
    if facts["super_damage"]:
        fields["superblock"] = "; ".join(facts["super_damage"])
    write_fields(fields)
