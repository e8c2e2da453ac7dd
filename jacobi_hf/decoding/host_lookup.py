"""The lookup branch of each row, found on the host, for devices whose tensors the host reads at no cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.drafts.lookup import NgramIndex

if TYPE_CHECKING:
    from jacobi_hf.decoding.report import StepReport
    from jacobi_hf.decoding.state import DecodingState


class HostLookup:
    """Looks up how each row's text may go on, and writes the guesses into the state when a step sends them.

    Args:
        state: the rows, opened for the call.
        limit: the most new tokens.
    """

    def __init__(self, state: DecodingState, limit: int) -> None:
        names = state.sources.branch_names
        self._state = state
        self._limit = limit
        self._sources = [number for number, source in enumerate(state.sources.branching) if source.is_on_host]
        self._branches = [names.index(state.sources.branching[number].name) for number in self._sources]
        self._start: list[int] = state.start_B.tolist() if self._sources else []
        self._known = [0] * len(self._start)  # tokens of each row's text that are in its index
        self._indices = [NgramIndex() for _ in self._start]
        self._read: torch.Tensor | None = None
        self._text_BL: Any = None  # the same numbers for NumPy
        self._places = [0] * len(self._start)

    def update(self, report: StepReport) -> None:
        """Take in the new tokens of each row, and note in the report what its lookup branch can have.

        Args:
            report: of the last step; `branches` and `orders` are written.
        """
        if not self._sources:
            return
        if self._read is not self._state.text_BL:  # texts have grown
            self._read = self._state.text_BL
            self._text_BL = self._read.numpy()
        for row, index in enumerate(self._indices):
            length = self._start[row] + report.generated[row]
            room = self._limit - 1 - report.generated[row]
            order = 0
            if not report.ended[row] and room > 0:
                index.extend(self._text_BL[row, self._known[row] : length].tolist())
                self._known[row] = length
                self._places[row], order = index.match()
            report.orders[row] = order
            for branch in self._branches:
                most = self._state.sources.branch_lengths[branch]
                report.branches[branch][row] = min(most, room) if order else 0

    def write(self, sent: tuple[int, ...], report: StepReport) -> None:
        """Write the guesses that a step sends into the state.

        Args:
            sent: guesses of each branch in the step.
            report: of the last step, updated.
        """
        for number, branch in zip(self._sources, self._branches, strict=True):
            if not sent[branch]:
                continue
            lengths = [min(sent[branch], length) for length in report.branches[branch]]
            guesses = [
                index.after(place, sent[branch]) if length else [0] * sent[branch]
                for index, place, length in zip(self._indices, self._places, lengths, strict=True)
            ]
            token_BSN, length_BS = self._state.branches[number]
            token_BSN[:, 0, : sent[branch]] = torch.tensor(guesses)
            length_BS[:, 0] = torch.tensor(lengths)
