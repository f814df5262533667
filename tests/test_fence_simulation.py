"""Fences from the policy down to a simulated unit, under faults that hypothesis chooses.

Real: the policy, the driver, the server's reservation. Simulated: the unit, the durable records,
clients, crashes. Whatever happens, in whatever order, no fence is confirmed while the unit would
accept a write of that client's old layout, while one is queued, or while the client can still
register the key that it was told. When the faults end, so does every fence whose key was seen.

The bounds are those of tests/oracle/fence_model.py, but for a target that forgot: it serves
everybody, until a server notices. What is accepted then is not the fence's fault, but must not be
under way any more when one is confirmed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar
from unittest import mock

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from simulated_unit import SimulatedNexus, SimulatedTarget

from extfs.core import (
    CoreError,
    EventType,
    FenceRecord,
    FenceState,
    HolderKind,
    HolderRecord,
    HolderSpec,
    HolderState,
    JournalFullError,
    LayoutEvent,
    LostCause,
)
from extfs.layout import Fencing, NoFence, policy
from extfs.layout.reservation_fence import ReservationFence
from extfs.layout.reservations import ConflictError, UnitError
from extfs.layout.server_reservation import RefusedError, ServerReservation, Sight, Standing, State

_T = TypeVar("_T")

CLIENTS = 2
HOSTS = ("server 1", "server 2")
GRACE = 10.0
COMMANDS = ("READ KEYS", "READ RESERVATION", "PREEMPT", "REGISTER", "RESERVE", "RESET", "READ")
TROUBLES = ("refused", "lost before", "lost after", "repeated")


class Killed(BaseException):
    """The server's process ends here, in the middle of a call."""


class Inline(ReservationFence):
    """Its commands in the caller's thread, so that a run can be repeated."""

    async def _call(self, work: Callable[[], _T]) -> _T:
        await trio.lowlevel.checkpoint()
        return work()


@dataclass
class Holder:
    """A holder's record on disk."""

    number: int
    client: Client
    key: int
    state: HolderState = HolderState.LIVE
    cause: LostCause = LostCause.NOT


@dataclass
class Client:
    """Follows the rules (see the model): `told` is a key that it may register at any time."""

    nexus: SimulatedNexus
    layout: Holder | None = None
    told: int | None = None
    node: int | None = None
    """The key that it believes to be registered with. It is in the device ID of a layout, so each
    holder's layouts need their own."""

    @property
    def host(self) -> str:
        return self.nexus.host


class View:
    """`HolderTable` of one mount. After another mount, or when the unit refuses, nothing is
    written."""

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.pending: list[LayoutEvent] = []
        self.full = 0
        self.kill_at_put = 0
        self._come = trio.Event()

    def post(self, kind: EventType, holder: int, length: int = 0) -> None:
        self.pending.append(LayoutEvent(kind, 1, holder, 0, 0, 0, 0, length, 0, 0))
        self._come.set()

    def events(self) -> list[LayoutEvent]:
        events, self.pending = self.pending, []
        if self._come.is_set():  # else somebody may be waiting for this one
            self._come = trio.Event()
        return events

    async def wait_events(self) -> None:
        await self._come.wait()

    def holders(self) -> list[HolderRecord]:
        return [self._record(holder) for holder in self.world.holders.values()]

    def holder(self, holder: int) -> HolderRecord | None:
        found = self.world.holders.get(holder)
        return None if found is None else self._record(found)

    def _record(self, holder: Holder) -> HolderRecord:
        spec = HolderSpec(
            name=holder.client.host, kind=HolderKind.CLIENT, fence_key=holder.key, fence="scsi:1"
        )
        return HolderRecord(holder.number, holder.state, spec, 1, 1, 0, 0, holder.cause)

    def fences(self) -> list[FenceRecord]:
        return list(self.world.fences.values())

    def _writable(self, holder: int) -> Holder:
        if self.world.mount is not self or not self.world.target.serves(self.host):
            raise CoreError(-errno.EIO)
        found = self.world.holders.get(holder)
        if found is None:
            raise CoreError(-errno.ENOENT)
        if found.state is not HolderState.LOST:
            raise CoreError(-errno.EBUSY)
        return found

    async def fence_put(self, holder: int, state: FenceState, tries: int) -> None:
        await trio.lowlevel.checkpoint()
        kill, self.kill_at_put = self.kill_at_put, 0
        if kill == 1:
            raise Killed
        self._writable(holder)
        self.world.fences[holder] = FenceRecord(holder, state, tries, 1)
        if kill == 2:
            raise Killed
        await trio.lowlevel.checkpoint()

    def fenced(self, holder: int) -> None:
        found = self._writable(holder)
        if self.full:
            self.full -= 1
            raise JournalFullError(-errno.EAGAIN)
        self.world.confirmed(found)
        self.post(EventType.HOLDER_GONE, holder, 1)

    async def wait_space(self) -> None:
        """No time: a target that forgets meanwhile is no worse than one that does right after."""
        await trio.lowlevel.checkpoint()


