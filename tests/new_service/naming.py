"""The names that a service can have: a name is a directory, a module, a queue and an image."""

from __future__ import annotations

import builtins
import keyword
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

# Both a module's name, which has no "-", and a service's, which has no "_".
_FORM = re.compile(r"[a-z][a-z0-9]{0,29}")
# What pytest, git and Docker know as something else.
_SET_ASIDE = {"test", "build", "dist"}


def objection_to(name: str, root: Path) -> str | None:
    """Return in one line why a new service cannot have this name, or None."""
    if not name:
        return "which one? make new-service NAME=billing"
    if not _FORM.fullmatch(name):
        return f"NAME={name!r}: at most 30 small letters and digits, a letter first"
    if taken := next(_taken_by(name, root), None):
        return f"NAME={name} is taken: {taken}"
    return None


def _taken_by(name: str, root: Path) -> Iterator[str]:
    """Yield what has the name: a module here, a compose entry, Python, or a package."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    for place in [".", *settings["tool"]["mypy"]["mypy_path"]]:
        for path in (root / place / name, root / place / f"{name}.py"):
            if path.exists():
                yield f"{path.relative_to(root)} is there"
    for compose in sorted(root.glob("docker-compose*.yaml")):
        _, _, entries = compose.read_text().partition("\nservices:\n")
        if re.search(rf"^  {name}:", entries, re.MULTILINE):
            yield f"{compose.name} has it"
    if name in _SET_ASIDE:
        yield "it is kept for tests and builds"
    if keyword.iskeyword(name) or hasattr(builtins, name) or name in sys.stdlib_module_names:
        yield "Python has it"
    if name in packages_distributions() or name in _locked(root):
        yield "an installed package has it"


def _locked(root: Path) -> set[str]:
    """Return the packages that the services' locks name, written as modules are."""
    lock = (root / "requirements.lock").read_text()
    return {
        package.lower().replace("-", "_").replace(".", "_")
        for package in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)
    }
