"""The operator's command with fakes of the servers and of the terminal."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager as ContextManager
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import orjson
import pika
from etcd3 import etcdrpc as pb
from grpc.aio import AioRpcError

from idempotent_consumer import records
from idempotent_consumer.bus import queue_arguments
from idempotent_consumer.cli.broker import Broker, BrokerError, Depth
from idempotent_consumer.cli.command import main
from idempotent_consumer.cli.context import Context
from idempotent_consumer.cli.etcd import Etcd
from idempotent_consumer.cli.web import Page, Tls, WebError
from idempotent_consumer.etcd import EtcdError, Failure
from idempotent_consumer.event import Outgoing
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import Store

NOW_S = 1_800_000_000.0
TOKEN = "a" * 32 + "/1/7"
ETCD_AWAY, RABBITMQ_AWAY = (
    EtcdError(Failure.UNKNOWN, "etcd is away"),
    BrokerError("RabbitMQ is away"),
)
PAGE_AWAY = WebError("127.0.0.1 does not answer")
NO_QUEUES = {"api/queues/%2F": PAGE_AWAY}
"""The management API does not answer."""


class Ran(NamedTuple):
    """How the command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return orjson.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Terminal(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self) -> bool:
        return True


class Typed(io.BytesIO):
    """Standard input on a terminal. Something happens while a line is typed."""

    def __init__(self, text: bytes, meanwhile: Callable[[], object]) -> None:
        super().__init__(text)
        self._meanwhile = meanwhile

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> bytes:
        self._meanwhile()
        return super().readline(size)


class FakeEtcd(Etcd):
    """An etcd of one member, in memory."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def ask(self, method: str, request: Any) -> Any:
        if self._operator.etcd_error is not None:
            raise self._operator.etcd_error
        try:
            reply = self._operator.store.apply(method, request)
        except AioRpcError as error:
            raise EtcdError(Failure.UNKNOWN, str(error.details())) from None
        if method in ("Range", "Txn"):
            self._operator.meanwhile()
        return reply


class FakeRabbit(Broker):
    """A connection to RabbitMQ with the operator's queues, and its only channel."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self.version = operator, operator.rabbitmq_version
        self._unacked: list[tuple[Any, bytes]] = []
        self._ready: Iterator[tuple[int, tuple[Any, bytes]]] = iter(())
        self._prefetch = 0

    def depth(self, queue: str) -> Depth | None:
        return self._operator.depths.get(queue)

    def differs(self, queue: str, arguments: dict[str, object]) -> bool:
        return bool(self._operator.queue(queue)["arguments"] != arguments)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        yield self

    def wait(self, seconds: float) -> None:
        self._operator.waits()

    def confirm_delivery(self) -> None: ...

    def queue_declare(self, queue: str, *, passive: bool) -> Any:
        ready = len(self._operator.waiting[queue]) + self._operator.left[queue]
        consumers = self._operator.depths.get(queue, Depth(0, 0)).consumers
        return SimpleNamespace(
            method=SimpleNamespace(message_count=ready, consumer_count=consumers)
        )

    def queue_delete(self, queue: str) -> Any:
        self._operator.deleted.append(queue)
        return self.queue_declare(queue, passive=True)

    def consume(self, queue: str, *, inactivity_timeout: float) -> Iterator[Any]:
        """Deliver the messages up to the prefetch, then none."""
        self._unacked = list(self._operator.waiting[queue])
        self._ready = iter(enumerate(self._unacked))
        for _ in range(self._prefetch):
            yield self.basic_get(queue)
        while inactivity_timeout:
            yield None, None, None

    def basic_qos(self, *, prefetch_count: int) -> None:
        self._prefetch = min(prefetch_count, self._operator.most_prefetched)

    def basic_get(self, _queue: str) -> tuple[Any, Any, Any]:
        """Deliver the next message, or none."""
        tag, (properties, body) = next(self._ready, (None, (None, None)))
        if tag is None:
            return None, None, None
        self._operator.looked_at += 1
        return SimpleNamespace(delivery_tag=tag), properties, body

    def basic_publish(
        self, exchange: str, queue: str, body: bytes, properties: Any, *, mandatory: bool
    ) -> None:
        if exchange or not mandatory:
            raise AssertionError("without such a queue it would be lost")
        if self._unacked:
            raise AssertionError("pika would read all of a large queue while it waits here")
        self._operator.resent.append((queue, properties, body))

    def basic_ack(self, tag: int) -> None:
        self._operator.acks()
        self._operator.removed.append(self._unacked[tag][1])
        self._operator.dead.remove(self._unacked[tag])


