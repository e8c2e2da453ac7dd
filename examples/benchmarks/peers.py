"""Compare autotuned Jacobi decoding with transformers' own decoding strategies.

    OMP_NUM_THREADS=1 python examples/benchmarks/peers.py

The models are the tiny base, the forced tiny model, and the base with its drafter. Transformers' strategies are
ordinary `generate`, prompt lookup of three lengths, and assisted decoding with a draft model of 1.1 M parameters
(examples/tiny_qwen3/README.md). Each runs eagerly. Ordinary `generate`, prompt lookup and assisted decoding also run
with a static cache and a compiled forward, which transformers compiles for the last two since 5.24. A strategy of
transformers that fails in the installed release is left out and named on standard error. Early exit is not among them:
on these models it reached 0.15 to 0.2 of ordinary speed (transformers 5.24).

`autotune` gets other prompts of the domain than the timed ones. All strategies run in one process, in turn on every
prompt, several times. The seconds of a strategy are the sum of its medians per prompt. Baselines: each eager strategy
is compared with all eager ones, each compiled strategy with all compiled ones, and eager Jacobi decoding also with
compiled `generate`.

The document is written after every domain of a model, and `--resume` continues one. The last line on stdout is its
path.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, CompileConfig

import jacobi_hf
from jacobi_hf.output import JacobiStats
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Results, Speedup
from jacobi_hf.tuning.autotune import Tuning, autotune
from jacobi_hf.tuning.strategies import describe

ROOM = 512
WITH_DRAFTER = "base + drafter"


@dataclass
class Strategy:
    """A decoding strategy with the results of its runs.

    Attributes:
        arguments: for `generate`.
        ours: whether it is a strategy of this library.
        note: the setting that autotune chose, in words.
        seconds: by prompt, then by repeat.
        outputs: new tokens by prompt.
        forwards: of the full model, over all prompts, where they can be counted.
        stats: of Jacobi decoding, by prompt.
    """

    decoder: Decoder
    arguments: dict[str, Any]
    ours: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        self.seconds: list[list[float]] = []
        self.outputs: list[list[int]] = []
        self.forwards = 0
        self.stats: list[JacobiStats] = []

    @property
    def total(self) -> float:
        """The seconds for all prompts once: the sum of the medians."""
        return sum(statistics.median(times) for times in self.seconds)


def compiling() -> CompileConfig:
    """Return a config that compiles on every device, the CPU included."""
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    return config


def compiled_generate() -> dict[str, Any]:
    """Return the arguments of `generate` with a static cache and a compiled forward."""
    return {"cache_implementation": "static", "max_cache_len": ROOM, "compile_config": compiling()}


def theirs(draft: Any) -> list[Strategy]:
    """Return transformers' strategies, ordinary `generate` first; `draft` is the model of assisted decoding."""
    lookups = [
        Strategy(
            Decoder(name=f"prompt-lookup-{tokens}", kind="prompt-lookup", lookup_tokens=tokens),
            {"prompt_lookup_num_tokens": tokens},
        )
        for tokens in (5, 10, 16)
    ]
    assisted = Strategy(Decoder(name="assisted", kind="assisted"), {"assistant_model": draft})
    ordinary = Decoder(name="generate-compiled", kind="generate-static-compiled", compiled=True)
    compiled_too = [
        Strategy(
            one.decoder.model_copy(update={"name": f"{one.decoder.name}-compiled", "compiled": True}),
            one.arguments | compiled_generate(),
        )
        for one in (*lookups, assisted)
        if one.decoder.name in ("prompt-lookup-10", "assisted")
    ]
    return [
        Strategy(Decoder(name="generate", kind="generate"), {}),
        *lookups,
        assisted,
        Strategy(ordinary, compiled_generate()),
        *compiled_too,
    ]


