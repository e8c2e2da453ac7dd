"""Drafters of random weights for the tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import jacobi_hf
from jacobi_hf.drafts.loading import attach
from jacobi_hf.drafts.lora import LoraDrafter


def random_drafter(model: Any, seed: int = 0, scale: float = 1.0, r: int = 4) -> LoraDrafter:
    """A drafter whose factors and embedding are normal noise of that scale."""
    drafter, generator = LoraDrafter.new(model, r=r), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return drafter.requires_grad_(requires_grad=False)


@contextlib.contextmanager
def drafting(model: Any, drafter: LoraDrafter) -> Iterator[None]:
    """The model with this drafter in use."""
    attach(model, drafter, "test")
    try:
        yield
    finally:
        jacobi_hf.unload_drafter(model)
