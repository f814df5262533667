"""Segments against a model that knows every block."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from extfs.core import Iomode
from extfs.nfs.layout_segments import Segment, Segments, merged

END = 24
ranges = st.tuples(st.integers(0, END), st.integers(0, END)).map(lambda r: (min(r), max(r)))
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "take", "take proven"]),
        ranges,
        st.sampled_from([Iomode.READ, Iomode.RW]),
        st.booleans(),
    ),
    max_size=30,
)


@dataclass
class Reply:
    """`received`: whether it is proven."""

    received: bool

    def proven(self) -> bool:
        return self.received


def blocks(segments: Segments) -> dict[tuple[Iomode, int], int]:
    """The serial of each block; each block is in one segment at most."""
    found: dict[tuple[Iomode, int], int] = {}
    for segment in segments:
        assert segment.start < segment.end
        for block in range(segment.start, segment.end):
            assert (segment.iomode, block) not in found
            found[segment.iomode, block] = segment.serial
    return found


@given(steps)
def test_against_a_model(steps: list[tuple[str, tuple[int, int], Iomode, bool]]) -> None:
    segments = Segments()
    model: dict[tuple[Iomode, int], tuple[int, bool]] = {}
    replies = []
    for serial, (what, (start, end), iomode, received) in enumerate(steps, 1):
        if what == "add":
            if start == end:
                continue
            replies.append(Reply(received))
            segments.add(Segment(start, end, iomode, serial, replies[-1]))  # type: ignore[arg-type]
            for block in range(start, end):
                model[iomode, block] = (serial, received)
        else:
            proven, newest = what == "take proven", serial // 2
            taken = segments.takes(start, end, iomode, newest, proven=proven)
            assert all(start <= part.start < part.end <= end for part in taken)
            expected = {
                key
                for key, (at, known) in model.items()
                if key[0] is iomode and start <= key[1] < end and at <= newest
                and (known or not proven)
            }  # fmt: skip
            told = [(p.iomode, b) for p in taken for b in range(p.start, p.end)]
            assert sorted(told) == sorted(expected)
            assert {(p.iomode, b) for p in merged(taken) for b in range(p.start, p.end)} == expected
            segments.remove(taken)
            for key in expected:
                del model[key]
        assert blocks(segments) == {key: at for key, (at, _) in model.items()}
        assert segments.has(iomode) == any(key[0] is iomode for key in model)
        inside = any(start <= block < end for _, block in model)
        assert any(True for _ in segments.overlapping(start, end)) == inside
        assert bool(segments) == bool(model)
    assert segments.unproven() == [reply for reply in replies if not reply.received]


def test_what_came_after_a_return_was_asked_for_stays() -> None:
    segments = Segments()
    segments.add(Segment(0, 10, Iomode.RW, 1))
    taken = segments.takes(0, 10, Iomode.RW, 1)
    segments.add(Segment(4, 6, Iomode.RW, 2))
    segments.remove(taken)
    assert [(s.start, s.end, s.serial) for s in segments] == [(4, 6, 2)]


def test_replies_that_were_received_are_forgotten() -> None:
    segments = Segments()
    for number in range(1000):
        segments.add(Segment(number, number + 1, Iomode.RW, 1, Reply(number < 990)))  # type: ignore[arg-type]
        assert len(segments._replies) <= 64
    assert len(segments.unproven()) == 10
