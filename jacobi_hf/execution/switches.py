"""What a model decides by, told once in a call, and the guards of compiled steps that become superfluous by that."""

from __future__ import annotations

import re
import weakref
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Switches:
    """What a model's modules decide by at this moment, so that steps under other switches are other steps.

    Attributes:
        structure: which modules there are and where, of which classes, and the kinds of their weights.
        attributes: by name, and then by module, what the modules' attributes are, as far as `_told` tells it.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        places = {id(module): place for place, module in enumerate(modules)}
        attention = str(model.config.get_text_config(decoder=True)._attn_implementation)
        self.structure = attention, model.dtype, *(_structure(module, places) for module in modules)
        self.attributes: dict[str, dict[int, str]] = {}
        for place, module in enumerate(modules):
            for name, value in vars(module).items():
                if name not in _OF_EVERY_MODULE:
                    self.attributes.setdefault(name, {})[place] = repr(_told(value))

    def of(self, names: Iterable[str] | None = None) -> tuple[Any, ...]:
        """What a step depends on that looks at the attributes of these names; by default at any."""
        if names is None:
            return self.structure, self.attributes
        return self.structure, {
            name: self.attributes.get(name) for name in tuple(names)
        }  # to which another thread may add


def _structure(module: torch.nn.Module, places: dict[int, int]) -> tuple[Any, ...]:
    """A module's class, the children in its slots, by their places, and the kinds of its weights."""
    kind = type(module)
    children = tuple((name, None if child is None else places[id(child)]) for name, child in module._modules.items())
    weights = tuple(
        (name, _kind_of(weight)) for own in (module._parameters, module._buffers) for name, weight in own.items()
    )
    # Not by number, which the next class or function can have when this one is gone.
    return weakref.ref(kind), weakref.ref(kind.forward), children, weights


def _kind_of(weight: torch.Tensor | None) -> Any:
    if weight is None:
        return None
    strides = weight.stride() if weight.layout == torch.strided else None
    return type(weight), weight.dtype, tuple(weight.shape), weight.layout, strides, weight.device, weight.requires_grad


def _told(value: Any, depth: int = 4) -> Any:
    """Numbers, strings and the like as they are, also in collections (the names of active adapters, their scales); which function it is,
    where one was put in a method's place; `UNTOLD` of anything else.
    """
    if type(value) in _PLAIN or isinstance(value, Enum):
        return value
    if type(value) not in (dict, list, tuple, set, frozenset):
        return id(value) if isinstance(value, _FUNCTIONS) else UNTOLD
    if not depth:
        return UNTOLD
    parts = [_told(part, depth - 1) for part in (value.items() if isinstance(value, dict) else value)]
    return UNTOLD if any(part is UNTOLD for part in parts) else (type(value), parts)


UNTOLD = ...
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial)


class LeftOut:
    """Which guards of a compiled step stay: all but those on modules and weights that `Switches` tells apart once in a call.

    To check those too before every step takes a small model longer than all that a step does behind its forward.

    Attributes:
        names: of the attributes whose guards do not stay.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, guards: Sequence[Any]) -> list[bool]:
        """For each guard that a compiled function wants whether it stays."""
        return [not self._leaves_out(guard) for guard in guards]

    def _leaves_out(self, guard: Any) -> bool:
        if guard.guard_type not in _OF_SWITCHES:
            return False
        if (
            guard.guard_type == "NOT_PRESENT_IN_GENERIC_DICT"
        ):  # of a method, say, that could be replaced for one module
            name = getattr(guard.orig_guard.create_fn, "keywords", {}).get("attr")
            if name is None or not re.fullmatch(_MODULE, guard.name):
                return False
        elif _MODULE_OR_WEIGHT.fullmatch(guard.name):
            return True
        else:
            attribute = _ATTRIBUTE.fullmatch(guard.name)
            if attribute is None or not guard.has_value or _told(guard.value) is UNTOLD:
                return False
            name = attribute["name"]
        self.names.add(name)
        return True


_OF_SWITCHES = {"TYPE_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH", "NOT_PRESENT_IN_GENERIC_DICT", "TENSOR_MATCH"}
_MODULE = r"(L\['forward'\]|forward)\._model(\._modules\['\w+'\])*"
_MODULE_OR_WEIGHT = re.compile(_MODULE + r"(\._modules|\._(parameters|buffers)(\['\w+'\])?)?")
_ATTRIBUTE = re.compile(_MODULE + r"\.(?!config\b|_\w*hooks\b)(?P<name>\w+)")


def with_filter(backend: Any, mode: str | None, options: dict[str, Any] | None, left_out: LeftOut) -> dict[str, Any]:
    """Arguments of `torch.compile` that ask for the same, and for the guards that stay, where it takes such a filter."""
    takes_filter = hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe")  # came with the option
    if not takes_filter or (mode is not None and (backend != "inductor" or options is not None)):
        return {"backend": backend, "mode": mode, "options": options}
    # A filter is an option, and of mode and options only one can be given; but a mode is a name for some options.
    of_mode = torch._inductor.list_mode_options(mode) if mode is not None else {}
    return {"backend": backend, "options": {"guard_filter_fn": left_out, **of_mode, **(options or {})}}
