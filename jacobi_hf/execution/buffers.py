"""The buffers of a call, and what is kept for a model between calls: buffers of static address, compiled and captured steps."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.execution.compiled import CompiledStep, UncompiledStep


class Arena:
    """Everything that the steps of one call read and write beside the model's weights.

    Args:
        model: whose cache this is; nothing here refers to it.
        rows, columns, capacity: of the batch, of a row's text, and of a row's cache.

    Attributes:
        ring_IBV: noise, where an earlier call has sampled.
        recordings: captured steps over these buffers, see `capture.Captured`.
    """

    def __init__(
        self, model: Any, config: JacobiConfig, rows: int, columns: int, capacity: int, device: torch.device
    ) -> None:
        self.cache = JacobiStaticCache(model.config, rows, capacity, device)
        self.step = Step(config, self.cache, columns)
        self.ring_IBV: torch.Tensor | None = None
        self.recordings: Any = None
        self._held: dict[Any, torch.Tensor] = {}

    def hold(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor with this value, the same one whenever name, shape and type are: what a step reads of a call."""
        kind = name, value.shape, value.dtype
        if kind not in self._held:
            self._held[kind] = value.clone()
        return self._held[kind].copy_(value)


class Kept:
    """What is kept for a model.

    Attributes:
        compiled: steps, each of which knows for what it is good.
        arenas: those that no call is using, with what distinguishes them, the last used at the end.
    """

    def __init__(self) -> None:
        self.compiled: list[CompiledStep | UncompiledStep] = []
        self.arenas: list[tuple[Any, Arena]] = []


ARENAS = 32  # kept for a model; each holds a cache
SMALLEST = 512  # tokens
_kept: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
_keeping = threading.Lock()


def kept_for(model: Any) -> Kept:
    """What is kept for a model, to be added to."""
    with _keeping:
        return _kept.setdefault(model, Kept())


def clear_graphs(model: Any) -> None:
    """Forget the compiled and captured steps of a model and the buffers kept for them; the next call that wants them begins anew."""
    with _keeping:
        _kept.pop(model, None)


def rounded_up(tokens: int) -> int:
    """The power of two, `SMALLEST` at least, that has room for so many tokens."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


@contextlib.contextmanager
def borrowed(model: Any, config: JacobiConfig, rows: int, capacity: int, device: torch.device) -> Iterator[Arena]:
    """An arena that an earlier call has left, or a new one; no other call has it meanwhile. Left to the next call unless this one fails.

    For calls that differ in length alone it is the same one, so long as it has room; then a larger one takes its place.
    """
    kept = kept_for(model)
    # Under inference mode tensors are made that nobody else may write to.
    context = (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
    )
    text = model.config.get_text_config(decoder=True)
    layers = [getattr(text, name, None) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    kind = config, rows, device, model.dtype, layers, context
    with _keeping:
        mine = [arena for other, arena in kept.arenas if other == kind]
        arena = next((a for a in reversed(mine) if a.cache.capacity >= capacity), None)
        kept.arenas = [
            (other, a)
            for other, a in kept.arenas
            if a is not arena and (other != kind or a.cache.capacity >= capacity)
        ]
        del mine
    if arena is None:
        arena = Arena(model, config, rows, rounded_up(capacity), rounded_up(capacity), device)
    else:
        arena.cache.reset()
    yield arena
    with _keeping:
        kept.arenas = [*kept.arenas, (kind, arena)][-ARENAS:]
