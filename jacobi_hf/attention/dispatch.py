"""The functions in transformers' registries through which the masks and the attention of a step pass.

Importing this module puts a function of ours in front of the attention functions and of the mask functions that
transformers has registered. They stay there, so that nothing of a model or its config is changed for a call. An
attention function of ours recognises the masks of a step by their form (`StepMasks`) and runs the kernel for them. Any
other call goes to the function of transformers, with the same arguments.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jacobi_hf.attention.kernels import flash, flex, grouped_sdpa
from jacobi_hf.attention.masks import is_step_block_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SDPA = "sdpa"
FLEX = "flex_attention"
FLASH = "flash_attention_2"
EAGER = "eager"
# Arguments of transformers' attention functions that change the result, and that our kernels do not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")

# How far a mask without a size of its own is looked at.
_FAR = 1 << 14


class AttentionProbe:
    """What one forward of a model does with attention: the masks that its code asks for, and the shapes that arrive.

    A model asks transformers for a mask of each kind that its layers use. So the kinds are known without a look into
    its config, of which modelling code may read some fields and ignore others.

    Args:
        answer: function of a sliding window, or of None, that returns the mask which the model gets.

    Attributes:
        windows: the sliding windows that were asked for, None for full attention, each once.
        groups: the numbers of query heads for each key/value head that arrived.
        head_dims: the sizes of the heads that arrived, of queries and of values.
        takes_groups: whether every layer may run `grouped_sdpa`.
        problem: why the model cannot decode with masks of ours, or None.
    """

    def __init__(self, answer: Callable[[int | None], Any]) -> None:
        self._answer = answer
        self._given: list[Any] = []
        self.windows: list[int | None] = []
        self.groups: set[int] = set()
        self.head_dims: set[int] = set()
        self.takes_groups = True
        self.problem: str | None = None

    def ask(self, mask_function: Any, local_size: int | None) -> Any:
        """Return the mask that the model asks for, and note its kind."""
        try:
            window = window_of(mask_function, local_size)
        except ValueError as error:
            self.problem = str(error)
            window = None
        if window not in self.windows:
            self.windows.append(window)
        mask = self._answer(window)
        self._given.append(mask)
        return mask

    def arrive(
        self, own: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, more: Any
    ) -> None:
        """Note what arrives at an attention function.

        Args:
            own: name of the attention implementation.
            module: the attention module.
            query: `(B, heads, Q, head_dim)`.
            key: `(B, key/value heads, K, head_dim)`.
            value: `(B, key/value heads, K, head_dim)`.
            mask: the mask.
            more: further arguments of the function by their name.
        """
        self.groups.add(query.shape[1] // key.shape[1])
        self.head_dims |= {query.shape[-1], value.shape[-1]}
        if key.shape[1] * getattr(module, "num_key_value_groups", 1) not in (query.shape[1], key.shape[1]):
            self.problem = "attention whose keys transformers would repeat once more under a mask"
        unknown = [name for name in _UNKNOWN if more.get(name) is not None]
        if unknown:
            self.takes_groups = False
            if own != SDPA:
                self.problem = f"attention with {unknown[0]} in attn_implementation={own!r}"
        if not any(_are_same(mask, given) for given in self._given):
            self.problem = "attention whose mask is not the one that transformers' mask functions return"

    def without_masks(self) -> AttentionProbe:
        """Return the probe after dropping its masks, to be kept with the model."""
        self._given.clear()
        self._answer = lambda _: None
        return self


def _are_same(mask: Any, given: Any) -> bool:
    """Return whether two masks are the same object, or views of the same numbers."""
    if mask is given or not (isinstance(mask, torch.Tensor) and isinstance(given, torch.Tensor)):
        return mask is given
    return mask.shape == given.shape and mask.dtype == given.dtype and mask.data_ptr() == given.data_ptr()


@contextlib.contextmanager
def probing(probe: AttentionProbe) -> Iterator[None]:
    """Let a probe answer and note what the forwards of this thread do while the context is open."""
    _of_thread.probe = probe
    try:
        yield
    finally:
        _of_thread.probe = None


def window_of(mask_function: Any, local_size: int | None) -> int | None:
    """Return the sliding window of a mask function of transformers; None for plain causality.

    Args:
        mask_function: function of indices of row, head, query and key, as transformers composes it.
        local_size: the size that came with it.

    Raises:
        ValueError: the function is neither.
    """
    if mask_function is causal_mask_function:
        return None
    size = _FAR if local_size is None else local_size
    query = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size + 1, 3 * size + 1])[:, None]
    key = torch.arange(3 * size + 3)[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        allowed = mask_function(zero, zero, query, key).broadcast_to(len(query), key.shape[1])
    except (RuntimeError, IndexError, TypeError, AttributeError):
        allowed = torch.empty(0)  # it reads tensors of its own, e.g. the blocks of images
    causal = key <= query
    if torch.equal(allowed, causal):
        return None
    if local_size is not None and torch.equal(allowed, causal & (key > query - size)):
        return size
    raise ValueError("layers whose mask is neither causal nor a sliding window")


def is_of_step(own: str, query: torch.Tensor, key: torch.Tensor, mask: Any) -> bool:
    """Return whether a mask has a form that only `StepMasks` makes, so that it is not for transformers' function."""
    if isinstance(mask, BlockMask):
        # Of a model that runs FlexAttention anyway, any mask may be one. Compiled, both functions are the same.
        return own != FLEX or (not torch.compiler.is_compiling() and is_step_block_mask(mask))
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    is_grouped = mask.shape[2] != query.shape[2] and mask.shape[2] * key.shape[1] == query.shape[2] * query.shape[1]
    is_unread = mask.dtype == torch.int32 or not mask.shape[3]
    return is_grouped or is_unread or own == FLASH or (own == FLEX and mask.dtype == torch.bool)


