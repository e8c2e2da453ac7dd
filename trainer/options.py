"""Fields of the argument dataclasses, checks of their values, and the new names of renamed options."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

# By verb: the new name of each option that was renamed, so that an old recipe ends in an error that says what to
# write.
RENAMED = {
    "pack": {"window": "noise_levels"},
    "train": {
        "window": "context_window",
        "gated_width": "window_width",
        "gated_windows": "windows_per_text",
        "gated_visits": "steps_per_window",
        "gated_decay": "position_decay",
        "gated_targets": "targets",
        "gated_constant_draft": "constant_draft",
    },
}


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


def check_choice(args: Any, name: str, allowed: Collection[str]) -> None:
    """Raise a ValueError unless the argument has one of the allowed values."""
    value = getattr(args, name)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")


def check_at_least(args: Any, least: float, *names: str) -> None:
    """Raise a ValueError that names the first argument below a bound; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            bound = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={value} {bound}.")
