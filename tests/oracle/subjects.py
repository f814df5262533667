"""What is compared with the oracle: the core's Python calls, or a mount through system calls."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from extfs import core

from .model import Model, Node, State


class Subject(Protocol):
    """Every operation of the driver, on nodes of the model."""

    def add(self, directory: Node, name: bytes, mode: int, target: bytes) -> int: ...
    def link(self, node: Node, directory: Node, name: bytes) -> None: ...
    def unlink(self, directory: Node, name: bytes) -> None: ...
    def rmdir(self, directory: Node, name: bytes) -> None: ...
    def rename(
        self, old: Node, name: bytes, new: Node, new_name: bytes, noreplace: bool, exchange: bool
    ) -> None: ...
    def write(self, node: Node, offset: int, content: bytes, append: bool) -> None: ...
    def read(self, node: Node, offset: int, length: int) -> bytes: ...
    def truncate(self, node: Node, size: int) -> None: ...
    def fallocate(self, node: Node, offset: int, length: int, mode: str) -> None: ...
    def copy(self, source: Node, offset: int, node: Node, to: int, length: int) -> int: ...
    def setxattr(self, node: Node, name: bytes, value: bytes) -> None: ...
    def removexattr(self, node: Node, name: bytes) -> None: ...
    def chmod(self, node: Node, mode: int) -> None: ...
    def fsync(self, node: Node) -> None: ...
    def state(self) -> State: ...


FALLOCATE = {
    "allocate": {},
    "keep": {"keep_size": True},
    "punch": {"punch_hole": True, "keep_size": True},
    "zero": {"zero_range": True},
    "zero-keep": {"zero_range": True, "keep_size": True},
}


class CoreSubject:
    """The core in this process."""

    def __init__(self, fs: core.Filesystem) -> None:
        self.fs = fs

    def add(self, directory: Node, name: bytes, mode: int, target: bytes) -> int:
        cred = core.Cred(uid=0, gid=0, umask=0)
        if stat.S_ISDIR(mode):
            return self.fs.mkdir(directory.ino, name, stat.S_IMODE(mode), cred).ino
        if stat.S_ISLNK(mode):
            return self.fs.symlink(directory.ino, name, target, cred).ino
        return self.fs.mknod(directory.ino, name, mode, 0, cred).ino

    def link(self, node: Node, directory: Node, name: bytes) -> None:
        self.fs.link(node.ino, directory.ino, name)

    def unlink(self, directory: Node, name: bytes) -> None:
        self.fs.unlink(directory.ino, name)

    def rmdir(self, directory: Node, name: bytes) -> None:
        self.fs.rmdir(directory.ino, name)

    def rename(
        self, old: Node, name: bytes, new: Node, new_name: bytes, noreplace: bool, exchange: bool
    ) -> None:
        self.fs.rename(old.ino, name, new.ino, new_name, noreplace=noreplace, exchange=exchange)

    def write(self, node: Node, offset: int, content: bytes, append: bool) -> None:
        whole(len(content), self.fs.write(node.ino, offset, content, append=append))

    def read(self, node: Node, offset: int, length: int) -> bytes:
        return self.fs.read(node.ino, offset, length)

    def truncate(self, node: Node, size: int) -> None:
        self.fs.truncate(node.ino, size)

    def fallocate(self, node: Node, offset: int, length: int, mode: str) -> None:
        self.fs.fallocate(node.ino, offset, length, **FALLOCATE[mode])

    def copy(self, source: Node, offset: int, node: Node, to: int, length: int) -> int:
        expected = max(0, min(length, len(source.content) - offset))
        return whole(expected, self.fs.copy(source.ino, offset, node.ino, to, length))

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        self.fs.setxattr(node.ino, name, value)

    def removexattr(self, node: Node, name: bytes) -> None:
        self.fs.removexattr(node.ino, name)

    def chmod(self, node: Node, mode: int) -> None:
        self.fs.setattr(node.ino, mode=mode)

    def fsync(self, node: Node) -> None:
        self.fs.fsync(node.ino)

    def state(self) -> State:
        result: State = {}
        queue = [1]
        while queue:
            ino = queue.pop()
            if ino in result:
                continue
            st = self.fs.getattr(ino)
            entries: frozenset[tuple[bytes, int]] = frozenset()
            target = b""
            if stat.S_ISDIR(st.mode):
                entries = frozenset((entry.name, entry.ino) for entry in self.fs.scandir(ino))
                queue.extend(child for _, child in entries)
            elif stat.S_ISLNK(st.mode):
                target = self.fs.readlink(ino)
            xattrs = frozenset(
                (name, self.fs.getxattr(ino, name)) for name in self.fs.listxattr(ino)
            )
            size = 0 if stat.S_ISDIR(st.mode) else st.size
            result[ino] = (st.mode, st.nlink, size, target, xattrs, entries)
        return result


class MountSubject:
    """A mounted filesystem, by paths and system calls."""

    def __init__(self, root: Path, model: Model) -> None:
        self.root = os.fsencode(root)
        self.model = model

    def _path(self, node: Node, *names: bytes) -> bytes:
        return b"/".join([self.root, *self.model.path(node), *names])

    def _with_fd(self, node: Node, flags: int, call: Callable[[int], object]) -> object:
        fd = os.open(self._path(node), flags | os.O_CLOEXEC)
        try:
            return call(fd)
        finally:
            os.close(fd)

    def add(self, directory: Node, name: bytes, mode: int, target: bytes) -> int:
        path = self._path(directory, name)
        if stat.S_ISDIR(mode):
            os.mkdir(path, stat.S_IMODE(mode))
        elif stat.S_ISLNK(mode):
            os.symlink(target, path)
        elif stat.S_ISREG(mode):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IMODE(mode)))
        else:
            os.mknod(path, mode)
        if not stat.S_ISLNK(mode):
            os.chmod(path, stat.S_IMODE(mode))  # whatever the umask is
        return os.lstat(path).st_ino

    def link(self, node: Node, directory: Node, name: bytes) -> None:
        os.link(self._path(node), self._path(directory, name), follow_symlinks=False)

    def unlink(self, directory: Node, name: bytes) -> None:
        os.unlink(self._path(directory, name))

    def rmdir(self, directory: Node, name: bytes) -> None:
        os.rmdir(self._path(directory, name))

    def rename(
        self, old: Node, name: bytes, new: Node, new_name: bytes, noreplace: bool, exchange: bool
    ) -> None:
        renameat2(self._path(old, name), self._path(new, new_name), noreplace + 2 * exchange)

    def write(self, node: Node, offset: int, content: bytes, append: bool) -> None:
        def call(fd: int) -> None:
            whole(len(content), os.write(fd, content) if append else os.pwrite(fd, content, offset))

        self._with_fd(node, os.O_WRONLY | (os.O_APPEND if append else 0), call)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        result = self._with_fd(node, os.O_RDONLY, lambda fd: os.pread(fd, length, offset))
        assert isinstance(result, bytes)
        return result

    def truncate(self, node: Node, size: int) -> None:
        os.truncate(self._path(node), size)

    def fallocate(self, node: Node, offset: int, length: int, mode: str) -> None:
        bits = {"allocate": 0, "keep": 1, "punch": 3, "zero": 16, "zero-keep": 17}[mode]
        self._with_fd(node, os.O_RDWR, lambda fd: fallocate(fd, bits, offset, length))

    def copy(self, source: Node, offset: int, node: Node, to: int, length: int) -> int:
        out = os.open(self._path(source), os.O_RDONLY | os.O_CLOEXEC)
        into = os.open(self._path(node), os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.copy_file_range(out, into, length, offset, to)
        finally:
            os.close(into)
            os.close(out)

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        os.setxattr(self._path(node), name, value, follow_symlinks=False)

    def removexattr(self, node: Node, name: bytes) -> None:
        os.removexattr(self._path(node), name, follow_symlinks=False)

    def chmod(self, node: Node, mode: int) -> None:
        os.chmod(self._path(node), mode)

    def fsync(self, node: Node) -> None:
        self._with_fd(node, os.O_RDONLY, os.fsync)

    def state(self) -> State:
        result: State = {}
        queue = [(self.root, os.lstat(self.root).st_ino)]
        while queue:
            path, ino = queue.pop()
            if ino in result:
                continue
            st = os.lstat(path)
            entries: frozenset[tuple[bytes, int]] = frozenset()
            target = b""
            if stat.S_ISDIR(st.st_mode):
                entries = frozenset((e.name, e.inode()) for e in os.scandir(path))
                queue.extend((path + b"/" + name, child) for name, child in entries)
            elif stat.S_ISLNK(st.st_mode):
                target = os.readlink(path)
            xattrs = frozenset(
                (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False))
                for name in os.listxattr(path, follow_symlinks=False)
            )
            size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
            result[ino] = (st.st_mode, st.st_nlink, size, target, xattrs, entries)
        return result


def whole(expected: int, count: int) -> int:
    """A short count is how a call says that it met an error half-way: EIO, as a retry would."""
    if count < expected:
        raise OSError(errno.EIO, f"{count} bytes of {expected}")
    return count


def _libc_call(name: str, *arguments: object) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2); flags: 1 RENAME_NOREPLACE, 2 RENAME_EXCHANGE."""
    _libc_call("renameat2", -100, old, -100, new, flags)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode."""
    import ctypes

    _libc_call("fallocate", fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
