"""What the server keeps over a restart, and in which transactions."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extfs.core import Filesystem, SimDevice, mkfs
from extfs.nfs.effects import run_here
from extfs.nfs.records import ClientRecord, Kind, ServerRecord
from extfs.nfs.xdr import XdrError
from nfs.conftest import DEVICE_BYTES
from nfs.handshake import Server, identify

CLIENTS = st.builds(
    ClientRecord,
    clientid=st.integers(0, (1 << 64) - 1),
    owner=st.binary(max_size=1024),
    verifier=st.binary(min_size=8, max_size=8),
    flavor=st.integers(0, 6),
    uid=st.integers(0, (1 << 32) - 1),
    eligible=st.booleans(),
    reclaim_done=st.booleans(),
    kept=st.booleans(),
    minor=st.integers(1, 2),
    sequence=st.integers(0, (1 << 32) - 1),
    reply=st.binary(max_size=200),
    holder_id=st.integers(0, (1 << 64) - 1),
    holder_key=st.integers(0, (1 << 64) - 1),
)


@pytest.fixture
def fs() -> Iterator[Filesystem]:
    with SimDevice(DEVICE_BYTES) as sim:
        with sim.device() as device:
            mkfs(device)
        with Filesystem.open(sim.device()) as filesystem:
            yield filesystem


@given(CLIENTS)
def test_client_record(record: ClientRecord) -> None:
    encoded = record.encode()
    assert ClientRecord.decode(encoded) == record
    for length in range(0, len(encoded), 4):
        with pytest.raises(XdrError):
            ClientRecord.decode(encoded[:length])


def test_a_record_of_another_version() -> None:
    encoded = bytearray(ServerRecord(bytes(16), 1, b"owner").encode())
    encoded[3] += 1
    with pytest.raises(XdrError, match="version 2"):
        ServerRecord.decode(bytes(encoded))


def test_what_a_restart_keeps_of_the_server(fs: Filesystem) -> None:
    server = Server(fs)
    first = server.service.records
    before = identify(server.wire(), b"owner")
    server.restart()
    second = server.service.records
    assert (second.secret, second.owner) == (first.secret, first.owner)
    assert second.epoch == first.epoch + 1
    after = identify(server.wire(), b"owner")
    assert (after.server_owner, after.server_scope) == (before.server_owner, before.server_scope)
    assert after.clientid != before.clientid


def test_a_damaged_server_record_stops_the_start(fs: Filesystem) -> None:
    Server(fs)
    fs.records.put({0: b"\0\0\0\1short"})
    with pytest.raises(OSError, match="own record"):
        Server(fs)


@pytest.mark.expect_log("record .* of the layout server is unknown")
def test_an_unknown_record_stays(fs: Filesystem) -> None:
    number = 0x77 << 56 | 5
    fs.records.put({number: b"from a later version", Kind.CLIENT << 56 | 9: b"garbage"})
    server = Server(fs)
    assert fs.records.load()[number] == b"from a later version"
    # Its number is not used again.
    server.session()
    assert fs.records.load()[Kind.CLIENT << 56 | 9] == b"garbage"


def clients_on(fs: Filesystem) -> dict[int, ClientRecord]:
    return {
        number: ClientRecord.decode(value)
        for number, value in fs.records.load().items()
        if number >> 56 == Kind.CLIENT
    }


def test_a_client_is_durable_when_it_is_confirmed(fs: Filesystem) -> None:
    server = Server(fs)
    identify(server.wire(), b"pending")
    assert not clients_on(fs)
    session = server.session(b"owner", reclaim_complete=False)
    [record] = clients_on(fs).values()
    assert (record.owner, record.clientid, record.eligible) == (b"owner", session.clientid, False)
    again = server.session(b"owner", b"again")
    [record] = clients_on(fs).values()
    assert (record.clientid, record.eligible) == (again.clientid, True)


class Counting:
    """The records of a filesystem; counts transactions, fails when told to."""

    def __init__(self, fs: Filesystem) -> None:
        self.inner = fs.records
        self.puts = 0
        self.error: int = 0
        self.gate: threading.Event | None = None

    def load(self) -> dict[int, bytes]:
        return self.inner.load()

    def put(self, values: dict[int, bytes], delete: Any = ()) -> None:
        self.puts += 1
        if self.gate is not None:
            self.gate.wait()
        if self.error:
            raise OSError(self.error, "as told")
        self.inner.put(values, delete)


def test_changes_of_many_are_one_transaction(fs: Filesystem) -> None:
    """While one commit is under way all others wait for the next, which is one."""
    records = Server(fs).service.records
    store = records._store = Counting(fs)
    store.gate = threading.Event()
    threads = []
    for number in range(1, 9):
        records.stage(Kind.CLIENT << 56 | number, b"\0" * 40)
        thread = threading.Thread(target=records.commit)
        thread.start()
        threads.append(thread)
        while store.puts == 0:
            pass
    store.gate.set()
    for thread in threads:
        thread.join()
    assert store.puts == 2
    assert len(clients_numbers(fs)) == 8
    assert not records.pending


def clients_numbers(fs: Filesystem) -> list[int]:
    return [number for number in fs.records.load() if number >> 56 == Kind.CLIENT]


def test_more_than_a_transaction_holds(fs: Filesystem) -> None:
    records = Server(fs).service.records
    for number in range(1, 401):
        records.stage(Kind.CLIENT << 56 | number, b"\0" * 900)
    run_here(records.durable())
    assert len(clients_numbers(fs)) == 400
    for number in range(1, 401):
        records.stage(Kind.CLIENT << 56 | number, None)
    run_here(records.durable())
    assert clients_numbers(fs) == []


def test_what_could_not_be_written_stays_staged(fs: Filesystem) -> None:
    records = Server(fs).service.records
    store = records._store = Counting(fs)
    number = Kind.CLIENT << 56 | 1
    records.stage(number, b"first")
    store.error = errno.ENOSPC
    with pytest.raises(OSError):
        run_here(records.durable())
    assert records.pending
    records.stage(number, b"second")
    store.error = 0
    run_here(records.durable())
    assert fs.records.load()[number] == b"second"
    assert not records.pending
    puts = store.puts
    run_here(records.durable())
    assert store.puts == puts
