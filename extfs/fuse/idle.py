"""Whether idle CPUs are to poll while requests follow one another, instead of halting.

How it is done is in native/bridge_idle.h. It is worth the power where waking a CPU costs much more
than a request: in a virtual machine, where a halt leaves it. There the kernel's cpuidle driver is
haltpoll. And it is for all CPUs, so only a machine of few has it unasked.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path

__all__ = ["CPUS_MAX", "IdlePoll", "latency_device"]

CPUS_MAX = 8
"""A machine of more has it only when it is asked for."""

DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
DEVICE = Path("/dev/cpu_dma_latency")


class IdlePoll(enum.Enum):
    """Option idle_poll of the mount."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def latency_device(
    choice: IdlePoll, *, driver: Path = DRIVER, device: Path = DEVICE
) -> tuple[int | None, str]:
    """A descriptor of /dev/cpu_dma_latency, the caller's; or None, and why idle CPUs will halt.

    Without a cpuidle driver the kernel does not look at what is written there.
    """
    if choice is IdlePoll.OFF:
        return None, "not asked for"
    try:
        name = driver.read_text(encoding="ascii").strip()
    except OSError:
        name = "none"
    if name == "none":
        return None, "the kernel has no cpuidle driver"
    cpus = os.cpu_count() or 1
    if choice is IdlePoll.AUTO and name != "haltpoll":
        return None, f"CPUs wake up fast here (cpuidle driver {name})"
    if choice is IdlePoll.AUTO and cpus > CPUS_MAX:
        return None, f"all {cpus} CPUs would"
    try:
        return os.open(device, os.O_WRONLY | os.O_CLOEXEC), ""
    except OSError as error:
        return None, f"{device}: {error.strerror}"