class Operator(Context):
    """An operator at the command line, with servers, a terminal and a clock of the test's own."""

    def __init__(self) -> None:
        self.given = {"ENABLE_ETCD": "true"}
        self.time_s = NOW_S
        self.store = Store(lambda: self.time_s, max_txn_ops=1024)
        self.stdin, self.err = io.BytesIO(), io.StringIO()
        self.depths: dict[str, Depth] = {}
        self.queues, self.bindings, self.policies = (list[dict[str, Any]]() for _ in range(3))
        self.waiting = defaultdict[str, list[tuple[Any, bytes]]](list)
        self.dead = self.waiting["order.dead-letter"]
        self.left = Counter[str]()
        """How many messages leave a queue after they are counted."""
        self.resent = list[tuple[str, Any, bytes]]()
        self.removed, self.deleted, self.published = list[bytes](), list[str](), list[bytes]()
        self.looked_at, self.most_prefetched = 0, 65_535
        self.pages: dict[str, bytes | WebError] = {}
        self.publish_error: BaseException | None = None
        self.etcd_error: EtcdError | None = None
        self.rabbitmq_error: BrokerError | None = None
        self.rabbitmq_version = "4.3.6"
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens after each request for data in etcd."""
        self.waits: Callable[[], None] = lambda: None
        """What happens while the command waits for RabbitMQ."""
        self.acks: Callable[[], None] = lambda: None
        """What happens before RabbitMQ takes an ack."""
        self.sent: list[dict[str, int]] = []
        """The gauges of each round that was sent to statsd."""

    def run(self, *arguments: str, **environ: str) -> Ran:
        def context(environ: Mapping[str, str]) -> Operator:
            self.environ, self.settings = environ, Settings.from_environ(environ)
            return self

        with redirect_stdout(io.StringIO()) as out, redirect_stderr(self.err):
            try:
                code = main(arguments, {**self.given, **environ}, context)
            except SystemExit as ended:  # argparse's own way out.
                code = int(str(ended.code))
        return Ran(code, out.getvalue(), cast("io.StringIO", self.err).getvalue())

    def ends(self, code: int, says: str, *arguments: str) -> None:
        """Run the command; it must end with this exit code and say this."""
        ran = self.run(*arguments)
        if ran.code != code or says not in ran.out + ran.err:
            raise AssertionError(f"{ran}, and not {code}, {says!r}")

    # What the servers hold.

    def types(self, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Sit at a terminal and type this; something happens meanwhile."""
        self.stdin, self.err = Typed(text.encode(), meanwhile), Terminal()

    def has_record(
        self,
        service: str,
        event_id: str,
        digest: str = "1:00",
        state: str = "done",
        lease_s: int = 3600,
        events: tuple[Outgoing, ...] = (),
    ) -> None:
        """Write a replica's record, without a lease if ``lease_s`` is 0."""
        grant = pb.LeaseGrantRequest(TTL=lease_s)
        lease = self.store.apply("LeaseGrant", grant).ID if lease_s else 0
        value = records.encode(state, digest, TOKEN, "2027-01-15T07:58:20.000+00:00", events)
        self.store.put(f"/service/{service}/{event_id}", value, lease)

    def has_letter(self, body: bytes, queue: Any = "order.dead-letter", **headers: object) -> None:
        """Put a message into a queue."""
        named = {f"x-{name.replace('_', '-')}": value for name, value in headers.items()}
        self.waiting[queue].append((pika.BasicProperties(headers=named), body))
        self.depths[queue] = Depth(len(self.waiting[queue]), 0)

    def has_service(self, service: str, dead: int = 0, consumers: int = 1) -> None:
        """Declare a service's queues, as by the default settings."""
        for name, arguments in queue_arguments(service, Settings().retry_delays).items():
            facts = {"name": name, "type": "quorum", "arguments": arguments}
            self.queues.append({**facts, "messages_unacknowledged": 0})
            self.depths[name] = Depth(0, 0)
        self.depths[service] = Depth(0, consumers)
        self.depths[f"{service}.dead-letter"] = Depth(dead, 0)
        self.bindings += [
            {"source": "", "destination": service, "routing_key": service},
            {"source": "events", "destination": service, "routing_key": "#"},
        ]
        self.store.put(f"/incarnation/{service}", b"first")

    def queue(self, name: str) -> dict[str, Any]:
        """Return a queue as the management API shows it."""
        return next(queue for queue in self.queues if queue["name"] == name)

    # What the command uses.

    def rabbitmq(self, url: str = "") -> ContextManager[Broker]:
        if self.rabbitmq_error is not None:
            raise self.rabbitmq_error
        return nullcontext(FakeRabbit(self))

    def etcd(self, address: tuple[str, int] | None = None) -> ContextManager[Etcd]:
        return nullcontext(FakeEtcd(self))

    def producer(self, _exchange: str) -> ContextManager[Any]:
        """Open a producer whose broker confirms everything; then raise ``publish_error``."""

        def publish(bodies: Iterable[bytes], _: float, progress: Callable[[int], None]) -> None:
            for number, body in enumerate(bodies, 1):
                self.published.append(body)
                progress(number)
            if self.publish_error is not None:
                raise self.publish_error

        return nullcontext(SimpleNamespace(publish=publish))

    def metrics(self) -> Any:
        gauges: dict[str, int] = {}

        def send() -> None:
            self.sent.append(dict(gauges))
            gauges.clear()

        return SimpleNamespace(gauge=gauges.__setitem__, send=send, close=gauges.clear)

    def now_s(self) -> float:
        return self.time_s

    def fetch(self, url: str, tls: Tls) -> Page:
        """Get one of the operator's pages."""
        known: dict[str, Any] = {
            "api/queues/%2F": self.queues,
            "api/health/checks/alarms": {"status": "ok"},
            "api/policies/%2F": self.policies,
            "api/operator-policies/%2F": [],
            "api/bindings/%2F": self.bindings,
        }
        pages = {name: orjson.dumps(found) for name, found in known.items()} | self.pages
        path = url.partition("://")[2].partition("/")[2].partition("?")[0]
        page = pages.get(path, WebError("no such page", 404))
        if isinstance(page, WebError):
            raise page
        return Page(page)
