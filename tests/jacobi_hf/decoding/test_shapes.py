"""The shapes of steps under both schedules, and what a step without guesses costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList

from jacobi_hf import JacobiConfig
from jacobi_hf.decoding import step
from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.decoding.report import CopiedReport, StepClock
from jacobi_hf.decoding.shapes import AdaptiveSchedule
from jacobi_hf.decoding.state import DecodingState
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.tuning.controller import Controller
from jacobi_hf.tuning.memory import Memory
from jacobi_hf.tuning.options import Option, RowOutcome
from tests.helpers.calls import prompt
from tests.helpers.cases import Case, cases
from tests.helpers.models import tiny_model
from tests.helpers.properties import at_most
from tests.helpers.schedules import let_the_host_lag, random_shapes


@given(case=cases().filter(lambda case: case.knobs.get("jacobi_schedule") == "adaptive"))
@at_most(40)
def test_guesses_that_were_not_sent_never_count_as_accepted(case: Case) -> None:
    """Sources have more guesses than a step sends. Only those in the step are valid, accepted and counted."""
    inputs_of = DecodingState.inputs
    accept = step.accept
    sent = []

    def watch_inputs(self, shape, layout):
        inputs = inputs_of(self, shape, layout)
        starts = (0, *(start for start, used in zip(shape.starts, shape.branches, strict=False) if used), 0)
        most = [start + length for start, length in zip(starts, layout.lengths, strict=False)]
        sent.append(torch.tensor(most))
        assert (inputs.length_BS <= sent[-1]).all()
        return inputs

    def watch_accept(state, inputs, *rest, **options):
        acceptance = accept(state, inputs, *rest, **options)
        assert (acceptance.accepted_BS <= inputs.length_BS).all()
        return acceptance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingState, "inputs", watch_inputs)
        patch.setattr(step, "accept", watch_accept)
        output, _ = case.generate(**case.knobs)
    assert sent or case.arguments["max_new_tokens"] == 1 or "eos_token_id" in case.arguments
    if case.returns_dict:
        stats = output.jacobi_stats
        assert stats.accepted <= stats.verified <= stats.drafted
        assert sum(length * count for length, count in stats.accepted_guesses.items()) <= stats.guesses


@given(case=cases().filter(lambda case: case.knobs.get("jacobi_schedule") == "adaptive"), lags=st.booleans())
@at_most(60)
def test_counted_guesses_are_those_that_were_sent(case: Case, lags: bool) -> None:
    """What the host counts for each row and segment is what the tensors of the step held."""
    run_step = Decoder._step
    count = Decoder._count
    sent = []

    def watch_step(self, shape, layout):
        starts = [0, *(start for start, used in zip(shape.starts, shape.branches, strict=True) if used)]
        length_BS = self._state.inputs(shape, layout).length_BS[:, : layout.verified_segments]
        sent.append((length_BS - torch.tensor(starts)).clamp(min=0).tolist())
        run_step(self, shape, layout)

    def watch_count(self, before, launched):
        if launched.names:
            in_step = sent.pop(0)
            for row, runs in enumerate(self._running):
                backbone, branches = before.sent(launched.shape, row)
                used = [length for length, used in zip(branches, launched.shape.branches, strict=True) if used]
                assert not self._counts(before, row, runs=runs) or [backbone, *used] == in_step[row]
        count(self, before, launched)

    with pytest.MonkeyPatch.context() as patch:
        let_the_host_lag(patch, lags=lags)
        patch.setattr(Decoder, "_step", watch_step)
        patch.setattr(Decoder, "_count", watch_count)
        case.generate(**case.knobs)


def test_shapes_are_named_in_the_statistics():
    """Every decoding step has a name and a time, and a call that never sends a guess has steps of one slot alone."""
    model = tiny_model("qwen3")
    arguments = {"decoding": "jacobi_multiblock", "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with random_shapes(3) as chosen:
        stats = model.generate(prompt(1, 6), **arguments, return_dict_in_generate=True).jacobi_stats
    assert sum(stats.steps_by_shape.values()) == stats.forwards - 1 == len(chosen)
    assert stats.steps_by_shape.keys() == stats.seconds_by_shape.keys()
    assert sum(stats.seconds_by_shape.values()) <= stats.decode_seconds
    assert any("lookup" in name or "window" in name for name in stats.steps_by_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "choose", lambda self, orders: self._options[0])
        stats = model.generate(prompt(1, 6), **arguments, return_dict_in_generate=True).jacobi_stats
    assert set(stats.steps_by_shape) == {"1"}
    assert stats.mean_tokens_per_forward == 1


class OperationCount(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Unchanged(LogitsProcessor):
    """A caller's processor, which decoding has to call token by token."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("processors", [None, [Unchanged()]], ids=["alone", "with a processor"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_one_slot_takes_no_more_operations_than_ordinary_decoding(kind, processors, monkeypatch):
    """Where nothing is drafted, a token takes at most 1.02 times the tensor operations of ordinary `generate`."""
    model = tiny_model(kind)
    monkeypatch.setattr(Controller, "choose", lambda self, orders: self._options[0])

    def operations(tokens, **arguments):
        with OperationCount() as counted:
            model.generate(
                prompt(1, 6),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList(processors or []),
                **arguments,
            )
        return counted.count

    def per_token(**arguments):
        return (operations(40, **arguments) - operations(20, **arguments)) / 20

    per_token(decoding="jacobi_multiblock")
    # A tiny model of two layers has few operations in which a constant number of others could hide.
    assert per_token(decoding="jacobi_multiblock") <= 1.02 * per_token()


