"""The stack brings its dashboard along, and the dashboard shows a run whose counts are known.

The stack is the one of `make up`, on ports of its own.
"""

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from browser.chromium import Chromium
from chaos.checks import becomes
from demo.compose import Compose, Ports
from demo.stage import SERVICES
from demo.steps import CommandFailedError
from servers.counters import GraphiteCounters
from servers.servers import REPOSITORY
from servers.wait import eventually
from servers.web import fetch_json

# The first test waits for the images to be built and the stack to start, another for the run.
pytestmark = pytest.mark.timeout(400)

DEFINITION: dict[str, Any] = json.loads(
    (REPOSITORY / "server-config/graphite-dashboard.json").read_text()
)
NAME = DEFINITION["name"]
TITLES = [graph["title"] for graph in DEFINITION["graphs"]]
EVENTS, WHILE_STOPPED, REPEATED = 70, 30, 30
AT_A_TIME = 5

NOUNS = {"orders", "notifications"}
KEPT = {"order records", "order effects", "notify records"}
# Graphite's own pages request these in vain, with any dashboard.
GRAPHITES_OWN = ("/favicon.ico", "//fonts.googleapis.com/")

# One graph of the four counters over the whole run, for the README.
APPEARANCE = {
    **DEFINITION["defaultGraphParams"],
    "title": "Events counted since the start",
    "width": 1600,
    "height": 620,
    "margin": 20,
    "fontSize": 20,
}
# In the order of drawing: where two lines coincide, the thin one lies on the thick one.
LINES = (
    ("orders_processed", "2266cc", 12),
    ("notifications_processed", "ff9922", 5),
    ("orders_processed_skipped", "99bbee", 12),
    ("notifications_processed_skipped", "cc5500", 5),
)

# While a graph is drawn again, its class changes and its old image stays.
IMAGES = """
return Array.from(document.querySelectorAll("img[class^=graph-img]"),
                  (image) => [image.src, image.complete ? image.naturalWidth : 0])
"""
SHOW_PAST = """
TimeRange.relativeStartQuantity = arguments[0]
TimeRange.relativeStartUnits = "seconds"
timeRangeUpdated()
"""


class Stack:
    """The stack, and the counters that Graphite is expected to show."""

    def __init__(self) -> None:
        ports = Ports.read().elsewhere()
        settings = {**ports.settings(), "ENABLE_ETCD": "true"}
        self.compose = Compose(f"browser-{secrets.token_hex(3)}", settings)
        self.graphite = f"http://{ports.host}:{ports.numbers['PORT_GRAPHITE']}"
        self.counters = GraphiteCounters(self.graphite)
        self._broker = ports.broker()
        self._expected: Counter[str] = Counter()

    def publish(self, ids: range, *counters: str) -> None:
        """Publish a few events at a time, and wait each time until Graphite shows them.

        So the lines rise in visible steps, at the pace of the stack.
        """
        for first in ids[::AT_A_TIME]:
            numbers = range(first, first + AT_A_TIME)
            self._broker.publish(*(f"order-{number}" for number in numbers)).run()
            self.expect(AT_A_TIME, *counters)

    def expect(self, more: int, *counters: str) -> None:
        self._expected.update(dict.fromkeys(counters, more))
        becomes(
            lambda: {name: self.counters.count(name) for name in self._expected},
            self._expected,
            also=(OSError,),
        )

    def titles(self) -> list[str]:
        state: Any = fetch_json("GET", f"{self.graphite}/dashboard/load/{NAME}")["state"]
        return [parameters["title"] for _, parameters, *_ in state["graphs"]]

    def delete(self) -> None:
        answer = fetch_json("GET", f"{self.graphite}/dashboard/delete/{NAME}")
        assert answer == {"success": True}

    def check_health(self) -> None:
        """Run the health check, as the engine does every few seconds."""
        self.compose.run("exec", "-T", "graphite-statsd", "node", "/opt/graphite-healthcheck.js")


class Dashboard:
    """The dashboard's page in the browser."""

    def __init__(self, chromium: Chromium, graphite: str) -> None:
        self._chromium = chromium
        self._url = f"{graphite}/dashboard/{NAME}"

    def open(self) -> None:
        """Open the page and wait until all of its graphs are drawn."""
        self._chromium.open(self._url, 1200, 1195)
        eventually(self._drawn)

    def show_past(self, seconds: int) -> None:
        """Choose how far back the graphs go, like its "Relative Time Range"."""
        self._chromium.run(SHOW_PAST, str(seconds))
        eventually(lambda: self._drawn(f"-{seconds}seconds"))

    def graphs(self) -> dict[str, dict[str, list[float]]]:
        """Return for each graph, by title, the values of its lines by their legends."""
        return {
            _query(url)["title"][0]: {
                line["target"]: [value for value, _ in line["datapoints"] if value is not None]
                for line in fetch_json("GET", f"{url}&format=json")
            }
            for url in self._images()
        }

    def _drawn(self, since: str | None = None) -> None:
        # The page has the dashboard, and loads it once more because its name is in the URL.
        assert not self._chromium.run("return Ext.Ajax.isLoading()")
        images = self._images()
        assert images
        assert set(images.values()) == {DEFINITION["graphSize"]["width"]}
        assert since is None or all(_query(url)["from"] == [since] for url in images)

    def _images(self) -> dict[str, int]:
        """Return the width of each graph's image by its URL; 0 while it is loading."""
        return {str(url): int(width) for url, width in self._chromium.run(IMAGES)}


