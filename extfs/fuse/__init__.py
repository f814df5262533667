"""The FUSE front in Python: the opcodes that the bridge (``native/bridge_dispatch.c``) forwards.

`Operations` answers them; `Session` runs pyfuse3 on the bridge's socket under trio.
"""

from extfs.fuse.operations import Operations
from extfs.fuse.session import Session

__all__ = ["Operations", "Session"]
