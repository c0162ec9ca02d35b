"""etcd in the states that faults bring it to, and read all the same."""

from collections.abc import Iterator

import pytest

from servers.etcd import EtcdClient
from servers.server import Etcd
from servers.servers import Servers, start_etcd
from servers.store import Store


@pytest.fixture
def etcd(servers: Servers) -> Iterator[Etcd]:
    """Give an etcd of this test's own."""
    with start_etcd(servers.kind) as running:
        yield running


def test_a_restored_etcd_has_its_older_keys_and_revisions(etcd: Etcd) -> None:
    """At the same address, and with the history up to the snapshot."""
    store = Store(etcd)
    store.client.put("/orders/1", b"x")
    etcd.save()
    for number in range(10):
        store.client.put(f"/orders/later-{number}", b"x")
    etcd.restore()
    assert set(store.orders()) == {"1"}
    assert store.client.revision() == 2
    store.client.put("/orders/2", b"x")
    etcd.restart()
    assert [change.key for change in store.history()] == ["/orders/1", "/orders/2"]


def test_an_etcd_that_asks_for_a_login_is_read_with_root_s(etcd: Etcd) -> None:
    """By clients that were there before as well; others are refused until nobody is asked."""
    store, other = Store(etcd), EtcdClient(etcd.endpoint)
    store.client.put("/orders/1", b"x")
    etcd.require_login()
    assert set(store.orders()) == {"1"}
    with pytest.raises(OSError, match="400"):
        other.get()
    etcd.restart()  # It forgets the tokens that it has given out.
    assert len(store.history("/orders/")) == 1
    assert set(store.orders()) == {"1"}
    etcd.require_no_login()
    assert len(other.get("/orders/")) == len(store.orders()) == 1


def test_history_that_is_kept_outlives_a_compaction(etcd: Etcd) -> None:
    """It is whole, and each change is in it once."""
    store = Store(etcd)
    for value in (b"1", b"2"):
        store.client.put("/orders/1", value)
    etcd.ctl("compact", "--physical", str(store.keep_history()))
    store.client.put("/orders/1", b"3")
    assert [change.value for change in store.history("/orders/")] == [b"1", b"2", b"3"]
    with pytest.raises(RuntimeError, match="ended the watch"):
        Store(etcd).history()
