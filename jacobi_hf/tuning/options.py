"""The shapes among which a controller chooses, and what a step brought a row. Plain Python on the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A shape that a step may have; all zero is one slot alone.

    Attributes:
        backbone: guesses of the backbone that are verified.
        draft_slots: with a drafter, guesses of the backbone that also go into draft slots.
        lookup: most guesses of the lookup branch.
        others: whether the other branches are sent: those of the pool, and top-k.
    """

    backbone: int = 0
    draft_slots: int = 0
    lookup: int = 0
    others: bool = False


@dataclass(frozen=True)
class RowOutcome:
    """What one step brought one unfinished row.

    Attributes:
        tokens: tokens committed.
        total: new tokens of the row after the step.
        order: length of the n-gram that the lookup had matched for this step; 0 without a match.
        lookup: guesses of the lookup branch that were sent, and how many were accepted, whether or not it won.
        backbone: the same for the backbone.
        others: the same for the best of the other branches.
    """

    tokens: int
    total: int
    order: int = 0
    lookup: tuple[int, int] = (0, 0)
    backbone: tuple[int, int] = (0, 0)
    others: tuple[int, int] = (0, 0)


def options_for(width: int, lookup: int, *, draft_slots: bool, others: bool, few: bool) -> tuple[Option, ...]:
    """Return the options of a setting, without duplicates; the first is one slot alone.

    Args:
        width: most guesses of the backbone; 0 without one.
        lookup: most guesses of the lookup branch; 0 without one.
        draft_slots: whether the backbone is that of a drafter with draft slots.
        others: whether there are other branches.
        few: at most six options, for steps that are compiled or captured one by one.
    """
    widths = [max(1, width // share) for share in (8, 4, 2, 1)] if width else []
    pairs = [*zip(widths, [*widths[1:], width], strict=False)] if draft_slots else [(each, 0) for each in widths]
    lengths = dict.fromkeys((0, lookup) if few else (0, lookup // 2, lookup))
    found = [Option(lookup=length) for length in lengths]
    if others and not pairs:
        found += [Option(lookup=length, others=True) for length in (0, lookup)]
    if few:
        found += [Option(*pair) for pair in pairs[1:2]]
        found += [Option(*pair, lookup=lookup) for pair in pairs[2:3]]
        found += [Option(*pair, lookup=lookup, others=others) for pair in pairs[-1:]]
    else:
        branches = ((0, False), (lookup, False), (lookup, others))
        found += [Option(*pair, lookup=length, others=other) for pair in pairs for length, other in branches]
    return tuple(dict.fromkeys(found))
