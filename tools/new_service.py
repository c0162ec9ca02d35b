"""Write a new service: a project that is like order, with a handler and a test to begin with.

Ends with 0 when it is there, 1 when it cannot be written, 2 for a wrong name.
"""

from __future__ import annotations

import builtins
import keyword
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]

_TEMPLATE = Path(__file__).with_name("service_template")
_PLACEHOLDER = "placeholder"
_MODEL = "order"

# A name is a directory, a queue, an image, a module (no "-") and a service (no "_").
_FORM = re.compile(r"[a-z][a-z0-9]{0,29}")
# What pytest, git and Docker know as something else.
_SET_ASIDE = {"test", "build", "dist"}


def main(name: str) -> int:
    """Write all of it, or say in one line why not."""
    if wrong := objection_to(name, ROOT):
        print(f"new-service: {wrong}", file=sys.stderr)
        return 2
    try:
        for path, text in files_of(name, ROOT).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(path.relative_to(ROOT))
    except OSError as error:
        print(f"new-service: {error}", file=sys.stderr)
        return 1
    print(
        f"Try it: make setup && .venv/bin/pytest {name}\n"
        f"Then write its handler, in {name}/{name}.py"
    )
    return 0


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


def files_of(name: str, root: Path) -> dict[Path, str]:
    """Return the text of each file that is new or other than before; nothing is written.

    The compose files come last: until then, what is there of the project is used by nobody.
    """
    project = root / name
    code = {
        project / path.name.replace(_PLACEHOLDER, name): path.read_text().replace(
            _PLACEHOLDER, name
        )
        for path in _TEMPLATE.glob("*.py")
    }
    return code | _surroundings(name, root) | _entries(name, root)


def _surroundings(name: str, root: Path) -> dict[Path, str]:
    """Return the project file, the image and the lock: order's, under the new name."""
    model, project = root / _MODEL, root / name
    description = 'description = "Writes a document for each new_order event, once"'
    settings = re.sub(
        r"^description = .*",
        description,
        (model / "pyproject.toml").read_text(),
        flags=re.MULTILINE,
    )
    return {
        project / "pyproject.toml": _renamed(settings, name),
        project / "Dockerfile": _renamed((model / "Dockerfile").read_text(), name),
        project / "requirements.lock": (model / "requirements.lock").read_text(),
    }


def _entries(name: str, root: Path) -> dict[Path, str]:
    """Return the compose files that have an entry of order's, with another one behind it."""
    entry = re.compile(rf"^  {_MODEL}:.*\n(?:    .*\n)*\n?", re.MULTILINE)
    changed = {}
    for compose in sorted(root.glob("docker-compose*.yaml")):
        text = compose.read_text()
        after = entry.sub(lambda found: found[0] + _renamed(found[0], name), text)
        if after != text:
            changed[compose] = after
    return changed


def _renamed(text: str, name: str) -> str:
    return re.sub(rf"\b{_MODEL}\b", name, text)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
