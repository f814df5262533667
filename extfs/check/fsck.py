"""The check as a whole: what is read in which order, and repair until nothing changes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extfs.check import layout
from extfs.check.attributes import Attributes, Targets
from extfs.check.fixes import Fixes
from extfs.check.holders import Holders
from extfs.check.inventory import Inventory
from extfs.check.layout import Magic
from extfs.check.log import Log, Writer, read_log, replay
from extfs.check.names import Names
from extfs.check.repair import Repair, RepairError, reset_heartbeat, restore_super
from extfs.check.report import Finding, Report
from extfs.check.space import Space
from extfs.check.volume import DamageError, Volume, VolumeError

EXIT_CLEAN = 0
EXIT_REPAIRED = 1
EXIT_ERRORS_LEFT = 4
EXIT_OPERATIONAL = 8

_PASSES = 4

Progress = Callable[[str, int, int], None]
"""What is being done, steps done, steps in all (0: not known)."""


@dataclass
class Result:
    """Outcome of a run."""

    exit_code: int
    report: Report
    """What the last pass found."""
    repaired: list[Finding] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "exit_code": self.exit_code,
            "clean": self.report.clean,
            "errors": self.report.errors,
            "findings": [finding.as_json() for finding in self.report.findings],
            "counts": dict(self.report.counts),
            "repaired": [finding.as_json() for finding in self.repaired],
            "messages": self.messages,
            "facts": self.report.facts,
        }


@dataclass
class _State:
    report: Report
    fixes: Fixes
    log: Log
    inventory: Inventory | None = None
    space: Space | None = None


def _this_boot() -> tuple[bytes, bytes]:
    """(boot id, host name) as a heartbeat has them."""
    try:
        boot = bytes.fromhex(
            Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        )
    except (OSError, ValueError):
        boot = bytes(16)
    return boot, socket.gethostname().encode()[:63]


def _read_heartbeat(volume: Volume) -> dict[str, Any] | None:
    try:
        block = volume.read_meta(layout.HEARTBEAT_BLOCK, Magic.HEARTBEAT, 0)
    except DamageError:
        return None
    return layout.HEARTBEAT.unpack(block)


def refuse_when_mounted_elsewhere(
    volume: Volume, sleep: Callable[[float], None] = time.sleep
) -> None:
    """`VolumeError` MOUNTED when another host keeps writing its heartbeat.

    On this host the device's lock says so; a heartbeat of this boot is one of a process that died.
    Any other is watched for half an interval more than it promises.
    """
    before = _read_heartbeat(volume)
    if before is None or before["state"] != layout.HEARTBEAT_MOUNTED:
        return
    if (before["boot_id"], before["host"].rstrip(b"\0")) == _this_boot() and any(before["boot_id"]):
        return
    sleep(min(before["interval_ms"], 60_000) * 1.5 / 1000)
    volume.forget_cached(layout.HEARTBEAT_BLOCK)
    now = _read_heartbeat(volume)
    if now is None or now["seq"] != before["seq"]:
        host = before["host"].rstrip(b"\0").decode("utf-8", "replace")
        raise VolumeError(
            "MOUNTED", f"{volume.path}: mounted on host {host} by process {before['pid']}"
        )


def check_volume(volume: Volume, progress: Progress | None = None) -> _State:
    """One pass over everything. The journal is replayed into the volume's overlay."""
    report, fixes = Report(), Fixes()
    volume.overlay.clear()
    for damage in volume.load_super():
        fixes.supers = True
        report.add(
            damage.code,
            f"superblock, block {damage.block}",
            damage.text,
            "write it again from the other copy",
        )
    _check_heartbeat(volume, report, fixes)
    log = _check_log(volume, report, fixes)
    state = _State(report, fixes, log)
    if not log.usable:
        return state
    inventory = Inventory(volume, report, fixes)
    if not inventory.load_root():
        return state
    inventory.load_ags()
    state.inventory = inventory
    state.space = _passes(inventory, progress)
    return state


def _check_heartbeat(volume: Volume, report: Report, fixes: Fixes) -> None:
    try:
        block = volume.read_meta(layout.HEARTBEAT_BLOCK, Magic.HEARTBEAT, 0)
    except DamageError as damage:
        fixes.heartbeat = True
        report.add(damage.code, "heartbeat", damage.text, "write a new one")
        return
    beat = layout.HEARTBEAT.unpack(block)
    if beat["state"] == layout.HEARTBEAT_MOUNTED:
        host = beat["host"].rstrip(b"\0").decode("utf-8", "replace")
        report.note(
            "NOT_UNMOUNTED",
            "heartbeat",
            f"not unmounted by process {beat['pid']} on {host or 'an unknown host'}",
        )


