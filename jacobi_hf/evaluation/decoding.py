"""Measure greedy decoding of prompts: tokens per forward, slots per step, and agreement with ordinary `generate`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.output import acceptance_length_of
from jacobi_hf.prompts import encode_prompts
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Speedup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jacobi_hf.config import JacobiConfig

BASELINE = "generate"  # name of ordinary decoding in results
_WARM_UP = 8  # tokens that each decoder writes before the clock runs


@dataclass(frozen=True)
class DecodingReport:
    """Counts and outputs of decoding a list of prompts one at a time.

    Attributes:
        new_tokens: new tokens of each prompt.
        forwards: model forwards of each prompt, prefill included.
        mean_slots: positions per decoding forward, over all prompts.
        outputs: ids of the new tokens of each prompt.
        steps_by_shape: number of steps by their shape, as in `JacobiStats`.
        accepted_guesses: number of steps that verified guesses by how many they accepted, as in `JacobiStats`.
        seconds: wall time of each prompt.
    """

    new_tokens: list[int]
    forwards: list[int]
    mean_slots: float
    outputs: list[list[int]]
    steps_by_shape: Counter[str] = field(default_factory=Counter)
    accepted_guesses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, calls: Sequence[_Call]) -> DecodingReport:
        """Return the counts of several calls."""
        return cls(
            [len(call.output) for call in calls],
            [call.forwards for call in calls],
            sum(call.slots for call in calls) / max(1, sum(call.steps for call in calls)),
            [call.output for call in calls],
            sum((call.shapes for call in calls), Counter()),
            sum((call.accepted for call in calls), Counter()),
            [call.seconds for call in calls],
        )

    @property
    def tokens_per_second(self) -> float:
        """New tokens over seconds, all prompts together."""
        return sum(self.new_tokens) / sum(self.seconds)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forwards, all prompts together."""
        return sum(self.new_tokens) / sum(self.forwards)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Mean tokens of a step that verified guesses, all prompts together; None if no step did."""
        return acceptance_length_of(self.accepted_guesses) if self.accepted_guesses else None

    @property
    def per_prompt(self) -> list[float]:
        """Tokens per forward of each prompt."""
        return [tokens / forwards for tokens, forwards in zip(self.new_tokens, self.forwards, strict=True)]

    @property
    def looping(self) -> list[int]:
        """Indices of the prompts whose output ends in a loop."""
        return [number for number, output in enumerate(self.outputs) if is_looping(output)]

    @property
    def loop_free(self) -> float | None:
        """Tokens per forward over the prompts whose output ends in no loop; None if there is no such prompt."""
        looping = set(self.looping)
        free = [
            counts
            for number, counts in enumerate(zip(self.new_tokens, self.forwards, strict=True))
            if number not in looping
        ]
        return sum(tokens for tokens, _ in free) / sum(forwards for _, forwards in free) if free else None


def is_looping(tokens: Sequence[int], tail: int = 48, longest_period: int = 19) -> bool:
    """Return whether the last `tail` tokens repeat with a period of at most `longest_period` tokens."""
    last = list(tokens[-tail:])
    return len(last) == tail and any(last[p:] == last[:-p] for p in range(1, longest_period + 1))


def untracked(rows: Iterable[Any], what: str) -> Iterable[Any]:  # noqa: ARG001
    """Return the rows unchanged: a progress bar that shows nothing.

    Args:
        rows: items to iterate over.
        what: label that a visible progress bar would show.
    """
    return rows


def measure_decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: JacobiConfig,
    max_new_tokens: int,
) -> DecodingReport:
    """Decode prompts greedily with Jacobi decoding, one prompt at a time, and return the counts.

    Args:
        model: model of a registered class, in eval mode.
        prompts: token ids of each prompt.
        config: how to decode.
        max_new_tokens: most new tokens of each prompt.
    """
    return DecodingReport.of([_call(model, prompt, config, max_new_tokens) for prompt in prompts])


def compare_decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoders: Mapping[str, JacobiConfig | None],
    max_new_tokens: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
    what: str = "",
) -> dict[str, DecodingReport]:
    """Decode each prompt greedily with each decoder, and return the counts of each decoder by its name.

    The decoders take turns, so that whatever else the machine does slows down all of them. Before that, each decodes a
    few tokens that do not count.

    Args:
        model: model of a registered class, in eval mode.
        prompts: token ids of each prompt.
        decoders: how to decode, by name; None is ordinary decoding.
        max_new_tokens: most new tokens of each prompt.
        track: progress bar, called as `untracked` is.
        what: label of the progress bar.
    """
    calls: dict[str, list[_Call]] = {name: [] for name in decoders}
    names = list(decoders)
    for config in decoders.values() if prompts else ():
        _call(model, prompts[0], config, min(max_new_tokens, _WARM_UP))
    for number, prompt in enumerate(track(prompts, what)):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls[name].append(_call(model, prompt, decoders[name], max_new_tokens))
    return {name: DecodingReport.of(found) for name, found in calls.items()}


@dataclass(frozen=True)
class _Call:
    """One call of `generate` for one prompt."""

    output: list[int]
    seconds: float
    forwards: int
    slots: int
    steps: int
    shapes: Counter[str] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)


def _call(model: PreTrainedModel, prompt: Sequence[int], config: JacobiConfig | None, max_new_tokens: int) -> _Call:
    options = {"decoding": None} if config is None else config.to_knobs()
    started = time.perf_counter()
    output = _generate(model, prompt, max_new_tokens, return_dict_in_generate=True, **options)
    ids = output.sequences[0, len(prompt) :].tolist()
    seconds = time.perf_counter() - started
    if config is None:
        return _Call(ids, seconds, len(ids), len(ids) - 1, len(ids) - 1)
    stats = output.jacobi_stats
    steps = stats.slots_by_width.total()
    return _Call(ids, seconds, stats.forwards, stats.slots, steps, stats.steps_by_shape, stats.accepted_guesses)


def ordinary_outputs(model: PreTrainedModel, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the new token ids that ordinary greedy decoding writes for each prompt, one prompt at a time."""
    return [_generate(model, prompt, max_new_tokens, decoding=None)[0, len(prompt) :].tolist() for prompt in prompts]


