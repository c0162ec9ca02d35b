"""The dashboard opens without a fault, and shows what has happened."""

import time
from pathlib import Path

import pytest

from browser.chromium import Chromium
from browser.counters import WIDTH, counters_url
from browser.dashboard import DEFINITION, NAME, Dashboard
from browser.known_run import EVENTS, REPEATED, KnownRun
from browser.stack import Stack

NOUNS = {"orders", "notifications"}
# What Graphite's own pages ask for in vain, with any dashboard.
GRAPHITES_OWN = ("/favicon.ico", "//fonts.googleapis.com/")

# The first test waits for the images to be built, and for the stack and the run.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("known_run")]


def test_the_page_opens_without_a_fault(dashboard: Dashboard, chromium: Chromium) -> None:
    dashboard.open()
    assert chromium.run("return document.title") == f"{NAME} - Graphite Dashboard"
    errors = chromium.errors()
    assert [error for error in errors if not any(own in error for own in GRAPHITES_OWN)] == []


def test_the_graphs_show_the_counts_of_the_run(dashboard: Dashboard) -> None:
    dashboard.open()
    graphs = dashboard.graphs()
    assert list(graphs) == [graph["title"] for graph in DEFINITION["graphs"]]
    processed, skipped, received, commit_ms, handle_ms, rare = graphs.values()
    assert set(processed) == {f"{noun}: {EVENTS}" for noun in NOUNS}
    assert {values[-1] for values in processed.values()} == {EVENTS}
    assert set(skipped) == {f"{noun}: {REPEATED}" for noun in NOUNS}
    assert {values[-1] for values in skipped.values()} == {REPEATED}
    arrived = {noun: sum(values) for noun, values in received.items()}
    assert arrived == dict.fromkeys(NOUNS, EVENTS + REPEATED)
    assert set(commit_ms) == set(handle_ms) == NOUNS
    assert min(map(min, (*commit_ms.values(), *handle_ms.values()))) > 0
    assert set(rare) == {"retried: 0", "parked: 0", "returned: 0"}


def test_pictures_are_taken(
    dashboard: Dashboard, chromium: Chromium, stack: Stack, known_run: KnownRun, pictures: Path
) -> None:
    dashboard.open()
    dashboard.show_past(int(time.time()) - known_run.began + 5)
    chromium.picture(pictures / "dashboard.png")
    chromium.open(counters_url(stack.graphite, known_run), WIDTH, 900)
    assert chromium.run("return document.querySelector('img').naturalWidth") == WIDTH
    chromium.picture(pictures / "counters.png", "img")
