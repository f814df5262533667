"""README: tables of `scripts/bench mount`. `python -m benchmarks.mount_markdown RESULT.json ...`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import report, targets

HEADINGS = {
    "extfs": "extfs",
    "classic": "by /dev/fuse",
    "halting": "`idle_poll=off`",
    "writeback": "`writeback_cache`",
    "fuse2fs": "fuse2fs",
    "ntfs3g": "ntfs-3g",
    "xfs": "XFS",
    "polling": "XFS, polling",
    "raw": "raw",
}
RATIOS = {"peer": "/ FUSE peer", "xfs": "/ XFS", "raw": "/ raw"}


def lines(jobs: Mapping[str, Any]) -> Iterator[str]:
    """A row a job: medians, and extfs's ratios."""
    names = [name for name in targets.NAMES if any(name in job["median"] for job in jobs.values())]
    cells = ["job", "unit", *(HEADINGS[name] for name in names), *RATIOS.values()]
    yield f"| {' | '.join(cells)} |"
    yield "|---" * len(cells) + "|"
    for job in jobs.values():
        rates, ratios = job["median"], job["ratios"]
        cells = [
            job["title"],
            job["unit"],
            *(report.number(rates[name]) if name in rates else "" for name in names),
            *(f"{ratios[key]:.2f}" if key in ratios else "" for key in RATIOS),
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table of all jobs of the results that are named."""
    jobs: dict[str, Any] = {}
    for path in sys.argv[1:]:
        jobs |= json.loads(Path(path).read_text())["jobs"]
    print("\n".join(lines(jobs)))


if __name__ == "__main__":
    main()