def _generate(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> Any:
    """Return the output of one greedy call of `generate` for one prompt."""
    ids_1P = torch.tensor([list(prompt)], device=model.device)
    return model.generate(
        input_ids=ids_1P,
        attention_mask=torch.ones_like(ids_1P),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )


def measurements(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Any]],
    decoders: Mapping[str, JacobiConfig],
    max_new_tokens: int,
    drafter: str | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
    *,
    chat: bool | None = None,
) -> list[Measurement]:
    """Return speed, tokens per forward and agreement of each decoder, and of ordinary decoding, by domain.

    Args:
        model: model of a registered class, in eval mode.
        tokenizer: the model's tokenizer.
        prompts: prompts by the name of their domain, as `jacobi_hf.prompts.read_prompts` returns them.
        decoders: settings of Jacobi decoding by the name that the results give them.
        max_new_tokens: most new tokens of each prompt.
        drafter: name that the results give the drafter in use; None without a drafter.
        track: progress bar, called as `untracked` is.
        chat: whether texts go through the chat template, see `jacobi_hf.prompts.encode_prompts`.

    Raises:
        ValueError: the chat template is missing or refuses a prompt, or a prompt has no tokens.
    """
    measured = []
    for domain, texts in prompts.items():
        ids = encode_prompts(texts, tokenizer, model.name_or_path, chat=chat)
        described = Prompts(domain=domain, source="held-out prompts", count=len(ids), max_new_tokens=max_new_tokens)
        reports = compare_decoding(model, ids, {BASELINE: None, **decoders}, max_new_tokens, track, domain)
        ordinary = reports.pop(BASELINE)
        measured.append(_measurement(Decoder(name=BASELINE, kind="generate"), described, ordinary))
        for name, report in reports.items():
            one = _measurement(Decoder.of(name, decoders[name], drafter), described, report)
            factor = report.tokens_per_second / ordinary.tokens_per_second
            beside = {
                "agreement": Agreement.between(report.outputs, ordinary.outputs),
                "speedups": [Speedup(baseline=BASELINE, factor=factor)],
            }
            measured.append(one.model_copy(update=beside))
    return measured


def _measurement(decoder: Decoder, prompts: Prompts, report: DecodingReport) -> Measurement:
    return Measurement(
        decoder=decoder,
        prompts=prompts,
        new_tokens=sum(report.new_tokens),
        forwards=sum(report.forwards),
        tokens_per_forward=report.tokens_per_forward,
        tokens_per_forward_loop_free=report.loop_free,
        per_prompt_tokens_per_forward=report.per_prompt,
        looping=report.looping,
        mean_slots=report.mean_slots,
        mean_acceptance_length=report.mean_acceptance_length,
        seconds=sum(report.seconds),
        tokens_per_second=report.tokens_per_second,
        extra={"steps_by_shape": dict(report.steps_by_shape)} if decoder.adaptive else {},
    )
