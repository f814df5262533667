"""status: what a mounted filesystem is doing."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from extfs.cli.output import CommandError, size_text, write_fields, write_table

_LATENCIES = ("get", "commit", "return", "recall")


def read_status(mountpoint: str) -> tuple[str, dict[str, Any]]:
    """The text of /.extfs/status, and what it says. CommandError."""
    from extfs.control.client import STATUS_NAME

    path = os.path.join(mountpoint, STATUS_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandError(f"{mountpoint}: no extfs is mounted here") from error
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    try:
        return text, json.loads(text)
    except ValueError as error:
        raise CommandError(f"{path}: not understood: {error}") from error


def duration_text(seconds: float) -> str:
    """Seconds for a person: 0.4 s, 59 s, 5 min, 3 h 20 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _bound(value: int | None) -> str:
    if value is None:
        return "-"
    return f"< {value:,} µs" if value < 10_000 else f"< {value / 1000:,.0f} ms"


def transport_text(bridge: dict[str, Any]) -> str:
    """How requests come from the kernel, and why not otherwise; of ``bridge`` in the status."""
    if bridge["transport"] == "uring":
        return "FUSE over io_uring"
    return f"/dev/fuse; FUSE over io_uring: {bridge['transport_why']}"


def idle_text(bridge: dict[str, Any]) -> str:
    """Whether idle CPUs poll while requests follow one another; of ``bridge`` in the status."""
    if bridge["idle_poll_why"]:
        return f"halt: {bridge['idle_poll_why']}"
    now = ", now too" if bridge["idle_polling"] else ""
    return (
        f"polled {bridge['idle_polls']:,} times, for "
        f"{duration_text(bridge['idle_poll_seconds'])} in all{now}"
    )


def memory_text(memory: dict[str, Any]) -> str:
    """What the caches hold of what they may, and what pressure did; of ``memory``."""
    metadata, inodes = memory["metadata"], memory["inodes"]
    text = (
        f"{size_text(metadata['bytes'])} of {size_text(metadata['limit'])} for metadata, "
        f"{inodes['unused']:,} of {inodes['limit']:,} unused inodes"
    )
    if any(part["effective_limit"] < part["limit"] for part in (metadata, inodes)):
        text += (
            f"; while memory is short, at most {size_text(metadata['effective_limit'])} and "
            f"{inodes['effective_limit']:,}"
        )
    return text


def pressure_text(pressure: dict[str, Any], now: float) -> str:
    """How often the caches shrank, and who tells; of ``pressure`` in the status."""
    text = "caches never shrank"
    if pressure["shrinks"]:
        text = (
            f"caches shrank {pressure['shrinks']:,} times, gave back "
            f"{size_text(pressure['given_back'])}, last {duration_text(now - pressure['last'])} ago"
        )
    if not pressure["watched"]:
        text += f"; the kernel does not tell of it: {pressure['why']}"
    return text


def _fields(status: dict[str, Any]) -> dict[str, str]:
    space = status["space"]
    used = space["total"] - space["free"]
    state = "read-only" if status["read_only"] else "writable"
    if status["error"]:
        state = f"turned read-only by an error: {status['error']}"
    fields = {
        "device": status["device"],
        "mounted on": f"{status['mountpoint']}, {state}, for {duration_text(status['uptime'])}",
        "UUID": status["uuid"],
        "space": f"{size_text(used)} used, {size_text(space['free'])} free of "
        f"{size_text(space['total'])}; {space['inodes']:,} inodes",
        "requests": f"{status['bridge']['requests']:,}, "
        f"{status['bridge']['forwarded']:,} of them served in Python",
        "transport": transport_text(status["bridge"]),
        "idle CPUs": idle_text(status["bridge"]),
        "memory": memory_text(status["memory"]),
        "memory pressure": pressure_text(status["memory"]["pressure"], status["time"]),
        "journal": f"{status['core']['commits']:,} commits, "
        f"{status['core']['checkpoints']:,} checkpoints",
        "holders": f"{status['holders']['live']:,} live, {status['holders']['lost']:,} lost; "
        f"{status['recall_ms'] / 1000:g} s to answer a recall",
    }
    if space["quarantined"]:
        fields["quarantine"] = f"{size_text(space['quarantined'])} wait for a fence"
    waiting = status["fences"]["waiting"]
    if waiting:
        fields["fences"] = f"{len(waiting):,} wait, by {status['fences']['driver']}"
    return fields


def _write_holders(holders: dict[str, Any]) -> None:
    rows = [
        (
            str(holder["id"]),
            holder["state"],
            f"{holder['grants']:,}",
            size_text(holder["quarantined"]),
            f"{holder['recalls']:,}",
            f"{holder['recalls_missed']:,}",
            str(holder["pid"]),
            " ".join(filter(None, (holder["name"], holder["fence"]))),
        )
        for holder in holders["list"]
    ]
    if rows:
        click.echo()
        titles = (
            "holder",
            "state",
            "layouts",
            "quarantine",
            "recalls",
            "missed",
            "process",
            "name",
        )
        write_table(titles, rows)
    if holders["more"]:
        click.echo(f"and {holders['more']:,} more holders")


def _write_recalls(recalls: dict[str, Any]) -> None:
    rows = [
        (
            str(recall["holder"]),
            str(recall["ino"]),
            f"{recall['offset']:,}",
            "to the end" if recall["length"] > 1 << 62 else size_text(recall["length"]),
            recall["iomode"],
            f"{recall['age_ms'] / 1000:.1f} s",
        )
        for recall in recalls["list"]
    ]
    if rows:
        click.echo("\nrecalls that are not answered")
        write_table(("holder", "inode", "file offset", "length", "for", "age"), rows)


def _write_fences(fences: dict[str, Any]) -> None:
    rows = [
        (
            str(fence["holder"]),
            duration_text(fence["seconds"]),
            str(fence["attempts"]),
            fence["last_failure"] or "-",
        )
        for fence in fences["waiting"]
    ]
    if rows:
        click.echo(f"\nfences that are not confirmed, by {fences['driver']}")
        write_table(("holder", "for", "attempts", "last failure"), rows)


def _write_layouts(layouts: dict[str, Any]) -> None:
    rows = [
        (
            name,
            f"{layouts['latencies'][name]['count']:,}",
            _bound(layouts["latencies"][name]["p50_us"]),
            _bound(layouts["latencies"][name]["p99_us"]),
            "",
        )
        for name in _LATENCIES
        if layouts["latencies"][name]["count"]
    ]
    if rows:
        click.echo()
        write_table(("layout calls", "count", "median", "99 %", ""), rows)
    counters = {name: f"{count:,}" for name, count in layouts["counters"].items() if count}
    if counters:
        click.echo("\nlayout counters")
        write_fields(counters)


@click.command()
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="Print MOUNTPOINT/.extfs/status as it is.")
def status(mountpoint: str, as_json: bool) -> None:
    """Print what the filesystem mounted on MOUNTPOINT is doing: space, holders, recalls, fences.

    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    text, document = read_status(mountpoint)
    if as_json:
        click.echo(text, nl=False)
        return
    write_fields(_fields(document))
    _write_holders(document["holders"])
    _write_recalls(document["recalls"])
    _write_fences(document["fences"])
    _write_layouts(document["layouts"])
