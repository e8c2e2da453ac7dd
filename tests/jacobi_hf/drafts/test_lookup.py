"""Prompt lookup on the host against prompt lookup on the device."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.drafts.lookup import NgramIndex, NgramLookup


@given(
    texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), min_size=1, max_size=3),
    pieces=st.integers(1, 7),
    length=st.integers(1, 9),
    order=st.integers(1, 4),
)
def test_the_host_finds_what_the_device_finds(texts, pieces, length, order):
    """Same guesses, same length of the match, however the text arrives."""
    columns = max(map(len, texts)) + 2
    text_BL = torch.tensor([text + [1] * (columns - len(text)) for text in texts])
    length_B = torch.tensor([len(text) for text in texts])
    source = NgramLookup(length, order)
    source.order_B = torch.zeros(len(texts), dtype=torch.long)
    pending_B1 = text_BL.gather(1, length_B[:, None] - 1)
    token_BSN, length_B1 = source.propose(
        SimpleNamespace(text_BL=text_BL, text_length_B=length_B, pending_B1=pending_B1)
    )
    for row, text in enumerate(texts):
        index = NgramIndex(order)
        for first in range(0, len(text), pieces):
            index.extend(text[first : first + pieces])
        place, matched = index.match()
        assert matched == source.order_B[row]
        assert (length_B1[row, 0] > 0) == (matched > 0)
        if matched:
            assert index.after(place, length) == token_BSN[row, 0].tolist()
