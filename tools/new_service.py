"""Write a new service: a project like order, with a handler and a test to begin with.

Exit code 0: it is written, 1: it cannot be written, 2: its name is wrong.
"""

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

# The name of a directory, a queue, an image, a module (no "-") and a service (no "_").
_FORM = re.compile(r"[a-z][a-z0-9]{0,29}")
# These mean something else to pytest, git and Docker.
_SET_ASIDE = {"test", "build", "dist"}


def main(name: str) -> int:
    """Write the service, or say in one line why that is impossible."""
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
    """Return a line that says why a new service cannot have this name, or None."""
    if not name:
        return "which one? make new-service NAME=billing"
    if not _FORM.fullmatch(name):
        return f"NAME={name!r}: at most 30 lower-case letters and digits, a letter first"
    if taken := next(_taken_by(name, root), None):
        return f"NAME={name} is taken: {taken}"
    return None


def _taken_by(name: str, root: Path) -> Iterator[str]:
    """Yield what has the name already: a module here, a compose entry, Python, a package."""
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
    # Packages of the lock, spelled like modules.
    locked = re.findall(r"^([\w.-]+)==", (root / "requirements.lock").read_text(), re.MULTILINE)
    if name in {*packages_distributions(), *(re.sub("[-.]", "_", each.lower()) for each in locked)}:
        yield "an installed package has it"


def files_of(name: str, root: Path) -> dict[Path, str]:
    """Return the text of each new or changed file, without writing any.

    The compose files come last: until they are written, nothing uses the new project.
    """
    texts = {
        root / name / path.name.replace(_PLACEHOLDER, name): path.read_text().replace(
            _PLACEHOLDER, name
        )
        for path in _TEMPLATE.glob("*.py")
    }
    for file in ("pyproject.toml", "Dockerfile", "requirements.lock"):
        texts[root / name / file] = re.sub(
            "(?m)^description = .*",
            'description = "Writes a document for each new_order event, once"',
            _renamed((root / _MODEL / file).read_text(), name),
        )
    # After each entry of order comes one of the new service.
    entry = re.compile(rf"^  {_MODEL}:.*\n(?:    .*\n)*\n?", re.MULTILINE)
    for compose in sorted(root.glob("docker-compose*.yaml")):
        before = compose.read_text()
        after = entry.sub(lambda found: found[0] + _renamed(found[0], name), before)
        if after != before:
            texts[compose] = after
    return texts


def _renamed(text: str, name: str) -> str:
    return re.sub(rf"\b{_MODEL}\b", name, text)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
