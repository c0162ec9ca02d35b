"""Counters and timers as a statsd server sees them; outcomes as counters and log lines."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import LogCapture

from fakes.deadline import CALLS, ends_in_time
from idempotent_consumer.metrics import Metrics, Outcome, Tally
from idempotent_consumer.testing.process import Counts, captured

DEADLINE_S = 10.0


class Statsd:
    """A statsd server's socket."""

    def __init__(self, family: socket.AddressFamily, host: str) -> None:
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.settimeout(DEADLINE_S)
        self.host, self.port = host, self.socket.getsockname()[1]

    def lines(self, number: int) -> list[str]:
        """Return the next so many metrics."""
        lines: list[str] = []
        while len(lines) < number:
            lines += self.socket.recv(65536).decode().split("\n")
        return lines


@pytest.fixture(
    params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
def statsd(request: pytest.FixtureRequest) -> Iterator[Statsd]:
    server = Statsd(*request.param)
    yield server
    server.socket.close()


@pytest.fixture
def metrics(statsd: Statsd) -> Iterator[Metrics]:
    metrics = Metrics(statsd.host, statsd.port, "")
    yield metrics
    metrics.close()


def test_zeros_are_shown_at_the_start(statsd: Statsd, metrics: Metrics) -> None:
    """A graph begins at 0, not at the first event."""
    log: Any = None
    Tally("orders", metrics, log)
    metrics.send()
    assert set(statsd.lines(9)) >= {
        "orders_received:0|c",
        "orders_processed:0|c",
        "orders_processed_skipped:0|c",
    }


def test_what_is_counted_between_two_sendings_is_one_sum(statsd: Statsd, metrics: Metrics) -> None:
    for _ in range(5):
        metrics.count("a")
    metrics.count("b", 7)
    metrics.send()
    assert statsd.lines(2) == ["a:5|c", "b:7|c"]
    metrics.count("a")
    metrics.send()
    assert statsd.lines(1) == ["a:1|c"]


def test_counters_are_sent_before_timers(statsd: Statsd, metrics: Metrics) -> None:
    """Graphite may limit how many new series it makes at a time."""
    metrics.timing("t", 0.25)
    metrics.count("c")
    metrics.send()
    assert statsd.lines(2) == ["c:1|c", "t:250.000000|ms"]


def test_timings_are_bounded_a_name_and_a_sending(statsd: Statsd, metrics: Metrics) -> None:
    for _ in range(1000):
        metrics.timing("t", 0.001)
    metrics.timing("u", 0.001)
    metrics.count("end")
    metrics.send()
    lines = statsd.lines(22)
    assert len(lines) == 22
    assert lines.count("t:1.000000|ms") == 20


def test_the_end_sends_what_is_left(statsd: Statsd) -> None:
    metrics = Metrics(statsd.host, statsd.port, "shop.eu")
    metrics.count("a", 3)
    metrics.close()
    assert statsd.lines(1) == ["shop.eu.a:3|c"]


def test_many_names_go_out_in_several_datagrams(statsd: Statsd, metrics: Metrics) -> None:
    """None is larger than what every network carries."""
    for number in range(200):
        metrics.count(f"a_rather_long_name_of_a_counter_{number}", number)
    metrics.send()
    received = 0
    while received < 200:
        datagram = statsd.socket.recv(65536)
        assert len(datagram) <= 1432
        received += len(datagram.split(b"\n"))
    assert received == 200


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Stand in for the machine's name service: give the function that makes a name known."""
    real, names = socket.getaddrinfo, dict[str, str]()

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "graphite.example" and host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(names.get(host, host), *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names.__setitem__


def test_what_is_counted_before_the_name_resolves_is_sent_once_it_does(
    resolver: Callable[[str, str], None],
) -> None:
    """Neither the making nor the counting raises meanwhile."""
    statsd = Statsd(socket.AF_INET, "127.0.0.1")
    metrics = Metrics("graphite.example", statsd.port, "")
    for _ in range(3):
        metrics.count("a")
        metrics.send()
    resolver("graphite.example", "127.0.0.1")
    metrics.count("a")
    metrics.close()
    total = 0
    while total < 4:
        total += sum(int(line[2:-2]) for line in statsd.lines(1))
    assert total == 4
    statsd.socket.close()


@pytest.mark.parametrize("host", ["graphite.example", "a..b", "x" * 300])
def test_a_name_that_never_resolves_holds_up_nobody(
    host: str, resolver: Callable[[str, str], None]
) -> None:
    assert resolver is not None
    metrics = Metrics(host, 8125, "")
    ends_in_time(lambda: count_and_send(metrics))
    metrics.close()


def test_a_port_where_nobody_listens_holds_up_nobody(statsd: Statsd) -> None:
    statsd.socket.close()
    metrics = Metrics(statsd.host, statsd.port, "")
    ends_in_time(lambda: count_and_send(metrics))
    metrics.close()


def count_and_send(metrics: Metrics) -> None:
    for _ in range(CALLS):
        metrics.count("a")
        metrics.timing("t", 1.0)
        metrics.send()


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Stand in for a name service that answers once this is set."""
    real, resolves = socket.getaddrinfo, threading.Event()

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        resolves.wait()
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield resolves
    resolves.set()


@pytest.mark.parametrize("statsd", [(socket.AF_INET, "127.0.0.1")], indirect=True)
def test_a_name_service_that_does_not_answer_holds_up_nobody_and_loses_no_count(
    statsd: Statsd, resolves: threading.Event
) -> None:
    metrics = Metrics(statsd.host, statsd.port, "")
    ends_in_time(lambda: count_and_send(metrics))
    resolves.set()
    counted = 0
    while counted < CALLS:
        metrics.send()
        counted += sum(int(line[2:-2]) for line in statsd.lines(1) if line.endswith("|c"))
    assert counted == CALLS
    metrics.close()


def test_the_end_does_not_wait_for_a_name_service(resolves: threading.Event) -> None:
    metrics = Metrics("127.0.0.1", 8125, "")
    metrics.count("a")
    ends_in_time(metrics.close)
    assert not resolves.is_set()


# Outcomes.


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def tally(lines: LogCapture, counts: Counts) -> Tally:
    return Tally("orders", counts, captured(lines))


def test_every_counter_shows_as_zero_from_the_start(tally: Tally, counts: Counts) -> None:
    """The names of the contract."""
    assert tally is not None
    assert counts.counts == dict.fromkeys(
        [
            "orders_received",
            "orders_processed",
            "orders_processed_skipped",
            "orders_ignored",
            "orders_conflicted",
            "orders_invalid",
            "orders_failed",
            "orders_retried",
            "orders_returned",
        ],
        0,
    )


def test_a_few_deliveries_get_a_line_each(tally: Tally, lines: LogCapture) -> None:
    for number in range(10):
        tally.settled(Outcome.PROCESSED, {"event_id": str(number)})
    tally.flush()
    assert [line["event_id"] for line in lines.entries] == [str(n) for n in range(10)]


def test_many_get_one_line_with_their_numbers(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    for number in range(200):
        outcome = Outcome.PROCESSED if number % 4 else Outcome.SKIPPED
        tally.settled(outcome, {"event_id": str(number)})
    tally.flush()
    (line,) = lines.entries
    assert (line["processed"], line["processed_skipped"]) == (150, 50)
    assert (counts.counts["orders_processed"], counts.counts["orders_processed_skipped"]) == (
        150,
        50,
    )


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        (Outcome.PROCESSED, "info"),
        (Outcome.FAILED, "warning"),
        (Outcome.INVALID, "warning"),
    ],
)
def test_what_is_parked_is_a_warning_among_many_too(
    tally: Tally, lines: LogCapture, outcome: Outcome, level: str
) -> None:
    for number in range(200):
        tally.settled(outcome if number == 100 else Outcome.PROCESSED, {})
    tally.flush()
    assert [line["log_level"] for line in lines.entries] == [level]


@pytest.mark.parametrize("outcome", [each for each in Outcome if each is not Outcome.RETURNED])
def test_each_outcome_has_a_line_and_a_counter(
    tally: Tally, lines: LogCapture, counts: Counts, outcome: Outcome
) -> None:
    tally.settled(outcome, {"event_id": "1"})
    tally.flush()
    assert counts.counts[f"orders_{outcome.value}"] == 1
    assert len(lines.entries) == 1


def test_nothing_is_counted_or_written_twice(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    tally.settled(Outcome.PROCESSED, {})
    tally.flush()
    tally.flush()
    assert counts.counts["orders_processed"] == 1
    assert len(lines.entries) == 1


def test_returned_deliveries_are_counted_and_told_only_where_there_are_any(
    tally: Tally, lines: LogCapture, counts: Counts
) -> None:
    tally.returned(0)
    assert lines.entries == []
    tally.returned(3)
    assert counts.counts["orders_returned"] == 3
    assert lines.entries[0]["deliveries"] == 3
