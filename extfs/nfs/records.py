"""What the layout server keeps over a restart (RFC 8881 8.4.2 to 8.4.3, 2.10.6.5), and how.

Every record is (number, bytes) in a tree of the filesystem; a set of them is written in one
transaction. Number 0 is the server's own: its secret (of the filehandles), its epoch (one more at
each start), its owner (server_owner4 and scope: the same after a restart). Other numbers have their
kind in the top byte and are never used twice in a server's life between two starts.

What is durable when
    a client            before CREATE_SESSION confirms it is answered
    RECLAIM_COMPLETE    before it is answered: from then on the client may reclaim after a restart
    a client expired    before the request that needed what it held is answered (8.4.3, first edge)
    the end of grace    before anything that is no reclaim is granted: who has not reclaimed by then
                        may not do it after the next restart either (8.4.3, second edge)
    of a *kept* client  its stateids and what they stand for, before the answer that tells them

A change is *staged* in the protocol's thread, and `commit`, which blocks, writes all that is staged
in one transaction (or, when they are too many for it, one after the other in the order in which
they were staged): whoever waits for one that is under way finds his own changes in the next, so
that many requests share it. A COMPOUND that staged something commits before it is answered.

A client is kept if it asked for it: it set CREATE_SESSION4_FLAG_PERSIST, as the Linux client does.
After a restart it has its client ID, stateids and layouts, so that nothing is to be reclaimed, and
nothing in flight is lost. Its sessions are not kept, and csr_flags does not promise PERSIST: that
flag promises the reply cache (18.36.3), and a session without it could execute a retransmitted
request twice and never say so. The answer is NFS4ERR_BADSESSION, by which the client knows that
retransmissions are its own business now; it makes a new session under its client ID with one
CREATE_SESSION (2.10.13.1.3, 8.4.2.1), and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extfs.nfs.effects import Blocking, Steps
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.clients import Client
    from extfs.nfs.service import Service

__all__ = ["ClientRecord", "Kind", "Records", "ServerRecord"]

log = logging.getLogger("extfs.nfs")

VERSION = 1
SECRET_BYTES = 16
OWNER_MAX = 1024
REPLY_MAX = 4096
_KIND_SHIFT = 56
_NUMBER_MASK = (1 << _KIND_SHIFT) - 1


class Kind:
    """The top byte of a record's number."""

    CLIENT = 1
    STATE = 2


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """Record 0."""

    secret: bytes
    epoch: int
    owner: bytes

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.fixed(self.secret)
        out.u32(self.epoch)
        out.opaque(self.owner)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> ServerRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        return cls(reader.fixed(SECRET_BYTES), reader.u32(), reader.opaque(OWNER_MAX))


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A client; the fields are those of `clients.Client`."""

    clientid: int
    owner: bytes
    verifier: bytes
    flavor: int
    uid: int
    eligible: bool
    reclaim_done: bool
    kept: bool
    minor: int
    sequence: int
    reply: bytes
    holder_id: int
    holder_key: int

    def encode(self) -> bytes:
        """As it is stored."""
        out = Writer()
        out.u32(VERSION)
        out.u64(self.clientid)
        out.opaque(self.owner)
        out.fixed(self.verifier)
        out.u32(self.flavor)
        out.u32(self.uid)
        out.boolean(self.eligible)
        out.boolean(self.reclaim_done)
        out.boolean(self.kept)
        out.u32(self.minor)
        out.u32(self.sequence)
        out.opaque(self.reply)
        out.u64(self.holder_id)
        out.u64(self.holder_key)
        return bytes(out.buffer)

    @classmethod
    def decode(cls, encoded: bytes) -> ClientRecord:
        """`XdrError`: it is none of this version."""
        reader = _reader(encoded)
        return cls(
            clientid=reader.u64(),
            owner=reader.opaque(OWNER_MAX),
            verifier=reader.fixed(8),
            flavor=reader.u32(),
            uid=reader.u32(),
            eligible=reader.boolean(),
            reclaim_done=reader.boolean(),
            kept=reader.boolean(),
            minor=reader.u32(),
            sequence=reader.u32(),
            reply=reader.opaque(REPLY_MAX),
            holder_id=reader.u64(),
            holder_key=reader.u64(),
        )


def _reader(encoded: bytes) -> Reader:
    reader = Reader(encoded)
    version = reader.u32()
    if version != VERSION:
        raise XdrError(f"version {version} of a record")
    return reader


class Records:
    """The server's records. Opening it reads all of them and begins a new epoch: blocks.

    `OSError`: they cannot be read or written. All methods but `commit` belong to the protocol's
    thread.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.fs.records
        loaded = self._store.load()
        server = self._start(loaded.pop(0, None))
        self.secret = server.secret
        self.epoch = server.epoch
        self.owner = server.owner
        self._loaded = loaded
        self._last: dict[int, int] = {}
        for number in loaded:
            kind = number >> _KIND_SHIFT
            self._last[kind] = max(self._last.get(kind, 0), number & _NUMBER_MASK)
        self._numbers: dict[Client, int] = {}
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._staged: dict[int, bytes | None] = {}
        self.staged = 0
        """How often something was staged: a COMPOUND that finds another number than at its
        beginning commits before it is answered."""

    def _start(self, stored: bytes | None) -> ServerRecord:
        if stored is None:
            owner = b"extfs-" + os.urandom(8).hex().encode()
            server = ServerRecord(os.urandom(SECRET_BYTES), 1, owner)
        else:
            try:
                old = ServerRecord.decode(stored)
            except XdrError as error:
                raise OSError(f"the layout server's own record: {error}") from None
            server = ServerRecord(old.secret, (old.epoch + 1) & 0xFFFFFFFF, old.owner)
        self._store.put({0: server.encode()})
        return server

    # -- staging --

    def new_number(self, kind: int) -> int:
        """A number for a record."""
        last = self._last[kind] = self._last.get(kind, 0) + 1
        return kind << _KIND_SHIFT | last

    def stage(self, number: int, value: bytes | None) -> None:
        """Write the record at the next commit; None: delete it."""
        with self._lock:
            self._staged[number] = value
        self.staged += 1

    def stage_client(self, client: Client) -> None:
        """The client as it is now."""
        number = self._numbers.get(client)
        if number is None:
            number = self._numbers[client] = self.new_number(Kind.CLIENT)
        self.stage(number, client.to_record())

    def drop_client(self, client: Client) -> None:
        """It has no record any more. A client that has none is no error."""
        number = self._numbers.pop(client, None)
        if number is not None:
            self.stage(number, None)

    @property
    def pending(self) -> bool:
        """Whether a commit has something to write."""
        return bool(self._staged)

    def commit(self) -> None:
        """What was staged before the call is durable after it. Blocks. `OSError`: it is not.

        Runs in any thread. What could not be written stays staged.
        """
        with self._committing:
            with self._lock:
                batch, self._staged = self._staged, {}
            if not batch:
                return
            try:
                self._put(list(batch.items()))
            except BaseException:
                with self._lock:
                    self._staged = batch | self._staged
                raise

    def _put(self, changes: list[tuple[int, bytes | None]]) -> None:
        """In the order in which they were staged, in as few transactions as they fit in."""
        try:
            self._store.put(
                {number: value for number, value in changes if value is not None},
                [number for number, value in changes if value is None],
            )
        except OSError as error:
            if error.errno != errno.E2BIG or len(changes) == 1:
                raise
            half = len(changes) // 2
            self._put(changes[:half])
            self._put(changes[half:])

    def durable(self) -> Steps[None]:
        """Wait until all that is staged now is durable."""
        if self._staged or self._committing.locked():
            yield Blocking(self.commit)

    # -- after a restart --

    def restore(self) -> None:
        """Hand the records of the last epoch to those whom they concern."""
        loaded, self._loaded = self._loaded, {}
        clients: dict[int, ClientRecord] = {}
        for number, encoded in sorted(loaded.items()):
            if number >> _KIND_SHIFT == Kind.CLIENT:
                with contextlib.suppress(XdrError):
                    clients[number] = ClientRecord.decode(encoded)
                    continue
            log.warning("record %x of the layout server is unknown, it stays as it is", number)
        self._service.lease.restore(clients)
