"""Cells of a card: each a typed path into a document of results, and how what lies there is shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jacobi_hf.hub_cards import escape
from jacobi_hf.results.schema import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


@dataclass(frozen=True)
class Cell:
    """What a card says of one place in a document of results.

    Attributes:
        document: name of the JSON file.
        path: fields and indices that lead there.
        format: the name of a function of `FORMATS`.
        markdown: what the card shows.
    """

    document: str
    path: tuple[str | int, ...]
    format: str
    markdown: str

    def __str__(self) -> str:
        return self.markdown


@dataclass(frozen=True)
class Document:
    """A document of results under the name of its file."""

    name: str
    results: Results

    @cached_property
    def content(self) -> dict[str, Any]:
        """The document as its JSON holds it."""
        content: dict[str, Any] = json.loads(self.results.model_dump_json(exclude_none=True))
        return content

    def cell(self, format: str, *path: str | int) -> Cell | None:  # noqa: A002 (the word for it)
        """What lies at a path, or None where nothing was measured.

        Raises:
            ValueError: it is nothing that can be shown, such as a quality without a value.
        """
        node = resolve(self.content, path)
        if node is None or node in ({}, []):
            return None
        try:
            return Cell(self.name, path, format, FORMATS[format](node))
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ValueError(
                f"{self.name} has {node!r} at {'.'.join(map(str, path))}, which is no {format}."
            ) from error


@dataclass(frozen=True)
class Table:
    """A table; None is what was not measured. Rows and columns of nothing else are left out, and so is a table without rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str | None]]
    labels: int = 1  # columns in front that say what a row is about
    numbers: bool = False  # whether the other columns are aligned right

    def __str__(self) -> str:
        rows = [row for row in self.rows if any(cell is not None for cell in row[self.labels :])]
        kept = [at for at in range(len(self.head)) if any(row[at] is not None for row in rows)]
        lines = [
            [self.head[at] for at in kept],
            ["---:" if self.numbers and at >= self.labels else "---" for at in kept],
        ]
        lines += [["-" if row[at] is None else str(row[at]) for at in kept] for row in rows]
        return "\n".join("| " + " | ".join(shown) + " |" for shown in lines) if rows else ""

    def __iter__(self) -> Iterator[Cell]:
        """The cells that are shown, row by row."""
        for row in self.rows:
            if any(cell is not None for cell in row[self.labels :]):
                yield from (cell for cell in row if isinstance(cell, Cell))


def resolve(content: Any, path: Iterable[str | int]) -> Any:
    """What lies at a path of a JSON document, or None where the path leads to nothing."""
    for key in path:
        try:
            content = content[key]
        except (KeyError, IndexError):
            return None
    return content


def read_documents(results: Sequence[str | Path | Results] | str | Path | Results) -> list[Document]:
    """Documents of results under the names that they are published by.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is no document of results, with the fields that are unknown, missing or wrong; two files of one name.
    """
    given = [results] if isinstance(results, str | Path | Results) else list(results)
    documents: dict[str, Document] = {}
    for number, one in enumerate(given, 1):
        name = f"results-{number}.json" if isinstance(one, Results) else f"{Path(one).stem}.json"
        if name in documents:
            raise ValueError(f"two documents of results would be {name}: rename one.")
        documents[name] = Document(name, one if isinstance(one, Results) else _read(Path(one)))
    return list(documents.values())


def _read(path: Path) -> Results:
    try:
        return Results.read(path)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()[:5]
        )
        raise ValueError(f"{path} is no document of results that this version knows: {wrong}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no document of results: it is not UTF-8 text.") from None


def _mean_length(counts: dict[str, int]) -> str:
    """Tokens per decoding forward, from how many forwards yielded how many."""
    return f"{sum(int(length) * count for length, count in counts.items()) / max(1, sum(counts.values())):.2f}"


