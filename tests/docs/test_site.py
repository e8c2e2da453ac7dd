"""The site builds without a warning, and fetches nothing from elsewhere."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.docs.pages import ROOT, tokens


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_every_page_is_there(site):
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((site / page).is_file() for page in sources)


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\"\s>]+)")
    assert not [
        (page.name, found)
        for page in site.rglob("*.html")
        for found in fetched.findall(page.read_text(encoding="utf-8"))
    ]


def test_lists_and_tables_are_those_of_github(site):
    """mkdocs needs a blank line before a list or a table; GitHub does not."""
    for source in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "results").glob("*.md")]:
        page = source.relative_to(ROOT).as_posix()
        html = (site / source.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")
        article = html[html.index("<article") : html.index("</article>")]
        counts = {
            tag: sum(t.type == f"{kind}_open" for t in tokens(page))
            for tag, kind in (("li", "list_item"), ("table", "table"))
        }
        assert {tag: len(re.findall(rf"<{tag}[ >]", article)) for tag in counts} == counts, page


@pytest.mark.parametrize("package", ["jacobi_hf", "jacobi_hf.trainer", "jacobi_hf.hub_cards"])
def test_the_reference_has_everything_public(site, package):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    names = [name for name in import_module(package).__all__ if not name.startswith("__")]
    assert names
    assert not [name for name in names if f'id="{package}.{name}"' not in reference]
