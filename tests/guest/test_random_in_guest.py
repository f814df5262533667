"""Random operations on one file by two guests and the local mount, in turn, against a model."""

from __future__ import annotations

import hashlib
import os
import random

import pytest

from guest.client import Client
from guest.served import assert_no_canary
from guest.test_names_in_guest import eventually
from guest.world import World

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600)]

STEPS = 60
SIZE = 512 << 10
BLOCK = 4096


class Model:
    """What the file contains."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, offset: int, piece: bytes) -> None:
        if len(self.content) < offset:
            self.content += bytes(offset - len(self.content))
        self.content[offset : offset + len(piece)] = piece

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.content += bytes(size - len(self.content))

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.content))
        if offset < end:
            self.content[offset:end] = bytes(end - offset)

    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def step_of_guest(client: Client, name: str, dice: random.Random, model: Model) -> str:
    """One operation by a guest, which opens and closes the file for it."""
    offset, length = dice.randrange(SIZE), dice.randint(1, SIZE // 4)
    fill = dice.randint(1, 255)
    match dice.choice(["buffered", "buffered", "direct", "direct", "mapped", "truncate", "punch"]):
        case "buffered":
            command, flags = f"pwrite -q -S {fill} {offset} {length}", ""
            model.write(offset, bytes([fill]) * length)
        case "direct":
            offset, length = offset // BLOCK * BLOCK, (length // BLOCK + 1) * BLOCK
            command, flags = f"pwrite -q -S {fill} {offset} {length}", "-d"
            model.write(offset, bytes([fill]) * length)
        case "mapped" if model.content:
            offset = dice.randrange(len(model.content))
            length = dice.randint(1, len(model.content) - offset)
            command = f"mwrite -S {fill} {offset} {length}"
            client.xfs_io(name, f"mmap -rw 0 {len(model.content)}", command, "msync -s")
            model.write(offset, bytes([fill]) * length)
            return command
        case "punch":
            command, flags = f"fpunch {offset} {length}", ""
            model.punch(offset, length)
        case _:
            command, flags = f"truncate {offset}", ""
            model.truncate(offset)
    client.xfs_io(name, command, flags=flags)
    return f"{command} {flags}"


def step_here(world: World, name: str, dice: random.Random, model: Model) -> str:
    """One operation through the local mount."""
    offset, length = dice.randrange(SIZE), dice.randint(1, SIZE // 4)
    kind = dice.choice(["write", "truncate", "clone"])
    if kind == "clone":
        world.served.path("random-clone").unlink(missing_ok=True)
        if model.content:
            world.served.clone(name, "random-clone")  # from now on all blocks are shared
        return "clone"
    fd = os.open(world.served.path(name), os.O_RDWR)
    try:
        if kind == "write":
            piece = dice.randbytes(length)
            assert os.pwrite(fd, piece, offset) == length
            model.write(offset, piece)
        else:
            os.ftruncate(fd, offset)
            model.truncate(offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    return f"{kind} {offset} {length}"


@pytest.mark.parametrize("seed", [1, 2])
def test_one_file_of_three_parties(world: World, seed: int) -> None:
    """After each step another party reads the whole file; at the end the device is looked at."""
    dice, model, name = random.Random(seed), Model(), f"random-{seed}"
    served, clients = world.served, (world.client, world.second)
    served.path(name).touch()
    steps: list[str] = []
    for _ in range(STEPS):
        actor = dice.randrange(3)
        if actor == 2:
            steps.append("local " + step_here(world, name, dice, model))
        else:
            client = clients[actor]
            steps.append(f"{client.guest.name} " + step_of_guest(client, name, dice, model))
        reader = dice.randrange(3)
        said = "\n".join(steps[-8:])
        if reader == 2:
            assert eventually(lambda: served.digest(name) == model.digest()), said
        else:
            client = clients[reader]
            direct = dice.random() < 0.5
            found = client.digest(client.path(name), direct=direct)
            assert found == model.digest(), f"{said}\nread by {client.guest.name}, direct={direct}"
    assert_no_canary(served.path(name).read_bytes(), name)
    assert served.device_digest(name) == model.digest()
