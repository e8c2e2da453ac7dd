"""Muon for the matrices inside a model, AdamW for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW, Optimizer

from jacobi_hf.integration.compat import MUON

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import TrainingArguments


NO_MUON = (
    f"muon_learning_rate needs torch.optim.Muon, which torch {torch.__version__} does not have: leave it out, or "
    "pip install 'torch>=2.9'"
)


class JointOptimizer(Optimizer):
    """Several optimizers, each with weights of its own, as one optimizer for schedules and checkpoints."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._parts = optimizers
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts this optimizer's own groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as any optimizer does, and share it with the parts."""
        super().load_state_dict(state_dict)
        self._share()


def muon_and_adamw(
    model: torch.nn.Module,
    args: TrainingArguments,
    muon_learning_rate: float,
    decayed: Collection[str],
    outside: Collection[torch.nn.Module],
) -> JointOptimizer:
    """Return an optimizer that trains matrices by Muon and all other weights by AdamW.

    Muon (Jordan et al. 2024, `torch.optim.Muon`) orthogonalises the momentum of each matrix. Its steps are scaled to
    the size of AdamW's (arXiv 2502.16982, section 2.2), so that its learning rate is comparable to AdamW's.

    Args:
        model: the model whose weights are trained, those that require gradients.
        args: learning rate, betas and epsilon of AdamW; weight decay of both.
        muon_learning_rate: learning rate of the matrices.
        decayed: names of the weights that decay.
        outside: modules whose matrices AdamW trains too: embeddings and LM head.

    Raises:
        ValueError: torch is older than 2.9, and has no Muon.
    """
    left_out = {id(p) for module in outside for p in module.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in left_out
            groups.setdefault((is_matrix, name in decayed), []).append(parameter)

    def of(*, matrices: bool) -> list[dict[str, Any]]:
        return [
            {"params": members, "weight_decay": args.weight_decay if decays else 0.0}
            for (is_matrix, decays), members in groups.items()
            if is_matrix == matrices
        ]

    parts: list[Optimizer] = []
    if matrices := of(matrices=True):
        if MUON is None:
            raise ValueError(NO_MUON)
        parts.append(MUON(matrices, lr=muon_learning_rate, adjust_lr_fn="match_rms_adamw"))
    if others := of(matrices=False):
        parts.append(
            AdamW(others, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, fused=True)
        )
    return JointOptimizer(parts)
