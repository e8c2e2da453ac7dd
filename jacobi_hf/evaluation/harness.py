"""Measure ordinary and Jacobi decoding on the same tasks of lm-evaluation-harness: scores, tokens per forward, speed,
identity.

Each prompt is answered once with every decoder, one decoder after another, alone in its batch. Then the harness scores
the outputs of each decoder in a pass of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import evaluate as score_tasks
from lm_eval.models.huggingface import HFLM

from jacobi_hf.evaluation.decoding import BASELINE
from jacobi_hf.loading import positions_of
from jacobi_hf.output import acceptance_length_of
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Quality, Speedup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.output import JacobiStats
    from jacobi_hf.resume import Progress

BOOTSTRAPS = 1000  # for scores that are not means


@dataclass(frozen=True)
class Output:
    """Output of one decoder for one request, with its counts.

    Attributes:
        text: the text that is scored, without stop strings.
        ids: ids of the new tokens.
        forwards: model forwards, prefill included.
        slots: positions computed in decoding forwards.
        steps: number of decoding forwards.
        seconds: wall time of the call.
        accepted_lengths: number of decoding forwards by the number of tokens that they committed, as in `JacobiStats`.
        steps_by_shape: number of steps by their shape, as in `JacobiStats`.
        accepted_guesses: number of steps that verified guesses by how many they accepted, as in `JacobiStats`.
    """

    text: str
    ids: list[int]
    forwards: int
    slots: int
    steps: int
    seconds: float
    accepted_lengths: dict[int, int] = field(default_factory=dict)
    accepted_guesses: dict[int, int] = field(default_factory=dict)
    steps_by_shape: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, ids: list[int], stats: JacobiStats | None, seconds: float) -> Output:
        """Return the output of one call of `generate`.

        Args:
            text: the text that is scored.
            ids: ids of the new tokens.
            stats: statistics of Jacobi decoding; None for ordinary decoding, which runs one forward for each token.
            seconds: wall time of the call.
        """
        if stats is None:
            return cls(text, ids, len(ids), len(ids) - 1, len(ids) - 1, seconds)
        return cls(
            text,
            ids,
            stats.forwards,
            stats.slots,
            stats.slots_by_width.total(),
            seconds,
            dict(sorted(stats.accepted_lengths.items())),
            dict(sorted(stats.accepted_guesses.items())),
            dict(stats.steps_by_shape),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Output:
        """Return the output that was written as JSON, which has turned the keys of its histograms into strings."""
        histograms = {
            name: {int(length): count for length, count in value.get(name, {}).items()}
            for name in ("accepted_lengths", "accepted_guesses")
        }
        return cls(**{**value, **histograms})


class Journal:
    """Outputs of an evaluation by decoder and request, kept so that an interrupted one generates only what is missing.

    Args:
        progress: the file that keeps the outputs; None keeps them in memory only.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        parts = {} if progress is None else progress.parts
        self._outputs = {name: Output.from_json(value) for name, value in parts.items()}

    def get(self, decoder: str, request: int) -> Output | None:
        """Return the output of a decoder for a request, or None if it is missing."""
        return self._outputs.get(f"{decoder}/{request}")

    def add(self, decoder: str, request: int, output: Output) -> None:
        """Keep an output."""
        name = f"{decoder}/{request}"
        self._outputs[name] = output
        if self._progress is not None:
            self._progress.add(name, dataclasses.asdict(output))

    def close(self) -> None:
        """Delete the file, when every output is there."""
        if self._progress is not None:
            self._progress.remove()


