"""The mount option ``fence=...``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from extfs.layout.cgroups import CgroupFence, Host
from extfs.layout.fencing import CommandFence, FenceDriver, NoFence

__all__ = ["FenceChoice", "parse_fence"]


@dataclass(frozen=True, slots=True)
class FenceChoice:
    """What confirms fences: "observe" (default), "cgroup", "none", or "command" with its path."""

    kind: str = "observe"
    path: str = ""

    def driver(self, device: str, context: Mapping[str, str], host: Host) -> FenceDriver:
        """The driver for the filesystem on `device`; `context` is more environment of a command."""
        if self.kind == "none":
            return NoFence()
        if self.kind == "command":
            return CommandFence(self.path, context)
        return CgroupFence(device, kill=self.kind == "cgroup", host=host)


def parse_fence(text: str) -> FenceChoice:
    """Read the option's value. ValueError says what is wrong, for a person."""
    kind, _, path = text.partition(":")
    if kind == "command":
        if not os.path.isabs(path):
            raise ValueError("a fence command is named by its absolute path")
        if not os.access(path, os.X_OK) or not os.path.isfile(path):
            raise ValueError(f"fence command {path} is not an executable file")
        return FenceChoice("command", path)
    if text not in ("observe", "cgroup", "none"):
        raise ValueError(f"{text!r} is none of observe, cgroup, none, command:/PATH")
    return FenceChoice(text)
