"""The mutants as data, and how one is put into a copy of the code."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

SIMULATION = "simulation"
"""The suite of a mutant that the simulation finds; all others name files of unit tests."""

FILES = (
    "ten.toml",
    "claims.toml",
    "more.toml",
    "outbox.toml",
    "loop.toml",
    "breaker.toml",
    "messages.toml",
)


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
    """Return all mutants in the order of their files."""
    here = Path(__file__).parent
    return [
        Mutant(
            one["name"],
            one["wrong"],
            one.get("suite", SIMULATION),
            # One edit stands in the mutant itself.
            tuple(Edit(edit["file"], edit["old"], edit["new"]) for edit in one.get("edit", [one])),
        )
        for file in FILES
        for one in tomllib.loads((here / file).read_text())["mutant"]
    ]


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
