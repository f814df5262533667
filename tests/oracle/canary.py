"""Layouts on the simulated device, whose every byte is a canary: no read, ever, returns one.

A failure prints one command that repeats it:

    python -m oracle.canary --seed N [--mutant NAME]        (in tests/)

Holders get layouts, write the device directly, commit, return, are asked and do not answer, go on
writing where they have lost everything, until they are fenced; meanwhile files are written,
truncated, punched, cloned, exchanged and unlinked through the core; the daemon or the power goes at
any write, and what is left is opened again. Each 512-byte sector of each file must at all times be
one of the values that the model allows for it: zeros, or the number of a write that was made to
this very sector and has not been replaced for good. The canary is never one of them.

Time is virtual: a recall is missed because the clock is moved, not because somebody waits.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable

from extfs import core
from extfs.core.native import CoreError, checked, ffi, lib

from .canary_world import (
    ALL,
    ANY,
    ATOMIC,
    BLOCK,
    FILE_BLOCKS,
    FILES,
    INVALID,
    PER_BLOCK,
    PIN,
    READ,
    RECALL,
    RW,
    SECTOR,
    WAIT,
    File,
    Holder,
    Lost,
    Run,
    Violation,
    World,
    stamp,
)

END = (1 << 64) - 1
PROGRESS = 1000
UNKNOWN = (-errno.ENOENT, -errno.EKEYREJECTED)
Step = Callable[[World], None]
STEPS: dict[str, tuple[int, Step]] = {}


def step(weight: int) -> Callable[[Step], Step]:
    def note(call: Step) -> Step:
        STEPS[call.__name__] = (weight, call)
        return call

    return note


def some_file(w: World) -> File:
    if len(w.files) < FILES and (not w.files or w.rng.random() < 0.25):
        w.names += 1
        name = b"f%d" % w.names
        ino = w.fs.mknod(core.ROOT_INODE, name, 0o100644).ino
        w.sync()
        w.files[ino] = File(ino, name)
    return w.rng.choice(list(w.files.values()))


def some_holder(w: World) -> Holder:
    alive = [h for h in w.holders if not h.dead]
    if len(alive) < 3 and (not alive or w.rng.random() < 0.3):
        return w.register()
    return w.rng.choice(alive)


def some_range(w: World) -> tuple[int, int]:
    first = w.rng.randrange(FILE_BLOCKS)
    return first, w.rng.choice([1, 1, 2, 4, 8, 16])


@step(22)
def get_rw(w: World) -> None:
    first, count = some_range(w)
    flags = w.rng.choice([0, 0, WAIT, WAIT, RECALL])
    if w.rng.random() < 0.12:
        flags |= ATOMIC
    w.get(some_holder(w), some_file(w), first, count, RW, flags)


@step(6)
def get_read(w: World) -> None:
    first, count = some_range(w)
    iomode, flags = w.rng.choice([READ, READ, PIN]), w.rng.choice([0, WAIT])
    w.get(some_holder(w), some_file(w), first, count, iomode, flags)


@step(30)
def holder_writes(w: World) -> None:
    holder = some_holder(w)
    keys = sorted(holder.held)
    for key in w.rng.sample(keys, min(len(keys), w.rng.randint(1, 6))):
        w.write_device(holder, key)


@step(20)
def holder_commits(w: World) -> None:
    holder = some_holder(w)
    inodes = sorted({i for (i, b), told in holder.held.items() if told.written})
    if inodes:
        ino = w.rng.choice(inodes)
        mine = sorted(b for (i, b), told in holder.held.items() if i == ino and told.written)
        w.commit_blocks(holder, ino, sorted(w.rng.sample(mine, w.rng.randint(1, len(mine)))))


@step(4)
def commit_of_the_unheld(w: World) -> None:
    """Whole or nothing: refused, and nothing changes."""
    holder, file = some_holder(w), some_file(w)
    if holder.ghost:
        return  # what it was told before the restart it may commit, whatever it remembers
    free = [b for b in range(FILE_BLOCKS) if (file.ino, b) not in holder.held]
    if not free:
        return
    args = ffi.new("struct extfs_layout_args *")
    ranges = ffi.new("struct extfs_core_range[]", 2)
    mine = sorted(b for (i, b), told in holder.held.items() if i == file.ino and told.written)
    picked = sorted({w.rng.choice(free), *mine[:1]})
    for slot, block in zip(ranges, picked, strict=False):
        slot.offset, slot.length = block * BLOCK, BLOCK
    args.holder, args.ranges, args.nranges = holder.id, ranges, len(picked)
    args.size = (picked[-1] + 1) * BLOCK
    code = w.patiently(holder, lambda: lib.extfs_layout_commit(w.fs.raw, file.ino, args))
    if code >= 0 and w.run.mutant == core.Mutant.NONE:
        raise Violation(f"a commit of blocks {picked} was accepted; held: {mine}")
    if code >= 0:
        file.size = max(file.size, int(args.size))
        file.sizes.add(file.size)


@step(8)
def holder_returns(w: World) -> None:
    holder = some_holder(w)
    if holder.held:
        ino = w.rng.choice(sorted({i for i, _ in holder.held}))
        first, count = some_range(w)
        atomic = [b for i, b in holder.atomic if i == ino]
        if atomic:
            first, count = 0, FILE_BLOCKS * 4
        w.give_back(holder, ino, first, first + count)


@step(12)
def lost_holder_writes(w: World) -> None:
    """It was revoked, and does not know or does not care."""
    for holder in w.holders:
        for lost in w.rng.sample(holder.memory, min(len(holder.memory), 3)):
            number = w.next_number()
            w.note(f"  {holder.id} writes {number} where it was: {lost}")
            w.count("stale write")
            file = w.files.get(lost.ino)
            if file and lost.syncs == w.syncs:
                for sector in range(lost.block * PER_BLOCK, (lost.block + 1) * PER_BLOCK):
                    file.later[sector] = file.later.get(sector, {0}) | {number}
            w.sim.poke(lost.device * BLOCK, stamp(number) * PER_BLOCK)
        if holder.dead and holder.held:
            w.write_device(holder, w.rng.choice(sorted(holder.held)))


@step(14)
def server_write(w: World) -> None:
    file = some_file(w)
    sector = w.rng.randrange(FILE_BLOCKS * PER_BLOCK)
    count = w.rng.choice([1, 3, 8, 8, 16])
    number = w.next_number()
    end = (sector + count) * SECTOR
    with file.under_way({s: {number} for s in range(sector, sector + count)}, grows=end):
        w.waiting(lambda: w.fs.write(file.ino, sector * SECTOR, stamp(number) * count))
    w.note("  write", number, file.name, "sectors", sector, count)
    if end > file.size:
        grow(file, end)
    for s in range(sector, sector + count):
        file.put(s, {number})
    w.taken(file, sector // PER_BLOCK, (sector + count - 1) // PER_BLOCK + 1)


def grow(file: File, size: int) -> None:
    for s in range((file.size + SECTOR - 1) // SECTOR, (size + SECTOR - 1) // SECTOR):
        file.put(s, {0})
    file.beyond.clear()
    file.resized(size)


@step(8)
def server_truncate(w: World) -> None:
    file = some_file(w)
    size = w.rng.randrange(FILE_BLOCKS * PER_BLOCK) * SECTOR
    with file.under_way({s: {0} for s in file.later if s * SECTOR >= size}, size=size):
        w.waiting(lambda: w.fs.truncate(file.ino, size))
    w.note("  truncate", file.name, file.size, "to", size)
    file.resize(size)
    w.taken(file, size // BLOCK, 1 << 50)


@step(6)
def server_punch(w: World) -> None:
    file = some_file(w)
    first, count = some_range(w)
    span = range(first * PER_BLOCK, (first + count) * PER_BLOCK)
    offset, length = first * BLOCK, count * BLOCK
    with file.under_way({s: {0} for s in span}):
        w.waiting(lambda: w.fs.fallocate(file.ino, offset, length, keep_size=True, punch_hole=True))
    for s in span:
        file.put(s, {0})
    w.taken(file, first, first + count)


@step(6)
def server_clone(w: World) -> None:
    source, target = some_file(w), some_file(w)
    first, count = some_range(w)
    end = min((first + count) * BLOCK, source.size // BLOCK * BLOCK)
    if source is target or end <= first * BLOCK:
        return
    w.waiting(lambda: lib.extfs_layout_settle(w.fs.raw))
    span = range(first * PER_BLOCK, end // SECTOR)
    arguments = (source.ino, first * BLOCK, target.ino, first * BLOCK, end - first * BLOCK)
    with target.under_way({s: set(source.later.get(s, {0})) for s in span}, grows=end):
        done = w.waiting(lambda: w.fs.clone(*arguments))
    w.count("clone")
    if end > target.size:
        grow(target, end)
    if done != end - first * BLOCK:
        raise Violation(f"cloned {done} of {end - first * BLOCK}")
    for s in span:
        # the holders of the source may have written until the very moment
        target.put(s, source.allowed(s))
    w.taken(target, first, end // BLOCK)
    w.taken(source, first, end // BLOCK)


@step(3)
def server_exchange(w: World) -> None:
    one, other = some_file(w), some_file(w)
    first, count = some_range(w)
    end = min((first + count) * BLOCK, one.size // BLOCK * BLOCK, other.size // BLOCK * BLOCK)
    if one is other or end <= first * BLOCK:
        return
    span = range(first * PER_BLOCK, end // SECTOR)
    arguments = (one.ino, first * BLOCK, other.ino, first * BLOCK, end - first * BLOCK)
    with (
        one.under_way({s: set(other.later.get(s, {0})) for s in span}),
        other.under_way({s: set(one.later.get(s, {0})) for s in span}),
    ):
        w.waiting(lambda: checked(lib.extfs_exchange(w.fs.raw, *arguments)))
    w.count("exchange")
    for s in span:
        mine, theirs = one.allowed(s), other.allowed(s)
        one.put(s, theirs)
        other.put(s, mine)
    w.taken(one, first, end // BLOCK)
    w.taken(other, first, end // BLOCK)


@step(3)
def unlink(w: World) -> None:
    if len(w.files) < 2:
        return
    file = w.rng.choice(list(w.files.values()))
    w.fs.unlink(core.ROOT_INODE, file.name)
    del w.files[file.ino]
    w.sync()


@step(4)
def missed_recall(w: World) -> None:
    """Somebody asks; time passes."""
    file = some_file(w)
    first, count = some_range(w)
    checked(lib.extfs_layout_recall(w.fs.raw, file.ino, 0, ANY, first * BLOCK, count * BLOCK))
    if w.rng.random() < 0.5:
        w.pump()
    w.advance()
    lib.extfs_layout_settle(w.fs.raw)
    w.pump()


@step(3)
def closes(w: World) -> None:
    """A holder's descriptor is closed; it goes on writing."""
    holder = some_holder(w)
    try:
        w.retry(lambda: lib.extfs_holder_lost(w.fs.raw, holder.id))
    except CoreError as error:
        if error.errno != errno.ENOENT or holder.held:
            raise Violation(f"holder {holder.id} is unknown, and holds {holder.held}") from error
    holder.dead = True
    w.note(f"  {holder.id} closes, holding", sorted(holder.held))


