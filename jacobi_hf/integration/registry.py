"""Which model classes have the `decoding` argument of `generate`."""

from __future__ import annotations

import warnings

from transformers import GenerationMixin, PreTrainedModel

from jacobi_hf.integration.compat import CACHE, parameters_of
from jacobi_hf.integration.defaults import ALWAYS
from jacobi_hf.integration.mixin import JacobiGenerationMixin
from jacobi_hf.integration.on_load import register_no_more, register_when_loaded
from jacobi_hf.integration.releases import is_tested

_registered: list[type] = []


def check_can_decode(model_class: type) -> None:
    """Refuse a class whose models Jacobi decoding cannot serve.

    Raises:
        TypeError: the class is not a causal language model of transformers whose forward takes what a step needs.
    """
    name = model_class.__name__
    forward = getattr(model_class, "forward", None)
    if not issubclass(model_class, GenerationMixin) or not issubclass(model_class, PreTrainedModel) or forward is None:
        raise TypeError(
            f"{name} is not a transformers model that generates: "
            "it needs PreTrainedModel and GenerationMixin as bases."
        )
    missing = {CACHE, "position_ids", "logits_to_keep"} - parameters_of(forward)
    if missing:
        raise TypeError(f"{name}.forward does not take {', '.join(sorted(missing))}, which Jacobi decoding passes.")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise TypeError(
            f"{name} does not use transformers' attention interface, through which the mask of a step is passed."
        )


def register(model_class: type) -> type:
    """Give a decoder-only class with full or sliding attention the `decoding` argument, and return the class.

    Subclasses have it too, also those made before. Registering a class twice changes nothing. The function can be used
    as a decorator, and `unregister` takes the argument away. A class must take its mask and positions as arguments; a
    class that builds a bias of its own (ALiBi, GPT-Neo) is refused where this can be seen.

    Raises:
        TypeError: the class is not a causal language model of transformers whose forward takes what a step needs.
    """
    if JacobiGenerationMixin in model_class.__mro__:
        return model_class
    check_can_decode(model_class)
    for subclass in [known for known in _registered if issubclass(known, model_class)]:
        unregister(subclass)  # from now on it inherits
    model_class.__bases__ = (JacobiGenerationMixin, *model_class.__bases__)
    _registered.append(model_class)
    return model_class


def unregister(model_class: type | None = None) -> None:
    """Take the `decoding` argument away from a class, or from all registered ones and those that are loaded later.

    Other classes are left alone.
    """
    if model_class is None:
        register_no_more()
    for known in [other for other in _registered if model_class in (None, other)]:
        known.__bases__ = tuple(base for base in known.__bases__ if base is not JacobiGenerationMixin)
        _registered.remove(known)


def registered() -> list[type]:
    """Return the registered classes whose modules are loaded; their subclasses decode too."""
    return list(_registered)


def register_defaults() -> None:
    """Register the classes that importing jacobi_hf registers, after `unregister`."""
    register_when_loaded()


def register_default(model_class: type) -> None:
    """Register a class that nobody asked for.

    A class may lack what it needs in an older release of transformers; then it is left out. In a release that is newer
    than the tests, a warning says so, so that the class can be used without this package.
    """
    try:
        register(model_class)
    except TypeError as error:
        name = model_class.__name__
        if not is_tested():
            warnings.warn(f"{name} is not registered: {error}", UserWarning, stacklevel=2)
        elif name in ALWAYS:
            raise
