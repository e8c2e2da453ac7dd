from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.output import JacobiStats, steps_in_words

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


def test_three_lines_say_what_a_call_did():
    stats = noted([(8, 6), (4, 1)])
    stats.new_tokens, stats.row_forwards = [10], [5]
    stats.accepted_from.update({"lookup": 6, "window": 1})
    stats.prefill_seconds, stats.decode_seconds = 0.5, 1.0
    for shape in ("1", "1", "lookup 8", "window 4"):
        stats.note_step(shape, 0.1)
    assert str(stats).splitlines() == [
        "10 tokens in 1.50 s (0.50 s of it prefill), 2.00 tokens per forward",
        "acceptance length 4.50, 7 of 12 guesses accepted: lookup 6, window 1",
        "steps: 2 of one slot, 1 of lookup 8, 1 of window 4",
    ]
    assert steps_in_words(dict(zip("1abcde", (9, 5, 4, 3, 2, 1), strict=True))).endswith("3 of c and 2 more shapes")


def test_an_empty_call_has_a_text_too():
    assert str(JacobiStats()).splitlines()[0] == "0 tokens in 0.00 s (0.00 s of it prefill), no forward"


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
