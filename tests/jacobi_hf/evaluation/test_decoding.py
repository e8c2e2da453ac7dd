"""Counts of a decoding report."""

from __future__ import annotations

from collections import Counter

import pytest

from jacobi_hf.evaluation.decoding import DecodingReport, is_looping


@pytest.mark.parametrize(
    ("tail", "looping"),
    [
        ([1, 2, 3] * 20, True),
        ([7] * 60, True),
        (list(range(60)), False),
        ([*range(19)] * 4, True),
        ([*range(20)] * 4, False),
        ([5] * 20, False),
    ],
)
def test_loops_are_found(tail, looping):
    assert is_looping(tail) == looping


def test_prompts_that_end_in_a_loop_are_left_out():
    report = DecodingReport([60, 60], [30, 10], 2.0, [list(range(60)), [7] * 60])
    assert report.looping == [1]
    assert (report.tokens_per_forward, report.per_prompt, report.loop_free) == (3.0, [2.0, 6.0], 2.0)


def test_acceptance_is_that_of_all_prompts_together():
    report = DecodingReport([9, 9], [5, 5], 2.0, [[1], [2]], accepted_guesses=Counter({0: 3, 2: 1}))
    assert report.mean_acceptance_length == 1.5
    assert DecodingReport([9], [9], 1.0, [[1]]).mean_acceptance_length is None


def test_if_every_prompt_ends_in_a_loop_there_is_no_loop_free_figure():
    assert DecodingReport([60], [10], 2.0, [[7] * 60]).loop_free is None
