"""The mutants as data, and how one is put into a copy of the code."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIMULATION = "simulation"
"""The suite of a mutant that the simulation finds; all others name files of unit tests."""

FILES = ("ten", "claims", "more", "outbox", "loop", "breaker", "messages")

_PROJECT = "idempotent_consumer"


class OutOfDate(Exception):
    """A mutant's text is not in the code once; the message says which, in one line."""


@dataclass(frozen=True)
class Edit:
    """One text in one file, and what stands there in the mutant."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A fault. ``wrong`` says what goes wrong in the world, ``suite`` what must find it."""

    name: str
    wrong: str
    suite: str
    edits: tuple[Edit, ...]


def read_catalogue() -> list[Mutant]:
    """Return all mutants, file by file."""
    return [mutant for file in FILES for mutant in _read(Path(__file__).with_name(f"{file}.toml"))]


def _read(path: Path) -> Iterator[Mutant]:
    modules = tomllib.loads(path.read_text())
    usual = modules.pop("suite", SIMULATION)
    for module, mutants in modules.items():
        for name, given in mutants.items():
            files = given.get("suite", usual).split()
            suite = [file if file == SIMULATION else f"{_PROJECT}/tests/{file}" for file in files]
            yield Mutant(name, given["wrong"], " ".join(suite), tuple(_edits(module, given)))


def _edits(module: str, given: dict[str, Any]) -> Iterator[Edit]:
    """Yield one for each hunk of the mutant's diff, or the one text that it names."""
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


def mutate(root: Path, mutant: Mutant) -> None:
    """Put a mutant into the code under ``root``; raises OutOfDate."""
    for edit in mutant.edits:
        path = root / edit.file
        text = path.read_text() if path.is_file() else ""
        times = text.count(edit.old)
        if times != 1:
            first = edit.old.strip().splitlines()[0]
            raise OutOfDate(
                f"mutant {mutant.name!r} must be brought up to date: its text stands "
                f"{times} times in {edit.file}, and once is right: {first!r}"
            )
        path.write_text(text.replace(edit.old, edit.new))
