"""mount and umount."""

from __future__ import annotations

import errno
import logging
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from extfs.cli.mounts import Daemons, detach, find_mount
from extfs.cli.output import CommandError, complain

if TYPE_CHECKING:
    from extfs.daemon import MountOptions

DEAD_DAEMON_SECONDS = 60.0


def _clear_dead_mount(device: str, mountpoint: str) -> None:
    """Take away what a daemon that died left at the mountpoint; wait until it is really gone."""
    try:
        os.statvfs(mountpoint)  # not stat: the kernel may still know that
        return
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            return  # the daemon's own checks tell it better
    mount = find_mount(mountpoint)
    if mount is None:
        raise CommandError(
            f"{mountpoint}: a dead mount that is not of extfs is in the way; unmount it first"
        )
    complain(f"{mountpoint}: the daemon of {mount.source} died; cleaning up its mount")
    try:
        detach(mountpoint, lazy=True)
    except OSError as error:
        raise CommandError(f"{mountpoint}: cannot be cleaned up: {error.strerror}") from error
    for source in {mount.source, device}:
        # Its I/O may still be in flight; the process is there until that has ended.
        daemons = Daemons(source, serving=False)
        if not daemons.wait(DEAD_DAEMON_SECONDS):
            raise CommandError(f"{source}: a process still has it open; wait until it has ended")
        daemons.close()


def _check_environment(mountpoint: str) -> None:
    if os.geteuid() != 0:
        raise CommandError("mounting needs root")
    if not os.path.exists("/dev/fuse"):
        raise CommandError("there is no /dev/fuse (is the fuse module loaded?)")
    try:
        os.lstat(mountpoint)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandError(f"{mountpoint}: {error.strerror}") from error
    except OSError:
        pass  # what a dead daemon left answers nothing, and is there


