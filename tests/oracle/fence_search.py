"""Follows every run of ``fence_model``, and finds the shortest that violates a property.

``python -m oracle.fence_search`` in tests/ prints that of each rule that is left out.
"""

from __future__ import annotations

import enum
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from oracle.fence_model import (
    ENDS,
    Actor,
    Rules,
    State,
    committed_after_revoke,
    pending,
    rule_names,
    steps,
    violation,
)


@dataclass(frozen=True)
class Result:
    """What an exploration found. With a violation, `trace` is a shortest way to it."""

    states: int
    transitions: int
    depth: int
    labels: frozenset[str]
    violation: str | None = None
    trace: tuple[tuple[str, State], ...] = ()
    start: State | None = None

    def text(self) -> str:
        """The trace, a step a line, with what each changed."""
        if self.violation is None:
            return f"{self.states} states, {self.transitions} transitions, depth {self.depth}"
        lines = [f"{self.violation}:"]
        before = self.start or State()
        for number, (label, after) in enumerate(self.trace, 1):
            lines.append(f"{number:3}. {label}  [{changes(before, after)}]")
            before = after
        return "\n".join(lines)


def changes(before: State, after: State) -> str:
    """The fields that a step changed, as text."""

    def shown(value: object) -> str:
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, tuple):
            return "/".join(shown(part) for part in value)
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    return ", ".join(
        f"{name} {shown(new)}"
        for name, old, new in zip(State._fields, before, after, strict=True)
        if old != new
    )


def explore(rules: Rules | None = None, *, servers: int = 2, most: int = 2_000_000) -> Result:
    """All that can happen, breadth first, until something is violated.

    `servers`: 1 leaves the second one out. `most`: states to visit at most; RuntimeError when
    there are more.
    """
    rules = rules or Rules()
    start = State(reservation=0 if rules.reserves else -1)
    parents: dict[State, tuple[State, str] | None] = {start: None}
    depths = {start: 0}
    back: dict[State, list[tuple[Actor, State]]] = {start: []}
    queue = deque([start])
    labels: set[str] = set()
    transitions = 0

    def result(found: str | None, last: State) -> Result:
        trace: list[tuple[str, State]] = []
        while found is not None and (parent := parents[last]) is not None:
            trace.append((parent[1], last))
            last = parent[0]
        deepest = max(depths.values())
        return Result(
            len(parents),
            transitions,
            deepest,
            frozenset(labels),
            found,
            tuple(reversed(trace)),
            start,
        )

    while queue:
        state = queue.popleft()
        for actor, label, after in steps(state, rules, servers):
            transitions += 1
            labels.add(label)
            if after not in parents:
                parents[after] = state, label
                depths[after] = depths[state] + 1
                back[after] = []
                queue.append(after)
                if len(parents) > most:
                    raise RuntimeError(f"more than {most} states")
                if (found := violation(after)) is not None:
                    return result(found, after)
            back[after].append((actor, state))
            if (found := committed_after_revoke(state, after)) is not None:
                return result(found, after)

    for found, concerned, actors in ENDS:
        stuck = without_end(back, concerned, actors)
        if stuck:
            return result(found, min(stuck, key=lambda state: depths[state]))
    return result(None, start)


def without_end(
    back: dict[State, list[tuple[Actor, State]]],
    concerned: Callable[[State], bool],
    actors: frozenset[Actor],
) -> list[State]:
    """States with a fence from which no steps of `actors` lead to its end."""
    reaches = {state for state in back if not pending(state)}
    queue = deque(reaches)
    while queue:
        for actor, before in back[queue.popleft()]:
            if actor in actors and before not in reaches:
                reaches.add(before)
                queue.append(before)
    return [state for state in back if concerned(state) and state not in reaches]


def main() -> int:
    """Explore the rules as they are, then without each of them; print all traces."""
    for aborts in (True, False):
        unit = "aborts" if aborts else "does not abort"
        print(f"\nall rules, the unit {unit}: {explore(Rules(unit_aborts=aborts)).text()}")
        for rule in rule_names():
            rules = Rules(unit_aborts=aborts, **{rule: False})
            print(f"\nwithout {rule}, the unit {unit}: {explore(rules).text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
