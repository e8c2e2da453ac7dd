"""A `generate` that decodes with Jacobi by default, for models whose class nobody has registered.

It is what `custom_generate/generate.py` of a Hub repository holds: `jacobi_hf.hub_cards` builds that file from this
module and those that it imports. A model has another class while such a call runs, and only then: its own class, other
models, and its next plain `generate` are unchanged.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from jacobi_hf._version import __version__
from jacobi_hf.config import MULTIBLOCK
from jacobi_hf.drafts.loading import using_source
from jacobi_hf.integration.mixin import JacobiGenerationMixin
from jacobi_hf.integration.registry import check_can_decode
from jacobi_hf.integration.releases import check_release
from jacobi_hf.shared_change import SharedChange

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

# With these arguments transformers finds the repository. It also passes them to the repository's function.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
    "revision",
    "subfolder",
    "token",
)


class JacobiByDefault(JacobiGenerationMixin):
    """Base of model classes whose `generate` decodes with Jacobi unless a call says otherwise."""

    _default_decoding = MULTIBLOCK


def generate_by_default(*args: Any, model: Any, **kwargs: Any) -> Any:
    """Return `model.generate(*args, **kwargs)`, decoded with Jacobi.

    The knobs come from the call, else from the model's generation config, else they have their defaults.
    `decoding=None` decodes in the ordinary way. A call that Jacobi decoding does not support is decoded in the
    ordinary way with a warning, unless it names a `decoding`.

    Raises:
        TypeError: Jacobi decoding does not support the model.
        ValueError: a knob is wrong, or a `decoding` in the call contradicts another argument.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
    if kwargs.get("custom_generate") is not None:  # another decoding method, which knows what to do
        return type(model).generate(model, *args, **kwargs)
    with _jacobi_by_default(model):
        return type(model).generate(model, *args, **kwargs)


def generate_with_drafter(*args: Any, model: Any, **kwargs: Any) -> Any:
    """Return what `generate_by_default` returns, with the drafter of the repository or folder that the call names.

    The first call loads the drafter into the model, where it stays.

    Raises:
        DrafterError: there is no drafter, or it was made for another model.
        TypeError, ValueError: as `generate_by_default`.
    """
    check_can_decode(type(model))
    with using_source(model, _repository_of_the_call(), revision=kwargs.get("revision"), token=kwargs.get("token")):
        return generate_by_default(*args, model=model, **kwargs)


def entry(kind: Literal["model", "drafter"]) -> Callable[..., Any]:
    """Return the function of a repository: from the installed jacobi_hf, else from this copy of it.

    Raises:
        ImportError: this copy is used, and transformers is too old for it.
    """
    function: Callable[..., Any] = generate_with_drafter if kind == "drafter" else generate_by_default
    found = importlib.util.find_spec("jacobi_hf")
    if found is None or found.origin is None:  # a folder of that name is no package
        check_release()
        return function
    installed = importlib.import_module("jacobi_hf.integration.custom_generate")
    if installed.__version__ != __version__:
        warnings.warn(
            f"jacobi_hf {installed.__version__} is installed and decodes; "
            f"the repository's own copy is version {__version__}.",
            UserWarning,
            stacklevel=2,
        )
    theirs: Callable[..., Any] = getattr(installed, function.__name__)
    return theirs


def _repository_of_the_call() -> str:
    """Return the repository or folder that `model.generate(custom_generate=...)` names.

    Transformers does not pass the name on, so it is read from the frame of the call.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        name = frame.f_locals.get("custom_generate")
        if isinstance(name, str):
            return name
        frame = frame.f_back
    raise TypeError(
        "a drafter's repository is used by "
        "model.generate(..., custom_generate='user/repository', trust_remote_code=True)."
    )


_classes_in_calls = SharedChange()


def _jacobi_by_default(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the model's class has `JacobiByDefault` among its bases."""

    def switch() -> Callable[[], None]:
        own: type = type(model)
        model.__class__ = _with_jacobi(own)
        return lambda: setattr(model, "__class__", own)

    return _classes_in_calls.made(model, switch)


@cache
def _with_jacobi(model_class: type) -> type:
    """Return a class like the given one whose `generate` decodes with Jacobi by default."""
    check_can_decode(model_class)
    # `save_pretrained` writes the name of the class, should it be called meanwhile.
    names = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (JacobiByDefault, model_class), names)
