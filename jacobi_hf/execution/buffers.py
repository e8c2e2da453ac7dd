"""The buffers of a call: tensors of fixed address, left from call to call if steps are compiled."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.state import DecodingState
from jacobi_hf.execution.kept import keeping, kept_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.drafts.sources import Sources

MOST_BUFFERS = 32  # sets of buffers that are kept for a model; each holds a cache
SMALLEST = 512  # tokens


class CallBuffers:
    """Everything that the steps of one call read and write, apart from the model's weights.

    Args:
        model: the model; nothing here refers to it.
        sources: the draft sources of the call.
        rows: B.
        columns: the most tokens of a row's text.
        capacity: the most tokens of a row in the cache, the slots of a step included.
        device: where the tokens are.

    Attributes:
        state: the rows, with their cache.
        ring_IBV: sampling noise of an earlier call, or None.
        graphs: CUDA graphs over these buffers, see `jacobi_hf.execution.cuda_graphs.CudaGraphSteps`.
    """

    def __init__(
        self, model: Any, sources: Sources, rows: int, columns: int, capacity: int, device: torch.device
    ) -> None:
        self.cache = JacobiStaticCache(model.config, rows, capacity, device)
        self.state = DecodingState(sources, self.cache, columns)
        self.ring_IBV: torch.Tensor | None = None
        self.graphs: Any = None
        self._stored: dict[Any, torch.Tensor] = {}

    def store(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor with this value, which has the same address for every value of this name, shape and type."""
        key = name, value.shape, value.dtype
        if key not in self._stored:
            self._stored[key] = value.clone()
        return self._stored[key].copy_(value)


def rounded_up(tokens: int) -> int:
    """Return the smallest power of two that is at least `tokens` and `SMALLEST`."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


@contextlib.contextmanager
def acquire(
    model: Any, config: JacobiConfig, sources: Sources, rows: int, capacity: int, device: torch.device
) -> Iterator[CallBuffers]:
    """Give the buffers that an earlier call has left, or new ones; no other call has them meanwhile.

    Calls that differ in length alone get the same buffers while these have room; then larger ones take their place. A
    call that fails does not leave its buffers to the next one.
    """
    kept = kept_for(model)
    # Under inference mode, tensors are made that no call outside of it may write to.
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    text_config = model.config.get_text_config(decoder=True)
    layers = [getattr(text_config, name, None) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    drafts = [(source.name, source.shape) for source in sources.all]
    key = config, drafts, rows, device, model.dtype, layers, torch.is_inference_mode_enabled(), autocast
    with keeping:
        found = [buffers for other, buffers in kept.buffers if other == key and buffers.cache.capacity >= capacity]
        buffers = found[-1] if found else None
        # Buffers of this key that are too small have had their time.
        kept.buffers = [
            (other, kept_buffers)
            for other, kept_buffers in kept.buffers
            if other != key or (kept_buffers is not buffers and kept_buffers.cache.capacity >= capacity)
        ]
        del found
    if buffers is None:
        buffers = CallBuffers(model, sources, rows, rounded_up(capacity), rounded_up(capacity), device)
    else:
        buffers.cache.reset()
    yield buffers
    with keeping:
        kept.buffers = [*kept.buffers, (key, buffers)][-MOST_BUFFERS:]
