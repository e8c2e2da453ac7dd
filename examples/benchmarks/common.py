"""What the benchmarks share: the model, the prompts, the decoders, and a stopwatch on every forward.

Terms. *TPF*: new tokens over forwards, prefill counted, so ordinary decoding is 1.0. *Slots*: positions that one decoding forward
computes. *ms per forward*: wall time from the start of one forward to the start of the next, so everything around the forward is
in it. *Looping*: the last 48 tokens of an output are periodic with a period under 20.
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
from jacobi_hf.output import JacobiStats
from jacobi_hf.results.schema import Decoder

EXAMPLES = Path(__file__).resolve().parents[1]
TINY = EXAMPLES / "tiny_qwen3"
CHECKPOINT, PROMPTS = TINY / "checkpoint", TINY / "prompts.json"
MODELS = {"base": CHECKPOINT, "forced": TINY / "forced"}
RESULTS = Path(__file__).resolve().parent / "results"
NGRAM = 3  # longest n-gram that our lookup matches, given to prompt lookup too


@dataclass(frozen=True)
class Contender:
    """A way to decode: how it is reported, and what `generate` is given for it."""

    decoder: Decoder
    arguments: dict[str, Any]


@dataclass
class Stopwatch:
    """Start times and widths of a model's forwards."""

    starts: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def on(cls, model: Any) -> Stopwatch:
        """The stopwatch of a model, attached when it is first asked for. One hook for good: a new one would recompile the model."""
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
        """Times of decoding forwards by width; the prefill, which comes first, is left out."""
        times = defaultdict(list)
        for (start, width), (following, _) in zip(self.starts[1:], [*self.starts[2:], (ended, 0)], strict=False):
            times[width].append((following - start) * 1e3)
        return times


_WATCHES: WeakKeyDictionary[Any, Stopwatch] = WeakKeyDictionary()


@dataclass(frozen=True)
class Run:
    """One output and what it took."""

    tokens: list[int]
    forwards: int
    seconds: float
    milliseconds: dict[int, list[float]]

    @property
    def slots(self) -> list[int]:
        """Width of every decoding forward."""
        return [width for width, times in self.milliseconds.items() for _ in times]


def load(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """Model, tokenizer, and the name that they are reported under."""
    source = name or str(CHECKPOINT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(source), name or "examples/tiny_qwen3/checkpoint"


def prompts(count: int) -> dict[str, list[str]]:
    """The first `count` held-out prompts of each domain."""
    stored = json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]
    return {domain: texts[:count] for domain, texts in stored.items()}


def ordinary() -> Contender:
    """`generate` as it is: eager, with a DynamicCache, whatever the checkpoint's generation config asks for."""
    return Contender(Decoder(name="generate", kind="generate"), {"decoding": None})


def sampled(contender: Contender) -> Contender:
    """The same, at temperature 1."""
    return Contender(contender.decoder, contender.arguments | {"do_sample": True, "top_k": 0})


def compiled(room: int) -> Contender:
    """`generate` with a StaticCache for `room` tokens and a compiled forward."""
    config = CompileConfig(
        mode="default", fullgraph=False
    )  # the stopwatch breaks the graph once, in front of the forward
    config._compile_all_devices = True
    arguments = {"cache_implementation": "static", "max_cache_len": room, "compile_config": config}
    return Contender(Decoder(name="generate-static-compiled", kind="generate-static-compiled"), arguments)


def prompt_lookup(tokens: int) -> Contender:
    """Transformers' own prompt lookup."""
    decoder = Decoder(name=f"prompt-lookup-{tokens}", kind="prompt-lookup", lookup_tokens=tokens)
    return Contender(decoder, {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": NGRAM})


def jacobi(name: str, drafter: str | None = None, **changes: Any) -> Contender:
    """A setting of ours under a name, for a model that has `drafter` in use."""
    config = jacobi_hf.JacobiConfig(**changes)
    return Contender(Decoder.of(name, config, drafter), config.to_knobs())


def run(model: Any, tokenizer: Any, contender: Contender, prompt: str, max_new_tokens: int) -> Run:
    """A continuation of one prompt: greedy, unless the contender's arguments sample; then always with the same seed."""
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
    """The statistics of a greedy continuation by a decoder of ours. Apart from the clock: who asks for them is handed a cache too."""
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **arguments
    )
    stats: JacobiStats = output.jacobi_stats
    return stats


def accepted_lengths(stats: list[JacobiStats]) -> dict[int, int]:
    """In how many decoding forwards so many tokens were committed, all together."""
    return dict(sorted(sum((one.accepted_lengths for one in stats), Counter[int]()).items()))


def medians_by_width(runs: list[Run]) -> dict[int, float]:
    """Median ms per forward of each width that was seen at least five times."""
    times: dict[int, list[float]] = defaultdict(list)
    for one in runs:
        for width, values in one.milliseconds.items():
            times[width] += values
    return {width: round(statistics.median(values), 3) for width, values in sorted(times.items()) if len(values) >= 5}
