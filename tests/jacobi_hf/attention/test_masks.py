from __future__ import annotations

import inspect

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.attention.kernels import grouped_mask
from jacobi_hf.attention.masks import (
    FLEX_BLOCK,
    attention_mask,
    block_mask,
    mask_from_table,
    mask_table,
    visibility_rule,
)
from jacobi_hf.decoding.layout import build_layout, chain_layout

CPU = torch.device("cpu")


def figures_of(function):
    """Return the figures of a docstring: for each, the labels of its columns and lines, and its marks."""
    figures, above = [], []
    for line in map(str.split, inspect.getdoc(function).splitlines()):
        if len(line) > 1 and set("".join(line[1:])) <= set("#+."):
            if above:
                figures.append((above, [], []))
            figures[-1][1].append(line[0])
            figures[-1][2].append("".join(line[1:]))
            above = []
        else:
            above = line
    return figures


def labels_of_slots(window, branches=(), draft_slots=0):
    named = [("w", window), *(("b", length) for length in branches), ("d", draft_slots)]
    return ["p", *(f"{name}{depth}" for name, length in named for depth in range(1, length + 1))]


def figure_from_mask(slots, cached, allowed):
    """Return one row's mask `(Q, K)` in the form of `figures_of`."""
    columns = [f"t{number}" for number in range(cached)] + slots
    columns += ["-"] * (allowed.shape[1] - len(columns))
    return columns, slots, ["".join("#" if mark else "." for mark in line) for line in allowed.tolist()]


def test_figure_of_the_rule():
    layout = build_layout((2, 2), CPU, 2, (1,))
    rule = visibility_rule(layout, torch.tensor([2]))
    allowed = rule(torch.tensor(0), torch.arange(layout.slots)[:, None], torch.arange(2 + layout.slots))
    assert figures_of(visibility_rule) == [figure_from_mask(labels_of_slots(2, (2,), 2), 2, allowed)]


def test_figures_of_the_dense_mask():
    mask = attention_mask(build_layout((2, 2), CPU, 0, (1,)), torch.tensor([3, 1]), torch.arange(8), 3)
    slots = labels_of_slots(2, (2,))
    assert figures_of(attention_mask) == [
        figure_from_mask(slots, 3, mask[0, 0]),
        figure_from_mask(slots, 1, mask[1, 0]),
    ]


def test_figures_of_the_table():
    slots = labels_of_slots(2, (1,))
    table = mask_table(build_layout((2, 1), CPU), 1, torch.float32)
    assert figures_of(mask_table) == [figure_from_mask(slots, 0, table == 0)]
    mask = mask_from_table(table, torch.tensor([2]), torch.arange(8))[0, 0]
    assert bool((mask.isinf() | (mask == 0)).all())
    assert figures_of(mask_from_table) == [figure_from_mask(slots, 2, mask == 0)]


