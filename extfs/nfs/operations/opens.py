"""OPEN, OPEN_DOWNGRADE, CLOSE."""

from __future__ import annotations

import errno
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.core import CoreError, Stat
from extfs.nfs import changes, credentials, filehandles, names, set_attributes
from extfs.nfs import constants as n
from extfs.nfs.attributes import EXCLCREAT
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.delegations import Conflict, DelegationState, RefusedError
from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.opens import OpenState
from extfs.nfs.riders import Mark, carried
from extfs.nfs.stateids import INVALID, Kind, Stateid, read_stateid, write_stateid
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.filehandles import Filehandle

__all__ = ["OPERATIONS", "WANT_FLAGS", "write_delegation"]

DEFAULT_MODE = 0o600
"""Of a file whose creator did not say one."""
SPACE_MAX = 64 << 20
"""Bytes: so much of a growing file a WRITE delegation lets a client keep to itself over a CLOSE."""

_ACCESS_BITS = n.OPEN4_SHARE_ACCESS_BOTH
WANT_FLAGS = (
    n.OPEN4_SHARE_ACCESS_WANT_SIGNAL_DELEG_WHEN_RESRC_AVAIL
    | n.OPEN4_SHARE_ACCESS_WANT_PUSH_DELEG_WHEN_UNCONTENDED
    | n.OPEN4_SHARE_ACCESS_WANT_DELEG_TIMESTAMPS
    | n.OPEN4_SHARE_ACCESS_WANT_OPEN_XOR_DELEGATION
)
"""Wishes about delegations that are not fulfilled, as a server may (RFC 8881 18.16.3, RFC 9754)."""
_VERIFIER_ATTRIBUTES = 1 << n.FATTR4_TIME_ACCESS | 1 << n.FATTR4_TIME_MODIFY
_RESULT_FLAGS = n.OPEN4_RESULT_LOCKTYPE_POSIX | n.OPEN4_RESULT_MAY_NOTIFY_LOCK
_VERIFIER = struct.Struct(">II")
_CHANGE_INFO = struct.Struct(">IQQ")
_REPLY_BYTES = 192


@dataclass(slots=True)
class _Creation:
    """openhow with OPEN4_CREATE; `verifier` of the exclusive modes."""

    mode: int
    wanted: set_attributes.SetAttributes | None
    verifier: bytes = b""

    @property
    def exclusive(self) -> bool:
        return self.mode in (n.EXCLUSIVE4, n.EXCLUSIVE4_1)


@dataclass(slots=True)
class _Arguments:
    """OPEN4args. `name`: of the claims by name; `stateid`: of those of a delegation."""

    access: int
    deny: int
    want: int
    owner: bytes
    creation: _Creation | None
    claim: int
    name: bytes | None = None
    stateid: Stateid | None = None
    delegate_type: int = n.OPEN_DELEGATE_NONE


@dataclass(slots=True)
class _Found:
    """The file of an OPEN. `mine`: this OPEN made it. `again`: it looks as if it had done so when
    it was sent before; but the times that say so are no secret, and anybody can repeat them."""

    stat: Stat
    before: int
    after: int
    atomic: bool = True
    mine: bool = False
    again: bool = False
    truncate: bool = False
    attributes: int = 0


# -- arguments --


def _read_creation(args: Reader, minor: int) -> _Creation | None:
    how = args.u32()
    if how == n.OPEN4_NOCREATE:
        return None
    if how != n.OPEN4_CREATE:
        raise XdrError("neither create nor not")
    mode = args.u32()
    if mode in (n.UNCHECKED4, n.GUARDED4):
        return _Creation(mode, set_attributes.decode(args, minor))
    if mode == n.EXCLUSIVE4:
        return _Creation(mode, None, args.fixed(n.NFS4_VERIFIER_SIZE))
    if mode == n.EXCLUSIVE4_1:
        verifier = args.fixed(n.NFS4_VERIFIER_SIZE)
        wanted = set_attributes.decode(args, minor)
        if wanted.mask & ~EXCLCREAT:
            raise NfsError(n.NFS4ERR_INVAL)
        return _Creation(mode, wanted, verifier)
    raise XdrError("no such createmode")


