"""Several turns of several chats on one cache: rows get unequal lengths, so pads stand between the turns.

Tried: two and three turns of one to four chats, answers that end at different lengths, new text padded anywhere, chats
that say nothing more, a DynamicCache and a StaticCache, greedy and sampled, ordinary and Jacobi turns in any order,
embeddings instead of ids, and sliding windows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from jacobi_hf.integration.compat import CACHE
from tests.helpers.models import TINY, VOCAB, fresh_model, tiny_model
from tests.helpers.properties import at_most

ORDINARY: dict[str, Any] = {}
JACOBI = {"decoding": "jacobi", "jacobi_block_size": 4}
MULTIBLOCK = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant", "jacobi_block_size": 4}


@dataclass(frozen=True)
class Turn:
    """What the rows say, 0 for a pad, how long the answer may be, and how it is decoded."""

    says: tuple[tuple[int, ...], ...]
    new_tokens: int
    knobs: dict[str, Any]


@dataclass(frozen=True)
class Chats:
    """A batch of chats."""

    kind: str
    is_static: bool
    turns: tuple[Turn, ...]
    arguments: dict[str, Any]

    def run(self, *, as_said: bool) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
        """Return ids, mask and cache after each turn; all turns are ordinary unless they go `as_said`."""
        model = tiny_model(self.kind)
        config = model.config
        cache = StaticCache(config=config, max_cache_len=99) if self.is_static else DynamicCache(config=config)
        ids = mask = torch.zeros(len(self.turns[0].says), 0, dtype=torch.long)
        after = []
        for number, turn in enumerate(self.turns):
            said = torch.tensor(turn.says)
            ids = torch.cat([ids, said], 1)
            mask = torch.cat([mask, (said != 0).long()], 1)
            torch.manual_seed(number)
            knobs = turn.knobs if as_said else ORDINARY
            # The model never writes a 0, the pad.
            call = {**self.arguments, "max_new_tokens": turn.new_tokens, "pad_token_id": 0, "suppress_tokens": [0]}
            ids = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **call, **knobs)
            mask = torch.cat([mask, (ids[:, mask.shape[1] :] != 0).long()], 1)
            keys = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            after.append((ids, mask, keys))
        return after


def says(draw: Any, rows: int, *, is_first: bool) -> tuple[tuple[int, ...], ...]:
    columns = draw(st.integers(1, 6))
    token = st.integers(0, VOCAB - 1)
    line = st.lists(token, min_size=columns - 1, max_size=columns - 1)
    last = st.integers(1, VOCAB - 1)
    has_ended = [not is_first and draw(st.integers(0, 9)) == 0 for _ in range(rows)]
    return tuple((0,) * columns if ended else (*draw(line), draw(last)) for ended in has_ended)


@st.composite
def chats(draw: Any) -> Chats:
    rows = draw(st.integers(1, 4))
    knobs = st.sampled_from([ORDINARY, JACOBI, MULTIBLOCK, MULTIBLOCK])
    turns = [
        Turn(says(draw, rows, is_first=number == 0), draw(st.integers(1, 9)), draw(knobs))
        for number in range(draw(st.integers(2, 3)))
    ]
    arguments = {
        "do_sample": draw(st.booleans()),
        "eos_token_id": draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=4, unique=True)),
    }
    return Chats(draw(st.sampled_from(TINY)), draw(st.booleans()), tuple(turns), arguments)


@hypothesis.given(case=chats())
@at_most(60)
def test_turns_in_any_order_equal_ordinary_turns(case: Chats) -> None:
    """A batch of chats on one cache; each turn is decoded either way, and ids and cached tokens are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = case.run(as_said=False)
        found = case.run(as_said=True)
    for (ids, mask, keys), (our_ids, our_mask, our_keys) in zip(expected, found, strict=True):
        assert torch.equal(ids, our_ids)
        assert torch.equal(mask, our_mask)
        for pair, our_pair in zip(keys, our_keys, strict=True):
            for states, our_states in zip(pair, our_pair, strict=True):
                assert states.shape == our_states.shape
                if "sliding" in case.kind:
                    continue
                columns = ids.shape[1] - 1
                is_token = mask[:, :columns].bool()
                first, second = (one[:, :, :columns].transpose(1, 2)[is_token] for one in (states, our_states))
                assert torch.allclose(first, second, atol=2e-4)


