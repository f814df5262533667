"""The FUSE front in Python: the opcodes that the bridge (``native/bridge_dispatch.c``) forwards.

`Operations` answers them; `Session` runs pyfuse3 on the bridge's socket under trio. `IdlePoll` and
`latency_device`: whether idle CPUs poll while requests follow one another.
"""

from extfs.fuse.idle import IdlePoll, latency_device
from extfs.fuse.operations import Operations
from extfs.fuse.session import Session

__all__ = ["IdlePoll", "Operations", "Session", "latency_device"]
