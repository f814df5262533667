"""The life of a fence as a state machine; ``fence_search`` explores all of it.

One block, the client that was given it, two servers, one unit with persistent reservations. Every
order of their steps is followed, with as many faults as one likes: servers crash, restart, freeze
and wake up; the unit restarts with its registrations (APTPL) or without; the client sleeps, dies,
boots, drops its layout, comes back. A frozen party is one that takes no step, and each party can
take none for as long as one likes, so freezing needs no state of its own.

What must hold in every state:

1. *No block is reachable by two*: while the block belongs to a new owner, no command of the old
   one is queued at the unit, and the unit accepts none from it while it has the layout in memory.
2. *One server*: while one has the filesystem mounted, no command of the other is queued, and the
   unit accepts none of what the other has yet to send.
3. *A revoked block stays out of the file*: one that waits in the quarantine is not committed.

And from every state:

4. *A fence of a key that was registered ends by the server's steps alone*, whoever else sleeps.
5. *Every fence ends* when all take their steps and an operator confirms for a client that is off.

(From every state there is a run that ends: in a finite graph that is the same as "each fair run
does".)

What is taken for granted, because no server can enforce it:

- A client registers only a key that GETDEVICEINFO told it; when it says that it has dropped a
  layout, it sends nothing by that any more; and it waits for its I/O before it returns a layout or
  unregisters. What it *sent* may be queued at the unit as long as it likes.
- A host is one client (see `Rules.one_client`). Registering over another key of the same initiator
  port replaces that; the Linux client does so.
- PREEMPT AND ABORT is one uninterrupted action of the unit, which aborts what the preempted one had
  queued; or it aborts nothing (`Rules.unit_aborts`; the Linux kernel's target is so), and then a
  LOGICAL UNIT RESET ends everything that is queued. A restart of the unit ends what it had
  queued; one that forgot lets nobody write before a server has reserved it again.
- What a server's host had sent is executed or aborted before a server starts there again.

Bounds: two holders of the client one after the other (the second with a new key, on other blocks);
a running server notices that the unit forgot and reserves it again in one step.

`Rules` are the decisions that make it safe, and two of the things taken for granted. Each can be
turned off: the mutants.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

OTHER = (1, 0)


class Phase(enum.IntEnum):
    """How far a server has come. STALE: it believes that it has the filesystem mounted."""

    DOWN = 0
    STARTED = 1
    OWNS = 2
    MOUNTED = 3
    STALE = 4


class Key(enum.IntEnum):
    """The old holder's key. OFFERED: the client was told it and may register it at any time."""

    ABSENT = 0
    OFFERED = 1
    REGISTERED = 2
    PREEMPTED = 3


class Holder(enum.IntEnum):
    """The old holder's record. RECALLED is LIVE on disk."""

    LIVE = 0
    RECALLED = 1
    LOST = 2
    GONE = 3


class Record(enum.IntEnum):
    """The fence record, durable."""

    NONE = 0
    DECIDED = 1
    ISSUED = 2


class Block(enum.IntEnum):
    """EXPOSED: unwritten, given to the holder. REUSED: it belongs to somebody else."""

    EXPOSED = 0
    WRITTEN = 1
    QUARANTINE = 2
    FREE = 3
    REUSED = 4


class Actor(enum.Enum):
    """Who takes a step. FAULT: nobody's will, and no run has to contain it."""

    SERVER = "server"
    CLIENT = "client"
    UNIT = "unit"
    OPERATOR = "operator"
    FAULT = "fault"


class State(NamedTuple):
    """Everything. Pairs are by server."""

    phases: tuple[Phase, Phase] = (Phase.MOUNTED, Phase.DOWN)
    # the unit
    registered: tuple[bool, bool] = (True, False)
    reservation: int = 0
    """The server that holds it; -1: nobody."""
    open: bool = True
    """Whether writes are let in; see what is taken for granted."""
    server_queue: tuple[bool, bool] = (False, False)
    client_queue: bool = False
    key: Key = Key.ABSENT
    second_key: bool = False
    """The client's initiator port is registered with the key of its second holder."""
    same_key: bool = False
    """Another client has registered the same key (only with `Rules.keys_differ` off)."""
    # the client
    power: bool = True
    layout: bool = True
    """It has the old layout in memory and writes by it when it likes."""
    # on disk
    holder: Holder = Holder.LIVE
    record: Record = Record.NONE
    block: Block = Block.EXPOSED
    # in the mounted server's memory
    drained: bool = False
    """It has reset the unit after the key was absent."""
    seen: bool = False
    """READ KEYS has shown the key after the fence was decided."""
    confirmed: bool = False
    came_back: bool = False
    """The client has told, under a new client ID, that it has dropped what it had."""


