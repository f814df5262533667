"""The model of the fence's life: it holds, and none of its rules can be left out."""

from __future__ import annotations

import pytest
from oracle.fence_model import Rules, State, rule_names, steps
from oracle.fence_search import Result, changes, explore

QUEUED = "a block of a new owner is reachable by two: the old one's write is queued"
ACCEPTED = "a block of a new owner is reachable by two: the old one's writes are accepted"
TWO_SERVERS_QUEUED = "server 2 has it mounted: a write of server 1 is queued"
TWO_SERVERS = "server 2 has it mounted: writes of server 1 are accepted"
STUCK = "a fence does not end by the server's steps alone"

# How many servers there are, and what goes wrong.
MUTANTS: dict[str, tuple[int, str]] = {
    "aborts": (1, QUEUED),
    "aborts_server": (2, TWO_SERVERS_QUEUED),
    "waits": (1, ACCEPTED),
    "records": (1, STUCK),
    "issues_seen": (1, ACCEPTED),
    "reserves": (1, QUEUED),
    "reserves_first": (1, QUEUED),
    "keys_differ": (1, ACCEPTED),
    "lost_stays_lost": (1, ACCEPTED),
    "absent_is_nothing": (1, ACCEPTED),
    "one_holder": (1, QUEUED),
    "asks_first": (1, ACCEPTED),
    "offers_to_live": (1, ACCEPTED),
    "boot_is_fenced": (1, QUEUED),
    "preempts_server": (2, TWO_SERVERS),
    "taken_over_stops": (2, TWO_SERVERS),
    "refuses_commits": (1, "a block that waits in the quarantine is back in the file"),
    "one_client": (1, QUEUED),
}
# On a unit whose PREEMPT AND ABORT aborts nothing.
RESET_MUTANTS: dict[str, tuple[int, str]] = {
    "resets": (1, QUEUED),
    "resets_last": (1, QUEUED),
    "resets_taken": (2, TWO_SERVERS_QUEUED),
}
MUST_HAPPEN = (
    "recall",
    "LAYOUTCOMMIT is accepted",
    "the client returns its layout",
    "the time of the recall is over: revoke",
    "fence: decided",
    "fence: READ KEYS shows the key",
    "fence: issued",
    "the unit preempts the key",
    "fence: the key is absent, confirmed",
    "the quarantine is released, the holder is gone",
    "the block is given to a new owner",
    "the client dies",
    "the client boots",
    "the client comes back: its holder is live again",
    "the client registers the key of a second holder",
    "the operator confirms: the client is off",
    "the unit restarts and keeps its registrations",
    "the unit restarts and forgets",
    "server 1 crashes",
    "server 1 finds its key gone and registers again",
    "server 1 finds that it was taken over and stops",
    "server 2 preempts server 1",
    "server 2 finds the other's reservation, unregisters, stops",
    "server 1 preempts server 2",
)


@pytest.fixture(scope="module", params=[True, False], ids=["aborting unit", "other unit"])
def whole(request: pytest.FixtureRequest) -> Result:
    return explore(Rules(unit_aborts=request.param))


def replay(found: Result, rules: Rules) -> None:
    """Every step of the trace is one that can be taken, from the one before it."""
    assert found.start is not None
    state = found.start
    for label, after in found.trace:
        assert (label, after) in {(text, next_) for _, text, next_ in steps(state, rules)}
        assert after == state or changes(state, after)
        state = after


def test_no_block_is_reachable_by_two_and_every_fence_ends(whole: Result) -> None:
    print(whole.text())
    assert whole.violation is None, whole.text()
    assert 10_000 < whole.states < 200_000  # neither a model of nothing, nor one that explodes


def test_everything_happens(whole: Result) -> None:
    """A model that never fences holds all properties."""
    assert set(MUST_HAPPEN) <= whole.labels


def test_each_rule_has_its_mutant() -> None:
    assert set(MUTANTS) | set(RESET_MUTANTS) == set(rule_names())


@pytest.mark.parametrize("rule", rule_names())
def test_without_a_rule_it_goes_wrong(rule: str) -> None:
    servers, what = {**MUTANTS, **RESET_MUTANTS}[rule]
    rules = Rules(unit_aborts=rule not in RESET_MUTANTS, **{rule: False})
    found = explore(rules, servers=servers)
    print(f"without {rule}: {found.text()}")
    assert found.violation == what
    replay(found, rules)


def test_where_the_unit_aborts_no_reset_is_needed() -> None:
    assert explore(Rules(**dict.fromkeys(RESET_MUTANTS, False))).violation is None


def test_one_server_alone_is_safe_without_what_is_for_two() -> None:
    """The rules of the take-over are about the second server, and about nothing else."""
    rules = Rules(aborts_server=False, preempts_server=False, taken_over_stops=False)
    assert explore(rules, servers=1).violation is None
    assert explore(rules).violation is not None


def test_a_trace_tells_what_each_step_changed() -> None:
    text = explore(Rules(waits=False), servers=1).text()
    assert text.startswith(ACCEPTED)
    assert "[key REGISTERED]" in text
    assert "block REUSED" in text.splitlines()[-1]


def test_too_many_states_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="more than 1000 states"):
        explore(most=1000)


def test_states_are_values() -> None:
    assert State() == State()
    assert len({State(), State()._replace(layout=False), State()}) == 2
