"""A frozen model with a drafter, as training runs them: decoding steps of windows in a clean text, and their losses.

A training step reads a text once through the model alone. Then windows at random places of it make a few decoding
steps. In each step the draft tokens run through model and drafter, after the keys and values of the text. The model
accepts the first draft tokens that are right and adds one token of its own. The drafter's choices at the remaining
slots are the next draft tokens. The drafter learns at these slots, since the model's choice there is known from the
text.

Shapes: B rows, L text columns, M windows of a row, W draft tokens of a window, Q = M * W slots, R rows of hidden
states (all slots of a batch, flattened), X those of them that carry a loss, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from jacobi_hf.attention.interface import MaskBuilder
from jacobi_hf.decoding.choice import best
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.trainer.base import output_head, vocabulary_size
from jacobi_hf.trainer.drafter.loss import drafting_loss
from jacobi_hf.trainer.drafter.windows import (
    CleanText,
    Windows,
    WindowStep,
    advanced,
    fresh_windows,
    random_windows,
    window_mask,
)
from jacobi_hf.trainer.head_hook import AtHead

if TYPE_CHECKING:
    from jacobi_hf.drafts.lora import LoraDrafter


class ReadOnlyCache(DynamicCache):
    """The keys and values of a text, for forwards that attend to them and add none of their own."""

    def __init__(self, text: DynamicCache) -> None:
        super().__init__()
        self.layers = text.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the text's keys and values of a layer, followed by those of the forward."""
        layer = self.layers[layer_idx]
        assert layer.keys is not None
        assert layer.values is not None
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)


