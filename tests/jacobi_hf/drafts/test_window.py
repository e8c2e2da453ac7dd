from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.config import JacobiConfig
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.drafts.window import JacobiWindow
from tests.helpers.outcomes import context_of, outcome_of_step


def make(n, blocks, ratio, decoding="jacobi_multiblock"):
    config = JacobiConfig(
        decoding=decoding, jacobi_block_size=n, jacobi_max_blocks=blocks, jacobi_activation_ratio=ratio
    )
    window = JacobiWindow(config)
    window.allocate(1, 128, 128, torch.device("cpu"))  # more columns than any test generates tokens
    return window


def observed(window, before, generated, agrees=()):
    """Let the window observe a step that brought a row from `before` to `generated` tokens."""
    layout = build_layout((len(agrees),), torch.device("cpu"))
    window.observe(outcome_of_step(layout, before=before, generated=generated, agrees=agrees))


def end_by_definition(n, blocks, needed, end, before, generated, agrees):
    """The rule of the design, one block at a time."""
    front = generated // n * n
    end = max(end, front)
    if end == front:
        end += n
    while end - front < blocks * n:
        newest = range(end - n, end)
        run = 0
        for index in newest:
            depth = index - before
            if index < generated or (0 <= depth < len(agrees) and agrees[depth]):
                run += 1
            else:
                break
        if run < needed:
            break
        end += n
        if needed:
            break  # one block per step; a fresh one has not been through a forward
    return end


@given(
    n=st.sampled_from([2, 3, 4, 8]),
    blocks=st.integers(1, 4),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**32 - 1)), min_size=1, max_size=12),
)
def test_blocks_are_appended_by_the_rule(n, blocks, ratio, steps):
    window, needed = make(n, blocks, ratio), math.ceil(ratio * n)
    generated = end = 0
    for count, bits in steps:
        before, drafts = generated, max(0, end - generated)
        agrees = [bool(bits >> i & 1) for i in range(drafts)]
        generated += min(count, drafts + 1)
        observed(window, before, generated, agrees)
        end = end_by_definition(n, blocks, needed, end, before, generated, agrees)
        assert window.end_B.item() == end
        in_flight = end - generated
        assert 1 <= in_flight <= blocks * n
        if ratio == 0:
            assert in_flight >= (blocks - 1) * n
        if before == 0 and needed != 1:  # the first token is verified, so a block that needs one has it
            assert in_flight == (blocks if ratio == 0 else 1) * n - 1


@given(n=st.sampled_from([2, 3, 8]), generated=st.integers(1, 40))
def test_jacobi_keeps_to_blocks_whose_first_token_is_verified(n, generated):
    window = make(n, 2, 0.0, "jacobi")
    observed(window, 0, generated)
    drafts = window.end_B.item() - generated
    assert drafts == (-generated) % n  # n-1 behind the first token of a block, none behind its last


def test_without_blocks_there_is_no_window():
    config = JacobiConfig(jacobi_max_blocks=0)
    assert JacobiWindow.for_call(config, None) is None


def test_each_guess_is_the_newest_choice_or_else_an_id_of_the_text():
    """A branch won with two tokens: its own choices come first, then those of the backbone, then ids of the text."""
    window = make(4, 2, 0.0)
    layout = build_layout((4, 3), torch.device("cpu"))
    choice = [20, 21, 22, 23, 24, 11, 12, 12]
    outcome = outcome_of_step(
        layout, before=1, generated=3, choice=choice, lengths=(4, 2), best=1, run=[10, 11, 12, 12], count=2
    )
    window.observe(outcome)
    token_BSN, length_BS = window.propose(context_of(outcome, [7, 8, 9]))
    assert token_BSN[0, 0, :3].tolist() == [12, 23, 24]
    assert set(token_BSN[0, 0, 3:].tolist()) <= {7, 8, 9}
    assert length_BS.tolist() == [[8 - 3]]