def ours(tuning: Tuning, drafter: str | None) -> list[Strategy]:
    """Return the strategy that autotune chose, eager and compiled.

    If autotune chose assisted or ordinary decoding, the compiled one is ordinary decoding.
    """
    note = describe(tuning.strategy, drafted=tuning.drafted)
    if tuning.config is None:
        eager = Decoder(name="autotuned", kind="generate" if tuning.strategy is None else "assisted")
        compiled = Decoder(name="autotuned-compiled", kind="generate-static-compiled", compiled=True)
        return [
            Strategy(eager, tuning.knobs, ours=True, note=note),
            Strategy(compiled, compiled_generate(), ours=True, note=describe(None)),
        ]
    eager = Decoder.of("autotuned", tuning.config, drafter)
    compiled = eager.model_copy(update={"name": "autotuned-compiled", "compiled": True})
    return [
        Strategy(eager, tuning.knobs, ours=True, note=note),
        Strategy(compiled, {**tuning.knobs, "compile_config": compiling()}, ours=True, note=note),
    ]


def once(
    model: Any, inputs: dict[str, torch.Tensor], strategy: Strategy, max_new_tokens: int
) -> tuple[list[int], float]:
    """Return the new tokens of one greedy output, and its seconds."""
    started = time.perf_counter()
    # The forced checkpoint's generation config switches Jacobi decoding on.
    arguments = {"decoding": None, **strategy.arguments}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **arguments)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, time.perf_counter() - started


def warmed_up(model: Any, encoded: list[dict[str, torch.Tensor]], strategy: Strategy, max_new_tokens: int) -> bool:
    """Compile and warm up outside the clock; false for a strategy of transformers' own that its release cannot run."""
    try:
        for inputs in encoded:
            once(model, inputs, strategy, max_new_tokens)
    except Exception as error:
        if strategy.ours:
            raise
        reason = str(error).partition("\n")[0]
        print(f"{strategy.decoder.name} is left out. {type(error).__name__}: {reason}", file=sys.stderr)
        return False
    return True


def count_forwards(model: Any, inputs: dict[str, torch.Tensor], strategy: Strategy, max_new_tokens: int) -> None:
    """Count forwards of an eager strategy, and collect statistics of Jacobi decoding, in runs that are not timed."""

    def note(*_: Any) -> None:
        strategy.forwards += 1

    if not strategy.decoder.compiled:
        hook = model.lm_head.register_forward_pre_hook(note)
        once(model, inputs, strategy, max_new_tokens)
        hook.remove()
    if strategy.decoder.kind == "jacobi_multiblock":
        strategy.stats.append(common.stats_of(model, inputs, strategy.arguments, max_new_tokens))


def compare(
    model: Any, tokenizer: Any, draft: Any, name: str, domain: str, count: int, max_new_tokens: int, repeats: int
) -> list[Measurement]:
    """Run all strategies on the prompts of a domain."""
    texts = common.prompts(count + 12)[domain]
    tuning = autotune(
        model,
        texts[count:],
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        progress=False,
        assistant_model=draft,
    )
    drafter = "examples/tiny_qwen3/drafter" if name == WITH_DRAFTER else None
    contenders = [*theirs(draft), *ours(tuning, drafter)]
    encoded = [
        dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device))
        for text in texts[:count]
    ]
    contenders = [strategy for strategy in contenders if warmed_up(model, encoded, strategy, max_new_tokens)]
    for inputs in track(encoded, description=f"{name} {domain}", console=Console(stderr=True)):
        for strategy in contenders:
            strategy.seconds.append([])
        for repeat in range(repeats):
            for strategy in contenders:
                output, seconds = once(model, inputs, strategy, max_new_tokens)
                strategy.seconds[-1].append(seconds)
                if not repeat:
                    strategy.outputs.append(output)
        for strategy in contenders:
            count_forwards(model, inputs, strategy, max_new_tokens)
    jacobi_hf.clear_graphs(model)
    torch.compiler.reset()
    return [measured(strategy, contenders, name, domain, max_new_tokens, repeats) for strategy in contenders]