def _read_claim(args: Reader, into: _Arguments) -> None:
    claim = into.claim = args.u32()
    if claim in (n.CLAIM_NULL, n.CLAIM_DELEGATE_PREV):
        into.name = names.component(args)
    elif claim == n.CLAIM_PREVIOUS:
        into.delegate_type = args.u32()
    elif claim == n.CLAIM_DELEGATE_CUR:
        into.stateid = read_stateid(args)
        into.name = names.component(args)
    elif claim == n.CLAIM_DELEG_CUR_FH:
        into.stateid = read_stateid(args)
    elif claim not in (n.CLAIM_FH, n.CLAIM_DELEG_PREV_FH):
        raise XdrError("no such claim")


def _read_arguments(args: Reader, minor: int) -> _Arguments:
    args.u32()  # seqid, of 4.0
    share = args.u32()
    deny = args.u32()
    args.u64()  # the session says which client it is (RFC 8881 18.16.3)
    owner = args.opaque(n.NFS4_OPAQUE_LIMIT)
    creation = _read_creation(args, minor)
    access = share & _ACCESS_BITS
    want = share & n.OPEN4_SHARE_ACCESS_WANT_DELEG_MASK
    found = _Arguments(access, deny, want, owner, creation, n.CLAIM_NULL)
    _read_claim(args, found)
    unknown = share & ~(_ACCESS_BITS | n.OPEN4_SHARE_ACCESS_WANT_DELEG_MASK | WANT_FLAGS)
    if not access or deny > n.OPEN4_SHARE_DENY_BOTH or unknown:
        raise NfsError(n.NFS4ERR_INVAL)
    if want > n.OPEN4_SHARE_ACCESS_WANT_CANCEL:
        raise NfsError(n.NFS4ERR_INVAL)
    if creation is not None and found.claim != n.CLAIM_NULL:
        raise NfsError(n.NFS4ERR_INVAL)
    if found.claim in (n.CLAIM_DELEGATE_PREV, n.CLAIM_DELEG_PREV_FH):
        # Delegations are not kept for another instance of a client (RFC 8881 10.2.1).
        raise NfsError(n.NFS4ERR_NOTSUPP)
    return found


# -- the file --


def _directory(c: Compound) -> Stat:
    """The current directory; the user may look names up in it."""
    assert c.current is not None
    found = filehandles.stat(c, c.current)
    if stat.S_ISLNK(found.mode):
        raise NfsError(n.NFS4ERR_SYMLINK)
    if not stat.S_ISDIR(found.mode):
        raise NfsError(n.NFS4ERR_NOTDIR)
    if not c.current.pseudo:
        credentials.require(c, c.current.ino, credentials.EXECUTE)
    return found


def _lookup(c: Compound, directory: int, name: bytes) -> Stat | None:
    try:
        return c.service.fs.lookup(directory, name)
    except CoreError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _by_name(c: Compound, wanted: _Arguments) -> Steps[_Found]:
    """Look the name up, or create it; the current filehandle becomes the file's."""
    directory = c.current
    assert directory is not None
    assert wanted.name is not None
    parent = _directory(c)
    if directory.pseudo:
        if wanted.creation is not None:
            raise NfsError(n.NFS4ERR_ROFS)
        filehandles.named(c, directory, wanted.name)
        raise NfsError(n.NFS4ERR_ISDIR)
    mark = c.done(n.OP_OPEN)
    if mark is not None and wanted.creation is not None:
        found = _made_before(c, mark, wanted.creation)
        c.set_current(filehandles.child(c, directory, found.stat))
        return found
    while True:
        known = _lookup(c, directory.ino, wanted.name)
        if known is not None:
            change = changes.value(c.service.fs.getattr(directory.ino))
            found = _Found(known, change, change)
            if wanted.creation is not None:
                _check_existing(found, wanted.creation)
            break
        if wanted.creation is None:
            raise NfsError(n.NFS4ERR_NOENT)
        try:
            found = yield from _create(c, directory, parent, wanted.name, wanted.creation)
            break
        except CoreError as error:
            if error.errno != errno.EEXIST or wanted.creation.mode == n.GUARDED4:
                raise
            # Somebody else made it meanwhile: it exists, and is looked at as such.
    c.set_current(filehandles.child(c, directory, found.stat))
    return found


