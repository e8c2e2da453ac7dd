"""Field reports: memory of steps with processors, sampling noise and scores, where the vocabulary is large."""

from __future__ import annotations

from functools import cache

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria

from jacobi_hf.decoding import choice
from jacobi_hf.decoding.noise import SamplingNoise
from jacobi_hf.integration.forward import ModelForward
from tests.helpers.cases import Case, cases, differences
from tests.helpers.models import fresh_model
from tests.helpers.properties import at_most

CPU = torch.device("cpu")
WARPERS = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
CALLS = {
    "sampled": {"do_sample": True, **WARPERS},
    "sampled without warpers": {"do_sample": True, "top_k": 0},
    "many warpers": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "sampled with penalty": {"do_sample": True, "repetition_penalty": 1.3, **WARPERS},
    "scores": {"do_sample": False, "output_scores": True, "output_logits": True},
    "sampled with scores": {"do_sample": True, "output_scores": True, "output_logits": True, **WARPERS},
    "token by token": {"do_sample": True, "no_repeat_ngram_size": 3, **WARPERS},
    "runners-up": {"do_sample": True, "jacobi_topk_branches": 4, **WARPERS},
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in its context and still live.

    Attributes:
        peak: the most bytes at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._add((args, kwargs), counts=False)
        output = func(*args, **(kwargs or {}))
        self._add(output, counts=True)
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output

    def _add(self, values, *, counts: bool) -> None:
        self._live = {address: kept for address, kept in self._live.items() if not kept[0].expired()}
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                size = storage.nbytes() if counts else 0
                self._live.setdefault(storage.data_ptr(), (StorageWeakRef(storage), size))


class AfterTokens(StoppingCriteria):
    """Ends a call long before its limit, so that windows are as wide as they can be."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._columns)


def peak_of(model, rows: int, tokens: int, **arguments) -> int:
    """Return the most bytes that a call of `generate` holds, those of the model aside."""
    input_ids = torch.randint(0, model.config.vocab_size, (rows, 4), generator=torch.Generator().manual_seed(rows))
    with LiveBytes() as live:
        model.generate(
            input_ids,
            max_new_tokens=64,
            pad_token_id=0,
            stopping_criteria=[AfterTokens(4 + tokens)],
            return_dict_in_generate=True,
            **arguments,
        )
    return live.peak


def peaks(model, rows: int, tokens: int, call: str, **knobs) -> tuple[int, int, int]:
    """Return the most bytes of a call and of the same call of ordinary decoding, and bytes of its largest logits."""
    largest = 0
    forward = ModelForward.__call__

    def watching(self, inputs):
        nonlocal largest
        output = forward(self, inputs)
        largest = max(largest, output.logits_BQV.nbytes)
        return output

    ordinary_arguments = {name: value for name, value in CALLS[call].items() if not name.startswith("jacobi")}
    ordinary = peak_of(model, rows, tokens, **ordinary_arguments)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelForward, "__call__", watching)
        whole = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", **CALLS[call], **knobs}
        ours = peak_of(model, rows, tokens, **whole)
    return ours, ordinary, largest


@cache
def model_with(vocab_size: int):
    """Return a small model with a large vocabulary."""
    model = fresh_model("qwen3")
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model


@hypothesis.given(
    rows=st.integers(1, 3),
    block_size=st.sampled_from([8, 16]),
    lookup=st.sampled_from([0, 8]),
    vocab_size=st.sampled_from([6_400, 7_001]),
    call=st.sampled_from(list(CALLS)),
)
@at_most(12)
def test_a_call_holds_little_beside_the_logits_of_a_step(rows, block_size, lookup, vocab_size, call):
    """Processors, softmax and noise once took nine times the memory of the logits that they were made from."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "SMALL_BLOCK", 1)
        patched.setattr(SamplingNoise, "KEPT", 1)
        ours, ordinary, logits = peaks(
            model_with(vocab_size), rows, 3, call, jacobi_block_size=block_size, jacobi_lookup_tokens=lookup
        )
    assert logits > 3 * rows * vocab_size * 4
    assert ours < 1.5 * logits + ordinary


def test_sampling_from_a_vocabulary_of_152_000_holds_little_beside_logits_and_ring():
    """Qwen's vocabulary, T=0.6, top-k 20, top-p 0.95, several rows: the sizes of blocks and ring are the real ones."""
    ours, _, logits = peaks(model_with(151_936), 2, 2, "sampled", jacobi_block_size=12)
    assert logits > 12e6
    assert ours < 1.5 * logits + 4 * SamplingNoise.KEPT


@hypothesis.given(case=cases())
@at_most(30)
def test_blocks_of_one_slot_and_noise_that_is_drawn_again_decode_the_same(case: Case):
    """Text, scores, cache and the generator's state are those of ordinary decoding however small the blocks are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "SMALL_BLOCK", 1)
        patched.setattr(SamplingNoise, "KEPT", 1)
        assert differences(case) == []


@hypothesis.given(
    steps=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4),
    depths=st.integers(1, 6),
    places=st.integers(0, 4),
    size=st.integers(1, 30),
    ranks=st.sampled_from([0, 3]),
    seed=st.integers(0, 10**6),
)
def test_blocks_choose_what_one_block_chooses(steps, depths, places, size, ranks, seed):
    """Rows are at different tokens; the noise that has no place in the ring is drawn again in every step."""
    rows, vocab_size = 3, 11
    logits = torch.randn(len(steps), rows, depths, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[0, 1, 0, 2] = float("nan")

    def all_steps(*, redraws: bool):
        torch.manual_seed(seed)
        noise = SamplingNoise(CPU, redraws=redraws)
        generated_B = torch.zeros(rows, dtype=torch.long)
        for number, moved in enumerate(steps):
            noise.draw(int(generated_B.min()), int(generated_B.max()) + depths - 1, (rows, vocab_size))
            index_BQ = generated_B[:, None] + torch.arange(depths)
            yield choice.choose(logits[number], index_BQ, noise, lambda logits_RV, place_R: logits_RV / 0.7, ranks)
            generated_B += torch.tensor(moved).clamp(max=depths)
        noise.rewind(int(generated_B.max()))
        yield torch.get_rng_state()

    *whole, state = all_steps(redraws=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "SMALL_BLOCK", size * vocab_size)
        patched.setattr(SamplingNoise, "KEPT", places * rows * vocab_size)
        *blocks, state_of_blocks = all_steps(redraws=True)
    assert torch.equal(state, state_of_blocks)
    for one, other in zip(whole, blocks, strict=True):
        assert torch.equal(one.token_BQ, other.token_BQ)
        assert torch.equal(one.broken_BQ, other.broken_BQ)
        assert ranks == 0 or torch.equal(one.ranked_BQR, other.ranked_BQR)
    assert whole[0].broken_BQ[1, 0]


def test_the_ring_has_room_for_what_a_step_needs_and_no_more():
    """The ring of the default knobs once had 64 places for 33 tokens."""
    noise = SamplingNoise(CPU, room=33)
    noise.draw(0, 32, (1, 2))
    assert len(noise.ring_IBV) == 33
