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

    Noise is kept from step to step in a ring. It can be large: in a step it has up to as many numbers as the logits
    have. Where the host can read at no cost which tokens the slots are for (`redraws`), the ring stays below 16 MB.
    Noise that has no place in it is drawn again in every step, from the state that the generator had. That costs as
    much as the noise of a token in ordinary sampling.

    Args:
        device: the device whose default generator is used.
        ahead: whether noise may be drawn before the earlier tokens are chosen. It may not if something else draws from
            the same generator in between, e.g. a logits processor.
        room: tokens that are expected to need noise at the same time.
        redraws: whether noise that has no place in a small ring is drawn again.
        ring_IBV: noise of an earlier call, to be overwritten; a new tensor by default.

    Attributes:
        ring_IBV: the noise of new token i is at `i % I`, if it is kept. A longer tensor takes its place if more noise
            is needed at the same time than it has room for.
        is_whole: whether all noise that is available is in the ring (`at`). Otherwise `of` returns it.
        first: the first new token whose noise is available.
    """

    KEPT = 1 << 22  # numbers in the ring of a call that draws noise again

    def __init__(
        self,
        device: torch.device,
        *,
        ahead: bool = True,
        room: int = 1,
        redraws: bool = False,
        ring_IBV: torch.Tensor | None = None,
    ) -> None:
        self._device = device
        self.ahead = ahead
        self._room = room
        self._redraws = redraws
        self.ring_IBV = torch.empty(0, 0, 0, device=device) if ring_IBV is None else ring_IBV
        self._held = [-1] * len(self.ring_IBV)  # the new token whose noise is in each place of the ring
        self._states = {0: generator_state(device)}  # by the number of tokens whose noise has been drawn
        self._drawn = 0
        self._at: int | None = 0  # the state that the generator has, if nobody else has drawn from it
        self.is_whole = True
        self.first = 0

    def draw(self, first: int, last: int, shape: tuple[int, int]) -> None:
        """Make the noise of the new tokens `first` to `last` available, and forget that of tokens before.

        Args:
            first: index of a new token, at least the `first` of the call before.
            last: index of a new token.
            shape: `(B, V)`.
        """
        for index in range(self.first, min(first, self._drawn)):
            self._states.pop(index, None)
        self.first = first
        self._make_room(last - first + 1, shape)
        if self.is_whole:
            for index in range(first, last + 1):
                self.of(index)
        else:
            self._at = None

    def _make_room(self, needed: int, shape: tuple[int, int]) -> None:
        length = self._room
        while length < needed:
            length *= 2
        if self._redraws:
            length = min(length, max(1, self.KEPT // (shape[0] * shape[1])))
        before_IBV = self.ring_IBV
        if tuple(before_IBV.shape[1:]) != shape or len(before_IBV) < length:
            held = {index: before_IBV[place] for place, index in enumerate(self._held) if index >= self.first}
            self.ring_IBV = torch.empty(length, *shape, device=self._device)
            self._held = [-1] * length
            for index, noise_BV in held.items():
                self.ring_IBV[index % length] = noise_BV
                self._held[index % length] = index
        self.is_whole = len(self.ring_IBV) >= needed

    def at(self, index_R: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        """Return noise `(R, V)` from the ring; arbitrary values for tokens whose noise is not available.

        Args:
            index_R: indices of new tokens.
            row_R: the row of each.
        """
        return self.ring_IBV[index_R % len(self.ring_IBV), row_R]

    def of(self, index: int) -> torch.Tensor:
        """Return the noise `(B, V)` of a new token, from `first` on; it holds until the next call."""
        place = index % len(self.ring_IBV)
        noise_BV = self.ring_IBV[place]
        if self._held[place] == index:
            return noise_BV
        if self.is_whole or self._held[place] < self.first:
            self._held[place] = index
        else:
            noise_BV = torch.empty_like(noise_BV)
        for number in range(min(index, self._drawn), index + 1):
            if number != self._at:
                set_generator_state(self._device, self._states[number])
            noise_BV.exponential_()
            self._at = number + 1
            if number == self._drawn:
                self._drawn += 1
                self._states[self._drawn] = generator_state(self._device)
        return noise_BV

    def rewind(self, tokens: int) -> None:
        """Set the generator to its state after sampling `tokens` new tokens in each row.

        States before the first token whose noise is available are gone; then the state of that token is taken.
        """
        if self.ahead:
            set_generator_state(self._device, self._states[max(tokens, self.first)])
