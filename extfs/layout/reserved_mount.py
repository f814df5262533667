"""The reservation of a mount: taken before the filesystem is opened, looked after until its end.

Order of things at a mount of a unit that another server may have: register (which gives access to a
unit that is reserved), look at the heartbeat on the device, then take the reservation, then open.
So the journal is replayed only when nobody else can write any more.

    reservation of   mark on the device     what happens
    nobody, us       mounted now            refused: another host has it without a reservation
    another server   mounted now            refused; take_over changes nothing about that
    another server   mounted, not heard of  refused, unless take_over: then preempted and aborted
    another server   not mounted            preempted: it has unmounted and left its reservation
    anybody          of no server           refused
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import trio

from extfs.core import (
    CoreError,
    Device,
    Filesystem,
    HolderState,
    MountedState,
    mounted_state,
)
from extfs.layout.keys import is_server_key, key_text
from extfs.layout.reservation_fence import ReservationFence
from extfs.layout.reservations import Designator, Unit, UnitError
from extfs.layout.scsi_unit import ScsiUnit
from extfs.layout.server_reservation import RefusedError, ServerReservation, Standing, State

__all__ = ["CHECK_SECONDS", "ReservedMount", "reserve", "why_refused"]

log = logging.getLogger("extfs")

KEY_SECONDS = 5.0
"""For the unit to tell which keys are registered, before a client gets a new one."""
ASKING_MAX = 8
"""Of these questions at a time, with those that have no answer."""
QUIET_SECONDS = 1.0
"""For what the kernel has of our I/O to end before a reset; then that comes all the same."""
HOLD_SECONDS = 10.0
"""A reset without an answer does not hold up our I/O longer."""
CHECK_SECONDS = 2.0
"""How often the unit is looked at: for so long at most a target that forgot serves everybody."""
_MINUTE = 60.0
_IDLE_PAUSE = 0.001


@dataclass(slots=True)
class ReservedMount:
    """The reservation of one mount, and what depends on the filesystem once that is open.

    Threads that wait for the unit are left behind at the unmount and may go on at any later time:
    all that they do to the filesystem, they do in `_opened`.
    """

    reservation: ServerReservation
    filesystem: Filesystem | None = None
    _using: threading.Lock = field(default_factory=threading.Lock)
    _over: bool = False
    _held: bool = False
    _asking: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(ASKING_MAX))
    fence: ReservationFence = field(init=False)
    _told: str = ""
    _told_at: float = float("-inf")

    def __post_init__(self) -> None:
        self.fence = ReservationFence(self.reservation)

    @property
    def designator(self) -> Designator:
        """The name that clients find the unit by."""
        return self.reservation.designators[0]

    def described(self) -> str:
        """What the unit can, in words, for the log at start."""
        able = self.reservation.capabilities
        types = "not told" if able.types is None else ", ".join(str(int(t)) for t in able.types)
        aborts = "aborts" if able.aborts else "may not abort: it is reset at each fence"
        return (
            f"unit {self.designator}, our key {key_text(self.reservation.key)}; reservation types"
            f" {types}; APTPL; a preempt {aborts}"
        )

    def holder_keys(self) -> set[int]:
        """The registration keys of all holders that are not at their end."""
        with self._opened() as filesystem:
            holders = filesystem.layouts.holders()
        return {h.spec.fence_key for h in holders if h.state is not HolderState.GONE}

    def new_key(self) -> int:
        """For a new holder; blocks, for `KEY_SECONDS` at most.

        `OSError`: the unit does not say which keys are registered, or not by then. The command is
        left behind in a thread of its own, so an unmount does not wait for it.
        """
        if not self._asking.acquire(blocking=False):
            raise OSError(errno.EIO, "no key for a client: the unit has not answered earlier ones")
        answer: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(self.reservation.client_key(self.holder_keys()))
            except Exception as error:
                answer.put(error)
            finally:
                self._asking.release()

        threading.Thread(target=ask, name="extfs-key", daemon=True).start()
        try:
            found = answer.get(timeout=KEY_SECONDS)
        except queue.Empty:
            found = UnitError(f"the unit has not answered for {KEY_SECONDS:g} s")
        if isinstance(found, (UnitError, CoreError)):
            raise OSError(errno.EIO, f"no key for a client: {found}") from found
        if isinstance(found, Exception):
            raise found
        return found

    def may_restore(self) -> bool:
        """Whether a reservation that is gone may be established again: nobody mounted since."""
        if self.filesystem is None and not self._over:
            return True
        with self._opened() as filesystem:
            return filesystem.mount_stands()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, the filesystem hands no I/O to the kernel, and what the kernel had has ended, if
        that took no longer than `QUIET_SECONDS`.

        A reset of the unit waits for commands whose data are still to come, and this host sends
        none while it waits for the reset: some targets then drop our session, seconds later.
        """
        with contextlib.ExitStack() as ends:
            if self._hold():
                timer = threading.Timer(HOLD_SECONDS, self._release)
                timer.daemon = True
                ends.callback(self._release)
                ends.callback(timer.cancel)
                timer.start()
                until = time.monotonic() + QUIET_SECONDS
                while not self.reservation.unit.idle() and time.monotonic() < until:
                    time.sleep(_IDLE_PAUSE)
            yield

    def _hold(self) -> bool:
        """False: there is no filesystem, and no I/O."""
        with self._using:
            if self.filesystem is not None and not self._held:
                self.filesystem.hold_device()
                self._held = True
            return self._held

    def _release(self) -> None:
        """Once for each `_hold`, or once more."""
        with self._using:
            self._release_locked()

    def _release_locked(self) -> None:
        if self._held and self.filesystem is not None:
            self.filesystem.release_device()
        self._held = False

    def let_go(self) -> None:
        """Before the filesystem is closed: no thread is in a call of it, and none will be."""
        with self._using:
            self._over = True
            self._release_locked()
            self.filesystem = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Filesystem]:
        """It stays open inside. `UnitError`: it is closed, or about to be."""
        with self._using:
            if self.filesystem is None:
                raise UnitError("the filesystem is unmounted")
            yield self.filesystem

    async def keep(self, taken: Callable[[str], None]) -> None:
        """Look after the reservation until cancelled, or until somebody else has it: `taken`."""
        thread = trio.CapacityLimiter(1)  # others that wait for threads are no reason to look later
        while True:  # at once: whoever registered since the last mount may be writing
            try:
                standing = await trio.to_thread.run_sync(
                    self.look, abandon_on_cancel=True, limiter=thread
                )
            except (UnitError, CoreError) as error:
                self._tell_trouble(str(error))
            else:
                if standing.state is State.TAKEN:
                    taken(standing.detail)
                    return
            await trio.sleep(CHECK_SECONDS)

    def look(self) -> Standing:
        """Have the reservation in order, and nobody registered who is no holder. Blocks.

        `UnitError`, `CoreError`: it is not known.
        """
        standing = self.reservation.check()
        if standing.detail and standing.state is not State.TAKEN:
            log.warning("%s", standing.detail)
            self._end(standing.lost_keys)
        if standing.state is not State.TAKEN:
            for key in self.reservation.sweep(self.holder_keys):
                log.info("key %s was registered and is no holder's: preempted", key_text(key))
        return standing

    def _end(self, keys: Collection[int]) -> None:
        """Holders whose registrations are lost: their clients do not register again by themselves,
        but for another device id, which a new holder has."""
        with self._opened() as filesystem:
            for holder in filesystem.layouts.holders():
                if holder.spec.fence_key in keys:
                    with contextlib.suppress(CoreError):  # it has ended by itself
                        filesystem.layouts.lost(holder.id)

    def _tell_trouble(self, text: str) -> None:
        """Each trouble once, and again when a minute has passed."""
        now = trio.current_time()
        if text != self._told or now - self._told_at > _MINUTE:
            log.warning("the reservation could not be looked at: %s", text)
            self._told, self._told_at = text, now


