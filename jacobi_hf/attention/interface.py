"""Which attention a model runs while it decodes in steps, and the masks that it takes.

A call of ours switches a model from `sdpa`, `flex_attention` or `flash_attention_2` to our implementation of the same name with `jacobi_`
in front. Its masks say which kernel is meant (`StepMasks`); whatever else it is given goes to transformers' own function, so that to
everybody else's forwards it is the implementation that the model was loaded with.
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
SDPA, FLEX, FLASH = "sdpa", "flex_attention", "flash_attention_2"
# The names are transformers' own registry's: a copy of this code (a repository's custom_generate) must not take the package's.
_PREFIX = "jacobi_" if __name__ == "jacobi_hf.attention.interface" else f"jacobi_{zlib.crc32(__name__.encode()):08x}_"
OURS = {own: _PREFIX + own for own in (SDPA, FLEX, FLASH)}
# Implementations that take a bool mask of any shape.
TAKES_MASK = (SDPA, "eager", OURS[SDPA])
# Wider forwards are prefills: there the mask, once per query head of a group, would be larger than what it saves.
GROUPED_SLOTS = 512
# Arguments of transformers' attention functions that change the result and that ours do not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def attention_of(config: Any) -> str:
    """The attention implementation that a model with this config runs."""
    return str(config._attn_implementation)


def own_attention_of(config: Any) -> str:
    """The attention implementation that a model with this config was loaded with, also while it runs one of ours."""
    return attention_of(config).removeprefix(_PREFIX)


def cannot_attend(config: Any) -> str | None:
    """What about a model's attention implementation keeps it from taking our masks, with advice."""
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
    """Query heads for each key/value head; 1 where a config declares no such groups."""
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    return heads // shared if heads and shared and heads % shared == 0 else 1


def layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer."""
    declared = getattr(config, "layer_types", None)
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(declared) if declared else [kind] * config.num_hidden_layers


def usable_kernels(own: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> set[str]:
    """Which of `FLEX` and `FLASH` a model of this kind can run in steps; sdpa it always can."""
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
    """The attention function of `OURS[own]`.

    Args:
        query: `(B, heads, Q, head_dim)`; key, value: `(B, key/value heads, K, head_dim)`.
        attention_mask: one of `StepMasks`, or anything that the implementation `own` takes.

    Returns:
        `(B, Q, heads, head_dim)`, and no weights.
    """
    mask, groups, slots = attention_mask, query.shape[1] // key.shape[1], query.shape[2]
    is_dense = isinstance(mask, torch.Tensor) and mask.dim() == 4
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown and is_dense and own != SDPA:
        raise ValueError(
            f"Jacobi decoding knows no attention with {unknown[0]}: load the model with attn_implementation='eager'."
        )
    if isinstance(mask, BlockMask) and not unknown:
        return flex(query, key, value, mask, scaling), None
    if is_dense and mask.dtype == torch.int32:
        return flash(query, key, value, mask.flatten(), kwargs.get("sliding_window"), scaling), None
    if is_dense and groups > 1 and mask.shape[2] == groups * slots and not unknown:
        return grouped_sdpa(query, key, value, mask, scaling, dropout), None
    if is_dense:
        own = SDPA
        if not mask.shape[3]:  # plain causality: sdpa needs no mask for that, and without one it repeats no keys
            mask, key, value = None, key[:, :, :slots], value[:, :, :slots]
    if own == FLASH:  # transformers looks it up by the name in the config
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
    """Builds the `attention_mask` argument of a model's forward from bool masks, one per kind of layer.

    Args:
        config: the model's config.
        dtype: of the model.

    Attributes:
        windows: the sliding window of each kind of layer, None for full attention.
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
        """The argument for one forward.

        Args:
            mask: gives the bool mask `(B, 1, Q, K)`, True where attention is allowed, for a sliding window or None.
            device: where the model takes it.
        """
        return self._by_kind(lambda window: self._additive(mask(window)).to(device))

    def _by_kind(self, mask: Callable[[int | None], Any]) -> Any:
        masks = {kind: mask(window) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        """For eager attention, which adds a bool mask to the scores, silently."""
        if self._own != "eager":
            return allowed
        return torch.where(allowed, 0.0, torch.finfo(self._dtype).min).to(self._dtype)


class StepMasks(MaskBuilder):
    """The `attention_mask` argument of a step's forward: for each kind of layer what the kernel wants that is to run.

    | kernel | mask |
    |---|---|
    | sdpa of a prefill that needs none | an empty tensor, `(1, 1, 0, 0)` |
    | sdpa | additive `(B, 1, groups * Q, K)`; bool `(B, 1, Q, K)` for wide forwards |
    | FlexAttention | a `BlockMask` |
    | flash-attn | int32 `(B, 1, 1, 1)`, the columns that are filled |

    Args:
        model: it gets masks for our kernels where it runs one of our implementations, else plain ones.
        device: where it takes its masks.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model.config, model.dtype)
        config = model.config.get_text_config(decoder=True)
        self._device, self._groups, self._usable = device, groups_of(config), set[str]()
        is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        self._is_ours = attention_of(config) in OURS.values()
        if self._is_ours and not is_spread and not getattr(config, "attention_dropout", 0):
            heads = getattr(config, "num_attention_heads", None)
            head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
            self._usable = usable_kernels(self._own, device, model.dtype, head_dim)

    def of_step(self, layout: Layout, lengths_B: torch.Tensor, key_column_K: torch.Tensor) -> Any:
        """The argument for a forward over the layout's slots; see `masks.attention_mask` for the arguments."""
        kernel = self._kernel(layout) if lengths_B.device == self._device else SDPA
        return self._by_kind(lambda window: self._of_layer(kernel, layout, lengths_B, key_column_K, window))

    def is_causal(self, slots: int) -> bool:
        """Whether a chain of `slots` slots with nothing before it needs no mask in any layer, since plain causality is all there is."""
        return all(self._sees_all(slots, window) for window in self.windows.values())

    def _sees_all(self, slots: int, window: int | None) -> bool:
        return self._is_ours and (window is None or window >= slots)

    def _kernel(self, layout: Layout) -> str:
        """flash-attn knows no tree and cannot be compiled; FlexAttention is fast only where it is.

        So a model that was loaded with something else gets FlexAttention within compiled steps alone: a call that did not ask for a
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
        if (
            grouped and window is None and not torch.compiler.is_compiling()
        ):  # a compiler makes one kernel of the plain way
            return mask_from_table(mask_table(layout, self._groups, self._dtype), lengths_B, key_column_K).to(
                self._device
            )
        allowed = attention_mask(layout, lengths_B, key_column_K, window)
        if grouped:
            return grouped_mask(allowed, self._groups, self._dtype).to(self._device)
        return self._additive(allowed).to(self._device)
