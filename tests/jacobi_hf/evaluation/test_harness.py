"""Outputs of an evaluation outlive an interruption."""

from __future__ import annotations

from dataclasses import asdict

from jacobi_hf.evaluation.harness import Journal, Output
from jacobi_hf.resume import Progress


def test_a_journal_gives_back_what_it_was_given(tmp_path):
    output = Output("täxt\n", [1, 2], 2, 3, 1, 0.5, {1: 2, 7: 1}, {0: 2, 6: 1}, {"1": 1, "window 16": 2})
    file = tmp_path / "deep" / "j.jsonl"
    Journal(Progress(file, {"a": 1})).add("generate", 3, output)
    again = Journal(Progress(file, {"a": 1}))
    assert again.get("generate", 3) == output
    assert again.get("generate", 2) is None


def test_a_journal_of_before_has_no_acceptance(tmp_path):
    kept = {**asdict(Output("a", [1], 2, 3, 1, 0.5, {7: 1})), "accepted_lengths": {"7": 1}}
    del kept["accepted_guesses"], kept["steps_by_shape"]
    assert Output.from_json(kept) == Output("a", [1], 2, 3, 1, 0.5, {7: 1})