def step_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with a mask for which `is_of_step` is true.

    Args:
        module: the attention module.
        query: `(B, heads, Q, head_dim)`.
        key: `(B, key/value heads, K, head_dim)`.
        value: `(B, key/value heads, K, head_dim)`.
        attention_mask: the mask.
        dropout: probability, as transformers passes it.
        scaling: factor of the scores; None for the default.
        kwargs: further arguments of transformers' attention functions.

    Returns:
        the output, `(B, Q, heads, head_dim)`, and None instead of weights.
    """
    mask = attention_mask
    slots = query.shape[2]
    if isinstance(mask, BlockMask):
        return flex(query, key, value, mask, scaling), None
    if mask.dtype == torch.int32:
        return flash(query, key, value, mask.flatten(), kwargs.get("sliding_window"), scaling), None
    if not mask.shape[3] and mask.shape[2]:  # one slot, which attends to every column
        return grouped_sdpa(query, key, value, None, scaling, dropout), None
    if not mask.shape[3]:  # plain causality, for which sdpa needs no mask; without a mask it does not repeat keys
        mask = None
        key = key[:, :, :slots]
        value = value[:, :, :slots]
        kwargs["is_causal"] = True
    elif mask.shape[2] != slots:
        return grouped_sdpa(query, key, value, mask, scaling, dropout), None
    output: tuple[torch.Tensor, torch.Tensor | None] = _functions[SDPA](
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


class _InFrontOf:
    """A function of ours in front of one of transformers'; its pickle holds the function of transformers alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]
        self._function = function
        self.forms = _FORMS
        self.of_thread = _of_thread

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        return copy.copy, (self._function,)  # a copy of a function is the function


class _Attention(_InFrontOf):
    """Attention that runs our kernels for masks of a step.

    Args:
        function: the attention function of transformers, or of a library that replaced it.
        own: the name of the implementation.
    """

    def __init__(self, function: Callable[..., Any], own: str) -> None:
        super().__init__(function)
        self._own = own

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        probe = None if torch.compiler.is_compiling() else getattr(_of_thread, "probe", None)
        if probe is not None:
            probe.arrive(self._own, module, query, key, value, attention_mask, kwargs)
        if is_of_step(self._own, query, key, attention_mask):
            return step_attention(module, query, key, value, attention_mask, *args, **kwargs)
        return self._function(module, query, key, value, attention_mask, *args, **kwargs)


class _Mask(_InFrontOf):
    """Mask function that hands a model's request to the probe of the thread, if there is one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        probe = None if torch.compiler.is_compiling() else getattr(_of_thread, "probe", None)
        if probe is None:
            return self._function(*args, **kwargs)
        return probe.ask(kwargs.get("mask_function"), kwargs.get("local_size"))


# The forms of masks that this code knows. A copy of it, in a repository's custom_generate, may find functions of the
# package in the registries; if these know the same forms, the copy uses them.
_FORMS = 1
_functions: dict[str, Callable[..., Any]] = {}  # what the attention functions of ours stand in front of
_installing = threading.Lock()
_of_thread: threading.local = getattr(ALL_ATTENTION_FUNCTIONS[SDPA], "of_thread", None) or threading.local()


def install_dispatch() -> None:
    """Put our functions in front of those in transformers' registries, also of those that somebody has replaced."""
    with _installing:
        for registry, owns in (
            (ALL_ATTENTION_FUNCTIONS, (SDPA, FLEX, FLASH)),
            (ALL_MASK_ATTENTION_FUNCTIONS, (SDPA, FLEX, FLASH, EAGER)),
        ):
            for own in owns:
                function = registry[own]
                if getattr(function, "forms", None) == _FORMS:
                    continue
                is_attention = registry is ALL_ATTENTION_FUNCTIONS
                if is_attention:
                    _functions[own] = function
                in_front = _Attention(function, own) if is_attention else _Mask(function)
                if own in registry._local_mapping:
                    registry[own] = in_front
                else:
                    type(registry).register(own, in_front)


install_dispatch()
