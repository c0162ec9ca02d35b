"""The reference pages have what the code has, all of it and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import idempotent_consumer
from documents.pages import DOCS, PAGES, REPOSITORY, first_cells, name, section
from idempotent_consumer import Settings, names
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.metrics import _SAY, Outcome
from idempotent_consumer.settings import _VARIABLES

LIBRARY = Path(idempotent_consumer.__file__).parent
SIGNALS = DOCS / "signals.md"
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
LEVELS = {"info", "warning", "error", "critical"}


def variables(page: Path) -> dict[str, str]:
    """Return a table's variables, each with what stands in its second cell."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]*?) \|", page.read_text(), re.MULTILINE)
    return dict(rows)


def test_the_page_of_settings_has_each_variable_with_its_default() -> None:
    documented = variables(DOCS / "settings.md")
    assert list(documented) == list(_VARIABLES)
    for variable, (field, parse) in _VARIABLES.items():
        default = getattr(Settings(), field)
        if documented[variable] == "unset":
            assert not default, variable
        else:
            assert parse(documented[variable].strip("`")) == default, variable


def test_the_readme_names_no_other_settings() -> None:
    """It has the ones that matter most, several in a row here and there."""
    rows = section(REPOSITORY / "README.md", "Settings").splitlines()
    named = {
        variable
        for row in rows
        if row.startswith("| `")
        for variable in re.findall(r"`([A-Z_]+)`", row.split("|")[1])
    }
    assert named - {"NOTIFY_URL"} <= set(_VARIABLES)
    for variable, default in variables(REPOSITORY / "README.md").items():
        field, parse = _VARIABLES.get(variable, ("", str))
        if match := re.match(r"`([^`]+)`", default):
            assert parse(match[1]) == getattr(Settings(), field), variable


def test_the_page_of_the_api_has_each_public_name() -> None:
    cells = first_cells((DOCS / "api.md").read_text())
    assert sorted(cells) == sorted(idempotent_consumer.__all__)


def test_each_counter_is_explained() -> None:
    cells = first_cells(section(SIGNALS, "Counters"))
    assert {f"orders_{outcome.value}" for outcome in Outcome} | {"orders_received"} == {
        cell for cell in cells if cell.startswith("orders_")
    }


def test_each_log_line_that_the_library_writes_is_explained() -> None:
    """And none is explained that it does not write."""
    cells, lines = first_cells(section(SIGNALS, "Log lines")), set(said())
    assert len(lines) > 20
    assert {line for line in lines if not any(re.fullmatch(line, cell) for cell in cells)} == set()
    assert [cell for cell in cells if not any(re.fullmatch(line, cell) for line in lines)] == []


def said() -> Iterator[str]:
    """Yield the text of each log line of a service, as a pattern."""
    yield from map(re.escape, _SAY.values())
    for file in LIBRARY.rglob("*.py"):
        if "cli" in file.relative_to(LIBRARY).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value) in ("self._log", "log")
            ):
                yield from _patterns(node.args[0])


def _patterns(text: ast.expr) -> Iterator[str]:
    """Yield what a text can be; what another place says of it (a name) is not looked up."""
    match text:
        case ast.Constant(str(value)):
            yield re.escape(value)
        case ast.IfExp(body=first, orelse=second):
            yield from (*_patterns(first), *_patterns(second))
        case ast.JoinedStr(values=parts):
            yield "".join(next(_patterns(part), ".+") for part in parts)


def test_each_header_and_queue_is_named() -> None:
    page = DOCS / "names.md"
    headers = {value for key, value in vars(names).items() if key.endswith("_HEADER")}
    assert headers <= set(first_cells(section(page, "Message headers")))
    queues = queue_arguments("order", [("1s", 1)])
    assert set(first_cells(section(page, "Exchange and queues"))) == {names.EXCHANGE, *queues}


@pytest.mark.parametrize("page", [*PAGES, *WORKFLOWS], ids=name)
def test_each_make_target_is_one(page: Path) -> None:
    """In code, that is: elsewhere the word means what it means."""
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    used = re.findall(r"(?:`|^|run: |&& )make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert set(used) - set(targets) == set()
