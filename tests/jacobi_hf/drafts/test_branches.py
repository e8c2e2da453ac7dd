from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from jacobi_hf.decoding.step import Step
from jacobi_hf.drafts.base import Drafts, NgramLookup, NgramPool, OtherChoices, Rejection, Text
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import tiny_model

ids = st.integers(0, 4)


def text_of(*rows):
    longest = max(map(len, rows))
    return Text(
        torch.tensor([row + [9] * (longest - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])
    )


def lookup_by_definition(row, length, max_ngram=3):
    """Longest match of the last tokens, the latest of those, continued with its own beginning."""
    for order in range(min(max_ngram, len(row) - 1), 0, -1):
        for end in range(len(row) - 2, order - 2, -1):
            if row[end - order + 1 : end + 1] == row[-order:]:
                period = len(row) - 1 - end
                return [row[end + 1 + i % period] for i in range(length)]
    return None


@given(rows=st.lists(st.lists(ids, min_size=1, max_size=14), min_size=1, max_size=3), length=st.integers(1, 6))
def test_lookup_is_as_defined(rows, length):
    tokens, lengths = NgramLookup(length).propose(text_of(*rows))
    for number, row in enumerate(rows):
        wanted = lookup_by_definition(row, length)
        assert lengths[number, 0] == (length if wanted else 0)
        if wanted:
            assert tokens[number, 0].tolist() == wanted


def test_lookup_goes_on_with_a_repetition():
    tokens, lengths = NgramLookup(7).propose(text_of([1, 2, 3, 1, 2, 3]))
    assert lengths.tolist() == [[7]]
    assert tokens[0, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]


class PlainPool:
    """A list of n-grams, the newest last."""

    def __init__(self, branches, length, capacity):
        self.branches, self.length, self.capacity, self.grams = branches, length, capacity, []

    def learn(self, tokens, choices, accepted, width):
        for slot in range(accepted + 1, width + 1):
            self.grams.append((tokens[slot], choices[slot : min(slot + self.length, width + 1)]))
        self.grams = self.grams[-self.capacity :]

    def propose(self, pending):
        found = []
        for key, gram in reversed(self.grams):
            if key == pending and gram[0] not in [other[0] for other in found] and len(found) < self.branches:
                found.append(gram)
        return found


@given(
    steps=st.lists(
        st.tuples(
            st.lists(ids, min_size=1, max_size=6), st.lists(ids, min_size=6, max_size=6), st.integers(0, 5), ids
        ),
        max_size=8,
    ),
    branches=st.integers(1, 3),
    length=st.integers(1, 4),
)
@example(  # the last guess of a wide step was learnt before those of the step after it
    steps=[([0], [0] * 6, 0, 0), ([0] * 6, [0, 0, 0, 0, 0, 1], 1, 0), ([0, 0], [0] * 6, 0, 0)],
    branches=1,
    length=1,
)
def test_pool_is_as_defined(steps, branches, length):
    pool = NgramPool(branches, length, 1, torch.device("cpu"), capacity=8)
    plain = PlainPool(branches, length, capacity=8)
    for tokens, choices, accepted, pending in steps:
        width = len(tokens) - 1
        accepted = min(accepted, width)
        choices = choices[: width + 1]
        pool.learn(
            Rejection(torch.tensor([tokens]), torch.tensor([choices]), torch.tensor([accepted]), torch.tensor([width]))
        )
        plain.learn(tokens, choices, accepted, width)
        proposed, lengths = pool.propose(text_of([pending]))
        found = [proposed[0, c, :n].tolist() for c, n in enumerate(lengths[0].tolist()) if n]
        assert found == plain.propose(pending)


def test_rows_have_pools_of_their_own():
    pool = NgramPool(1, 2, 2, torch.device("cpu"))
    pool.learn(
        Rejection(
            torch.tensor([[1, 2], [1, 3]]), torch.tensor([[5, 6], [5, 7]]), torch.tensor([0, 0]), torch.tensor([1, 1])
        )
    )
    tokens, lengths = pool.propose(text_of([2], [2]))
    assert lengths.tolist() == [[1], [0]]
    assert tokens[0, 0, 0] == 6


def test_other_choices_stand_in_for_the_first_guesses():
    source = OtherChoices(5, width=3)
    drafts = Drafts(
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[[11, 21], [12, 22], [13, 23]]] * 2), torch.tensor([3, 1])
    )
    tokens, depths = source.propose(text_of([0]), drafts)
    assert source.starts == (0, 0, 1, 1, 2)
    assert tokens[0].tolist() == [[11, 2], [21, 2], [12, 3], [22, 3], [13, 3]]
    assert depths.tolist() == [[2, 2, 3, 3, 3], [2, 2, 0, 0, 0]]
    assert OtherChoices(32, width=2).branches == 4


