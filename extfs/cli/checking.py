"""fsck and dump."""

from __future__ import annotations

import click

from extfs.cli.output import CommandError, complain, print_json, progress, write_tree

_SHOWN = 200
EXIT_OPERATIONAL = 8


def check_device(device: str, repair: bool, as_json: bool) -> int:
    """Run fsck, print what it found; returns the exit code. CommandError with exit code 8."""
    from extfs.check.fsck import fsck as run
    from extfs.check.volume import DamageError, VolumeError

    try:
        with progress() as step:
            result = run(device, repair=repair, progress=step)
    except (VolumeError, DamageError) as error:
        raise CommandError(str(error), EXIT_OPERATIONAL) from error
    if as_json:
        print_json({"device": device} | result.as_json())
        return result.exit_code
    left = result.report
    for finding in result.repaired[:_SHOWN]:
        click.echo(f"{finding.where}: {finding.text}: repaired ({finding.repair}) [{finding.code}]")
    _more(len(result.repaired))
    for finding in left.findings[:_SHOWN]:
        how = "note: " if finding.severity.value == "note" else ""
        if not how and not repair:
            how = "" if finding.repair else "not repairable: "
        click.echo(f"{finding.where}: {how}{finding.text} [{finding.code}]")
    _more(len(left.findings))
    for message in result.messages:
        complain(message)
    click.echo(f"{device}: {_summary(result.exit_code, left.errors, left.repairable, repair)}")
    facts = left.facts
    if facts:
        click.echo(
            f"{device}: {facts['inodes']:,} inodes, {facts['extents']:,} extents, "
            f"{facts['nodes']:,} tree nodes, {facts['free_blocks']:,} of "
            f"{facts['total_blocks']:,} blocks free"
        )
    return result.exit_code


def _more(count: int) -> None:
    if count > _SHOWN:
        click.echo(f"... and {count - _SHOWN:,} more (all of them: --json)")


def _summary(code: int, errors: int, repairable: int, repair: bool) -> str:
    if code == 0:
        return "clean"
    if code == 1:
        return "repaired, now clean"
    if repair:
        return f"{errors:,} errors are left"
    return f"{errors:,} errors; --repair can put {repairable:,} of them right"


@click.command()
@click.argument("device")
@click.option("--repair", is_flag=True, help="Put right what needs no guess.")
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
def fsck(device: str, repair: bool, as_json: bool) -> int:
    """Check the filesystem on DEVICE, which must not be mounted.

    Without --repair nothing is written: a journal that has to be replayed is replayed in memory.
    With it, that is written first; then counts, links, reference counts, free space, superblock
    copies and journal headers are put right, files without a name appear in lost+found.
    Interrupted repairs do no harm: run it again.

    Exit codes: 0 clean, 1 errors repaired, 4 errors left, 8 could not check, 16 wrong usage.
    """
    return check_device(device, repair, as_json)


@click.command()
@click.argument("device")
@click.argument("what", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def dump(device: str, what: tuple[str, ...], as_json: bool) -> None:
    """Print structures of DEVICE as they are on it, the journal replayed in memory.

    \b
    WHAT:
      super, heartbeat, root, journal
      ag N                  allocation group and its free extents
      inode N, dir N, extents N
      node BLOCK, block BLOCK
      tree NAME             inode, extent, dirent, xattr, symlink, refcount, orphan, intent,
                            quarantine, holder, fence, exposure, nfs-client

    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    from extfs.check.dump import DumpError
    from extfs.check.dump import dump as read
    from extfs.check.mapping import Image
    from extfs.check.volume import DamageError, VolumeError

    try:
        with Image(device) as image:
            found = read(image, list(what))
    except VolumeError as error:
        raise CommandError(error.text) from error
    except DamageError as error:
        raise CommandError(f"{device}: {error}") from error
    except DumpError as error:
        raise CommandError(str(error)) from error
    if as_json:
        print_json(found)
    else:
        write_tree(found)
