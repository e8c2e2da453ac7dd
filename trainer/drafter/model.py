"""Training a drafter: windows of drafts behind clean text, as the decoder has them, and what the model itself says there.

A *window* is a place in an answer, told by the position of its pending token, and W drafts behind it. One *visit* is what a decoding step
does: the drafts go through the drafted model behind the keys and values of the text; the leading drafts that are right are accepted, one
more token comes from the model itself, and the choices at the remaining slots are the next drafts. Those slots, from the first wrong
draft on, are what is learnt from: at each the model's own choice one position further on is known from the clean text.

Shapes: B rows, L text columns, M windows of a row, W drafts of a window, Q = M * W slots, R = B * Q rows of hidden states, N of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from jacobi_hf.attention.interface import MaskBuilder
from jacobi_hf.decoding.selection import best
from jacobi_hf.drafts.window import ids_of_the_text
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.trainer.head_hook import AtHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.drafts.lora import LoraDrafter

TARGETS = ("hard", "soft")


@dataclass(frozen=True)
class CleanText:
    """A batch of prompts with their answers, and what the model makes of them.

    Attributes:
        ids_BL: prompt and answer, padded on the right.
        prompt_B, length_B: tokens of the prompt, and of both.
        choice_BL: the model's choice behind each token of the answer (and the prompt's last); elsewhere 0.
        cache: keys and values of the text.
        hidden_BLH: the model's last hidden states, for soft targets.
    """

    ids_BL: torch.Tensor
    prompt_B: torch.Tensor
    length_B: torch.Tensor
    choice_BL: torch.Tensor
    cache: DynamicCache
    hidden_BLH: torch.Tensor


class BehindText(DynamicCache):
    """The keys and values of a text in front of those of a forward, which are not kept."""

    def __init__(self, text: DynamicCache) -> None:
        super().__init__()
        self.layers = text.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and forward, one behind the other."""
        layer = self.layers[layer_idx]
        assert layer.keys is not None
        assert layer.values is not None
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)


@dataclass(frozen=True)
class Windows:
    """Drafts in flight.

    Attributes:
        pending_BM: position of each window's pending token.
        draft_BMW: the drafts; draft w is a guess for position `pending + 1 + w`.
    """

    pending_BM: torch.Tensor
    draft_BMW: torch.Tensor

    @property
    def position_BMW(self) -> torch.Tensor:
        """Of the drafts."""
        return self.pending_BM[..., None] + 1 + torch.arange(self.draft_BMW.shape[-1], device=self.pending_BM.device)


@dataclass(frozen=True)
class Visit:
    """What a forward over windows came to.

    Attributes:
        loss: weighted sum over the kept slots, with gradient; `weight` is the sum of their weights.
        kept, agreeing: slots that were learnt from, and those of them whose choice is the model's.
        accepted_BM: leading drafts that were right.
        next_BMW: the drafted model's choice at each slot (0 at those not kept).
    """

    loss: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor
    agreeing: torch.Tensor
    accepted_BM: torch.Tensor
    next_BMW: torch.Tensor


def fresh_windows(text: CleanText, pending_BM: torch.Tensor, width: int) -> Windows:
    """Windows as the decoder begins them: all drafts ids of the text so far."""
    offset_W = torch.arange(width, device=pending_BM.device)
    return Windows(pending_BM, _fillers(text, pending_BM, pending_BM[..., None] + 1 + offset_W))


def random_windows(text: CleanText, windows: int, width: int) -> Windows:
    """Fresh windows at random places of the answers, so that at least one token is to be predicted in each."""
    room_B1 = (text.length_B - 1 - text.prompt_B).clamp(min=1)[:, None]
    drawn_BM = torch.rand(len(room_B1), windows, device=room_B1.device)
    return fresh_windows(text, text.prompt_B[:, None] + (drawn_BM * room_B1).long(), width)


def advanced(text: CleanText, windows: Windows, visit: Visit) -> Windows:
    """The windows behind a visit: accepted tokens and the model's own leave at the front, choices move up, fillers follow."""
    width = windows.draft_BMW.shape[-1]
    offset_W = torch.arange(width, device=windows.pending_BM.device)
    pending_BM = windows.pending_BM + visit.accepted_BM + 1
    source_BMW = visit.accepted_BM[..., None] + offset_W
    chosen_BMW = visit.next_BMW.gather(-1, source_BMW.clamp(max=width - 1))
    filler_BMW = _fillers(text, pending_BM, pending_BM[..., None] + 1 + offset_W)
    return Windows(pending_BM, torch.where(source_BMW < width, chosen_BMW, filler_BMW))


def _fillers(text: CleanText, pending_BM: torch.Tensor, position_BMW: torch.Tensor) -> torch.Tensor:
    """What the decoder puts where the model has said nothing yet (`Window.redraft`), behind the tokens up to the pending ones."""
    batch, columns = text.ids_BL.shape
    known_BMW = (pending_BM + 1).clamp(max=columns)[..., None].expand_as(position_BMW)
    index_BMW = position_BMW - text.prompt_B[:, None, None]
    return ids_of_the_text(index_BMW.reshape(batch, -1), text.ids_BL, known_BMW.reshape(batch, -1)).view_as(
        position_BMW
    )


