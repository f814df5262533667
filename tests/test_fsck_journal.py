"""fsck with a journal to replay, repair under power cuts, and damage of any kind."""

# ruff: noqa: F811
from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from broken import (  # the fixtures among them are used by name
    SIZE,
    codes,
    contents,
    first,
    image,  # noqa: F401
    inos,  # noqa: F401
    leave_a_log,
    longer_value,
    move_part,
    named,
    number,
    put,
    template,  # noqa: F401
)
from surgeon import Surgeon

from extfs import core
from extfs.check import layout
from extfs.check.fsck import fsck
from extfs.check.layout import BLOCK_SIZE, Tree
from extfs.check.log import place_of
from extfs.check.mapping import Image
from extfs.check.volume import Volume

# ---- the journal -------------------------------------------------------------------------------


def test_a_log_is_replayed_in_memory_and_written_by_repair(image: Path) -> None:
    orphan = leave_a_log(image)
    before = image.read_bytes()
    result = fsck(image)
    assert result.exit_code == 0, result.report.findings
    assert result.report.has("JOURNAL_REPLAYED")
    assert result.report.facts["orphans"] == 1
    assert image.read_bytes() == before
    with Image(image) as looking:
        assert looking.lookup(1, b"logged-48") is not None
        assert looking.inode(orphan) is not None
    result = fsck(image, repair=True)
    assert result.exit_code == 0
    with Image(image) as looking:
        assert looking.log.records == []
        assert looking.lookup(1, b"logged-48") is not None
    assert "/logged-3" in contents(image)
    assert fsck(image).report.facts["orphans"] == 0, "the mount has freed it"


def test_replay_agrees_with_the_core(image: Path, make_image: Callable[..., Path]) -> None:
    leave_a_log(image)
    other = make_image(SIZE)
    other.write_bytes(image.read_bytes())
    fsck(image, repair=True)
    assert contents(image) == contents(other)
    assert fsck(other).exit_code == 0


def test_a_torn_last_record_is_the_end_and_a_torn_earlier_one_is_damage(image: Path) -> None:
    leave_a_log(image)
    surgeon = Surgeon(image)
    with Image(image) as looking:
        records = looking.log.records
        assert len(records) > 2
        places = [place_of(looking.volume, record.lsn + 1) for record in records]
    whole = image.read_bytes()
    surgeon.flip(places[-1])
    result = fsck(image)
    assert result.exit_code == 0
    assert fsck(image, repair=True).exit_code == 0
    image.write_bytes(whole)
    surgeon.flip(places[1])
    result = fsck(image)
    assert result.exit_code == 4
    assert codes(result) == {"JOURNAL"}
    broken = image.read_bytes()
    assert fsck(image, repair=True).exit_code == 4
    assert image.read_bytes() == broken, "a damaged log must not be thrown away"


def test_attributes_of_an_orphan_may_be_half_gone(image: Path) -> None:
    fs = core.Filesystem.open(core.Device.open(str(image)), commit_ms=60_000)
    orphan = fs.mknod(1, b"doomed", stat.S_IFREG | 0o644).ino
    fs.setxattr(orphan, b"user.big", b"v" * (1024 - 8 - 3 + 4 * 1024))  # the last part is full
    fs.open_inode(orphan)
    fs.unlink(1, b"doomed")
    fs.sync()
    fs.abandon()
    fsck(image, repair=True)
    surgeon = Surgeon(image)
    # As if the last parts were gone: the head speaks of more than there is.
    surgeon.edit(Tree.XATTR, lambda hi, lo, _r: hi == orphan and not lo & 0xFFFF, longer_value)
    assert codes(fsck(image)) == set()
    surgeon.edit_inode(orphan, nlink=1)
    assert "XATTR_SHAPE" in codes(fsck(image))
    surgeon.edit_inode(orphan, nlink=0)
    move_part(orphan)(surgeon, {})
    assert "XATTR_SHAPE" in codes(fsck(image)), "a part in the middle"


def test_an_orphan_may_have_lost_its_target(image: Path) -> None:
    """The reaper frees it in one transaction and the inode in a later one."""
    fs = core.Filesystem.open(core.Device.open(str(image)), commit_ms=60_000)
    orphan = fs.symlink(1, b"doomed", b"t" * 100).ino
    fs.open_inode(orphan)
    fs.unlink(1, b"doomed")
    fs.sync()
    fs.abandon()
    fsck(image, repair=True)
    surgeon = Surgeon(image)
    surgeon.remove(Tree.SYMLINK, lambda hi, _lo, _r: hi == orphan)
    assert codes(fsck(image)) == set()
    surgeon.edit_inode(orphan, nlink=1)
    assert "SYMLINK_SIZE" in codes(fsck(image))


