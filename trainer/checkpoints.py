"""Checkpoints of a run: which one to resume from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def last_finished_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete `checkpoint-N` of a folder, or None if there is none.

    `Trainer` writes `trainer_state.json` last, so a checkpoint is complete if that file can be read.
    """
    finished = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            finished[int(folder.name.removeprefix("checkpoint-"))] = str(folder)
        except (ValueError, OSError):
            logger.warning("%s is not a complete checkpoint and is ignored.", folder)
    return finished[max(finished)] if finished else None
