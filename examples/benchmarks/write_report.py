"""Write the pages of docs/results from the JSON documents under examples/benchmarks/results.

    python examples/benchmarks/write_report.py

Every figure of the pages is read from a document. A test fails when pages and documents differ.
"""

from __future__ import annotations

from pathlib import Path

from report import pages

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/results/{name}")


if __name__ == "__main__":
    main()
