from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.decoding import step as decoding_step
from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.trainer.drafter.loss import drafting_loss, plain_loss
from jacobi_hf.trainer.drafter.model import ModelWithDrafter
from jacobi_hf.trainer.drafter.windows import Windows, advanced, fresh_windows, random_windows, window_mask
from tests.helpers.drafters import drafting, random_drafter
from tests.helpers.models import TINY, VOCAB, fresh_model
from tests.helpers.properties import at_most

PROMPTS = ([3, 4, 5, 6, 3, 4], [7, 8, 9])


def answered(model, tokens=24):
    """Prompts with the model's greedy answers, padded on the right: ids, prompt lengths, lengths."""
    texts = [
        model.generate(torch.tensor([p]), max_new_tokens=tokens - 3 * i, do_sample=False, pad_token_id=0)[0].tolist()
        for i, p in enumerate(PROMPTS)
    ]
    columns = max(map(len, texts))
    ids = torch.tensor([text + [0] * (columns - len(text)) for text in texts])
    return ids, torch.tensor([len(p) for p in PROMPTS]), torch.tensor([len(text) for text in texts])


@pytest.mark.parametrize("kind", TINY)
def test_a_training_row_is_the_decoders_own_step(kind):
    """From each state of a decoder: the same choices at the kept slots, and the same next draft tokens."""
    model = fresh_model(kind)
    drafter = random_drafter(model, scale=0.1)
    ids, prompt_B, length_B = answered(model)
    accept, steps = decoding_step.accept, []

    def watch(state, inputs, *rest, **options):
        acceptance = accept(state, inputs, *rest, **options)
        if inputs.layout.draft_slots:
            steps.append(
                (
                    int(state.length_B[0]) - 1,
                    inputs.token_BQ[:, -inputs.layout.draft_slots :],
                    acceptance.choice_BQ[:, -inputs.layout.draft_slots :],
                )
            )
        return acceptance

    trained = ModelWithDrafter(model, drafter)
    for row, prompt in enumerate(PROMPTS):
        steps.clear()
        with drafting(model, drafter), pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding_step, "accept", watch)
            model.generate(
                torch.tensor([prompt]),
                max_new_tokens=int(length_B[row]) - len(prompt),
                do_sample=False,
                pad_token_id=0,
                decoding="jacobi_multiblock",
                jacobi_schedule="constant",
                jacobi_block_size=4,
                jacobi_max_blocks=2,
                jacobi_pool_size=0,
                jacobi_lookup_tokens=0,
                jacobi_verify_width=8,
            )
        assert len(steps) > 5
        text = trained.read(ids[row : row + 1, : int(length_B[row])], prompt_B[row : row + 1], length_B[row : row + 1])
        assert torch.equal(text.choice_BL[0, len(prompt) - 1 : -1], text.ids_BL[0, len(prompt) :])
        for number, (pending, draft_1W, choice_1W) in enumerate(steps):
            windows = Windows(torch.tensor([[pending]]), draft_1W[:, None])
            with torch.no_grad():
                step = trained.step(text, windows)
            accepted, last = int(step.accepted_BM), int(length_B[row]) - 2
            learnt = [w for w in range(draft_1W.shape[1]) if w >= accepted and pending + 1 + w <= last]
            assert step.next_BMW[0, 0, learnt].tolist() == choice_1W[0, learnt].tolist()
            if number == 0:
                assert torch.equal(fresh_windows(text, windows.pending_BM, draft_1W.shape[1]).draft_BMW[0], draft_1W)
            if number + 1 < len(steps):
                following = advanced(text, windows, step)
                next_pending, next_1W, _ = steps[number + 1]
                assert int(following.pending_BM) == next_pending
                # Slots after the window's end count only if they are in it; fillers are the same in both.
                width = min(next_1W.shape[1], draft_1W.shape[1], last - next_pending)
                kept = [i for i in range(width) if accepted + i in learnt or accepted + i >= draft_1W.shape[1]]
                assert following.draft_BMW[0, 0, kept].tolist() == next_1W[0, kept].tolist()


@given(
    pending=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=3),
    width=st.integers(1, 4),
    sliding=st.none() | st.integers(1, 6),
)
def test_the_mask_of_windows(pending, width, sliding):
    """Against the definition, slot by slot."""
    windows, columns = Windows(torch.tensor(pending), torch.zeros(len(pending), 2, width, dtype=torch.long)), 7
    allowed = window_mask(windows, columns, sliding)
    for row, places in enumerate(pending):
        for q in range(2 * width):
            window, offset = divmod(q, width)
            position = places[window] + 1 + offset
            for k in range(columns + 2 * width):
                if k < columns:
                    sees, at = k <= places[window], k
                else:
                    other, before = divmod(k - columns, width)
                    sees, at = other == window and before <= offset, places[other] + 1 + before
                if sliding is not None:
                    sees = sees and at > position - sliding
                assert bool(allowed[row, 0, q, k]) == sees


