"""The constants of the controller of adaptive steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The constants of the controller. Amounts are in steps of one slot.

    They were chosen on recorded decodes, see `examples/benchmarks/adaptive_simulation.py`.

    Attributes:
        call: advance, bank and debt are shares of so many tokens, or of the call's limit if that is lower.
        first_advance: share that the first call of a model may spend on trying at once.
        advance: share that later calls may spend at once, in addition to what is banked.
        bank: most that a call leaves to the next.
        debt: most that a call charges to the next.
        accrual: share of the time that trying may cost in the long run.
        allowance: what any step may cost more than one slot.
        caution: surcharge on the cost beyond one slot while nothing has been earned yet.
        switch: tokens per row by which another base must be better than the current one.
        trial: steps of a trial.
        gap: tokens from one trial to the next; doubles with each trial of a call up to `most_gap`.
        most_gap: see `gap`.
        renewal: steps for which a plan holds.
        memory: share of earlier steps in the price of time that is left after a step.
    """

    call: int = 128
    first_advance: float = 0.035
    advance: float = 0.008
    bank: float = 0.05
    debt: float = 0.01
    accrual: float = 0.01
    allowance: float = 0.015
    caution: float = 0.3
    switch: float = 0.03
    trial: int = 3
    gap: int = 32
    most_gap: int = 512
    renewal: int = 8
    memory: float = 0.95


POLICY = Policy()
