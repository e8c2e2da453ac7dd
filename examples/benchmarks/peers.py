"""Ours, as autotuned, against transformers' own ways to decode, on the base, the forced tiny checkpoint, and the base with its drafter.

    OMP_NUM_THREADS=1 python examples/benchmarks/peers.py

Transformers' prompt lookup and assisted decoding also run with a static cache and a compiled forward, which it offers since 5.24.
A way of transformers' own that fails in the installed release is left out, and named on standard error. Early exit is not among them: on
these models it ran at 0.15 to 0.2 of ordinary speed (transformers 5.24).

`autotune` sees other prompts of the domain than those that are timed. All ways run in one process, in turn on every prompt, several times
over; a way's seconds are the sum of its medians per prompt. Uncompiled ways are compared with uncompiled ones, compiled with compiled, and
ours uncompiled with compiled `generate` too. The document is written after every domain of a model; `--resume` goes on where it ends.
The draft of assisted decoding has 1.1 M parameters and was trained by the same script on the same texts (examples/tiny_qwen3/README.md).
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
from jacobi_hf.tuning.autotune import Tuning, autotune, describe

ROOM = 512
WITH_DRAFTER = "base + drafter"


@dataclass
class Way:
    """A way to decode, whose it is, and what it did: seconds per prompt and repeat, outputs, forwards of the model, our statistics."""

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
        """Seconds for all prompts once."""
        return sum(statistics.median(times) for times in self.seconds)


def compiling() -> CompileConfig:
    """Compiled on whatever device."""
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    return config


def ways(tuning: Tuning, draft: Any, drafter: str | None) -> list[Way]:
    """Transformers' own, and ours."""
    ordinary = {"cache_implementation": "static", "max_cache_len": ROOM, "compile_config": compiling()}
    static = Decoder(name="autotuned-compiled", kind="generate-static-compiled", compiled=True)
    speculative = [
        *(
            Way(
                Decoder(name=f"prompt-lookup-{tokens}", kind="prompt-lookup", lookup_tokens=tokens),
                {"prompt_lookup_num_tokens": tokens},
            )
            for tokens in (5, 10, 16)
        ),
        Way(Decoder(name="assisted", kind="assisted"), {"assistant_model": draft}),
    ]
    compiled_too = [
        Way(
            one.decoder.model_copy(update={"name": f"{one.decoder.name}-compiled", "compiled": True}),
            one.arguments | ordinary,
        )
        for one in speculative
        if one.decoder.name in ("prompt-lookup-10", "assisted")
    ]
    found = [
        Way(Decoder(name="generate", kind="generate"), {}),
        *speculative,
        Way(static.model_copy(update={"name": "generate-compiled"}), ordinary),
        *compiled_too,
    ]
    note = describe(tuning.way, drafted=tuning.drafted)
    if tuning.config is None:
        kind = "generate" if tuning.way is None else "assisted"
        found.append(Way(Decoder(name="autotuned", kind=kind), tuning.knobs, ours=True, note=note))
        found.append(Way(static, ordinary, ours=True, note=describe(None)))  # the one way of theirs that is compiled
    else:
        plain, compiled = (Decoder.of(name, tuning.config, drafter) for name in ("autotuned", "autotuned-compiled"))
        knobs = tuning.knobs
        found.append(Way(plain, knobs, ours=True, note=note))
        found.append(
            Way(
                compiled.model_copy(update={"compiled": True}),
                {**knobs, "compile_config": compiling()},
                ours=True,
                note=note,
            )
        )
    return found


def once(model: Any, inputs: dict[str, torch.Tensor], way: Way, max_new_tokens: int) -> tuple[list[int], float]:
    """One greedy output and its seconds."""
    started = time.perf_counter()
    # The forced checkpoint is saved with a decoding of its own.
    arguments = {"decoding": None, **way.arguments}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **arguments)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, time.perf_counter() - started


def warmed_up(model: Any, encoded: list[dict[str, torch.Tensor]], way: Way, max_new_tokens: int) -> bool:
    """Compile and warm up outside the clock; false for a way of transformers' own that its release cannot run."""
    try:
        for inputs in encoded:
            once(model, inputs, way, max_new_tokens)
    except Exception as error:
        if way.ours:
            raise
        reason = str(error).partition("\n")[0]
        print(f"{way.decoder.name} is left out: {type(error).__name__}: {reason}", file=sys.stderr)
        return False
    return True


