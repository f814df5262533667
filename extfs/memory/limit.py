"""How near the cgroup of this process is to its memory limit.

Pressure comes late there: a daemon's memory is anonymous, its file pages are few, so without swap
reclaim finds nothing in a full cgroup and the next page kills somebody, before anybody has waited
for long. So the use is looked at from time to time, and caches may not grow beyond what is left.
Pages of files count in it, but are as good as free and fill every cgroup in time: they are left
out.

See Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from extfs.layout.cgroups import CgroupError, Host, cgroup_root

__all__ = ["MemoryLimit", "find_limit"]

_NO_LIMIT = 1 << 60
"""From here on version 1 means none."""


@dataclass(frozen=True, slots=True)
class _Files:
    limits: tuple[str, ...]
    use: str
    pages: tuple[str, ...]
    """Of files, in memory.stat; of the cgroup and all below it."""


_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True, slots=True)
class _Group:
    directory: Path
    files: _Files

    def _number(self, name: str) -> int | None:
        try:
            text = (self.directory / name).read_text().strip()
        except OSError:
            return None
        number = int(text) if text.isdecimal() else _NO_LIMIT
        return number if number < _NO_LIMIT else None

    def limit(self) -> int | None:
        """Bytes, now."""
        found = [self._number(name) for name in self.files.limits]
        return min((number for number in found if number is not None), default=None)

    def used(self) -> int:
        """Bytes without pages of files."""
        used = self._number(self.files.use) or 0
        with contextlib.suppress(OSError, ValueError):
            for line in (self.directory / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name in self.files.pages:
                    used -= int(value)
        return used


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The limits of a cgroup and of those above it; they may change at any time."""

    groups: tuple[_Group, ...]

    def bytes(self) -> int | None:
        """The least of them; None: there is none."""
        return min((n for group in self.groups if (n := group.limit()) is not None), default=None)

    def room(self) -> int | None:
        """Bytes until seven eighths of one of them are used, negative above; None: no limit."""
        return min(
            (
                limit - limit // 8 - group.used()
                for group in self.groups
                if (limit := group.limit()) is not None
            ),
            default=None,
        )


def _up(root: Path, path: str, files: _Files) -> Iterator[_Group]:
    """The cgroup and those above it, the root too: in a container it may have a limit."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:  # outside of what this process sees
        parts = []
    for count in range(len(parts), -1, -1):
        directory = root.joinpath(*parts[:count])
        if (directory / files.use).exists():
            yield _Group(directory, files)


def _root_of_v1(host: Host) -> Path | None:
    for line in (host.proc / "mounts").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] == "cgroup" and "memory" in fields[3].split(","):
            return Path(fields[1])
    return None


def find_limit(host: Host | None = None) -> MemoryLimit | None:
    """The cgroups of this process that count memory; None: there are none."""
    host = host or Host()
    groups: list[_Group] = []
    with contextlib.suppress(OSError):
        for line in (host.proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(",") and (root := _root_of_v1(host)) is not None:
                groups += _up(root, path, _V1)
            elif not controllers:
                with contextlib.suppress(CgroupError):
                    groups += _up(cgroup_root(host), path, _V2)
    return MemoryLimit(tuple(groups)) if groups else None
