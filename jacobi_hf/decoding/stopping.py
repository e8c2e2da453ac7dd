"""Stopping rules: criteria and streamers, called as `generate` calls them, once for each token with the full batch.

A step commits several tokens, and not the same number to each row. So tokens are replayed after the step. The rules
know how many tokens every unfinished row has. Up to there, they do for each token what ordinary decoding does; then
they wait for the slowest row. Tokens after a stop are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from jacobi_hf.streaming import StepEvent, StepStreamer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.generation import BaseStreamer

    from jacobi_hf.streaming import Candidate

LEAST_ROOM = 64  # columns by which the output grows at least


class Scores:
    """Scores or logits of each new token, as `output_scores` and `output_logits` return them, filled in row by row.

    Attributes:
        steps: for each new token, float32 `(B, V)`.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def record(self, value_BV: torch.Tensor, indices: Sequence[int | None]) -> None:
        """Store the values of a committed token of each row.

        Args:
            value_BV: the values.
            indices: for each row, the index of its new token; None if it has none.
        """
        for row, index in enumerate(indices):
            if index is None:
                continue
            while len(self.steps) <= index:
                self.steps.append(torch.zeros_like(value_BV, dtype=torch.float32))
            self.steps[index][row] = value_BV[row]


def token_limit(criteria: StoppingCriteriaList, max_length: int, prompt_columns: int) -> int:
    """Return the most new tokens that a call may generate, at least 1.

    Args:
        criteria: the call's criteria. Each `MaxLengthCriteria` among them is a limit.
        max_length: the limit where there is no `MaxLengthCriteria`; like theirs, it counts the prompt.
        prompt_columns: columns of the prompt, pads included.
    """
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [max_length]
    return max(1, min(lengths) - prompt_columns)


