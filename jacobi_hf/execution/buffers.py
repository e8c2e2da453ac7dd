"""The buffers of a call, which grow with its text. They stay from call to call if steps are compiled."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import field_of
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
        columns: columns of cache and text that are needed at first, those of one step included.
        device: where the tokens are.
        most: columns that the call needs at most, for buffers of one call. Without it, the buffers are for many calls.

    Attributes:
        state: the rows, with their cache.
        ring_IBV: sampling noise of an earlier call, or None.
        graphs: CUDA graphs over these buffers, see `jacobi_hf.execution.cuda_graphs.CudaGraphSteps`.
    """

    def __init__(
        self,
        model: Any,
        sources: Sources,
        rows: int,
        columns: int,
        device: torch.device,
        most: int | None = None,
    ) -> None:
        room_for = rounded_up if most is None else partial(with_reserve, most=most)
        self.cache = JacobiStaticCache(model.config, rows, room_for(columns), device)
        self.state = DecodingState(sources, self.cache, room_for)
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


def with_reserve(columns: int, most: int) -> int:
    """Return a quarter more than `columns`, but no more than `most`: the buffers of one call grow by such quarters."""
    return max(columns, min(columns + columns // 4, most))


@contextlib.contextmanager
def acquire(
    model: Any, config: JacobiConfig, sources: Sources, rows: int, columns: int, device: torch.device
) -> Iterator[CallBuffers]:
    """Give the buffers that an earlier call has left, or new ones; no other call has them meanwhile.

    Calls that differ in length alone get the same buffers. They have room for powers of two, and grow with the texts.
    A call that fails does not leave its buffers to the next one.

    Args:
        model: the model.
        config: the knobs of the call.
        sources: the draft sources of the call.
        rows: B.
        columns: columns of cache and text that the call needs at first, those of one step included.
        device: where the tokens are.
    """
    kept = kept_for(model)
    # Under inference mode, tensors are made that no call outside of it may write to.
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    text_config = model.config.get_text_config(decoder=True)
    layers = [field_of(text_config, name) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    drafts = [(source.name, source.shape) for source in sources.all]
    key = config, drafts, rows, device, model.dtype, layers, torch.is_inference_mode_enabled(), autocast
    with keeping:
        found = [buffers for other, buffers in kept.buffers if other == key]
        buffers = found[-1] if found else None
        kept.buffers = [pair for pair in kept.buffers if pair[1] is not buffers]
        del found
    if buffers is None:
        buffers = CallBuffers(model, sources, rows, columns, device)
    else:
        buffers.cache.reset()
        buffers.state.reserve(columns)
    yield buffers
    with keeping:
        kept.buffers = [*kept.buffers, (key, buffers)][-MOST_BUFFERS:]
