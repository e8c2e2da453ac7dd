"""The attention implementations that models run during Jacobi decoding, and the masks that these take.

A call with Jacobi decoding switches a model from `sdpa`, `flex_attention` or `flash_attention_2` to an implementation
of this module, whose name has `jacobi_` in front. The type of a mask says which kernel is to run (`StepMasks`). Any
other mask goes to transformers' own function. So for other forwards of the same model, nothing changes.
"""

from __future__ import annotations

import copy
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jacobi_hf.attention.kernels import flash, flash_attn_with_kvcache, flex, grouped_mask, grouped_sdpa, has_flex
from jacobi_hf.attention.masks import attention_mask, block_mask, mask_from_table, mask_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from jacobi_hf.decoding.layout import Layout

LAYER_TYPES = {"full_attention", "sliding_attention"}
SDPA = "sdpa"
FLEX = "flex_attention"
FLASH = "flash_attention_2"
# A copy of this code in a repository's custom_generate must not take the package's names in transformers' registry.
_PREFIX = "jacobi_" if __name__ == "jacobi_hf.attention.interface" else f"jacobi_{zlib.crc32(__name__.encode()):08x}_"
OURS = {own: _PREFIX + own for own in (SDPA, FLEX, FLASH)}
# Implementations that take any bool mask.
TAKES_MASK = (SDPA, "eager", OURS[SDPA])
# Forwards with more slots are prefills. `grouped_sdpa` repeats the mask, which would cost them more than it saves.
GROUPED_SLOTS = 512
# Arguments of transformers' attention functions that change the result, and that our kernels do not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def attention_of(config: Any) -> str:
    """Return the name of the attention implementation that a model with this config runs."""
    return str(config._attn_implementation)


def own_attention_of(config: Any) -> str:
    """Return the name of the attention implementation that a model was loaded with, also while it runs one of ours."""
    return attention_of(config).removeprefix(_PREFIX)


def cannot_attend(config: Any) -> str | None:
    """Return why a model's attention implementation cannot take our masks, with advice; None if it can."""
    own = own_attention_of(config)
    if own == FLASH and flash_attn_with_kvcache() is None:
        problem = "for which the package flash-attn is not installed"
    elif own not in (*OURS, "eager"):
        problem = "which takes no mask of our own"
    else:
        return None
    advice = "load the model with attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')"
    return f"attn_implementation={own!r}, {problem}: {advice}"


def groups_of(config: Any) -> int:
    """Return the number of query heads for each key/value head; 1 if a config has no such groups."""
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    return heads // shared if heads and shared and heads % shared == 0 else 1


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


def step_attention(
    own: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention: the function of the implementation `OURS[own]`.

    Args:
        own: name of the implementation that takes over for masks that are not ours.
        module: the attention module.
        query: `(B, heads, Q, head_dim)`.
        key: `(B, key/value heads, K, head_dim)`.
        value: `(B, key/value heads, K, head_dim)`.
        attention_mask: a mask of `StepMasks`, or any mask that `own` takes.
        dropout: probability, as transformers passes it.
        scaling: factor of the scores; None for the default.
        kwargs: further arguments of transformers' attention functions.

    Returns:
        the output, `(B, Q, heads, head_dim)`, and None instead of weights.

    Raises:
        ValueError: an argument changes the result in a way that our kernels do not support.
    """
    mask = attention_mask
    slots = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    is_dense = isinstance(mask, torch.Tensor) and mask.dim() == 4
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown and is_dense and own != SDPA:
        raise ValueError(
            f"Jacobi decoding does not support attention with {unknown[0]}: load the model with "
            "attn_implementation='eager'."
        )
    if isinstance(mask, BlockMask) and not unknown:
        return flex(query, key, value, mask, scaling), None
    if is_dense and mask.dtype == torch.int32:
        return flash(query, key, value, mask.flatten(), kwargs.get("sliding_window"), scaling), None
    if is_dense and groups > 1 and mask.shape[2] == groups * slots and not unknown:
        return grouped_sdpa(query, key, value, mask, scaling, dropout), None
    if is_dense:
        own = SDPA
        if not mask.shape[3]:  # plain causality, for which sdpa needs no mask; without a mask it does not repeat keys
            mask = None
            key = key[:, :, :slots]
            value = value[:, :, :slots]
    if own == FLASH:  # transformers' function reads the name of the implementation in the config
        module = copy.copy(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = own
    output: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS[own](
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


for _own, _ours in OURS.items():
    AttentionInterface.register(_ours, partial(step_attention, _own))
    AttentionMaskInterface.register(_ours, ALL_MASK_ATTENTION_FUNCTIONS[_own])


class MaskBuilder:
    """Builder of the `attention_mask` argument of a model's forward, from one bool mask for each kind of layer.

    Args:
        config: the model's config.
        dtype: of the model.

    Attributes:
        windows: sliding window of each kind of layer; None for full attention.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        text_config = config.get_text_config(decoder=True)
        self._dtype = dtype
        self._own = own_attention_of(text_config)
        self.windows = {
            kind: text_config.sliding_window if kind == "sliding_attention" else None
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
        if self._own != "eager":
            return allowed
        forbidden = torch.finfo(self._dtype).min  # of float64, it is more than float32 holds
        return torch.zeros_like(allowed, dtype=self._dtype).masked_fill_(~allowed, forbidden)


class StepMasks(MaskBuilder):
    """Builder of the `attention_mask` argument of a step's forward; it chooses the kernel by the type of the mask.

    | kernel | mask |
    |---|---|
    | sdpa, for a prefill that needs no mask | empty `(1, 1, 0, 0)` |
    | sdpa | additive `(B, 1, groups * Q, K)`; bool `(B, 1, Q, K)` for wide forwards |
    | FlexAttention | a `BlockMask` |
    | flash-attn | int32 `(B, 1, 1, 1)`, the number of filled columns |

    Args:
        model: a model that runs one of our implementations gets masks for our kernels. Another model gets plain masks.
        device: where the model takes its masks.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model.config, model.dtype)
        config = model.config.get_text_config(decoder=True)
        self._device = device
        self._groups = groups_of(config)
        self._usable = set[str]()
        is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        self._is_ours = attention_of(config) in OURS.values()
        if self._is_ours and not is_spread and not getattr(config, "attention_dropout", 0):
            heads = getattr(config, "num_attention_heads", None)
            head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
            self._usable = usable_kernels(self._own, device, model.dtype, head_dim)

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
        return self._is_ours and (window is None or window >= slots)

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
        grouped = self._is_ours and layout.slots <= GROUPED_SLOTS
        if grouped and window is None and not torch.compiler.is_compiling():  # compiled, a dense mask is one kernel
            table = mask_table(layout, self._groups, self._dtype)
            return mask_from_table(table, lengths_B, key_column_K).to(self._device)
        allowed = attention_mask(layout, lengths_B, key_column_K, window)
        if grouped:
            return grouped_mask(allowed, self._groups, self._dtype).to(self._device)
        return self._additive(allowed).to(self._device)
