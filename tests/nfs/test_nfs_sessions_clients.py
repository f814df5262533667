"""EXCHANGE_ID, CREATE_SESSION and the ends of both (RFC 8881 18.35, 18.36, 18.37, 18.50)."""

from __future__ import annotations

import pytest

from extfs.nfs import constants as n
from extfs.nfs.service import ServiceOptions
from nfs import wire
from nfs.conftest import World
from nfs.handshake import (
    CONFIRMED,
    OTHER_USER,
    RECLAIM_COMPLETE,
    UPDATE,
    bind_conn,
    created,
    destroy_clientid,
    destroy_session,
    identify,
    identify_status,
)
from nfs.wire import (
    Session,
    channel_attributes,
    create_session,
    next_result,
    op,
    opaque,
    u32,
    u64,
)


def test_new_owner_gets_an_unconfirmed_client_id(world: World) -> None:
    """Case 1."""
    found = identify(world.wire(), b"owner")
    assert not found.flags & CONFIRMED
    assert found.flags & n.EXCHGID4_FLAG_MASK_PNFS == n.EXCHGID4_FLAG_USE_PNFS_MDS
    assert found.sequence == 1
    assert found.server_owner == found.server_scope == world.service.records.owner


def test_pnfs_is_for_hosts_that_have_the_disk(world: World) -> None:
    export = "/:rw,insecure,10.0.0.0/8,layouts=block@10.1.0.0/16"
    service, _ = wire.make_service(world.fs, exports=(export,))
    for host, expected in (
        ("10.1.2.3", n.EXCHGID4_FLAG_USE_PNFS_MDS),
        ("10.2.0.1", n.EXCHGID4_FLAG_USE_NON_PNFS),
    ):
        found = identify(wire.Wire(service, host), b"owner")
        assert found.flags & n.EXCHGID4_FLAG_MASK_PNFS == expected


def test_the_same_client_again_has_the_same_client_id(world: World) -> None:
    """Case 2: trunking, or a retransmission; the sequence number of CREATE_SESSION goes on."""
    session = world.session(b"owner", b"boot")
    found = identify(world.wire(), b"owner", b"boot")
    assert found.clientid == session.clientid
    assert found.flags & CONFIRMED
    assert found.sequence == session.first + 1


def test_case_2_forgets_a_pending_client_of_the_owner(world: World) -> None:
    session = world.session(b"owner", b"boot")
    later = identify(world.wire(), b"owner", b"later")
    assert identify(world.wire(), b"owner", b"boot").clientid == session.clientid
    reply = world.wire().compound(create_session(later.clientid, later.sequence))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID


def test_other_principal_while_the_client_has_a_session(world: World) -> None:
    """Case 3, in use."""
    world.session(b"owner")
    for verifier in (b"boot", b"other"):
        status = identify_status(world.wire(), b"owner", verifier, auth=OTHER_USER)
        assert status == n.NFS4ERR_CLID_INUSE


def test_other_principal_takes_over_what_has_nothing(world: World) -> None:
    """Case 3: the old client is gone at once."""
    session = world.session(b"owner")
    assert session.wire.compound(destroy_session(session.id)).status == n.NFS4_OK
    found = identify(world.wire(), b"owner", b"boot", auth=OTHER_USER)
    assert found.clientid != session.clientid
    reply = world.wire().compound(create_session(session.clientid, session.first + 1))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID


def test_other_principal_takes_over_when_the_lease_is_over(world: World) -> None:
    """Case 3."""
    session = world.session(b"owner")
    world.runner.now += world.service.options.lease_seconds + 1
    found = identify(world.wire(), b"owner", b"boot", auth=OTHER_USER)
    assert found.clientid != session.clientid


@pytest.mark.parametrize("verifier", [b"boot", b"other"])
@pytest.mark.parametrize("auth", [wire.ROOT, OTHER_USER])
def test_unconfirmed_is_replaced(world: World, verifier: bytes, auth: bytes) -> None:
    """Case 4."""
    first = identify(world.wire(), b"owner", b"boot")
    second = identify(world.wire(), b"owner", verifier, auth=auth)
    assert first.clientid != second.clientid
    reply = world.wire().compound(create_session(first.clientid, first.sequence))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID


def test_restarted_client_loses_its_state_when_it_is_confirmed(world: World) -> None:
    """Case 5."""
    old = world.session(b"owner", b"boot")
    connection = world.wire()
    new = identify(connection, b"owner", b"again")
    assert new.clientid != old.clientid
    assert old.run().status == n.NFS4_OK
    created(connection.compound(create_session(new.clientid, new.sequence)))
    reply = old.wire.compound(wire.sequence(old.id, 9))
    assert reply.status == n.NFS4ERR_BADSESSION
    assert world.service.clients.get(old.clientid) is None