@hypothesis.given(case=chats())
@at_most(40)
def test_each_chat_reads_as_if_it_were_alone(case: Chats) -> None:
    """Without sliding windows, a row equals the same chat decoded alone, in one piece, without a cache."""
    hypothesis.assume("sliding" not in case.kind)
    case = Chats(case.kind, case.is_static, case.turns, {**case.arguments, "do_sample": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = case.run(as_said=True)
    for row in range(len(case.turns[0].says)):
        end = 0
        for turn, (ids, mask, _) in zip(case.turns, after, strict=True):
            if not any(turn.says[row]):
                break  # a chat that has ended goes on as ordinary decoding makes it
            end += len(turn.says[row])
            text = ids[row : row + 1, :end][mask[row : row + 1, :end] != 0][None]
            alone = tiny_model(case.kind).generate(
                text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=turn.new_tokens,
                pad_token_id=0,
                suppress_tokens=[0],
                **case.arguments,
            )[0, text.shape[1] :]
            answer = ids[row, end:]
            assert torch.equal(answer[mask[row, end:] != 0], alone)
            end = ids.shape[1]


SECOND = {
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1, 1]]),
    "input_ids": torch.tensor([[0, 0, 5, 6, 7, 0, 0, 8], [1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 0, 4, 5, 0, 6, 7]]),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("part", [0, 3, 5])
def test_pads_anywhere_are_served(kind, part, sampled, recwarn):
    """A mask with holes, in the cache and in the new text, is served rather than decoded ordinarily."""
    model = tiny_model(kind)
    outputs = []
    for knobs in (ORDINARY, JACOBI, MULTIBLOCK):
        cache = DynamicCache(config=model.config)
        ids, mask = SECOND["input_ids"], SECOND["attention_mask"]
        if part:
            positions = (mask[:, :part].cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                model(ids[:, :part], attention_mask=mask[:, :part], position_ids=positions, **{CACHE: cache})
        torch.manual_seed(0)
        output = model.generate(
            **SECOND,
            **{CACHE: cache},
            max_new_tokens=12,
            do_sample=sampled,
            pad_token_id=0,
            return_dict_in_generate=True,
            **knobs,
        )
        outputs.append(output.sequences)
        assert int(cache.get_seq_length()) == 8 + 12 - 1
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not [one for one in recwarn if "decoding ordinarily" in str(one.message)]
    assert output.jacobi_stats.forwards > 1


def test_embeddings_with_pads_inside():
    """Embeddings take the place of ids, and pads stand between them."""
    model = tiny_model("qwen3")
    embeds = model.get_input_embeddings()(SECOND["input_ids"]).detach()
    call = {"attention_mask": SECOND["attention_mask"], "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for inputs in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": SECOND["input_ids"]}):
        assert torch.equal(model.generate(**inputs, **call), model.generate(**inputs, **call, **MULTIBLOCK))


@pytest.mark.parametrize(("new_tokens", "is_served"), [(4, True), (9, False)])
def test_a_sliding_window_counts_pads(new_tokens, is_served, recwarn):
    """Ordinary decoding counts columns, pads too. So beyond the window a row differs from the row decoded alone."""
    model = fresh_model("qwen3-sliding")
    model.config.sliding_window = 11
    model = type(model)(model.config).eval()
    call = {**SECOND, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**call, **MULTIBLOCK)
    warned = [str(one.message) for one in recwarn if "decoding ordinarily" in str(one.message)]
    assert torch.equal(output, model.generate(**call))
    assert ["sliding window, which counts them" in one for one in warned] == ([] if is_served else [True])
