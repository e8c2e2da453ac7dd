"""Whole steps through `torch.compile`, each under what the model decided by, and freed with its last holder."""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.execution.switches import LeftOut, Switches, with_filter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.step import Forward, Step, Widths


class CompiledStep:
    """What `torch.compile` makes of a whole step when it first runs, and again for other sizes.

    Args:
        kind: what distinguishes it from others, beside what the model decides by.
        how: backend, mode and options of `torch.compile`.
        all_guards: whether all that it takes for granted is checked in every step, see `LeftOut`.
    """

    why_not = None

    def __init__(self, kind: Any, how: dict[str, Any], *, all_guards: bool) -> None:
        self.kind, self.has_all_guards = kind, all_guards
        self._left_out, self._known_names = LeftOut(), -1
        self._under: Any = None
        own = of_its_own(whole_step)
        weakref.finalize(self, torch._dynamo.reset_code, own.__code__).atexit = False  # type: ignore[attr-defined]
        self._run = torch.compile(
            own, **(how if all_guards else with_filter(**how, left_out=self._left_out)), fullgraph=True, dynamic=False
        )

    def __call__(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
    ) -> None:
        """One step.

        Raises:
            torch._dynamo.exc.Unsupported: it cannot be compiled; nothing of it has run.
            torch._dynamo.exc.FailOnRecompileLimitHit: it was compiled too often; nothing of it has run.
        """
        self._run(step, forward, selector, widths, layout, key_column_K)

    @property
    def is_settled(self) -> bool:
        """Whether `settle` has been told of all that was compiled so far."""
        return len(self._left_out.names) == self._known_names

    def settle(self, before: Switches, after: Switches) -> bool:
        """Note what it depends on; false if that changed while it was compiled, so that it has to be checked in every step."""
        names = self._left_out.names
        self._under, self._known_names = after.of(names), len(names)
        return before.of(names) == self._under

    def fits(self, switches: Switches) -> bool:
        """Whether it is what a model that decides by these would compile."""
        return switches.of(self._left_out.names) == self._under


class UncompiledStep:
    """A whole step that torch.compile does not take.

    Args:
        kind: as of the compiled one.
        why_not: the reason, for people.
        switches: what the model decides by.
        names: of the attributes that matter to it; by default all do.
    """

    is_settled = True

    def __init__(self, kind: Any, why_not: str, switches: Switches, names: Iterable[str] | None = None) -> None:
        self.kind, self.why_not = kind, why_not
        self._names, self._under = names, switches.of(names)

    def __call__(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
    ) -> None:
        """One step, as it stands."""
        whole_step(step, forward, selector, widths, layout, key_column_K)

    def fits(self, switches: Switches) -> bool:
        """Whether compiling would fail again."""
        return switches.of(self._names) == self._under


def whole_step(
    step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, key_column_K: torch.Tensor
) -> None:
    """What is compiled."""
    step.run(forward, selector, widths, layout, key_column_K)


def of_its_own(function: Any) -> Any:
    """A copy with a code object of its own: by that torch.compile keeps what it compiled, limits and searches it."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
