"""Which execution a `CompileConfig` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacobi_hf.execution.base import Eager, WholeSteps
from jacobi_hf.execution.compiled import Compiled
from jacobi_hf.execution.cuda_graphs import GRAPHS, CudaGraphSteps

if TYPE_CHECKING:
    from transformers import CompileConfig

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.execution.base import Execution
    from jacobi_hf.execution.buffers import CallBuffers

# Modes in which inductor itself records CUDA graphs, and the same modes without. Here the whole step is recorded.
GRAPH_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


def execution_for(model: Any, config: JacobiConfig, wanted: CompileConfig | None, buffers: CallBuffers) -> Execution:
    """Return the execution of a call.

    Without a `CompileConfig` steps run eagerly. On a device that can record graphs (CUDA), the modes in which inductor
    records graphs give graphs of compiled steps, and the backend "cudagraphs" gives graphs of steps that are not
    compiled. Anything else goes to `torch.compile` unchanged.

    Args:
        model: the model.
        config: the knobs of the call.
        wanted: how to compile, or None.
        buffers: what the steps read and write.
    """
    if wanted is None:
        return Eager()
    mode = wanted.mode
    sources = buffers.state.sources
    records = buffers.cache.lengths_B.device.type in GRAPHS
    if records and wanted.backend == "cudagraphs":
        return CudaGraphSteps(model, WholeSteps(sources), buffers)
    records = records and mode in GRAPH_MODES
    if records:
        mode = GRAPH_MODES[mode]
    steps = Compiled(model, config, sources, wanted.backend, mode, wanted.options, fullgraph=wanted.fullgraph)
    return CudaGraphSteps(model, steps, buffers) if records else steps
