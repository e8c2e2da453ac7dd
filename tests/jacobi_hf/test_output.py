from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.output import JacobiStats

# Guesses that a step verified for a row, and how many it accepted.
ROWS = st.lists(st.integers(0, 40).flatmap(lambda sent: st.tuples(st.just(sent), st.integers(0, sent))), max_size=30)


def noted(rows):
    stats = JacobiStats()
    for guesses, accepted in rows:
        stats.note_row(guesses, accepted)
    return stats


def test_acceptance_of_steps_made_by_hand():
    stats = noted([(0, 0), (4, 0), (4, 3), (8, 1), (0, 0)])
    assert stats.guesses == 16
    assert stats.mean_acceptance_length == 1 + 4 / 3
    assert stats.draft_acceptance_rate == 4 / 16
    assert stats.acceptance_per_position == [2 / 3, 1 / 3, 1 / 3]


def test_nothing_verified():
    stats = noted([(0, 0), (0, 0)])
    assert stats.mean_acceptance_length == 1
    assert stats.draft_acceptance_rate == 0
    assert stats.acceptance_per_position == []


@given(ROWS)
def test_acceptance_is_what_vllm_counts(rows):
    """vLLM keeps the number of drafts, of draft tokens, of accepted tokens, and of accepted tokens by position."""
    drafts = [(guesses, accepted) for guesses, accepted in rows if guesses]
    positions = [sum(accepted > place for _, accepted in drafts) for place in range(40)]
    stats = noted(rows)
    assert stats.draft_acceptance_rate == sum(positions) / max(1, sum(guesses for guesses, _ in drafts))
    assert stats.mean_acceptance_length == 1 + sum(positions) / max(1, len(drafts))
    shares = [count / max(1, len(drafts)) for count in positions if count]
    assert stats.acceptance_per_position == shares
    assert sum(shares) == pytest.approx(stats.mean_acceptance_length - 1)


def test_steps_are_counted_by_shape():
    stats = JacobiStats()
    for shape, seconds in (("1", 0.5), ("window 16 + lookup 8", 2.0), ("1", 0.25)):
        stats.note_step(shape, seconds)
    assert stats.steps_by_shape == {"1": 2, "window 16 + lookup 8": 1}
    assert stats.seconds_by_shape == {"1": 0.75, "window 16 + lookup 8": 2.0}
