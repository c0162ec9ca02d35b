"""The documents' code compiles, passes the tests beside it, and quotes what there is."""

import ast
import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest

from documents.pages import DOCS, PAGES, REPOSITORY, blocks, name, run

BLOCKS = [(page, block) for page in PAGES for block in blocks(page, "python")]
PYTHON = (sys.executable, "-m")
TUTORIAL = DOCS / "tutorial.md"
RECIPES = DOCS / "recipes.md"
SERVICES = {
    (page, found[1]): block
    for page, block in BLOCKS
    if page not in (RECIPES, TUTORIAL) and (found := re.search(r'= Service\("(\w+)"', block))
}
"""The complete services of the pages, by page and name."""

PARTS = [
    block
    for page, block in BLOCKS
    if page == TUTORIAL or ("@service." in block and "= Service(" not in block)
]


@pytest.mark.parametrize(
    "block",
    [block for _, block in BLOCKS],
    ids=[f"{name(page)}-{number}" for number, (page, _) in enumerate(BLOCKS)],
)
def test_each_block_is_python(block: str) -> None:
    """A block with imports has all that it needs."""
    ast.parse(textwrap.dedent(block))
    if "import" in block:
        run(*PYTHON, "ruff", "check", "--isolated", "--select=F", "-", text=block)


@pytest.mark.parametrize("block", PARTS)
def test_a_part_of_a_service_is_quoted_from_a_complete_one(block: str) -> None:
    files = ("order/order.py", "notify/notify.py", "idempotent_consumer/examples/shipment.py")
    whole = [*((REPOSITORY / each).read_text() for each in files), *SERVICES.values()]
    assert any(block in each for each in whole)


def test_the_services_in_the_pages_are_these() -> None:
    assert sorted(service for _, service in SERVICES) == ["bank", "billing", "mailing", "order"]


@pytest.mark.parametrize(("page", "service"), SERVICES)
def test_a_pages_service_passes_the_pages_test(tmp_path: Path, page: Path, service: str) -> None:
    (test,) = (each for each in blocks(page, "python") if f"\nimport {service}\n" in each)
    (tmp_path / f"{service}.py").write_text(SERVICES[page, service])
    (tmp_path / f"test_{service}.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    out = run(*PYTHON, "pytest", "-q", "-p", "no:cacheprovider", directory=tmp_path)
    assert f"\n{test.count('def test_')} passed" in out


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
