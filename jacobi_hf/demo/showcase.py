"""The demo in a terminal: decoders and models write a few texts side by side, in colours, and are timed."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

import jacobi_hf
from jacobi_hf import loading
from jacobi_hf.demo.terminal import Painter, side_by_side
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Results, Speedup

TINY = Path(jacobi_hf.__file__).resolve().parents[1] / "examples" / "tiny_qwen3"
PLACE = "examples/tiny_qwen3"  # name of that folder in results
REPEATS = 3
NO_CHECKPOINT = "an installed package does not have the tiny checkpoint of the repository: name a model with --model."


@dataclass(frozen=True)
class Example:
    """A prompt and its domain."""

    domain: str
    prompt: str


@dataclass(frozen=True)
class Loaded:
    """A model as the demo shows it.

    Attributes:
        name: name of the model in results.
        model: model in eval mode, with its drafter if it has one.
        tokenizer: the model's tokenizer.
        label: short name for the panels and the table.
        drafter: name of the drafter in results; None without a drafter.
    """

    name: str
    model: Any
    tokenizer: Any
    label: str = "model"
    drafter: str | None = None


def examples(prompt: str | None) -> list[Example]:
    """Return the prompts to show.

    Args:
        prompt: the only prompt; None takes one held-out prompt from each domain of the tiny checkpoint.

    Raises:
        ValueError: the prompt is empty, or there is none and the repository's prompts are missing.
    """
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("--prompt is empty.")
        return [Example("own", prompt)]
    file = TINY / "prompts.json"
    if not file.is_file():
        raise ValueError(
            "an installed package does not have the held-out prompts of the repository: give --prompt and --model."
        )
    return [
        Example(domain, prompts[0])
        for domain, prompts in json.loads(file.read_text(encoding="utf-8"))["prompts"].items()
    ]


def load(name: str | None, drafter: str | None = None) -> list[Loaded]:
    """Return the models to show, in float32, in which all decoders write the same tokens.

    Args:
        name: name or folder of a model, which is shown without and with its drafter. None is the tiny checkpoint:
            before and after Jacobi Forcing, and with its drafter.
        drafter: folder or Hub repository of a drafter of the named model.

    Raises:
        ValueError: there is no such model, the tiny checkpoint is missing, or the drafter does not fit the model.
    """
    if name is not None:
        model = _load(name, name, "model")
        return [model] if drafter is None else [model, _load(name, name, "model + drafter", drafter)]
    if not (TINY / "checkpoint").is_dir():
        raise ValueError(NO_CHECKPOINT)
    folders = {"base": ("checkpoint", None), "forced": ("forced", None), "base + drafter": ("checkpoint", "drafter")}
    return [
        _load(str(TINY / folder), f"{PLACE}/{folder}", label, drafter and str(TINY / drafter))
        for label, (folder, drafter) in folders.items()
        if (TINY / folder).is_dir() and (TINY / (drafter or folder)).is_dir()
    ]


def _load(source: str, name: str, label: str, drafter: str | None = None) -> Loaded:
    model, tokenizer = loading.load(source, "float32", drafter)
    return Loaded(name, model, tokenizer, label, drafter and drafter.replace(str(TINY), PLACE))


@dataclass(frozen=True)
class Contender:
    """A model and how it decodes.

    Attributes:
        loaded: the model.
        decoding: name of the decoding.
        knobs: arguments of `generate` that select it.
    """

    loaded: Loaded
    decoding: str
    knobs: dict[str, Any]

    @property
    def title(self) -> str:
        """Title of the panel."""
        return f"{self.loaded.label}, {self.decoding}"

    def write(self, prompt: str, max_new_tokens: int, **options: Any) -> Any:
        """Return the output of `generate` for a prompt, greedily."""
        inputs = self.loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(
            self.loaded.model.device
        )
        return self.loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, **self.knobs, **options
        )


def contenders(loaded: list[Loaded]) -> list[Contender]:
    """Return ordinary decoding with the first model, and Jacobi decoding with each model."""
    knobs = jacobi_hf.JacobiConfig().to_knobs()
    return [
        Contender(loaded[0], "generate", {"decoding": None}),
        *(Contender(one, "jacobi_multiblock", knobs) for one in loaded),
    ]


def run(loaded: list[Loaded], shown: list[Example], max_new_tokens: int, *, quiet: bool) -> Results:
    """Show every example, and return the measurements.

    Args:
        loaded: models to show.
        shown: prompts to continue.
        max_new_tokens: new tokens of each prompt.
        quiet: whether to print nothing.

    Raises:
        ValueError: a prompt and its text need more positions than a model has. Nothing has been shown.
    """
    for one, example in itertools.product(loaded, shown):
        loading.check_length(one.model, len(one.tokenizer(example.prompt)["input_ids"]), max_new_tokens)
    console = Console(quiet=quiet)
    measurements: list[Measurement] = []
    for example in shown:
        console.rule(f"[bold]{example.domain}")
        if not quiet:
            _stream(contenders(loaded), example, max_new_tokens, console)
        measurements += _measure(contenders(loaded), example, max_new_tokens)
    console.print(_table(measurements, [one.label for one in (loaded[0], *loaded)]))
    for note in _notes(loaded):
        console.print(note, style="dim")
    what = "jacobi-hf demo: ordinary and Jacobi decoding of single prompts"
    return Results.start(what, loaded[0].model, loaded[0].name).with_measurements(measurements)


def _notes(loaded: list[Loaded]) -> list[str]:
    """Return what a reader of the table has to know."""
    names = ", ".join(f"{one.label}: {one.name}" for one in loaded)
    threads = torch.get_num_threads()
    notes = [
        f"{names}; fp32, {threads} thread{'s' * (threads > 1)}; seconds are medians of {REPEATS} alternating runs.",
        "identical: the text is that of generate() with the same model.",
    ]
    if any(one.drafter for one in loaded):
        notes.append(
            "base + drafter: the base model verifies every guess, so the text does not depend on the drafter."
        )
    return notes


def _stream(shown: list[Contender], example: Example, max_new_tokens: int, console: Console) -> None:
    """Let all contenders write the text of an example, one after another, and show their panels."""
    painters: list[Painter] = []

    def redraw() -> None:
        live.update(side_by_side([painter.panel() for painter in painters], len(shown), console.width))

    with Live(console=console, refresh_per_second=12) as live:
        for contender in shown:
            painter = Painter(contender.loaded.model, contender.loaded.tokenizer, contender.title, example.prompt)
            painters.append(painter)
            painter.on_token = redraw
            try:
                contender.write(example.prompt, max_new_tokens, streamer=painter)
            finally:
                painter.end()
    if not console.is_terminal:
        console.print()  # Live ends its only frame without a line break


def _measure(shown: list[Contender], example: Example, max_new_tokens: int) -> list[Measurement]:
    """Return a measurement of each contender on an example; their timed runs alternate."""
    seconds: dict[str, list[float]] = {contender.title: [] for contender in shown}
    outputs: dict[str, Any] = {}
    for _ in range(REPEATS):
        for contender in shown:
            started = time.perf_counter()
            outputs[contender.title] = contender.write(example.prompt, max_new_tokens, return_dict_in_generate=True)
            seconds[contender.title].append(time.perf_counter() - started)
    medians = {title: statistics.median(values) for title, values in seconds.items()}
    prompts = Prompts(domain=example.domain, source="held-out prompt", count=1, max_new_tokens=max_new_tokens)
    first = outputs[shown[0].title].sequences.shape[1] - len(shown[0].loaded.tokenizer(example.prompt)["input_ids"])
    # Two models write texts of different lengths, so speed is compared per token.
    per_token = medians[shown[0].title] / first
    return [_measurement(c, outputs[c.title], prompts, example, per_token, medians[c.title]) for c in shown]


def _measurement(
    contender: Contender,
    output: Any,
    prompts: Prompts,
    example: Example,
    baseline_seconds_per_token: float,
    seconds: float,
) -> Measurement:
    prompt_tokens = len(contender.loaded.tokenizer(example.prompt)["input_ids"])
    tokens = output.sequences.shape[1] - prompt_tokens
    common: dict[str, Any] = {
        "model": contender.loaded.name,
        "prompts": prompts,
        "new_tokens": tokens,
        "repeats": REPEATS,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    if contender.decoding == "generate":
        ordinary = Decoder(name="generate", kind="generate")
        return Measurement(decoder=ordinary, forwards=tokens, tokens_per_forward=1.0, mean_slots=1.0, **common)
    reference = Contender(contender.loaded, "generate", {"decoding": None}).write(
        example.prompt, prompts.max_new_tokens
    )
    stats = output.jacobi_stats
    same = int(torch.equal(reference, output.sequences))
    return Measurement(
        decoder=Decoder.of("jacobi_multiblock", jacobi_hf.JacobiConfig(), contender.loaded.drafter),
        forwards=stats.forwards,
        tokens_per_forward=stats.mean_tokens_per_forward,
        mean_slots=stats.mean_slots,
        speedups=[Speedup(baseline="generate", factor=tokens / seconds * baseline_seconds_per_token)],
        agreement=Agreement(baseline="generate", identical=same, total=1),
        **common,
    )


def _table(measurements: list[Measurement], labels: list[str]) -> Table:
    table = Table(title="Results", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("prompt", "model", "decoding", "tokens per forward", "seconds", "tok/s", "identical"):
        left = column in ("prompt", "model", "decoding")
        table.add_column(column, justify="left" if left else "right", no_wrap=" " not in column)
    for m, label in zip(measurements, itertools.cycle(labels), strict=False):
        identical = "" if m.agreement is None else "yes" if m.agreement.identical == m.agreement.total else "NO"
        table.add_row(
            m.prompts.domain,
            label,
            m.decoder.name,
            f"{m.tokens_per_forward:.2f}",
            f"{m.seconds:.2f}",
            f"{m.tokens_per_second:.0f}",
            identical,
        )
    return table
