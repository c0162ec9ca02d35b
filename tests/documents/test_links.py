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
