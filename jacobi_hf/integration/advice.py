"""What a call of a class says that is not registered, if it asks for a decoding.

Transformers refuses `decoding=` as an unused model argument, and ignores one in a generation config. This module is
imported when transformers has loaded `GenerationMixin`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from jacobi_hf.config import KNOBS

_warned: set[type] = set()


def give_advice(mixin: Any) -> None:
    """Wrap the check of arguments of `GenerationMixin`: unregistered classes say how they would be registered."""
    check = mixin._validate_model_kwargs
    if getattr(check, "is_advice", False):
        return

    @functools.wraps(check)
    def checked(self: Any, model_kwargs: dict[str, Any]) -> None:
        if any(hasattr(one, "_default_decoding") for one in type(self).__mro__):  # it is registered
            check(self, model_kwargs)
            return
        given = [name for name in KNOBS if model_kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]}={model_kwargs[given[0]]!r} does not work here: {advice(type(self))}")
        for name in KNOBS:
            model_kwargs.pop(name, None)
        saved = getattr(self.generation_config, "decoding", None)
        if saved is not None and type(self) not in _warned:
            _warned.add(type(self))
            warnings.warn(
                f"The generation config has decoding={saved!r}, but this model decodes ordinarily: "
                f"{advice(type(self))}",
                UserWarning,
                stacklevel=4,
            )
        check(self, model_kwargs)

    checked.is_advice = True  # type: ignore[attr-defined]
    mixin._validate_model_kwargs = checked


def advice(model_class: type) -> str:
    """Return what to do so that models of a class do Jacobi decoding, or why they cannot."""
    from jacobi_hf.integration.registry import check_can_decode

    try:
        check_can_decode(model_class)
    except TypeError as error:
        return str(error)
    return f"{model_class.__name__} is not registered. Call jacobi_hf.register(type(model)) first."
