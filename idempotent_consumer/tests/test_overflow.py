"""A cache that is smaller than what is done: it forgets, and nothing is done twice for that."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fakes.events import Claimed, Pure, body
from idempotent_consumer.handlers import Handler
from idempotent_consumer.ledger.cache import Cache
from idempotent_consumer.testing.loop import ManualLoop
from idempotent_consumer.testing.process import Process
from idempotent_consumer.testing.store import Store

EVENTS = 200
ENTRIES = 20


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def store(loop: ManualLoop) -> Store:
    return Store(loop.now_s)


def start(loop: ManualLoop, store: Store, handler: Handler) -> Process:
    process = Process(loop, store, {"new_order": handler}, cache=Cache(ENTRIES))
    process.open()
    return process


def shuffled_ids(seed: int) -> list[str]:
    ids = [str(number) for number in range(EVENTS)]
    random.Random(seed).shuffle(ids)
    return ids


@pytest.mark.parametrize("seed", range(3))
def test_what_is_forgotten_is_asked_for_and_skipped(
    loop: ManualLoop, store: Store, seed: int
) -> None:
    handler = Pure()
    process = start(loop, store, Handler(handler))
    for event_id in (*map(str, range(EVENTS)), *shuffled_ids(seed), *shuffled_ids(seed + 100)):
        process.deliver(body(event_id))
    assert process.count("processed") == EVENTS
    assert process.count("processed_skipped") == 2 * EVENTS
    assert set(Counter(change.key for change in store.puts("/")).values()) == {1}
    assert len(handler.seen) > EVENTS, "some were forgotten, else this proves nothing"
    process.assert_all_counted()


def test_the_other_body_of_a_forgotten_event_is_a_conflict(loop: ManualLoop, store: Store) -> None:
    process = start(loop, store, Handler(Pure()))
    process.deliver(*(body(str(number)) for number in range(EVENTS)))
    process.deliver(*(body(str(number), other=True) for number in range(EVENTS)))
    assert process.count("conflicted") == EVENTS
    assert len(store.puts("/service/")) == EVENTS


def test_a_forgotten_call_is_not_made_again(loop: ManualLoop, store: Store) -> None:
    claimed = Claimed()
    process = start(loop, store, Handler(claimed, timeout_s=5))
    for event_id in (*map(str, range(EVENTS)), *shuffled_ids(0)):
        process.deliver(body(event_id))
        process.work()
    assert Counter(claimed.calls) == dict.fromkeys(map(str, range(EVENTS)), 1)
    assert process.count("processed_skipped") == EVENTS
