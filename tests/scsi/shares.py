"""Where the time of a fence goes: in the unit's commands, in the journal, in our own code.

    PYTHONPATH=tests .venv/bin/python -m scsi.shares [FENCES]

From the event that a holder is lost, at the deadline of its recall, to the release of what it had.
The server is in an emulated guest, where Python is some ten times slower than on the machine.
"""

from __future__ import annotations

import sys

import rundir
from guest import image

from scsi.san import San
from scsi.stories import Victim, cables_back

_JOURNAL = "fence_put"
_COMMANDS = ("register", "preempt_abort", "keys", "reservation", "passes", "reset")


def union(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of them covers."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def shares(log: str) -> list[dict[str, float]]:
    """Of each confirmed fence in a daemon's log: milliseconds, all and by what they went to."""
    traced = [line.split() for line in log.splitlines() if line.startswith("trace ")]
    spans = [(name, float(begin), float(end)) for _, name, begin, end in traced]
    found = []
    for name, begin, end in spans:
        if name != "fence-confirmed":
            continue
        inside = [
            (n, b, e) for n, b, e in spans if b >= begin and e <= end and not n.startswith("f")
        ]
        puts = [(b, e) for n, b, e in spans if n == _JOURNAL and b >= begin and e <= end]
        parts = {n: union([(b, e) for m, b, e in inside if m == n]) for n in _COMMANDS}
        parts["journal"] = union(puts)
        own = end - begin - union([(b, e) for n, b, e in inside if n in _COMMANDS] + puts)
        found.append({"all": end - begin, "own": own, **parts})
    return [{name: 1000 * value for name, value in one.items()} for one in found]


def main(fences: int) -> None:
    made = image.ensure(lambda text: print(text, file=sys.stderr))
    rundir.sweep_stale()
    directory = rundir.RunDirectory()
    san = San(made, directory)
    try:
        san.client_of("one")
        san.server.kill()
        san.server.start(fault="trace")
        for _ in range(fences):
            victim = Victim(san, "one")
            victim.write()
            victim.cut_off()
            victim.recall()
            victim.wait_fenced()
            cables_back(san, victim)
            victim.come_back()
            one = shares(san.server.log())[-1]
            print(", ".join(f"{name} {ms:.0f} ms" for name, ms in one.items() if ms), flush=True)
    finally:
        san.close()
        directory.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
