"""Folders of parquet shards with a manifest: each shard finished atomically, nothing half-written ever under its final name."""

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
    """The processes that share the work, under `accelerate launch` or `torchrun`; on a machine without an accelerator too."""
    import torch
    from accelerate import PartialState

    # Not told so, accelerate takes each process of a CPU machine for the only one. One that is done waits for the slowest.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def leave_together() -> None:
    """End the group of processes, where there is one: a process that leaves while another still sends makes that one abort."""
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
        """Add a shard: to a temporary file first, then under its name, then into the manifest."""
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
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or it cannot be read.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ManifestError(f"{file} does not exist: is {path} a folder that jacobi_hf.trainer wrote?")
    try:
        return read_progress(file, "shards", RENAMED["pack"])
    except ResumeError as error:
        raise ManifestError(str(error)) from None


def read_shards(path: str | Path) -> Any:
    """All rows of a folder as a `datasets.Dataset`.

    Raises:
        ManifestError: shards are missing or damaged, named; or the folder is unfinished.
    """
    from datasets import load_dataset

    return load_dataset("parquet", data_files=checked_shards(path), split="train")


def checked_shards(path: str | Path) -> list[str]:
    """The files of a finished folder that hold rows, in order.

    Raises:
        ManifestError: shards are missing or damaged, named; or the folder is unfinished.
    """
    folder, manifest = Path(path), read_manifest(path)
    if not manifest.get("complete"):
        raise ManifestError(
            f"{folder} is not finished: run the command that writes it again, it goes on where it stopped."
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


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("jacobi-hf", "torch", "transformers", "datasets")}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Differs when a model under the same name was trained on: a hash over a few numbers of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(repr(parameter.detach().flatten()[:8].float().cpu().tolist()).encode())
    return digest.hexdigest()[:16]
