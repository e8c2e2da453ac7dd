"""The table of a card that says how its model was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jacobi_hf.hub_cards.cells import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jacobi_hf.hub_cards.cells import Document

# Row, format, field of `Training`; no field is the whole stage.
_ROWS = (
    ("Method", "method", "method"),
    ("Began from", "path", "base_model"),
    ("KL against", "path", "reference_model"),
    ("Data", "data", "data"),
    ("Strategy", "strategy", "strategy"),
    ("Epochs", "two", "epochs"),
    ("Optimizer steps", "integer", "steps"),
    ("Slots learnt from", "million", "slots"),
    ("Optimizer and peak learning rate", "optimizer", None),
    ("Schedule", "text", "schedule"),
    ("Batch", "batch", "batch"),
    ("Precision of the forwards", "text", "precision"),
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
    """A column a stage, from the document that knows the most stages."""
    document = max(documents, key=lambda one: len(one.results.training), default=None)
    if document is None or not document.results.training:
        return Table(("", "training"), ())
    stages = range(len(document.results.training))
    head = ["", *(f"stage {at + 1}" if len(stages) > 1 else "training" for at in stages)]
    rows = [
        [name, *(document.cell(how, "training", at, *([field] if field else [])) for at in stages)]
        for name, how, field in _ROWS
    ]
    return Table(head, rows)
