"""A new service works in a copy of the repository, and a wrong name changes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from new_service import files_of, objection_to

REPOSITORY = Path(__file__).parents[1]
LIBRARY = "idempotent_consumer"
NEEDED = (
    "Makefile",
    "pyproject.toml",
    "requirements.lock",
    ".env",
    ".dockerignore",
    "order",
    "tools",
    f"{LIBRARY}/pyproject.toml",
    f"{LIBRARY}/{LIBRARY}",
    *(path.name for path in REPOSITORY.glob("docker-compose*.yaml")),
)
# Names that hardly anybody gives to a real service.
NAME, ANOTHER, LONGEST, SHORTEST = "trial", "othertrial", "z" * 30, "z"
PYTEST = str(Path(sys.executable).with_name("pytest"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy what `make new-service` needs."""
    leave_out = shutil.ignore_patterns("test_new_service.py", "test_lock.py", "__pycache__")
    for path in NEEDED:
        source, target = REPOSITORY / path, tmp_path / path
        if source.is_dir():
            shutil.copytree(source, target, ignore=leave_out)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    python = tmp_path / ".bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def start(copy: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the copy to its end, without the variables of an outer make."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | environ
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)


def run(copy: Path, *command: str, **environ: str) -> str:
    """Run a program in the copy, check that it succeeds, and return its output."""
    ended = start(copy, *command, **environ)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


MAKE = ("make", "BIN=.bin", "PYTHON=false")
"""It has a Python that cannot install anything: it would replace the real projects."""


def new_service(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Make a service in the copy, as if `make setup` had run."""
    return start(copy, *MAKE, "READY=ready", "--old-file=ready", "new-service", *arguments)


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture
def made(copy: Path) -> Path:
    ended = new_service(copy, f"NAME={NAME}")
    assert ended.returncode == 0, ended.stderr
    return copy


def test_its_own_tests_pass_and_pytest_finds_them_by_itself(made: Path) -> None:
    installed = f"{made / NAME}:{made / 'order'}"
    out = run(made, PYTEST, "-v", "-p", "no:cacheprovider", PYTHONPATH=installed)
    assert len(re.findall(rf"^{NAME}/test_{NAME}\.py::\w+ PASSED", out, re.MULTILINE)) == 4


def test_make_sets_it_up_and_tests_and_types_it(made: Path) -> None:
    out = run(made, *MAKE, "--dry-run", "setup", "unit-test", "typecheck", "lock")
    assert f"-e ./{NAME}" in out
    options = "-n auto --dist loadfile --no-loadscope-reorder"
    assert f"/pytest {options}\n" in out, "a test's place is in pytest's settings"
    assert re.search(rf"MYPYPATH=\S*\b{NAME}\b.* .*mypy$", out, re.MULTILINE)
    assert f"lock.py {NAME}/requirements.lock" in out


def test_an_image_is_built_of_its_code_and_lock_alone(made: Path) -> None:
    lines = (made / ".dockerignore").read_text().splitlines()
    sent = exclude_paths(str(made), [line for line in lines if not line.startswith("#")])
    assert {path for path in sent if path.startswith(f"{NAME}/")} == {
        f"{NAME}/{file}" for file in (f"{NAME}.py", "pyproject.toml", "requirements.lock")
    }
    assert {path.partition("/")[0] for path in sent if "/" in path} == {LIBRARY, NAME, "order"}


def test_it_is_what_order_is_under_another_name(made: Path) -> None:
    assert {path.name for path in (made / NAME).iterdir()} == {
        path.name.replace("order", NAME) for path in (made / "order").iterdir()
    }
    for path in ("Dockerfile", "requirements.lock"):
        expected = (made / "order" / path).read_text().replace("order", NAME)
        assert (made / NAME / path).read_text() == expected
    assert "placeholder" not in "".join(path.read_text() for path in (made / NAME).iterdir())


@pytest.mark.parametrize("name", [SHORTEST, f"{NAME}2", LONGEST])
def test_its_code_is_clean_and_only_it_and_its_compose_entries_are_new(
    copy: Path, name: str
) -> None:
    before = contents(copy)
    assert objection_to(name, REPOSITORY) is None
    assert files_of(name, copy)
    assert contents(copy) == before, "nothing is written while the text is made"
    assert new_service(copy, f"NAME={name}").returncode == 0
    after = contents(copy)
    changed = {path for path in after if before.get(path) != after[path]}
    assert {path for path in changed if not path.startswith(f"{name}/")} == {
        "docker-compose.services.yaml",
        "docker-compose.cluster.yaml",
    }
    for path in changed & before.keys():
        assert set(before[path].splitlines()) <= set(after[path].splitlines())
    run(copy, sys.executable, "-m", "ruff", "check", "--no-cache", name)


@pytest.mark.skipif(
    os.system("docker compose version >/dev/null 2>&1") != 0,
    reason="docker compose, which needs no engine to read its files, is not here",
)
@pytest.mark.parametrize("overlay", [(), ("-f", "docker-compose.cluster.yaml")])
def test_compose_takes_its_entry_as_it_takes_orders(made: Path, overlay: tuple[str, ...]) -> None:
    assert new_service(made, f"NAME={ANOTHER}").returncode == 0

    def entry(name: str) -> str:
        files = ("-f", "docker-compose.yaml", "-f", "docker-compose.services.yaml", *overlay)
        out = run(made, "docker", "compose", *files, "config", "--no-consistency")
        (found,) = re.findall(rf"^  {name}:\n(?:    .*\n)+", out, re.MULTILINE)
        return str(found)

    for name in (NAME, ANOTHER):
        assert entry(name) == entry("order").replace("order", name)


WRONG = {
    "which one?": [""],
    "at most 30 lower-case letters and digits": [
        *("Billing", "bill-ing", "bill_ing", "1st", "a b", "../b", "bé", "b\n", "'; touch x; '"),
        LONGEST + "a",
    ],
    "{name} is there": ["order", "tests", "docs"],
    "tests/{name} is there": ["simulation"],
    "tests/{name}.py is there": ["conftest"],
    "tools/service_template/{name}.py is there": ["placeholder"],
    "idempotent_consumer/tests/{name} is there": ["fakes"],
    "docker-compose.cluster.yaml has it": ["etcd", "rabbitmq2"],
    "kept for tests": ["test", "build"],
    "Python has it": ["queue", "class", "list"],
    "an installed package": ["pika", "grpc", "grpcio"],
}


@pytest.mark.parametrize(
    ("says", "name"), [(says, name) for says, names in WRONG.items() for name in names]
)
def test_a_wrong_name_is_told_in_one_line(says: str, name: str) -> None:
    wrong = objection_to(name, REPOSITORY)
    assert wrong is not None
    assert says.format(name=name) in wrong
    assert "\n" not in wrong


@pytest.mark.parametrize("arguments", [(), ("NAME=",), (f"NAME={NAME}",), ("NAME=; touch x",)])
def test_a_wrong_name_changes_nothing(made: Path, arguments: tuple[str, ...]) -> None:
    """Including the name of an existing service."""
    before = contents(made)
    ended = new_service(made, *arguments)
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if not line.startswith("make: ")]
    assert len(ours) == 1
    assert ours[0].startswith("new-service: ")
    assert contents(made) == before