def test_update(world: World) -> None:
    """Cases 6 to 9."""
    connection = world.wire()
    assert identify_status(connection, b"owner", flags=UPDATE) == n.NFS4ERR_NOENT
    identify(connection, b"owner")
    assert identify_status(connection, b"owner", flags=UPDATE) == n.NFS4ERR_NOENT
    session = world.session(b"owner", b"boot")
    found = identify(connection, b"owner", b"boot", UPDATE)
    assert (found.clientid, found.flags & CONFIRMED) == (session.clientid, CONFIRMED)
    assert identify_status(connection, b"owner", b"other", UPDATE) == n.NFS4ERR_NOT_SAME
    assert identify_status(connection, b"owner", b"boot", UPDATE, OTHER_USER) == n.NFS4ERR_PERM
    assert session.run().status == n.NFS4_OK


@pytest.mark.parametrize("flags", [4, CONFIRMED, 1 << 20])
def test_flags_that_no_client_may_set(world: World, flags: int) -> None:
    assert identify_status(world.wire(), b"owner", flags=flags) == n.NFS4ERR_INVAL


def exchange_id_with(protection: bytes, implementations: bytes = u32(0)) -> bytes:
    head = op(n.OP_EXCHANGE_ID, b"verifier", opaque(b"owner"), u32(0))
    return head + protection + implementations


def test_state_protection_needs_gss(world: World) -> None:
    connection = world.wire()
    bitmaps = u32(1) + u32(1 << 3) + u32(0)
    reply = connection.compound(exchange_id_with(u32(n.SP4_MACH_CRED) + bitmaps))
    assert reply.status == n.NFS4ERR_INVAL
    algorithms = u32(1) + opaque(b"oid")
    ssv = u32(n.SP4_SSV) + bitmaps + algorithms + algorithms + u32(4) + u32(2)
    assert connection.compound(exchange_id_with(ssv)).status == n.NFS4ERR_ENCR_ALG_UNSUPP
    assert connection.compound(exchange_id_with(u32(7))).status == n.NFS4ERR_BADXDR


def test_implementation_ids(world: World) -> None:
    one = opaque(b"domain") + opaque(b"name") + u64(1) + u32(2)
    none = u32(n.SP4_NONE)
    connection = world.wire()
    assert connection.compound(exchange_id_with(none, u32(1) + one)).status == n.NFS4_OK
    reply = connection.compound(exchange_id_with(none, u32(2) + one + one))
    assert reply.status == n.NFS4ERR_BADXDR


def test_owner_too_long(world: World) -> None:
    assert identify_status(world.wire(), b"o" * 1025) == n.NFS4ERR_BADXDR
    assert identify_status(world.wire(), b"o" * 1024) == n.NFS4_OK


def test_pending_clients_are_bounded_and_go_with_their_lease(world: World) -> None:
    connection = world.wire()
    first = identify(connection, b"first")
    for number in range(1200):
        identify(connection, b"%d" % number)
    assert len(world.service.clients) <= 1024
    reply = connection.compound(create_session(first.clientid, first.sequence))
    assert reply.status == n.NFS4ERR_STALE_CLIENTID
    world.runner.advance(world.service.options.lease_seconds + 3)
    assert len(world.service.clients) == 0


# -- CREATE_SESSION --


def test_what_is_negotiated(world: World) -> None:
    connection = world.wire()
    options = world.service.options
    found = identify(connection, b"owner")
    huge = channel_attributes(1 << 31, 1 << 31, 1 << 31, 1 << 31, 2049)
    got = created(connection.compound(create_session(found.clientid, 1, 0xFF & 2, huge)))
    assert got.sequence == 1
    assert got.flags == n.CREATE_SESSION4_FLAG_CONN_BACK_CHAN
    assert got.fore == (
        options.record_bytes,
        options.record_bytes,
        options.cached_bytes,
        options.operations,
        options.slots,
    )
    small = channel_attributes(512, 400, 10, 4, 8)
    assert created(connection.compound(create_session(found.clientid, 2, 0, small))).fore == (
        512,
        400,
        10,
        4,
        8,
    )


@pytest.mark.parametrize(
    "fore",
    [
        channel_attributes(request=20),
        channel_attributes(response=0),
        channel_attributes(ops=0),
        channel_attributes(slots=0),
    ],
)
def test_channels_of_no_use(world: World, fore: bytes) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    reply = connection.compound(create_session(found.clientid, 1, 2, fore))
    assert reply.status == n.NFS4ERR_TOOSMALL
    # The sequence number was not taken.
    created(connection.compound(create_session(found.clientid, 1)))