class StoppingRules:
    """Output ids of a batch and the rules that end its rows; they replay tokens to criteria and streamers.

    Args:
        input_BP: the prompt as the caller gave it, pads included.
        criteria: the call's criteria, as `generate` prepared them; a `MaxLengthCriteria` is among them.
        streamer: receives `(B,)` token ids, one token at a time. A `StepStreamer` receives what `report_step` is given
            instead.
        limit: most new tokens, from `token_limit`.
        pad_token_id: follows the end of a finished row; None counts as 0.
        scores: passed to the criteria if the caller asked for scores.
        one_by_one: whether to replay every token even if no criterion and no streamer needs it.

    Attributes:
        ids_BL: the output so far, and pads in some columns after it.
        generated: new tokens that have been replayed.
        is_one_by_one: whether every token is replayed.
        pads: whether pads follow a finished row. Without an end token they do not: the row goes on until all rows are
            finished.
        pad: the id of a pad.
        eos_E: ids that end a row.
        limit: most new tokens.
        ended: for each row, its number of new tokens once it has finished, else None.

    Raises:
        ValueError: a `StepStreamer` is to follow more than one sequence.
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
        batch, self._prompt = input_BP.shape
        self._criteria = criteria
        self._scores = scores
        self._step_streamer = streamer if isinstance(streamer, StepStreamer) else None
        self._streamer = None if self._step_streamer else streamer
        if self._step_streamer and batch > 1:
            raise ValueError(f"{type(streamer).__name__} follows one sequence; this call generates {batch}.")
        is_simple = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria)
        self.is_one_by_one = one_by_one or streamer is not None or not is_simple
        self.limit = limit
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = 0 if pad_token_id is None else pad_token_id
        eos = [c.eos_token_id.to(input_BP.device).view(-1) for c in criteria if type(c) is EosTokenCriteria]
        self.eos_E = torch.cat(eos) if eos else torch.empty(0, dtype=torch.long, device=input_BP.device)
        self.ids_BL = input_BP.long()  # is not written to before it has grown
        self.generated = 0
        self._reported = 0  # tokens that the step streamer has received
        self._seen_BL: torch.Tensor | None = None  # `sequences` after the last token, for criteria and processors
        self.ended: list[int | None] = [None] * batch

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return None not in self.ended

    @property
    def has_step_streamer(self) -> bool:
        """Whether the streamer is a `StepStreamer`, which `report_step` reports to."""
        return self._step_streamer is not None

    def report_step(self, candidates: tuple[Candidate, ...], shape: str) -> None:
        """Report a forward to the step streamer, if there is one.

        Args:
            candidates: what the forward verified. The report also has the tokens that were replayed since the report
                before.
            shape: the shape of the step in words.
        """
        if self._step_streamer is not None:
            token_ids = self.ids_BL[0, self._prompt + self._reported : self._prompt + self.generated].tolist()
            self._reported = self.generated
            self._step_streamer.step(StepEvent(tuple(token_ids), candidates, shape))

    @property
    def sequences(self) -> torch.Tensor:
        """The output as far as it has been replayed, `(B, P + generated)`."""
        columns = self._prompt + self.generated
        if self._seen_BL is None or self._seen_BL.shape[1] != columns:
            # The columns of one row lie in memory as a tensor of their own would.
            view_BL = self.ids_BL[:, :columns]
            self._seen_BL = view_BL if len(view_BL) == 1 else view_BL.clone()
        return self._seen_BL

    def output(self, row: int) -> torch.Tensor:
        """Return prompt and new tokens of a finished row, pads on the left included."""
        return self.ids_BL[row, : self._prompt + (self.ended[row] or 0)]

    def write(self, token_B: torch.Tensor) -> None:
        """Write the next token of every row into the output, after those that have been replayed."""
        self._make_room(self.generated + 1)
        self.ids_BL[:, self._prompt + self.generated] = token_B

    def _make_room(self, tokens: int) -> None:
        """Make room for so many new tokens in the output, and for a quarter more columns, up to the limit."""
        columns = self._prompt + tokens
        before = self.ids_BL.shape[1]
        if columns > before:
            room = max(columns, min(columns + columns // 4 + LEAST_ROOM, self._prompt + self.limit))
            added_BL = self.ids_BL.new_full((len(self.ids_BL), room - before), self.pad)
            self.ids_BL = torch.cat([self.ids_BL, added_BL], 1)

    def copy_texts(self, text_BL: torch.Tensor, start_B: torch.Tensor, available: list[int]) -> None:
        """Copy the new tokens of each row's text into the output.

        Args:
            text_BL: ids of each row, without pads on the left.
            start_B: where each row's new tokens begin.
            available: new tokens of each row.
        """
        self._make_room(max(self.generated, *available))
        first = self.generated if self.is_one_by_one else 0
        index_N = torch.arange(first, max(available), device=text_BL.device)
        ids_BN = text_BL.gather(1, start_B[:, None] + index_N)
        there_BN = index_N < torch.tensor(available, device=text_BL.device)[:, None]
        self.ids_BL[:, self._prompt + first : self._prompt + max(available)] = ids_BN.where(there_BN, self.pad)

    def advance(self, available: list[int], at_eos: list[bool]) -> list[int]:
        """Replay tokens as far as every unfinished row has them, and note which rows have finished.

        Args:
            available: new tokens of each row.
            at_eos: whether the last one of them is an end token.

        Returns:
            rows that a criterion ended at another token than their last one. Whatever such a row has after its end is
            void.
        """
        if not self.is_one_by_one:
            self._end_rows(available, at_eos)
            return []
        stopped = list[int]()
        available = list(available)
        # A criterion that is given scores is given those of finished rows too.
        waits_for_all = not self.pads or self._scores is not None
        while not self.done and self.generated < min(
            tokens for tokens, end in zip(available, self.ended, strict=True) if end is None or waits_for_all
        ):
            void = [row for row in self._replay_token() if available[row] > self.generated or not at_eos[row]]
            for row in void:
                available[row] = self.generated  # scores after its end are computed again, after pads
            stopped += void
        return stopped

    def _end_rows(self, available: list[int], at_eos: list[bool]) -> None:
        """Do what replaying the tokens would do if only end tokens and the limit can end a row."""
        for row, (tokens, stops) in enumerate(zip(available, at_eos, strict=True)):
            if self.ended[row] is None and (stops or tokens >= self.limit):
                self.ended[row] = tokens
        if self.pads:
            self.generated = max(end or 0 for end in self.ended)
        else:
            self.generated = max(available) if self.done else 0

    def _replay_token(self) -> list[int]:
        """Call criteria and streamer for one token; return the rows that end here, none if rows are never padded."""
        column = self._prompt + self.generated
        ended = [end is not None for end in self.ended]
        if self.pads and any(ended):
            self.ids_BL[:, column].masked_fill_(torch.tensor(ended, device=self.ids_BL.device), self.pad)
        self.generated += 1
        scores = None if self._scores is None else tuple(self._scores.steps[: self.generated])
        stops = self._criteria(self.sequences, scores).tolist()
        ending = [row for row, stop in enumerate(stops) if stop and self.ended[row] is None]
        for row in ending:
            self.ended[row] = self.generated
        if self._streamer is not None:
            self._streamer.put(self.ids_BL[:, column].clone().cpu())
        return ending if self.pads else []
