"""The C module, its errors and its log. Nothing else imports ``extfs._core``."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

from extfs import _core

ffi: Any = _core.ffi
lib: Any = _core.lib


class CoreError(OSError):
    """A call of the core failed.

    Attributes: ``errno`` for callers that speak POSIX; ``code``, the core's negative return code;
    ``name``, its symbol ("ERR_META_CRC", or "ENOSPC" when it is a plain errno); ``text``, what
    failed.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        self.name: str = string(lib.extfs_error_name(code))
        self.text: str = string(lib.extfs_error_text(code))
        super().__init__(int(lib.extfs_errno(code)), self.text)


class JournalFullError(CoreError):
    """The journal has no room until its next checkpoint. Nothing was done; wait and call again."""


def string(pointer: Any) -> str:
    """A C string."""
    raw: bytes = ffi.string(pointer)
    return raw.decode("utf-8", "replace")


def checked(code: int) -> int:
    """Pass a count or 0 through; raise for a negative code."""
    if code >= 0:
        return code
    if lib.extfs_is_retry(code):
        raise JournalFullError(code)
    raise CoreError(code)


def log_fd() -> int:
    """A descriptor that is readable while the core has lines for `drain_log`. Owned by the core."""
    return int(lib.extfs_log_fd())


def log_lines() -> list[tuple[int, str]]:
    """The core's log lines since the last call: level (as in logging) and text."""
    buffer = ffi.new("char[]", 1024)
    lines = []
    while level := lib.extfs_log_next(buffer, len(buffer)):
        lines.append((int(level), string(buffer)))
    return lines


def io_flusher() -> None:
    """Before threads are made: this process serves file I/O. Memory that it waits for does not wait
    for file I/O then, which may be its own (prctl(2), PR_SET_IO_FLUSHER).

    CoreError: not allowed (CAP_SYS_RESOURCE).
    """
    checked(lib.extfs_io_flusher())


def drain_log(logger: logging.Logger) -> int:
    """Hand the core's log lines to `logger` at their own levels; returns how many there were."""
    lines = log_lines()
    for level, text in lines:
        logger.log(level, "%s", text)
    return len(lines)


class Closing:
    """A context manager that closes at the end of its block."""

    def close(self) -> None:
        """End it; a second time does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
