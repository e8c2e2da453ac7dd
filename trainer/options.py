"""Fields of the argument dataclasses, and the new names of renamed ones."""

from dataclasses import field
from typing import Any

# By verb: the new name of each option that was renamed, so that an old recipe ends in an error that says what to write.
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
