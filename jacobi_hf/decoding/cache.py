"""A static cache whose rows have lengths of their own, written first and committed later."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

# Keys and values of a drafter's slots are held to this; those of sound models are far below it.
BOUND = 1e4


class JacobiStaticLayer(StaticLayer):
    """Keys and values of one layer, `(B, heads, capacity, head_dim)`, full length even where attention slides.

    `update` writes a step's slots behind each row's committed tokens and returns the part of the buffers that any row
    uses; it never advances a length.
    """

    def __init__(self, capacity: int, steps: _Step) -> None:
        super().__init__(max_cache_len=capacity)
        self._step = steps

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate; values may have another dtype than keys (autocast)."""
        super().lazy_initialization(key_states, value_states)
        if value_states.dtype != self.values.dtype:
            self.values: torch.Tensor = self.values.to(value_states.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `(B, heads, Q, head_dim)` states; returns `(B, heads, extent, head_dim)` keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._step.draft_slots:
            for states in (key_states, value_states):
                # A masked column still takes part as 0 times its value: NaN or Inf of a broken drafter must not get to other slots.
                states[:, :, -self._step.draft_slots :].nan_to_num_(0.0, BOUND, -BOUND).clamp_(-BOUND, BOUND)
        self.write(self._step.slot_BQ, key_states, value_states)
        extent = len(self._step.key_column_K)
        return self.keys[:, :, :extent], self.values[:, :, :extent]

    def write(self, index_BQ: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put `(B, heads, Q, head_dim)` states at the given places of each row."""
        index_BQ = index_BQ.to(self.keys.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if len(buffer) == 1:
                buffer.index_copy_(2, index_BQ[0], states)
            else:
                buffer.scatter_(2, index_BQ[:, None, :, None].expand_as(states), states)

    def read(self, index_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the states at the given places of each row, `(B, heads, N, head_dim)`."""
        index_BN = index_BN.to(self.keys.device)
        if len(self.keys) == 1:
            return self.keys.index_select(2, index_BN[0]), self.values.index_select(2, index_BN[0])
        index = index_BN[:, None, :, None]
        keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        return keys, values


class _Step:
    """What the layers share while one forward runs: where its slots go and how far the cache is read."""

    slot_BQ: torch.Tensor
    key_column_K: torch.Tensor
    draft_slots: int = 0


class JacobiStaticCache(StaticCache):
    """Key/value cache of a ragged batch: *write, then commit*.

    A forward's slots are written at `lengths_B + arange(Q)`; only `commit` advances `lengths_B`, so unverified slots are
    simply written over by the next forward and nothing is ever rolled back.

    Args:
        config: the model's config.
        batch_size: B.
        capacity: tokens a row can hold, one step's slots included.
        device: of the lengths; layers live where their keys come from.
    """

    EXTENT_MULTIPLE = 64

    def __init__(self, config: PreTrainedConfig, batch_size: int, capacity: int, device: torch.device) -> None:
        self._step = _Step()
        self.capacity = capacity
        # One column more than is ever read: a compiled step would take a view of all columns for another kind of tensor.
        columns = self._extent(capacity) + 1
        layers = [
            JacobiStaticLayer(columns, self._step)
            for _ in range(config.get_text_config(decoder=True).num_hidden_layers)
        ]
        Cache.__init__(self, layers=layers)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.column_C = torch.arange(columns, device=device)

    def columns(self, slots: int, longest: int) -> torch.Tensor:
        """`key_column_K`, the numbers of the columns that a forward of `slots` slots reads; on the host.

        Args:
            longest: the largest of `lengths_B`.
        """
        needed = longest + slots
        if needed > self.capacity:
            raise RuntimeError(
                f"a step of {slots} slots behind {longest} tokens does not fit into a cache of {self.capacity}"
            )
        return self.column_C[: self._extent(needed)]

    def _extent(self, columns: int) -> int:
        return -(-columns // self.EXTENT_MULTIPLE) * self.EXTENT_MULTIPLE

    def open_step(self, slots: int, key_column_K: torch.Tensor, draft_slots: int = 0) -> None:
        """Prepare for a forward of `slots` slots, the last `draft_slots` of them a drafter's, that reads the columns `key_column_K`."""
        self._step.draft_slots = draft_slots
        self._step.slot_BQ = self.lengths_B[:, None] + self.column_C[:slots]
        self._step.key_column_K = key_column_K

    @property
    def slot_BQ(self) -> torch.Tensor:
        """The places that the opened step's slots are written to."""
        return self._step.slot_BQ

    def commit(self, counts_B: torch.Tensor, slot_BN: torch.Tensor | None = None) -> None:
        """Keep `counts_B` of the written slots per row.

        Args:
            counts_B: tokens that became part of each row.
            slot_BN: the slots that hold them, where they are not the first N: their states are moved to the front.
        """
        if slot_BN is not None:
            first_B1 = self.lengths_B[:, None]
            target_BN = first_B1 + torch.arange(slot_BN.shape[1], device=slot_BN.device)
            for layer in self.layers:
                layer.write(target_BN, *layer.read(first_B1 + slot_BN))
        self.lengths_B += counts_B

    def reset(self) -> None:
        """Hold nothing, at the same addresses."""
        super().reset()  # zeros, since a NaN of an earlier call would not stay behind a mask
        self.lengths_B.zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's committed tokens."""
        return int(self.lengths_B.max())

    def load(self, source: Cache, pad_B: torch.Tensor, row_B: torch.Tensor | None = None) -> None:
        """Take over a left-padded cache, each row shifted left by its `pad_B` pads and cut at the capacity; `source` is only read.

        Args:
            source: the cache of an earlier call.
            pad_B: pads in front of each row of this cache.
            row_B: the row of `source` that each row takes over; by default its own.
        """
        past = int(source.get_seq_length())
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            keys, values = theirs.keys, theirs.values
            if row_B is not None:
                keys, values = keys[row_B.to(keys.device)], values[row_B.to(values.device)]
            stored = min(past, keys.shape[2])  # a sliding layer has kept the last tokens only
            if not mine.is_initialized:
                mine.lazy_initialization(keys, values)
            compact_BN = torch.arange(past - stored, past, device=keys.device) - pad_B.to(keys.device)[:, None]
            # What has no place is sent to the last one, which is written over before it is ever visible.
            index_BN = torch.where((compact_BN >= 0) & (compact_BN < self.capacity), compact_BN, self.capacity - 1)
            for buffer, states in ((mine.keys, keys), (mine.values, values)):
                index = index_BN[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                buffer.scatter_(2, index, states[:, :, :stored].to(buffer.dtype))
        self.lengths_B.copy_((past - pad_B).clamp(0, self.capacity))

    def append_to(self, target: Cache, first: int, last: int, pad_B: torch.Tensor, *, frees: bool = True) -> None:
        """Append copies of the tokens `first..last-1` (counted with left pads) to `target`.

        Args:
            frees: whether this cache is freed, layer by layer; it is then of no more use.
        """
        index_BN = (torch.arange(first, last, device=pad_B.device) - pad_B[:, None]).clamp(min=0)
        for number, layer in enumerate(self.layers):
            keys, values = layer.read(index_BN)
            if frees:
                layer.keys = layer.values = None
            target.update(keys, values, number)