def measured(
    strategy: Strategy, contenders: list[Strategy], model: str, domain: str, max_new_tokens: int, repeats: int
) -> Measurement:
    """Return the measurement of a strategy, with its speed-up over each strategy of transformers."""
    reference = contenders[0].outputs
    different = [i for i, (a, b) in enumerate(zip(reference, strategy.outputs, strict=True)) if a != b]
    others = [p for p in contenders if not p.ours and p is not strategy]
    peers = [
        p
        for p in others
        if p.decoder.compiled == strategy.decoder.compiled or (strategy.ours and p.decoder.name == "generate-compiled")
    ]
    tokens = sum(map(len, strategy.outputs))
    return Measurement(
        decoder=strategy.decoder,
        model=model,
        prompts=Prompts(
            domain=domain,
            source="examples/tiny_qwen3/prompts.json",
            count=len(reference),
            max_new_tokens=max_new_tokens,
        ),
        new_tokens=tokens,
        forwards=strategy.forwards or None,
        tokens_per_forward=round(tokens / strategy.forwards, 4) if strategy.forwards else None,
        seconds=round(strategy.total, 4),
        repeats=repeats,
        tokens_per_second=round(tokens / strategy.total, 2),
        speedups=[Speedup(baseline=p.decoder.name, factor=round(p.total / strategy.total, 4)) for p in peers],
        agreement=Agreement(
            baseline="generate", identical=len(reference) - len(different), total=len(reference), different=different
        ),
        mean_acceptance_length=common.acceptance_length(strategy.stats),
        accepted_lengths=common.accepted_lengths(strategy.stats) or None,
        extra={"setting": strategy.note} if strategy.ours else {},
    )


def kept(path: Path, document: Results) -> list[Measurement]:
    """Return the measurements of an interrupted run.

    Args:
        path: its document.
        document: the empty document of this run.

    Raises:
        typer.BadParameter: the two differ in code, machine, threads, dtype or device.
    """
    found = Results.read(path)
    for name in ("software", "hardware", "threads", "dtype", "device"):
        if getattr(found, name) != getattr(document, name):
            raise typer.BadParameter(
                f"{path.name} was measured with another {name}, {getattr(found, name)}. "
                "Run without --resume to start again."
            )
    return found.measurements


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS / "peers.json",
    draft: Annotated[Path, typer.Option(help="The draft model of assisted decoding.")] = common.TINY / "draft",
    count: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    models: Annotated[
        str | None, typer.Option(help="Some of base, forced, base + drafter, separated by commas (default: all).")
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Domains, separated by commas (default: all).")] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep the measurements of the document; code and machine must be the same.")
    ] = False,
) -> None:
    """Compare the strategies on all models and domains, or on some."""
    assistant = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    document = Results.start("Autotuned decoding against transformers' own strategies", common.load(None)[0], "tiny")
    measurements = kept(output, document) if resume and output.exists() else []
    folders = {**common.MODELS, WITH_DRAFTER: common.CHECKPOINT}
    for name in models.split(",") if models else folders:
        folder = folders[name]
        model, tokenizer, _ = common.load(str(folder))
        if name == WITH_DRAFTER:
            jacobi_hf.load_drafter(model, common.TINY / "drafter")
        assistant.to(model.device)
        for domain in domains.split(",") if domains else common.prompts(1):
            if any((m.model, m.prompts.domain) == (name, domain) for m in measurements):
                continue
            measurements += compare(model, tokenizer, assistant, name, domain, count, max_new_tokens, repeats)
            document.with_measurements(measurements).write(output)
            for m in measurements[-9:]:
                ahead = " ".join(f"{s.baseline} {s.factor:.2f}" for s in m.speedups)
                equal = m.agreement.identical if m.agreement else 0
                setting = m.extra.get("setting", "")
                speed = f"{m.tokens_per_second:7.1f} tok/s TPF {m.tokens_per_forward} identical {equal}"
                print(f"{m.model:6s} {m.prompts.domain:10s} {m.decoder.name:20s} {speed} {setting} | {ahead}")
    print(output)


if __name__ == "__main__":
    typer.run(main)
