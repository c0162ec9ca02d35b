"""What a trial needs, and the table of all trials at the end."""

from collections.abc import Callable, Iterator

import pytest

from chaos.acks import AckAudit, audit_acks
from chaos.soak import MINUTES, SEED
from chaos.table import table
from chaos.trial import Result, Trial
from servers.broker import Broker
from servers.servers import Servers
from servers.services import Service
from servers.store import Store

StartTrial = Callable[..., Trial]

# The soak is collected only where it is wanted.
collect_ignore = [] if MINUTES else ["test_soak.py"]

_results = pytest.StashKey[list[Result]]()


def pytest_report_header() -> list[str]:
    """Say first of all how the soak can be had again."""
    return [f"soak: CHAOS_MINUTES={MINUTES:g} CHAOS_SEED={SEED}"] if MINUTES else []


def pytest_configure(config: pytest.Config) -> None:
    """Make the list that the trials leave their results in."""
    config.stash[_results] = []


@pytest.fixture
def acks(clean: Servers) -> Iterator[AckAudit]:
    """Stand between the services and the broker, and note each ack that comes too early."""
    with audit_acks(clean.rabbitmq, clean.etcd) as audit:
        yield audit


@pytest.fixture
def start_audited(start_service: Callable[..., Service], acks: AckAudit) -> Callable[..., Service]:
    """Start services as `start_service` does, with their acks audited."""

    def start(name: str, **settings: str) -> Service:
        return start_service(name, **{"RABBITMQ_URL": acks.url, **settings})

    return start


@pytest.fixture
def trial(
    broker: Broker, store: Store, acks: AckAudit, request: pytest.FixtureRequest
) -> StartTrial:
    """Begin a trial: `trial("broker killed", service="order")`."""

    def begin(fault: str, *, service: str = "order") -> Trial:
        return Trial(fault, service, broker, store, acks, request.config.stash[_results])

    return begin


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    if results := config.stash[_results]:
        terminalreporter.section("trials")
        terminalreporter.write_line(table(results))
