"""A device in memory that is larger than memory: blocks of zeros are given back to the host.

For workloads that write zeros and free nothing: their data take no memory, what a filesystem keeps
about them does. Blocks of zeros and holes read the same, so a filesystem cannot tell.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Self

import numpy as np

PAGE = 4096
CHUNK = 8 << 20
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _punch(descriptor: int, offset: int, length: int) -> None:
    flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate64(descriptor, flags, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}")


def _data_end(descriptor: int, offset: int) -> tuple[int, int] | None:
    """The next range of data at or behind an offset."""
    try:
        begin = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    return begin, os.lseek(descriptor, begin, os.SEEK_HOLE)


class Thin:
    """Gives the zeros of a file in memory back, while it is used: a context.

    A block goes when it was all zeros in two passes, `seconds` apart: a page that is being written
    for the first time may read as zeros while the bytes are on their way.
    """

    def __init__(self, path: Path, seconds: float = 15.0) -> None:
        self._seconds = seconds
        self._file = path.open("r+b", buffering=0)
        self._zeros = np.zeros(os.fstat(self._file.fileno()).st_size // PAGE, dtype=bool)
        self._memory = np.empty(CHUNK // 8, dtype=np.uint64)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thin")
        self.given_back = 0
        """Bytes."""
        self.error: OSError | None = None
        """What ended it, and will fill the memory."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        try:
            while not self._end.wait(self._seconds):
                self._pass()
        except OSError as error:
            self.error = error

    def _pass(self) -> None:
        descriptor, offset = self._file.fileno(), 0
        while not self._end.is_set() and (found := _data_end(descriptor, offset)):
            begin, end = found
            offset = min(end, begin + CHUNK)
            self._give_back(begin, offset)

    def _give_back(self, begin: int, end: int) -> None:
        descriptor = self._file.fileno()
        count = (end - begin) // PAGE
        words = self._memory[: count * PAGE // 8]
        os.preadv(descriptor, [words.data], begin)
        zero = ~words.reshape(count, -1).any(axis=1)
        before = self._zeros[begin // PAGE : begin // PAGE + count]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], (zero & before).view(np.int8), [0]))))
        before[:] = zero
        for first, last in edges.reshape(-1, 2).tolist():
            _punch(descriptor, begin + first * PAGE, (last - first) * PAGE)
            self.given_back += (last - first) * PAGE
