"""Very large bodies and replies, and a full disk: all other events are handled."""

from pathlib import Path

import pytest

from chaos.checks import becomes, lines, says, throughout, true
from chaos.hosts import prelude
from chaos.load import ids, orders
from chaos.outages import alarm
from chaos.rig import Rig
from chaos.trial import StartTrial
from idempotent_consumer.event import decode
from idempotent_consumer.records import DONE, PUBLISHING, encode
from servers.broker import Event
from servers.broker import encode as encode_event
from servers.processes import resident_bytes
from servers.wait import eventually

_MIB = 1024 * 1024
_BODIES = [bytes([number]) * 15 * _MIB for number in range(12)]

_PAUSED_S = 20.0
"""With a heartbeat of 1 s pika closes a connection on which nothing arrives for 12 s."""

_LOG_BYTES = 8192
# At this limit a write fails as it does on a full disk.
_SMALL_FILES = f"""
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, ({_LOG_BYTES}, {_LOG_BYTES}))
"""

_GRPC_RECEIVES = 64 * 1024 * 1024


def record(rig: Rig, event: Event, state: str, more: bytes, lease: str = "0") -> None:
    """Write the service order's record of an event, with one more member."""
    digest = decode(encode_event(event)).digest
    value = encode(state, digest, "t", "2026-01-01T00:00:00.000+00:00")
    rig.store.client.put(f"/service/order/{event['id']}", value[:-1] + more, lease)


@pytest.mark.timeout(180)
def test_the_end_of_a_lease_is_noticed_if_its_records_are_larger_than_a_grpc_message(
    rig: Rig,
) -> None:
    """The service imports the records in pages, and forgets them in fragments."""
    events, kept = orders(120), orders(10, "kept")
    lease = rig.store.client.post("/lease/grant", {"TTL": "3600"})["ID"]
    padding = b',"padding":"%s"}' % (b"x" * 600_000)
    for event in events:
        record(rig, event, DONE, padding, lease)
    assert len(events) * len(padding) > _GRPC_RECEIVES
    service = rig.start("order")
    rig.broker.publish(kept)
    becomes(lambda: rig.store.done("order"), ids(events + kept))
    becomes(lambda: [line["records"] for line in says(service, "records imported")], [120])
    rig.broker.publish(events)
    becomes(lambda: rig.statsd.count("orders_processed_skipped"), len(events))

    # etcd deletes a lease's keys in order, so this is the last.
    last = max(events, key=lambda event: str(event["id"]))
    rig.store.client.post("/lease/revoke", {"ID": lease})

    def last_is_forgotten() -> None:
        rig.broker.publish([last])
        assert rig.store.is_done("order", last["id"])

    eventually(last_is_forgotten)
    rig.broker.publish(events + kept)
    rig.drained("order")
    becomes(lambda: rig.store.done("order"), ids(events + kept))
    becomes(lambda: rig.statsd.count("orders_processed"), len(events + kept))
    assert lines(service, "no progress") == []


@pytest.mark.timeout(180)
def test_a_batch_is_settled_if_its_records_are_larger_than_a_grpc_message(rig: Rig) -> None:
    """They take 69 MiB, the limit is 64. Each has an event that a dead process left unpublished."""
    events = orders(80)
    for event in events:
        held = {"id": f"{event['id']}/order/0", "type": "shipped", "args": {"a": "x" * 900_000}}
        record(rig, event, PUBLISHING, b',"events":[%s]}' % encode_event(held))
    assert rig.start("order").terminate() == 0
    rig.broker.publish(events)  # So that they arrive all at once.
    service = rig.start("order")
    becomes(lambda: rig.statsd.count("orders_processed_skipped"), len(events), 120)
    rig.drained("order")
    assert rig.store.done("order") == ids(events)
    assert rig.statsd.count("orders_ignored") == len(events), "what was published came back"
    assert rig.parked("order", 0) == []
    assert lines(service, "etcd does not answer") == []


def test_under_an_alarm_memory_is_bounded_and_the_connection_stays(rig: Rig) -> None:
    """The service stops reading until the alarm is over, and then parks each body."""
    assert rig.start("order").terminate() == 0
    rig.broker.publish_raw(*_BODIES)
    with alarm(rig.servers.rabbitmq, "memory"):
        service = rig.start("order", RABBITMQ_URL=f"{rig.servers.rabbitmq.url}?heartbeat=1")
        eventually(lambda: says(service, "what is in flight is large"))
        # Half of the bodies would exceed this: an idle service takes some 60 MB.
        limit = 100 * _MIB + sum(map(len, _BODIES)) / 2
        throughout(_PAUSED_S, lambda: true(resident_bytes(service.pid) < limit))
    becomes(lambda: rig.broker.ready("order.dead-letter"), len(_BODIES), 60)
    assert lines(service, "no connection to RabbitMQ") == []
    assert sorted(message.body for message in rig.parked("order", len(_BODIES))) == _BODIES


def test_the_log_cannot_be_written(trial: StartTrial, tmp_path: Path) -> None:
    """Events are handled without it, and the service ends in order."""
    attempt = trial("disk full (the log's)")
    (code := tmp_path / "code").mkdir()
    service = attempt.start(**prelude(code, _SMALL_FILES))
    (log,) = tmp_path.glob("order-*.log")
    with attempt.under_load(at_least=300):
        becomes(lambda: log.stat().st_size, _LOG_BYTES)
        attempt.works(300)
        throughout(1, lambda: true(log.stat().st_size == _LOG_BYTES))
        attempt.fired()
    assert service.terminate(10) == 0
