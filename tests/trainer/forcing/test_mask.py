"""Masks against an oracle that follows the paper's table slot by slot, and against the figure of the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.trainer.data.collator import JacobiForcingCollator
from jacobi_hf.trainer.data.record import PackedRecord
from jacobi_hf.trainer.forcing import mask
from jacobi_hf.trainer.forcing.mask import CONTEXTS, Slots, blocks_per_window, dense_mask, draw, mask_mod, sample_slots
from tests.helpers.properties import at_most


def roles(prompt, blocks, n):
    """Return (role, block, offset, position) of each slot of one sample."""
    slots = [("p", 0, i, i) for i in range(prompt)]
    for j in range(blocks):
        slots += [("k", j, t, prompt + j * n + t) for t in range(n)] + [
            ("l", j, t, prompt + j * n + t) for t in range(n)
        ]
    return slots


def sees(query, key, context, window):
    """Return whether a query sees a key: the paper's table (section 3.2, figure 3), row by row."""
    (a, i, t, p), (b, j, u, q) = query, key
    if a == "p":
        return b == "p" and q <= p
    if b == "p":
        return True
    if a == b and i == j:
        return u <= t
    if a == "l":
        return b == "l" and j < i
    if context == "noisy":
        return b == "k" and j < i
    if context == "clean":
        return b == "l" and j < i
    same_window = i // window == j // window
    return j < i and (b == "k" if same_window else b == "l")


samples = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=3)


@at_most(60)
@given(
    samples,
    st.integers(2, 3),
    st.sampled_from(CONTEXTS),
    st.integers(1, 3),
    st.integers(0, 3),
    st.none() | st.integers(1, 9),
)
def test_dense_mask_is_the_table(parts, n, context, window, padding, sliding):
    owners, table = [], []
    for number, (prompt, blocks) in enumerate(parts):
        part = roles(prompt, blocks, n)
        owners += [number] * len(part)
        table += part
    pieces = [sample_slots(prompt, blocks, n) for prompt, blocks in parts]
    pad = torch.zeros(1, padding, dtype=torch.long)
    slots = Slots(
        sample=torch.cat([*(p.sample + i for i, p in enumerate(pieces)), pad - 1], 1),
        stream=torch.cat([*(p.stream for p in pieces), pad], 1),
        block=torch.cat([*(p.block for p in pieces), pad], 1),
        position=torch.cat([*(p.position for p in pieces), pad], 1),
        start=torch.cat([*(p.start for p in pieces), pad], 1),
    )
    length = len(table)
    expected = torch.eye(length + padding, dtype=torch.bool)
    for a in range(length):
        for b in range(length):
            near = sliding is None or table[b][3] > table[a][3] - sliding
            expected[a, b] = expected[a, b] or (
                owners[a] == owners[b] and near and sees(table[a], table[b], context, window)
            )
    assert torch.equal(dense_mask(slots, context, window, sliding)[0, 0], expected)


def test_mask_mod_is_the_dense_mask_one_number_at_a_time():
    slots = sample_slots(3, 3, 2)
    rule, dense = mask_mod(slots, "window", 2), dense_mask(slots, "window", 2)[0, 0]
    zero = torch.tensor(0)
    for q in range(len(dense)):
        for k in range(len(dense)):
            assert bool(rule(zero, zero, torch.tensor(q), torch.tensor(k))) == bool(dense[q, k])


def test_flex_attention_takes_the_mask_mod():
    from torch.nn.attention.flex_attention import create_block_mask

    slots = sample_slots(10, 4, 8)
    length = slots.sample.shape[1]
    block_mask = create_block_mask(mask_mod(slots, "clean"), 1, None, length, length, device="cpu", BLOCK_SIZE=16)
    assert block_mask.shape[-2:] == (length, length)


def test_clean_context_is_a_window_of_one_block():
    slots = sample_slots(3, 4, 3)
    assert torch.equal(dense_mask(slots, "clean"), dense_mask(slots, "window", 1))
    assert torch.equal(dense_mask(slots, "noisy"), dense_mask(slots, "window", 4))


@pytest.mark.parametrize("context", ["noisy", "window"])
def test_collator_packs_the_slots_that_the_mask_is_drawn_from(context):
    record = PackedRecord.build([1, 2], [[[3, 5]] * 3], [[3, 4]] * 3, [0] * 3)
    batch = JacobiForcingCollator(block_size=2, context=context, context_window=2)([record.to_row()])
    packed = Slots.of(batch)
    expected = sample_slots(2, 3, 2)
    for name in ("sample", "stream", "block", "position", "start"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name


def test_with_clean_context_only_noisy_slots_with_a_loss_are_laid_out():
    """The first block is wrong from its second slot on, the second is right, the third is wrong after the end id 9."""
    noisy = [[3, 7, 5], [6, 7, 8], [3, 6, 7]]
    clean = [[3, 4, 5], [6, 7, 8], [3, 9, 0]]
    record = PackedRecord.build([1, 2], [noisy], clean, [0, 0, 0])
    batch = JacobiForcingCollator(block_size=3, eos_token_ids=(9,))([record.to_row()])
    assert batch["input_ids"].tolist() == [[1, 2, 7, 5, 3, 4, 5, 6, 7, 8, 3, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch["teacher"].tolist() == [[-1, -1, 5, 6, *[-1] * 8]]
    assert batch["start"][0, 2:4].tolist() == [3, 3]
    seen = dense_mask(Slots.of(batch), "clean")[0, 0]
    assert batch["input_ids"][0][seen[3]].tolist() == [1, 2, 7, 5, 3]


def test_the_masks_are_those_of_the_figure():
    """The figure in the docstring of the module has one row and column for the prompt and for each block."""
    lines = mask.__doc__.split("\n")
    top = next(number for number, line in enumerate(lines) if line.split() == ["p", "k_0", "l_0", "k_1", "l_1"] * 2)
    prompt, n = 2, 3
    first_slots = [0, *(prompt + n * block for block in range(4))]
    for context, begin in (("noisy", 14), ("clean", 46)):
        assert lines[top - 1][begin:].startswith(f'"{context}"')
        rows = [line.ljust(80)[begin : begin + 20 : 4] for line in lines[top + 1 : top + 6]]
        figure = torch.tensor([[cell == "x" for cell in row] for row in rows])
        dense = dense_mask(sample_slots(prompt, 2, n), context)[0, 0]
        # The last slot of a block sees the first slot of another if the block sees it at all.
        last_slots = [prompt - 1, *(slot + n - 1 for slot in first_slots[1:])]
        assert torch.equal(dense[last_slots][:, first_slots], figure), context


@pytest.mark.parametrize(("context", "window"), [("noise", None), ("window", None), ("window", 0)])
def test_bad_contexts_are_named(context, window):
    with pytest.raises(ValueError, match=r"context=") as error:
        blocks_per_window(context, window)
    assert repr(window if context == "window" else context) in str(error.value)


def test_drawing_writes_a_picture(tmp_path):
    draw(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
