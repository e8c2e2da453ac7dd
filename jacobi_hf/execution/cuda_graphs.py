"""Steps as CUDA graphs, so that the host starts a whole step with one call."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jacobi_hf.attention.interface import attention_key
from jacobi_hf.execution.buffers import rounded_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import Forward, StepPlan, StepShape
    from jacobi_hf.execution.base import WholeSteps
    from jacobi_hf.execution.buffers import CallBuffers

_one_at_a_time = threading.Lock()  # a process can record one graph at a time


class DeviceGraphs(Protocol):
    """Recorder of a device's work, one for each set of buffers. Its graphs never run at the same time."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work in the way in which it will be recorded."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Return a function that runs the work again on the tensors that it uses now; nothing runs yet."""


class CudaGraphs:
    """CUDA graphs that share a memory pool for the temporary tensors of a step."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work on the stream of the recordings, where libraries then allocate their workspaces."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record the work on a stream of its own; other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        caches = torch.is_autocast_cache_enabled()
        with _one_at_a_time:
            # Weights that autocast has cast are gone when its context ends, so the graph casts its own.
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
class RecordedSteps:
    """The graphs over one set of buffers.

    Attributes:
        recorder: records the steps.
        fingerprint: the model for which the graphs hold, see `fingerprint_of`.
        capacity: of the cache for which the graphs hold; buffers that have grown have other addresses.
        replays: for each kind of step, how to run it and the layout whose tensors it reads; None if it has run once.
    """

    recorder: DeviceGraphs
    fingerprint: Any
    capacity: int
    replays: dict[Any, tuple[Callable[[], None], Layout] | None] = field(default_factory=dict)


class CudaGraphSteps:
    """Whole steps, compiled or not, each kind of which is recorded once and then replayed.

    Recording does nothing on the device. So the first step of a kind runs, as a warm-up, and the second one is
    recorded.

    Args:
        model: the model.
        steps: what is recorded.
        buffers: what the steps read and write; the graphs stay with them.

    Attributes:
        recorded: graphs that this call recorded.
    """

    def __init__(self, model: Any, steps: WholeSteps, buffers: CallBuffers) -> None:
        self._model = model
        self._steps = steps
        self._buffers = buffers
        self._known: RecordedSteps | None = None
        self.recorded = 0

    few_shapes = True

    @property
    def compiled(self) -> int:
        """Kinds of steps that this call compiled."""
        return self._steps.compiled

    def shape(self, shape: StepShape) -> StepShape:
        """Return the shape in which a step runs that needs at least the given one."""
        return self._steps.shape(shape)

    def run(self, state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
        """Run one step; the cache is read in few lengths, because each length is a graph of its own."""
        columns = rounded_up(len(plan.key_column_K))
        plan = replace(plan, key_column_K=state.cache.first_columns(columns))
        key = columns, self._steps.key(state, selector, plan.shape)
        work: Callable[[], object] = partial(self._steps.run, state, forward, selector, plan)
        if self._known is None:
            self._known = self._recorded_before()  # after the prefill, which may change the model's attributes
        known = self._known
        if known.capacity != state.cache.capacity:
            known.replays.clear()
            known.capacity = state.cache.capacity
        if key not in known.replays:
            known.recorder.warm_up(work)
            known.replays[key] = None
            return
        recording = known.replays[key]
        if recording is None:
            recording = known.replays[key] = known.recorder.record(work), plan.layout
            self.recorded += 1
        replay, _ = recording
        replay()

    def _recorded_before(self) -> RecordedSteps:
        """Return the graphs that come with the buffers if they hold for the model as it is, else none."""
        fingerprint = fingerprint_of(self._model)
        known: RecordedSteps | None = self._buffers.graphs
        if known is None or known.fingerprint != fingerprint:
            cache = self._buffers.cache
            device = cache.lengths_B.device
            known = self._buffers.graphs = RecordedSteps(GRAPHS[device.type](device), fingerprint, cache.capacity)
        return known


def fingerprint_of(model: Any) -> tuple[Any, ...]:
    """Return what a graph takes from a model for good: addresses of weights, and plain attributes of modules.

    Such attributes are, for example, `training`, the names of active adapters, and their scales.
    """
    modules = [
        (
            type(module),
            type(module).forward,
            {name: _plain(value) for name, value in vars(module).items() if not name.endswith("_hooks")},
        )
        for module in model.modules()
    ]
    weights = [_address(weight) for weight in (*model.parameters(), *model.buffers())]
    return attention_key(model.config), modules, weights


def _plain(value: Any, depth: int = 4) -> Any:
    """Return a number, string or the like, also in collections; the identity of a function; None for anything else."""
    if type(value) in (bool, int, float, str, torch.dtype, torch.device) or isinstance(value, Enum):
        return value
    if isinstance(value, FunctionType | MethodType | partial):
        return id(value)
    if isinstance(value, dict) and depth:
        value = value.items()
    elif not isinstance(value, list | tuple | set | frozenset) or not depth:
        return None
    return [_plain(part, depth - 1) for part in value]


def _address(weight: torch.Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # a subclass whose data lies in tensors of its own
        return id(weight)
