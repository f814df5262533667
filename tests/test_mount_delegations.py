"""Delegations and local users of a mount: who waits for whom, and how waiting ends.

The mount and the server's side are one process (`Server`), in virtual time; local users are others.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import rundir
from conftest import ExtfsRunner
from faults import wait_for
from mounted_core import MountedCore, RefusedError, mounted_as

from extfs.control.client import Descriptor
from extfs.control.client import Iomode as LocalIomode

pytestmark = pytest.mark.fuse

RECALL_MS = 10_000
QUIET = 0.3
"""Seconds after which somebody who has said nothing is taken to wait."""

# What the server's process has besides.
SERVER = """
fs.layouts.set_clock(10**12)

def client():
    return fs.layouts.register(HolderSpec("client", HolderKind.CLIENT))[0]

def forward(ms):
    fs.layouts.set_clock(fs.layouts.now() + ms * 1000000)
    fs.layouts.settle()

def may_have(ino, holder, write):
    try:
        fs.delegations.grant(ino, holder, write)
    except CoreError as error:
        assert error.name == "EAGAIN", error
        return False
    fs.delegations.give_back(ino, holder)
    return True

def give_all_back(holder):
    for delegation in fs.delegations.of(holder):
        fs.delegations.give_back(delegation.ino, holder)

def events():
    return [[e.type.name, e.holder, e.ino, e.grant_seq] for e in fs.layouts.events()]
"""


class Server(MountedCore):
    """The process that mounts, and what the tests ask it for."""

    def file(self, name: str, text: bytes = b"text") -> tuple[Path, int]:
        """A new file with contents that nobody has open: its path and number."""
        path = self.mountpoint / name
        path.write_bytes(text)
        ino = path.stat().st_ino
        closed(self, ino)
        return path, ino

    def grant(self, ino: int, holder: int, write: bool) -> int:
        return int(self(f"fs.delegations.grant({ino}, {holder}, {write})"))

    def give_back(self, ino: int, holder: int) -> None:
        self(f"fs.delegations.give_back({ino}, {holder})")

    def counter(self, name: str) -> int:
        return int(self(f"fs.layouts.counters()[{name!r}]"))

    def events(self) -> list[list[Any]]:
        found: list[list[Any]] = self("events()")
        return found

    def recalled(self, ino: int, holder: int, number: int) -> None:
        """Waits until exactly one recall was sent, of this delegation.

        Before that the kernel may have looked at the file's attributes, to see who may do what.
        """
        found: list[list[Any]] = []

        def come() -> bool:
            found.extend(e for e in self.events() if e[0] != "DELEGATION_ATTRS")
            return bool(found)

        wait_for(come, "a recall")
        assert found == [["DELEGATION_RECALL", holder, ino, number]]


@pytest.fixture
def server(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> Iterator[Server]:
    extfs("mkfs", loop_device)
    more = mounted_as(Server, loop_device, run_directory, recall_ms=RECALL_MS, more=SERVER)
    with more as served:
        yield served


class User:
    """A process that says "go", runs a statement, and says how it ended."""

    PROGRAM = """
import os, signal, sys
class Alarm(Exception): pass
def alarm(*args): raise Alarm
signal.signal(signal.SIGUSR1, alarm)
signal.signal(signal.SIGUSR2, lambda *args: None)
path = sys.argv[1]
print("go", flush=True)
try:
    exec(sys.argv[2])
except OSError as error:
    print(f"errno {error.errno}", flush=True)
except Alarm:
    print("alarm", flush=True)
else:
    print("done", flush=True)
