"""A server on a unit that can fence, for the tests of SCSI layouts; keys are counted up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from extfs.core import ROOT_INODE, Filesystem, HolderRecord
from extfs.nfs import constants as n
from extfs.nfs.scsi_layout import ScsiIdentity
from extfs.nfs.service import ServiceOptions
from nfs.conftest import World
from nfs.layout_calls import SCSI_TYPE, File, answer, events, open_file, take_recall
from nfs.wire import Session, make_service

NAA = bytes.fromhex("6001405a1b2c3d4e5f60718293a4b5c6")
EXPORT = "/:127.0.0.0/8,10.0.0.0/8,rw,insecure,no_root_squash,layouts=scsi"
FIRST_KEY = 0xE5F5_0000_0000_1001
OVER = 11_000_000_000
"""More than the time of a recall, in nanoseconds."""


@dataclass(frozen=True)
class Name:
    """A designator."""

    kind: str = "naa"
    data: bytes = NAA
    code_set: int = 1


def unit(offset: int = 0, new_key: Callable[[], int] | None = None) -> ScsiIdentity:
    numbers = itertools.count(FIRST_KEY)
    return ScsiIdentity(Name(), offset, new_key or (lambda: next(numbers)))


def scsi_world(world: World, *exports: str, identity: ScsiIdentity | None = None) -> World:
    """The same filesystem, served as a unit."""
    options = ServiceOptions(unit=identity or unit())
    service, runner = make_service(world.fs, exports or (EXPORT,), options)
    world.fs.layouts.set_clock(1)
    return World(world.fs, service, runner, world.sim)


def session(world: World, owner: bytes = b"one", host: str = "127.0.0.1", **how: bytes) -> Session:
    return Session(world.service, owner, how.get("verifier", b"boot"), host)


def scsi_file(of: Session, name: bytes = b"file") -> File:
    return open_file(of, name, kind=SCSI_TYPE)


def holder(world: World, owner: bytes = b"one") -> HolderRecord:
    """The holder of a client, as the core has it."""
    client = world.service.clients.living(owner)
    assert client is not None
    record = world.fs.layouts.holder(client.holder_id)
    assert record is not None
    return record


def ino_of(fs: Filesystem, name: bytes = b"file") -> int:
    return fs.lookup(ROOT_INODE, name).ino


def miss_a_recall(world: World, name: bytes = b"file", block: int = 0) -> None:
    """Somebody wants a block of a file back, and the client does not answer in time."""
    world.fs.layouts.recall(ino_of(world.fs, name), block * 4096, 4096)
    events(world)
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.settle()


def has_nothing(of: Session, status: int = n.NFS4ERR_NOMATCHING_LAYOUT) -> None:
    """The client is asked for all of its layouts, and answers."""
    callback, recall = take_recall(of)
    assert (recall.kind, recall.layout_type) == (n.LAYOUT4_RET_REC_ALL, SCSI_TYPE)
    answer(of.wire, callback, status)


def fence(world: World, number: int) -> None:
    """The storage refuses the holder; the core releases what it had."""
    world.fs.layouts.fenced(number)
    world.fs.layouts.settle()
