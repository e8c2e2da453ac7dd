"""Folders of parquet shards with a manifest. A shard gets its final name when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from jacobi_hf.resume import Progress, ResumeError, read_progress
from jacobi_hf.trainer.options import RENAMED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"


def processes() -> PartialState:
    """Return the state of the processes that share the work, under `accelerate launch`, `torchrun` or alone."""
    import torch
    from accelerate import PartialState

    # With cpu=False, accelerate takes each process of a machine without accelerators for the only one. The timeout is
    # long because a process that is finished waits for the slowest one.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def leave_together() -> None:
    """End the group of processes, if there is one, when all have come here.

    A process aborts if another one leaves while it still sends.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


class ManifestError(ResumeError):
    """A folder of shards that is unfinished, damaged, or has no manifest."""


class ShardFolder:
    """A folder of parquet shards that several processes may fill, and its manifest, which says how they were made.

    Args:
        path: the folder; it is created if it is not there.
        settings: everything that determines the rows.

    Raises:
        ResumeError: the folder was begun under other settings, named one by one.
        ManifestError: the folder has parquet files but no manifest.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = self.path / MANIFEST
        if not manifest.is_file() and any(self.path.glob("*.parquet")):
            raise ManifestError(f"{self.path} holds parquet files but no {MANIFEST}: choose an empty folder.")
        self._progress = Progress(
            manifest,
            settings,
            place=self.path,
            option="output_dir",
            parts_key="shards",
            renamed=RENAMED["pack"],
            lock=FileLock(self.path / ".lock"),
            facts={"versions": _versions(), "complete": False},
        )
        self._progress.begin()

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the counts of each finished shard, by file name."""
        self._progress.reload()
        return {name: counts for name, counts in self._progress.parts.items() if (self.path / name).is_file()}

    def write(self, name: str, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> None:
        """Write a shard to a temporary file, rename it, and add it to the manifest.

        Args:
            name: file name of the shard.
            rows: its rows.
            counts: numbers about the rows, for the manifest.
        """
        from datasets import Dataset

        part = self.path / f".{name}.{os.getpid()}.part"
        try:
            Dataset.from_list([dict(row) for row in rows]).to_parquet(str(part))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            digest = _digest(part)
            part.replace(self.path / name)
        finally:
            part.unlink(missing_ok=True)
        self._progress.add(name, {**counts, "sha256": digest})

    def complete(self) -> None:
        """Note in the manifest that no shard is missing, and delete the temporary files of killed processes."""
        for leftover in self.path.glob(".*.part"):
            leftover.unlink()
        self._progress.note(complete=True)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder: `settings`, `versions`, `shards` (counts by file name) and `complete`.

    Raises:
        ManifestError: there is no manifest, or it is damaged.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ManifestError(f"{file} does not exist: is {path} a folder that jacobi_hf.trainer wrote?")
    try:
        return read_progress(file, "shards", RENAMED["pack"])
    except ResumeError as error:
        raise ManifestError(str(error)) from None


def read_shards(path: str | Path) -> Any:
    """Return all rows of a folder as a `datasets.Dataset`.

    Raises:
        ManifestError: the folder is unfinished, or a shard is missing or damaged.
    """
    from datasets import load_dataset

    return load_dataset("parquet", data_files=checked_shards(path), split="train")


def checked_shards(path: str | Path) -> list[str]:
    """Return the files of a finished folder that have rows, in order, after a check of their checksums.

    Raises:
        ManifestError: the folder is unfinished, or a shard is missing or damaged. The error names the shard.
    """
    folder = Path(path)
    manifest = read_manifest(path)
    if not manifest.get("complete"):
        raise ManifestError(
            f"{folder} is not finished: run the command that writes it again. It continues where it stopped."
        )
    files = []
    for name, counts in manifest["shards"].items():
        file = folder / name
        if not file.is_file():
            raise ManifestError(f"{file} is missing: run the command that wrote it again.")
        if _digest(file) != counts["sha256"]:
            raise ManifestError(
                f"{file} is damaged (its checksum is not that of the manifest): delete it and run the command again."
            )
        if counts["rows"]:
            files.append(str(file))
    if not files:
        raise ManifestError(f"{folder} holds no rows.")
    return files


def load_trajectories(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, block_size: int | None = None
) -> Any:
    """Return collected trajectories: a `datasets.Dataset` with `data_id`, `prompt_ids`, `answer_ids` and `blocks`.

    Args:
        path: folder that `collect` wrote.
        tokenizer: tokenizer that they must have been collected with; None accepts any.
        block_size: block size that they must have been collected with; None accepts any.

    Raises:
        ManifestError: the folder is unfinished or damaged, or of another tokenizer or block size.
    """
    settings = read_manifest(path)["settings"]
    if tokenizer is not None and settings.get("tokenizer") != tokenizer_fingerprint(tokenizer):
        raise ManifestError(
            f"{path} was collected with another tokenizer, that of {settings.get('model')!r}: "
            "collect again with this one."
        )
    if block_size is not None and settings.get("block_size") != block_size:
        raise ManifestError(f"{path} was collected with block_size={settings.get('block_size')}, not {block_size}.")
    return read_shards(path)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("jacobi-hf", "torch", "transformers", "datasets")}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary: equal for tokenizers with the same vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a few numbers of every parameter, which differs after any further training of the model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(repr(parameter.detach().flatten()[:8].float().cpu().tolist()).encode())
    return digest.hexdigest()[:16]
