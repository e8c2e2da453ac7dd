"""The state of all rows of a call: tensors that keep their address from step to step, until they grow.

Shapes: B rows, S segments, N guesses of a segment, D depths (D = 1 + N), W backbone guesses, L text columns, E end
tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jacobi_hf.decoding.step import StepInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.accept import Acceptance
    from jacobi_hf.decoding.cache import JacobiStaticCache
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.prompt import Prompt
    from jacobi_hf.decoding.step import StepShape
    from jacobi_hf.drafts.sources import Sources


class DecodingState:
    """Text, cache, guesses and counters of every row, to be opened for a call and moved on by its steps.

    Args:
        sources: the draft sources of the call; their buffers are allocated here.
        cache: keys and values of every committed token but the pending one. The texts get as much room as the cache.
        room_for: function of the columns that a step needs. It returns how many to make room for if these are too
            many. By default that is exactly as many.

    Attributes:
        generated_B: new tokens of each row, the pending one included.
        halted_B: whether a row has ended.
        text_BL: prompt and new tokens of each row without pads; `length_B` of them count, and the last one is pending.
        start_B: the place of each row's first new token in its text.
        front_BD: the pending token, then the guesses of the backbone, `D = 1 + W`.
        width_B: valid guesses of the backbone.
        branches: for each source with branches, its guesses `(B, S, N)` and their valid lengths `(B, S)`.
        report_N: what the host reads after a step; see `report`.
    """

    REPORTED = 7  # numbers for each row in a report, before those of the branches

    def __init__(
        self, sources: Sources, cache: JacobiStaticCache, room_for: Callable[[int], int] | None = None
    ) -> None:
        device = cache.lengths_B.device
        rows = len(cache.lengths_B)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.sources = sources
        self.cache = cache
        self._room_for = room_for
        for source in sources.all:
            source.allocate(rows, cache.capacity, cache.capacity, device)
        self.generated_B = zeros(rows)
        self.halted_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.text_BL = zeros(rows, len(cache.column_C))
        self.length_B = zeros(rows)
        self.start_B = zeros(rows)
        self.front_BD = zeros(rows, 1 + sources.width)
        self.width_B = zeros(rows)
        shapes = [source.shape for source in sources.branching]
        self.branches = [(zeros(rows, len(s.lengths), max(s.lengths)), zeros(rows, len(s.lengths))) for s in shapes]
        starts = [torch.tensor(s.starts, device=device) if any(s.starts) else None for s in shapes]
        self._starts: list[torch.Tensor | None] = starts
        self.report_N = zeros((self.REPORTED + 2 * len(sources.branch_names)) * rows)
        self._no_branches_N = zeros(2 * len(sources.branch_names) * rows)
        self._pending_B1 = self.front_BD[:, :1]
        self._length_B1 = self.length_B[:, None]
        self.pad = zeros()
        self.eos_E = zeros(0)
        self.fills = False
        self.zeros_B = zeros(rows)
        self.zeros_B1 = self.zeros_B[:, None]
        self.nothing_B10 = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        self.ones_B = zeros(rows) + 1
        self._limit = zeros()
        self._last = zeros()

    def open(self, prompt: Prompt, limit: int, pad: int, eos_E: torch.Tensor, *, fills: bool) -> None:
        """Begin a call.

        Args:
            prompt: the prompt of every row; the cache holds what came before it.
            limit: the most new tokens.
            pad: the id that follows a finished row.
            eos_E: ids that end a row.
            fills: whether finished rows go on, as pads, because the caller gets their cache or scores.
        """
        for buffer in (self.generated_B, self.halted_B, self.width_B):
            buffer.zero_()
        for source in self.sources.all:
            source.reset()
        self.text_BL[:, : prompt.text_BL.shape[1]] = prompt.text_BL
        self.start_B.copy_(prompt.text_length_B)
        self.length_B.copy_(prompt.text_length_B)
        self.pad.fill_(pad)
        self.eos_E = eos_E
        self.fills = fills
        self._limit.fill_(limit)
        self._last.fill_(limit - 1)  # the token that a step adds itself comes after its guesses

    def reserve(self, columns: int) -> None:
        """Make sure that cache, texts and sources have room for so many columns.

        Buffers that are too small are replaced by larger ones with the same contents. The host knows how many columns
        a step may use, so nothing is read from the device.

        Args:
            columns: of the cache with the slots of a step, or of the text with the tokens that the step may add.
        """
        if columns <= self.cache.capacity:
            return
        capacity = columns if self._room_for is None else self._room_for(columns)
        self.cache.grow(capacity)
        text_BL = self.text_BL
        self.text_BL = text_BL.new_zeros(len(text_BL), len(self.cache.column_C))
        self.text_BL[:, : text_BL.shape[1]] = text_BL
        for source in self.sources.all:
            source.grow(capacity, capacity)

    @property
    def pending_B1(self) -> torch.Tensor:
        """The last token of each row, whose keys and values are not in the cache yet."""
        return self._pending_B1

    @property
    def backbone_BW(self) -> torch.Tensor:
        """The guesses of the backbone, a view."""
        return self.front_BD[:, 1:]

    @property
    def key(self) -> tuple[int, int, bool]:
        """What makes the steps of one call other code than those of another: rows, end tokens, filling."""
        return len(self.generated_B), len(self.eos_E), self.fills

    def inputs(self, shape: StepShape, layout: Layout) -> StepInputs:
        """Return what goes into a step of this shape; `layout` is that of the shape.

        A guess that is valid and does not go into the step is not counted among the valid ones of the step.
        """
        if layout.slots == 1 and not shape.drafts:
            return StepInputs(layout, self.pending_B1, self.zeros_B1)
        tokens = [self.front_BD[:, : 1 + shape.backbone]]
        lengths = [self._cut(self.width_B, shape.backbone, self.sources.width)]
        segments = [
            (token_BSN[:, s], length_BS[:, s], start)
            for (token_BSN, length_BS), source in zip(self.branches, self.sources.branching, strict=True)
            for s, start in enumerate(source.shape.segment_starts)
        ]
        for (token_BN, length_B, start), used in zip(segments, shape.branches, strict=True):
            if used:
                tokens.append(token_BN[:, :used])
                lengths.append(self._cut(length_B, start + used, start + token_BN.shape[1]))
        if shape.draft_slots:
            tokens.append(self.front_BD[:, 1 : 1 + shape.draft_slots])
            lengths.append(self._cut(self.width_B, shape.draft_slots, self.sources.width))
        if len(tokens) == 1:
            return StepInputs(layout, tokens[0].clone(), lengths[0][:, None])
        return StepInputs(layout, torch.cat(tokens, 1), torch.stack(lengths, 1))

    @staticmethod
    def _cut(length_B: torch.Tensor, sent: int, most: int) -> torch.Tensor:
        """Return valid lengths, cut to the guesses that are sent if these can be fewer."""
        return length_B if sent >= most else length_B.clamp(max=sent)

    def limited(self, count_B: torch.Tensor) -> torch.Tensor:
        """Return a number of tokens for each row, at most as many as its limit leaves room for."""
        return torch.minimum(count_B, self._limit - self.generated_B)

    def commit(self, acceptance: Acceptance, layout: Layout, *, moves: bool) -> None:
        """Make the accepted tokens part of cache and text.

        Args:
            acceptance: what the step chose.
            layout: where the slots of the step sit.
            moves: whether keys and values of accepted branches must be moved after those of the pending token.
        """
        self.cache.commit(acceptance.count_B, acceptance.path_BD if moves else None)
        if layout.slots == 1 and acceptance.count_B is self.ones_B:
            self.text_BL.scatter_(1, self._length_B1, acceptance.run_BD)
            self.length_B += 1
            self.pending_B1.copy_(acceptance.run_BD)
            return
        # What comes after `count_B` tokens is overwritten before it counts.
        self.text_BL.scatter_(1, self.length_B[:, None] + layout.offset_D, acceptance.run_BD)
        self.length_B += acceptance.count_B
        self.pending_B1.copy_(self.text_BL.gather(1, self.length_B[:, None] - 1))

    def restart(self) -> None:
        """Give the backbone guesses for a step after one from which no source got any (`StepShape.drafts`)."""
        backbone = self.sources.backbone
        if backbone is None:
            return
        token_BSN, length_BS = backbone.restart(self.generated_B, self.text_BL, self.length_B)
        self.backbone_BW.copy_(token_BSN[:, 0])
        for source, (_, branch_length_BS) in zip(self.sources.branching, self.branches, strict=True):
            if not (source.is_on_host or source.reads_text_alone):
                branch_length_BS.zero_()
        self.clip(length_BS[:, 0])

    def clip(self, width_B: torch.Tensor, *, may_be_over: bool = True) -> None:
        """Cut the valid guesses to the room that the limit leaves; the guesses of halted rows become pads.

        Args:
            width_B: valid guesses of the backbone before the cut; the result is `self.width_B`.
            may_be_over: False if the host knows that no row has halted or has all its tokens.
        """
        room_B = self._last - self.generated_B
        if not may_be_over and all(source.is_on_host for source in self.sources.branching):
            torch.clamp(torch.minimum(width_B, room_B), min=0, out=self.width_B)
            return
        room_B = room_B.clamp(min=0)
        halted_B1 = self.halted_B[:, None]
        width_B = torch.minimum(width_B, room_B)
        if may_be_over:
            self.backbone_BW.copy_(torch.where(halted_B1, self.pad, self.backbone_BW))
            width_B = torch.where(self.halted_B, room_B.clamp(max=self.sources.width), width_B)
        self.width_B.copy_(width_B)
        for source, start_S, (_, length_BS) in zip(self.sources.branching, self._starts, self.branches, strict=True):
            if source.is_on_host:  # the host has cut them
                continue
            length_BS.copy_(torch.minimum(length_BS, room_B[:, None]).masked_fill(halted_B1, 0))
            if start_S is not None:  # there must be guesses to follow
                length_BS.masked_fill_(self.width_B[:, None] < start_S, 0)

    def roll_back(self, row: int, tokens: int) -> None:
        """Take back the last `tokens` tokens of a row and halt it. Call `clip(self.width_B)` afterwards."""
        for length_B in (self.cache.lengths_B, self.length_B, self.generated_B):
            length_B[row] -= tokens
        self.halted_B[row] = True
        self.front_BD[row, 0] = self.text_BL[row, self.length_B[row] - 1]

    def report(self, acceptance: Acceptance, layout: Layout, *, proposes: bool = True) -> None:
        """Write `report_N`, one number for each row of each kind.

        The kinds are: new tokens, valid guesses of the backbone, whether the row has ended, the segment that won,
        guesses accepted in the backbone, whether sampling met no distribution, the length of the n-gram that the
        lookup matched; then the valid length of each branch, and for each branch of the step the accepted guesses.

        Args:
            acceptance: what the model accepted in the step.
            layout: the slots of the step.
            proposes: whether a source has proposed after the step.
        """
        broken_B = self.zeros_B if acceptance.broken_B is None else acceptance.broken_B
        is_one_slot = acceptance.accepted_BS is self.zeros_B1
        accepted_B = self.zeros_B if is_one_slot else acceptance.accepted_BS[:, 0]
        # A step of one slot keeps the flags themselves only if no row has halted.
        halted_B = self.zeros_B if is_one_slot and acceptance.halted_B is self.halted_B else self.halted_B.long()
        order_B = self.zeros_B
        for source in self.sources.branching:
            if source.order_B is not None:
                order_B = source.order_B
        numbers = [self.generated_B, self.width_B, halted_B, acceptance.best_B, accepted_B, broken_B, order_B]
        branches = layout.verified_segments - 1
        if proposes or branches:
            numbers += [length_BS.T.flatten() for _, length_BS in self.branches]
            unused = (len(self.sources.branch_names) - branches) * len(self.zeros_B)
            numbers += [acceptance.accepted_BS[:, 1 : 1 + branches].T.flatten(), self._no_branches_N[:unused]]
        else:
            numbers.append(self._no_branches_N)
        self.report_N.copy_(torch.cat(numbers))