class _Warnings(logging.Handler):
    """What the daemon says before it goes to the background, but for the error it ends with."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName != "_background":
            complain(record.getMessage())


def _show_warnings() -> None:
    logger = logging.getLogger()
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    logger.addHandler(_Warnings(logging.WARNING))


def mount_options(
    device: str,
    mountpoint: str,
    words: str,
    nfs: str | None = None,
    exports: tuple[str, ...] = (),
) -> MountOptions:
    """What the command line says. `click.UsageError`."""
    from extfs import daemon

    try:
        options = daemon.parse_options(device, mountpoint, words)
        if nfs is not None:
            options = replace(options, nfs=daemon.parse_nfs(nfs, exports))
        elif exports:
            raise click.UsageError("--export says what --nfs serves; there is no --nfs")
    except daemon.MountError as error:
        raise click.UsageError(str(error)) from error
    return options


def mount_device(options: MountOptions, foreground: bool) -> None:
    """Mount; returns when it can be used, in the foreground when it has been unmounted."""
    from extfs import daemon

    device, mountpoint = options.device, options.mountpoint
    try:
        _check_environment(mountpoint)
        _clear_dead_mount(device, mountpoint)
        if find_mount(mountpoint) is not None:
            raise CommandError(f"{mountpoint}: something is mounted there already")
        if foreground:
            logging.basicConfig(
                stream=sys.stderr, level=logging.INFO, format="extfs: %(levelname)s %(message)s"
            )
            daemon.run(options)
        else:
            _show_warnings()
            daemon.start(options)
    except daemon.MountError as error:
        raise CommandError(str(error)) from error


@click.command()
@click.argument("device", required=False)
@click.argument("mountpoint", required=False)
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Comma-separated, see above.")
@click.option(
    "--nfs",
    is_flag=False,
    flag_value="127.0.0.1:2049",
    metavar="[ADDRESS:PORT]",
    help="Serve NFSv4.1 and 4.2 there (127.0.0.1:2049).",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="PATH[:OPTIONS]",
    help="A directory that NFS clients see, see below; once for each.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="Everything from a TOML file instead, see extfs.toml(5).",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Preempt the server that has the device reserved and is not heard of any more.",
)
@click.option("--foreground", is_flag=True, help="Stay; log to standard error; end when unmounted.")
def mount(
    device: str | None,
    mountpoint: str | None,
    options: tuple[str, ...],
    nfs: str | None,
    exports: tuple[str, ...],
    config: str | None,
    take_over: bool,
    foreground: bool,
) -> None:
    """Mount the filesystem on DEVICE at the directory MOUNTPOINT.

    \b
    Options:
      ro, rw                        read-only or not
      relatime, noatime, strictatime, nodiratime
      nosuid, nodev, noexec
      cache=SIZE                    memory for metadata (a 32nd of the memory, 64M to 1G)
      inode_cache=N                 unused inodes kept in memory (16384); both shrink to an eighth
                                    while memory is short
      early_writes=SIZE             memory for data of buffered writes that are answered before it
                                    is on the device, as a page cache does; 0: none are (16M)
      commit=SECONDS                changes are durable after at most this long (1)
      threads=N                     threads that serve requests (one for each CPU; without
                                    io_uring up to 4)
      transport=auto|uring|classic  how requests come from the kernel: over io_uring if it is
                                    switched on (/sys/module/fuse/parameters/enable_uring),
                                    else by /dev/fuse (auto); or only so, or only so
      idle_poll=auto|on|off         while requests follow one another, idle CPUs poll instead of
                                    halting, all of them: off, on, or on where a halt leaves a
                                    virtual machine (cpuidle driver haltpoll) of up to 8 CPUs (auto)
      writeback_cache               let the kernel keep written data for a while; only when
                                    nothing but this mount changes the files; no layouts
      recall=SECONDS                time that layout holders have to answer a recall (10)
      fence=WAY                     what confirms that a holder which did not answer cannot reach
                                    the device any more, so that its blocks may be used again:
                                      observe        its cgroup is empty, if it named one (default)
                                      cgroup         the same, after its processes were killed
                                      command:/PATH  a program, run for each, exits with 0; its
                                                     environment has EXTFS_HOLDER, EXTFS_KIND,
                                                     EXTFS_NAME, EXTFS_UID, EXTFS_PID,
                                                     EXTFS_PID_START, EXTFS_BOOT_ID, EXTFS_FENCE,
                                                     EXTFS_FENCE_KEY, EXTFS_QUARANTINED (blocks),
                                                     EXTFS_DEVICE, EXTFS_MOUNTPOINT, EXTFS_UUID
                                      none           only `extfs layout fence`
                                    Holders of before a restart of the daemon have the time of a
                                    recall to come back, before they are killed or the program runs.
    \b
    Options of an export, with commas between them:
      NETWORK                       10.0.0.0/8, ::1: whose clients see it (this machine only)
      ro, rw                        read-only or not (ro)
      root_squash, no_root_squash, all_squash, anonuid=N, anongid=N
      insecure                      also from ports that any user may use
      layouts=none, layouts=block, layouts=block@NETWORK
                                    whose hosts reach the disk and are given its blocks (none)
      layouts=scsi, layouts=scsi@NETWORK
                                    the same of a disk with persistent reservations, which this
                                    mount takes: a host that does not answer is shut out by it
      sec=sys

    Words for /etc/fstab (defaults, auto, noauto, nofail, _netdev, x-...) are accepted and ignored.

    What a daemon that died left at MOUNTPOINT is cleaned up first.
    Exit codes: 0 mounted (--foreground: unmounted cleanly), 1 failed, 2 wrong usage.
    """
    if config is not None:
        from extfs.cli.configuration import read_configuration

        if device or options or nfs or exports:
            raise click.UsageError("--config says everything: no DEVICE, -o, --nfs, --export")
        configured = read_configuration(config)
        if take_over:
            configured = replace(configured, take_over=True)
        mount_device(configured, foreground)
        return
    if device is None or mountpoint is None:
        raise click.UsageError("DEVICE and MOUNTPOINT are missing")
    words = ",".join([*options, "take_over"] if take_over else options)
    mount_device(mount_options(device, mountpoint, words, nfs, exports), foreground)


@click.command()
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="Detach now although it is in use; do not wait.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, and wait until everything is written and the daemon is gone.

    Exit codes: 0 unmounted, 1 failed (in use, not mounted), 2 wrong usage.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        raise CommandError(f"{mountpoint}: no extfs is mounted there")
    daemons = Daemons(mount.source)
    try:
        detach(mountpoint, lazy=lazy)
    except OSError as error:
        text = "it is in use" if error.errno == errno.EBUSY else error.strerror
        raise CommandError(f"{mountpoint}: cannot be unmounted: {text}") from error
    if lazy:
        return
    if not daemons.wait(10):
        complain(f"{mountpoint}: waiting until {mount.source} is written")
        daemons.wait()
    daemons.close()