def _query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(url).query)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Build and start everything, and leave nothing behind."""
    stack = Stack()
    try:
        stack.compose.run("up", "--build", "--detach", "--wait", timeout_s=240)
        yield stack
    finally:
        stack.compose.run(
            "--profile", "example1", "down", "--volumes", "--rmi", "local", "--timeout", "1"
        )


@pytest.fixture(scope="module")
def known_run(stack: Stack) -> tuple[int, int]:
    """Publish some events, some of them while notify is stopped, and some of them again.

    Return the begin and end of the run, as whole seconds of Unix time.
    """
    began, both = int(time.time()), ("orders_processed", "notifications_processed")
    stack.publish(range(20), *both)
    stack.compose.run("stop", "notify")
    stack.publish(range(20, 20 + WHILE_STOPPED), "orders_processed")
    becomes(lambda: stack.counters.gauge("notify_ready"), WHILE_STOPPED, also=(OSError,))
    stack.compose.run("start", "notify")
    stack.expect(WHILE_STOPPED, "notifications_processed")
    stack.publish(range(20 + WHILE_STOPPED, EVENTS), *both)
    stack.publish(range(REPEATED), "orders_processed_skipped", "notifications_processed_skipped")
    return began, int(time.time())


@pytest.fixture
def dashboard(chromium: Chromium, stack: Stack) -> Dashboard:
    return Dashboard(chromium, stack.graphite)


def test_it_is_there_at_once_an_edited_one_stays_and_a_deleted_one_comes_back(
    stack: Stack, dashboard: Dashboard, chromium: Chromium
) -> None:
    assert stack.titles() == TITLES
    dashboard.open()
    chromium.run("graphStore.removeAt(0); sendSaveRequest(arguments[0])", NAME)
    becomes(stack.titles, TITLES[1:])
    stack.check_health()
    dashboard.open()
    assert list(dashboard.graphs()) == TITLES[1:]
    stack.delete()
    stack.check_health()
    assert stack.titles() == TITLES


def test_the_image_of_the_bare_example_runs_its_program(stack: Stack) -> None:
    """With a wrong setting, because the events of a longer run would be counted."""
    flags = ("--build", "--rm", "--no-deps", "-T", "-e", "RABBITMQ_URL=nowhere")
    with pytest.raises(CommandFailedError, match="RABBITMQ_URL is not of the form"):
        stack.compose.run("run", *flags, "example1", timeout_s=120)


@pytest.mark.usefixtures("known_run")
def test_it_opens_without_a_fault_and_shows_the_counts_of_the_run(
    dashboard: Dashboard, chromium: Chromium
) -> None:
    dashboard.open()
    assert chromium.run("return document.title") == f"{NAME} - Graphite Dashboard"
    errors = chromium.errors()
    assert [error for error in errors if not any(own in error for own in GRAPHITES_OWN)] == []
    graphs = dashboard.graphs()
    assert list(graphs) == TITLES
    kept, queued, processed, skipped, received, rare, commit_ms, handle_ms = graphs.values()
    assert set(kept) == {f"{what}: {EVENTS}" for what in KEPT}
    (waited,) = (values for line, values in queued.items() if line.startswith("notify ready"))
    assert (max(waited), waited[-1]) == (WHILE_STOPPED, 0)
    assert set(processed) == {f"{noun}: {EVENTS}" for noun in NOUNS}
    assert {values[-1] for values in processed.values()} == {EVENTS}
    assert set(skipped) == {f"{noun}: {REPEATED}" for noun in NOUNS}
    assert {values[-1] for values in skipped.values()} == {REPEATED}
    arrived = {noun: sum(values) for noun, values in received.items()}
    assert arrived == dict.fromkeys(NOUNS, EVENTS + REPEATED)
    assert set(commit_ms) == set(handle_ms) == NOUNS
    assert min(map(min, (*commit_ms.values(), *handle_ms.values()))) > 0
    assert set(rare) == {"retried: 0", "parked: 0", "returned: 0", "breakers open: 0"}

    # RabbitMQ counts the unacked messages only every five seconds.
    empty = {f"{service} {what}: 0" for service in SERVICES for what in ("ready", "unacked")}
    empty |= {"retries: 0", "dead letters: 0"}
    becomes(lambda: set(dashboard.graphs()[TITLES[1]]), empty)


def test_pictures_are_taken(
    dashboard: Dashboard,
    chromium: Chromium,
    stack: Stack,
    known_run: tuple[int, int],
    pictures: Path,
) -> None:
    (began, ended), width = known_run, APPEARANCE["width"]
    dashboard.open()
    dashboard.show_past(int(time.time()) - began + 5)
    chromium.picture(pictures / "dashboard.png")
    targets = [
        f'lineWidth(color(alias(integral(stats_counts.{name}),"{name}"),"{color}"),{width})'
        for name, color, width in LINES
    ]
    times = {"from": began - 3, "until": ended + 4}
    query = urlencode({**APPEARANCE, **times, "target": targets}, doseq=True)
    chromium.open(f"{stack.graphite}/render?{query}", 1600, 900)
    assert chromium.run("return document.querySelector('img').naturalWidth") == width
    chromium.picture(pictures / "counters.png", "img")