def test_other_choices_are_the_models_second_and_third(model):
    """In a call: what a branch begins with is the runner-up at the slot that the window's guess comes from."""
    accept, former, seen = Step.accept, [], []

    def watch(self, slots, *rest, **options):
        acceptance = accept(self, slots, *rest, **options)
        if former:
            former_slots, former_verdict = former.pop()
            depths = self._branches[0][1][0].tolist()
            sent = [
                (c, start) for c, (start, depth) in enumerate(zip(self.starts, depths, strict=True)) if depth > start
            ]
            for segment, (branch, start) in enumerate(sent, 1):
                slot = former_slots.layout.path_SD[0, int(former_verdict.count_B) + start]
                likeliest = former_verdict.merit_BQV[0, slot].topk(3).indices.tolist()
                first = int(slots.token_BQ[0, slots.layout.path_SD[segment, start + 1]])
                assert first == likeliest[1 + branch % 2]
                seen.append(first)
        former.append((slots, acceptance))
        return acceptance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "accept", watch)
        ids = torch.tensor([[3, 4, 5]])
        output = model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            decoding="jacobi_multiblock",
            jacobi_block_size=4,
            jacobi_pool_size=0,
            jacobi_lookup_tokens=0,
            jacobi_topk_branches=8,
        )
    assert torch.equal(output, model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0))
    assert len(seen) > 20


def test_the_pool_learns_from_the_model_as_far_as_it_verifies(monkeypatch):
    """With a drafter, what follows a guess that the model was asked about is the model's choice there, by a forward of its own."""
    learnt, texts = [], []
    learn, propose = NgramPool.learn, NgramPool.propose

    def proposing(self, text, drafts=None):
        texts.append(text.ids_BL[0, : text.length_B[0]].tolist())
        return propose(self, text, drafts)

    def learning(self, rejection):
        learnt.append((texts[-1] if texts else None, rejection))
        learn(self, rejection)

    monkeypatch.setattr(NgramPool, "propose", proposing)
    monkeypatch.setattr(NgramPool, "learn", learning)
    model, verified = tiny_model("qwen3"), 3
    knobs = {"jacobi_block_size": 4, "jacobi_lookup_tokens": 0, "jacobi_verify_width": verified}
    with drafting(model, random_drafter(model, scale=1.0)):
        model.generate(
            torch.tensor([[3, 4, 5, 3, 4]]), max_new_tokens=24, do_sample=False, decoding="jacobi_multiblock", **knobs
        )
    checked = 0
    for text, rejection in learnt[1:]:
        guesses = min(verified, int(rejection.width_B[0]))
        assert text[-1] == rejection.token_BW1[0, 0]
        ids = torch.tensor([[*text, *rejection.token_BW1[0, 1 : guesses + 1].tolist()]])
        said = model(ids).logits[0, len(text) - 1 :].argmax(-1)
        assert torch.equal(rejection.choice_BW1[0, : guesses + 1], said)
        checked += guesses
    assert checked > 20
