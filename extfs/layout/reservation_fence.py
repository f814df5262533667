"""The fence driver of persistent reservations: preempts the key of a client's holder.

What it confirms, and why, is in server_reservation.py. Here is what it needs of trio: every command
runs in a thread, and one that has no answer in time is left behind there. That confirms nothing:
the command may take effect at any later time, and the next attempt looks what is so.

A holder that this driver fences has `spec.fence` that begins with "scsi:" and its registration key
in `spec.fence_key`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from extfs.core import HolderRecord
from extfs.layout.fencing import Attempt, Outcome
from extfs.layout.reservations import UnitError
from extfs.layout.server_reservation import ServerReservation, Sight

__all__ = ["SCHEME", "ReservationFence"]

SCHEME = "scsi"
"""What `spec.fence` begins with, before a colon."""
CALL_SECONDS = 90.0
"""Longer than the kernel waits for one command; then its thread is left behind."""
THREADS = 4
"""Commands without an answer hold a thread each; attempts beyond that wait, and fail."""

_T = TypeVar("_T")


class _NoAnswerError(Exception):
    pass


@dataclass(slots=True)
class ReservationFence:
    """`extfs.layout.FenceDriver`. Says `issued` only after the key was seen registered."""

    reservation: ServerReservation
    seconds: float = CALL_SECONDS
    name: str = "reservation"
    harms: bool = True
    _threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREADS))

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        """Look, make durable that it is issued, preempt and see that it worked."""
        reservation, victim = self.reservation, holder.spec.fence_key
        before = attempt.issued_before
        try:
            seen = await self._call(lambda: reservation.sight(victim, issued_before=before))
            if isinstance(seen, Outcome):
                return seen
            if seen is Sight.PRESENT:
                await attempt.issued()
                return await self._call(lambda: reservation.preempt(victim))
            return await self._call(lambda: reservation.confirm_gone(victim))
        except UnitError as error:
            return Outcome.failed(str(error))
        except _NoAnswerError:
            return Outcome.failed(
                f"the unit has not answered for {self.seconds:g} s; what was sent may still happen"
            )

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            with trio.fail_after(self.seconds):
                return await trio.to_thread.run_sync(
                    work, abandon_on_cancel=True, limiter=self._threads
                )
        except trio.TooSlowError:
            raise _NoAnswerError from None
