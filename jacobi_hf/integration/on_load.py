"""Registration of classes when transformers loads their modules.

Importing transformers and its models takes seconds. So importing jacobi_hf does not import them, and registers a class
at the end of the import of its module, before anybody can use the class.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

from jacobi_hf.integration.defaults import SERVED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODELS = "transformers.models."
_GENERATE = "transformers.generation.utils"


def register_when_loaded() -> None:
    """Register the classes of `SERVED`: those of loaded modules now, all others when their module is loaded."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in [*sys.modules]:
        if (change := _change_of(name)) is not None:
            change(import_module(name))  # waits if another thread is loading it


def register_no_more() -> None:
    """Leave modules that are loaded from now on as they are."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def _change_of(name: str) -> Callable[[ModuleType], None] | None:
    """Return what is to be done with a module of this name when it is loaded, or None."""
    if name == _GENERATE:
        return _advise
    return _register if name.startswith(_MODELS) and ".modeling_" in name else None


def _register(module: ModuleType) -> None:
    names = [name for name in vars(module) if name in SERVED]
    classes = [one for name in names if (one := getattr(module, name)).__module__ == module.__name__]
    for model_class in classes:
        import_module("jacobi_hf.integration.registry").register_default(model_class)


def _advise(module: ModuleType) -> None:
    import_module("jacobi_hf.integration.advice").give_advice(module.GenerationMixin)


class _Finder(MetaPathFinder):
    """Finder of the modules in which something changes. The finders after it find them; it adds a loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _change_of(fullname)
        if change is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader(Loader):
    """Loader that changes a module after another loader has loaded it.

    Args:
        loader: the other loader. It becomes the module's loader, so that tools find the module's source.
        change: gets the module.
    """

    def __init__(self, loader: Any, change: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._change = change

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)  # a spec's loader is asked for its source before the module is loaded

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._change(module)
