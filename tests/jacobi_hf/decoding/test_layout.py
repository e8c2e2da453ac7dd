from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.attention.masks import attention_mask
from jacobi_hf.decoding.layout import build_layout, chain_layout

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple))
def test_paths_lead_from_the_pending_token_through_a_segment(lengths):
    layout = build_layout(lengths, CPU)
    first = 1
    for segment, length in enumerate(lengths):
        path = layout.path_SD[segment].tolist()
        assert path[: length + 1] == [0, *range(first, first + length)]
        assert layout.depth_Q[path[: length + 1]].tolist() == list(range(length + 1))
        first += length


@given(
    window=st.integers(1, 5),
    branches=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=3),
    cached=st.lists(st.integers(0, 6), min_size=1, max_size=2),
    sliding=st.none() | st.integers(1, 6),
)
def test_a_branch_off_the_window_is_a_chain_along_its_path(window, branches, cached, sliding):
    """A branch attends along its path as a window of the same tokens would, and to nothing off its path."""
    branches = [(min(start, window), length) for start, length in branches]
    layout = build_layout((window, *(length for _, length in branches)), CPU, 0, tuple(start for start, _ in branches))
    extent = max(cached) + layout.slots
    mask = attention_mask(layout, torch.tensor(cached), torch.arange(extent), sliding)
    for segment, (start, length) in enumerate(branches, 1):
        path = layout.path_SD[segment, : start + length + 1]
        assert path[: start + 1].tolist() == list(range(start + 1))
        assert layout.depth_Q[path].tolist() == list(range(start + length + 1))
        chain = attention_mask(chain_layout(len(path), CPU), torch.tensor(cached), torch.arange(extent), sliding)
        for row, text in enumerate(cached):
            own = mask[row, 0, path]
            assert torch.equal(own[:, :text], chain[row, 0, :, :text])
            assert torch.equal(own[:, text + path], chain[row, 0, :, text : text + len(path)])
            others = [slot for slot in range(layout.slots) if slot not in path.tolist()]
            assert not own[start + 1 :, text:][:, others].any()


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    draft_slots=st.integers(1, 5),
)
def test_draft_slots_are_the_last_segment_and_not_verified(lengths, draft_slots):
    plain = build_layout(lengths, CPU)
    assert (plain.verified_segments, plain.draft_segment, plain.draft_slots) == (len(lengths), 0, 0)
    layout = build_layout(lengths, CPU, draft_slots)
    assert layout.slots == plain.slots + draft_slots
    assert layout.verified_segments == len(lengths)
    assert layout.lengths[layout.draft_segment] == draft_slots
    assert layout.path_SD[layout.draft_segment, 1 : 1 + draft_slots].tolist() == [*range(plain.slots, layout.slots)]
