"""A client that the oracle compares with: every operation goes through the protocol.

What NFSv4.2 has no operation for (renames with flags, some kinds of fallocate, attributes that are
not user's) is done by the core directly, as a local user would: both ways lead to one filesystem.
Checks that a client's kernel makes before it asks the server are made here.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from oracle.model import Node, State
from oracle.subjects import FALLOCATE, CoreSubject

from extfs.core import Filesystem
from extfs.nfs import constants as n
from extfs.nfs.service import Service
from extfs.nfs.xdr import Reader
from nfs import calls, file_calls
from nfs.calls import Call, Failed, do
from nfs.wire import Session, op, opaque, u32, u64

_ERRNO = {
    n.NFS4ERR_PERM: errno.EPERM,
    n.NFS4ERR_NOENT: errno.ENOENT,
    n.NFS4ERR_IO: errno.EIO,
    n.NFS4ERR_ACCESS: errno.EACCES,
    n.NFS4ERR_EXIST: errno.EEXIST,
    n.NFS4ERR_NOTDIR: errno.ENOTDIR,
    n.NFS4ERR_ISDIR: errno.EISDIR,
    n.NFS4ERR_INVAL: errno.EINVAL,
    n.NFS4ERR_NOSPC: errno.ENOSPC,
    n.NFS4ERR_ROFS: errno.EROFS,
    n.NFS4ERR_NAMETOOLONG: errno.ENAMETOOLONG,
    n.NFS4ERR_NOTEMPTY: errno.ENOTEMPTY,
    n.NFS4ERR_NOXATTR: errno.ENODATA,
}
_TYPES = {n.NF4DIR: stat.S_IFDIR, n.NF4LNK: stat.S_IFLNK, n.NF4FIFO: stat.S_IFIFO}
_NEW = {stat.S_IFDIR: n.NF4DIR, stat.S_IFLNK: n.NF4LNK, stat.S_IFIFO: n.NF4FIFO}
_STATE = (
    n.FATTR4_TYPE,
    n.FATTR4_SIZE,
    n.FATTR4_FILEHANDLE,
    n.FATTR4_FILEID,
    n.FATTR4_MODE,
    n.FATTR4_NUMLINKS,
)


def below(node: Node, ancestor: Node) -> bool:
    """Is it that directory, or a directory in it?"""
    while node is not ancestor and node.parent is not None and node.parent is not node:
        node = node.parent
    return node is ancestor


class NfsSubject(CoreSubject):
    """A client with one session, which opens a file for each operation on its contents."""

    def __init__(self, fs: Filesystem, service: Service, owner: bytes = b"model") -> None:
        super().__init__(fs)
        self.session = Session(service, owner)
        self.files = file_calls.FileClient(self.session)
        self.handles: dict[int, bytes] = {1: do(self.session, calls.putrootfh(), calls.getfh())[-1]}

    def _do(self, *steps: Call) -> list[object]:
        try:
            return do(self.session, *steps)
        except Failed as failed:
            raise OSError(_ERRNO.get(failed.status, errno.EPROTO), str(failed)) from None

    def _on(self, node: Node, *steps: Call) -> object:
        return self._do(calls.putfh(self._handle(node)), *steps)[-1]

    def _handle(self, node: Node) -> bytes:
        """Known since the file was made, or seen in a listing."""
        return self.handles[node.ino]

    def _local(self, call: Callable[[], None]) -> None:
        call()
        self.fs.sync()

    # -- names --

    def add(self, directory: Node, name: bytes, mode: int, target: bytes) -> int:
        wanted = {n.FATTR4_MODE: u32(stat.S_IMODE(mode))}
        seen = (calls.getfh(), calls.getattr_(n.FATTR4_FILEID))
        if stat.S_ISREG(mode):
            return self._add_file(directory, name, calls.fattr(wanted))
        made = calls.create(_NEW[stat.S_IFMT(mode)], name, calls.fattr(wanted), target=target)
        *_, handle, found = self._do(calls.putfh(self._handle(directory)), made, *seen)
        assert isinstance(handle, bytes)
        assert isinstance(found, dict)
        self.handles[found[n.FATTR4_FILEID]] = handle
        ino: int = found[n.FATTR4_FILEID]
        return ino

    def _add_file(self, directory: Node, name: bytes, wanted: bytes) -> int:
        try:
            opened = self.files.open(
                name,
                fh=self._handle(directory),
                claim=file_calls.by_name(name),
                how=u32(n.OPEN4_CREATE) + u32(n.GUARDED4) + wanted,
            )
            self.files.close(opened.fh, opened.stateid)
        except file_calls.StatusError as failed:
            raise OSError(_ERRNO.get(failed.status, errno.EPROTO), str(failed)) from None
        found = self._do(calls.putfh(opened.fh), calls.getattr_(n.FATTR4_FILEID))[-1]
        assert isinstance(found, dict)
        self.handles[found[n.FATTR4_FILEID]] = opened.fh
        ino: int = found[n.FATTR4_FILEID]
        return ino

    def _type(self, directory: Node, name: bytes) -> int:
        found = self._on(directory, calls.lookup(name), calls.getattr_(n.FATTR4_TYPE))
        assert isinstance(found, dict)
        kind: int = found[n.FATTR4_TYPE]
        return kind

    def link(self, node: Node, directory: Node, name: bytes) -> None:
        if node.is_dir:
            raise OSError(errno.EPERM, "the client's kernel asks nobody")
        self._do(
            calls.putfh(self._handle(node)),
            calls.savefh(),
            calls.putfh(self._handle(directory)),
            calls.link(name),
        )

    def unlink(self, directory: Node, name: bytes) -> None:
        if self._type(directory, name) == n.NF4DIR:
            raise OSError(errno.EISDIR, "the client's kernel asks nobody")
        self._on(directory, calls.remove(name))

    def rmdir(self, directory: Node, name: bytes) -> None:
        if self._type(directory, name) != n.NF4DIR:
            raise OSError(errno.ENOTDIR, "the client's kernel asks nobody")
        self._on(directory, calls.remove(name))

    def rename(
        self, old: Node, name: bytes, new: Node, new_name: bytes, noreplace: bool, exchange: bool
    ) -> None:
        moved = old.entries.get(name)
        if noreplace or exchange:
            self._local(
                lambda: CoreSubject.rename(self, old, name, new, new_name, noreplace, exchange)
            )
            return
        try:
            self._do(
                calls.putfh(self._handle(old)),
                calls.savefh(),
                calls.putfh(self._handle(new)),
                calls.rename(name, new_name),
            )
        except OSError as error:
            if error.errno == errno.EEXIST and moved is not None and below(new, moved):
                raise OSError(errno.EINVAL, "the client's kernel sees that first") from None
            if error.errno == errno.EEXIST:  # types that do not fit: the kernel looks first
                directory = self._type(old, name) == n.NF4DIR
                raise OSError(errno.ENOTDIR if directory else errno.EISDIR, str(error)) from None
            raise

    # -- contents --

    def _with_open(self, node: Node, access: int, steps: Callable[[bytes], list[Call]]) -> object:
        """OPEN, some operations with its stateid, CLOSE."""
        try:
            opened = self.files.open(fh=self._handle(node), access=access | file_calls.NO_DELEG)
        except file_calls.StatusError as failed:
            raise OSError(_ERRNO.get(failed.status, errno.EPROTO), str(failed)) from None
        try:
            return self._on(node, *steps(file_calls.stateid(opened.stateid)))
        finally:
            self.files.close(opened.fh, opened.stateid)

    def write(self, node: Node, offset: int, content: bytes, append: bool) -> None:
        if append:
            found = self._on(node, calls.getattr_(n.FATTR4_SIZE))
            assert isinstance(found, dict)
            offset = found[n.FATTR4_SIZE]

        def steps(held: bytes) -> list[Call]:
            fields = (held, u64(offset), u32(n.FILE_SYNC4), opaque(content))
            return [Call(op(n.OP_WRITE, *fields), _written)]

        assert self._with_open(node, file_calls.WRITE, steps) == len(content)

    def read(self, node: Node, offset: int, length: int) -> bytes:
        def steps(held: bytes) -> list[Call]:
            return [Call(op(n.OP_READ, held, u64(offset), u32(length)), _contents)]

        found = self._with_open(node, file_calls.READ, steps)
        assert isinstance(found, bytes)
        return found

    def truncate(self, node: Node, size: int) -> None:
        self._on(node, calls.setattr_({n.FATTR4_SIZE: u64(size)}))

    def fallocate(self, node: Node, offset: int, length: int, mode: str) -> None:
        numbers = {"allocate": n.OP_ALLOCATE, "punch": n.OP_DEALLOCATE}
        if mode not in numbers:
            self._local(lambda: self.fs.fallocate(node.ino, offset, length, **FALLOCATE[mode]))
            return

        def steps(held: bytes) -> list[Call]:
            return [Call(op(numbers[mode], held, u64(offset), u64(length)))]

        self._with_open(node, file_calls.WRITE, steps)

    def copy(self, source: Node, offset: int, node: Node, to: int, length: int) -> int:
        length = min(length, len(source.content) - offset)  # its kernel knows the size
        fields = (u64(offset), u64(to), u64(length), u32(1), u32(1), u32(0))
        *_, done = self._do(
            calls.putfh(self._handle(source)),
            calls.savefh(),
            calls.putfh(self._handle(node)),
            Call(op(n.OP_COPY, bytes(16), bytes(16), *fields), _copied),
        )
        assert isinstance(done, int)
        return done

    def fsync(self, node: Node) -> None:
        self._on(node, Call(op(n.OP_COMMIT, u64(0), u32(0)), lambda body: body.fixed(8)))

    # -- attributes --

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        if not name.startswith(b"user."):
            self._local(lambda: CoreSubject.setxattr(self, node, name, value))
            return
        fields = (u32(n.SETXATTR4_EITHER), opaque(name[5:]), opaque(value))
        self._on(node, Call(op(n.OP_SETXATTR, *fields), lambda body: body.fixed(20)))

    def removexattr(self, node: Node, name: bytes) -> None:
        if not name.startswith(b"user."):
            self._local(lambda: CoreSubject.removexattr(self, node, name))
            return
        fields = opaque(name[5:])
        self._on(node, Call(op(n.OP_REMOVEXATTR, fields), lambda body: body.fixed(20)))

    def chmod(self, node: Node, mode: int) -> None:
        self._on(node, calls.setattr_({n.FATTR4_MODE: u32(mode)}))

    # -- the whole --

    def state(self) -> State:
        """By READDIR with attributes; extended attributes by the core."""
        session = self.session
        root = do(session, calls.putrootfh(), calls.getattr_(*_STATE))[-1]
        result: State = {}
        queue = [root]
        while queue:
            found = queue.pop()
            ino, handle = found[n.FATTR4_FILEID], found[n.FATTR4_FILEHANDLE]
            self.handles[ino] = handle
            if ino in result:
                continue
            entries: frozenset[tuple[bytes, int]] = frozenset()
            target = b""
            kind = _TYPES.get(found[n.FATTR4_TYPE], stat.S_IFREG)
            if kind == stat.S_IFDIR:
                listed = self._list(handle)
                entries = frozenset((name, at[n.FATTR4_FILEID]) for name, at in listed)
                queue.extend(at for _, at in listed)
            elif kind == stat.S_IFLNK:
                target = do(session, calls.putfh(handle), calls.readlink())[-1]
            xattrs = frozenset(
                (name, self.fs.getxattr(ino, name)) for name in self.fs.listxattr(ino)
            )
            size = 0 if kind == stat.S_IFDIR else found[n.FATTR4_SIZE]
            mode = kind | found[n.FATTR4_MODE]
            result[ino] = (mode, found[n.FATTR4_NUMLINKS], size, target, xattrs, entries)
        return result

    def _list(self, handle: bytes) -> list[tuple[bytes, dict[int, int]]]:
        found: list[tuple[bytes, dict[int, int]]] = []
        cookie = 0
        while True:
            call = calls.readdir(*_STATE, cookie=cookie, maxcount=1000)
            listing = do(self.session, calls.putfh(handle), call)[-1]
            found += [(entry.name, entry.attributes) for entry in listing.entries]
            if listing.eof:
                return found
            cookie = listing.entries[-1].cookie


def _written(body: Reader) -> int:
    count, committed, _ = body.u32(), body.u32(), body.fixed(8)
    assert committed == n.FILE_SYNC4
    return count


def _contents(body: Reader) -> bytes:
    body.boolean()
    return body.opaque(1 << 20)


def _copied(body: Reader) -> int:
    assert body.u32() == 0, "a callback"
    done, committed, _ = body.u64(), body.u32(), body.fixed(8)
    assert committed == n.FILE_SYNC4
    assert body.boolean(), "consecutive"
    assert body.boolean(), "synchronous"
    return done
