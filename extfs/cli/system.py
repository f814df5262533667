"""What mkfs(8), fsck(8), mount(8) and /etc/fstab call: mkfs.extfs, fsck.extfs, mount.extfs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from extfs.cli.checking import check_device
from extfs.cli.formatting import make_filesystem
from extfs.cli.mounting import mount_device, mount_options
from extfs.cli.output import CommandError, SizeType

NAMES = ("mkfs.extfs", "fsck.extfs", "mount.extfs")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("device")
@click.option("-L", "--label", default="", metavar="LABEL")
@click.option("-J", "--journal-size", type=SizeType(), default=0, metavar="SIZE")
@click.option("-f", "-F", "--force", is_flag=True, help="Overwrite another filesystem.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True, help="Ignored.")
def mkfs_helper(
    device: str, label: str, journal_size: int, force: bool, quiet: bool, verbose: bool
) -> None:
    """Make an extfs on DEVICE, as mkfs(8) asks for it. Exit codes: 0 made, 1 failed."""
    made = make_filesystem(device, label, journal_size, force)
    if not quiet:
        click.echo(f"{device}: extfs, UUID {made['uuid']}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("device")
@click.option("-a", "-p", "-y", "repair", is_flag=True, help="Put right what needs no guess.")
@click.option("-r", "ask", is_flag=True, help="The same: there is never anything to ask.")
@click.option("-n", "only_look", is_flag=True, help="Change nothing.")
@click.option("-f", "force", is_flag=True, help="Ignored: every check is a full one.")
@click.option("-C", "progress", metavar="FD", help="Ignored: a terminal gets a bar.")
@click.option("-T", "-V", "-v", "ignored", is_flag=True, help="Ignored.")
def fsck_helper(
    device: str,
    repair: bool,
    ask: bool,
    only_look: bool,
    force: bool,
    progress: str | None,
    ignored: bool,
) -> int:
    """Check the extfs on DEVICE, as fsck(8) asks for it.

    Exit codes: 0 clean, 1 errors repaired, 4 errors left, 8 could not check, 16 wrong usage.
    """
    return check_device(device, (repair or ask) and not only_look, as_json=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("device")
@click.argument("directory")
@click.option("-o", "options", multiple=True, metavar="OPTIONS")
@click.option("-r", "read_only", is_flag=True, help="As -o ro.")
@click.option("-w", "writable", is_flag=True, help="As -o rw.")
@click.option("-f", "fake", is_flag=True, help="Do everything but mount.")
@click.option("-s", "sloppy", is_flag=True, help="Ignored: options that nobody knows are errors.")
@click.option("-n", "-v", "ignored", is_flag=True, help="Ignored.")
@click.option("-t", "kind", metavar="TYPE", help="Ignored.")
def mount_helper(
    device: str,
    directory: str,
    options: tuple[str, ...],
    read_only: bool,
    writable: bool,
    fake: bool,
    sloppy: bool,
    ignored: bool,
    kind: str | None,
) -> None:
    """Mount DEVICE at DIRECTORY, as mount(8) asks for it. Exit codes: 0 mounted, 1 failed."""
    words = [*options, *(["ro"] if read_only else []), *(["rw"] if writable else [])]
    if fake:
        from extfs import daemon

        try:
            daemon.parse_options(device, directory, ",".join(words))
        except daemon.MountError as error:
            raise CommandError(str(error)) from error
        return
    mount_device(mount_options(device, directory, ",".join(words)), foreground=False)


def _program() -> Path:
    """The installed `extfs` that belongs to this interpreter."""
    program = Path(sys.executable).with_name("extfs")
    if not os.access(program, os.X_OK):
        raise CommandError(f"{program} is not there: install the package first")
    return program


@click.command("install-helpers")
@click.option(
    "--prefix", default="/sbin", show_default=True, metavar="DIR", help="Where mount(8) looks."
)
@click.option("--remove", is_flag=True, help="Take the links away again.")
def install_helpers(prefix: str, remove: bool) -> None:
    """Link mkfs.extfs, fsck.extfs and mount.extfs into DIR.

    Then `mkfs -t extfs`, `fsck -t extfs`, `mount -t extfs` and /etc/fstab work. Links are only
    replaced when they are such links.
    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    program = _program()
    for name in NAMES:
        link = Path(prefix) / name
        if link.is_symlink() and Path(os.readlink(link)).name == "extfs":
            link.unlink()
        elif os.path.lexists(link):
            raise CommandError(f"{link} exists and is not a link to extfs")
        if not remove:
            link.symlink_to(program)
