"""The repository's documents, and the parts of them that tests check."""

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
WRITTEN_FOR = ("*.md", "docs/*.md", "idempotent_consumer/*.md", "benchmarks/results/*.md")
"""The same files as in docs/conf.py."""

PAGES = sorted(path for pattern in WRITTEN_FOR for path in REPOSITORY.glob(pattern))

_FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    """Return a page's path in the repository, for a test's id."""
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return [block for _, kind, block in _FENCED.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    """Return a page's text without its code."""
    return re.sub(r"`[^`\n]*`", "code", _FENCED.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures, without those on other sites."""
    return [link for link in _LINK.findall(prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = Counter[str]()
    text = _FENCED.sub("", page.read_text())
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found[re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")] += 1
    return {f"{anchor}-{n}" if n else anchor for anchor in found for n in range(found[anchor])}


def first_cells(text: str) -> list[str]:
    """Return the code with which the rows of the tables in a text begin."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def tables(page: Path) -> list[list[str]]:
    """Return the first cell of each row of each table, without the heads."""
    found = re.findall(r"^\|.*\n\|[-:| ]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [[row.split("|")[1].strip() for row in rows.splitlines()] for rows in found]


def commands(page: Path, name: str) -> list[list[str]]:
    """Return the arguments of each call of a command, in blocks and in the text's code.

    Arguments end at a redirection, a pipe or another command.
    """
    code = [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]
    for block in blocks(page, "console"):
        code += re.findall(r"^\$ (.+)", block, re.MULTILINE)
    code += re.findall(r"`([^`\n]+)`", _FENCED.sub("", page.read_text()))
    called = re.compile(rf"(?:\.?[\w/]*/)?{name} ([^<>|;&]+)")
    return [shlex.split(match[1], comments=True) for each in code if (match := called.match(each))]


def run(*command: str | Path, text: str = "", directory: Path | None = None) -> str:
    """Run a program on a text, without PYTHONPATH; return its output.

    Raises AssertionError unless it ends with 0.
    """
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        command, input=text, cwd=directory, env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}\n{text}"
    return ended.stdout


def section(page: Path, heading: str) -> str:
    """Return a page's text from a heading of the second level to the next one."""
    _, found, rest = page.read_text().partition(f"\n## {heading}\n")
    assert found, f"{name(page)} has no section {heading!r}"
    return rest.partition("\n## ")[0]
