import re
from pathlib import Path

import pytest

from lock import pinned

REPOSITORY = Path(__file__).parents[1]
ALL = "requirements.lock"


def locked(path: str) -> set[str]:
    """Return a lock's packages, each with its version, marker and hashes."""
    return set(re.findall(r"^\S.*(?:\n .*)*", (REPOSITORY / path).read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("tag", "is_pinned"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64", True),
        ("cp314-cp314-manylinux_2_28_aarch64", True),
        ("cp39-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64", True),
        ("cp310-abi3-manylinux2014_x86_64", True),
        ("py3-none-manylinux_2_17_aarch64.manylinux2014_aarch64", True),
        ("cp313-cp313-macosx_11_0_arm64", True),
        ("cp312-cp312-macosx_11_0_universal2", True),
        ("cp310-cp310-manylinux_2_17_x86_64", False),
        ("cp314-cp314t-manylinux_2_17_x86_64", False),
        ("cp313-cp313-musllinux_1_2_x86_64", False),
        ("cp313-cp313-manylinux_2_17_s390x", False),
        ("cp313-cp313-win_amd64", False),
        ("py3-none-win_amd64", False),
        ("pp311-pypy311_pp73-manylinux_2_17_x86_64", False),
    ],
)
def test_a_lock_has_the_wheels_that_a_supported_machine_installs(tag: str, is_pinned: bool) -> None:
    wheel = {"url": f"https://example.org/a-1.0-{tag}.whl", "hashes": {"sha256": "b" * 64}}
    sdist = {"hashes": {"sha256": "a" * 64}}
    lines = pinned({"name": "a", "version": "1.0", "sdist": sdist, "wheels": [wheel]})
    assert lines == f"a==1.0 \\\n    --hash=sha256:{'a' * 64}" + (
        f" \\\n    --hash=sha256:{'b' * 64}\n" if is_pinned else "\n"
    )


def test_only_a_marker_that_excludes_a_supported_python_is_written() -> None:
    package = {"name": "a", "version": "1.0", "sdist": {"hashes": {"sha256": "a"}}}
    oldest = "python_full_version >= '3.11'"
    assert pinned(package | {"marker": oldest}).startswith("a==1.0 \\\n")
    marker = "sys_platform == 'win32'"
    assert pinned(package | {"marker": f"{oldest} and {marker}"}).startswith(f"a==1.0 ; {marker} ")


def test_a_package_that_nothing_here_installs_is_left_out() -> None:
    wheel = {"url": "https://example.org/a-1.0-py3-none-win32.whl", "hashes": {"sha256": "a"}}
    assert not pinned({"name": "a", "version": "1.0", "wheels": [wheel]})


@pytest.mark.parametrize(
    "path", ["order/requirements.lock", "notify/requirements.lock", "build-requirements.lock"]
)
def test_an_image_has_the_packages_that_the_tests_run_with(path: str) -> None:
    assert locked(path) <= locked(ALL)
