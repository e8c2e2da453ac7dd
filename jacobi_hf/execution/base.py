"""How a step runs: as it stands, or whole, as one graph that is compiled, captured, or both (`compile_config`)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jacobi_hf.decoding.step import Widths, candidate_sources
from jacobi_hf.execution.buffers import kept_for
from jacobi_hf.execution.compiled import CompiledStep, UncompiledStep
from jacobi_hf.execution.cuda_graphs import GRAPHS, Captured
from jacobi_hf.execution.switches import Switches
from jacobi_hf.integration.compat import OUTPUT_CAPTURING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import CompileConfig

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.step import Forward, Step
    from jacobi_hf.execution.buffers import Arena


def cannot_compile(model: Any) -> str | None:
    """What about a model forbids compiling it as one graph."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "the model is split over several processes"
    if any(not _can_be_traced(hook) for hook in _hooks(model)) or any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "a module of the model has hooks"
    if any(_hooks_of_all_modules()):
        return "there are hooks for all modules"
    quantizer = getattr(model, "hf_quantizer", None)
    return "its quantisation cannot be compiled" if quantizer is not None and not quantizer.is_compileable else None


def _can_be_traced(hook: Any) -> bool:
    """Return whether a hook is compiled together with the model's forward.

    A drafter's hooks are there while another call drafts. Transformers' own are left on the layers by a forward with
    `output_hidden_states=True` or `output_attentions=True`, and do nothing in other forwards.
    """
    return getattr(hook, "is_drafters", False) or getattr(hook, "__module__", "") == OUTPUT_CAPTURING


def _hooks(model: Any) -> Iterator[Any]:
    for module in model.modules():
        for name in _HOOKS:
            yield from getattr(module, name).values()


def _hooks_of_all_modules() -> Iterator[Any]:
    for name in _HOOKS:
        yield from getattr(torch.nn.modules.module, f"_global{name}", {}).values()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Execution(Protocol):
    """What the decoder asks of a way to run steps.

    Attributes:
        captured: steps that this call recorded.
    """

    captured: int

    @property
    def compiled(self) -> int:
        """Steps that this call compiled."""

    def widths(self, widths: Widths) -> Widths:
        """The shape in which a step that needs `widths` runs."""

    def run(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
        text_columns: int,
        *,
        some_over: bool,
    ) -> None:
        """One step; see `Step.run`."""


class Eager:
    """Every operation of a step as it comes, with shapes as small as the step needs."""

    compiled = captured = 0

    def widths(self, widths: Widths) -> Widths:
        """The shape in which a step that needs `widths` runs."""
        return widths

    def run(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
        text_columns: int,
        *,
        some_over: bool,
    ) -> None:
        """One step; see `Step.run`."""
        may_look = key_column_K.device.type == "cpu"  # at the host's own memory
        step.run(forward, selector, widths, layout, key_column_K, text_columns, some_over=some_over, may_look=may_look)