def window_mask(windows: Windows, columns: int, sliding_window: int | None = None) -> torch.Tensor:
    """Who sees whom: a draft sees the text up to its pending token, and its own window up to itself.

    Args:
        columns: L, of the text; the slots of the forward follow.
        sliding_window: positions that a query may look back, itself included.

    Returns:
        bool `(B, 1, Q, L + Q)`.
    """
    batch, count, width = windows.draft_BMW.shape
    position_BQ = windows.position_BMW.reshape(batch, -1)
    column_L = torch.arange(columns, device=position_BQ.device)
    text_BQL = column_L <= windows.pending_BM.repeat_interleave(width, 1)[..., None]
    index_Q = torch.arange(count * width, device=position_BQ.device)
    own_QQ = (index_Q[:, None] // width == index_Q // width) & (index_Q[:, None] >= index_Q)
    own_BQQ = own_QQ.expand(batch, -1, -1)
    if sliding_window is not None:
        first_BQ1 = (position_BQ - sliding_window)[..., None]
        text_BQL = text_BQL & (column_L > first_BQ1)
        own_BQQ = own_BQQ & (position_BQ[:, None] > first_BQ1)
    return torch.cat([text_BQL, own_BQQ], 2)[:, None]


def plain_loss(
    logits_NV: torch.Tensor, label_N: torch.Tensor, weight_N: torch.Tensor, teacher_NV: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sum of the cross entropies, against the labels or a distribution; what `drafting_loss` is checked against."""
    target = label_N if teacher_NV is None else teacher_NV.softmax(-1)
    return F.cross_entropy(logits_NV.float(), target, reduction="none") @ weight_N


def drafting_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_NH: torch.Tensor,
    label_N: torch.Tensor,
    weight_N: torch.Tensor,
    teacher_NH: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss from hidden states, `rows` at a time, and the choice of each row."""
    loss, choices = hidden_NH.new_zeros((), dtype=torch.float32), []

    def part(
        hidden_CH: torch.Tensor, label_C: torch.Tensor, weight_C: torch.Tensor, teacher_CH: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV = head(hidden_CH).float()
        teacher_CV = None
        if teacher_CH is not None:
            with torch.no_grad():
                teacher_CV = head(teacher_CH).float()
        return plain_loss(logits_CV, label_C, weight_C, teacher_CV), best(logits_CV.detach())

    for first in range(0, len(hidden_NH), rows):
        chunk = slice(first, first + rows)
        arguments = (
            hidden_NH[chunk],
            label_N[chunk],
            weight_N[chunk],
            None if teacher_NH is None else teacher_NH[chunk],
        )
        if len(hidden_NH) > rows and torch.is_grad_enabled():
            of_chunk, choice_C = checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            of_chunk, choice_C = part(*arguments)
        loss = loss + of_chunk
        choices.append(choice_C)
    return loss, torch.cat(choices) if choices else label_N


class DraftedModel(torch.nn.Module):
    """A frozen model with a drafter, as training runs it. Its parameters are the drafter's alone.

    Args:
        base: the model; it stays in eval mode and out of this module's state.
        drafter: what is trained.
        targets: `"hard"`, the model's choice, or `"soft"`, its distribution.
        decay: weight of a slot over that of the one before it, from the first wrong draft on.
        chunk_numbers: numbers in a vocabulary-sized tensor of the loss.
    """

    def __init__(
        self, base: Any, drafter: LoraDrafter, targets: str = "hard", decay: float = 1.0, chunk_numbers: int = 2**24
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self._unlisted = [base.eval().requires_grad_(requires_grad=False)]
        self._targets, self._decay = targets, decay
        self._rows = max(1, chunk_numbers // base.config.get_text_config(decoder=True).vocab_size)
        self._at_head = AtHead(base.get_output_embeddings())
        self._masks = MaskBuilder(base.config, base.dtype)

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._unlisted[0]

    @torch.no_grad()
    def read(self, ids_BL: torch.Tensor, prompt_B: torch.Tensor, length_B: torch.Tensor) -> CleanText:
        """Keys, values and choices of texts padded on the right."""
        cache = DynamicCache()  # of no config, so that sliding layers keep everything too
        column_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        asked_BL = (column_L >= prompt_B[:, None] - 1) & (column_L < length_B[:, None])

        def choices(hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked_NH = hidden_RH[asked_BL.flatten()]
            choice_N = torch.cat([best(self._at_head.head(part)) for part in asked_NH.split(self._rows)])
            return torch.zeros_like(ids_BL).masked_scatter(asked_BL, choice_N), hidden_RH

        (choice_BL, hidden_RH), _ = self._at_head(
            lambda: self.base(input_ids=ids_BL, use_cache=True, return_dict=True, **{CACHE: cache}), choices
        )
        return CleanText(ids_BL, prompt_B, length_B, choice_BL, cache, hidden_RH.view(*ids_BL.shape, -1))

    def visit(self, text: CleanText, windows: Windows) -> Visit:
        """One forward over the windows."""
        batch, _, width = windows.draft_BMW.shape
        columns, position_BMW = text.ids_BL.shape[1], windows.position_BMW
        inside_BMW = position_BMW < text.length_B[:, None, None]
        truth_BMW = _at(text.ids_BL, position_BMW)
        right_BMW = (windows.draft_BMW == truth_BMW) & inside_BMW
        accepted_BM = right_BMW.long().cumprod(-1).sum(-1)
        # A slot predicts the position behind its own; it is of use from the first wrong draft on, as far as the answer goes.
        offset_W = torch.arange(width, device=position_BMW.device)
        kept_BMW = (offset_W >= accepted_BM[..., None]) & (position_BMW + 1 < text.length_B[:, None, None])
        kept_R, label_N = kept_BMW.flatten(), _at(text.choice_BL, position_BMW)[kept_BMW]
        # What comes sooner is verified sooner, and decides what of the rest is.
        weight_N = (self._decay ** (offset_W - accepted_BM[..., None]).float())[kept_BMW]
        teacher_NH = None
        if self._targets == "soft":
            row_BMW = torch.arange(batch, device=position_BMW.device)[:, None, None] * columns + position_BMW.clamp(
                max=columns - 1
            )
            teacher_NH = text.hidden_BLH.flatten(0, 1)[row_BMW[kept_BMW]]

        def learn(hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return drafting_loss(self._at_head.head, hidden_RH[kept_R], label_N, weight_N, teacher_NH, self._rows)

        (loss, choice_N), nothing = self._at_head(lambda: self._forward(text, windows), learn)
        next_BMW = torch.zeros_like(windows.draft_BMW).masked_scatter(kept_BMW, choice_N)
        return Visit(loss + nothing, weight_N.sum(), kept_R.sum(), (choice_N == label_N).sum(), accepted_BM, next_BMW)

    def _forward(self, text: CleanText, windows: Windows) -> Any:
        batch, count, width = windows.draft_BMW.shape
        slots, device = count * width, windows.draft_BMW.device
        draft_BQ = self.drafter.shown(windows.draft_BMW.view(batch, slots), slots)
        columns = text.ids_BL.shape[1]
        last = self.base.config.get_text_config(decoder=True).max_position_embeddings - 1
        with self.drafter.attached(self.base), self.drafter.drafting(0, slots, batch):
            return self.base(
                input_ids=draft_BQ,
                position_ids=windows.position_BMW.reshape(batch, slots).clamp(max=last),
                attention_mask=self._masks(lambda sliding: window_mask(windows, columns, sliding), device),
                use_cache=True,
                return_dict=True,
                **{CACHE: BehindText(text.cache)},
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_length: torch.Tensor,
        length: torch.Tensor,
        windows: int,
        width: int,
        visits: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over `visits` visits to `windows` random windows of every text, and `[kept, agreeing, accepted, steps]`."""
        text = self.read(input_ids, prompt_length, length)
        if self.training:
            state = random_windows(text, windows, width)
        else:  # the same places each time, without a draw from the training's generator
            with torch.random.fork_rng(devices=[input_ids.device] if input_ids.is_cuda else []):
                torch.manual_seed(0)
                state = random_windows(text, windows, width)
        loss, weight, totals = (torch.zeros(size, device=input_ids.device) for size in ((), (), 4))
        for number in range(visits):
            running_BM = state.pending_BM < length[:, None] - 1
            visit = self.visit(text, state)
            loss, weight = loss + visit.loss, weight + visit.weight
            totals += torch.stack([visit.kept, visit.agreeing, visit.accepted_BM[running_BM].sum(), running_BM.sum()])
            if number + 1 < visits:
                state = advanced(text, state, visit)
        return loss / weight.clamp(min=1e-6), totals

    @torch.no_grad()
    def tokens_per_forward(
        self, input_ids: torch.Tensor, prompt_length: torch.Tensor, length: torch.Tensor, width: int
    ) -> tuple[int, int]:
        """New tokens, and the forwards (prefill included) in which windows of `width` drafts, all verified, bring the answers about."""
        text = self.read(input_ids, prompt_length, length)
        state = fresh_windows(text, prompt_length[:, None], width)
        forwards = len(length)
        while bool((running_B := state.pending_BM[:, 0] < length - 1).any()):
            forwards += int(running_B.sum())
            visit = self.visit(text, state)
            state = advanced(text, state, visit)
            # Rows that have ended stand still behind their last token.
            state = Windows(torch.minimum(state.pending_BM, length[:, None] - 1), state.draft_BMW)
        return int((length - prompt_length).sum()), forwards


def _at(value_BL: torch.Tensor, position_BMW: torch.Tensor) -> torch.Tensor:
    """Values at positions, those behind the end taken from the last column."""
    batch, columns = value_BL.shape
    return value_BL.gather(1, position_BMW.reshape(batch, -1).clamp(max=columns - 1)).view_as(position_BMW)
