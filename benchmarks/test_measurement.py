"""What is measured by: series of events, rates of queues, latencies, etcd's page, the receiver."""

from collections import Counter

import pytest

from .calls import after_request, asked_ms
from .keyspace import gauges_of
from .processes import Progress, rate
from .publishers import series
from .results import NotMeasuredError
from .scenarios import latencies_ms, reached_per_s
from .subjects import Mix

REQUEST = b"POST /n HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nIdempotency-Key: 1\r\n\r\n1234"
PAGE = """
# HELP etcd_mvcc_put_total Total number of puts seen by this member.
# TYPE etcd_mvcc_put_total counter
etcd_mvcc_put_total 300002
etcd_mvcc_put_total_of_another 7
etcd_debugging_lease_granted_total 30
etcd_debugging_lease_revoked_total 4
process_resident_memory_bytes 3.60534016e+08
grpc_server_started_total{grpc_method="Txn",grpc_service="etcdserverpb.KV",grpc_type="unary"} 12
grpc_server_started_total{grpc_method="TxnOfAnother",grpc_service="x",grpc_type="unary"} 5
"""


def falling(
    first_s: float, ready: int, per_s: float, cpu_us: float, step: int = 1
) -> list[Progress]:
    """Return a queue that runs empty from a time on, `step` messages at once."""
    return [
        Progress(first_s + done / per_s, ready - done // step * step, done * cpu_us / 1e6)
        for done in range(ready + 1)
    ]


def distances(bodies: list[bytes]) -> list[int]:
    """Return how far behind its first arrival each event comes again."""
    return [
        bodies.index(body, place + 1) - place
        for place, body in enumerate(bodies)
        if bodies.index(body) == place
    ]


def test_a_shuffled_series_has_each_event_twice_in_the_same_order_each_time() -> None:
    """Ids are fresh each time, so the order shows in where the first of each comes again."""
    one, other = (series(Mix.SHUFFLED, 100) for _ in range(2))

    for bodies, events in (one, other):
        assert len(bodies) == 100
        assert list(Counter(bodies).values()) == [2] * events == [2] * 50
    assert distances(one[0]) == distances(other[0])
    assert len(set(distances(one[0]))) > 10


def test_a_repeated_series_comes_as_a_whole_behind_itself() -> None:
    bodies, events = series(Mix.REPEATED, 10)

    assert events == 10
    assert bodies[:10] == bodies[10:]
    assert len(set(bodies)) == 10


def test_a_fresh_series_has_no_event_twice() -> None:
    bodies, events = series(Mix.FRESH, 10)

    assert events == len(bodies) == len(set(bodies)) == 10


def test_the_rate_is_that_of_the_inner_tenths() -> None:
    """A start that takes ten seconds and a slow end are in the outer ones."""
    whole = falling(10.0, 1000, per_s=500.0, cpu_us=20.0)
    slow_end = [seen._replace(at_s=seen.at_s + 100) for seen in whole if seen.ready < 50]
    seen = [Progress(0.0, 1000, 0.0), *(s for s in whole if s.ready >= 50), *slow_end]

    assert tuple(rate(seen, 1000)) == pytest.approx((500.0, 20.0))


def test_what_the_prefetch_window_takes_at_once_does_not_count() -> None:
    """400 of 1,000 leave the queue before the first ack."""
    window = [Progress(0.0, 1000, 0.0), Progress(0.001, 700, 0.0), Progress(0.002, 600, 0.0)]
    seen = [*window, *falling(5.0, 600, per_s=100.0, cpu_us=50.0)]

    assert tuple(rate(seen, 1000, prefetch=400)) == pytest.approx((100.0, 50.0))
    assert rate(seen, 1000).events_per_s != pytest.approx(100.0)


def test_each_of_two_series_has_its_own_rate() -> None:
    first = [s._replace(ready=s.ready + 1000) for s in falling(0.0, 1000, 100.0, 10.0)]
    seen = [*first, *falling(10.0, 1000, 400.0, 2.0)]

    assert tuple(rate(seen, 1000, behind=1000)) == pytest.approx((100.0, 10.0))
    assert tuple(rate(seen, 1000)) == pytest.approx((400.0, 2.0))


def test_a_staircase_is_measured_from_edge_to_edge() -> None:
    """Acks come 90 at a time: a step cut in two would give up to a ninth too much or too little."""
    assert tuple(rate(falling(0.0, 1000, 100.0, 10.0, step=90), 1000)) == pytest.approx(
        (100.0, 10.0)
    )


def test_too_few_samples_give_no_rate() -> None:
    seen = [Progress(0.0, 1000, 0.0), Progress(1.0, 500, 0.1), Progress(2.0, 0, 0.2)]

    with pytest.raises(NotMeasuredError):
        rate(seen, 1000)


def test_a_latency_begins_when_its_event_was_due() -> None:
    """Event 3 of 2/s is due 1.5 s after the start, whenever sent; the first second is out."""
    recorded_s = {0: 1000.5, 1: 1000.6, 2: 1001.25, 3: 1002.0}

    assert latencies_ms(2, 4, 1000.0, recorded_s) == pytest.approx([250.0, 500.0])


def test_the_rate_reached_counts_intervals_and_not_events() -> None:
    """Eleven events, one each tenth of a second, take one second."""
    assert reached_per_s(11, 1.0) == 10.0


def test_each_of_etcds_metrics_is_read_by_its_whole_name() -> None:
    found = gauges_of(PAGE)

    assert found.written == 300_002
    assert found.memory == 360_534_016
    assert found.leases == 26
    assert found.transactions == 12
    assert gauges_of("").written == 0


@pytest.mark.parametrize("size", [0, 1, REQUEST.index(b"1234"), len(REQUEST) - 1])
def test_a_request_that_has_not_arrived_whole_is_waited_for(size: int) -> None:
    assert after_request(REQUEST[:size]) is None


def test_what_follows_a_request_is_the_next_one() -> None:
    assert after_request(REQUEST) == b""
    assert after_request(REQUEST + b"POST") == b"POST"


@pytest.mark.parametrize(("path", "ms"), [(b"/0", 0), (b"/100", 100), (b"/n", 0), (b"/", 0)])
def test_the_path_says_after_how_many_milliseconds_to_answer(path: bytes, ms: int) -> None:
    assert asked_ms(REQUEST.replace(b"/n", path)) == ms