class WholeSteps:
    """Steps in few shapes, whatever the lengths of texts and cache, and whatever the host knows of them.

    Args:
        config: how drafts are made, for the shapes.
    """

    PARTS = 4  # widths of the window, as parts of its greatest
    compiled = captured = 0

    def __init__(self, config: JacobiConfig) -> None:
        self._window = config.window_width
        self._sources = [(s.branches, s.length) for s in candidate_sources(config, 1, torch.device("cpu"))]

    def widths(self, widths: Widths) -> Widths:
        """The window in quarters of its full width; of each source all branches at full length, or none."""
        part = max(1, -(-self._window // self.PARTS))
        window, noisy = (min(self._window, -(-width // part) * part) for width in (widths.window, widths.noisy))
        used, branches = list(widths.branches), []
        for number, length in self._sources:
            branches += [length if any(used[:number]) else 0] * number
            del used[:number]
        window = max([window, *(start for start, length in zip(widths.starts, branches, strict=True) if length)])
        return Widths(window, tuple(branches), noisy, widths.starts)

    def kind(self, step: Step, selector: Selector, widths: Widths) -> tuple[Any, ...]:
        """What makes a step another one than the next, beside the lengths."""
        return widths, step.kind, selector.kind

    def run(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
        text_columns: int,
        *,
        some_over: bool,
    ) -> None:
        """One step; `text_columns` and `some_over` are not looked at, so that they change nothing in what is compiled or recorded."""
        step.run(forward, selector, widths, layout, key_column_K)


class Compiled(WholeSteps):
    """Whole steps through `torch.compile`, once for each kind.

    Args:
        model: whose steps these are.
        config: how drafts are made, for the shapes.
        backend, mode, options: of `torch.compile`.
        fullgraph: whether a step that cannot be compiled is an error. If not, it runs uncompiled, with a warning.
        is_alone: whether no code but ours and transformers' runs between two steps, which might change the model.

    Attributes:
        compiled: steps that this call compiled.
    """

    def __init__(
        self,
        model: Any,
        config: JacobiConfig,
        backend: Any = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        *,
        fullgraph: bool = False,
        is_alone: bool = True,
    ) -> None:
        super().__init__(config)
        self._model, self._fullgraph, self._is_alone, self._kept = model, fullgraph, is_alone, kept_for(model)
        self._how = {"backend": backend, "mode": mode, "options": options}
        # What is not told apart here, torch.compile would tell apart itself, and give up after some. A number, once, not in every step.
        self._under = hash((config, is_alone, torch.is_inference_mode_enabled(), repr(self._how)))
        self._switches: Switches | None = None
        self._ready: dict[Any, CompiledStep | UncompiledStep] = {}  # what this call has found or compiled
        self._own: list[CompiledStep] = []

    def kind(self, step: Step, selector: Selector, widths: Widths) -> tuple[Any, ...]:
        """What makes a step another one than the next, beside the lengths."""
        return *super().kind(step, selector, widths), self._under

    def run(
        self,
        step: Step,
        forward: Forward,
        selector: Selector,
        widths: Widths,
        layout: Layout,
        key_column_K: torch.Tensor,
        text_columns: int,
        *,
        some_over: bool,
    ) -> None:
        """One step.

        Raises:
            torch._dynamo.exc.TorchDynamoException: it cannot be compiled as one graph, and `fullgraph` says that it must.
        """
        if self._switches is None:
            self._switches = Switches(self._model)  # as the prefill has left them
            _mark_lengths(step)
        key_column_K = key_column_K.view(-1)
        torch._dynamo.mark_dynamic(key_column_K, 0)
        kind = self.kind(step, selector, widths)
        ready = self._ready.get(kind)
        if ready is None:
            ready = self._ready[kind] = self._find(kind, self._switches)
        before = self._switches if ready.is_settled else Switches(self._model)
        try:
            ready(step, forward, selector, widths, layout, key_column_K)
        except (
            torch._dynamo.exc.Unsupported,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:  # nothing of the step has run
            ready = self._ready[kind] = self._instead(ready, error)
            self.run(step, forward, selector, widths, layout, key_column_K, text_columns, some_over=some_over)
            return
        if isinstance(ready, CompiledStep) and not ready.is_settled:
            self._ready[kind] = self._settled(ready, before)

    def _find(self, kind: Any, switches: Switches) -> CompiledStep | UncompiledStep:
        """The kept step of this kind, or one to be compiled."""
        for ready in self._kept.compiled:
            if ready.kind == kind and ready.fits(switches):
                if ready.why_not:
                    _warn_uncompiled(ready.why_not)
                return ready
        return self._new(kind, all_guards=not self._is_alone)

    def _new(self, kind: Any, *, all_guards: bool) -> CompiledStep:
        self._own.append(CompiledStep(kind, self._how, all_guards=all_guards))
        return self._own[-1]

    def _settled(self, ready: CompiledStep, before: Switches) -> CompiledStep:
        """A step that was compiled just now, to be kept; of a model that changes itself, one with all guards to be compiled instead."""
        if ready.settle(before, Switches(self._model)) or ready.has_all_guards:
            if ready not in self._kept.compiled:
                self.compiled += 1
                self._kept.compiled = [*self._kept.compiled, ready][-MOST_COMPILED:]
            return ready
        self._drop(ready)
        return self._new(ready.kind, all_guards=True)

    def _instead(self, failed: CompiledStep | UncompiledStep, error: Exception) -> CompiledStep | UncompiledStep:
        """What runs instead of a step that could not be compiled, or not again."""
        self._drop(failed)
        too_often = isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)
        if too_often and failed not in self._own:  # over many calls
            return self._new(failed.kind, all_guards=not self._is_alone)
        if self._fullgraph:
            raise error
        switches = Switches(self._model)
        if too_often:
            step = UncompiledStep(
                failed.kind, "what the model decides by changes from step to step", switches, names=()
            )
        else:
            step = UncompiledStep(failed.kind, str(error).partition("\n")[0], switches)
        self._kept.compiled = [*self._kept.compiled, step][-MOST_COMPILED:]
        _warn_uncompiled(step.why_not)
        return step

    def _drop(self, step: CompiledStep | UncompiledStep) -> None:
        self._kept.compiled = [other for other in self._kept.compiled if other is not step]


def _warn_uncompiled(reason: str) -> None:
    warnings.warn(
        f"compile_config is without effect on some steps: {reason}. They run uncompiled.", UserWarning, stacklevel=2
    )


MOST_COMPILED = 128  # steps that are kept for a model
# Modes of inductor in which it captures CUDA graphs, and what they are without: we capture the whole step ourselves.
CAPTURING_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


def whole_steps(
    model: Any, config: JacobiConfig, wanted: CompileConfig, arena: Arena, *, is_alone: bool = True
) -> WholeSteps | Captured:
    """The execution that a `CompileConfig` asks for.

    Where the device can record graphs (CUDA), the modes in which inductor would are taken for that, and backend "cudagraphs" for
    graphs of steps that are not compiled. Anything else goes to `torch.compile` as it is.
    """
    if arena.cache.lengths_B.device.type in GRAPHS:
        if wanted.backend == "cudagraphs":
            return Captured(model, WholeSteps(config), arena)
        if wanted.mode in CAPTURING_MODES:
            mode = CAPTURING_MODES[wanted.mode]
            compiled = Compiled(
                model, config, wanted.backend, mode, wanted.options, fullgraph=wanted.fullgraph, is_alone=is_alone
            )
            return Captured(model, compiled, arena)
    return Compiled(
        model, config, wanted.backend, wanted.mode, wanted.options, fullgraph=wanted.fullgraph, is_alone=is_alone
    )


def _mark_lengths(step: Step) -> None:
    """Tell the compiler which sizes change from call to call: those that follow from the lengths of prompt and output."""
    torch._dynamo.mark_dynamic(step.text_BL, 1)
    torch._dynamo.mark_dynamic(step.window.scattered_T, 0)
    torch._dynamo.mark_dynamic(step.window.end_T, 0)
    torch._dynamo.mark_dynamic(step.cache.column_C, 0)
    for layer in step.cache.layers:
        torch._dynamo.mark_dynamic(layer.keys, 2)
        torch._dynamo.mark_dynamic(layer.values, 2)