"""

    def __init__(self, path: Path, statement: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, path, statement],
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.line() == "go"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "it says nothing"
        return self.process.stdout.readline().strip()

    def waits(self) -> bool:
        return not select.select([self.process.stdout], [], [], QUIET)[0]


READS = "os.close(os.open(path, os.O_RDONLY))"
WRITES = "os.close(os.open(path, os.O_WRONLY))"
CHANGES = {
    "open to write": WRITES,
    "open to do both": "os.close(os.open(path, os.O_RDWR))",
    "open and empty": "os.close(os.open(path, os.O_RDONLY | os.O_TRUNC))",
    "create what is there": "os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))",
    "truncate": "os.truncate(path, 1)",
    "chmod": "os.chmod(path, 0o600)",
    "chown": "os.chown(path, 1, 1)",
    "times": "os.utime(path, (1, 1))",
    "set an attribute": "os.setxattr(path, 'user.new', b'value')",
    "remove an attribute": "os.removexattr(path, 'user.old')",
    "unlink": "os.unlink(path)",
    "rename": "os.rename(path, path + '-new')",
    "replace": "open(path + '-other', 'w').close(); os.rename(path + '-other', path)",
    "link": "os.link(path, path + '-link')",
}


# ---- who waits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("write", [False, True], ids=["READ", "WRITE"])
def test_a_change_waits_until_it_is_given_back(server: Server, statement: str, write: bool) -> None:
    path, ino = server.file("file")
    os.setxattr(path, "user.old", b"value")
    holder = server("client()")
    number = server.grant(ino, holder, write)
    with User(path, statement) as user:
        server.recalled(ino, holder, number)
        assert user.waits()
        server(f"forward({RECALL_MS - 1})")
        assert user.waits()
        with pytest.raises(RefusedError):
            server.grant(ino, server("client()"), False)  # nobody gets between
        server.give_back(ino, holder)
        assert user.line() == "done"
    assert server.counter("delegation_recalls") == 1
    assert server.counter("delegations_revoked") == 0


def test_readers_wait_for_a_write_delegation_only(server: Server) -> None:
    path, ino = server.file("file", b"old")
    holder = server("client()")
    assert path.read_bytes() == b"old"  # the kernel has it in memory now
    closed(server, ino)
    server.grant(ino, holder, False)
    with User(path, READS) as user:
        assert user.line() == "done"
    assert server.events() == []
    closed(server, ino)
    number = server.grant(ino, holder, True)
    with User(path, "assert open(path, 'rb').read() == b'new and longer'") as user:
        server.recalled(ino, holder, number)
        assert user.waits()
        # The client writes what it has, and gives it back: that is what was waited for.
        server(f"fs.write({ino}, 0, b'new and longer')")
        server.give_back(ino, holder)
        assert user.line() == "done"
    assert server.counter("delegation_recalls_open_read") == 1


def test_who_does_not_want_to_wait(server: Server) -> None:
    """open(2): EWOULDBLOCK, with O_NONBLOCK and an incompatible lease."""
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, True)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        with pytest.raises(BlockingIOError):
            os.open(path, flags | os.O_NONBLOCK)
    server.recalled(ino, holder, number)
    server.give_back(ino, holder)
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    assert path.stat().st_size == 4


def test_what_does_not_conflict_is_not_held_up(server: Server) -> None:
    path, ino = server.file("file")
    other, _ = server.file("other")
    server.grant(ino, server("client()"), True)
    os.listdir(server.mountpoint)
    assert path.stat().st_size == 4
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.none")
    other.write_bytes(b"much longer")
    os.rename(other, str(other) + "-new")
    assert server.counter("delegation_recalls") == 0


def test_all_readers_have_to_give_back(server: Server) -> None:
    path, ino = server.file("file")
    first, second = server("client()"), server("client()")
    server.grant(ino, first, False)
    server.grant(ino, second, False)
    with User(path, WRITES) as user, User(path, "os.truncate(path, 1)") as other:
        wait_for(lambda: server.counter("delegation_recalls") == 2, "the recalls")
        server.give_back(ino, first)
        assert user.waits()
        assert other.waits()
        server.give_back(ino, second)
        assert user.line() == other.line() == "done"
    assert server.counter("delegation_recalls") == 2


def test_names_that_stand_for_the_same_file(server: Server) -> None:
    """RENAME over a hard link of a delegated file; exchange of two delegated ones."""
    path, ino = server.file("file")
    os.link(path, f"{path}-link")
    other, other_ino = server.file("other")
    holder = server("client()")
    server.grant(ino, holder, False)
    server.grant(other_ino, holder, False)
    with User(other, "os.rename(path, path.replace('other', 'file-link'))") as user:
        # One after the other: what it moves, then what it replaces.
        wait_for(lambda: server.counter("delegation_recalls") == 1, "a recall")
        server.give_back(other_ino, holder)
        wait_for(lambda: server.counter("delegation_recalls") == 2, "another recall")
        assert user.waits()
        with pytest.raises(RefusedError):
            server.grant(other_ino, holder, False)
        server.give_back(ino, holder)
        assert user.line() == "done"
    assert Path(f"{path}-link").stat().st_ino == other_ino
    server.grant(other_ino, holder, False)  # its operation has ended


# ---- how waiting ends --------------------------------------------------------------------------


def test_at_the_deadline_it_is_revoked(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, True)
    with User(path, "os.unlink(path)") as user:
        server.recalled(ino, holder, number)
        server(f"forward({RECALL_MS - 1})")
        assert user.waits()
        server("forward(1)")
        assert user.line() == "done"
    assert server.events() == [["DELEGATION_REVOKED", holder, ino, number]]
    assert not path.exists()
    with pytest.raises(RefusedError, match=str(errno.ENOENT)):
        server.give_back(ino, holder)
    assert server(f"fs.layouts.holder({holder}).state.name") == "LIVE"


def test_a_holder_that_goes_is_waited_for_no_longer(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, True)
    with User(path, READS) as user:
        server.recalled(ino, holder, number)
        server(f"fs.layouts.gone({holder})")
        assert user.line() == "done"


def test_any_signal_ends_an_open(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, True)
    for statement in (READS, CHANGES["create what is there"]):
        with User(path, statement) as user:
            wait_for(lambda: server.counter("delegation_recalls") == 1, "the recall")
            assert user.waits()
            user.process.send_signal(signal.SIGUSR1)
            assert user.line() == "alarm"
    server.recalled(ino, holder, number)
    # Nothing of them is left: the file is as it was, and can be delegated again.
    server.give_back(ino, holder)
    server.grant(ino, holder, True)
    assert server(f"fs.delegations.local_opens({ino})") == [0, 0]
    assert path.stat().st_size == 4


def test_other_calls_go_on_waiting_unless_the_caller_is_killed(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, False)
    with User(path, "os.unlink(path)") as user, User(path, "os.chmod(path, 0o600)") as killed:
        server.recalled(ino, holder, number)
        assert user.waits()
        assert killed.waits()
        for signum in (signal.SIGUSR2, signal.SIGUSR1):
            user.process.send_signal(signum)
            assert user.waits()
        killed.process.kill()
        assert killed.process.wait(10) == -signal.SIGKILL
        server.give_back(ino, holder)
        assert user.line() in ("done", "alarm")  # its handler runs after the call
    assert not path.exists()


@pytest.mark.parametrize("statement", [READS, "os.unlink(path)", CHANGES["link"]])
def test_an_aborted_mount_ends_it(server: Server, statement: str) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    number = server.grant(ino, holder, True)
    with User(path, statement) as user:
        server.recalled(ino, holder, number)
        assert user.waits()
        server("bridge.abort()")
        assert user.line().startswith("errno")


# ---- open files --------------------------------------------------------------------------------


def opens(server: Server, ino: int) -> list[int]:
    """Open files of local users: with read access, with write access."""
    found: list[int] = server(f"fs.delegations.local_opens({ino})")
    return found


def closed(server: Server, ino: int) -> None:
    """Waits for the kernel, which releases files in the background."""
    wait_for(lambda: opens(server, ino) == [0, 0], "the release")


def test_open_files_are_counted_and_stand_against_it(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")

    def may_have(write: bool) -> bool:
        return bool(server(f"may_have({ino}, {holder}, {write})"))

    reader = os.open(path, os.O_RDONLY)
    assert opens(server, ino) == [1, 0]
    assert may_have(False)
    assert not may_have(True)
    both = os.open(path, os.O_RDWR)
    assert opens(server, ino) == [2, 1]
    assert not may_have(False)
    with mmap.mmap(both, 4) as mapped:
        os.close(both)
        os.close(reader)
        mapped[:4] = b"TEXT"
        wait_for(lambda: opens(server, ino) == [1, 1], "the reader's release")
        assert not may_have(False), "there is a writable mapping"
    closed(server, ino)
    assert may_have(False)
    assert may_have(True)
    made = os.open(server.mountpoint / "made", os.O_WRONLY | os.O_CREAT)
    assert opens(server, os.fstat(made).st_ino) == [0, 1]
    os.close(made)
    assert server.counter("delegations_refused_open") == 3


def test_layouts_of_local_processes(server: Server) -> None:
    """They are taken by a handle of the control file, with nothing open."""
    path, ino = server.file("file", bytes(65536))
    holder = server("client()")
    with Descriptor.of(path) as file:
        handle = file.handle()
    closed(server, ino)
    with Descriptor.control(server.mountpoint) as control:
        local = control.register("local")
        local.get(LocalIomode.READ, 0, 4096, file=handle)
        with pytest.raises(RefusedError):
            server.grant(ino, holder, True)
        number = server.grant(ino, holder, False)
        for recall in (False, True):
            with pytest.raises(BlockingIOError):
                local.get(LocalIomode.RW, 0, 4096, file=handle, recall=recall)
            assert server.counter("delegation_recalls") == recall
        program = """
