"""Resolve dependencies and write them with hashes into the lock that the first argument names.

The other arguments are those of `uv pip compile`. A package may have two hundred files; the lock
has its sdist and the wheels for the Pythons and platforms below, and pip installs nothing else.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.utils import parse_wheel_filename

# A wheel's tag: Python, ABI (without the "t" of a Python without GIL) and platform.
INSTALLED = re.compile(
    r"(py3-none|cp3\d+-abi3|cp31[1-4]-(cp31[1-4]|none))"
    r"-(any|manylinux\w+_(x86_64|aarch64)|macosx_\w+_(arm64|universal2))"
)
_OLDEST = "3.11"
_UV = Path(sys.executable).with_name("uv")


def main(lock: str, *arguments: str) -> None:
    """Write the lock with the newest versions that the arguments permit."""
    options = ("--universal", "--python-version", _OLDEST, "--format", "pylock.toml")
    ours = ("--no-emit-package", "idempotent-consumer")
    resolved = subprocess.run(
        [_UV, "pip", "compile", "--quiet", "--upgrade", *options, *ours, *arguments],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    packages = tomllib.loads(resolved)["packages"]
    Path(lock).write_text("".join(pinned(each) for each in packages))


def pinned(package: dict[str, Any]) -> str:
    """Return the lock's lines for a package of a pylock.toml, "" if no platform installs it."""
    hashes = sorted(_hashes(package))
    if not hashes:
        return ""
    always = f"python_full_version >= '{_OLDEST}'"
    marker = package.get("marker", "").removeprefix(always).removeprefix(" and ")
    requirement = f"{package['name']}=={package['version']}" + (marker and f" ; {marker}")
    return " \\\n    --hash=sha256:".join([requirement, *hashes]) + "\n"


def _hashes(package: dict[str, Any]) -> Iterator[str]:
    if sdist := package.get("sdist"):
        yield sdist["hashes"]["sha256"]
    for wheel in package.get("wheels", ()):
        *_, tags = parse_wheel_filename(wheel["url"].rpartition("/")[-1])
        if any(INSTALLED.fullmatch(str(tag)) for tag in tags):
            yield wheel["hashes"]["sha256"]


if __name__ == "__main__":
    main(*sys.argv[1:])
