"""The stack brings the dashboard along, and the dashboard shows what has happened."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.chromium import Chromium
from browser.dashboard import DEFINITION, NAME, WIDTH, Dashboard, counters_url
from browser.stack import EVENTS, REPEATED, KnownRun, Stack
from demo.command import CommandFailedError
from demo.stage import SERVICES
from servers.wait import eventually
from servers.web import fetch_json

# The first test waits for the images to be built, and for the stack; another one for the run.
pytestmark = pytest.mark.timeout(400)

NOUNS = {"orders", "notifications"}
KEPT = {"order records", "order effects", "notify records"}
# What Graphite's own pages ask for in vain, with any dashboard.
GRAPHITES_OWN = ("/favicon.ico", "//fonts.googleapis.com/")


def test_it_is_there_once_the_stack_is_healthy(stack: Stack) -> None:
    assert _titles(stack) == [graph["title"] for graph in DEFINITION["graphs"]]


@pytest.fixture
def restored(stack: Stack) -> Iterator[None]:
    """Load the dashboard again at the end."""
    yield
    _delete(stack)
    _check_health(stack)


@pytest.mark.usefixtures("restored")
def test_one_that_somebody_has_edited_stays(stack: Stack, dashboard: Dashboard) -> None:
    whole = _titles(stack)
    dashboard.open()
    dashboard.remove_first_and_save()
    eventually(lambda: _assert_titles(stack, whole[1:]))
    _check_health(stack)
    dashboard.open()
    assert list(dashboard.graphs()) == whole[1:]


def test_one_that_was_deleted_comes_back(stack: Stack) -> None:
    whole = _titles(stack)
    _delete(stack)
    _check_health(stack)
    _assert_titles(stack, whole)


def test_the_image_of_the_bare_example_runs_its_program(stack: Stack) -> None:
    """Up to its one setting; run for longer, its events would be counted on the dashboard."""
    with pytest.raises(CommandFailedError, match="RABBITMQ_URL is not of the form"):
        stack.compose(
            "run",
            "--build",
            "--rm",
            "--no-deps",
            "-T",
            "-e",
            "RABBITMQ_URL=nowhere",
            "example1",
            timeout_s=120,
        )


def _titles(stack: Stack) -> list[str]:
    state: Any = fetch_json("GET", f"{stack.graphite}/dashboard/load/{NAME}")["state"]
    return [parameters["title"] for _, parameters, *_ in state["graphs"]]


def _assert_titles(stack: Stack, titles: list[str]) -> None:
    assert _titles(stack) == titles


def _delete(stack: Stack) -> None:
    answer = fetch_json("GET", f"{stack.graphite}/dashboard/delete/{NAME}")
    assert answer == {"success": True}


def _check_health(stack: Stack) -> None:
    """Check it once more, as the engine does every few seconds."""
    stack.compose("exec", "-T", "graphite-statsd", "node", "/opt/graphite-healthcheck.js")


@pytest.mark.usefixtures("known_run")
def test_the_page_opens_without_a_fault(dashboard: Dashboard, chromium: Chromium) -> None:
    dashboard.open()
    assert chromium.run("return document.title") == f"{NAME} - Graphite Dashboard"
    errors = chromium.errors()
    assert [error for error in errors if not any(own in error for own in GRAPHITES_OWN)] == []


@pytest.mark.usefixtures("known_run")
def test_the_graphs_show_the_counts_of_the_run(dashboard: Dashboard) -> None:
    dashboard.open()
    graphs = dashboard.graphs()
    assert list(graphs) == [graph["title"] for graph in DEFINITION["graphs"]]
    kept, queued, processed, skipped, received, rare, commit_ms, handle_ms = graphs.values()
    assert set(kept) == {f"{what}: {EVENTS}" for what in KEPT}
    (waited,) = (values for line, values in queued.items() if line.startswith("notify ready"))
    assert (max(waited), waited[-1]) == (30, 0)
    assert set(processed) == {f"{noun}: {EVENTS}" for noun in NOUNS}
    assert {values[-1] for values in processed.values()} == {EVENTS}
    assert set(skipped) == {f"{noun}: {REPEATED}" for noun in NOUNS}
    assert {values[-1] for values in skipped.values()} == {REPEATED}
    arrived = {noun: sum(values) for noun, values in received.items()}
    assert arrived == dict.fromkeys(NOUNS, EVENTS + REPEATED)
    assert set(commit_ms) == set(handle_ms) == NOUNS
    assert min(map(min, (*commit_ms.values(), *handle_ms.values()))) > 0
    eventually(lambda: _assert_nothing_queued(dashboard))
    assert set(rare) == {"retried: 0", "parked: 0", "returned: 0", "breakers open: 0"}


def _assert_nothing_queued(dashboard: Dashboard) -> None:
    """RabbitMQ counts what is unacked every five seconds only."""
    queued = dashboard.graphs()[DEFINITION["graphs"][1]["title"]]
    services = {f"{service} {what}: 0" for service in SERVICES for what in ("ready", "unacked")}
    assert set(queued) == services | {"retries: 0", "dead letters: 0"}


def test_pictures_are_taken(
    dashboard: Dashboard, chromium: Chromium, stack: Stack, known_run: KnownRun, pictures: Path
) -> None:
    dashboard.open()
    dashboard.show_past(int(time.time()) - known_run.began + 5)
    chromium.picture(pictures / "dashboard.png")
    chromium.open(counters_url(stack.graphite, known_run), WIDTH, 900)
    assert chromium.run("return document.querySelector('img').naturalWidth") == WIDTH
    chromium.picture(pictures / "counters.png", "img")
