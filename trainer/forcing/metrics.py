"""Logged means of the losses of Jacobi Forcing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jacobi_hf.trainer.data.batch import COUNTS
from jacobi_hf.trainer.forcing.mask import PADDING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jacobi_hf.trainer.forcing.losses import Losses

# Which of the collator's counts each `consistency_reduction` divides by.
_DIVISOR = {
    "mean": COUNTS.index("pairs"),
    "block_sum": COUNTS.index("blocks"),
    "reference": COUNTS.index("samples"),
}


class LossSums:
    """Detached sums of losses and counts over batches, from which the logged means are computed.

    Args:
        reduction: `consistency_reduction` of the config.
        with_kl: whether there is a KL loss to log.
    """

    def __init__(self, reduction: str, *, with_kl: bool) -> None:
        self._averaged = [COUNTS.index("labels"), COUNTS.index("replay labels"), _DIVISOR[reduction]]
        self._with_kl = with_kl
        self._sums: torch.Tensor | None = None

    def add(self, losses: Losses, own: torch.Tensor, counts: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Add a batch.

        Args:
            losses: of the batch, as shares of the means over the accumulated batch.
            own: the batch's counts (`collator.COUNTS`).
            counts: those of the accumulated batch, by which the losses were divided; they undo the division.
            inputs: the batch, whose slots are counted.
        """
        labelled = counts[:2].sum(0, keepdim=True)
        divisors = torch.cat([counts[self._averaged], labelled])
        per_loss = torch.stack([*losses.ar_G, losses.consistency, losses.kl]).detach() * divisors
        slots = (inputs["attention_mask"] > 0) if "attention_mask" in inputs else inputs["sample"] != PADDING
        others = torch.stack(
            [losses.agreeing, losses.judged, *own[self._averaged].float(), own[2].float(), slots.sum().float()]
        )
        values = torch.cat([per_loss, others.to(per_loss.dtype)]).double()
        self._sums = values if self._sums is None else self._sums + values

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = None

    def means(self, reduced: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means of what was added since the last call, by their logged name; empty if nothing was.

        Args:
            reduced: gives the sum of a tensor over all processes.
        """
        if self._sums is None:
            return {}
        sums = reduced(self._sums)
        self.clear()
        ar, replay, consistency, kl, agreeing, judged, labels, replayed, averaged, pairs, slots = sums.tolist()
        parts = {
            "ar_loss": (ar, labels),
            **({"kl_loss": (kl, labels + replayed)} if self._with_kl else {}),
            "consistency_loss": (consistency, averaged),
            "agreement": (agreeing, judged),
            "replay_loss": (replay, replayed),
        }
        metrics = {name: value / count for name, (value, count) in parts.items() if count}
        return metrics | {"kept_positions": pairs, "slots": slots}
