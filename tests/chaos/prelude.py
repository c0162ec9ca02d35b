"""Python that a service runs before anything else of its own."""

import os
from pathlib import Path


def prelude(directory: Path, code: str) -> dict[str, str]:
    """Return the variable that lets a service run some code first: Python's `sitecustomize`."""
    (directory / "sitecustomize.py").write_text(code)
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), inherited)))}
