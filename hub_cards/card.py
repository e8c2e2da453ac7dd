"""The card of a model or drafter: every number from a document of results, every string from outside as data."""

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
    """The card of a repository, from documents of results.

    Args:
        results: files or documents; none gives a card that says that nothing was measured. The first one that has `training` of the most
            stages gives the recipe.
        repo_id: of the repository.
        base_model: that was trained, or that a drafter is for: its repository, or a folder.
        license: inherited from the base's card when not given.
        language: codes, such as "en".
        datasets: names of Hub datasets that were trained on.
        drafter: the repository holds a drafter, which needs `base_model`.
        adapter: the repository holds a LoRA adapter of PEFT.
        measured_as: what documents that hold several models call this one.
        base_measured_as: what they call its base, whose quality is then shown beside it.
        decoders: names of the Jacobi decoders to show; None shows all of them.
        prompt: in the examples of use.

    Raises:
        OSError: a file that cannot be read.
        ValueError: see the arguments; documents with unknown or missing fields, which are named.
    """
    check_repo_id(repo_id)
    if drafter and base_model is None:
        raise ValueError(
            "base_model is missing: a drafter works beside the model that it was made for, and the card has to name it."
        )
    documents, selection = (
        read_documents(results),
        _selection(measured_as, base_measured_as, decoders, drafter=drafter),
    )
    mine = places(documents, selection.names)
    data = model_metadata(
        repo_id=repo_id,
        base_model=base_model,
        license=license,
        language=language,
        datasets=datasets,
        relation="adapter" if drafter or adapter else "finetune",
        eval_results=eval_results(rows_of(mine, selection), [place for place in mine if place.it.quality]),
    )
    body = render(
        "drafter.md.jinja" if drafter else "model.md.jinja",
        title=escape.text(repo_id.rpartition("/")[2]),
        name=_python(repo_id),
        base=None if base_model is None else _link(base_model),
        base_name=_python(base_model or ""),
        adapter=adapter,
        dtype=_dtype(documents, selection),
        prompt=_python(prompt),
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
    """The cells of the card that `generate_model_card` makes of the same arguments, in the order of the card."""
    documents, selection = (
        read_documents(results),
        _selection(measured_as, base_measured_as, decoders, drafter=drafter),
    )
    said = [cell for _, in_sentence in highlights(documents, selection) for cell in in_sentence]
    return [*said, *recipe(documents), *benchmark(documents, selection), *setting(documents)]


def render(template: str, **values: Any) -> str:
    """A template of the package, in Jinja's sandbox. Values are put in as they are: they have been escaped."""
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


def _python(value: str) -> str:
    """A string as it is written in an example: on one line, whatever it holds."""
    return (json.dumps(value) if value.isascii() else ascii(value)).replace(
        "`", r"\x60"
    )  # three of them would end the example


def _link(name: str) -> str:
    return f"[{escape.text(name)}](https://huggingface.co/{name})" if is_repo_id(name) else escape.path(name)


def _dtype(documents: Sequence[Document], selection: Selection) -> str | None:
    """In which texts were found identical to those of ordinary decoding."""
    compared = [place for place in rows_of(places(documents, selection.names), selection) if place.it.agreement]
    dtypes = [
        place.document.results.dtype
        for place in compared
        if place.document.results.dtype in ("float32", "bfloat16", "float16")
    ]
    return "float32" if "float32" in dtypes else next(iter(dtypes), None)
