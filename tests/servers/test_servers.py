"""What tests read from the servers is true, and a verdict names every fault."""

import socket
import threading
from contextlib import nullcontext
from typing import Any

import pytest

from servers.broker import Broker
from servers.checker import doubles, judge
from servers.counters import GraphiteCounters, StatsdListener
from servers.etcd import Change, Store
from servers.servers import Servers, start_etcd
from servers.wait import eventually
from servers.web import fetch_json


def test_history_is_whole_or_an_error(servers: Servers) -> None:
    """Each put and delete is in it once, even if it is larger than a gRPC message of 4 MiB."""
    large = b"x" * 1_000_000
    with start_etcd(servers.kind) as etcd:
        store = Store(etcd)
        for _ in range(6):
            store.client.put("/orders/1", large)
        store.client.delete("/orders/")
        store.client.put("elsewhere", b"1")
        revision = store.client.put("/orders/1", b"2")
        history = store.history("/orders/")
        assert [change.kind for change in history] == ["put"] * 6 + ["delete", "put"]
        assert [change.value for change in history] == [large] * 6 + [b"", b"2"]
        etcd.ctl("compact", str(revision))
        with pytest.raises(RuntimeError, match="ended the watch"):
            store.history()
        store.clear()
        assert store.history() == []


def test_an_event_that_no_queue_takes_is_not_confirmed(broker: Broker) -> None:
    """The broker itself confirms it, after it has returned it."""
    assert broker.publish([{"id": "1", "type": "new_order"}]) == []


def test_an_unacked_message_counts_for_its_queue(broker: Broker) -> None:
    """Also after its consumer was cancelled, and until its channel is closed."""
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
    """A packet may have several lines, some of them sampled, zero or broken."""
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


def test_a_point_that_carbon_does_not_show_for_a_moment_still_counts() -> None:
    """So a count never goes down. A gauge has its last value."""
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


WITHOUT_FAULT = {
    "attempted": "abcd",
    "confirmed": "abd",  # The confirm of c is unknown, and c was recorded: no fault.
    "recorded": "abc",
    "effected": "abc",
    "parked": "d",
}


@pytest.mark.parametrize(
    ("differs", "fault"),
    [
        ({}, None),
        ({"parked": ""}, "lost: 1"),
        ({"attempted": "abd"}, "unexpected: 1"),
        ({"effected": "ab"}, "torn: 1"),
        ({"effected": "abcd"}, "torn: 1"),
        ({"confirmed": "ab"}, "only 2"),
        ({"double": {"/orders/a": []}}, "double: 1"),
    ],
)
def test_a_verdict_names_the_fault(differs: dict[str, Any], fault: str | None) -> None:
    verdict = judge(**(WITHOUT_FAULT | differs))
    with pytest.raises(AssertionError, match=fault) if fault else nullcontext():
        verdict.require(confirmed_at_least=3)


CHANGES = {
    "claimed": ("put", b'{"state": "claimed"}'),
    "done": ("put", b'{"state": "done"}'),
    "gone": ("delete", b""),
}


@pytest.mark.parametrize(
    ("prefix", "steps", "is_double"),
    [
        ("/orders/", "done", False),
        ("/orders/", "done done", True),
        ("/orders/", "done gone", True),
        ("/service/notify/", "claimed done", False),
        ("/service/notify/", "claimed gone claimed done", False),
        ("/service/notify/", "claimed gone", False),
        ("/service/notify/", "done done", True),
        ("/service/notify/", "done claimed", True),
    ],
)
def test_a_key_is_done_once_and_not_changed_afterwards(
    prefix: str, steps: str, is_double: bool
) -> None:
    """Only a record under a claim may change before it is done."""
    key = f"{prefix}1"
    changes = (CHANGES[step] for step in steps.split())
    history = [Change(revision, kind, key, value) for revision, (kind, value) in enumerate(changes)]
    assert set(doubles(history, claimed=("/service/notify/",))) == ({key} if is_double else set())


def test_an_answer_that_breaks_off_is_an_os_error() -> None:
    """As any other failure of a server that is killed meanwhile."""

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
