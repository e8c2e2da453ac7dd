"""The loop of one call: prefill, then steps until every row has ended.

This is the host's side. It chooses the shape of each step, launches it, reads its report, and updates criteria,
streamer and statistics. The tensors of a step are in `jacobi_hf.decoding.step`.

Shapes: B rows, Q slots of a forward, V vocabulary, P prompt columns.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from jacobi_hf.decoding.choice import check_samples
from jacobi_hf.decoding.host_lookup import HostLookup
from jacobi_hf.decoding.layout import build_layout
from jacobi_hf.decoding.one_by_one import OneByOne
from jacobi_hf.decoding.prefill import prompt_forward, read_prompt_parts
from jacobi_hf.decoding.report import CopiedReport, LaunchedStep, StepClock, StepReport
from jacobi_hf.decoding.step import ForwardInputs, ForwardOutput, StepInputs, StepPlan, StepShape, advance, finish_step
from jacobi_hf.output import JacobiStats
from jacobi_hf.streaming import candidates_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.accept import Acceptance
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.prompt import Prompt
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.shapes import Schedule
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import Forward
    from jacobi_hf.decoding.stopping import Scores, StoppingRules
    from jacobi_hf.execution.base import Execution
    from jacobi_hf.streaming import Candidate


class Decoder:
    """One call of `generate`.

    On a device that works while the host goes on (CUDA), the next step is launched before the report of the last one
    is read, unless criteria or a streamer must see its tokens first. The host then sends all guesses, because it does
    not know how many are valid, and one step runs after the end, which adds nothing.

    Args:
        forward: the model; it writes to the cache of the state.
        state: the rows, opened for this call; the cache holds what came before the prompt.
        selector: the model's choice under processors and sampling noise.
        stopping: criteria, streamer and output ids.
        schedule: chooses the shape of each step.
        execution: how steps run; eagerly if the call wants more than the tokens, or processors see each token.
        scores, logits: filled if the caller asked for them.
        fills: whether finished rows go on, as pads, because the caller gets their cache or scores.
    """

    LAGS_ON: tuple[str, ...] = ("cuda",)
    PREFILL_SLOTS = 512

    def __init__(
        self,
        forward: Forward,
        state: DecodingState,
        selector: Selector,
        stopping: StoppingRules,
        schedule: Schedule,
        execution: Execution,
        scores: Scores | None = None,
        logits: Scores | None = None,
        *,
        fills: bool = False,
    ) -> None:
        rows = len(state.generated_B)
        self._forward = forward
        self._state = state
        self._cache = state.cache
        self._selector = selector
        self._stopping = stopping
        self._scores = scores
        self._logits = logits
        self._records = scores is not None or logits is not None
        self._fills = fills
        wants_tokens_alone = selector.is_vectorised and not self._records
        self._execution = execution
        self._one_by_one = OneByOne(state, selector, stopping, scores, logits)
        self._schedule = schedule
        self._lookup = HostLookup(state, stopping.limit)
        self._drafted = schedule.drafts_always  # whether the last step got guesses for the next
        self._restarted: CopiedReport | None = None  # valid guesses of the backbone, if it restarted for the next step
        self._text_start = int(state.start_B.max())
        device_is_async = self._cache.lengths_B.device.type in self.LAGS_ON
        self._lag = int(wants_tokens_alone and not stopping.is_one_by_one and device_is_async)
        self._reads_exactly = not device_is_async and not execution.few_shapes
        self._launched: deque[LaunchedStep] = deque()
        self._running = [True] * rows
        self._made = execution.compiled, execution.recorded
        self._last = StepReport.before_the_prefill(rows, len(state.sources.branch_names))
        self.stats = JacobiStats(new_tokens=[0] * rows, row_forwards=[0] * rows)
        # For each row and step: the row, its tokens before and after, the source that won, and accepted guesses. They
        # are counted at the end, because a criterion may end a row within the tokens of an earlier step.
        self._runs: list[tuple[int, int, int, str, int]] = []

    def run(self, prompt: Prompt, keep_going: Callable[[bool], bool]) -> None:
        """Decode until every row has ended.

        Args:
            prompt: the prompt of every row.
            keep_going: called before each forward with whether this process is done; returns whether to run another
                forward. If this process is done, the forward is idle, for processes that are not.
        """
        started = time.perf_counter()
        self._clock = StepClock()
        self._prefill(prompt)
        prefilled = time.perf_counter()
        self._schedule.start(prompt.inputs.shape[1], prefilled - started)
        while keep_going(self._finished()):
            if self._finished():
                self._idle_forward()
            else:
                self._decode()
        self._read_reports(waiting=0)
        if not self._stopping.is_one_by_one:
            self._stopping.copy_texts(self._state.text_BL, self._state.start_B, self._last.generated)
        self.stats.prefill_seconds = prefilled - started
        self.stats.decode_seconds = time.perf_counter() - prefilled
        self._schedule.end()
        self.stats.probing_seconds = self._schedule.probing_seconds
        self._finish_statistics()

    def _finish_statistics(self) -> None:
        stats = self.stats
        stats.compiled_steps = self._execution.compiled
        stats.cuda_graphs = self._execution.recorded
        stats.new_tokens = [end or 0 for end in self._stopping.ended]
        for row, first, last, name, accepted in self._runs:
            count = max(0, min(last, stats.new_tokens[row]) - first)
            stats.accepted_lengths[count] += 1
            if accepted:
                stats.accepted_from[name] += min(count, accepted)

    def _finished(self) -> bool:
        """Return whether every row has ended and has its pads, if it needs some."""
        stopping = self._stopping
        lacks_pads = self._fills and stopping.pads and min(self._last.generated) < stopping.generated
        return stopping.done and not lacks_pads

    def _prefill(self, prompt: Prompt) -> None:
        """Run the model over the prompt and choose the first token."""
        output, features = prompt_forward(self._forward, self._state, prompt, self.PREFILL_SLOTS)
        self._cache.lengths_B -= 1  # the last prompt token counts as pending
        self._base = self._cache.lengths_B.tolist()
        self._vocab_size = output.logits_BQV.shape[-1]
        nothing_B1 = torch.zeros_like(prompt.length_B)[:, None]
        inputs = StepInputs(build_layout((0,), prompt.length_B.device), nothing_B1, nothing_B1)
        self._finish(inputs, output, drafts=self._drafted)
        read_prompt_parts(self._state, prompt, features)
        self._launch([], StepShape(0, (), drafts=self._drafted), 0, 1)
        self._read_reports(waiting=0)

    def _idle_forward(self) -> None:
        """Run a forward of one slot whose outcome is not used, for peers that wait for one."""
        layout = build_layout((0,), self._cache.lengths_B.device)
        self._forward(ForwardInputs(layout, self._columns(layout), self._state.pending_B1))

    def _decode(self) -> None:
        """Launch a step, and read the report of the one before if the host lags, else its own."""
        state = self._state
        shape = self._next_shape()
        self._lookup.write(shape.branches, self._last)
        layout = shape.layout(self._cache.lengths_B.device)
        names = state.sources.names(shape.branches)
        candidates = candidates_of(state.inputs(shape, layout), names) if self._stopping.has_step_streamer else ()
        self._step(shape, layout)
        self._launch(names, shape, layout.slots, layout.offset_D.shape[0], candidates)
        self._read_reports(waiting=self._lag)

    def _next_shape(self) -> StepShape:
        """Return the shape of the next step; give the backbone guesses if it has none."""
        last = self._last
        states = enumerate(zip(last.ended, last.generated, strict=True))
        unfinished = [row for row, (ended, tokens) in states if not ended and tokens < self._stopping.limit]
        needs_guesses = self._schedule.decide(self._last, unfinished)
        if needs_guesses and not self._drafted:
            self._state.restart()
            if self._lag:
                self._restarted = CopiedReport(self._state.width_B)
            else:
                self._last = replace(self._last, widths=self._state.width_B.tolist())
        known = None if self._lag else self._last
        shape = self._execution.shape(self._schedule.shape(known, self._active_rows()))
        self._drafted = shape.drafts
        return shape

    def _active_rows(self) -> list[int]:
        """Return the rows that the next step advances: those that have not ended, or all if finished rows go on."""
        return [row for row, ended in enumerate(self._last.ended) if self._fills or not ended]

    def _may_be_over(self) -> bool:
        """Return whether a row may have halted or have all its tokens, as far as the host knows."""
        return bool(self._lag) or any(self._last.ended) or max(self._last.generated) >= self._stopping.limit

    def _unread(self) -> int:
        """Return how many tokens a row may have that the host does not know of."""
        return sum(step.tokens for step in self._launched)

    def _longest_cached(self) -> int:
        """Return a number of tokens that no row exceeds in the cache."""
        unread = self._unread()
        limit = self._stopping.limit
        tokens = zip(self._base, self._last.generated, strict=True)
        return max(base + min(limit, generated + unread) for base, generated in tokens)

    def _text_columns(self, layout: Layout) -> int:
        """Return how many columns of the text may be in use after a step."""
        generated = min(self._stopping.limit, max(self._last.generated) + self._unread())
        return self._text_start + generated + layout.offset_D.shape[0]

    def _columns(self, layout: Layout) -> torch.Tensor:
        """Make room for a step, and return the columns of the cache that it reads; the text has no more in use."""
        longest = max(self._longest_cached(), self._text_columns(layout) - layout.slots)
        self._state.reserve(longest + layout.slots)
        return self._cache.columns(layout.slots, longest, exact=self._reads_exactly)

    def _past(self) -> int | None:
        """Return the cached tokens of every row, if the host knows that all have as many."""
        if self._lag:
            return None
        past, *others = (base + count for base, count in zip(self._base, self._last.generated, strict=True))
        return past if all(other == past for other in others) else None

    def _step(self, shape: StepShape, layout: Layout) -> None:
        """Run one step of the given shape."""
        key_column_K = self._columns(layout)
        self._draw_noise(layout)
        if not self._selector.is_vectorised:
            inputs = self._state.inputs(shape, layout)
            output = self._forward(ForwardInputs(layout, key_column_K, inputs.token_BQ, past=self._past()))
            self._finish(inputs, output, drafts=shape.drafts)
            return
        record = self._record if self._records else None
        plan = StepPlan(shape, layout, key_column_K, self._may_be_over(), self._past(), record)
        self._execution.run(self._state, self._forward, self._selector, plan)

    def _finish(self, inputs: StepInputs, output: ForwardOutput, *, drafts: bool) -> None:
        """Do what comes after a forward that no execution has run: the prefill, and steps that go token by token."""
        layout = inputs.layout
        may_be_over = self._may_be_over()
        text_columns = self._text_columns(layout)
        self._draw_noise(layout)
        if self._selector.is_vectorised:
            finish_step(
                self._state,
                self._selector,
                inputs,
                output,
                text_columns=text_columns,
                drafts=drafts,
                may_be_over=may_be_over,
                record=self._record if self._records else None,
            )
        else:
            acceptance = self._one_by_one.accept(inputs, output.logits_BQV)
            features_BQF = output.features_BQF
            advance(
                self._state, inputs, acceptance, features_BQF, text_columns, drafts=drafts, may_be_over=may_be_over
            )

    def _draw_noise(self, layout: Layout) -> None:
        """Make the sampling noise of every slot's new-token index available."""
        noise = self._selector.noise
        if noise is None or (not self._selector.is_vectorised and not noise.ahead):
            return
        running_at = [self._last.generated[row] for row in self._active_rows()]
        last = max(running_at) + self._unread() + layout.offset_D.shape[0] - 1
        noise.draw(min(running_at), last, (len(self._last.generated), self._vocab_size))

    def _record(self, inputs: StepInputs, acceptance: Acceptance, logits_BQV: torch.Tensor) -> None:
        """Store scores and logits of the tokens that a step commits, one token of each row at a time."""
        counts = acceptance.count_B.tolist()
        row_B = torch.arange(len(counts), device=logits_BQV.device)
        for depth in range(max(counts)):
            slot_B = acceptance.path_BD[:, depth]
            logits_BV = logits_BQV[row_B, slot_B]
            rows = zip(self._last.generated, counts, strict=True)
            indices = [generated + depth if depth < count else None for generated, count in rows]
            if self._logits is not None:
                self._logits.record(logits_BV, indices)
            if self._scores is not None:
                place_B = row_B * inputs.layout.slots + slot_B
                scores_BV = self._selector.scores(inputs.layout, inputs.token_BQ, logits_BV, place_B)
                self._scores.record(scores_BV, indices)

    def _launch(
        self, names: list[str], shape: StepShape, slots: int, tokens: int, candidates: tuple[Candidate, ...] = ()
    ) -> None:
        """Note a step that the device was just given, and begin to copy its report."""
        report_N = self._state.report_N
        report = CopiedReport(report_N) if self._lag else lambda: report_N
        made = self._execution.compiled, self._execution.recorded
        is_new = made != self._made
        self._made = made
        label = self._state.sources.label(shape) if names else ""
        self._launched.append(
            LaunchedStep(names, shape, label, slots, tokens, report, candidates, is_new, self._restarted)
        )
        self._restarted = None

    def _read_reports(self, *, waiting: int) -> None:
        """Read the reports of all launched steps but the last `waiting` ones."""
        while len(self._launched) > waiting:
            launched = self._launched.popleft()
            if launched.widths is not None:
                self._last = replace(self._last, widths=launched.widths().tolist())
            before = self._last
            rows = [row for row, runs in enumerate(self._running) if self._counts(before, row, runs=runs)]
            self._read(launched)
            seconds = self._clock.seconds_since_last(launched.report)
            if launched.names:
                self.stats.seconds_by_width[launched.slots].append(seconds)
                self.stats.note_step(launched.label, seconds)
                self._schedule.note(before, self._last, launched.shape, rows, math.nan if launched.is_new else seconds)

    def _read(self, launched: LaunchedStep) -> None:
        """Read one step's report: update criteria, streamer, statistics, and what the next step needs."""
        before = self._last
        report, is_broken = StepReport.of(launched.report().tolist(), len(self._running))
        check_samples(is_broken)
        if not launched.shape.drafts:
            report = report.of_text_alone(self._state.sources.branches_read_text_alone)
        self._last = report
        self._lookup.update(report)
        stopping = self._stopping
        if stopping.is_one_by_one and self._selector.is_vectorised:
            stopping.copy_texts(self._state.text_BL, self._state.start_B, report.generated)
        stopped = stopping.advance(report.generated, report.ended)
        self._count(before, launched)
        self._running = [end is None for end in stopping.ended]
        if stopped:
            self._halt(stopped)
        stopping.report_step(launched.candidates, launched.label)

    def _count(self, before: StepReport, launched: LaunchedStep) -> None:
        """Add a step to the statistics."""
        stats = self.stats
        stats.forwards += 1
        for row, runs in enumerate(self._running):
            if not self._counts(before, row, runs=runs):
                continue
            stats.row_forwards[row] += 1
            if not launched.names:  # the prefill
                continue
            first = before.generated[row]
            last = self._last.generated[row]
            accepted = self._last.accepted[row]
            self._runs.append((row, first, last, launched.names[self._last.best[row]], last - first - 1))
            if launched.slots == 1:
                continue
            shape = launched.shape
            stats.drafted += min(before.widths[row], max(shape.backbone, shape.draft_slots))
            stats.verified += min(before.widths[row], shape.backbone)
            stats.accepted += accepted
            backbone, branches = before.sent(shape, row)
            stats.note_row(backbone + sum(branches), last - first - 1)

    def _counts(self, before: StepReport, row: int, *, runs: bool) -> bool:
        """Return whether a row had not ended before a step."""
        return runs and not before.ended[row] and before.generated[row] < self._stopping.limit

    def _halt(self, rows: list[int]) -> None:
        """Take back what these rows have after the token at which a criterion ended them; they go on as pads."""
        state = self._state
        report = self._last
        generated = list(report.generated)
        ended = list(report.ended)
        for row in rows:
            end = self._stopping.ended[row]
            assert end is not None
            state.roll_back(row, generated[row] - end)
            self._selector.recount(row, self._stopping.output(row))
            generated[row] = end
            ended[row] = True
        state.clip(state.width_B)
        branches = [
            [0 if over else length for length, over in zip(lengths, ended, strict=True)] for lengths in report.branches
        ]
        widths = state.width_B.tolist()
        self._last = replace(report, generated=generated, widths=widths, ended=ended, branches=branches)
