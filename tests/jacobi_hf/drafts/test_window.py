from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.config import JacobiConfig
from jacobi_hf.drafts.window import Window


def make(n, blocks, ratio, decoding="jacobi_multiblock"):
    config = JacobiConfig(
        decoding=decoding, jacobi_block_size=n, jacobi_max_blocks=blocks, jacobi_activation_ratio=ratio
    )
    return Window(config, 1, 128, torch.device("cpu"))  # more columns than any test generates tokens


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
        window.append_blocks(
            torch.tensor([before]), torch.tensor([generated]), torch.tensor([agrees], dtype=torch.bool).view(1, -1)
        )
        end = end_by_definition(n, blocks, needed, end, before, generated, agrees)
        assert window.end_B.item() == end
        in_flight = end - generated
        assert 1 <= in_flight <= blocks * n
        if ratio == 0:
            assert in_flight >= (blocks - 1) * n
        if before == 0 and needed != 1:  # the first token is verified, so a block that needs one has it
            assert in_flight == (blocks if ratio == 0 else 1) * n - 1


@given(
    n=st.sampled_from([2, 5]),
    ratio=st.sampled_from([0.0, 0.5]),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_without_blocks_nothing_is_drafted(n, ratio, counts):
    window, generated = make(n, 0, ratio), 0
    for count in counts:
        before, generated = generated, generated + count
        window.append_blocks(torch.tensor([before]), torch.tensor([generated]), torch.zeros(1, 0, dtype=torch.bool))
        assert window.draft_BW.shape[1] == 0
        assert window.end_B.item() <= generated


@given(n=st.sampled_from([2, 3, 8]), generated=st.integers(1, 40))
def test_jacobi_keeps_to_blocks_whose_first_token_is_verified(n, generated):
    window = make(n, 2, 0.0, "jacobi")
    window.append_blocks(torch.tensor([0]), torch.tensor([generated]), torch.zeros(1, 0, dtype=torch.bool))
    drafts = window.end_B.item() - generated
    assert drafts == (-generated) % n  # n-1 behind the first token of a block, none behind its last


def test_redraft_takes_the_newest_choice_and_else_ids_of_the_text():
    window = make(4, 2, 0.0)
    best, plain = torch.tensor([[10, 11, 12, 12]]), torch.tensor([[20, 21, 22, 23, 24]])
    text = torch.tensor([[7, 8, 9, 0, 0]])
    choices = [(best, torch.tensor([[2]])), (plain, torch.tensor([[4]]))]
    window.redraft(torch.tensor([3]), torch.tensor([2]), choices, text, torch.tensor([3]))
    assert window.front_BX[0, :4].tolist() == [11, 12, 23, 24]
    assert set(window.draft_BW[0, 3:].tolist()) <= {7, 8, 9}