def _check_existing(found: _Found, creation: _Creation) -> None:
    """A file that was to be created is there (RFC 8881 18.16.3, create modes)."""
    if creation.mode == n.GUARDED4:
        raise NfsError(n.NFS4ERR_EXIST)
    if creation.exclusive:
        if not _made_with(found.stat, creation.verifier):
            raise NfsError(n.NFS4ERR_EXIST)
        found.again = True
        found.attributes = _VERIFIER_ATTRIBUTES
        if creation.wanted is not None:
            found.attributes |= creation.wanted.mask
    elif creation.wanted is not None and creation.wanted.size == 0:
        found.truncate = True
        found.attributes = 1 << n.FATTR4_SIZE


def _made_with(file: Stat, verifier: bytes) -> bool:
    """Whether an exclusive create with this verifier made the file: its times say so."""
    times = (file.atime, file.atime_ns, file.mtime, file.mtime_ns)
    high, low = _VERIFIER.unpack(verifier)
    return stat.S_ISREG(file.mode) and times == (high, 0, low, 0)


def _made_before(c: Compound, mark: Mark, creation: _Creation) -> _Found:
    """This OPEN has made the file before a restart. STALE: somebody has removed it since."""
    try:
        c.service.fs.handle_check(mark.ino, mark.generation)
        found = c.service.fs.getattr(mark.ino)
    except CoreError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT):
            raise
        raise NfsError(n.NFS4ERR_STALE) from None
    place = mark.places[0]
    made = creation.wanted.mask if creation.wanted is not None else 0
    return _Found(
        found,
        place.before_value,
        place.value_after,
        atomic=place.atomic,
        mine=True,
        attributes=made | (_VERIFIER_ATTRIBUTES if creation.exclusive else 0),
    )


def _create(
    c: Compound, directory: Filehandle, parent: Stat, name: bytes, creation: _Creation
) -> Steps[_Found]:
    """A new file, with its attributes, durable. EEXIST: somebody was faster."""
    c.writable()
    credentials.require(c, directory.ino, credentials.WRITE | credentials.EXECUTE)
    names.creatable(directory.ino, name)
    assert c.client is not None
    if not c.service.states.has_room(c.client):
        raise NfsError(n.NFS4ERR_DELAY)  # before there is a file that the next try would find
    fs = c.service.fs
    wanted = creation.wanted if creation.wanted is not None else set_attributes.SetAttributes()
    mode, cred = set_attributes.creation(c, parent, wanted, DEFAULT_MODE)
    mode |= stat.S_IFREG

    ride = c.ride(n.OP_OPEN)

    def plain() -> tuple[Stat, int]:
        made = carried(ride, lambda: fs.mknod(directory.ino, name, mode, 0, cred))
        fs.fsync(made.ino)
        return made, wanted.mask

    def whole() -> tuple[Stat, int]:
        """The name appears with the attributes, and the verifier, in place: a crash leaves all of
        it or nothing."""
        made = fs.tmpfile(directory.ino, mode, cred)
        try:
            attrset = set_attributes.apply_created(fs, made, wanted)
            if creation.exclusive:
                high, low = _VERIFIER.unpack(creation.verifier)
                fs.setattr(made.ino, atime=(high, 0), mtime=(low, 0))
                attrset |= _VERIFIER_ATTRIBUTES
            carried(ride, lambda: fs.link(made.ino, directory.ino, name))
            fs.fsync(made.ino)
            return fs.getattr(made.ino), attrset
        finally:
            fs.release(made.ino)

    before = fs.getattr(directory.ino)
    if ride is not None:
        ride.before(0, before)
    in_steps = creation.exclusive or set_attributes.more_than_mode(wanted)
    made, attrset = yield Blocking(whole if in_steps else plain)
    after = fs.getattr(directory.ino)
    return _Found(
        made,
        changes.value(before),
        changes.value(after),
        # Exactly one change between the two looks: it was this one.
        atomic=after.change - before.change == 1,
        mine=True,
        attributes=attrset,
    )


def _by_filehandle(c: Compound) -> _Found:
    fh = c.regular()
    return _Found(c.service.fs.getattr(fh.ino), 0, 0)


def _check_type(found: Stat) -> None:
    if stat.S_ISREG(found.mode):
        return
    if stat.S_ISDIR(found.mode):
        raise NfsError(n.NFS4ERR_ISDIR)
    raise NfsError(n.NFS4ERR_SYMLINK if stat.S_ISLNK(found.mode) else n.NFS4ERR_WRONG_TYPE)


