"""Whole steps through `torch.compile`."""

from __future__ import annotations

import warnings
import weakref
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.decoding.step import run_step
from jacobi_hf.execution.base import WholeSteps, without_knowledge
from jacobi_hf.execution.kept import kept_for

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import Forward, StepPlan, StepShape
    from jacobi_hf.drafts.sources import Sources

MOST_COMPILED = 128  # steps that are kept for a model


class CompiledStep:
    """One kind of step, compiled when it first runs, and again when `torch.compile` finds that the model has changed.

    Args:
        how: backend, mode and options of `torch.compile`.
    """

    def __init__(self, how: dict[str, Any]) -> None:
        own = with_own_code(whole_step)
        # The compiled code belongs to the code object, which outlives this step if nobody resets it.
        weakref.finalize(self, torch._dynamo.reset_code, own.__code__).atexit = False  # type: ignore[attr-defined]
        self.run = torch.compile(own, **how, fullgraph=True, dynamic=False)


class UncompiledStep:
    """One kind of step that `torch.compile` does not take.

    Args:
        reason: why, for the warning.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.run = whole_step

    def warn(self) -> None:
        """Warn that these steps run uncompiled."""
        warnings.warn(
            f"compile_config is ignored for some steps, because {self.reason}. They run uncompiled.",
            UserWarning,
            stacklevel=2,
        )


class Compiled(WholeSteps):
    """Whole steps through `torch.compile`, once for each kind of step. They are kept with the model.

    Args:
        model: the model.
        config: the knobs of the call.
        sources: the draft sources of the call.
        backend, mode, options: of `torch.compile`.
        fullgraph: whether a step that cannot be compiled is an error. If not, it runs uncompiled, with a warning.

    Attributes:
        compiled: kinds of steps that this call compiled.
    """

    def __init__(
        self,
        model: Any,
        config: JacobiConfig,
        sources: Sources,
        backend: Any = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        *,
        fullgraph: bool = False,
    ) -> None:
        super().__init__(sources)
        self._kept = kept_for(model)
        self._fullgraph = fullgraph
        self._how = {"backend": backend, "mode": mode, "options": options}
        # torch.compile would tell these apart itself, but it gives up after a few differences.
        self._context = hash((config, torch.is_inference_mode_enabled(), repr(self._how)))
        self._steps: dict[Any, CompiledStep | UncompiledStep] = {}  # those that this call has found or made
        self._made: set[Any] = set()
        # Lengths of `key_column_K` that the compiler knows to be variable, for buffers of this capacity.
        self._marked: set[int] = set()
        self._capacity: int | None = None

    def key(self, state: DecodingState, selector: Selector, shape: StepShape) -> tuple[Any, ...]:
        """Return what makes one step other code than another, apart from lengths."""
        return *super().key(state, selector, shape), self._context

    def run(self, state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
        """Run one step; see `Execution.run`.

        Raises:
            torch._dynamo.exc.Unsupported: the step cannot be compiled, and `fullgraph` says that it must.
            torch._dynamo.exc.FailOnRecompileLimitHit: the model changes from step to step, and `fullgraph` is set.
        """
        if self._capacity != state.cache.capacity:
            mark_lengths(state)
            self._capacity = state.cache.capacity
            self._marked.clear()
        columns = len(plan.key_column_K)
        if columns not in self._marked:
            torch._dynamo.mark_dynamic(plan.key_column_K, 0)
            self._marked.add(columns)
        key = self.key(state, selector, plan.shape)
        arguments = state, forward, selector, without_knowledge(plan)
        try:
            self._step(key).run(*arguments)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            self._instead(key, error).run(*arguments)  # nothing of the step has run

    def _step(self, key: Any) -> CompiledStep | UncompiledStep:
        """Return the step of this kind: the call's own, one that is kept with the model, or a new one."""
        step = self._steps.get(key)
        if step is not None:
            return step
        step = self._kept.steps.get(key)
        is_uncompiled = isinstance(step, UncompiledStep)
        if step is None or (is_uncompiled and self._fullgraph):  # with fullgraph the error is raised again
            return self._new(key)
        if is_uncompiled:
            step.warn()
        self._steps[key] = step
        return step

    def _new(self, key: Any) -> CompiledStep:
        step = CompiledStep(self._how)
        self._made.add(key)
        self.compiled += 1
        self._keep(key, step)
        return step

    def _instead(self, key: Any, error: Exception) -> CompiledStep | UncompiledStep:
        """Return what runs instead of a step that could not be compiled, or not once more."""
        changes = isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)
        if changes and key not in self._made:  # the model has changed over many calls: begin anew
            return self._new(key)
        if self._fullgraph:
            raise error
        if key in self._made:
            self._made.remove(key)
            self.compiled -= 1
        reason = "the model's attributes change between steps" if changes else str(error).partition("\n")[0]
        step = UncompiledStep(reason)
        step.warn()
        self._keep(key, step)
        return step

    def _keep(self, key: Any, step: CompiledStep | UncompiledStep) -> None:
        """Keep a step with the model; the oldest ones go if there are too many."""
        self._steps[key] = step
        others = {other: kept for other, kept in self._kept.steps.items() if other != key}
        self._kept.steps = dict([*others.items(), (key, step)][-MOST_COMPILED:])


def whole_step(state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
    """Run a step; this is what is compiled."""
    run_step(state, forward, selector, plan)


def with_own_code(function: Any) -> Any:
    """Return a copy of a function with its own code object, to which `torch.compile` ties its results."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )


def mark_lengths(state: DecodingState) -> None:
    """Mark for the compiler which sizes change from call to call: those that follow from the lengths of the texts."""
    sized = [(state.text_BL, 1), (state.cache.column_C, 0)]
    for layer in state.cache.used_layers:
        sized += [(layer.keys, 2), (layer.values, 2)]
    for source in state.sources.all:
        sized += source.sized_by_length()
    for tensor, dimension in sized:
        torch._dynamo.mark_dynamic(tensor, dimension)