def _decoder(decoder: dict[str, Any]) -> str:
    """Its name and knobs."""
    shown = {
        "block_size": "n",
        "max_blocks": "K",
        "activation_ratio": "r",
        "pool_size": "pool ",
        "lookup_tokens": "lookup ",
    }
    knobs = [
        f"{label}{'' if label.endswith(' ') else '='}{decoder[field]:g}"
        for field, label in shown.items()
        if decoder.get(field)
    ]
    return escape.code(decoder["name"]) + (f" ({', '.join(knobs)})" if knobs else "")


def _quality(quality: dict[str, Any]) -> str:
    interval = f"[{quality['low']:.3f}, {quality['high']:.3f}]"
    return f"{escape.text(quality['metric'])} {quality['value']:.3f} {interval} of {quality['samples']:,}"


def _data(data: list[dict[str, Any]]) -> str:
    """Sources and samples."""
    return ", ".join(
        escape.text(one["name"]) + (f" ({one['samples']:,} samples)" if "samples" in one else "") for one in data
    )


def _strategy(strategy: dict[str, Any]) -> str:
    """How drafts were made."""
    if strategy["schedule"] == "drafter":
        width, windows = strategy["window_width"], strategy["windows_per_text"]
        steps = strategy["steps_per_window"]
        return f"the drafter's own guesses, {width} a window, {windows} windows a text, {steps} steps each"
    shown = [f"{escape.text(strategy['schedule'])} noise", f"n={strategy['block_size']}"]
    shown.append(f"w={strategy['noise_levels']}")
    if "min_noise" in strategy or "max_noise" in strategy:
        shown.append(f"levels {strategy.get('min_noise', 0):g} to {strategy.get('max_noise', 1):g}")
    shown += [f"{strategy[name]} {name}" for name in ("visits", "views") if name in strategy]
    return ", ".join(shown)


def _optimizer(stage: dict[str, Any]) -> str:
    """Optimiser and learning rates."""
    rate, muon = f"{stage['learning_rate']:g}", stage.get("muon_learning_rate")
    name = escape.text(stage.get("optimizer") or "not recorded")
    return f"Muon at {muon:g} for matrices, AdamW at {rate} for the rest" if muon is not None else f"{name} at {rate}"


def _batch(batch: dict[str, int]) -> str:
    devices = f"{batch['devices']} device{'s' * (batch['devices'] != 1)}"
    return f"{devices} x {batch['per_device']} rows x {batch['accumulation']} accumulated"


def _weights(weights: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {weights[field]:g}"
        for field, name in (("consistency", "consistency"), ("ar", "AR"), ("replay", "replay"), ("kl", "KL"))
    )


def _hardware(hardware: dict[str, Any]) -> str:
    return escape.text(hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores")


def _time(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _method(method: str) -> str:
    return {
        "finetune": "Jacobi Forcing",
        "drafter": "a drafter; the model is frozen",
        "sft": "supervised finetuning",
    }[method]


def _packages(packages: dict[str, str]) -> str:
    return ", ".join(f"{escape.text(name)} {escape.text(version)}" for name, version in packages.items())


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": escape.text,
    "code": escape.code,
    "path": escape.path,
    "integer": lambda number: f"{number:,}",
    "one": lambda number: f"{number:.1f}",
    "two": lambda number: f"{number:.2f}",
    "whole": lambda number: f"{number:.0f}",
    "million": lambda number: f"{number / 1e6:.2f} M",
    "factor": lambda number: f"{number:.2f} x",
    "loss": lambda number: f"loss {number:.3f}",
    "day": lambda moment: escape.text(str(moment)[:10]),
    "identical": lambda agreement: f"{agreement['identical']} of {agreement['total']}",
    "prompts": lambda prompts: f"{prompts['count']} x {prompts['max_new_tokens']}",
    "mean length": _mean_length,
    "decoder": _decoder,
    "quality": _quality,
    "method": _method,
    "data": _data,
    "strategy": _strategy,
    "optimizer": _optimizer,
    "batch": _batch,
    "weights": _weights,
    "hardware": _hardware,
    "time": _time,
    "packages": _packages,
}
