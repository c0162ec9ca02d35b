"""A service's records, counted and read."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fakes.operator import Operator
from idempotent_consumer import cache
from idempotent_consumer.cli.etcd import Records


@pytest.mark.parametrize("number", [0, 1, 7, 8, 100])
def test_all_states_are_counted_page_by_page(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record once, whatever its id, and nothing of another service."""
    monkeypatch.setattr(cache, "PAGE_RECORDS", 4)
    rng, operator = random.Random(number), Operator()
    expected = Counter[str]()
    for index in range(number):
        state = rng.choice(["done", "claimed", "released"])
        expected[state] += 1
        prefix = rng.choice(["é", "0/", "zz", "order-"])
        operator.has_record("order", f"{prefix}{index}", state=state)
    operator.has_record("orders", "1")
    operator.has_record("order0", "1")
    records = Records(operator.etcd, "order")
    assert records.states() == expected
    assert records.count() == number


def test_a_page_does_not_see_what_is_written_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "PAGE_RECORDS", 4)
    operator = Operator()
    for index in range(20):
        operator.has_record("order", f"{index:02}")

    def write() -> None:
        operator.meanwhile = lambda: None
        operator.has_record("order", "99")

    operator.meanwhile = write
    assert Records(operator.etcd, "order").states() == {"done": 20}
