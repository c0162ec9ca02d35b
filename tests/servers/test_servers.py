"""The servers keep their data and their ports through what a test does to them."""

from collections.abc import Callable

import pytest

from servers.broker import Broker
from servers.etcd import EtcdClient
from servers.server import Etcd, Server
from servers.servers import Servers


def stop_and_start(server: Server) -> None:
    """Restart in order."""
    server.restart()


def kill_and_start(server: Server) -> None:
    """Restart after a SIGKILL."""
    server.kill()
    server.start()


@pytest.mark.parametrize("again", [stop_and_start, kill_and_start])
def test_a_broker_keeps_confirmed_events(
    clean: Servers, queue: str, again: Callable[[Server], None]
) -> None:
    """What was confirmed is there after a restart and after a SIGKILL, at the same address."""
    broker = Broker(clean.rabbitmq)
    events = [{"id": str(number), "type": "new_order"} for number in range(50)]
    assert broker.publish(events) == events
    again(clean.rabbitmq)
    assert broker.depth(queue) == (50, 0)
    assert len(broker.drain(queue, expect=50)) == 50
    broker.assert_drained(queue)


@pytest.mark.parametrize("again", [stop_and_start, kill_and_start])
def test_etcd_keeps_its_keys(clean: Servers, again: Callable[[Server], None]) -> None:
    """What was put is there after a restart and after a SIGKILL, at the same address."""
    EtcdClient(clean.etcd.endpoint).put("/orders/1", b"x")
    again(clean.etcd)
    assert [kv.key for kv in EtcdClient(clean.etcd.endpoint).get("/orders/")] == ["/orders/1"]


def test_a_frozen_server_does_not_answer(clean: Servers) -> None:
    """Frozen means silent, and healing undoes it."""
    clean.rabbitmq.pause()
    clean.etcd.pause()
    with pytest.raises(OSError, match="timed out"):
        clean.rabbitmq.probe()
    with pytest.raises(OSError, match="timed out"):
        clean.etcd.probe()
    clean.heal()
    clean.rabbitmq.probe()
    clean.etcd.probe()


def test_a_wiped_etcd_begins_again(clean: Servers) -> None:
    """A wipe loses the keys and the revisions, not the address."""
    etcd: Etcd = clean.etcd
    etcd.ctl("put", "a", "b")  # the tool of the server's own, in whichever way it runs
    etcd.wipe()
    assert EtcdClient(etcd.endpoint).get() == []
    assert EtcdClient(etcd.endpoint).revision() == 1
