"""The interface of draft sources: what a source is told, and that any source leaves the text as it is."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf import JacobiConfig
from jacobi_hf.drafts import sources
from jacobi_hf.drafts.base import DraftSource, SourceShape
from tests.helpers.models import TINY, VOCAB, tiny_model
from tests.helpers.properties import at_most
from tests.helpers.schedules import random_shapes
from tests.test_packaging import ROOT

ARGUMENTS = {"do_sample": False, "pad_token_id": 0}
JACOBI = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}


class Random(DraftSource):
    """Proposes random tokens, as the backbone or in branches that start anywhere on the backbone."""

    name = "random"

    def __init__(self, shape):
        self.shape = shape
        self.generator = torch.Generator().manual_seed(0)

    def propose(self, context):
        rows = len(context.pending_B1)
        shape = rows, len(self.shape.lengths), max(self.shape.lengths)
        token_BSN = torch.randint(1, VOCAB, shape, generator=self.generator)
        most_S = torch.tensor(self.shape.lengths) + torch.tensor(self.shape.segment_starts)
        length_BS = (torch.rand(shape[:2], generator=self.generator) * (most_S + 1)).long()
        return token_BSN, length_BS


def using(monkeypatch, *made):
    """Let calls use these sources, each of which is made anew for a call."""
    classes = [type("Made", (), {"for_call": staticmethod(lambda config, model, make=make: make())}) for make in made]
    monkeypatch.setattr(sources, "SOURCES", classes)


@given(
    kind=st.sampled_from(sorted(TINY)),
    width=st.integers(0, 6),
    branches=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), max_size=4),
    tokens=st.integers(1, 30),
    rows=st.integers(1, 3),
    schedule=st.sampled_from(["adaptive", "constant"]),
)
@at_most(60)
def test_whatever_sources_propose_the_text_is_that_of_generate(kind, width, branches, tokens, rows, schedule):
    """Also if a backbone cannot restart after steps without it; such a backbone takes part in every step."""
    model = tiny_model(kind)
    made = []
    if width:
        made.append(lambda: Random(SourceShape((width,), is_backbone=True)))
    for length, start in branches:
        made.append(lambda length=length, start=start: Random(SourceShape((length,), (min(start, width),))))
    ids = torch.randint(1, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(tokens))
    expected = model.generate(ids, max_new_tokens=tokens, **ARGUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        using(patch, *made)
        with random_shapes(tokens):
            output = model.generate(
                ids, max_new_tokens=tokens, **ARGUMENTS, decoding="jacobi_multiblock", jacobi_schedule=schedule
            )
    assert torch.equal(output, expected)


class Reader(Random):
    """Keeps what it is told of the prompt and of each step, in the order of the text."""

    def __init__(self, taps):
        super().__init__(SourceShape((3,), is_backbone=True, taps=taps))
        self.prompt = []
        self.steps = []

    def read_prompt(self, place_B, next_BP, features_BPF):
        self.prompt.append((int(place_B[0]), next_BP[0], features_BPF[0]))

    def observe(self, outcome):
        if outcome.features_BQF is not None:
            acceptance = outcome.acceptance
            count = int(acceptance.count_B[0])
            path_D = acceptance.path_BD[0, :count]
            self.steps.append(
                (int(outcome.before_B[0]), acceptance.run_BD[0, :count], outcome.features_BQF[0, path_D])
            )


@pytest.mark.parametrize("prefill_slots", [4, 512])
def test_a_source_reads_the_outputs_of_the_tapped_layers(prefill_slots, monkeypatch):
    """Of prompt and committed tokens: the states of a forward over the whole text, and for each token the next one."""
    model = tiny_model("qwen3")
    layers = model.config.num_hidden_layers
    taps = (0, layers - 1)
    ids = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    readers = []
    using(monkeypatch, lambda: readers.append(Reader(taps)) or readers[-1])
    monkeypatch.setattr("jacobi_hf.decoding.loop.Decoder.PREFILL_SLOTS", prefill_slots)
    if prefill_slots < 512:
        monkeypatch.setattr("jacobi_hf.integration.forward.ModelForward.needs_mask", lambda *_, **__: True)
    text = model.generate(ids, max_new_tokens=12, **ARGUMENTS, **JACOBI)[0]
    reader = readers[-1]
    states = {}
    hooks = [
        model.model.layers[tap].register_forward_hook(lambda _, __, out, tap=tap: states.update({tap: out}))
        for tap in taps
    ]
    with torch.no_grad():
        model(text[None])
    for hook in hooks:
        hook.remove()
    expected_LF = torch.cat([states[tap][0] for tap in taps], -1)
    assert len(reader.prompt) == -(-9 // prefill_slots)
    for place, next_P, features_PF in reader.prompt:
        assert torch.equal(next_P, text[place + 1 : place + 1 + len(next_P)])
        torch.testing.assert_close(features_PF, expected_LF[place : place + len(next_P)], atol=1e-4, rtol=1e-4)
    for before, run, features in reader.steps:
        first = 9 + before - 1  # the pending token is the first whose features the step computes
        assert torch.equal(run, text[first + 1 : first + 1 + len(run)])
        torch.testing.assert_close(features, expected_LF[first : first + len(run)], atol=1e-4, rtol=1e-4)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_steps_of_a_source_with_taps_run_uncompiled(monkeypatch):
    from transformers import CompileConfig

    model = tiny_model("qwen3")
    using(monkeypatch, lambda: Reader((0,)))
    ids = torch.tensor([[3, 4, 5]])
    with pytest.warns(UserWarning, match="compile_config is ignored: a draft source reads hidden states"):
        model.generate(
            ids, max_new_tokens=3, **ARGUMENTS, decoding="jacobi_multiblock", compile_config=CompileConfig()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": (3, 4), "starts": (1,)}, "2 segments and 1 starts"),
        ({"lengths": (3, 4), "is_backbone": True}, "a backbone has one segment"),
        ({"lengths": (3,), "starts": (1,), "is_backbone": True}, "which follows the pending token"),
    ],
)
def test_shapes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SourceShape(**arguments)


def test_the_first_backbone_of_the_list_is_the_backbone(monkeypatch):
    first, second = Random(SourceShape((3,), is_backbone=True)), Random(SourceShape((5,), is_backbone=True))
    using(monkeypatch, lambda: first, lambda: second, lambda: Random(SourceShape((2, 2), (0, 1))))
    chosen = sources.sources_of(JacobiConfig(), None)
    assert chosen.backbone is first
    assert (chosen.width, chosen.branch_lengths, chosen.branch_starts, chosen.depths) == (3, (2, 2), (0, 1), 4)
    assert chosen.slots() == 1 + 3 + 4
    assert chosen.slots(limit=1) == 1 + 1 + 2


def test_no_module_but_its_own_and_the_list_knows_a_source():
    """So that a new source needs one file and one line."""
    names = [source.__name__ for source in sources.SOURCES]
    known = re.compile("|".join(rf"\b{name}\b" for name in names))
    own = {"sources.py", *(source.__module__.rpartition(".")[2] + ".py" for source in sources.SOURCES)}
    for package in ("jacobi_hf", "trainer", "hub_cards"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent.name != "drafts" or path.name not in own:
                assert not known.search(path.read_text(encoding="utf-8")), path
