"""The card of a model or drafter.

Every number comes from a document of results, and every string from outside is escaped.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from jinja2 import FunctionLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jacobi_hf._version import __version__
from jacobi_hf.hub_cards import escape
from jacobi_hf.hub_cards.benchmark import Selection, benchmark, highlights, places, rows_of, setting
from jacobi_hf.hub_cards.cells import Cell, Document, read_documents
from jacobi_hf.hub_cards.metadata import check_repo_id, eval_results, is_repo_id, model_metadata
from jacobi_hf.hub_cards.recipe import recipe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from jacobi_hf.results.schema import Results

    Source = Sequence[str | Path | Results] | str | Path | Results

WHOLE = "---\n{{ card_data }}\n---\n\n{{ body }}\n"


def generate_model_card(
    results: Source,
    *,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    datasets: Iterable[str] = (),
    drafter: bool = False,
    adapter: bool = False,
    measured_as: str | Collection[str] | None = None,
    base_measured_as: str | Collection[str] = (),
    decoders: Collection[str] | None = None,
    prompt: str = "def quicksort(items):",
) -> ModelCard:
    """Return the card of a repository, written from documents of results.

    Args:
        results: documents of results or their files. Without any, the card says that nothing was measured. The recipe
            comes from the document with the most stages of training.
        repo_id: the repository, "user/name".
        base_model: the model that was trained, or that a drafter is for: its Hub repository or a folder.
        license: the license; None takes that of the base model's card.
        language: codes of languages, such as "en".
        datasets: names of the Hub datasets of the training.
        drafter: whether the repository holds a drafter. It needs `base_model`.
        adapter: whether the repository holds a LoRA adapter of PEFT.
        measured_as: the model's name in documents that hold several models.
        base_measured_as: the base model's name in the documents. Its quality is then shown for comparison.
        decoders: the names of the Jacobi decoders to show; None shows all.
        prompt: the prompt of the card's examples.

    Returns:
        The card with its metadata.

    Raises:
        OSError: a file cannot be read.
        ValueError: an argument is wrong, or a document has unknown or missing fields. The message names them.
    """
    check_repo_id(repo_id)
    if drafter and base_model is None:
        raise ValueError(
            "base_model is missing. A drafter works only with the model that it was trained for. Name that model."
        )
    documents = read_documents(results)
    selection = _selection(measured_as, base_measured_as, decoders, drafter=drafter)
    mine = places(documents, selection.names)
    data = model_metadata(
        repo_id=repo_id,
        base_model=base_model,
        license=license,
        language=language,
        datasets=datasets,
        relation="adapter" if drafter or adapter else "finetune",
        eval_results=eval_results(rows_of(mine, selection), [place for place in mine if place.measurement.quality]),
    )
    body = render(
        "drafter.md.jinja" if drafter else "model.md.jinja",
        title=escape.text(repo_id.rpartition("/")[2]),
        name=_python_string(repo_id),
        base=None if base_model is None else _link(base_model),
        base_name=_python_string(base_model or ""),
        adapter=adapter,
        dtype=_dtype(documents, selection),
        prompt=_python_string(prompt),
        license=escape.text(data.license),
        version=escape.text(__version__),
        highlights=[sentence for sentence, _ in highlights(documents, selection)],
        recipe=str(recipe(documents)),
        benchmark=str(benchmark(documents, selection)),
        setting=str(setting(documents)),
    )
    return ModelCard.from_template(data, template_str=WHOLE, body=body)


def model_card_cells(
    results: Source,
    *,
    measured_as: str | Collection[str] | None = None,
    base_measured_as: str | Collection[str] = (),
    decoders: Collection[str] | None = None,
    drafter: bool = False,
) -> list[Cell]:
    """Return the cells of the card that `generate_model_card` writes for the same arguments, in the order of the card.

    Args:
        results: as of `generate_model_card`, like all arguments.

    Raises:
        OSError, ValueError: as `generate_model_card`.
    """
    documents = read_documents(results)
    selection = _selection(measured_as, base_measured_as, decoders, drafter=drafter)
    in_highlights = [cell for _, cells in highlights(documents, selection) for cell in cells]
    return [*in_highlights, *recipe(documents), *benchmark(documents, selection), *setting(documents)]


def render(template: str, **values: Any) -> str:
    """Return a template of the package with these values, which must be escaped already."""
    return _environment().get_template(template).render(**values).strip()


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        loader=FunctionLoader(_template),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def _template(name: str) -> str:
    return resources.files("jacobi_hf.hub_cards").joinpath("templates", name).read_text(encoding="utf-8")


def _selection(
    measured_as: str | Collection[str] | None,
    base: str | Collection[str],
    decoders: Collection[str] | None,
    *,
    drafter: bool,
) -> Selection:
    names = (measured_as,) if isinstance(measured_as, str) else measured_as
    return Selection(names, (base,) if isinstance(base, str) else base, decoders, drafter)


def _python_string(value: str) -> str:
    """Return a string as a Python literal on one line."""
    literal = json.dumps(value) if value.isascii() else ascii(value)
    return literal.replace("`", r"\x60")  # three backticks would end the example in the card


def _link(name: str) -> str:
    return f"[{escape.text(name)}](https://huggingface.co/{name})" if is_repo_id(name) else escape.path(name)


def _dtype(documents: Sequence[Document], selection: Selection) -> str | None:
    """Return the dtype in which texts were compared with ordinary decoding; float32 if that is among several."""
    rows = rows_of(places(documents, selection.names), selection)
    compared = [place.document.results.dtype for place in rows if place.measurement.agreement]
    dtypes = [dtype for dtype in compared if dtype in ("float32", "bfloat16", "float16")]
    return "float32" if "float32" in dtypes else next(iter(dtypes), None)