def _check_permission(c: Compound, found: _Found, access: int) -> None:
    """May the user open it so? Who may only execute a file may read it over NFS."""
    if access & n.OPEN4_SHARE_ACCESS_WRITE or found.truncate:
        c.writable()
    if found.mine:
        return
    mask = 0
    if access & n.OPEN4_SHARE_ACCESS_WRITE or found.truncate:
        mask |= credentials.WRITE
    if access & n.OPEN4_SHARE_ACCESS_READ:
        have = credentials.allowed(c, found.stat.ino, credentials.READ | credentials.EXECUTE)
        if not have:
            mask |= credentials.READ
    if mask:
        # Who made it owns it, whatever mode it was made with.
        credentials.require(c, found.stat.ino, mask, owner_override=found.again)


# -- the open --


def _share(c: Compound, found: _Found, wanted: _Arguments) -> OpenState:
    """Delegations and denials of others are out of the way: the open, new or extended."""
    states = c.service.states
    ino = found.stat.ino
    changes = (
        wanted.access & n.OPEN4_SHARE_ACCESS_WRITE
        or wanted.deny & n.OPEN4_SHARE_DENY_READ
        or found.truncate
    )
    states.about_to_change(c, ino, Conflict.OPEN_WRITE if changes else Conflict.OPEN_READ)
    file = states.file(ino, found.stat.generation)
    opened = file.opens.get((c.client, wanted.owner))
    if opened is not None and c.did(opened):
        return opened
    for holder in file.share_conflicts(opened, wanted.access, wanted.deny):
        if not states.expire_courtesy(holder.client):
            reclaim = wanted.claim == n.CLAIM_PREVIOUS
            raise NfsError(n.NFS4ERR_RECLAIM_CONFLICT if reclaim else n.NFS4ERR_SHARE_DENIED)
    if opened is None:
        opened = OpenState(c.client, file, states.new_other(), wanted.owner)
        states.add(opened)
    else:
        opened.bump()
        states.changed(opened)
    opened.file.add_share(opened, wanted.access, wanted.deny)
    c.tag(opened)
    return opened


def _truncate(c: Compound, found: _Found) -> Steps[None]:
    """UNCHECKED4 with a size of zero: the file loses its contents, durably."""
    fs, file = c.service.fs, found.stat
    wanted = set_attributes.SetAttributes(1 << n.FATTR4_SIZE, size=0)
    change = set_attributes.change_of(c, file, wanted, opened=True)
    yield Blocking(lambda: change.run(fs, file.ino))


def _check_delegation(c: Compound, wanted: _Arguments, ino: int) -> None:
    """CLAIM_DELEGATE_CUR: the client opens what its delegation has let it open already."""
    assert wanted.stateid is not None
    found = c.service.states.find(c, wanted.stateid, Kind.DELEGATION, file=ino)
    assert isinstance(found, DelegationState)
    if wanted.access & n.OPEN4_SHARE_ACCESS_WRITE and not found.write:
        raise NfsError(n.NFS4ERR_OPENMODE)


def _find_file(c: Compound, wanted: _Arguments) -> Steps[_Found]:
    if wanted.name is None:
        found = _by_filehandle(c)
    else:
        found = yield from _by_name(c, wanted)
    _check_type(found.stat)
    if wanted.stateid is not None:
        _check_delegation(c, wanted, found.stat.ino)
    _check_permission(c, found, wanted.access)
    return found


def _did_open(c: Compound) -> bool:
    """Whether this OPEN was granted before a restart: grace is for what is new."""
    if not c.retry:
        return False
    assert c.client is not None
    return any(c.did(state) for state in c.service.states.of_client(c.client, Kind.OPEN))


