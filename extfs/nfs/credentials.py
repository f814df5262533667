"""Who a request is for, and what they may do: squash and permission checks, as the kernel's.

All of it reads metadata that is cached in memory, so nothing here waits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extfs.core import Stat
from extfs.nfs import constants as n
from extfs.nfs.errors import NfsError
from extfs.nfs.exports import Export, Squash
from extfs.nfs.rpc import Credential

if TYPE_CHECKING:
    from extfs.nfs.compound import Compound

__all__ = [
    "EXECUTE",
    "READ",
    "WRITE",
    "allowed",
    "in_group",
    "require",
    "require_owner",
    "squashed",
    "sticky",
    "user",
    "writable",
]

READ = 4
WRITE = 2
EXECUTE = 1

S_ISVTX = 0o1000
_PSEUDO_MASK = READ | EXECUTE


def squashed(export: Export, credential: Credential) -> Credential:
    """The credential that counts in an export; AUTH_NONE is the anonymous user everywhere."""
    rules = export.rules
    if rules.squash is Squash.ALL or credential.flavor == n.AUTH_NONE:
        return replace(credential, uid=rules.anonuid, gid=rules.anongid, gids=())
    if rules.squash is Squash.NONE:
        return credential
    if credential.uid and credential.gid and 0 not in credential.gids:
        return credential
    return replace(
        credential,
        uid=credential.uid or rules.anonuid,
        gid=credential.gid or rules.anongid,
        gids=tuple(gid or rules.anongid for gid in credential.gids),
    )


def user(c: Compound) -> Credential:
    """Whose rights count for the current filehandle."""
    assert c.current is not None
    return squashed(c.current.export, c.credential)


def writable(c: Compound) -> None:
    """NFS4ERR_ROFS where nobody may change anything through the current filehandle."""
    assert c.current is not None
    if c.current.export.rules.read_only:
        raise NfsError(n.NFS4ERR_ROFS)


def in_group(who: Credential, gid: int) -> bool:
    """Whether a user is in a group."""
    return gid == who.gid or gid in who.gids


def allowed(c: Compound, ino: int, mask: int) -> int:
    """The part of `mask` that the user has on an inode of the current filehandle's export."""
    assert c.current is not None
    if c.current.pseudo:
        return mask & _PSEUDO_MASK
    who = user(c)
    return c.service.fs.access(ino, who.uid, (who.gid, *who.gids), mask)


def require(c: Compound, ino: int, mask: int, owner_override: bool = False) -> None:
    """NFS4ERR_ACCESS unless the user has all of `mask`.

    `owner_override`: the owner may read and write whatever the mode says, as the kernel's server
    lets them: a file that was opened stays usable after a chmod.
    """
    if allowed(c, ino, mask) == mask:
        return
    if owner_override and not mask & EXECUTE and c.service.fs.getattr(ino).uid == user(c).uid:
        return
    raise NfsError(n.NFS4ERR_ACCESS)


def require_owner(who: Credential, st: Stat) -> None:
    """NFS4ERR_PERM unless the user owns the file or is root."""
    if who.uid not in (0, st.uid):
        raise NfsError(n.NFS4ERR_PERM)


def sticky(who: Credential, directory: Stat, victim: Stat) -> None:
    """NFS4ERR_PERM: the sticky bit leaves a name to the owners of the file and the directory."""
    if directory.mode & S_ISVTX and who.uid not in (0, victim.uid, directory.uid):
        raise NfsError(n.NFS4ERR_PERM)
