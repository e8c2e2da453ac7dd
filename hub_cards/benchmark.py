"""The tables of a card that say what was measured, and what they come to."""

from __future__ import annotations

from collections.abc import Collection  # noqa: TC003 (of a dataclass)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jacobi_hf.hub_cards import escape
from jacobi_hf.hub_cards.cells import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jacobi_hf.hub_cards.cells import Cell, Document
    from jacobi_hf.results.schema import Measurement

_HEAD = (
    "domain",
    "decoding",
    "prompts x tokens",
    "base quality",
    "AR quality",
    "Jacobi quality",
    "AR tok/s",
    "Jacobi tok/s",
    "speed-up, eager",
    "speed-up, compiled",
    "TPF",
    "acceptance",
    "identical",
)


@dataclass(frozen=True)
class Selection:
    """Which measurements are the model's.

    Attributes:
        names: what the documents call it; None where they hold one model alone.
        base_names: what they call its base.
        decoders: those that are shown, by name; None shows every Jacobi decoder.
        drafter: whether it is a drafter, so that what decoded with one counts; otherwise what decoded without.
    """

    names: Collection[str] | None = None
    base_names: Collection[str] = ()
    decoders: Collection[str] | None = None
    drafter: bool = False

    def shows(self, measurement: Measurement) -> bool:
        """Whether a measurement has a row of its own."""
        decoder = measurement.decoder
        named = self.decoders is None or decoder.name in self.decoders
        return named and decoder.kind.startswith("jacobi") and (decoder.drafter is not None) == self.drafter


@dataclass(frozen=True)
class Place:
    """A measurement and where it lies."""

    document: Document
    index: int

    @property
    def it(self) -> Measurement:
        """The measurement."""
        return self.document.results.measurements[self.index]

    @property
    def model(self) -> str:
        """The name of what was measured."""
        return self.it.model or self.document.results.model

    def cell(self, format: str, *path: str | int) -> Cell | None:  # noqa: A002
        """A cell of it."""
        return self.document.cell(format, "measurements", self.index, *path)

    def quality(self) -> Cell | None:
        """Score or loss."""
        return self.cell("quality", "quality") or self.cell("loss", "held_out_loss")

    def factor(self, *, compiled: bool) -> Cell | None:
        """Speed-up over ordinary decoding, eager or compiled."""
        wanted = "generate-static-compiled" if compiled else "generate"
        kinds = {m.decoder.name: m.decoder.kind for m in self.document.results.measurements}
        found = [at for at, speedup in enumerate(self.it.speedups) if kinds.get(speedup.baseline) == wanted]
        return self.cell("factor", "speedups", found[0], "factor") if found else None


def places(documents: Sequence[Document], names: Collection[str] | None) -> list[Place]:
    """The measurements of a model.

    Raises:
        ValueError: several models were measured, and `names` does not say which is meant; or none of that name was.
    """
    found = [Place(document, index) for document in documents for index in range(len(document.results.measurements))]
    if names is not None:
        mine = [place for place in found if place.model in names]
        if found and not mine:
            raise ValueError(f"no measurement is of {', '.join(map(repr, names))}; there are {_listed(found)}.")
        return mine
    for document in documents:
        here = [place for place in found if place.document is document]
        if len({place.model for place in here}) > 1:
            raise ValueError(
                f"{document.name} holds several models: say by measured_as which is the card's: {_listed(here)}."
            )
    return found


def _listed(found: Sequence[Place]) -> str:
    return ", ".join(map(repr, dict.fromkeys(place.model for place in found)))


def rows_of(found: Sequence[Place], selection: Selection) -> list[Place]:
    """Jacobi decoders with something measured, by domain in the order of the documents."""
    mine = [place for place in found if selection.shows(place.it)]
    domains = list(dict.fromkeys(place.it.prompts.domain for place in mine))
    return sorted(mine, key=lambda place: domains.index(place.it.prompts.domain))


def benchmark(documents: Sequence[Document], selection: Selection) -> Table:
    """A row a domain and Jacobi decoder; then a row a domain that has a quality and no such decoder."""
    found, base = places(documents, selection.names), []
    if selection.base_names:
        base = places(documents, selection.base_names)
    rows, shown = [], set()
    for place in rows_of(found, selection):
        shown.add(place.it.prompts.domain)
        rows.append(_row(place, found, base))
    for place in found:
        if place.it.prompts.domain not in shown and place.it.decoder.kind == "generate" and place.quality():
            shown.add(place.it.prompts.domain)
            label: list[Cell | str | None] = [
                place.cell("text", "prompts", "domain"),
                place.cell("decoder", "decoder"),
                None,
            ]
            qualities = [_quality_of(base, place), place.quality()]
            rows.append([*label, *qualities, *[None] * (len(_HEAD) - 5)])
    return Table(_HEAD, rows, labels=3, numbers=True)


