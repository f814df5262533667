"""What the daemon does when the machine, or the cgroup it runs in, is short of memory.

The caches of metadata blocks and of inodes are bounded by options of the mount, or by a share of
the memory; below that they grow as they are used. Under pressure they give back what is clean and
unused. The mechanism is the core's (native/buffer.h, native/inode.h); here is when, and how much.
"""

from extfs.memory.limit import MemoryLimit, find_limit
from extfs.memory.policy import Shrinker
from extfs.memory.size import cache_size
from extfs.memory.sources import Source, find_sources

__all__ = ["MemoryLimit", "Shrinker", "Source", "cache_size", "find_limit", "find_sources"]
