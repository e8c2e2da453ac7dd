"""Made-up machines on which adaptive_simulation.py replays recorded texts.

A step costs what a curve says; ordinary decoding has steps of one slot, which cost 1. The controller sees the cost
with noise and with rare outliers, as on a busy machine. The time that is reported is the cost without noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, pairwise

from adaptive_traces import UNKNOWN, Trace

from jacobi_hf.tuning.controller import Controller
from jacobi_hf.tuning.memory import Memory
from jacobi_hf.tuning.options import Option, RowOutcome
from jacobi_hf.tuning.policy import POLICY, Policy

POOL = (2, 8)  # branches of the pool, and their length
OUTLIERS = 0.01  # share of the measurements that are 3 to 50 times too long


@dataclass(frozen=True)
class Curve:
    """What steps cost on a made-up machine.

    Attributes:
        name: name in the results.
        cost: the cost of a step by its slots, all rows together.
        noise: standard deviation of the logarithm of a measurement.
        load: how many times longer every step takes while other programs run, which come and go.
    """

    name: str
    cost: Callable[[int], float]
    noise: float = 0.15
    load: float = 1.0


def through(*points: tuple[int, float]) -> Callable[[int], float]:
    """Return straight lines through points; beyond the last two points the line goes on."""

    def cost(slots: int) -> float:
        lines = [*pairwise(points)]
        (x, a), (y, b) = next((line for line in lines if slots <= line[1][0]), lines[-1])
        return a + (b - a) * (slots - x) / (y - x)

    return cost


SMOLLM2 = ((1, 1.0), (2, 1.66), (4, 1.72), (8, 1.88), (16, 2.4), (32, 3.4), (64, 4.8), (96, 6.0))
TINY = ((1, 1.0), (2, 1.9), (4, 2.1), (8, 2.2), (16, 2.25), (32, 3.0), (64, 3.7), (96, 4.2))
CURVES = (
    Curve("flat to 128", through((1, 1.0), (128, 1.0), (256, 2.0))),
    Curve("flat to 16, then linear", through((1, 1.0), (16, 1.0), (32, 2.0))),
    Curve("linear", through((1, 1.0), (2, 1.5))),
    Curve("linear after a first guess", through((1, 1.0), (2, 1.7), (4, 2.1), (8, 2.9))),
    Curve("step at 64", through((1, 1.0), (64, 1.0), (65, 3.0), (1000, 3.0))),
    Curve("SmolLM2, measured", through(*SMOLLM2)),
    Curve("tiny, measured", through(*TINY)),
    Curve("flat to 16, noise 30 %", through((1, 1.0), (16, 1.0), (32, 2.0)), noise=0.3),
    Curve("SmolLM2, noise 30 %", through(*SMOLLM2), noise=0.3),
    Curve("SmolLM2, other programs", through(*SMOLLM2), load=2.5),
)
SWITCH = 1 / 64  # probability that other programs begin or end at a step


@dataclass(frozen=True)
class Text:
    """A recorded text, with numbers for each of its positions.

    Attributes:
        trace: the recorded numbers.
        hopeless: whether no guess is ever accepted.
    """

    trace: Trace
    hopeless: bool = False

    @cached_property
    def positions(self) -> list[tuple[int, int, int, int]]:
        """Order of the match, and accepted guesses of lookup, backbone and pool, after 1, 2, .. new tokens."""
        trace = self.trace
        rows = zip(
            map(int, trace.order), filled(trace.lookup), filled(trace.window), filled(trace.others), strict=True
        )
        return [(order, 0, 0, 0) if self.hopeless else (order, *accepted) for order, *accepted in rows]


def filled(digits: str) -> list[int]:
    """Return the numbers of a string of digits; an unknown one is that of the nearest known one."""
    known = [(place, int(digit, 36)) for place, digit in enumerate(digits) if digit != UNKNOWN] or [(0, 0)]
    return [min(known, key=lambda pair: abs(pair[0] - place))[1] for place in range(len(digits))]


def slots_of(option: Option) -> int:
    """Return the most slots of a row."""
    return 1 + option.backbone + option.draft_slots + option.lookup + math.prod(POOL) * option.others


class Row:
    """A row of a batch that writes texts one after another, up to a limit."""

    def __init__(self, texts: Sequence[Text], first: int, limit: int) -> None:
        endless = (place for number in count(first) for place in texts[number % len(texts)].positions)
        self._places = [next(endless) for _ in range(limit)]
        self.left = limit
        self.prompt = texts[first % len(texts)].trace.prompt

    @property
    def order(self) -> int:
        """Order of the match for the next step."""
        return self._places[-self.left][0]

    def step(self, option: Option, *, warm: bool) -> RowOutcome:
        """Write the tokens of a step, and return what it brought."""
        order, looked, window, other = self._places[-self.left]
        lookup = option.lookup if order else 0
        accepted = min(looked, lookup)
        backbone = min(window, option.backbone) if warm else 0
        others = min(other, POOL[1]) if option.others and warm else 0
        tokens = min(self.left, 1 + max(accepted, backbone, others))
        self.left -= tokens
        return RowOutcome(
            tokens,
            len(self._places) - self.left,
            order,
            (lookup, accepted),
            (option.backbone, backbone),
            (POOL[1] * option.others, others),
        )


@dataclass
class Call:
    """One simulated call.

    Attributes:
        seconds: time of its steps, without noise.
        shapes: the option of each step.
    """

    seconds: float
    shapes: list[Option]

    @property
    def changes(self) -> int:
        """How often the step had another window or other branches than the step before; the lookup may change."""
        bases = [replace(option, lookup=0) for option in self.shapes]
        return sum(before != after for before, after in pairwise(bases))


def adaptive_call(
    rows: list[Row],
    curve: Curve,
    options: Sequence[Option],
    memory: Memory,
    noise: random.Random,
    policy: Policy = POLICY,
) -> Call:
    """Return a call under the controller, which adds to the memory."""
    number = len(rows)
    limit = max(row.left for row in rows)
    controller = Controller(options, slots_of, memory, key=number, sampled=False, limit=limit, policy=policy)
    prompt = max(row.prompt for row in rows)
    busy = noise.random() < 0.5
    load = curve.load if busy else 1.0
    controller.start(prompt, 0.9 * load * measured(curve.cost(prompt * number), curve.noise, noise))
    call = Call(0.0, [])
    warm = False
    while rows:
        option = controller.choose([(limit - row.left, row.order) for row in rows])
        slots = slots_of(option) - (0 if any(row.order for row in rows) else option.lookup)
        cost = curve.cost(slots * number)  # rows that have ended are still in the batch
        outcomes = [row.step(option, warm=warm) for row in rows]
        warm = option.backbone > 0
        busy ^= noise.random() < SWITCH
        load = curve.load if busy else 1.0
        controller.note(option, slots, load * measured(cost, curve.noise, noise), outcomes)
        rows = [row for row in rows if row.left]
        call.seconds += cost
        call.shapes.append(option)
    controller.end()
    return call


def fixed_call(rows: list[Row], curve: Curve, option: Option) -> float:
    """Return the time of a call in which all steps have the same option."""
    number = len(rows)
    seconds = 0.0
    warm = False
    while rows:
        slots = slots_of(option) - (0 if any(row.order for row in rows) else option.lookup)
        seconds += curve.cost(slots * number)
        for row in rows:
            row.step(option, warm=warm)
        warm = True
        rows = [row for row in rows if row.left]
    return seconds


def measured(cost: float, spread: float, noise: random.Random) -> float:
    """Return a measurement of a cost."""
    outlier = math.exp(noise.uniform(math.log(3), math.log(50))) if noise.random() < OUTLIERS else 1.0
    return cost * outlier * math.exp(noise.gauss(0, spread))


def rows_of(texts: Sequence[Text], first: int, rows: int, limit: int) -> list[Row]:
    """Return the rows of a call that begins with a text."""
    return [Row(texts, first + number, limit) for number in range(rows)]
