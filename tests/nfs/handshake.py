"""Encoders and decoders for the tests of clients and sessions; a restart of the server."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from extfs.core import Filesystem
from extfs.nfs import constants as n
from extfs.nfs.service import Service, ServiceOptions
from extfs.nfs.xdr import Reader
from nfs import wire
from nfs.wire import (
    Reply,
    Runner,
    Session,
    Wire,
    create_session,
    make_service,
    next_result,
    op,
    u32,
    u64,
)

CONFIRMED = n.EXCHGID4_FLAG_CONFIRMED_R
UPDATE = n.EXCHGID4_FLAG_UPD_CONFIRMED_REC_A
RECLAIM_COMPLETE = op(n.OP_RECLAIM_COMPLETE, u32(0))
PERSIST = n.CREATE_SESSION4_FLAG_PERSIST | n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
OTHER_USER = wire.auth_sys(uid=1111)


@dataclass(frozen=True)
class Identity:
    """What EXCHANGE_ID returned."""

    clientid: int
    sequence: int
    flags: int
    server_owner: bytes
    server_scope: bytes


def identify(
    connection: Wire,
    owner: bytes,
    verifier: bytes = b"boot",
    flags: int = 0,
    auth: bytes = wire.ROOT,
) -> Identity:
    """EXCHANGE_ID that must succeed."""
    reply = connection.compound(wire.exchange_id(owner, verifier, flags), auth=auth)
    assert reply.status == n.NFS4_OK, n.STATUS_NAMES[reply.status]
    body = next_result(reply.body).body
    clientid, sequence, granted = body.u64(), body.u32(), body.u32()
    assert body.u32() == n.SP4_NONE
    assert body.u64() == 0
    found = Identity(clientid, sequence, granted, body.opaque(1024), body.opaque(1024))
    assert body.u32() == 0
    assert body.done()
    return found


def identify_status(
    connection: Wire,
    owner: bytes,
    verifier: bytes = b"boot",
    flags: int = 0,
    auth: bytes = wire.ROOT,
) -> int:
    """EXCHANGE_ID's status."""
    return connection.compound(wire.exchange_id(owner, verifier, flags), auth=auth).status


@dataclass(frozen=True)
class Created:
    """What CREATE_SESSION returned; channels as (request, response, cached, ops, slots)."""

    id: bytes
    sequence: int
    flags: int
    fore: tuple[int, ...]
    back: tuple[int, ...]


def _read_channel(body: Reader) -> tuple[int, ...]:
    values = body.unpack(struct.Struct(">IIIIIII"))
    assert values[0] == 0
    assert values[6] == 0
    return values[1:6]


def created(reply: Reply) -> Created:
    """The result of a CREATE_SESSION that must have succeeded."""
    result = next_result(reply.body)
    assert result.status == n.NFS4_OK, result
    body = result.body
    return Created(body.fixed(16), body.u32(), body.u32(), _read_channel(body), _read_channel(body))


def sequence_result(reply: Reply) -> tuple[bytes, tuple[int, ...]]:
    """Session id and the five numbers of a SEQUENCE result."""
    result = next_result(reply.body)
    assert (result.op, result.status) == (n.OP_SEQUENCE, n.NFS4_OK), result
    return result.body.fixed(16), tuple(result.body.u32() for _ in range(5))


def destroy_session(identity: bytes) -> bytes:
    return op(n.OP_DESTROY_SESSION, identity)


def destroy_clientid(clientid: int) -> bytes:
    return op(n.OP_DESTROY_CLIENTID, u64(clientid))


def bind_conn(identity: bytes, direction: int) -> bytes:
    return op(n.OP_BIND_CONN_TO_SESSION, identity, u32(direction), u32(0))


class Server:
    """A server that can be restarted, with its filesystem left as it is."""

    def __init__(
        self,
        fs: Filesystem,
        options: ServiceOptions | None = None,
        exports: tuple[str, ...] = ("/:rw,insecure,no_root_squash,layouts=block",),
    ) -> None:
        self.fs = fs
        self.options = options
        self.exports = exports
        self.runner = Runner()
        self.service: Service
        self.restart()

    def restart(self) -> None:
        """As after a kill: nothing but what is durable remains."""
        self.runner = Runner()
        self.service, _ = make_service(self.fs, self.exports, self.options, self.runner)

    def session(self, owner: bytes = b"one", verifier: bytes = b"boot", **how: bool) -> Session:
        return Session(self.service, owner, verifier, **how)

    def wire(self) -> Wire:
        return Wire(self.service)


class Kept(Session):
    """A client that asks for PERSIST, as the Linux client does."""

    def __init__(self, server: Server, owner: bytes = b"kept", verifier: bytes = b"boot") -> None:
        self.service = server.service
        self.wire = server.wire()
        found = identify(self.wire, owner, verifier)
        self.clientid, self.first = found.clientid, found.sequence
        self.confirmed = bool(found.flags & n.EXCHGID4_FLAG_CONFIRMED_R)
        self.reopen(server, self.first)

    def reopen(self, server: Server, number: int) -> None:
        """CREATE_SESSION with this sequence number."""
        self.service = server.service
        self.wire = server.wire()
        got = created(self.wire.compound(create_session(self.clientid, number, PERSIST)))
        assert got.flags & n.CREATE_SESSION4_FLAG_PERSIST
        self.id, self.numbers = got.id, {}
