"""scripts/soak-scsi: stories of fenced clients, with everything else that may fail meanwhile.

Each round is drawn from its seed: how the client is lost, at which step the server dies, what
happens to the target and to the server's cable to it, who gets the client's blocks, and whether a
second server takes over at the end. What must hold is in `scsi.stories` and `scsi.take_over`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from dataclasses import dataclass

import rundir
from guest import image

from scsi.faulty import NAMES
from scsi.san import STORAGE_NIC, San
from scsi.stories import Successor, Victim, cables_back
from scsi.take_over import Loss, TakeOver


@dataclass(frozen=True)
class Plan:
    """One round."""

    frozen: bool
    """The client is stopped, else only deaf."""
    fault: str
    """The step of the fence at which the server dies; or none."""
    kill_after: float | None
    """Seconds from the recall to a kill -9 of the server at no particular step."""
    target: str
    """"stays", or it restarts "before" the fence, or "after" it."""
    cable: float | None
    """Seconds from the recall until the server's storage cable is out for some seconds."""
    local: bool
    """The successor is a process on the server, else another client with a layout."""
    take_over: Loss | None
    """How the server is lost afterwards, while a client writes, and another one takes over."""

    @staticmethod
    def draw(seed: int) -> Plan:
        draw = random.Random(seed)
        death = draw.choice(["", "", "step", "step", "time"])
        target = draw.choice(["stays", "stays", "stays", "before", "after"])
        return Plan(
            frozen=draw.random() < 0.5,
            fault=draw.choice(NAMES) if death == "step" else "",
            kill_after=draw.uniform(0, 6) if death == "time" else None,
            target=target,
            cable=draw.uniform(0, 5) if draw.random() < 0.2 else None,
            local=target == "after" or draw.random() < 0.5,
            take_over=draw.choice([None, None, None, "killed", "cut", "frozen"]),
        )


def play(san: San, plan: Plan) -> None:
    """One round on a server that runs; it runs afterwards."""
    server = san.server
    san.client_of("one")
    if plan.fault:
        server.kill()
        server.start(fault=plan.fault)
    victim = Victim(san, "one")
    try:
        victim.write()
        if plan.frozen:
            victim.freeze()
        else:
            victim.cut_off()
        _lose(san, plan, victim)
        if plan.fault or plan.kill_after is not None:
            victim.wait_keyless()
        else:
            fence = victim.wait_fenced()
            print(f"  fenced after {fence['seconds']:.2f} s, {fence['attempts']} attempts")
        if not plan.frozen:
            victim.wait_refused()
            victim.assert_shut_out()
        if plan.target == "after":
            san.restart_target()
        successor = Successor(san, local=plan.local)
        successor.write(victim)
        victim.thaw()
        victim.wait_over()
        successor.assert_intact()
        victim.reconnect()
        victim.come_back()
    finally:
        cables_back(san, victim)
    if plan.take_over is not None:
        story = TakeOver(san, "one")
        story.write()
        story.lose(plan.take_over)
        story.take_over()
        story.assert_nothing_lost()
        story.old_comes_back()
        story.end()


def _lose(san: San, plan: Plan, victim: Victim) -> None:
    """The server wants the layout back; what is to fail then fails."""
    server = san.server
    dies = bool(plan.fault) or plan.kill_after is not None
    recall = victim.start_recall()
    if plan.target == "before":
        san.restart_target()
    if plan.cable is not None:
        time.sleep(plan.cable)
        san.server_guest.plug(STORAGE_NIC, False)
        time.sleep(4)
        san.server_guest.plug(STORAGE_NIC, True)
    if plan.kill_after is not None:
        time.sleep(plan.kill_after)
        server.kill()
    elif plan.fault:
        server.wait_ended(120)
    victim.end_recall(recall, dies=dies)
    if dies:
        victim.server_died()
        server.start()
        victim.recall()  # what the dead one had not got to


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak-scsi", description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=50)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    reason = image.why_no_guest()
    if reason is not None:
        print(f"soak-scsi: no virtual machines here: {reason}", file=sys.stderr)
        return 3
    made = image.ensure(lambda text: print(text, file=sys.stderr))
    rundir.sweep_stale()
    directory = rundir.RunDirectory()
    failed = 0
    san: San | None = None
    try:
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            plan, begin = Plan.draw(seed), time.monotonic()
            print(f"round {seed}: {plan}", flush=True)
            try:
                if san is None or not san.is_healthy():
                    if san is not None:
                        san.close()
                    san = San(made, directory)
                play(san, plan)
            except Exception:
                failed += 1
                traceback.print_exc()
                if san is not None:
                    print(san.evidence(), file=sys.stderr)
                    san.close()
                    san = None
                print(f"FAILED: scripts/soak-scsi 1 {seed}", flush=True)
            else:
                print(f"  passed in {time.monotonic() - begin:.0f} s", flush=True)
    finally:
        if san is not None:
            san.close()
        directory.close()
    print(f"{arguments.rounds - failed} of {arguments.rounds} rounds passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
