"""The README's tables of `scripts/bench nfs`: `python -m benchmarks.nfs_markdown RESULT.json`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from guest import fio

from . import nfs, nfs_guest, nfs_where


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def compounds(found: dict[str, Any]) -> Iterator[str]:
    """Medians of the rounds."""
    peer = found["getattr"]["ganesha"]

    def median(rounds: list[dict[str, Any]], key: str) -> float:
        return statistics.median(entry[key] for entry in rounds)

    yield _row(("compound", "extfs", "NFS-Ganesha", "aim"))
    yield "|---|---|---|---|"
    name = "SEQUENCE+PUTFH+GETATTR (15 attributes), median"
    for title, key, aim in ((name, "median", "200 us"), ("the same, 99 %", "p99", "")):
        theirs = f"{median(peer, key):.0f} us" if peer else ""
        yield _row((title, f"{median(found['getattr']['extfs'], key):.0f} us", theirs, aim))
    ours = f"{median(found['getattr']['extfs'], 'rate') / 1000:.1f} k/s"
    theirs = f"{median(peer, 'rate') / 1000:.1f} k/s" if peer else ""
    yield _row((f"the same over {nfs.CONNECTIONS} connections", ours, theirs, "4 k/s"))
    for key, (title, aim) in nfs.LAYOUT_CALLS.items():
        wanted = f"{aim[2:]} us" if aim else ""
        yield _row((title, f"{statistics.median(found[key]):.0f} us", "", wanted))
    yield _row(
        ("memory of an idle client", f"{found['idle_client_bytes'] / 1024:.1f} KiB", "", "64 KiB")
    )


def jobs(guests: dict[str, Any]) -> Iterator[str]:
    """Medians of the rounds, and of the ratios in each."""
    yield _row(
        (
            "job",
            "raw disk",
            "extfs",
            "knfsd",
            "extfs / raw",
            "extfs / knfsd",
            "extfs / raw, held back",
        )
    )
    yield "|---|---|---|---|---|---|---|"
    for job, title in nfs_guest.TITLES.items():
        key, unit = ("bandwidth", nfs_guest.MIB) if job.startswith("seq") else ("iops", 1)
        by_place = {
            rows: {
                (row["place"], row["round"]): row[key] / unit
                for row in guests[rows]
                if row["job"] == job
            }
            for rows in ("rows", "slow_rows")
        }

        def rounds(rows: str, by_place: dict[str, Any] = by_place) -> list[int]:
            return sorted({number for _, number in by_place[rows]})

        def median(place: str, by_place: dict[str, Any] = by_place) -> float:
            return statistics.median(by_place["rows"][place, n] for n in rounds("rows", by_place))

        def ratio(rows: str, other: str, by_place: dict[str, Any] = by_place) -> float:
            found = by_place[rows]
            return statistics.median(
                found["extfs", n] / found[other, n] for n in rounds(rows, by_place)
            )

        yield _row(
            (
                f"{title}, {'iops' if unit == 1 else 'MiB/s'}",
                *(f"{median(place):,.0f}" for place in fio.PLACES),
                f"{ratio('rows', 'raw'):.2f}", f"{ratio('rows', 'knfsd'):.2f}",
                f"{ratio('slow_rows', 'raw'):.2f}",
            )
        )  # fmt: skip
    cold = guests["cold_write_mib_s"]
    each = (f"{cold['extfs']:,.0f}", f"{cold['knfsd']:,.0f}")
    ratio_of_cold = f"{cold['extfs'] / cold['knfsd']:.2f}"
    yield _row(("first write of a new file, 1 MiB, MiB/s", "", *each, "", ratio_of_cold, ""))


def where(found: dict[str, Any]) -> Iterator[str]:
    """What the guest's CPU does for each I/O."""
    titles = (nfs_guest.TITLES[job] for job in found["costs"])
    yield _row(("1,000 instructions for each I/O: raw disk, layout", *titles))
    yield f"|---|{'---|' * len(found['costs'])}"
    for cells in nfs_where.rows(found):
        yield _row(cells)


def main() -> None:
    """The command."""
    found = json.loads(Path(sys.argv[1]).read_text())
    lines = [*compounds(found)]
    if found["guests"]:
        lines += ["", *jobs(found["guests"]), "", *where(found["guests"]["where"])]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
