"""Counters and timers as a statsd server sees them; outcomes as counters and log lines."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import LogCapture

from fakes.probe import CALLS, ends_in_time, free_port
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
        """Return the next metrics, at least this many."""
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


def test_counts_are_summed_and_sent_before_timers(statsd: Statsd, metrics: Metrics) -> None:
    """Zeros too, so that a graph starts at 0."""
    metrics.gauge("g", 1)
    metrics.gauge("g", 2)
    metrics.timing("t", 0.25)
    for _ in range(5):
        metrics.count("a")
    metrics.count("b", 7)
    metrics.count("c", 0)
    metrics.send()
    assert statsd.lines(5) == ["a:5|c", "b:7|c", "c:0|c", "t:250.000000|ms", "g:2|g"]
    metrics.count("a")
    metrics.send()
    assert statsd.lines(1) == ["a:1|c"]


def test_the_timings_of_a_name_are_bounded(statsd: Statsd, metrics: Metrics) -> None:
    for _ in range(1000):
        metrics.timing("t", 0.001)
    metrics.timing("u", 0.001)
    metrics.send()
    lines = statsd.lines(21)
    assert len(lines) == 21
    assert lines.count("t:1.000000|ms") == 20


def test_what_is_left_is_sent_at_the_end(statsd: Statsd) -> None:
    metrics = Metrics(statsd.host, statsd.port, "shop.eu")
    metrics.count("a", 3)
    metrics.close()
    assert statsd.lines(1) == ["shop.eu.a:3|c"]


def test_many_names_go_out_in_several_datagrams(statsd: Statsd, metrics: Metrics) -> None:
    """None of them is too large for any network."""
    for number in range(200):
        metrics.count(f"a_rather_long_name_of_a_counter_{number}", number)
    metrics.send()
    received = 0
    while received < 200:
        datagram = statsd.socket.recv(65536)
        assert len(datagram) <= 1432
        received += len(datagram.split(b"\n"))
    assert received == 200


# The name service.


class NameService:
    """The machine's name service. It blocks until ``answers`` is set, and learns one name later."""

    def __init__(self) -> None:
        self._real, self.address_of_graphite = socket.getaddrinfo, ""
        self.answers = threading.Event()

    def getaddrinfo(self, host: Any, *rest: Any, **options: Any) -> Any:
        self.answers.wait()
        if host == "graphite.example":
            if not self.address_of_graphite:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = self.address_of_graphite
        return self._real(host, *rest, **options)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameService]:
    names = NameService()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.answers.set()


def count_and_send(metrics: Metrics) -> None:
    for _ in range(CALLS):
        metrics.count("a")
        metrics.timing("t", 1.0)
        metrics.send()


@pytest.mark.parametrize("host", ["graphite.example", "a..b", "x" * 300, "127.0.0.1", "::1"])
def test_an_absent_server_delays_nobody(names: NameService, host: str) -> None:
    names.answers.set()
    metrics = Metrics(host, free_port(), "")
    ends_in_time(lambda: count_and_send(metrics))
    metrics.close()


@pytest.mark.parametrize("answers", [True, False], ids=["no such name", "no answer"])
def test_what_is_counted_before_the_name_resolves_delays_nobody_and_is_sent_later(
    statsd: Statsd, names: NameService, answers: bool
) -> None:
    if answers:
        names.answers.set()
    metrics = Metrics("graphite.example", statsd.port, "")
    ends_in_time(lambda: count_and_send(metrics))
    names.address_of_graphite = statsd.host
    names.answers.set()
    metrics.count("a")
    counted = 0
    while counted < CALLS + 1:
        metrics.send()
        counted += sum(int(line[2:-2]) for line in statsd.lines(1) if line.endswith("|c"))
    assert counted == CALLS + 1
    metrics.close()


def test_the_end_does_not_wait_for_a_name_service(names: NameService) -> None:
    metrics = Metrics("127.0.0.1", free_port(), "")
    metrics.count("a")
    ends_in_time(metrics.close)
    assert not names.answers.is_set()


# Outcomes.


class OpenTally(Tally):
    """A tally that shows what it has logged and counted."""

    def __init__(self) -> None:
        log, metrics = LogCapture(), Counts()
        super().__init__("orders", metrics, captured(log))
        self.lines, self.counts = log.entries, metrics.counts


@pytest.fixture
def tally() -> OpenTally:
    return OpenTally()


def test_every_counter_of_the_contract_is_zero_at_the_start(tally: OpenTally) -> None:
    parked = ("conflicted", "invalid", "rejected", "failed")
    others = ("received", "processed", "processed_skipped", "ignored", "retried", "returned")
    assert tally.counts == {f"orders_{name}": 0 for name in (*others, *parked)}


OUTCOMES = [outcome for outcome in Outcome if outcome is not Outcome.RETURNED]
FINE = (Outcome.PROCESSED, Outcome.SKIPPED, Outcome.IGNORED)


def test_a_few_deliveries_get_a_line_each(tally: OpenTally) -> None:
    settled = [*OUTCOMES, Outcome.PROCESSED, Outcome.PROCESSED]
    for number, outcome in enumerate(settled):
        tally.settled(outcome, {"event_id": str(number)})
        if number in (4, 9):
            tally.flush()
    tally.flush()
    assert [line["event_id"] for line in tally.lines] == [str(n) for n in range(10)]
    levels = ["info" if outcome in FINE else "warning" for outcome in settled]
    assert [line["log_level"] for line in tally.lines] == levels
    for outcome in OUTCOMES:
        assert tally.counts[f"orders_{outcome.value}"] == settled.count(outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_many_deliveries_get_one_line_for_all(tally: OpenTally, outcome: Outcome) -> None:
    for number in range(200):
        tally.settled(outcome if number == 100 else Outcome.PROCESSED, {})
    tally.flush()
    (line,) = tally.lines
    for name, number in {"processed": 199, outcome.value: 1}.items():
        expected = 200 if outcome is Outcome.PROCESSED else number
        assert line[name] == tally.counts[f"orders_{name}"] == expected
    assert line["log_level"] == ("info" if outcome in FINE else "warning")


def test_outcomes_are_counted_at_once_and_may_be_logged_later(tally: OpenTally) -> None:
    for number in range(1, 21):
        tally.settled(Outcome.PROCESSED, {"event_id": str(number)})
        tally.flush(log=False)
        assert (tally.counts["orders_processed"], tally.lines) == (number, [])
    tally.flush()
    assert [line["processed"] for line in tally.lines] == [20]
    assert tally.counts["orders_processed"] == 20


def test_returned_deliveries_are_counted_and_logged(tally: OpenTally) -> None:
    tally.returned(0)
    assert tally.lines == []
    tally.returned(3)
    assert tally.counts["orders_returned"] == 3
    assert tally.lines[0]["deliveries"] == 3