@step(5)
def comes_clean(w: World) -> None:
    """It stops, and returns everything: whatever it had lost, it is live again."""
    holder = some_holder(w)
    args = ffi.new("struct extfs_layout_args *")
    args.holder, args.flags, args.iomode, args.length = holder.id, ALL, ANY, END
    code = -errno.EIO
    try:
        code = w.patiently(holder, lambda: lib.extfs_layout_return(w.fs.raw, 0, args))
    finally:
        w.note(f"  {holder.id} returns everything: {code}")
        # also if the power goes meanwhile: whoever sends a return has ended its writes
        if code >= 0 or w.sim.crashed:
            holder.held.clear()
            holder.memory.clear()
            holder.atomic.clear()
            holder.ghost = False


@step(3)
def fence(w: World) -> None:
    dead = [h for h in w.holders if h.dead]
    if dead:
        holder = w.rng.choice(dead)
        w.note(f"  {holder.id} is fenced")
        holder.memory.clear()
        holder.held.clear()
        with contextlib.suppress(CoreError):
            w.retry(lambda: lib.extfs_holder_fenced(w.fs.raw, holder.id))
        w.holders.remove(holder)
        lib.extfs_layout_settle(w.fs.raw)


@step(12)
def fence_goes_on(w: World) -> None:
    """The next step of somebody's fence, as the layout server takes them. Who is live has none."""
    lost = [h for h in w.holders if h.fence] or [h for h in w.holders if h.dead] or w.holders
    if not lost:
        return
    holder = w.rng.choice(lost)
    if holder.fence is core.FenceState.ISSUED:
        w.note(f"  {holder.id} is fenced, confirmed")
        with contextlib.suppress(CoreError):
            w.retry(lambda: lib.extfs_holder_fenced(w.fs.raw, holder.id))
            w.count("fence confirmed")
        w.holders.remove(holder)
        lib.extfs_layout_settle(w.fs.raw)
        return
    state = core.FenceState.ISSUED if holder.fence else core.FenceState.DECIDED
    try:
        w.retry(lambda: lib.extfs_fence_put(w.fs.raw, holder.id, int(state), 1))
    except CoreError as error:
        if not w.sim.crashed and error.errno not in (errno.EBUSY, errno.ENOENT):
            raise
        return
    w.note(f"  fence of {holder.id}: {state.name}")
    w.count(f"fence {state.name.lower()}")
    holder.fence, holder.dead = state, True
    if state is core.FenceState.ISSUED:
        holder.memory.clear()
        holder.held.clear()


