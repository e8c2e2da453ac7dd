"""The masks of a step, in the form that each attention implementation of a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.dispatch import EAGER, FLASH, FLEX, SDPA, AttentionProbe
from jacobi_hf.attention.kernels import flash_attn_with_kvcache, grouped_mask, has_flex
from jacobi_hf.attention.masks import attention_mask, block_mask, mask_from_table, mask_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from jacobi_hf.decoding.layout import Layout

FULL = "full_attention"
SLIDING = "sliding_attention"
LAYER_TYPES = {FULL, SLIDING}
# Implementations that take any bool mask.
TAKES_MASK = (SDPA, EAGER)
# Forwards with more slots are prefills. `grouped_sdpa` repeats the mask, which would cost them more than it saves.
GROUPED_SLOTS = 512


def attention_of(config: Any) -> str:
    """Return the name of the attention implementation that a model with this config runs.

    While `generate_batch` runs on a model, its config may have the name with "paged|" in front.
    """
    return str(config._attn_implementation).removeprefix("paged|")


def field_of(config: Any, name: str) -> Any:
    """Return a field of a config; None where there is none, or where it differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' error for a field that differs from layer to layer
        return None


def attention_key(config: Any) -> tuple[Any, ...]:
    """Return what must be equal for two calls of a model with this config to attend in the same way."""
    text_config = config.get_text_config(decoder=True)
    fields = [field_of(text_config, name) for name in ("sliding_window", "is_causal")]
    return attention_of(text_config), *fields, tuple(layer_types(text_config))


def cannot_attend(config: Any) -> str | None:
    """Return why a model's attention implementation cannot take our masks, with advice; None if it can."""
    own = attention_of(config)
    if own == FLASH and flash_attn_with_kvcache() is None:
        problem = "for which the package flash-attn is not installed"
    elif own not in (SDPA, FLEX, FLASH, EAGER):
        problem = "which takes no mask of our own"
    else:
        return None
    advice = "load the model with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')"
    return f"attn_implementation={own!r}, {problem}: {advice}"


def layer_types(config: Any) -> list[str]:
    """Return the kind of attention of each layer: "full_attention", "sliding_attention", or another."""
    declared = getattr(config, "layer_types", None)
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(declared) if declared else [kind] * config.num_hidden_layers


