"""The tables and sentences of a card that show what was measured."""

from __future__ import annotations

from collections.abc import Collection  # noqa: TC003 (a field of a dataclass)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jacobi_hf.hub_cards import escape
from jacobi_hf.hub_cards.cells import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jacobi_hf.hub_cards.cells import Cell, Document
    from jacobi_hf.results.schema import Measurement

    Row = list[Cell | str | None]

_HEAD = (
    "domain",
    "decoding",
    "prompts x new tokens",
    "quality: base model",
    "quality: ordinary",
    "quality: Jacobi",
    "tokens/s: ordinary",
    "tokens/s: Jacobi",
    "speed-up (eager)",
    "speed-up (compiled)",
    "tokens per forward",
    "mean acceptance length",
    "identical texts",
)
_LABELS = 3  # columns that name a row
# Heading of the row, format, path in the document.
_SETTING = (
    ("measurement", "text", "what"),
    ("parameters", "million", "parameters"),
    ("dtype", "text", "dtype"),
    ("hardware", "hardware", "hardware"),
    ("threads", "integer", "threads"),
    ("attention", "text", "attention"),
    ("versions", "packages", "software", "packages"),
    ("git revision of jacobi-hf", "text", "software", "git_revision"),
    ("date", "day", "created"),
    ("command", "code", "command"),
)
_EAGER = "generate"
_COMPILED = "generate-static-compiled"


@dataclass(frozen=True)
class Selection:
    """Which measurements of the documents belong on a card.

    Attributes:
        names: what the documents call the model; None if each holds one model alone.
        base_names: what the documents call its base model.
        decoders: the names of the decoders to show; None shows every Jacobi decoder.
        drafter: whether the card is a drafter's. Then measurements with a drafter count, otherwise those without.
    """

    names: Collection[str] | None = None
    base_names: Collection[str] = ()
    decoders: Collection[str] | None = None
    drafter: bool = False

    def shows(self, measurement: Measurement) -> bool:
        """Return whether a measurement has its own row in the table."""
        decoder = measurement.decoder
        is_named = self.decoders is None or decoder.name in self.decoders
        return is_named and decoder.kind.startswith("jacobi") and (decoder.drafter is not None) == self.drafter


@dataclass(frozen=True)
class Place:
    """A measurement and its place in a document, for cells that refer to it.

    Attributes:
        document: the document.
        index: the index of the measurement in it.
    """

    document: Document
    index: int

    @property
    def measurement(self) -> Measurement:
        """The measurement itself."""
        return self.document.results.measurements[self.index]

    @property
    def domain(self) -> str:
        """The domain of its prompts."""
        return self.measurement.prompts.domain

    @property
    def kind(self) -> str:
        """The kind of its decoder."""
        return self.measurement.decoder.kind

    @property
    def model(self) -> str:
        """The name of the measured model."""
        return self.measurement.model or self.document.results.model

    def cell(self, format: str, *path: str | int) -> Cell | None:  # noqa: A002 (as in `Cell`)
        """Return the cell of one value of the measurement, or None where nothing was measured."""
        return self.document.cell(format, "measurements", self.index, *path)

    def quality(self) -> Cell | None:
        """Return the score, or else the held-out loss."""
        return self.cell("quality", "quality") or self.cell("loss", "held_out_loss")

    def speedup(self, baseline: str) -> Cell | None:
        """Return the speed-up over a kind of decoder, such as "generate"."""
        kinds = self._kinds()
        found = [at for at, one in enumerate(self.measurement.speedups) if kinds.get(one.baseline) == baseline]
        return self.cell("factor", "speedups", found[0], "factor") if found else None

    def best_factor(self, baseline: str) -> float:
        """Return the largest speed-up over a kind of decoder, or 0 if there is none."""
        kinds = self._kinds()
        return max((one.factor for one in self.measurement.speedups if kinds.get(one.baseline) == baseline), default=0)

    def _kinds(self) -> dict[str, str]:
        """Return the kinds of the document's decoders by their names."""
        return {one.decoder.name: one.decoder.kind for one in self.document.results.measurements}


def places(documents: Sequence[Document], names: Collection[str] | None) -> list[Place]:
    """Return the measurements of a model, in the order of the documents.

    Args:
        documents: the documents of results.
        names: what they call the model; None takes everything.

    Raises:
        ValueError: no measurement has one of the names; or a document holds several models and `names` is None.
    """
    found = [Place(document, index) for document in documents for index in range(len(document.results.measurements))]
    if names is not None:
        mine = [place for place in found if place.model in names]
        if found and not mine:
            asked = ", ".join(map(repr, names))
            raise ValueError(f"No measurement is of {asked}. The documents hold {_models(found)}.")
        return mine
    for document in documents:
        here = [place for place in found if place.document is document]
        if len({place.model for place in here}) > 1:
            raise ValueError(
                f"{document.name} holds several models: {_models(here)}. Choose the card's with `measured_as`."
            )
    return found


def rows_of(found: Sequence[Place], selection: Selection) -> list[Place]:
    """Return the measurements of Jacobi decoders that a card shows, grouped by domain."""
    mine = [place for place in found if selection.shows(place.measurement)]
    domains = list(dict.fromkeys(place.domain for place in mine))
    return sorted(mine, key=lambda place: domains.index(place.domain))


