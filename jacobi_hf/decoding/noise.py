"""Sampling noise, drawn as ordinary sampling draws it, which makes sampled decoding greedy decoding of noisy scores.

`torch.multinomial(p, 1)` is `argmax(p / q)` with exponential noise `q`. If each new token keeps its own `q`, then its
guess can be verified by equality, and the text is that of ordinary sampling with the same seed.
"""

from __future__ import annotations

import torch


def generator_state(device: torch.device) -> torch.Tensor:
    """Return the state of torch's default generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Put torch's default generator of a device back to `state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


class SamplingNoise:
    """Exponential noise `(B, V)` for each new token, drawn in the order of the tokens.

    It comes from torch's default generator of a device, as in ordinary sampling.

    A step may draw noise for tokens that are not kept in the end. After the call, `rewind` sets the generator to the
    state in which ordinary sampling leaves it.

    Args:
        device: the device whose default generator is used.
        ahead: whether noise may be drawn before the earlier tokens are chosen. It may not if something else draws from
            the same generator in between, e.g. a logits processor.
        room: tokens that are expected to need noise at the same time.
        ring_IBV: noise of an earlier call, to be overwritten; a new tensor by default.

    Attributes:
        ring_IBV: the noise of new token i is at `i % I`. A longer tensor takes its place if more noise is needed at
            the same time than it has room for.
    """

    def __init__(
        self, device: torch.device, *, ahead: bool = True, room: int = 1, ring_IBV: torch.Tensor | None = None
    ) -> None:
        self._device = device
        self.ahead = ahead
        self._room = room
        self.ring_IBV = torch.empty(0, 0, 0, device=device) if ring_IBV is None else ring_IBV
        self._states = {0: generator_state(device)}  # by the number of tokens whose noise has been drawn
        self._drawn = 0
        self._first = 0

    def draw(self, first: int, last: int, shape: tuple[int, int]) -> None:
        """Make the noise of the new tokens `first` to `last` available, and forget that of tokens before.

        Args:
            first: index of a new token, at least the `first` of the call before.
            last: index of a new token.
            shape: `(B, V)`.
        """
        self._make_room(first, last, shape)
        while self._drawn <= last:
            self.ring_IBV[self._drawn % len(self.ring_IBV)].exponential_()
            self._drawn += 1
            self._states[self._drawn] = generator_state(self._device)
        for index in range(self._first, first):
            self._states.pop(index, None)
        self._first = first

    def _make_room(self, first: int, last: int, shape: tuple[int, int]) -> None:
        ring_IBV = self.ring_IBV
        needed = last - first + 1
        if tuple(ring_IBV.shape[1:]) == shape and len(ring_IBV) >= needed:
            return
        length = 1 << (max(needed, self._room) - 1).bit_length()
        self.ring_IBV = torch.empty(length, *shape, device=self._device)
        for index in range(first, self._drawn):
            self.ring_IBV[index % length] = ring_IBV[index % len(ring_IBV)]

    def at(self, index_BQ: torch.Tensor) -> torch.Tensor:
        """Return the noise `(B, Q, V)` of new tokens; arbitrary values for tokens whose noise is not available.

        Args:
            index_BQ: for each slot, the index of the new token that is chosen there.
        """
        row_B1 = torch.arange(len(index_BQ), device=index_BQ.device)[:, None]
        return self.ring_IBV[index_BQ % len(self.ring_IBV), row_B1]

    def rewind(self, tokens: int) -> None:
        """Set the generator to its state after sampling `tokens` new tokens in each row.

        States before the first token whose noise is available are gone; then the state of that token is taken.
        """
        if self.ahead:
            set_generator_state(self._device, self._states[max(tokens, self._first)])
