"""Write a new service: 0 when it is there, 1 when it cannot be written, 2 for a wrong name."""

from __future__ import annotations

import sys
from pathlib import Path

from new_service.files import files_of
from new_service.naming import objection_to

ROOT = Path(__file__).parents[2]


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


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
