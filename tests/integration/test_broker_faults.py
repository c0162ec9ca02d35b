"""The broker stops, dies, closes connections and loses queues: confirmed events survive."""

from collections.abc import Callable
from functools import partial

import pytest

from integration.judging import (
    StartService,
    assert_counters_add_up,
    assert_handled_once,
    becomes,
    lines,
    not_ready,
    parked,
    passes,
    says,
    throughout,
    wait_drained,
)
from integration.load import Load, order, orders
from servers.broker import Broker
from servers.server import RabbitMQ
from servers.servers import Servers
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


@pytest.mark.parametrize("end", [RabbitMQ.stop, RabbitMQ.kill])
def test_a_broker_that_goes_down_under_load_loses_and_doubles_nothing(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
    end: Callable[[RabbitMQ], None],
) -> None:
    """Stopped in order or killed: the service names it as missing, returns and goes on."""
    service = start_service("order")
    with Load(broker, rate_per_s=600) as load:
        passes(lambda: statsd.count("orders_processed"), 300)
        end(clean.rabbitmq)
        eventually(lambda: not_ready(service, "rabbitmq"))
        assert load.running
        handled = len(store.done("order"))
        clean.rabbitmq.start()
        service.wait_ready(30)
        passes(lambda: len(store.done("order")), handled + 300)
        confirmed = load.finish()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=load.sent, confirmed=confirmed, at_least=600)
    assert broker.ready("order.dead-letter") == 0
    eventually(lambda: assert_counters_add_up(statsd, "orders"))


def test_connections_closed_by_an_operator_are_opened_again(
    clean: Servers,
    start_service: StartService,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Three times under load: what was in hand comes again, to the same process, and is done once.

    The service is frozen for the moment of each closing, so that there is something in hand.
    """
    service = start_service("order")
    with Load(broker, rate_per_s=600) as load:
        for closed in range(1, 4):
            # Counts come up to a second late: they do not tell that it is connected again.
            service.wait_ready()
            handled = statsd.count("orders_processed")
            passes(lambda: statsd.count("orders_processed"), handled + 50)
            service.pause()
            passes(lambda: broker.unacked("order"), 0)
            clean.rabbitmq.ctl("close_all_connections", "closed by the test")
            service.resume()
            eventually(partial(says, service, "deliveries went back", closed))
        confirmed = load.finish()
    service.wait_ready()
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=load.sent, confirmed=confirmed, at_least=300)
    assert statsd.count("orders_returned") > 0
    eventually(lambda: assert_counters_add_up(statsd, "orders"))


def test_a_queue_that_is_deleted_by_hand_is_declared_and_consumed_again(
    clean: Servers, start_service: StartService, broker: Broker, store: Store
) -> None:
    """Within 10 s, and the log says what happened."""
    service = start_service("order")
    broker.publish([order("before")])
    becomes(lambda: store.done("order"), {"before"})
    clean.rabbitmq.ctl("delete_queue", "order")

    def taken_again() -> None:
        assert broker.publish([order("after")])

    eventually(taken_again, 10)
    becomes(lambda: store.done("order"), {"before", "after"}, 10)
    service.wait_ready()
    assert "deleted" in lines(service, "no connection to RabbitMQ")[0]["error"]


def test_dead_letter_and_retry_queues_are_declared_again_when_they_are_needed(
    clean: Servers, start_service: StartService, broker: Broker, statsd: StatsdListener
) -> None:
    """A dead letter that no queue takes is not lost: its queue is made anew first."""
    service = start_service("order")
    clean.rabbitmq.ctl("delete_queue", "order.dead-letter")
    broker.publish_raw(b"not json")
    eventually(lambda: broker.ready("order.dead-letter"), 30)
    becomes(lambda: statsd.count("orders_invalid"), 1)
    assert [message.body for message in parked(broker, "order", 1)] == [b"not json"]
    service.wait_ready()
    wait_drained(broker, "order")


def test_a_queue_with_other_arguments_is_explained(
    clean: Servers, start_service: StartService, broker: Broker, store: Store
) -> None:
    """Not ready, with one line that says what to do, no hot loop; ready when it is done."""
    clean.rabbitmq.management("PUT", "/api/queues/%2f/order", {"durable": True, "arguments": {}})
    service = start_service("order", wait=False)

    def explained() -> str:
        reason = not_ready(service, "rabbitmq")["rabbitmq"]
        assert "PRECONDITION_FAILED" in reason
        return reason

    reason = eventually(explained, also=(OSError,))
    assert "delete" in reason
    assert "\n" not in reason
    before = _refusals(service)
    throughout(3, explained)
    # Two connections with growing pauses: some ten attempts. A hot loop makes thousands.
    assert _refusals(service) - before < 50
    clean.rabbitmq.ctl("delete_queue", "order")
    service.wait_ready()
    broker.publish(orders(3))
    becomes(lambda: len(store.done("order")), 3)


def _refusals(service: Service) -> int:
    return len(lines(service, "no connection to RabbitMQ"))
