"""Registration of the default classes when transformers loads their modules.

Importing transformers and its models takes seconds. So importing jacobi_hf does not import them, and registers a class
at the end of the import of its module, before anybody can use the class.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

from jacobi_hf.integration.defaults import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def register_when_loaded() -> None:
    """Register the default classes: those of loaded modules now, all others when their module is loaded."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in DEFAULTS:
        if name in sys.modules:
            _register(import_module(name))  # waits if another thread is loading it


def _register(module: ModuleType) -> None:
    registry = import_module("jacobi_hf.integration.registry")
    registry.register_default(getattr(module, DEFAULTS[module.__name__]))


class _Finder(MetaPathFinder):
    """Finder of the modules of the default classes. The finders after it find them; it adds a loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in DEFAULTS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loader that registers a class of the module that another loader has loaded.

    Args:
        loader: the other loader. It becomes the module's loader, so that tools find the module's source.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

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
        _register(module)
