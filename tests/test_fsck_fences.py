"""fsck and dump of fence records: what a crash may leave, and what only damage does."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from broken import Break, codes, number, of, put
from surgeon import Surgeon

from extfs import core
from extfs.check import layout
from extfs.check.dump import dump_tree
from extfs.check.fsck import fsck
from extfs.check.layout import Tree
from extfs.check.mapping import Image
from extfs.core import FenceState

MIB = 1 << 20
STATES = [FenceState.DECIDED, FenceState.ISSUED, FenceState.FAILED]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Three lost holders with a layout each; their fences are decided, issued, and failed."""
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    with core.Device.open(str(path)) as device:
        core.mkfs(device, label=b"fences")
        with core.Filesystem.open(device) as fs:
            for number, last in enumerate(STATES):
                name = b"file%d" % number
                ino = fs.mknod(core.ROOT_INODE, name, stat.S_IFREG | 0o644).ino
                spec = core.HolderSpec(kind=core.HolderKind.CLIENT, fence="scsi:1", fence_key=77)
                holder, _key = fs.layouts.register(spec)
                fs.layouts.get(ino, holder, core.Iomode.RW, 0, MIB)
                fs.layouts.lost(holder)
                for state in STATES[: STATES.index(last) + 1]:
                    fs.layouts.fence_put(holder, state, STATES.index(state))
    return path


def test_what_a_crash_may_leave_is_clean(image: Path) -> None:
    assert codes(fsck(image)) == set()
    with core.Device.open(str(image)) as device, core.Filesystem.open(device) as fs:
        found = fs.layouts.fences()
        assert [(f.holder, f.state, f.tries) for f in found] == [
            (number + 1, state, number) for number, state in enumerate(STATES)
        ]
        assert all(abs(f.decided - time.time()) < 60 for f in found)
        fs.layouts.fenced(2)
        fs.layouts.settle()
        assert [f.holder for f in fs.layouts.fences()] == [1, 3]
    assert codes(fsck(image)) == set()


def test_the_dump_of_fences(image: Path) -> None:
    with Image(image) as looking:
        found = dump_tree(looking, "fence")["records"]
    assert [(f["hi"], f["lo"], f["holder"], f["state"], f["tries"]) for f in found] == [
        (1, 0, 1, 1, 0),
        (2, 0, 2, 2, 1),
        (3, 0, 3, 4, 2),
    ]


@pytest.mark.parametrize(
    ("damage", "code", "repaired"),
    [
        pytest.param(
            lambda s, _i: s.edit(Tree.FENCE, of(2), put(8, number(3, 4))),
            "FENCE_SHAPE",
            False,
            id="a state that there is not",
        ),
        pytest.param(
            lambda s, _i: s.edit(Tree.FENCE, of(2), put(0, number(1))),
            "FENCE_SHAPE",
            False,
            id="another holder's name",
        ),
        pytest.param(
            lambda s, _i: s.edit(Tree.HOLDER, of(2), put(4, number(3, 4))),
            "FENCE_HOLDER",
            True,
            id="a holder that is gone",
        ),
        pytest.param(
            lambda s, _i: s.remove(Tree.HOLDER, of(3)),
            "FENCE_HOLDER",
            True,
            id="no holder",
        ),
        pytest.param(
            lambda s, _i: s.set_fields(layout.ROOT_BLOCK, layout.ROOT, next_holder=2),
            "NEXT_HOLDER",
            True,
            id="numbers of holders would come again",
        ),
    ],
)
def test_damage_is_found(image: Path, damage: Break, code: str, repaired: bool) -> None:
    """And no mount takes it for true."""
    damage(Surgeon(image), {})
    assert code in codes(fsck(image))
    with core.Device.open(str(image)) as device, pytest.raises(core.CoreError, match="record"):
        core.Filesystem.open(device)
    fsck(image, repair=True)
    assert (code in codes(fsck(image))) == (not repaired)
