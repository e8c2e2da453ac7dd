"""Where the JSON documents of measured results are, and how they are read."""

from __future__ import annotations

from pathlib import Path

from jacobi_hf.results.schema import Results

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
TINY = BENCHMARKS.parent / "tiny_qwen3"
FORCING = "forcing"  # folder of the forced models and of the ablations
DRAFTERS = "drafter"  # folder of the drafters and of the controls


def document(name: str) -> Results:
    """Return the document `results/NAME.json`."""
    return Results.read(RESULTS / f"{name}.json")


def group(folder: str, prefix: str) -> dict[str, Results]:
    """Return the documents of a folder whose names start with a prefix, by name."""
    return {path.stem: Results.read(path) for path in sorted((RESULTS / folder).glob(f"{prefix}*.json"))}
