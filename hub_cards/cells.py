"""Cells and tables of a card.

A cell is a path into a document of results and the format in which its value is shown, so that every number of a card
can be traced to a measurement.
"""

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
    """One value of a document of results, as a card shows it.

    Attributes:
        document: the name of the JSON file.
        path: the fields and indices that lead to the value in that file.
        format: the name of the function in `FORMATS` that shows the value.
        markdown: the value as the card shows it.
    """

    document: str
    path: tuple[str | int, ...]
    format: str
    markdown: str

    def __str__(self) -> str:
        return self.markdown


@dataclass(frozen=True)
class Document:
    """A document of results and the name of its file in the repository."""

    name: str
    results: Results

    @cached_property
    def content(self) -> dict[str, Any]:
        """The document as JSON values."""
        content: dict[str, Any] = json.loads(self.results.model_dump_json(exclude_none=True))
        return content

    def cell(self, format: str, *path: str | int) -> Cell | None:  # noqa: A002 (as in `Cell`)
        """Return the cell of the value at a path, or None where nothing was measured.

        Args:
            format: the name of a function in `FORMATS`.
            path: fields and indices.

        Raises:
            ValueError: the value cannot be shown in this format, for example a quality without a number.
        """
        node = resolve(self.content, path)
        if node is None or node in ({}, []):
            return None
        try:
            return Cell(self.name, path, format, FORMATS[format](node))
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            where = ".".join(map(str, path))
            raise ValueError(f"{self.name}: {where} is {node!r}, which cannot be shown as {format}.") from error


@dataclass(frozen=True)
class Table:
    """A table in Markdown, without the rows and columns that hold nothing.

    `str` gives its text, which is empty if no row is left.

    Attributes:
        head: the headings.
        rows: the cells; None is a value that was not measured.
        labels: the number of first columns that name a row. A row with nothing but labels is left out.
        numbers: whether the other columns are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str | None]]
    labels: int = 1
    numbers: bool = False

    def __str__(self) -> str:
        rows = self._measured()
        columns = [column for column in range(len(self.head)) if any(row[column] is not None for row in rows)]
        heads = [self.head[column] for column in columns]
        rules = ["---:" if self.numbers and column >= self.labels else "---" for column in columns]
        lines = [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
        return "\n".join(f"| {' | '.join(shown)} |" for shown in (heads, rules, *lines)) if rows else ""

    def __iter__(self) -> Iterator[Cell]:
        """Yield the cells that are shown, row by row."""
        for row in self._measured():
            yield from (cell for cell in row if isinstance(cell, Cell))

    def _measured(self) -> list[Sequence[Cell | str | None]]:
        return [row for row in self.rows if any(cell is not None for cell in row[self.labels :])]


def resolve(content: Any, path: Iterable[str | int]) -> Any:
    """Return the value at a path of a JSON document, or None if the path leads to nothing."""
    for key in path:
        try:
            content = content[key]
        except (KeyError, IndexError):
            return None
    return content


def read_documents(results: Sequence[str | Path | Results] | str | Path | Results) -> list[Document]:
    """Return documents of results, each with the name of its file in the repository.

    Args:
        results: one or several documents or files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not a document of results (its wrong fields are named), or two files have one name.
    """
    given = [results] if isinstance(results, str | Path | Results) else list(results)
    documents: dict[str, Document] = {}
    for number, one in enumerate(given, 1):
        name = f"results-{number}.json" if isinstance(one, Results) else f"{Path(one).stem}.json"
        if name in documents:
            raise ValueError(f"Two documents of results would become {name}. Rename one of them.")
        documents[name] = Document(name, one if isinstance(one, Results) else _read(Path(one)))
    return list(documents.values())


def _read(path: Path) -> Results:
    try:
        return Results.read(path)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()[:5]
        )
        raise ValueError(f"{path} is not a document of results of this version: {wrong}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a document of results: it is not UTF-8 text.") from None


def _mean_length(forwards: dict[str, int]) -> str:
    """Return the mean number of new tokens of a verify forward.

    Args:
        forwards: the number of forwards by the number of new tokens that they gave.
    """
    tokens = sum(int(length) * count for length, count in forwards.items())
    return f"{tokens / max(1, sum(forwards.values())):.2f}"


_KNOBS = {
    "block_size": "n=",
    "max_blocks": "K=",
    "activation_ratio": "r=",
    "pool_size": "pool ",
    "lookup_tokens": "lookup ",
}


def _decoder(decoder: dict[str, Any]) -> str:
    """Return a decoder's name and its knobs, without those that are zero."""
    knobs = ["adaptive"] if decoder.get("adaptive") else []
    knobs += [f"{label}{decoder[field]:g}" for field, label in _KNOBS.items() if decoder.get(field)]
    return escape.code(decoder["name"]) + (f" ({', '.join(knobs)})" if knobs else "")