class Server:
    """One process: from its start to its crash."""

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.view = View(world, host)
        self.scope = trio.CancelScope()
        self.reservation: ServerReservation | None = None
        self.nexus = world.target.nexus(host)

    def start(self, *, take_over: bool) -> bool:
        """Whether it has the filesystem mounted."""
        world = self.world
        try:
            self.reservation = ServerReservation.register(
                self.nexus, may_restore=lambda: world.mount is self.view
            )
            foreign = self.reservation.foreign()
            if foreign is not None and not take_over:
                self.reservation.back_out()
                return False
            self.reservation.take(foreign)
        except (UnitError, RefusedError, Killed):
            world.target.claims.pop(self.host, None)  # the kernel closes what a process had open
            return False
        world.mounted(self)
        return True

    async def serve(self) -> None:
        assert self.reservation is not None
        driver = Inline(self.reservation)
        fencing = Fencing(self.view, NoFence(), schemes={"scsi": driver}, grace=GRACE)
        try:
            with self.scope:
                await fencing.run()
        except* Killed:
            self.world.crash(self)

    def check(self) -> None:
        assert self.reservation is not None
        try:
            if self.reservation.check().state is State.TAKEN:
                self.world.crash(self)
            else:
                self.reservation.sweep(lambda: [h.key for h in self.world.holders.values()])
        except UnitError:
            pass
        except Killed:
            self.world.crash(self)


