"""Which draft sources there are, and which of them take part in a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacobi_hf.drafts.base import DraftSource
from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.drafts.lora_source import LoraDraftSource
from jacobi_hf.drafts.ngram_pool import NgramPool
from jacobi_hf.drafts.topk import TopKBranches
from jacobi_hf.drafts.window import JacobiWindow

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.step import StepShape

# In this order: the first backbone that a call can use is its backbone, and branches keep the order of their sources.
SOURCES: list[type[DraftSource]] = [LoraDraftSource, JacobiWindow, NgramLookup, NgramPool, TopKBranches]


class Sources:
    """The draft sources of a call and their sizes, known on the host before any tensor exists.

    Args:
        sources: at most one backbone, and any number of sources with branches.

    Attributes:
        backbone: the source of the backbone; None for a call with branches alone.
        branching: the sources with branches.
        width: W, the most guesses of the backbone.
        draft_slots: draft slots of the backbone in a forward.
        taps: decoder layers whose outputs some source reads, in ascending order.
        ranks: how many of the best tokens at each slot some source reads.
        branch_lengths, branch_starts, branch_names: of each branch, its most tokens, the backbone guesses that it
            follows, and the name of its source.
        branches_read_text_alone: for each branch, whether its source reads nothing but the text.
    """

    def __init__(self, sources: list[DraftSource]) -> None:
        backbones = [source for source in sources if source.shape.is_backbone]
        self.backbone = backbones[0] if backbones else None
        self.branching = [source for source in sources if not source.shape.is_backbone]
        self.width = self.backbone.shape.lengths[0] if self.backbone else 0
        self.draft_slots = self.backbone.shape.draft_slots if self.backbone else 0
        self.taps = tuple(sorted({tap for source in self.all for tap in source.shape.taps}))
        self.ranks = max((source.shape.ranks for source in self.all), default=0)
        self.branch_lengths = tuple(length for source in self.branching for length in source.shape.lengths)
        self.branch_starts = tuple(start for source in self.branching for start in source.shape.segment_starts)
        self.branch_names = tuple(source.name for source in self.branching for _ in source.shape.lengths)
        self.branches_read_text_alone = [
            source.reads_text_alone for source in self.branching for _ in source.shape.lengths
        ]

    @property
    def all(self) -> list[DraftSource]:
        """The backbone's source, then the others."""
        return [*([self.backbone] if self.backbone else []), *self.branching]

    def names(self, branches: tuple[int, ...]) -> list[str]:
        """Return the name of the source of each verified segment of a step, the backbone first.

        Args:
            branches: guesses of each branch in the step.
        """
        backbone = "" if self.backbone is None else self.backbone.name
        return [backbone, *(name for name, used in zip(self.branch_names, branches, strict=True) if used)]

    def label(self, shape: StepShape) -> str:
        """Return a shape in words, as statistics show it: "1" for one slot alone, or "window 16 + lookup 8 + pool"."""
        parts = []
        if shape.backbone and self.backbone is not None:
            parts.append(f"{self.backbone.name} {shape.backbone}")
        used = dict.fromkeys(self.names(shape.branches)[1:])
        lookups = [length for name, length in zip(self.branch_names, shape.branches, strict=True) if name == "lookup"]
        parts += [f"{name} {lookups[0]}" if name == "lookup" else name for name in used]
        return " + ".join(parts) or "1"

    @property
    def observe_every_step(self) -> bool:
        """Whether a source must observe every step: it has a state that follows the text, or it cannot restart."""
        if self.backbone is not None and type(self.backbone).restart is DraftSource.restart:
            return True
        return any(source.shape.taps or source.shape.cache_ahead for source in self.all)

    @property
    def any_reads_text_alone(self) -> bool:
        """Whether a source on the device proposes in every step, because it reads nothing but the text."""
        return any(source.reads_text_alone and not source.is_on_host for source in self.branching)

    @property
    def depths(self) -> int:
        """D, the most tokens that one step can commit."""
        branches = zip(self.branch_starts, self.branch_lengths, strict=True)
        return 1 + max([self.width, *(start + length for start, length in branches)])

    def slots(self, limit: int | None = None) -> int:
        """Return the most slots of one forward, of a call that generates at most `limit` tokens."""
        lengths = [self.width, self.draft_slots, *self.branch_lengths]
        return 1 + sum(length if limit is None else min(length, limit) for length in lengths)


def sources_of(config: JacobiConfig, model: Any) -> Sources:
    """Return the sources of a call with these knobs and this model; their buffers are not allocated."""
    chosen: list[DraftSource] = []
    for source_class in SOURCES:
        source = source_class.for_call(config, model)
        has_backbone = any(other.shape.is_backbone for other in chosen)
        if source is not None and not (has_backbone and source.shape.is_backbone):
            chosen.append(source)
    return Sources(chosen)
