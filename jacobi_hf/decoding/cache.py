"""A static key/value cache for rows of different lengths: slots are written first, and committed once accepted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

# Keys and values of draft slots are clamped to this; those of sound models are far below it.
BOUND = 1e4


class JacobiStaticLayer(StaticLayer):
    """Keys and values of one layer, `(B, heads, columns, head_dim)`; full length even if the layer's attention slides.

    `update` writes the slots of a forward after each row's committed tokens. It returns the key columns that the
    forward reads, and leaves the lengths of the rows alone.

    Args:
        columns: tokens that a row has room for.
        step: where the slots of the current forward go; all layers of a cache share it.
    """

    def __init__(self, columns: int, step: _OpenStep) -> None:
        super().__init__(max_cache_len=columns)
        self._step = step

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers. Under autocast, values may have another dtype than keys."""
        super().lazy_initialization(key_states, value_states)
        if value_states.dtype != self.values.dtype:
            self.values: torch.Tensor = self.values.to(value_states.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of a forward's slots, and return the keys and values that it reads.

        Args:
            key_states: `(B, heads, Q, head_dim)`.
            value_states: `(B, heads, Q, head_dim)`.
            args: ignored, as in transformers' static layers.
            kwargs: ignored.

        Returns:
            keys and values, each `(B, heads, K, head_dim)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._step.draft_slots:
            # Attention adds 0 times the value of a masked column, and 0 times NaN is NaN. So a drafter's NaN or Inf
            # would reach the other slots.
            for states in (key_states, value_states):
                states[:, :, -self._step.draft_slots :].nan_to_num_(0.0, BOUND, -BOUND).clamp_(-BOUND, BOUND)
        self.write(self._step.slot_BQ, key_states, value_states, self._step.slot_Q)
        columns = self._step.columns
        return self.keys.narrow(2, 0, columns), self.values.narrow(2, 0, columns)

    def grow(self, columns: int, used: int) -> None:
        """Replace the buffers by longer ones: the first `used` columns are copied, the others hold zeros."""
        self.max_cache_len = columns
        if not self.is_initialized:
            return
        keys = self.keys
        values = self.values
        self.lazy_initialization(keys, values)
        self.keys[:, :, :used] = keys[:, :, :used]
        self.values[:, :, :used] = values[:, :, :used]

    def empty(self, used: int) -> None:
        """Write zeros to the first `used` columns."""
        if self.is_initialized:
            self.keys[:, :, :used] = 0
            self.values[:, :, :used] = 0

    def write(
        self,
        index_BQ: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        index_Q: torch.Tensor | None = None,
    ) -> None:
        """Write states `(B, heads, Q, head_dim)` to the columns `index_BQ`.

        Args:
            index_BQ: the columns of each row.
            key_states: keys.
            value_states: values.
            index_Q: the columns, if they are the same in every row.
        """
        if index_Q is not None:
            index_Q = index_Q.to(self.keys.device)
            self.keys.index_copy_(2, index_Q, key_states)
            self.values.index_copy_(2, index_Q, value_states)
            return
        index_BQ = index_BQ.to(self.keys.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, index_BQ[:, None, :, None].expand_as(states), states)

    def read(self, index_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the keys and values in the columns `index_BN`, each `(B, heads, N, head_dim)`."""
        index_BN = index_BN.to(self.keys.device)
        if len(self.keys) == 1:
            return self.keys.index_select(2, index_BN[0]), self.values.index_select(2, index_BN[0])
        index = index_BN[:, None, :, None]
        keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        return keys, values


class _OpenStep:
    """The current forward, as layers of a cache see it: where its slots are written, and which columns it reads."""

    slot_BQ: torch.Tensor
    slot_Q: torch.Tensor | None  # if they are the same in every row
    columns: int
    draft_slots: int = 0


class JacobiStaticCache(StaticCache):
    """Key/value cache of a batch whose rows have different lengths.

    A forward writes its slots after the committed tokens of each row, at `lengths_B + arange(Q)`. Only `commit`
    changes `lengths_B`. So nothing is ever rolled back: the next forward writes over the slots that were not accepted.

    `grow` makes room for more tokens. Only then do the buffers get other addresses.

    Args:
        config: the model's config.
        batch_size: B.
        capacity: tokens that a row has room for, the slots of one step included.
        device: of the lengths. Each layer is on the device of its keys.

    Attributes:
        capacity: tokens that a row has room for now.
        lengths_B: committed tokens of each row.
        column_C: 0, 1, 2, .., the numbers of all columns.
    """

    EXTENT_MULTIPLE = 64

    def __init__(self, config: PreTrainedConfig, batch_size: int, capacity: int, device: torch.device) -> None:
        self._step = _OpenStep()
        self.capacity = capacity
        columns = self._all_columns(capacity)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        Cache.__init__(self, layers=[JacobiStaticLayer(columns, self._step) for _ in range(layers)])
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.column_C = torch.arange(columns, device=device)
        self._first_columns: dict[int, torch.Tensor] = {}  # views, by their length
        self._used = 0  # columns that have been written or read since the cache was empty

    def columns(self, slots: int, longest: int, *, exact: bool = False) -> torch.Tensor:
        """Return `key_column_K`, the numbers of the columns that a forward reads, without waiting for the device.

        Args:
            slots: Q, slots of the forward.
            longest: the largest of `lengths_B`.
            exact: whether no column is read that no row needs. Otherwise their number is a multiple of
                `EXTENT_MULTIPLE`, so that forwards have few shapes.

        Raises:
            RuntimeError: the slots do not fit.
        """
        needed = longest + slots
        if needed > self.capacity:
            raise RuntimeError(
                f"a step of {slots} slots after {longest} tokens does not fit into a cache of {self.capacity} tokens."
            )
        extent = needed if exact else self._extent(needed)
        self._used = max(self._used, extent)
        return self.first_columns(extent)

    def first_columns(self, count: int) -> torch.Tensor:
        """Return the numbers of the first columns; a view takes time to make, so each is made once."""
        if count not in self._first_columns:
            self._first_columns[count] = self.column_C[:count]
        return self._first_columns[count]

    def _extent(self, columns: int) -> int:
        return -(-columns // self.EXTENT_MULTIPLE) * self.EXTENT_MULTIPLE

    def _all_columns(self, capacity: int) -> int:
        # One column more than is ever read: a compiled step would take a view of all columns for a new kind of tensor.
        return self._extent(capacity) + 1

    def grow(self, capacity: int) -> None:
        """Make room for more tokens. Layer after layer gets longer buffers, so only one layer is there twice.

        Args:
            capacity: tokens that a row has room for afterwards, the slots of one step included.
        """
        self.capacity = capacity
        columns = self._all_columns(capacity)
        for layer in self.layers:
            layer.grow(columns, self._used)
        self.column_C = torch.arange(columns, device=self.lengths_B.device)
        self._first_columns = {}

    def open_step(
        self,
        slots: int,
        key_column_K: torch.Tensor,
        draft_slots: int = 0,
        *,
        past: int | None = None,
        exact: bool = False,
    ) -> None:
        """Prepare for a forward.

        Args:
            slots: Q, slots of the forward.
            key_column_K: the columns that it reads, from `columns`.
            draft_slots: how many of the slots, the last ones, run with a drafter's weights.
            past: committed tokens of every row, if the host knows that all have as many.
            exact: with `past`, whether the forward reads no column after its slots.
        """
        step = self._step
        step.draft_slots = draft_slots
        step.slot_BQ = self.lengths_B[:, None]
        if slots > 1:
            step.slot_BQ = step.slot_BQ + self.column_C[:slots]
        is_same = past is not None or len(self.lengths_B) == 1
        step.slot_Q = step.slot_BQ[0] if is_same else None
        step.columns = past + slots if exact and past is not None else len(key_column_K)

    @property
    def slot_BQ(self) -> torch.Tensor:
        """The columns that the slots of the current forward are written to."""
        return self._step.slot_BQ

    @property
    def used_layers(self) -> list[JacobiStaticLayer]:
        """The layers that have keys and values: in some models, others read those of a layer before them."""
        return [layer for layer in self.layers if layer.is_initialized]

    def commit(self, counts_B: torch.Tensor, slot_BN: torch.Tensor | None = None) -> None:
        """Make slots of the last forward part of each row.

        Args:
            counts_B: number of tokens that become part of each row.
            slot_BN: the slots that hold these tokens, in the order of the text. By default they are the first slots;
                others are moved there.
        """
        if slot_BN is not None:
            first_B1 = self.lengths_B[:, None]
            target_BN = first_B1 + torch.arange(slot_BN.shape[1], device=slot_BN.device)
            for layer in self.used_layers:
                layer.write(target_BN, *layer.read(first_B1 + slot_BN), target_BN[0] if len(target_BN) == 1 else None)
        self.lengths_B += counts_B

    def reset(self) -> None:
        """Empty the cache. Its buffers keep their addresses."""
        for layer in self.layers:
            layer.empty(self._used)  # a masked NaN of an earlier call would still reach the output
        self._used = 0
        self.lengths_B.zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the committed tokens of the longest row in a layer; 0 in a layer that no forward has written to."""
        # Cross-attention is left out by its model where its layer is empty.
        return int(self.lengths_B.max()) if self.layers[layer_idx].is_initialized else 0

    def load(self, source: Cache, place_BL: torch.Tensor, row_B: torch.Tensor | None = None) -> None:
        """Copy the tokens of a padded cache into this empty one, each to its place, as far as the capacity goes.

        Args:
            source: the cache of an earlier call; it does not change.
            place_BL: for each column of `source`, the place of its token in each row of this cache; negative for a
                pad. Further columns are ignored.
            row_B: the row of `source` that each row of this cache copies; by default the row of the same number.
        """
        past = int(source.get_seq_length())
        place_BL = place_BL[:, :past]
        for mine, theirs in zip(self.layers, source.layers, strict=False):
            if not theirs.is_initialized or theirs.keys is None:
                continue
            keys = theirs.keys
            values = theirs.values
            if row_B is not None:
                keys = keys[row_B.to(keys.device)]
                values = values[row_B.to(values.device)]
            if not mine.is_initialized:
                mine.lazy_initialization(keys, values)
            stored = min(past, keys.shape[2])  # a sliding layer keeps its last tokens only
            place_BN = place_BL[:, past - stored :].to(keys.device)
            # A token without a place goes to the last column, which is never read.
            has_place_BN = (place_BN >= 0) & (place_BN < self.capacity)
            index_BN = torch.where(has_place_BN, place_BN, mine.max_cache_len - 1)
            for buffer, states in ((mine.keys, keys), (mine.values, values)):
                index = index_BN[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                buffer.scatter_(2, index, states[:, :, :stored].to(buffer.dtype))
        self.lengths_B.copy_((place_BL >= 0).sum(1).clamp(max=self.capacity))
        self._used = self._extent(min(past, self.capacity))

    def append_to(self, target: Cache, place_BN: torch.Tensor, *, frees: bool = True) -> None:
        """Append copies of committed tokens to a padded cache of transformers.

        Args:
            target: the cache that grows.
            place_BN: for each column that it grows by, the place of its token in the row; for a pad, any place.
            frees: whether to free this cache, layer by layer. It cannot be used afterwards.
        """
        for number, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            keys, values = layer.read(place_BN)
            if frees:
                layer.keys = None
                layer.values = None
            target.update(keys, values, number)