def _check_log(volume: Volume, report: Report, fixes: Fixes) -> Log:
    log = read_log(volume)
    for damage in log.damages:
        if log.header is not None:
            fixes.headers = True
        repair = "write it again" if log.header is not None else ""
        report.add(damage.code, f"journal header, block {damage.block}", damage.text, repair)
    if log.header is None:
        report.add("JOURNAL", "journal", "no header is readable, so nobody knows what to replay")
    elif log.gap is not None:
        report.add(
            "JOURNAL",
            "journal",
            f"record {log.next_xid} at position {log.end_lsn} is damaged: "
            f"record {log.gap.xid} behind it is whole",
        )
    elif log.fault:
        report.add("JOURNAL", "journal", log.fault)
    elif log.records:
        count = replay(volume, log)
        report.note(
            "JOURNAL_REPLAYED",
            "journal",
            f"{len(log.records)} records with {count} blocks were not home yet",
        )
    return log


def _passes(inventory: Inventory, progress: Progress | None) -> Space:
    report = inventory.report
    total = inventory.expected_records()
    done = 0
    title = "inodes"

    def step(_nodes: int) -> None:
        nonlocal done
        done += 1
        if progress is not None and done % 64 == 0:
            progress(title, done, nodes)

    # Nodes are not counted anywhere; leaves of every kind hold some 40 records.
    nodes = max(total // 40, 1)
    inventory.walker.progress = step
    space, names = Space(inventory), Names(inventory)
    attributes, targets = Attributes(inventory), Targets(inventory)
    holders = Holders(inventory)
    inventory.read_inodes()
    inventory.read_small_trees()
    holders.read()
    title = "extents"
    space.read_extents()
    title = "names"
    names.read()
    title = "attributes"
    attributes.read()
    targets.read()
    title = "links"
    names.check()
    attributes.check()
    targets.check()
    title = "space"
    space.check_extents()
    holders.check()
    space.check_refcounts()
    space.read_ags()
    space.check_owners()
    if report.has("TREE_COUNT"):
        inventory.fixes.root = True
        inventory.fixes.ags |= {
            ag.number
            for ag in inventory.ags
            if ag.values and (ag.by_block.records or ag.by_len.records)
        }
    report.facts = {
        "inodes": len(inventory.ino),
        "extents": len(inventory.ext_start),
        "orphans": len(inventory.orphans),
        "intents": len(inventory.intents),
        "nodes": len(inventory.walker.nodes),
        "free_blocks": inventory.root["free_blocks"],
        "total_blocks": inventory.volume.super.total_blocks,
    }
    return space


def _repair(volume: Volume, state: _State, messages: list[str]) -> bool:
    """Carry out what can be; False when nothing was."""
    fixes = state.fixes
    acted = False
    if fixes.supers:
        restore_super(volume)
        acted = True
    if fixes.heartbeat:
        reset_heartbeat(volume)
        acted = True
    if not state.log.usable:
        if fixes.any:
            messages.append("the journal is damaged: nothing that depends on it is repaired")
        return acted
    inventory, space = state.inventory, state.space
    change = fixes.metadata and inventory is not None
    if change and inventory is not None and inventory.core_damaged:
        messages.append(
            "part of a tree is not readable or contradicts the rest: what it held is unknown, so "
            "counts, links and free space are left as they are"
        )
        change = False
    if not (change or state.log.records or fixes.headers):
        return acted
    writer = Writer.after_replay(volume, state.log)
    acted = acted or bool(state.log.records) or fixes.headers
    if not change or inventory is None or space is None:
        return acted
    try:
        Repair(inventory, space, writer).run()
    except RepairError as error:
        messages.append(f"not repaired: {error}")
        return acted
    return True


def fsck(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Progress | None = None
) -> Result:
    """Check; with `repair` put right what needs no guess. `VolumeError`: cannot check at all."""
    with Volume(path, writable=repair) as volume:
        volume.load_super()
        refuse_when_mounted_elsewhere(volume)
        state = check_volume(volume, progress)
        if not repair:
            code = EXIT_CLEAN if state.report.clean else EXIT_ERRORS_LEFT
            return Result(code, state.report)
        messages: list[str] = []
        repaired: list[Finding] = []
        for _ in range(_PASSES):
            if not (state.fixes.any or state.log.records):
                break
            before = state.report
            if not _repair(volume, state, messages):
                break
            state = check_volume(volume, progress)
            left = set(state.report.findings)
            repaired += [
                finding for finding in before.findings if finding.repair and finding not in left
            ]
            if state.report.findings == before.findings:
                break
        if state.log.usable and state.report.has("NOT_UNMOUNTED"):
            beat = _read_heartbeat(volume)
            reset_heartbeat(volume, beat["seq"] if beat else 0)
        if not state.report.clean:
            code = EXIT_ERRORS_LEFT
        else:
            code = EXIT_REPAIRED if repaired else EXIT_CLEAN
        return Result(code, state.report, repaired, list(dict.fromkeys(messages)))


__all__ = [
    "EXIT_CLEAN",
    "EXIT_ERRORS_LEFT",
    "EXIT_OPERATIONAL",
    "EXIT_REPAIRED",
    "Progress",
    "Result",
    "VolumeError",
    "check_volume",
    "fsck",
]
