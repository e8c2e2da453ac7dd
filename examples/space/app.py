"""A Space with the page of `jacobi-hf demo --web`; README.md lists the folders that it needs beside this file.

In a clone of the repository it shows the tiny checkpoint:

    python examples/space/app.py
"""

from __future__ import annotations

import os
from pathlib import Path

from jacobi_hf.demo import page
from jacobi_hf.demo.race import Lane

HERE = Path(__file__).resolve().parent
PROMPT = "    def __repr__(self):\n        info = ['StreamReader']\n"


def compared() -> list[Lane]:
    """Return the lanes of the model to show.

    The model is named by the variables MODEL and DRAFTER of the Space. Without them it is in the folders beside this
    file, and in a clone of the repository it is the tiny checkpoint.
    """
    if model := os.environ.get("MODEL"):
        return page.lanes(model, os.environ.get("DRAFTER"))
    if (HERE / "checkpoint").is_dir():
        return page.lanes(str(HERE / "checkpoint"), str(HERE / "drafter"), "float32")
    return page.lanes()


if __name__ == "__main__":
    page.build(page.Page(compared()), PROMPT).launch(**page.look())
