"""What confirms that a lost holder cannot reach the device any more: the fence drivers.

A driver is asked about one holder and answers once, with an `Outcome`. CONFIRMED is a promise about
the storage: whatever the holder did has reached it or never will. Nothing here decides *whether* a
holder is to be fenced; that is the policy's business.

A driver that harms is called only after it is durable that the fence is decided, and says so itself
(`Attempt.issued`) before the first thing that the holder could feel. Whoever finds the record after
a crash knows by it what may have happened.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import trio

from extfs.core import HolderKind, HolderRecord

__all__ = [
    "Attempt",
    "CommandFence",
    "FenceDriver",
    "FenceOverError",
    "NoFence",
    "Outcome",
    "Verdict",
]

COMMAND_SECONDS = 60.0
_DETAIL_CHARACTERS = 300


class Verdict(enum.Enum):
    """Whether the storage refuses the holder."""

    CONFIRMED = "confirmed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A driver's answer; `detail` says in words what was seen."""

    verdict: Verdict
    detail: str

    @classmethod
    def confirmed(cls, detail: str) -> Outcome:
        """It reaches nothing any more."""
        return cls(Verdict.CONFIRMED, detail)

    @classmethod
    def failed(cls, detail: str) -> Outcome:
        """It is not known to be cut off; worth another try later."""
        return cls(Verdict.FAILED, detail)


class FenceOverError(Exception):
    """The holder is not to be fenced any more: it is gone. A driver lets it pass."""


class Attempt(Protocol):
    """One call of a driver, as far as it concerns the record of the fence."""

    @property
    def number(self) -> int:
        """1 for the first one of this fence; those of before a restart count, too."""
        ...

    @property
    def issued_before(self) -> bool:
        """An earlier attempt was issued, by this process or by one before a restart.

        Its harm may have been done, wholly or not at all, and its answer is not known.
        """
        ...

    async def issued(self) -> None:
        """Make durable that the holder is harmed from now on; the driver then does it at once.

        Waits for the device. A second call in an attempt returns at once. `FenceOverError`: no
        harm may be done; `CoreError`: the record cannot be written, so none may be done either.
        The driver lets both pass: the policy decides what follows.
        """
        ...


class FenceDriver(Protocol):
    """The interface: one method.

    `name` is for the log and the status. `harms`: it acts against the holder instead of looking;
    then the decision is durable before the call, and a holder that a restart made lost is first
    given time to come back.
    """

    @property
    def name(self) -> str:
        """For the log."""
        ...

    @property
    def harms(self) -> bool:
        """Whether it does something to the holder."""
        ...

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        """Cut the holder off, or see that it is; may take any time.

        Called again after FAILED, with a growing pause. It is cancelled when the filesystem is
        unmounted or somebody else confirmed; what it then leaves half done, another attempt meets.
        Not two attempts at a time for one holder, but any number for different ones.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoFence:
    """Waits until somebody else confirms: ``extfs layout fence``, or the ioctl FENCED."""

    name: str = "none"
    harms: bool = False

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        """Never returns."""
        await trio.sleep_forever()
        raise AssertionError("sleep_forever returned")


@dataclass(frozen=True, slots=True)
class CommandFence:
    """Runs a program for each holder; exit code 0 means confirmed.

    The program gets no arguments. Its environment is PATH and EXTFS_HOLDER (id), EXTFS_KIND (local,
    client), EXTFS_NAME, EXTFS_UID, EXTFS_PID, EXTFS_PID_START (clock ticks since boot),
    EXTFS_BOOT_ID, EXTFS_FENCE, EXTFS_FENCE_KEY (hexadecimal), EXTFS_QUARANTINED (blocks), and what
    `context` adds. It may be run again for a holder that it fenced already.
    """

    path: str
    context: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = COMMAND_SECONDS
    name: str = "command"
    harms: bool = True

    def environment(self, holder: HolderRecord) -> dict[str, str]:
        """What the program is told."""
        spec = holder.spec
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "EXTFS_HOLDER": str(holder.id),
            "EXTFS_KIND": "client" if spec.kind is HolderKind.CLIENT else "local",
            "EXTFS_NAME": spec.name,
            "EXTFS_UID": str(spec.uid),
            "EXTFS_PID": str(spec.pid),
            "EXTFS_PID_START": str(spec.pid_start),
            "EXTFS_BOOT_ID": str(uuid.UUID(bytes=spec.boot_id)),
            "EXTFS_FENCE": spec.fence,
            "EXTFS_FENCE_KEY": f"{spec.fence_key:#x}",
            "EXTFS_QUARANTINED": str(holder.quarantined),
            **self.context,
        }

    async def fence(self, holder: HolderRecord, attempt: Attempt) -> Outcome:
        """Run it; over time it is killed, which is no confirmation."""
        await attempt.issued()
        try:
            with trio.fail_after(self.seconds):
                done = await trio.run_process(
                    [self.path],
                    env=self.environment(holder),
                    stdin=b"",
                    capture_stdout=True,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
        except trio.TooSlowError:
            return Outcome.failed(f"{self.path} took longer than {self.seconds:g} s")
        except OSError as error:
            return Outcome.failed(f"{self.path}: {error.strerror}")
        lines = done.stdout.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        detail = f"{self.path}: exit {done.returncode}"
        if said:
            detail += f", {said[:_DETAIL_CHARACTERS]!r}"
        return Outcome.confirmed(detail) if done.returncode == 0 else Outcome.failed(detail)