class AlternatingLM(HFLM):
    """A model of the harness that answers each request with every decoder in turn.

    All decoders answer when the harness asks for the first time. Later passes of the harness get the same outputs.

    Args:
        model: model of a registered class, in eval mode.
        tokenizer: the model's tokenizer.
        decoders: arguments of `generate` by the name of the decoder.
        journal: returns where outputs are kept, for the fingerprint of the requests.
        progress: progress bar; takes and yields the indices of the requests.

    Attributes:
        answers_with: name of the decoder whose texts the harness gets.
        outputs: outputs by the name of the decoder, in the order of the requests.
        task_names: name of the task of each request.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoders: Mapping[str, Mapping[str, Any]],
        journal: Callable[[str], Journal],
        progress: Callable[[Sequence[int]], Iterable[int]],
    ) -> None:
        # The harness cuts prompts at `max_position_embeddings`, which stretched embeddings go beyond.
        positions = positions_of(model)
        longest = None if math.isinf(positions) else int(positions)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest)
        self._decoders = decoders
        self._journal = journal
        self._progress = progress
        self._arguments: Mapping[str, Any] = {}
        self._last: tuple[list[int], JacobiStats | None, float] = ([], None, 0.0)
        self.answers_with = next(iter(decoders))
        self.outputs: dict[str, list[Output]] = {}
        self.task_names: list[str] = []
        self._fingerprint = ""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the texts of `answers_with` for the requests, which have to be the same in every pass.

        Raises:
            RuntimeError: the requests differ from those of the first pass.
        """
        fingerprint = hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()
        if not self.outputs:
            self.task_names = [str(request.task_name) for request in requests]
            self._fingerprint = fingerprint
            self._generate_all(requests)
        if fingerprint != self._fingerprint:
            raise RuntimeError("lm-evaluation-harness asked for other texts in its second pass than in its first.")
        return [output.text for output in self.outputs[self.answers_with]]

    def _generate_all(self, requests: list[Instance]) -> None:
        """Answer every request with every decoder, unless the journal has the output already."""
        journal = self._journal(self._fingerprint)
        for name in self._decoders:
            self._generate(name, requests[0], 0)  # warm up, so that no timing includes what is slow only once
        for number in self._progress(range(len(requests))):
            for name in self._decoders:
                if journal.get(name, number) is None:
                    journal.add(name, number, self._generate(name, requests[number], number))
        found = {name: [journal.get(name, number) for number in range(len(requests))] for name in self._decoders}
        self.outputs = {name: [output for output in outputs if output is not None] for name, outputs in found.items()}
        journal.close()

    def _generate(self, name: str, request: Instance, seed: int) -> Output:
        """Return the output of one decoder for one request."""
        self._arguments = self._decoders[name]
        torch.manual_seed(seed)  # a task that samples gets the same sampling noise with every decoder
        (text,) = super().generate_until([request], disable_tqdm=True)
        ids, stats, seconds = self._last
        return Output.of(text, ids, stats, seconds)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Run the harness's call of `generate` with the decoder's arguments; keep its ids, statistics and seconds."""
        arguments = {**generation_kwargs, **self._arguments, "return_dict_in_generate": True}
        started = time.perf_counter()
        output: Any = super()._model_generate(context, max_length, stop, **arguments)
        ids = output.sequences[0, context.shape[1] :].tolist()
        self._last = ids, getattr(output, "jacobi_stats", None), time.perf_counter() - started
        sequences: torch.Tensor = output.sequences
        return sequences


def measure(
    lm: AlternatingLM,
    tasks: Mapping[str, Any],
    decoders: Mapping[str, JacobiConfig | None],
    *,
    limit: int | None = None,
    chat: bool = False,
    drafter: str | None = None,
) -> list[Measurement]:
    """Return a measurement of every decoder on every task, the baseline first.

    Args:
        lm: the model that answers.
        tasks: tasks of the harness by name; see `load_tasks`.
        decoders: how each decoder of `lm` decodes; None is ordinary decoding.
        limit: most problems of a task; None takes all.
        chat: whether prompts go through the chat template.
        drafter: name that the results give the drafter in use; None without a drafter.
    """
    scores = {name: _scores(lm, tasks, name, limit, chat=chat) for name in decoders}
    measured = []
    for task_name, task in tasks.items():
        rows = [number for number, of in enumerate(lm.task_names) if of == task_name]
        outputs = {name: [lm.outputs[name][row] for row in rows] for name in decoders}
        prompts = _prompts(task_name, task, len(rows))
        for name, config in decoders.items():
            decoder = Decoder(name=name, kind="generate") if config is None else Decoder.of(name, config, drafter)
            quality, others = _quality(scores[name], task_name)
            measured.append(_measurement(decoder, prompts, outputs, quality, others))
    return measured


def _scores(lm: AlternatingLM, tasks: Mapping[str, Any], decoder: str, limit: int | None, *, chat: bool) -> Any:
    """Return the harness's scores of one decoder on all tasks."""
    lm.answers_with = decoder
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)  # the same examples in every pass
    return score_tasks(
        lm=lm,
        task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=chat,
        confirm_run_unsafe_code=True,
    )