class ModelWithDrafter(torch.nn.Module):
    """A frozen model with a drafter, whose forward is the loss of the drafter. Its parameters are the drafter's alone.

    Args:
        base: the model. It stays in eval mode, and out of this module's state.
        drafter: the drafter that is trained.
        targets: `"hard"`, the model's choice, or `"soft"`, its distribution.
        position_decay: weight of a slot over that of the slot before it, from the first wrong draft token on.
        chunk_numbers: most numbers in a vocabulary-sized tensor of the loss.
    """

    def __init__(
        self,
        base: Any,
        drafter: LoraDrafter,
        targets: str = "hard",
        position_decay: float = 1.0,
        chunk_numbers: int = 2**24,
    ) -> None:
        super().__init__()
        self.drafter = drafter
        # In a list, so that torch does not count the model's weights as this module's.
        self._unlisted = [base.eval().requires_grad_(requires_grad=False)]
        self._targets = targets
        self._decay = position_decay
        self._chunk_rows = max(1, chunk_numbers // vocabulary_size(base))
        self._at_head = AtHead(output_head(base))
        self._masks = MaskBuilder(base.config, base.dtype)

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._unlisted[0]

    @torch.no_grad()
    def read(self, ids_BL: torch.Tensor, prompt_B: torch.Tensor, length_B: torch.Tensor) -> CleanText:
        """Run texts through the model alone.

        Args:
            ids_BL: prompts and answers, padded on the right.
            prompt_B: tokens of each prompt.
            length_B: tokens of each prompt and its answer.

        Returns:
            The texts with the model's keys, values, choices and hidden states.
        """
        cache = DynamicCache()  # without a config, so that sliding layers keep all keys too
        column_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        is_asked_BL = (column_L >= prompt_B[:, None] - 1) & (column_L < length_B[:, None])

        def choices(hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked_XH = hidden_RH[is_asked_BL.flatten()]
            choice_X = torch.cat([best(self._at_head.head(part)) for part in asked_XH.split(self._chunk_rows)])
            return torch.zeros_like(ids_BL).masked_scatter(is_asked_BL, choice_X), hidden_RH

        (choice_BL, hidden_RH), _ = self._at_head(
            lambda: self.base(input_ids=ids_BL, use_cache=True, return_dict=True, **{CACHE: cache}), choices
        )
        return CleanText(ids_BL, prompt_B, length_B, choice_BL, cache, hidden_RH.view(*ids_BL.shape, -1))

    def step(self, text: CleanText, windows: Windows) -> WindowStep:
        """Make one decoding step of all windows, and return its outcome with the loss of the drafter."""
        width = windows.draft_BMW.shape[-1]
        position_BMW = windows.position_BMW
        is_inside_BMW = position_BMW < text.length_B[:, None, None]
        is_right_BMW = (windows.draft_BMW == _at(text.ids_BL, position_BMW)) & is_inside_BMW
        accepted_BM = is_right_BMW.long().cumprod(-1).sum(-1)
        # A slot predicts the position after its own. It is of use from the first wrong draft token to the answer's
        # end.
        offset_W = torch.arange(width, device=position_BMW.device)
        has_next_BMW = position_BMW + 1 < text.length_B[:, None, None]
        is_kept_BMW = (offset_W >= accepted_BM[..., None]) & has_next_BMW
        is_kept_R = is_kept_BMW.flatten()
        label_X = _at(text.choice_BL, position_BMW)[is_kept_BMW]
        # What comes sooner is verified sooner, and decides whether the rest is verified at all.
        weight_X = (self._decay ** (offset_W - accepted_BM[..., None]).float())[is_kept_BMW]
        teacher_XH = self._teacher(text, position_BMW, is_kept_BMW) if self._targets == "soft" else None

        def learn(hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_XH = hidden_RH[is_kept_R]
            return drafting_loss(self._at_head.head, hidden_XH, label_X, weight_X, teacher_XH, self._chunk_rows)

        (loss, choice_X), zero = self._at_head(lambda: self._forward(text, windows), learn)
        next_BMW = torch.zeros_like(windows.draft_BMW).masked_scatter(is_kept_BMW, choice_X)
        agreeing = (choice_X == label_X).sum()
        return WindowStep(loss + zero, weight_X.sum(), is_kept_R.sum(), agreeing, accepted_BM, next_BMW)

    @staticmethod
    def _teacher(text: CleanText, position_BMW: torch.Tensor, is_kept_BMW: torch.Tensor) -> torch.Tensor:
        """Return the model's hidden states `(X, H)` at the positions of the kept slots."""
        rows, columns = text.ids_BL.shape
        row_B11 = torch.arange(rows, device=position_BMW.device)[:, None, None]
        index_BMW = row_B11 * columns + position_BMW.clamp(max=columns - 1)
        return text.hidden_BLH.flatten(0, 1)[index_BMW[is_kept_BMW]]

    def _forward(self, text: CleanText, windows: Windows) -> Any:
        """Run the draft tokens of all windows through model and drafter, after the keys and values of the text."""
        rows, count, width = windows.draft_BMW.shape
        slots = count * width
        columns = text.ids_BL.shape[1]
        last = columns - 1  # nothing is learnt after the text, and the model may have no more positions
        draft_BQ = self.drafter.replace_drafts(windows.draft_BMW.view(rows, slots), slots)
        with self.drafter.attached(self.base), self.drafter.drafting(0, slots, rows):
            return self.base(
                input_ids=draft_BQ,
                position_ids=windows.position_BMW.reshape(rows, slots).clamp(max=last),
                attention_mask=self._masks(lambda sliding: window_mask(windows, columns, sliding), draft_BQ.device),
                use_cache=True,
                return_dict=True,
                **{CACHE: ReadOnlyCache(text.cache)},
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_length: torch.Tensor,
        length: torch.Tensor,
        windows_per_text: int,
        window_width: int,
        steps_per_window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss over steps of random windows, and four counts.

        In eval mode the windows are at the same places in each call.

        Args:
            input_ids: `(B, L)`, prompts and answers, padded on the right.
            prompt_length: `(B,)`, tokens of each prompt.
            length: `(B,)`, tokens of each prompt and its answer.
            windows_per_text: M, windows of each text.
            window_width: W, draft tokens of a window.
            steps_per_window: decoding steps of each window.

        Returns:
            the loss, and `(4,)`: kept slots, kept slots where the drafter agrees with the model, accepted draft
            tokens, and steps of windows that had not reached the end of their text.
        """
        text = self.read(input_ids, prompt_length, length)
        if self.training:
            windows = random_windows(text, windows_per_text, window_width)
        else:  # without a draw from the training's generator
            with torch.random.fork_rng(devices=[input_ids.device] if input_ids.is_cuda else []):
                torch.manual_seed(0)
                windows = random_windows(text, windows_per_text, window_width)
        loss = torch.zeros((), device=input_ids.device)
        weight = torch.zeros((), device=input_ids.device)
        totals = torch.zeros(4, device=input_ids.device)
        for number in range(steps_per_window):
            is_running_BM = windows.pending_BM < length[:, None] - 1
            step = self.step(text, windows)
            loss = loss + step.loss
            weight = weight + step.weight
            accepted = step.accepted_BM[is_running_BM].sum()
            totals += torch.stack([step.kept, step.agreeing, accepted, is_running_BM.sum()])
            if number + 1 < steps_per_window:
                windows = advanced(text, windows, step)
        return loss / weight.clamp(min=1e-6), totals

    @torch.no_grad()
    def decode_answers(
        self, input_ids: torch.Tensor, prompt_length: torch.Tensor, length: torch.Tensor, window_width: int
    ) -> tuple[int, int]:
        """Decode the answers greedily, one window for each, and count tokens and forwards.

        The tokens are known, so only their number of forwards is found out: prefill, and one for each step of a window
        of `window_width` draft tokens that are all verified.

        Args:
            input_ids: `(B, L)`, prompts and the model's own greedy answers, padded on the right.
            prompt_length: `(B,)`, tokens of each prompt.
            length: `(B,)`, tokens of each prompt and its answer.
            window_width: W, draft tokens of a window.

        Returns:
            new tokens and forwards, over all rows.
        """
        text = self.read(input_ids, prompt_length, length)
        windows = fresh_windows(text, prompt_length[:, None], window_width)
        forwards = len(length)
        while bool((is_running_B := windows.pending_BM[:, 0] < length - 1).any()):
            forwards += int(is_running_B.sum())
            step = self.step(text, windows)
            windows = advanced(text, windows, step)
            # The window of a row that has ended stays at the last token.
            windows = Windows(torch.minimum(windows.pending_BM, length[:, None] - 1), windows.draft_BMW)
        return int((length - prompt_length).sum()), forwards


def _at(value_BL: torch.Tensor, position_BMW: torch.Tensor) -> torch.Tensor:
    """Return the values at positions; positions after the last column take its value."""
    rows, columns = value_BL.shape
    return value_BL.gather(1, position_BMW.reshape(rows, -1).clamp(max=columns - 1)).view_as(position_BMW)
