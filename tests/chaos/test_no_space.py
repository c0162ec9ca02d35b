"""An etcd that is full: what cannot be recorded is held, what is recorded is acked all the same."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from urllib.error import HTTPError

import pytest

from chaos.acks import AckAudit
from chaos.conftest import StartTrial
from chaos.holding import holds
from integration.judging import becomes, throughout
from integration.load import ids, orders
from servers.broker import Broker
from servers.server import Etcd
from servers.servers import Servers, start_etcd
from servers.services import Service
from servers.statsd import StatsdListener
from servers.store import Store
from servers.wait import eventually

QUOTA_BYTES = 16_777_216
FILLER = "/filler/"


@pytest.fixture
def clean(clean: Servers) -> Iterator[Servers]:
    """Give a small etcd beside the session's broker."""
    with start_etcd(clean.kind, quota_bytes=QUOTA_BYTES) as etcd:
        yield replace(clean, etcd=etcd)


@pytest.mark.timeout(200)
def test_etcd_is_full(
    trial: StartTrial,
    clean: Servers,
    start_audited: Callable[..., Service],
    acks: AckAudit,
    broker: Broker,
    store: Store,
    statsd: StatsdListener,
) -> None:
    """Held and not returned, duplicates acked; a replica that starts meanwhile consumes nothing."""
    attempt = trial("etcd NOSPACE")
    service = start_audited("order")
    known = attempt.publish(orders(100, "known"))
    becomes(lambda: store.done("order"), ids(known))
    fill(clean.etcd, store)
    attempt.publish(orders(50, "held"))
    eventually(partial(holds, service, "space exceeded"))
    late = start_audited("order", wait=False)
    eventually(partial(holds, late, "space exceeded"), also=(OSError,))
    attempt.publish(known)
    becomes(lambda: statsd.count("orders_processed_skipped"), 100)

    def held() -> None:
        holds(service, "space exceeded")
        holds(late, "space exceeded")
        assert broker.depth("order") == (0, 50)
        assert store.done("order") == ids(known)
        assert (acks.checked, acks.unknown) == (200, 0)

    throughout(5, held)
    attempt.fired()
    heal(clean.etcd, store)
    attempt.recovers()
    service.wait_ready()
    late.wait_ready()
    attempt.judge(at_least=150)
    becomes(lambda: statsd.count("orders_processed"), 151)
    assert statsd.count("orders_returned") == 0


def fill(etcd: Etcd, store: Store) -> None:
    """Write until etcd raises its alarm."""
    megabyte = b"x" * 1_000_000
    refused = False
    for number in range(2 * QUOTA_BYTES // len(megabyte)):
        try:
            store.client.put(f"{FILLER}{number}", megabyte)
        except HTTPError as error:
            error.close()
            refused = True
            break
    assert refused
    assert "NOSPACE" in etcd.ctl("alarm", "list")


def heal(etcd: Etcd, store: Store) -> None:
    """Do what etcd's page "Maintenance" says: make room, then disarm the alarm."""
    store.client.delete(FILLER)
    etcd.ctl("compact", "--physical", str(store.keep_history()))
    etcd.ctl("defrag")
    etcd.ctl("alarm", "disarm")
