"""Acceptance token by token, for processors that must see the exact text before each token.

Such a processor looks at the ids of the whole batch, so all rows move on together, by as many tokens as the row with
the fewest accepted guesses. Each token goes through processors, choice, criteria and streamer before the next one is
looked at, as in ordinary decoding.

Shapes: B rows, Q slots of a forward, S segments, D depths, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from jacobi_hf.decoding.accept import Acceptance
from jacobi_hf.decoding.choice import Choice, best, choose
from jacobi_hf.decoding.selection import accepted_prefixes

if TYPE_CHECKING:
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import StepInputs
    from jacobi_hf.decoding.stopping import Scores, StoppingRules


class OneByOne:
    """Accepts the guesses of a step token by token.

    Args:
        state: the rows.
        selector: processors and sampling noise.
        stopping: criteria, streamer and output ids, which get every token.
        scores, logits: filled if the caller asked for them.
    """

    def __init__(
        self,
        state: DecodingState,
        selector: Selector,
        stopping: StoppingRules,
        scores: Scores | None,
        logits: Scores | None,
    ) -> None:
        self._state = state
        self._selector = selector
        self._stopping = stopping
        self._scores = scores
        self._logits = logits

    def accept(self, inputs: StepInputs, logits_BQV: torch.Tensor) -> Acceptance:
        """Return what the model accepts of a step.

        Slots after the last committed token get the choice without processors, which is a fair guess.
        """
        layout = inputs.layout
        if layout.slots == 1 and not self._state.sources.ranks:
            return self._accept_one(layout, logits_BQV)
        halted_B = self._state.halted_B
        unprocessed = self._unprocessed_choice(inputs, logits_BQV)
        choice_BQ = unprocessed.token_BQ
        path_SD = layout.path_SD[: layout.verified_segments]
        length_BS = inputs.length_BS[:, : layout.verified_segments]
        alive_BS = torch.ones_like(length_BS, dtype=torch.bool)
        for depth in range(path_SD.shape[1]):
            best_B = alive_BS.long().argmax(1)
            token_B = self._next_token(logits_BQV, path_SD[best_B, depth], halted_B)
            # Segments may share slots. Those that are no longer alive write to one place more than there are.
            slot_BS = torch.where(alive_BS, path_SD[:, depth], choice_BQ.shape[1])
            written_BQ = functional.pad(choice_BQ, (0, 1)).scatter(1, slot_BS, token_B[:, None].expand_as(slot_BS))
            choice_BQ = written_BQ[:, :-1]
            self._commit(token_B)
            halted_B = self._halted(halted_B)
            if self._stopping.done or depth + 1 == path_SD.shape[1]:
                break
            guess_BS = inputs.token_BQ[:, path_SD[:, depth + 1]]
            alive_BS = alive_BS & (length_BS > depth) & (guess_BS == token_B[:, None])
            if not alive_BS.any(1).all():
                break
        path_BD = layout.path_SD[best_B]
        agrees_BSN, accepted_BS = accepted_prefixes(layout, inputs.token_BQ, choice_BQ, inputs.length_BS)
        return Acceptance(
            choice_BQ=choice_BQ,
            agrees_BSN=agrees_BSN,
            accepted_BS=accepted_BS,
            best_B=best_B,
            path_BD=path_BD,
            run_BD=choice_BQ.gather(1, path_BD),
            count_B=torch.full_like(best_B, depth + 1),
            halted_B=halted_B,
            ranked_BQR=unprocessed.ranked_BQR,
        )

    def _accept_one(self, layout: Layout, logits_BQV: torch.Tensor) -> Acceptance:
        """Return what the model accepts of a step without guesses: the choice after the pending token."""
        state = self._state
        token_B = self._next_token(logits_BQV, None, state.halted_B)
        self._commit(token_B)
        token_B1 = token_B[:, None]
        return Acceptance(
            choice_BQ=token_B1,
            agrees_BSN=state.nothing_B10,
            accepted_BS=state.zeros_B1,
            best_B=state.zeros_B,
            path_BD=layout.path_SD,
            run_BD=token_B1,
            count_B=state.ones_B,
            halted_B=self._halted(state.halted_B),
        )

    def _halted(self, halted_B: torch.Tensor) -> torch.Tensor:
        """Return which rows have ended after the last token; `halted_B` are those that had before."""
        ended = [end is not None for end in self._stopping.ended]
        if not self._stopping.pads or not any(ended):
            return halted_B
        return torch.tensor(ended, device=halted_B.device)

    def _unprocessed_choice(self, inputs: StepInputs, logits_BQV: torch.Tensor) -> Choice:
        """Return the choice at every slot without processors."""
        noise = self._selector.noise
        if noise is not None and not noise.ahead:
            noise = None
        index_BQ = self._state.generated_B[:, None] + inputs.layout.depth_Q
        return choose(logits_BQV, index_BQ, noise, ranks=self._state.sources.ranks)

    def _next_token(
        self, logits_BQV: torch.Tensor, slot_B: torch.Tensor | None, halted_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the next token of every row, a pad for a row that has halted; record scores and logits.

        Args:
            logits_BQV: logits of all slots.
            slot_B: the slot after which the token comes; None for the first one in every row.
            halted_B: rows that have halted.
        """
        selector = self._selector
        stopping = self._stopping
        rows = len(logits_BQV)
        index = stopping.generated
        if slot_B is None:
            logits_BV = logits_BQV[:, 0].to(torch.float32, copy=True)
        else:
            row_B = torch.arange(rows, device=slot_B.device)
            logits_BV = logits_BQV[row_B, slot_B].to(torch.float32, copy=True)
        scores_BV = selector.processors(stopping.sequences, logits_BV)
        if selector.noise is None:
            token_B = best(scores_BV)
        else:
            selector.noise.draw(index, index, tuple(scores_BV.shape))
            index_B1 = torch.full((rows, 1), index, device=scores_BV.device)
            choice = choose(scores_BV[:, None], index_B1, selector.noise)
            choice.check()
            token_B = choice.token_BQ[:, 0]
        for wanted, value_BV in ((self._scores, scores_BV), (self._logits, logits_BV)):
            if wanted is not None:
                wanted.record(value_BV, [index] * rows)
        return torch.where(halted_B, stopping.pad, token_B) if any(stopping.ended) else token_B

    def _commit(self, token_B: torch.Tensor) -> None:
        """Hand a token of every row to criteria and streamer."""
        stopping = self._stopping
        rows = len(token_B)
        stopping.write(token_B)
        stopping.advance([stopping.generated + 1] * rows, [False] * rows)
