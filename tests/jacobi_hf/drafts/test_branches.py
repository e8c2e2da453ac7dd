from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from jacobi_hf.decoding import step
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.selection import Selector
from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.drafts.ngram_pool import NgramPool
from jacobi_hf.drafts.topk import TopKBranches
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import tiny_model
from tests.helpers.outcomes import context_of, outcome_of_step

ids = st.integers(0, 4)


def after(*rows):
    """Return the context of a proposal that depends on the texts alone."""
    return context_of(None, *rows)


def pool_of(branches, length, rows=1, capacity=1024):
    pool = NgramPool(branches, length, capacity)
    pool.allocate(rows, 64, 64, torch.device("cpu"))
    return pool


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
    tokens, lengths = NgramLookup(length).propose(after(*rows))
    for number, row in enumerate(rows):
        wanted = lookup_by_definition(row, length)
        assert lengths[number, 0] == (length if wanted else 0)
        if wanted:
            assert tokens[number, 0].tolist() == wanted


def test_lookup_goes_on_with_a_repetition():
    tokens, lengths = NgramLookup(7).propose(after([1, 2, 3, 1, 2, 3]))
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
    pool = pool_of(branches, length, capacity=8)
    plain = PlainPool(branches, length, capacity=8)
    for tokens, choices, accepted, pending in steps:
        width = len(tokens) - 1
        accepted = min(accepted, width)
        choices = choices[: width + 1]
        pool.learn(torch.tensor([tokens]), torch.tensor([choices]), torch.tensor([accepted]), torch.tensor([[width]]))
        plain.learn(tokens, choices, accepted, width)
        proposed, lengths = pool.propose(after([pending]))
        found = [proposed[0, c, :n].tolist() for c, n in enumerate(lengths[0].tolist()) if n]
        assert found == plain.propose(pending)


def test_rows_have_pools_of_their_own():
    pool = pool_of(1, 2, rows=2)
    pool.learn(
        torch.tensor([[1, 2], [1, 3]]), torch.tensor([[5, 6], [5, 7]]), torch.tensor([0, 0]), torch.tensor([[1], [1]])
    )
    tokens, lengths = pool.propose(after([2], [2]))
    assert lengths.tolist() == [[1], [0]]
    assert tokens[0, 0, 0] == 6


def test_top_k_branches_replace_the_first_guesses():
    source = TopKBranches(5, width=3)
    source.allocate(1, 64, 64, torch.device("cpu"))
    layout = build_layout((3,), torch.device("cpu"))
    ranked = torch.arange(4)[None, :, None] + torch.tensor([0, 10, 20])
    backbone = torch.tensor([[1, 2, 3]])
    for valid, lengths in ((3, [2, 2, 3, 3, 3]), (1, [2, 2, 0, 0, 0])):
        outcome = outcome_of_step(layout, lengths=(valid,), count=1, ranked=ranked)
        tokens, depths = source.propose(context_of(outcome, [0], backbone=backbone))
        assert tokens[0].tolist() == [[11, 2], [21, 2], [12, 3], [22, 3], [13, 3]]
        assert depths.tolist() == [lengths]
    assert source.shape.starts == (0, 0, 1, 1, 2)
    assert TopKBranches(32, width=2).shape.lengths == (2,) * 4


def test_top_k_branches_are_the_models_second_and_third_choices(model, monkeypatch):
    """In a call: a branch begins with the runner-up at the slot that the guess of the backbone comes from."""
    accept, choose, last, seen, logits = step.accept, Selector.choose, [], [], []

    def choosing(self, logits_BQV, *rest):
        logits.append(logits_BQV)
        return choose(self, logits_BQV, *rest)

    def watch(state, inputs, *rest, **options):
        acceptance = accept(state, inputs, *rest, **options)
        if last:
            last_inputs, last_acceptance, last_logits = last.pop()
            lengths = state.branches[0][1][0].tolist()
            starts = state.sources.branch_starts
            sent = [
                (c, start) for c, (start, length) in enumerate(zip(starts, lengths, strict=True)) if length > start
            ]
            for segment, (branch, start) in enumerate(sent, 1):
                slot = last_inputs.layout.path_SD[0, int(last_acceptance.count_B) + start]
                likeliest = last_logits[0, slot].topk(3).indices.tolist()
                first = int(inputs.token_BQ[0, inputs.layout.path_SD[segment, start + 1]])
                assert first == likeliest[1 + branch % 2]
                seen.append(first)
        last.append((inputs, acceptance, logits.pop()))
        return acceptance

    ids = torch.tensor([[3, 4, 5]])
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    monkeypatch.setattr(step, "accept", watch)
    monkeypatch.setattr(Selector, "choose", choosing)
    knobs = {"jacobi_block_size": 4, "jacobi_pool_size": 0, "jacobi_lookup_tokens": 0, "jacobi_topk_branches": 8}
    knobs["jacobi_schedule"] = "constant"
    output = model.generate(ids, **arguments, **knobs, decoding="jacobi_multiblock")
    assert torch.equal(output, expected)
    assert len(seen) > 20


def test_the_pool_learns_from_the_model_as_far_as_it_verifies(monkeypatch):
    """With a drafter, what follows a verified guess is the model's own choice there."""
    learnt, texts = [], []
    learn, propose = NgramPool.learn, NgramPool.propose

    def proposing(self, context):
        texts.append(context.text_BL[0, : context.text_length_B[0]].tolist())
        return propose(self, context)

    def learning(self, token_BD, choice_BD, accepted_B, length_B1):
        learnt.append((texts[-1] if texts else None, token_BD, choice_BD, int(length_B1)))
        learn(self, token_BD, choice_BD, accepted_B, length_B1)

    monkeypatch.setattr(NgramPool, "propose", proposing)
    monkeypatch.setattr(NgramPool, "learn", learning)
    model, verified = tiny_model("qwen3"), 3
    knobs = {"jacobi_block_size": 4, "jacobi_lookup_tokens": 0, "jacobi_verify_width": verified}
    knobs["jacobi_schedule"] = "constant"
    with drafting(model, random_drafter(model, scale=1.0)):
        model.generate(
            torch.tensor([[3, 4, 5, 3, 4]]), max_new_tokens=24, do_sample=False, decoding="jacobi_multiblock", **knobs
        )
    checked = 0
    for text, token_BD, choice_BD, length in learnt[1:]:
        guesses = min(verified, length)
        assert text[-1] == token_BD[0, 0]
        ids = torch.tensor([[*text, *token_BD[0, 1 : guesses + 1].tolist()]])
        said = model(ids).logits[0, len(text) - 1 :].argmax(-1)
        assert torch.equal(choice_BD[0, : guesses + 1], said)
        checked += guesses
    assert checked > 20
