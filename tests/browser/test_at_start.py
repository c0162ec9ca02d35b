"""The stack brings the dashboard along, and leaves one alone that is there."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser.dashboard import DEFINITION, NAME, Dashboard
from browser.stack import Stack
from demo.command import CommandFailedError
from servers.wait import eventually
from servers.web import fetch_json

# The first test waits for the images to be built, and for the stack.
pytestmark = pytest.mark.timeout(400)


def test_it_is_there_once_the_stack_is_healthy(stack: Stack) -> None:
    assert _titles(stack) == [graph["title"] for graph in DEFINITION["graphs"]]


@pytest.fixture
def restored(stack: Stack) -> Iterator[None]:
    """Load the dashboard anew at the end."""
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