@dataclass(frozen=True)
class Rules:
    """What a correct server does. Turned off one by one, they are the mutants."""

    aborts: bool = True
    """It sends PREEMPT AND ABORT; plain PREEMPT leaves what is queued alive."""
    aborts_server: bool = True
    """It does so when it takes over, too."""
    waits: bool = True
    """The quarantine is released when the fence is confirmed, not when it is issued."""
    records: bool = True
    """The decision and the issue are on disk before the next step."""
    issues_seen: bool = True
    """ISSUED is written only when READ KEYS has just shown the key."""
    reserves: bool = True
    """The server holds a reservation; without one a preempt removes a key and stops nobody."""
    reserves_first: bool = True
    """A unit that forgot is reserved before anybody can write. Only whoever runs the unit can
    see to that."""
    keys_differ: bool = True
    """A key is not given to another client while its fence is not confirmed."""
    lost_stays_lost: bool = True
    """A holder with a fence record does not come back to life."""
    absent_is_nothing: bool = True
    """A key that is absent before the fence was issued confirms nothing."""
    one_holder: bool = True
    """A client gets no second holder, so no new key, before the first one's fence is confirmed."""
    asks_first: bool = True
    """A client that was fenced is told another key when it has answered that it dropped all (the
    recall of all its layouts): the new key would let its old writes pass."""
    offers_to_live: bool = True
    """GETDEVICEINFO tells a key only to a client whose holder is live."""
    boot_is_fenced: bool = True
    """A client that booted is fenced like a lost one: what it sent may still be queued."""
    preempts_server: bool = True
    """A take-over preempts the server before it."""
    taken_over_stops: bool = True
    """A server whose key is gone registers again only if nobody else has the reservation."""
    refuses_commits: bool = True
    """A revoked layout commits nothing."""

    resets: bool = True
    """Where the unit does not abort, it is reset before a fence is confirmed."""
    resets_last: bool = True
    """After the key was absent, that is: before, more may be queued."""
    resets_taken: bool = True
    """The same before a server mounts what it has taken over, if in an earlier life."""

    one_client: bool = True
    """Not the server's: two clients (containers) of one host would share an initiator port, and the
    key of one would let the writes of the other pass."""

    unit_aborts: bool = True
    """Not a rule but the unit: whether PREEMPT AND ABORT aborts."""


def rule_names() -> list[str]:
    """The rules that can be left out."""
    return [rule.name for rule in fields(Rules) if rule.name != "unit_aborts"]


Step = tuple[Actor, str, State]


def accepts_client(s: State) -> bool:
    """Whether the unit would queue a write of the client."""
    if not s.open:
        return False
    return s.reservation < 0 or s.key is Key.REGISTERED or s.second_key


def accepts_server(s: State, n: int) -> bool:
    """Whether the unit would queue a write of server `n`."""
    return s.open if s.reservation < 0 else s.registered[n]


def key_present(s: State) -> bool:
    """What READ KEYS says of the old holder's key."""
    return s.key is Key.REGISTERED or s.same_key


def at(pair: tuple[bool, bool], n: int, value: bool) -> tuple[bool, bool]:
    return (value, pair[1]) if n == 0 else (pair[0], value)


def in_phase(s: State, n: int, phase: Phase) -> State:
    """The server's new phase, and what that makes of everybody's memory."""
    phases = (phase, s.phases[1]) if n == 0 else (s.phases[0], phase)
    s = s._replace(phases=phases)
    if Phase.MOUNTED not in phases:
        holder = Holder.LIVE if s.holder is Holder.RECALLED else s.holder
        s = s._replace(holder=holder, drained=False, seen=False, confirmed=False, came_back=False)
    return s


def without_key(s: State, left: Key, *, aborts: bool) -> State:
    return s._replace(
        key=left if s.key is Key.REGISTERED else s.key,
        same_key=False,
        client_queue=s.client_queue and not aborts,
    )


def ended(s: State) -> State:
    """The holder is gone: its blocks may be used again."""
    return s._replace(
        holder=Holder.GONE,
        record=Record.NONE,
        block=Block.FREE,
        drained=False,
        seen=False,
        confirmed=False,
        came_back=False,
    )


# ---- the client ----------------------------------------------------------------------------------


