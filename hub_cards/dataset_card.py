"""The card of a dataset of collected or packed trajectories, written from the dataset's manifest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData

from jacobi_hf._version import __version__
from jacobi_hf.hub_cards import escape
from jacobi_hf.hub_cards.card import WHOLE, render
from jacobi_hf.hub_cards.cells import Table
from jacobi_hf.hub_cards.metadata import check_repo_id, checked_language, checked_license, is_repo_id
from jacobi_hf.trainer.data.shards import ManifestError, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
_DATA_FILES = (".jsonl", ".json", ".parquet")
_SOURCE = (
    "name",
    "model",
    "revision",
    "dataset",
    "split",
    "prompts",
    "block_size",
    "max_new_tokens",
    "do_sample",
    "temperature",
)


def generate_dataset_card(
    source: str | Path | Mapping[str, Any],
    *,
    repo_id: str,
    license: str,
    language: str | Iterable[str] | None = None,
    description: str | None = None,
) -> DatasetCard:
    """Return the card of a dataset repository.

    Args:
        source: the folder that `collect` or `pack` wrote, or its manifest.
        repo_id: the repository, "user/name".
        license: the license of the texts, as the licenses of the prompts and of the model allow.
        language: codes of languages, such as "en".
        description: a sentence for the top of the card.

    Returns:
        The card with its metadata.

    Raises:
        ManifestError: the manifest is missing, damaged or unfinished.
        ValueError: `repo_id`, `license` or `language` is invalid.
    """
    check_repo_id(repo_id)
    manifest = _checked(source)
    settings = manifest["settings"]
    counts = _totals(manifest["shards"])
    packed = isinstance(settings.get("of"), dict)
    sources = [one for one in (settings["of"].values() if packed else [settings]) if isinstance(one, dict)]
    data = DatasetCardData(
        license=checked_license(license),
        language=checked_language(language),
        pretty_name=repo_id.rpartition("/")[2],
        size_categories=next((name for limit, name in _SIZES if counts["rows"] < limit), "n>10M"),
        source_datasets=_repositories(sources, "dataset"),
        task_categories=["text-generation"],
        tags=["jacobi-forcing", "parallel-decoding"],
        configs=[{"config_name": "default", "data_files": "*.parquet"}],
    )
    body = render(
        "dataset.md.jinja",
        title=escape.text(repo_id.rpartition("/")[2]),
        name=repo_id,
        packed=packed,
        description=escape.text(description) if description else "",
        models=", ".join(dict.fromkeys(escape.path(one.get("model", "")) for one in sources)),
        sources=str(_sources(sources)),
        counts=str(_counts(counts)),
        settings=str(_settings(settings)),
        license=escape.text(license),
        version=escape.text(__version__),
    )
    return DatasetCard.from_template(data, template_str=WHOLE, body=body)


def _checked(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    manifest: Any = read_manifest(source) if not hasattr(source, "keys") else source
    if not isinstance(manifest.get("settings"), dict) or not isinstance(manifest.get("shards"), dict):
        raise ManifestError("The manifest has no settings and shards, so jacobi_hf.trainer did not write it.")
    if not manifest.get("complete"):
        raise ManifestError("The folder is unfinished. Run the command that writes it again until it is complete.")
    return manifest


def _totals(shards: Mapping[str, Any]) -> Counter[str]:
    """Return the sums of the counts of all shards."""
    totals: Counter[str] = Counter()
    for counts in shards.values():
        if not isinstance(counts, dict):
            raise ManifestError("The manifest is damaged: the counts of its shards are missing.")
        totals.update({name: number for name, number in counts.items() if type(number) is int})
    return totals


def _repositories(sources: Iterable[Mapping[str, Any]], field: str) -> list[str] | None:
    """Return the values of a field that are names of Hub repositories, or None without any."""
    names = dict.fromkeys(str(one.get(field, "")) for one in sources)
    return [name for name in names if "/" in name and is_repo_id(name) and not name.endswith(_DATA_FILES)] or None


def _sources(sources: Iterable[Mapping[str, Any]]) -> Table:
    """Return the table of the sources: one row for each."""
    rows = [[None if one.get(field) is None else escape.path(one[field]) for field in _SOURCE] for one in sources]
    return Table([field.replace("_", " ") for field in _SOURCE], rows)


def _counts(counts: Mapping[str, int]) -> Table:
    rows = [(escape.text(name), f"{number:,}") for name, number in counts.items()]
    return Table(("count", "number"), rows, numbers=True)


def _settings(settings: Mapping[str, Any]) -> Table:
    """Return the table of the settings that the table of sources does not show."""
    plain = {name: value for name, value in settings.items() if name not in ("of", "sources") and value is not None}
    return Table(("setting", "value"), [(escape.text(name), escape.path(value)) for name, value in plain.items()])
