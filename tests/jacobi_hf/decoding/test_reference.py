"""The plain algorithm against `generate`, ordinary and with Jacobi decoding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf import JacobiConfig
from jacobi_hf.decoding.reference import decode
from tests.helpers.models import TINY, VOCAB, tiny_model
from tests.helpers.properties import at_most


@given(
    kind=st.sampled_from(sorted(TINY)),
    prompt=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12),
    tokens=st.integers(1, 30),
    block=st.integers(2, 6),
    blocks=st.integers(1, 3),
    lookup=st.integers(0, 6),
)
@at_most(60)
def test_the_decoder_does_what_the_reference_does(kind, prompt, tokens, block, blocks, lookup):
    """The same tokens as ordinary decoding, in as many forwards as the plain algorithm takes."""
    model = tiny_model(kind)
    config = JacobiConfig(
        jacobi_schedule="constant",
        jacobi_block_size=block,
        jacobi_max_blocks=blocks,
        jacobi_pool_size=0,
        jacobi_lookup_tokens=lookup,
    )
    arguments = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    ordinary = model.generate(torch.tensor([prompt]), **arguments).sequences[0, len(prompt) :].tolist()
    jacobi = model.generate(torch.tensor([prompt]), **arguments, **config.to_knobs())
    new, forwards = decode(model, prompt, tokens, config)
    assert new == ordinary
    assert jacobi.sequences[0, len(prompt) :].tolist() == ordinary
    assert jacobi.jacobi_stats.forwards == forwards
