"""How an operation fails: the protocol's status codes, and which one an errno becomes."""

from __future__ import annotations

import errno

from extfs.nfs import constants as c

__all__ = ["NfsError", "status_of"]


class NfsError(Exception):
    """An operation ends with `status`, followed by `body` where its result has one for it."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__(c.STATUS_NAMES.get(status, str(status)))
        self.status = status
        self.body = body


_STATUS = {
    errno.EPERM: c.NFS4ERR_PERM,
    errno.ENOENT: c.NFS4ERR_NOENT,
    errno.EIO: c.NFS4ERR_IO,
    errno.ENXIO: c.NFS4ERR_NXIO,
    errno.EBADF: c.NFS4ERR_STALE,
    errno.EAGAIN: c.NFS4ERR_DELAY,
    errno.EBUSY: c.NFS4ERR_DELAY,
    errno.ENOMEM: c.NFS4ERR_DELAY,
    errno.EINTR: c.NFS4ERR_DELAY,
    errno.EACCES: c.NFS4ERR_ACCESS,
    errno.EEXIST: c.NFS4ERR_EXIST,
    errno.EXDEV: c.NFS4ERR_XDEV,
    errno.ENOTDIR: c.NFS4ERR_NOTDIR,
    errno.EISDIR: c.NFS4ERR_ISDIR,
    errno.EINVAL: c.NFS4ERR_INVAL,
    errno.EFBIG: c.NFS4ERR_FBIG,
    errno.EOVERFLOW: c.NFS4ERR_FBIG,
    errno.ENOSPC: c.NFS4ERR_NOSPC,
    errno.EROFS: c.NFS4ERR_ROFS,
    errno.EMLINK: c.NFS4ERR_MLINK,
    errno.ENAMETOOLONG: c.NFS4ERR_NAMETOOLONG,
    errno.ENOTEMPTY: c.NFS4ERR_NOTEMPTY,
    errno.EDQUOT: c.NFS4ERR_DQUOT,
    errno.ESTALE: c.NFS4ERR_STALE,
    errno.ELOOP: c.NFS4ERR_SYMLINK,
    errno.EDEADLK: c.NFS4ERR_DEADLOCK,
    errno.ENOLCK: c.NFS4ERR_DENIED,
    errno.ENODATA: c.NFS4ERR_NOXATTR,
    errno.E2BIG: c.NFS4ERR_XATTR2BIG,
    errno.EOPNOTSUPP: c.NFS4ERR_NOTSUPP,
    errno.ENOSYS: c.NFS4ERR_NOTSUPP,
    errno.ETXTBSY: c.NFS4ERR_ACCESS,
}


def status_of(error: OSError) -> int:
    """The status for an error of the core or of POSIX (RFC 8881 15.1); what has none is IO."""
    return _STATUS.get(error.errno or 0, c.NFS4ERR_IO)