@given(rows=st.integers(1, 9), chunk=st.integers(1, 5), soft=st.booleans(), seed=st.integers(0, 1000))
@at_most(40)
def test_the_loss_by_chunks_is_the_plain_one(rows, chunk, soft, seed):
    torch.manual_seed(seed)
    head, hidden = torch.nn.Linear(6, 11), torch.randn(rows, 6, requires_grad=True)
    label, weight, teacher = torch.randint(0, 11, (rows,)), torch.rand(rows), torch.randn(rows, 6) if soft else None
    loss, choice = drafting_loss(head, hidden, label, weight, teacher, chunk)
    (gradient,) = torch.autograd.grad(loss, hidden)
    logits = head(hidden)
    expected = plain_loss(logits, label, weight, None if teacher is None else head(teacher).detach())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])
    assert torch.equal(choice, logits.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_a_drafter_learns_a_text(targets):
    """And only the drafter changes; rows of a batch and windows of a row do not disturb each other."""
    model = fresh_model("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, prompt_B, length_B = answered(model)
    trained = ModelWithDrafter(model, LoraDrafter.new(model, r=16), targets=targets)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    assert sum(p.numel() for p in trained.parameters()) == sum(p.numel() for p in trained.drafter.parameters())
    tokens, forwards = trained.decode_answers(ids, prompt_B, length_B, 8)
    assert tokens == int((length_B - prompt_B).sum())
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        loss, totals = trained(ids, prompt_B, length_B, windows_per_text=6, window_width=8, steps_per_window=2)
        loss.backward()
        optimizer.step()
    assert totals[1] / totals[0] > 0.8
    _, fewer = trained.decode_answers(ids, prompt_B, length_B, 8)
    assert fewer < 0.7 * forwards
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # The decoder needs as many forwards as the training counts.
    drafter = trained.drafter.copied()
    with drafting(model, drafter):
        counted = 0
        for row, prompt in enumerate(PROMPTS):
            output = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=int(length_B[row]) - len(prompt),
                do_sample=False,
                pad_token_id=0,
                decoding="jacobi_multiblock",
                jacobi_schedule="constant",
                jacobi_block_size=2,
                jacobi_max_blocks=4,
                jacobi_pool_size=0,
                jacobi_lookup_tokens=0,
                jacobi_verify_width=8,
                return_dict_in_generate=True,
            )
            assert torch.equal(output.sequences[0], ids[row, : int(length_B[row])])
            counted += output.jacobi_stats.forwards
    assert counted <= fewer + 6  # its window is between 6 and 8 drafts wide


def test_a_window_sees_nothing_of_the_others():
    model = fresh_model("qwen2-sliding")
    trained = ModelWithDrafter(model, random_drafter(model))
    ids, prompt_B, length_B = answered(model)
    text = trained.read(ids, prompt_B, length_B)
    torch.manual_seed(1)
    together = random_windows(text, 3, 5)
    assert (together.pending_BM >= prompt_B[:, None]).all()
    assert (together.pending_BM <= length_B[:, None] - 2).all()
    with torch.no_grad():
        of_all = trained.step(text, together)
        for window in range(3):
            alone = Windows(together.pending_BM[:, window : window + 1], together.draft_BMW[:, window : window + 1])
            step = trained.step(text, alone)
            assert torch.equal(step.next_BMW[:, 0], of_all.next_BMW[:, window])
            assert torch.equal(step.accepted_BM[:, 0], of_all.accepted_BM[:, window])


def test_constant_drafts_hide_the_drafts():
    model = fresh_model("qwen3")
    ids, prompt_B, length_B = answered(model)
    drafter = LoraDrafter.new(model, r=4, constant_draft=1)
    with torch.no_grad():
        drafter.embedding.normal_()
    trained = ModelWithDrafter(model, drafter)
    text = trained.read(ids, prompt_B, length_B)
    pending_BM = prompt_B[:, None]
    first = fresh_windows(text, pending_BM, 4)
    other = Windows(pending_BM, (first.draft_BMW + 1) % VOCAB)
    with torch.no_grad():
        assert torch.equal(trained._forward(text, first).logits, trained._forward(text, other).logits)
    # And in decoding.
    inputs, seen = torch.tensor([PROMPTS[0]]), []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with drafting(model, drafter.copied()):
        output = model.generate(
            inputs,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            decoding="jacobi_multiblock",
            jacobi_schedule="constant",
            jacobi_block_size=4,
            jacobi_max_blocks=1,
            jacobi_pool_size=0,
            jacobi_lookup_tokens=0,
        )
    handle.remove()
    assert all((token_BQ[:, -2:] == 1).all() for token_BQ in seen[1:3])
    assert torch.equal(output, model.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=0))
