"""The loop: prefill -> (forward -> select -> accept -> commit -> redraft)* -> output.

Shapes: B rows, P prompt columns, Q slots of a step, W window guesses, S segments, D depths (1 + the longest segment), V ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.layout import Layout, build_layout, chain_layout
from jacobi_hf.output import JacobiStats
from jacobi_hf.pool import CandidateSource, NgramLookup, NgramPool, Rejection, Text
from jacobi_hf.selection import Selector, best, confirmed
from jacobi_hf.window import Window

if TYPE_CHECKING:
    from jacobi_hf.cache import JacobiStaticCache
    from jacobi_hf.frontier import Frontier, Scores
    from jacobi_hf.prompt import Prompt

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Slots:
    """What goes into one forward.

    Attributes:
        layout: where each slot sits.
        token_BQ: pending token, window, branches.
        length_BS: valid guesses of each segment.
        names: the source of each segment.
    """

    layout: Layout
    token_BQ: torch.Tensor
    length_BS: torch.Tensor
    names: tuple[str, ...] = ("window",)


@dataclass(frozen=True)
class Verdict:
    """What came of it.

    Attributes:
        choice_BQ: the model's token at every slot.
        agrees_BSD, accepted_BS: as `selection.confirmed` returns them.
        best_B: the segment that each row follows; path_BD: its slots by depth.
        run_BD: the choices along it, of which the first `count_B` are committed.
        at_eos_B: whether the row's last committed token ends it.
    """

    choice_BQ: torch.Tensor
    agrees_BSD: torch.Tensor
    accepted_BS: torch.Tensor
    best_B: torch.Tensor
    path_BD: torch.Tensor
    run_BD: torch.Tensor
    count_B: torch.Tensor
    at_eos_B: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What the host knows after a step, from one copy off the device. Lists are per row."""

    generated: list[int]
    widths: list[int]
    at_eos: list[bool]
    counts: list[int]
    best: list[int]
    confirmed_in_window: list[int]
    branches: list[list[int]]  # valid tokens of each branch of the next step


def candidate_sources(config: JacobiConfig, batch_size: int, device: torch.device) -> list[CandidateSource]:
    """The sources of branches that a config asks for."""
    sources: list[CandidateSource] = []
    if config.decoding == MULTIBLOCK and config.jacobi_lookup_tokens:
        sources.append(NgramLookup(config.jacobi_lookup_tokens))
    if config.decoding == MULTIBLOCK and config.jacobi_pool_size and config.jacobi_max_blocks:
        sources.append(NgramPool(config.jacobi_pool_size, config.jacobi_branch_length, batch_size, device))
    return sources


def step_slots(config: JacobiConfig, limit: int) -> int:
    """Most slots of one forward that is to yield at most `limit` tokens: pending token, window and branches."""
    sources = candidate_sources(config, 1, torch.device("cpu"))
    window = Window(config, 1, torch.device("cpu")).draft_BW.shape[1]
    return 1 + min(window, limit) + sum(s.branches * min(s.length, limit) for s in sources)