@dataclass
class World:
    """All that outlives a process, and the actions."""

    target: SimulatedTarget
    nursery: trio.Nursery
    clock: trio.testing.MockClock
    holders: dict[int, Holder] = field(default_factory=dict)
    fences: dict[int, FenceRecord] = field(default_factory=dict)
    mount: View | None = None
    servers: dict[str, Server] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    """Holders whose fence was confirmed: their blocks belong to others."""
    holders_made: int = 0
    confirmations: int = 0

    # -- what must hold --

    def confirmed(self, holder: Holder) -> None:
        client, tag = holder.client, tag_of(holder)
        queued = [write for write in self.target.queue if write.contents == tag]
        assert not queued, f"confirmed, but queued: {queued}"
        if client.layout is holder and client.node == holder.key:
            assert not self.target.serves(client.host), "confirmed, but its writes are accepted"
        if client.layout is holder:
            assert client.told != holder.key, "confirmed, but it may register its key yet"
        self.confirmations += 1
        self._end(holder)
        self.done.add(holder.number)

    def mounted(self, server: Server) -> None:
        """Another server's writes are over, but for those of a unit that served everybody."""
        late = [w for w in self.target.queue if w.contents == b"server" and w.nexus != server.host]
        assert not late, f"mounted, but the server before it has queued: {late}"
        self.mount = server.view
        self.servers[server.host] = server
        for holder in self.holders.values():
            if holder.state is HolderState.LIVE:
                holder.state, holder.cause = HolderState.LOST, LostCause.MOUNT
        self.nursery.start_soon(server.serve)

    # -- parts --

    def _end(self, holder: Holder) -> None:
        del self.holders[holder.number]
        self.fences.pop(holder.number, None)

    def crash(self, server: Server) -> None:
        server.scope.cancel()
        if self.servers.get(server.host) is server:
            del self.servers[server.host]
        self.target.claims.pop(server.host, None)

    @property
    def serving(self) -> Server | None:
        """The server that has it mounted, lives, and reaches the unit."""
        for server in self.servers.values():
            if server.view is self.mount and self.target.serves(server.host):
                return server
        return None

    def holder_of(self, client: Client) -> Holder | None:
        return next((h for h in self.holders.values() if h.client is client), None)

    # -- actions of clients; `n` is a number to choose by --

    def grant(self, client: Client, n: int) -> None:
        holder, server = self.holder_of(client), self.serving
        if server is None or client.layout is not None:
            return
        if holder is None:
            assert server.reservation is not None
            try:
                key = server.reservation.client_key([h.key for h in self.holders.values()])
            except UnitError:
                return
            except Killed:
                self.crash(server)
                return
            self.holders_made += 1
            number = self.holders_made
            holder = self.holders[number] = Holder(number, client, key)
        if holder.state is HolderState.LIVE:
            client.layout = holder

    def tell(self, client: Client, n: int) -> None:
        """GETDEVICEINFO."""
        holder, server = client.layout, self.serving
        if server is None or holder is None or holder.number not in self.holders:
            return
        if holder.state is HolderState.LIVE and client.node != holder.key:
            assert server.reservation is not None
            server.reservation.offered(holder.key)
            client.told = holder.key

    def register(self, client: Client, n: int) -> None:
        if client.told is not None:
            client.nexus.register(client.told, ignore=True)
            client.node, client.told = client.told, None

    def write(self, client: Client, n: int) -> None:
        holder = client.layout
        if holder is None or client.node != holder.key:
            return
        guarded = self.target.holder is not None
        try:
            client.nexus.submit(holder.number, tag_of(holder))
        except ConflictError:
            client.node = None
        else:
            assert not guarded or holder.number not in self.done, "a fenced client writes"

    def drop(self, client: Client, n: int) -> None:
        client.layout = client.told = None

    def unregister(self, client: Client, n: int) -> None:
        queued = any(write.nexus == client.host for write in self.target.queue)
        if client.layout is None and client.node is not None and not queued:
            with contextlib.suppress(ConflictError):
                client.nexus.register(0, old=client.node)
            client.node = None

    def returns(self, client: Client, n: int) -> None:
        """LAYOUTRETURN of everything, after its I/O."""
        holder, server = client.layout, self.serving
        queued = any(write.nexus == client.host for write in self.target.queue)
        if holder is None or server is None or queued or holder.number in self.fences:
            return
        client.layout = client.told = None
        if holder.number in self.holders:
            self._end(holder)
            server.view.post(EventType.HOLDER_GONE, holder.number)

    def resume(self, client: Client, n: int) -> None:
        """It comes back after a restart, with its layouts."""
        holder = client.layout
        if self.serving is None or holder is None or holder.number not in self.holders:
            return
        if holder.number not in self.fences:
            holder.state, holder.cause = HolderState.LIVE, LostCause.NOT

    def lose(self, client: Client, n: int) -> None:
        """It did not answer a recall, or booted."""
        holder, server = self.holder_of(client), self.serving
        if holder is None or server is None or holder.state is HolderState.LOST:
            return
        holder.state, holder.cause = HolderState.LOST, LostCause.RECALL
        server.view.post(EventType.FENCE_WANTED, holder.number)

    # -- actions of servers and of the unit --

    def start_server(self, client: Client, n: int) -> None:
        host = HOSTS[n & 1]
        if host not in self.servers:
            Server(self, host).start(take_over=bool(n & 2))

    def crash_server(self, client: Client, n: int) -> None:
        server = self.servers.get(HOSTS[n & 1])
        if server is not None:
            self.crash(server)

    def crash_in_command(self, client: Client, n: int) -> None:
        def die() -> None:
            raise Killed

        self.target.before(HOSTS[n & 1], COMMANDS[(n >> 1) % len(COMMANDS)], die)

    def crash_at_record(self, client: Client, n: int) -> None:
        if self.mount is not None:
            self.mount.kill_at_put = 1 + (n & 1)

    def server_writes(self, client: Client, n: int) -> None:
        server = self.servers.get(HOSTS[n & 1])
        if server is None or self.target.holder is None:
            return  # what a unit without a reservation accepts is another matter
        try:
            server.nexus.submit(0, b"server")
        except UnitError:
            return
        assert server.view is self.mount, "a server writes that another has taken over from"

    def check(self, client: Client, n: int) -> None:
        server = self.servers.get(HOSTS[n & 1])
        if server is not None:
            server.check()

    def journal_is_full(self, client: Client, n: int) -> None:
        if self.mount is not None:
            self.mount.full = 1

    def restart_unit(self, client: Client, n: int) -> None:
        self.target.restart(forget=bool(n & 1))

    def settle(self, client: Client, n: int) -> None:
        self.target.settle()

    def trouble(self, client: Client, n: int) -> None:
        kind = TROUBLES[(n >> 1) % len(TROUBLES)]
        command = COMMANDS[(n >> 3) % len(COMMANDS)]
        self.target.trouble(HOSTS[n & 1], command, kind)  # type: ignore[arg-type]

    def in_between(self, client: Client, n: int) -> None:
        """Just before a command of a server: the client does something, or the unit restarts."""
        steps = (self.register, self.write, self.restart_unit, self.settle)
        step = steps[(n >> 1) % len(steps)]
        command = COMMANDS[(n >> 3) % len(COMMANDS)]
        self.target.before(HOSTS[n & 1], command, lambda: step(client, n >> 6))

    def time_passes(self, client: Client, n: int) -> None:
        self.clock.jump((0.5, 1.5, 6.0, GRACE + 1)[n & 3])


