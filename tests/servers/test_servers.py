"""What a test reads of the servers is true, and a verdict names every fault."""

import socket
import threading
from typing import Any

import pytest

from servers.broker import Broker
from servers.checker import doubles, judge
from servers.counters import GraphiteCounters, StatsdListener
from servers.etcd import Change, Store
from servers.servers import Servers, start_etcd
from servers.wait import eventually
from servers.web import fetch_json

DONE = b'{"state": "done"}'
CLAIMED = b'{"state": "claimed"}'


def test_history_is_whole_and_outlives_a_compaction(servers: Servers) -> None:
    """Each put and delete is in it once, be it more than one gRPC answer of 4 MiB."""
    large = b"x" * 1_000_000
    with start_etcd(servers.kind) as etcd:
        store = Store(etcd)
        for _ in range(6):
            store.client.put("/orders/1", large)
        store.client.delete("/orders/")
        store.client.put("elsewhere", b"1")
        etcd.ctl("compact", "--physical", str(store.keep_history()))
        store.client.put("/orders/1", b"2")
        history = store.history("/orders/")
        assert [change.kind for change in history] == ["put"] * 6 + ["delete", "put"]
        assert [change.value for change in history] == [large] * 6 + [b"", b"2"]
        with pytest.raises(RuntimeError, match="ended the watch"):
            Store(etcd).history()
        store.clear()
        assert store.history() == []


def test_an_event_that_no_queue_takes_is_not_confirmed(broker: Broker) -> None:
    """The broker confirms unroutable events too; the publisher knows better."""
    assert broker.publish([{"id": "1", "type": "new_order"}]) == []


def test_what_is_held_counts_for_the_queue_that_it_came_from(broker: Broker) -> None:
    """At once, a cancelled consumer's too; it is ready again once the channel is gone."""
    queue = "order"
    for name in (queue, "notify"):
        broker.bind(name)
    broker.publish([{"id": str(number), "type": "new_order"} for number in range(5)])
    with broker.channel() as other, broker.channel() as consumer:
        for channel, name, count in ((other, "notify", 2), (consumer, queue, 3)):
            channel.basic_qos(prefetch_count=count)
            messages = channel.consume(name)
            for _ in range(count):
                next(messages)
        assert (broker.unacked(queue), broker.unacked("notify")) == (3, 2)
        assert (broker.depth(queue), broker.depth("notify")) == ((2, 3), (3, 2))
        with pytest.raises(AssertionError, match=r"order: 2 ready"):
            broker.assert_drained(queue)
        assert len(broker.drain(queue)) == 2
        with pytest.raises(AssertionError, match=r"unacked=3"):
            broker.assert_drained(queue)
        consumer.cancel()
        assert broker.unacked(queue) == 3
        with pytest.raises(AssertionError, match=r"unacked"):
            broker.assert_drained(queue)
    assert (broker.depth(queue), broker.depth("notify")) == ((3, 0), (5, 0))


def test_the_listener_sums_counters_and_keeps_timers_and_gauges(statsd: StatsdListener) -> None:
    """Several lines may come in one packet, sampled, as zero, or broken."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        packet = b"n:2|c\nn:1|c|@0.5\nzero:0|c\nt:1.5|ms\ng:3|g\ng:1|g\nbroken\nn:x|c\n"
        sender.sendto(packet, ("127.0.0.1", statsd.port))

    def arrived() -> None:
        assert statsd.counts() == {"n": 4, "zero": 0}
        assert statsd.timers_ms("t") == [1.5]
        assert (statsd.gauge("g"), statsd.gauge("absent")) == (1, 0)

    eventually(arrived, 5)
    assert statsd.seen("zero")
    assert not statsd.seen("t")


def test_a_point_on_its_way_to_the_file_still_counts_and_a_gauge_is_its_newest() -> None:
    """Carbon shows it nowhere for a moment; a count never goes down."""
    answers: list[Any] = [
        [{"datapoints": [[1.0, 100], [2.0, 101]]}],
        [{"datapoints": [[1.0, 100], [None, 101], [4.0, 102]]}],
        [],
        [{"datapoints": [[1.0, 100], [2.0, 101], [None, 102]]}],
    ]
    asked: list[str] = []

    def fetch(_method: str, url: str) -> Any:
        asked.append(url)
        return answers.pop(0)

    counters = GraphiteCounters("http://graphite", since=100, fetch=fetch)
    assert [counters.count("orders_processed") for _ in range(3)] == [3, 7, 7]
    assert counters.gauge("breaker_open") == 2
    assert "target=stats.gauges.breaker_open&" in asked[-1]


def put(revision: int, key: str, value: bytes = DONE) -> Change:
    return Change(revision, "put", key, value)


def delete(revision: int, key: str) -> Change:
    return Change(revision, "delete", key, b"")


def test_a_run_without_fault_passes() -> None:
    """Recorded or parked, each once, and an unknown confirm that landed is no fault."""
    verdict = judge(
        attempted="abcd", confirmed="abd", recorded="abc", parked="d", double=doubles([put(1, "a")])
    )
    verdict.require(confirmed_at_least=3)


@pytest.mark.parametrize(
    ("attempted", "confirmed", "recorded", "effected", "fault"),
    [
        ("ab", "ab", "a", None, "lost: 1"),
        ("a", "a", "ax", None, "unexpected: 1"),
        ("a", "a", "a", None, "only 1"),
        ("abc", "ab", "ab", "a", "torn: 1"),
        ("abc", "ab", "ab", "abc", "torn: 1"),
    ],
)
def test_a_fault_is_named(
    attempted: str, confirmed: str, recorded: str, effected: str | None, fault: str
) -> None:
    """What is lost, made up, without its effect, or too little to mean anything."""
    verdict = judge(attempted=attempted, confirmed=confirmed, recorded=recorded, effected=effected)
    with pytest.raises(AssertionError, match=fault):
        verdict.require(confirmed_at_least=2)


def test_a_key_put_twice_or_deleted_is_double() -> None:
    """A record or an effect is put once and stays."""
    history = [put(1, "once"), put(2, "twice"), put(3, "twice"), put(4, "gone"), delete(5, "gone")]
    found = doubles(history)
    assert set(found) == {"twice", "gone"}
    with pytest.raises(AssertionError, match="double: 2"):
        judge(attempted="a", confirmed="a", recorded="a", double=found).require(
            confirmed_at_least=1
        )


def test_a_claimed_record_is_done_once_and_last() -> None:
    """Claims may come and go; a second done, or anything after the first, is a double."""
    history = [
        put(1, "c/fine", CLAIMED),
        put(2, "c/fine"),
        put(3, "c/taken over", CLAIMED),
        delete(4, "c/taken over"),
        put(5, "c/taken over", CLAIMED),
        put(6, "c/taken over"),
        put(7, "c/released", CLAIMED),
        delete(8, "c/released"),
        put(9, "c/twice"),
        put(10, "c/twice"),
        put(11, "c/reopened"),
        put(12, "c/reopened", CLAIMED),
    ]
    assert set(doubles(history, claimed=("c/",))) == {"c/twice", "c/reopened"}


def test_an_answer_that_breaks_off_is_a_lost_connection() -> None:
    """As of a server that is killed meanwhile: whoever asks again has to catch no more."""

    def answer() -> None:
        with listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer)
        server.start()
        with pytest.raises(OSError, match="IncompleteRead"):
            fetch_json("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server.join()
