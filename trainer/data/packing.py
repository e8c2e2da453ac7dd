"""Packing: filters and mixes trajectories, chooses noisy blocks, and writes a training set in the published format."""

from __future__ import annotations

import random
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.trainer.data.schedule import NoiseSchedule, pack
from jacobi_hf.trainer.data.shards import ManifestError, ShardFolder, load_trajectories, read_manifest
from jacobi_hf.trainer.data.trajectories import Trajectory
from jacobi_hf.trainer.options import option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


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


def select(rows: Any, max_blocks: int | None = None, buckets: str | None = None) -> list[int]:
    """Return the numbers of the rows that pass the filters `max_blocks` and `buckets` of a `PackConfig`."""
    wanted = wanted_buckets(buckets)
    chosen = []
    for index, (name, blocks) in enumerate(zip(rows["data_id"], rows["blocks"], strict=True)):
        found = re.search(r"bucket_(\d+)_", name)
        in_bucket = wanted is None or (found is not None and int(found.group(1)) in wanted)
        if in_bucket and (max_blocks is None or len(blocks) <= max_blocks):
            chosen.append(index)
    return chosen


def shares(sources: Sequence[str]) -> dict[str, float | None]:
    """Return the share of each folder in `sources`; None for each if no source has one.

    Raises:
        ValueError: there is no source, only some have a share, or a share is no positive number.
    """
    parsed: dict[str, float | None] = {}
    for source in sources:
        folder, _, share = ("", "", "") if Path(source).is_dir() else source.rpartition("=")
        try:
            parsed[folder or source] = float(share) if folder else None
        except ValueError:
            raise ValueError(f"sources={source!r}: {share!r} is no share; write folder=0.4.") from None
    given = [share for share in parsed.values() if share is not None]
    if given and (len(given) < len(parsed) or min(given) <= 0):
        raise ValueError(f"sources: give every folder a positive share, or none of them: {', '.join(sources)}.")
    if not parsed:
        raise ValueError("sources is empty: name at least one folder of trajectories.")
    return parsed


def _amounts(available: Mapping[str, int], wanted: Mapping[str, float | None], rows: int | None) -> dict[str, int]:
    """Return how many rows to take from each source: its share of `rows`, or of as many rows as the shares allow.

    Args:
        available: rows of each source that pass the filters.
        wanted: share of each source; None for each to take all rows.
        rows: rows to take in all.

    Raises:
        ValueError: the sources have too few rows.
    """
    share_of = {name: share for name, share in wanted.items() if share is not None}
    if not share_of:
        total = sum(available.values())
        share_of = {name: count / max(1, total) for name, count in available.items()}
    whole = sum(share_of.values())
    most = min((available[name] * whole / share for name, share in share_of.items() if share), default=0.0)
    if rows is not None and rows > most + 0.5:
        raise ValueError(
            f"rows={rows} is too many: {', '.join(f'{n} has {c}' for n, c in available.items())}; "
            f"at most {int(most)} are possible."
        )
    return {
        name: min(available[name], round((most if rows is None else rows) * share / whole))
        for name, share in share_of.items()
    }


def pack_trajectories(config: PackConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, int]:
    """Write the packed records of `config.sources`, in random order. A second call continues an interrupted one.

    Args:
        config: what to pack.
        tokenizer: if given, the trajectories must be of this tokenizer.

    Returns:
        The number of trajectories that were taken from each source.

    Raises:
        ResumeError: the output folder was begun under other settings.
        ManifestError: the sources differ in block size or tokenizer, hold packed records, or are damaged.
        ValueError: the shares cannot be used, or no trajectory passes the filters.
    """
    from tqdm.auto import tqdm

    wanted = shares(config.sources)
    settings = {folder: read_manifest(folder)["settings"] for folder in wanted}
    _check_sources(settings)
    data = {folder: load_trajectories(folder, tokenizer) for folder in wanted}
    passing = {folder: select(rows, config.max_blocks, config.buckets) for folder, rows in data.items()}
    rng = random.Random(config.seed)
    amounts = _amounts({folder: len(rows) for folder, rows in passing.items()}, wanted, config.rows)
    if not sum(amounts.values()):
        raise ValueError(f"no trajectory passes max_blocks={config.max_blocks}, buckets={config.buckets}: {amounts}.")
    chosen = [(folder, index) for folder, count in amounts.items() for index in rng.sample(passing[folder], count)]
    visited = [(visit, folder, index) for visit in range(config.visits) for folder, index in chosen]
    rng.shuffle(visited)
    first = next(iter(settings.values()))
    described = {k: v for k, v in asdict(config).items() if k != "output_dir"}
    shards = ShardFolder(
        config.output_dir,
        {**described, "block_size": first["block_size"], "tokenizer": first["tokenizer"], "of": settings},
    )
    schedule = config.noise_schedule()
    done = shards.finished()
    with tqdm(total=len(visited), unit=" records", desc="pack") as bar:
        for number, start in enumerate(range(0, len(visited), config.shard_size)):
            name = f"packed-{number:05d}.parquet"
            part = visited[start : start + config.shard_size]
            if name in done:
                bar.update(len(part))
                continue
            records = []
            for visit, folder, index in part:
                records.append(_record(data[folder][index], schedule, visit, config))
                bar.update()
            shards.write(name, records, {"rows": len(records)})
    shards.complete()
    return amounts


def _check_sources(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ManifestError` if folders, of which these are the settings, cannot be packed together."""
    for name in ("block_size", "tokenizer"):
        if len({str(s.get(name)) for s in settings.values()}) > 1:
            values = ", ".join(f"{folder}: {s.get(name)}" for folder, s in settings.items())
            raise ManifestError(f"the sources differ in {name}: {values}.")
    for folder, one in settings.items():
        if "max_new_tokens" not in one:
            raise ManifestError(
                f"{folder} holds packed records, not trajectories: give the folders that collect wrote."
            )


def _record(row: Mapping[str, Any], schedule: NoiseSchedule, visit: int, config: PackConfig) -> dict[str, Any]:
    """Return a packed record of a row with a trajectory. Its random choices depend on seed, row and visit alone."""
    trajectory = Trajectory(row["prompt_ids"], row["answer_ids"], row["blocks"])
    rng = random.Random(f"{config.seed}/{row['data_id']}/{visit}")
    return pack(trajectory, schedule, row["data_id"], rng, config.views)
