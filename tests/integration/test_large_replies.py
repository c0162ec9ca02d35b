"""What etcd has to say at once is more than gRPC receives: it is asked for in parts."""

import base64
from typing import Any

import pytest

from idempotent_consumer.event import decode
from idempotent_consumer.records import DONE, PUBLISHING, encode
from integration.judging import StartService, becomes, lines, parked, says, wait_drained
from integration.load import ids, orders
from servers.broker import Broker
from servers.publisher import Event
from servers.publisher import encode as encode_event
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually
from servers.web import fetch_json

_GRPC_RECEIVES = 64 * 1024 * 1024


class Gateway:
    """etcd's JSON gateway, for what only an operator does."""

    def __init__(self, servers: Servers) -> None:
        self._url = f"http://{servers.etcd.endpoint}/v3"

    def grant(self) -> str:
        """Grant a lease of an hour."""
        return str(self._post("lease/grant", TTL="3600")["ID"])

    def revoke(self, lease: str) -> None:
        """End a lease: all its keys go in one revision."""
        self._post("lease/revoke", ID=lease)

    def record(self, event: Event, value: bytes, lease: str = "0") -> None:
        """Write the record that the service "order" has of an event."""
        key = base64.b64encode(f"/service/order/{event['id']}".encode()).decode()
        self._post("kv/put", key=key, value=base64.b64encode(value).decode(), lease=lease)

    def _post(self, path: str, **body: str) -> Any:
        return fetch_json("POST", f"{self._url}/{path}", body, timeout_s=30)


@pytest.fixture
def gateway(clean: Servers) -> Gateway:
    return Gateway(clean)


def digest_of(event: Event) -> str:
    return decode(encode_event(event)).digest


@pytest.mark.timeout(180)
def test_a_leases_end_of_more_than_grpc_receives_is_heard_of(
    gateway: Gateway,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Its records are imported in pages that fit, and forgotten in fragments."""
    events, kept, lease = orders(120), orders(10, "kept"), gateway.grant()
    padding = b',"padding":"%s"}' % (b"x" * 600_000)
    for event in events:
        value = encode(DONE, digest_of(event), "t", "2026-01-01T00:00:00.000+00:00")
        gateway.record(event, value[:-1] + padding, lease)
    assert len(events) * len(padding) > _GRPC_RECEIVES
    service = start_service("order")
    broker.publish(kept)
    becomes(lambda: store.done("order"), ids(events + kept))
    becomes(lambda: [line["records"] for line in says(service, "records imported")], [120])
    broker.publish(events)
    becomes(lambda: statsd.count("orders_processed_skipped"), len(events))

    # etcd deletes a lease's keys in their order, and so tells of this one last.
    last = max(events, key=lambda event: str(event["id"]))
    gateway.revoke(lease)

    def last_is_forgotten() -> None:
        broker.publish([last])
        assert store.is_done("order", last["id"])

    eventually(last_is_forgotten)
    broker.publish(events + kept)
    wait_drained(broker, "order")
    becomes(lambda: store.done("order"), ids(events + kept))
    becomes(lambda: statsd.count("orders_processed"), len(events + kept))
    assert lines(service, "no progress") == []


@pytest.mark.timeout(180)
def test_a_batch_of_more_records_than_grpc_receives_is_settled(
    gateway: Gateway,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Each of them holds an event to publish, whose process has died."""
    events = orders(200)
    for event in events:
        held = {"id": f"{event['id']}/order/0", "type": "shipped", "args": {"a": "x" * 900_000}}
        value = encode(PUBLISHING, digest_of(event), "t", "now", [encode_event(held)])
        gateway.record(event, value)
    assert start_service("order").terminate() == 0
    broker.publish(events)  # So that they come all at once.
    service = start_service("order")
    becomes(lambda: statsd.count("orders_processed_skipped"), len(events), 60)
    wait_drained(broker, "order")
    assert store.done("order") == ids(events)
    assert statsd.count("orders_ignored") == len(events), "what was published came back"
    assert parked(broker, "order", 0) == []
    assert lines(service, "etcd does not answer") == []