def test_orphans_with_a_name_and_orphans_of_nothing(image: Path, inos: dict[str, int]) -> None:
    orphan = leave_a_log(image)
    fsck(image, repair=True)
    surgeon = Surgeon(image)
    surgeon.edit_inode(orphan, nlink=1)
    result = fsck(image)
    assert "UNREACHABLE" in codes(result)
    assert fsck(image, repair=True).exit_code == 1
    assert f"/lost+found/#{orphan}" in contents(image)


# ---- repair under a power cut ------------------------------------------------------------------


class PowerCutError(Exception):
    pass


class Cut:
    """Lets `writes` writes through; at the cut, a random part of what was not flushed is undone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, seed: int) -> None:
        self.left = writes
        self.random = random.Random(seed)
        self.held: list[tuple[int, bytes]] = []
        real_write, real_flush = Volume.write_block, Volume.flush

        def write(volume: Volume, number: int, block: bytes) -> None:
            if self.left == 0:
                for place, old in reversed(self.held):
                    if self.random.random() < 0.5:
                        real_write(volume, place, old)
                raise PowerCutError
            self.left -= 1
            self.held.append((number, volume.read_raw(number)))
            real_write(volume, number, block)

        def flush(volume: Volume) -> None:
            real_flush(volume)
            self.held.clear()

        monkeypatch.setattr(Volume, "write_block", write)
        monkeypatch.setattr(Volume, "flush", flush)


def break_much(surgeon: Surgeon, inos: dict[str, int]) -> None:
    surgeon.remove(Tree.DIRENT, named(b"sub"))
    surgeon.edit_inode(inos["dir"], nlink=77, size=1)
    surgeon.edit(Tree.REFCOUNT, first, put(8, number(9, 4)))
    surgeon.edit(Tree.DIRENT, named(b"file-3"), put(8, b"\x04"))
    surgeon.flip(surgeon.super.ag_header(0))
    surgeon.flip(surgeon.super.journal_start)
    surgeon.flip(layout.SUPER_BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_repair_is_finished_by_the_next(
    seed: int, image: Path, inos: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_much(Surgeon(image), inos)
    broken = image.read_bytes()
    with monkeypatch.context() as patch:
        counter = Cut(patch, 10**9, 0)
        assert fsck(image, repair=True).exit_code == 1
        writes = 10**9 - counter.left
    files = contents(image)
    assert writes > 20
    for cut_at in range(seed, writes, 3):
        image.write_bytes(broken)
        with monkeypatch.context() as patch:
            Cut(patch, cut_at, seed * 1000 + cut_at)
            with pytest.raises(PowerCutError):
                fsck(image, repair=True)
        result = fsck(image, repair=True)
        assert result.exit_code in (0, 1), (cut_at, result.report.findings)
        assert fsck(image).report.findings == [], cut_at
    assert contents(image) == files


# ---- anything broken ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(int(os.environ.get("EXTFS_FSCK_SEEDS", "8"))))
def test_no_damage_makes_fsck_fail_itself(seed: int, image: Path) -> None:
    """Random bytes of random metadata blocks, checksums fixed: findings, never an exception."""
    chance = random.Random(seed)
    with Image(image) as looking:
        uuid = looking.volume.super.uuid
    whole = image.read_bytes()
    metadata = [
        n
        for n in range(len(whole) // BLOCK_SIZE)
        if whole[n * BLOCK_SIZE + 16 : n * BLOCK_SIZE + 32] == uuid
        and not layout.JOURNAL_START_BLOCK + 2 <= n < layout.JOURNAL_START_BLOCK + 1024
        and n not in (layout.SUPER_BLOCK, layout.SUPER_COPY_BLOCK)
    ]
    surgeon = Surgeon(image)
    for _ in range(12):
        for _ in range(chance.choice((1, 1, 2, 5))):
            block_number = chance.choice(metadata)
            block = surgeon.read(block_number)
            at = chance.choice((chance.randrange(48, 256), chance.randrange(32, 4096)))
            block[at] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
            surgeon.write(block_number, block)
        first_pass = fsck(image)
        result = fsck(image, repair=True)
        second = fsck(image)
        if result.exit_code in (0, 1):
            assert second.exit_code == 0, second.report.findings[:5]
        assert first_pass.exit_code in (0, 4)
        with open(image, "r+b") as out:
            out.write(whole)
