"""Parts that the benchmarks share: models, prompts, decoders, and a stopwatch on every forward.

- *TPF*: new tokens divided by forwards. The prefill counts, so ordinary decoding has 1.0.
- *slots*: positions that one decoding forward computes.
- *ms per forward*: wall time from the start of one forward to the start of the next, with everything between them.
- *looping*: the last 48 tokens of an output repeat with a period below 20.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import jacobi_hf
from jacobi_hf.config import CONSTANT
from jacobi_hf.output import JacobiStats, acceptance_length_of
from jacobi_hf.results.schema import Decoder

EXAMPLES = Path(__file__).resolve().parents[1]
TINY = EXAMPLES / "tiny_qwen3"
CHECKPOINT = TINY / "checkpoint"
PROMPTS = TINY / "prompts.json"
MODELS = {"base": CHECKPOINT, "forced": TINY / "forced"}
RESULTS = Path(__file__).resolve().parent / "results"
NGRAM = 3  # the longest n-gram that our lookup matches; prompt lookup gets the same


@dataclass(frozen=True)
class Contender:
    """A decoder: its entry in the results, and the arguments that `generate` gets for it."""

    decoder: Decoder
    arguments: dict[str, Any]


@dataclass
class Stopwatch:
    """Start times and widths of a model's forwards, in the order in which they ran."""

    starts: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def on(cls, model: Any) -> Stopwatch:
        """Return the stopwatch of a model.

        The first call attaches a hook to the model. The hook stays, because a new one would recompile the model.
        """
        if model not in _WATCHES:
            watch = cls()

            @torch.compiler.disable
            def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
                ids = kwargs.get("input_ids", args[0] if args else None)
                watch.starts.append((time.perf_counter(), ids.shape[1]))

            model.register_forward_pre_hook(note, with_kwargs=True)
            _WATCHES[model] = watch
        return _WATCHES[model]

    def milliseconds(self, ended: float) -> dict[int, list[float]]:
        """Return the milliseconds of the decoding forwards by width, without the prefill.

        Args:
            ended: when the last forward ended, in seconds of `time.perf_counter`.
        """
        times = defaultdict(list)
        for (start, width), (following, _) in zip(self.starts[1:], [*self.starts[2:], (ended, 0)], strict=False):
            times[width].append((following - start) * 1e3)
        return times


_WATCHES: WeakKeyDictionary[Any, Stopwatch] = WeakKeyDictionary()


@dataclass(frozen=True)
class Run:
    """One output, with its forwards and its time."""

    tokens: list[int]
    forwards: int
    seconds: float
    milliseconds: dict[int, list[float]]

    @property
    def slots(self) -> list[int]:
        """The width of every decoding forward."""
        return [width for width, times in self.milliseconds.items() for _ in times]


def load(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """Return model, tokenizer, and the model's name in the results; without a name, the tiny checkpoint."""
    source = name or str(CHECKPOINT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(source), name or "examples/tiny_qwen3/checkpoint"


def prompts(count: int) -> dict[str, list[str]]:
    """Return the first `count` held-out prompts of each domain."""
    stored = json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]
    return {domain: texts[:count] for domain, texts in stored.items()}


def ordinary() -> Contender:
    """Return ordinary eager `generate` with a DynamicCache, whatever the checkpoint's generation config says."""
    return Contender(Decoder(name="generate", kind="generate"), {"decoding": None})


def sampled(contender: Contender) -> Contender:
    """Return the contender with sampling at temperature 1."""
    return Contender(contender.decoder, contender.arguments | {"do_sample": True, "top_k": 0})


def compiled(room: int) -> Contender:
    """Return ordinary `generate` with a StaticCache for `room` tokens and a compiled forward."""
    config = CompileConfig(mode="default", fullgraph=False)  # the stopwatch breaks the graph once, before the forward
    config._compile_all_devices = True
    arguments = {"cache_implementation": "static", "max_cache_len": room, "compile_config": config}
    return Contender(Decoder(name="generate-static-compiled", kind="generate-static-compiled"), arguments)


def prompt_lookup(tokens: int) -> Contender:
    """Return transformers' own prompt lookup of so many tokens."""
    decoder = Decoder(name=f"prompt-lookup-{tokens}", kind="prompt-lookup", lookup_tokens=tokens)
    return Contender(decoder, {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": NGRAM})


def jacobi(name: str, drafter: str | None = None, **changes: Any) -> Contender:
    """Return Jacobi decoding with these knobs under a name; `drafter` is the drafter that the model has loaded.

    Every step sends all guesses, unless the knobs name another schedule.
    """
    config = jacobi_hf.JacobiConfig(**{"jacobi_schedule": CONSTANT} | changes)
    return Contender(Decoder.of(name, config, drafter), config.to_knobs())


def run(model: Any, tokenizer: Any, contender: Contender, prompt: str, max_new_tokens: int) -> Run:
    """Return a continuation of one prompt: greedy, or with a fixed seed if the contender's arguments sample."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    watch = Stopwatch.on(model)
    watch.starts.clear()
    torch.manual_seed(0)
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False} | contender.arguments)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    ended = time.perf_counter()
    return Run(tokens, len(watch.starts), ended - started, watch.milliseconds(ended))


def stats_of(
    model: Any, inputs: dict[str, torch.Tensor], arguments: dict[str, Any], max_new_tokens: int
) -> JacobiStats:
    """Return the statistics of a greedy continuation by Jacobi decoding.

    Do not time this call: its output also holds the cache.
    """
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **arguments
    )
    stats: JacobiStats = output.jacobi_stats
    return stats


def accepted_lengths(stats: list[JacobiStats]) -> dict[int, int]:
    """Return how many decoding forwards committed how many tokens, over all statistics."""
    return dict(sorted(sum((one.accepted_lengths for one in stats), Counter[int]()).items()))


def acceptance_length(stats: list[JacobiStats]) -> float | None:
    """Return the mean acceptance length over all statistics; None if no step verified a guess."""
    accepted = sum((one.accepted_guesses for one in stats), Counter[int]())
    return round(acceptance_length_of(accepted), 4) if accepted else None


def medians_by_width(runs: list[Run]) -> dict[int, float]:
    """Return the median ms per forward of each width that ran at least five times."""
    times: dict[int, list[float]] = defaultdict(list)
    for one in runs:
        for width, values in one.milliseconds.items():
            times[width] += values
    return {width: round(statistics.median(values), 3) for width, values in sorted(times.items()) if len(values) >= 5}
