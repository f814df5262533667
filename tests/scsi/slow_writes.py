"""In the server's guest: what a fence leaves under way on a unit that takes its time.

    slow_writes.py DEVICE DEVICE-BY-ANOTHER-NEXUS preempt|fence

The other nexus registers as a client and has WRITES writes under way. Then its key is preempted
(one command), or fenced (what the server does). Prints, as JSON: how many of the writes had
arrived when that was done, how many a while later, and how long it took.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from reservation_contract import CLIENT, Nexuses, outcome_of

from extfs.layout.scsi_unit import ScsiUnit
from extfs.layout.server_reservation import ServerReservation

WRITES = 6
STEP = 1 << 20
PIECE = 4096
WHILE = 10.0


def block(stamp: int) -> mmap.mmap:
    memory = mmap.mmap(-1, PIECE)
    memory[:] = stamp.to_bytes(8, "little") * (PIECE // 8)
    return memory


def write(device: str, number: int, stamp: int) -> None:
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        os.pwrite(descriptor, block(stamp), number * STEP)
    except OSError:
        pass  # refused, or aborted
    finally:
        os.close(descriptor)


def arrived(device: str, stamp: int) -> int:
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, PIECE)
    count = 0
    for number in range(WRITES):
        os.preadv(descriptor, [memory], number * STEP)
        count += memory[:] == block(stamp)[:]
    os.close(descriptor)
    return count


def main(device: str, other: str, how: str) -> None:
    stamp = time.time_ns()
    with tempfile.TemporaryDirectory() as locks:
        nexuses = Nexuses(ScsiUnit(device, locks=Path(locks)), ScsiUnit(other))
        nexuses.wipe()
        server = ServerReservation.register(nexuses.first)
        server.take()
        nexuses.second.register(CLIENT)
        threads = [
            threading.Thread(target=write, args=(other, number, stamp)) for number in range(WRITES)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begin = time.monotonic()
        if how == "preempt":
            nexuses.first.preempt_abort(server.key, CLIENT)
            told = "preempted"
        else:
            told = str(outcome_of(server, CLIENT))
        seconds = time.monotonic() - begin
        then = arrived(device, stamp)
        time.sleep(WHILE)
        later = arrived(device, stamp)
        for thread in threads:
            thread.join()
        nexuses.wipe()
    print(json.dumps({"then": then, "later": later, "seconds": seconds, "told": told}))


if __name__ == "__main__":
    main(*sys.argv[1:])
