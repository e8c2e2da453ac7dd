"""What is kept with a model between calls: compiled steps, buffers, how it attends, and what steps cost and bring."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jacobi_hf.tuning.memory import Memory

if TYPE_CHECKING:
    from jacobi_hf.attention.dispatch import AttentionProbe
    from jacobi_hf.execution.buffers import CallBuffers


class Kept:
    """What is kept for a model between calls.

    Attributes:
        steps: compiled steps by their key.
        buffers: those that no call is using, each with its key; the last used one is at the end.
        probes: what a first forward has shown of the model's attention, see `jacobi_hf.integration.forward`.
        memory: what steps have cost, and how many guesses were accepted.
    """

    def __init__(self) -> None:
        self.steps: dict[Any, Any] = {}
        self.buffers: list[tuple[Any, CallBuffers]] = []
        self.probes: dict[Any, AttentionProbe] = {}
        self.memory = Memory()


_kept_by_model: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
keeping = threading.Lock()


def kept_for(model: Any) -> Kept:
    """Return what is kept for a model, to be added to."""
    with keeping:
        return _kept_by_model.setdefault(model, Kept())


def clear_graphs(model: Any) -> None:
    """Drop the compiled steps, CUDA graphs and buffers that are kept for a model. The next call makes new ones."""
    with keeping:
        _kept_by_model.pop(model, None)