class Decoder:
    """One call of `generate`: the state of all rows, and the step that moves them on.

    Args:
        forward: `(token_BQ or None, embeds_BQH or None, layout, longest, keep_BN or None) -> logits`, written to `cache`.
        config: how to draft.
        cache: as it stands before the prompt.
        prompt: what to prefill.
        selector: the model's choice under the call's processors and noise.
        frontier: criteria, streamer, output ids.
        scores, logits: filled when the caller asked for them.
        fills: whether finished rows are decoded on (as pads), because cache or scores are handed out.
    """

    def __init__(
        self,
        forward: Forward,
        config: JacobiConfig,
        cache: JacobiStaticCache,
        prompt: Prompt,
        selector: Selector,
        frontier: Frontier,
        scores: Scores | None = None,
        logits: Scores | None = None,
        fills: bool = False,
    ) -> None:
        batch, device = len(prompt.length_B), prompt.length_B.device
        self._forward, self._cache, self._selector, self._frontier = forward, cache, selector, frontier
        self._scores, self._logits, self._fills = scores, logits, fills or not selector.is_vectorised
        self._window = Window(config, batch, device)
        self._sources = candidate_sources(config, batch, device)
        self._generated_B = torch.zeros(batch, dtype=torch.long, device=device)
        self._halted_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self._pending_B = torch.zeros(batch, dtype=torch.long, device=device)
        # One column more than the text can have, for what is not to be kept.
        self._text_BL = torch.cat([prompt.text_BL, prompt.text_BL.new_zeros(batch, frontier.limit + 1)], 1)
        self._text_start_B = prompt.text_length_B
        self._prompt_text = prompt.text_BL.shape[1]
        self._longest_cached = int(cache.lengths_B.max())
        self._plan = Plan([0] * batch, [0] * batch, [False] * batch, [0] * batch, [0] * batch, [0] * batch, [[]] * batch)
        self.stats = JacobiStats(new_tokens=[0] * batch, row_forwards=[0] * batch)
        # Per row and step: row, tokens before and behind it, name of the segment, guesses confirmed. Counted at the end, since a
        # criterion may end a row within what an earlier step accepted.
        self._runs: list[tuple[int, int, int, str, int]] = []

    def run(self, prompt: Prompt, keep_going: Callable[[bool], bool]) -> None:
        """Decode until every row has finished; `keep_going(done)` may ask for idle forwards (distributed peers)."""
        started = time.perf_counter()
        self._prefill(prompt)
        prefilled = time.perf_counter()
        while keep_going(self._finished()):
            if self._finished():
                self._idle_forward()
            else:
                self._step()
        self.stats.prefill_seconds, self.stats.decode_seconds = prefilled - started, time.perf_counter() - prefilled
        self.stats.new_tokens = [end or 0 for end in self._frontier.ended]
        for row, first, last, name, confirmed_guesses in self._runs:
            count = max(0, min(last, self.stats.new_tokens[row]) - first)
            self.stats.accepted_lengths[count] += 1
            self.stats.accepted_from[name] += min(count, confirmed_guesses)

    def _finished(self) -> bool:
        """Whether every row has ended, and with `fills` has its pads too."""
        frontier = self._frontier
        return frontier.done and not (self._fills and frontier.pads and min(self._plan.generated) < frontier.generated)

    def _prefill(self, prompt: Prompt) -> None:
        device, last_B1 = prompt.length_B.device, prompt.length_B[:, None] - 1
        layout = chain_layout(prompt.inputs.shape[1], device)
        logits_B1V = self._forward(prompt.ids_BP, prompt.embeds_BPH, layout, self._longest_cached, last_B1)
        self._cache.commit(last_B1[:, 0])  # the last prompt token plays the pending one
        self._base = self._cache.lengths_B.tolist()
        nothing_B1 = torch.zeros_like(last_B1)
        self._settle(logits_B1V, Slots(build_layout((0,), device), nothing_B1, nothing_B1))

    def _idle_forward(self) -> None:
        layout = build_layout((0,), self._pending_B.device)
        self._forward(self._pending_B[:, None], None, layout, self._longest_cached, None)

    def _step(self) -> None:
        started = time.perf_counter()
        slots = self._next_slots()
        logits_BQV = self._forward(slots.token_BQ, None, slots.layout, self._longest_cached, None)
        self._settle(logits_BQV, slots)
        self.stats.seconds_by_width[slots.layout.slots].append(time.perf_counter() - started)

    def _next_slots(self) -> Slots:
        """Pending token, window, and the branches that some active row has, none longer than any of these uses."""
        plan, active = self._plan, self._active_rows()
        width = max(plan.widths[row] for row in active)
        used = [max(plan.branches[row][c] for row in active) for c in range(len(self._proposals))]
        kept = [c for c, length in enumerate(used) if length]
        tokens = [self._pending_B[:, None], self._window.draft_BW[:, :width], *(self._proposals[c][1][:, : used[c]] for c in kept)]
        lengths = [self._width_B, *(self._proposals[c][2] for c in kept)]
        layout = build_layout((width, *(used[c] for c in kept)), self._pending_B.device)
        return Slots(layout, torch.cat(tokens, 1), torch.stack(lengths, 1), ("window", *(self._proposals[c][0] for c in kept)))

    def _active_rows(self) -> list[int]:
        """Rows that the next step moves on: the unfinished, and with `fills` all."""
        return [row for row, halted in enumerate(self._plan.at_eos) if self._fills or not halted]

    def _settle(self, logits_BQV: torch.Tensor, slots: Slots) -> None:
        """Everything behind the forward: select, accept, commit, redraft, tell the frontier, plan the next step."""
        self.stats.forwards += 1
        running = [end is None for end in self._frontier.ended]
        if self._selector.noise is not None:
            deepest, running_at = slots.layout.path_SD.shape[1] - 1, [self._plan.generated[row] for row in self._active_rows()]
            last = max(running_at) + deepest if self._selector.noise.ahead else -1
            self._selector.noise.draw(min(running_at), last, (len(logits_BQV), logits_BQV.shape[-1]))
        accept = self._accept if self._selector.is_vectorised else self._accept_one_by_one
        verdict = accept(logits_BQV, slots)
        before_B = self._generated_B
        self._commit(slots, verdict)
        self._redraft(before_B, slots, verdict)
        self._tell(slots, verdict, running)

    def _accept(self, logits_BQV: torch.Tensor, slots: Slots) -> Verdict:
        """All slots at once; the segment with the longest confirmed prefix wins."""
        selector, layout = self._selector, slots.layout
        scores_BQV = logits_BQV if selector.is_argmax else selector.scores(logits_BQV, layout, slots.token_BQ)
        choice_BQ = selector.choose(scores_BQV, self._generated_B[:, None] + layout.depth_Q)
        choice_BQ = torch.where(self._halted_B[:, None], self._frontier.pad, choice_BQ)
        agrees_BSD, accepted_BS = confirmed(layout, slots.token_BQ, choice_BQ, slots.length_BS)
        # Of equals the window wins: nothing has to be moved.
        rank_S = torch.arange(accepted_BS.shape[1], device=accepted_BS.device)
        best_B = (accepted_BS * len(rank_S) - rank_S).argmax(1)
        path_BD = layout.path_SD[best_B]
        run_BD = choice_BQ.gather(1, path_BD)
        count_B = accepted_BS.gather(1, best_B[:, None])[:, 0] + 1
        count_B, at_eos_B = self._cut(run_BD, count_B)
        verdict = Verdict(choice_BQ, agrees_BSD, accepted_BS, best_B, path_BD, run_BD, count_B, at_eos_B)
        selector.check(path_BD, count_B)
        self._record(self._scores, scores_BQV, verdict)
        self._record(self._logits, logits_BQV, verdict)
        return verdict

    def _cut(self, run_BD: torch.Tensor, count_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """End the run behind its first end token and at the limit; finished rows stand still unless they are to be filled."""
        frontier = self._frontier
        count_B = torch.minimum(count_B, frontier.limit - self._generated_B)
        at_eos_B = self._halted_B
        if len(frontier.eos_E):
            eos_BD = torch.isin(run_BD, frontier.eos_E) & (torch.arange(run_BD.shape[1], device=run_BD.device) < count_B[:, None])
            ends_B = eos_BD.any(1) & ~self._halted_B
            count_B = torch.where(ends_B, eos_BD.long().argmax(1) + 1, count_B)
            at_eos_B = at_eos_B | ends_B
        return (count_B if self._fills else count_B.masked_fill(self._halted_B, 0)), at_eos_B

    def _accept_one_by_one(self, logits_BQV: torch.Tensor, slots: Slots) -> Verdict:
        """For processors that must see each token's true prefix, in order, with the full batch: all rows move in step.

        Every token goes through processors, choice, criteria and streamer before the next one is looked at, as in ordinary
        decoding. Slots behind the last committed token get the choice without processors, which is as good a guess as any.
        """
        selector, frontier, layout = self._selector, self._frontier, slots.layout
        row_B = torch.arange(len(slots.token_BQ), device=slots.token_BQ.device)
        if selector.noise is None or not selector.noise.ahead:
            choice_BQ = best(logits_BQV)
        else:
            choice_BQ = selector.choose(logits_BQV, self._generated_B[:, None] + layout.depth_Q)
        alive_BS = torch.ones_like(slots.length_BS, dtype=torch.bool)
        for depth in range(layout.path_SD.shape[1]):
            best_B = alive_BS.long().argmax(1)
            index, slot_B = frontier.generated, layout.path_SD[best_B, depth]
            logits_BV = logits_BQV[row_B, slot_B].to(torch.float32, copy=True)
            scores_BV = selector.processors(frontier.sequences, logits_BV)
            if selector.noise is not None:
                selector.noise.draw(index, index, tuple(scores_BV.shape))
            token_B = selector.choose(scores_BV[:, None], torch.full_like(row_B, index)[:, None])[:, 0]
            selector.check(torch.zeros_like(row_B)[:, None], torch.ones_like(row_B))
            token_B = torch.where(self._halted_B, frontier.pad, token_B)
            slot_BS = layout.path_SD[:, depth].expand_as(alive_BS)
            choice_BQ = choice_BQ.scatter(1, slot_BS, torch.where(alive_BS, token_B[:, None], choice_BQ.gather(1, slot_BS)))
            for wanted, value_BV in ((self._scores, scores_BV), (self._logits, logits_BV)):
                if wanted is not None:
                    wanted.record(value_BV[:, None], [index] * len(row_B), [1] * len(row_B))
            frontier.write(token_B[:, None], torch.full_like(row_B, index), torch.ones_like(row_B))
            frontier.advance([index + 1] * len(row_B), [False] * len(row_B))
            if frontier.pads:
                self._halted_B = torch.tensor([end is not None for end in frontier.ended], device=row_B.device)
            if frontier.done or depth + 1 == layout.path_SD.shape[1]:
                break
            alive_BS = alive_BS & (slots.length_BS > depth) & (slots.token_BQ[:, layout.path_SD[:, depth + 1]] == token_B[:, None])
            if not alive_BS.any(1).all():
                break
        path_BD = layout.path_SD[best_B]
        agrees_BSD, accepted_BS = confirmed(layout, slots.token_BQ, choice_BQ, slots.length_BS)
        count_B = torch.full_like(row_B, depth + 1)
        return Verdict(choice_BQ, agrees_BSD, accepted_BS, best_B, path_BD, choice_BQ.gather(1, path_BD), count_B, self._halted_B)

    def _record(self, scores: Scores | None, value_BQV: torch.Tensor, verdict: Verdict) -> None:
        if scores is None:
            return
        counts, row_B1 = verdict.count_B.tolist(), torch.arange(len(value_BQV), device=value_BQV.device)[:, None]
        scores.record(value_BQV[row_B1, verdict.path_BD[:, : max(counts)]], self._plan.generated, counts)

    def _commit(self, slots: Slots, verdict: Verdict) -> None:
        """Make the run part of every row: cache, text, output ids, pending token."""
        run_BD, count_B, before_B = verdict.run_BD, verdict.count_B, self._generated_B
        moves = not slots.layout.is_chain and bool(((verdict.best_B > 0) & (count_B > 1)).any())
        self._cache.commit(count_B, verdict.path_BD if moves else None)
        offset_D = torch.arange(run_BD.shape[1], device=run_BD.device)
        place_BD = torch.where(
            offset_D < count_B[:, None], self._text_start_B[:, None] + before_B[:, None] + offset_D, self._text_BL.shape[1] - 1
        )
        self._text_BL.scatter_(1, place_BD, run_BD)
        self._frontier.write(run_BD, before_B, count_B)
        self._selector.commit(run_BD, count_B)
        last_B1 = (count_B - 1).clamp(min=0)[:, None]
        self._pending_B = torch.where(count_B > 0, run_BD.gather(1, last_B1)[:, 0], self._pending_B)
        self._generated_B = before_B + count_B
        self._halted_B = verdict.at_eos_B

    def _redraft(self, before_B: torch.Tensor, slots: Slots, verdict: Verdict) -> None:
        """The next window and the next branches."""
        window, width = self._window, slots.layout.lengths[0]
        window_choice_BD = verdict.choice_BQ[:, : width + 1]
        window.append_blocks(before_B, self._generated_B, verdict.agrees_BSD[:, 0])
        best_length_B = slots.length_BS.gather(1, verdict.best_B[:, None])[:, 0]
        choices = [(verdict.run_BD, best_length_B), (window_choice_BD, slots.length_BS[:, 0])]
        text = Text(self._text_BL[:, :-1], self._text_start_B + self._generated_B)
        window.redraft(self._generated_B, verdict.count_B, choices[-1:] if slots.layout.is_chain else choices, text.ids_BL, text.length_B)
        rejection = Rejection(slots.token_BQ[:, : width + 1], window_choice_BD, verdict.accepted_BS[:, 0], slots.length_BS[:, 0])
        self._proposals: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        used = self._prompt_text + max(self._plan.generated) + verdict.run_BD.shape[1]
        for source in self._sources:
            if width:
                source.learn(rejection)
            token_BCL, length_BC = source.propose(Text(text.ids_BL[:, :used], text.length_B))
            self._proposals += [(source.name, token_BCL[:, c], length_BC[:, c]) for c in range(source.branches)]

    def _tell(self, slots: Slots, verdict: Verdict, running: list[bool]) -> None:
        """One copy to the host: statistics, criteria and streamer, what the next step needs."""
        self._measure_drafts()
        columns = [self._generated_B, self._width_B, verdict.at_eos_B, verdict.count_B, verdict.best_B, verdict.accepted_BS[:, 0]]
        rows = torch.stack([c.long() for c in columns] + [length_B for _, _, length_B in self._proposals], 1).tolist()
        former = self._plan
        generated, widths, at_eos, counts, best, in_window = (
            list(column) for column in zip(*(row[: len(columns)] for row in rows), strict=True)
        )
        self._plan = plan = Plan(
            generated, widths, [bool(e) for e in at_eos], counts, best, in_window, [row[len(columns) :] for row in rows]
        )
        stopped = self._frontier.advance(plan.generated, plan.at_eos)
        self._count(former, slots, running)
        if stopped:
            self._halt(stopped)
        self._longest_cached = max(base + tokens for base, tokens in zip(self._base, self._plan.generated, strict=True))

    def _measure_drafts(self) -> None:
        """Clip window and branches to what the limit leaves room for; a finished row's guesses are pads."""
        window, room_B = self._window, (self._frontier.limit - 1 - self._generated_B).clamp(min=0)
        window.draft_BW = torch.where(self._halted_B[:, None], self._frontier.pad, window.draft_BW)
        width_B = torch.where(self._halted_B, window.draft_BW.shape[1], (window.end_B - self._generated_B).clamp(min=0))
        self._width_B = torch.minimum(width_B, room_B)
        self._proposals = [
            (name, token_BL, torch.minimum(length_B, room_B).masked_fill(self._halted_B, 0)) for name, token_BL, length_B in self._proposals
        ]

    def _count(self, former: Plan, slots: Slots, running: list[bool]) -> None:
        stats, is_prefill = self.stats, self.stats.forwards == 1
        for row, runs in enumerate(running):
            if not runs or former.at_eos[row] or former.generated[row] >= self._frontier.limit:
                continue
            stats.row_forwards[row] += 1
            if is_prefill:
                continue
            name = slots.names[self._plan.best[row]]
            self._runs.append((row, former.generated[row], self._plan.generated[row], name, self._plan.counts[row] - 1))
            stats.drafted += former.widths[row]
            stats.drafted_confirmed += self._plan.confirmed_in_window[row]

    def _halt(self, rows: list[int]) -> None:
        """A criterion ended these rows: put them back to where they ended, and go on with pads."""
        generated = list(self._plan.generated)
        for row in rows:
            end = self._frontier.ended[row]
            assert end is not None
            self._cache.lengths_B[row] -= generated[row] - end
            self._pending_B[row] = self._text_BL[row, int(self._text_start_B[row]) + end - 1]
            self._selector.recount(row, self._frontier.output(row))
            generated[row] = end
        self._generated_B = torch.tensor(generated, device=self._pending_B.device)
        halted = [halted or row in rows for row, halted in enumerate(self._plan.at_eos)]
        self._halted_B = torch.tensor(halted, device=self._pending_B.device)
        self._measure_drafts()
        branches = [[0] * len(row) if on else row for row, on in zip(self._plan.branches, halted, strict=True)]
        self._plan = replace(self._plan, generated=generated, widths=self._width_B.tolist(), at_eos=halted, branches=branches)