@step(6)
def sync(w: World) -> None:
    w.sync()


@step(10)
def look(w: World) -> None:
    w.pump()
    w.look()


@step(3)
def daemon_dies(w: World) -> None:
    """The process ends, the device and the holders live on."""
    w.fs.abandon()
    w.open()
    w.count("daemon died")
    w.check_fences()
    w.look(crashed=True)
    for holder in list(w.holders):
        # a loss that was not durable did not happen
        holder.memory = [lost for lost in holder.memory if lost.syncs != w.syncs]
        if holder.dead:
            if lib.extfs_holder_check(w.fs.raw, holder.id, holder.key) in UNKNOWN:
                w.holders.remove(holder)  # never durable: its number may be given again
            continue
        if not holder.held or w.rng.random() < 0.5:
            w.resume(holder)
        else:
            holder.dead = True


def run_one(run: Run) -> dict[str, int]:
    """Violation, with what broke. Returns what was done, by name."""
    w = World(run)
    try:
        return _run_in(w, run)
    finally:
        w.fs.abandon()  # nothing, but after a failure
        w.sim.close()


def _run_in(w: World, run: Run) -> dict[str, int]:
    names = list(STEPS)
    weights = [STEPS[n][0] for n in names]
    cut = w.rng.random() < 0.5
    if cut:
        w.sim.crash_at(w.sim.events + w.rng.randrange(5, 120))
    try:
        for name in w.rng.choices(names, weights, k=run.steps):
            w.count(name)
            w.note(name)
            STEPS[name][1](w)
            if w.sim.crashed:
                break  # what is in memory now was never promised
        else:
            w.look()
    except OSError as error:
        if not w.sim.crashed and error.errno != errno.ENOSPC:
            raise
        if not w.sim.crashed:
            w.count("full")
    if w.sim.crashed:
        after_the_cut(w)
    try:
        w.fs.close()
    except OSError:
        if not w.sim.crashed:
            raise
    return w.counts


