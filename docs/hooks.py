"""Hooks of mkdocs: the source that mkdocstrings reads, pages outside of `docs`, and links that leave `docs`."""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The default of a knob, which is shown as a number.
KNOB = re.compile(r"= _knob\(\s*([\d.]+),.*?\)$", re.DOTALL | re.MULTILINE)
# A parameter in a group of parameters, which is shown as an item of a list.
ARGUMENT = re.compile(r"^( {8})([a-z_, ]+): ", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s#]+)([^)]*)\)")


def on_startup(**_: Any) -> None:
    """Copy the package for mkdocstrings, because defaults and parameters are rewritten for the reader."""
    target = ROOT / "build" / "docs" / "jacobi_hf"
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(ROOT / "jacobi_hf", target, ignore=shutil.ignore_patterns("__pycache__"))
    config = target / "config.py"
    config.write_text(KNOB.sub(r"= \1", config.read_text(encoding="utf-8")), encoding="utf-8")
    for method in ("forcing", "drafter"):
        arguments = target / "trainer" / method / "config.py"
        # The module's docstring comes first, then that of the class.
        *opening, docstring, rest = arguments.read_text(encoding="utf-8").split('"""', 4)
        arguments.write_text('"""'.join([*opening, ARGUMENT.sub(r"\1- **\2**: ", docstring), rest]), encoding="utf-8")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie at the root of the repository."""
    for source, name in PAGES.items():
        files.append(
            File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8").replace("](docs/", "]("))
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that leave `docs`: by the page of the site if there is one, else by the name of the file."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def named(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        text = link[1].strip("`")
        if path in PAGES:
            return (
                f"[{link[1]}]({posixpath.relpath(PAGES[path], posixpath.dirname(page.file.src_uri) or '.')}{link[3]})"
            )
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if path.endswith(text) else f"{link[1]} (`{path}`)"

    return LINK.sub(named, markdown)
