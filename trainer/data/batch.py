"""The tensors of a training batch: names and padding, a row under construction, and numbers about a batch.

Suffixes of tensor names: B rows, L slots of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from jacobi_hf.trainer.forcing.losses import IGNORE
from jacobi_hf.trainer.forcing.mask import NOISY, PADDING, PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping

# The numbers that losses are divided by, in the order of `counts_of`.
COUNTS = ("labels", "replay labels", "pairs", "blocks", "samples")

# Every tensor with one value per slot, and its value in slots of padding.
FILL = {
    "input_ids": 0,
    "position_ids": 0,
    "sample": PADDING,
    "stream": PROMPT,
    "block": 0,
    "start": 0,
    "labels": IGNORE,
    "replay": 0,
    "teacher": -1,
    "divisor": 1,
    "index": -1,
    "attention_mask": 0,
}


@dataclass
class Row:
    """One row of a batch under construction.

    Attributes:
        parts: for each tensor, the arrays that were added.
        length: slots so far.
        members: records and replay rows so far.
        samples: records so far.
        blocks: noisy blocks so far, those of every view counted.
    """

    parts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in FILL})
    length: int = 0
    members: int = 0
    samples: int = 0
    blocks: int = 0

    def add(self, ids: np.ndarray, positions: np.ndarray, index: int, **tensors: np.ndarray | int) -> None:
        """Add slots.

        Args:
            ids: token ids of the slots.
            positions: their position ids.
            index: number of their row in the data set.
            tensors: their values in other tensors of `FILL`; one number stands for all slots. A tensor that is not
                given gets its value of padding.
        """
        given = {"input_ids": ids, "position_ids": positions, "index": index, "attention_mask": 1, **tensors}
        for name, fill in FILL.items():
            value = given.get(name, fill)
            self.parts[name].append(value if isinstance(value, np.ndarray) else np.full(len(ids), value))
        self.length += len(ids)


def clean_part(batch: Mapping[str, torch.Tensor], multiple: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch without its noisy slots, for a model that only reads clean text.

    Args:
        batch: a batch of `JacobiForcingCollator`, in either layout.
        multiple: the row length is rounded up to a multiple of this, but not above the batch's own.

    Returns:
        The tensors that the model's forward and mask need, `(B', L')`; and for each of these slots its index in the
        flattened batch, -1 for padding.
    """
    length = batch["input_ids"].shape[1]
    home_BL = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device).view(batch["input_ids"].shape)
    if "stream" not in batch:  # a plain causal row is noisy or clean as a whole
        clean_B = (batch["labels"] != IGNORE).any(1)
        part = {name: batch[name][clean_B] for name in ("input_ids", "position_ids", "attention_mask")}
        return part, home_BL[clean_B].masked_fill(part["attention_mask"] == 0, -1).flatten()
    clean_BL = (batch["sample"] != PADDING) & (batch["stream"] < NOISY)
    width = min(length, -(-int(clean_BL.sum(1).max()) // multiple) * multiple)
    first_BL = (~clean_BL).long().argsort(dim=1, stable=True)[:, :width]
    is_padding_BL = ~clean_BL.gather(1, first_BL)
    part = {
        name: batch[name].gather(1, first_BL)
        for name in ("input_ids", "position_ids", "sample", "stream", "block", "start")
    }
    part["sample"] = part["sample"].masked_fill(is_padding_BL, PADDING)
    return part, home_BL.gather(1, first_BL).masked_fill(is_padding_BL, -1).flatten()


def counts_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the numbers that the losses of a batch are divided by, an int tensor in the order of `COUNTS`."""
    labelled = batch["labels"] != IGNORE
    replayed = batch["replay"] != 0
    counted = (
        labelled & ~replayed,
        labelled & replayed,
        batch["teacher"] >= 0,
        batch["blocks_in_row"],
        batch["samples_in_row"],
    )
    return torch.stack([c.sum() for c in counted])