def client_steps(s: State, rules: Rules) -> Iterator[Step]:
    client = Actor.CLIENT
    if not s.power:
        yield client, "the client boots", s._replace(power=True)
        return
    off = Key.ABSENT if s.key is Key.OFFERED else s.key
    yield Actor.FAULT, "the client dies", s._replace(power=False, layout=False, key=off)
    if s.layout:
        if accepts_client(s) and not s.client_queue:
            yield (
                client,
                "the client sends a write by the old layout",
                s._replace(client_queue=True),
            )
        yield client, "the client drops its layout", s._replace(layout=False)
    elif not s.client_queue and s.key in (Key.OFFERED, Key.REGISTERED):
        yield client, "the client unregisters and forgets the key", s._replace(key=Key.ABSENT)
    if s.key is Key.OFFERED and s.open:
        yield (
            client,
            "the client registers its key",
            s._replace(key=Key.REGISTERED, second_key=False),
        )
    if not rules.one_client and s.open and not s.second_key:
        yield Actor.FAULT, "another client of the same host registers its key", replaced(s)
    if Phase.MOUNTED in s.phases:
        server = s.phases.index(Phase.MOUNTED)
        if s.registered[server] or not rules.reserves:
            yield from client_talks(s, rules)


def client_talks(s: State, rules: Rules) -> Iterator[Step]:
    """What the client and the mounted server do together."""
    client = Actor.CLIENT
    live = s.holder in (Holder.LIVE, Holder.RECALLED)
    lost = s.holder is Holder.LOST
    if s.layout:
        told = s.key in (Key.OFFERED, Key.REGISTERED)
        if not told and (live or (lost and not rules.offers_to_live)):
            yield client, "GETDEVICEINFO tells the client its key", s._replace(key=Key.OFFERED)
        if live and not s.client_queue:
            yield client, "the client returns its layout", ended(s._replace(layout=False))
        committable = s.block is Block.EXPOSED and live
        if committable or (s.block is Block.QUARANTINE and not rules.refuses_commits):
            yield client, "LAYOUTCOMMIT is accepted", s._replace(block=Block.WRITTEN)
        if s.holder is Holder.GONE and not rules.asks_first and s.open and not s.second_key:
            yield client, "the client registers the key of a second holder", replaced(s)
        if lost and (s.record is Record.NONE or not rules.lost_stays_lost):
            yield (
                client,
                "the client comes back: its holder is live again",
                s._replace(holder=Holder.LIVE),
            )
        return
    if live and not rules.boot_is_fenced:
        yield client, "the client comes back as a new one: its old holder ends", ended(s)
    elif live:
        yield client, "the client comes back as a new one: its old holder is lost", revoked(s)
    elif lost and not s.came_back:
        yield client, "the client comes back as a new one", s._replace(came_back=True)
    allowed = s.holder is Holder.GONE or (lost and not rules.one_holder)
    if allowed and not s.second_key and s.open:
        yield client, "the client registers the key of a second holder", replaced(s)


def replaced(s: State) -> State:
    """Another key at the client's initiator port, over the one that may be there."""
    key = Key.ABSENT if s.key is Key.REGISTERED else s.key
    return s._replace(second_key=True, key=key)


# ---- the unit ------------------------------------------------------------------------------------


def unit_steps(s: State, rules: Rules) -> Iterator[Step]:
    if s.client_queue:
        yield Actor.UNIT, "the unit executes the client's write", s._replace(client_queue=False)
    for n in (0, 1):
        if s.server_queue[n]:
            yield (
                Actor.UNIT,
                f"the unit executes server {n + 1}'s write",
                s._replace(server_queue=at(s.server_queue, n, False)),
            )
    quiet = s._replace(client_queue=False, server_queue=(False, False))
    if quiet != s:
        yield Actor.FAULT, "the unit restarts and keeps its registrations", quiet
    yield (
        Actor.FAULT,
        "the unit restarts and forgets",
        quiet._replace(
            registered=(False, False),
            reservation=-1,
            open=not rules.reserves_first,
            key=Key.ABSENT if s.key is Key.REGISTERED else s.key,
            second_key=False,
            same_key=False,
        ),
    )


# ---- the servers ---------------------------------------------------------------------------------