from extfs.control.client import Descriptor, FileHandle, Iomode
with Descriptor.control(path) as control:
    local = control.register("another")
    local.get(Iomode.RW, 0, 4096, file=FileHandle(*HANDLE), wait=True)
""".replace("HANDLE", repr((handle.ino, handle.generation)))
        with User(server.mountpoint, program) as user:
            server.recalled(ino, holder, number)
            assert user.waits()
            server.give_back(ino, holder)
            assert user.line() == "done"
    assert server.counter("delegations_refused_layout") == 1
    assert server.counter("delegation_recalls_write") == 1


# ---- attributes --------------------------------------------------------------------------------


def test_looks_at_a_write_delegated_file(server: Server) -> None:
    path, ino = server.file("file")
    holder = server("client()")
    assert path.stat().st_size == 4  # the kernel knows it now, and for a day
    number = server.grant(ino, holder, True)
    told = [["DELEGATION_ATTRS", holder, ino, number]]
    for _ in range(20):
        assert path.stat().st_size == 4
    assert server.events() == told
    # What the server sets in the client's name is seen without anybody telling the kernel.
    server(f"fs.truncate({ino}, 10)")
    assert path.stat().st_size == 10
    assert server.events() == []
    server("forward(1000)")
    for entry in os.scandir(server.mountpoint):
        if entry.name == "file":
            assert entry.stat().st_size == 10
    assert server.events() == told
    server.give_back(ino, holder)
    server("forward(1000)")
    path.stat()
    server.grant(ino, holder, False)
    path.stat()
    assert server.events() == []


# ---- all at once -------------------------------------------------------------------------------

BUSY = """
import os, random, sys, time
random.seed(sys.argv[2])
directory, end = sys.argv[1], time.monotonic() + 3
count = 0
while time.monotonic() < end:
    path = os.path.join(directory, str(random.randrange(3)))
    what = random.randrange(8)
    try:
        if what < 3: os.close(os.open(path, os.O_RDONLY))
        elif what == 3: os.close(os.open(path, os.O_RDWR | os.O_CREAT))
        elif what == 4: os.truncate(path, random.randrange(9))
        elif what == 5: os.rename(path, os.path.join(directory, str(random.randrange(3))))
        elif what == 6: os.unlink(path)
        else: os.link(path, os.path.join(directory, str(random.randrange(3))))
    except (FileNotFoundError, FileExistsError):
        pass
    count += 1