def open_(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """OPEN (RFC 8881 18.16)."""
    wanted = _read_arguments(args, c.minor)
    assert c.client is not None
    reclaim = wanted.claim == n.CLAIM_PREVIOUS
    if c.done(n.OP_OPEN) is None and not _did_open(c):
        c.service.lease.begin_open(c.client, reclaim)
    found = yield from _find_file(c, wanted)
    opened = _share(c, found, wanted)
    if found.truncate:
        was = opened.seqid
        try:
            yield from _truncate(c, found)
        except (OSError, NfsError):
            # Of an open that is new nothing is to remain; what was extended stays so: the client
            # does not know, and its next OPEN or CLOSE says what it wants.
            if was == 1 and opened.seqid == was:
                c.service.states.drop(opened)
            raise
    stateid = opened.stateid()
    delegation, why = yield from _delegation(c, opened, wanted)
    write_stateid(out, stateid)
    out.pack(_CHANGE_INFO, found.atomic, found.before, found.after)
    out.u32(_RESULT_FLAGS)
    out.bitmap(found.attributes)
    write_delegation(c, out, delegation, why)
    c.set_stateid(stateid)


# -- delegations in answers --


def _delegation(
    c: Compound, opened: OpenState, wanted: _Arguments
) -> Steps[tuple[DelegationState | None, int | None]]:
    """A delegation, or why there is none, which is told to who said what it wants."""
    want = wanted.want
    reclaim = wanted.claim == n.CLAIM_PREVIOUS
    if reclaim:
        if wanted.delegate_type == n.OPEN_DELEGATE_READ:
            want = n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG
        elif wanted.delegate_type == n.OPEN_DELEGATE_WRITE:
            want = n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG
        else:
            return None, None
    elif wanted.stateid is not None:
        return None, None
    try:
        delegation = yield from c.service.states.delegations.grant(
            c, opened.file, wanted.access, want, reclaim=reclaim
        )
    except RefusedError as refused:
        return None, refused.why if wanted.want else None
    return delegation, None


def write_delegation(
    c: Compound, out: Writer, delegation: DelegationState | None, why: int | None
) -> None:
    """open_delegation4 (RFC 8881 18.16.2)."""
    if delegation is None:
        if why is None:
            out.u32(n.OPEN_DELEGATE_NONE)
            return
        out.u32(n.OPEN_DELEGATE_NONE_EXT)
        out.u32(why)
        if why in (n.WND4_CONTENTION, n.WND4_RESOURCE):
            out.boolean(False)  # nothing will be pushed or signalled
        return
    out.u32(n.OPEN_DELEGATE_WRITE if delegation.write else n.OPEN_DELEGATE_READ)
    write_stateid(out, delegation.stateid())
    out.boolean(delegation.recalled is not None)
    if delegation.write:
        space = c.service.fs.statfs().avail * c.service.fs.super.block_size
        out.u32(n.NFS_LIMIT_SIZE)
        out.u64(delegation.size + min(SPACE_MAX, space // 16))
    # An ACE that lets nobody do without ACCESS: who may open what is asked each time.
    out.u32(0)
    out.u32(0)
    out.u32(0)
    out.opaque(b"")


# -- the end of opens --


def close(c: Compound, args: Reader, out: Writer) -> None:
    """CLOSE (RFC 8881 18.2). Locks that are left go with the open."""
    args.u32()  # seqid, of 4.0
    stateid = read_stateid(args)
    assert c.current is not None
    assert c.client is not None
    states = c.service.states
    if c.ended(stateid):
        file = states.known_file(c.current.ino)
    else:
        opened = states.find(c, stateid, Kind.OPEN, file=c.current.ino)
        file = opened.file
        states.drop(opened)
    if file is not None:  # layouts are return-on-close
        c.service.layouts.closed(c.client, file)
    write_stateid(out, INVALID)
    c.set_stateid(INVALID)


def open_downgrade(c: Compound, args: Reader, out: Writer) -> None:
    """OPEN_DOWNGRADE (RFC 8881 18.18): back to the union of some of the OPENs."""
    stateid = read_stateid(args)
    args.u32()  # seqid, of 4.0
    access = args.u32() & ~(n.OPEN4_SHARE_ACCESS_WANT_DELEG_MASK | WANT_FLAGS)
    deny = args.u32()
    if not 1 <= access <= _ACCESS_BITS or deny > n.OPEN4_SHARE_DENY_BOTH:
        raise NfsError(n.NFS4ERR_INVAL)
    assert c.current is not None
    states = c.service.states
    opened = states.find(c, stateid, Kind.OPEN, file=c.current.ino)
    assert isinstance(opened, OpenState)
    if c.did(opened):
        stateid = opened.stateid()
    else:
        opened.file.share(opened, access, deny, opened.downgraded(access, deny))
        stateid = opened.bump()
        c.tag(opened)
        states.changed(opened)
    write_stateid(out, stateid)
    c.set_stateid(stateid)


OPERATIONS = {
    n.OP_OPEN: Operation(open_, filehandle="current", reply_bytes=_REPLY_BYTES),
    n.OP_CLOSE: Operation(close, filehandle="current", reply_bytes=16),
    n.OP_OPEN_DOWNGRADE: Operation(open_downgrade, filehandle="current", reply_bytes=16),
}
