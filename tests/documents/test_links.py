from __future__ import annotations

from pathlib import Path

import pytest

from documents.pages import DOCS, PAGES, anchors, links, name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_link_leads_to_what_is_there(page: Path) -> None:
    """To a file of the repository, and to a heading that it has."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_first_page_lists_every_page() -> None:
    """What it lists is also the tree of the site."""
    listed = {(DOCS / link).resolve() for link in links(DOCS / "README.md")}
    assert [
        name(page) for page in DOCS.glob("*.md") if page not in listed and page.name != "README.md"
    ] == []


def test_anchors_are_githubs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, `two` & [three](x.md)\n## Same\n## Same\n```bash\n# no heading\n```\n")
    assert anchors(page) == {"one-two--three", "same", "same-1"}


def test_code_holds_no_links(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](b.md#c) `x[0](y)` ![p](q.svg) [far](https://far.example)\n```python\nf[0](z)\n```\n"
    )
    assert links(page) == ["b.md#c", "q.svg"]
