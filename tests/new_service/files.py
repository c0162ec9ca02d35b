"""What a new service consists of: code from the template, and all around it as order has it."""

from __future__ import annotations

import re
from pathlib import Path

_TEMPLATE = Path(__file__).parent / "template"
_PLACEHOLDER = "placeholder"
_MODEL = "order"


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
