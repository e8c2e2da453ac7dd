"""How a step runs: the interface, and eager execution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from jacobi_hf.decoding.step import StepPlan, StepShape, run_step

if TYPE_CHECKING:
    from jacobi_hf.decoding.selection import Selector
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import Forward
    from jacobi_hf.drafts.sources import Sources


class Execution(Protocol):
    """What the decoder asks of a way to run steps."""

    @property
    def few_shapes(self) -> bool:
        """Whether each shape costs time to make, so that a call should use few."""

    @property
    def compiled(self) -> int:
        """Kinds of steps that this call compiled."""

    @property
    def recorded(self) -> int:
        """CUDA graphs that this call recorded."""

    def shape(self, shape: StepShape) -> StepShape:
        """Return the shape in which a step runs that needs at least the given one."""

    def run(self, state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
        """Run one step; arguments as in `run_step`."""


class Eager:
    """Every operation of a step on its own, in shapes as small as the step needs."""

    few_shapes = False
    compiled = 0
    recorded = 0

    def shape(self, shape: StepShape) -> StepShape:
        """Return the same shape."""
        return shape

    def run(self, state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
        """Run one step; see `Execution.run`."""
        on_cpu = plan.key_column_K.device.type == "cpu"  # there the host can read a value at no cost
        run_step(state, forward, selector, plan, host_may_read=on_cpu)


class WholeSteps:
    """Steps in few shapes, whatever the lengths of texts and cache and whatever the host knows of them.

    The base of compiled steps and of CUDA graphs, which cost time to make for every shape.

    Args:
        sources: the draft sources of the call.
    """

    few_shapes = True
    PARTS = 4  # the backbone is rounded up to quarters of its full width
    compiled = 0
    recorded = 0

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def shape(self, shape: StepShape) -> StepShape:
        """Return the shape with the backbone in quarters, and of each source all branches at full length or none."""
        width = self._sources.width
        part = max(1, -(-width // self.PARTS))
        backbone, draft_slots = (min(width, -(-used // part) * part) for used in (shape.backbone, shape.draft_slots))
        used = list(shape.branches)
        branches: list[int] = []
        for source in self._sources.branching:
            lengths = source.shape.lengths
            wanted = used[: len(lengths)]
            branches += lengths if any(wanted) else [0] * len(lengths)
            del used[: len(lengths)]
        followed = [start for start, length in zip(shape.starts, branches, strict=True) if length]
        return StepShape(max([backbone, *followed]), tuple(branches), draft_slots, shape.starts, shape.drafts)

    def key(self, state: DecodingState, selector: Selector, shape: StepShape) -> tuple[Any, ...]:
        """Return what makes one step other code than another, apart from lengths."""
        return shape, state.key, selector.key

    def run(self, state: DecodingState, forward: Forward, selector: Selector, plan: StepPlan) -> None:
        """Run one step; see `Execution.run`."""
        run_step(state, forward, selector, without_knowledge(plan))


def without_knowledge(plan: StepPlan) -> StepPlan:
    """Return a plan without what the host knows of the rows, so that the same code serves all rows."""
    return StepPlan(plan.shape, plan.layout, plan.key_column_K)
