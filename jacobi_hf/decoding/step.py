"""One decoding step: forward, select, accept, commit, redraft.

All of it is tensor operations over buffers that keep their address from step to step. What shapes depend on (`Widths`) is the host's
choice, and nothing goes to the host in between, so that a step can run as it stands, compiled, or captured.

Shapes: B rows, P prompt columns, Q slots of a step, W window guesses, S segments, D depths (1 + the longest segment), C branches, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.decoding.layout import Layout, build_layout
from jacobi_hf.decoding.selection import accepted_prefixes, pick
from jacobi_hf.drafts.base import CandidateSource, Drafts, NgramLookup, NgramPool, OtherChoices, Rejection, Text
from jacobi_hf.drafts.window import Window

if TYPE_CHECKING:
    from jacobi_hf.decoding.cache import JacobiStaticCache
    from jacobi_hf.decoding.prompt import Prompt
    from jacobi_hf.decoding.selection import Selector


class Forward(Protocol):
    """A forward of the model over a layout's slots, behind what the step's cache holds."""

    def __call__(
        self,
        token_BQ: torch.Tensor | None,
        embeds_BQH: torch.Tensor | None,
        layout: Layout,
        key_column_K: torch.Tensor,
        keep_BN: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits `(B, Q, V)`, or `(B, N, V)` of the slots `keep_BN`."""

    def needs_mask(self, slots: int, *, without_past: bool) -> bool:
        """Whether a chain of `slots` slots has a mask as large as their square."""


@dataclass(frozen=True)
class Widths:
    """The shape of a step.

    Attributes:
        window: guesses of the window that are sent.
        branches: tokens of every branch that are sent; a branch of 0 is left out.
        noisy: guesses of the window that are sent through the drafter; 0 without one.
        starts: guesses of the window that each branch follows; none by default.
    """

    window: int
    branches: tuple[int, ...]
    noisy: int = 0
    starts: tuple[int, ...] = ()

    def layout(self, device: torch.device) -> Layout:
        """Where everything sits."""
        starts = tuple(start for start, used in zip(self.starts, self.branches, strict=False) if used)
        return build_layout(
            (self.window, *filter(None, self.branches)), device, self.noisy, starts if any(starts) else ()
        )


@dataclass(frozen=True)
class Slots:
    """What goes into one forward.

    Attributes:
        layout: where each slot sits.
        token_BQ: pending token, window, branches.
        length_BS: valid guesses of each segment.
    """

    layout: Layout
    token_BQ: torch.Tensor
    length_BS: torch.Tensor


@dataclass(frozen=True)
class Acceptance:
    """What came of it.

    Attributes:
        choice_BQ: the model's token at every slot.
        agrees_BSD, accepted_BS: as `selection.accepted_prefixes` returns them; in_window_B: accepted in the window.
        best_B: the segment that each row follows.
        path_BD: its slots by depth.
        run_BD: the choices along it, of which the first `count_B` are committed.
        at_eos_B: whether the row's last committed token ends it.
        merit_BQV: what the choices are the greatest of.
        broken_B: whether a committed token was sampled from what is no distribution; None for greedy decoding.
    """

    choice_BQ: torch.Tensor
    agrees_BSD: torch.Tensor
    accepted_BS: torch.Tensor
    in_window_B: torch.Tensor
    best_B: torch.Tensor
    path_BD: torch.Tensor
    run_BD: torch.Tensor
    count_B: torch.Tensor
    at_eos_B: torch.Tensor
    merit_BQV: torch.Tensor
    broken_B: torch.Tensor | None = None


def candidate_sources(config: JacobiConfig, batch_size: int, device: torch.device) -> list[CandidateSource]:
    """The sources of branches that a config asks for."""
    sources: list[CandidateSource] = []
    if config.decoding == MULTIBLOCK and config.jacobi_lookup_tokens:
        sources.append(NgramLookup(config.jacobi_lookup_tokens))
    if config.decoding == MULTIBLOCK and config.jacobi_pool_size and config.jacobi_max_blocks:
        sources.append(NgramPool(config.jacobi_pool_size, config.jacobi_branch_length, batch_size, device))
    if config.decoding == MULTIBLOCK and config.jacobi_topk_branches and config.jacobi_max_blocks:
        sources.append(OtherChoices(config.jacobi_topk_branches, config.window_width))
    return sources


