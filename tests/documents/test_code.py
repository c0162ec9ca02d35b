"""The code in the documents: all of it compiles, and whole services register their handlers."""

import ast
import runpy
import sys
import textwrap
from pathlib import Path

import pytest

import idempotent_consumer
from documents.pages import DOCS, PAGES, REPOSITORY, blocks, name, run
from idempotent_consumer import Event, Service
from idempotent_consumer.event import check_effects

BLOCKS = [(page, block) for page in PAGES for block in blocks(page, "python")]
PYTHON = (sys.executable, "-m")
TUTORIAL = DOCS / "tutorial.md"
GUIDE = DOCS / "write-a-service.md"
DATABASE = DOCS / "your-own-database.md"
RECIPES = DOCS / "recipes.md"
LIBRARY = REPOSITORY / "idempotent_consumer" / "README.md"


def define(block: str) -> Service:
    """Do what a block does, but run no service and publish nothing; return its service.

    A block that shows a part of one is given the rest: the public names, and a service.
    """
    tree = ast.parse(block)
    tree.body = [
        statement
        for statement in tree.body
        if not isinstance(statement, ast.With) and not _runs(statement)
    ]
    public = {each: getattr(idempotent_consumer, each) for each in idempotent_consumer.__all__}
    names = {"__name__": "documented", "service": Service("documented", noun="parts"), **public}
    exec(compile(tree, "block", "exec", dont_inherit=True), names)
    service = names["service"]
    assert isinstance(service, Service)
    return service


def _runs(statement: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "run"
        for node in ast.walk(statement)
    )


@pytest.mark.parametrize(
    "block",
    [block for _, block in BLOCKS],
    ids=[f"{name(page)}-{number}" for number, (page, _) in enumerate(BLOCKS)],
)
def test_each_block_is_python(block: str) -> None:
    ast.parse(textwrap.dedent(block))


@pytest.mark.parametrize("block", [block for _, block in BLOCKS if "import" in block])
def test_what_has_its_imports_has_all_of_them(block: str) -> None:
    run(*PYTHON, "ruff", "check", "--isolated", "--select=F", "-", text=block)


@pytest.mark.parametrize(
    "block",
    [
        block
        for page, block in BLOCKS
        if page not in (TUTORIAL, RECIPES) and ("@service." in block or "= Service(" in block)
    ],
)
def test_what_shows_a_service_registers_its_handlers(block: str) -> None:
    """And a pure handler returns effects that can be recorded."""
    service = define(block)
    assert service.handlers
    for event_type, handler in service.handlers.items():
        if not handler.claimed:
            event = Event("1", event_type, {})
            check_effects(handler.function(*handler.arguments(event)), service.name, event)


@pytest.mark.parametrize("block", blocks(TUTORIAL, "python"))
def test_the_tutorial_quotes_the_services_as_they_are(block: str) -> None:
    sources = [(REPOSITORY / each / f"{each}.py").read_text() for each in ("order", "notify")]
    assert any(block in source for source in sources)


@pytest.mark.parametrize(
    ("page", "service", "passed"),
    [(LIBRARY, "order", 2), (GUIDE, "billing", 4), (GUIDE, "mailing", 2), (DATABASE, "bank", 3)],
)
def test_a_pages_test_passes_on_the_pages_service(
    tmp_path: Path, page: Path, service: str, passed: int
) -> None:
    written = {f"{service}.py": f'Service("{service}"', f"test_{service}.py": f"import {service}"}
    for file, contains in written.items():
        (block,) = (each for each in blocks(page, "python") if contains in each)
        (tmp_path / file).write_text(block)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    out = run(*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", directory=tmp_path)
    assert f"\n{passed} passed" in out


@pytest.mark.parametrize("block", blocks(RECIPES, "python"))
def test_each_recipe_does_what_its_last_lines_say(tmp_path: Path, block: str) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(block)
    runpy.run_path(str(recipe))
    assert "world.publish(" in block.partition("InMemory(service)")[2]
    assert "\nassert " in block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_bash_blocks_are_bash(page: Path) -> None:
    for block in blocks(page, "bash"):
        run("bash", "-n", text=textwrap.dedent(block))
