"""The pages are short, say each thing once, use the field's terms, and have no broken links."""

import re
from itertools import combinations
from pathlib import Path

import pytest

from documents.pages import DOCS, PAGES, REPOSITORY, anchors, links, name, prose, tables

WORDS = {
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "anew": "again",
    "in hand": "in flight",
    "is no event": "is not a valid event",
    "a letter": "a dead letter",
    "the letter": "the dead letter",
    "such letters": "such dead letters",
}
"""Words that RabbitMQ's and etcd's documentation do not use, and those that they do."""


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_librarys_readme_stands_alone() -> None:
    """A package index shows it without the repository's other files."""
    page = REPOSITORY / "idempotent_consumer" / "README.md"
    assert [link for link in links(page) if not link.startswith("#")] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_words_are_the_fields_terms(page: Path) -> None:
    text = " ".join(prose(page).split())
    found = re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text, re.IGNORECASE)
    assert {word: WORDS[word.lower()] for word in found} == {}


def test_no_table_stands_twice() -> None:
    """Nor do most of its rows."""
    pages = [page for page in PAGES if page.parent.name != "results"]
    all_tables = [(name(page), cells) for page in pages for cells in tables(page)]
    twice = [
        (one, other, shared)
        for (one, cells), (other, others) in combinations(all_tables, 2)
        if len(shared := set(cells) & set(others) - {""}) > min(len(cells), len(others)) / 2
    ]
    assert twice == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_link_is_broken(page: Path) -> None:
    """Its file exists, and so does its heading."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_first_page_lists_every_page() -> None:
    """Its list is also the tree of the site."""
    listed = {(DOCS / link).resolve() for link in links(DOCS / "README.md")}
    assert [
        name(page) for page in DOCS.glob("*.md") if page not in listed and page.name != "README.md"
    ] == []