def count_forwards(model: Any, inputs: dict[str, torch.Tensor], way: Way, max_new_tokens: int) -> None:
    """How often the whole model ran where that can be told, and what our decoder counted; apart from the clock."""

    def note(*_: Any) -> None:
        way.forwards += 1

    if not way.decoder.compiled:
        hook = model.lm_head.register_forward_pre_hook(note)
        once(model, inputs, way, max_new_tokens)
        hook.remove()
    if way.decoder.kind == "jacobi_multiblock":
        way.stats.append(common.stats_of(model, inputs, way.arguments, max_new_tokens))


def compare(
    model: Any, tokenizer: Any, draft: Any, name: str, domain: str, count: int, max_new_tokens: int, repeats: int
) -> list[Measurement]:
    """All ways on the prompts of a domain."""
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
    contenders = ways(tuning, draft, drafter)
    encoded = [
        dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device))
        for text in texts[:count]
    ]
    contenders = [way for way in contenders if warmed_up(model, encoded, way, max_new_tokens)]
    for inputs in track(encoded, description=f"{name} {domain}", console=Console(stderr=True)):
        for way in contenders:
            way.seconds.append([])
        for repeat in range(repeats):
            for way in contenders:
                output, seconds = once(model, inputs, way, max_new_tokens)
                way.seconds[-1].append(seconds)
                if not repeat:
                    way.outputs.append(output)
        for way in contenders:
            count_forwards(model, inputs, way, max_new_tokens)
    jacobi_hf.clear_graphs(model)
    torch.compiler.reset()
    return [measured(way, contenders, name, domain, max_new_tokens, repeats) for way in contenders]


def measured(
    way: Way, contenders: list[Way], model: str, domain: str, max_new_tokens: int, repeats: int
) -> Measurement:
    """What a way came to, and over each of transformers' own ways that runs as it does."""
    reference = contenders[0].outputs
    different = [i for i, (a, b) in enumerate(zip(reference, way.outputs, strict=True)) if a != b]
    theirs = [p for p in contenders if not p.ours and p is not way]
    peers = [
        p
        for p in theirs
        if p.decoder.compiled == way.decoder.compiled or (way.ours and p.decoder.name == "generate-compiled")
    ]
    tokens = sum(map(len, way.outputs))
    return Measurement(
        decoder=way.decoder,
        model=model,
        prompts=Prompts(
            domain=domain,
            source="examples/tiny_qwen3/prompts.json",
            count=len(reference),
            max_new_tokens=max_new_tokens,
        ),
        new_tokens=tokens,
        forwards=way.forwards or None,
        tokens_per_forward=round(tokens / way.forwards, 4) if way.forwards else None,
        seconds=round(way.total, 4),
        repeats=repeats,
        tokens_per_second=round(tokens / way.total, 2),
        speedups=[Speedup(baseline=p.decoder.name, factor=round(p.total / way.total, 4)) for p in peers],
        agreement=Agreement(
            baseline="generate", identical=len(reference) - len(different), total=len(reference), different=different
        ),
        accepted_lengths=common.accepted_lengths(way.stats) or None,
        extra={"setting": way.note} if way.ours else {},
    )


def kept(path: Path, document: Results) -> list[Measurement]:
    """What a document of an interrupted run holds.

    Raises:
        typer.BadParameter: it was measured otherwise than `document` is going to be.
    """
    found = Results.read(path)
    for name in ("software", "hardware", "threads", "dtype", "device"):
        if getattr(found, name) != getattr(document, name):
            raise typer.BadParameter(
                f"{path.name} has another {name}, {getattr(found, name)}: start anew without --resume."
            )
    return found.measurements


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON document goes.")] = common.RESULTS / "peers.json",
    draft: Annotated[Path, typer.Option(help="The draft model of assisted decoding.")] = common.TINY / "draft",
    count: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    models: Annotated[str | None, typer.Option(help="Of base, forced, base + drafter; separated by commas.")] = None,
    domains: Annotated[str | None, typer.Option(help="Domains, separated by commas.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep what the document holds, by the same code on the same machine.")
    ] = False,
) -> None:
    """All models and domains, or some."""
    assistant = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    document = Results.start("Ours against transformers' own ways", common.load(None)[0], "tiny")
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
                equal, setting = m.agreement.identical if m.agreement else 0, m.extra.get("setting", "")
                speed = f"{m.tokens_per_second:7.1f} tok/s TPF {m.tokens_per_forward} identical {equal}"
                print(f"{m.model:6s} {m.prompts.domain:10s} {m.decoder.name:20s} {speed} {setting} | {ahead}")
    print(output)


if __name__ == "__main__":
    typer.run(main)