def _quality(quality: dict[str, Any]) -> str:
    """Return a score with its 95 % interval and the number of problems."""
    interval = f"[{quality['low']:.3f}, {quality['high']:.3f}]"
    return f"{escape.text(quality['metric'])} {quality['value']:.3f} {interval} of {quality['samples']:,}"


def _data(data: list[dict[str, Any]]) -> str:
    """Return the sources of the training data, with the number of samples where it is known."""
    counts = (f" ({one['samples']:,} samples)" if "samples" in one else "" for one in data)
    return ", ".join(f"{escape.text(one['name'])}{count}" for one, count in zip(data, counts, strict=True))


def _strategy(strategy: dict[str, Any]) -> str:
    """Return where the guesses came from that the training learned to correct."""
    if strategy["schedule"] == "drafter":
        width = strategy["window_width"]
        windows = strategy["windows_per_text"]
        steps = strategy["steps_per_window"]
        return f"the drafter's own: {width} a window, {windows} windows a text, {steps} steps a window"
    levels = f"{strategy['noise_levels']} noise levels"
    if "min_noise" in strategy or "max_noise" in strategy:
        levels += f" from {strategy.get('min_noise', 0):g} to {strategy.get('max_noise', 1):g}"
    shown = [f"{escape.text(strategy['schedule'])} noise schedule", f"blocks of {strategy['block_size']}", levels]
    shown += [f"{strategy[field]} {label}" for field, label in _COPIES.items() if field in strategy]
    return ", ".join(shown)


_COPIES = {"visits": "records a text", "views": "noisy versions a record"}


def _optimizer(stage: dict[str, Any]) -> str:
    """Return the optimizer and its peak learning rates."""
    rate = f"{stage['learning_rate']:g}"
    if (muon := stage.get("muon_learning_rate")) is not None:
        return f"Muon at {muon:g} for matrices, AdamW at {rate} for the rest"
    return f"{escape.text(stage.get('optimizer') or 'not recorded')} at {rate}"


def _batch(batch: dict[str, int]) -> str:
    devices = f"{batch['devices']} device{'s' * (batch['devices'] != 1)}"
    return f"{devices} x {batch['per_device']} rows x {batch['accumulation']} accumulated"


_LOSSES = {"consistency": "consistency", "ar": "next token", "replay": "replay", "kl": "KL"}


def _weights(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weights[field]:g}" for field, name in _LOSSES.items())


def _hardware(hardware: dict[str, Any]) -> str:
    return escape.text(hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores")


def _time(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


_METHODS = {
    "finetune": "Jacobi Forcing",
    "drafter": "LoRA drafter, with the model frozen",
    "sft": "supervised finetuning",
}


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
    "method": _METHODS.__getitem__,
    "data": _data,
    "strategy": _strategy,
    "optimizer": _optimizer,
    "batch": _batch,
    "weights": _weights,
    "hardware": _hardware,
    "time": _time,
    "packages": _packages,
}