def test_replay_of_create_session(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    first = created(connection.compound(create_session(found.clientid, 1)))
    again = created(connection.compound(create_session(found.clientid, 1)))
    assert first == again
    assert len(world.service.sessions) == 1
    for misordered in (0, 3, 1 << 31):
        reply = connection.compound(create_session(found.clientid, misordered))
        assert reply.status == n.NFS4ERR_SEQ_MISORDERED
    second = created(connection.compound(create_session(found.clientid, 2)))
    assert second.id != first.id


def test_misordered_before_the_first(world: World) -> None:
    found = identify(world.wire(), b"owner")
    reply = world.wire().compound(create_session(found.clientid, found.sequence - 1))
    assert reply.status == n.NFS4ERR_SEQ_MISORDERED


def test_other_principal_cannot_confirm_but_create_later(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    for _ in range(2):
        reply = connection.compound(create_session(found.clientid, 1), auth=OTHER_USER)
        assert reply.status == n.NFS4ERR_CLID_INUSE
    created(connection.compound(create_session(found.clientid, 1)))
    created(connection.compound(create_session(found.clientid, 2), auth=OTHER_USER))


def test_unknown_flags_and_clients(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    reply = connection.compound(create_session(found.clientid, 1, 0xF))
    assert reply.status == n.NFS4ERR_INVAL
    assert connection.compound(create_session(12345, 1)).status == n.NFS4ERR_STALE_CLIENTID


def test_not_the_only_operation(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    root = op(n.OP_PUTROOTFH)
    for operation in (
        wire.exchange_id(b"other"),
        create_session(found.clientid, 1),
        destroy_clientid(found.clientid),
        bind_conn(bytes(16), n.CDFC4_FORE),
        destroy_session(bytes(16)),
    ):
        assert connection.compound(operation, root).status == n.NFS4ERR_NOT_ONLY_OP


def test_callback_security(world: World) -> None:
    """The first flavor that the server has is taken; a garbled one is BADXDR."""
    connection = world.wire()
    found = identify(connection, b"owner")
    machine = u32(5) + opaque(b"machine") + u32(7) + u32(11) + u32(1) + u32(13)
    gss = u32(6) + u32(1) + opaque(b"from server") + opaque(b"from client")
    plain = create_session(found.clientid, 1)[:-8]
    reply = connection.compound(plain + u32(3) + gss + u32(1) + machine + u32(0))
    session = world.service.sessions.get(created(reply).id)
    assert session is not None
    assert session.cb_auth == u32(n.AUTH_SYS) + opaque(machine)
    plain = create_session(found.clientid, 2)[:-8]
    assert connection.compound(plain + u32(1) + u32(5)).status == n.NFS4ERR_BADXDR
    # With nothing but GSS there are no callbacks, and the answer says so.
    assert created(connection.compound(plain + u32(1) + gss)).flags == 0


def test_sessions_of_a_client_are_bounded(world: World) -> None:
    connection = world.wire()
    found = identify(connection, b"owner")
    limit = world.service.options.sessions_of_client
    for number in range(1, limit + 1):
        created(connection.compound(create_session(found.clientid, number)))
    reply = connection.compound(create_session(found.clientid, limit + 1))
    assert reply.status == n.NFS4ERR_NOSPC


def test_the_reply_cache_of_all_is_bounded(world: World) -> None:
    """New sessions get less and less slots, at least two; then there are no more sessions."""
    options = ServiceOptions(reply_cache_bytes=1 << 20, cached_bytes=16384)
    limited, _ = wire.make_service(world.fs, options=options)
    connection = wire.Wire(limited)
    fore = channel_attributes(cached=1 << 20)
    slots, sessions = [], []
    for number in range(100):
        found = identify(connection, b"%d" % number)
        reply = connection.compound(create_session(found.clientid, 1, 2, fore))
        if reply.status != n.NFS4_OK:
            assert reply.status == n.NFS4ERR_NOSPC
            break
        got = created(reply)
        assert got.fore[2] == 16384
        slots.append(got.fore[4])
        sessions.append(got.id)
    assert slots[0] == 8
    assert slots == sorted(slots, reverse=True)
    assert slots[-1] == 2
    assert sum(slots) * 16384 <= 1 << 20
    assert connection.compound(destroy_session(sessions[-1])).status == n.NFS4_OK
    created(connection.compound(create_session(found.clientid, 1, 2, fore)))


def test_confirmed_clients_are_bounded(world: World) -> None:
    limited, _ = wire.make_service(world.fs, options=ServiceOptions(clients=3))
    for number in range(3):
        Session(limited, b"%d" % number)
    connection = wire.Wire(limited)
    found = identify(connection, b"more")
    reply = connection.compound(create_session(found.clientid, 1))
    assert reply.status == n.NFS4ERR_DELAY


# -- the ends --


def test_destroy_session(world: World) -> None:
    session = world.session()
    other = world.wire()
    reply = other.compound(destroy_session(session.id))
    assert reply.status == n.NFS4ERR_CONN_NOT_BOUND_TO_SESSION
    # SEQUENCE binds the connection.
    assert other.compound(wire.sequence(session.id, 1, 5, 5)).status == n.NFS4_OK
    assert other.compound(destroy_session(session.id)).status == n.NFS4_OK
    assert other.compound(destroy_session(session.id)).status == n.NFS4ERR_BADSESSION
    assert not other.connection.sessions
    assert not session.wire.connection.sessions


def test_destroy_session_in_itself_is_last(world: World) -> None:
    session = world.session()
    root = op(n.OP_PUTROOTFH)
    assert session.run(destroy_session(session.id), root).status == n.NFS4ERR_NOT_ONLY_OP
    assert session.run(destroy_session(session.id)).status == n.NFS4_OK
    reply = session.wire.compound(wire.sequence(session.id, 4))
    assert reply.status == n.NFS4ERR_BADSESSION


def test_destroy_clientid(world: World) -> None:
    session = world.session()
    connection = world.wire()
    assert connection.compound(destroy_clientid(1)).status == n.NFS4ERR_STALE_CLIENTID
    busy = destroy_clientid(session.clientid)
    assert connection.compound(busy).status == n.NFS4ERR_CLIENTID_BUSY
    assert session.run(busy).status == n.NFS4ERR_CLIENTID_BUSY
    assert session.wire.compound(destroy_session(session.id)).status == n.NFS4_OK
    assert connection.compound(busy).status == n.NFS4_OK
    assert connection.compound(busy).status == n.NFS4ERR_STALE_CLIENTID
    pending = identify(connection, b"pending")
    other = world.session(b"other")
    assert other.run(destroy_clientid(pending.clientid)).status == n.NFS4_OK


def test_reclaim_complete(world: World) -> None:
    session = Session(world.service, reclaim_complete=False)
    one_fs = op(n.OP_RECLAIM_COMPLETE, u32(1))
    assert session.run(one_fs).status == n.NFS4ERR_NOFILEHANDLE
    root = op(n.OP_PUTROOTFH)
    assert session.run(root, one_fs).status == n.NFS4_OK
    assert session.run(root, one_fs).status == n.NFS4ERR_COMPLETE_ALREADY
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4_OK
    assert session.run(RECLAIM_COMPLETE).status == n.NFS4ERR_COMPLETE_ALREADY


def test_set_ssv_without_ssv(world: World) -> None:
    session = world.session()
    reply = session.run(op(n.OP_SET_SSV, opaque(b"x" * 32), opaque(b"digest")))
    assert reply.status == n.NFS4ERR_INVAL


def test_every_prefix_of_the_handshake_is_an_answer(world: World) -> None:
    """Cut anywhere, an operation gets BADXDR, and nothing is created."""
    session = world.session()
    before = len(world.service.clients), len(world.service.sessions)
    gss = u32(6) + u32(1) + opaque(b"from server") + opaque(b"from client")
    machine = u32(1) + u32(5) + opaque(b"machine") + u32(7) + u32(11) + u32(1) + u32(13)
    create = create_session(session.clientid, 2)[:-8] + u32(2) + gss + machine
    exchange = exchange_id_with(
        u32(n.SP4_NONE), u32(1) + opaque(b"domain") + opaque(b"name") + u64(1) + u32(2)
    )
    for whole in (
        exchange,
        create,
        bind_conn(session.id, n.CDFC4_BACK_OR_BOTH),
        destroy_session(session.id),
        destroy_clientid(session.clientid),
        wire.sequence(session.id, 2),
        op(n.OP_BACKCHANNEL_CTL, u32(1), u32(1), machine),
    ):
        for length in range(4, len(whole), 4):
            reply = world.wire().compound(whole[:length])
            assert reply.status in (n.NFS4ERR_BADXDR, n.NFS4ERR_OP_NOT_IN_SESSION), length
    assert (len(world.service.clients), len(world.service.sessions)) == before
    assert next_result(session.run(op(n.OP_PUTROOTFH)).body).status == n.NFS4_OK
