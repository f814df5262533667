"""Operations on filehandles and names (RFC 8881 18.4, 18.8 to 18.14, 18.17, 18.19 to 18.29, 18.45).

What changes a directory does so, and makes it durable, in one blocking call. The change attribute
of a directory grows by one with each change of its names, so a change that ours alone explains was
ours alone: then change_info4 may say that it is atomic.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import CoreError, Stat
from extfs.nfs import constants as n
from extfs.nfs import credentials, filehandles, names, set_attributes
from extfs.nfs.changes import CHANGE_INFO_BYTES, ChangeInfo, watched
from extfs.nfs.compound import Operation
from extfs.nfs.delegations import Conflict
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.riders import carried
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound
    from extfs.nfs.filehandles import Filehandle
    from extfs.nfs.riders import Mark

__all__ = ["OPERATIONS", "directory"]

S_IFMT = 0o170000
S_IFDIR = 0o040000
S_IFLNK = 0o120000
_TYPES = {
    n.NF4DIR: S_IFDIR,
    n.NF4BLK: 0o060000,
    n.NF4CHR: 0o020000,
    n.NF4LNK: S_IFLNK,
    n.NF4SOCK: 0o140000,
    n.NF4FIFO: 0o010000,
}
_LINK_MAX = 4095
_LINK_WIRE_MAX = 65536
_MAJOR_MAX, _MINOR_MAX = 0xFFF, 0xFFFFF
_BITMAP_BYTES = 16
_STYLE_PARENT = n.SECINFO_STYLE4_PARENT


# ---- directories -------------------------------------------------------------------------------


def directory(c: Compound, filehandle: Filehandle) -> Stat:
    """Attributes of what must be a directory: NFS4ERR_NOTDIR, NFS4ERR_SYMLINK."""
    found = filehandles.stat(c, filehandle)
    kind = found.mode & S_IFMT
    if kind != S_IFDIR:
        raise NfsError(n.NFS4ERR_SYMLINK if kind == S_IFLNK else n.NFS4ERR_NOTDIR)
    return found


def _changeable(c: Compound, filehandle: Filehandle) -> Stat:
    """A directory whose names the user may change; its export is the current one's."""
    found = directory(c, filehandle)
    if filehandle.pseudo or filehandle.export.rules.read_only:
        raise NfsError(n.NFS4ERR_ROFS)
    credentials.require(c, filehandle.ino, credentials.WRITE | credentials.EXECUTE)
    return found