def after_the_cut(w: World) -> None:
    """Everybody lost power. Holders come back, and write what they remember where it was."""
    w.fs.abandon()
    w.sim.restart(w.run.seed)
    w.open()
    w.count("power cut")
    w.check_fences()
    w.look(crashed=True)
    for holder in w.holders:
        holder.memory = [lost for lost in holder.memory if lost.syncs != w.syncs]
        holder.memory += [
            Lost(t.device, *key, w.syncs)
            for key, t in holder.held.items()
            if t.state == INVALID and not t.written  # else its commit may be in doubt
        ]
        holder.held.clear()
        holder.dead = True
    for _ in range(6):
        lost_holder_writes(w)
        server_write(w)
        server_punch(w)
        w.look()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--mutant", default="NONE", choices=[m.name for m in core.Mutant])
    chosen = parser.parse_args()
    total: dict[str, int] = {}
    failed: list[int] = []
    for done, seed in enumerate(range(chosen.seed, chosen.seed + chosen.count)):
        if done and done % PROGRESS == 0:
            print(f"{done} sequences, {len(failed)} failed: {failed}", file=sys.stderr, flush=True)
        run = Run(seed, core.Mutant[chosen.mutant], chosen.steps, chosen.trace)
        try:
            for name, n in run_one(run).items():
                total[name] = total.get(name, 0) + n
        except (Violation, OSError) as error:
            failed.append(seed)
            print(f"seed {seed}: {error}", file=sys.stderr)
            print(
                f"repeat: python -m oracle.canary --seed {seed} --steps {run.steps}"
                f" --mutant {run.mutant.name}",
                file=sys.stderr,
                flush=True,
            )
    print(", ".join(f"{name} {n}" for name, n in sorted(total.items())))
    print(f"{chosen.count} sequences, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
