"""How long after its record a duplicate came, and how often that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from fakes.events import Pure, body
from fakes.world import OrderProcess, World
from idempotent_consumer import records
from idempotent_consumer.calls import Handler
from idempotent_consumer.event import decode
from idempotent_consumer.metrics import BOUNDS_S
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import REQUEST_LOST

NOW_S = 1_800_000_000.0


@pytest.fixture
def world() -> Iterator[World]:
    world = World(NOW_S)
    yield world
    world.close()


@pytest.fixture
def process(world: World) -> OrderProcess:
    return world.start(Handler(Pure()))


def recorded(process: OrderProcess, event: bytes, time: str, state: str = records.DONE) -> None:
    """Let another process have recorded an event."""
    value = records.encode(state, decode(event).digest, "b" * 32 + "/1/1", time)
    process.store.put(f"/service/order/{decode(event).id}", value)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def ages(process: OrderProcess) -> tuple[int, float]:
    document = process.running.duplicates.document
    return document["read"], document["oldest_s"]


def timed(process: OrderProcess) -> int:
    return process.metrics.timings.count("orders_duplicate_age")


def test_one_that_etcd_was_asked_about_is_as_old_as_its_record(process: OrderProcess) -> None:
    recorded(process, body("1"), at(NOW_S - 93))
    process.deliver(body("1"))
    assert ages(process) == (1, 93.0)
    assert process.running.duplicates.document["within"] == {
        name: int(bound_s >= 93) for name, bound_s in BOUNDS_S.items()
    }
    assert timed(process) == 1
    assert process.count("processed_skipped") == 1


def test_of_those_that_the_cache_knows_one_a_second_is_read(
    process: OrderProcess, world: World
) -> None:
    process.deliver(body("1"), body("2"))
    world.skip(7200)
    for _ in range(3):
        process.deliver(body("1"), body("2"), body("1"))
    assert ages(process) == (1, 7200.0)
    assert len(process.etcd.sent("Txn")) == 2, "the incarnation, and the batch"
    world.advance(1.0)
    process.deliver(body("2"), body("2"))
    assert ages(process) == (2, 7201.0)
    assert timed(process) == 2
    assert process.count("processed_skipped") == 11


def test_the_oldest_is_kept(process: OrderProcess) -> None:
    for event_id, age_s in (("1", 5.0), ("2", 86_400.0), ("3", 61.0)):
        recorded(process, body(event_id), at(NOW_S - age_s))
        process.deliver(body(event_id))
    assert ages(process) == (3, 86_400.0)
    within = process.running.duplicates.document["within"]
    assert (within["1s"], within["10s"], within["10m"], within["1d"]) == (0, 1, 2, 3)


def test_clocks_that_differ_give_no_negative_age(process: OrderProcess) -> None:
    recorded(process, body("1"), at(NOW_S + 60))
    process.deliver(body("1"))
    assert ages(process) == (1, 0.0)


@pytest.mark.parametrize("time", ["", "yesterday", "9999-99-99T00:00:00+00:00"])
def test_a_record_without_a_readable_time_says_nothing(process: OrderProcess, time: str) -> None:
    recorded(process, body("1"), time)
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1


def test_one_whose_record_has_gone_is_skipped_by_the_cache_and_has_no_age(
    process: OrderProcess,
) -> None:
    process.deliver(body("1"))
    process.store.delete("/service/order/1")
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1


def test_a_reading_that_fails_holds_nothing_up(process: OrderProcess, world: World) -> None:
    process.deliver(body("1"))
    process.etcd.script("Range", REQUEST_LOST)
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1
    assert process.in_hand == 0
    world.advance(10)
    assert "etcd" not in process.health.missing, "the guard's next reading has cleared it"


def test_an_event_of_this_process_whose_answer_was_lost_is_no_duplicate(
    world: World, process: OrderProcess
) -> None:
    process.etcd.script("Txn", REQUEST_LOST)
    process.deliver(body("1"))
    world.advance(10)
    assert process.count("processed") == 1
    assert ages(process) == (0, 0.0)


def test_without_etcd_there_are_no_ages(world: World) -> None:
    process = world.start(Handler(Pure()), settings=Settings())
    process.deliver(body("1"), body("1"))
    assert ages(process) == (0, 0.0)
