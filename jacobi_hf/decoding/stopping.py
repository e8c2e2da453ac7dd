"""Stopping criteria and streamer, called as `generate` calls them: one token at a time, with the full batch.

Rows run ahead of each other; the *stopping* is the number of tokens that every unfinished row has. It moves on as far as the
slowest row allows, replaying for each index what ordinary decoding does there, and tokens behind a stop are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from jacobi_hf.streaming import StepEvent, StepStreamer

if TYPE_CHECKING:
    from transformers.generation import BaseStreamer

    from jacobi_hf.streaming import Candidate


class Scores:
    """Per-token `(B, V)` tensors that the caller asked for (`output_scores`, `output_logits`), filled row by row."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def record(self, value_BNV: torch.Tensor, first: list[int], count: list[int]) -> None:
        """Store the values of each row's committed tokens at the indices `first .. first + count - 1`."""
        for row, (start, number) in enumerate(zip(first, count, strict=True)):
            while len(self.steps) < start + number:
                self.steps.append(torch.zeros_like(value_BNV[:, 0], dtype=torch.float32))
            for offset in range(number):
                self.steps[start + offset][row] = value_BNV[row, offset]


def token_limit(criteria: StoppingCriteriaList, max_length: int, prompt_columns: int) -> int:
    """Most new tokens that the criteria allow; `max_length` counts the prompt, and applies where they name no length."""
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [max_length]
    return max(1, min(lengths) - prompt_columns)


class StoppingRules:
    """Output ids of the batch, and who has finished.

    Args:
        input_BP: the prompt as the caller gave it, pads included.
        criteria: as `generate` prepared them; a `MaxLengthCriteria` is among them.
        streamer: receives one `(B,)` tensor per token; a `StepStreamer` what `show` tells.
        limit: most new tokens, see `token_limit`.
        pad_token_id: what follows a finished row, or None.
        scores: handed to the criteria when the caller asked for scores.
        one_by_one: replay every token even where all criteria could be answered at once.

    Attributes:
        ids_BT: the output so far, `P + limit` columns and one that is thrown away.
        generated: tokens behind the stopping.
        is_one_by_one: whether criteria or streamer look at every token.
        pads: whether a finished row is followed by pads (it goes on generating where no criterion knows an end token).
        eos_E: ids that end a row.
        ended: per row, its number of tokens once it has finished, else None.
    """

    def __init__(
        self,
        input_BP: torch.Tensor,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        limit: int,
        pad_token_id: int | None,
        scores: Scores | None,
        one_by_one: bool = False,
    ) -> None:
        self._criteria, self._scores = criteria, scores
        self._watcher = streamer if isinstance(streamer, StepStreamer) else None
        self._streamer = None if self._watcher else streamer
        if self._watcher and len(input_BP) > 1:
            raise ValueError(f"{type(streamer).__name__} follows one sequence; this call generates {len(input_BP)}.")
        self._prompt = input_BP.shape[1]
        self.is_one_by_one = (
            one_by_one
            or streamer is not None
            or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in criteria)
        )
        self.limit = limit
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = 0 if pad_token_id is None else pad_token_id
        eos = [c.eos_token_id.to(input_BP.device).view(-1) for c in criteria if type(c) is EosTokenCriteria]
        self.eos_E = torch.cat(eos) if eos else torch.empty(0, dtype=torch.long, device=input_BP.device)
        self.ids_BT = torch.full(
            (len(input_BP), self._prompt + self.limit + 1), self.pad, dtype=torch.long, device=input_BP.device
        )
        self.ids_BT[:, : self._prompt] = input_BP
        self.generated = self._shown = 0
        self.ended: list[int | None] = [None] * len(input_BP)

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return None not in self.ended

    @property
    def is_watched(self) -> bool:
        """Whether somebody follows the forwards; see `show`."""
        return self._watcher is not None

    def show(self, drafts: tuple[Candidate, ...]) -> None:
        """Tell who follows the forwards of one that verified `drafts`, and of what was committed since the one before."""
        if self._watcher is not None:
            token_ids = self.ids_BT[0, self._prompt + self._shown : self._prompt + self.generated].tolist()
            self._shown = self.generated
            self._watcher.step(StepEvent(tuple(token_ids), drafts))

    @property
    def sequences(self) -> torch.Tensor:
        """The output up to the stopping, `(B, P + generated)`."""
        return self.ids_BT[:, : self._prompt + self.generated].clone()

    def output(self, row: int) -> torch.Tensor:
        """Prompt and tokens of a finished row, pads on the left included."""
        return self.ids_BT[row, : self._prompt + (self.ended[row] or 0)]

    def write(self, token_BN: torch.Tensor, first_B: torch.Tensor, count_B: torch.Tensor) -> None:
        """Put the first `count_B` of `token_BN` at the new-token indices from `first_B` on."""
        offset_N = torch.arange(token_BN.shape[1], device=token_BN.device)
        index_BN = torch.where(
            offset_N < count_B[:, None], self._prompt + first_B[:, None] + offset_N, self.ids_BT.shape[1] - 1
        )
        self.ids_BT.scatter_(1, index_BN, token_BN)

    def take(self, text_BL: torch.Tensor, start_B: torch.Tensor, available: list[int]) -> None:
        """Bring the output up to date with the rows' texts, whose new tokens begin at `start_B`; see `advance`."""
        first = self.generated if self.is_one_by_one else 0
        index_N = torch.arange(first, max(available), device=text_BL.device)
        ids_BN = text_BL.gather(1, start_B[:, None] + index_N)
        there_BN = index_N < torch.tensor(available, device=text_BL.device)[:, None]
        self.ids_BT[:, self._prompt + first : self._prompt + max(available)] = ids_BN.where(there_BN, self.pad)

    def advance(self, available: list[int], at_eos: list[bool]) -> list[int]:
        """Move on as far as every unfinished row has tokens.

        Args:
            available: tokens each row has.
            at_eos: whether the row's last token ends it.

        Returns:
            rows that a criterion finished otherwise than by their last token: what they have behind their end is void.
        """
        if not self.is_one_by_one:
            for row, (tokens, stops) in enumerate(zip(available, at_eos, strict=True)):
                if self.ended[row] is None and (stops or tokens >= self.limit):
                    self.ended[row] = tokens
            self.generated = (
                max(available if self.done else [0]) if not self.pads else max(end or 0 for end in self.ended)
            )
            return []
        stopped, available = list[int](), list(available)
        # A criterion that is given scores is given those of finished rows too.
        waits_for_all = not self.pads or self._scores is not None
        while not self.done and self.generated < min(
            a for a, end in zip(available, self.ended, strict=True) if end is None or waits_for_all
        ):
            void = [row for row in self._one_token() if available[row] > self.generated or not at_eos[row]]
            for row in void:
                available[row] = self.generated  # scores of what it has after its end are computed anew, after pads
            stopped += void
        return stopped

    def _one_token(self) -> list[int]:
        column = self._prompt + self.generated
        finished = torch.tensor([end is not None for end in self.ended], device=self.ids_BT.device)
        if self.pads:
            self.ids_BT[:, column].masked_fill_(finished, self.pad)
        self.generated += 1
        scores = None if self._scores is None else tuple(self._scores.steps[: self.generated])
        stops = self._criteria(self.sequences, scores).tolist()
        newly = [row for row, stop in enumerate(stops) if stop and self.ended[row] is None]
        for row in newly:
            self.ended[row] = self.generated
        if self._streamer is not None:
            self._streamer.put(self.ids_BT[:, column].clone().cpu())
        return newly if self.pads else []
