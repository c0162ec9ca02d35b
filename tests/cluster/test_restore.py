"""etcd is restored from a snapshot by the guide's own commands, and not everybody was stopped."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from chaos.holding import holds
from cluster.cluster import Cluster
from cluster.replicas import Replica, StartReplicas
from cluster.shell import FILES, Shell, documented
from demo.command import CommandFailedError
from integration.judging import assert_handled_once, becomes, says, throughout, wait_drained
from integration.load import ids, orders
from servers.broker import Broker
from servers.engine import docker_available
from servers.store import Store
from servers.wait import eventually

PAGE = "stop-and-restore-etcd.md"
# Of the replicas, which are processes here: the test stops and starts them.
OF_SERVICES = re.compile(r"^docker compose (stop|start) order notify$", re.MULTILINE)
ANOTHER = "wiped|restored from an older state"
PAST_THE_SNAPSHOT = 50


@pytest.mark.timeout(400)
def test_the_restore_of_the_guide(
    cluster: Cluster, start_replicas: StartReplicas, broker: Broker, store: Store
) -> None:
    """What the snapshot lacks is handled again; who was overlooked settles nothing meanwhile."""
    stopped, running, frozen = start_replicas()
    saved = broker.publish(orders(200, "saved"))
    becomes(lambda: store.done("order"), ids(saved))
    cluster.shell.do(documented(PAGE, "Back it up"))
    _write_elsewhere(store)
    gone = broker.publish(orders(200, "gone"))
    becomes(lambda: store.done("order"), ids(saved + gone))
    wait_drained(broker, "order")
    lost_revision = store.client.revision()

    assert stopped.service.terminate(10) == 0
    frozen.service.pause()
    cluster.shell.do(_commands(cluster.shell, "Restore a cluster"))
    assert store.done("order") == ids(saved)
    eventually(partial(holds, running.service, ANOTHER))
    while store.client.revision() <= lost_revision:
        _write_elsewhere(store)
    frozen.service.resume()
    eventually(partial(holds, frozen.service, ANOTHER))

    overlooked = [running, frozen]
    settled = [replica.settled() for replica in overlooked]
    new_ones = start_replicas(number=2)
    for replica in new_ones:
        (found,) = says(replica.service, "it holds this service's history")
        assert found["incarnation"].startswith("restored ")
    again = broker.publish([*saved, *gone, *orders(200, "new")])
    becomes(lambda: broker.ready("order"), 0)
    throughout(5, lambda: _settle_nothing(overlooked, settled))
    for replica in overlooked:
        assert replica.service.terminate(10) == 0
    wait_drained(broker, "order")

    assert broker.ready("order.dead-letter") == 0
    assert_handled_once("order", store, sent=again, confirmed=again, at_least=600)
    becomes(lambda: _count(new_ones, "processed_skipped"), 200)
    becomes(lambda: _count(new_ones, "processed"), 400)
    assert [replica.settled() for replica in overlooked] == settled


@pytest.mark.timeout(200)
def test_the_restore_of_a_single_etcd(tmp_path: Path) -> None:
    """It holds what the snapshot does, and the new incarnations."""
    if not docker_available():
        pytest.skip("it takes Docker to play compose commands")
    shell = Shell(tmp_path, {"COMPOSE_FILE": ":".join(FILES[:2])})

    def etcdctl(arguments: str) -> str:
        return shell.do(f"docker compose exec etcd /usr/local/bin/etcdctl {arguments}")

    try:
        shell.do("docker compose up --detach --wait etcd")
        etcdctl("put /saved 1")
        shell.do(documented(PAGE, "Back it up"))
        etcdctl("put /gone 1")
        shell.do(_commands(shell, "Restore a snapshot"))
        found = etcdctl("get / --prefix --keys-only").split()
        assert found == ["/incarnation/notify", "/incarnation/order", "/saved"]
    finally:
        shell.do("docker compose down --volumes --timeout 1")


def _commands(shell: Shell, heading: str) -> str:
    """Return the guide's commands for etcd."""
    commands, number = OF_SERVICES.subn("", documented(PAGE, heading))
    assert number == 2
    try:
        shell.do("docker compose exec etcd /usr/local/bin/etcdutl version")
    except CommandFailedError:
        # Not every image of etcd 3.5 has it; there etcdctl does the same.
        return commands.replace("etcdutl", "etcdctl")
    return commands


def _write_elsewhere(store: Store) -> None:
    """Raise etcd's revision."""
    for number in range(PAST_THE_SNAPSHOT):
        store.client.put("/elsewhere", str(number).encode())


def _settle_nothing(replicas: list[Replica], settled: list[int]) -> None:
    for replica in replicas:
        holds(replica.service, ANOTHER)
    assert [replica.settled() for replica in replicas] == settled


def _count(replicas: list[Replica], outcome: str) -> int:
    return sum(replica.statsd.count(f"orders_{outcome}") for replica in replicas)