def _row(place: Place, found: Sequence[Place], base: Sequence[Place]) -> list[Cell | str | None]:
    """One decoder beside ordinary decoding."""
    ordinary = "generate-static-compiled" if place.it.decoder.compiled else "generate"
    beside = [
        one
        for one in found
        if one.document is place.document
        and one.model == place.model
        and one.it.prompts == place.it.prompts
        and one.it.decoder.kind == ordinary
    ]
    return [
        place.cell("text", "prompts", "domain"),
        place.cell("decoder", "decoder"),
        place.cell("prompts", "prompts"),
        _quality_of(base, place),
        _quality_of(found, place),
        place.quality() or next(iter(_qualities(found, place, place.it.decoder.name)), None),
        beside[0].cell("whole", "tokens_per_second") if beside else None,
        place.cell("whole", "tokens_per_second"),
        place.factor(compiled=False),
        place.factor(compiled=True),
        place.cell("two", "tokens_per_forward"),
        place.cell("mean length", "accepted_lengths"),
        place.cell("identical", "agreement"),
    ]


def _qualities(found: Sequence[Place], place: Place, decoder: str | None) -> Iterator[Cell]:
    """Scores, then losses, of the place's domain: of a decoder by name, or of ordinary decoding."""
    same = [one for one in found if one.it.prompts.domain == place.it.prompts.domain]
    mine = [
        one
        for one in same
        if (one.it.decoder.kind == "generate" if decoder is None else one.it.decoder.name == decoder)
    ]
    mine.sort(key=lambda one: one.document is not place.document)
    for format, field in (("quality", "quality"), ("loss", "held_out_loss")):  # noqa: A001
        yield from (cell for one in mine if (cell := one.cell(format, field)))


def _quality_of(found: Sequence[Place], place: Place) -> Cell | None:
    return next(_qualities(found, place, None), None)


def highlights(documents: Sequence[Document], selection: Selection) -> list[tuple[str, list[Cell]]]:
    """For each domain what is fastest: a sentence, and the cells in it."""
    by_domain: dict[str, list[Place]] = {}
    for place in rows_of(places(documents, selection.names), selection):
        by_domain.setdefault(place.it.prompts.domain, []).append(place)
    sentences = []
    for domain, mine in by_domain.items():
        best = max(mine, key=lambda place: (_factor(place, "generate"), place.it.tokens_per_forward or 0))
        compiled = max(mine, key=lambda place: _factor(place, "generate-static-compiled"))
        parts = [
            (best.cell("two", "tokens_per_forward"), " tokens per forward"),
            (best.factor(compiled=False), " the speed of eager `generate`"),
            (compiled.factor(compiled=True), " the speed of compiled `generate`"),
            (best.cell("identical", "agreement"), " texts identical to ordinary decoding"),
        ]
        said = [(cell, words) for cell, words in parts if cell]
        if said:
            sentence = f"**{escape.text(domain)}**: " + ", ".join(f"{cell}{words}" for cell, words in said) + "."
            sentences.append((sentence, [cell for cell, _ in said]))
    return sentences


def _factor(place: Place, kind: str) -> float:
    kinds = {m.decoder.name: m.decoder.kind for m in place.document.results.measurements}
    return max((speedup.factor for speedup in place.it.speedups if kinds.get(speedup.baseline) == kind), default=0.0)


_SETTING = (
    ("what", "text", "what"),
    ("parameters", "million", "parameters"),
    ("dtype", "text", "dtype"),
    ("hardware", "hardware", "hardware"),
    ("threads", "integer", "threads"),
    ("attention", "text", "attention"),
    ("versions", "packages", "software", "packages"),
    ("revision of jacobi-hf", "text", "software", "git_revision"),
    ("day", "day", "created"),
    ("command", "code", "command"),
)


def setting(documents: Sequence[Document]) -> Table:
    """Where each document was measured, a column each."""
    head = ["", *(escape.code(f"results/{one.name}") for one in documents)]
    return Table(head, [[name, *(one.cell(how, *path) for one in documents)] for name, how, *path in _SETTING])