def reserve(path: str, *, take_over: bool, unit: Unit | None = None) -> ReservedMount:
    """Have the unit of this device for us alone, before it is read. Blocks, for seconds.

    `RefusedError` says which requirement the unit fails, or who has it; `UnitError`; `CoreError`:
    the device cannot be read. After an error the unit is as it was found.
    """
    mount: list[ReservedMount] = []
    reservation = ServerReservation.register(
        unit if unit is not None else ScsiUnit(path),
        may_restore=lambda: mount[0].may_restore(),
        quiet=lambda: mount[0].quiet(),
    )
    mount.append(ReservedMount(reservation))
    try:
        victim = reservation.foreign()
        _check_victim(reservation, path, victim, take_over)
        reservation.take(victim)
    except BaseException:
        reservation.back_out()
        raise
    if victim is not None:
        log.warning("%s: taken over from the server with key %s", path, key_text(victim))
    return mount[0]


def why_refused(path: str, unit: Unit | None = None) -> str | None:
    """Who has reserved a device that cannot be read; None: that is not the reason. Blocks."""
    try:
        unit = unit if unit is not None else ScsiUnit(path)
        with contextlib.closing(unit):
            held = None if unit.passes() else unit.reservation()
    except (UnitError, OSError):
        return None
    if held is None:
        return None
    whose = "an extfs server" if is_server_key(held.key) else "somebody else"
    return f"{path} is reserved by {whose}, with key {key_text(held.key)}"


def _check_victim(
    reservation: ServerReservation, path: str, victim: int | None, take_over: bool
) -> None:
    if victim is not None and not is_server_key(victim):
        raise RefusedError(f"{path} is reserved by key {key_text(victim)}, which is no server's")
    with Device.open(path, read_only=True, shared=True) as device:
        mounted = mounted_state(device)
    whose = "another server" if victim is None else f"the server with key {key_text(victim)}"
    if mounted is MountedState.NOW:
        raise RefusedError(f"{path} is mounted by {whose}, which is alive")
    if victim is not None and mounted is MountedState.UNHEARD and not take_over:
        raise RefusedError(
            f"{path} is reserved by {whose}, which has it mounted and is not heard of any more;"
            " --take-over preempts it"
        )