def benchmark(documents: Sequence[Document], selection: Selection) -> Table:
    """Return the table of what was measured.

    It has a row for each domain and Jacobi decoder. A domain without Jacobi decoder has one row with its quality.
    """
    found = places(documents, selection.names)
    base = places(documents, selection.base_names) if selection.base_names else []
    jacobi = rows_of(found, selection)
    rows = [_row(place, found, base) for place in jacobi]
    shown = {place.domain for place in jacobi}
    for place in found:
        if place.domain not in shown and place.kind == _EAGER and place.quality():
            shown.add(place.domain)
            rows.append(_quality_row(place, base))
    return Table(_HEAD, rows, labels=_LABELS, numbers=True)


def _row(place: Place, found: Sequence[Place], base: Sequence[Place]) -> Row:
    """Return the row of a Jacobi decoder beside ordinary decoding."""
    ordinary = _ordinary_beside(place, found)
    return [
        place.cell("text", "prompts", "domain"),
        place.cell("decoder", "decoder"),
        place.cell("prompts", "prompts"),
        _quality_of(base, place),
        _quality_of(found, place),
        place.quality() or _quality_of(found, place, place.measurement.decoder.name),
        ordinary.cell("whole", "tokens_per_second") if ordinary else None,
        place.cell("whole", "tokens_per_second"),
        place.speedup(_EAGER),
        place.speedup(_COMPILED),
        place.cell("two", "tokens_per_forward"),
        # Documents without it were measured with windows. Each step has guesses then: the mean is that of all steps.
        place.cell("two", "mean_acceptance_length") or place.cell("mean length", "accepted_lengths"),
        place.cell("identical", "agreement"),
    ]


def _quality_row(place: Place, base: Sequence[Place]) -> Row:
    """Return the row of a domain for which only the quality of ordinary decoding is known."""
    labels = [place.cell("text", "prompts", "domain"), place.cell("decoder", "decoder"), None]
    qualities = [_quality_of(base, place), place.quality()]
    return [*labels, *qualities, *[None] * (len(_HEAD) - len(labels) - len(qualities))]


def _ordinary_beside(place: Place, found: Sequence[Place]) -> Place | None:
    """Return ordinary decoding of the same prompts in the same document; compiled, if the decoder is."""
    kind = _COMPILED if place.measurement.decoder.compiled else _EAGER
    for one in found:
        is_same_model = one.document is place.document and one.model == place.model
        if is_same_model and one.kind == kind and one.measurement.prompts == place.measurement.prompts:
            return one
    return None


def _quality_of(found: Sequence[Place], place: Place, decoder: str | None = None) -> Cell | None:
    """Return the quality that was measured for a place's domain, scores before losses.

    Args:
        found: where to look; a measurement of the place's own document comes first.
        place: the place.
        decoder: the name of the decoder that was measured; None is ordinary decoding.
    """
    mine = [one for one in found if one.domain == place.domain and _is_decoder(one, decoder)]
    mine.sort(key=lambda one: one.document is not place.document)
    return next(_qualities(mine), None)


def _is_decoder(place: Place, name: str | None) -> bool:
    return place.kind == _EAGER if name is None else place.measurement.decoder.name == name


def _qualities(mine: Sequence[Place]) -> Iterator[Cell]:
    """Yield the scores, then the held-out losses."""
    for shown, field in (("quality", "quality"), ("loss", "held_out_loss")):
        yield from (cell for one in mine if (cell := one.cell(shown, field)))


def highlights(documents: Sequence[Document], selection: Selection) -> list[tuple[str, list[Cell]]]:
    """Return a sentence about the fastest decoder of each domain, and the cells in the sentence."""
    by_domain: dict[str, list[Place]] = {}
    for place in rows_of(places(documents, selection.names), selection):
        by_domain.setdefault(place.domain, []).append(place)
    found = [_highlight(domain, mine) for domain, mine in by_domain.items()]
    return [(sentence, cells) for sentence, cells in found if cells]


def _highlight(domain: str, mine: Sequence[Place]) -> tuple[str, list[Cell]]:
    eager = max(mine, key=lambda place: (place.best_factor(_EAGER), place.measurement.tokens_per_forward or 0))
    compiled = max(mine, key=lambda place: place.best_factor(_COMPILED))
    parts = [
        (eager.cell("two", "tokens_per_forward"), "tokens per forward"),
        (eager.speedup(_EAGER), "the speed of eager `generate`"),
        (compiled.speedup(_COMPILED), "the speed of compiled `generate`"),
        (eager.cell("identical", "agreement"), "texts identical to ordinary decoding"),
    ]
    shown = [(cell, words) for cell, words in parts if cell]
    sentence = f"**{escape.text(domain)}**: {', '.join(f'{cell} {words}' for cell, words in shown)}."
    return sentence, [cell for cell, _ in shown]


def setting(documents: Sequence[Document]) -> Table:
    """Return the table of where and how each document was measured: one column for each."""
    head = ["", *(escape.code(f"results/{one.name}") for one in documents)]
    return Table(head, [[name, *(one.cell(shown, *path) for one in documents)] for name, shown, *path in _SETTING])


def _models(found: Sequence[Place]) -> str:
    return ", ".join(map(repr, dict.fromkeys(place.model for place in found)))
