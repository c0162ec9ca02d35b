"""The mutants as data, and what each makes of the code."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIMULATION = "simulation"
"""The suite of the mutants that the simulation has to find; all others name a unit test's file."""

_PROJECT = "idempotent_consumer"


class OutOfDate(Exception):
    """The code does not contain a mutant's text exactly once; one line says which."""


@dataclass(frozen=True)
class Edit:
    """A text in a file, and what the mutant has in its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A fault. ``wrong`` says what goes wrong in the world, ``suite`` what has to find it."""

    name: str
    wrong: str
    suite: str
    edits: tuple[Edit, ...]


def read_catalogue() -> list[Mutant]:
    """Return all mutants, file by file."""
    return [
        Mutant(name, given["wrong"], suite, tuple(_edits(module, given)))
        for path in sorted(Path(__file__).parent.glob("*.toml"))
        for suite, modules in tomllib.loads(path.read_text()).items()
        for module, mutants in modules.items()
        for name, given in mutants.items()
    ]


def _edits(module: str, given: dict[str, Any]) -> Iterator[Edit]:
    """Yield an edit for each hunk of the mutant's diff, or its only edit."""
    if "diff" not in given:
        yield Edit(_file(module), given["old"], given.get("new", ""))
        return
    for hunk in f"\n@@ {module}\n{given['diff']}".split("\n@@")[1:]:
        head, *lines = hunk.rstrip("\n").split("\n")
        module = head.strip() or module
        old, new = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
        yield Edit(_file(module), old, new)


def _file(module: str) -> str:
    return f"{_PROJECT}/{_PROJECT}/{module}.py"


def suite_file(suite: str) -> str:
    """Return where the unit tests of a suite are."""
    return f"{_PROJECT}/tests/{suite}.py"


def mutated(root: Path, mutant: Mutant) -> dict[Path, str]:
    """Return the text of each file below ``root`` that a mutant changes; raises OutOfDate."""
    texts: dict[Path, str] = {}
    for edit in mutant.edits:
        path = root / edit.file
        text = texts.get(path) or (path.read_text() if path.is_file() else "")
        times = text.count(edit.old)
        if times != 1:
            first = edit.old.strip().splitlines()[0]
            raise OutOfDate(
                f"mutant {mutant.name!r} must be brought up to date: its text stands "
                f"{times} times in {edit.file}, and once is right: {first!r}"
            )
        texts[path] = text.replace(edit.old, edit.new)
    return texts
