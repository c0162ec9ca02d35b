"""A producer's headers, of kinds that pika does not write, on a real RabbitMQ."""

import struct
from decimal import Decimal

from fakes.headers import array, encoded, entry, table
from idempotent_consumer.amqp import Properties, keep_header_bytes
from integration.commanding import Command
from integration.judging import StartService, becomes, parked
from integration.load import order
from integration.sink import Sink
from servers.broker import Broker
from servers.publisher import encode
from servers.servers import Servers
from servers.statsd import StatsdListener

FLOAT, DOUBLE = struct.pack(">f", 0.5), struct.pack(">d", 1e300)
WRITTEN = table(
    entry(b"float", b"f", FLOAT),
    entry(b"decimal", b"D", struct.pack(">Bi", 2, 314)),
    entry(b"year", b"T", struct.pack(">Q", 2**62)),
    entry(b"table", b"F", table(entry(b"list", b"A", array(b"d" + DOUBLE, b"V")))),
    entry(b"x-attempts", b"f", FLOAT),
    entry(b"text", b"S", struct.pack(">I", 60_000) + b"a" * 60_000),
)
READ = {
    "float": 0.5,
    "decimal": Decimal("3.14"),
    "year": 2**62,
    "table": {"list": [1e300, None]},
    "text": "a" * 60_000,
}


def test_headers_arrive_unchanged_after_retries_a_dead_letter_and_a_replay(
    start_service: StartService,
    clean: Servers,
    broker: Broker,
    statsd: StatsdListener,
    sink: Sink,
) -> None:
    keep_header_bytes()  # For what this test reads.
    start_service("notify", NOTIFY_URL=sink.url, RETRY_DELAYS="1s")
    sink.refuse("1")
    broker.publish_raw(encode(order("1")), Properties().decode(encoded(WRITTEN)))
    becomes(lambda: statsd.count("notifications_failed"), 1)
    command = Command(clean)
    assert command.json("dead-letters", "replay", "notify", "--all", "--force")["replayed"] == 1
    becomes(lambda: statsd.count("notifications_failed"), 2)
    (dead,) = parked(broker, "notify", 1)
    theirs = {name: value for name, value in dead.headers.items() if not name.startswith("x-")}
    assert theirs == READ
    assert dead.headers["x-attempts"] == 2
