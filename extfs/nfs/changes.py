"""The change attribute on the wire, and change_info4 (RFC 8881 5.8.1.4, 3.3.3).

The core counts changes of an inode. After a power cut the counter may go back by what had not
become durable, and grow again over other contents: a client that saw both would take the one for
the other. So the time of the last change is added, as the kernel's server does: a value comes back
only if the clock goes back as well. As the clock may do that, `change_attr_type` promises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from extfs.core import Filesystem, Stat
from extfs.nfs.xdr import Writer

if TYPE_CHECKING:
    from extfs.nfs.riders import Ride

__all__ = ["CHANGE_INFO_BYTES", "ChangeInfo", "value", "value_of", "watched"]

T = TypeVar("T")

CHANGE_INFO_BYTES = 20

_SECONDS_SHIFT = 30
_MASK = (1 << 64) - 1


def value(st: Stat) -> int:
    """The change attribute."""
    return value_of(st.change, st.ctime, st.ctime_ns)


def value_of(change: int, ctime: int, ctime_ns: int) -> int:
    """The same, of its parts."""
    return change + (ctime << _SECONDS_SHIFT) + ctime_ns & _MASK


@dataclass(frozen=True, slots=True)
class ChangeInfo:
    """change_info4: attributes of a directory on both sides of an operation."""

    before: Stat
    after: Stat

    def write(self, out: Writer, changes: int = 1) -> None:
        """`changes`: how many the operation makes; if there were no others it was atomic."""
        out.boolean(self.after.change - self.before.change == changes)
        out.u64(value(self.before))
        out.u64(value(self.after))


def watched(
    fs: Filesystem, ino: int, change: Callable[[], T], ride: Ride | None = None, place: int = 0
) -> tuple[T, ChangeInfo]:
    """Do something to an inode, and say how its change attribute went. May block.

    `place`: of the inode, in the mark of `ride`, which `change` is to carry.
    """
    before = fs.getattr(ino)
    if ride is not None:
        ride.before(place, before)
    result = change()
    return result, ChangeInfo(before, fs.getattr(ino))
