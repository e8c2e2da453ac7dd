"""A `generate` that decodes with Jacobi unless told otherwise, for models whose class nobody has registered.

It is what the `custom_generate/generate.py` of a repository holds (`hub_cards/single_file.py` builds that file from this module and
those that it imports). A model is of another class while a call runs, and only then: its own class, other models, and its next plain
`generate` are as they were.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from jacobi_hf._version import __version__
from jacobi_hf.config import MULTIBLOCK
from jacobi_hf.drafts.loading import using_source
from jacobi_hf.integration.compat import check_release
from jacobi_hf.integration.mixin import JacobiGenerationMixin, check_can_decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Transformers hands these, with which it finds the repository, on to the repository's function.
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
    """The mixin where Jacobi decoding is what was asked for already."""

    _unless_told = MULTIBLOCK


def generate_by_default(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs)`, decoded with Jacobi.

    The knobs are those of the call, else those of the model's generation config, else the defaults; `decoding=None` decodes the ordinary
    way. What Jacobi decoding cannot serve is decoded the ordinary way with a warning, unless the call names a `decoding`.

    Raises:
        TypeError: the model is none that Jacobi decoding can serve.
        ValueError: a knob that is wrong, or a `decoding` in the call that contradicts the rest of it.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
    if kwargs.get("custom_generate") is not None:  # another way to decode, which knows itself what to do
        return type(model).generate(model, *args, **kwargs)
    with _decoding_by_default(model):
        return type(model).generate(model, *args, **kwargs)


def generate_with_drafter(*args: Any, model: Any, **kwargs: Any) -> Any:
    """`generate_by_default` with the drafter that lies in the repository or folder whose `custom_generate/generate.py` this is.

    The drafter is loaded into the model by the first call, and kept.

    Raises:
        DrafterError: there is no drafter, or it was made for another model.
        TypeError, ValueError: as `generate_by_default`.
    """
    check_can_decode(type(model))
    with using_source(model, _named_by_the_caller(), revision=kwargs.get("revision"), token=kwargs.get("token")):
        return generate_by_default(*args, model=model, **kwargs)


def entry(kind: Literal["model", "drafter"]) -> Callable[..., Any]:
    """Return the function of a repository: that of the jacobi_hf that is installed, else that of this copy of it.

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
            f"jacobi_hf {installed.__version__} is installed and decodes; the repository's own copy is version {__version__}.",
            UserWarning,
            stacklevel=2,
        )
    theirs: Callable[..., Any] = getattr(installed, function.__name__)
    return theirs


def _named_by_the_caller() -> str:
    """The repository or folder that this call of `model.generate(custom_generate=...)` names; transformers does not hand it on."""
    frame: Any = sys._getframe()
    while frame is not None:
        name = frame.f_locals.get("custom_generate")
        if isinstance(name, str):
            return name
        frame = frame.f_back
    raise TypeError(
        "a drafter's repository is used by model.generate(..., custom_generate='user/repository', trust_remote_code=True)."
    )


_in_calls: WeakKeyDictionary[Any, tuple[type, int]] = WeakKeyDictionary()
_counting = threading.Lock()


@contextlib.contextmanager
def _decoding_by_default(model: Any) -> Iterator[None]:
    """The model as one of a class with `JacobiByDefault`, until the last of the calls that overlap ends."""
    with _counting:
        own, calls = _in_calls.get(model, (type(model), 0))
        model.__class__ = _with_jacobi(own)
        _in_calls[model] = own, calls + 1
    try:
        yield
    finally:
        with _counting:
            own, calls = _in_calls.pop(model)
            if calls > 1:
                _in_calls[model] = own, calls - 1
            else:
                model.__class__ = own


@cache
def _with_jacobi(model_class: type) -> type:
    check_can_decode(model_class)
    # Its name is what save_pretrained writes, should it be called meanwhile.
    names = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (JacobiByDefault, model_class), names)
