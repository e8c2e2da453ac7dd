"""Simulate adaptive steps: texts that were recorded once, on machines that are made up.

    python examples/benchmarks/adaptive_simulation.py record base
    python examples/benchmarks/adaptive_simulation.py record forced --model examples/tiny_qwen3/forced
    python examples/benchmarks/adaptive_simulation.py record drafter --drafter examples/tiny_qwen3/drafter
    python examples/benchmarks/adaptive_simulation.py record SmolLM2-135M --data DATA --model MODEL
    python examples/benchmarks/adaptive_simulation.py run

`record` decodes prompts with the default knobs and keeps, for each token, how many guesses of each source are right.
DATA has the files that adaptive_cells.py names. `run` replays these traces under curves of what a step costs, with the
controller of `jacobi_schedule="adaptive"`. Baselines: ordinary decoding, and the best single shape of all steps in
hindsight. Of each domain, the traces at even places were for tuning the controller's constants; `run` uses the others.

`none` has the matches of SmolLM2-135M, and no guess is ever right. The last line on stdout is the path of the JSON
document (schema: jacobi_hf/results/schema.py).
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import adaptive_traces
import common
import typer
from adaptive_world import CURVES, Curve, Text, adaptive_call, fixed_call, rows_of, slots_of
from rich.progress import track

import jacobi_hf
from jacobi_hf.results.schema import Decoder, Measurement, Prompts, Results, Speedup
from jacobi_hf.tuning.memory import Memory
from jacobi_hf.tuning.options import Option, options_for

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0] if __doc__ else None)
WINDOW = 32
LOOKUP = 16
LATER = 8  # later calls after each first call
HOPELESS = "none"
DRAFTED = "drafter"
HOPELESS_OF = "SmolLM2-135M"


@dataclass(frozen=True)
class Setting:
    """How calls are made.

    Attributes:
        name: name in the results; empty for the setting of most cells.
        rows: rows of a batch.
        tokens: new tokens of a row.
        few: whether the options are those of compiled steps.
    """

    name: str = ""
    rows: int = 1
    tokens: int = 128
    few: bool = False


USUAL = Setting()
SETTINGS = (
    Setting("64 tokens", tokens=64),
    Setting("512 tokens", tokens=512),
    Setting("8 rows", rows=8),
    Setting("six options", few=True),
)
MIXED = "mixed"
VARIED = ("SmolLM2, measured",)


@dataclass(frozen=True)
class Cell:
    """Calls of one model on texts of one domain, on one machine."""

    model: str
    domain: str
    curve: Curve
    setting: Setting
    texts: tuple[Text, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """What the controller chooses from."""
        return options_for(WINDOW, LOOKUP, draft_slots=self.model == DRAFTED, others=True, few=self.setting.few)

    def rows(self, first: int) -> list:
        """Return the rows of a call that begins with a text."""
        return rows_of(self.texts, first, self.setting.rows, self.setting.tokens)

    def fixed(self, option: Option) -> float:
        """Return the mean time of a call in which all steps have the same option."""
        return statistics.mean(fixed_call(self.rows(first), self.curve, option) for first in range(len(self.texts)))

    def measured(self, seeds: int) -> Measurement:
        """Return the speed of first and later calls, relative to ordinary decoding and to the best fixed option."""
        first, later = [], []
        changes = steps = 0
        for seed in range(seeds):
            for start in range(len(self.texts)):
                noise = random.Random(f"{seed} {start}")
                memory = Memory()
                for call in range(1 + LATER):
                    done = adaptive_call(self.rows(start + call), self.curve, self.options, memory, noise)
                    (later if call else first).append(done.seconds)
                    changes += done.changes
                    steps += len(done.shapes)
        ordinary = self.fixed(Option())
        times = {option: self.fixed(option) for option in self.options}
        best = min(times, key=lambda option: (times[option], slots_of(option)))
        return Measurement(
            decoder=Decoder(
                name=f"{self.curve.name} {self.setting.name}".strip(), kind="jacobi_multiblock", adaptive=True
            ),
            prompts=Prompts(
                domain=self.domain,
                source="recorded traces",
                count=len(self.texts),
                max_new_tokens=self.setting.tokens,
                batch_size=self.setting.rows,
            ),
            model=self.model,
            speedups=[
                Speedup(baseline="generate", factor=round(ordinary / statistics.mean(later), 4)),
                Speedup(baseline="best fixed option", factor=round(times[best] / statistics.mean(later), 4)),
            ],
            extra={
                "curve": self.curve.name,
                "setting": self.setting.name,
                "first_call": round(ordinary / statistics.mean(first), 4),
                "slowest_first_call": round(ordinary / max(first), 4),
                "best_option": label(best),
                "best_factor": round(ordinary / times[best], 4),
                "sequences": seeds,
                "calls": 1 + LATER,
                "changes": round(100 * changes / steps, 1),
            },
        )


def label(option: Option) -> str:
    """Return what an option is called in the results."""
    if option == Option():
        return "1"
    drafted = f" of {option.draft_slots}" if option.draft_slots else ""
    parts = [
        f"window {option.backbone}{drafted}" * bool(option.backbone),
        f"lookup {option.lookup}" * bool(option.lookup),
    ]
    return " + ".join([*filter(None, parts), *["pool"] * option.others])


@cache
def texts(part: int) -> dict[str, dict[str, tuple[Text, ...]]]:
    """Return the recorded texts of each domain of each model: part 0 is for tuning, part 1 is held out."""
    found = {
        model: {domain: tuple(map(Text, traces[part::2])) for domain, traces in domains.items() if traces[part:]}
        for model, domains in adaptive_traces.read().items()
    }
    hopeless = {
        domain: tuple(Text(text.trace, hopeless=True) for text in some) for domain, some in found[HOPELESS_OF].items()
    }
    return found | {HOPELESS: hopeless}


def cells(part: int) -> list[Cell]:
    """Return all cells: every curve in the usual setting, some curves in others."""
    found = [
        Cell(model, domain, curve, USUAL, some)
        for model, domains in texts(part).items()
        for curve in CURVES
        for domain, some in domains.items()
    ]
    varied = [curve for curve in CURVES if curve.name in VARIED]
    for model, domains in texts(part).items():
        for curve in varied:
            found += [Cell(model, domain, curve, s, some) for s in SETTINGS for domain, some in domains.items()]
            mixed = tuple(text for together in zip(*domains.values(), strict=False) for text in together)
            found.append(Cell(model, MIXED, curve, Setting("mixed domains"), mixed))
    return found


@app.command()
def run(
    output: Annotated[Path | None, typer.Option(help="Path of the JSON document to write.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats of each sequence of calls, with other noise.")] = 4,
    *,
    tuning: Annotated[bool, typer.Option("--tuning", help="Replay the traces that are for tuning.")] = False,
) -> None:
    """Replay the traces on all made-up machines."""
    path = output or common.RESULTS / "adaptive_simulation.json"
    measurements = [cell.measured(seeds) for cell in track(cells(0 if tuning else 1), "simulating")]
    model, _, _ = common.load(None)
    about = {"model": "recorded traces of " + ", ".join(texts(1)), "parameters": 0}
    results = Results.start("Adaptive steps, simulated from recorded traces on made-up machines", model, "")
    results.model_copy(update=about).with_measurements(measurements).write(path)
    print(path)


@app.command()
def record(
    name: Annotated[str, typer.Argument(help="Name of the model in the traces.")],
    model: Annotated[str | None, typer.Option(help="Model name or folder (default: the tiny checkpoint).")] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter to load.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the task data; without it, the tiny prompts.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Most new tokens.")] = 128,
    output: Annotated[Path, typer.Option(help="File of all traces.")] = adaptive_traces.TRACES,
) -> None:
    """Record acceptance traces of a model; texts that the file has already are skipped."""
    loaded, tokenizer, _ = common.load(model)
    if drafter:
        jacobi_hf.load_drafter(loaded, drafter)
    by_domain = adaptive_traces.prompts_of(data, prompts)
    for number in range(prompts):
        for domain, some in by_domain.items():
            traces = adaptive_traces.read(output)
            found = traces.setdefault(name, {}).setdefault(domain, [])
            if len(found) > number:
                continue
            inputs = adaptive_traces.encoded(tokenizer, some[number], chat=data is not None)
            found.append(adaptive_traces.record(loaded, inputs, tokens))
            adaptive_traces.write(traces, output)
            print(name, domain, number, len(found[-1].order), flush=True)
    print(output)


if __name__ == "__main__":
    app()