def _look(c: Compound, place: Stat, name: bytes) -> Stat | None:
    try:
        return c.service.fs.lookup(place.ino, name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


@contextlib.contextmanager
def _others_have_it() -> Iterator[None]:
    """NFS4ERR_DELAY where the core finds that a name leads to another inode than was looked at.

    What was asked about one file (whose it is, who holds it) is not to be done to another.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise NfsError(n.NFS4ERR_DELAY) from None
        raise


def _removable(c: Compound, place: Stat, victim: Stat) -> None:
    """Whether this name may go: not an export's directory, nor what others hold or own."""
    if c.service.exports.rooted_at(victim.ino) is not None:
        raise NfsError(n.NFS4ERR_FILE_OPEN)
    credentials.sticky(credentials.user(c), place, victim)
    c.service.states.about_to_change(c, victim.ino, Conflict.NAMESPACE)


# ---- filehandles -------------------------------------------------------------------------------


def putfh(c: Compound, args: Reader, out: Writer) -> None:
    """PUTFH, RFC 8881 18.19."""
    wire = args.opaque(n.NFS4_FHSIZE)
    filehandle = c.service.filehandles.decode(wire)
    try:
        filehandle = filehandles.check(c, filehandle)
    except CoreError:
        if not c.before_done():
            raise
        # It is gone; what was done to it was done when it was there.
    c.set_current(filehandle)


def putrootfh(c: Compound, args: Reader, out: Writer) -> None:
    """PUTROOTFH, RFC 8881 18.21; PUTPUBFH, 18.20: the public filehandle is the root."""
    c.set_current(filehandles.root(c))


def getfh(c: Compound, args: Reader, out: Writer) -> None:
    """GETFH, RFC 8881 18.8."""
    assert c.current is not None
    out.opaque(c.current.wire)


def savefh(c: Compound, args: Reader, out: Writer) -> None:
    """SAVEFH, RFC 8881 18.28; the current stateid goes with it (16.2.3.1.2)."""
    c.saved = c.current
    c.saved_stateid = c.stateid


def restorefh(c: Compound, args: Reader, out: Writer) -> None:
    """RESTOREFH, RFC 8881 18.27."""
    if c.saved is None:
        raise NfsError(n.NFS4ERR_NOFILEHANDLE)
    c.set_current(c.saved)
    c.stateid = c.saved_stateid


# ---- looking -----------------------------------------------------------------------------------


def _found(c: Compound, name: bytes) -> Filehandle:
    """What a name in the current directory leads to."""
    current = c.current
    assert current is not None
    directory(c, current)
    if current.pseudo:
        return filehandles.named(c, current, name)
    credentials.require(c, current.ino, credentials.EXECUTE)
    return filehandles.child(c, current, c.service.fs.lookup(current.ino, name))


def _above(c: Compound) -> Filehandle:
    current = c.current
    assert current is not None
    found = directory(c, current)
    credentials.require(c, current.ino, credentials.EXECUTE)
    return filehandles.parent(c, current, found)


def lookup(c: Compound, args: Reader, out: Writer) -> None:
    """LOOKUP, RFC 8881 18.13."""
    c.set_current(_found(c, names.component(args)))


def lookupp(c: Compound, args: Reader, out: Writer) -> None:
    """LOOKUPP, RFC 8881 18.14."""
    c.set_current(_above(c))


def readlink(c: Compound, args: Reader, out: Writer) -> None:
    """READLINK, RFC 8881 18.24."""
    assert c.current is not None
    if filehandles.stat(c, c.current).mode & S_IFMT != S_IFLNK:
        raise NfsError(n.NFS4ERR_WRONG_TYPE)
    out.opaque(c.service.fs.readlink(c.current.ino))


def _write_flavors(c: Compound, out: Writer) -> None:
    """SECINFO4resok, and no current filehandle any more (RFC 8881 2.6.3.1.1.8)."""
    out.u32(1)
    out.u32(n.AUTH_SYS)
    c.current = None
    c.stateid = None


def secinfo(c: Compound, args: Reader, out: Writer) -> None:
    """SECINFO, RFC 8881 18.29."""
    _found(c, names.component(args))
    _write_flavors(c, out)


def secinfo_no_name(c: Compound, args: Reader, out: Writer) -> None:
    """SECINFO_NO_NAME, RFC 8881 18.45."""
    style = args.u32()
    if style > _STYLE_PARENT:
        raise XdrError("no such secinfo_style4")
    if style == _STYLE_PARENT:
        _above(c)
    _write_flavors(c, out)


def openattr(c: Compound, args: Reader, out: Writer) -> None:
    """OPENATTR, RFC 8881 18.17: there are no named attributes (`named_attr` is false)."""
    args.boolean()
    raise NfsError(n.NFS4ERR_NOTSUPP)


# ---- CREATE ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _NewObject:
    """createtype4."""

    kind: int
    target: bytes = b""
    rdev: int = 0


def _read_type(args: Reader) -> _NewObject:
    number = args.u32()
    target, rdev = b"", 0
    if number == n.NF4LNK:
        target = args.opaque(_LINK_WIRE_MAX)
        if not target or b"\0" in target:
            raise NfsError(n.NFS4ERR_INVAL)
        if len(target) > _LINK_MAX:
            raise NfsError(n.NFS4ERR_NAMETOOLONG)
    elif number in (n.NF4BLK, n.NF4CHR):
        major, minor = args.u32(), args.u32()
        if major > _MAJOR_MAX or minor > _MINOR_MAX:
            raise NfsError(n.NFS4ERR_INVAL)
        rdev = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    kind = _TYPES.get(number)
    if kind is None:
        raise NfsError(n.NFS4ERR_BADTYPE)
    return _NewObject(kind, target, rdev)


def create(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """CREATE, RFC 8881 18.4: anything but regular files."""
    new = _read_type(args)
    name = names.component(args)
    wanted = set_attributes.decode(args, c.minor)
    current = c.current
    assert current is not None
    mark = c.done(n.OP_CREATE)
    if mark is not None:
        yield from _created(c, mark, wanted, out)
        return
    place = _changeable(c, current)
    names.creatable(place.ino, name)
    default = 0o700 if new.kind == S_IFDIR else 0o600
    mode, cred = set_attributes.creation(c, place, wanted, default, new.kind)
    if new.kind in (0o060000, 0o020000) and cred.uid:
        raise NfsError(n.NFS4ERR_PERM)  # as mknod(2)
    fs, ride = c.service.fs, c.ride(n.OP_CREATE)

    def make() -> Stat:
        if new.kind == S_IFDIR:
            return fs.mkdir(place.ino, name, mode, cred)
        if new.kind == S_IFLNK:
            return fs.symlink(place.ino, name, new.target, cred)
        return fs.mknod(place.ino, name, new.kind | mode, new.rdev, cred)

    def work() -> tuple[Stat, ChangeInfo, int]:
        made, info = watched(fs, place.ino, lambda: carried(ride, make), ride)
        mask = set_attributes.apply_created(fs, made, wanted)
        fs.fsync(made.ino)
        return made, info, mask

    made, info, mask = yield Blocking(work)
    c.set_current(filehandles.child(c, current, made))
    info.write(out)
    out.bitmap(mask)


def _created(
    c: Compound, mark: Mark, wanted: set_attributes.SetAttributes, out: Writer
) -> Steps[None]:
    """CREATE was done before a restart, but for attributes that are set in a second step."""
    fs, directory = c.service.fs, c.current
    assert directory is not None

    def work() -> int:
        try:
            fs.handle_check(mark.ino, mark.generation)
            done = set_attributes.apply_created(fs, fs.getattr(mark.ino), wanted)
            fs.fsync(mark.ino)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            return wanted.mask  # somebody has removed it since
        return done

    mask = yield Blocking(work)
    c.set_current(c.service.filehandles.make(directory.export, mark.ino, mark.generation))
    mark.places[0].write(out)
    out.bitmap(mask)


# ---- LINK, REMOVE, RENAME ----------------------------------------------------------------------


def _both(c: Compound) -> tuple[Filehandle, Filehandle]:
    """Saved and current filehandle. NFS4ERR_XDEV: of different exports."""
    saved, current = c.saved, c.current
    assert saved is not None
    assert current is not None
    if saved.export is not current.export:
        raise NfsError(n.NFS4ERR_XDEV)
    return saved, current


def link(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """LINK, RFC 8881 18.9: the saved filehandle's file gets a name in the current directory."""
    name = names.component(args)
    saved, current = _both(c)
    mark = c.done(n.OP_LINK)
    if mark is not None:
        mark.places[0].write(out)
        return
    source = filehandles.stat(c, saved)
    if source.mode & S_IFMT == S_IFDIR:
        raise NfsError(n.NFS4ERR_ISDIR)
    place = _changeable(c, current)
    names.creatable(place.ino, name)
    c.service.states.about_to_change(c, source.ino, Conflict.NAMESPACE)
    fs, ride = c.service.fs, c.ride(n.OP_LINK)

    def make() -> Stat:
        return fs.link(source.ino, place.ino, name)

    def work() -> ChangeInfo:
        _, info = watched(fs, place.ino, lambda: carried(ride, make), ride)
        fs.fsync(place.ino)
        return info

    info = yield Blocking(work)
    info.write(out)


def remove(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """REMOVE, RFC 8881 18.25. A file that is open stays usable through its filehandle."""
    name = names.component(args)
    current = c.current
    assert current is not None
    mark = c.done(n.OP_REMOVE)
    if mark is not None:
        mark.places[0].write(out)
        return
    place = _changeable(c, current)
    fs = c.service.fs
    victim = fs.lookup(place.ino, name)
    _removable(c, place, victim)
    call = fs.rmdir if victim.mode & S_IFMT == S_IFDIR else fs.unlink
    ride = c.ride(n.OP_REMOVE)

    def take() -> Stat:
        return call(place.ino, name, victim.ino)

    def work() -> ChangeInfo:
        with _others_have_it():
            _, info = watched(fs, place.ino, lambda: carried(ride, take), ride)
        fs.fsync(place.ino)
        return info

    info = yield Blocking(work)
    info.write(out)


def _check_target(c: Compound, place: Stat, moved: Stat, victim: Stat) -> None:
    """NFS4ERR_EXIST: a directory where there is a file, or the reverse (RFC 8881 18.26.3)."""
    if (moved.mode & S_IFMT == S_IFDIR) != (victim.mode & S_IFMT == S_IFDIR):
        raise NfsError(n.NFS4ERR_EXIST)
    _removable(c, place, victim)


def rename(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """RENAME, RFC 8881 18.26: from the saved directory to the current one."""
    old, new = names.component(args), names.component(args)
    saved, current = _both(c)
    mark = c.done(n.OP_RENAME)
    if mark is not None:
        for done in mark.places:
            done.write(out)
        return
    source, target = _changeable(c, saved), _changeable(c, current)
    names.creatable(target.ino, new)
    fs = c.service.fs
    moved = fs.lookup(source.ino, old)
    victim = _look(c, target, new)
    if victim is not None and victim.ino == moved.ino:
        for place in (source, target):
            ChangeInfo(place, place).write(out, 0)
        return
    if moved.mode & S_IFMT == S_IFDIR and source.ino != target.ino:
        credentials.require(c, moved.ino, credentials.WRITE)  # its ".." changes
    _removable(c, source, moved)
    if victim is not None:
        _check_target(c, target, moved, victim)
    ride = c.ride(n.OP_RENAME)
    meant = moved.ino, victim.ino if victim is not None else 0

    def move() -> Stat | None:
        return fs.rename(source.ino, old, target.ino, new, meant=meant)

    def into() -> tuple[Stat | None, ChangeInfo]:
        return watched(fs, target.ino, lambda: carried(ride, move), ride, 1)

    def work() -> tuple[ChangeInfo, ChangeInfo]:
        with _others_have_it():
            (_, inner), outer = watched(fs, source.ino, into, ride)
        fs.fsync(target.ino)
        return outer, inner

    source_info, target_info = yield Blocking(work)
    source_info.write(out)
    target_info.write(out)


OPERATIONS = {
    n.OP_PUTFH: Operation(putfh),
    n.OP_PUTROOTFH: Operation(putrootfh),
    n.OP_PUTPUBFH: Operation(putrootfh),
    n.OP_GETFH: Operation(getfh, filehandle="current"),
    n.OP_SAVEFH: Operation(savefh, filehandle="current"),
    n.OP_RESTOREFH: Operation(restorefh),
    n.OP_LOOKUP: Operation(lookup, filehandle="current"),
    n.OP_LOOKUPP: Operation(lookupp, filehandle="current"),
    n.OP_READLINK: Operation(readlink, filehandle="current"),
    n.OP_SECINFO: Operation(secinfo, filehandle="current"),
    n.OP_SECINFO_NO_NAME: Operation(secinfo_no_name, filehandle="current"),
    n.OP_OPENATTR: Operation(openattr, filehandle="current"),
    n.OP_CREATE: Operation(
        create, filehandle="current", reply_bytes=8 + CHANGE_INFO_BYTES + _BITMAP_BYTES
    ),
    n.OP_LINK: Operation(link, filehandle="both", reply_bytes=8 + CHANGE_INFO_BYTES),
    n.OP_REMOVE: Operation(remove, filehandle="current", reply_bytes=8 + CHANGE_INFO_BYTES),
    n.OP_RENAME: Operation(rename, filehandle="both", reply_bytes=8 + 2 * CHANGE_INFO_BYTES),
}
