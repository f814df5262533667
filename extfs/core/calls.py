"""Calls of the core for event loops: begun and ended in one thread, which has more to do.

`Prepared` is a call with its arguments; `Layouts` makes them (`prepare_get`, ...), and
`Layouts.run` does one in the calling thread, which blocks. `Calls` begins them instead: what a call
does before it has to wait (for the device, for durability, for another operation on the file) it
does at once, in the thread of the loop. That is kept for reading metadata and, on a device that
answers faster than a thread wakes up, for the journal's write; for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from extfs.core.native import Closing, CoreError, checked, ffi, lib

if TYPE_CHECKING:
    from extfs.core.filesystem import Filesystem

__all__ = ["Calls", "Done", "Prepared"]

T = TypeVar("T")

Done = Callable[[Any, "Exception | None"], None]
"""Told the answer, or the exception."""


class Prepared(Generic[T]):
    """A call of the core with its arguments in C, to be made once.

    `blocking` and `begin`: its two forms in the C module. `answer` makes the result of the
    arguments, when the call has succeeded. `memory`: what the arguments point to.
    """

    __slots__ = ("answer", "args", "begin", "blocking", "ino", "memory")

    def __init__(
        self,
        blocking: Callable[..., int],
        begin: Callable[..., int],
        ino: int,
        args: Any,
        answer: Callable[[], T],
        memory: Any = None,
    ) -> None:
        self.blocking = blocking
        self.begin = begin
        self.ino = ino
        self.args = args
        self.answer = answer
        self.memory = memory


class Calls(Closing):
    """Calls that are running. All methods belong to the thread that made it.

    Before the filesystem is closed it is to be closed, and before that no call may be running.
    """

    def __init__(self, filesystem: Filesystem) -> None:
        """OSError: no memory, no descriptors."""
        out = ffi.new("struct extfs_calls **")
        checked(lib.extfs_calls_create(filesystem.raw, out))
        self._raw = out[0]
        self._running: dict[int, tuple[Prepared[Any], Done]] = {}
        self._last = 0

    @property
    def running(self) -> int:
        """How many were begun and are not told."""
        return len(self._running)

    def fileno(self) -> int:
        """A descriptor that is readable when `ended` has something to do; never read it."""
        return int(lib.extfs_calls_fd(self._raw))

    def begin(self, prepared: Prepared[Any], done: Done) -> tuple[Any, Exception | None] | None:
        """Begin a call. The answer or exception, if it is over; None: `ended` will tell `done`."""
        self._last += 1
        number = self._last
        code = prepared.begin(self._raw, prepared.ino, prepared.args, number)
        if code > 0:
            self._running[number] = (prepared, done)
            return None
        return _answer(prepared, code)

    @property
    def pending(self) -> bool:
        """Whether `ended` has something that the descriptor does not tell: after `begin`."""
        return bool(lib.extfs_calls_any(self._raw))

    def ended(self) -> Iterator[tuple[Done, Any, Exception | None]]:
        """Of each call that has ended its `done`, to be told the answer and the exception."""
        result = ffi.new("int *")
        while number := lib.extfs_calls_ended(self._raw, result):
            prepared, done = self._running.pop(number)
            yield done, *_answer(prepared, result[0])

    def close(self) -> None:
        """Give the descriptors back; a second time does nothing."""
        raw, self._raw = self._raw, None
        if raw is not None:
            lib.extfs_calls_destroy(raw)


def _answer(prepared: Prepared[Any], code: int) -> tuple[Any, Exception | None]:
    try:
        checked(code)
    except CoreError as error:
        return None, error
    return prepared.answer(), None
