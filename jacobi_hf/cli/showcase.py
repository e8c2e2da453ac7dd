"""What the demo shows: two decoders on a few prompts, streamed, coloured, then timed."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import BaseStreamer

import jacobi_hf
from jacobi_hf.results import Agreement, Decoder, Measurement, Prompts, Results, Speedup

if TYPE_CHECKING:
    from collections.abc import Callable

TINY = Path(jacobi_hf.__file__).resolve().parents[1] / "examples" / "tiny_qwen3"
COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "bright_blue", "bright_red")
REPEATS = 3


@dataclass(frozen=True)
class Example:
    """A prompt and the domain that it is from."""

    domain: str
    prompt: str


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer, with the name that they are reported under."""

    name: str
    model: Any
    tokenizer: Any


def examples(prompt: str | None) -> list[Example]:
    """The prompts to show: the caller's one, or a held-out one of each domain of the tiny checkpoint.

    Raises:
        ValueError: neither a prompt nor the repository's own prompts are there.
    """
    if prompt is not None:
        if not prompt:
            raise ValueError("--prompt is empty.")
        return [Example("own", prompt)]
    file = TINY / "prompts.json"
    if not file.is_file():
        raise ValueError("the held-out prompts are part of the repository, not of an installed package: give --prompt and --model.")
    return [Example(domain, prompts[0]) for domain, prompts in json.loads(file.read_text(encoding="utf-8"))["prompts"].items()]


def load(name: str | None) -> Loaded:
    """Model and tokenizer in fp32, in which the texts are equal token for token.

    Raises:
        ValueError: no model was named and the tiny checkpoint is not there.
    """
    source = str(TINY / "checkpoint") if name is None else name
    if name is None and not Path(source).is_dir():
        raise ValueError("the tiny checkpoint is part of the repository, not of an installed package: name a model with --model.")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return Loaded(name or "examples/tiny_qwen3/checkpoint", model.eval(), AutoTokenizer.from_pretrained(source))


class _Painter(BaseStreamer):
    """A streamer that paints each token in the colour of the forward that it came out of."""

    def __init__(self, loaded: Loaded, title: str, prompt: str) -> None:
        self._tokenizer, self._title = loaded.tokenizer, title
        self._text, self._written = Text(prompt, style="dim"), ""
        self._tokens: list[int] = []
        self._forwards = 0
        self._is_prompt = True
        self._hook = loaded.model.register_forward_pre_hook(self._count)
        self.on_token: Callable[[], None] = lambda: None

    def _count(self, *_: Any) -> None:
        self._forwards += 1

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not whole.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self._text.append(whole[len(self._written) :], style=COLOURS[self._forwards % len(COLOURS)])
            self._written = whole
        self.on_token()

    def end(self) -> None:
        self._hook.remove()

    def panel(self) -> Panel:
        footer = f"{len(self._tokens)} tokens, {self._forwards} forwards"
        return Panel(self._text, title=self._title, subtitle=footer, title_align="left", subtitle_align="left")


def run(loaded: Loaded, shown: list[Example], max_new_tokens: int, *, quiet: bool) -> Results:
    """Show every example and return what was measured."""
    console = Console(quiet=quiet)
    measurements: list[Measurement] = []
    for example in shown:
        console.rule(f"[bold]{example.domain}")
        if not quiet:
            _stream(loaded, example, max_new_tokens, console)
        measurements += _measure(loaded, example, max_new_tokens)
    console.print(_table(measurements))
    console.print(
        f"{loaded.name}, fp32, {torch.get_num_threads()} thread(s); seconds are medians of {REPEATS} alternating runs.", style="dim"
    )
    return Results.start("jacobi-hf demo: ordinary and Jacobi decoding of single prompts", loaded.model, loaded.name).with_measurements(
        measurements
    )


def _decoders() -> dict[str, dict[str, Any]]:
    return {"generate": {}, "jacobi_multiblock": jacobi_hf.JacobiConfig().to_knobs()}


def _stream(loaded: Loaded, example: Example, max_new_tokens: int, console: Console) -> None:
    inputs = loaded.tokenizer(example.prompt, return_tensors="pt").to(loaded.model.device)
    painters: list[_Painter] = []

    def redraw() -> None:
        live.update(_side_by_side([painter.panel() for painter in painters], console.width))

    with Live(console=console, refresh_per_second=12) as live:
        for name, knobs in _decoders().items():
            painter = _Painter(loaded, name, example.prompt)
            painters.append(painter)
            painter.on_token = redraw
            try:
                loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=painter, **knobs)
            finally:
                painter.end()
    if not console.is_terminal:
        console.print()  # Live ends its only frame without a line break


def _side_by_side(panels: list[Panel], width: int) -> RenderableType:
    if width < 100:
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in _decoders():
        grid.add_column(ratio=1)
    grid.add_row(*panels, *[""] * (len(_decoders()) - len(panels)))
    return grid


def _measure(loaded: Loaded, example: Example, max_new_tokens: int) -> list[Measurement]:
    inputs = loaded.tokenizer(example.prompt, return_tensors="pt").to(loaded.model.device)
    decoders, prompt_length = _decoders(), inputs["input_ids"].shape[1]
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    outputs: dict[str, Any] = {}
    for _ in range(REPEATS):
        for name, knobs in decoders.items():
            started = time.perf_counter()
            outputs[name] = loaded.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=bool(knobs), **knobs
            )  # fmt: skip
            seconds[name].append(time.perf_counter() - started)
    reference, output = outputs["generate"], outputs["jacobi_multiblock"]
    tokens = reference.shape[1] - prompt_length
    prompts = Prompts(domain=example.domain, source="held-out prompt", count=1, max_new_tokens=max_new_tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    common = {"prompts": prompts, "new_tokens": tokens, "repeats": REPEATS}
    stats = output.jacobi_stats
    ordinary = Measurement(
        decoder=Decoder(name="generate", kind="generate"), forwards=tokens, tokens_per_forward=1.0, mean_slots=1.0,
        seconds=medians["generate"], tokens_per_second=tokens / medians["generate"], **common,
    )  # fmt: skip
    jacobi = Measurement(
        decoder=Decoder.of("jacobi_multiblock", jacobi_hf.JacobiConfig()),
        forwards=stats.forwards, tokens_per_forward=stats.mean_tokens_per_forward, mean_slots=stats.mean_slots,
        seconds=medians["jacobi_multiblock"], tokens_per_second=tokens / medians["jacobi_multiblock"],
        speedups=[Speedup(baseline="generate", factor=medians["generate"] / medians["jacobi_multiblock"])],
        agreement=Agreement(baseline="generate", identical=int(torch.equal(reference, output.sequences)), total=1), **common,
    )  # fmt: skip
    return [ordinary, jacobi]


def _table(measurements: list[Measurement]) -> Table:
    table = Table(title="What it took", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("prompt", "decoding", "tokens per forward", "forwards", "seconds", "tok/s", "identical"):
        table.add_column(column, justify="left" if column in ("prompt", "decoding") else "right", no_wrap=" " not in column)
    for m in measurements:
        identical = "" if m.agreement is None else "yes" if m.agreement.identical == m.agreement.total else "NO"
        table.add_row(
            m.prompts.domain,
            m.decoder.name,
            f"{m.tokens_per_forward:.2f}",
            str(m.forwards),
            f"{m.seconds:.2f}",
            f"{m.tokens_per_second:.0f}",
            identical,
        )
    return table
