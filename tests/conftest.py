"""Fixtures for whatever needs real servers: one pair per session, empty for each test."""

import logging
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from chaos.crash_points import VARIABLE
from chaos.receiver import Receiver
from chaos.rig import Rig
from chaos.trial import Result, table
from servers.broker import Broker
from servers.counters import StatsdListener, listen_statsd
from servers.etcd import Store
from servers.servers import Servers, docker_available, start_servers
from servers.services import Service, run_service

RunService = Callable[..., Service]

_started = pytest.StashKey[list[Service]]()
_results = pytest.StashKey[list[Result]]()


@pytest.fixture(scope="session")
def docker() -> None:
    """Skip what needs a Docker engine where none answers."""
    if not docker_available():
        pytest.skip("it needs Docker, which does not answer")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start RabbitMQ and etcd for the session; a test may stop, kill and freeze them."""
    with start_servers() as running:
        yield running


@pytest.fixture
def clean(servers: Servers) -> Servers:
    """Give the servers running and empty: no queue of a service, no key in etcd.

    The exchange stays. Deleting the services' own keys is safe, as none of them runs between
    two tests.
    """
    servers.heal()
    Broker(servers.rabbitmq).delete_queues("order", "notify", "shipment")
    Store(servers.etcd).clear()
    return servers


@pytest.fixture
def store(clean: Servers) -> Store:
    """Give an empty etcd; its history begins with this test."""
    return Store(clean.etcd, since=Store(clean.etcd).client.revision())


@pytest.fixture
def broker(clean: Servers) -> Broker:
    """Give the broker without queues of the services."""
    return Broker(clean.rabbitmq)


@pytest.fixture
def statsd() -> Iterator[StatsdListener]:
    with listen_statsd() as listener:
        yield listener


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver that takes a while for each call, so that faults fall into calls."""
    with closing(Receiver(latency_s=0.05)) as running:
        yield running


@pytest.fixture
def start_service(
    clean: Servers,
    statsd: StatsdListener,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[RunService]:
    """Start services against the servers and the listener; they end with the test.

    `start_service("order", BATCH_SIZE="1")` waits until the service is ready, with records in
    etcd; `wait=False` does not wait. A `script` is a program of the test's that runs under the
    service's name, with `arguments`; `crash_at` is a crash point and its passage; `command` is
    for what is started in another way. Its log is shown when the test fails.
    """
    defaults = {**clean.settings(), **statsd.settings(), "ENABLE_ETCD": "true"}
    services: list[Service] = []
    request.node.stash[_started] = services
    with ExitStack() as stack:

        def start(
            name: str,
            *,
            wait: bool = True,
            script: str = "",
            arguments: Sequence[str] = (),
            crash_at: str = "",
            command: Sequence[str] = (),
            **settings: str,
        ) -> Service:
            module = [name]
            if script:
                module = [f"its_{name}", *arguments]
                (tmp_path / f"{module[0]}.py").write_text(script)
                settings["PYTHONPATH"] = str(tmp_path)
            if crash_at:
                module = ["chaos.crash_points", *module]
                settings[VARIABLE] = crash_at
            running = run_service(
                name,
                {**defaults, **settings},
                log_directory=tmp_path,
                command=command or [sys.executable, "-m", *module],
            )
            service = stack.enter_context(running)
            services.append(service)
            if wait:
                service.wait_ready()
            return service

        yield start


@pytest.fixture
def rig(
    clean: Servers, broker: Broker, store: Store, statsd: StatsdListener, start_service: RunService
) -> Rig:
    """Give servers that are empty, with what reads them and starts services on them."""
    return Rig(clean, broker, store, statsd, start_service)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> list[Result]:
    """Give the list that trials leave their results in, for the table at the end."""
    return request.config.stash[_results]


def pytest_configure(config: pytest.Config) -> None:
    """Make that list, and keep pika from filling the output of a failed test.

    It logs ten lines for every refused connection, and tests here restart the broker.
    """
    config.stash[_results] = []
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if results := config.stash[_results]:
        terminalreporter.section("trials")
        terminalreporter.write_line(table(results))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of each service's log with a failed test."""
    report = yield
    if report.failed:
        for service in item.stash.get(_started, []):
            report.sections.append(
                (f"log of {service.name} ({service.pid})", service.output()[-8000:])
            )
    return report