def usable_kernels(own: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> set[str]:
    """Return which of `FLEX` and `FLASH` a model can run in steps; `SDPA` it always can.

    Args:
        own: the attention implementation that the model was loaded with.
        device: of the model.
        dtype: of the model.
        head_dim: features of a head.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not 16 <= head_dim <= 256:
        return set()
    usable = {FLEX} if has_flex() else set()
    return usable | {FLASH} if own == FLASH and head_dim % 8 == 0 else usable


class MaskBuilder:
    """Builder of the `attention_mask` argument of a model's forward, from one bool mask for each kind of layer.

    Args:
        config: the model's config.
        dtype: of the model.

    Attributes:
        windows: sliding window of each kind of layer; None for full attention. They are taken from the config.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        text_config = config.get_text_config(decoder=True)
        self._dtype = dtype
        self._own = attention_of(text_config)
        self.windows: dict[str, int | None] = {
            kind: text_config.sliding_window if kind == SLIDING else None
            for kind in sorted(set(layer_types(text_config)))
        }

    def __call__(
        self, mask: Callable[[int | None], torch.Tensor], device: torch.device
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the argument for one forward: a mask, or a mask for each kind of layer by its name.

        Args:
            mask: function of a sliding window, or of None, that returns the bool mask `(B, 1, Q, K)`, True where
                attention is allowed.
            device: where the model takes its masks.
        """
        return self._by_kind(lambda window: self._additive(mask(window)).to(device))

    def _by_kind(self, mask: Callable[[int | None], Any]) -> Any:
        masks = {kind: mask(window) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        """Return an additive mask for eager attention, which would silently add a bool mask to the scores."""
        if self._own != EAGER:
            return allowed
        forbidden = torch.finfo(self._dtype).min  # of float64, it is more than float32 holds
        return torch.zeros_like(allowed, dtype=self._dtype).masked_fill_(~allowed, forbidden)


class StepMasks(MaskBuilder):
    """Builder of the `attention_mask` argument of a step's forward; it chooses the kernel by the form of the mask.

    | kernel | mask |
    |---|---|
    | sdpa, for a prefill that needs no mask | empty `(1, 1, 0, 0)` |
    | sdpa, for one slot that needs no mask | empty `(1, 1, 1, 0)` |
    | sdpa | additive `(B, 1, groups * Q, K)`; bool `(B, 1, Q, K)` for wide forwards |
    | FlexAttention | a `BlockMask` |
    | flash-attn | int32 `(B, 1, 1, 1)`, the number of filled columns |

    Which masks a model needs is learnt from a first forward, in which its own code asks for them (`probe`, `learn`).

    Args:
        model: the model.
        device: where the model takes its masks.

    Attributes:
        is_learnt: whether the windows are those that the model asked for. Before, they are what its config says.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model.config, model.dtype)
        config = model.config.get_text_config(decoder=True)
        self._device = device
        self._groups = 1
        self._usable = set[str]()
        self._has_kernels = self._own in (SDPA, FLEX, FLASH)
        is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        self._may_use_kernels = self._has_kernels and not is_spread and not field_of(config, "attention_dropout")
        self._takes_several = getattr(config, "layer_types", None) is not None
        self._whole = torch.empty(1, 1, 1, 0, device=device)
        self._takes_whole = False
        self.is_learnt = False

    def probe(self, layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor) -> AttentionProbe:
        """Return a probe that gives a model the masks for the slots of a layout as the model asks for them."""
        return AttentionProbe(lambda window: self._of_layer(SDPA, layout, lengths_B, key_column_K, window))

    def learn(self, probe: AttentionProbe) -> str | None:
        """Take over what a forward has shown; return why the model cannot decode with masks of ours, or None."""
        windows = {FULL if window is None else SLIDING: window for window in probe.windows}
        if probe.problem:
            return probe.problem
        if not windows:
            return "attention whose mask is not the one that transformers' mask functions return"
        if self._has_kernels and not probe.groups:
            return "attention that does not go through transformers' attention functions"
        if len(windows) < len(probe.windows) or (len(windows) > 1 and not self._takes_several):
            return "masks of several kinds, which the types of the layers do not name"
        self.windows = windows
        self._groups = next(iter(probe.groups)) if len(probe.groups) == 1 and probe.takes_groups else 1
        self._takes_whole = self._has_kernels and probe.takes_groups
        if self._may_use_kernels and probe.takes_groups and len(probe.head_dims) == 1:
            self._usable = usable_kernels(self._own, self._device, self._dtype, next(iter(probe.head_dims)))
        self.is_learnt = True
        return None

    def needs_none(self, layout: Layout, past: int | None) -> bool:
        """Return whether the slots of a layout attend to every column: a single slot after rows of equal length.

        Args:
            layout: the slots.
            past: cached tokens of every row, if the host knows that all have as many.
        """
        if past is None or layout.slots > 1 or not self._takes_whole or self._kernel(layout) != SDPA:
            return False
        return all(window is None or window > past for window in self.windows.values())

    def of_single(self) -> Any:
        """Return the argument for a forward over a single slot that attends to every column."""
        return self._by_kind(lambda _: self._whole)

    def of_step(self, layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor) -> Any:
        """Return the argument for a forward over the slots of a layout.

        Args:
            layout: the slots.
            lengths_B: cached tokens of each row.
            key_column_K: 0, 1, 2, .., the key columns that the forward reads.
        """
        kernel = self._kernel(layout) if lengths_B.device == self._device else SDPA
        return self._by_kind(lambda window: self._of_layer(kernel, layout, lengths_B, key_column_K, window))

    def is_causal(self, slots: int) -> bool:
        """Return whether a chain of `slots` slots without a past needs no mask, because every layer is causal."""
        return all(self._sees_all(slots, window) for window in self.windows.values())

    def _sees_all(self, slots: int, window: int | None) -> bool:
        return self._has_kernels and (window is None or window >= slots)

    def _kernel(self, layout: Layout) -> str:
        """Return the kernel for a forward over a layout.

        flash-attn takes a chain only, and cannot be compiled. FlexAttention is fast only when it is compiled. So a
        model that was loaded with sdpa gets FlexAttention in compiled steps alone: a call that did not ask for a
        compiler does not wait for one.
        """
        compiling = torch.compiler.is_dynamo_compiling()
        if FLASH in self._usable and layout.is_chain and not compiling:
            return FLASH
        return FLEX if FLEX in self._usable and (compiling or self._own == FLEX) else SDPA

    def _of_layer(
        self, kernel: str, layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor, window: int | None
    ) -> Any:
        if kernel == FLASH:
            return (lengths_B + layout.slots).int()[:, None, None, None]
        if layout.without_past and self._sees_all(layout.slots, window):
            return torch.empty(1, 1, 0, 0, device=self._device)
        if kernel == FLEX:
            return block_mask(layout, lengths_B, key_column_K, window)
        # Without groups the mask has the form of an ordinary one, and FlexAttention takes none that is additive.
        grouped = self._has_kernels and layout.slots <= GROUPED_SLOTS and (self._groups > 1 or self._own != FLEX)
        if grouped and window is None and not torch.compiler.is_compiling():  # compiled, a dense mask is one kernel
            table = mask_table(layout, self._groups, self._dtype)
            return mask_from_table(table, lengths_B, key_column_K).to(self._device)
        allowed = attention_mask(layout, lengths_B, key_column_K, window)
        if grouped:
            return grouped_mask(allowed, self._groups, self._dtype).to(self._device)
        return self._additive(allowed).to(self._device)
