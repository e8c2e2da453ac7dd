"""Sampling noise, drawn as ordinary sampling draws it, so that sampled decoding is greedy decoding of noisy scores.

`torch.multinomial(p, 1)` is `argmax(p / q)` with exponential noise `q`. When each new-token index keeps its own `q`, drafts can be
verified by equality, and the text is that of `generate`.
"""

from __future__ import annotations

import torch


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of torch's default generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Put torch's default generator of a device back to `state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


class SamplingNoise:
    """Exponential noise `(B, V)` per new-token index, drawn in order from torch's default generator of the device.

    Indices may be drawn ahead of the tokens that are finally kept; `rewind` sets the generator to where ordinary sampling of a
    given number of tokens leaves it.

    Args:
        device: whose default generator is drawn from.
        ahead: whether indices may be drawn before the tokens in front of them are chosen. Not so where somebody else draws
            from the same generator in between.
        room: indices in flight to be expected.
        ring_IBV: of an earlier call, to be drawn into.

    Attributes:
        ring_IBV: index i lies at `i % I`; replaced by a longer one when more indices are in flight than it has room for.
    """

    def __init__(
        self, device: torch.device, *, ahead: bool = True, room: int = 1, ring_IBV: torch.Tensor | None = None
    ) -> None:
        self._device, self.ahead, self._room = device, ahead, room
        self.ring_IBV = torch.empty(0, 0, 0, device=device) if ring_IBV is None else ring_IBV
        self._states = {0: generator_state(device)}
        self._drawn = self._first = 0

    def draw(self, first: int, last: int, shape: tuple[int, int]) -> None:
        """Make the indices `first..last` available, each of shape `(B, V)`, and forget those before."""
        self._make_room(first, last, shape)
        while self._drawn <= last:
            self.ring_IBV[self._drawn % len(self.ring_IBV)].exponential_()
            self._drawn += 1
            self._states[self._drawn] = generator_state(self._device)
        for index in range(self._first, first):
            self._states.pop(index, None)
        self._first = first

    def _make_room(self, first: int, last: int, shape: tuple[int, int]) -> None:
        ring_IBV, needed = self.ring_IBV, last - first + 1
        if tuple(ring_IBV.shape[1:]) == shape and len(ring_IBV) >= needed:
            return
        length = 1 << (max(needed, self._room) - 1).bit_length()
        self.ring_IBV = torch.empty(length, *shape, device=self._device)
        for index in range(first, self._drawn):
            self.ring_IBV[index % length] = ring_IBV[index % len(ring_IBV)]

    def at(self, index_BQ: torch.Tensor) -> torch.Tensor:
        """The noise of each row at its indices, `(B, Q, V)`; anything at indices that are not available."""
        rows_B1 = torch.arange(len(index_BQ), device=index_BQ.device)[:, None]
        return self.ring_IBV[index_BQ % len(self.ring_IBV), rows_B1]

    def rewind(self, tokens: int) -> None:
        """Leave the generator as if exactly `tokens` tokens per row had been sampled (or all that were kept, if those are more)."""
        if self.ahead:
            set_generator_state(self._device, self._states[max(tokens, self._first)])
