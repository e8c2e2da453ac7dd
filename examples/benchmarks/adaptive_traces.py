"""Acceptance traces for adaptive_simulation.py: what each draft source would have contributed at each token of a text.

A trace holds numbers only, no text. It comes from one decode with the default setting under
`jacobi_schedule="constant"`. The lookup depends on the text alone, so it is replayed at every position. The window and
the pool are known where the decode began a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import common
import torch

from jacobi_hf import JacobiConfig
from jacobi_hf.streaming import StepEvent, StepStreamer

TRACES = common.RESULTS / "adaptive_traces.json"
LOOKUP = 16  # guesses of the lookup that are replayed
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one digit a number
UNKNOWN = "."
TASKS: dict[str, Callable[[Path], list[str]]] = {
    "code": lambda data: _field(data / "humaneval.jsonl", "prompt"),
    "math": lambda data: _field(data / "gsm8k_test.jsonl", "question"),
    "chat": lambda data: _spec_bench(data, ("writing", "roleplay", "reasoning", "extraction", "stem", "humanities")),
    "summarization": lambda data: _spec_bench(data, ("summarization",)),
}


@dataclass(frozen=True)
class Trace:
    """Numbers of one decoded text. A string has a digit of base 36 for each new token but the last.

    The digit at index i is about a step that begins after i + 1 new tokens.

    Attributes:
        prompt: tokens of the prompt.
        order: length of the n-gram that the lookup matches, 0 to 3.
        lookup: guesses of the lookup that would be accepted, of 16.
        window: guesses of the window or of the drafter that would be accepted; "." where no step began.
        others: the same for the best branch of the pool.
    """

    prompt: int
    order: str
    lookup: str
    window: str
    others: str


def read(path: Path = TRACES) -> dict[str, dict[str, list[Trace]]]:
    """Return the traces of each domain of each model; an empty dict if there is no file."""
    stored = json.loads(path.read_text(encoding="utf-8"))["traces"] if path.exists() else {}
    return {
        model: {domain: [Trace(**trace) for trace in traces] for domain, traces in domains.items()}
        for model, domains in stored.items()
    }


def write(traces: dict[str, dict[str, list[Trace]]], path: Path = TRACES) -> None:
    """Write traces with one line a text."""
    models = []
    for model, domains in sorted(traces.items()):
        lines = [
            f'    "{domain}": [\n      ' + ",\n      ".join(json.dumps(asdict(one)) for one in found) + "\n    ]"
            for domain, found in domains.items()
        ]
        models.append(f'  "{model}": {{\n' + ",\n".join(lines) + "\n  }")
    about = json.dumps(" ".join((__doc__ or "").split()))
    path.write_text(f'{{"about": {about},\n"traces": {{\n' + ",\n".join(models) + "\n}}\n", encoding="utf-8")


def prompts_of(data: Path | None, count: int) -> dict[str, list[str]]:
    """Return prompts of each domain: those of the tiny models, or tasks from a folder of JSONL files."""
    if data is None:
        return common.prompts(count)
    return {domain: load(data)[:count] for domain, load in TASKS.items()}


def encoded(tokenizer: Any, prompt: str, *, chat: bool) -> dict[str, torch.Tensor]:
    """Return the inputs of `generate` for a prompt, as a message of a chat if asked for."""
    if not chat:
        return dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    messages = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )


class Recorder(StepStreamer):
    """Keeps the reports of all forwards of a call."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []

    def step(self, step: StepEvent) -> None:
        """Keep a report."""
        self.events.append(step)


def record(model: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Trace:
    """Return the trace of a greedy decode."""
    recorder = Recorder()
    knobs = JacobiConfig(jacobi_schedule="constant").to_knobs()
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=recorder, **knobs)
    prompt = inputs["input_ids"][0].tolist()
    new = [token for event in recorder.events for token in event.token_ids]
    matches = [looked_up(prompt + new[:place]) for place in range(1, len(new))]
    backbone: dict[int, int] = {}
    others: dict[int, int] = {}
    place = 0
    for event in recorder.events:
        after = new[place:]
        for candidate in event.candidates:
            accepted = common_prefix(candidate.token_ids, after)
            if candidate.is_backbone:
                backbone[place] = accepted
            elif candidate.source == "lookup":
                assert list(candidate.token_ids) == matches[place - 1][1][: len(candidate.token_ids)]
            else:
                others[place] = max(accepted, others.get(place, 0))
        if place and place not in others:
            others[place] = 0
        place += len(event.token_ids)
    places = range(1, len(new))
    return Trace(
        prompt=len(prompt),
        order="".join(str(order) for order, _ in matches),
        lookup="".join(DIGITS[common_prefix(matches[at - 1][1], new[at:])] for at in places),
        window="".join(digit(backbone.get(at)) for at in places),
        others="".join(digit(others.get(at)) for at in places),
    )


def digit(number: int | None) -> str:
    """Return the digit of a number, the largest digit for larger ones."""
    return UNKNOWN if number is None else DIGITS[min(number, len(DIGITS) - 1)]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many items two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def looked_up(text: list[int], length: int = LOOKUP, longest: int = 3) -> tuple[int, list[int]]:
    """Return what `NgramLookup` does with a text: the length of the match, and the guesses."""
    last = len(text) - 1
    best = (0, 0)
    for place in range(last):
        order = 0
        while order < longest and place >= order and text[place - order] == text[last - order]:
            order += 1
        best = max(best, (order, place))
    order, place = best
    if not order:
        return 0, []
    return order, [text[place + 1 + n % (last - place)] for n in range(length)]


def _field(path: Path, name: str) -> list[str]:
    """Return a field of every line of a JSONL file."""
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


def _spec_bench(data: Path, categories: tuple[str, ...]) -> list[str]:
    """Return the first turns of categories of Spec-Bench, in turn from each category."""
    lines = [json.loads(line) for line in (data / "spec_bench.jsonl").read_text(encoding="utf-8").splitlines()]
    by_category = [[one["turns"][0] for one in lines if one["category"] == category] for category in categories]
    return [prompt for together in zip(*by_category, strict=True) for prompt in together]
