"""How long after its record a duplicate came, and how often that is asked for."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from fakes.events import Pure, body
from idempotent_consumer.duplicates import BOUNDS_S
from idempotent_consumer.event import decode
from idempotent_consumer.handlers import Handler
from idempotent_consumer.ledger import records
from idempotent_consumer.settings import Settings
from idempotent_consumer.testing.etcd import REQUEST_LOST
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.process import Process
from idempotent_consumer.testing.store import Store

NOW_S = 1_800_000_000.0


class Clock:
    """The clock of the process."""

    def __init__(self) -> None:
        self.now_s = NOW_S


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now_s)
    return clock


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def process(loop: ManualLoop) -> Process:
    return start(loop, Store(loop.now_s))


def start(loop: ManualLoop, store: Store, **settings: Any) -> Process:
    process = Process(
        loop,
        store,
        {"new_order": Handler(Pure())},
        settings=Settings(**{"enable_etcd": True, **settings}),
    )
    process.open()
    return process


def recorded(process: Process, event: bytes, time: str, state: str = records.DONE) -> None:
    """Let another process have recorded an event."""
    value = records.encode(state, decode(event).digest, "b" * 32 + "/1/1", time)
    process.store.put(f"/service/order/{decode(event).id}", value)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def ages(process: Process) -> tuple[int, float]:
    document = process.consumer.duplicates.document
    return document["read"], document["oldest_s"]


def timed(process: Process) -> int:
    return process.metrics.timings.count("orders_duplicate_age")


def test_one_that_etcd_was_asked_about_is_as_old_as_its_record(process: Process) -> None:
    recorded(process, body("1"), at(NOW_S - 93))
    process.deliver(body("1"))
    assert ages(process) == (1, 93.0)
    assert process.consumer.duplicates.document["within"] == {
        name: int(bound_s >= 93) for name, bound_s in BOUNDS_S.items()
    }
    assert timed(process) == 1
    assert process.count("processed_skipped") == 1


def test_of_those_that_the_cache_knows_one_a_second_is_read(
    process: Process, loop: ManualLoop, clock: Clock
) -> None:
    process.deliver(body("1"), body("2"))
    clock.now_s += 7200
    for _ in range(3):
        process.deliver(body("1"), body("2"), body("1"))
    assert ages(process) == (1, 7200.0)
    assert len(process.etcd.sent("Txn")) == 2, "the incarnation, and the batch"
    loop.advance(1.0)
    process.deliver(body("2"), body("2"))
    assert ages(process) == (2, 7200.0)
    assert timed(process) == 2
    assert process.count("processed_skipped") == 11


def test_the_oldest_is_kept(process: Process) -> None:
    for event_id, age_s in (("1", 5.0), ("2", 86_400.0), ("3", 61.0)):
        recorded(process, body(event_id), at(NOW_S - age_s))
        process.deliver(body(event_id))
    assert ages(process) == (3, 86_400.0)
    within = process.consumer.duplicates.document["within"]
    assert (within["1s"], within["10s"], within["10m"], within["1d"]) == (0, 1, 2, 3)


def test_clocks_that_differ_give_no_negative_age(process: Process) -> None:
    recorded(process, body("1"), at(NOW_S + 60))
    process.deliver(body("1"))
    assert ages(process) == (1, 0.0)


@pytest.mark.parametrize("time", ["", "yesterday", "9999-99-99T00:00:00+00:00"])
def test_a_record_without_a_readable_time_says_nothing(process: Process, time: str) -> None:
    recorded(process, body("1"), time)
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1


def test_one_whose_record_has_gone_is_skipped_by_the_cache_and_has_no_age(process: Process) -> None:
    process.deliver(body("1"))
    process.store.delete("/service/order/1")
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1


def test_a_reading_that_fails_holds_nothing_up(process: Process, loop: ManualLoop) -> None:
    process.deliver(body("1"))
    process.etcd.script("Range", REQUEST_LOST)
    process.deliver(body("1"))
    assert ages(process) == (0, 0.0)
    assert process.count("processed_skipped") == 1
    assert process.bus.in_hand == 0
    loop.advance(10)
    assert "etcd" not in process.health.missing, "the guard's next reading has cleared it"


def test_an_event_of_this_process_whose_answer_was_lost_is_no_duplicate(process: Process) -> None:
    process.etcd.script("Txn", REQUEST_LOST)
    process.deliver(body("1"))
    process.loop.advance(10)
    assert process.count("processed") == 1
    assert ages(process) == (0, 0.0)


def test_without_etcd_there_are_no_ages(loop: ManualLoop) -> None:
    process = start(loop, Store(loop.now_s), enable_etcd=False)
    process.deliver(body("1"), body("1"))
    assert ages(process) == (0, 0.0)
