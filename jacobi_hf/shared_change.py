"""Changes to an object that calls in several threads share."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CallHook:
    """A hook on a module of a model for the time of a call.

    Somebody may copy or pickle the model meanwhile. The copy has a hook from the standard library instead, which takes
    anything and returns None. So it does nothing, and it loads where this package is not installed.

    Args:
        hook: what the hook does.
        is_drafters: whether it is a drafter's, which may be compiled together with the model's forward.
    """

    def __init__(self, hook: Callable[..., Any], *, is_drafters: bool = False) -> None:
        self._hook = hook
        self.is_drafters = is_drafters

    def __call__(self, *args: Any) -> Any:
        """Run the hook."""
        return self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a hook that does nothing."""
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        """Pickle a hook that does nothing."""
        return getattr, (contextlib.nullcontext(), "__exit__")


class SharedChange:
    """A change that overlapping calls make to the same object, such as a hook on a model.

    The first call makes the change, and the last one that ends undoes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[int, int] = {}
        self._undo: dict[int, Callable[[], None]] = {}

    @contextlib.contextmanager
    def made(self, changed: object, make: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """Keep an object changed while the context is open.

        Args:
            changed: the object; two objects that are equal are still two objects.
            make: makes the change and returns the function that undoes it.
        """
        key = id(changed)
        with self._lock:
            if key not in self._uses:
                self._undo[key] = make()
            self._uses[key] = self._uses.get(key, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                    self._undo.pop(key)()

    def is_made(self, changed: object) -> bool:
        """Return whether some call keeps the object changed."""
        return id(changed) in self._uses