def schedule_of(config, memory, *, few, limit=40):
    sources = sources_of(config, tiny_model("qwen3"))
    return AdaptiveSchedule(sources, config, limit, memory, key="key", sampled=False, few=few)


def test_a_call_makes_one_shape_at_most(monkeypatch):
    """Where each shape is compiled, a call adds one to those that earlier calls have made."""
    config = JacobiConfig()
    memory = Memory()
    wanted = [Option(lookup=16), Option(lookup=16), Option(backbone=32, lookup=16, others=True), Option()]
    ran = []
    for _ in range(2):
        schedule = schedule_of(config, memory, few=True)
        options = iter(wanted)
        monkeypatch.setattr(schedule._controller, "choose", lambda orders, options=options: next(options))
        report = SimpleNamespace(generated=[1], orders=[1])
        for _ in wanted:
            schedule.decide(report, [0])
            ran.append(schedule._option)
    assert ran[:4] == [wanted[0], wanted[0], Option(), Option()]
    assert ran[4:] == wanted
    # Steps of other knobs are other code, although their options may be equal.
    others = schedule_of(JacobiConfig(jacobi_branch_length=3), memory, few=True)
    assert not others._made


def test_shapes_that_must_not_be_made_are_not_waited_for():
    """A trial of a window whose steps are not made must not keep the call from a lookup that pays."""
    memory = Memory()
    config = JacobiConfig()
    memory.made["key", config].add(Option(lookup=16))
    for _ in range(3):
        schedule = schedule_of(config, memory, few=True, limit=128)
        schedule._may_make = False
        controller = schedule._controller
        ran = []
        total = 0
        for _ in range(100):
            schedule.decide(SimpleNamespace(generated=[1], orders=[3]), [0])
            option = schedule._option
            accepted = min(option.lookup, 4)
            total += 1 + accepted
            outcome = RowOutcome(1 + accepted, total, 3, (option.lookup, accepted), (option.backbone, 0))
            controller.note(option, schedule._slots(option), 1.0, [outcome])
            ran.append(option)
        controller.end()
    assert ran.count(Option(lookup=16)) > 90


@given(
    width=st.sampled_from([0, 2, 16, 32]),
    lookup=st.sampled_from([0, 1, 16]),
    pool=st.integers(0, 3),
    few=st.booleans(),
    limit=st.integers(1, 40),
)
def test_knobs_are_upper_limits(width, lookup, pool, few, limit):
    if not width and not lookup:
        return
    config = JacobiConfig(
        jacobi_block_size=max(2, width),
        jacobi_max_blocks=int(width > 0),
        jacobi_lookup_tokens=lookup,
        jacobi_pool_size=pool,
    )
    schedule = schedule_of(config, Memory(), few=few, limit=limit)
    options = schedule._options
    assert options[0] == Option()
    assert len(options) <= (6 if few else 20)
    for option in options:
        assert option.backbone <= min(width, limit)
        assert option.lookup <= min(lookup, limit)
        schedule._option = option
        shape = schedule.shape(None, [])
        assert shape.backbone + sum(shape.branches) + 1 <= schedule._slots(option)


class Event:
    """An event of a device, which passed at a time."""

    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_times_of_a_device_come_from_its_events():
    """The host reads a report late; the time of a step is that between the events of two reports."""
    clock = StepClock()
    reports = [SimpleNamespace(arrived=Event(at)) for at in (5.0, 5.5, 7.5)]
    assert clock.seconds_since_last(reports[0]) < 5  # there is no event before it
    assert clock.seconds_since_last(reports[1]) == pytest.approx(0.5)
    assert clock.seconds_since_last(reports[2]) == pytest.approx(2.0)
    assert 0 <= clock.seconds_since_last(lambda: None) < 5
    report_N = torch.arange(4)
    copied = CopiedReport(report_N)
    report_N.zero_()
    assert copied().tolist() == [0, 1, 2, 3]
