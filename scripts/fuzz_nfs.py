"""The fuzz targets of the layout server, started by scripts/fuzz.

A finding is an exception other than the ones that decoders may raise, a reply that is not well
formed, or NFS4ERR_SERVERFAULT.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from pathlib import Path

import atheris
import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

with atheris.instrument_imports(include=["extfs.nfs"]):
    from nfs import wire

    from extfs.nfs import constants as n
    from extfs.nfs.rpc import RecordError, RecordReader, RejectedError, read_call, read_reply
    from extfs.nfs.xdr import Reader, XdrError

from extfs.core import Filesystem, SimDevice, mkfs

SEEDS = Path(__file__).resolve().parent.parent / "tests" / "nfs" / "seeds"
SEED_BYTES_MAX = 512
RUNS_OF_A_SERVER = 2000
DEVICE_BYTES = 32 << 20


def records(received: bytes) -> None:
    """A stream of records: headers of calls and replies, and every kind of XDR read."""
    reader = RecordReader(1 << 16)
    try:
        half = len(received) // 2
        for record in [*reader.feed(received[:half]), *reader.feed(received[half:])]:
            try:
                call = read_call(record)
            except RejectedError:
                continue
            if call is None:
                read_reply(record)
            else:
                _read_everything(call.arguments)
    except (RecordError, XdrError):
        pass


def _read_everything(reader: Reader) -> None:
    reads = (
        reader.u32, reader.u64, reader.i64, reader.boolean, reader.bitmap,
        lambda: reader.fixed(7), lambda: reader.opaque(64),
        lambda: reader.count(16),
    )  # fmt: skip
    while not reader.done():
        reads[reader.u32() % len(reads)]()


class Compounds:
    """Operations of any content against a server that is replaced now and then."""

    def __init__(self) -> None:
        self.left = 0
        self.sim: SimDevice | None = None
        self.fs: Filesystem | None = None

    def _begin(self) -> None:
        if self.fs is not None:
            self.fs.abandon()
        if self.sim is not None:
            self.sim.close()
        self.sim = SimDevice(DEVICE_BYTES)
        with self.sim.device() as device:
            mkfs(device)
        self.fs = Filesystem.open(self.sim.device())
        self.service, self.runner = wire.make_service(self.fs)
        self.session = wire.Session(self.service)
        self.left = RUNS_OF_A_SERVER

    def run(self, received: bytes) -> None:
        """One COMPOUND: the first byte counts operations, each begins with its number."""
        if not self.left:
            self._begin()
        self.left -= 1
        if not received:
            return
        session = self.session
        number = session.numbers[0] = session.numbers[0] + 1
        body = wire.encode(wire.sequence(session.id, number), wire.op(n.OP_PUTROOTFH), minor=2)
        count = 2 + received[0] % 8
        body = body[:8] + wire.u32(count) + body[12:] + received[1:]
        xid = session.wire.send(body)
        self.runner.advance(0.01)
        session.wire.calls.clear()
        if not session.wire.open:
            self.left = 0
            return
        reply = wire.read_compound(session.wire.results(xid))
        assert reply.status != n.NFS4ERR_SERVERFAULT, "SERVERFAULT"
        assert 1 <= reply.count <= count
        assert not self.service.counters["server_faults"]


class _Recorder:
    """A pytest plugin: what the tests of the layout server send becomes seeds of `compounds`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run = wire.Session.run

        def recorded(session: wire.Session, *operations: bytes, **options: object) -> wire.Reply:
            self.record(operations)
            return run(session, *operations, **options)  # type: ignore[arg-type]

        wire.Session.run = recorded  # type: ignore[method-assign]
        self.known: set[bytes] = set()

    def record(self, operations: tuple[bytes, ...]) -> None:
        """One for each sequence of operations; filehandles of another server are left out."""
        kept = [encoded for encoded in operations if encoded[:4] != wire.u32(n.OP_PUTFH)]
        kind = b"".join(encoded[:4] for encoded in kept)
        seed = bytes([len(kept)]) + b"".join(kept)
        variant = kind
        if not 0 < len(kept) < 8 or len(seed) > SEED_BYTES_MAX or variant in self.known:
            return
        self.known.add(variant)
        (self.folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


def make_seeds() -> None:
    """Fill the seeds of `compounds` with what the tests send."""
    import pytest

    folder = SEEDS / "compounds"
    for old in folder.iterdir():
        old.unlink()
    recorder = _Recorder(folder)
    pytest.main(["-q", str(SEEDS.parent)], plugins=[recorder])
    print(f"{len(list(folder.iterdir()))} seeds in {folder}")


@click.command()
@click.argument("target", type=click.Choice(["records", "compounds", "seeds"]))
@click.option("--runs", default=10_000_000, show_default=True)
@click.option("--seconds", default=0, help="Stop after so long; 0: after the runs.")
def main(target: str, runs: int, seconds: int) -> None:
    """Fuzz TARGET, or make the seeds of compounds out of what the tests send."""
    if target == "seeds":
        make_seeds()
        return
    logging.getLogger("extfs.nfs").setLevel(logging.CRITICAL)
    function = records if target == "records" else Compounds().run
    seeds = SEEDS / target
    with tempfile.TemporaryDirectory(prefix="extfs-fuzz-") as corpus:
        arguments = [
            sys.argv[0], corpus, str(seeds), f"-runs={runs}", f"-max_total_time={seconds}",
            "-max_len=2048", "-timeout=20", "-print_final_stats=1",
        ]  # fmt: skip
        atheris.Setup(arguments, function)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
