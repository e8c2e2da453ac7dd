"""What a model decides by, told once in a call, and the guards of compiled steps that become superfluous by that."""

from __future__ import annotations

import re
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def switches_of(model: Any) -> tuple[Any, ...]:
    """What a model's modules decide by, so that steps under other switches are other steps."""
    attention = str(model.config.get_text_config(decoder=True)._attn_implementation)
    return attention, model.dtype, *(_switches(module) for module in model.modules())


def _switches(module: torch.nn.Module) -> tuple[Any, ...]:
    """The kinds of a module's weights, and its attributes, as far as `_told` tells them."""
    own = [(name, _told(value)) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    weights = [_kind_of(weight) for weight in (*module._parameters.values(), *module._buffers.values())]
    return type(module), module.training, repr(own), repr(weights)


def _told(value: Any, depth: int = 4) -> Any:
    """Numbers, strings and the like as they are, also in collections (the names of active adapters, their scales); which function it is,
    where one was put in a method's place; `UNTOLD` of anything else.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    if type(value) not in (dict, list, tuple, set, frozenset):
        return id(value) if isinstance(value, _FUNCTIONS) else UNTOLD
    if not depth:
        return UNTOLD
    parts = [_told(part, depth - 1) for part in (value.items() if isinstance(value, dict) else value)]
    return UNTOLD if any(part is UNTOLD for part in parts) else (type(value), parts)


def _kind_of(weight: torch.Tensor | None) -> Any:
    if weight is None:
        return None
    strides = weight.stride() if weight.layout == torch.strided else None
    return type(weight), weight.dtype, tuple(weight.shape), weight.layout, strides, weight.device, weight.requires_grad


UNTOLD = ...
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_PLAIN = (bool, int, float, str, Enum, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial)


def with_fewer_guards(backend: Any, mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `torch.compile` that ask for the same, and where it takes a filter of guards for `checked_in_every_step`."""
    takes_filter = hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe")  # came with the option
    if not takes_filter or (mode is not None and (backend != "inductor" or options is not None)):
        return {"backend": backend, "mode": mode, "options": options}
    # A filter is an option, and of mode and options only one can be given; but a mode is a name for some options.
    of_mode = torch._inductor.list_mode_options(mode) if mode is not None else {}
    return {"backend": backend, "options": {"guard_filter_fn": checked_in_every_step, **of_mode, **(options or {})}}


def checked_in_every_step(guards: Sequence[Any]) -> Sequence[bool]:
    """Which guards of a compiled step stay: all but those on modules and weights that `switches_of` tells apart once in a call.

    To check those too before every step takes a small model longer than all that a step does behind its forward.
    """
    return [not (guard.guard_type in _OF_SWITCHES and _is_switch(guard)) for guard in guards]


def _is_switch(guard: Any) -> bool:
    if _MODULE_OR_WEIGHT.fullmatch(guard.name):
        return True
    return bool(_ATTRIBUTE.fullmatch(guard.name)) and guard.has_value and _told(guard.value) is not UNTOLD


_OF_SWITCHES = {"TYPE_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH", "NOT_PRESENT_IN_GENERIC_DICT", "TENSOR_MATCH"}
_MODULE = r"(L\['forward'\]|forward)\._model(\._modules\['\w+'\])*"
_MODULE_OR_WEIGHT = re.compile(_MODULE + r"(\._modules|\._(parameters|buffers)(\['\w+'\])?)?")
_ATTRIBUTE = re.compile(_MODULE + r"\.(?!config\b|_\w*hooks\b)\w+")
