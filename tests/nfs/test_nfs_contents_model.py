"""Contents of two files, changed at random through the protocol and locally, against bytearrays."""

from __future__ import annotations

import random
import struct

import pytest

from extfs.nfs import constants as n
from nfs.conftest import World
from nfs.file_calls import FileClient, Opened, StatusError, stateid
from nfs.test_nfs_contents import allocate, clone, copy, deallocate, read_plus, seek
from nfs.wire import bitmap, op, opaque

BLOCK = 4096
SIZE_MAX = 40 * BLOCK
STEPS = 250


class Run:
    """Random operations on files `f` and `g`."""

    def __init__(self, world: World, seed: int) -> None:
        self.dice = random.Random(seed)
        self.world = world
        self.client = FileClient(world.session(b"one"))
        self.files = [self.client.create(name) for name in (b"f", b"g")]
        self.inodes = [world.fs.lookup(1, name).ino for name in (b"f", b"g")]
        self.contents = [bytearray(), bytearray()]

    def offset(self, limit: int) -> int:
        """Often at the edge of a block."""
        at = self.dice.randrange(limit + 1)
        return at // BLOCK * BLOCK if self.dice.random() < 0.4 else at

    def step(self) -> None:
        dice = self.dice
        which = dice.randrange(2)
        file, content = self.files[which], self.contents[which]
        steps = [self.write, self.write, self.local_write, self.truncate, self.allocate]
        steps += [self.deallocate, self.clone, self.copy, self.read, self.read, self.seek]
        dice.choice(steps)(which, file, content)

    def grow(self, content: bytearray, size: int) -> None:
        content.extend(bytes(max(0, size - len(content))))

    def write(self, which: int, file: Opened, content: bytearray) -> None:
        at = self.offset(SIZE_MAX - 3 * BLOCK)
        new = self.dice.randbytes(self.dice.choice((1, 100, BLOCK, 2 * BLOCK + 7)))
        how = self.dice.choice((n.UNSTABLE4, n.DATA_SYNC4, n.FILE_SYNC4))
        assert self.client.write(file.fh, file.stateid, at, new, how)[0] == len(new)
        self.grow(content, at)
        content[at : at + len(new)] = new

    def local_write(self, which: int, file: Opened, content: bytearray) -> None:
        at = self.offset(SIZE_MAX - BLOCK)
        new = self.dice.randbytes(self.dice.randrange(1, BLOCK))
        self.world.fs.write(self.inodes[which], at, new)
        self.grow(content, at)
        content[at : at + len(new)] = new

    def truncate(self, which: int, file: Opened, content: bytearray) -> None:
        size = self.offset(SIZE_MAX)
        values = bitmap(n.FATTR4_SIZE) + opaque(struct.pack(">Q", size))
        self.client.on(file.fh, op(n.OP_SETATTR, stateid(file.stateid), values))
        self.grow(content, size)
        del content[size:]

    def allocate(self, which: int, file: Opened, content: bytearray) -> None:
        at, length = self.offset(SIZE_MAX - 4 * BLOCK), self.dice.randrange(1, 4 * BLOCK)
        allocate(self.client, file, at, length)
        self.grow(content, at + length)

    def deallocate(self, which: int, file: Opened, content: bytearray) -> None:
        at, length = self.offset(SIZE_MAX), self.dice.randrange(1, 6 * BLOCK)
        deallocate(self.client, file, at, length)
        end = min(at + length, len(content))
        if at < end:
            content[at:end] = bytes(end - at)

    def clone(self, which: int, file: Opened, content: bytearray) -> None:
        source = self.contents[1 - which]
        at = self.dice.randrange(len(source) // BLOCK + 1) * BLOCK
        to = self.dice.randrange(20) * BLOCK
        length = len(source) - at
        if self.dice.random() < 0.5:
            length = min(length, self.dice.randrange(1, 8) * BLOCK)
        if not length:
            return
        partial = length % BLOCK
        try:
            clone(self.client, self.files[1 - which], file, at, to, length)
        except StatusError as error:
            # The last block of the source may not cover bytes of the target behind it.
            if error.status != n.NFS4ERR_INVAL or not partial or to + length >= len(content):
                raise
            return
        self.grow(content, to)
        content[to : to + length] = source[at : at + length]

    def copy(self, which: int, file: Opened, content: bytearray) -> None:
        source = self.contents[1 - which]
        at, to = self.offset(len(source)), self.offset(SIZE_MAX // 2)
        length = self.dice.randrange(len(source) - at + 1)
        done = copy(self.client, self.files[1 - which], file, at, to, length)
        assert done == (length or len(source) - at)
        if done:
            self.grow(content, to)
            content[to : to + done] = source[at : at + done]

    def read(self, which: int, file: Opened, content: bytearray) -> None:
        at, length = self.offset(SIZE_MAX), self.dice.randrange(1, 10 * BLOCK)
        expected = bytes(content[at : at + length])
        eof = at + length >= len(content)
        assert self.client.read(file.fh, file.stateid, at, length) == (expected, eof)
        told, found = read_plus(self.client, file, at, length)
        assert told == eof
        pieces, pos = b"", at
        for offset, piece in found:
            assert offset == pos
            pieces += bytes(piece) if isinstance(piece, int) else piece
            pos = at + len(pieces)
        assert pieces == expected

    def seek(self, which: int, file: Opened, content: bytearray) -> None:
        """What is said to be a hole reads as zeros; whatever is not zero is data."""
        if not content:
            return
        at = self.dice.randrange(len(content))
        eof, data = seek(self.client, file, at, n.NFS4_CONTENT_DATA)
        assert not any(content[at:data])
        assert eof == (data >= len(content))
        eof, hole = seek(self.client, file, at, n.NFS4_CONTENT_HOLE)
        assert at <= hole <= len(content)
        assert eof == (hole >= len(content))

    def prove(self) -> None:
        for which, content in enumerate(self.contents):
            ino = self.inodes[which]
            assert self.world.fs.getattr(ino).size == len(content)
            assert self.world.fs.read(ino, 0, SIZE_MAX * 2) == content


@pytest.mark.parametrize("seed", range(6))
def test_model(world: World, seed: int) -> None:
    run = Run(world, seed)
    for _ in range(STEPS):
        run.step()
    run.prove()
