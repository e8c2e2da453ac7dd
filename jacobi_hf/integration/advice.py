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
    """Wrap the stage of `GenerationMixin.generate` that sees the arguments, for classes that are not registered."""
    prepare = mixin._prepare_generation_config
    if getattr(prepare, "is_advice", False):
        return

    @functools.wraps(prepare)
    def advising(self: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        from jacobi_hf.integration.compat import parameters_of  # here, because its import may be what brought us here

        is_registered = any("_default_decoding" in vars(one) for one in type(self).__mro__)
        if not is_registered and not set(KNOBS) & parameters_of(self.forward):
            _check(self, generation_config, kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in KNOBS}
        return prepare(self, generation_config, *args, **kwargs)

    advising.is_advice = True  # type: ignore[attr-defined]
    mixin._prepare_generation_config = advising


def _check(model: Any, generation_config: Any, arguments: dict[str, Any]) -> None:
    """Refuse a call that names a decoding, and warn once for each class of a saved one.

    Raises:
        ValueError: the call has a knob among its arguments, or a generation config with a decoding.
    """
    saved = getattr(model.generation_config, "decoding", None)
    in_config = getattr(generation_config, "decoding", None)
    given = [(name, arguments[name]) for name in KNOBS if arguments.get(name) is not None]
    if in_config not in (None, saved):
        given.append(("decoding", in_config))
    if given:
        name, value = given[0]
        raise ValueError(f"{name}={value!r} does not work here: {advice(model)}")
    if saved is not None and "decoding" not in arguments and type(model) not in _warned:
        _warned.add(type(model))
        warnings.warn(
            f"The generation config has decoding={saved!r}, but this model decodes ordinarily: {advice(model)}",
            UserWarning,
            stacklevel=3,
        )


def advice(model: Any) -> str:
    """Return what to do so that a model does Jacobi decoding, or why it cannot."""
    from jacobi_hf.integration.registry import check_can_decode
    from jacobi_hf.integration.support import reason_of_model

    name = type(model).__name__
    try:
        check_can_decode(type(model))
    except TypeError as error:
        return str(error)
    if reason := reason_of_model(model):
        return f"{name} has what Jacobi decoding does not support: {reason}."
    return f"{name} is not registered. Call jacobi_hf.register(type(model)) first."
