"""Servers and clients on the simulated unit, as tests of reservations want them."""

from __future__ import annotations

from reservation_contract import CLIENT
from simulated_unit import SimulatedNexus, SimulatedTarget

from extfs.layout.fencing import Outcome, Verdict
from extfs.layout.server_reservation import ServerReservation


def server(target: SimulatedTarget, host: str = "server") -> ServerReservation:
    reservation = ServerReservation.register(target.nexus(host))
    reservation.take()
    return reservation


def client(target: SimulatedTarget, host: str = "client", key: int = CLIENT) -> SimulatedNexus:
    nexus = target.nexus(host)
    nexus.register(key)
    return nexus


def confirmed(outcome: Outcome) -> bool:
    return outcome.verdict is Verdict.CONFIRMED
