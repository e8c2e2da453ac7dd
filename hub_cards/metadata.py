"""The metadata of a card: what the Hub filters by, all of it checked before it becomes YAML."""

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
    """The id as it is.

    Raises:
        ValueError: it is none that the Hub would take.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"repo_id={repo_id!a} is no name of a Hub repository: write user/name, of letters, digits, '-', '_' and '.'."
        ) from None
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w./-]+", repo_id, re.ASCII) or "\n" in repo_id:
        raise ValueError(f"repo_id={repo_id!a} is no name of a Hub repository.")
    return repo_id


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name; a local folder's path is none."""
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
    """What stands on top of a model's card.

    Raises:
        ValueError: no license is given and the base's card has none that can be read; a license or language that is none.
    """
    data = ModelCardData(
        **_license(license, base_model),
        language=checked_language(language),
        base_model=base_model if base_model is not None and is_repo_id(base_model) else None,
        base_model_relation=relation if base_model is not None and is_repo_id(base_model) else None,
        datasets=[name for name in dict.fromkeys(datasets) if is_repo_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )
    if eval_results:
        data.model_name, data.eval_results = repo_id.rpartition("/")[2], eval_results
    return data


def checked_license(name: str) -> str:
    """The license as it is.

    Raises:
        ValueError: it is no identifier of a license.
    """
    if not isinstance(name, str) or not _LICENSE.fullmatch(name):
        raise ValueError(
            f"license={name!a} is no identifier of a license as the Hub has them, such as 'apache-2.0' or 'other'."
        )
    return name


def checked_language(language: str | Iterable[str] | None) -> list[str] | None:
    """Languages as a list.

    Raises:
        ValueError: a code that is none.
    """
    given = [language] if isinstance(language, str) else list(language or ())
    if wrong := [one for one in given if not isinstance(one, str) or not _LANGUAGE.fullmatch(one)]:
        raise ValueError(f"language={wrong[0]!a} is no code of a language, such as 'en'.")
    return given or None


def _license(given: str | None, base_model: str | None) -> dict[str, Any]:
    """As given, or that of the base."""
    if given is not None:
        return {"license": checked_license(given)}
    if base_model is None:
        raise ValueError(
            "license is missing: give one, such as license='apache-2.0', or base_model, whose card says it."
        )
    try:
        inherited = _card_of(base_model).data
        found: dict[str, Any] = {field: inherited.get(field) for field in ("license", "license_name", "license_link")}
    except Exception as error:  # noqa: BLE001  (whatever the network, a file or a stranger's YAML may raise)
        raise ValueError(
            f"license is missing, and the card of {base_model!a} cannot be read ({type(error).__name__}): give one, such as "
            "license='apache-2.0'."
        ) from None
    if not isinstance(found["license"], str):
        raise ValueError(  # noqa: TRY004  (what is missing is the caller's license)
            f"license is missing, and the card of {base_model!a} does not say one: give it, such as license='apache-2.0'."
        )
    checked_license(found["license"])
    return {field: escape.line(value) for field, value in found.items() if value is not None}


def _card_of(base_model: str) -> ModelCard:
    folder = Path(base_model)
    return ModelCard.load(folder / "README.md" if folder.is_dir() else base_model)


def eval_results(rows: Sequence[Place], qualities: Sequence[Place]) -> list[EvalResult]:
    """The model-index: scores, and apart from them speed."""
    found = []
    for place in qualities:
        quality = place.it.quality
        if quality is not None and math.isfinite(quality.value):
            found.append(_result("Quality", place, escape.line(quality.metric), quality.value))
    for place in rows:
        speeds = {"tokens_per_forward": place.it.tokens_per_forward, "tokens_per_second": place.it.tokens_per_second}
        found += [
            _result("Decoding speed", place, name, value)
            for name, value in speeds.items()
            if value and math.isfinite(value)
        ]
    return found


def _result(task: str, place: Place, metric: str, value: float) -> EvalResult:
    domain, source, decoder = (
        escape.line(one) for one in (place.it.prompts.domain, place.it.prompts.source, place.it.decoder.name)
    )
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
