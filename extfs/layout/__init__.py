"""Policy of layouts: who is fenced, when, and by what. No sockets, no protocols.

The mechanism (grants, recalls, revokes, the quarantine) is the core's; see ``native/layout.h``.
"""

from extfs.layout.cgroups import CgroupFence, Host
from extfs.layout.choice import FenceChoice, parse_fence
from extfs.layout.fencing import (
    Attempt,
    CommandFence,
    FenceDriver,
    FenceOverError,
    NoFence,
    Outcome,
    Verdict,
)
from extfs.layout.policy import FenceStatus, Fencing, PastFence
from extfs.layout.table import CoreTable

__all__ = [
    "Attempt",
    "CgroupFence",
    "CommandFence",
    "CoreTable",
    "FenceChoice",
    "FenceDriver",
    "FenceOverError",
    "FenceStatus",
    "Fencing",
    "Host",
    "NoFence",
    "Outcome",
    "PastFence",
    "Verdict",
    "parse_fence",
]
