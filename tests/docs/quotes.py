"""Code of the repository that pages quote: python -m tests.docs.quotes

A comment `<!-- from PATH -->` or `<!-- from PATH: NAME, NAME -->` before a block of Python says that the block is that
file, or those functions and classes of that file. This module writes such blocks anew. A test fails when one of them
is stale.
"""

from __future__ import annotations

import ast
import re

from tests.docs.pages import PAGES, ROOT

QUOTE = re.compile(r"(^<!-- from ([\w./]+)(?:: ([\w, ]+))? -->\n\n```python\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)


def quoted(path: str, names: str | None) -> str:
    """Return the text of a file, or of some of its functions, classes and constants with the comments before them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if names is None:
        return text
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while lines[first - 1].startswith("#"):
            first -= 1
        found[name_of(node)] = "\n".join(lines[first : node.end_lineno]) + "\n"
    wanted = [found[name] for name in names.split(", ")]
    return ("\n\n" if any("def " in one or "class " in one for one in wanted) else "").join(wanted)


def name_of(node: ast.stmt) -> str:
    """Return what a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", node)])
    return getattr(node, "name", None) or ast.unparse(targets[0])


def renewed(page: str) -> str:
    """Return the text of a page with its quotes as the code is now."""
    return QUOTE.sub(lambda m: m[1] + quoted(m[2], m[3]) + m[5], page)


if __name__ == "__main__":
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            (ROOT / name).write_text(new, encoding="utf-8")
            print(name)
