"""The sdist and the wheel have the right files, and the wheel works in an empty environment."""

import os
import shutil
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from documents.pages import REPOSITORY, blocks, run

LIBRARY = REPOSITORY / "idempotent_consumer"
PROJECT = tomllib.loads((LIBRARY / "pyproject.toml").read_text())["project"]
NAME = f"idempotent_consumer-{PROJECT['version']}"
INFO = f"{NAME}.dist-info"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.timeout(600)
"""The library's dependencies are downloaded."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, in the directory DIST or in a temporary one."""
    source = tmp_path_factory.mktemp("source") / "library"
    shutil.copytree(LIBRARY, source, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / file, source)
    into = Path(os.environ.get("DIST") or tmp_path_factory.mktemp("dist")).absolute()
    build(source, into)
    return into


@pytest.fixture(scope="session")
def wheel(built: Path) -> dict[str, bytes]:
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {each: archive.read(each) for each in archive.namelist()}


@pytest.fixture(scope="session")
def sdist(built: Path) -> dict[str, bytes]:
    """Give the files of the sdist, by their path below its only directory."""
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        opened = {member.name: archive.extractfile(member) for member in archive}
        return {path.removeprefix(f"{NAME}/"): each.read() for path, each in opened.items() if each}


@pytest.fixture(scope="session")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in an environment with its dependencies and nothing else."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    pip = (BIN / "pip", "--disable-pip-version-check", "--python", directory / "bin" / "python")
    # The dependencies of order are the library and the library's own.
    lock = REPOSITORY / "order" / "requirements.lock"
    run(*pip, "install", "--require-hashes", "--only-binary", ":all:", "-r", lock)
    run(*pip, "install", "--no-deps", "--no-index", *built.glob("*.whl"))
    run(*pip, "check")
    return directory


def build(source: Path, into: Path, *options: str) -> None:
    backend = ("--no-build-isolation", "--python", sys.executable, "--offline")
    run(BIN / "uv", "build", "--no-create-gitignore", *backend, *options, "-o", into, source)


def files(*directories: str) -> dict[str, bytes]:
    """Return the files below some directories of the library."""
    return {
        str(path.relative_to(LIBRARY)): path.read_bytes()
        for directory in directories
        for path in (LIBRARY / directory).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_its_licence_and_its_changelog(wheel: dict[str, bytes]) -> None:
    package = files("idempotent_consumer")
    for file in ("py.typed", "testing/__init__.py"):
        assert f"idempotent_consumer/{file}" in package
    copied = {
        f"{INFO}/licenses/LICENSE": (REPOSITORY / "LICENSE").read_bytes(),
        f"{INFO}/extra_metadata/CHANGELOG.md": (REPOSITORY / "CHANGELOG.md").read_bytes(),
    }
    generated = {f"{INFO}/{each}" for each in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    assert wheel == package | copied | {path: wheel[path] for path in generated}


def test_the_sdist_holds_what_the_wheel_is_built_from_and_the_examples(
    sdist: dict[str, bytes], wheel: dict[str, bytes]
) -> None:
    copied = (REPOSITORY / "LICENSE", REPOSITORY / "CHANGELOG.md")
    own = (LIBRARY / "README.md", LIBRARY / "pyproject.toml")
    others = {path.name: path.read_bytes() for path in (*copied, *own)}
    metadata = {"PKG-INFO": wheel[f"{INFO}/METADATA"]}
    assert sdist == files("idempotent_consumer", "examples") | others | metadata


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    """Byte for byte: a build depends on nothing but its source."""
    (source,) = built.glob("*.tar.gz")
    build(source, tmp_path, "--wheel")
    (again,), (first,) = tmp_path.glob("*.whl"), built.glob("*.whl")
    assert again.name == first.name
    assert again.read_bytes() == first.read_bytes()


def test_the_metadata_is_the_projects(wheel: dict[str, bytes]) -> None:
    """`packaging` refuses what a package index would refuse."""
    metadata = Metadata.from_email(wheel[f"{INFO}/METADATA"])
    assert str(metadata.version) == PROJECT["version"]
    assert metadata.author == "The idempotent-consumer authors"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description == (LIBRARY / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown"


def test_the_readmes_test_passes_on_the_readmes_service(environment: Path, tmp_path: Path) -> None:
    """The library comes from the wheel, and there is no pytest."""
    written = {"order.py": 'Service("order"', "test_order.py": "import order"}
    for file, contains in written.items():
        (block,) = (each for each in blocks(LIBRARY / "README.md", "python") if contains in each)
        (tmp_path / file).write_text(block)
    code = (
        "import idempotent_consumer, test_order\n"
        "tests = [each for name, each in vars(test_order).items() if name.startswith('test_')]\n"
        "for test in tests: test()\n"
        "print(len(tests), idempotent_consumer.__file__)\n"
    )
    passed, imported = run(environment / "bin" / "python", "-c", code, directory=tmp_path).split()
    assert passed == "2"
    assert Path(imported).is_relative_to(environment)


def test_the_command_is_installed(environment: Path, tmp_path: Path) -> None:
    out = run(environment / "bin" / "idempotent-consumer", "--help", directory=tmp_path)
    assert "dead-letters" in out
