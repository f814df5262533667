"""fence: list, confirm, test - who is kept from a device, and what the device can do for that."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import click

from extfs.cli.layouts import HOLDER_ID, confirm_fenced
from extfs.cli.mounts import find_mount, mounts_of_device
from extfs.cli.output import CommandError, print_json, write_table
from extfs.cli.status import duration_text, read_status

if TYPE_CHECKING:
    from extfs.layout.reservations import Held, Keys

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def fence() -> None:
    """Keep lost holders from the device: what waits for that, what was done, what is possible.

    A holder that does not answer is fenced before its blocks are used for anything else. With
    --export ...:layouts=scsi the disk itself refuses it (persistent reservations); otherwise the
    mount option fence= says what confirms it.
    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """


# ---- list --------------------------------------------------------------------------------------


def _registered(device: str) -> tuple[Keys, Held | None] | str:
    """What is registered on the unit below; in words why that cannot be told."""
    from extfs.layout.reservations import UnitError
    from extfs.layout.scsi_unit import ScsiUnit

    try:
        with contextlib.closing(ScsiUnit(device)) as unit:
            return unit.keys(), unit.reservation()
    except UnitError as error:
        return str(error)


def _key_rows(keys: Keys, held: Held | None, holders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from extfs.layout.examination import key_owner
    from extfs.layout.keys import key_text

    by_key = {holder.get("fence_key"): holder["id"] for holder in holders}
    return [
        {
            "key": key_text(key),
            "paths": keys.keys.count(key),
            "holds": held is not None and held.key == key,
            "holder": by_key.get(key_text(key)),
            "whose": key_owner(key),
        }
        for key in dict.fromkeys(keys.keys)
    ]


def _write_fences(fences: dict[str, Any]) -> None:
    waiting = [
        (
            str(fence["holder"]),
            fence["state"],
            duration_text(fence["seconds"]),
            str(fence["attempts"]),
            fence["driver"],
            fence["cause"],
            fence["last_failure"] or "-",
        )
        for fence in fences["waiting"]
    ]
    if waiting:
        click.echo("fences that wait")
        titles = ("holder", "state", "for", "attempts", "by", "cause", "last failure")
        write_table(titles, waiting)
    else:
        click.echo("no fence waits")
    done = [
        (
            str(fence["holder"]),
            fence["outcome"],
            f"{fence['seconds']:.3f} s",
            str(fence["attempts"]),
            fence["driver"],
            fence["cause"],
            " ".join(filter(None, (fence["name"], fence["detail"]))) or "-",
        )
        for fence in fences["history"]
    ]
    if done:
        click.echo("\nfences of this mount that are over")
        write_table(("holder", "outcome", "after", "attempts", "by", "cause", "who, how"), done)


def _write_keys(device: str, rows: list[dict[str, Any]], held: Held | None) -> None:
    click.echo(f"\nregistered on the unit of {device}")
    write_table(
        ("key", "paths", "holder", "reservation", "whose"),
        [
            (
                row["key"],
                str(row["paths"]),
                str(row["holder"] or "-"),
                "holds it" if row["holds"] else "-",
                row["whose"],
            )
            for row in rows
        ],
    )
    if not rows:
        click.echo("nothing")
    if held is None:
        click.echo("no reservation: the unit serves everybody")
    elif not held.right_type:
        click.echo(f"the reservation has type {held.type}, which keeps no client out for us")


def _target(path: str) -> tuple[str | None, str]:
    """(mountpoint or None, device) of a mountpoint or a device. CommandError."""
    mount = find_mount(path)
    if mount is not None:
        return mount.mountpoint, mount.source
    if not os.path.exists(path):
        raise CommandError(f"{path}: No such file or directory")
    if os.path.isdir(path):
        raise CommandError(f"{path}: no extfs is mounted here")
    mounts = mounts_of_device(path)
    return (mounts[-1].mountpoint if mounts else None), path


@fence.command("list")
@click.argument("target", metavar="MOUNTPOINT-OR-DEVICE")
@_JSON
def list_fences(target: str, as_json: bool) -> None:
    """Print the fences of a filesystem that wait and that are over, and who is registered.

    Of a DEVICE that is not mounted: what is registered on it.
    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    mountpoint, device = _target(target)
    fences: dict[str, Any] | None = None
    holders: list[dict[str, Any]] = []
    if mountpoint is not None:
        document = read_status(mountpoint)[1]
        fences, holders = document["fences"], document["holders"]["list"]
    found = _registered(device)
    if fences is None and isinstance(found, str):
        raise CommandError(f"{device}: {found}")
    rows = [] if isinstance(found, str) else _key_rows(*found, holders)
    if as_json:
        unit = {"error": found} if isinstance(found, str) else {"keys": rows}
        print_json({"device": device, "mountpoint": mountpoint, "fences": fences, "unit": unit})
        return
    if fences is not None:
        _write_fences(fences)
    if isinstance(found, str):
        click.echo(f"\n{device}: {found}")
    else:
        _write_keys(device, rows, found[1])


# ---- confirm, test -----------------------------------------------------------------------------


@fence.command()
@click.argument("mountpoint")
@click.argument("holders", nargs=-1, required=True, type=HOLDER_ID, metavar="HOLDER...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def confirm(mountpoint: str, holders: tuple[int, ...], yes: bool) -> None:
    """Confirm that each lost HOLDER cannot reach the device any more. Its blocks become free.

    Only root may, and only who knows: a holder that still writes would write into whatever these
    blocks are used for next. Needed where a fence can find out nothing: a client that had not yet
    registered its key, a unit that cannot be reset. The same as `extfs layout fence`.
    Exit codes: 0 confirmed, 1 failed, or not confirmed, 2 wrong usage.
    """
    confirm_fenced(mountpoint, holders, yes=yes)


@fence.command()
@click.argument("device")
@click.option(
    "--reserve",
    is_flag=True,
    help="Also reserve it for a moment. Other hosts that use it then get errors.",
)
@_JSON
def test(device: str, reserve: bool, as_json: bool) -> int:
    """Print what DEVICE can do for --export ...:layouts=scsi, and try it.

    Nothing is written, and nothing stays: a key is registered for a moment if nobody else is
    registered. That another host's key can be preempted takes two hosts, and is not tried.
    Exit codes: 0 it can be used, 1 it cannot, or failed, 2 wrong usage.
    """
    from extfs.layout.examination import Finding, examine
    from extfs.layout.reservations import UnitError
    from extfs.layout.scsi_unit import ScsiUnit

    findings: list[Finding] = []
    try:
        with contextlib.closing(ScsiUnit(device)) as unit:
            findings += examine(unit, reserve=reserve)
    except UnitError as error:
        findings.append(Finding("device", False, str(error)))
    usable = all(found.fits is not False for found in findings)
    if as_json:
        print_json(
            {
                "device": device,
                "usable": usable,
                "findings": [
                    {"subject": found.subject, "fits": found.fits, "text": found.text}
                    for found in findings
                ],
            }
        )
    else:
        words = {True: "yes", False: "NO", None: ""}
        write_table(
            ("", "fits", ""),
            [(found.subject, words[found.fits], found.text) for found in findings],
        )
        click.echo(f"{device}: layouts=scsi {'can be used' if usable else 'cannot be used'}")
    return 0 if usable else 1