def server_steps(s: State, n: int, rules: Rules) -> Iterator[Step]:
    name, phase = f"server {n + 1}", s.phases[n]
    server = Actor.SERVER
    if phase is Phase.DOWN:
        if s.server_queue[n]:
            return
        yield (
            server,
            f"{name} starts and registers",
            in_phase(s._replace(registered=at(s.registered, n, True)), n, Phase.STARTED),
        )
        return
    record = s.record if rules.records or phase is not Phase.MOUNTED else Record.NONE
    yield Actor.FAULT, f"{name} crashes", in_phase(s._replace(record=record), n, Phase.DOWN)
    if phase is Phase.STARTED:
        yield from taking(s, n, rules)
    elif phase is Phase.OWNS:
        yield from mounting(s, n)
    else:
        if accepts_server(s, n) and not s.server_queue[n]:
            yield (
                server,
                f"{name} sends a write",
                s._replace(server_queue=at(s.server_queue, n, True)),
            )
        yield from checking(s, n, rules)
        if phase is Phase.MOUNTED and accepts_server(s, n):
            yield from fencing(s, n, rules)
            yield from layouts(s)


def reset(s: State) -> State:
    """LOGICAL UNIT RESET: registrations and the reservation stay."""
    return s._replace(client_queue=False, server_queue=(False, False))


def server_preempted(s: State, other: int, rules: Rules) -> State:
    aborts = rules.aborts_server and rules.unit_aborts
    return s._replace(
        registered=at(s.registered, other, False),
        server_queue=at(s.server_queue, other, s.server_queue[other] and not aborts),
    )


def taking(s: State, n: int, rules: Rules) -> Iterator[Step]:
    """From registered to the owner of the unit."""
    name, other = f"server {n + 1}", OTHER[n]
    server = Actor.SERVER
    if not s.registered[n]:
        yield server, f"{name} finds its key gone and stops", in_phase(s, n, Phase.DOWN)
        return
    if not rules.reserves:
        yield server, f"{name} goes on without a reservation", in_phase(s, n, Phase.OWNS)
        return
    if s.reservation == other:
        yield (
            server,
            f"{name} finds the other's reservation, unregisters, stops",
            in_phase(s._replace(registered=at(s.registered, n, False)), n, Phase.DOWN),
        )
        if not rules.preempts_server:
            yield server, f"{name} takes over without preempting", in_phase(s, n, Phase.OWNS)
            return
        taken = server_preempted(s, other, rules)._replace(reservation=n)
        owns = in_phase(taken, n, Phase.OWNS) if rules.unit_aborts else taken
        yield server, f"{name} preempts server {other + 1}", owns
    elif s.registered[other]:
        cleared = server_preempted(s, other, rules)
        yield server, f"{name} preempts the key of server {other + 1}", cleared
    elif not rules.unit_aborts and rules.resets_taken and s.reservation == n:
        yield (
            server,
            f"{name} has the reservation and resets the unit",
            in_phase(reset(s), n, Phase.OWNS),
        )
    else:
        yield (
            server,
            f"{name} reserves",
            in_phase(s._replace(reservation=n, open=True), n, Phase.OWNS),
        )


def mounting(s: State, n: int) -> Iterator[Step]:
    """Replay of the journal; every holder that was live is lost until it comes back."""
    name, other = f"server {n + 1}", OTHER[n]
    if not accepts_server(s, n):
        yield Actor.SERVER, f"{name} is refused by the unit and stops", in_phase(s, n, Phase.DOWN)
        return
    if s.phases[other] is Phase.MOUNTED:
        s = in_phase(s, other, Phase.STALE)
    if s.holder is Holder.LIVE:
        s = s._replace(holder=Holder.LOST)
    yield Actor.SERVER, f"{name} mounts", in_phase(s, n, Phase.MOUNTED)


def checking(s: State, n: int, rules: Rules) -> Iterator[Step]:
    """What a running server makes of it when its key is not there."""
    name, other = f"server {n + 1}", OTHER[n]
    if s.registered[n]:
        return
    forgotten = s.reservation < 0 and not s.registered[other] and s.phases[n] is Phase.MOUNTED
    if forgotten or not rules.taken_over_stops:
        mine = s.reservation < 0 and rules.reserves
        yield (
            Actor.SERVER,
            f"{name} finds its key gone and registers again",
            s._replace(
                registered=at(s.registered, n, True),
                reservation=n if mine else s.reservation,
                open=s.open or mine,
            ),
        )
    else:
        yield (
            Actor.SERVER,
            f"{name} finds that it was taken over and stops",
            in_phase(s, n, Phase.DOWN),
        )


def revoked(s: State) -> State:
    """Its blocks leave the map, or are copied: either way the old ones wait in the quarantine."""
    return s._replace(holder=Holder.LOST, block=Block.QUARANTINE)


