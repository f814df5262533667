"""Runs operations on the oracle and a subject at once and compares every answer.

An operation is a tuple of a name and small numbers; the driver turns the numbers into existing
nodes, names and ranges, so any sequence of tuples is a valid program: good for seeds, for
hypothesis to shrink, and to print.
"""

from __future__ import annotations

import contextlib
import errno
import random
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from .model import Model, Node, Refused, State
from .subjects import Subject

Op = tuple[str, int, int, int, int]

FILE_LIMIT = 400_000
"""No file grows beyond this (bytes)."""
NAMES = [b"a", b"b", b"c", b"d", b"e", b"\xff\x01", b"n" * 255, b"\xc3\xa4"]
XATTRS = [b"user.one", b"user.two", b"trusted.t", b"security.s"]
FALLOCATE_MODES = ["allocate", "keep", "punch", "zero", "zero-keep"]

WEIGHTS = {
    "create": 10, "mkdir": 4, "symlink": 2, "fifo": 1, "link": 3, "unlink": 5, "rmdir": 2,
    "rename": 6, "write": 22, "append": 6, "truncate": 9, "fallocate": 9, "copy": 7, "read": 6,
    "setxattr": 4, "removexattr": 2, "chmod": 2, "fsync": 6,
}  # fmt: skip


def random_ops(rng: random.Random, count: int, weights: dict[str, int] = WEIGHTS) -> list[Op]:
    """A program of `count` operations."""
    kinds = rng.choices(list(weights), weights=list(weights.values()), k=count)
    return [(kind, *(rng.getrandbits(32) for _ in range(4))) for kind in kinds]  # type: ignore[misc]


