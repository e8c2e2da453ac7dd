"""Noise schedules: how wrong the noisy block of each pair is.

The *noise* of a state is the share of its block that still differs from the fixed point. A schedule gives a target
noise for each block of a sample. The noisy block is the state of the block's trajectory whose noise is nearest to the
target (arXiv 2512.14681, section 3.2, eq. 7).
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
    """A schedule of target noises, and the choice of states that come nearest.

    Parameters:
        kind: how the target goes from block to block.
            `"progressive"`: it rises through the levels and starts again.
            `"reverse"`: it falls through the levels and starts again.
            `"random"`: each block has a random level.
            `"constant"`: each block has max_noise.
            `"cyclic"`: states are chosen by their number instead of their noise. Block j has the state that lies
            `(j mod w) / (w - 1)` of the way from the fixed point back to the draft.
        noise_levels: w, the number of levels.
        min_noise, max_noise: lowest and highest level, from 0 to 1.
        end_points: `"reference"`, levels that include both ends: `linspace(min_noise, max_noise, w)`. `"paper"`,
            without the
            upper end: `{0, 1/w, ..., (w-1)/w}` (eq. 7).
        phase: `"random"`, each sample starts at a random level. `"fixed"`, each sample starts at the first level; then
            samples of fewer than w blocks never have the last levels.
        noise: how the noise of a state is measured, each divided by n. `"suffix"`, the slots from the first wrong one
            on (the reference code). `"fraction"`, the wrong slots (the text of the paper).

    Raises:
        ValueError: a value is unknown or out of range.
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
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} of a noise schedule must be one of {', '.join(map(repr, allowed))}."
                )
        if isinstance(self.noise_levels, bool) or not isinstance(self.noise_levels, int) or self.noise_levels < 1:
            raise ValueError(f"noise_levels={self.noise_levels!r} must be an integer of at least 1.")
        if not 0 <= self.min_noise <= self.max_noise <= 1:
            raise ValueError(
                f"min_noise={self.min_noise} and max_noise={self.max_noise} must satisfy 0 <= min <= max <= 1."
            )

    @property
    def is_deterministic(self) -> bool:
        """Whether the schedule chooses the same states of a trajectory every time."""
        return self.kind == "constant" or (self.kind != "random" and self.phase == "fixed")

    def levels(self) -> list[float]:
        """Return the w levels in rising order."""
        steps = self.noise_levels - 1 if self.end_points == "reference" else self.noise_levels
        return [
            self.min_noise + (self.max_noise - self.min_noise) * i / max(1, steps) for i in range(self.noise_levels)
        ]

    def targets(self, blocks: int, rng: random.Random) -> list[float]:
        """Return the target noise of each of `blocks` blocks.

        Args:
            blocks: number of blocks.
            rng: random generator of the phase and of what the kind draws.
        """
        shift = rng.randrange(self.noise_levels) if self.phase == "random" else 0
        steps = [(block + shift) % self.noise_levels for block in range(blocks)]
        return SCHEDULES[self.kind](self, steps, rng)

    def choose(self, blocks: Sequence[Sequence[State]], lengths: Sequence[int], rng: random.Random) -> list[int]:
        """Return the number of the chosen state for each block.

        Args:
            blocks: states of each block, the fixed point last.
            lengths: how many slots of each block belong to the answer.
            rng: random generator of the phase and of what the kind draws.
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


# By kind: a function that takes the schedule, a number from 0 to w - 1 for each block (counted on from the phase) and
# a random generator, and returns the noise that each block should have. docs/developer.md adds one.
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
    """Return the noise of a state, from 0 to (n - 1) / n.

    Args:
        state: n token ids.
        fixed: the fixed point of the state's block.
        length: how many slots belong to the answer; the slots after them are never wrong.
        definition: `"suffix"` or `"fraction"`, see `NoiseSchedule`.
    """
    wrong = [i for i in range(length) if state[i] != fixed[i]]
    if not wrong:
        return 0.0
    return (length - wrong[0] if definition == "suffix" else len(wrong)) / len(fixed)


def pack(
    trajectory: Trajectory, schedule: NoiseSchedule, data_id: str, rng: random.Random, views: int = 1
) -> dict[str, Any]:
    """Return the packed record of a trajectory, as a row with a `data_id`.

    Args:
        trajectory: an answer with the states of its blocks.
        schedule: chooses the noisy blocks.
        data_id: name of the sample.
        rng: random generator of the schedule.
        views: noisy versions of each block, each with choices of its own.
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