def _prompts(name: str, task: Any, count: int) -> Prompts:
    """Return the description of a task's prompts for the results."""
    options = task.config.generation_kwargs or {}
    source = task.config.dataset_path or (task.config.metadata or {}).get("source") or "task file"
    longest = options.get("max_gen_toks", 256)
    return Prompts(
        domain=name, source=str(source), count=count, max_new_tokens=longest, do_sample=bool(options.get("do_sample"))
    )


def _measurement(
    decoder: Decoder,
    prompts: Prompts,
    outputs: dict[str, list[Output]],
    quality: Quality | None,
    scores: dict[str, float],
) -> Measurement:
    """Return the measurement of one decoder on one task.

    Args:
        decoder: the decoder.
        prompts: description of the task's prompts.
        outputs: outputs for the task, by the name of the decoder.
        quality: first score of the task; None without an interval.
        scores: all scores of the task.
    """
    mine = outputs[decoder.name]
    reference = outputs[BASELINE]
    is_baseline = decoder.name == BASELINE
    tokens = sum(len(one.ids) for one in mine)
    forwards = sum(one.forwards for one in mine)
    factor = _tokens_per_second(mine) / _tokens_per_second(reference)
    agreement = Agreement.between([one.ids for one in mine], [one.ids for one in reference], BASELINE)
    accepted: Counter[int] = sum((Counter(one.accepted_lengths) for one in mine), Counter())
    shapes: Counter[str] = sum((Counter(one.steps_by_shape) for one in mine), Counter())
    guesses: Counter[int] = sum((Counter(one.accepted_guesses) for one in mine), Counter())
    return Measurement(
        decoder=decoder,
        prompts=prompts,
        new_tokens=tokens,
        forwards=forwards,
        tokens_per_forward=tokens / forwards,
        per_prompt_tokens_per_forward=[len(one.ids) / one.forwards for one in mine],
        mean_slots=sum(one.slots for one in mine) / max(1, sum(one.steps for one in mine)),
        seconds=sum(one.seconds for one in mine),
        repeats=1,
        tokens_per_second=_tokens_per_second(mine),
        mean_acceptance_length=acceptance_length_of(guesses) if guesses else None,
        accepted_lengths=dict(sorted(accepted.items())) or None,
        quality=quality,
        speedups=[] if is_baseline else [Speedup(baseline=BASELINE, factor=factor)],
        agreement=None if is_baseline else agreement,
        extra={"scores": scores} | ({"steps_by_shape": dict(shapes)} if decoder.adaptive else {}),
    )


def _tokens_per_second(outputs: Sequence[Output]) -> float:
    return sum(len(one.ids) for one in outputs) / sum(one.seconds for one in outputs)


def _quality(results: Any, task: str) -> tuple[Quality | None, dict[str, float]]:
    """Return a task's first score with its interval, and all scores by the harness's names ("metric,filter").

    Args:
        results: what the harness returned for one decoder.
        task: name of the task.
    """
    found: dict[str, Any] = results["results"][task]
    scores = {
        key: float(value)
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        values = [
            sample[metric] for sample in results["samples"][task] if sample["filter"] == filtered and metric in sample
        ]
        if values and all(one in (0, 1) for one in values):
            return Quality.of_share(key, int(sum(values)), len(values)), scores
        spread = found.get(f"{metric}_stderr,{filtered}")
        if isinstance(spread, float):
            low = value - 1.96 * spread
            high = value + 1.96 * spread
            return Quality(metric=key, value=value, low=low, high=high, samples=len(values)), scores
    return None, scores
