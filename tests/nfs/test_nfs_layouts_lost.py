"""What the server may not take for returned: writes of a client that lost a layout may be under way
until the client itself says that they are not (`extfs.nfs.layouts`, invariant 11)."""

from __future__ import annotations

import pytest
from conftest import LogWatch

from extfs.core import ROOT_INODE, CoreError, HolderState
from extfs.nfs import constants as n
from nfs.calls import putfh, status_of
from nfs.conftest import World
from nfs.layout_calls import (
    ALL,
    ANY,
    BLOCK,
    RW,
    File,
    close,
    events,
    layoutget,
    layoutreturn,
    open_file,
)
from nfs.test_nfs_layouts_recall import OVER, Slow, result, send


@pytest.fixture
def file(world: World) -> File:
    """A file of 1 MiB, a hole, open by the client "one"."""
    file = open_file(world.session(b"one"), b"file")
    world.fs.truncate(world.fs.lookup(ROOT_INODE, b"file").ino, 1 << 20)
    world.fs.layouts.set_clock(1)
    return file


def held(world: World, name: bytes = b"file") -> set[int]:
    """The blocks of a file that somebody has a grant of."""
    grants = world.fs.layouts.grants(world.fs.lookup(ROOT_INODE, name).ino)
    spans = (range(g.offset // BLOCK, (g.offset + g.length) // BLOCK) for g in grants)
    return {block for span in spans for block in span}


def holder(world: World) -> int:
    (client,) = world.service.clients.all_living()
    assert client.holder_id
    return client.holder_id


def revoke(world: World, block: int, name: bytes = b"file") -> None:
    """A local writer wants a block, and gets it after the time that the client had."""
    ino = world.fs.lookup(ROOT_INODE, name).ino
    with pytest.raises(CoreError):
        world.fs.write(ino, block * BLOCK, b"local", nowait=True)
    world.fs.layouts.set_clock(world.fs.layouts.now() + OVER)
    world.fs.layouts.settle()
    events(world)


def test_a_layoutget_that_a_revoke_overtook_returns_nothing(
    world: World, file: File, log_watch: LogWatch
) -> None:
    log_watch.expect("was revoked")
    file.get(0, 8 * BLOCK)
    slow = Slow(world)
    get = layoutget(0, 4 * BLOCK, BLOCK, RW, file.layout or file.opened)
    xid = send(file, get, 1)
    tell = slow.go(answer=False)
    revoke(world, 6)
    assert world.service.layouts.status()["states"] == 0
    tell()
    slow.end()
    assert result(file, get, xid) == n.NFS4ERR_DELAY
    assert held(world) == {0, 1, 2, 3, 4, 5, 7}, "the client had these before, and may write them"


def test_a_layoutget_of_a_client_that_went_returns_nothing(world: World, file: File) -> None:
    file.get(0, 8 * BLOCK)
    slow = Slow(world)
    send(file, layoutget(0, 4 * BLOCK, BLOCK, RW, file.layout or file.opened), 1)
    tell = slow.go(answer=False)
    (client,) = world.service.clients.all_living()
    world.service.clients.drop(client)
    tell()
    slow.end()
    assert held(world) == set(range(8))


def test_a_layoutget_after_the_last_close_leaves_nothing(world: World, file: File) -> None:
    file.get(0, BLOCK)
    assert file.give_back() is None
    slow = Slow(world)
    get = layoutget(0, BLOCK, BLOCK, RW, file.opened)
    xid = send(file, get, 1)
    tell = slow.go(answer=False)
    assert held(world) == {0}
    slow.runner.blocking = slow.at_once  # type: ignore[method-assign]
    assert status_of(file.session, putfh(file.fh), close(file.opened)) == "OK"
    tell()
    slow.end()
    assert result(file, get, xid) == n.NFS4ERR_BAD_STATEID
    assert held(world) == set()


def test_a_layoutget_after_the_last_close_spares_what_was_left_of_a_revoked_layout(
    world: World, file: File, log_watch: LogWatch
) -> None:
    log_watch.expect("was revoked")
    file.get(0, 8 * BLOCK)
    revoke(world, 6)
    file.layout = None
    open_file(file.session, b"other").get(0, BLOCK)  # its holder is live again
    slow = Slow(world)
    get = layoutget(0, 4 * BLOCK, BLOCK, RW, file.opened)
    xid = send(file, get, 1)
    tell = slow.go(answer=False)
    slow.runner.blocking = slow.at_once  # type: ignore[method-assign]
    assert status_of(file.session, putfh(file.fh), close(file.opened)) == "OK"
    tell()
    slow.end()
    assert result(file, get, xid) == n.NFS4ERR_BAD_STATEID
    assert held(world) == {0, 1, 2, 3, 4, 5, 7}


def test_one_of_two_revoked_stateids_returns_nothing_of_the_other(
    world: World, file: File, log_watch: LogWatch
) -> None:
    log_watch.expect("was revoked")
    first = file.get(0, 8 * BLOCK)
    revoke(world, 6)
    file.layout = None
    second = file.get(16 * BLOCK, 4 * BLOCK)
    revoke(world, 19)
    assert first.stateid.other != second.stateid.other
    assert file.do(layoutreturn(stateid=first.stateid)) is None
    assert held(world) >= {16, 17, 18}
    assert file.do(layoutreturn(stateid=second.stateid)) is None
    world.fs.layouts.settle()
    assert held(world) == set()
    record = world.fs.layouts.holder(holder(world))
    assert record is not None
    assert (record.state, record.quarantined) == (HolderState.LIVE, 0)


def test_the_end_of_a_lease_is_no_return(world: World, file: File, log_watch: LogWatch) -> None:
    """Of a client that missed a recall before, too, and returned what was revoked then."""
    log_watch.expect("was revoked")
    other = open_file(file.session, b"other")
    other.get(0, 4 * BLOCK)
    lost = file.get(0, BLOCK)
    number = holder(world)
    revoke(world, 0)
    assert file.do(layoutreturn(stateid=lost.stateid)) is None
    (client,) = world.service.clients.all_living()
    world.service.clients.drop(client)
    world.fs.layouts.settle()
    record = world.fs.layouts.holder(number)
    assert record is not None
    assert record.state is HolderState.LOST
    assert held(world, b"other") >= {0, 1, 2, 3}
    assert world.service.counters["holders_settled"] == 0


def test_a_return_of_a_part_that_a_revoke_overtook_is_not_one_of_all(
    world: World, file: File, log_watch: LogWatch
) -> None:
    """No stateid in the answer would say that the client has nothing left, and so nothing lost."""
    log_watch.expect("was revoked")
    layout = file.get(0, 8 * BLOCK)
    slow = Slow(world)
    give = layoutreturn(0, 2 * BLOCK, ANY, layout.stateid)
    xid = send(file, give, 1)
    revoke(world, 6)
    slow.end()
    assert result(file, give, xid) == n.NFS4ERR_BAD_STATEID
    assert held(world) == {2, 3, 4, 5, 7}


def test_a_return_of_all_that_a_revoke_overtook_returns_what_was_revoked(
    world: World, file: File, log_watch: LogWatch
) -> None:
    log_watch.expect("was revoked")
    layout = file.get(0, 8 * BLOCK)
    slow = Slow(world)
    give = layoutreturn(0, ALL, ANY, layout.stateid)
    xid = send(file, give, 1)
    revoke(world, 6)
    slow.end()
    assert result(file, give, xid) is None
    world.fs.layouts.settle()
    record = world.fs.layouts.holder(holder(world))
    assert record is not None
    assert (record.state, record.quarantined) == (HolderState.LIVE, 0)
