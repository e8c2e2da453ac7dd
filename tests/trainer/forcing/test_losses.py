"""Losses and gradients: chunked against plain ones, and packed rows against plain rows against a loop over slots."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.trainer import JacobiForcingCollator
from jacobi_hf.trainer.data.batch import counts_of
from jacobi_hf.trainer.forcing.losses import IGNORE, Reference, Targets, chunked_losses, plain_losses
from jacobi_hf.trainer.forcing.mask import Slots, dense_mask
from tests.helpers.models import VOCAB, fresh_model, tiny_model
from tests.helpers.properties import at_most
from tests.helpers.records import END, random_record, records


def random_targets(rng, rows):
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    label = torch.randint(0, VOCAB, (rows,), generator=generator)
    label[torch.rand(rows, generator=generator) < 0.4] = IGNORE
    teacher = torch.full((rows,), -1)
    order = torch.randperm(rows, generator=generator)
    students = rng.randint(0, rows - 1)
    teachers = order[students:]
    teacher[order[:students]] = teachers[torch.randint(len(teachers), (students,), generator=generator)]
    weights = torch.rand(rows, 2, generator=generator)
    return Targets(label, weights, teacher, torch.rand(rows, generator=generator), rng.random()), generator


@at_most(40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40), st.sampled_from([1.0, 0.5, 3.0]), st.booleans())
def test_chunked_equals_plain(seed, rows, rows_per_chunk, temperature, with_kl):
    targets, generator = random_targets(random.Random(seed), rows)
    head = torch.nn.Linear(6, VOCAB)
    hidden = torch.randn(rows, 6, generator=generator, requires_grad=True)
    factors = torch.rand(2, generator=generator)
    frozen = Reference(torch.nn.Linear(6, VOCAB), torch.randn(rows, 6, generator=generator)) if with_kl else None
    results = []
    for fast in (False, True):
        head.zero_grad()
        hidden.grad = None
        if fast:
            losses = chunked_losses(head, hidden, targets, VOCAB, temperature, 2 * VOCAB * rows_per_chunk, frozen)
        else:
            losses = plain_losses(head(hidden), targets, temperature, frozen and frozen.logits(torch.arange(rows)))
        total = losses.ar_G @ factors + losses.consistency + 2 * losses.kl
        if total.requires_grad:
            total.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (hidden, *head.parameters())]
        results.append(
            (losses.ar_G, losses.consistency, losses.kl, losses.agreeing.float(), losses.judged.float(), *gradients)
        )
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


def forward_losses(model, batch, context, window, weights):
    """Return the losses of a batch, from all its logits."""
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
    else:
        slots = Slots.of(batch)
        sliding = (
            dense_mask(slots, context, window, model.config.sliding_window) if model.config.sliding_window else None
        )
        mask = dense_mask(slots, context, window)
        if sliding is not None:
            mask = {"full_attention": mask, "sliding_attention": sliding}
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
    ).logits
    labels, _, pairs, _, _ = counts_of(batch).clamp(min=1).float()
    rows = batch["labels"].numel()
    targets = Targets(
        batch["labels"].flatten(),
        torch.full((rows, 1), 1.0) / labels,
        batch["teacher"].flatten(),
        torch.full((rows,), 1.0) / pairs,
    )
    losses = plain_losses(logits.flatten(0, 1), targets)
    return losses, losses.ar_G[0] * weights[0] + losses.consistency * weights[1]


def by_hand(model, record, n, context, window, tau=1.0):
    """Return the AR and consistency terms of one record, slot by slot, from forwards over what each block sees."""
    prompt = record["prompt_ids"]
    body = record["complete_training_sequence_ids"][len(prompt) :]
    blocks = len(body) // (2 * n)
    views = [
        [token for j in range(blocks) for token in body[2 * n * j : 2 * n * j + n]],
        *record.get("more_noisy_ids", []),
    ]
    clean = [body[2 * n * j + n : 2 * n * (j + 1)] for j in range(blocks)]
    answer = [token for block in clean for token in block]
    end = answer.index(END) + 1 if END in answer else len(answer)

    def log_probabilities(ids, tau=1.0):
        return (model(torch.tensor([ids])).logits[0] / tau).log_softmax(-1)

    clean_log, teacher_log = log_probabilities(prompt + answer), log_probabilities(prompt + answer, tau)
    text = prompt + answer[:end]
    ar = [-clean_log[i, text[i + 1]] for i in range(len(text) - 1)]
    consistency = []
    for j, view in itertools.product(range(blocks), views):
        noisy = [view[n * i : n * (i + 1)] for i in range(blocks)]
        if context == "noisy":
            before = [token for block in noisy[:j] for token in block]
        else:
            w = 1 if context == "clean" else window
            first = j // w * w
            before = [t for block in clean[:first] for t in block] + [t for block in noisy[first:j] for t in block]
        noisy_log = log_probabilities(prompt + before + noisy[j], tau)[-n:]
        wrong = [t for t in range(n) if noisy[j][t] != clean[j][t] and j * n + t < end]
        for t in range(wrong[0], n) if wrong else ():
            at = j * n + t
            if at + 1 < end or (END not in answer and at < end):
                teacher = teacher_log[len(prompt) + at].exp().detach()
                consistency.append(-(teacher * noisy_log[t]).sum())
    return ar, consistency


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding"])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("context", "window"), [("noisy", None), ("window", 2), ("clean", None)])
def test_packed_rows_and_the_loop_agree(kind, views, context, window):
    model, n = fresh_model(kind), 3  # other tests may leave a shared model on another attention
    data = records(3, n, seed=5, views=views)
    weights = (3.0, 1.0)
    collators = [
        JacobiForcingCollator(n, (END,), layout="packed", context=context, context_window=window, max_length=96)
    ]
    if context != "clean":
        collators.append(
            JacobiForcingCollator(n, (END,), layout="rows", context=context, context_window=window, max_length=96)
        )
    terms = [by_hand(model, record, n, context, window) for record in data]
    ar, consistency = [t for a, _ in terms for t in a], [t for _, c in terms for t in c]
    assert consistency
    expected = torch.stack(ar).mean() * weights[0] + torch.stack(consistency).mean() * weights[1]
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    for collator in collators:
        losses, total = forward_losses(model, collator(data), context, window, weights)
        torch.testing.assert_close(losses.ar_G[0], torch.stack(ar).mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.consistency, torch.stack(consistency).mean(), rtol=1e-5, atol=1e-5)
        for gradient, wanted in zip(torch.autograd.grad(total, parameters), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@at_most(40)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 5))
def test_counts_are_those_of_the_loop(seed, n, count):
    rng = random.Random(seed)
    data = [random_record(rng, n, views=rng.randint(1, 3)) for _ in range(count)]
    counts = counts_of(JacobiForcingCollator(n, (END,))(data)).tolist()
    model = tiny_model("qwen3")
    terms = [by_hand(model, record, n, "clean", None) for record in data]
    assert counts[0] == sum(len(ar) for ar, _ in terms)
    assert counts[2] == sum(len(consistency) for _, consistency in terms)
    assert counts[1] == 0
    noisy_blocks = [len(r["traj_position_indices"]) * (1 + len(r.get("more_noisy_ids") or [])) for r in data]
    assert counts[3:] == [sum(noisy_blocks), count]


def test_teacher_is_detached():
    head = torch.nn.Linear(4, 7)
    hidden = torch.randn(2, 4, requires_grad=True)
    targets = Targets(torch.full((2,), IGNORE), torch.ones(2, 1), torch.tensor([-1, 0]), torch.ones(2))
    chunked_losses(head, hidden, targets, 7).consistency.backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[0] == 0).all())
    assert bool((hidden.grad[1] != 0).any())


def test_a_perfect_student_has_the_teachers_entropy():
    head = torch.nn.Linear(4, 7)
    hidden = torch.randn(1, 4).expand(2, 4)
    targets = Targets(torch.full((2,), IGNORE), torch.ones(2, 1), torch.tensor([-1, 0]), torch.ones(2))
    entropy = torch.distributions.Categorical(logits=head(hidden[0])).entropy()
    torch.testing.assert_close(chunked_losses(head, hidden, targets, 7).consistency, entropy)
    assert math.isfinite(float(entropy.detach()))
