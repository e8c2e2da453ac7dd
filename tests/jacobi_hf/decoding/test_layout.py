from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.attention.kernels import grouped_mask
from jacobi_hf.attention.masks import FLEX_BLOCK, attention_mask, block_mask, mask_from_table, mask_table
from jacobi_hf.decoding.layout import build_layout, chain_layout

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
    """What a kernel makes of a `BlockMask`: nothing of blocks that are not named, the rule in partial ones, all of whole ones."""
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
    """Along its path, a branch sees and stands where a window of the same tokens would; off it, nothing."""
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
