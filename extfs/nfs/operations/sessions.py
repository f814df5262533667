"""Operations of clients and sessions (RFC 8881 18.33 to 18.37, 18.46, 18.47, 18.50, 18.51)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from extfs.nfs import constants as n
from extfs.nfs.clients import Client, Principal, Standing
from extfs.nfs.compound import Compound, Operation
from extfs.nfs.effects import Steps
from extfs.nfs.errors import NfsError
from extfs.nfs.sessions import ChannelAttributes
from extfs.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from extfs.nfs.service import ServiceOptions
    from extfs.nfs.sessions import Session

__all__ = ["OPERATIONS"]

log = logging.getLogger("extfs.nfs")

_CLIENT_FLAGS = (
    n.EXCHGID4_FLAG_SUPP_MOVED_REFER
    | n.EXCHGID4_FLAG_SUPP_MOVED_MIGR
    | n.EXCHGID4_FLAG_BIND_PRINC_STATEID
    | n.EXCHGID4_FLAG_MASK_PNFS
    | n.EXCHGID4_FLAG_UPD_CONFIRMED_REC_A
)
_SESSION_FLAGS = (
    n.CREATE_SESSION4_FLAG_PERSIST
    | n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
    | n.CREATE_SESSION4_FLAG_CONN_RDMA
)
_RPCSEC_GSS = 6
_IMPLEMENTATION_MAX = 1024
_ALGORITHMS_MAX = 32
_OID_MAX = 128
_SECURITIES_MAX = 16
_MACHINE_NAME_MAX = 255
_GIDS_MAX = 16
_GSS_HANDLE_MAX = 1024
_SSV_MAX = 1024

# The least with which a channel is of any use: a SEQUENCE or CB_SEQUENCE and one small operation,
# with RPC header and AUTH_SYS.
REQUEST_MIN = 256
RESPONSE_MIN = 128
BACK_BYTES_MAX = 65536
BACK_OPS_MAX = 16
BACK_SLOTS_MAX = 16
_U32_MAX = 0xFFFFFFFF


def _principal(c: Compound) -> Principal:
    return c.credential.flavor, c.credential.uid


# -- EXCHANGE_ID --


def _read_protection(args: Reader) -> None:
    """state_protect4_a. What is not SP4_NONE needs RPCSEC_GSS, which this server has not.

    SP4_MACH_CRED over another flavor is NFS4ERR_INVAL; of the algorithms for SP4_SSV none is
    supported (RFC 8881 18.35.3).
    """
    how = args.u32()
    if how == n.SP4_NONE:
        return
    if how not in (n.SP4_MACH_CRED, n.SP4_SSV):
        raise XdrError("state_protect_how4")
    args.bitmap()
    args.bitmap()
    if how == n.SP4_MACH_CRED:
        raise NfsError(n.NFS4ERR_INVAL)
    for _ in range(2):
        for _ in range(args.count(_ALGORITHMS_MAX)):
            args.opaque(_OID_MAX)
    args.u32()
    args.u32()
    raise NfsError(n.NFS4ERR_ENCR_ALG_UNSUPP)


def _read_implementation(args: Reader) -> None:
    """client_impl_id: at most one nfs_impl_id4."""
    for _ in range(args.count(1)):
        args.opaque(_IMPLEMENTATION_MAX)
        args.opaque(_IMPLEMENTATION_MAX)
        args.i64()
        args.u32()


def exchange_id(c: Compound, args: Reader, out: Writer) -> None:
    """EXCHANGE_ID (RFC 8881 18.35)."""
    verifier = args.fixed(n.NFS4_VERIFIER_SIZE)
    owner = args.opaque(n.NFS4_OPAQUE_LIMIT)
    flags = args.u32()
    if flags & ~_CLIENT_FLAGS:
        raise NfsError(n.NFS4ERR_INVAL)
    _read_protection(args)
    _read_implementation(args)
    if flags & n.EXCHGID4_FLAG_UPD_CONFIRMED_REC_A:
        client = _updated(c, owner, verifier)
    else:
        client = _identified(c, owner, verifier)
    service = c.service
    client.peer, client.minor = c.connection.host, c.minor
    confirmed = client.standing is not Standing.PENDING
    out.u64(client.clientid)
    out.u32((client.sequence + 1) & _U32_MAX)
    out.u32(_server_flags(c) | (n.EXCHGID4_FLAG_CONFIRMED_R if confirmed else 0))
    out.u32(n.SP4_NONE)
    # One process serves all addresses: any two connections may be trunked (2.10.5). The owner
    # stays after a restart.
    out.u64(0)
    out.opaque(service.records.owner)
    out.opaque(service.records.owner)
    out.u32(0)


def _server_flags(c: Compound) -> int:
    host = c.connection.host
    if any(export.offers_layouts(host) for export in c.service.exports.all):
        return n.EXCHGID4_FLAG_USE_PNFS_MDS
    return n.EXCHGID4_FLAG_USE_NON_PNFS


def _updated(c: Compound, owner: bytes, verifier: bytes) -> Client:
    """Cases 6 to 9 of RFC 8881 18.35.4."""
    client = c.service.clients.living(owner)
    if client is None:
        raise NfsError(n.NFS4ERR_NOENT)
    if client.verifier != verifier:
        raise NfsError(n.NFS4ERR_NOT_SAME)
    if client.principal != _principal(c):
        raise NfsError(n.NFS4ERR_PERM)
    return client


def _identified(c: Compound, owner: bytes, verifier: bytes) -> Client:
    """Cases 1 to 5 of RFC 8881 18.35.4."""
    clients = c.service.clients
    principal = _principal(c)
    client = clients.living(owner)
    if client is not None:
        if client.principal != principal:
            _take_over(c, client)
        elif client.verifier == verifier:
            pending = clients.pending(owner)
            if pending is not None and pending.creating:
                raise NfsError(n.NFS4ERR_DELAY)  # it is about to take this one's place
            if pending is not None:
                clients.drop(pending)
            return client
    return clients.add(owner, verifier, principal)


def _take_over(c: Compound, client: Client) -> None:
    """Another principal uses the owner of `client`: it may, if that has nothing any more."""
    if not c.service.lease.is_courtesy(client) and (
        client.sessions or c.service.clients.has_state(client)
    ):
        raise NfsError(n.NFS4ERR_CLID_INUSE)
    c.service.clients.drop(client)


# -- CREATE_SESSION --


def _read_channel(args: Reader) -> ChannelAttributes:
    """channel_attrs4; padding of headers is for RDMA."""
    args.u32()
    request, response, cached, ops, slots = (args.u32() for _ in range(5))
    for _ in range(args.count(1)):
        args.u32()
    return ChannelAttributes(request, response, cached, ops, slots)


def _write_channel(out: Writer, channel: ChannelAttributes) -> None:
    out.u32(0)
    out.u32(channel.max_request)
    out.u32(channel.max_response)
    out.u32(channel.max_cached)
    out.u32(channel.max_ops)
    out.u32(channel.max_slots)
    out.u32(0)


def _fore(asked: ChannelAttributes, options: ServiceOptions) -> ChannelAttributes:
    """What is granted of what is asked for, as far as memory allows."""
    if (
        asked.max_request < REQUEST_MIN
        or asked.max_response < RESPONSE_MIN
        or asked.max_ops < 1
        or asked.max_slots < 1
    ):
        raise NfsError(n.NFS4ERR_TOOSMALL)
    return ChannelAttributes(
        min(asked.max_request, options.record_bytes),
        min(asked.max_response, options.record_bytes),
        min(asked.max_cached, options.cached_bytes),
        min(asked.max_ops, options.operations),
        min(asked.max_slots, options.slots),
    )


def _back(asked: ChannelAttributes) -> ChannelAttributes:
    if (
        asked.max_request < REQUEST_MIN
        or asked.max_response < RESPONSE_MIN
        or asked.max_ops < 2
        or asked.max_slots < 1
    ):
        raise NfsError(n.NFS4ERR_TOOSMALL)
    return ChannelAttributes(
        min(asked.max_request, BACK_BYTES_MAX),
        min(asked.max_response, BACK_BYTES_MAX),
        min(asked.max_cached, BACK_BYTES_MAX),
        min(asked.max_ops, BACK_OPS_MAX),
        min(asked.max_slots, BACK_SLOTS_MAX),
    )


def _read_callback_security(args: Reader) -> bytes | None:
    """callback_sec_parms4<>: the opaque_auth of the first that this server can use, or None."""
    chosen: bytes | None = None
    for _ in range(args.count(_SECURITIES_MAX)):
        flavor = args.u32()
        auth: bytes | None = None
        if flavor == n.AUTH_NONE:
            auth = bytes(8)
        elif flavor == n.AUTH_SYS:
            begin = args.pos
            args.u32()
            args.opaque(_MACHINE_NAME_MAX)
            args.u32()
            args.u32()
            for _ in range(args.count(_GIDS_MAX)):
                args.u32()
            credential = Writer()
            credential.u32(n.AUTH_SYS)
            credential.opaque(args.buffer[begin : args.pos])
            auth = bytes(credential.buffer)
        elif flavor == _RPCSEC_GSS:
            args.u32()
            args.opaque(_GSS_HANDLE_MAX)
            args.opaque(_GSS_HANDLE_MAX)
        else:
            raise XdrError("flavor of callbacks")
        if chosen is None:
            chosen = auth
    return chosen


def create_session(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """CREATE_SESSION (RFC 8881 18.36), with its own slot for retransmissions (18.36.4).

    Only a success takes the sequence number; what failed is judged anew when it is sent again.
    PERSIST is granted where the session is durable before it is answered (see records.py).
    """
    clientid, sequence, flags = args.u64(), args.u32(), args.u32()
    asked_fore, asked_back = _read_channel(args), _read_channel(args)
    program = args.u32()
    cb_auth = _read_callback_security(args)
    client = c.service.clients.get(clientid)
    if client is None:
        raise NfsError(n.NFS4ERR_STALE_CLIENTID)
    if client.creating:
        raise NfsError(n.NFS4ERR_DELAY)
    if sequence == client.sequence and client.reply:
        out.raw(client.reply)
        return
    if sequence != (client.sequence + 1) & _U32_MAX:
        raise NfsError(n.NFS4ERR_SEQ_MISORDERED)
    if flags & ~_SESSION_FLAGS:
        raise NfsError(n.NFS4ERR_INVAL)
    options = c.service.options
    back = _back(asked_back)
    fore = c.service.sessions.admitted(_fore(asked_fore, options))
    if len(client.sessions) >= options.sessions_of_client:
        raise NfsError(n.NFS4ERR_NOSPC)
    if client.standing is Standing.PENDING:
        if flags & n.CREATE_SESSION4_FLAG_PERSIST and options.keep_clients:
            c.service.records.keep(client)
        yield from _confirm(c, client)
        fore = c.service.sessions.admitted(fore)  # others were admitted meanwhile
    client.renew(c.service.clock())
    client.peer = c.connection.host  # one that was kept over a restart has sent no EXCHANGE_ID
    session = c.service.sessions.create(client, c.minor, fore, back, program, cb_auth or bytes(8))
    granted = 0
    wants_back = flags & n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN and cb_auth is not None
    if wants_back:
        granted = n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
    session.wants_back = bool(wants_back)
    client.sequence = sequence
    begin = len(out)
    persist = granted | n.CREATE_SESSION4_FLAG_PERSIST
    _write_created(out, session, sequence, persist)
    client.reply = bytes(out.buffer[begin:])
    if not (flags & n.CREATE_SESSION4_FLAG_PERSIST and (yield from _persistent(c, session))):
        out.truncate(begin)
        _write_created(out, session, sequence, granted)
        client.reply = bytes(out.buffer[begin:])
        if client.kept:
            c.service.records.stage_client(client)
    if not c.connection.closed:
        c.service.sessions.bind(session, c.connection, fore=True, back=bool(wants_back))


def _write_created(out: Writer, session: Session, sequence: int, flags: int) -> None:
    """CREATE_SESSION4resok."""
    out.fixed(session.id)
    out.u32(sequence)
    out.u32(flags)
    _write_channel(out, session.fore)
    _write_channel(out, session.back)


def _persistent(c: Compound, session: Session) -> Steps[bool]:
    """Whether the session is durable now, with the answer; if it cannot be, it is as any other."""
    sessions, client = c.service.sessions, session.client
    if not client.kept or not sessions.persistent(session.fore):
        return False
    c.service.callbacks.reserve(session)
    sessions.keep(session)
    c.service.records.stage_client(client)
    client.creating = True  # who repeats the request meanwhile waits
    try:
        yield from c.service.records.durable()
    except OSError as error:
        log.warning("a session of client %s is not persistent: %s", client.name, error)
        sessions.not_kept(session)
        return False
    finally:
        client.creating = False
    if client.standing is Standing.GONE:
        raise NfsError(n.NFS4ERR_STALE_CLIENTID)
    return True


def _confirm(c: Compound, client: Client) -> Steps[None]:
    """The phase of client ID confirmation (RFC 8881 18.36.3): durable, then CONFIRMED.

    While `creating` is set the client stays PENDING and in the table, and its owner gets no other.
    """
    if client.principal != _principal(c):
        raise NfsError(n.NFS4ERR_CLID_INUSE)
    service = c.service
    clients = service.clients
    if not service.lease.may_succeed(client):
        raise NfsError(n.NFS4ERR_CLID_INUSE)
    former = clients.living(client.owner)
    if former is not None and former.principal != client.principal:
        _take_over(c, former)
    clients.make_room()
    client.creating = True
    try:
        yield from service.lease.confirmed(client)
        former = clients.living(client.owner)
        if former is not None:
            clients.drop(former, restarted=True)
            yield from service.records.durable()
    finally:
        client.creating = False
    clients.confirm(client)


# -- connections and the backchannel --


def bind_conn_to_session(c: Compound, args: Reader, out: Writer) -> None:
    """BIND_CONN_TO_SESSION (RFC 8881 18.34)."""
    identity = args.fixed(n.NFS4_SESSIONID_SIZE)
    direction = args.u32()
    args.boolean()
    if c.op_count != 1:
        raise NfsError(n.NFS4ERR_NOT_ONLY_OP)
    if direction not in (
        n.CDFC4_FORE,
        n.CDFC4_BACK,
        n.CDFC4_FORE_OR_BOTH,
        n.CDFC4_BACK_OR_BOTH,
    ):
        raise XdrError("channel_dir_from_client4")
    session = c.service.sessions.get(identity)
    if session is None:
        raise NfsError(n.NFS4ERR_BADSESSION)
    fore = direction != n.CDFC4_BACK
    back = direction != n.CDFC4_FORE
    if not c.connection.closed:
        c.service.sessions.bind(session, c.connection, fore=fore, back=back)
    out.fixed(identity)
    out.u32(n.CDFS4_BOTH if fore and back else n.CDFS4_FORE if fore else n.CDFS4_BACK)
    out.boolean(False)


def backchannel_ctl(c: Compound, args: Reader, out: Writer) -> None:
    """BACKCHANNEL_CTL (RFC 8881 18.33)."""
    program = args.u32()
    cb_auth = _read_callback_security(args)
    session = c.session
    assert session is not None
    if cb_auth is None:
        # All that was offered were GSS handles, and none is known here.
        raise NfsError(n.NFS4ERR_NOENT)
    session.cb_program = program
    session.cb_auth = cb_auth
    if session.record:
        c.service.records.stage_session(session)
    if session.back_connections:
        c.service.callbacks.attach(session)


# -- the ends --


def destroy_session(c: Compound, args: Reader, out: Writer) -> None:
    """DESTROY_SESSION (RFC 8881 18.37)."""
    identity = args.fixed(n.NFS4_SESSIONID_SIZE)
    if c.op_index != c.op_count - 1:
        raise NfsError(n.NFS4ERR_NOT_ONLY_OP)
    session = c.service.sessions.get(identity)
    if session is None:
        raise NfsError(n.NFS4ERR_BADSESSION)
    if c.connection not in session.connections and not _alone(c, session):
        raise NfsError(n.NFS4ERR_CONN_NOT_BOUND_TO_SESSION)
    if session.busy(but=c.slot):
        raise NfsError(n.NFS4ERR_DELAY)
    c.service.sessions.destroy(session)


def _alone(c: Compound, session: Session) -> bool:
    """Of a session of before a restart, which nobody has used since: whether it is its client."""
    return (
        session.restored and not session.connections and session.client.principal == _principal(c)
    )


def destroy_clientid(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """DESTROY_CLIENTID (RFC 8881 18.50)."""
    clientid = args.u64()
    clients = c.service.clients
    client = clients.get(clientid)
    if client is None:
        raise NfsError(n.NFS4ERR_STALE_CLIENTID)
    if client.creating or client.sessions or clients.has_state(client):
        raise NfsError(n.NFS4ERR_CLIENTID_BUSY)
    clients.drop(client)
    yield from c.service.records.durable()


def reclaim_complete(c: Compound, args: Reader, out: Writer) -> Steps[None]:
    """RECLAIM_COMPLETE (RFC 8881 18.51)."""
    client = c.client
    assert client is not None
    if not args.boolean():
        if client.reclaim_done and c.retry:
            return  # it came before a restart
        yield from c.service.lease.reclaim_complete(client)
        return
    if c.current is None:
        raise NfsError(n.NFS4ERR_NOFILEHANDLE)
    export = c.current.export.id
    if export in client.reclaimed_exports:
        raise NfsError(n.NFS4ERR_COMPLETE_ALREADY)
    client.reclaimed_exports.add(export)


def set_ssv(c: Compound, args: Reader, out: Writer) -> None:
    """SET_SSV (RFC 8881 18.47): no client ID here has an SSV."""
    args.opaque(_SSV_MAX)
    args.opaque(_SSV_MAX)
    raise NfsError(n.NFS4ERR_INVAL)


OPERATIONS: dict[int, Operation] = {
    n.OP_BACKCHANNEL_CTL: Operation(backchannel_ctl),
    n.OP_BIND_CONN_TO_SESSION: Operation(bind_conn_to_session),
    n.OP_EXCHANGE_ID: Operation(exchange_id),
    n.OP_CREATE_SESSION: Operation(create_session, reply_bytes=96),
    n.OP_DESTROY_SESSION: Operation(destroy_session),
    n.OP_SET_SSV: Operation(set_ssv),
    n.OP_DESTROY_CLIENTID: Operation(destroy_clientid),
    n.OP_RECLAIM_COMPLETE: Operation(reclaim_complete),
}
