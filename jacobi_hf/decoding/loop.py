"""The loop: prefill -> step* -> output. What the host knows, decides and tells; the tensors of a step are in `step.py`."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from jacobi_hf.decoding.layout import build_layout, chain_layout
from jacobi_hf.decoding.selection import Selector, accepted_prefixes, best, check_samples, pick
from jacobi_hf.decoding.step import Acceptance, Slots, Step, Widths
from jacobi_hf.execution.base import Eager
from jacobi_hf.output import JacobiStats
from jacobi_hf.streaming import candidates_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.prompt import Prompt
    from jacobi_hf.decoding.step import Forward
    from jacobi_hf.decoding.stopping import Scores, StoppingRules
    from jacobi_hf.execution.base import Execution
    from jacobi_hf.streaming import Candidate


@dataclass(frozen=True)
class Plan:
    """What the host knows after a step, from one copy off the device. Lists are per row."""

    generated: list[int]
    widths: list[int]
    at_eos: list[bool]
    best: list[int]
    confirmed_in_window: list[int]
    branches: list[list[int]]  # of each branch of the next step its valid tokens


class Reach:
    """How many guesses of a drafter are verified at a time: as the config says, or what was accepted lately twice over, and two more."""

    def __init__(self, config: JacobiConfig) -> None:
        self._fixed, self._window = config.jacobi_verify_width, config.window_width
        self._accepted = max(0.0, self._window / 4 - 1)  # so that it begins with half the window

    @property
    def width(self) -> int:
        """For the next step."""
        return self._fixed or min(self._window, math.ceil(2 * self._accepted) + 2)

    def note(self, accepted: int) -> None:
        """What a row accepted of its window in a step."""
        self._accepted += 0.2 * (accepted - self._accepted)


@dataclass(frozen=True)
class Launched:
    """A step that was handed to the device, and of which the host has not been told.

    Attributes:
        names: of its segments, none for the prefill.
        slots: of its forward.
        tokens: most that it adds to a row.
        verified: guesses of the window that it verifies at most.
        report: waits for the step and reads `Step.report_N` as it was behind it.
        drafts: what it verifies, where somebody watches.
    """

    names: list[str]
    slots: int
    tokens: int
    verified: int
    report: Callable[[], torch.Tensor]
    drafts: tuple[Candidate, ...] = ()


class Decoder:
    """One call of `generate`.

    Args:
        forward: `(token_BQ or None, embeds_BQH or None, layout, key_column_K, keep_BN or None) -> logits`, written to the step's cache.
        step: the state of all rows, opened for this call; its cache stands as it does before the prompt.
        selector: the model's choice under the call's processors and noise.
        stopping: criteria, streamer, output ids.
        scores, logits: filled when the caller asked for them.
        fills: whether finished rows are decoded on (as pads), because cache or scores are handed out.
        execution: how steps run; as they stand by default. Those of which more than the tokens is wanted always do.
        drafts_apart: whether a drafter makes the window's guesses, in a stream of their own.

    Where the device works on while the host goes its way, the next step is launched before the host is told of the last one, unless
    criteria or streamer have to see its tokens first. All that is drafted is sent then, since the host does not know what will be, and
    one step runs behind the end, which adds nothing.
    """

    LAGS_ON: tuple[str, ...] = ("cuda",)
    PREFILL_SLOTS = 512

    def __init__(
        self,
        forward: Forward,
        step: Step,
        selector: Selector,
        stopping: StoppingRules,
        scores: Scores | None = None,
        logits: Scores | None = None,
        fills: bool = False,
        execution: Execution | None = None,
        *,
        drafts_apart: bool = False,
    ) -> None:
        batch = len(step.generated_B)
        self._forward, self._step, self._cache, self._selector, self._frontier = (
            forward,
            step,
            step.cache,
            selector,
            stopping,
        )
        self._scores, self._logits, self._fills = scores, logits, fills
        self._wants_tokens_alone = selector.is_vectorised and scores is None and logits is None
        self._execution = execution if execution is not None and self._wants_tokens_alone else Eager()
        self._drafts_apart, self._reach = drafts_apart, Reach(step.config)
        self._text_start = int(step.start_B.max())
        self._lag = int(
            self._wants_tokens_alone
            and not stopping.is_one_by_one
            and self._cache.lengths_B.device.type in self.LAGS_ON
        )
        self._launched: deque[Launched] = deque()
        self._running = [True] * batch
        self._plan = Plan(
            [0] * batch, [0] * batch, [False] * batch, [0] * batch, [0] * batch, [[0] * batch] * len(step.names)
        )
        self.stats = JacobiStats(new_tokens=[0] * batch, row_forwards=[0] * batch)
        # Per row and step: row, tokens before and behind it, name of the segment, guesses confirmed. Counted at the end, since a
        # criterion may end a row within what an earlier step accepted.
        self._runs: list[tuple[int, int, int, str, int]] = []

    def run(self, prompt: Prompt, keep_going: Callable[[bool], bool]) -> None:
        """Decode until every row has finished; `keep_going(done)` may ask for idle forwards (distributed peers)."""
        self._told = started = time.perf_counter()
        self._prefill(prompt)
        prefilled = time.perf_counter()
        while keep_going(self._finished()):
            if self._finished():
                self._idle_forward()
            else:
                self._decode()
        self._tell(waiting=0)
        if not self._frontier.is_one_by_one:
            self._frontier.copy_texts(self._step.text_BL, self._step.start_B, self._plan.generated)
        self.stats.compiled_steps, self.stats.cuda_graphs = self._execution.compiled, self._execution.captured
        self.stats.prefill_seconds, self.stats.decode_seconds = prefilled - started, time.perf_counter() - prefilled
        self.stats.new_tokens = [end or 0 for end in self._frontier.ended]
        for row, first, last, name, confirmed_guesses in self._runs:
            count = max(0, min(last, self.stats.new_tokens[row]) - first)
            self.stats.accepted_lengths[count] += 1
            self.stats.accepted_from[name] += min(count, confirmed_guesses)

    def _finished(self) -> bool:
        """Whether every row has ended, and with `fills` has its pads too."""
        stopping = self._frontier
        return stopping.done and not (self._fills and stopping.pads and min(self._plan.generated) < stopping.generated)

    def _prefill(self, prompt: Prompt) -> None:
        device = prompt.length_B.device
        logits_B1V = self._prompt_logits(prompt)
        self._cache.lengths_B -= 1  # the last prompt token plays the pending one
        self._base = self._cache.lengths_B.tolist()
        nothing_B1 = torch.zeros_like(prompt.length_B)[:, None]
        self._vocab_size = logits_B1V.shape[-1]
        self._settle(Slots(build_layout((0,), device), nothing_B1, nothing_B1), logits_B1V)
        self._launch([], 0, 1, 0)
        self._tell(waiting=0)

    def _prompt_logits(self, prompt: Prompt) -> torch.Tensor:
        """Logits of each row's last prompt token; where a mask is needed, a long prompt goes in by parts, since it is as wide as high."""
        last_B1, kept, columns, cached = (
            prompt.length_B[:, None] - 1,
            None,
            prompt.inputs.shape[1],
            int(self._cache.lengths_B.max()),
        )
        size = self.PREFILL_SLOTS if self._forward.needs_mask(columns, without_past=not cached) else columns
        for first in range(0, columns, size):
            part = slice(first, first + size)
            ids_BP, embeds_BPH = (
                None if inputs is None else inputs[:, part] for inputs in (prompt.ids_BP, prompt.embeds_BPH)
            )
            layout = chain_layout(
                prompt.inputs[:, part].shape[1], last_B1.device, without_past=not cached and not first
            )
            key_column_K = self._cache.columns(layout.slots, cached + first)
            place_B1 = last_B1 - first
            logits_B1V = self._forward(ids_BP, embeds_BPH, layout, key_column_K, place_B1.clamp(0, layout.slots - 1))
            kept = logits_B1V if kept is None else torch.where(place_B1[..., None] < 0, kept, logits_B1V)
            self._cache.commit((place_B1[:, 0] + 1).clamp(0, layout.slots))
        assert kept is not None
        return kept

    def _idle_forward(self) -> None:
        layout = build_layout((0,), self._cache.lengths_B.device)
        self._forward(self._step.pending_B1, None, layout, self._cache.columns(1, self._longest_cached()), None)

    def _decode(self) -> None:
        widths = self._execution.widths(self._greatest_widths() if self._lag else self._widths())
        layout = widths.layout(self._cache.lengths_B.device)
        key_column_K = self._cache.columns(layout.slots, self._longest_cached())
        names = ["window", *(name for name, used in zip(self._step.names, widths.branches, strict=True) if used)]
        drafts = candidates_of(self._step.slots(widths, layout), names) if self._frontier.has_step_streamer else ()
        if self._wants_tokens_alone:
            some_over, text_columns = self._some_over(), self._text_columns(layout)
            self._draw(layout)
            self._execution.run(
                self._step,
                self._forward,
                self._selector,
                widths,
                layout,
                key_column_K,
                text_columns,
                some_over=some_over,
            )
        else:
            slots = self._step.slots(widths, layout)
            self._settle(slots, self._forward(slots.token_BQ, None, layout, key_column_K, None))
        self._launch(names, layout.slots, layout.offset_D.shape[0], widths.window, drafts)
        self._tell(waiting=self._lag)

    def _widths(self) -> Widths:
        """As much of the window and of each branch as some active row uses."""
        plan, active = self._plan, self._active_rows()
        starts = self._step.starts
        used = tuple(
            max(0, max(lengths[row] for row in active) - start)
            for lengths, start in zip(plan.branches, starts, strict=True)
        )
        return self._sent(max(plan.widths[row] for row in active), used)

    def _sent(self, window: int, branches: tuple[int, ...]) -> Widths:
        """The shape of a step for so many guesses of the window: with a drafter in both streams, in the clean one as far as it reaches."""
        starts = self._step.starts
        branches = tuple(used if start <= window else 0 for start, used in zip(starts, branches, strict=True))
        if not self._drafts_apart:
            return Widths(window, branches, starts=starts)
        hung_on = max((start for start, used in zip(starts, branches, strict=True) if used), default=0)
        return Widths(min(window, max(self._reach.width, hung_on)), branches, window, starts)

    def _greatest_widths(self) -> Widths:
        """As much as a row can use."""
        step, limit = self._step, self._frontier.limit
        branches = [min(limit, source.length) for source in step.sources for _ in range(source.branches)]
        return self._sent(min(limit, step.window.draft_BW.shape[1]), tuple(branches))

    def _active_rows(self) -> list[int]:
        """Rows that the next step moves on: the unfinished, and with `fills` all."""
        return [row for row, halted in enumerate(self._plan.at_eos) if self._fills or not halted]

    def _some_over(self) -> bool:
        """Whether a row has halted, or has all its tokens, for all that the host knows."""
        return bool(self._lag) or any(self._plan.at_eos) or max(self._plan.generated) >= self._frontier.limit

    def _untold(self) -> int:
        """Tokens that a row may have more than the host knows of."""
        return sum(step.tokens for step in self._launched)

    def _longest_cached(self) -> int:
        """No row has more in the cache."""
        untold, limit = self._untold(), self._frontier.limit
        return max(
            base + min(limit, tokens + untold) for base, tokens in zip(self._base, self._plan.generated, strict=True)
        )

    def _settle(self, slots: Slots, logits_BQV: torch.Tensor) -> None:
        """Everything behind the forward: select, accept, commit, redraft."""
        step, selector, layout = self._step, self._selector, slots.layout
        some_over = self._some_over()
        if selector.is_vectorised:
            scores_BQV = logits_BQV if selector.is_argmax else selector.scores(logits_BQV, layout, slots.token_BQ)
            acceptance = step.accept(slots, scores_BQV, self._noise(layout), some_over=some_over)
        else:
            scores_BQV, acceptance = logits_BQV, self._accept_one_by_one(logits_BQV, slots)
        step.advance(slots, acceptance, self._text_columns(layout), some_over=some_over)
        if selector.is_vectorised:
            selector.commit(acceptance.run_BD, acceptance.count_B)
            self._record(self._scores, scores_BQV, acceptance)
            self._record(self._logits, logits_BQV, acceptance)

    def _text_columns(self, layout: Layout) -> int:
        """So much of the text may be in use behind a step."""
        return self._text_start + max(self._plan.generated) + self._untold() + layout.offset_D.shape[0]

    def _draw(self, layout: Layout) -> None:
        """Make the noise of every slot's new-token index available."""
        noise = self._selector.noise
        if noise is not None:
            running_at = [self._plan.generated[row] for row in self._active_rows()]
            shape = len(self._plan.generated), self._vocab_size
            noise.draw(min(running_at), max(running_at) + self._untold() + layout.offset_D.shape[0] - 1, shape)

    def _noise(self, layout: Layout) -> torch.Tensor | None:
        """The noise of every slot's new-token index, `(B, Q, V)`."""
        self._draw(layout)
        noise = self._selector.noise
        return None if noise is None else noise.at(self._step.generated_B[:, None] + layout.depth_Q)

    def _accept_one_by_one(self, logits_BQV: torch.Tensor, slots: Slots) -> Acceptance:
        """For processors that must see each token's true prefix, in order, with the full batch: all rows move in step.

        Every token goes through processors, choice, criteria and streamer before the next one is looked at, as in ordinary
        decoding. Slots behind the last committed token get the choice without processors, which is as good a guess as any.
        """
        selector, stopping, layout, step = self._selector, self._frontier, slots.layout, self._step
        halted_B, row_B = step.halted_B, torch.arange(len(slots.token_BQ), device=slots.token_BQ.device)
        if selector.noise is None or not selector.noise.ahead:
            choice_BQ = best(logits_BQV)
        else:
            choice_BQ, _, _ = pick(logits_BQV, self._noise(layout))
        path_SD, length_BS = layout.path_SD[: layout.verified_segments], slots.length_BS[:, : layout.verified_segments]
        alive_BS = torch.ones_like(length_BS, dtype=torch.bool)
        for depth in range(path_SD.shape[1]):
            best_B = alive_BS.long().argmax(1)
            index, slot_B = stopping.generated, path_SD[best_B, depth]
            logits_BV = logits_BQV[row_B, slot_B].to(torch.float32, copy=True)
            scores_BV = selector.processors(stopping.sequences, logits_BV)
            if selector.noise is not None:
                selector.noise.draw(index, index, tuple(scores_BV.shape))
            token_B = selector.choose(scores_BV[:, None], torch.full_like(row_B, index)[:, None])[:, 0]
            selector.check()
            token_B = torch.where(halted_B, stopping.pad, token_B)
            # Segments may share slots: those that are not alive write to one place more than there are.
            slot_BS = torch.where(alive_BS, path_SD[:, depth], choice_BQ.shape[1])
            choice_BQ = functional.pad(choice_BQ, (0, 1)).scatter(1, slot_BS, token_B[:, None].expand_as(slot_BS))[
                :, :-1
            ]
            for wanted, value_BV in ((self._scores, scores_BV), (self._logits, logits_BV)):
                if wanted is not None:
                    wanted.record(value_BV[:, None], [index] * len(row_B), [1] * len(row_B))
            stopping.write(token_B[:, None], torch.full_like(row_B, index), torch.ones_like(row_B))
            stopping.advance([index + 1] * len(row_B), [False] * len(row_B))
            if stopping.pads:
                halted_B = torch.tensor([end is not None for end in stopping.ended], device=row_B.device)
            if stopping.done or depth + 1 == path_SD.shape[1]:
                break
            alive_BS = alive_BS & (length_BS > depth) & (slots.token_BQ[:, path_SD[:, depth + 1]] == token_B[:, None])
            if not alive_BS.any(1).all():
                break
        path_BD = layout.path_SD[best_B]
        agrees_BSD, accepted_BS = accepted_prefixes(layout, slots.token_BQ, choice_BQ, slots.length_BS)
        count_B = torch.full_like(row_B, depth + 1)
        run_BD = choice_BQ.gather(1, path_BD)
        return Acceptance(
            choice_BQ,
            agrees_BSD,
            accepted_BS,
            accepted_BS[:, 0],
            best_B,
            path_BD,
            run_BD,
            count_B,
            halted_B,
            logits_BQV,
        )

    def _record(self, scores: Scores | None, value_BQV: torch.Tensor, acceptance: Acceptance) -> None:
        if scores is None:
            return
        counts, row_B1 = acceptance.count_B.tolist(), torch.arange(len(value_BQV), device=value_BQV.device)[:, None]
        scores.record(value_BQV[row_B1, acceptance.path_BD[:, : max(counts)]], self._plan.generated, counts)

    def _launch(
        self, names: list[str], slots: int, tokens: int, verified: int, drafts: tuple[Candidate, ...] = ()
    ) -> None:
        """Send for the report of the step that was just handed to the device."""
        report_N = self._step.report_N
        report = report_of(report_N) if self._lag else lambda: report_N
        self._launched.append(Launched(names, slots, tokens, verified, report, drafts))

    def _tell(self, *, waiting: int) -> None:
        """Take note of what was launched, but for the last `waiting` steps."""
        while len(self._launched) > waiting:
            launched = self._launched.popleft()
            self._take(launched)
            now = time.perf_counter()
            if launched.names:
                self.stats.seconds_by_width[launched.slots].append(now - self._told)
            self._told = now

    def _take(self, launched: Launched) -> None:
        """One step's report: statistics, criteria and streamer, what the next step needs."""
        step, former = self._step, self._plan
        numbers, batch = launched.report().tolist(), len(self._running)
        generated, widths, at_eos, best, in_window, broken, *branches = (
            numbers[first : first + batch] for first in range(0, len(numbers), batch)
        )
        check_samples(any(broken))
        self._plan = plan = Plan(generated, widths, [bool(e) for e in at_eos], best, in_window, branches)
        stopping = self._frontier
        if stopping.is_one_by_one and self._selector.is_vectorised:
            stopping.copy_texts(step.text_BL, step.start_B, plan.generated)
        stopped = stopping.advance(plan.generated, plan.at_eos)
        self._count(former, launched)
        self._running = [end is None for end in stopping.ended]
        if stopped:
            self._halt(stopped)
        stopping.report_step(launched.drafts)

    def _count(self, former: Plan, launched: Launched) -> None:
        stats, names = self.stats, launched.names
        stats.forwards += 1
        for row, runs in enumerate(self._running):
            if not runs or former.at_eos[row] or former.generated[row] >= self._frontier.limit:
                continue
            stats.row_forwards[row] += 1
            if not names:  # the prefill
                continue
            name = names[self._plan.best[row]]
            first, last = former.generated[row], self._plan.generated[row]
            self._runs.append((row, first, last, name, last - first - 1))
            stats.drafted += former.widths[row]
            stats.verified += min(former.widths[row], launched.verified)
            stats.accepted += self._plan.confirmed_in_window[row]
            self._reach.note(self._plan.confirmed_in_window[row])

    def _halt(self, rows: list[int]) -> None:
        """A criterion ended these rows: put them back to where they ended, and go on with pads."""
        step, plan, generated, at_eos = self._step, self._plan, list(self._plan.generated), list(self._plan.at_eos)
        for row in rows:
            end = self._frontier.ended[row]
            assert end is not None
            step.take_back(row, generated[row] - end)
            self._selector.recount(row, self._frontier.output(row))
            generated[row], at_eos[row] = end, True
        step.measure()
        branches = [
            [0 if on else length for length, on in zip(lengths, at_eos, strict=True)] for lengths in plan.branches
        ]
        self._plan = replace(plan, generated=generated, widths=step.width_B.tolist(), at_eos=at_eos, branches=branches)


def report_of(report_N: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a report to the host; what is returned waits for it."""
    if report_N.device.type != "cuda":
        copied = report_N.to("cpu", copy=True)
        return lambda: copied
    pinned, arrived = report_N.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(report_N.device))

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return pinned

    return wait
