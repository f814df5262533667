"""clients: who uses the layout server of a mounted filesystem."""

from __future__ import annotations

import json
from typing import Any

import click

from extfs.cli.output import CommandError, write_fields, write_table
from extfs.cli.status import duration_text, read_status

_TITLES = (
    "client",
    "address",
    "standing",
    "heard of",
    "sessions",
    "opens",
    "locks",
    "delegations",
    "layouts",
    "callbacks",
    "name",
)


def _row(client: dict[str, Any]) -> tuple[str, ...]:
    states = client["states"]
    return (
        client["clientid"],
        client["address"],
        client["standing"],
        f"{duration_text(client['renewed_seconds_ago'])} ago",
        str(len(client["sessions"])),
        f"{states['open']:,}",
        f"{states['lock']:,}",
        f"{states['delegation']:,}",
        f"{states['layout']:,}",
        "reach it" if client["callback_path"] else "do not",
        client["owner"],
    )


def _fields(nfs: dict[str, Any]) -> dict[str, str]:
    lease = nfs["lease"]
    fields = {
        "serving on": ", ".join(nfs["listening"]),
        "connections": f"{nfs['connections']:,}",
        "lease": f"{lease['seconds']:g} s",
    }
    if lease["grace_seconds_left"]:
        fields["grace"] = (
            f"ends in {duration_text(lease['grace_seconds_left'])} at the latest; "
            f"{lease['may_reclaim']:,} clients may reclaim"
        )
    return fields


def _write_recalls(recalls: list[dict[str, Any]]) -> None:
    rows = [
        (recall["client"], str(recall["ino"]), f"{recall['seconds']:.1f} s") for recall in recalls
    ]
    if rows:
        click.echo("\nlayout recalls in progress")
        write_table(("client", "inode", "age"), rows)


@click.command()
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clients(mountpoint: str, as_json: bool) -> None:
    """Print the NFS clients of the filesystem mounted on MOUNTPOINT, and what they hold.

    Exit codes: 0 told, 1 failed (nothing is served), 2 wrong usage.
    """
    document = read_status(mountpoint)[1]
    nfs = document["nfs"]
    if nfs is None:
        raise CommandError(f"{mountpoint}: mounted without --nfs, serves no clients")
    if as_json:
        click.echo(json.dumps(nfs, indent=1))
        return
    write_fields(_fields(nfs))
    if nfs["clients"]:
        click.echo()
        write_table(_TITLES, [_row(client) for client in nfs["clients"]])
    if nfs["more"]:
        click.echo(f"and {nfs['more']:,} more clients")
    _write_recalls(nfs["layouts"]["recalls"])
    counters = {name: f"{count:,}" for name, count in sorted(nfs["counters"].items())}
    if counters:
        click.echo("\ncounters")
        write_fields(counters)
