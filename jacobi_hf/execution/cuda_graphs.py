"""Steps recorded as graphs of the device, so that the host starts a whole step with one call."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jacobi_hf.execution.buffers import rounded_up
from jacobi_hf.execution.switches import Switches

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.step import Forward, Step, Widths
    from jacobi_hf.execution.base import WholeSteps
    from jacobi_hf.execution.buffers import Arena


_one_at_a_time = threading.Lock()  # a process has one capture under way


class DeviceGraphs(Protocol):
    """What records work of a device; one for each arena, whose graphs never run at the same time."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do it, as it will be recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does it again, with the tensors that it used; nothing is done now."""


class CudaGraphs:
    """CUDA graphs that share a pool of memory for what a step needs in between."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def warm_up(self, work: Callable[[], None]) -> None:
        """On the stream of the recordings, where libraries then have their workspaces."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record on a stream of our own; what other threads do on the device meanwhile is none of its business."""
        graph, caches = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        with _one_at_a_time:
            # Weights that autocast has cast are gone with its context; the graph casts its own.
            torch.set_autocast_cache_enabled(False)
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    work()
            finally:
                torch.set_autocast_cache_enabled(caches)
        return graph.replay


# Types of devices whose work can be recorded.
GRAPHS: dict[str, type[DeviceGraphs]] = {"cuda": CudaGraphs}


@dataclass
class Recordings:
    """The captured steps of an arena.

    Attributes:
        model_state: what they hold good for, see `baked_in`.
        replays: by kind of step; None for one that has run once. With each goes the layout, whose tensors it reads.
    """

    graphs: DeviceGraphs
    model_state: Any
    replays: dict[Any, tuple[Callable[[], None], Layout] | None] = field(default_factory=dict)


class Captured:
    """Whole steps, compiled or not, each kind of which is recorded once and replayed from then on.

    Recording does nothing on the device. So the first step of a kind runs, which is its warm-up, and the second one is recorded.

    Args:
        model: whose steps these are.
        steps: what is recorded.
        arena: whose buffers they work on; recordings stay with it.

    Attributes:
        captured: steps that this call recorded.
    """

    def __init__(self, model: Any, steps: WholeSteps, arena: Arena) -> None:
        self._model, self._steps, self._arena, self.captured = model, steps, arena, 0
        self._recordings: Recordings | None = None

    @property
    def compiled(self) -> int:
        """Steps that this call compiled."""
        return self._steps.compiled

    def widths(self, widths: Widths) -> Widths:
        """The shape in which a step that needs `widths` runs."""
        return self._steps.widths(widths)

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
        """One step; it reads the cache in few lengths, since each is a recording of its own."""
        key_column_K = step.cache.column_C[: rounded_up(len(key_column_K))]
        kind = len(key_column_K), self._steps.kind(step, selector, widths)
        work = partial(
            self._steps.run, step, forward, selector, widths, layout, key_column_K, text_columns, some_over=some_over
        )
        if self._recordings is None:
            self._recordings = self._kept()  # not before, since a prefill may set what a model decides by
        known = self._recordings
        if kind not in known.replays:
            known.graphs.warm_up(work)
            known.replays[kind] = None
            return
        recording = known.replays[kind]
        if recording is None:
            recording = known.replays[kind] = known.graphs.record(work), layout
            self.captured += 1
        replay, _ = recording
        replay()

    def _kept(self) -> Recordings:
        """What the arena has, if it holds good for the model as it is."""
        state, known = baked_in(self._model), self._arena.recordings
        if known is None or known.model_state != state:
            device = self._arena.cache.lengths_B.device
            known = self._arena.recordings = Recordings(GRAPHS[device.type](device), state)
        return known


def baked_in(model: Any) -> tuple[Any, ...]:
    """What a recorded step has taken from a model for good: where its weights lie, and what its modules decide by."""
    return Switches(model).of(), [_address(weight) for weight in (*model.parameters(), *model.buffers())]


def _address(weight: torch.Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # a subclass whose data lies in tensors of its own
        return id(weight)
