"""What a trial needs, and the table of all trials at the end."""

from collections.abc import Iterator

import pytest

from chaos.acks import AckAudit, audit_acks
from chaos.checks import StartService
from chaos.durations import MINUTES, SEED
from chaos.receiver import Receiver, listen_http
from chaos.rig import Rig
from chaos.trial import Result, StartTrial, Trial, table
from servers.broker import Broker
from servers.counters import StatsdListener
from servers.etcd import Store
from servers.servers import Servers

# The soak is collected only where it is wanted.
collect_ignore = [] if MINUTES else ["test_soak.py"]

_results = pytest.StashKey[list[Result]]()


def pytest_report_header() -> list[str]:
    """Say first of all how the soak can be had again."""
    return [f"soak: CHAOS_MINUTES={MINUTES:g} CHAOS_SEED={SEED}"] if MINUTES else []


def pytest_configure(config: pytest.Config) -> None:
    """Make the list that the trials leave their results in."""
    config.stash[_results] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each trial as chaos, and as long where it has no quick form, before -m chooses."""
    for item in items:
        if "trial" in getattr(item, "fixturenames", ()):
            item.add_marker("chaos")
            if item.get_closest_marker("quick") is None:
                item.add_marker("long")


@pytest.fixture
def acks(clean: Servers) -> Iterator[AckAudit]:
    """Stand between the services and the broker, and note each ack that comes too early."""
    with audit_acks(clean.rabbitmq, clean.etcd) as audit:
        yield audit


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver that takes a while for each call, so that faults fall into calls."""
    with listen_http(latency_s=0.05) as running:
        yield running


@pytest.fixture
def rig(
    clean: Servers,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    start_service: StartService,
) -> Rig:
    """Give servers that are empty, with what reads them and starts services on them."""
    return Rig(clean, broker, store, statsd, start_service)


@pytest.fixture
def trial(rig: Rig, acks: AckAudit, request: pytest.FixtureRequest) -> StartTrial:
    """Begin a trial: `trial("broker killed", service="order")`."""

    def begin(fault: str, *, service: str = "order") -> Trial:
        return Trial(fault, service, rig, acks, request.config.stash[_results])

    return begin


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    if results := config.stash[_results]:
        terminalreporter.section("trials")
        terminalreporter.write_line(table(results))