def pattern(stamp: int, length: int) -> bytes:
    """Bytes that no other stamp produces, never zero."""
    unit = b"%08x." % (stamp & 0xFFFFFFFF)
    return (unit * (length // len(unit) + 1))[:length]


def span(one: int, other: int) -> tuple[int, int]:
    """An offset and a length: often aligned to blocks or sectors, sometimes tiny or large."""
    grain = (4096, 4096, 512, 1, 16384)[one % 5]
    offset = (one // 5) % 150_000 // grain * grain
    grain = (4096, 512, 1, 1, 65536)[other % 5]
    length = max(1, (other // 5) % (8 * grain if grain >= 512 else 9000) // grain * grain)
    return offset, length


@dataclass
class Driver:
    """Model and subject side by side; with keep_history, what was true after every step."""

    model: Model
    subject: Subject
    step: int = 0
    states: list[State] = field(default_factory=list)
    contents: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    touched: list[set[int]] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)
    """The last step that changed what describes an inode."""
    durable: int = 0
    """The last step that an fsync has made durable: the one that had changed the file's inode."""
    synced: dict[int, int] = field(default_factory=dict)
    """The step of each file's last fsync: its contents of then are durable."""
    keep_history: bool = False

    def begin(self) -> None:
        """Remember the state before the first step."""
        self.states.append(self.model.state())
        self.touched.append(set())

    def run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self.apply(op)

    def apply(self, op: Op) -> None:
        """One operation on both. AssertionError when the answers differ.

        EIO or EROFS (the device is gone) goes up; the model has then done the operation that may or
        may not have happened, as its last step. A new file of that step has inode number 0.
        """
        kind, *numbers = op
        touched: set[int] = set()
        try:
            getattr(self, "_" + kind)(touched, *numbers)
        except Nothing:
            return
        except OSError:
            self._record(touched)
            raise
        self._record(touched)

    def _record(self, touched: set[int]) -> None:
        self.step += 1
        if not self.keep_history:
            return
        state = self.model.state()
        for ino, described in state.items():
            if self.states[-1].get(ino) != described:
                self.changed[ino] = self.step
        self.states.append(state)
        self.touched.append(touched)
        for node in self.model.walk():
            if node.ino in touched and node.is_file:
                self.contents.setdefault(node.ino, []).append((self.step, node.content))

    # ---- choosing ----

    def _pick(self, number: int, *, kind: str) -> Node:
        nodes = [
            node
            for node in self.model.walk()
            if kind == "any" or (node.is_dir if kind == "dir" else node.is_file)
        ]
        if not nodes:
            raise Nothing
        return nodes[number % len(nodes)]

    @staticmethod
    def _name(number: int) -> bytes:
        return NAMES[number % len(NAMES)]

    def _taken(self, number: int, other: int) -> tuple[Node, bytes]:
        """A directory and, if it has any, one of its names (else a name that is not there)."""
        directory = self._pick(number, kind="dir")
        names = sorted(directory.entries)
        return directory, names[other % len(names)] if names else self._name(other)

    # ---- both sides of one call ----

    def _both(self, model_call: object, subject_call: object) -> object:
        """What the subject answered, with what the model did where it says anything.

        Nothing when both refuse; AssertionError when only one does or for another reason.
        """
        refused = 0
        assert callable(model_call)
        assert callable(subject_call)
        try:
            answer = subject_call()
        except OSError as error:
            refused = error.errno or errno.EIO
            if refused in (errno.EIO, errno.EROFS):
                with contextlib.suppress(Refused):
                    model_call()
                raise
            answer = None
        try:
            snapshot = model_call()
        except Refused as refusal:
            expected = refusal.number
            assert refused == expected, (
                f"expected {errno.errorcode[expected]}, "
                f"got {errno.errorcode.get(refused, 'success')}"
            )
            raise Nothing from None
        assert not refused, f"expected success, got {errno.errorcode[refused]}"
        return answer if snapshot is None else (answer, snapshot)

    def _add(self, directory: Node, name: bytes, mode: int, target: bytes = b"") -> None:
        answer = self._both(
            lambda: self.model.add(directory, name, mode, target),
            lambda: self.subject.add(directory, name, mode, target),
        )
        assert isinstance(answer, tuple)
        answer[1].ino = answer[0]
        if answer[1].is_file and self.keep_history:
            self.contents[answer[1].ino] = [(self.step, b"")]

    # ---- operations ----

    def _create(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        mode = stat.S_IFREG | (0o600, 0o644, 0o755)[c % 3]
        self._add(self._pick(a, kind="dir"), self._name(b), mode)

    def _mkdir(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        self._add(self._pick(a, kind="dir"), self._name(b), stat.S_IFDIR | 0o755)

    def _fifo(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        self._add(self._pick(a, kind="dir"), self._name(b), stat.S_IFIFO | 0o600)

    def _symlink(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        target = pattern(c, (1, 30, 1023, 1024, 1025, 4095)[d % 6])
        self._add(self._pick(a, kind="dir"), self._name(b), stat.S_IFLNK | 0o777, target)

    def _link(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="any")
        if node is self.model.root:
            raise Nothing
        directory, name = self._pick(b, kind="dir"), self._name(c)
        if node.is_dir and name in directory.entries:
            raise Nothing  # two errors at once: the kernel and the core name different ones
        self._both(
            lambda: self.model.link(node, directory, name),
            lambda: self.subject.link(node, directory, name),
        )

    def _unlink(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        directory, name = self._taken(a, b)
        self._both(
            lambda: self.model.unlink(directory, name) and None,
            lambda: self.subject.unlink(directory, name),
        )

    def _rmdir(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        directory, name = self._taken(a, b)
        self._both(
            lambda: self.model.rmdir(directory, name) and None,
            lambda: self.subject.rmdir(directory, name),
        )

    def _rename(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        old, name = self._taken(a, b)
        new, new_name = self._taken(c, d) if d % 3 else (self._pick(c, kind="dir"), self._name(d))
        flags = {"noreplace": b % 5 == 0, "exchange": b % 5 == 1}
        victim = new.entries.get(new_name)
        if victim and victim.is_dir and self.model.is_below(old, victim):
            raise Nothing  # the kernel has an error of its own for this: ENOTEMPTY
        self._both(
            lambda: self.model.rename(old, name, new, new_name, **flags),
            lambda: self.subject.rename(old, name, new, new_name, *flags.values()),
        )

    def _write(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        offset, length = span(b, c)
        content = pattern(d, length)
        touched.add(node.ino)
        self._both(
            lambda: self.model.write(node, offset, content),
            lambda: self.subject.write(node, offset, content, False),
        )

    def _append(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        content = pattern(d, span(b, c)[1])
        if len(node.content) > FILE_LIMIT:
            raise Nothing
        touched.add(node.ino)
        self._both(
            lambda: self.model.write(node, len(node.content), content),
            lambda: self.subject.write(node, 0, content, True),
        )

    def _truncate(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        size = (0, span(b, c)[0], max(0, len(node.content) - c % 5000), len(node.content))[d % 4]
        touched.add(node.ino)
        self._both(
            lambda: self.model.truncate(node, size), lambda: self.subject.truncate(node, size)
        )

    def _fallocate(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        offset, length = span(b, c)
        mode = FALLOCATE_MODES[d % len(FALLOCATE_MODES)]
        touched.add(node.ino)
        self._both(
            lambda: self.model.fallocate(node, offset, length, mode),
            lambda: self.subject.fallocate(node, offset, length, mode),
        )

    def _copy(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        source, node = self._pick(a, kind="file"), self._pick(b, kind="file")
        offset, length = span(c, d)
        to = offset if d % 2 else span(d, c)[0]
        if offset >= len(source.content) or length == 0:
            raise Nothing
        touched.add(node.ino)
        answer = self._both(
            lambda: self.model.copy(source, offset, node, to, length),
            lambda: self.subject.copy(source, offset, node, to, length),
        )
        assert isinstance(answer, tuple)
        assert answer[0] == answer[1], f"copied {answer[0]} bytes of {answer[1]}"

    def _read(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        offset, length = span(b, c)
        compare(node.content[offset : offset + length], self.subject.read(node, offset, length))
        raise Nothing

    def _setxattr(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="any")
        name = XATTRS[b % len(XATTRS)]
        if stat.S_ISLNK(node.mode) or not (node.is_dir or node.is_file):
            name = b"trusted.t"  # user. is for files and directories
        value = pattern(c, (0, 10, 1000, 1024, 3000, 20000)[d % 6])
        self._both(
            lambda: node.xattrs.__setitem__(name, value),
            lambda: self.subject.setxattr(node, name, value),
        )

    def _removexattr(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="any")
        name = sorted(node.xattrs)[b % len(node.xattrs)] if node.xattrs else b"trusted.none"
        self._both(
            lambda: self.model.removexattr(node, name),
            lambda: self.subject.removexattr(node, name),
        )

    def _chmod(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="any")
        if stat.S_ISLNK(node.mode):
            raise Nothing
        mode = stat.S_IFMT(node.mode) | (0o700, 0o644, 0o755, 0o600)[b % 4]
        self._both(
            lambda: setattr(node, "mode", mode),
            lambda: self.subject.chmod(node, stat.S_IMODE(mode)),
        )

    def _fsync(self, touched: set[int], a: int, b: int, c: int, d: int) -> None:
        node = self._pick(a, kind="file")
        self.subject.fsync(node)
        self.durable = max(self.durable, self.changed.get(node.ino, 0))
        self.synced[node.ino] = self.step

    # ---- the whole ----

    def check_all(self) -> None:
        """Every name, attribute and byte agrees."""
        expected, found = self.model.state(), self.subject.state()
        assert found == expected, difference(expected, found)
        for node in self.model.walk():
            if node.is_file:
                compare(node.content, self.subject.read(node, 0, len(node.content) + 10))


class Nothing(Exception):  # noqa: N818 - not an error
    """The operation has nothing to work on, or was refused on both sides."""


def compare(expected: bytes, found: bytes) -> None:
    """AssertionError that names the first byte that differs."""
    if expected == found:
        return
    assert len(expected) == len(found), f"{len(found)} bytes where {len(expected)} were expected"
    at = next(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
    raise AssertionError(
        f"byte {at} (block {at // 4096}): found {found[at : at + 16]!r}, "
        f"expected {expected[at : at + 16]!r}"
    )


def difference(expected: State, found: State) -> str:
    """What two states disagree in, a line an inode."""
    lines = [
        f"inode {ino}: expected {expected.get(ino)}, found {found.get(ino)}"
        for ino in sorted(expected.keys() | found.keys())
        if expected.get(ino) != found.get(ino)
    ]
    return "\n".join(lines[:5])
