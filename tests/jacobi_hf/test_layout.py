from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.layout import attention_mask, build_layout, chain_layout

CPU = torch.device("cpu")


def mask_by_definition(lengths, cached, extent, window):
    """Slot by slot, in words: a guess sees the row's cached text, the pending token, and its own segment up to itself."""
    slots = [("pending", 0)] + [(segment, depth) for segment, n in enumerate(lengths) for depth in range(1, n + 1)]
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
    cached=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
    slack=st.integers(0, 4),
)
def test_mask_is_as_defined(lengths, cached, window, slack):
    layout = build_layout(lengths, CPU)
    extent = max(cached) + layout.slots + slack
    mask = attention_mask(layout, torch.tensor(cached), torch.arange(extent), window)
    assert torch.equal(mask, mask_by_definition(lengths, cached, extent, window))


@given(length=st.integers(1, 8), cached=st.integers(0, 5), window=st.none() | st.integers(1, 4))
def test_a_chain_is_plain_causality(length, cached, window):
    mask = attention_mask(chain_layout(length, CPU), torch.tensor([cached]), torch.arange(cached + length), window)
    assert torch.equal(mask, mask_by_definition((length - 1,), [cached], cached + length, window))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple))
def test_paths_lead_from_the_pending_token_through_a_segment(lengths):
    layout = build_layout(lengths, CPU)
    first = 1
    for segment, length in enumerate(lengths):
        path = layout.path_SD[segment].tolist()
        assert path[: length + 1] == [0, *range(first, first + length)]
        assert layout.depth_Q[path[: length + 1]].tolist() == list(range(length + 1))
        first += length
