"""The metadata of a card, by which the Hub filters. Every value is checked before it becomes YAML."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not listed

from jacobi_hf.hub_cards import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jacobi_hf.hub_cards.benchmark import Place

TAGS = ("jacobi-forcing", "parallel-decoding", "custom_generate")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,10}(-[A-Za-z0-9]{1,10})*")


def check_repo_id(repo_id: str) -> str:
    """Return the name of a repository unchanged.

    Raises:
        ValueError: the Hub would not accept the name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"repo_id={repo_id!a} is not the name of a Hub repository. "
            "Write user/name with letters, digits, '-', '_' and '.'."
        ) from None
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w./-]+", repo_id, re.ASCII) or "\n" in repo_id:
        raise ValueError(f"repo_id={repo_id!a} is not the name of a Hub repository.")
    return repo_id


def is_repo_id(name: str) -> bool:
    """Return whether the Hub could have a repository of this name. The path of an existing folder is not one."""
    try:
        check_repo_id(name)
    except ValueError:
        return False
    return not Path(name).exists()


def model_metadata(
    *,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    language: str | Iterable[str] | None,
    datasets: Iterable[str],
    relation: str,
    eval_results: list[EvalResult],
) -> ModelCardData:
    """Return the metadata of a model's card.

    Args:
        repo_id: the card's repository.
        base_model: the base model: a Hub repository, or a folder, which the metadata leave out.
        license: the license; None takes that of the base model's card.
        language: codes of languages, such as "en".
        datasets: names of Hub datasets; others are left out.
        relation: how the model relates to its base, in the Hub's words: "finetune" or "adapter".
        eval_results: scores and speeds.

    Raises:
        ValueError: a license or language is invalid, or no license is given and the base's card names none.
    """
    base_on_hub = base_model if base_model is not None and is_repo_id(base_model) else None
    data = ModelCardData(
        **_license(license, base_model),
        language=checked_language(language),
        base_model=base_on_hub,
        base_model_relation=relation if base_on_hub else None,
        datasets=[name for name in dict.fromkeys(datasets) if is_repo_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )
    if eval_results:
        data.model_name = repo_id.rpartition("/")[2]
        data.eval_results = eval_results
    return data


def checked_license(name: str) -> str:
    """Return the identifier of a license unchanged.

    Raises:
        ValueError: it cannot be an identifier.
    """
    if not isinstance(name, str) or not _LICENSE.fullmatch(name):
        raise ValueError(
            f"license={name!a} is not an identifier of a license on the Hub. Give one such as 'apache-2.0' or 'other'."
        )
    return name


def checked_language(language: str | Iterable[str] | None) -> list[str] | None:
    """Return codes of languages as a list, or None without any.

    Raises:
        ValueError: one cannot be the code of a language.
    """
    given = [language] if isinstance(language, str) else list(language or ())
    if wrong := [one for one in given if not isinstance(one, str) or not _LANGUAGE.fullmatch(one)]:
        raise ValueError(f"language={wrong[0]!a} is not the code of a language. Give one such as 'en'.")
    return given or None


def _license(given: str | None, base_model: str | None) -> dict[str, Any]:
    """Return the fields of the license: the given one, or those of the base model's card."""
    if given is not None:
        return {"license": checked_license(given)}
    if base_model is None:
        raise ValueError(
            "The license is missing. Give one such as license='apache-2.0', or a base_model whose card names one."
        )
    try:
        inherited = _card_of(base_model).data
        found: dict[str, Any] = {field: inherited.get(field) for field in ("license", "license_name", "license_link")}
    except Exception as error:  # noqa: BLE001  (the network, files and strangers' YAML raise many kinds)
        raise ValueError(
            f"The license is missing, and the card of {base_model!a} cannot be read ({type(error).__name__}). "
            "Give one such as license='apache-2.0'."
        ) from None
    if not isinstance(found["license"], str):
        raise ValueError(  # noqa: TRY004  (the caller's license is missing, which is no matter of types)
            f"The license is missing, and the card of {base_model!a} names none. "
            "Give one such as license='apache-2.0'."
        )
    checked_license(found["license"])
    return {field: escape.line(value) for field, value in found.items() if value is not None}


def _card_of(base_model: str) -> ModelCard:
    folder = Path(base_model)
    return ModelCard.load(folder / "README.md" if folder.is_dir() else base_model)


def eval_results(rows: Sequence[Place], qualities: Sequence[Place]) -> list[EvalResult]:
    """Return the entries of the Hub's model-index: first the scores, then the speeds.

    Args:
        rows: the Jacobi decoders whose speed is shown.
        qualities: the measurements with a score.
    """
    found = []
    for place in qualities:
        quality = place.measurement.quality
        if quality is not None and math.isfinite(quality.value):
            found.append(_result("Quality", place, escape.line(quality.metric), quality.value))
    for place in rows:
        for name in ("tokens_per_forward", "tokens_per_second"):
            value = getattr(place.measurement, name)
            if value and math.isfinite(value):
                found.append(_result("Decoding speed", place, name, value))
    return found


def _result(task: str, place: Place, metric: str, value: float) -> EvalResult:
    domain = escape.line(place.domain)
    source = escape.line(place.measurement.prompts.source)
    decoder = escape.line(place.measurement.decoder.name)
    return EvalResult(
        task_type="text-generation",
        task_name=task,
        dataset_type=domain or "prompts",
        dataset_name=f"{domain}, {source}",
        dataset_config=f"{task}, {decoder}, {place.document.name}",
        metric_type=metric or "score",
        metric_name=f"{metric}, {decoder}",
        metric_value=value,
    )
