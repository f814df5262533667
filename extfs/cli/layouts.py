"""layout: get, commit, return, list, recall, fence - the control calls, for people."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from extfs.cli.mounts import all_mounts
from extfs.cli.output import (
    CommandError,
    SizeType,
    complain,
    parse_size,
    print_json,
    size_text,
    write_table,
)

if TYPE_CHECKING:
    from extfs.control.client import Descriptor, Event, Grant, Holder, Layout

BLOCK_SIZE = 4096
_MODES = {"read": 1, "rw": 2, "any": 3, "pin": 4}
_TO_THE_END = (1 << 64) - 1
PIN_MAX_MS = 60_000
_LOOK_SECONDS = 1.0

_MEANINGS = {
    errno.ENOTTY: "not a regular file on a mounted extfs",
    errno.EAGAIN: "somebody else has a layout of it, or it is being recalled: try --wait",
    errno.EACCES: "only root and the owner of the file may do that",
    errno.EPERM: "only root may do that",
    errno.ENXIO: "the holder does not hold this range (any more); nothing was changed",
    errno.ERANGE: "the size lies outside of what the holder has",
    errno.EKEYREJECTED: "this is not the key of the holder",
    errno.EOWNERDEAD: "the holder is lost: `extfs layout return --all` says that it has stopped",
    errno.EOPNOTSUPP: "the filesystem is mounted with writeback_cache: there are no layouts",
    errno.EROFS: "the filesystem is mounted read-only",
    errno.ESTALE: "the file is gone",
}


@contextlib.contextmanager
def _explained(**more: str) -> Iterator[None]:
    """OSErrors of control calls as CommandErrors; `more`: meanings of errnos by their names."""
    meanings = _MEANINGS | {getattr(errno, name): text for name, text in more.items()}
    try:
        yield
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        text = meanings.get(error.errno or 0, error.strerror or str(error))
        raise CommandError(f"{name}{text}") from error


# ---- parameters --------------------------------------------------------------------------------


class _NumberType(SizeType):
    """An id or key: decimal, or hexadecimal with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to number."""
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{value!r} is not a number of 64 bits", param, ctx)
        return number


def parse_range(text: str) -> tuple[int, int]:
    """(offset, length) of "OFFSET:LENGTH", both with units; ValueError."""
    offset, colon, length = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not OFFSET:LENGTH")
    return parse_size(offset), parse_size(length)


def _ranges(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    try:
        return [parse_range(text) for text in texts]
    except ValueError as error:
        raise click.UsageError(str(error)) from error


_OFFSET = click.option("--offset", type=SizeType(), default=0, metavar="SIZE", help="Default 0.")
_LENGTH = click.option(
    "--length", type=SizeType(), metavar="SIZE", help="Default: to the end of the file."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON; all numbers in bytes.")
HOLDER_ID = _NumberType()
_HOLDER = click.option(
    "--holder",
    type=_NumberType(),
    envvar="EXTFS_HOLDER",
    required=True,
    metavar="ID",
    help="As `layout get` told. Or in the environment: EXTFS_HOLDER.",
)
_KEY = click.option(
    "--key",
    type=_NumberType(),
    envvar="EXTFS_KEY",
    required=True,
    metavar="KEY",
    help="The same: EXTFS_KEY.",
)


@click.group()
def layout() -> None:
    """Take, give back and look at layouts: extents of files that somebody reads and writes himself.

    A layout belongs to a holder, and a holder to the process that has made it: `get` holds what it
    got until it ends. Meanwhile whoever knows the holder's id and key speaks for it, so what was
    written to the device is committed, and parts are returned, with `commit` and `return` from
    another terminal. What a `get` that was killed leaves behind is ended by `return --all`, if
    nobody writes to the device any more, or by `fence`, which root confirms.
    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """


# ---- get ---------------------------------------------------------------------------------------


def _extent_rows(layouts: list[Layout]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for extent in (extent for answer in layouts for extent in answer.extents):
        address = extent.state.name != "NONE_DATA"
        rows.append(
            (
                f"{extent.offset:,}",
                size_text(extent.length),
                f"{extent.physical:,}" if address else "-",
                f"{extent.physical // BLOCK_SIZE:,}" if address else "-",
                extent.state.name,
            )
        )
    return rows


def _got_json(path: str, holder: Holder, layouts: list[Layout]) -> dict[str, Any]:
    return {
        "file": path,
        "holder": holder.id,
        "key": holder.key,
        "recall_ms": holder.recall_ms,
        "iomode": layouts[0].iomode.name.lower(),
        "offset": layouts[0].offset,
        "length": layouts[-1].next - layouts[0].offset,
        "seq": layouts[-1].seq,
        "file_size": layouts[-1].file_size,
        "extents": [
            {
                "offset": extent.offset,
                "physical": extent.physical,
                "length": extent.length,
                "state": extent.state.name,
            }
            for answer in layouts
            for extent in answer.extents
        ],
    }


def _show_got(path: str, holder: Holder, layouts: list[Layout]) -> None:
    first, last = layouts[0], layouts[-1]
    click.echo(
        f"{path}: {first.iomode.name} layout of {size_text(last.next - first.offset)} "
        f"at offset {first.offset:,}"
    )
    write_table(("file offset", "length", "device offset", "block", "state"), _extent_rows(layouts))
    click.echo(f"export EXTFS_HOLDER={holder.id} EXTFS_KEY={holder.key:#018x}")


class _Ended(Exception):  # noqa: N818 - not an error
    """SIGTERM came."""


def _ended(number: int, frame: FrameType | None) -> None:
    raise _Ended


def _span(event: Event) -> str:
    if event.length > 1 << 62:
        return f"from offset {event.offset:,} on"
    return f"{size_text(event.length)} at offset {event.offset:,}"


def _obey(holder: Holder, event: Event, answer: bool) -> bool:
    """What an event asks for. False: something was taken away."""
    kind = event.type.name
    if kind == "RECALL":
        if answer:
            holder.give_back(event.offset, event.length)
            complain(f"recalled and returned: {_span(event)}")
        else:
            complain(f"recalled, to be returned in {event.left_ms / 1000:g} s: {_span(event)}")
    elif kind == "OVERFLOW":
        complain(f"{event.length} events were lost")
    else:
        complain(f"{kind.lower().replace('_', ' ')}: {_span(event)}")
    return kind not in ("REVOKED", "OVERFLOW")


def _hold(descriptor: Descriptor, holder: Holder, seconds: float | None, answer: bool) -> bool:
    """Until time is over, a signal, or nothing is left. False: something was taken away."""
    deadline = None if seconds is None else time.monotonic() + seconds
    kept = True
    with contextlib.suppress(KeyboardInterrupt, _Ended):
        while deadline is None or time.monotonic() < deadline:
            # Others may return it in this holder's name, which is no event.
            left = _LOOK_SECONDS if deadline is None else deadline - time.monotonic()
            for event in descriptor.wait_events(min(left, _LOOK_SECONDS)):
                kept = _obey(holder, event, answer) and kept
            if not any(grant.holder == holder.id for grant in descriptor.grants()):
                complain("nothing is held any more")
                break
    return kept


@layout.command()
@click.argument("file")
@click.option(
    "--for",
    "mode",
    type=click.Choice(["read", "rw", "pin"]),
    default="read",
    show_default=True,
    help="rw allocates what is missing; pin freezes the map and the contents.",
)
@_OFFSET
@_LENGTH
@click.option("--atomic", is_flag=True, help="rw: all new blocks; one commit swaps them in.")
@click.option("--wait", is_flag=True, help="Recall what is in the way, and wait for that.")
@click.option(
    "--hold",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Hold it so long; default: until Ctrl-C or SIGTERM.",
)
@click.option("--name", default="extfs layout get", metavar="TEXT", help="Whom `list` names.")
@click.option(
    "--fence",
    default="",
    metavar="cgroup:/PATH",
    help="The holder runs in this cgroup, and may be killed with it.",
)
@click.option(
    "--on-recall",
    type=click.Choice(["return", "tell"]),
    help="Return what is recalled (default for read and pin), or only tell it (for rw).",
)
@_JSON
def get(
    file: str,
    mode: str,
    offset: int,
    length: int | None,
    atomic: bool,
    wait: bool,
    hold: float | None,
    name: str,
    fence: str,
    on_recall: str | None,
    as_json: bool,
) -> int:
    """Get a layout of FILE, print its extents, and hold it. Then return it, without a commit.

    What is recalled of a layout for writing is told on standard error: stop writing there,
    `commit` it, and `return` it, or end this, in time. Else it is revoked: the file keeps what was
    committed, and the holder is lost. A pin ends after its time, at most 60 s.
    Exit codes: 0 got, held and returned, 1 failed, or it was revoked, 2 wrong usage.
    """
    from extfs.control.client import Descriptor

    if atomic and mode != "rw":
        raise click.UsageError("--atomic goes with --for rw")
    if length == 0:
        raise click.UsageError("a length of 0 holds nothing")
    on_recall = on_recall or ("tell" if mode == "rw" else "return")
    signal.signal(signal.SIGTERM, _ended)
    try:
        with (
            _explained(EPERM="that cgroup is not yours", EBADF="not writable"),
            Descriptor.of(file, write=mode != "read") as descriptor,
        ):
            if length is None:
                length = os.fstat(descriptor.fileno()).st_size - offset
                if length <= 0:
                    raise CommandError(f"{file}: ends there: --length says how much is wanted")
            holder = descriptor.register(name, fence=fence)
            try:
                layouts = _got(holder, mode, (offset, length), hold, wait=wait, atomic=atomic)
                if as_json:
                    print_json(_got_json(file, holder, layouts))
                else:
                    _show_got(file, holder, layouts)
                sys.stdout.flush()
                kept = _hold(descriptor, holder, hold, on_recall == "return")
            finally:
                with contextlib.suppress(OSError):  # lost meanwhile, or unmounted
                    holder.give_all_back()
                    holder.gone()
    except (_Ended, KeyboardInterrupt):
        return 0
    return 0 if kept else 1


def _got(
    holder: Holder,
    mode: str,
    span: tuple[int, int],
    seconds: float | None,
    *,
    wait: bool,
    atomic: bool,
) -> list[Layout]:
    from extfs.control.client import Iomode

    iomode = Iomode(_MODES[mode])
    if iomode is not Iomode.PIN:
        return holder.get_all(iomode, *span, wait=wait, atomic=atomic)
    time_ms = PIN_MAX_MS if seconds is None else min(PIN_MAX_MS, max(1, round(seconds * 1000)))
    return [holder.get(iomode, *span, time_ms=time_ms, wait=wait)]


# ---- commit, return ----------------------------------------------------------------------------


@layout.command()
@click.argument("file")
@_HOLDER
@_KEY
@click.option(
    "--range", "texts", multiple=True, metavar="OFFSET:LENGTH", help="What was written; repeatable."
)
@click.option("--size", type=SizeType(), default=0, metavar="SIZE", help="The file grows to this.")
@click.option("--lazy", is_flag=True, help="Durable only with the next fsync(2) of the file.")
@_JSON
def commit(
    file: str,
    holder: int,
    key: int,
    texts: tuple[str, ...],
    size: int,
    lazy: bool,
    as_json: bool,
) -> None:
    """Say that these ranges of FILE were written to the device, wholly. Now others see them.

    Ranges are whole blocks, within what the holder has for writing. Everything is committed, or
    nothing. A range that was not written shows what the device held before: commit only what was.
    Exit codes: 0 committed, 1 refused or failed, 2 wrong usage.
    """
    from extfs.control.client import Descriptor

    ranges = _ranges(texts)
    if not ranges and not size:
        raise click.UsageError("nothing to commit: --range OFFSET:LENGTH, --size SIZE or both")
    with (
        _explained(ENOENT=f"{file}, or holder {holder}, does not exist"),
        Descriptor.of(file, write=True) as descriptor,
    ):
        now = descriptor.holder(holder, key).commit(ranges, file_size=size, lazy=lazy)
    written = sum(length for _, length in ranges)
    if as_json:
        print_json({"file": file, "committed": written, "file_size": now})
    else:
        click.echo(f"{file}: {size_text(written)} committed, the file has {size_text(now)}")


@layout.command("return")
@click.argument("file")
@_HOLDER
@_KEY
@_OFFSET
@_LENGTH
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Everything that the holder has, of all files: it has stopped, and ends.",
)
def give_back(
    file: str, holder: int, key: int, offset: int, length: int | None, everything: bool
) -> None:
    """Return a range of FILE: nobody reads or writes it on the device any more.

    What was not committed is not part of the file. With --all FILE only says which filesystem; a
    holder that was lost (killed, or before a restart) ends this way too.
    Exit codes: 0 returned, 1 failed, 2 wrong usage.
    """
    from extfs.control.client import Descriptor

    with (
        _explained(
            ENOENT=f"{file}, or holder {holder}, does not exist",
            EINVAL="not whole blocks, or a part of an atomic layout",
        ),
        Descriptor.of(file) as descriptor,
    ):
        speaker = descriptor.holder(holder, key)
        if not everything:
            speaker.give_back(offset, _TO_THE_END if length is None else length)
            return
        speaker.give_all_back()
        # Whoever else speaks for it may have ended it, or got something new.
        with contextlib.suppress(OSError):
            speaker.gone()


# ---- list, recall, fence -----------------------------------------------------------------------


def _grant_json(grant: Grant) -> dict[str, Any]:
    return {
        "holder": grant.holder,
        "offset": grant.offset,
        "length": grant.length,
        "iomode": grant.iomode.name.lower(),
        "seq": grant.seq,
        "atomic": grant.atomic,
    }


@layout.command("list")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_JSON
def list_grants(files: tuple[str, ...], as_json: bool) -> None:
    """Print the layouts of each FILE: who holds which range, and for what.

    `extfs status MOUNTPOINT` says more about the holders.
    Exit codes: 0 told, 1 failed, 2 wrong usage.
    """
    from extfs.control.client import Descriptor

    found: dict[str, list[Grant]] = {}
    for file in files:
        with _explained(), Descriptor.of(file) as descriptor:
            found[file] = list(descriptor.grants())
    if as_json:
        print_json(
            [
                {"file": file, "layouts": [_grant_json(grant) for grant in grants]}
                for file, grants in found.items()
            ]
        )
        return
    rows = [
        (
            str(grant.holder),
            f"{grant.offset:,}",
            "to the end" if grant.length > 1 << 62 else size_text(grant.length),
            grant.iomode.name + (", atomic" if grant.atomic else ""),
            file,
        )
        for file, grants in found.items()
        for grant in grants
    ]
    write_table(("holder", "file offset", "length", "for", "file"), rows)
    if not rows:
        click.echo("no layouts")


@layout.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_OFFSET
@_LENGTH
@click.option("--holder", type=_NumberType(), default=0, metavar="ID", help="Only this one.")
@click.option(
    "--for",
    "mode",
    type=click.Choice(["read", "rw", "pin", "any"]),
    default="any",
    show_default=True,
    help="Only layouts of this kind.",
)
def recall(files: tuple[str, ...], offset: int, length: int | None, holder: int, mode: str) -> None:
    """Have the holders of layouts of each FILE asked to return them. Does not wait for them.

    Who does not answer within the recall time of the mount loses them.
    Exit codes: 0 asked, 1 failed, 2 wrong usage.
    """
    from extfs.control.client import Descriptor, Iomode

    for file in files:
        with _explained(), Descriptor.of(file) as descriptor:
            descriptor.recall(
                offset,
                _TO_THE_END if length is None else length,
                iomode=Iomode(_MODES[mode]),
                holder=holder,
            )


def _mountpoint(given: str | None) -> str:
    if given is not None:
        return given
    found = all_mounts()
    if len(found) != 1:
        raise click.UsageError(f"{len(found)} filesystems are mounted: --mount says which is meant")
    return found[0].mountpoint


@layout.command()
@click.argument("holders", nargs=-1, required=True, type=_NumberType(), metavar="HOLDER...")
@click.option("--mount", "mountpoint", metavar="MOUNTPOINT", help="Default: the only one there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def fence(holders: tuple[int, ...], mountpoint: str | None, yes: bool) -> None:
    """Confirm that each lost HOLDER cannot reach the device any more. Its blocks become free.

    Only root may, and only who knows: a holder that still writes would write into whatever these
    blocks are used for next. `extfs status` lists the holders that wait for this.
    Exit codes: 0 confirmed, 1 failed, or not confirmed, 2 wrong usage.
    """
    confirm_fenced(_mountpoint(mountpoint), holders, yes=yes)


def confirm_fenced(path: str, holders: tuple[int, ...], *, yes: bool) -> None:
    """Tell the filesystem mounted at `path` that these holders are cut off; `yes`: do not ask."""
    from extfs.control.client import Descriptor

    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("--yes is needed where nobody can be asked")
        who = ", ".join(map(str, holders))
        if not click.confirm(f"Is it certain that holder {who} cannot write to the device?"):
            raise CommandError("not confirmed")
    with (
        _explained(ENOENT=f"{path}: no extfs is mounted there"),
        Descriptor.control(path) as control,
    ):
        for holder in holders:
            with _explained(
                ENOENT=f"there is no holder {holder}", EBUSY=f"holder {holder} is not lost"
            ):
                control.fenced(holder)
            click.echo(f"holder {holder} is fenced")