def tag_of(holder: Holder) -> bytes:
    return b"holder %d" % holder.number


ACTIONS = {
    "grant": 1,
    "tell": 1,
    "register": 1,
    "write": 2,
    "drop": 1,
    "unregister": 1,
    "returns": 1,
    "resume": 1,
    "lose": 2,
    "start_server": 2,
    "crash_server": 1,
    "crash_in_command": 1,
    "crash_at_record": 1,
    "server_writes": 1,
    "check": 2,
    "journal_is_full": 1,
    "restart_unit": 1,
    "settle": 1,
    "trouble": 2,
    "in_between": 2,
    "time_passes": 3,
}
"""With their weights."""
NAMES = [name for name, weight in ACTIONS.items() for _ in range(weight)]
Program = list[tuple[str, int, int]]
programs = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, CLIENTS - 1), st.integers(0, 511)),
    max_size=40,
)
SETUP: Program = [
    ("start_server", 0, 0),
    *((name, client, 0) for client in range(CLIENTS) for name in ("grant", "tell", "register")),
    ("write", 0, 0),
]


LATE: Program = [("start_server", 0, 0), ("grant", 0, 0), ("tell", 0, 0), ("lose", 0, 0)]


class _Faults(logging.Handler):
    """A driver that raised is a fault of the code, whatever came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


async def simulate(program: Program, target: SimulatedTarget) -> World:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    async with trio.open_nursery() as nursery:
        world = World(target, nursery, clock)
        world.clients = [Client(target.nexus(f"client {n}")) for n in range(CLIENTS)]
        for name, client, number in program:
            getattr(world, name)(world.clients[client], number)
            await trio.testing.wait_all_tasks_blocked()
        await heal(world)
        nursery.cancel_scope.cancel()
    return world


async def heal(world: World) -> None:
    """No more faults. Fences whose key was seen by the server end; others may wait for a person."""
    target = world.target
    target.troubles.clear()
    target.hooks.clear()
    if world.mount is not None:
        world.mount.kill_at_put = world.mount.full = 0
    for server in list(world.servers.values()):
        server.check()  # one that was taken over goes
        if server.view is not world.mount:
            world.crash(server)
    if not world.servers:
        assert Server(world, HOSTS[0]).start(take_over=True)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(30):
        world.clock.jump(13.0)
        await trio.testing.wait_all_tasks_blocked()
    server = world.serving
    assert server is not None, "the server does not come to an end with the unit"
    for holder in world.holders.values():
        if holder.state is not HolderState.LOST or not target.resets:
            continue
        record = world.fences.get(holder.number)
        issued = record is not None and record.state is not FenceState.DECIDED
        present = holder.key in target.registrations.values()
        assert not issued, f"a fence that was issued does not end: {holder}"
        assert not present, f"a fence of a registered key does not end: {holder}"


def run(program: Program, target: SimulatedTarget) -> World:
    faults = _Faults()
    log = logging.getLogger("simulation")
    log.addHandler(faults)
    try:
        with mock.patch.object(policy, "log", log):
            world: World = trio.run(simulate, program, target, clock=trio.testing.MockClock())
    finally:
        log.removeHandler(faults)
    assert not faults.found
    return world


KINDS: dict[str, Callable[[], SimulatedTarget]] = {
    "by the standard": SimulatedTarget,
    "without resets": lambda: SimulatedTarget(resets=False),
    "that does not abort": lambda: SimulatedTarget(aborts=False),
    "of the kernel": lambda: SimulatedTarget(as_linux=True, aborts=False),
}
"""Units."""


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs, kind=st.sampled_from(sorted(KINDS)))
@example(program=[("lose", 0, 0)], kind="without resets")
@example(program=[("lose", 0, 0), ("lose", 1, 0)], kind="of the kernel")
def test_no_fence_is_confirmed_too_early(program: Program, kind: str) -> None:
    run(SETUP + program, KINDS[kind]())


def test_a_fence_ends() -> None:
    """The simulation fences, and does not only watch."""
    target = SimulatedTarget(resets=False)
    world = run([*SETUP, ("lose", 0, 0)], target)
    assert world.done == {1}
    assert not target.queue
    assert list(target.registrations) == [HOSTS[0], "client 1"]


def test_a_client_that_may_register_yet_is_not_fenced() -> None:
    world = run([*LATE, ("time_passes", 0, 3)], SimulatedTarget())
    assert not world.done
    assert world.fences[1].state is FenceState.DECIDED
    # As soon as it registers it is.
    world = run([*LATE, ("time_passes", 0, 3), ("register", 0, 0)], SimulatedTarget())
    assert world.done == {1}


def test_a_key_that_was_told_again_after_the_unit_forgot_is_not_fenced() -> None:
    """It was registered once, is absent, and may be registered again."""
    program: Program = [
        *SETUP,
        ("check", 0, 0),
        ("restart_unit", 0, 1),
        ("check", 0, 0),
        ("write", 0, 0),  # RESERVATION CONFLICT: it forgets the device
        ("tell", 0, 0),
        ("lose", 0, 0),
        ("time_passes", 0, 3),
    ]
    assert not run(program, SimulatedTarget()).done


def complaint(program: Program, target: SimulatedTarget) -> str:
    """What the simulation finds wrong."""
    with pytest.raises((AssertionError, BaseExceptionGroup)) as found:
        run(program, target)
    error: BaseException = found.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, AssertionError), repr(error)
    return str(error)


def test_a_reset_that_is_left_out_is_seen() -> None:
    with mock.patch.object(ServerReservation, "_reset"):
        said = complaint([*SETUP, ("lose", 0, 0)], SimulatedTarget(aborts=False))
    assert "confirmed, but queued" in said


def test_a_preempt_that_does_nothing_is_seen() -> None:
    program: Program = [*SETUP, ("settle", 0, 0), ("lose", 0, 0)]
    with mock.patch.object(SimulatedNexus, "preempt_abort"):
        assert "does not end" in complaint(program, SimulatedTarget())
        with mock.patch.object(ServerReservation, "_unsecured", return_value=None):
            assert "confirmed, but its writes are accepted" in complaint(program, SimulatedTarget())


def test_a_confirmation_because_the_key_is_absent_is_seen() -> None:
    program: Program = [*LATE, ("time_passes", 0, 3)]
    with mock.patch.object(ServerReservation, "sight", return_value=Sight.GONE):
        said = complaint(program, SimulatedTarget())
    assert "confirmed, but it may register its key yet" in said


def test_a_server_that_does_not_see_the_take_over_is_seen() -> None:
    def go_on(reservation: ServerReservation, held: object) -> Standing:
        reservation._register_again()
        return Standing(State.HELD)

    program: Program = [
        *SETUP,
        ("start_server", 0, 1 | 2),
        ("check", 0, 0),
        ("server_writes", 0, 0),
    ]
    assert run(program, SimulatedTarget()).mount is not None
    with mock.patch.object(ServerReservation, "_lost_to", go_on):
        said = complaint(program, SimulatedTarget())
    assert "a server writes that another has taken over from" in said


def test_a_client_that_was_never_told_its_key_is_fenced() -> None:
    program = [step for step in LATE if step[0] != "tell"]
    assert run(program, SimulatedTarget()).done == {1}
    # After a restart nobody knows that it was not.
    program[-1:] = [("crash_server", 0, 0), ("start_server", 0, 0), ("time_passes", 0, 3)]
    assert not run(program, SimulatedTarget()).done


@pytest.mark.parametrize("command", ["READ", "RESET"])
def test_a_take_over_that_is_repeated_drains_too(command: str) -> None:
    """The first one preempted, on a unit that does not abort, and went no further."""
    target = SimulatedTarget(aborts=False)
    target.trouble(HOSTS[1], command, "lost before")
    program: Program = [
        *SETUP,
        ("server_writes", 0, 0),
        ("start_server", 0, 1 | 2),
        ("start_server", 0, 1 | 2),
    ]
    assert run(program, target).mount is not None


def test_a_server_that_is_registered_and_holds_nothing_is_shut_out() -> None:
    """The unit forgot, its server registered again and got no further; then another one mounts."""
    refuse = COMMANDS.index("RESERVE") << 3 | TROUBLES.index("refused") << 1
    program: Program = [
        *SETUP,
        ("restart_unit", 0, 1),
        ("trouble", 0, refuse),
        ("check", 0, 0),
        ("start_server", 0, 1),
        ("server_writes", 0, 0),
    ]
    assert run(program, SimulatedTarget(aborts=False)).mount is not None


@pytest.mark.parametrize("after", [1, 2])
def test_a_crash_around_a_record(after: int) -> None:
    program: Program = [
        *SETUP,
        ("crash_at_record", 0, after - 1),
        ("lose", 0, 0),
        ("start_server", 0, 1 | 2),
        ("time_passes", 0, 3),
    ]
    assert 1 in run(program, SimulatedTarget()).done


@pytest.mark.parametrize("command", range(len(COMMANDS)))
def test_a_crash_before_a_command(command: int) -> None:
    program: Program = [
        *SETUP,
        ("crash_in_command", 0, command << 1),
        ("lose", 0, 0),
        ("start_server", 0, 0),
        ("time_passes", 0, 3),
    ]
    assert 1 in run(program, SimulatedTarget()).done
