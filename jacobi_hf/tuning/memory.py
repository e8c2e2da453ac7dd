"""What calls of a model learn for later calls. Plain Python on the host."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jacobi_hf.tuning.acceptance import SourceRates
from jacobi_hf.tuning.costs import Costs

if TYPE_CHECKING:
    from collections.abc import Hashable

    from jacobi_hf.tuning.options import Option


@dataclass
class Memory:
    """What is kept with a model between calls. One object may serve calls of any shape.

    Attributes:
        costs: by the key that a call gives, which says what its steps have in common: rows, context, device, ...
        greedy: acceptance in greedy calls.
        sampled: acceptance in calls that sample.
        made: by that key and the knobs, the options whose steps were compiled or captured.
        bank: what earlier calls have left for trying, in steps of one slot; below 0 what they have overdrawn.
        lag: tokens that the slowest row of a batch may have less than with ordinary decoding for a while, by how
            earlier batches went; None before the first one.
        calls: calls that have ended.
    """

    costs: defaultdict[Hashable, Costs] = field(default_factory=lambda: defaultdict(Costs))
    greedy: SourceRates = field(default_factory=SourceRates)
    sampled: SourceRates = field(default_factory=SourceRates)
    made: defaultdict[Hashable, set[Option]] = field(default_factory=lambda: defaultdict(set))
    bank: float = 0.0
    lag: float | None = None
    calls: int = 0
