"""Where the trained checkpoint of the examples lies."""

from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_qwen3"
CHECKPOINT = EXAMPLE / "checkpoint"
