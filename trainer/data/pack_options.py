"""Options of `jacobi-hf pack`. Neither torch nor transformers is imported here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from jacobi_hf.trainer.data.schedule import NoiseSchedule
from jacobi_hf.trainer.options import option


@dataclass
class PackConfig:
    """Which trajectories become training records, and how noisy their blocks are.

    Parameters:
        sources: folders of trajectories. `folder=0.4` asks for that share of the rows.
        output_dir: folder of the packed records.
        rows: how many trajectories to take; None takes as many as the shares allow.
        max_blocks: samples of more blocks are left out.
        buckets: length buckets to keep, such as "8-11" or "3,5". The bucket of a sample is the number in its
            `data_id`: the tokens before its first block, divided by 32.
        visits: records for each trajectory, each with choices of its own.
        views: noisy versions of each block in a record, each with choices of its own (see `PackedRecord`).
        schedule, noise_levels, min_noise, max_noise, end_points, phase, noise: see `NoiseSchedule`; schedule is its
        kind.
        shard_size: records of a file.
        seed: seed of the choice of trajectories, their order and the schedule.

    Raises:
        ValueError: a value is out of range, or visits or views would repeat the same choices.
    """

    sources: list[str] = field(
        default_factory=list, metadata={"help": "Folders of trajectories, folder or folder=share."}
    )
    output_dir: str = option("", "Folder of the packed records.")
    rows: int | None = option(None, "Trajectories to take.")
    max_blocks: int | None = option(None, "Leave out samples of more blocks.")
    buckets: str | None = option(None, "Length buckets to keep, for example 8-11.")
    visits: int = option(1, "Records per trajectory.")
    views: int = option(1, "Noisy versions within a record.")
    schedule: str = option("progressive", "progressive, reverse, random, cyclic or constant.")
    noise_levels: int = option(8, "Levels of the schedule (w).")
    min_noise: float = option(0.0, "Lowest noise.")
    max_noise: float = option(1.0, "Highest noise.")
    end_points: str = option("reference", "reference or paper.")
    phase: str = option("random", "random or fixed.")
    noise: str = option("suffix", "suffix or fraction.")
    shard_size: int = option(20_000, "Records per file.")
    seed: int = option(0, "Seed.")

    def __post_init__(self) -> None:
        for name in ("visits", "views", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if isinstance(self.sources, str):
            self.sources = [self.sources]
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1.")
        wanted_buckets(self.buckets)
        if self.noise_schedule().is_deterministic and (self.views > 1 or self.visits > 1):
            raise ValueError(
                f"visits={self.visits} and views={self.views} would repeat one noisy version: "
                f"schedule={self.schedule!r} with phase={self.phase!r} draws nothing. "
                "Use phase='random' or schedule='random', or one visit and one view."
            )

    def noise_schedule(self) -> NoiseSchedule:
        """Return the schedule of these options."""
        names = {f.name for f in fields(NoiseSchedule)} - {"kind"}
        return NoiseSchedule(kind=self.schedule, **{name: getattr(self, name) for name in names})


def wanted_buckets(text: str | None) -> set[int] | None:
    """Return the numbers in a text such as "8-11" or "3,5,7-9", or None for None.

    Raises:
        ValueError: the text is no such list.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", str(text)):
        raise ValueError(f"buckets={text!r} must look like '8-11' or '3,5'.")
    ranges = [part.split("-") for part in str(text).split(",")]
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}