def step_slots(config: JacobiConfig, limit: int | None = None, *, drafts_apart: bool = False) -> int:
    """Most slots of one forward (that is to yield at most `limit` tokens): pending token, window, branches, and a drafter's stream."""
    sources = candidate_sources(config, 1, torch.device("cpu"))
    window = config.window_width
    lengths = [window, *([window] if drafts_apart else []), *(s.length for s in sources for _ in range(s.branches))]
    return 1 + sum(length if limit is None else min(length, limit) for length in lengths)


class Step:
    """The state of all rows, and the step that moves them on.

    Args:
        config: how to draft.
        cache: keys and values of everything committed but the pending token.
        columns: tokens that a row's text can have, prompt included.

    Attributes:
        generated_B: new tokens of each row, the pending one included.
        halted_B: rows behind their end token.
        text_BL: prompt and new tokens without pads, of which `length_B` count; new ones begin at `start_B`, the last one is pending.
        width_B, token_BCL, length_BC: valid guesses of the window; tokens and valid lengths of the branches, per source.
        report_N: what the host is told after a step, a number for each row of: new tokens, guesses of the next window, whether the row's
            last token ends it, segment followed, guesses confirmed in the window, whether sampling broke, valid tokens of each branch.
        names, starts: of each branch, its source and the guesses of the window that it follows.
        depths: D of the greatest step.
    """

    REPORTED = 6  # kinds of numbers in a report before those of the branches

    def __init__(self, config: JacobiConfig, cache: JacobiStaticCache, columns: int) -> None:
        device, batch = cache.lengths_B.device, len(cache.lengths_B)
        self.config, self.cache = config, cache
        self.window = Window(config, batch, columns, device)
        self.sources = candidate_sources(config, batch, device)
        self.names = [source.name for source in self.sources for _ in range(source.branches)]
        self.starts = tuple(start for source in self.sources for start in source.starts)
        self.depths = 1 + max(
            [self.window.draft_BW.shape[1], *(max(source.starts) + source.length for source in self.sources)]
        )

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.generated_B, self.length_B, self.start_B, self.width_B, self._none_B = (zeros(batch) for _ in range(5))
        self.halted_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.text_BL = zeros(batch, columns + self.depths)
        self._branches = [(zeros(batch, s.branches, s.length), zeros(batch, s.branches)) for s in self.sources]
        self._limit, self._last, self._pad, self._eos_E, self._fills = zeros(), zeros(), zeros(), zeros(0), False
        self.report_N = zeros((self.REPORTED + len(self.names)) * batch)

    def open(self, prompt: Prompt, limit: int, pad: int, eos_E: torch.Tensor, *, fills: bool) -> None:
        """Begin a call.

        Args:
            limit: most new tokens.
            pad: what follows a finished row; eos_E: ids that end one.
            fills: whether finished rows are decoded on, as pads.
        """
        for buffer in (self.generated_B, self.halted_B, self.window.end_B):
            buffer.zero_()
        for source in self.sources:
            source.forget()
        self.text_BL[:, : prompt.text_BL.shape[1]] = prompt.text_BL
        self.start_B.copy_(prompt.text_length_B)
        self.length_B.copy_(prompt.text_length_B)
        self._limit.fill_(limit)
        self._last.fill_(limit - 1)  # a step's own token is behind its guesses
        self._pad.fill_(pad)
        self._eos_E, self._fills = eos_E, fills

    @property
    def pending_B1(self) -> torch.Tensor:
        """The last token of each row, which the cache does not hold yet."""
        return self.window.front_BX[:, :1]

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What one call's step has different from another's: rows, end tokens, whether finished rows are decoded on."""
        return len(self.generated_B), len(self._eos_E), self._fills

    def run(
        self,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
        text_columns: int | None = None,
        *,
        some_over: bool = True,
        may_look: bool = False,
    ) -> None:
        """A whole step of a call that wants its tokens alone.

        Args:
            forward, layout, key_column_K: as in `Decoder`, for `widths.layout`.
            selector: vectorised; with the noise of every slot's new-token index, to sample.
            text_columns, some_over, may_look: as in `advance`.
        """
        slots = self.slots(widths, layout)
        scores_BQV = forward(slots.token_BQ, None, layout, key_column_K, None)
        if selector.processors:
            scores_BQV = selector.scores(scores_BQV, layout, slots.token_BQ)
        noise_BQV = None if selector.noise is None else selector.noise.at(self.generated_B[:, None] + layout.depth_Q)
        acceptance = self.accept(slots, scores_BQV, noise_BQV, some_over=some_over)
        self.advance(slots, acceptance, text_columns, some_over=some_over, may_look=may_look)
        selector.commit(acceptance.run_BD, acceptance.count_B)

    def slots(self, widths: Widths, layout: Layout) -> Slots:
        """Pending token, window and branches, cut to `widths`; the layout is that of `widths.layout`."""
        front_BX = self.window.front_BX
        tokens = [front_BX[:, : 1 + widths.window]]
        lengths = [self.width_B.clamp(max=widths.window) if widths.noisy else self.width_B]
        branches = [
            (token_BCL[:, c], length_BC[:, c])
            for token_BCL, length_BC in self._branches
            for c in range(token_BCL.shape[1])
        ]
        for (token_BL, length_B), used in zip(branches, widths.branches, strict=True):
            if used:
                tokens.append(token_BL[:, :used])
                lengths.append(length_B)
        if widths.noisy:
            tokens.append(front_BX[:, 1 : 1 + widths.noisy])
            lengths.append(self.width_B)
        if len(tokens) == 1:
            return Slots(layout, tokens[0].clone(), self.width_B[:, None])
        return Slots(layout, torch.cat(tokens, 1), torch.stack(lengths, 1))

    def accept(
        self, slots: Slots, scores_BQV: torch.Tensor, noise_BQV: torch.Tensor | None, *, some_over: bool = True
    ) -> Acceptance:
        """All slots at once; the segment with the longest confirmed prefix wins."""
        layout = slots.layout
        choice_BQ, broken_BQ, merit_BQV = pick(scores_BQV, noise_BQV)
        if some_over:
            choice_BQ = torch.where(self.halted_B[:, None], self._pad, choice_BQ)
        agrees_BSD, accepted_BS = accepted_prefixes(layout, slots.token_BQ, choice_BQ, slots.length_BS)
        in_window_B = accepted_BS[:, 0]
        if layout.verified_segments == 1:
            best_B, accepted_B = self._none_B, in_window_B
            path_BD = layout.path_SD if layout.is_chain else layout.path_SD[:1]
            run_BD = choice_BQ if layout.is_chain else choice_BQ[:, layout.path_SD[0]]
        else:
            # Of equals the window wins: nothing has to be moved.
            rank_S = layout.rank_S[: layout.verified_segments]
            best_B = (accepted_BS[:, : layout.verified_segments] * len(rank_S) - rank_S).max(1).indices
            path_BD = layout.path_SD[best_B]
            run_BD = choice_BQ.gather(1, path_BD)
            accepted_B = accepted_BS.gather(1, best_B[:, None])[:, 0]
        count_B, at_eos_B = self._cut(run_BD, accepted_B + 1, layout.offset_D, some_over=some_over)
        broken_B = None
        if broken_BQ is not None:
            broken_BD = broken_BQ.gather(1, path_BD.expand_as(run_BD)) & (layout.offset_D < count_B[:, None])
            broken_B = broken_BD.long().amax(1)
        return Acceptance(
            choice_BQ,
            agrees_BSD,
            accepted_BS,
            in_window_B,
            best_B,
            path_BD,
            run_BD,
            count_B,
            at_eos_B,
            merit_BQV,
            broken_B,
        )

    def _cut(
        self, run_BD: torch.Tensor, count_B: torch.Tensor, offset_D: torch.Tensor, *, some_over: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """End the run behind its first end token and at the limit; finished rows stand still unless they are to be filled."""
        if some_over:  # of rows that are not, no guess reaches beyond the limit; see `measure`
            count_B = torch.minimum(count_B, self._limit - self.generated_B)
        at_eos_B = self.halted_B
        if self._eos_E.numel():
            first, *others = self._eos_E.unbind()
            is_end_BD = run_BD == first
            for end in others:
                is_end_BD = is_end_BD | (run_BD == end)
            # Reductions of integers: inductor writes those of bools in C++ that does not compile (torch 2.13).
            first_B = torch.where(is_end_BD, offset_D, offset_D.shape[0]).amin(1)
            ends_B = first_B < count_B
            if some_over:
                ends_B = ends_B & ~self.halted_B
            count_B = torch.where(ends_B, first_B + 1, count_B)
            at_eos_B = at_eos_B | ends_B
        if some_over and not self._fills:
            count_B = count_B.masked_fill(self.halted_B, 0)
        return count_B, at_eos_B

    def advance(
        self,
        slots: Slots,
        acceptance: Acceptance,
        text_columns: int | None = None,
        *,
        some_over: bool = True,
        may_look: bool = False,
    ) -> None:
        """Make the run part of every row, draft anew, and report.

        Args:
            text_columns: how much of the text may be in use; all of it by default.
            some_over: False where the host knows that before this step no row had halted, or had all its tokens.
            may_look: whether the host may be asked for a value in between, where that saves work.
        """
        run_BD, count_B = acceptance.run_BD, acceptance.count_B
        moves = slots.layout.verified_segments > 1 and not (
            may_look and not bool(((acceptance.best_B > 0) & (count_B > 1)).any())
        )
        self.cache.commit(count_B, acceptance.path_BD if moves else None)
        # What is behind `count_B` is written over before it counts.
        self.text_BL.scatter_(1, self.length_B[:, None] + slots.layout.offset_D, run_BD)
        self.length_B += count_B
        generated_B = self.generated_B + count_B
        self._redraft(slots, acceptance, generated_B, text_columns)
        self.generated_B.copy_(generated_B)
        if acceptance.at_eos_B is not self.halted_B:
            self.halted_B.copy_(acceptance.at_eos_B)
        self.measure(some_over=some_over)
        self._report(acceptance)

    def _redraft(
        self, slots: Slots, acceptance: Acceptance, generated_B: torch.Tensor, text_columns: int | None
    ) -> None:
        """The next window and the next branches."""
        window, layout = self.window, slots.layout
        drafting, width = layout.draft_segment, layout.lengths[layout.draft_segment]
        drafted_B1 = slots.length_BS if layout.is_chain else slots.length_BS[:, drafting : drafting + 1]
        agrees_BD = acceptance.agrees_BSD[:, drafting] & (layout.offset_D[:-1] < drafted_B1) if window.waits else None
        window.append_blocks(self.generated_B, generated_B, agrees_BD)
        path_W1: torch.Tensor | slice = (
            layout.path_SD[drafting, : width + 1] if layout.draft_slots else slice(width + 1)
        )
        choice_BW1 = acceptance.choice_BQ if layout.is_chain else acceptance.choice_BQ[:, path_W1]
        choices = [(choice_BW1, drafted_B1)]
        if layout.verified_segments > 1 or layout.draft_slots:
            # The branch that was followed knows better than the window what comes behind it: the window's guesses were refuted. Where the
            # window was followed, a drafter has the word behind the tokens that the model itself chose.
            best_B1 = acceptance.best_B[:, None]
            known_B1 = slots.length_BS.gather(1, best_B1)
            if layout.draft_slots:
                known_B1 = torch.where(best_B1 > 0, known_B1, acceptance.count_B[:, None] - 1)
            choices = [(acceptance.run_BD, known_B1), *choices]
        if self.sources and width:
            learnt_BW1 = choice_BW1
            if layout.draft_slots:
                # What follows a refuted guess is for the model to say, as far as it was asked; behind that the drafter's word stands.
                verified_BW1 = layout.offset_D[: width + 1] <= slots.length_BS[:, :1]
                learnt_BW1 = torch.where(
                    verified_BW1, acceptance.choice_BQ[:, layout.path_SD[0, : width + 1]], choice_BW1
                )
            rejection = Rejection(slots.token_BQ[:, path_W1], learnt_BW1, acceptance.in_window_B, drafted_B1[:, 0])
            for source in self.sources:
                source.learn(rejection)
        window.redraft(generated_B, acceptance.count_B, choices, self.text_BL, self.length_B)
        if not self.sources:
            return
        text = Text(self.text_BL if text_columns is None else self.text_BL[:, :text_columns], self.length_B)
        drafts = (
            self._drafts(slots, acceptance)
            if any(isinstance(source, OtherChoices) for source in self.sources)
            else None
        )
        for source, (token_BCL, length_BC) in zip(self.sources, self._branches, strict=True):
            tokens, lengths = source.propose(text, drafts)
            token_BCL.copy_(tokens)
            length_BC.copy_(lengths)

    def _drafts(self, slots: Slots, acceptance: Acceptance) -> Drafts:
        """The next window, and what else the model held likely at the slots that its first guesses come from."""
        layout, draft_BW = slots.layout, self.window.draft_BW
        path_D, offset_S = (
            layout.path_SD[layout.draft_segment],
            torch.arange(1 + max(self.starts), device=draft_BW.device),
        )
        depth_BS = acceptance.count_B[:, None] + offset_S
        slot_BS = path_D[depth_BS.clamp(max=path_D.shape[0] - 1)]
        row_B1 = torch.arange(len(slot_BS), device=slot_BS.device)[:, None]
        likeliest_BSK = acceptance.merit_BQV[row_B1, slot_BS].topk(1 + OtherChoices.PER_GUESS).indices
        known_B = (slots.length_BS[:, layout.draft_segment] + 1 - acceptance.count_B).clamp(min=0)
        return Drafts(draft_BW, likeliest_BSK[..., 1:], known_B)

    def measure(self, *, some_over: bool = True) -> None:
        """Clip window and branches to what the limit leaves room for; guesses of rows that have halted are pads."""
        window = self.window
        width_B = torch.minimum(window.end_B, self._last) - self.generated_B
        if not some_over and not self.sources:
            torch.clamp(width_B, min=0, out=self.width_B)
            return
        width_B, halted_B1 = width_B.clamp(min=0), self.halted_B[:, None]
        room_B = (self._last - self.generated_B).clamp(min=0)
        if some_over:
            draft_BW = window.draft_BW
            draft_BW.copy_(torch.where(halted_B1, self._pad, draft_BW))
            width_B = torch.where(self.halted_B, room_B.clamp(max=draft_BW.shape[1]), width_B)
        self.width_B.copy_(width_B)
        for source, (_, length_BC) in zip(self.sources, self._branches, strict=True):
            length_BC.copy_(torch.minimum(length_BC, room_B[:, None]).masked_fill(halted_B1, 0))
            if isinstance(source, OtherChoices):  # there must be something to hang on
                start_C = torch.arange(source.branches, device=room_B.device) // source.PER_GUESS
                length_BC.masked_fill_(torch.minimum(self.width_B, room_B)[:, None] < start_C, 0)

    def take_back(self, row: int, tokens: int) -> None:
        """Halt a row in front of its last `tokens` tokens. Call `measure` behind this."""
        for lengths_B in (self.cache.lengths_B, self.length_B, self.generated_B):
            lengths_B[row] -= tokens
        self.halted_B[row] = True
        self.window.front_BX[row, 0] = self.text_BL[row, self.length_B[row] - 1]

    def _report(self, acceptance: Acceptance) -> None:
        broken_B = self._none_B if acceptance.broken_B is None else acceptance.broken_B
        numbers = [
            self.generated_B,
            self.width_B,
            self.halted_B.long(),
            acceptance.best_B,
            acceptance.in_window_B,
            broken_B,
        ]
        self.report_N.copy_(torch.cat([*numbers, *(length_BC.T.flatten() for _, length_BC in self._branches)]))
