"""Services that are down or start too early: what waits is consumed when everything is there."""

from integration.judging import (
    StartService,
    assert_handled_once,
    becomes,
    not_ready,
    throughout,
    wait_drained,
)
from integration.load import ids, orders
from servers.broker import Broker
from servers.servers import Servers
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually


def test_what_was_published_while_a_service_was_down_is_consumed_when_it_returns(
    start_service: StartService, broker: Broker, store: Store, statsd: StatsdListener
) -> None:
    """The other service is not affected; the one that was down catches up by itself."""
    start_service("order")
    first = start_service("notify")
    before, meanwhile = orders(5, "before"), orders(200, "meanwhile")
    broker.publish(before)
    becomes(lambda: statsd.count("notifications_processed"), 5)
    assert first.terminate() == 0
    assert len(broker.publish(meanwhile)) == 200
    becomes(lambda: statsd.count("orders_processed"), 205)
    assert broker.depth("notify") == (200, 0)
    assert statsd.count("notifications_processed") == 5

    start_service("notify")
    becomes(lambda: statsd.count("notifications_processed"), 205)
    wait_drained(broker, "order", "notify")
    events = before + meanwhile
    for service in ("order", "notify"):
        assert_handled_once(service, store, sent=events, confirmed=events, at_least=205)


def test_a_service_waits_for_servers_that_come_late(
    clean: Servers, start_service: StartService, broker: Broker, store: Store
) -> None:
    """Alive, not ready, saying why; ready within 10 s of the arrival of the last."""
    clean.rabbitmq.stop()
    clean.etcd.stop()
    service = start_service("notify", wait=False)
    eventually(lambda: not_ready(service, "etcd", "rabbitmq"), also=(OSError,))
    clean.etcd.start()
    eventually(lambda: _explained(not_ready(service, "rabbitmq"), "rabbitmq"))
    becomes(lambda: "etcd" in not_ready(service, "rabbitmq"), expected=False)
    assert service.health("/livez").status == 200
    clean.rabbitmq.start()
    service.wait_ready(10)
    broker.publish(orders(3))
    becomes(lambda: store.done("notify"), ids(orders(3)))


def test_a_service_consumes_nothing_before_etcd_is_there(
    clean: Servers, start_service: StartService, broker: Broker, store: Store
) -> None:
    """Alive, not ready, saying why, without a consumer; ready within 10 s of etcd's arrival."""
    assert start_service("order").terminate() == 0
    events = orders(50)
    assert len(broker.publish(events)) == 50
    clean.etcd.stop()
    service = start_service("order", wait=False)
    eventually(lambda: not_ready(service, "etcd"), also=(OSError,))
    eventually(lambda: _explained(not_ready(service, "etcd"), "etcd"))

    def nothing_is_taken() -> None:
        not_ready(service, "etcd")
        assert service.health("/livez").status == 200
        assert broker.depth("order") == (50, 0)
        assert broker.consumers("order") == 0

    throughout(1, nothing_is_taken)
    clean.etcd.start()
    service.wait_ready(10)
    wait_drained(broker, "order")
    assert_handled_once("order", store, sent=events, confirmed=events, at_least=50)


def _explained(reasons: dict[str, str], missing: str) -> dict[str, str]:
    """Return the reasons once the first attempt has failed; raises AssertionError before."""
    if reasons[missing] in ("not connected yet", "not reached yet"):
        raise AssertionError(f"{reasons}")
    return reasons
