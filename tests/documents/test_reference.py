"""The reference pages list what the code has, all of it and nothing else."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import idempotent_consumer
from demo.page.controls import ACTS
from documents.pages import DOCS, PAGES, REPOSITORY, blocks, commands, first_cells, name, section
from fakes.operator import Operator
from idempotent_consumer import Settings, names, testing
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.cli.broker import Management
from idempotent_consumer.cli.command import VERBS, main
from idempotent_consumer.cli.context import Context
from idempotent_consumer.cli.output import CommandError
from idempotent_consumer.metrics import _SAY, Outcome
from idempotent_consumer.settings import _VARIABLES

LIBRARY = Path(idempotent_consumer.__file__).parent
SIGNALS = DOCS / "signals.md"
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
LEVELS = {"info", "warning", "error", "critical"}


def test_the_page_of_settings_lists_each_variable_with_its_default() -> None:
    page = (DOCS / "settings.md").read_text()
    documented = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^|]*?)`? \|", page, re.MULTILINE))
    assert list(documented) == list(_VARIABLES)
    for variable, (field, parse) in _VARIABLES.items():
        default, shown = getattr(Settings(), field), documented[variable]
        assert not default if shown == "unset" else parse(shown) == default, variable


def test_the_page_of_the_api_lists_each_public_name() -> None:
    cells = first_cells((DOCS / "api.md").read_text())
    assert sorted(cells) == sorted([*idempotent_consumer.__all__, *testing.__all__])


def test_the_page_of_signals_explains_the_metrics_that_the_library_sends() -> None:
    """All of them, and no others."""
    sent = {"count": {outcome.value for outcome in Outcome}, "timing": set[str]()}
    for file in LIBRARY.rglob("*.py"):
        for kind, metric in re.findall(r'tally\.(count|timing)[(,]\s*"(\w+)"', file.read_text()):
            sent[kind].add(metric)
    gauges = re.findall(r'\.gauge\(f"\{self._noun\}_(\w+)"', (LIBRARY / "metrics.py").read_text())
    sent["gauge"] = set(gauges)
    for heading, kind in (("Counters", "count"), ("Timers", "timing"), ("Gauge", "gauge")):
        cells = first_cells(section(SIGNALS, heading))
        assert {cell.partition("_")[2] for cell in cells} == sent[kind], heading


def test_each_gauge_of_what_is_held_is_explained() -> None:
    operator = Operator()
    operator.has_service("order")
    sent = operator.run("gauges", "--effects", "order=/orders/", "--json").json["gauges"]
    assert first_cells(section(SIGNALS, "What is held")) == list(sent)


def test_the_verbs_that_use_the_management_api_are_named() -> None:
    class Asked(Operator):
        def management(self) -> Management:
            raise CommandError("asked the management API")

    def asks(verb: str) -> bool:
        service = {"publish": "{}", "find": "1", "dead-letters": "list order"}.get(verb, "order")
        event = " 1" * (verb in ("inspect", "forget"))
        ran = Asked().run(verb, *f"{service}{event}".split())
        assert ran.code < 2, ran
        return "asked the management API" in ran.err

    page = (DOCS / "command.md").read_text()
    (named,) = re.findall(r"API,\s+which only ([^.]*) use\.", page)
    asking = {verb.name for verb in VERBS if asks(verb.name)}
    assert set(re.findall(r"`([a-z-]+)`", named)) == asking


def test_each_name_in_missing_is_explained() -> None:
    code = "".join(file.read_text() for file in LIBRARY.glob("*.py"))
    lacking = set(re.findall(r'lacks\(\s*"([\w-]+)"|stuck\["(\w+)"\]', code))
    rows = re.findall(r"^\| ((?:`[\w-]+` )+)\|", section(SIGNALS, "Health"), re.MULTILINE)
    explained = set(re.findall(r"`([\w-]+)`", " ".join(rows)))
    # The names of the connections are not in such a call.
    assert explained - {"rabbitmq", "rabbitmq-publishing"} == {one or two for one, two in lacking}


def test_the_page_of_signals_explains_the_log_lines_that_the_library_writes() -> None:
    """All of them, and no others."""
    cells, lines = first_cells(section(SIGNALS, "Log lines")), set(said())
    assert len(lines) > 20
    assert {line for line in lines if not any(re.fullmatch(line, cell) for cell in cells)} == set()
    assert [cell for cell in cells if not any(re.fullmatch(line, cell) for line in lines)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_quoted_log_line_is_one(page: Path) -> None:
    lines = [line for block in blocks(page, "json") for line in block.splitlines()]
    quoted = {text for line in lines if (text := json.loads(line).get("event"))}
    patterns = [*said(), "notification"]  # The last one is from notify.
    assert {text for text in quoted if not any(re.fullmatch(p, text) for p in patterns)} == set()


def said() -> Iterator[str]:
    """Yield a pattern for each message that a service logs."""
    yield from map(re.escape, _SAY.values())
    for file in LIBRARY.rglob("*.py"):
        if "cli" in file.relative_to(LIBRARY).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value) in ("self._log", "self.log", "log")
            ):
                yield from _patterns(node.args[0])


def _patterns(text: ast.expr) -> Iterator[str]:
    """Yield a pattern for each text that an expression can be; none for a variable alone."""
    match text:
        case ast.Constant(str(value)):
            yield re.escape(value)
        case ast.IfExp(body=first, orelse=second):
            yield from (*_patterns(first), *_patterns(second))
        case ast.JoinedStr(values=parts):
            yield "".join(next(_patterns(part), ".+") for part in parts)


def test_each_header_and_queue_is_listed() -> None:
    page = DOCS / "names.md"
    headers = {value for key, value in vars(names).items() if key.endswith("_HEADER")}
    assert headers <= set(first_cells(section(page, "Message headers")))
    queues = queue_arguments("order", [("1s", 1)])
    assert set(first_cells(section(page, "Exchange and queues"))) == {names.EXCHANGE, *queues}


def test_each_reason_to_park_is_explained() -> None:
    reasons = {names.INVALID, names.CONFLICT, names.REJECTED, names.FAILED}
    assert reasons == set(first_cells((DOCS / "dead-letters.md").read_text()))
    inputs = section(REPOSITORY / "README.md", "What each input gets")
    assert set(re.findall(r"`x-reason: (\w+)`", inputs)) == reasons


def test_the_act_of_a_fault_quotes_the_page_of_faults() -> None:
    page = " ".join((DOCS / "when-can-my-code-run-twice.md").read_text().replace("**", "").split())
    texts = (text for act in ACTS.values() for text, *_ in act)
    (quoted,) = (text for text in texts if text.startswith("Killed: "))
    assert all(sentence.strip(".") in page for sentence in quoted.split(". "))


def test_the_changelog_and_every_project_have_the_librarys_version() -> None:
    versions = {
        name(project): tomllib.loads(project.read_text())["project"]["version"]
        for project in REPOSITORY.glob("*/pyproject.toml")
    }
    newest, *_ = re.findall(r"\n## (.+?),", (REPOSITORY / "CHANGELOG.md").read_text())
    assert "idempotent_consumer/pyproject.toml" in versions
    assert versions == dict.fromkeys(versions, newest)


def test_the_design_names_each_file_of_the_library() -> None:
    """Its picture names no other file."""
    rows = section(DOCS / "design.md", "The path of one event").splitlines()
    table = " ".join(row.split("|")[1] for row in rows if row.startswith("| `"))
    files = {path.name for path in LIBRARY.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {path.name + "/" for path in LIBRARY.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"`([\w/.]+)`", table)) == files | folders
    assert set(re.findall(r"\w+\.py", (DOCS / "event-way.svg").read_text())) <= files


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_command_is_one(page: Path) -> None:
    """Its verb and options exist; no server is asked."""

    def refuse(_: object) -> Context:
        raise CommandError("its arguments are right")

    for arguments in commands(page, "idempotent-consumer"):
        if len(arguments) > 1:
            assert main(arguments, {}, refuse) == 1, arguments


@pytest.mark.parametrize("page", [*PAGES, *WORKFLOWS], ids=name)
def test_each_make_target_is_one(page: Path) -> None:
    """Only in code: elsewhere, "make" is an English word."""
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    used = re.findall(r"(?:`|^|run: |&& )make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert set(used) - set(targets) == set()