def layouts(s: State) -> Iterator[Step]:
    server = Actor.SERVER
    if s.holder is Holder.LIVE:
        yield server, "recall", s._replace(holder=Holder.RECALLED)
    elif s.holder is Holder.RECALLED:
        yield server, "the time of the recall is over: revoke", revoked(s)
    elif s.holder is Holder.LOST and s.block in (Block.EXPOSED, Block.WRITTEN):
        yield server, "somebody wants the block: revoke", revoked(s)
    if s.block is Block.FREE:
        yield server, "the block is given to a new owner", s._replace(block=Block.REUSED)


def fencing(s: State, n: int, rules: Rules) -> Iterator[Step]:
    """The fence of the lost holder, by the mounted server."""
    server = Actor.SERVER
    if not rules.keys_differ and s.holder is Holder.LOST and not s.same_key:
        yield Actor.CLIENT, "another client registers the same key", s._replace(same_key=True)
    if s.holder is not Holder.LOST:
        return
    if not s.power and not s.client_queue and s.key is not Key.REGISTERED:
        yield Actor.OPERATOR, "the operator confirms: the client is off", ended(s)
    if s.record is Record.NONE:
        yield server, "fence: decided", s._replace(record=Record.DECIDED)
        return
    present, ours = key_present(s), s.reservation == n or not rules.reserves
    if s.record is Record.DECIDED and present and not s.seen:
        yield server, "fence: READ KEYS shows the key", s._replace(seen=True)
    if s.record is Record.DECIDED and (s.seen or not rules.issues_seen):
        yield server, "fence: issued", s._replace(record=Record.ISSUED)
    if s.record is Record.ISSUED and present and s.registered[n]:
        yield (
            server,
            "the unit preempts the key",
            without_key(s, Key.PREEMPTED, aborts=rules.aborts and rules.unit_aborts),
        )
    issued = s.record is Record.ISSUED or s.came_back or not rules.absent_is_nothing
    drained = rules.unit_aborts or s.drained or not rules.resets
    if not drained and issued and (not present or not rules.resets_last):
        yield server, "the server resets the unit", reset(s)._replace(drained=True)
    if not s.confirmed and not present and ours and issued and drained:
        yield server, "fence: the key is absent, confirmed", s._replace(confirmed=True)
    if s.confirmed or (s.record is Record.ISSUED and not rules.waits):
        yield server, "the quarantine is released, the holder is gone", ended(s)


# ---- properties ----------------------------------------------------------------------------------


def steps(s: State, rules: Rules, servers: int = 2) -> Iterator[Step]:
    """Every step that somebody can take."""
    yield from client_steps(s, rules)
    yield from unit_steps(s, rules)
    for n in range(servers):
        yield from server_steps(s, n, rules)


def violation(s: State) -> str | None:
    """Which of the properties of single states does not hold."""
    if s.block is Block.REUSED:
        if s.client_queue:
            return "a block of a new owner is reachable by two: the old one's write is queued"
        if s.layout and accepts_client(s):
            return "a block of a new owner is reachable by two: the old one's writes are accepted"
    for n in (0, 1):
        other = OTHER[n]
        if s.phases[n] is Phase.MOUNTED:
            if s.server_queue[other]:
                return f"server {n + 1} has it mounted: a write of server {other + 1} is queued"
            running = s.phases[other] in (Phase.MOUNTED, Phase.STALE)
            if running and accepts_server(s, other):
                return f"server {n + 1} has it mounted: writes of server {other + 1} are accepted"
    return None


def committed_after_revoke(before: State, after: State) -> str | None:
    """The property of steps."""
    if before.block is Block.QUARANTINE and after.block is Block.WRITTEN:
        return "a block that waits in the quarantine is back in the file"
    return None


def by_the_server(s: State) -> bool:
    """Fences that must end by the server's steps alone (property 4)."""
    known = s.key in (Key.REGISTERED, Key.PREEMPTED) or s.record is Record.ISSUED
    return s.holder is Holder.LOST and known


def pending(s: State) -> bool:
    return s.holder is Holder.LOST


ENDS: tuple[tuple[str, Callable[[State], bool], frozenset[Actor]], ...] = (
    (
        "a fence does not end by the server's steps alone",
        by_the_server,
        frozenset((Actor.SERVER, Actor.UNIT)),
    ),
    ("a fence never ends", pending, frozenset(Actor) - {Actor.FAULT}),
)
