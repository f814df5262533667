"""The server's own side of a persistent reservation: one for each mount of a reserved unit.

The server registers its key, holds the reservation (exclusive access, registrants only) from before
the filesystem is opened, and leaves both in place when it ends: a fenced client that wakes up later
must still be refused. Everything here blocks and may be called from any thread; a lock makes one
call at a time of it, so `check` never moves the ground under a fence.

What CONFIRMED means
--------------------

It promises that whatever the holder did has reached the unit or never will. Two things make that
true of a client with the key V, and both must have been seen:

  closed    no command of V's is accepted any more. While there is a reservation, the unit accepts
            commands of registered nexuses only. So: V is not in READ KEYS, and READ RESERVATION,
            read *after* the keys, names our key with the right type. A target that lost its
            registrations between the two shows in the second.
  drained   what was accepted from V before is done or aborted. A reservation is checked when a
            command begins, not when it reaches the medium. So: after V was closed out, a PREEMPT
            AND ABORT of V that answered GOOD has returned, on a unit that is known to abort
            (`Capabilities.aborts`; or that cannot be reset, and is not known not to); or a LOGICAL
            UNIT RESET has. READ KEYS alone never says that: registrations go first, commands
            afterwards, and a preempt whose answer was lost may still be aborting.

And one must not be in doubt: that V's absence comes from its nexus being shut out. A key can be
absent for other reasons, each with a client that writes afterwards:

  not yet   V has its layout and is about to register; nobody can refuse a REGISTER.
  replaced  another key was registered over V at the same nexus (REGISTER AND IGNORE EXISTING KEY is
            what Linux clients send): the nexus passes, under that key.

So V absent at first sight is CONFIRMED (after a reset, see drained) only

  - when the record says that an attempt was issued. It says so only after V was seen in READ KEYS,
    directly before the preempt: the preempt took effect, or the target lost V with all others, or
    V unregistered itself; in each case V had registered, and a client registers once for a device
    id. (A preempt that answers "no such key" is the same case: the kernel repeats commands whose
    answer was lost.)
  - when V was seen registered, the target was seen to have lost *all* registrations since
    (`_epoch`), so that no other key stands in V's place from before, and V was not told to the
    client again meanwhile (`offered`), which would register it once more.

A key that this mount made (`client_key`) and never told to anybody is CONFIRMED as it is: without
it no client knows the device of the layouts. Otherwise it is FAILED with that reason, tried
again, and ends when the key shows up and is preempted, when the holder returns everything, or when
a person confirms.

What stays out of reach of any reservation: a client that registers a key which is not its own; two
clients that share one nexus (a fence of one is a fence of both); one that registers its old key
again after it was fenced, until the next look preempts it once more. Linux before 6.11 can do
that, if it is frozen at one point for as long as a fence takes: there two tasks that ask for one
device at the same time both register. And what is written while a target that forgot serves
everybody. `Standing` counts the last.

Two servers
-----------

The unit decides: RESERVE and PREEMPT are atomic there. A server that finds another's reservation is
`TAKEN`, for good: it never registers again, because what it has queued would pass at once. Where
there is no reservation at all the target forgot, or somebody cleared it. Only then is it
re-established, and only after `may_restore` said that the filesystem is still this mount's (a
server that slept through a take-over *and* a restart of the target must not go on). Re-established
is: register, look whether somebody reserved meanwhile (then unregister and stop), reserve, reset.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator

from extfs.layout.fencing import Outcome
from extfs.layout.keys import (
    is_client_key,
    is_server_key,
    key_text,
    new_client_key,
    new_server_key,
)
from extfs.layout.reservations import (
    Capabilities,
    ConflictError,
    Designator,
    Held,
    Keys,
    Unit,
    UnitError,
    UnreachableError,
    UnsupportedError,
)
from extfs.layout.standing import (
    RefusedError,
    Sight,
    Standing,
    State,
    registered_key,
    requirements,
)

__all__ = ["RefusedError", "ServerReservation", "Sight", "Standing", "State", "requirements"]

DRAIN_TRIES = 3
STRANGE_SECONDS = 1.0
CLOSE_SECONDS = 1.0
LOCK_SECONDS = 30.0
"""For a call before this one to end; its command may be without an answer."""

Quiet = Callable[[], contextlib.AbstractContextManager[object]]
"""While it is entered this host begins nothing on the unit but our commands."""


class ServerReservation:
    """See the module. `key`: ours; `designators`, `capabilities` of the unit.

    `_fenced`: keys confirmed by this mount. `_seen`: clients' keys seen registered, with the epoch
    of the last sight; `_epoch` counts the times that the target forgot. `_offers`: keys told to
    clients, with the number of the offer; `_made`: keys made by this mount; both, and `_seen`, by
    `_names`. `_sharing`: clients' keys found at our own nexus. `_strangers`: keys that are not of
    extfs, since when; infinity: told. `_drained`: (generation, keys) of a reset under our
    reservation since which nobody but us changed a registration: a key that was absent then has
    nothing under way. `_read_in_order`: the keys that the last `_check` read, if it changed none.
    """

    def __init__(
        self,
        unit: Unit,
        key: int,
        *,
        adopted: bool,
        designators: list[Designator],
        capabilities: Capabilities,
        may_restore: Callable[[], bool],
        quiet: Quiet,
    ) -> None:
        self.unit = unit
        self.key = key
        self.designators = designators
        self.capabilities = capabilities
        self._adopted = adopted
        self._may_restore = may_restore
        self._quiet = quiet
        self._lock = threading.Lock()
        self._names = threading.Lock()
        self._taken = False
        self._over: Standing | None = None
        self._untold: list[Standing] = []
        self._generation: int | None = None
        self._epoch = 0
        self._good = time.monotonic()
        self._fenced: set[int] = set()
        self._seen: dict[int, int] = {}
        self._offer = self._offer_at_read = 0
        self._offers: dict[int, int] = {}
        self._made: set[int] = set()
        self._sharing: set[int] = set()
        self._strangers: dict[int, float] = {}
        self._drained: tuple[int, frozenset[int]] | None = None
        self._read_in_order: Keys | None = None

    # -- at start --

    @classmethod
    def register(
        cls,
        unit: Unit,
        *,
        may_restore: Callable[[], bool] = lambda: True,
        quiet: Quiet = contextlib.nullcontext,
    ) -> ServerReservation:
        """Register, which is what gives access to a unit that is reserved already.

        A host whose nexus carries a server's key already keeps it: it is that of an earlier mount
        (`Unit.claim` keeps a second one of this host out), and the reservation that it holds goes
        on without a gap. `RefusedError`; `UnitError`: the unit did not do it. Then the unit is
        closed.
        """
        try:
            designators, capabilities = requirements(unit)
            unit.claim()
            before = unit.keys()
            key, adopted = new_server_key(before.keys), False
            try:
                unit.register(key)
            except ConflictError:
                key, adopted = registered_key(unit, before), True
        except BaseException:
            unit.close()
            raise
        return cls(
            unit,
            key,
            adopted=adopted,
            designators=designators,
            capabilities=capabilities,
            may_restore=may_restore,
            quiet=quiet,
        )

    def foreign(self) -> int | None:
        """The key of somebody else's reservation; 0: of all registrants; None: there is none."""
        with self._exclusive():
            held = self.unit.reservation()
        return None if held is None or held.key == self.key else held.key

    def take(self, victim: int | None = None) -> None:
        """Reserve; or take the reservation from the key `victim`, which `foreign` told.

        Returns only when READ RESERVATION names us and the unit serves us, and when nothing of the
        victim's is under way any more. `RefusedError` names the key in the way; `UnitError`: it may
        have been taken or not, and can be tried again.
        """
        with self._exclusive():
            self._taken = True  # from here on nothing is unregistered: see back_out()
            held = self.unit.reservation()
            if held is None:
                self._reserve()
            elif held.key == self.key:
                if not held.right_type:
                    self.unit.preempt_abort(self.key, self.key)
            else:
                self._take_from(held, victim)
            self._verify_taken(victim)
            # Another server may be registered and hold nothing: it could not have it back.
            others = self._shut_out(self.unit.keys(), drain=False)
            # Our own reservation, too: an earlier take() of it may have stopped before this.
            must = bool(held or others) and self.capabilities.aborts is not True
            self._drain_at_start(must=must)
            self._remember(self._read_keys())
            self._good = time.monotonic()

    def _reserve(self) -> None:
        try:
            self.unit.reserve(self.key)
        except ConflictError as error:
            raise self._held_by(self.unit.reservation()) from error

    def _take_from(self, held: Held, victim: int | None) -> None:
        if victim is None or victim != held.key or not victim:
            raise self._held_by(held)
        try:
            self.unit.preempt_abort(self.key, victim)
        except ConflictError as error:
            raise self._held_by(self.unit.reservation()) from error

    def _held_by(self, held: Held | None) -> RefusedError:
        if held is None:
            return RefusedError(f"{self.unit.name}: the reservation changes under our hands")
        whose = "all registrants" if not held.key else f"key {key_text(held.key)}"
        kind = " of another extfs server" if is_server_key(held.key) else ""
        return RefusedError(f"{self.unit.name} is reserved by {whose}{kind}")

    def _verify_taken(self, victim: int | None) -> None:
        keys, held = self.unit.keys(), self.unit.reservation()
        if held is None or held.key != self.key or not held.right_type:
            raise self._held_by(held)
        if victim is not None and victim in keys:
            raise RefusedError(
                f"{self.unit.name}: {key_text(victim)} is registered again: its server lives"
            )
        if not self.unit.passes():
            raise RefusedError(
                f"{self.unit.name} is reserved with our key and does not serve this host: another "
                "path of it registered the key"
            )

    def _drain_at_start(self, *, must: bool) -> None:
        """End what was accepted before we held the reservation; `must`: or do not begin.

        A reset can wait for a host that is not there any more, until the target drops its session.
        """
        for tries_left in reversed(range(DRAIN_TRIES if must else 1)):
            try:
                self._reset()
                return
            except UnsupportedError as error:
                if must and self.capabilities.aborts is False:
                    raise self._not_drained(error) from error
                return
            except UnitError as error:
                if must and not tries_left:
                    raise self._not_drained(error) from error

    def _not_drained(self, error: UnitError) -> RefusedError:
        return RefusedError(
            f"{self.unit.name}: commands of the server before us may be under way, and the unit "
            f"could not be reset: {error}"
        )

    def back_out(self) -> None:
        """Instead of `take`: leave the unit as it was found. After `take`: only `close`."""
        with self._exclusive():
            if not self._adopted and not self._taken:
                with contextlib.suppress(ConflictError):  # whoever holds it has preempted us
                    self.unit.register(0, old=self.key)
            self.unit.close()

    def close(self) -> None:
        """Forget descriptors. Registration and reservation stay, and keep fenced clients out.

        A command without an answer keeps them until this process ends: its thread uses them, and
        would next use what other file has their numbers by then.
        """
        if self._lock.acquire(timeout=CLOSE_SECONDS):
            try:
                self.unit.close()
            finally:
                self._lock.release()

    # -- while mounted --

    def registered(self) -> Keys:
        """READ KEYS."""
        with self._exclusive():
            return self.unit.keys()

    def client_key(self, taken: Collection[int]) -> int:
        """A key for a new holder: not in `taken`, the keys of all holders, and not registered."""
        registered = self.registered()
        key = new_client_key({*taken, *registered.keys})
        with self._names:
            self._made.add(key)
        return key

    def offered(self, key: int) -> None:
        """Before a client is told its key: from now on it may register it. Does not block."""
        with self._names:
            self._offer += 1
            self._offers[key] = self._offer
            self._seen.pop(key, None)

    def check(self) -> Standing:
        """See that we hold the unit, or hold it again. Every few seconds; `UnitError`: not known.

        Keys that have no right to be there are preempted: other servers', and those of clients that
        were fenced and registered again.
        """
        with self._exclusive():
            standing = self._check()
            if standing.state is not State.TAKEN and standing.detail:
                self._untold.append(standing)
            if standing.state is not State.TAKEN and self._untold:
                return self._untold.pop(0)
            return standing

    def sweep(self, known: Callable[[], Collection[int]]) -> list[int]:
        """Preempt clients' keys of extfs that belong to no holder, and return them.

        `known` tells the keys of all holders. It is called after READ KEYS, and a holder is durable
        before its key is told to anybody: a key that is registered and not known has no rights.

        Whose blocks can a stray write to? Its holder is at its end: it had returned everything, so
        its own I/O was over; or its fence was confirmed, by us or a mount before us, so its blocks
        may be others' by now, and it has registered since. What the unit has completed for it is
        done. What is still queued there is ended as that of a fenced client is.
        """
        with self._exclusive():
            if self._in_order() is not None:
                return []
            keys = self.unit.keys()
            right = set(known())
            strays = [key for key in set(keys.keys) if is_client_key(key) and key not in right]
            self._throw_out(strays)
            return strays

    # -- one fence: sight, then preempt or confirm_gone --

    def sight(self, victim: int, *, issued_before: bool) -> Sight | Outcome:
        """What is to be done about a client's key; an Outcome: nothing, for now or at all."""
        with self._exclusive():
            if not is_client_key(victim):
                return Outcome.failed("it has no key that a reservation could keep out")
            self._read_in_order = None
            problem = self._in_order()
            if problem is not None:
                return Outcome.failed(problem)
            keys = self._read_in_order
            if keys is None:  # it took some mending, which changed them
                keys = self._read_keys()
                self._remember(keys)
            if victim in keys:
                return Sight.PRESENT
            text = key_text(victim)
            if victim in self._sharing:
                return Outcome.failed(
                    f"key {text} was registered from this host: a reservation cannot keep out who "
                    "shares the server's own path"
                )
            with self._names:
                unknown = victim in self._made and victim not in self._offers
                lost = self._seen.get(victim, self._epoch) < self._epoch
            if unknown:
                return Outcome.confirmed(f"key {text} was never told to anybody")
            if issued_before or lost:
                return Sight.GONE
            return Outcome.failed(
                f"key {text} is not registered, so there is nothing to preempt: the client may yet "
                "register it, or have registered another one in its place"
            )

    def preempt(self, victim: int) -> Outcome:
        """After PRESENT, and after that is durable: preempt and abort, and see that it worked."""
        with self._exclusive():
            if self._over is not None:
                return Outcome.failed(self._over.detail)
            before, begin = self._drained, time.monotonic()
            try:
                self.unit.preempt_abort(self.key, victim)
            except ConflictError:
                self._drained = None
                problem = self._unsecured(victim)
                if problem:
                    return Outcome.failed(f"the unit refused the preempt: {problem}")
                return self._gone(victim)
            except UnitError:
                self._drained = None
                raise
            how = f"preempted in {_ms(begin)}"
            if self.capabilities.aborts is not True:
                begin = time.monotonic()
                try:
                    self._reset()
                    return self._outcome(victim, f"{how}, the unit reset in {_ms(begin)}")
                except UnsupportedError as error:
                    if self.capabilities.aborts is False:
                        return Outcome.failed(f"preempted, not aborted, and no reset: {error}")
            elif before is not None:
                self._advance(before)
            return self._outcome(victim, f"{how}, and aborted")

    def confirm_gone(self, victim: int) -> Outcome:
        """After GONE: see that nothing of it is under way any more."""
        with self._exclusive():
            if self._over is not None:
                return Outcome.failed(self._over.detail)
            return self._gone(victim)

    def _gone(self, victim: int) -> Outcome:
        keys = self.unit.keys()
        drained = self._drained
        if drained is None or drained[0] != keys.generation or victim in drained[1]:
            problem = self._unsecured(victim)
            if problem:
                return Outcome.failed(problem)
            try:
                self._reset()
            except UnsupportedError as error:
                return Outcome.failed(
                    f"key {key_text(victim)} is gone, but what it had begun may not have ended, "
                    f"and the unit cannot be reset: {error}"
                )
        return self._outcome(victim, "its registration was gone; the unit was reset")

    def _outcome(self, victim: int, how: str) -> Outcome:
        problem = self._unsecured(victim)
        if problem:
            return Outcome.failed(problem)
        self._fenced.add(victim)
        with self._names:
            self._made.discard(victim)
            self._offers.pop(victim, None)
            self._seen.pop(victim, None)
        return Outcome.confirmed(f"key {key_text(victim)}: {how}")

    def _unsecured(self, victim: int) -> str | None:
        """Why the unit would still serve the victim. The reservation is read after the keys."""
        keys = self.unit.keys()
        held = self.unit.reservation()
        if held is None:
            return "the unit has lost the reservation"
        if held.key != self.key or not held.right_type:
            return f"the reservation is that of key {key_text(held.key)}, type {held.type}"
        if victim in keys:
            return f"key {key_text(victim)} is registered again"
        return None

    # -- parts; the lock is held --

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=LOCK_SECONDS):
            raise UnreachableError(
                f"{self.unit.name}: a command before this one is without an answer"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _in_order(self) -> str | None:
        """`check` before something else; what it restored is told by the next `check`."""
        standing = self._check()
        if standing.state is State.TAKEN:
            return standing.detail
        if standing.detail:
            self._untold.append(standing)
        return None

    def _reset(self) -> None:
        keys = self.unit.keys()
        self._drained = None
        with self._quiet():
            self.unit.reset()
        self._drained = keys.generation, frozenset(keys.keys)

    def _advance(self, before: tuple[int, frozenset[int]]) -> None:
        """Our own preempt is the one change since the reset, or the reset says nothing any more."""
        generation = self.unit.keys().generation
        fits = generation == (before[0] + 1) % (1 << 32)
        self._drained = (generation, before[1]) if fits else None

    def _read_keys(self) -> Keys:
        """READ KEYS for `_remember`."""
        with self._names:
            self._offer_at_read = self._offer
        return self.unit.keys()

    def _remember(self, keys: Keys) -> None:
        """A key that was told again while the keys were read may be registered once more."""
        self._generation = keys.generation
        with self._names:
            for key in keys.keys:
                if is_client_key(key) and self._offers.get(key, 0) <= self._offer_at_read:
                    self._seen[key] = self._epoch

    def _check(self) -> Standing:
        if self._over is not None:
            return self._over
        keys = self._read_keys()
        held = self.unit.reservation()
        if held is None:
            return self._restore(keys)
        told = []
        if held.key != self.key:
            if not self._overwritten(held):
                return self._lost_to(held)
            told.append(
                f"a client on this host had registered key {key_text(held.key)} over ours; it "
                "cannot be fenced"
            )
        elif not held.right_type:
            self.unit.preempt_abort(self.key, self.key)
            told.append(f"the reservation had type {held.type}")
        if not self.unit.passes():
            # A new nexus of this host; with multipath, a path that came back. The reservation stays
            # with the old one, under the same key.
            self.unit.register(self.key, ignore=True)
            told.append("this host was not registered on its path to the unit")
        told += self._shut_out(keys)
        self._remember(keys)
        self._good = time.monotonic()
        if not told:
            self._read_in_order = keys
            return Standing(State.HELD, self._strange(keys))
        return Standing(State.RESTORED, "; ".join(told))

    def _strange(self, keys: Keys) -> str:
        """In words whose keys are no extfs's, each once: they may write, and nobody fences them.

        Not those that come and go, as of who asks for the unit's size.
        """
        now = time.monotonic()
        strange = {key for key in keys.keys if not is_client_key(key) and not is_server_key(key)}
        self._strangers = {key: self._strangers.get(key, now) for key in strange}
        stay = [key for key, since in self._strangers.items() if now - since > STRANGE_SECONDS]
        self._strangers |= dict.fromkeys(stay, float("inf"))
        if not stay:
            return ""
        listed = ", ".join(map(key_text, sorted(stay)))
        return f"{self.unit.name}: registered and not of extfs, so able to write: {listed}"

    def _overwritten(self, held: Held) -> bool:
        """Whether the holder is our own nexus, with a client's key registered over ours."""
        if not is_client_key(held.key):
            return False
        try:
            self.unit.register(self.key, old=held.key)
        except ConflictError:
            return False
        self._sharing.add(held.key)
        self._drained = None
        return True

    def _lost_to(self, held: Held) -> Standing:
        self._over = Standing(
            State.TAKEN, f"taken over: {self._held_by(held)}; this server is over", held.key
        )
        return self._over

    def _shut_out(self, keys: Keys, *, drain: bool = True) -> list[str]:
        """Preempt whoever must not be registered; in words who that was.

        Without `drain` what they have under way is left to the caller.
        """
        told, out = [], []
        for key in sorted(set(keys.keys)):
            if key in self._fenced:
                out.append(key)
                told.append(f"a fenced client had registered key {key_text(key)} again")
            elif is_server_key(key) and key != self.key:
                out.append(key)
                told.append(f"another server had registered key {key_text(key)}")
        self._throw_out(out, drain=drain)
        return told

    def _throw_out(self, keys: Collection[int], *, drain: bool = True) -> None:
        """Preempt them all, and end what they have under way: with one reset, where it takes one.

        `UnitError`: that is not known, and nobody waits for it; the next one that is fenced does.
        """
        if not keys:
            return
        self._drained = None
        for key in keys:
            with contextlib.suppress(ConflictError):  # it went by itself
                self.unit.preempt_abort(self.key, key)
        if drain and self.capabilities.aborts is not True:
            with contextlib.suppress(UnsupportedError):
                self._reset()

    def _restore(self, keys: Keys) -> Standing:
        """Nobody holds a reservation: the unit serves everybody. Close it first, then count."""
        self._drained = None
        if not self._may_restore():
            self._over = Standing(
                State.TAKEN,
                f"{self.unit.name} has no reservation any more, and the filesystem was mounted by "
                "another server meanwhile; this server is over",
            )
            return self._over
        self._register_again()
        held = self.unit.reservation()
        if held is None:
            with contextlib.suppress(ConflictError):
                self.unit.reserve(self.key)
            held = self.unit.reservation()
        if held is None or held.key != self.key or not held.right_type:
            with contextlib.suppress(UnitError):
                self.unit.register(0, old=self.key)
            if held is None:
                raise UnitError(f"{self.unit.name}: the reservation cannot be established again")
            return self._lost_to(held)
        unguarded = time.monotonic() - self._good
        # With the counter back at its begin, or nothing registered, all registrations were lost.
        forgot = not keys.keys or (
            self._generation is not None and keys.generation < self._generation
        )
        with self._names:
            there = [key for key, epoch in self._seen.items() if epoch == self._epoch]
        lost = tuple(sorted(set(there).difference(keys.keys, self._fenced)))
        self._epoch += forgot
        with contextlib.suppress(UnitError):
            self._reset()  # what was accepted meanwhile
        now = self._read_keys()
        self._shut_out(now)
        self._remember(now)
        self._good = time.monotonic()
        return Standing(
            State.RESTORED,
            f"{self.unit.name} had lost its reservation and served everybody for up to "
            f"{unguarded:.1f} s: reserved again; {len(lost)} registrations of clients are lost, "
            f"and {len(self._fenced)} fenced clients could have written",
            unguarded=unguarded,
            lost_keys=lost,
            fenced=len(self._fenced),
        )

    def _register_again(self) -> None:
        try:
            self.unit.register(self.key)
        except ConflictError:  # registered, with ours or with a client's of this host
            self.unit.register(self.key, ignore=True)


def _ms(begin: float) -> str:
    """Since then: the unit's own time."""
    return f"{1000 * (time.monotonic() - begin):.0f} ms"