def test_figure_of_the_blocks():
    mask = block_mask(chain_layout(200, CPU), torch.tensor([300]), torch.arange(640))
    lines = []
    for block in range(2):
        whole = mask.full_kv_indices[0, 0, block, : mask.full_kv_num_blocks[0, 0, block]].tolist()
        partial = mask.kv_indices[0, 0, block, : mask.kv_num_blocks[0, 0, block]].tolist()
        lines.append("".join("#" if n in whole else "+" if n in partial else "." for n in range(640 // FLEX_BLOCK)))
    assert figures_of(block_mask) == [(["k0", "k1", "k2", "k3", "k4"], ["q0", "q1"], lines)]


def mask_by_definition(lengths, cached, extent, window, draft_slots=0):
    """Return the mask slot by slot: a guess attends to cached tokens, the pending token and its segment so far."""
    slots = [("pending", 0)] + [(segment, depth) for segment, n in enumerate(lengths) for depth in range(1, n + 1)]
    slots += [("draft", depth) for depth in range(1, draft_slots + 1)]
    mask = torch.zeros(len(cached), 1, len(slots), extent, dtype=torch.bool)
    for row, text in enumerate(cached):
        for q, (segment, depth) in enumerate(slots):
            for column in range(extent):
                if column < text:
                    position, visible = column, True
                elif column - text < len(slots):
                    other, other_depth = slots[column - text]
                    position = text + other_depth
                    visible = other == "pending" or (other == segment and other_depth <= depth)
                else:
                    continue
                near = window is None or position > text + depth - window
                mask[row, 0, q, column] = visible and near
    return mask


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    draft_slots=st.integers(0, 5),
    cached=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
    slack=st.integers(0, 4),
)
def test_mask_is_as_defined(lengths, draft_slots, cached, window, slack):
    layout = build_layout(lengths, CPU, draft_slots)
    extent = max(cached) + layout.slots + slack
    mask = attention_mask(layout, torch.tensor(cached), torch.arange(extent), window)
    assert torch.equal(mask, mask_by_definition(lengths, cached, extent, window, draft_slots))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    starts=st.lists(st.integers(0, 3), max_size=3),
    draft_slots=st.integers(0, 4),
    cached=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
    slack=st.integers(0, 4),
)
def test_the_dense_mask_is_the_rule(lengths, starts, draft_slots, cached, window, slack):
    starts = tuple(min(start, lengths[0]) for start in starts[: len(lengths) - 1])
    layout, lengths_B = build_layout(lengths, CPU, draft_slots, starts), torch.tensor(cached)
    key_column_K = torch.arange(max(cached) + layout.slots + slack)
    row, slot = torch.arange(len(cached))[:, None, None, None], torch.arange(layout.slots)[:, None]
    rule = visibility_rule(layout, lengths_B, window)
    assert torch.equal(attention_mask(layout, lengths_B, key_column_K, window), rule(row, slot, key_column_K))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    starts=st.lists(st.integers(0, 3), max_size=3),
    draft_slots=st.integers(0, 4),
    cached=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    slack=st.integers(0, 4),
    groups=st.integers(1, 3),
)
def test_the_mask_from_a_table_is_the_mask(lengths, starts, draft_slots, cached, slack, groups):
    starts = tuple(min(start, lengths[0]) for start in starts[: len(lengths) - 1])
    layout = build_layout(lengths, CPU, draft_slots, starts)
    cached_B, key_column_K = torch.tensor(cached), torch.arange(max(cached) + layout.slots + slack)
    mask = mask_from_table(mask_table(layout, groups, torch.float32), cached_B, key_column_K)
    assert torch.equal(mask, grouped_mask(attention_mask(layout, cached_B, key_column_K), groups, torch.float32))


@given(length=st.integers(1, 8), cached=st.integers(0, 5), window=st.none() | st.integers(1, 4))
def test_a_chain_is_plain_causality(length, cached, window):
    mask = attention_mask(chain_layout(length, CPU), torch.tensor([cached]), torch.arange(cached + length), window)
    assert torch.equal(mask, mask_by_definition((length - 1,), [cached], cached + length, window))


def dense_from_blocks(mask, batch):
    """Return the mask that a kernel computes: the rule in partial blocks, all of whole blocks, nothing of others."""
    slots, columns = mask.seq_lengths
    slot, column = torch.arange(slots)[:, None], torch.arange(columns)
    dense = torch.zeros(batch, 1, slots, columns, dtype=torch.bool)
    for row in range(batch):
        rule = mask.mask_mod(torch.tensor(row), torch.tensor(0), slot, column)
        for partial, numbers, indices in (
            (True, mask.kv_num_blocks, mask.kv_indices),
            (False, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            for block in range(0 if numbers is None else numbers.shape[2]):
                named = indices[row, 0, block, : numbers[row, 0, block]].tolist()
                assert len(named) == len(set(named))
                for number in named:
                    place = (
                        slice(block * FLEX_BLOCK, (block + 1) * FLEX_BLOCK),
                        slice(number * FLEX_BLOCK, (number + 1) * FLEX_BLOCK),
                    )
                    assert not dense[(row, 0, *place)].any()
                    dense[(row, 0, *place)] = rule[place] if partial else True
    return dense


@given(
    lengths=st.sampled_from([(0,), (5,), (127,), (200,), (300,), (3, 2), (90, 60, 7), (0, 130)]),
    cached=st.lists(st.sampled_from([0, 1, 100, 128, 250, 300]), min_size=1, max_size=3),
    window=st.none() | st.sampled_from([1, 7, 128, 140, 1000]),
)
def test_blocks_hold_the_same_mask(lengths, cached, window):
    layout, lengths_B = build_layout(lengths, CPU), torch.tensor(cached)
    key_column_K = torch.arange(-(-(max(cached) + layout.slots) // 64) * 64)
    mask = block_mask(layout, lengths_B, key_column_K, window)
    assert torch.equal(dense_from_blocks(mask, len(cached)), attention_mask(layout, lengths_B, key_column_K, window))


def test_a_row_reads_only_the_blocks_that_it_uses():
    mask = block_mask(build_layout((20, 4), CPU), torch.tensor([5, 3000]), torch.arange(3072))
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).flatten().tolist() == [1, 24]
    mask = block_mask(build_layout((20, 4), CPU), torch.tensor([5, 3000]), torch.arange(3072), 256)
    assert mask.kv_num_blocks.flatten().tolist() == [1, 3]
