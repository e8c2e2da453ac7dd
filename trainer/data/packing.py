"""Packing: filters and mixes trajectories, chooses noisy blocks, and writes a training set in the published format."""

from __future__ import annotations

import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacobi_hf.trainer.data.pack_options import wanted_buckets
from jacobi_hf.trainer.data.schedule import NoiseSchedule, pack
from jacobi_hf.trainer.data.shards import ManifestError, ShardFolder, load_trajectories, read_manifest
from jacobi_hf.trainer.data.trajectories import Trajectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from jacobi_hf.trainer.data.pack_options import PackConfig


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
