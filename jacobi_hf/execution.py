"""How a step runs: as it stands, or whole, as one graph that is compiled, captured, or both (`compile_config`)."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jacobi_hf.arena import kept_for
from jacobi_hf.capture import GRAPHS, Captured
from jacobi_hf.step import Widths, candidate_sources
from jacobi_hf.switches import switches_of, with_fewer_guards

if TYPE_CHECKING:
    from transformers import CompileConfig

    from jacobi_hf.arena import Arena
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.layout import Layout
    from jacobi_hf.selection import Selector
    from jacobi_hf.step import Forward, Step


def cannot_compile(model: Any) -> str | None:
    """What about a model forbids compiling it as one graph."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "the model is split over several processes"
    hooks = (hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    # Those of a drafter are there while another call drafts, and are traced with the rest.
    if any(not getattr(hook, "is_drafters", False) for hook in hooks) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "a module of the model has forward hooks"
    quantizer = getattr(model, "hf_quantizer", None)
    return "its quantisation cannot be compiled" if quantizer is not None and not quantizer.is_compileable else None


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
        self, step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, column_S: torch.Tensor,
        text_columns: int, *, some_over: bool,
    ) -> None:  # fmt: skip
        """One step; see `Step.run`."""


class Eager:
    """Every operation of a step as it comes, with shapes as small as the step needs."""

    compiled = captured = 0

    def widths(self, widths: Widths) -> Widths:
        """The shape in which a step that needs `widths` runs."""
        return widths

    def run(
        self, step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, column_S: torch.Tensor,
        text_columns: int, *, some_over: bool,
    ) -> None:  # fmt: skip
        """One step; see `Step.run`."""
        may_look = column_S.device.type == "cpu"  # at the host's own memory
        step.run(forward, selector, widths, layout, column_S, text_columns, some_over=some_over, may_look=may_look)


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
        self, step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, column_S: torch.Tensor,
        text_columns: int, *, some_over: bool,
    ) -> None:  # fmt: skip
        """One step; `text_columns` and `some_over` are not looked at, so that they change nothing in what is compiled or recorded."""
        step.run(forward, selector, widths, layout, column_S)


class Compiled(WholeSteps):
    """Whole steps through `torch.compile`, once for each kind.

    Args:
        model: whose steps these are.
        config: how drafts are made, for the shapes.
        backend, mode, options: of `torch.compile`; a step is always one graph.
        is_alone: whether no code but ours and transformers' runs between two steps, which might change the model.

    Attributes:
        compiled: steps that this call compiled.
    """

    def __init__(
        self, model: Any, config: JacobiConfig, backend: Any = "inductor", mode: str | None = None, options: dict[str, Any] | None = None,
        *, is_alone: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._model, self._is_alone = model, is_alone
        self._how, self._known, self._is_marked = {"backend": backend, "mode": mode, "options": options}, kept_for(model).compiled, False
        # What is not told apart here, torch.compile would tell apart itself, and give up after some.
        under = config, switches_of(model), is_alone, torch.is_inference_mode_enabled(), repr(self._how)
        self._under = hash(under)  # once, not in every step

    def kind(self, step: Step, selector: Selector, widths: Widths) -> tuple[Any, ...]:
        """What makes a step another one than the next, beside the lengths."""
        return *super().kind(step, selector, widths), self._under

    def run(
        self, step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, column_S: torch.Tensor,
        text_columns: int, *, some_over: bool,
    ) -> None:  # fmt: skip
        """One step."""
        kind = self.kind(step, selector, widths)
        before: tuple[Any, ...] | None = None
        if kind not in self._known:
            for oldest in list(self._known)[: max(0, len(self._known) + 1 - MOST_COMPILED)]:
                del self._known[oldest]
            how = with_fewer_guards(**self._how) if self._is_alone else self._how
            self._known[kind] = torch.compile(of_its_own(_whole_step), **how, fullgraph=True, dynamic=False)
            self.compiled += 1
            before = switches_of(self._model) if self._is_alone else None
        if not self._is_marked:
            _mark_lengths(step)
            self._is_marked = True
        column_S = column_S.view(-1)
        torch._dynamo.mark_dynamic(column_S, 0)
        self._known[kind](step, forward, selector, widths, layout, column_S)
        if before is not None and switches_of(self._model) != before:  # a model that changes itself has all its guards checked
            self._known[kind] = torch.compile(of_its_own(_whole_step), **self._how, fullgraph=True, dynamic=False)


MOST_COMPILED = 128  # steps that are kept for a model
# Modes of inductor in which it captures CUDA graphs, and what they are without: we capture the whole step ourselves.
CAPTURING_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


def whole_steps(model: Any, config: JacobiConfig, wanted: CompileConfig, arena: Arena, *, is_alone: bool = True) -> WholeSteps | Captured:
    """The execution that a `CompileConfig` asks for.

    Where the device can record graphs (CUDA), the modes in which inductor would are taken for that, and backend "cudagraphs" for
    graphs of steps that are not compiled. Anything else goes to `torch.compile` as it is.
    """
    if arena.cache.lengths_B.device.type in GRAPHS:
        if wanted.backend == "cudagraphs":
            return Captured(model, WholeSteps(config), arena)
        if wanted.mode in CAPTURING_MODES:
            mode = CAPTURING_MODES[wanted.mode]
            return Captured(model, Compiled(model, config, wanted.backend, mode, wanted.options, is_alone=is_alone), arena)
    return Compiled(model, config, wanted.backend, wanted.mode, wanted.options, is_alone=is_alone)


def _whole_step(step: Step, forward: Forward, selector: Selector, widths: Widths, layout: Layout, column_S: torch.Tensor) -> None:
    step.run(forward, selector, widths, layout, column_S)


def _mark_lengths(step: Step) -> None:
    """Tell the compiler which sizes change from call to call: those that follow from the lengths of prompt and output."""
    torch._dynamo.mark_dynamic(step.text_BL, 1)
    torch._dynamo.mark_dynamic(step.window.scattered_T, 0)
    torch._dynamo.mark_dynamic(step.window.end_T, 0)
    torch._dynamo.mark_dynamic(step.cache.column_C, 0)
    for layer in step.cache.layers:
        torch._dynamo.mark_dynamic(layer.keys, 2)
        torch._dynamo.mark_dynamic(layer.values, 2)


def of_its_own(function: Any) -> Any:
    """A copy with a code object of its own: torch.compile keeps what it compiled, and limits and searches it, by code object."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__)