print(count)
"""


def test_users_and_the_server_at_once(server: Server) -> None:
    """Grants as fast as they go, every recall answered: all go on, and nothing is left."""
    clients = [server("client()") for _ in range(2)]
    users = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, server.mountpoint, str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    recalls = 0
    try:
        deadline = time.monotonic() + 30
        while any(user.poll() is None for user in users):
            assert time.monotonic() < deadline, "somebody waits for ever"
            for name in range(3):
                try:
                    ino = server(f"fs.lookup(1, b'{name}').ino")
                    server.grant(ino, clients[name % 2], recalls % 3 == 0)
                except RefusedError:
                    continue
            for kind, holder, number, _ in server.events():
                if kind == "DELEGATION_RECALL":
                    recalls += 1
                    server.give_back(number, holder)
        counts = [int(user.communicate()[0]) for user in users]
    finally:
        for user in users:
            user.kill()
            user.__exit__(None, None, None)
    assert min(counts) > 0, counts
    assert recalls > 10, recalls
    assert server.counter("delegations_revoked") == 0
    for client in clients:
        server(f"give_all_back({client})")
    for name in os.listdir(server.mountpoint):
        ino = os.stat(server.mountpoint / name).st_ino
        closed(server, ino)
        server.grant(ino, clients[0], True)  # no use is left either
