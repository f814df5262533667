"""Encoders and decoders of operations on open files, and a client that uses them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from extfs.nfs import constants as n
from extfs.nfs.stateids import ANONYMOUS, CURRENT, Stateid
from extfs.nfs.xdr import Reader
from nfs.wire import ROOT, Reply, Result, Session, bitmap, next_result, op, opaque, u32, u64

__all__ = [
    "ANONYMOUS",
    "BOTH",
    "CURRENT",
    "DENY_BOTH",
    "DENY_READ",
    "DENY_WRITE",
    "NO_DELEG",
    "READ",
    "WANT_ANY",
    "WANT_READ",
    "WANT_WRITE",
    "WRITE",
    "Delegation",
    "FileClient",
    "Opened",
    "StatusError",
]

READ, WRITE, BOTH = 1, 2, 3
DENY_READ, DENY_WRITE, DENY_BOTH = 1, 2, 3
WANT_READ = n.OPEN4_SHARE_ACCESS_WANT_READ_DELEG
WANT_WRITE = n.OPEN4_SHARE_ACCESS_WANT_WRITE_DELEG
WANT_ANY = n.OPEN4_SHARE_ACCESS_WANT_ANY_DELEG
NO_DELEG = n.OPEN4_SHARE_ACCESS_WANT_NO_DELEG
TO_EOF = n.NFS4_MAXFILELEN


class StatusError(Exception):
    """An operation failed; the reader stands behind the status."""

    def __init__(self, result: Result) -> None:
        super().__init__(repr(result))
        self.status = result.status
        self.body = result.body


def stateid(value: Stateid) -> bytes:
    return struct.pack(">I12s", value.seqid, value.other)


def read_stateid(reader: Reader) -> Stateid:
    return Stateid(reader.u32(), reader.fixed(12))


def fattr(values: dict[int, bytes]) -> bytes:
    """fattr4 of encoded values by number."""
    return bitmap(*values) + opaque(b"".join(values[number] for number in sorted(values)))


@dataclass
class Delegation:
    kind: int
    stateid: Stateid
    recall: bool = False
    why: int | None = None

    @property
    def given(self) -> bool:
        return self.kind in (n.OPEN_DELEGATE_READ, n.OPEN_DELEGATE_WRITE)


@dataclass
class Opened:
    fh: bytes
    stateid: Stateid
    atomic: bool
    before: int
    after: int
    flags: int
    attributes: int
    delegation: Delegation


def read_delegation(reader: Reader) -> Delegation:
    kind = reader.u32()
    if kind == n.OPEN_DELEGATE_NONE:
        return Delegation(kind, ANONYMOUS)
    if kind == n.OPEN_DELEGATE_NONE_EXT:
        why = reader.u32()
        if why in (n.WND4_CONTENTION, n.WND4_RESOURCE):
            assert not reader.boolean()
        return Delegation(kind, ANONYMOUS, why=why)
    found = Delegation(kind, read_stateid(reader), reader.boolean())
    if kind == n.OPEN_DELEGATE_WRITE:
        assert reader.u32() == n.NFS_LIMIT_SIZE
        reader.u64()
    assert [reader.u32() for _ in range(3)] == [0, 0, 0]
    assert reader.opaque(100) == b""
    return found


def create(how: int = n.UNCHECKED4, verifier: bytes = b"", **attributes: bytes) -> bytes:
    """openflag4 that creates; `attributes`: mode=, size=, encoded."""
    numbers = {"mode": n.FATTR4_MODE, "size": n.FATTR4_SIZE, "mtime": n.FATTR4_TIME_MODIFY_SET}
    values = fattr({numbers[name]: value for name, value in attributes.items()})
    body = u32(n.OPEN4_CREATE) + u32(how)
    if how == n.EXCLUSIVE4:
        return body + verifier
    return body + (verifier if how == n.EXCLUSIVE4_1 else b"") + values


NOCREATE = u32(n.OPEN4_NOCREATE)
PUTROOTFH = op(n.OP_PUTROOTFH)
GETFH = op(n.OP_GETFH)


def putfh(fh: bytes) -> bytes:
    return op(n.OP_PUTFH, opaque(fh))


def open_op(
    claim: bytes, access: int = BOTH, deny: int = 0, owner: bytes = b"owner", how: bytes = NOCREATE
) -> bytes:
    return op(n.OP_OPEN, u32(0), u32(access), u32(deny), u64(0), opaque(owner), how, claim)


def by_name(name: bytes) -> bytes:
    return u32(n.CLAIM_NULL) + opaque(name)


class FileClient:
    """A client of one session, with a method for each operation; `StatusError` when one fails."""

    def __init__(self, session: Session, auth: bytes = ROOT) -> None:
        self.session = session
        self.auth = auth
        self.slot = 0

    def run(self, *operations: bytes, minor: int = 2, slot: int = 0) -> Reply:
        return self.session.run(*operations, minor=minor, auth=self.auth, slot=slot)

    def last(self, *operations: bytes, minor: int = 2) -> Reader:
        """The body of the last result; those before have none, or are GETFH."""
        reply = self.run(*operations, minor=minor)
        for _ in range(len(operations)):
            result = next_result(reply.body)
            if result.status:
                raise StatusError(result)
        return reply.body

    def on(self, fh: bytes, *operations: bytes, minor: int = 2) -> Reader:
        return self.last(putfh(fh), *operations, minor=minor)

    # -- opens --

    def open(
        self,
        name: bytes | None = None,
        access: int = BOTH | NO_DELEG,
        deny: int = 0,
        owner: bytes = b"owner",
        how: bytes = NOCREATE,
        fh: bytes | None = None,
        claim: bytes | None = None,
    ) -> Opened:
        """OPEN in the root by name, or of `fh` (CLAIM_FH, or another `claim`)."""
        if claim is None:
            claim = by_name(name) if name is not None else u32(n.CLAIM_FH)
        first = PUTROOTFH if fh is None else putfh(fh)
        reply = self.run(first, open_op(claim, access, deny, owner, how), GETFH)
        for _ in range(2):
            result = next_result(reply.body)
            if result.status:
                raise StatusError(result)
        body = reply.body
        found = Opened(
            b"",
            read_stateid(body),
            body.boolean(),
            body.u64(),
            body.u64(),
            body.u32(),
            body.bitmap(),
            read_delegation(body),
        )
        result = next_result(body)
        assert result.status == n.NFS4_OK
        found.fh = body.opaque(128)
        return found

    def create(self, name: bytes, access: int = BOTH | NO_DELEG, **rest: Any) -> Opened:
        """A new file, mode 644, or an old one."""
        return self.open(name, access, how=create(mode=u32(0o644)), **rest)

    def close(self, fh: bytes, held: Stateid) -> Stateid:
        return read_stateid(self.on(fh, op(n.OP_CLOSE, u32(0), stateid(held))))

    def downgrade(self, fh: bytes, held: Stateid, access: int, deny: int = 0) -> Stateid:
        fields = (stateid(held), u32(0), u32(access), u32(deny))
        return read_stateid(self.on(fh, op(n.OP_OPEN_DOWNGRADE, *fields)))

    # -- contents --

    def read(self, fh: bytes, held: Stateid, offset: int, count: int) -> tuple[bytes, bool]:
        body = self.on(fh, op(n.OP_READ, stateid(held), u64(offset), u32(count)))
        eof = body.boolean()
        return body.opaque(1 << 24), eof

    def write(
        self, fh: bytes, held: Stateid, offset: int, contents: bytes, stable: int = n.FILE_SYNC4
    ) -> tuple[int, int, bytes]:
        """(count, committed, verifier)"""
        fields = (stateid(held), u64(offset), u32(stable), opaque(contents))
        body = self.on(fh, op(n.OP_WRITE, *fields))
        return body.u32(), body.u32(), body.fixed(8)

    def commit(self, fh: bytes) -> bytes:
        return self.on(fh, op(n.OP_COMMIT, u64(0), u32(0))).fixed(8)

    # -- locks --

    def lock(
        self,
        fh: bytes,
        held: Stateid,
        owner: bytes | None,
        offset: int,
        length: int,
        kind: int = n.WRITE_LT,
        reclaim: bool = False,
    ) -> Stateid:
        """`held`: an open stateid with a new lock-owner, or a lock stateid with owner None."""
        if owner is not None:
            locker = u32(1) + u32(0) + stateid(held) + u32(0) + u64(0) + opaque(owner)
        else:
            locker = u32(0) + stateid(held) + u32(0)
        fields = (u32(kind), u32(reclaim), u64(offset), u64(length), locker)
        return read_stateid(self.on(fh, op(n.OP_LOCK, *fields)))

    def lockt(
        self, fh: bytes, owner: bytes, offset: int, length: int, kind: int = n.WRITE_LT
    ) -> None:
        fields = (u32(kind), u64(offset), u64(length), u64(0), opaque(owner))
        self.on(fh, op(n.OP_LOCKT, *fields))

    def locku(self, fh: bytes, held: Stateid, offset: int, length: int) -> Stateid:
        fields = (u32(n.WRITE_LT), u32(0), stateid(held), u64(offset), u64(length))
        return read_stateid(self.on(fh, op(n.OP_LOCKU, *fields)))

    # -- stateids --

    def test(self, *held: Stateid) -> list[int]:
        body = self.last(op(n.OP_TEST_STATEID, u32(len(held)), *map(stateid, held)))
        return [body.u32() for _ in range(body.u32())]

    def free(self, held: Stateid) -> None:
        self.last(op(n.OP_FREE_STATEID, stateid(held)))

    def delegreturn(self, fh: bytes, held: Stateid) -> None:
        self.on(fh, op(n.OP_DELEGRETURN, stateid(held)))
