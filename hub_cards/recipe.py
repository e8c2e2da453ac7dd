"""The table of a card that shows how its model was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jacobi_hf.hub_cards.cells import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jacobi_hf.hub_cards.cells import Cell, Document

# Heading of the row, format, field of `Training`; None stands for the whole stage.
_ROWS = (
    ("Method", "method", "method"),
    ("Start", "path", "base_model"),
    ("Reference model of the KL loss", "path", "reference_model"),
    ("Data", "data", "data"),
    ("Guesses trained on", "strategy", "strategy"),
    ("Epochs", "two", "epochs"),
    ("Optimizer steps", "integer", "steps"),
    ("Positions trained on", "million", "slots"),
    ("Optimizer and peak learning rate", "optimizer", None),
    ("Schedule", "text", "schedule"),
    ("Batch", "batch", "batch"),
    ("Precision of the forward pass", "text", "precision"),
    ("Precision of the trained weights", "text", "weights_dtype"),
    ("Loss weights", "weights", "loss_weights"),
    ("LoRA rank", "integer", "lora_rank"),
    ("Seed", "integer", "seed"),
    ("Hardware", "hardware", "hardware"),
    ("Threads", "integer", "threads"),
    ("Time", "time", "minutes"),
    ("Command", "code", "command"),
)


def recipe(documents: Sequence[Document]) -> Table:
    """Return the table of the training: one column for each stage.

    The stages come from the document that has most of them. Without any, the table is empty.
    """
    document = max(documents, key=lambda one: len(one.results.training), default=None)
    if document is None or not document.results.training:
        return Table(("", "training"), ())
    stages = range(len(document.results.training))
    heads = [f"stage {stage + 1}" for stage in stages] if len(stages) > 1 else ["training"]
    rows = [[name, *(_cell(document, stage, shown, field) for stage in stages)] for name, shown, field in _ROWS]
    return Table(["", *heads], rows)


def _cell(document: Document, stage: int, shown: str, field: str | None) -> Cell | None:
    path = () if field is None else (field,)
    return document.cell(shown, "training", stage, *path)
