"""The constants of the controller of adaptive steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The constants of the controller. Amounts are in steps of one slot.

    They were chosen on recorded decodes, see `examples/benchmarks/adaptive_simulation.py`.

    Attributes:
        call: advance, bank, debt, lag, overdraft and rich are shares of so many tokens, or of the limit of the call if
            that is lower.
        first_advance: what the first call of a model may spend on trying at once.
        advance: what later calls may spend at once, in addition to what is banked.
        bank: the most that a call leaves to the next.
        debt: the most that a call charges to the next.
        slow: share of a batch's rows, the slowest ones, from which the controller learns and for which it chooses.
        lag: the most tokens that the slowest row of a batch may have less than with ordinary decoding for a while.
        first_lag: the same in the first batch of a model, where it is also a share of the tokens so far.
        rich: an account with more than this pays for steps of a width that was never measured.
        accrual: share of the time that trying may cost in the long run.
        overdraft: how far the account may go below 0 for options that are worth it by what was measured.
        allowance: what any step may cost more than one slot.
        caution: surcharge on the cost beyond one slot while nothing has been earned yet.
        switch: tokens per row by which another base must be better than the current one.
        loss: a step that loses more than this has the plan renewed.
        trial: steps of a trial of the backbone.
        gap: tokens from one trial to the next; doubles with each trial of a call up to `most_gap`.
        most_gap: see `gap`.
        renewal: steps for which a plan holds.
        remeasure: steps after which one slot is measured anew if wide steps gain nothing; more if they gain.
        memory: share of earlier steps in the price of time that is left after a step.
        start: steps that the expected price of time is worth at the start of a call.
    """

    call: int = 128
    first_advance: float = 0.02
    advance: float = 0.005
    bank: float = 0.05
    debt: float = 0.01
    slow: float = 0.25
    lag: float = 0.125
    first_lag: float = 0.06
    rich: float = 0.04
    accrual: float = 0.01
    overdraft: float = 0.01
    allowance: float = 0.015
    caution: float = 0.5
    switch: float = 0.03
    loss: float = 0.9
    trial: int = 2
    gap: int = 32
    most_gap: int = 512
    renewal: int = 8
    remeasure: float = 16.0
    memory: float = 0.95
    start: float = 10.0


POLICY = Policy()
