"""Jacobi iteration of all blocks of several answers together, which `collect_trajectories` runs.

Each block iterates on its own: it sees the prompt and the final answer before it, never the drafts of another block.
So one forward pass can hold the blocks of all answers, over the keys and values that `generate` has left.

Suffixes of tensor names: B answers, T blocks of an answer, n tokens of a block, L text columns, Q slots of a forward
pass, K key columns, C key columns of prompt and answer, V vocabulary, R slots that sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from jacobi_hf.attention.interface import MaskBuilder
from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.choice import best
from jacobi_hf.decoding.noise import set_generator_state
from jacobi_hf.drafts.window import ids_of_the_text
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.trainer.data.answers import pad_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

    from jacobi_hf.trainer.data.trajectories import State


@dataclass(frozen=True)
class SampledNoise:
    """The sampling noise of a batch of answers, so that iteration chooses with the noise that `generate` chose with.

    Attributes:
        state: state of the generator before the answers were sampled.
        batch: number of answers in that batch.
        rows: for each answer here, its row in that batch.
        starts: for each answer here, the tokens of the answer before its first block.
    """

    state: torch.Tensor
    batch: int
    rows: list[int]
    starts: list[int]


@dataclass
class BlockIteration:
    """The blocks of several answers, from their drafts to their fixed points.

    Attributes:
        model: a causal LM.
        prompts: token ids of each prompt.
        answers: token ids of each answer.
        block_size: n.
        warpers: processors of the scores before a token is sampled.
        noise: sampling noise of the answers; None if they are greedy.
    """

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    answers: list[list[int]]
    block_size: int
    warpers: LogitsProcessorList
    noise: SampledNoise | None
    _states: list[torch.Tensor] = field(default_factory=list)
    _unsettled: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.model.device
        n = self.block_size
        batch = len(self.prompts)
        blocks = max(-(-len(answer) // n) for answer in self.answers)
        pad = pad_id(self.model)
        self._length_B = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        answer_length_B = torch.tensor([len(answer) for answer in self.answers], device=device)
        self._columns = int((self._length_B + answer_length_B).max())
        fixed = [[*answer, *[pad] * (blocks * n - len(answer))] for answer in self.answers]
        self._fixed_BTn = torch.tensor(fixed, device=device).view(batch, blocks, n)
        first_T = torch.arange(blocks, device=device) * n
        self._valid_BT = (answer_length_B[:, None] - first_T).clamp(0, n)
        self._inside_BTn = torch.arange(n, device=device) < self._valid_BT[..., None]
        self._state_BTn = torch.where(self._inside_BTn, self._draft(pad), pad)
        self._masks = MaskBuilder(self.model.config, self.model.dtype)
        self._cache = JacobiStaticCache(self.model.config, batch, self._columns + blocks * n, device)

    def _draft(self, pad: int) -> torch.Tensor:
        """Return the first state of each block, `(B, T, n)`.

        `decoding="jacobi"` drafts in the same way: from the ids of the prompt and of the answer up to the block's
        first token.
        """
        n = self.block_size
        batch, blocks, _ = self._fixed_BTn.shape
        texts = [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        text_BL = torch.tensor(
            [text + [pad] * (self._columns - len(text)) for text in texts], device=self.model.device
        )
        index_BL = torch.arange(blocks * n, device=self.model.device).expand(batch, -1)
        known_BL = (self._length_B[:, None] + (index_BL // n) * n + 1).clamp(max=self._columns)
        draft_BL = ids_of_the_text(index_BL, text_BL, known_BL)
        first_is_known_BL = torch.where(index_BL % n == 0, self._fixed_BTn.view(batch, -1), draft_BL)
        return first_is_known_BL.view(batch, blocks, n)

    def load(self, clean: DynamicCache, pads: list[int], rows: list[int]) -> None:
        """Copy the keys and values of prompts and answers.

        Args:
            clean: cache of the batch in which the answers were written.
            pads: for each answer here, the pads on the left of its row in that cache.
            rows: for each answer here, its row in that cache.
        """
        device = self.model.device
        column_L = torch.arange(int(clean.get_seq_length()), device=device)
        place_BL = column_L - torch.tensor(pads, device=device)[:, None]
        self._cache.load(clean, place_BL, torch.tensor(rows, device=device))
        # Every forward writes its slots after the longest row.
        self._cache.lengths_B.fill_(self._columns)

    def iterate(self) -> None:
        """Iterate until every block is at its fixed point, and keep each state on the way."""
        with torch.no_grad():
            while True:
                wrong_BTn = (self._state_BTn != self._fixed_BTn) & self._inside_BTn
                unsettled_BT = wrong_BTn.any(-1)
                if not bool(unsettled_BT.any()):
                    return
                self._states.append(self._state_BTn.cpu())
                self._unsettled.append(unsettled_BT.cpu())
                self._advance(wrong_BTn.long().argmax(-1), unsettled_BT)

    def states(self) -> list[list[list[State]]]:
        """Return, for each answer and each of its blocks, the states before the fixed point."""
        n = self.block_size
        states: list[list[list[State]]] = [[[] for _ in range(-(-len(answer) // n))] for answer in self.answers]
        for state_BTn, unsettled_BT in zip(self._states, self._unsettled, strict=True):
            for row, block in unsettled_BT.nonzero().tolist():
                states[row][block].append(state_BTn[row, block].tolist())
        return states

    def _advance(self, wrong_BT: torch.Tensor, unsettled_BT: torch.Tensor) -> None:
        """Run one Jacobi iteration of the unsettled blocks.

        Args:
            wrong_BT: the first slot of each block that differs from the fixed point.
            unsettled_BT: whether a block differs from its fixed point.
        """
        batch, blocks, n = self._state_BTn.shape
        slot_n = torch.arange(n, device=wrong_BT.device)
        # The model's choice for the first wrong slot is known from the answer, so only the slots from there on are
        # computed. The last slot of an answer predicts nothing that is needed.
        needed_BTn = (
            unsettled_BT[..., None] & (slot_n >= wrong_BT[..., None]) & (slot_n < self._valid_BT[..., None] - 1)
        )
        corrected_BTn = torch.where(slot_n == wrong_BT[..., None], self._fixed_BTn, self._state_BTn)
        needed_BL = needed_BTn.view(batch, -1)
        width = int(needed_BL.sum(1).max())
        if width:
            index_BQ = (~needed_BL).long().argsort(dim=1, stable=True)[:, :width]
            used_BQ = needed_BL.gather(1, index_BQ)
            choice_BQ = self._choose(self._forward(index_BQ, used_BQ, wrong_BT), index_BQ, used_BQ)
            # Slots that are not used write to an extra column, which is then cut off.
            target_BQ = torch.where(used_BQ, index_BQ + 1, blocks * n)
            with_extra_BL = torch.nn.functional.pad(corrected_BTn.view(batch, -1), (0, 1))
            corrected_BTn = with_extra_BL.scatter(1, target_BQ, choice_BQ)[:, :-1].view(batch, blocks, n)
        self._state_BTn = corrected_BTn

    def _forward(self, index_BQ: torch.Tensor, used_BQ: torch.Tensor, wrong_BT: torch.Tensor) -> torch.Tensor:
        """Return the logits `(B, Q, V)` of some slots. Each block follows its own prefix, which is correct.

        Args:
            index_BQ: offsets of the slots in the answer.
            used_BQ: whether a slot is used; the others fill up the row.
            wrong_BT: the first wrong slot of each block.
        """
        n = self.block_size
        columns = self._columns
        position_BQ = self._length_B[:, None] + index_BQ
        block_BQ = index_BQ // n
        # Correct tokens before the first wrong one of each slot's block.
        clean_BQ = self._length_B[:, None] + block_BQ * n + wrong_BT.gather(1, block_BQ)
        column_K = self._cache.columns(index_BQ.shape[1], columns)
        self._cache.open_step(index_BQ.shape[1], column_K)

        def mask(window: int | None) -> torch.Tensor:
            column_C = column_K[:columns]
            clean_BQC = column_C < clean_BQ[..., None]
            own_BQQ = (
                (block_BQ[..., None] == block_BQ[:, None])
                & (index_BQ[..., None] >= index_BQ[:, None])
                & used_BQ[:, None]
            )
            if window is not None:
                clean_BQC &= column_C > position_BQ[..., None] - window
                own_BQQ &= index_BQ[:, None] > index_BQ[..., None] - window
            allowed_BQK = torch.cat([clean_BQC, own_BQQ], -1)
            return torch.nn.functional.pad(allowed_BQK, (0, len(column_K) - allowed_BQK.shape[-1]))[:, None]

        outputs = self.model(
            input_ids=self._state_BTn.view(len(index_BQ), -1).gather(1, index_BQ),
            attention_mask=self._masks(mask, self.model.device),
            position_ids=position_BQ,
            use_cache=True,
            **{CACHE: self._cache},
        )
        logits_BQV: torch.Tensor = outputs.logits
        return logits_BQV

    def _choose(self, logits_BQV: torch.Tensor, index_BQ: torch.Tensor, used_BQ: torch.Tensor) -> torch.Tensor:
        """Return the model's token after each slot: the greedy one, or the one sampled with the answer's noise."""
        if self.noise is None:
            return best(logits_BQV)
        device = logits_BQV.device
        choice_BQ = torch.zeros_like(index_BQ)
        set_generator_state(device, self.noise.state)
        noise_BV = torch.empty(self.noise.batch, logits_BQV.shape[-1], device=device)
        own_B = torch.tensor(self.noise.rows, device=device)
        after_BQ = index_BQ + 1 + torch.tensor(self.noise.starts, device=device)[:, None]
        # Noise is drawn for one new token at a time, since that of a whole answer would take as much memory as the
        # logits.
        for index in range(self._fixed_BTn.shape[1] * self.block_size + max(self.noise.starts)):
            noise_BV.exponential_()
            row_R, slot_R = ((after_BQ == index) & used_BQ).nonzero(as_tuple=True)
            if len(row_R):
                scores_RV = self.warpers(None, logits_BQV[row_R, slot_R].float())
                choice_BQ[row_R, slot_R] = best(scores_RV.softmax(-1) / noise_BV[own_B[row_R]])
        return choice_BQ
