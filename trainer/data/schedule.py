"""Noise schedules: which state of each block a sample trains on, and the packed record that comes of it.

A sample with T blocks asks for a noise level per block; the state of the block's trajectory whose noise is nearest is taken
(arXiv 2512.14681, section 3.2, eq. 7). Noise of a state is measured against the fixed point, over the n slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jacobi_hf.trainer.data.record import PackedRecord

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from jacobi_hf.trainer.data.trajectories import State, Trajectory

END_POINTS = ("reference", "paper")
PHASES = ("fixed", "random")
NOISES = ("suffix", "fraction")


@dataclass(frozen=True)
class NoiseSchedule:
    """Target noise per block, and the state that comes nearest.

    Parameters:
        kind: `"progressive"` rises over each run of w blocks, `"reverse"` falls, `"random"` draws one of the w levels per
            block, `"cyclic"` walks through the states by index instead of by noise (block j takes the state that lies
            `(j mod w) / (w - 1)` of the way from the fixed point back to the draft, whatever the levels are), `"constant"` asks for
            `max_noise` everywhere.
        noise_levels: w, how many levels the schedule has.
        min_noise, max_noise: the ends of the levels, within 0 and 1.
        end_points: `"reference"` includes both ends (`linspace(min, max, w)`), `"paper"` leaves the upper one out (eq. 7:
            `{0, 1/w, .., (w-1)/w}`).
        phase: `"random"` starts each sample at a random level. With `"fixed"`, samples of fewer than w blocks never
            reach the high levels.
        noise: `"suffix"`, slots from the first wrong one on (the reference code), or `"fraction"`, wrong slots (the
            paper's text), each over n.

    Raises:
        ValueError: an unknown word, noise_levels below 1, or ends out of order.
    """

    kind: str = "progressive"
    noise_levels: int = 8
    min_noise: float = 0.0
    max_noise: float = 1.0
    end_points: str = "reference"
    phase: str = "random"
    noise: str = "suffix"

    def __post_init__(self) -> None:
        words = (("kind", kinds()), ("end_points", END_POINTS), ("phase", PHASES), ("noise", NOISES))
        for name, allowed in words:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of a noise schedule must be one of {', '.join(map(repr, allowed))}."
                )
        if isinstance(self.noise_levels, bool) or not isinstance(self.noise_levels, int) or self.noise_levels < 1:
            raise ValueError(f"noise_levels={self.noise_levels!r} must be an integer of at least 1.")
        if not 0 <= self.min_noise <= self.max_noise <= 1:
            raise ValueError(
                f"min_noise={self.min_noise} and max_noise={self.max_noise} must satisfy 0 <= min <= max <= 1."
            )

    @property
    def is_deterministic(self) -> bool:
        """Whether a trajectory gives the same noisy version every time."""
        return self.kind == "constant" or (self.kind != "random" and self.phase == "fixed")

    def levels(self) -> list[float]:
        """The w levels, rising."""
        steps = self.noise_levels - 1 if self.end_points == "reference" else self.noise_levels
        return [
            self.min_noise + (self.max_noise - self.min_noise) * i / max(1, steps) for i in range(self.noise_levels)
        ]

    def targets(self, blocks: int, rng: random.Random) -> list[float]:
        """Return the noise that each of `blocks` blocks should have; `rng` draws the phase and whatever the kind draws."""
        shift = rng.randrange(self.noise_levels) if self.phase == "random" else 0
        steps = [(block + shift) % self.noise_levels for block in range(blocks)]
        return SCHEDULES[self.kind](self, steps, rng)

    def choose(self, blocks: Sequence[Sequence[State]], lengths: Sequence[int], rng: random.Random) -> list[int]:
        """The index of the chosen state in each block's trajectory.

        Args:
            blocks: states per block, the fixed point last.
            lengths: slots of each block that belong to the answer.
            rng: of the phase and the draws.
        """
        if self.kind == "cyclic":
            shift = rng.randrange(self.noise_levels) if self.phase == "random" else 0
            steps = [(block + shift) % self.noise_levels for block in range(len(blocks))]
            return [
                len(states) - 1 - (len(states) - 1) * step // max(1, self.noise_levels - 1)
                for states, step in zip(blocks, steps, strict=True)
            ]
        chosen = []
        for states, length, target in zip(blocks, lengths, self.targets(len(blocks), rng), strict=True):
            levels = [noise_of(state, states[-1], length, self.noise) for state in states]
            chosen.append(min(range(len(states)), key=lambda i: (abs(levels[i] - target), i)))
        return chosen


def progressive(schedule: NoiseSchedule, steps: list[int], rng: random.Random) -> list[float]:  # noqa: ARG001
    """Return levels that rise and start again after the highest."""
    levels = schedule.levels()
    return [levels[step] for step in steps]


def reverse(schedule: NoiseSchedule, steps: list[int], rng: random.Random) -> list[float]:  # noqa: ARG001
    """Return levels that fall and start again after the lowest."""
    levels = schedule.levels()
    return [levels[-1 - step] for step in steps]


def drawn(schedule: NoiseSchedule, steps: list[int], rng: random.Random) -> list[float]:
    """Return a level for each block that is drawn without regard to the others."""
    levels = schedule.levels()
    return [rng.choice(levels) for _ in steps]


def constant(schedule: NoiseSchedule, steps: list[int], rng: random.Random) -> list[float]:  # noqa: ARG001
    """Return the highest noise for every block."""
    return [schedule.max_noise] * len(steps)


# By kind: a function that takes the schedule, a number from 0 to w - 1 for each block (counted on from the phase) and a random
# generator, and returns the noise that each block should have. docs/developer.md adds one.
SCHEDULES: dict[str, Callable[[NoiseSchedule, list[int], random.Random], list[float]]] = {
    "progressive": progressive,
    "reverse": reverse,
    "random": drawn,
    "constant": constant,
}


def kinds() -> tuple[str, ...]:
    """Return the kinds of schedules: those of `SCHEDULES`, and `"cyclic"`, which looks at no noise."""
    return (*SCHEDULES, "cyclic")


def noise_of(state: State, fixed: State, length: int, definition: str) -> float:
    """Noise of a state against its fixed point, from 0 to (n - 1) / n.

    Args:
        length: slots that belong to the answer; the rest is never wrong.
        definition: `"suffix"` or `"fraction"`.
    """
    wrong = [i for i in range(length) if state[i] != fixed[i]]
    if not wrong:
        return 0.0
    return (length - wrong[0] if definition == "suffix" else len(wrong)) / len(fixed)


def pack(
    trajectory: Trajectory, schedule: NoiseSchedule, data_id: str, rng: random.Random, views: int = 1
) -> dict[str, Any]:
    """The packed record of one sample, `prompt, k_0, l_0, k_1, l_1, ...`, with the fields of the published sets.

    Args:
        views: noisy versions of the sample, each with its own phase. Those beyond the first, which the published format has no
            place for, are in `more_noisy_ids`, block after block.
    """
    blocks = trajectory.blocks
    n = len(blocks[0][-1])
    lengths = [min(n, len(trajectory.answer_ids) - n * block) for block in range(len(blocks))]
    chosen = [schedule.choose(blocks, lengths, rng) for _ in range(views)]
    record = PackedRecord.build(
        trajectory.prompt_ids,
        views=[[states[index] for states, index in zip(blocks, view, strict=True)] for view in chosen],
        clean=[states[-1] for states in blocks],
        states=chosen[0],
    )
    return {"data_id": data_id, **record.to_row()}
