"""Run the examples of cards as a reader does: first without jacobi_hf, then with it.

    python reader.py FOLDER_OF_THE_PACKAGE REPOSITORY ...

`HF_ENDPOINT` names the Hub. The last line is JSON: what each example printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from without import Without

torch.set_num_threads(1)


def examples(repo_id: str) -> list[str]:
    """Return the Python examples of a card."""
    text = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "card", "exec"), {"__name__": "__main__"})
    return out.getvalue()


package, *repositories = sys.argv[1:]
seen: dict[str, dict[str, list[str]]] = {}
finders = sys.meta_path[:]
sys.meta_path[:] = map(Without, finders)
assert importlib.util.find_spec("jacobi_hf") is None
for name in repositories:
    seen[name] = {"without": [printed(code) for code in examples(name) if "import jacobi_hf" not in code]}
assert not any(module.partition(".")[0] == "jacobi_hf" for module in sys.modules)
sys.meta_path[:] = finders
sys.path.insert(0, package)
for name in repositories:
    seen[name]["with"] = [printed(code) for code in examples(name) if "import jacobi_hf" in code]
sys.stdout.write("\n" + json.dumps(seen) + "\n")
